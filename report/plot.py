"""The figures of runs: curves over the steps of training."""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from errors import UserError
from report.paper import METHODS
from report.runs import Run
from report.tables import group

CURVES = {  # file: its panels, each a key of metrics.jsonl and a title
    "accuracy": {"accuracy": "Accuracy in training, as sampled", "reward": "Reward, as trained on"},
    "advantage": {
        "mixed_groups": "Mixed groups, as sampled",
        "mixed_groups_corrected": "Mixed groups, after correction",
        "advantage_variance": "Variance of advantages, before EDA",
        "advantage_variance_eda": "Variance of advantages, after EDA",
    },
    "entropy": {
        "entropy_sampled": "Entropy (nats per token), as sampled",
        "entropy": "Entropy (nats per token), as trained on",
    },
    "responses": {
        "response_tokens": "Length of responses (tokens)",
        "truncated": "Truncated responses",
    },
    "corrections": {
        "reflected": "Reflections per step",
        "reflect_fixed": "Reflections that became right",
        "answered": "Injected answers per step",
        "referenced": "References per step",
    },
    "update": {"loss": "Loss", "grad_norm": "Gradient norm, before clipping"},
    "seconds": {
        "seconds_sample": "Seconds per step, sampling",
        "seconds_grade": "Seconds per step, grading",
        "seconds_correct": "Seconds per step, correcting",
        "seconds_update": "Seconds per step, updating",
    },
}
LINES = ("-", "--", ":", "-.")


@dataclass
class Panel:
    title: str
    values: dict[str, list[tuple[int, float, float]]]  # by label: (step, mean, standard error)
    xlabel: str
    apart: dict[str, list[tuple[int, float, float]]] = field(
        default_factory=dict
    )  # points that are on no line


def curve(
    series: list[list[tuple[int, float, float]]], window: int
) -> list[tuple[int, float, float]]:
    """(step, mean, standard error) over seeds of (step, value, its standard error) series, each first smoothed by the
    mean of its last `window` values; only steps that every seed has. The only seed keeps its own standard error."""
    smooth = [
        {
            step: (statistics.fmean(v for _, v, _ in s[max(0, i + 1 - window) : i + 1]), error)
            for i, (step, _, error) in enumerate(s)
        }
        for s in series
    ]
    points = []
    for step in sorted(set.intersection(*map(set, smooth))):
        values, errors = zip(*(s[step] for s in smooth))
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else errors[0]
        points.append((step, statistics.fmean(values), error))
    return points


def panels_of_curves(runs: list[Run], window: int) -> dict[str, list[Panel]]:
    """The panels of each figure; those without data are left out, and so are corrections that a method has not."""
    seeds = group(runs, lambda r: r.label)
    figures = defaultdict(list)

    def curves(
        points: Callable[[Run], list], window: int = 1
    ) -> dict[str, list[tuple[int, float, float]]]:
        series = {
            label: [found for r in alike if (found := points(r))] for label, alike in seeds.items()
        }
        return {label: curve(found, window) for label, found in series.items() if found}

    for task in dict.fromkeys(e["task"] for r in runs for e in r.evals):
        [(usual, _)] = Counter(
            e["problems"] for r in runs for e in r.evals if e["task"] == task
        ).most_common(1)
        lines, apart = (
            curves(
                lambda r: [
                    (e["step"], e["accuracy"], e.get("stderr", 0.0))
                    for e in r.evals
                    if e["task"] == task and (e["problems"] == usual) == same
                ]
            )
            for same in (True, False)
        )
        figures["accuracy"].append(
            Panel(
                f"Held-out accuracy, {Path(task).name}",
                lines,
                f"step (line: {usual} problems, rings: all)" if apart else "step",
                apart,
            )
        )
    for figure, panels in CURVES.items():
        for key, title in panels.items():
            if lines := curves(
                lambda r: [
                    (m["step"], m[key], 0.0)
                    for m in r.metrics
                    if key in m and (figure != "corrections" or any(m.get(key) for m in r.metrics))
                ],
                window,
            ):
                xlabel = f"step (mean of the last {window})" if window > 1 else "step"
                figures[figure].append(Panel(title, lines, xlabel))
    return figures


def styles(labels: list[str]) -> dict[str, tuple[str, str]]:
    """(colour, line style) by label: a method has its own, anything else what is left, then again with other lines."""
    named = {**dict(METHODS.values()), "": "#F0E442"}
    free = [colour for name, colour in named.items() if name not in labels] or list(named.values())
    free = free[2:] + free[:2]  # black and dark blue last
    others = [label for label in labels if label not in named]
    found = {
        label: (free[i % len(free)], LINES[i // len(free) % 4]) for i, label in enumerate(others)
    }
    return {label: found.get(label) or (named[label], "-") for label in labels}


def draw(runs: list[Run], out: Path) -> list[Path]:
    """One PNG per figure that the runs have data for, curves smoothed over a 25th of the steps; returns their paths.
    UserError without data or matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
    except ImportError:
        raise UserError(
            "figures need matplotlib, which is not installed: pip install matplotlib"
        ) from None
    figures = panels_of_curves(runs, max(1, max(len(r.metrics) for r in runs) // 25))
    if not figures:
        raise UserError("nothing to draw: no line in a metrics.jsonl or an evals.jsonl")
    alike = group(runs, lambda r: r.label)
    note = (
        "mean over seeds ± standard error"
        if max(map(len, alike.values())) > 1
        else "± standard error over problems"
    )
    out.mkdir(parents=True, exist_ok=True)
    for name, panels in figures.items():
        draw_figure(out / f"{name}.png", panels, styles(list(alike)), note)
    return [out / f"{name}.png" for name in figures]


def draw_figure(
    path: Path, panels: list[Panel], style: dict[str, tuple[str, str]], note: str
) -> None:
    import matplotlib.pyplot as plt
    from PIL import Image

    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    size = (5.2 * columns, 2.9 * rows + 0.4 + 0.22 * math.ceil(len(style) / columns))
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, panel in zip(axes.flat, panels):
        draw_curves(axis, panel.values, style)
        for label, points in panel.apart.items():
            axis.errorbar(
                *zip(*points), fmt="o", color=style[label][0], markerfacecolor="white", markersize=5
            )
        axis.set_title(panel.title, fontsize=11)
        axis.set_xlabel(panel.xlabel)
        axis.set_axisbelow(True)
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    handles = {
        label: handle
        for axis in figure.axes
        for handle, label in zip(*axis.get_legend_handles_labels())
    }
    present = [label for label in style if label in handles]
    figure.legend(
        [handles[label] for label in present],
        present,
        loc="outside lower center",
        frameon=False,
        title=note,
        ncols=columns,
    )
    figure.savefig(path, dpi=110)
    Image.open(path).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(
        path, optimize=True
    )  # a third of it
    plt.close(figure)


def draw_curves(axis, curves: dict, style: dict) -> None:
    """Equal curves stay visible: each lies over the next one, which is thicker. No axis is zoomed into noise."""
    for label, points in curves.items():
        steps, mean, error = zip(*points)
        colour, line = style[label]
        depth = list(style).index(label) / len(style)
        axis.plot(
            steps,
            mean,
            line,
            color=colour,
            label=label,
            linewidth=1.2 + 2 * depth,
            zorder=3 - depth,
            marker="o" if len(steps) < 15 else None,
            markersize=3 + 3 * depth,
        )
        axis.fill_between(
            steps,
            [m - e for m, e in zip(mean, error)],
            [m + e for m, e in zip(mean, error)],
            color=colour,
            alpha=0.15,
            linewidth=0,
        )
    low, high = axis.get_ylim()
    if high > 20 * max(
        1, statistics.median(mean for points in curves.values() for _, mean, _ in points)
    ):
        axis.set_yscale("symlog", linthresh=1)  # a variance after EDA, of first steps
        low = min(mean for points in curves.values() for _, mean, _ in points) - 0.1
        axis.yaxis.set_major_formatter("{x:g}")
    axis.set_ylim(min(-0.01, low), max(0.2, high))
