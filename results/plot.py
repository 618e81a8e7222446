"""The figures of runs: curves over the steps of training, and bars of eval.py's analyses."""
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from data import UserError
from results.paper import COLOURS
from results.runs import Run
from results.tables import group

OTHERS = ("#56B4E9", "#E69F00", "#F0E442")               # variants and models; then again, dashed
CURVES = {                                                      # file: its panels, (key of metrics.jsonl, title)
    "entropy": [("entropy_sampled", "Mean entropy (nats), as sampled"),
                ("entropy", "Mean entropy (nats), as trained on")],
    "advantage": [("advantage_variance", "Advantage variance before EDA"),
                  ("advantage_variance_eda", "Advantage variance after EDA"),
                  ("mixed_groups", "Share of mixed groups, as sampled"),
                  ("mixed_groups_corrected", "Share of mixed groups, after correction")],
    "accuracy": [("accuracy", "Training accuracy, as sampled")],
}
REFLECTION_BARS = {"overall\naccuracy": "accuracy", "accuracy with\nself-reflection": "accuracy_reflecting",
                   "wrong ones fixed by\nforced reflection": "mean_fixed"}
ENTROPY_BARS = {"Mean P, correct responses": "mean_correct", "Mean P, wrong responses": "mean_wrong",
                "Mean P, wrong / correct": "ratio", "Correct ones above the average P": "correct_above",
                "Wrong ones below the average P": "wrong_below"}


def curve(series: list[list[tuple[int, float]]], window: int) -> list[tuple[int, float, float, float]]:
    """(step, mean, min, max) over seeds of (step, value) series, each first smoothed by the mean of its last `window`
    values; only steps that every seed has."""
    smooth = [{step: statistics.fmean(v for _, v in s[max(0, i + 1 - window):i + 1]) for i, (step, _) in enumerate(s)}
              for s in series]
    values = {step: [s[step] for s in smooth] for step in sorted(set.intersection(*map(set, smooth)))}
    return [(step, statistics.fmean(v), min(v), max(v)) for step, v in values.items()]


def panels_of_curves(runs: list[Run], window: int) -> dict[str, list[tuple[str, str, dict]]]:
    """Per figure, its panels (title, label of the x axis, {run's label: curve}); panels without data are left out."""
    def panel(title: str, points, window: int) -> tuple[str, str, dict]:
        curves = {}
        for label, alike in group(runs, lambda r: r.label).items():
            if series := [found for r in alike if (found := points(r))]:
                curves[label] = curve(series, window)
        return title, "step" if window == 1 else f"step (each point: mean of the last {window} steps)", curves

    def metric(key: str):
        return lambda r: [(m["step"], m[key]) for m in r.metrics if key in m]

    def held_out(task: str):
        return lambda r: [(e["step"], e["accuracy"]) for e in r.evals if e["task"] == task]

    figures = {name: [panel(title, metric(key), window) for key, title in panels] for name, panels in CURVES.items()}
    for task in dict.fromkeys(e["task"] for r in runs for e in r.evals):
        figures["accuracy"].append(panel(f"Held-out accuracy, {task}", held_out(task), 1))
    return {name: kept for name, panels in figures.items() if (kept := [p for p in panels if p[2]])}


def panels_of_bars(runs: list[Run]) -> dict[str, list[tuple[str, str, dict]]]:
    """The same of saved results; in the place of a curve {category: (mean, min, max) over seeds}."""
    cells = defaultdict(list)
    for r in runs:
        for T, result in ((T, x) for summary in r.summaries for T, x in summary["results"].items()):
            reflection, entropy = result.get("reflection", {}), result.get("entropy", {}).get("overall", {})
            for category, key in REFLECTION_BARS.items():
                cells["reflection", f"Reflection, T = {T}", r.label, category].append(reflection.get(key))
            for title, key in ENTROPY_BARS.items():
                cells["entropy_correctness", title, r.label, f"T = {T}"].append(entropy.get(key))
    figures = {}
    for (name, title, label, category), values in cells.items():
        if values := [v for v in values if v is not None]:
            bars = figures.setdefault(name, {}).setdefault(title, {}).setdefault(label, {})
            bars[category] = statistics.fmean(values), min(values), max(values)
    return {name: [(title, "", bars) for title, bars in panels.items()] for name, panels in figures.items()}


def styles(labels: list[str]) -> dict[str, tuple[str, str]]:
    """(colour, line style) by label."""
    others = [label for label in labels if label not in COLOURS]
    found = {label: (OTHERS[i % 3], ("-", "--", ":", "-.")[i // 3 % 4]) for i, label in enumerate(others)}
    return {label: (COLOURS[label], "-") if label in COLOURS else found[label] for label in labels}


def draw(runs: list[Run], out: Path, window: int) -> list[Path]:
    """One PNG per figure that the runs have data for; returns their paths. UserError without data or matplotlib."""
    try:
        import matplotlib
        matplotlib.use("Agg")
    except ImportError:
        raise UserError("figures need matplotlib, which is not installed: pip install matplotlib") from None
    window = window or max(1, max(len(r.metrics) for r in runs) // 25)
    figures = [(name, panels, draw_curve) for name, panels in panels_of_curves(runs, window).items()]
    figures += [(name, panels, draw_bars) for name, panels in panels_of_bars(runs).items()]
    if not figures:
        raise UserError("nothing to draw: no line in a metrics.jsonl, and no results of eval.py --entropy or --reflect")
    alike = group(runs, lambda r: r.label)
    note = "mean over seeds; band or whisker: lowest to highest seed" if max(map(len, alike.values())) > 1 else None
    out.mkdir(parents=True, exist_ok=True)
    for name, panels, draw_panel in figures:
        draw_figure(out / f"{name}.png", panels, draw_panel, styles(list(alike)), note)
    return [out / f"{name}.png" for name, _, _ in figures]


def draw_figure(path: Path, panels: list, draw_panel: Callable, style: dict, note: str | None) -> None:
    import matplotlib.pyplot as plt
    columns = min(len(panels), 2)
    height = -(-len(panels) // columns)
    figure, axes = plt.subplots(height, columns, figsize=(5.2 * columns, 3.2 * height + 0.6), squeeze=False,
                                layout="constrained")
    for axis in axes.flat[len(panels):]:
        axis.remove()
    for axis, (title, xlabel, values) in zip(axes.flat, panels):
        draw_panel(axis, values, style)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel(xlabel)
        axis.set_axisbelow(True)
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    handles = {label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels())}
    labels = [label for label in style if label in handles]
    figure.legend([handles[label] for label in labels], labels, loc="outside lower center", ncols=min(3, len(labels)),
                  frameon=False, title=note)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_curve(axis, curves: dict, style: dict) -> None:
    for label, points in curves.items():
        steps, mean, low, high = zip(*points)
        colour, line = style[label]
        axis.plot(steps, mean, line, color=colour, label=label, marker="o" if len(steps) < 15 else None, markersize=3)
        axis.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
    if max(high for points in curves.values() for *_, high in points) > 20:     # a variance after EDA, of first steps
        axis.set_yscale("symlog", linthresh=1)


def draw_bars(axis, values: dict, style: dict) -> None:
    categories = list(dict.fromkeys(category for bars in values.values() for category in bars))
    width = 0.8 / len(values)
    for i, (label, bars) in enumerate(values.items()):
        x = [categories.index(category) + (i + 0.5) * width - 0.4 for category in bars]
        mean, low, high = zip(*bars.values())
        whiskers = [[max(0, m - a) for m, a in zip(mean, low)], [max(0, b - m) for m, b in zip(mean, high)]]
        colour, line = style[label]
        axis.bar(x, mean, width * 0.92, color=colour, hatch=None if line == "-" else "//", label=label,
                 yerr=whiskers if any(map(any, whiskers)) else None, capsize=2)
    axis.set_xticks(range(len(categories)), categories, fontsize=9)
    axis.set_xlim(-0.6, len(categories) - 0.4)
