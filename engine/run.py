"""A run's folder and its life around the method: opened or resumed, logged, saved, evaluated,
stopped."""

import json
import math
import platform
import re
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
from engine.folder import append, claim, flush, read_json, remove, write_json
from engine.memory import peak_memory
from engine.models import CannotSample, Policy
from engine.processes import gather, is_main, on_main, seed_from, world_size
from engine.trainer import Trainer
from errors import UserError

MAX_BAD_STEPS = 5  # in a row without a finite gradient; then the run stops
LOGS = ("metrics.jsonl", "samples.jsonl", "evals.jsonl")
RUN_FILES = ("checkpoints", "final", "figures", "report.md", *LOGS, "config.json")


class Run(AbstractContextManager):
    """The folder of a run. Only the main process reads what it writes there.

    `steps` yields the steps to be made, and each calls `log` once; `code` is the exit code, 0 for
    a whole run."""

    def __init__(
        self,
        flags,
        policy: Policy,
        problems: list[Problem],
        left_out: list,
        wrong_references: list,
        tasks: dict[str, list[Problem]],
    ):
        self.flags, self.policy, self.problems = flags, policy, problems
        self.out = Path(flags.out)
        self.code = 0
        self.bad_steps = 0  # without a finite gradient, in a row, up to now
        self.lock = None
        learned_from = [(p.question, p.answers, p.solution) for p in problems]
        self.facts = dict(
            parameters=sum(p.numel() for p in policy.model.parameters()),
            problems=len(problems),
            problems_left_out=left_out,
            wrong_references=wrong_references,
            problems_fingerprint=blake2b(repr(learned_from).encode(), digest_size=16).hexdigest(),
            model_fingerprint=policy.fingerprint(),
            tasks_fingerprint=str(seed_from(tasks)),
        )
        self.checkpoint = on_main(self._open)
        self.log_live = lambda line: None
        if flags.log and is_main():
            self.log_live = live_log(flags.log, self.out)

    def __exit__(self, kind: type | None, error: BaseException | None, trace) -> None:
        if self.lock:
            self.lock.close()
        if isinstance(error, CannotSample):
            saved = checkpoint_folders(self.out / "checkpoints")
            newest = saved[0] if saved else "none was saved"
            raise UserError(f"{error}, or lower --lr; newest checkpoint: {newest}") from error

    def steps(
        self, trainer: Trainer, evaluate: Callable[[int], None], shown: dict[str, str]
    ) -> Iterator[int]:
        """Yield each step still to be made, from 0; save, evaluate and stop between them.

        evaluate: is called with the number of steps made. shown: see Progress."""
        flags, stop, folder = self.flags, Stop(), self.out / "checkpoints"
        first = self._restore(trainer)
        save_every = flags.save_every or flags.steps
        eval_every = flags.eval_every or flags.steps
        saves = math.ceil((flags.steps - first) / save_every)
        on_main(lambda: check_space(folder, trainer, flags.keep, saves))
        on_main(self._write_config)
        self._introduce()
        self.progress = Progress(flags.steps, first, shown)
        for step in range(first, flags.steps):
            if step % eval_every == 0:  # after saving: a failure here loses no step
                evaluate(step)
            SECONDS.clear()
            yield step
            made = step + 1
            stopping = max(gather(stop.signal))
            if self.bad_steps == MAX_BAD_STEPS:
                raise CannotSample(
                    f"no finite gradient in {self.bad_steps} steps in a row, so the run stops; "
                    f"look at --eda-clamp and the end of {self.out / 'samples.jsonl'}"
                )
            due = made % save_every == 0 and not self.bad_steps
            if stopping or due or made == flags.steps:
                self._save(trainer, made)
            if stopping:
                self.progress.bar.close()
                say(
                    f"stopped after step {made}, which is saved; the same command with --resume "
                    "goes on"
                )
                self.code = 128 + stopping
                return
        self.progress.bar.close()
        evaluate(flags.steps)
        prune(folder, flags.keep)

    def log(self, step: int, metrics: dict, samples: list[dict]) -> None:
        """Write a line of metrics.jsonl, with the seconds of each phase, and the step's rows of
        samples.jsonl."""
        self.bad_steps = self.bad_steps + 1 if metrics["skipped_updates"] else 0
        if self.bad_steps:
            say(
                f"step {step + 1}: loss or gradient is not finite, so the weights stay "
                f"({self.bad_steps} in a row)"
            )
        sampling = SECONDS["sample"] + SECONDS["correct"]
        line = dict(
            step=step + 1,
            **metrics,
            **{f"seconds_{k}": SECONDS[k] for k in ("sample", "grade", "correct", "update")},
            peak_memory_gib=peak_memory(self.policy.device),
            tokens_per_second=metrics["sampled_tokens"] / sampling,
        )
        append(self.out / "metrics.jsonl", [line])
        append(self.out / "samples.jsonl", [dict(step=step + 1, **row) for row in samples])
        self.log_live({key: value for key, value in line.items() if value is not None})
        self.progress.show(line)

    def _restore(self, trainer: Trainer) -> int:
        """Load the checkpoint to go on from, if there is one; returns the number of steps made."""
        if not self.checkpoint:
            if self.flags.resume:
                say(f"no checkpoint in {self.out} yet: starting at the first step")
            return 0
        path, manifest = self.checkpoint
        load_checkpoint(trainer, path, manifest)
        self.bad_steps = manifest["bad_steps"]
        say(f"going on from {path}")
        return manifest["step"]

    def _save(self, trainer: Trainer, step: int) -> None:
        """Write a checkpoint, which records the length of each log. The final model is written
        before the last checkpoint, because it needs less space. Raises CannotSample, and replaces
        nothing, if the policy has diverged."""
        prompt = self.policy.prompt_ids(self.problems[0].question)
        self.policy.sample([prompt], [8], [0], self.flags.temperature)
        logs = {}
        if is_main():
            for name in LOGS:
                flush(self.out / name)
                logs[name] = (self.out / name).stat().st_size
        if step == self.flags.steps:
            save_final(self.policy, self.out / "final")
        progress = dict(logs=logs, bad_steps=self.bad_steps)
        save_checkpoint(trainer, self.out / "checkpoints", step, progress)
        if not self.bad_steps:  # else the good ones are kept
            prune(self.out / "checkpoints", self.flags.keep)

    def _open(self) -> tuple[Path, dict] | None:
        """Make, clear or reopen the folder, and lock it; returns the checkpoint to go on from."""
        flags, out = self.flags, self.out
        self.lock = claim(out)
        if flags.overwrite:  # config.json is the last to go; what is not a run's stays
            for name in ("eval", *RUN_FILES):
                remove(out / name)
        elif not flags.resume and any((out / name).exists() for name in RUN_FILES):
            raise UserError(
                f"--out {out}: holds a run already; give --resume to go on with it, --overwrite "
                "to delete it, or another --out"
            )
        checkpoint = self._find_checkpoint() if flags.resume else None
        for unfinished in (out / "checkpoints").glob(".step-*.unfinished"):
            remove(unfinished)
        for name in LOGS:  # what was logged after the checkpoint will be logged again
            size = checkpoint[1]["logs"].get(name, 0) if checkpoint else 0
            with open(out / name, "ab") as file:
                file.truncate(size)
        return checkpoint

    def _find_checkpoint(self) -> tuple[Path, dict] | None:
        """The newest whole checkpoint, None if none was saved yet. Raises UserError if this is not
        the same run."""
        out = self.out
        if not any((out / name).exists() for name in ("checkpoints", "final", "config.json")):
            return None
        config = read_json(out / "config.json", flags=dict, problems_fingerprint=str)
        before = config["flags"]
        now = json.loads(json.dumps(asdict(self.flags)))
        changed = [
            f"{option(name)} was {before.get(name)}, is {now[name]}"
            for name in now
            if name not in MAY_CHANGE and before.get(name) != now[name]
        ]
        if config["problems_fingerprint"] != self.facts["problems_fingerprint"]:
            changed.append(f"--data {now['data']} has other problems now")
        model, tasks = self.facts["model_fingerprint"], self.facts["tasks_fingerprint"]
        if config.get("model_fingerprint", model) != model:
            changed.append(f"--model {now['model']} has other weights or another chat template now")
        if config.get("tasks_fingerprint", tasks) != tasks:
            changed.append("--eval-tasks have other problems now")
        if changed:
            raise UserError(
                f"--resume {out}: the run was started otherwise ({'; '.join(changed)}); give the "
                "same, or another --out"
            )
        found = newest_checkpoint(out / "checkpoints")
        if not found and checkpoint_folders(out / "checkpoints"):
            raise UserError(
                f"--resume {out}: no whole checkpoint is left to go on from; put one back, or "
                "start again with --overwrite"
            )
        return found

    def _write_config(self) -> None:
        """Write config.json: what is needed to run it again."""
        flags = self.flags
        here = Path(__file__).parent
        git = subprocess.run(
            "git describe --always --dirty", shell=True, cwd=here, capture_output=True
        )
        config = dict(
            method=flags.method,
            seed=flags.seed,
            flags=asdict(flags),
            changed={
                k: v for k, v in flags.differing.items() if k not in MAY_CHANGE | {"seed", "method"}
            },
            command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            commit=git.stdout.decode().strip() or "unknown",  # on a machine without git
            versions=dict(
                python=platform.python_version(),
                torch=torch.__version__,
                transformers=transformers.__version__,
            ),
            device=str(self.policy.device),
            cpu=cpu_name(),
            cpu_capability=torch.backends.cpu.get_cpu_capability(),
            processes=world_size(),
            threads=torch.get_num_threads(),
            **self.facts,
        )
        if self.policy.device.type == "cuda":
            config["device"] = torch.cuda.get_device_name()
        write_json(self.out / "config.json", config)

    def _introduce(self) -> None:
        """Print the model, the data, the flags in force and a prompt."""
        flags, policy, facts = self.flags, self.policy, self.facts
        left_out = len(facts["problems_left_out"])
        note = f", {left_out} left out (prompt too long)" if left_out else ""
        differing = " ".join(f"{k}={v}" for k, v in flags.differing.items()) or "none"
        prompt = policy.decode_raw(policy.prompt_ids(self.problems[0].question))
        say(
            f"{flags.model} ({facts['parameters'] / 1e6:.1f}M parameters) on {policy.device}, CPU "
            f"threads: {torch.get_num_threads()}; {flags.data}: {len(self.problems)} "
            f"problems{note}"
        )
        say(f"flags other than the defaults: {differing} (all are in {self.out / 'config.json'})")
        say(f"prompt of the first problem: {prompt!r}")


def cpu_name() -> str:
    """The processor's model name: the last digits of a run depend on it, and so its samples."""
    info = Path("/proc/cpuinfo")  # Linux
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.machine()


def live_log(package: str, out: Path) -> Callable[[dict], None]:
    """A function that passes a line of metrics.jsonl on to wandb or TensorBoard. UserError if the
    package is not installed."""
    try:
        if package == "wandb":
            import wandb

            run = wandb.init(project="edge-grpo", name=out.name, dir=str(out), resume="allow")
            return lambda line: run.log(line, step=line["step"])
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            f"--log {package}: the package is not installed; pip install {package}, or drop --log"
        ) from None
    writer = SummaryWriter(str(out))

    def add_scalars(line: dict) -> None:
        for key, value in line.items():
            writer.add_scalar(key, value, line["step"])

    return add_scalars
