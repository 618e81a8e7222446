"""Checkpoints: checkpoints/step-N/ holds the model in Hugging Face format, optimizer-*.safetensors (masters and moments)
and checkpoint.json (step, log positions, and size and sha256 of every file). It is written beside and renamed: a folder
named step-N is whole or damaged, never half-written. Nothing in it is unpickled.
"""
import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig

from data import UserError
from engine.console import first_line
from engine.folder import publish
from engine.memory import GIB
from engine.models import Policy
from engine.processes import is_main
from engine.trainer import Trainer

SHARD_BYTES = 4 * GIB


def save_model(policy: Policy, folder: Path) -> None:
    """The weights in Hugging Face format, and beside them all else that the model came with."""
    model = policy.model
    model.generation_config, kept = GenerationConfig(), model.generation_config         # some are refused in saving
    model.save_pretrained(folder, max_shard_size=SHARD_BYTES)                           # a file is gathered in memory
    model.generation_config = kept
    for name, content in policy.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def save_final(policy: Policy, folder: Path) -> None:
    """The final model, written beside and renamed."""
    if not is_main():
        return
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    save_model(policy, unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    publish(unfinished, folder)


def save_checkpoint(trainer: Trainer, folder: Path, step: int, progress: dict, keep: int) -> Path:
    """Write folder/step-N whole, then delete all but the newest `keep`. `progress` comes back from load_checkpoint."""
    target, unfinished = folder / f"step-{step}", folder / f".step-{step}.unfinished"
    if is_main():
        later = [f for f in checkpoint_folders(folder) if int(f.name[5:]) > step]   # found damaged when the run went on
        for old in [*folder.glob(".step-*.unfinished"), *later]:
            shutil.rmtree(old)
        check_space(folder, trainer)
        unfinished.mkdir(parents=True)
        save_model(trainer.policy, unfinished)
    save_state(trainer, unfinished)
    if is_main():
        written = sorted(f for f in unfinished.rglob("*") if f.is_file())        # some tokenizers write a folder
        files = {str(f.relative_to(unfinished)): {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in written}
        manifest = {"step": step, "adam_steps": adam_steps(trainer), **progress, "files": files}
        manifest["sha256"] = digest(manifest)
        (unfinished / "checkpoint.json").write_text(json.dumps(manifest, indent=1))
        shutil.rmtree(target, ignore_errors=True)
        publish(unfinished, target)
        prune(folder, step, keep)
    return target


def prune(folder: Path, step: int, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints up to a step."""
    if is_main():
        for old in [f for f in checkpoint_folders(folder) if int(f.name[5:]) <= step][keep:]:
            shutil.rmtree(old)


def digest(manifest: dict) -> str:
    """sha256 of a checkpoint.json but for the digest in it."""
    text = json.dumps({k: v for k, v in manifest.items() if k != "sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def save_state(trainer: Trainer, folder: Path) -> None:
    """Masters and moments, in files of about 4 GiB, so that no more than that is gathered at a time."""
    held, held_bytes, part = {}, 0, 0
    for name, tensor in trainer.state():
        if is_main():
            held[name], held_bytes = tensor.contiguous(), held_bytes + tensor.nbytes
            if held_bytes > SHARD_BYTES:
                save_file(held, folder / f"optimizer-{part}.safetensors")
                held, held_bytes, part = {}, 0, part + 1
    if held:
        save_file(held, folder / f"optimizer-{part}.safetensors")


def adam_steps(trainer: Trainer) -> int:
    """How many updates AdamW has made."""
    states = [adam.state.get(trainer.masters[name]) for name, adam in trainer.adam.items()]
    return int(max((state["step"].item() for state in states if state), default=0))


def check_space(folder: Path, trainer: Trainer) -> None:
    """UserError if the disk cannot hold one more checkpoint."""
    count = sum(p.numel() for p in trainer.policy.model.parameters())
    weight_bytes = next(trainer.policy.model.parameters()).element_size()
    need = count * (weight_bytes + 8 + (4 if trainer.sharded or weight_bytes < 4 else 0)) + 32 * 2**20
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < need:
        raise UserError(f"{folder}: a checkpoint needs {need / GIB:.2f} GiB, the disk has {free / GIB:.2f} GiB left; "
                        "free some space, lower --keep, or put --out on another disk, then go on with --resume")


def sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def checkpoint_folders(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    found = [f for f in folder.glob("step-*") if f.name[5:].isdigit() and f.is_dir()]
    return sorted(found, key=lambda f: -int(f.name[5:]))


def newest_checkpoint(folder: Path, wanted: Callable[[dict], bool] = lambda manifest: True) -> tuple[Path, dict] | None:
    """The newest whole checkpoint that is wanted, and its manifest; damaged ones are named on stderr and left."""
    for path in checkpoint_folders(folder):
        problem, manifest = damage(path)
        if not problem and wanted(manifest):
            return path, manifest
        if problem and is_main():
            print(f"checkpoint {path} is not used: {problem}", file=sys.stderr)
    return None


def damage(path: Path) -> tuple[str, dict]:
    """What is wrong with a checkpoint ("" if nothing), and its manifest."""
    try:
        manifest = json.loads((path / "checkpoint.json").read_text())
        files = manifest["files"].items()
        if manifest["sha256"] != digest(manifest):
            return "checkpoint.json was altered (sha256 differs)", {}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return f"checkpoint.json cannot be read ({first_line(error)})", {}
    for name, expected in files:
        file = path / name
        if not file.is_file():
            return f"{name} is missing", {}
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}", {}
        if sha256(file) != expected["sha256"]:
            return f"{name} was altered (sha256 differs)", {}
    return "", manifest


def load_checkpoint(trainer: Trainer, path: Path, manifest: dict) -> None:
    """Weights, masters, moments and step count of a checkpoint, into a trainer on any number of processes."""
    where, files = {}, []
    for name in manifest["files"]:
        if not name.endswith(".safetensors"):
            continue
        files.append(safe_open(path / name, "pt"))
        where.update({name: files[-1] for name in files[-1].keys()})
    trainer.load_state(lambda name: where[name].get_tensor(name) if name in where else None, manifest["adam_steps"])
