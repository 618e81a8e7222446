"""Checkpoints: checkpoints/step-N/ holds the model in Hugging Face format, optimizer-*.safetensors (masters, moments)
and checkpoint.json (step, log positions, sha256 of every file). It is written beside and renamed: a folder named step-N
is whole or damaged, never half-written. Nothing in it is unpickled."""

import hashlib
import itertools
import json
import re
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig

from engine.console import first_line
from engine.folder import flush, publish, read_json, remove
from engine.memory import GIB
from engine.models import Policy
from engine.processes import is_main
from engine.trainer import Trainer
from errors import UserError

SHARD_BYTES = 4 * GIB


def save_model(policy: Policy, folder: Path) -> None:
    """The weights in Hugging Face format, and beside them all else that the model came with."""
    model = policy.model
    model.generation_config, kept = (
        GenerationConfig(),
        model.generation_config,
    )  # some are refused in saving
    model.save_pretrained(folder, max_shard_size=SHARD_BYTES)  # a file is gathered in memory
    model.generation_config = kept
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
    """Write folder/step-N whole. `progress` comes back from newest_checkpoint."""
    unfinished = folder / f".step-{step}.unfinished"
    with (
        ThreadPoolExecutor() as pool
    ):  # a file is hashed, from the page cache, while the next ones are written
        hashes = {file: pool.submit(sha256, file) for file in write(trainer, unfinished)}
    if is_main():
        files = {str(f.relative_to(unfinished)): {"sha256": h.result()} for f, h in hashes.items()}
        manifest = {"step": step, "adam_steps": trainer.adam_steps, **progress, "files": files}
        manifest["sha256"] = digest(manifest)
        (unfinished / "checkpoint.json").write_text(json.dumps(manifest, indent=1))
        for later in [f for f in checkpoint_folders(folder) if int(f.name[5:]) > step]:
            remove(later)  # found damaged when the run went on
        publish(unfinished, folder / f"step-{step}")
        flush(folder.parent)


def write(trainer: Trainer, folder: Path) -> Iterator[Path]:
    """Write model, masters and moments; yields each file when it is whole, on the main process. No file of masters and
    moments is much larger than 4 GiB, since that is gathered at a time."""
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
        save_model(trainer.policy, folder)
        yield from sorted(
            f for f in folder.rglob("*") if f.is_file()
        )  # some tokenizers write a folder
    state = trainer.state()
    for part in itertools.count():
        held = {}
        for name, tensor in state:  # goes on where the last part ended
            held |= {name: tensor.contiguous()} if is_main() else {}
            if sum(t.nbytes for t in held.values()) > SHARD_BYTES:
                break
        if not held:
            return
        save_file(held, file := folder / f"optimizer-{part}.safetensors")
        yield file


def prune(folder: Path, step: int, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints up to a step."""
    for old in (
        [f for f in checkpoint_folders(folder) if int(f.name[5:]) <= step][keep:]
        if is_main()
        else ()
    ):
        remove(old)


def digest(manifest: dict) -> str:
    """sha256 of a checkpoint.json but for the digest in it."""
    others = {k: v for k, v in manifest.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def check_space(folder: Path, trainer: Trainer, keep: int, saves: int) -> None:
    """UserError if the disk cannot hold the checkpoints to come, of which `keep` stay, and the final model."""
    count = sum(p.numel() for p in trainer.policy.model.parameters())
    weights = count * next(trainer.policy.model.parameters()).element_size()
    one = weights + count * (8 if weights == 4 * count and not trainer.sharded else 12) + 32 * 2**20
    more = max(
        1, min(keep + 1 - len(checkpoint_folders(folder)), saves)
    )  # an old one goes after a new one
    need, free = weights + more * one, shutil.disk_usage(folder.parent).free
    if free < need:
        raise UserError(
            f"{folder.parent}: {more} checkpoints to come and the final model need {need / GIB:.2f} GiB, "
            f"the disk has {free / GIB:.2f} GiB left; free some, or set --keep lower, --save-every 0 (only "
            "at the end) or another --out"
        )


def sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def checkpoint_folders(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first. OSError if the folder cannot be read: that is not an empty one."""
    found = [
        f
        for f in (folder.iterdir() if folder.is_dir() else ())
        if re.fullmatch(r"step-\d+", f.name)
    ]
    return sorted(found, key=lambda f: -int(f.name[5:]))


def newest_checkpoint(folder: Path) -> tuple[Path, dict] | None:
    """The newest whole checkpoint, and its manifest; damaged ones are named on stderr and left."""
    for path in checkpoint_folders(folder):
        try:
            return path, verified(path)
        except (UserError, FileNotFoundError) as error:
            print(f"checkpoint {path} is not used: {first_line(error)}", file=sys.stderr)


def verified(path: Path) -> dict:
    """A checkpoint's manifest. UserError or FileNotFoundError for damage, any other OSError for what cannot be read."""
    manifest = read_json(path / "checkpoint.json", files=dict, sha256=str)
    if manifest["sha256"] != digest(manifest):
        raise UserError("checkpoint.json was altered (sha256 differs)")
    for name, size in manifest.get("logs", {}).items():
        if (path.parents[1] / name).stat().st_size < size:
            raise UserError(f"{name} is shorter than when the checkpoint was saved")
    altered = [
        name for name, saved in manifest["files"].items() if sha256(path / name) != saved["sha256"]
    ]
    if altered:
        raise UserError(f"{', '.join(altered)} was altered (sha256 differs)")
    return manifest


def load_checkpoint(trainer: Trainer, path: Path, manifest: dict) -> None:
    """Weights, masters, moments and step count of a checkpoint, into a trainer on any number of processes."""
    files = [
        safe_open(path / name, "pt") for name in manifest["files"] if name.endswith(".safetensors")
    ]
    where = {name: file for file in files for name in file.keys()}
    trainer.load_state(
        lambda name: where[name].get_tensor(name) if name in where else None, manifest["adam_steps"]
    )
