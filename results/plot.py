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

CURVES = {              # file: its panels (key of metrics.jsonl, title, how far the y axis reaches at least from 0)
    "accuracy": [("accuracy", "Accuracy in training, as sampled", 0.2), ("reward", "Reward, as trained on", 0.2)],
    "advantage": [("mixed_groups", "Mixed groups, as sampled", 1),
                  ("mixed_groups_corrected", "Mixed groups, after correction", 1),
                  ("advantage_variance", "Variance of advantages, before EDA", 1),
                  ("advantage_variance_eda", "Variance of advantages, after EDA", 1)],
    "entropy": [("entropy_sampled", "Entropy (nats per token), as sampled", 0.2),
                ("entropy", "Entropy (nats per token), as trained on", 0.2)],
    "responses": [("response_tokens", "Length of responses (tokens)", 10), ("truncated", "Truncated responses", 0.2)],
    "corrections": [("reflected", "Reflections per step", 1), ("reflect_fixed", "Reflections that became right", 1),
                    ("answered", "Injected answers per step", 1), ("referenced", "References per step", 1)],
    "update": [("loss", "Loss", 0.2), ("grad_norm", "Gradient norm, before clipping", 1)],
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
    least: float = 0.01         # what the y axis reaches at least


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
    """The panels of each figure; those without data are left out."""
    def panel(title: str, least: float, points: Callable[[Run], list], window: int) -> Panel:
        series = {label: [found for r in alike if (found := points(r))]
                  for label, alike in group(runs, lambda r: r.label).items()}
        curves = {label: curve(seeds, window) for label, seeds in series.items() if seeds}
        return Panel(title, curves, "step" if window == 1 else f"step (mean of the last {window})", least)

    def metric(key: str, figure: str) -> Callable[[Run], list]:
        def points(r: Run) -> list:
            found = [(m["step"], m[key], 0.0) for m in r.metrics if key in m]
            return found if figure != "corrections" or any(value for _, value, _ in found) else []
        return points

    def held_out(task: str) -> Callable[[Run], list]:
        return lambda r: [(e["step"], e["accuracy"], e.get("stderr", 0.0)) for e in r.evals if e["task"] == task]

    figures = {name: [panel(title, least, metric(key, name), window) for key, title, least in panels]
               for name, panels in CURVES.items()}
    tasks = dict.fromkeys(e["task"] for r in runs for e in r.evals)
    figures["accuracy"][:0] = [panel(f"Held-out accuracy, {Path(t).name}", 0.2, held_out(t), 1) for t in tasks]
    return {name: kept for name, panels in figures.items() if (kept := [p for p in panels if p.values])}


def panels_of_bars(runs: list[Run]) -> dict[str, list[Panel]]:
    """The same of phases and of saved results."""
    cells = defaultdict(list)
    for r in runs:
        for key in dict.fromkeys(key for m in r.metrics for key in m if key.startswith("seconds_")):
            seconds = statistics.median(m[key] for m in r.metrics if key in m)
            cells["seconds", "Seconds per step (median)", r.label, key.removeprefix("seconds_")].append(seconds)
        for T, what, key, value in r.analyses:
            if what == "reflection" and key in REFLECTION_BARS:
                cells["reflection", f"Accuracy and reflection, T = {T}", r.label, REFLECTION_BARS[key]].append(value)
            if what == "entropy" and key in ENTROPY_BARS:
                cells["entropy_correctness", ENTROPY_BARS[key], r.label, f"T = {T}"].append(value)
    figures = {}
    for (name, title, label, category), values in cells.items():
        bars = figures.setdefault(name, {}).setdefault(title, {}).setdefault(label, {})
        bars[category] = mean_error(values)
    return {name: [Panel(title, bars) for title, bars in panels.items()] for name, panels in figures.items()}


def styles(labels: list[str]) -> dict[str, tuple[str, str]]:
    """(colour, line style) by label: a method has its own, anything else what is left, then again with other lines."""
    named = {**dict(METHODS.values()), "": "#F0E442"}
    free = [colour for name, colour in named.items() if name not in labels] or list(named.values())
    free = free[2:] + free[:2]                                      # black and dark blue last
    others = [label for label in labels if label not in named]
    found = {label: (free[i % len(free)], LINES[i // len(free) % 4]) for i, label in enumerate(others)}
    return {label: found.get(label) or (named[label], "-") for label in labels}


def draw(runs: list[Run], out: Path, window: int) -> list[Path]:
    """One PNG per figure that the runs have data for; returns their paths. UserError without data or matplotlib."""
    try:
        import matplotlib
        matplotlib.use("Agg")
    except ImportError:
        raise UserError("figures need matplotlib, which is not installed: pip install matplotlib") from None
    window = window or max(1, max(len(r.metrics) for r in runs) // 25)
    figures = [(name, panels, draw_curves) for name, panels in panels_of_curves(runs, window).items()]
    figures += [(name, panels, draw_bars) for name, panels in panels_of_bars(runs).items()]
    if not figures:
        raise UserError("nothing to draw: no line in a metrics.jsonl, and no results of eval.py --entropy or --reflect")
    alike = group(runs, lambda r: r.label)
    note = "mean over seeds ± standard error" if max(map(len, alike.values())) > 1 else "± standard error over problems"
    out.mkdir(parents=True, exist_ok=True)
    for name, panels, draw_panel in figures:
        draw_figure(out / f"{name}.png", panels, draw_panel, styles(list(alike)), note)
    return [out / f"{name}.png" for name, _, _ in figures]


def draw_figure(path: Path, panels: list[Panel], draw_panel: Callable, style: dict, note: str | None) -> None:
    import matplotlib.pyplot as plt
    import numpy as np
    from PIL import Image
    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    present = [label for label in style if any(label in panel.values for panel in panels)]
    lines = math.ceil(len(present) / max(1, int(5.2 * columns / (0.6 + 0.09 * max(map(len, present))))))
    height = 2.9 * rows + 0.4 + 0.22 * lines
    figure, axes = plt.subplots(rows, columns, figsize=(5.2 * columns, height), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels):]:
        axis.remove()
    for i, (axis, panel) in enumerate(zip(axes.flat, panels)):
        reach = draw_panel(axis, panel.values, style)
        low, high = min(0, *reach), max(panel.least, *reach)
        axis.set_ylim(low - 0.04 * min(high - low, 1 if axis.get_yscale() == "symlog" else math.inf), 1.04 * high)
        axis.set_title(panel.title, fontsize=11)
        axis.set_xlabel(panel.xlabel if i + columns >= len(panels) else "")
        axis.set_axisbelow(True)
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    handles = {label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend([handles[label] for label in present], present, loc="outside lower center", frameon=False, title=note,
                  ncols=math.ceil(len(present) / lines))
    figure.set_dpi(110)
    figure.canvas.draw()
    pixels = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])
    pixels.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)    # a third of the bytes of savefig
    plt.close(figure)


def draw_curves(axis, curves: dict, style: dict) -> list[float]:
    """Equal curves stay visible: each lies over the next one, which is thicker. Returns what the axis must reach."""
    reach = []
    for label, points in curves.items():
        steps, mean, error = zip(*points)
        low, high = [m - e for m, e in zip(mean, error)], [m + e for m, e in zip(mean, error)]
        colour, line = style[label]
        depth = list(style).index(label) / len(style)
        axis.plot(steps, mean, line, color=colour, label=label, linewidth=1.2 + 2 * depth, zorder=3 - depth,
                  marker="o" if len(steps) < 15 else None, markersize=3 + 3 * depth)
        axis.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        reach += [*low, *high]
    if max(reach) > 20 * max(1, statistics.median(reach)):                   # a variance after EDA, of first steps
        axis.set_yscale("symlog", linthresh=1)
        axis.yaxis.set_major_formatter("{x:g}")
    return reach


def draw_bars(axis, values: dict, style: dict) -> list[float]:
    categories = list(dict.fromkeys(category for bars in values.values() for category in bars))
    width = 0.8 / len(values)
    reach = []
    for i, (label, bars) in enumerate(values.items()):
        x = [categories.index(category) + (i + 0.5) * width - 0.4 for category in bars]
        mean, error = zip(*bars.values())
        colour, line = style[label]
        axis.bar(x, mean, width * 0.92, color=colour, hatch=None if line == "-" else "//", label=label,
                 yerr=error if any(error) else None, ecolor="0.4", capsize=2)
        reach += [m + e for m, e in zip(mean, error)]
    axis.set_xticks(range(len(categories)), categories, fontsize=9)
    axis.set_xlim(-0.6, len(categories) - 0.4)
    return reach
