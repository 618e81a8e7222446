"""A dataclass of flags as a command line: each field carries its line of help, its range and its
section of --help.

(transformers' HfArgumentParser would need as many lines for ranges, sections, and defaults that a
method changes.)"""

import argparse
import difflib
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, field, fields
from functools import partial
from pathlib import Path
from typing import NoReturn

from errors import UserError

# Flags that may change on --resume: they affect memory and bookkeeping, not results.
MAY_CHANGE = set(
    "resume overwrite device out save_every keep log mirror max_rows drafts micro_batch_tokens "
    "gradient_checkpointing offload_optimizer save_tokens trust_remote_code".split()
)


def flag(default, help: str, *, low=None, high=None, choices=None, names=None, section=None):
    """A dataclass field that is a flag.

    low, high: the closed range of its value, or of each value of a list.
    names: what --help calls the values of a list: a tuple if their number is fixed, else a string.
    section: the heading of --help that begins with this flag; it holds for those after it.
    """
    metadata = dict(help=help, low=low, high=high, choices=choices, names=names, section=section)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def option(name: str) -> str:
    """A field as it is written on the command line."""
    return "--" + name.replace("_", "-")


def changed(flags, defaults: dict) -> dict:
    """The flags that differ from their default, which is that in `defaults` or else the
    dataclass's."""
    expected = asdict(type(flags)()) | defaults
    return {name: value for name, value in asdict(flags).items() if value != expected[name]}


def run_name(flags, differing: dict) -> str:
    """MODEL-METHOD-FLAGS-seedN. FLAGS are those that make it another experiment than METHOD
    alone."""
    parts = [Path(flags.model).resolve().name or "model", flags.method]
    for name, value in differing.items():
        if name not in MAY_CHANGE | {"model", "method", "seed"}:
            parts.append(re.sub(r"[^\w.]+", "-", f"{name}-{value}").rstrip("-"))
    return "-".join([*parts, f"seed{flags.seed}"])


def wrong_flag(message: str, parser: argparse.ArgumentParser | None = None) -> NoReturn:
    """For ArgumentParser.error: its complaint as one sentence, with the flag that was probably
    meant."""
    if parser and message.startswith("unrecognized"):
        for word in re.findall(r"--\S+", message):
            for name in difflib.get_close_matches(word, parser._option_string_actions, 1):
                message += f"; did you mean {name}?"
    raise UserError(f"{message} (--help lists every flag)")


def end_if_unreadable(read: Callable[[list[str]], object]) -> None:
    """End the program with one sentence and code 2 if `read` refuses its command line.

    For the top of a program, before imports that take seconds. Of several processes under torchrun
    the first one prints the sentence."""
    try:
        read(sys.argv[1:])
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def make_parser(
    kind: type, defaults: dict, description: str, usage: str
) -> argparse.ArgumentParser:
    """A parser with one option for each field of the dataclass; `defaults` overrides some of
    theirs.

    --help shows the default in force and, where that is not the dataclass's, also the paper's."""
    parser = argparse.ArgumentParser(
        description=description,
        usage=usage,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = partial(wrong_flag, parser=parser)
    section = parser
    for f in fields(kind):
        if f.metadata["section"]:
            section = parser.add_argument_group(f.metadata["section"])
        paper = getattr(kind(), f.name)
        default = defaults.get(f.name, paper)
        shown = as_text(default)
        if default != paper:
            shown += f" (paper: {as_text(paper)})"
        help = f"{f.metadata['help']} [{shown}]".replace("%", "%%")
        section.add_argument(option(f.name), default=default, help=help, **value_of(f))
    return parser


def as_text(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def value_of(f) -> dict:
    """How argparse reads the value of a field."""
    names, choices = f.metadata["names"], f.metadata["choices"]
    if names:
        count = len(names) if isinstance(names, tuple) else "*"
        return dict(type=f.type.__args__[0], metavar=names, nargs=count)
    if f.type is bool:
        return dict(action=argparse.BooleanOptionalAction)
    if choices:
        return dict(type=f.type, choices=choices)
    return dict(type=f.type, metavar=f.type.__name__.upper())


def check_ranges(flags) -> None:
    """Raise UserError for a value out of its range."""
    for f in fields(flags):
        value = getattr(flags, f.name)
        low, high = f.metadata["low"], f.metadata["high"]
        if value is None:
            continue
        for v in value if isinstance(value, list) else [value]:
            if isinstance(v, float) and not math.isfinite(v):
                raise UserError(f"{option(f.name)} {v}: must be a finite number")
            if (low is not None and v < low) or (high is not None and v > high):
                bounds = f"at least {low}" if high is None else f"between {low} and {high}"
                raise UserError(f"{option(f.name)} {v}: must be {bounds}")
