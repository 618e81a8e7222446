"""The commands of eval.py that read runs: plot, compare, show and pack."""

import argparse
import sys
from pathlib import Path

from engine.flags import wrong_flag
from report import compare, plot, runs, show

RUN = """a folder of edge_grpo.py or of results of eval.py, a folder of such folders, or packed
    runs: FILE.jsonl.xz or 'FILE.jsonl.xz/GLOB'"""


def run_command(argv: list[str]) -> str:
    """Run one of COMMANDS with its flags, as eval.py got them; return what is to be printed."""
    name, *given = argv
    flags = parse_flags(name, given)
    if name == "compare":
        return compare.comparison(runs.read_runs(flags.runs), flags.against)
    if name == "plot":
        return "\n".join(map(str, plot.draw(runs.read_runs(flags.runs), flags.out)))
    if name == "pack":
        runs.pack(flags.out, flags.runs)
        return str(flags.out)
    rows = show.find_group(flags.run, flags.step, flags.question)
    if not flags.html:
        return show.as_text(rows, colour=sys.stdout.isatty())
    flags.html.write_text(show.as_page(rows), encoding="utf-8")
    return str(flags.html)


def parse_flags(name: str, argv: list[str]) -> argparse.Namespace:
    """Parse the flags of a command. Raises UserError."""
    parser = argparse.ArgumentParser(prog=f"eval.py {name}", allow_abbrev=False)
    parser.error = wrong_flag
    add = parser.add_argument
    if name == "show":
        add("run", type=Path, help="a folder of edge_grpo.py")
        add("--step", type=int, help="[the last]")
        add("--question", type=int, default=1, help="which question of the step [1]")
        add("--html", type=Path, help="file for a page with each token shaded by its entropy")
        return parser.parse_args(argv)
    add("runs", nargs="+", metavar="RUN", help=RUN)
    if name == "compare":
        add("--against", metavar="LABEL", help="also print paired differences to this label")
    if name == "plot":
        add("--out", type=Path, default=Path("figures"), help="folder of the PNGs [figures]")
    if name == "pack":
        add("--out", type=Path, required=True, help="the file to write, NAME.jsonl.xz")
    return parser.parse_args(argv)
