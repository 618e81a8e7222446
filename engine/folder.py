"""A folder that a program writes its results to: one program at a time, nothing half-written, one reader of JSON."""

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
    """Make a folder, and lock it until the file that is returned is closed. UserError if another process has."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # any other: a file system without locks
        if isinstance(error, (BlockingIOError, PermissionError)):
            raise UserError(
                f"--out {folder}: another process is at work in it; wait until it has ended, or give "
                "another --out"
            ) from None
    return file


def append(path: Path, rows: Iterable[dict]) -> None:
    """Append rows to a JSONL file, on the main process. JSON has no NaN and no infinities: they become null."""
    if not is_main():
        return

    def finite(value: object) -> object:
        value = [finite(v) for v in value] if isinstance(value, list) else value
        return None if isinstance(value, float) and not math.isfinite(value) else value

    try:
        with open(path, "a", encoding="utf-8") as f:
            f.writelines(json.dumps({k: finite(v) for k, v in row.items()}) + "\n" for row in rows)
    except OSError as error:  # that of a write does not name the file
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_json(path: Path, text: bytes | None = None, line: int = 1, **kinds: type | tuple) -> dict:
    """The object in a JSON file (or in `text`, which begins at a line of it) whose keys hold values of these kinds.
    UserError for any other content; but a file that is not there, or cannot be read, is an OSError."""
    try:
        content, wrong = json.loads(path.read_bytes() if text is None else text), "no JSON object"
        if isinstance(content, dict):
            wrong = ", ".join(
                f"no usable {k}"
                for k, kind in kinds.items()
                if not isinstance(content.get(k), kind)
            )
    except (ValueError, RecursionError) as error:
        line, wrong = line + getattr(error, "lineno", 1) - 1, "not valid JSON"
    if wrong:
        raise UserError(f"{path}:{line}: {wrong}; restore the file, or take another folder")
    return content


def read_lines(path: Path, **kinds: type | tuple) -> tuple[list[dict], int]:
    """The objects of a JSONL file, each as in read_json (none if there is no file), and the bytes of its whole lines: a
    last line that an interruption cut off is left out."""
    try:
        whole = path.read_bytes().rpartition(b"\n")[0]
    except FileNotFoundError:
        whole = b""
    lines = whole.split(b"\n") if whole else []
    return [read_json(path, text, n, **kinds) for n, text in enumerate(lines, start=1)], len(
        whole
    ) + bool(whole)


def write_json(path: Path, content: dict) -> None:
    """Written beside, flushed and renamed: the file is the old one or the new one, never half of one."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    flush(unfinished)
    unfinished.replace(path)
    flush(path.parent)


def publish(unfinished: Path, target: Path) -> None:
    """Flush every file to the disk, then give the folder its name in one move."""
    for path in [*unfinished.rglob("*"), unfinished]:
        flush(path)
    remove(target)
    unfinished.rename(target)
    flush(target.parent)


def flush(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    os.fsync(descriptor := os.open(path, os.O_RDONLY))
    os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a folder, a file, or a link (never what it leads to); nothing if there is none."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
