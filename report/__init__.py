"""This package looks at runs: `eval.py plot`, `compare`, `show` and `pack`, and report.md."""

import argparse
import sys
from pathlib import Path

from engine.flags import wrong_flag
from report import compare, plot, runs, show

COMMANDS = ("plot", "compare", "show", "pack")


def command(argv: list[str]) -> str:
    """Run one of COMMANDS with its flags, as eval.py got them; return what is to be printed."""
    name = argv[0]
    flags = parse_flags(name, argv[1:])
    if name == "compare":
        return compare.comparison(runs.read_runs(flags.runs), flags.against)
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


def parse_flags(name: str, argv: list[str]) -> argparse.Namespace:
    """Parse the flags of a command. Raises UserError."""
    parser = argparse.ArgumentParser(prog=f"eval.py {name}", allow_abbrev=False)
    parser.error = wrong_flag
    add = parser.add_argument
    run = "a folder of edge_grpo.py, or of results of eval.py"
    if name == "show":
        add("runs", nargs=1, metavar="RUN", help=run)
        add("--step", type=int, help="[the last]")
        question = "which question of the step, or problem of the results [1]"
        add("--question", type=int, default=1, help=question)
        page = "write a page with each token shaded by its entropy"
        add("--html", metavar="FILE", type=Path, help=page)
    else:
        packed = "; or packed runs: FILE.jsonl.xz or 'FILE.jsonl.xz/GLOB'"
        add("runs", nargs="+", metavar="RUN", help=run + packed)
    if name == "compare":
        against = "a label of the table: also print the paired differences to it, over seeds"
        add("--against", metavar="LABEL", help=against)
    if name == "plot":
        add("--out", type=Path, default=Path("figures"), help="folder of the PNGs [figures]")
    if name == "pack":
        add("--out", type=Path, required=True, help="the file of packed runs, NAME.jsonl.xz")
    return parser.parse_args(argv)
