"""A folder that a program writes its results to: one program at a time, and nothing half-written."""
import fcntl
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from data import UserError
from engine.processes import is_main


def claim(folder: Path) -> IO:
    """Make a folder, and keep other processes from working in it until the file that is returned is closed.

    Raises UserError if another one is at work there, for example a job that was started anew before its last attempt
    had ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"--out {folder}: another process is at work in it; wait until it has ended, or give another "
                        "--out") from None
    except OSError:                                             # a file system without locks
        pass
    return file


def append(path: Path, rows: Iterable[dict]) -> None:
    """Append rows to a JSONL file, on the main process. JSON has no NaN and no infinities: they become null. An error
    names the file, which that of a write does not."""
    def finite(value: object) -> object:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    if not is_main():
        return
    try:
        with open(path, "a", encoding="utf-8") as f:
            f.writelines(json.dumps({k: finite(v) for k, v in row.items()}) + "\n" for row in rows)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_lines(path: Path) -> tuple[list[dict], int]:
    """The JSON objects of a JSONL file (none if there is no file), and the length in bytes of its whole lines: a last
    line that an interruption cut off is left out. UserError for a broken line before it."""
    whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    rows = []
    for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise UserError(f"{path}:{number}: not valid JSON; delete that line, or take another folder") from None
    return rows, len(whole) + bool(whole)


def read_json(path: Path) -> dict:
    """The content of a JSON file. UserError for one that is damaged."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        raise UserError(f"{path}:{line}: not valid JSON; leave that folder out, or delete the file") from None


def write_json(path: Path, content: dict) -> None:
    """Written beside and renamed: the file is the old one or the new one, never half of one."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def publish(unfinished: Path, target: Path) -> None:
    """Flush every file to the disk, then give the folder its name in one move."""
    for path in [*unfinished.rglob("*"), unfinished]:
        flush(path)
    unfinished.rename(target)
    flush(target.parent)


def flush(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
