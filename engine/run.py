"""A run's folder and its life around the method: opened or gone on with, logged, saved, evaluated, stopped."""

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path

import torch
import transformers

from data import Problem
from engine.checkpoints import (
    check_space,
    checkpoint_folders,
    load_checkpoint,
    newest_checkpoint,
    prune,
    save_checkpoint,
    save_final,
)
from engine.console import SECONDS, Progress, Stop, say
from engine.flags import MAY_CHANGE, option
from engine.folder import append, claim, flush, read_json, read_lines, remove, write_json
from engine.memory import peak_memory
from engine.models import CannotSample, Policy
from engine.processes import gather, is_main, on_main, world_size
from engine.trainer import Trainer
from errors import UserError

LOGS = ("metrics.jsonl", "samples.jsonl", "evals.jsonl")
WRITTEN = (
    "eval",
    "checkpoints",
    "final",
    "figures",
    "report.md",
    *LOGS,
    "config.json",
)  # by it, or eval.py


class Run(AbstractContextManager):
    """The folder, opened with flags and problems checked; only the main process reads what it writes there."""

    def __init__(
        self, flags, policy: Policy, problems: list[Problem], left_out: list, wrong_references: list
    ):
        self.flags, self.policy, self.problems = flags, policy, problems
        self.counts = dict(
            problems=len(problems), problems_left_out=left_out, wrong_references=wrong_references
        )
        self.out, self.bad_steps, self.code, self.lock = Path(flags.out), 0, 0, None
        self.good = self.saved = (
            0  # the newest checkpoint that a step was sampled from, and the newest
        )
        self.parameters = sum(p.numel() for p in policy.model.parameters())
        learned_from = repr([(p.question, p.answers, p.solution) for p in problems]).encode()
        self.fingerprint = blake2b(learned_from, digest_size=16).hexdigest()
        self.checkpoint = on_main(self._open)

    def __exit__(self, kind: type | None, error: BaseException | None, trace) -> None:
        if self.lock:
            self.lock.close()
        if isinstance(error, CannotSample):
            good = (
                self.out / "checkpoints" / f"step-{self.good}"
                if self.good
                else "none was saved yet"
            )
            raise UserError(f"{error}, or lower --lr; the last good checkpoint: {good}") from error

    def steps(
        self, trainer: Trainer, evaluate: Callable[[int], None], shown: dict[str, str]
    ) -> Iterator[int]:
        """Yields each step still to be made, from 0; its body calls `log` once. After it this saves, evaluates (given
        the number of steps made) or stops; `code` is the exit code. shown: as in Progress."""
        flags, first, stop, folder = self.flags, 0, Stop(), self.out / "checkpoints"
        if self.checkpoint:
            path, manifest = self.checkpoint
            load_checkpoint(trainer, path, manifest)
            first, self.bad_steps, self.good = (
                manifest["step"],
                manifest["bad_steps"],
                manifest["good"],
            )
            self.saved = self.good if self.bad_steps else first
            say(f"going on from {path}")
        elif flags.resume:
            say(f"no checkpoint in {self.out} yet: starting at the first step")
        saves = (
            -((first - flags.steps) // flags.save_every) if flags.save_every else 1
        )  # rounded up
        on_main(lambda: check_space(folder, trainer, flags.keep, saves))
        self._introduce()
        between = range(flags.eval_every, flags.steps, flags.eval_every) if flags.eval_every else ()
        if first == 0 or first in between:
            evaluate(first)
        self.progress = Progress(flags.steps, first, shown)
        for step in range(first, flags.steps):
            SECONDS.clear()
            yield step
            self.good = self.saved
            prune(folder, self.good, flags.keep)
            stopping = max(gather(stop.signal))
            if self.bad_steps >= 5:
                raise CannotSample(
                    f"no finite gradient in {self.bad_steps} steps in a row, so the run stops; look at "
                    f"--eda-clamp and the end of {self.out / 'samples.jsonl'}"
                )
            due = flags.save_every and (step + 1) % flags.save_every == 0 and not self.bad_steps
            if stopping or due or step + 1 == flags.steps:  # a bad step is no place to go back to
                self._save(trainer, step + 1)
            if stopping:
                self.progress.bar.close()
                say(
                    f"stopped after step {step + 1}, which is saved; the same command with --resume goes on"
                )
                self.code = 128 + stopping
                return
            if step + 1 in between:  # after saving: a failure here loses no step
                evaluate(step + 1)
        self.progress.bar.close()
        evaluate(flags.steps)
        prune(folder, self.saved, flags.keep)

    def log(self, step: int, metrics: dict, samples: list[dict]) -> None:
        """A line of metrics.jsonl, with the seconds of each phase, and the step's rows of samples.jsonl."""
        self.bad_steps = self.bad_steps + 1 if metrics["skipped_updates"] else 0
        if self.bad_steps:
            say(
                f"step {step + 1}: loss or gradient is not finite, so the weights stay ({self.bad_steps} in a row)"
            )
        seconds = {f"seconds_{k}": SECONDS[k] for k in ("sample", "grade", "correct", "update")}
        line = dict(
            step=step + 1,
            **metrics,
            **seconds,
            peak_memory_gib=peak_memory(self.policy.device),
            tokens_per_second=metrics["sampled_tokens"] / (SECONDS["sample"] + SECONDS["correct"]),
        )
        append(self.out / "metrics.jsonl", [line])
        append(self.out / "samples.jsonl", [dict(step=step + 1, **row) for row in samples])
        self.progress.show(line)

    def _save(self, trainer: Trainer, step: int) -> None:
        """A checkpoint that knows the length of each log; before the last one, the final model, as it takes less space.
        A policy that has diverged is CannotSample here, and replaces nothing."""
        self.policy.sample(
            [self.policy.prompt_ids(self.problems[0].question)], [8], [0], self.flags.temperature
        )
        folder, logs = self.out / "checkpoints", {}
        if is_main():
            for name in LOGS:
                flush(self.out / name)
                logs[name] = (self.out / name).stat().st_size
            (folder / f".step-{step}.unfinished").mkdir(
                parents=True
            )  # tells what `final` without it is
        if step == self.flags.steps:
            save_final(self.policy, self.out / "final")
        save_checkpoint(
            trainer, folder, step, dict(logs=logs, bad_steps=self.bad_steps, good=self.good)
        )
        self.saved = self.saved if self.bad_steps else step

    def _open(self) -> tuple[Path, dict] | None:
        """Make, clear or reopen the folder; returns the checkpoint to go on from. The lock holds as long as the run."""
        flags, out, found = self.flags, self.out, None
        self.lock = claim(out)
        if any((out / name).exists() for name in WRITTEN[1:]) and not (
            flags.resume or flags.overwrite
        ):
            raise UserError(
                f"--out {out}: holds a run already; give --resume to go on with it, --overwrite to delete "
                "it, or another --out"
            )
        for name in (
            WRITTEN if flags.overwrite else ()
        ):  # nothing else that stands there, and config.json last
            remove(out / name)
        if flags.resume:
            found = self._find_checkpoint()
        for unfinished in (out / "checkpoints").glob(".step-*.unfinished"):
            remove(unfinished)
        for name in LOGS:  # what was logged after the checkpoint will be logged again
            with open(out / name, "ab") as f:
                f.truncate(found[1]["logs"].get(name, 0) if found else 0)
        read_lines(out / "metrics.jsonl", step=int)  # damage in what is read at the end is met now
        read_lines(out / "evals.jsonl", task=str, step=int, accuracy=(int, float))
        return found

    def _find_checkpoint(self) -> tuple[Path, dict] | None:
        """The newest whole checkpoint, None if there was none yet. UserError if flags or data make it another run."""
        out, folder = self.out, self.out / "checkpoints"
        if not any((out / name).exists() for name in ("checkpoints", "final", "config.json")):
            return None
        config = read_json(out / "config.json", flags=dict, problems_fingerprint=str)
        before, now = config["flags"], json.loads(json.dumps(asdict(self.flags)))
        changed = [
            f"{option(k)} was {before.get(k)}, is {now[k]}"
            for k in now
            if k not in MAY_CHANGE and before.get(k) != now[k]
        ]
        if config["problems_fingerprint"] != self.fingerprint:
            changed.append(f"--data {now['data']} has other problems now")
        if changed:
            raise UserError(
                f"--resume {out}: the run was started with other flags ({'; '.join(changed)}); give the "
                "same, or another --out"
            )
        if found := newest_checkpoint(folder):
            return found
        # A log that goes on behind a step that was to be saved, or a final model: the checkpoints were deleted.
        lines, every = (
            read_lines(out / "metrics.jsonl", step=int, skipped_updates=int)[0],
            before.get("save_every"),
        )
        deleted = any(
            every and m["step"] % every == 0 and not m["skipped_updates"] for m in lines[:-1]
        )
        ended = (out / "final").exists() and not any(folder.glob(".step-*.unfinished"))
        if checkpoint_folders(folder) or deleted or ended:
            raise UserError(
                f"--resume {out}: no whole checkpoint is left to go on from; put one back, or start again "
                "with --overwrite"
            )

    def _introduce(self) -> None:
        """Print what is in force, and write config.json: what is needed to run it again."""
        flags, policy, left_out = self.flags, self.policy, len(self.counts["problems_left_out"])
        here = Path(__file__).parent
        git = subprocess.run(
            "git describe --always --dirty", shell=True, cwd=here, capture_output=True
        )
        device = (
            f"cuda: {torch.cuda.get_device_name()}"
            if policy.device.type == "cuda"
            else f"cpu: {platform.processor() or platform.machine()}"
        )
        changed = {
            k: v for k, v in flags.differing.items() if k not in MAY_CHANGE | {"seed", "method"}
        }
        config = dict(
            method=flags.method,
            seed=flags.seed,
            flags=asdict(flags),
            changed=changed,
            command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            commit=git.stdout.decode().strip() or "unknown",  # on a machine without git
            versions=dict(
                python=platform.python_version(),
                torch=torch.__version__,
                transformers=transformers.__version__,
            ),
            device=device,
            processes=world_size(),
            threads=torch.get_num_threads(),
            parameters=self.parameters,
            **self.counts,
            problems_fingerprint=self.fingerprint,
        )
        on_main(lambda: write_json(self.out / "config.json", config))
        say(
            f"{flags.model} ({self.parameters / 1e6:.1f}M parameters) on {policy.device}, "
            f"CPU threads: {torch.get_num_threads()}; "
            f"{flags.data}: {len(self.problems)} problems"
            + (f", {left_out} left out (prompt too long)" if left_out else "")
        )
        say(
            "flags other than the defaults: "
            + (" ".join(f"{k}={v}" for k, v in flags.differing.items()) or "none")
            + f" (all are in {self.out / 'config.json'})"
        )
        say(
            f"prompt of the first problem: {policy.decode_raw(policy.prompt_ids(self.problems[0].question))!r}"
        )
