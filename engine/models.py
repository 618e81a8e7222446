"""The policy: a model of transformers with its tokenizer, end tokens and sampler, all checked."""

import functools
import json
import re
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from engine.console import say
from engine.modelfiles import files_beside_weights, find_model, folder_of, from_model, where
from engine.outputlayer import check_output_layer
from engine.processes import choose_threads, spread, start_processes
from engine.prompts import (
    INSTRUCTION,
    QUESTION,
    closed_turn,
    find_end_ids,
    prompt_text,
    saved_eos_token,
    turn_end,
)
from errors import UserError
from rollout import Sample, Sampler

transformers.utils.logging.disable_progress_bar()  # else its bars stand between our lines

# Tensors in weight files that no longer change a model's logits: buffers that are computed anew,
# and the layers that predict several tokens ahead.
HARMLESS_LEFTOVERS = re.compile(
    r"(^|\.)(rotary\w*\.\w+|inv_freq|(cos|sin)_cached|masked_bias|(self_)?att(n|ention)\.bias"
    r"|position_ids)$|^(model\.)?mtp\."
)


@dataclass
class Policy:
    """A causal language model, its tokenizer and its sampler: ids in, ids out, and text <-> ids."""

    model: nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    sampler: Sampler
    end_ids: set[int]  # any of them ends a response
    end_id: int  # the one that ends injected text
    vocab_size: int  # ids from here on are padding of the embedding, or have no row in it
    device: torch.device
    template: str  # "qwen" or "llama"
    response_header: str = ""  # what the chat template writes between a prompt and its response
    files: dict[str, bytes] = field(default_factory=dict, repr=False)  # saved beside the weights

    def context(self) -> int:
        """Returns the most tokens, prompt plus response, that the model has positions for.

        For longrope this is the original context: one longer row would change the rotations of
        every row in its batch.
        """
        config = self.model.config.get_text_config()
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":
            return rope["original_max_position_embeddings"]
        for name in ("max_position_embeddings", "max_seq_len"):
            if getattr(config, name, None):
                return getattr(config, name)
        return 2**31

    def prompt_ids(self, question: str) -> list[int]:
        """Returns the ids of the question in the model's chat template.

        Without a template the prompt begins with the BOS, if the tokenizer begins texts with it.
        Raises UserError, whatever goes wrong in the template.
        """
        tokenizer = self.tokenizer
        advice = "; correct it, or try another --template"
        with from_model(tokenizer.name_or_path, "its chat template fails", advice):
            ids = self._ids(prompt_text(tokenizer, question, self.template))
            if tokenizer.chat_template is None:
                first = tokenizer.encode("")[:1]
                if first == [tokenizer.bos_token_id]:
                    ids = first + ids
            return ids

    def encode(self, text: str) -> list[int]:
        """Returns the ids of text inside a response, so without a blank put before it.

        Raises UserError where the text needs ids that the model does not have.
        """
        first_token = self.tokenizer.convert_ids_to_tokens(self._ids("a"))[0]
        if first_token.startswith(("\u2581", "\u0120")):  # this tokenizer puts a blank before texts
            for before in ("\n", "."):
                before_ids = self._ids(before)
                ids = self._ids(before + text)
                if ids[: len(before_ids)] == before_ids:
                    return ids[len(before_ids) :]
        return self._ids(text)

    def encode_response(self, text: str) -> list[int]:
        """Returns the ids of a whole response, which begins with the template's header."""
        return self.encode(self.response_header + text)

    def _ids(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        check_ids(self.tokenizer.name_or_path, max(ids, default=0), self.vocab_size)
        return ids

    def decode_raw(self, ids: list[int]) -> str:
        """Returns the text of ids with special tokens."""
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def decode(self, ids: list[int]) -> str:
        """Returns the text of ids without special tokens."""
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def fingerprint(self) -> str:
        """Returns a hash of the weights (4096 numbers of each), a prompt and the end tokens.

        Results of one model are never continued with another. Take it before the weights are
        trained or cut over processes. The numbers are rounded to bf16, so that a model has the same
        fingerprint on a CPU (fp32) and on a GPU.
        """
        digest = blake2b(digest_size=8)
        for weight in self.model.parameters():
            numbers = weight.detach().flatten()[:4096].bfloat16().float().cpu()
            digest.update(numbers.numpy().tobytes())
        digest.update(repr((self.prompt_ids(QUESTION), sorted(self.end_ids))).encode())
        return digest.hexdigest()

    def room(self, prompt: list[int]) -> int:
        """Returns how many tokens a response to this prompt can have in the model's context."""
        return max(0, self.context() - len(prompt))

    def sample(
        self,
        prompts: list[list[int]],
        limits: list[int],
        seeds: list[int],
        temperature: float,
        top_p: float = 1.0,
    ) -> list[Sample]:
        """Returns one sample for each prompt, with its own limit and seed, within the context.

        The prompts are spread over the processes. Raises CannotSample.
        """
        limits = [min(limit, self.room(prompt)) for prompt, limit in zip(prompts, limits)]

        def sample_share(prompts: list, limits: list, seeds: list) -> list[Sample]:
            groups = self.sampler.sample(prompts, 1, limits, temperature, seeds, top_p)
            return [group[0] for group in groups]

        try:
            return spread(prompts, limits, seeds, sample_share)
        except ValueError as error:  # the sampler's own sentence, such as logits that are NaN
            raise CannotSample(str(error)) from error


class CannotSample(UserError):
    """The policy's logits are not finite."""


def check_ids(name: str, highest: int, rows: int) -> None:
    """Raises UserError if the tokenizer needs an id that the embedding has no row for."""
    if highest >= rows:
        raise UserError(
            f"--model {name}: the tokenizer has ids up to {highest}, but the model's embedding "
            f"only {rows} rows; it belongs to another model"
        )


def load_config(name: str, trust_remote_code: bool = False) -> transformers.PretrainedConfig:
    """Returns the model's config.

    Raises UserError if there is none, if the weights are quantized or far too small for it.
    """
    advice = "; give a local folder, or a hub id while the hub can be reached"
    with from_model(name, "no usable config.json", advice):
        config = AutoConfig.from_pretrained(**where(name), trust_remote_code=trust_remote_code)
    for part in (config, config.get_text_config()):
        if getattr(part, "quantization_config", None):
            raise UserError(
                f"--model {name}: its weights are quantized; use the model they were made from"
            )
    check_embedding(name, config.get_text_config())
    config._attn_implementation = None  # load_model chooses, whatever the file asks for
    return config


def check_embedding(name: str, config: transformers.PretrainedConfig) -> None:
    """Raises UserError if a local model's weights are too small to hold the embedding alone."""
    weight_bytes = sum(file.stat().st_size for file in Path(name).glob("*.safetensors"))
    embedding = config.vocab_size * getattr(config, "hidden_size", 1)
    if 0 < weight_bytes < embedding:
        raise UserError(
            f"--model {name}: config.json describes an embedding of {embedding:,} numbers, but the "
            f"weights have only {weight_bytes:,} bytes; it belongs to another model"
        )


def load_tokenizer(
    name: str, trust_remote_code: bool = False
) -> transformers.PreTrainedTokenizerBase:
    """Returns the tokenizer: the model's own tokenizer.json as it is, if it has one.

    AutoTokenizer would rebuild some of them by the rules of their class, with other ids (the
    distilled models of DeepSeek-R1). Raises UserError.
    """
    with from_model(name, "its tokenizer cannot be read"):
        folder = folder_of(name)
        tokenizer_files = r"^(tokenizer\.|vocab|tekken)|\.(model|tiktoken)$"
        if not any(re.search(tokenizer_files, file.name) for file in folder.iterdir()):
            raise UserError(
                f"--model {name}: it has no tokenizer (tokenizer.json); copy its base model's"
            )
        if (folder / "tokenizer.json").is_file():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(**where(name))
        else:
            tokenizer = AutoTokenizer.from_pretrained(
                **where(name), trust_remote_code=trust_remote_code
            )
        own_template = folder / "chat_template.json"  # where multimodal models keep it
        if tokenizer.chat_template is None and own_template.is_file():
            tokenizer.chat_template = json.loads(own_template.read_bytes())["chat_template"]
        return tokenizer


def load_model(
    name: str, device: torch.device, dtype: torch.dtype, trust_remote_code: bool = False
) -> nn.Module:
    """Returns the model with all of its weights, in eval mode on `device`. Raises UserError."""
    config = load_config(name, trust_remote_code)
    with from_model(name, "its weights cannot be loaded", memory=True):
        check_weight_files(name)
        load = functools.partial(
            AutoModelForCausalLM.from_pretrained,
            **where(name),
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        try:
            model, info = load(attn_implementation="sdpa")
        except ValueError:  # a family that has no such attention
            model, info = load(attn_implementation="eager")
        check_all_weights_used(name, model, info, whole=type(model.config) is type(config))
        keep_own_output_layer(model)
        turn_noise_off(model)
        return model.to(device).eval()


def check_weight_files(name: str) -> None:
    """Raises UserError unless the weights are in safetensors files."""
    folder = folder_of(name)
    if Path(find_model(name)).is_dir() and not list(folder.glob("*.safetensors")):
        raise UserError(
            f"--model {name}: the folder has no *.safetensors weights (pickles are not loaded)"
        )
    content = json.loads((folder / "config.json").read_bytes())
    named = [content.get("transformers_weights") or ".safetensors"]
    for index in folder.glob("*.safetensors.index.json"):
        named += json.loads(index.read_bytes())["weight_map"].values()
    for file in named:
        if not file.endswith((".safetensors", ".safetensors.index.json")):
            raise UserError(
                f"--model {name}: its weights are in {file}; pickled weights are not loaded, so "
                "convert them to safetensors"
            )


def check_all_weights_used(name: str, model: nn.Module, info: dict, whole: bool) -> None:
    """Raises UserError if weights are missing, of another shape, or have no place in the model.

    whole: False if the model is the text part of a larger one, whose other parts are left out.
    """
    missing = sorted(map(str, info["missing_keys"] or info["mismatched_keys"]))
    if missing:
        raise UserError(
            f"--model {name}: {len(missing)} weights are missing or of the wrong shape, such as "
            f"{missing[0]}; the folder is incomplete or of another architecture"
        )
    parts = {tuple(key.split(".")[:2]) for key in model.state_dict()}
    for key in sorted(info["unexpected_keys"]):
        belongs_here = whole or tuple(key.split(".")[:2]) in parts
        if belongs_here and not HARMLESS_LEFTOVERS.search(key):
            raise UserError(
                f"--model {name}: its files hold weights that config.json has no place for, such "
                f"as {key}; correct config.json (or merge the adapter), or delete them if unused"
            )


def keep_own_output_layer(model: nn.Module) -> None:
    """Corrects a config that calls embedding and output layer tied if the file has both.

    transformers 5 then trains both, and transformers 4 would drop the output layer of final/.
    """
    config = model.config.get_text_config()
    output = model.get_output_embeddings()
    if output is None or not config.tie_word_embeddings:
        return
    if output.weight is not model.get_input_embeddings().weight:
        config.tie_word_embeddings = model.config.tie_word_embeddings = False
        say(
            "note: config.json says that the output layer is the embedding, but the weights have "
            "another one: it is trained, and final/ says tie_word_embeddings: false"
        )


def turn_noise_off(model: nn.Module) -> None:
    """Sets dropout and router jitter to 0: sampler and trainer must be the same function."""
    for part in [*model.modules(), model.config.get_text_config()]:
        for key, value in list(vars(part).items()):
            if isinstance(value, float) and ("drop" in key or "jitter" in key):
                setattr(part, key, 0.0)
        if isinstance(part, nn.Dropout):
            part.p = 0.0


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; "auto" is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, name)


def load_policy(
    name: str,
    device: str = "auto",
    template: str = "auto",
    max_rows: int | None = None,
    trust_remote_code: bool = False,
    dtype: str = "auto",
) -> Policy:
    """Returns the policy `name`. dtype: see choose_dtype.

    template: "qwen", "llama", or "auto" (see choose_template). max_rows: how many are sampled at a
    time, None for any number. Raises UserError, which says what is wrong with the model.
    """
    device = start_processes(device)
    config = load_config(name, trust_remote_code)
    tokenizer = load_tokenizer(name, trust_remote_code)
    vocabulary = set(tokenizer.get_vocab().values())
    # Added tokens may lack a row in the embedding; they are refused where a text needs them.
    highest = max(vocabulary - set(tokenizer.added_tokens_decoder), default=0)
    check_ids(name, highest, config.get_text_config().vocab_size)
    if template == "auto":
        template = choose_template(config, tokenizer)
    model = load_model(name, device, choose_dtype(dtype, device), trust_remote_code)
    choose_threads(sum(p.numel() for p in model.parameters()))
    with from_model(name, "it is of a kind that cannot be trained here"):
        check_output_layer(model)
    with from_model(name, "its end tokens are unusable", "; correct that file"):
        end_ids = find_end_ids(config, model.generation_config, tokenizer, template)
        sampler = Sampler(model, end_ids, max(vocabulary) + 1, max_rows)
    if not end_ids:
        raise UserError(
            f"--model {name}: neither its config nor its tokenizer names an end token; set "
            "eos_token_id in generation_config.json"
        )
    for i in end_ids - tokenizer.added_tokens_decoder.keys():
        say(
            f"note: the ordinary token {tokenizer.decode([i])!r} ends every response, because "
            f"eos_token_id in config.json or generation_config.json is {i}"
        )
    candidates = (turn_end(tokenizer, template), tokenizer.eos_token_id, min(end_ids))
    end_id = next(i for i in candidates if i in end_ids)
    policy = Policy(
        model,
        tokenizer,
        sampler,
        end_ids,
        end_id,
        sampler.vocab_size,
        device,
        template,
    )
    check_prompt(policy, name)
    policy.response_header = usable_header(policy)
    eos_token = saved_eos_token(tokenizer, template, end_id)
    ordered = [end_id, *sorted(end_ids - {end_id})]  # readers that use one id use the first
    policy.files = files_beside_weights(name, model, config, ordered, eos_token)
    if policy.context() < (getattr(config.get_text_config(), "max_position_embeddings", None) or 0):
        say(f"note: rows end at {policy.context()} tokens, the original context of longrope")
    return policy


def choose_template(config: transformers.PretrainedConfig, tokenizer) -> str:
    """Returns "llama" for Llama and for templates that refuse a system turn, such as Gemma's."""
    if config.model_type != "llama":
        with suppress(Exception):
            prompt_text(tokenizer, QUESTION, "qwen")
            return "qwen"
    return "llama"


def check_prompt(policy: Policy, name: str) -> None:
    """Raises UserError if the chat template fails or loses the question, and warns if it loses the
    instruction."""
    policy.prompt_ids(QUESTION)
    prompt = prompt_text(policy.tokenizer, QUESTION, policy.template)
    if QUESTION not in prompt:
        raise UserError(
            f"--model {name}: its chat template leaves the question out; correct it, or try "
            "another --template"
        )
    # A template that names the system turn leaves it out on purpose, as that of `tiny` does.
    if INSTRUCTION not in prompt and "system" not in str(policy.tokenizer.chat_template):
        say(
            "warning: the chat template leaves out the system turn, so prompts do not ask for a "
            "box; --template llama asks in the user's turn"
        )


def usable_header(policy: Policy) -> str:
    """Returns what the template writes between a prompt and its response, "" if references cannot
    begin with it.

    For most templates this is empty. It is an empty think block for Qwen3, a channel for gpt-oss,
    and the assistant's header where the template ignores add_generation_prompt. Prints a note
    unless responses directly follow the prompt.
    """
    prompt = prompt_text(policy.tokenizer, QUESTION, policy.template)
    before, _ = closed_turn(policy.tokenizer, policy.template) or ("", "")
    header = before.removeprefix(prompt)
    problem = ""
    if "<think" in prompt and "</think" not in prompt.rpartition("<think")[2]:
        problem = "opens <think>: responses begin inside it, and injected text ends the turn there"
    elif not before.startswith(prompt):
        problem = "does not show how a response follows the prompt: references directly follow it"
    elif policy.end_ids & set(policy.encode(header)):
        problem = (
            f"puts {header!r}, which holds an end token, before a response: references directly "
            "follow the prompt"
        )
    if problem:
        say(f"note: the chat template {problem}")
        return ""
    if header:
        say(f"note: the chat template puts {header!r} before a response: references begin with it")
    return header
