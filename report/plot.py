"""`eval.py plot` draws curves over the steps of training, and the paper's Figures 2 and 3."""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from errors import UserError
from report.paper import METHODS
from report.runs import Run
from report.tables import group

KINDS = {  # of rows that a step trains on
    "right": "right responses",
    "wrong": "wrong responses",
    "reflect": "forced reflections",
    "answer": "injected answers",
    "reference": "references",
    "prefix": "prefixes of references",
    "sibling": "responses of a sibling",
}
TRAINING = {  # a figure's panels: the title of each key of metrics.jsonl
    "accuracy": {"accuracy": "Accuracy in training, as sampled", "reward": "Reward, as trained on"},
    "advantage": {
        "mixed_groups": "Mixed groups, as sampled",
        "mixed_groups_corrected": "Mixed groups, after correction",
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
    "relative_entropy": {
        f"relative_entropy_{kind}": f"P / mean of its group, {name}" for kind, name in KINDS.items()
    },
    "update": {"loss": "Loss", "grad_norm": "Gradient norm, before clipping"},
    "seconds": {
        "seconds_sample": "Seconds per step, sampling",
        "seconds_grade": "Seconds per step, grading",
        "seconds_correct": "Seconds per step, correcting",
        "seconds_update": "Seconds per step, updating",
    },
}
ANALYSES = {  # of eval.py, by temperature: a panel's title, and where its number stands
    "figure2": {
        "Accuracy, all responses": ("reflection", "accuracy"),
        "Accuracy, responses with self-reflection": ("reflection", "accuracy_reflecting"),
        "Wrong responses fixed by a forced reflection": ("reflection", "mean_fixed"),
        "Accuracy gained by forced reflections": ("reflection", "gain"),
    },
    "figure3": {
        "Mean P, wrong / right": ("entropy", "overall", "ratio"),
        "Mean P / question's mean, wrong / right": ("entropy", "within", "ratio"),
        "Right responses above the mean P": ("entropy", "overall", "correct_above"),
        "Wrong responses below the mean P": ("entropy", "overall", "wrong_below"),
    },
}
LINES = ("-", "--", ":", "-.")
Points = list[tuple[float, float, float]]  # (x, mean, standard error)


@dataclass
class Panel:
    title: str
    xlabel: str
    lines: dict[str, Points]  # by label
    rings: dict[str, Points]  # points that are on no line


def draw(runs: list[Run], out: Path) -> list[Path]:
    """Write one PNG per figure that the runs have data for; return their paths.

    Curves of metrics are smoothed over a 25th of the steps. Raises UserError without data or
    matplotlib.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
    except ImportError:
        raise UserError(
            "figures need matplotlib, which is not installed: pip install matplotlib"
        ) from None
    figures = all_panels(runs, max(1, max(len(run.metrics) for run in runs) // 25))
    if not figures:
        raise UserError(
            "nothing to draw: no line in a metrics.jsonl or an evals.jsonl, and no results of "
            "eval.py --entropy or --reflect"
        )
    labels = [run.label for run in runs]
    over = "seeds" if len(set(labels)) < len(labels) else "problems"
    style = styles(dict.fromkeys([*labels, *KINDS.values()]))
    out.mkdir(parents=True, exist_ok=True)
    for name, panels in figures.items():
        draw_figure(out / f"{name}.png", panels, style, f"bands: standard error over {over}")
    return [out / f"{name}.png" for name in figures]


# --- The data of the panels -----------------------------------------------------------------------


def all_panels(runs: list[Run], window: int) -> dict[str, list[Panel]]:
    """Collect the panels of each figure by its name; those without data are left out."""
    figures = defaultdict(list)

    def add(figure, title, xlabel, points, window=1, ring_points=lambda run: []):
        lines, rings = lines_of(runs, points, window), lines_of(runs, ring_points)
        if rings:
            xlabel += "; rings: on another number of problems"
        if lines or rings:
            figures[figure].append(Panel(title, xlabel, lines, rings))

    for task in dict.fromkeys(e["task"] for run in runs for e in run.evals):
        add(
            "accuracy",
            f"Held-out accuracy, {Path(task).name}",
            "step",
            lambda run: held_out(run, task, True),
            ring_points=lambda run: held_out(run, task, False),
        )
    steps = f"step (mean of the last {window})" if window > 1 else "step"
    for figure, titles in TRAINING.items():
        for key, title in titles.items():
            add(figure, title, steps, lambda run: metric(run, key), window)
    if len(group(runs, lambda run: run.label)) == 1 and "relative_entropy" in figures:
        lines = {}  # one panel with a line for each kind of row
        for panel in figures["relative_entropy"]:
            title, _, kind = panel.title.partition(", ")
            lines[kind] = panel.lines[runs[0].label]
        figures["relative_entropy"] = [Panel(title, steps, lines, {})]
    for figure, titles in ANALYSES.items():
        for title, place in titles.items():
            add(figure, title, "sampling temperature", lambda run: by_temperature(run, place))
    if panels := histograms(runs):
        figures["entropy_histogram"] = panels
    return figures


def lines_of(
    runs: list[Run], points: Callable[[Run], Points], window: int = 1
) -> dict[str, Points]:
    """Average the runs of each label to one line; labels without points have none."""
    lines = {}
    for label, seeds in group(runs, lambda run: run.label).items():
        line = curve(list(filter(None, map(points, seeds))), window)
        if line:
            lines[label] = line
    return lines


def curve(series: list[Points], window: int) -> Points:
    """Average over seeds, with the standard error, at each x that every seed has.

    Each seed is first smoothed by the mean of its last `window` values. A single seed keeps its
    own standard errors.
    """
    by_x = defaultdict(list)
    for points in series:
        for i, (x, _, error) in enumerate(points):
            last = points[max(0, i + 1 - window) : i + 1]
            by_x[x].append((statistics.fmean(value for _, value, _ in last), error))
    line = []
    for x, seeds in sorted(by_x.items()):
        values, (error, *_) = zip(*seeds)
        if len(values) > 1:
            error = statistics.stdev(values) / math.sqrt(len(values))
        if len(values) == len(series):
            line.append((x, statistics.fmean(values), error))
    return line


def metric(run: Run, key: str) -> Points:
    """Return one number of metrics.jsonl by step; none of a correction that a run never makes."""
    points = [(step["step"], step[key], 0.0) for step in run.metrics if key in step]
    never = not any(value for _, value, _ in points)
    return [] if never and key in TRAINING["corrections"] else points


def held_out(run: Run, task: str, on_line: bool) -> Points:
    """Return held-out accuracy by step: on_line, over the problems that the run was evaluated on
    most often; else its evaluations on more or fewer problems."""
    evals = [e for e in run.evals if e["task"] == task]
    sizes = Counter(e["problems"] for e in evals).most_common(1)
    chosen = [e for e in evals if (e["problems"] == sizes[0][0]) == on_line]
    return [(e["step"], e["accuracy"], e.get("stderr", 0.0)) for e in chosen]


def by_temperature(run: Run, place: tuple[str, ...]) -> Points:
    """Return a number that eval.py found, by the sampling temperature."""
    points = []
    for temperature, found in run.analyses:
        for key in place:
            found = (found or {}).get(key)
        if found is not None:
            points.append((temperature, found, 0.0))
    return sorted(points)


def histograms(runs: list[Run]) -> list[Panel]:
    """Show how P is distributed over right and over wrong responses, in a panel for each label and
    temperature at which eval.py --entropy was run."""
    import numpy

    pooled = defaultdict(lambda: dict(right=[], wrong=[]))
    for run in runs:
        for temperature, found in run.analyses:
            entropy = found.get("entropy") or {}
            pooled[run.label, temperature]["right"] += entropy.get("P_correct", [])
            pooled[run.label, temperature]["wrong"] += entropy.get("P_wrong", [])
    panels = []
    for (label, temperature), sides in sorted(pooled.items()):
        highest = max(sides["right"] + sides["wrong"], default=0.0)
        lines = {}
        for kind, P in sides.items():
            counts, edges = numpy.histogram(P, 24, (0.0, highest))
            if P:
                centres = edges[:-1] + edges[1] / 2
                lines[KINDS[kind]] = [(x, n / len(P), 0.0) for x, n in zip(centres, counts)]
        if lines:
            title = f"Share of responses by P, T = {temperature:g}\n{label}"
            panels.append(Panel(title, "entropy P (nats per token)", lines, {}))
    return panels


# --- Drawing --------------------------------------------------------------------------------------


def styles(labels: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Choose (colour, line style) by label: a method has its own colour, other labels take what is
    left, and then begin again with another line style."""
    named = dict(METHODS.values())
    style = {label: (named[label], "-") for label in labels if label in named}
    free = [colour for name, colour in named.items() if name not in style]
    free.append("#F0E442")
    for i, label in enumerate(label for label in labels if label not in named):
        row, column = divmod(i, len(free))
        style[label] = (free[(column + 2) % len(free)], LINES[row % len(LINES)])
    return style


def draw_figure(
    path: Path, panels: list[Panel], style: dict[str, tuple[str, str]], note: str
) -> None:
    """Draw the panels in two columns, with one legend below them. The note is about bands: it is
    left out if there are none."""
    import matplotlib.pyplot as plt

    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    figure = plt.figure(layout="constrained")
    handles, errors = {}, []
    for place, panel in enumerate(panels, start=1):
        handles |= draw_panel(figure.add_subplot(rows, columns, place), panel, style)
        for points in panel.lines.values():
            errors += [error for _, _, error in points]
    legend_rows = math.ceil(len(handles) / columns)
    figure.set_size_inches(5.2 * columns, 2.9 * rows + 0.4 + 0.22 * legend_rows)
    figure.legend(
        handles.values(),
        handles,
        loc="outside lower center",
        frameon=False,
        title=note if any(errors) else "",
        ncols=columns,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_panel(axis, panel: Panel, style: dict[str, tuple[str, str]]) -> dict:
    """Draw lines, bands and rings; returns what the legend shows of each label."""
    import numpy

    handles = {}
    for i, (label, points) in enumerate(panel.lines.items()):
        x, mean, error = numpy.array(points).T
        colour, line = style[label]
        behind = i / len(panel.lines)  # and thicker, so that equal lines stay visible
        look = dict(color=colour, linewidth=1.2 + 2 * behind, zorder=3 - behind)
        marker = "o" if len(points) < 15 else None
        [handles[label]] = axis.plot(x, mean, line, marker=marker, markersize=3, **look)
        axis.fill_between(x, mean - error, mean + error, color=colour, alpha=0.15, linewidth=0)
    for label, points in panel.rings.items():
        colour, _ = style[label]
        ring = axis.errorbar(*zip(*points), fmt="o", color=colour, markerfacecolor="white")
        handles.setdefault(label, ring)
    low, high = axis.get_ylim()
    if "Variance" in panel.title:  # after EDA that of some first steps is 100 times the others'
        axis.set_yscale("symlog", linthresh=1)
        axis.yaxis.set_major_formatter("{x:g}")
        low = 0.0
    axis.set_ylim(min(-0.01, low), max(0.2, high))  # noise around 0 is not blown up
    axis.set_title(panel.title, fontsize=11)
    axis.set_xlabel(panel.xlabel)
    axis.set_axisbelow(True)
    axis.grid(axis="y", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    return handles
