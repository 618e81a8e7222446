"""Evidence out: the code that reads, compares and draws runs, and the packed evidence with its report (README.md)."""
import argparse
from pathlib import Path

from engine.flags import ranged, wrong_flag
from results import compare, plot, runs, show

COMMANDS = ("plot", "compare", "show", "pack")


def command(argv: list[str]) -> str:
    """`plot`, `compare`, `show` or `pack` and their flags, as eval.py got them; returns what is to be printed."""
    parser = argparse.ArgumentParser(prog=f"eval.py {argv[0]}", allow_abbrev=False)
    parser.error = wrong_flag
    if argv[0] == "show":
        parser.add_argument("run", metavar="RUN", help="a folder of edge_grpo.py, or of results of eval.py")
        parser.add_argument("--step", type=ranged(int, 1), help="[the last]")
        parser.add_argument("--question", type=ranged(int, 1), default=1, help="which question of the step, or which problem "
                            "of the results [1]")
        parser.add_argument("--html", metavar="FILE", help="write a page with each token shaded by its entropy")
        flags = parser.parse_args(argv[1:])
        return show.show(Path(flags.run), flags.step, flags.question, flags.html)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of edge_grpo.py or of results of eval.py, or "
                        "packed runs: FILE.jsonl.xz or 'FILE.jsonl.xz/GLOB'")
    if argv[0] == "compare":
        parser.add_argument("--format", choices=["markdown", "csv", "latex"], default="markdown", help="[markdown]")
    if argv[0] == "plot":
        parser.add_argument("--out", default="figures", help="folder of the PNGs [figures]")
        parser.add_argument("--window", type=ranged(int, 0), default=0, help="steps averaged; 0: a 25th of the run [0]")
    if argv[0] == "pack":
        parser.add_argument("--out", required=True, help="the file of packed runs, NAME.jsonl.xz")
    flags = parser.parse_args(argv[1:])
    if argv[0] == "compare":
        return compare.comparison(runs.read_runs(flags.runs), flags.format)
    if argv[0] == "pack":
        runs.pack(Path(flags.out), flags.runs)
        return flags.out
    return "\n".join(map(str, plot.draw(runs.read_runs(flags.runs), Path(flags.out), flags.window)))
