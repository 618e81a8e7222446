"""Checkpoints: checkpoints/step-N/ holds the model in Hugging Face format, optimizer-*.safetensors
(fp32 masters and moments) and checkpoint.json (the step, the sizes of the logs, the sha256 of
every file).

A checkpoint is written beside its place and renamed: a folder named step-N is whole or damaged,
never half-written. Nothing in it is unpickled."""

import hashlib
import json
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig

from engine.console import first_line
from engine.folder import publish, read_json, remove
from engine.memory import GIB
from engine.models import Policy
from engine.processes import is_main
from engine.trainer import Trainer
from errors import UserError

SHARD_BYTES = 4 * GIB  # a file is gathered in memory before it is written


def save_model(policy: Policy, folder: Path) -> None:
    """Write the weights in Hugging Face format, and beside them everything else that the model
    came with."""
    model = policy.model
    generation_config = model.generation_config
    model.generation_config = GenerationConfig()  # transformers refuses to save some
    model.save_pretrained(folder, max_shard_size=SHARD_BYTES)
    model.generation_config = generation_config
    for name, content in policy.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def save_final(policy: Policy, folder: Path) -> None:
    if is_main():
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        remove(unfinished)
        save_model(policy, unfinished)
        publish(unfinished, folder)


def save_checkpoint(trainer: Trainer, folder: Path, step: int, progress: dict) -> None:
    """Write folder/step-N; newest_checkpoint gives `progress` back. (A collective.)"""
    unfinished = folder / f".step-{step}.unfinished"
    if is_main():
        save_model(trainer.policy, unfinished)
    save_optimizer(trainer, unfinished)
    if not is_main():
        return
    paths = [path for path in sorted(unfinished.rglob("*")) if path.is_file()]
    names = [str(path.relative_to(unfinished)) for path in paths]
    with ThreadPoolExecutor() as pool:
        files = dict(zip(names, pool.map(sha256, paths)))
    manifest = dict(step=step, adam_steps=trainer.adam_steps, **progress, files=files)
    (unfinished / "checkpoint.json").write_text(json.dumps(manifest, indent=1))
    for other in checkpoint_folders(folder):
        if step_of(other) > step:  # damaged, so the run went on from an earlier one
            remove(other)
    publish(unfinished, folder / f"step-{step}")


def save_optimizer(trainer: Trainer, folder: Path) -> None:
    """Write masters and moments in files of about 4 GiB, on the main process. (A collective.)"""
    part, number = {}, 0
    for name, tensor in trainer.state():
        if not is_main():
            continue
        part[name] = tensor.contiguous()
        if sum(t.nbytes for t in part.values()) > SHARD_BYTES:
            save_file(part, folder / f"optimizer-{number}.safetensors")
            part, number = {}, number + 1
    if part:
        save_file(part, folder / f"optimizer-{number}.safetensors")


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    if is_main():
        for old in checkpoint_folders(folder)[keep:]:
            remove(old)


def check_space(folder: Path, trainer: Trainer, keep: int, saves: int) -> None:
    """Raise UserError if the disk cannot hold the final model and the checkpoints still to be
    saved, of which the newest `keep` stay."""
    parameters = list(trainer.policy.model.parameters())
    weights = sum(p.nbytes for p in parameters)
    state = 12 * sum(p.numel() for p in parameters)  # masters and moments
    new = keep + 1 - len(checkpoint_folders(folder))  # an old one is deleted after a new one
    new = max(1, min(new, saves))
    need = weights + new * (weights + state)
    free = shutil.disk_usage(folder.parent).free
    if free < need:
        raise UserError(
            f"{folder.parent}: {new} checkpoints to come and the final model need "
            f"{need / GIB:.2f} GiB, the disk has {free / GIB:.2f} GiB left; free some, or set "
            "--keep lower, --save-every 0 (only at the end) or another --out"
        )


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def checkpoint_folders(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first. Raises OSError if the folder cannot be read, because
    it may hold some."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=step_of, reverse=True)


def newest_checkpoint(folder: Path) -> tuple[Path, dict] | None:
    """The newest whole checkpoint and its manifest, None if there is none. Damaged ones are named
    on stderr and left as they are."""
    for path in checkpoint_folders(folder):
        try:
            return path, verified(path)
        except (UserError, FileNotFoundError) as error:
            print(f"checkpoint {path} is not used: {first_line(error)}", file=sys.stderr)
    return None


def verified(path: Path) -> dict:
    """A checkpoint's manifest. Raises UserError or FileNotFoundError for damage, OSError for what
    cannot be read."""
    manifest = read_json(
        path / "checkpoint.json",
        step=int,
        adam_steps=int,
        logs=dict,
        bad_steps=int,
        files=dict,
    )
    for name, size in manifest["logs"].items():
        if (path.parents[1] / name).stat().st_size < size:
            raise UserError(f"{name} is shorter than when the checkpoint was saved")
    for name, saved in manifest["files"].items():
        if sha256(path / name) != saved:
            raise UserError(f"{name} was altered (its sha256 differs)")
    return manifest


def load_checkpoint(trainer: Trainer, path: Path, manifest: dict) -> None:
    """Load weights, masters, moments and the step count into a trainer on any number of
    processes."""
    tensors = {}
    for name in manifest["files"]:
        if name.endswith(".safetensors"):
            file = safe_open(path / name, "pt")
            tensors |= dict.fromkeys(file.keys(), file)

    def read(name: str):
        return tensors[name].get_tensor(name) if name in tensors else None

    trainer.load_state(read, manifest["adam_steps"])
