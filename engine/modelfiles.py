"""A model's files: found by name, here or on the hub, and what is saved beside its weights."""

import functools
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.constants import ENDPOINT
from torch import nn

from engine.console import first_line, is_out_of_memory
from errors import UserError

TINY_MODEL = Path(__file__).parents[1] / "data" / "tiny_model"
FILES_BESIDE_WEIGHTS = (
    "*.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "*.model",
    "*.txt",
    "*.tiktoken",
    "*.py",
)


@contextmanager
def from_model(name: str, problem: str, advice: str = "", memory: bool = False) -> Iterator[None]:
    """Turns whatever a model's folder raises into one sentence that names the model.

    memory: let an out-of-memory error through as it is, because it is no fault of the folder.
    """
    try:
        yield
    except BaseException as error:  # also a panic in the Rust tokenizer
        if isinstance(error, (UserError, KeyboardInterrupt, SystemExit)):
            raise
        if memory and is_out_of_memory(error):
            raise
        raise UserError(f"--model {name}: {problem} ({first_line(error)}){advice}") from error


def find_model(name: str) -> str:
    """Returns what from_pretrained takes for `tiny`, a folder, a hub id, or a bare Qwen or Llama.

    Raises UserError if the name is none of these, or the folder holds no model.
    """
    path = TINY_MODEL if name == "tiny" else Path(name)
    if path.is_dir():
        check_folder(name, path)
        return str(path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"--model {name}: there is no such folder")
    if "/" in name:
        return name
    if name.startswith("Qwen"):
        return f"Qwen/{name}"
    if name.startswith("Llama"):
        return f"meta-llama/{name}"
    raise UserError(
        f"--model {name}: neither a local folder, nor a hub id (owner/name), nor `tiny`"
    )


def check_folder(name: str, folder: Path) -> None:
    """Raises UserError if a folder holds a run or an adapter, or no model at all."""
    if not list(folder.glob("*.safetensors")):
        for saved in (folder / "final", *folder.glob("checkpoints/step-*")):
            if (saved / "config.json").is_file():
                raise UserError(
                    f"--model {name}: this is the folder of a run; give a model in it, such as "
                    f"{saved}"
                )
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"--model {name}: the folder holds an adapter (LoRA); merge it into its base model"
        )
    if not (folder / "config.json").is_file():
        raise UserError(
            f"--model {name}: the folder has no config.json; give a Hugging Face model folder"
        )


@functools.cache
def hub_is_away() -> bool:
    """Returns whether the hub cannot be reached; asks once.

    Then only the cache is used, because each file would be tried again for 20 s.
    """
    try:
        urllib.request.urlopen(ENDPOINT, timeout=10).close()
    except OSError as error:
        return not isinstance(error, urllib.error.HTTPError)  # that is an answer, whatever it says
    return False


def where(name: str) -> dict:
    """Returns the arguments with which any from_pretrained finds `name`."""
    path = find_model(name)
    local = Path(path).is_dir() or hub_is_away()
    return dict(pretrained_model_name_or_path=path, local_files_only=local)


@functools.cache
def folder_of(name: str) -> Path:
    """Returns the folder, given or in the hub's cache, with the files beside a model's weights."""
    path = find_model(name)
    if Path(path).is_dir():
        return Path(path)
    return Path(
        snapshot_download(path, allow_patterns=FILES_BESIDE_WEIGHTS, local_files_only=hub_is_away())
    )


def files_beside_weights(
    name: str,
    model: nn.Module,
    config: transformers.PretrainedConfig,
    end_ids: list[int],
    eos_token: str | None,
) -> dict[str, bytes]:
    """Returns what is saved beside trained weights, by file name, so that every reader loads the
    same model and stops where the sampler stops.

    The files that the model came with stay byte for byte, but for config.json and for the end
    tokens, which each file names as far as it can. Whatever may fail in saving fails here; raises
    UserError.
    """
    with from_model(name, "it cannot be saved again"), TemporaryDirectory() as scratch:
        model.config.save_pretrained(scratch)  # as will be done with the weights
        folder = folder_of(name)
        files = {"generation_config.json": model.generation_config.to_json_string().encode()}
        for pattern in FILES_BESIDE_WEIGHTS:
            for file in folder.glob(pattern):
                if not file.name.endswith((".index.json", "checkpoint.json")):
                    files[str(file.relative_to(folder))] = file.read_bytes()
        files["config.json"] = saved_config(files["config.json"], model, config)
        ends = end_ids if len(end_ids) > 1 else end_ids[0]
        for file in ("config.json", "generation_config.json"):
            files[file] = with_value(files[file], "eos_token_id", ends)
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            if b'"eos_token"' in files.get(file, b""):
                files[file] = with_value(files[file], "eos_token", eos_token)
        return files


def saved_config(original: bytes, model: nn.Module, config) -> bytes:
    """Returns the original config.json with what training changed and keys for all readers."""
    content = json.loads(original)
    if type(model.config) is not type(config):  # the text part of a larger model
        content = json.loads(config.get_text_config().to_json_string())
    content["architectures"] = [type(model).__name__]
    for key in ("transformers_weights", "_attn_implementation"):  # of the source's own machine
        content.pop(key, None)
    tied = model.config.get_text_config().tie_word_embeddings
    if tied != config.get_text_config().tie_word_embeddings:
        content["tie_word_embeddings"] = tied
    dtype = str(model.dtype).removeprefix("torch.")
    return json.dumps(with_old_keys(content, dtype), indent=2).encode()


def with_value(file: bytes, key: str, value: object) -> bytes:
    """Returns a JSON file with this value of a key; the file as it is if it has that already."""
    content = json.loads(file)
    if content.get(key) == value:
        return file
    return json.dumps(content | {key: value}, indent=2, ensure_ascii=False).encode()


def with_old_keys(config: dict, dtype: str) -> dict:
    """Returns a config.json with the keys of transformers 5 and, beside them, those of version 4.

    Engines built on version 4 would otherwise use other rotations without saying so.
    """
    new = {}
    for key, value in config.items():
        is_config = isinstance(value, dict) and "model_type" in value
        new[key] = with_old_keys(value, dtype) if is_config else value
    new |= {"dtype": dtype, "torch_dtype": dtype}
    old = old_rope_keys(config.get("rope_parameters") or {}, str(config.get("model_type")))
    if "num_local_experts" in config:
        old["num_experts"] = config["num_local_experts"]
    return old | new


def old_rope_keys(rope: dict, model_type: str) -> dict:
    """Returns transformers 4's keys for the rotations that version 5 keeps in rope_parameters."""
    old = {}
    if "sliding_attention" in rope:  # Gemma 3 has one for each type of layer
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    rope = dict(rope.get("full_attention", rope))
    theta_key, partial_key = "rope_theta", "partial_rotary_factor"
    if model_type.startswith("gpt_neox"):  # this family had its own names
        theta_key, partial_key = "rotary_emb_base", "rotary_pct"
    if "rope_theta" in rope:
        old |= {theta_key: rope.pop("rope_theta"), "rope_scaling": None}
    if "partial_rotary_factor" in rope:
        old[partial_key] = rope.pop("partial_rotary_factor")
    rope_type = rope.get("rope_type", "default")
    if rope_type == "longrope":  # Phi-3 takes these three alone
        old["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
        old["rope_scaling"] = {
            "type": "longrope",
            "short_factor": rope["short_factor"],
            "long_factor": rope["long_factor"],
        }
    elif rope_type != "default":
        old["rope_scaling"] = rope
    return old
