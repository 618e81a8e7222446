"""What a finished run says of itself."""
from pathlib import Path

from engine.console import say
from engine.folder import read_lines
from engine.processes import is_main


def conclude(flags) -> None:
    """Print held-out accuracy before and after, mixed groups before and after correction, and where everything is."""
    if not is_main():                                       # what the main process writes, only it reads
        return
    out = Path(flags.out)
    evals, lines = (read_lines(out / name)[0] for name in ("evals.jsonl", "metrics.jsonl"))
    for task in flags.eval_tasks:
        accuracy = {e["step"]: e["accuracy"] for e in evals if e["task"] == task}
        say(f"held-out {task}: accuracy {accuracy[0]:.3f} before, {accuracy[flags.steps]:.3f} after training")
    for name, part in (("first", lines[:10]), ("last", lines[-10:])) if not flags.sft else ():
        average = {k: sum(m[k] for m in part) / len(part)
                   for k in ("mixed_groups", "mixed_groups_corrected", "accuracy")}
        say(f"{name} {len(part)} steps: mixed groups {average['mixed_groups']:.2f} as sampled, "
            f"{average['mixed_groups_corrected']:.2f} after correction; sampled accuracy {average['accuracy']:.3f}")
    say(f"the model is in {out / 'final'}, the curves in {out / 'metrics.jsonl'}; draw them: python eval.py plot {out} "
        f"--out {out}")
