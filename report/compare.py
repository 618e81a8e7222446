"""The comparison of runs: tables of mean ± standard deviation (n - 1) over seeds, in Markdown, LaTeX or CSV."""

import csv
import io
import statistics
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

from errors import UserError
from report.paper import CONTEXT, TASKS
from report.runs import Run
from report.tables import group, latex, markdown, mean, short

TRAINING = {
    "mixed_groups": "mixed",
    "mixed_groups_corrected": "mixed corr.",
    "advantage_variance": "var A",
    "advantage_variance_eda": "var Â",
    "entropy_sampled": "P",
    "entropy": "P trained",
    "accuracy": "accuracy",
    "self_reflection": "reflects",
}
TRAINING_LEGEND = """\
Means over all steps of training.
- mixed: share of groups with rewards that differ, as sampled and after correction (corr.)
- var: variance of the advantages in a group, before (A) and after EDA (Â)
- P: entropy in nats per token, as sampled and as trained on
- accuracy: share of the samples that are right; reflects: that say the reflection phrase of their own accord
- seconds: of all steps together"""


@dataclass
class Table:
    runs: list[Run]
    columns: dict[str, Callable[[Run], float | None]]
    digits: int  # behind the point; of seconds none
    below: str

    def rows(self) -> list[tuple[str, list[Run], dict[str, list[float]]]]:
        """(label, its runs, the values that they have in each column)"""
        return [
            (
                label,
                alike,
                {
                    name: [v for v in map(value, alike) if v is not None]
                    for name, value in self.columns.items()
                },
            )
            for label, alike in group(self.runs, lambda r: r.label).items()
        ]


def comparison(runs: list[Run], format: str = "markdown") -> str:
    """Runs x benchmarks in percent, how each was measured, and runs x metrics of training."""
    kinds = list(dict.fromkeys(frozenset(r.scores) for r in runs))
    widest = group(
        runs, lambda r: max((kind for kind in kinds if kind >= r.scores.keys()), key=len)
    )
    tables = [score_table(alike) for alike in widest.values()]  # so that no table is mostly empty
    tables += [training_table(trained)] if (trained := [r for r in runs if r.metrics]) else []
    if format == "csv":
        return as_csv(tables)
    tables[-1].below += "\n" + legend(runs)
    parts = []
    for table in tables:
        cells = [
            [
                label,
                str(len(alike)),
                *(
                    mean_std(v, len(alike), 0 if name == "seconds" else table.digits)
                    for name, v in values.items()
                ),
            ]
            for label, alike, values in table.rows()
        ]
        parts.append(
            (latex if format == "latex" else markdown)(["method", "seeds", *table.columns], cells)
        )
        parts.append(textwrap.indent(table.below, "% " if format == "latex" else ""))
    return "\n\n".join(parts)


def as_csv(tables: list[Table]) -> str:
    """A line for each number: to be read by another program."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(["method", "seeds", "quantity", "mean", "std", "n"])
    for label, alike, columns in (row for table in tables for row in table.rows()):
        for quantity, values in columns.items():
            if values:
                std = statistics.stdev(values) if len(values) > 1 else float("nan")
                writer.writerow(
                    [
                        label,
                        " ".join(str(r.seed) for r in alike),
                        quantity,
                        f"{mean(values):.6g}",
                        f"{std:.6g}",
                        len(values),
                    ]
                )
    return lines.getvalue().rstrip()


def score_table(runs: list[Run]) -> Table:
    """Their average is the micro average over the paper's five tasks, or else over the tasks that every run has; there
    is none where a task was sampled in two ways."""
    keys = list(dict.fromkeys(key for r in runs for key in r.scores))
    if not keys:
        raise UserError(
            "nothing to compare: no run has an evals.jsonl or an eval/ folder of `eval.py --out RUN/eval`"
        )
    keys.sort(key=lambda key: TASKS.index(key[0]) if key[0] in TASKS else len(TASKS))
    ways = group(keys, lambda key: key[0])
    names = {
        key: " ".join([short(key[0]), *key[1:]] if len(ways[key[0]]) > 1 else [short(key[0])])
        for key in keys
    }
    pool = [key for key in keys if all(key in r.scores for r in runs)]
    if set(TASKS) <= {task for task, _ in pool}:
        pool = [key for key in pool if key[0] in TASKS]
    if len(keys) == 1 or len({task for task, _ in pool}) < len(pool):
        pool = []
    columns = (
        {"average": lambda r: 100 * micro_average([r.scores[key] for key in pool])} if pool else {}
    )
    for key, name in names.items():
        columns[name] = lambda r, key=key: (
            100 * r.scores[key]["accuracy"] if key in r.scores else None
        )
    below = ["Accuracy in percent at the last step: mean ± standard deviation over seeds."]
    below += (
        [f"- average: over all problems of {', '.join(names[key] for key in pool)}"] if pool else []
    )
    for key, name in names.items():
        how = sorted({measured_how(r.scores[key]) for r in runs if key in r.scores})
        below.append(
            f"- {name}: {key[0]}, "
            + ("NOT MEASURED ALIKE: " if len(how) > 1 else "")
            + "; ".join(how)
        )
    for r in runs:
        last, in_training = (
            max((e["step"] for e in r.evals), default=0),
            all("step" in s for s in r.scores.values()),
        )
        below += (
            [f"- {r.path}: last evaluated at step {last} of {r.steps}"]
            if last < r.steps and in_training
            else []
        )
    return Table(runs, columns, 1, "\n".join(below))


def training_table(runs: list[Run]) -> Table:
    columns = {
        name: lambda r, key=key: mean(line[key] for line in r.metrics if key in line)
        for key, name in TRAINING.items()
    }
    columns["seconds"] = lambda r: sum(
        v for line in r.metrics for k, v in line.items() if k.startswith("seconds_")
    )
    return Table(runs, columns, 3, TRAINING_LEGEND)


def legend(runs: list[Run]) -> str:
    """What the labels do not name: flags that most runs of a method have in common but not with the defaults, seeds."""
    everywhere = [words for words in runs[0].usual if all(words in r.usual for r in runs)]
    lines = [f"- all runs, unless named otherwise: {', '.join(everywhere)}"] if everywhere else []
    for rest, alike in group(
        runs, lambda r: tuple(words for words in r.usual if words not in everywhere)
    ).items():
        lines += (
            [f"- {', '.join(dict.fromkeys(r.method for r in alike))}: {', '.join(rest)}"]
            if rest
            else []
        )
    seeds = {
        label: ", ".join(str(r.seed) for r in alike)
        for label, alike in group(runs, lambda r: r.label).items()
    }
    labels = group(seeds, seeds.get)
    lines += [
        f"- seeds {s}" + (f": {'; '.join(labels[s])}" if len(labels) > 1 else "") for s in labels
    ]
    return "\n".join(lines)


def micro_average(numbers: list[dict]) -> float:
    return sum(s["accuracy"] * s["problems"] for s in numbers) / sum(s["problems"] for s in numbers)


def mean_std(values: list[float], expected: int, digits: int) -> str:
    if not values:
        return "–"
    std = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{std}" + (
        f" (n = {len(values)})" if len(values) < expected else ""
    )


def measured_how(s: dict) -> str:
    """What two scores must have in common to be compared."""
    parts = [f"{s['problems']} problems, n = {s['n']}, T = {s['temperature']:g}"]
    parts += [f"at most {s['max_new_tokens']:g} tokens"] if s.get("max_new_tokens") else []
    parts += [f"context {s['context']:g}"] if s.get("context", CONTEXT) != CONTEXT else []
    parts += [f"top-p {s['top_p']:g}"] if s.get("top_p", 1.0) != 1.0 else []
    return ", ".join(parts)
