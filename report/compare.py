"""`eval.py compare` prints tables of mean ± standard deviation (n - 1) over seeds."""

import math
import statistics
from collections.abc import Callable
from functools import partial

from errors import UserError
from report.paper import CONTEXT, TASKS
from report.runs import Run
from report.tables import average, group, markdown, short

Numbers = dict[str, float | None]  # of one run, by the head of their column

TRAINING = {
    "mixed_groups": "mixed",
    "mixed_groups_corrected": "mixed trained",
    "advantage_variance": "var A",
    "advantage_variance_eda": "var Â",
    "entropy_sampled": "P",
    "entropy": "P trained",
    "accuracy": "accuracy",
    "self_reflection": "reflects",
}
ACCURACY_LEGEND = """\
Accuracy in percent at the last step: mean ± standard deviation over seeds [median, from three
seeds on]."""
DIFFERENCE_LEGEND = """\
Differences in points, paired by seed: mean ± standard error, t = mean / standard error, and the
number n of seeds that both have."""
TRAINING_LEGEND = """\
Means over all steps of training: mean ± standard deviation over seeds [median].
- mixed: share of groups whose rewards differ, as sampled and as trained on
- var: variance of the advantages in a group, before (A) and after EDA (Â)
- Â / A: the factor by which EDA raises that variance in the median step; the means depend on a
  few extreme steps
- P: entropy in nats per token, as sampled and as trained on
- accuracy: share of the samples that are right
- reflects: share of the samples that contain the reflection phrase of their own accord
- seconds: of all steps together"""


def comparison(runs: list[Run], against: str | None = None) -> str:
    """Return the tables of accuracy and of training, and say how each number was measured.

    against is a label: then a third table has every other label's paired differences to it. Raises
    UserError if nothing was evaluated, or if no run has that label.
    """
    names = column_names(runs)
    if not names:
        raise UserError(
            "nothing to compare: no run has an evals.jsonl or an eval/ folder of "
            "`eval.py --out RUN/eval`"
        )
    pool = averaged(runs)
    accuracies = partial(accuracy, names=names, pool=pool)
    parts = [table(runs, accuracies, 1), accuracy_legend(runs, names, pool)]
    if against is not None:
        parts += [difference_table(runs, accuracies, against), DIFFERENCE_LEGEND]
    trained = [run for run in runs if run.metrics]
    if trained:
        parts += [table(trained, training, 3), TRAINING_LEGEND]
    for run in {run.method: run for run in runs if run.shared}.values():
        parts[-1] += f"\n- all runs of {run.method}:{run.shared}"
    return "\n\n".join(parts)


def by_label(runs: list[Run]) -> dict[str, list[Run]]:
    return group(runs, lambda run: run.label)


def table(runs: list[Run], numbers: Callable[[Run], Numbers], digits: int) -> str:
    """Make a table with a row for each label, which has the means over its seeds."""
    rows = []
    for label, seeds in by_label(runs).items():
        row = {"method": label, "seeds": str(len(seeds))}
        of_seeds = list(map(numbers, seeds))
        for name in of_seeds[0]:
            values = [of_seed[name] for of_seed in of_seeds]
            row[name] = mean_std(values, 0 if name == "seconds" else digits)
        rows.append(row)
    return markdown(rows)


def mean_std(values: list[float | None], digits: int) -> str:
    """Write mean ± standard deviation [median], and the number of values if some are missing."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    text = f"{statistics.fmean(known):.{digits}f}"
    if len(known) > 1:
        text += f" ± {statistics.stdev(known):.{digits}f}"
    if len(known) > 2:
        text += f" [{statistics.median(known):.{digits}f}]"
    if len(known) < len(values):
        text += f" (n = {len(known)})"
    return text


# --- Accuracy -------------------------------------------------------------------------------------


def column_names(runs: list[Run]) -> dict[tuple, str]:
    """Name the column of each (task, way of sampling), in the order of the paper's tasks."""
    found = {}
    for run in runs:
        found |= run.results
    keys = sorted(found, key=lambda key: [*TASKS, key[0]].index(key[0]))
    tasks = [task for task, _ in keys]
    names = {}
    for task, way in keys:
        names[task, way] = short(task) if tasks.count(task) == 1 else f"{short(task)} {way}"
    return names


def averaged(runs: list[Run]) -> list[tuple]:
    """Choose what the average is over: the paper's five tasks, or else all that every run has.

    There is no average of one task, nor where a task was sampled in two ways.
    """
    pool = [key for key in column_names(runs) if all(key in run.results for run in runs)]
    papers = [key for key in pool if key[0] in TASKS]
    if len(papers) == len(TASKS):
        pool = papers
    tasks = {task for task, _ in pool}
    return pool if 1 < len(pool) == len(tasks) else []


def accuracy(run: Run, names: dict[tuple, str], pool: list[tuple]) -> Numbers:
    """Return the run's accuracies in percent, the average over `pool` first."""
    numbers = {}
    if pool:
        numbers["average"] = micro_average([run.results[key] for key in pool])
    for key, name in names.items():
        result = run.results.get(key)
        numbers[name] = 100 * result["accuracy"] if result else None
    return numbers


def micro_average(results: list[dict]) -> float:
    """Return the accuracy in percent over all problems of several tasks."""
    right = sum(result["accuracy"] * result["problems"] for result in results)
    return 100 * right / sum(result["problems"] for result in results)


def accuracy_legend(runs: list[Run], names: dict[tuple, str], pool: list[tuple]) -> str:
    """Say how each column was measured, and which runs were not evaluated at their last step."""
    lines = [ACCURACY_LEGEND]
    if pool:
        lines.append(f"- average: over all problems of {', '.join(map(names.get, pool))}")
    for key, name in names.items():
        measured = {how_measured(run.results[key]) for run in runs if key in run.results}
        how = "; ".join(sorted(measured))
        if len(measured) > 1:
            how = f"NOT MEASURED ALIKE: {how}"
        lines.append(f"- {name}: {key[0]}, {how}")
    for run in runs:
        last = max((evaluation["step"] for evaluation in run.evals), default=0)
        if last < run.steps and all("step" in numbers for numbers in run.results.values()):
            lines.append(f"- {run.path}: last evaluated at step {last} of {run.steps}")
    return "\n".join(lines)


def how_measured(numbers: dict) -> str:
    """Describe what two results must have in common to be compared."""
    parts = [f"{numbers['problems']} problems, n = {numbers['n']}, T = {numbers['temperature']:g}"]
    if numbers.get("max_new_tokens"):
        parts.append(f"at most {numbers['max_new_tokens']} tokens")
    if numbers.get("context", CONTEXT) != CONTEXT:
        parts.append(f"context {numbers['context']}")
    if numbers.get("top_p", 1.0) != 1.0:
        parts.append(f"top-p {numbers['top_p']:g}")
    return ", ".join(parts)


def difference_table(runs: list[Run], numbers: Callable[[Run], Numbers], against: str) -> str:
    """Make a table of every other label's differences to `against`, paired by seed."""
    labels = by_label(runs)
    if against not in labels:
        raise UserError(f"--against {against}: no label of that name; there are {list(labels)}")
    if len({(run.label, run.seed) for run in runs}) < len(runs):
        raise UserError("--against: two runs of one label have the same seed; leave one out")
    baseline = {run.seed: numbers(run) for run in labels.pop(against)}
    rows = []
    for label, seeds in labels.items():
        differences = {name: [] for name in numbers(runs[0])}
        for run in seeds:
            for name, value in numbers(run).items():
                base = baseline.get(run.seed, {}).get(name)
                if value is not None and base is not None:
                    differences[name].append(value - base)
        row = {f"minus {against}": label}
        for name, of_seeds in differences.items():
            row[name] = paired(of_seeds)
        rows.append(row)
    return markdown(rows)


def paired(differences: list[float]) -> str:
    """Write mean, standard error, t and n of paired differences."""
    n = len(differences)
    if n == 0:
        return "–"
    difference = statistics.fmean(differences)
    if n == 1:
        return f"{difference:+.1f} (n = 1)"
    error = statistics.stdev(differences) / math.sqrt(n)
    t = difference / error if error else math.inf
    return f"{difference:+.1f} ± {error:.1f} (t = {t:.1f}, n = {n})"


# --- Training -------------------------------------------------------------------------------------


def training(run: Run) -> Numbers:
    """Return means over a run's steps, the median step's ratio of variances, and all seconds."""
    numbers = {}
    for key, name in TRAINING.items():
        numbers[name] = average(run.metrics, key)
    ratios = []
    seconds = 0.0
    for step in run.metrics:
        if step.get("advantage_variance"):
            ratios.append(step["advantage_variance_eda"] / step["advantage_variance"])
        seconds += sum(value for key, value in step.items() if key.startswith("seconds_"))
    numbers["Â / A"] = statistics.median(ratios) if ratios else None
    numbers["seconds"] = seconds
    return numbers
