"""Draws the figures of results/README.md from the packed runs, into results/figures/.

python results/figures.py
"""

import statistics

import matplotlib
from PIL import Image  # matplotlib needs it, too
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
    """Writes the figure in 64 colours: a quarter of the bytes."""
    OUT.mkdir(exist_ok=True)
    figure.savefig(OUT / name, dpi=110)
    plt.close(figure)
    Image.open(OUT / name).convert("RGB").quantize(64).save(OUT / name, optimize=True)


def dots(runs: dict, labels: list[tuple[str, str]], name: str, title: str) -> None:
    """One line a method: its seeds as dots, their median as a bar."""
    present = [(label, runs[run]) for label, run in labels if run in runs]
    height = 0.6 + 0.34 * len(present)
    figure, axis = plt.subplots(figsize=(7.2, height), layout="constrained")
    for y, (_, seeds) in enumerate(reversed(present)):
        values = [accuracy(packed, HARD, 8) for packed in seeds.values()]
        heights = [y] * len(values)
        axis.plot(values, heights, "o", color="#D55E00", alpha=0.6, markersize=5)
        median = statistics.median(values)
        axis.plot([median, median], [y - 0.3, y + 0.3], color="black")
    names = [label for label, _ in reversed(present)]
    axis.set_yticks(range(len(present)), names)
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
        tokens, seconds, accuracy = [], [], []
        for points in zip(*curves):  # the same step of every seed
            of_tokens, of_seconds, right = zip(*points)
            tokens.append(statistics.fmean(of_tokens))
            seconds.append(statistics.fmean(of_seconds))
            accuracy.append(statistics.fmean(right))
        axes[0].plot(tokens, accuracy, color=colour, label=label)
        axes[1].plot(seconds, accuracy, color=colour)
    for axis, unit in zip(axes, ("sampled tokens, thousands", "CPU seconds")):
        axis.set_xlabel(unit)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(f"percent right in training\n(mean of {WINDOW} steps and of seeds)")
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )
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


SEEN = {  # run -> title
    "edge": "EDGE-GRPO",
    "edge-no-answers": "references for answers",
    "force-r-eda": "Force-R & EDA",
}
CORRECTED_KINDS = [kind for kind in KINDS if kind != "wrong"]  # all wrong ones are corrected here
WHEN = (  # label, steps, offset of the bar, colour
    ("first 10 steps", slice(10), -0.2, "#0072B2"),
    ("last 10 steps (dots: seeds)", slice(-10, None), 0.2, "#E69F00"),
)


def what_eda_sees(runs: dict) -> None:
    """P/mean and share of the sum of |A^| by kind of row, in the first and the last ten steps."""
    size = {"figsize": (10, 5), "layout": "constrained", "sharey": "row"}
    figure, axes = plt.subplots(2, len(SEEN), **size)
    for column, (run, title) in enumerate(SEEN.items()):
        seeds = list(runs[run].values())
        bars(axes[0, column], seeds, "relative_entropy")
        bars(axes[1, column], seeds, "advantage_share")
        axes[0, column].axhline(1, color="grey", linewidth=0.8)
        axes[0, column].set_title(title, fontsize=11)
    axes[0, 0].set_ylabel("P / mean P of the group")
    axes[1, 0].set_ylabel("share of Σ|Â|")
    squares = [plt.Rectangle((0, 0), 1, 1, color=colour) for *_, colour in WHEN]
    labels = [label for label, *_ in WHEN]
    figure.legend(
        squares,
        labels,
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )
    save(figure, "eda.png")


def bars(axis, seeds: list[dict], key: str) -> None:
    for _, steps, offset, colour in WHEN:
        for x, kind in enumerate(CORRECTED_KINDS):
            means = [mean_of(packed, f"{key}_{kind}", steps) for packed in seeds]
            known = [mean for mean in means if mean is not None]
            if known:
                axis.bar(x + offset, statistics.fmean(known), 0.38, color=colour)
                axis.plot([x + offset] * len(known), known, "k.", markersize=3)
    axis.set_xticks(range(len(CORRECTED_KINDS)), CORRECTED_KINDS, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    packed_runs = load(HERE / "tiny.jsonl.xz")
    dots(packed_runs, METHODS, "methods.png", "Hard problems after 100 steps: seeds and median")
    plain = [(label.split(" (`")[0], run) for label, run in CONTROLS]
    dots(packed_runs, plain, "controls.png", "What EDA does: controls")
    cost(packed_runs)
    what_eda_sees(packed_runs)
