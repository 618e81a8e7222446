"""A dataclass of flags as a command line: each field carries its one line of help and the range of its values."""
import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import field, fields
from typing import NoReturn

from data import UserError

# What may differ when a run goes on, since it does not make it another experiment; memory and bookkeeping only.
MAY_CHANGE = {"resume", "overwrite", "device", "out", "save_every", "keep", "max_bad_steps", "mirror", "max_rows",
              "micro_batch_tokens", "gradient_checkpointing", "offload_optimizer"}


def flag(default, help: str, low=None, high=None, choices=None, names=None):
    """A dataclass field with its one line of help and the closed range of its values. names: what the values of a list
    are called; a tuple for so many, one string for any number."""
    factory = dict(default_factory=lambda: list(default)) if isinstance(default, list) else dict(default=default)
    return field(**factory, metadata=dict(help=help, low=low, high=high, choices=choices, names=names))


def option(name: str) -> str:
    """A field as it is written on the command line."""
    return "--" + name.replace("_", "-")


def wrong_flag(message: str) -> NoReturn:
    """For ArgumentParser.error: its complaint as one sentence, without the page of usage before it."""
    raise UserError(f"{message} (--help lists every flag)")


def make_parser(kind: type, defaults: dict, description: str, usage: str) -> argparse.ArgumentParser:
    """One option for each field of the dataclass; `defaults` overrides some of theirs."""
    parser = argparse.ArgumentParser(description=description, usage=usage, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = wrong_flag
    for f in fields(kind):
        value, names = defaults.get(f.name, getattr(kind(), f.name)), f.metadata["names"]
        shown = " ".join(map(str, value)) if isinstance(value, list) else value
        how = dict(help=f"{f.metadata['help']} [{shown}]".replace("%", "%%"), default=value)
        if names:
            how.update(type=f.type.__args__[0], metavar=names, nargs=len(names) if isinstance(names, tuple) else "*")
        elif f.type is bool:
            how.update(action=argparse.BooleanOptionalAction)
        else:
            choices = f.metadata["choices"]
            how.update(type=f.type, choices=choices, metavar=None if choices else f.type.__name__.upper())
        parser.add_argument(option(f.name), **how)
    return parser


def check_ranges(flags) -> None:
    """UserError for a value out of its range."""
    for f in fields(flags):
        value, low, high, name = getattr(flags, f.name), f.metadata["low"], f.metadata["high"], option(f.name)
        for v in value if isinstance(value, list) else [value]:
            if isinstance(v, float) and not math.isfinite(v):
                raise UserError(f"{name} {v}: must be a finite number")
            if (low is not None and v < low) or (high is not None and v > high):
                bounds = f"at least {low}" if high is None else f"between {low} and {high}"
                raise UserError(f"{name} {v}: must be {bounds}")


def ranged(kind: type, low: float, high: float = sys.float_info.max) -> Callable:
    """An argparse type: a number of that kind in [low, high]."""
    def parse(text: str):
        if not low <= kind(text) <= high:
            bounds = f"at least {low}" if high == sys.float_info.max else f"between {low} and {high}"
            raise argparse.ArgumentTypeError(f"{text} must be {bounds}")
        return kind(text)
    parse.__name__ = kind.__name__                   # argparse names it in "invalid int value"
    return parse
