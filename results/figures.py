"""Draws the figures of results/README.md from the packed runs, into results/figures/.

python results/figures.py
"""

import statistics

import matplotlib
from tables import CONTROLS, HARD, HERE, KINDS, METHODS, accuracy, load, mean_of

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OUT = HERE / "figures"
COST = [  # (label, run, colour): Okabe and Ito's colours, which the colour-blind can tell apart
    ("GRPO", "grpo", "#0072B2"),
    ("DAPO", "dapo", "#56B4E9"),
    ("EDGE-GRPO", "edge", "#D55E00"),
    ("no EDA, references × 20", "gec-ref20", "#E69F00"),
    ("GEC only", "gec", "#999999"),
    ("GEC, references for answers, no EDA", "gec-no-answers", "#009E73"),
    ("one reference in all-wrong groups", "imitate-neg", "#CC79A7"),
    ("SFT, then GRPO (SFT not counted)", "sft-grpo", "#000000"),
]
WINDOW = 10  # steps


def save(figure, name: str) -> None:
    OUT.mkdir(exist_ok=True)
    figure.savefig(OUT / name, dpi=110)
    plt.close(figure)


def dots(runs: dict, labels: list[tuple[str, str]], name: str, title: str) -> None:
    """One line a method: its seeds as dots, their median as a bar."""
    present = [(label, runs[run]) for label, run in labels if run in runs]
    figure, axis = plt.subplots(figsize=(7.2, 0.6 + 0.34 * len(present)), layout="constrained")
    for y, (_, seeds) in enumerate(reversed(present)):
        values = [accuracy(packed, HARD, 8) for packed in seeds.values()]
        axis.plot(values, [y] * len(values), "o", color="#D55E00", alpha=0.6, markersize=5)
        axis.plot([statistics.median(values)] * 2, [y - 0.3, y + 0.3], color="black")
    axis.set_yticks(range(len(present)), [label for label, _ in reversed(present)])
    axis.set_xlabel("percent of 512 hard problems, avg@8 at T = 0.6")
    axis.set_xlim(0, None)
    axis.set_title(title, fontsize=11)
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    save(figure, name)


def cost(runs: dict) -> None:
    """Accuracy of the policy's samples in training, by what was sampled and by seconds."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", sharey=True)
    for label, run, colour in COST:
        if run not in runs:
            continue
        curves = [curve(packed) for packed in runs[run].values()]
        for axis, column in zip(axes, (0, 1)):
            points = []
            for step in zip(*curves):  # the same step of every seed
                x = statistics.fmean(point[column] for point in step)
                points.append((x, statistics.fmean(point[2] for point in step)))
            axis.plot(*zip(*points), color=colour, label=label)
    for axis, unit in zip(axes, ("sampled tokens, thousands", "CPU seconds")):
        axis.set_xlabel(unit)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(f"percent right in training\n(mean of {WINDOW} steps and of seeds)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    save(figure, "cost.png")


def curve(packed: dict) -> list[tuple[float, float, float]]:
    """(thousands of tokens so far, CPU seconds so far, percent right) by step.

    The run's CPU seconds are spread over its steps as the seconds by the clock are, which depend
    on what else the machine did."""
    metrics = packed["metrics"]
    phases = [metrics[f"seconds_{phase}"] for phase in ("sample", "grade", "correct", "update")]
    clock = [sum(step) for step in zip(*phases)]
    scale = packed["config"]["cpu_seconds"] / sum(clock)
    tokens = seconds = 0.0
    points = []
    for step in range(len(metrics["accuracy"])):
        tokens += metrics["sampled_tokens"][step] / 1000
        seconds += clock[step] * scale
        last = metrics["accuracy"][max(0, step + 1 - WINDOW) : step + 1]
        points.append((tokens, seconds, 100 * statistics.fmean(last)))
    return points


def what_eda_sees(runs: dict) -> None:
    """P/mean and share of the sum of |A^| by kind of row, in the first and the last ten steps."""
    names = {"edge": "EDGE-GRPO", "edge-no-answers": "references for answers"}
    names["force-r-eda"] = "Force-R & EDA"
    kinds = [kind for kind in KINDS if kind != "wrong"]  # all of these are corrected
    parts = (("relative_entropy", "P / mean P of the group"), ("advantage_share", "share of Σ|Â|"))
    figure, axes = plt.subplots(2, len(names), figsize=(10, 5), layout="constrained", sharey="row")
    for column, (run, label) in enumerate(names.items()):
        for axis, (key, ylabel) in zip(axes[:, column], parts):
            for offset, (when, steps) in zip(
                (-0.2, 0.2), (("first 10 steps", slice(10)), ("last 10 steps", slice(-10, None)))
            ):
                for x, kind in enumerate(kinds):
                    means = [mean_of(p, f"{key}_{kind}", steps) for p in runs[run].values()]
                    known = [m for m in means if m is not None]
                    if known:
                        colour = "#0072B2" if offset < 0 else "#E69F00"
                        axis.bar(x + offset, statistics.fmean(known), 0.38, color=colour)
                        axis.plot([x + offset] * len(known), known, "k.", markersize=3)
            axis.set_xticks(range(len(kinds)), kinds, fontsize=9)
            axis.spines[["top", "right"]].set_visible(False)
            if column == 0:
                axis.set_ylabel(ylabel)
        axes[0, column].axhline(1, color="grey", linewidth=0.8)
        axes[0, column].set_title(label, fontsize=11)
    figure.legend(
        [plt.Rectangle((0, 0), 1, 1, color=c) for c in ("#0072B2", "#E69F00")],
        ["first 10 steps", "last 10 steps (dots: seeds)"],
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )
    save(figure, "eda.png")


if __name__ == "__main__":
    packed_runs = load(HERE / "tiny.jsonl.xz")
    dots(packed_runs, METHODS, "methods.png", "Hard problems after 100 steps: seeds and median")
    plain = [(label.split(" (`")[0], run) for label, run in CONTROLS]
    dots(packed_runs, plain, "controls.png", "What EDA does: controls")
    cost(packed_runs)
    what_eda_sees(packed_runs)
