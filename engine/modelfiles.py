"""A model's files: found by its name, here or on the hub, and what is saved beside the weights after training."""

import functools
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import transformers
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.constants import ENDPOINT
from torch import nn

from engine.console import first_line, is_out_of_memory
from errors import UserError

TINY_MODEL = Path(__file__).parents[1] / "data" / "tiny_model"
BESIDE_WEIGHTS = (
    "*.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "*.model",
    "*.txt",
    "*.tiktoken",
    "*.py",
)


@contextmanager
def from_model(name: str, problem: str, advice: str = "") -> Iterator[None]:
    """Around whatever comes from a model's folder: all that it raises becomes one sentence that names the model.
    (BaseException, because of a panic in the Rust tokenizer.)"""
    try:
        yield
    except BaseException as error:
        if isinstance(error, (UserError, KeyboardInterrupt, SystemExit)) or is_out_of_memory(error):
            raise
        raise UserError(f"--model {name}: {problem} ({first_line(error)}){advice}") from error


def find_model(name: str) -> str:
    """`tiny`, a local folder, a hub id, or a bare Qwen or Llama name -> what from_pretrained takes."""
    path = TINY_MODEL if name == "tiny" else Path(name)
    if path.is_dir():
        saved = [
            f
            for f in (path / "final", *path.glob("checkpoints/step-*"))
            if (f / "config.json").is_file()
        ]
        if saved and not list(path.glob("*.safetensors")):
            raise UserError(
                f"--model {name}: this is the folder of a run; give a model in it, such as {saved[0]}"
            )
        if (path / "adapter_config.json").is_file():
            raise UserError(
                f"--model {name}: the folder holds an adapter (LoRA); merge it into its base model first"
            )
        if not (path / "config.json").is_file():
            raise UserError(
                f"--model {name}: the folder has no config.json; give a Hugging Face model folder"
            )
        return str(path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"--model {name}: there is no such folder")
    if "/" not in name and not name.startswith(("Qwen", "Llama")):
        raise UserError(
            f"--model {name}: neither a local folder, nor a hub id (owner/name), nor `tiny`"
        )
    return name if "/" in name else f"{'Qwen' if name.startswith('Qwen') else 'meta-llama'}/{name}"


@functools.cache
def hub_is_away() -> bool:
    """Asked once: then files come from the cache at once, or not at all, instead of after 20 s of retries each."""
    try:
        urllib.request.urlopen(ENDPOINT, timeout=10).close()
    except OSError as error:
        return not isinstance(error, urllib.error.HTTPError)  # that is an answer, whatever it says
    return False


def where(name: str) -> dict:
    """What every from_pretrained is given to find `name`."""
    path = find_model(name)
    return dict(
        pretrained_model_name_or_path=path, local_files_only=Path(path).is_dir() or hub_is_away()
    )


@functools.cache
def folder_of(name: str) -> Path:
    """The folder, here or in the hub's cache, that holds what stands beside a model's weights."""
    path = find_model(name)
    if Path(path).is_dir():
        return Path(path)
    return (
        Path(hf_hub_download(path, "config.json", local_files_only=True)).parent
        if hub_is_away()
        else Path(snapshot_download(path, allow_patterns=BESIDE_WEIGHTS))
    )


def beside_weights(
    name: str, model: nn.Module, config: transformers.PretrainedConfig
) -> dict[str, bytes]:
    """What is saved beside the trained weights, by name: the files that the model came with, byte for byte, and its
    config.json in the words of transformers 4 and of 5. What can fail in saving, but for the disk, fails here."""
    with from_model(name, "it cannot be saved again"), TemporaryDirectory() as scratch:
        model.config.save_pretrained(scratch)  # as will be done with the weights
        folder = folder_of(name)
        files = {
            str(f.relative_to(folder)): f.read_bytes()
            for pattern in BESIDE_WEIGHTS
            for f in folder.glob(pattern)
            if not f.name.endswith((".index.json", "checkpoint.json"))
        }
        content = json.loads(files["config.json"])
        if type(model.config) is not type(config):  # the text part of a larger model
            content = json.loads(config.get_text_config().to_json_string())
        content["architectures"] = [type(model).__name__]
        content.pop("transformers_weights", None)  # they get their usual name
        files["config.json"] = json.dumps(
            for_both(content, str(model.dtype)[6:]), indent=2
        ).encode()
        return {"generation_config.json": model.generation_config.to_json_string().encode()} | files


def for_both(config: dict, dtype: str) -> dict:
    """A config.json with the keys of transformers 5 and, beside them, those that transformers 4, and engines built on
    it, read instead: without them they would take other rotations in silence."""
    config = {
        k: for_both(v, dtype) if isinstance(v, dict) and "model_type" in v else v
        for k, v in config.items()
    }
    config |= {"dtype": dtype, "torch_dtype": dtype}
    rope = config.get("rope_parameters") or {}
    rope, local = (
        rope.get("full_attention") or rope,
        rope.get("sliding_attention"),
    )  # Gemma 3 has one for each
    neox = str(config.get("model_type")).startswith("gpt_neox")  # whose names were its own
    old = {"num_experts": config["num_local_experts"]} if "num_local_experts" in config else {}
    if local:
        old["rope_local_base_freq"] = local["rope_theta"]
    if "rope_theta" in rope:
        old |= {
            "rotary_emb_base" if neox else "rope_theta": rope["rope_theta"],
            "rope_scaling": None,
        }
    if "partial_rotary_factor" in rope:
        old["rotary_pct" if neox else "partial_rotary_factor"] = rope["partial_rotary_factor"]
    if rope.get("rope_type", "default") != "default":
        old["rope_scaling"] = {
            k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")
        }
    if rope.get("rope_type") == "longrope":  # Phi-3 takes these three alone
        old["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
        old["rope_scaling"] = {
            "type": "longrope",
            **{f: rope[f] for f in ("short_factor", "long_factor")},
        }
    return old | config
