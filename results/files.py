"""AT THE MERGE this file goes: say, run_program and ranged are for engine.console, the rest for engine.folder."""
import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import engine
from data import UserError


def say(text: str = "") -> None:
    if engine.is_main():
        print(text, flush=True)


def append(path: Path, rows: Iterable[dict]) -> None:
    if engine.is_main():
        engine.append(path, rows)


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


def run_program(work: Callable[[], object], again: str, memory: str = "", readers_may_leave: bool = False) -> int:
    """The exit code of a program that does `work`: whatever a user can meet becomes one sentence, told once.
    (For engine.console: edge_grpo.main can use it as well. `again` says how to go on, `memory` what needs less.)"""
    try:
        with engine.one_error():
            work()
            engine.stop_processes()
            return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:                     # `| head` has read enough; Python would complain again at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0 if readers_may_leave else 141                          # an evaluation it ended is not complete
    except OSError as error:
        print(f"error: {error.filename or 'output'}: {error.strerror}; choose another path, or make room and give the "
              "same command again", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not engine.is_out_of_memory(error):
            raise
        print(f"error: out of memory ({engine.first_line(error)}): {memory}; {again}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; {again}", file=sys.stderr)
        return 130


def ranged(kind: type, low: float, high: float = sys.float_info.max) -> Callable:
    """An argparse type: a number of that kind in [low, high]."""
    def parse(text: str):
        if not low <= kind(text) <= high:
            bounds = f"at least {low}" if high == sys.float_info.max else f"between {low} and {high}"
            raise argparse.ArgumentTypeError(f"{text} must be {bounds}")
        return kind(text)
    parse.__name__ = kind.__name__                   # argparse names it in "invalid int value"
    return parse
