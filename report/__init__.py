"""Evidence out: the code that reads, compares and draws runs, and the packed evidence with its report (README.md)."""

import argparse
import sys
from pathlib import Path

from engine.flags import wrong_flag
from report import compare, plot, runs, show

COMMANDS = ("plot", "compare", "show", "pack")


def command(argv: list[str]) -> str:
    """`plot`, `compare`, `show` or `pack` and their flags, as eval.py got them; returns what is to be printed."""
    name = argv[0]
    parser = argparse.ArgumentParser(prog=f"eval.py {name}", allow_abbrev=False)
    parser.error, add = wrong_flag, parser.add_argument
    add(
        "runs",
        nargs=1 if name == "show" else "+",
        metavar="RUN",
        help="a folder of edge_grpo.py or of results of "
        "eval.py; but for show also packed runs: FILE.jsonl.xz or 'FILE.jsonl.xz/GLOB'",
    )
    if name == "show":
        add("--step", type=int, help="[the last]")
        add(
            "--question",
            type=int,
            default=1,
            help="which question of the step, or problem of the results [1]",
        )
        add(
            "--html",
            metavar="FILE",
            type=Path,
            help="write a page with each token shaded by its entropy",
        )
    if name == "compare":
        add("--format", choices=["markdown", "csv", "latex"], default="markdown", help="[markdown]")
    if name == "plot":
        add("--out", type=Path, default="figures", help="folder of the PNGs [figures]")
    if name == "pack":
        add("--out", type=Path, required=True, help="the file of packed runs, NAME.jsonl.xz")
    flags = parser.parse_args(argv[1:])
    if name == "compare":
        return compare.comparison(runs.read_runs(flags.runs), flags.format)
    if name == "plot":
        return "\n".join(map(str, plot.draw(runs.read_runs(flags.runs), flags.out)))
    if name == "pack":
        runs.pack(flags.out, flags.runs)
        return str(flags.out)
    rows = show.find_group(Path(flags.runs[0]), flags.step, flags.question)
    if not flags.html:
        return show.as_text(rows, colour=sys.stdout.isatty())
    flags.html.write_text(show.as_page(rows), encoding="utf-8")
    return str(flags.html)
