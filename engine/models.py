"""A model of transformers as the policy: weights, tokenizer, prompt, end tokens and sampler, checked before use."""

import functools
import json
import re
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from engine.console import say, try_with_less
from engine.modelfiles import beside_weights, find_model, folder_of, from_model, where
from engine.outputlayer import check_output_layer
from engine.processes import choose_threads, spread, start_processes
from errors import UserError
from rollout import Sample, Sampler

transformers.utils.logging.disable_progress_bar()  # the run prints its own

INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."
QWEN_TEMPLATE = (
    f"<|im_start|>system\n{INSTRUCTION}<|im_end|>\n<|im_start|>user\n{{question}}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
QUESTION = "What is 1 + 1?"  # to try a chat template with
TODAY = date(2024, 7, 26)  # for every chat template, so that a prompt does not change with the day
CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f"|replace('%{c}', '{TODAY.strftime('%' + c)}')" for c in "aAbBdHIjmMpSyY")
    + " }}{% endmacro %}\n"
)


@dataclass
class Policy:
    """A causal language model, its tokenizer and its sampler: ids in, ids out, and the two ways across to text."""

    model: nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    sampler: Sampler
    end_ids: set[int]  # any of them ends a response
    end_id: int  # the one that ends injected text
    vocab_size: int  # ids from here on are padding of the embedding, or have no row in it
    device: torch.device
    template: str  # "qwen" or "llama"
    files: dict[str, bytes] = field(
        default_factory=dict, repr=False
    )  # saved beside its weights, by name

    def context(self) -> int:
        """The most tokens, prompt and response together, that the model has positions for; with longrope the original
        context, since one longer row in a batch would change the rotations of all."""
        config = self.model.config.get_text_config()
        rope = getattr(config, "rope_parameters", None) or {}  # one, or one for each type of layer
        lengths = [
            r["original_max_position_embeddings"]
            for r in (rope, *rope.values())
            if isinstance(r, dict) and r.get("rope_type") == "longrope"
        ]
        lengths += [
            getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len")
        ]
        return min(filter(None, lengths), default=2**31)

    def prompt_ids(self, question: str) -> list[int]:
        """The question in the model's chat template; without one behind the BOS that the tokenizer begins a text with.
        Raises UserError, whatever the template does."""
        tokenizer = self.tokenizer
        with from_model(
            tokenizer.name_or_path,
            "its chat template fails",
            "; correct it, or try another --template",
        ):
            ids = self._ids(prompt_text(tokenizer, question, self.template))
            begin = tokenizer.encode("")[:1] if tokenizer.chat_template is None else []
            return begin + ids if begin == [tokenizer.bos_token_id] else ids

    def encode(self, text: str) -> list[int]:
        """Ids of text that stands inside a response: a tokenizer that puts a blank in front of every text is shown
        something before it. Raises UserError where the text needs ids that the model has not."""
        adds_blank = self.tokenizer.convert_ids_to_tokens(self._ids("a"))[0].startswith(
            ("\u2581", "\u0120")
        )
        for before in ("\n", ".") if adds_blank else ():
            head, ids = self._ids(before), self._ids(before + text)
            if ids[: len(head)] == head:
                return ids[len(head) :]
        return self._ids(text)

    def _ids(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        if max(ids, default=0) >= self.vocab_size:
            raise UserError(
                f"--model {self.tokenizer.name_or_path}: the tokenizer has ids up to {max(ids)}, but the "
                f"model's embedding only {self.vocab_size} rows; it belongs to another model"
            )
        return ids

    def decode_raw(self, ids: list[int]) -> str:
        """Text of ids, special tokens shown."""
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens dropped."""
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def room(self, prompt: list[int]) -> int:
        """How many tokens the model's positions leave behind a prompt."""
        return max(0, self.context() - len(prompt))

    def sample(
        self,
        prompts: list[list[int]],
        limits: list[int],
        seeds: list[int],
        temperature: float,
        top_p: float = 1.0,
    ) -> list[Sample]:
        """One sample of each prompt, with a limit and a seed for each, inside the model's context; the prompts are
        spread over the processes. Raises CannotSample."""
        rows = [
            (p, min(limit, self.room(p)), seed) for p, limit, seed in zip(prompts, limits, seeds)
        ]

        def draw(mine: list[tuple]) -> list[Sample]:
            prompts, limits, seeds = map(list, zip(*mine))

            def with_less() -> str:  # half of the rows it had, maybe fewer than it was asked for
                sampler, most = self.sampler, len(mine)
                sampler.max_rows = max(
                    1, min(sampler.max_rows or most, sampler.last_slots or most, most) // 2
                )
                sampler.release()
                return f"--max-rows {sampler.max_rows}"

            return try_with_less(
                lambda: [
                    s for [s] in self.sampler.sample(prompts, 1, limits, temperature, seeds, top_p)
                ],
                with_less,
                "while sampling",
                "--max-rows or --max-new-tokens lower",
            )

        try:
            return spread(rows, lambda mine: draw(mine) if mine else [])
        except (
            ValueError
        ) as error:  # the sampler's own sentence, for example about logits that are NaN
            raise CannotSample(str(error)) from error


class CannotSample(UserError):
    """The policy's logits are not finite, or the GPU has no memory to sample with."""


def prompt_text(
    tokenizer: transformers.PreTrainedTokenizerBase,
    question: str,
    template: str,
    response: str = "",
) -> str:
    """Qwen: the instruction is the system turn. Llama: it follows the problem in the user turn (as in the paper). The
    assistant's turn is opened, or holds the response and is closed. Raises whatever the template does."""
    if template == "llama":
        messages = [{"role": "user", "content": f"{question} {INSTRUCTION}"}]
    else:
        messages = [
            {"role": "system", "content": INSTRUCTION},
            {"role": "user", "content": question},
        ]
    if tokenizer.chat_template is None and template == "llama":
        raise UserError(
            f"--model {tokenizer.name_or_path}: its tokenizer has no chat template, which a Llama prompt "
            "needs; take the Instruct model, or --template qwen"
        )
    if tokenizer.chat_template is None:
        return QWEN_TEMPLATE.replace("{question}", question) + (
            response and f"{response}<|im_end|>"
        )
    if response:
        messages.append({"role": "assistant", "content": response})
    several = not isinstance(tokenizer.chat_template, str)  # then there may be a default one
    chosen = CLOCK + (tokenizer.get_chat_template() if several else tokenizer.chat_template)
    return tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=not response,
        chat_template=chosen,
        date_string=TODAY.strftime("%d %b %Y"),
    )


def load_config(name: str, trust_remote_code: bool = False) -> transformers.PretrainedConfig:
    with from_model(
        name,
        "no usable config.json",
        "; give a local folder, or a hub id while the hub can be reached",
    ):
        config = AutoConfig.from_pretrained(**where(name), trust_remote_code=trust_remote_code)
    if any(getattr(c, "quantization_config", None) for c in (config, config.get_text_config())):
        raise UserError(
            f"--model {name}: its weights are quantized; take the model they were made from"
        )
    return config


def load_tokenizer(
    name: str, trust_remote_code: bool = False
) -> transformers.PreTrainedTokenizerBase:
    path = Path(find_model(name))
    if path.is_dir() and not any(
        re.search(r"^(tokenizer\.|vocab|tekken)|\.(model|tiktoken)$", f.name)
        for f in path.iterdir()
    ):
        raise UserError(
            f"--model {name}: the folder has no tokenizer (tokenizer.json); copy the one of its base model"
        )
    with from_model(name, "its tokenizer cannot be read"):
        return AutoTokenizer.from_pretrained(**where(name), trust_remote_code=trust_remote_code)


def load_model(
    name: str, device: torch.device, dtype: torch.dtype, trust_remote_code: bool = False
) -> nn.Module:
    """The weights (safetensors only), all there and of the right shapes, on `device`."""
    with from_model(name, "its weights cannot be loaded"):
        folder = folder_of(name)
        if Path(find_model(name)).is_dir() and not list(folder.glob("*.safetensors")):
            raise UserError(
                f"--model {name}: the folder has no *.safetensors weights (pickled weights are not loaded)"
            )
        named = [
            json.loads((folder / "config.json").read_bytes()).get("transformers_weights")
            or ".safetensors"
        ]
        for index in folder.glob("*.safetensors.index.json"):
            named += json.loads(index.read_bytes())["weight_map"].values()
        if pickled := [
            f for f in named if not f.endswith((".safetensors", ".safetensors.index.json"))
        ]:
            raise UserError(
                f"--model {name}: its weights are in {pickled[0]}; pickled weights are not loaded, so "
                "convert them to safetensors"
            )
        load = functools.partial(
            AutoModelForCausalLM.from_pretrained,
            **where(name),
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
        if missing := sorted(map(str, info["missing_keys"] or info.get("mismatched_keys"))):
            raise UserError(
                f"--model {name}: {len(missing)} weights missing or of the wrong shape, as {missing[0]}; "
                "the folder is incomplete or of another architecture"
            )
        # Dropout and router jitter off, wherever a family keeps them: sampler and trainer must be the same function.
        for part in [*model.modules(), model.config.get_text_config()]:
            noise = [
                k
                for k, v in vars(part).items()
                if isinstance(v, float) and ("drop" in k or "jitter" in k)
            ]
            for key in [*noise, "p"] if isinstance(part, nn.Dropout) else noise:
                setattr(part, key, 0.0)
        return model.to(device).eval()


def turn_end(tokenizer, template: str) -> int | None:
    """The special token that the chat template puts behind a response; None if there is none."""
    response, ids = "The answer is 2.", []
    with suppress(Exception):  # of a template that takes no response; prompts may be in order
        _, found, behind = prompt_text(tokenizer, QUESTION, template, response).rpartition(response)
        ids = tokenizer.encode(behind.strip(), add_special_tokens=False) if found else []
    special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    return next((i for i in ids if i in special and tokenizer.decode([i]).strip()), None)


def find_end_ids(config, generation_config, tokenizer, template: str = "qwen") -> set[int]:
    """Every id that ends a sample: of the generation config, the config and the tokenizer, and the end of a turn."""
    ids = {turn_end(tokenizer, template)}
    for source in (generation_config, config, tokenizer):
        found = getattr(source, "eos_token_id", None)
        ids |= set(found) if isinstance(found, (list, tuple)) else {found}
    if not {type(i) for i in ids} <= {int, type(None)}:
        raise ValueError("an id is a whole number")
    return ids - {None}


def load_policy(
    name: str,
    device: str = "auto",
    template: str = "auto",
    max_rows: int | None = None,
    trust_remote_code: bool = False,
) -> Policy:
    """Model, tokenizer and sampler of `name`: bfloat16 on a GPU, float32 on a CPU. UserError says what is wrong."""
    device = start_processes(device)
    config = load_config(name, trust_remote_code)
    tokenizer = load_tokenizer(name, trust_remote_code)
    vocabulary, rows = set(tokenizer.get_vocab().values()), config.get_text_config().vocab_size
    if max(vocabulary - set(tokenizer.added_tokens_decoder), default=0) >= rows:
        raise UserError(
            f"--model {name}: the tokenizer has ids up to {max(vocabulary)}, but the model's embedding "
            f"only {rows} rows; it belongs to another model"
        )
    if template == "auto":
        template = "llama"
        if config.model_type != "llama":
            with suppress(Exception):  # some templates, such as Gemma's, refuse a system turn
                prompt_text(tokenizer, QUESTION, "qwen")
                template = "qwen"
    model = load_model(
        name, device, torch.bfloat16 if device.type == "cuda" else torch.float32, trust_remote_code
    )
    choose_threads(sum(p.numel() for p in model.parameters()))
    with from_model(name, "it is of a kind that cannot be trained here"):
        check_output_layer(model)
    with from_model(
        name,
        "its end tokens are unusable",
        "; correct eos_token_id in config.json and generation_config.json",
    ):
        end_ids = find_end_ids(config, model.generation_config, tokenizer, template)
        sampler = Sampler(model, end_ids, max(vocabulary) + 1, max_rows)
    if not end_ids:
        raise UserError(
            f"--model {name}: neither its config nor its tokenizer names an end token; set eos_token_id"
        )
    end_id = next(
        i
        for i in (turn_end(tokenizer, template), tokenizer.eos_token_id, min(end_ids))
        if i in end_ids
    )
    policy = Policy(
        model,
        tokenizer,
        sampler,
        end_ids,
        end_id,
        sampler.vocab_size,
        device,
        template,
        beside_weights(name, model, config),
    )
    policy.prompt_ids(QUESTION)
    prompt = prompt_text(tokenizer, QUESTION, template)
    if QUESTION not in prompt:
        raise UserError(
            f"--model {name}: its chat template leaves the question out; correct it, or try another "
            "--template"
        )
    if "<think" in prompt and "</think" not in prompt.rpartition("<think")[2]:
        say(
            "note: the chat template opens <think>: responses begin inside it, and injected text ends the turn there"
        )
    if policy.context() < (getattr(config.get_text_config(), "max_position_embeddings", None) or 0):
        say(
            f"note: rows end at {policy.context()} tokens, the original context of longrope (see Policy.context)"
        )
    return policy
