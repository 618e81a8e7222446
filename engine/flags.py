"""A dataclass of flags as a command line: each field carries its one line of help and the range of its values."""

import argparse
import difflib
import hashlib
import math
import re
from dataclasses import asdict, field, fields
from functools import partial
from pathlib import Path
from typing import NoReturn

from errors import UserError

# What may differ when a run goes on, since it does not make it another experiment; memory and bookkeeping only.
MAY_CHANGE = {
    "resume",
    "overwrite",
    "device",
    "out",
    "save_every",
    "keep",
    "max_bad_steps",
    "mirror",
    "max_rows",
    "micro_batch_tokens",
    "gradient_checkpointing",
    "offload_optimizer",
    "save_tokens",
    "trust_remote_code",
}


def flag(default, help: str, low=None, high=None, choices=None, names=None, section=None):
    """A dataclass field with its one line of help and the closed range of its values. names: what the values of a list
    are called; a tuple for so many, one string for any number."""
    factory = (
        dict(default_factory=lambda: list(default))
        if isinstance(default, list)
        else dict(default=default)
    )
    return field(
        **factory, metadata=dict(help=help, low=low, high=high, choices=choices, names=names)
    )


def option(name: str) -> str:
    """A field as it is written on the command line."""
    return "--" + name.replace("_", "-")


def changed(flags, defaults: dict) -> dict:
    """The flags that are not as `defaults`, or else the dataclass, have them."""
    usual = asdict(type(flags)()) | defaults
    return {name: value for name, value in asdict(flags).items() if value != usual[name]}


def run_name(flags, differing: dict) -> str:
    """MODEL-METHOD-seedN, with each flag between them that makes it another experiment than the method's row."""
    values = "".join(
        f"-{k}-{v}"
        for k, v in differing.items()
        if k not in MAY_CHANGE | {"model", "method", "seed"}
    )
    between = re.sub(r"[^\w.]+", "-", values).rstrip("-")
    if len(between) > 100:  # a name has 255 bytes at the most
        between = f"{between[:90]}-{hashlib.blake2b(between.encode(), digest_size=4).hexdigest()}"
    return f"{Path(flags.model).name}-{flags.method}{between}-seed{flags.seed}"


def wrong_flag(message: str, parser: argparse.ArgumentParser | None = None) -> NoReturn:
    """For ArgumentParser.error: its complaint as one sentence, without the page of usage before it, and with the flag
    that was probably meant, by its name or by the beginning of its help."""
    options = parser._option_string_actions if parser else {}
    known = {re.split("[;:,(]", action.help)[0]: name for name, action in options.items()} | {
        k[2:]: k for k in options
    }
    for word in (
        re.findall(r"--?([A-Za-z][\w-]*)", message) if message.startswith("unrecognized") else ()
    ):
        for meant in difflib.get_close_matches(word, known, 1):
            message += f"; {known[meant]} may be meant"
    raise UserError(f"{message} (--help lists every flag)")


def make_parser(
    kind: type, defaults: dict, description: str, usage: str
) -> argparse.ArgumentParser:
    """One option for each field of the dataclass; `defaults` overrides some of theirs."""
    parser = argparse.ArgumentParser(
        description=description,
        usage=usage,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = partial(wrong_flag, parser=parser)
    for f in fields(kind):
        value, names = defaults.get(f.name, getattr(kind(), f.name)), f.metadata["names"]
        shown = " ".join(map(str, value)) if isinstance(value, list) else value
        how = dict(help=f"{f.metadata['help']} [{shown}]".replace("%", "%%"), default=value)
        if names:
            how.update(
                type=f.type.__args__[0],
                metavar=names,
                nargs=len(names) if isinstance(names, tuple) else "*",
            )
        elif f.type is bool:
            how.update(action=argparse.BooleanOptionalAction)
        else:
            how.update(type=f.type, choices=f.metadata["choices"])
            how.update({} if how["choices"] else dict(metavar=f.type.__name__.upper()))
        parser.add_argument(option(f.name), **how)
    return parser


def check_ranges(flags) -> None:
    """UserError for a value out of its range."""
    for f in fields(flags):
        value, low, high, name = (
            getattr(flags, f.name),
            f.metadata["low"],
            f.metadata["high"],
            option(f.name),
        )
        for v in value if isinstance(value, list) else [] if value is None else [value]:
            if isinstance(v, float) and not math.isfinite(v):
                raise UserError(f"{name} {v}: must be a finite number")
            if (low is not None and v < low) or (high is not None and v > high):
                bounds = f"at least {low}" if high is None else f"between {low} and {high}"
                raise UserError(f"{name} {v}: must be {bounds}")
