"""The comparison of runs: tables in Markdown, mean ± standard deviation (n - 1) over seeds."""
import statistics

from data import UserError
from results.paper import CONTEXT, TASKS
from results.runs import Run
from results.tables import group, markdown

TRAINING = {"mixed_groups": "mixed, sampled", "mixed_groups_corrected": "mixed, corrected",
            "advantage_variance": "var A", "advantage_variance_eda": "var Â", "entropy_sampled": "entropy, sampled",
            "entropy": "entropy, trained on", "accuracy": "accuracy, sampled", "self_reflection": "self-reflection"}


def comparison(runs: list[Run]) -> str:
    """Methods x benchmarks in percent, how each was measured, and methods x metrics of training.

    The average is the micro average over the paper's five tasks, or else over the tasks that every run has.
    """
    tasks = list(dict.fromkeys(task for r in runs for task in r.scores))
    tasks = [t for t in TASKS if t in tasks] + [t for t in tasks if t not in TASKS]
    if not tasks:
        raise UserError("nothing to compare: no run has an evals.jsonl or an eval/ folder of `eval.py --out RUN/eval`")
    pool = [t for t in tasks if all(t in r.scores for r in runs)]
    if set(TASKS) <= set(pool):
        pool = list(TASKS)
    elif any(t.endswith(")") for t in pool):                            # one task in two ways: no average of both
        pool = []
    rows = []
    for label, alike in group(runs, lambda r: r.label).items():
        columns = [[micro_average([r.scores[t] for t in pool]) for r in alike] if pool else []]
        columns += [[r.scores[t]["accuracy"] for r in alike if t in r.scores] for t in tasks]
        seeds = ", ".join(str(r.seed) for r in alike)
        rows.append([label, f"{len(alike)} ({seeds})", *(mean_std(c, len(alike)) for c in columns)])
    below = ["Accuracy in percent at the last step: mean ± standard deviation over seeds. Average over all problems of "
             f"{', '.join(pool) or 'the tasks that every run has (there is none)'}.", "", *notes(runs, tasks)]
    return "\n".join([markdown(["method", "n (seeds)", "average", *tasks], rows), "", *below, "", training_table(runs)])


def training_table(runs: list[Run]) -> str:
    """Methods x metrics of training: the mean over all steps, then mean ± std over seeds; and seconds."""
    rows = []
    for label, alike in group([r for r in runs if r.metrics], lambda r: r.label).items():
        series = [[[line[key] for line in r.metrics if key in line] for r in alike] for key in TRAINING]
        columns = [[statistics.fmean(values) for values in column if values] for column in series]
        seconds = [sum(v for line in r.metrics for k, v in line.items() if k.startswith("seconds_")) for r in alike]
        rows.append([label, *(mean_std(c, len(alike), 1, 3) for c in columns), mean_std(seconds, len(alike), 1, 0)])
    if not rows:
        return ""
    below = ("Means over all steps of training: mean ± standard deviation over seeds. Seconds are those of all steps "
             "together.")
    return "\n".join([markdown(["method", *TRAINING.values(), "seconds"], rows), "", below])


def micro_average(numbers: list[dict]) -> float:
    return sum(s["accuracy"] * s["problems"] for s in numbers) / sum(s["problems"] for s in numbers)


def mean_std(values: list[float], expected: int, scale: int = 100, digits: int = 2) -> str:
    if not values:
        return "–"
    std = f" ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    mean = f"{scale * statistics.fmean(values):.{digits}f}"
    return mean + std + (f" (n = {len(values)})" if len(values) < expected else "")


def notes(runs: list[Run], tasks: list[str]) -> list[str]:
    """What a reader of the table must know: how each column was measured, and which runs had not ended."""
    lines = []
    for task in tasks:
        ways = sorted({measured_how(r.scores[task]) for r in runs if task in r.scores})
        lines.append(f"- {task}: " + ("NOT MEASURED ALIKE: " if len(ways) > 1 else "") + "; ".join(ways))
    for r in runs:
        last = max((e["step"] for e in r.evals), default=0)
        if not r.summaries and last < r.steps:
            lines.append(f"- {r.path}: last evaluated at step {last} of {r.steps}")
    return lines


def measured_how(s: dict) -> str:
    """What two scores must have in common to be compared."""
    parts = [f"{s['problems']} problems, n = {s['n']}, T = {s['temperature']:g}"]
    parts += [f"at most {s['max_new_tokens']} tokens"] if s.get("max_new_tokens") else []
    parts += [f"context {s['context']}"] if s.get("context", CONTEXT) != CONTEXT else []
    parts += [f"top-p {s['top_p']:g}"] if s.get("top_p", 1.0) != 1.0 else []
    return ", ".join(parts)
