"""Evidence out: the code that reads, compares and draws runs, and the packed evidence with its report (README.md)."""
import argparse
from pathlib import Path

import engine
from results import compare, plot, runs
from results.files import ranged

COMMANDS = ("plot", "compare", "pack")


def command(argv: list[str]) -> str:
    """`plot`, `compare` or `pack` and their flags, as eval.py got them; returns what is to be printed."""
    parser = argparse.ArgumentParser(prog=f"eval.py {argv[0]}", allow_abbrev=False)
    parser.error = engine.wrong_flag
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
