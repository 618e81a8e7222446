"""What a finished run says of itself: report.md in its folder, and the same in short on the screen."""

import json
from pathlib import Path

from engine.console import say
from engine.folder import read_json, read_lines
from engine.processes import is_main
from errors import UserError
from report import plot, runs, show
from report.tables import markdown, mean, percent


def conclude(flags) -> int:
    """Write report.md, with figures if there are ten steps to draw, and print what matters most of it. Returns 0."""
    if not is_main():  # what the main process writes, only it reads
        return 0
    out = Path(flags.out)
    config = read_json(out / "config.json")
    metrics = read_lines(out / "metrics.jsonl")[0]
    table = summary(flags, metrics, read_lines(out / "evals.jsonl")[0])
    warned = warnings(metrics, config)
    try:
        figures = (
            [p.name for p in plot.draw(runs.read_runs([str(out)]), out / "figures")]
            if len(metrics) >= 10
            else []
        )
    except UserError:  # no matplotlib: it is only there to draw
        figures = []
    groups = [
        show.as_text(show.find_group(out, step, 1), width=100)
        for step in sorted({1, (flags.steps + 1) // 2, flags.steps})
    ]
    changed = " ".join(f"{k}={json.dumps(v)}" for k, v in config["changed"].items()) or "none"
    versions = ", ".join(f"{name} {version}" for name, version in config["versions"].items())
    (out / "report.md").write_text(
        "\n\n".join(
            [
                f"# {out.name}",
                f"`python {config['command']}`, commit {config['commit']}",
                f"{config['device']}, processes: {config['processes']}, threads: {config['threads']}; {versions}. "
                f"{config['parameters'] / 1e6:.1f}M parameters, {config['problems']} problems. "
                f"Flags that differ from the defaults: {changed}.",
                table,
                *(f"**Warning:** {w}" for w in warned),
                *(f"![{name}](figures/{name})" for name in figures),
                "## Groups at the first, middle and last step, injected text in [brackets]",
                *(f"```\n{group}\n```" for group in groups),
            ]
        )
        + "\n",
        encoding="utf-8",
    )
    say(table)
    for warning in warned:
        say(f"warning: {warning}")
    say(
        f"the model is in {out / 'final'}, all of this with figures and samples in {out / 'report.md'}"
    )
    return 0


def summary(flags, metrics: list[dict], evals: list[dict]) -> str:
    """Held-out accuracy before and after, and what groups were like in the first and last steps."""
    accuracy = {
        (e["task"], e["step"]): f"{percent(e['accuracy'])} ± {percent(e['stderr'])}" for e in evals
    }
    rows = [
        [f"held-out accuracy, {task}", accuracy[task, 0], accuracy[task, flags.steps]]
        for task in flags.eval_tasks
    ]
    names = {
        "accuracy": "accuracy, sampled",
        "mixed_groups": "mixed groups, sampled",
        "mixed_groups_corrected": "mixed groups, corrected",
        "loss": "loss",
    }
    for key, name in names.items():
        ends = [average(part, key) for part in (metrics[:10], metrics[-10:])]
        if None not in ends:
            rows.append([name, *(f"{x:.2f}" if key == "loss" else percent(x) for x in ends)])
    return markdown(
        [f"in percent; evaluated, or mean of {min(10, len(metrics))} steps", "first", "last"], rows
    )


def average(metrics: list[dict], key: str) -> float | None:
    return mean(m[key] for m in metrics if m.get(key) is not None)


def warnings(metrics: list[dict], config: dict) -> list[str]:
    """What would make one doubt the run, largest first."""
    skipped, wrong = sum(m["skipped_updates"] for m in metrics), len(config["wrong_references"])
    gap, cut = average(metrics, "logprob_gap") or 0.0, average(metrics, "truncated") or 0.0
    found = [
        (skipped, f"{skipped} updates were skipped because their gradient was not finite"),
        (
            all(m["mixed_groups_corrected"] == 0 for m in metrics),
            "no group was ever mixed, so nothing was learned",
        ),
        (gap > 0.05, f"sampler and trainer differ by {gap:.3f} nats a token"),
        (cut > 0.1, f"{percent(cut)}% of the responses were cut at --max-new-tokens"),
        (
            wrong,
            f"{wrong} of {config['problems']} reference solutions are not graded right (--drop-wrong-references)",
        ),
        (
            config["problems_left_out"],
            f"{len(config['problems_left_out'])} problems were left out: too long a prompt",
        ),
    ]
    return [sentence for true, sentence in found if true]
