"""Prints the tables of results/smollm2/README.md from the packed runs.

    python -m results.smollm2.tables
    python -m results.smollm2.tables --write    # puts them below each <!-- table NAME -->

A run is evaluated with 4 responses to each of 300 problems. Differences between two arms are paired
by seed and problem. Their standard error is given twice: over seeds, and over problems (of the mean
over seeds), which does not see that another seed would have trained another model.
"""

import statistics
import sys
from pathlib import Path

import numpy

from results.tables import Runs, load, markdown, mean_and_std, mean_of, put_in

HERE = Path(__file__).parent
N = 4  # responses to a problem
ARMS = [
    ("before the warm start, 30 problems", "base"),
    ("warm start", "warm-start"),
    ("GRPO", "grpo"),
    ("EDGE-GRPO", "edge"),
    ("no EDA, references × w", "times-w"),
    ("SFT goes on", "sft"),
    ("GRPO, a random reward", "random"),
    ("GEC without answers, no EDA", "gec-reflect"),
]
PAIRS = [("edge", "grpo"), ("edge", "times-w"), ("times-w", "grpo"), ("sft", "edge")]
KINDS = ("right", "wrong", "reflect", "answer", "reference")


def result(packed: dict) -> dict:
    """The evaluation on the test problems."""
    for summary in packed["summaries"]:
        if summary["n"] == N:
            [by_temperature] = summary["results"].values()
            [task] = by_temperature["tasks"].values()
            return task
    raise KeyError(packed["name"])


def percents(packed: dict) -> list[float]:
    """Percent of right responses to each problem."""
    return [100 * right / N for right in result(packed)["right"]]


def mean_over(seeds: dict[int, dict], key: str, steps: slice = slice(None)) -> float | None:
    """The mean of a metric over the steps, and then over the seeds that have it."""
    means = [mean_of(packed, key, steps) for packed in seeds.values()]
    known = [mean for mean in means if mean is not None]
    return statistics.fmean(known) if known else None


def arms(runs: Runs) -> str:
    rows = []
    for label, name in ARMS:
        seeds = runs.get(name)
        if seeds is None:
            continue
        tasks = [result(packed) for packed in seeds.values()]
        accuracy = mean_and_std([100 * task["accuracy"] for task in tasks])
        boxed = 100 * statistics.fmean(task["format"] for task in tasks)
        row = [label, str(len(seeds)), accuracy, f"{boxed:.0f}"]
        before = mean_over(seeds, "mixed_groups")
        after = mean_over(seeds, "mixed_groups_corrected")
        row.append("–" if before is None else f"{before:.2f} → {after:.2f}")
        seconds = 0.0
        for phase in ("sample", "correct", "update"):
            seconds += mean_over(seeds, f"seconds_{phase}") or 0.0
        row.append("–" if before is None else f"{seconds:.0f}")
        rows.append(row)
    header = ["", "seeds", f"avg@{N}, percent", "with a box, percent"]
    return markdown([*header, "mixed groups, sampled → corrected", "s a step"], rows)


def pairs(runs: Runs) -> str:
    rows = []
    labels = {name: label for label, name in ARMS}
    for name, other in PAIRS:
        seeds = sorted(runs.get(name, {}).keys() & runs.get(other, {}).keys())
        if not seeds:
            continue
        by_seed = []  # (problems,) differences for each seed
        for seed in seeds:
            difference = numpy.subtract(percents(runs[name][seed]), percents(runs[other][seed]))
            by_seed.append(difference)
        of_seeds = numpy.mean(by_seed, axis=1).tolist()
        of_problems = numpy.mean(by_seed, axis=0).tolist()
        mean = statistics.fmean(of_seeds)
        over_seeds = "–"
        if len(seeds) > 1:
            error = statistics.stdev(of_seeds) / len(seeds) ** 0.5
            over_seeds = f"{error:.1f} (t = {mean / error:.1f})"
        over_problems = statistics.stdev(of_problems) / len(of_problems) ** 0.5
        rows.append(
            [
                f"{labels[name]} − {labels[other]}",
                " ".join(map("{:+.1f}".format, of_seeds)),
                f"{mean:+.1f}",
                over_seeds,
                f"{over_problems:.1f}",
            ]
        )
    header = ["", "by seed", "mean", "standard error over seeds", "over problems"]
    return markdown(header, rows)


def sees(runs: Runs) -> str:
    """P/mean and share of the sum of |A^| by kind of row, in the first and the last ten steps."""
    rows = []
    for label, name in ARMS:
        if name in ("base", "warm-start", "sft", "random") or name not in runs:
            continue
        for when, steps in (("first 10", slice(10)), ("last 10", slice(-10, None))):
            row = [label, when]
            for kind in KINDS:
                relative = mean_over(runs[name], f"relative_entropy_{kind}", steps)
                share = mean_over(runs[name], f"advantage_share_{kind}", steps)
                row.append("–" if relative is None else f"{relative:.2f}, {share:.2f}")
            rows.append(row)
    return markdown(["P/mean, share of Σ\\|Â\\|", "steps", *KINDS], rows)


def tables() -> dict[str, str]:
    runs = load(HERE / "chains.jsonl.xz")
    return {"arms": arms(runs), "pairs": pairs(runs), "sees": sees(runs)}


if __name__ == "__main__":
    if "--write" in sys.argv:
        readme = HERE / "README.md"
        readme.write_text(put_in(readme.read_text(), tables()))
    else:
        print("\n\n".join(f"## {name}\n\n{table}" for name, table in tables().items()))
