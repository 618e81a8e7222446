"""The figures of runs: curves over the steps of training, and bars of eval.py's analyses."""
import math
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data import UserError
from results.paper import METHODS
from results.runs import Run
from results.tables import group

CURVES = {                                              # file: its panels, each a key of metrics.jsonl and a title
    "accuracy": {"accuracy": "Accuracy in training, as sampled", "reward": "Reward, as trained on"},
    "advantage": {"mixed_groups": "Mixed groups, as sampled", "mixed_groups_corrected": "Mixed groups, after correction",
                  "advantage_variance": "Variance of advantages, before EDA",
                  "advantage_variance_eda": "Variance of advantages, after EDA"},
    "entropy": {"entropy_sampled": "Entropy (nats per token), as sampled",
                "entropy": "Entropy (nats per token), as trained on"},
    "responses": {"response_tokens": "Length of responses (tokens)", "truncated": "Truncated responses"},
    "corrections": {"reflected": "Reflections per step", "reflect_fixed": "Reflections that became right",
                    "answered": "Injected answers per step", "referenced": "References per step"},
    "update": {"loss": "Loss", "grad_norm": "Gradient norm, before clipping"},
}
REFLECTION_BARS = {"accuracy": "all", "accuracy_reflecting": "with self-\nreflection",
                   "mean_fixed": "wrong ones\nfixed by it"}
ENTROPY_BARS = {"mean_correct": "Mean P, right responses", "mean_wrong": "Mean P, wrong responses",
                "ratio": "Mean P, wrong ÷ right", "correct_above": "Right ones above the average P",
                "wrong_below": "Wrong ones below the average P"}
LINES = ("-", "--", ":", "-.")


@dataclass
class Panel:
    title: str
    values: dict                # by label: (step, mean, standard error) of a curve, {category: (mean, error)} of bars
    xlabel: str = ""


def mean_error(values: list[float], alone: float = 0.0) -> tuple[float, float]:
    """Mean and its standard error over seeds; that of the only seed is given."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else alone
    return statistics.fmean(values), error


def curve(series: list[list[tuple[int, float, float]]], window: int) -> list[tuple[int, float, float]]:
    """(step, mean, standard error) over seeds of (step, value, its standard error) series, each first smoothed by the
    mean of its last `window` values; only steps that every seed has."""
    smooth = [{step: (statistics.fmean(v for _, v, _ in s[max(0, i + 1 - window):i + 1]), error)
               for i, (step, _, error) in enumerate(s)} for s in series]
    steps = sorted(set.intersection(*map(set, smooth)))
    return [(step, *mean_error([s[step][0] for s in smooth], smooth[0][step][1])) for step in steps]


def panels_of_curves(runs: list[Run], window: int) -> dict[str, list[Panel]]:
    """The panels of each figure; those without data are left out, and so are corrections that a method has not."""
    seeds = group(runs, lambda r: r.label)
    figures = defaultdict(list)

    def add(figure: str, title: str, points: Callable[[Run], list], window: int) -> None:
        series = {label: [found for r in alike if (found := points(r))] for label, alike in seeds.items()}
        if curves := {label: curve(found, window) for label, found in series.items() if found}:
            figures[figure].append(Panel(title, curves, "step" if window == 1 else f"step (mean of the last {window})"))

    for task in dict.fromkeys(e["task"] for r in runs for e in r.evals):
        add("accuracy", f"Held-out accuracy, {Path(task).name}", lambda r: [
            (e["step"], e["accuracy"], e.get("stderr", 0.0)) for e in r.evals if e["task"] == task], window=1)
    for figure, panels in CURVES.items():
        for key, title in panels.items():
            add(figure, title, lambda r: [
                (m["step"], m[key], 0.0) for m in r.metrics if key in m
                and (figure != "corrections" or any(m.get(key) for m in r.metrics))], window)
    return figures


def panels_of_bars(runs: list[Run]) -> dict[str, list[Panel]]:
    """The same of phases and of saved results."""
    cells = defaultdict(list)
    for r in runs:
        for key in dict.fromkeys(key for m in r.metrics for key in m if key.startswith("seconds_")):
            seconds = statistics.median(m[key] for m in r.metrics if key in m)
            cells["seconds", "Seconds per step (median)", r.label, key.removeprefix("seconds_")].append(seconds)
        for T, result in (item for summary in r.summaries for item in summary["results"].items()):
            for key, bar in REFLECTION_BARS.items():
                cells["reflection", f"Accuracy and reflection, T = {T}", r.label, bar].append(
                    result.get("reflection", {}).get(key))
            for key, title in ENTROPY_BARS.items():
                cells["entropy_correctness", title, r.label, f"T = {T}"].append(
                    result.get("entropy", {}).get("overall", {}).get(key))
    figures = defaultdict(dict)
    for (name, title, label, category), found in cells.items():
        if values := [v for v in found if v is not None]:
            figures[name].setdefault(title, {}).setdefault(label, {})[category] = mean_error(values)
    return {name: [Panel(title, bars) for title, bars in panels.items()] for name, panels in figures.items()}


def styles(labels: list[str]) -> dict[str, tuple[str, str]]:
    """(colour, line style) by label: a method has its own, anything else what is left, then again with other lines."""
    named = {**dict(METHODS.values()), "": "#F0E442"}
    free = [colour for name, colour in named.items() if name not in labels] or list(named.values())
    free = free[2:] + free[:2]                                      # black and dark blue last
    others = [label for label in labels if label not in named]
    found = {label: (free[i % len(free)], LINES[i // len(free) % 4]) for i, label in enumerate(others)}
    return {label: found.get(label) or (named[label], "-") for label in labels}


def draw(runs: list[Run], out: Path) -> list[Path]:
    """One PNG per figure that the runs have data for, curves smoothed over a 25th of the steps; returns their paths.
    UserError without data or matplotlib."""
    try:
        import matplotlib
        matplotlib.use("Agg")
    except ImportError:
        raise UserError("figures need matplotlib, which is not installed: pip install matplotlib") from None
    curves = panels_of_curves(runs, max(1, max(len(r.metrics) for r in runs) // 25))
    bars = panels_of_bars(runs)
    if not curves and not bars:
        raise UserError("nothing to draw: no line in a metrics.jsonl, and no results of eval.py --entropy or --reflect")
    alike = group(runs, lambda r: r.label)
    note = "mean over seeds ± standard error" if max(map(len, alike.values())) > 1 else "± standard error over problems"
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for figures, draw_panel in ((curves, draw_curves), (bars, draw_bars)):
        for name, panels in figures.items():
            paths.append(out / f"{name}.png")
            draw_figure(paths[-1], panels, draw_panel, styles(list(alike)), note)
    return paths


def draw_figure(path: Path, panels: list[Panel], draw_panel: Callable, style: dict, note: str) -> None:
    import matplotlib.pyplot as plt
    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    size = (5.2 * columns, 2.9 * rows + 0.4 + 0.22 * math.ceil(len(style) / columns))
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels):]:
        axis.remove()
    for axis, panel in zip(axes.flat, panels):
        draw_panel(axis, panel.values, style)
        axis.set_title(panel.title, fontsize=11)
        axis.set_xlabel(panel.xlabel)
        axis.set_axisbelow(True)
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    handles = {label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels())}
    present = [label for label in style if label in handles]
    figure.legend([handles[label] for label in present], present, loc="outside lower center", frameon=False, title=note,
                  ncols=columns)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_curves(axis, curves: dict, style: dict) -> None:
    """Equal curves stay visible: each lies over the next one, which is thicker. No axis is zoomed into noise."""
    for label, points in curves.items():
        steps, mean, error = zip(*points)
        colour, line = style[label]
        depth = list(style).index(label) / len(style)
        axis.plot(steps, mean, line, color=colour, label=label, linewidth=1.2 + 2 * depth, zorder=3 - depth,
                  marker="o" if len(steps) < 15 else None, markersize=3 + 3 * depth)
        axis.fill_between(steps, [m - e for m, e in zip(mean, error)], [m + e for m, e in zip(mean, error)],
                          color=colour, alpha=0.15, linewidth=0)
    low, high = axis.get_ylim()
    if high > 20 * max(1, statistics.median(mean for points in curves.values() for _, mean, _ in points)):
        axis.set_yscale("symlog", linthresh=1)                               # a variance after EDA, of first steps
        axis.yaxis.set_major_formatter("{x:g}")
    axis.set_ylim(min(-0.01, low), max(0.2, high))


def draw_bars(axis, values: dict, style: dict) -> None:
    categories = list(dict.fromkeys(category for bars in values.values() for category in bars))
    width = 0.8 / len(values)
    for i, (label, bars) in enumerate(values.items()):
        x = [categories.index(category) + (i + 0.5) * width - 0.4 for category in bars]
        mean, error = zip(*bars.values())
        colour, line = style[label]
        axis.bar(x, mean, width * 0.92, color=colour, hatch=None if line == "-" else "//", label=label,
                 yerr=error if any(error) else None, ecolor="0.4", capsize=2)
    axis.set_xticks(range(len(categories)), categories, fontsize=9)
