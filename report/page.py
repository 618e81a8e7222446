"""A finished run writes report.md into its folder, and prints the short form of it."""

import math
import re
from pathlib import Path

from engine.console import say
from engine.folder import read_json, read_lines
from engine.processes import is_main
from errors import UserError
from report import plot, runs, show
from report.tables import average, group, markdown, number, percent, percent_and_error, visible

KINDS_LEGEND = """\
EDA divides the advantage A of a row by its P / mean, where P is the row's entropy and the mean is
that of its group; the result is Â. If every kind of row is near 1, EDA changes little. `% of Â` is
a kind's share of the sum of |Â|: the rows with the largest share decide what the update does."""


def conclude(flags) -> int:
    """Write report.md, with figures from ten steps on, and print its table and its warnings.

    Returns 0, the exit code of a whole run.
    """
    if not is_main():  # the other processes have written nothing
        return 0
    out = Path(flags.out)
    config = read_json(out / "config.json")
    metrics, _ = read_lines(out / "metrics.jsonl")
    evals, _ = read_lines(out / "evals.jsonl")
    table = summary(metrics, evals)
    doubts = warnings(metrics, config)
    parts = [f"# {out.name}", *setting(config), table]
    parts += [f"**Warning:** {doubt}" for doubt in doubts]
    kinds = kinds_of_rows(metrics)
    if kinds and not flags.sft:
        parts += ["## What EDA sees", KINDS_LEGEND, kinds]
    try:
        if len(metrics) >= 10:
            figures = plot.draw(runs.read_runs([out]), out / "figures")
            parts += [f"![{path.name}](figures/{path.name})" for path in figures]
    except UserError:  # no figures without matplotlib
        pass
    parts.append("## Groups at the first, middle and last step, injected text in [brackets]")
    for step in sorted({1, flags.steps // 2 + 1, flags.steps}):
        parts.append(fenced(show.as_text(show.find_group(out, step, 1), width=100)))
    (out / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    say(table)
    for doubt in doubts:
        say(f"warning: {doubt}")
    say(f"the model is in {out / 'final'}; report.md beside it has figures and samples, too")
    return 0


def setting(config: dict) -> list[str]:
    """Write what was run, and on what, as two paragraphs."""
    versions = ", ".join(map(" ".join, config["versions"].items()))
    return [
        visible(f"`python {config['command']}`, commit {config['commit']}"),
        f"{config['device']}, processes: {config['processes']}, threads: {config['threads']}; "
        f"{versions}. {config['parameters'] / 1e6:.1f}M parameters, {config['problems']} problems.",
    ]


def fenced(text: str) -> str:
    """Put text into a code block of Markdown, whatever backticks are in it."""
    longest = max(map(len, ["``", *re.findall("`+", text)]))
    fence = "`" * (longest + 1)
    return f"{fence}\n{text}\n{fence}"


def first_and_last(metrics: list[dict]) -> tuple[list[dict], list[dict]]:
    """Return the first and the last tenth of the steps, at least one of each."""
    count = math.ceil(len(metrics) / 10)
    return metrics[:count], metrics[-count:]


def summary(metrics: list[dict], evals: list[dict]) -> str:
    """Make a table of held-out accuracy before and after training, and of first and last steps."""
    first, last = first_and_last(metrics)
    steps = f"{len(first)} of {len(metrics)} steps"
    rows = []

    def add(name, early, late):
        rows.append({"": name, f"first {steps}": early, f"last {steps}": late})

    for task, of_task in group(evals, lambda e: e["task"]).items():
        before, after = percent_and_error(of_task[0]), percent_and_error(of_task[-1])
        add(f"held-out accuracy, {task}, before and after (%)", before, after)
    for key, name, show_number in ROWS:
        if average(metrics, key) is not None:
            add(name, show_number(average(first, key)), show_number(average(last, key)))
    return markdown(rows)


ROWS = [  # key of metrics.jsonl, name, how it is shown
    ("accuracy", "accuracy, sampled (%)", percent),
    ("mixed_accuracy", "mixed groups, sampled (%)", percent),
    ("mixed_accuracy_corrected", "mixed groups, trained on (%)", percent),
    ("loss", "loss", number),
]


def kinds_of_rows(metrics: list[dict]) -> str | None:
    """Tabulate P / mean and the share of |Â| by kind of row, early and late; None if unknown."""
    early, late = first_and_last(metrics)
    rows = []
    for kind, name in plot.kinds_of(metrics).items():
        row = {f"first and last {len(early)} of {len(metrics)} steps": name}
        for when, steps in (("early", early), ("late", late)):
            relative = average(steps, f"relative_entropy_{kind}")
            row[f"P / mean {when}"] = number(relative, ".2f")
            row[f"% of Â {when}"] = percent(average(steps, f"advantage_share_{kind}"))
        if average(metrics, f"relative_entropy_{kind}") is not None:
            rows.append(row)
    return markdown(rows) if rows else None


def diverged(metrics: list[dict]) -> bool:
    """Tell whether the last steps sampled nearly at random (more than 4 nats per token), or had no
    gradient in spite of advantages."""
    _, late = first_and_last(metrics)
    if average(late, "advantage_variance") and not average(late, "grad_norm"):
        return True
    return (average(late, "entropy") or 0) > 4


def warnings(metrics: list[dict], config: dict) -> list[str]:
    """List what would make one doubt the run, most serious first."""
    skipped, wrong = sum(m["skipped_updates"] for m in metrics), len(config["wrong_references"])
    left_out = len(config["problems_left_out"])
    gap, cut = average(metrics, "logprob_gap") or 0.0, average(metrics, "truncated") or 0.0
    sampled = average(metrics, "mixed_groups") or 0.0
    corrected = average(metrics, "mixed_groups_corrected") or 0.0
    doubts = [
        (
            diverged(metrics),
            "the model diverged: its last tokens were nearly uniform, or its gradients 0 in spite "
            "of advantages; set --lr lower",
        ),
        (skipped, f"{skipped} updates were skipped because their gradient was not finite"),
        (
            all(m["mixed_groups_corrected"] == 0 for m in metrics),
            "no group was ever mixed, so nothing was learned",
        ),
        (
            corrected < sampled,
            f"corrections lowered the share of mixed groups from {percent(sampled)}% to "
            f"{percent(corrected)}%, so there was less to learn from than without them",
        ),
        (gap > 0.05, f"sampler and trainer differ by {gap:.3f} nats a token"),
        (cut > 0.1, f"{percent(cut)}% of the responses were cut at --max-new-tokens"),
        (
            wrong,
            f"{wrong} of {config['problems']} reference solutions are not graded right "
            "(--drop-wrong-references)",
        ),
        (left_out, f"{left_out} problems were left out: too long a prompt"),
    ]
    return [sentence for doubtful, sentence in doubts if doubtful]
