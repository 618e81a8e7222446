"""A folder that a program writes its results to: one program at a time, nothing half-written, one
reader of JSON."""

import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from engine.processes import is_main
from errors import UserError


def claim(folder: Path) -> IO:
    """Make a folder and lock it until the returned file is closed. Raises UserError if another
    process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "a")  # not "w": it may be a link to somebody's file
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(
            f"--out {folder}: another process is at work in it; wait until it has ended, or give "
            "another --out"
        ) from None
    except OSError:  # a file system without locks
        pass
    return file


def append(path: Path, rows: Iterable[dict]) -> None:
    """Append rows to a JSONL file, on the main process."""
    if is_main():
        with open(path, "a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(without_nan(row)) + "\n")


def without_nan(value: object) -> object:
    """JSON has no NaN and no infinities: they become None, also inside dicts and lists."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [without_nan(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_json(path: Path, text: bytes | None = None, line: int = 1, **kinds: type | tuple) -> dict:
    """Return the object in a JSON file, or in `text`, which stands in that file from `line` on.

    kinds: the types that the values of some keys must have. Raises UserError for any other
    content, and OSError for a file that is absent or cannot be read."""
    if text is None:
        text = path.read_bytes()
    try:
        content = json.loads(text)
        problem = "" if isinstance(content, dict) else "no JSON object"
    except (ValueError, RecursionError) as error:
        line += getattr(error, "lineno", 1) - 1
        problem = "not valid JSON"
    if not problem:
        wrong = [k for k, kind in kinds.items() if not isinstance(content.get(k), kind)]
        problem = ", ".join(f"no usable {key}" for key in wrong)
    if problem:
        raise UserError(f"{path}:{line}: {problem}; restore the file, or take another folder")
    return content


def read_lines(path: Path) -> tuple[list[dict], int]:
    """Return the objects of a JSONL file (none if it is absent), and the bytes of its whole lines.

    A last line that an interruption cut off is left out. Raises what read_json raises.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    size = content.rfind(b"\n") + 1
    lines = content[:size].split(b"\n")[:-1]
    rows = [read_json(path, text, number) for number, text in enumerate(lines, start=1)]
    return rows, size


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file. At any moment there is the old file or the new one, never half of it."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    remove(unfinished)  # it may be a link to somebody's file
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    publish(unfinished, path)


def publish(unfinished: Path, target: Path) -> None:
    """Flush a file, or a folder with all in it, to the disk, and then rename it to `target`."""
    for path in [*unfinished.rglob("*"), unfinished]:
        flush(path)
    if target.is_dir():
        remove(target)
    unfinished.replace(target)
    flush(target.parent)


def flush(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a folder, a file, or a link (never what it points to); do nothing if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
