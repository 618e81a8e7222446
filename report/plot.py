"""`eval.py plot` draws curves over the steps of training, and the paper's Figures 2 and 3.

Bands are standard errors: over seeds, or over problems where there is one seed.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import cycle, product
from pathlib import Path
from statistics import fmean, mode, stdev

from errors import UserError
from report.runs import Run
from report.tables import group

KINDS = {  # of rows that a step trains on
    "right": "right responses",
    "wrong": "wrong responses",
    "reflect": "forced reflections",
    "answer": "injected answers",
    "reference": "references",
    "prefix": "prefixes of references",
}


def kinds_of(metrics: list[dict]) -> dict[str, str]:
    """The kinds of rows that these lines of metrics.jsonl tell apart, with a name for each."""
    prefix = "relative_entropy_"
    kinds = {}
    for line in metrics[-1:]:
        for key in line:
            if key.startswith(prefix):
                kind = key.removeprefix(prefix)
                kinds[kind] = KINDS.get(kind, kind)
    return kinds


TRAINING = {  # a figure's panels: the title of each key of metrics.jsonl
    "accuracy": {"accuracy": "Accuracy in training, as sampled", "reward": "Reward, as trained on"},
    "advantage": {
        "mixed_groups": "Mixed groups, as sampled",
        "mixed_groups_corrected": "Mixed groups, as trained on",
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
    "update": {"loss": "Loss", "grad_norm": "Gradient norm, before clipping"},
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
# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000 #F0E442".split()
LINES = ("-", "--", ":", "-.")
Points = list[tuple[float, float, float]]  # (x, mean, standard error)


@dataclass
class Panel:
    title: str
    xlabel: str
    lines: dict[str, Points]  # by label


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
    style = {}
    kinds = dict(KINDS)
    for run in runs:
        kinds |= kinds_of(run.metrics)
    for names in (kinds.values(), dict.fromkeys(run.label for run in runs)):
        style |= zip(names, cycle(product(LINES, COLOURS)))
    out.mkdir(parents=True, exist_ok=True)
    for name, panels in figures.items():
        draw_figure(out / f"{name}.png", panels, style)
    return [out / f"{name}.png" for name in figures]


# --- The data of the panels -----------------------------------------------------------------------


def all_panels(runs: list[Run], window: int) -> dict[str, list[Panel]]:
    """Collect the panels of each figure by its name; those without data are left out."""
    figures = defaultdict(list)
    labels = group(runs, lambda run: run.label)

    def add(figure, title, xlabel, lines):
        lines = {name: line for name, line in lines.items() if line}
        if lines:
            figures[figure].append(Panel(title, xlabel, lines))

    def compare(points, window=1):
        return {label: curve(map(points, seeds), window) for label, seeds in labels.items()}

    for task in dict.fromkeys(e["task"] for run in runs for e in run.evals):
        lines = compare(partial(held_out, task))
        add("accuracy", f"Held-out accuracy, {task}", "step", lines)
    steps = f"step (mean of the last {window})" if window > 1 else "step"
    for figure, titles in TRAINING.items():
        for key, title in titles.items():
            add(figure, title, steps, compare(partial(metric, key), window))
    for label, seeds in labels.items():
        lines = {}
        for kind, name in kinds_of(sum((run.metrics for run in seeds), [])).items():
            points = partial(metric, f"relative_entropy_{kind}")
            lines[name] = curve(map(points, seeds), window)
        add("relative_entropy", f"P / mean of its group\n{label}", steps, lines)
    for figure, titles in ANALYSES.items():
        for title, place in titles.items():
            add(figure, title, "sampling temperature", compare(partial(by_temperature, place)))
    for title, lines in histograms(runs).items():
        add("entropy_histogram", title, "entropy P (nats per token)", lines)
    return figures


def curve(seeds: Iterable[Points], window: int) -> Points:
    """Average over the seeds that have points, with the standard error, at each x that all have.

    Each seed is first smoothed by the mean of its last `window` values. A single seed keeps its
    own standard errors.
    """
    series = [points for points in seeds if points]
    by_x = defaultdict(list)
    for points in series:
        for i, (x, _, error) in enumerate(points):
            last = points[max(0, i + 1 - window) : i + 1]
            by_x[x].append((fmean(value for _, value, _ in last), error))
    line = []
    for x, pairs in sorted(by_x.items()):
        values = [value for value, _ in pairs]
        _, error = pairs[0]
        if len(values) > 1:
            error = stdev(values) / math.sqrt(len(values))
        if len(values) == len(series):
            line.append((x, fmean(values), error))
    return line


def metric(key: str, run: Run) -> Points:
    """Return one number of metrics.jsonl by step."""
    return [(step["step"], step[key], 0.0) for step in run.metrics if step.get(key) is not None]


def held_out(task: str, run: Run) -> Points:
    """Return held-out accuracy by step, over as many problems as the run was evaluated on most
    often. Others are left out: the line would jump where the policy did not change."""
    evals = [e for e in run.evals if e["task"] == task]
    problems = [e["problems"] for e in evals]
    points = []
    for e in evals:
        if e["problems"] == mode(problems):
            points.append((e["step"], e["accuracy"], e.get("stderr", 0.0)))
    return points


def by_temperature(place: tuple[str, ...], run: Run) -> Points:
    """Return a number that eval.py found, by the sampling temperature."""
    points = []
    for temperature, found in run.analyses:
        for key in place:
            found = (found or {}).get(key)
        if found is not None:
            points.append((temperature, found, 0.0))
    return sorted(points)


def histograms(runs: list[Run]) -> dict[str, dict[str, Points]]:
    """Return how P is distributed over right and over wrong responses, by the title of the panel:
    one for each run and temperature at which eval.py --entropy was run."""
    import numpy

    panels = {}
    for run in runs:
        for temperature, found in run.analyses:
            entropy = found.get("entropy") or {}
            sides = {"right": entropy.get("P_correct", []), "wrong": entropy.get("P_wrong", [])}
            highest = max(sides["right"] + sides["wrong"], default=0.0)
            lines = {}
            for kind, P in sides.items():
                counts, edges = numpy.histogram(P, 24, (0.0, highest))
                centres = edges[:-1] + edges[1] / 2
                shares = counts / max(1, len(P))
                lines[KINDS[kind]] = [(x, share, 0.0) for x, share in zip(centres, shares) if P]
            panels[f"Share of responses by P, T = {temperature:g}\n{run.path}"] = lines
    return panels


# --- Drawing --------------------------------------------------------------------------------------


def draw_figure(path: Path, panels: list[Panel], style: dict[str, tuple]) -> None:
    """Draw the panels in two columns, with one legend below them."""
    import matplotlib.pyplot as plt

    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    figure = plt.figure(layout="constrained")
    handles = {}
    for place, panel in enumerate(panels, start=1):
        handles |= draw_panel(figure.add_subplot(rows, columns, place), panel, style)
    legend_rows = math.ceil(len(handles) / columns)
    figure.set_size_inches(5.2 * columns, 2.9 * rows + 0.4 + 0.22 * legend_rows)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns)
    figure.savefig(path)
    plt.close(figure)


def draw_panel(axis, panel: Panel, style: dict[str, tuple]) -> dict:
    """Draw each line with its standard error as a band; return the lines by label."""
    import numpy

    handles = {}
    for label, points in panel.lines.items():
        x, mean, error = numpy.array(points).T
        line, colour = style[label]
        marker = "." if len(points) < 15 else None
        look = dict(color=colour, marker=marker, alpha=0.8)
        [handles[label]] = axis.plot(x, mean, line, **look)
        axis.fill_between(x, mean - error, mean + error, color=colour, alpha=0.15, linewidth=0)
    if "after EDA" in panel.title:  # EDA raises that of some steps to 100 times the others'
        axis.set_yscale("symlog", linthresh=1)
    low, high = axis.get_ylim()
    axis.set_ylim(min(-0.01, low), max(0.2, 1.05 * high))  # noise around 0 is not blown up
    axis.set_title(panel.title)
    axis.set_xlabel(panel.xlabel)
    axis.grid(axis="y", alpha=0.3)
    return handles
