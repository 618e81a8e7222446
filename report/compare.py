"""`eval.py compare` prints tables of mean ± standard deviation (n - 1) over seeds."""

import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from statistics import fmean, median, stdev

from errors import UserError
from report.paper import CONTEXT, PROBLEMS
from report.runs import Run
from report.tables import average, group, markdown

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
MEASURED = dict(  # settings of an evaluation, with the defaults for files that do not name them
    problems=None, max_new_tokens=None, context=CONTEXT, top_p=1.0
)
ACCURACY_LEGEND = """\
Accuracy in percent at the last step: mean ± standard deviation over seeds [median, from three
seeds on]. The average is over all problems of the paper's five benchmarks."""
DIFFERENCE_LEGEND = """\
Differences to {} in points, paired by seed: mean ± standard error, t = mean / standard error,
and the number n of seeds that both have."""
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
    keys = measured(runs)
    if not keys:
        raise UserError(
            "nothing to compare: no run has an evals.jsonl or an eval/ folder of "
            "`eval.py --out RUN/eval`"
        )
    accuracies = partial(accuracy, keys=keys)
    parts = [table(runs, accuracies, partial(mean_std, digits=1)), accuracy_legend(runs, keys)]
    if against is not None:
        parts += [difference_table(runs, accuracies, against), DIFFERENCE_LEGEND.format(against)]
    trained = [run for run in runs if run.metrics]
    if trained:
        parts += [table(trained, training, partial(mean_std, digits=3)), TRAINING_LEGEND]
    for run in {run.method: run for run in runs if run.shared}.values():
        parts[-1] += f"\n- all runs of {run.method}:{run.shared}"
    return "\n\n".join(parts)


def table(runs: list[Run], numbers: Callable[[Run], Numbers], write: Callable) -> str:
    """Make a table with a row for each label.

    write(values, seeds) makes a cell of the numbers that are known and the number of seeds.
    """
    rows = []
    for label, seeds in group(runs, lambda run: run.label).items():
        row = {"method": label, "seeds": str(len(seeds))}
        of_seeds = list(map(numbers, seeds))
        for name in of_seeds[0]:
            known = [of_seed[name] for of_seed in of_seeds if of_seed[name] is not None]
            row[name] = "–"
            if known:
                row[name] = write(known, len(seeds))
        rows.append(row)
    return markdown(rows)


def mean_std(values: list[float], seeds: int, digits: int) -> str:
    """Write mean ± standard deviation [median], and the number of values if some are missing."""
    text = f"{fmean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {stdev(values):.{digits}f}"
    if len(values) > 2:
        text += f" [{median(values):.{digits}f}]"
    if len(values) < seeds:
        text += f" (n = {len(values)})"
    return text


# --- Accuracy -------------------------------------------------------------------------------------


def measured(runs: list[Run]) -> list[tuple]:
    """Return every (task, way of sampling) of which a run has a result."""
    return list(dict.fromkeys(key for run in runs for key in run.results))


def accuracy(run: Run, keys: list[tuple]) -> Numbers:
    """Return the run's accuracies in percent, by column.

    The average over the paper's five tasks comes first, if each was measured in one way.
    """
    numbers = {}
    papers = [key for key in keys if key[0] in PROBLEMS]
    if len(papers) == len(PROBLEMS):
        numbers["average"] = micro_average(list(map(run.results.get, papers)))
    for key in keys:
        numbers[" ".join(key)] = micro_average([run.results.get(key)])
    return numbers


def micro_average(results: list[dict | None]) -> float | None:
    """Return the accuracy in percent over all problems of some results; None if one is missing."""
    right = problems = 0
    for result in results:
        if result is None:
            return None
        right += result["accuracy"] * result["problems"]
        problems += result["problems"]
    return 100 * right / problems


def accuracy_legend(runs: list[Run], keys: list[tuple]) -> str:
    """Say how each column was measured, which runs were not evaluated at their last step, and
    which seeds were run twice."""
    lines = [ACCURACY_LEGEND]
    for key in keys:
        ways = {}
        for run in runs:
            if key in run.results:
                ways[how_measured(run.results[key])] = True
        warning = "NOT MEASURED ALIKE: " if len(ways) > 1 else ""
        lines.append(f"- {' '.join(key)}: {warning}{'; '.join(ways)}")
    for run in runs:
        if run.evals and run.evals[-1]["step"] < run.steps:
            lines.append(
                f"- {run.path}: last evaluated at step {run.evals[-1]['step']} of {run.steps}"
            )
    for (label, seed), count in Counter((run.label, run.seed) for run in runs).items():
        if count > 1:
            lines.append(f"- {label}: {count} of its runs have the seed {seed}")
    return "\n".join(lines)


def how_measured(result: dict) -> str:
    """Write the settings that two results must share to be compared."""
    return " ".join(f"{name}={result.get(name, old)}" for name, old in MEASURED.items())


def difference_table(runs: list[Run], numbers: Callable[[Run], Numbers], against: str) -> str:
    """Make a table of every other label's differences to `against`, paired by seed."""
    baseline = {run.seed: numbers(run) for run in runs if run.label == against}
    if not baseline:
        labels = list(dict.fromkeys(run.label for run in runs))
        raise UserError(f"--against {against}: no label of that name; there are {labels}")
    if len({(run.label, run.seed) for run in runs}) < len(runs):
        raise UserError("--against: two runs of one label have the same seed; leave one out")

    def differences(run):
        of_run, of_baseline = numbers(run), baseline.get(run.seed, {})
        for name, value in of_run.items():
            other = of_baseline.get(name)
            of_run[name] = None if None in (value, other) else value - other
        return of_run

    return table([run for run in runs if run.label != against], differences, paired)


def paired(differences: list[float], seeds: int) -> str:
    """Write mean, standard error, t and n of paired differences."""
    n = len(differences)
    mean = fmean(differences)
    if n == 1:
        return f"{mean:+.1f} (n = 1)"
    error = stdev(differences) / math.sqrt(n)
    t = mean / error if error else math.inf
    return f"{mean:+.1f} ± {error:.1f} (t = {t:.1f}, n = {n})"


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
    numbers["Â / A"] = median(ratios) if ratios else None
    numbers["seconds"] = seconds
    return numbers
