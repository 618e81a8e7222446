"""What a finished run says of itself."""
from pathlib import Path

from engine.console import say
from engine.folder import read_lines
from engine.processes import is_main


def conclude(flags) -> None:
    """Print held-out accuracy before and after, mixed groups before and after correction, and where everything is."""
    if not is_main():                                       # what the main process writes, only it reads
        return
    out, number = Path(flags.out), (int, float)
    evals = read_lines(out / "evals.jsonl", task=str, step=int, accuracy=number)[0]
    keys = () if flags.sft else ("mixed_groups", "mixed_groups_corrected", "accuracy")
    lines = read_lines(out / "metrics.jsonl", **dict.fromkeys(keys, number))[0]
    for task in flags.eval_tasks:
        accuracy = {e["step"]: e["accuracy"] for e in evals if e["task"] == task}
        say(f"held-out {task}: accuracy {accuracy[0]:.3f} before, {accuracy[flags.steps]:.3f} after training")
    for name, part in (("first", lines[:10]), ("last", lines[-10:])) if keys else ():
        average = {k: sum(m[k] for m in part) / len(part) for k in keys}
        say(f"{name} {len(part)} steps: mixed groups {average['mixed_groups']:.2f} as sampled, "
            f"{average['mixed_groups_corrected']:.2f} after correction; sampled accuracy {average['accuracy']:.3f}")
    say(f"the model is in {out / 'final'}, the curves in {out / 'metrics.jsonl'}; draw them: python eval.py plot {out} "
        f"--out {out}")
