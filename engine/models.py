"""A model of transformers as the policy: weights, tokenizer, prompt, end tokens and sampler, checked before use."""
import functools
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import jinja2
import torch
import transformers
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from data import UserError
from engine.console import first_line
from engine.processes import spread, start_processes
from entropy import check_output_layer
from rollout import Sample, Sampler

transformers.utils.logging.disable_progress_bar()          # the run prints its own

TINY_MODEL = Path(__file__).parents[1] / "data" / "tiny_model"
INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."
QWEN_TEMPLATE = (f"<|im_start|>system\n{INSTRUCTION}<|im_end|>\n<|im_start|>user\n{{question}}<|im_end|>\n"
                 "<|im_start|>assistant\n")
END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>")
TURN_ENDS = ("<|im_end|>", "<|eot_id|>")        # what ends an assistant's turn in the two families of the paper


@dataclass
class Policy:
    """A causal language model, its tokenizer and its sampler: ids in, ids out, and the two ways across to text."""
    model: nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    sampler: Sampler
    end_ids: set[int]           # any of them ends a response
    end_id: int                 # the one that ends injected text
    vocab_size: int             # ids from here on are padding of the embedding
    device: torch.device
    template: str               # "qwen" or "llama"

    def context(self) -> int:
        """The most tokens, of prompt and response together, that the model has positions for."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2**31

    def prompt_ids(self, question: str) -> list[int]:
        """The question in the model's chat template, the assistant's turn opened."""
        text = prompt_text(self.tokenizer, question, self.template)
        return self.tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def encode(self, text: str) -> list[int]:
        """Ids of text that stands inside a response."""
        return self.tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def decode_raw(self, ids: list[int]) -> str:
        """Text of ids, special tokens shown."""
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens dropped."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def room(self, prompt: list[int]) -> int:
        """How many tokens the model's positions leave behind a prompt."""
        return max(0, self.context() - len(prompt))

    def sample(self, prompts: list[list[int]], limits: list[int], seeds: list[int], temperature: float,
               top_p: float = 1.0) -> list[Sample]:
        """One sample of each prompt, with a limit and a seed for each, inside the model's context; the prompts are
        spread over the processes. Raises CannotSample."""
        rows = [(p, min(limit, self.room(p)), seed) for p, limit, seed in zip(prompts, limits, seeds)]
        try:
            return spread(rows, lambda mine: self._draw(mine, temperature, top_p) if mine else [])
        except ValueError as error:                 # the sampler's own sentence, for example about logits that are NaN
            raise CannotSample(str(error)) from error

    def _draw(self, rows: list[tuple], temperature: float, top_p: float, retry: bool = True) -> list[Sample]:
        """If the GPU runs out of memory, once more with half the sampler's rows."""
        prompts, limits, seeds = map(list, zip(*rows))
        try:
            return [s for [s] in self.sampler.sample(prompts, 1, limits, temperature, seeds, top_p)]
        except torch.cuda.OutOfMemoryError as error:
            # The sampler may have had fewer slots than it was asked for.
            most = min(self.sampler.max_rows or len(rows), self.sampler.last_slots or len(rows), len(rows))
            if not retry:
                raise UserError(f"out of GPU memory while sampling {most} rows: set a lower --max-rows or "
                                "--max-new-tokens") from error
        self.sampler.max_rows = max(1, most // 2)       # outside of `except`, whose traceback keeps tensors alive
        torch.cuda.empty_cache()
        print(f"out of GPU memory while sampling: going on with --max-rows {self.sampler.max_rows}", file=sys.stderr)
        return self._draw(rows, temperature, top_p, retry=False)


class CannotSample(UserError):
    """The policy's logits are not finite, or the GPU has no memory to sample with."""


def prompt_text(tokenizer: transformers.PreTrainedTokenizerBase, question: str, template: str) -> str:
    """Qwen: the instruction is the system turn. Llama: it follows the problem in the user turn (as in the paper)."""
    if template == "llama":
        messages = [{"role": "user", "content": f"{question} {INSTRUCTION}"}]
    else:
        messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": question}]
    if tokenizer.chat_template is None and template == "llama":
        raise UserError(f"--model {tokenizer.name_or_path}: its tokenizer has no chat template, which a Llama prompt "
                        "needs; take the Instruct model, or --template qwen")
    if tokenizer.chat_template is None:
        return QWEN_TEMPLATE.replace("{question}", question)
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True,
                                             date_string="26 Jul 2024")       # Llama 3 would put today's date
    except (jinja2.TemplateError, TypeError, ValueError) as error:            # ValueError: several and no default
        raise UserError(f"--model {tokenizer.name_or_path}: its chat template fails ({first_line(error)}); correct the "
                        "template, or try another --template") from error


def find_model(name: str) -> str:
    """`tiny`, a local folder, a hub id, or a bare Qwen or Llama name -> what from_pretrained takes."""
    if name == "tiny":
        return str(TINY_MODEL)
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise UserError(f"--model {name}: the folder has no config.json; give a Hugging Face model folder")
        return name
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"--model {name}: there is no such folder")
    for start, owner in (("Qwen", "Qwen"), ("Llama", "meta-llama")):
        if name.startswith(start):
            return f"{owner}/{name}"
    if "/" not in name:
        raise UserError(f"--model {name}: neither a local folder, nor a hub id (owner/name), nor `tiny`")
    return name


# What transformers raises on a folder that is not a whole and consistent model.
BROKEN = (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError, ImportError,
          RuntimeError, SafetensorError, StrictDataclassError)


@functools.cache
def hub_is_away() -> bool:
    """Asked once: then files come from the cache at once, or not at all, instead of after 20 s of retries each."""
    try:
        urllib.request.urlopen(ENDPOINT, timeout=10).close()
    except urllib.error.HTTPError:              # an answer, whatever it says
        return False
    except OSError:
        return True
    return False


def where(name: str) -> dict:
    """What every from_pretrained is given to find `name`."""
    path = find_model(name)
    return dict(pretrained_model_name_or_path=path, local_files_only=Path(path).is_dir() or hub_is_away())


def load_config(name: str, trust_remote_code: bool = False) -> transformers.PretrainedConfig:
    """The model's configuration, with one clear sentence for whatever is wrong with it."""
    try:
        return AutoConfig.from_pretrained(**where(name), trust_remote_code=trust_remote_code)
    except UserError:                           # find_model's own sentence
        raise
    except BROKEN as error:
        raise UserError(f"--model {name}: no usable config.json ({first_line(error)}); give a local folder, or a hub "
                        "id while the hub can be reached") from error


def load_tokenizer(name: str, trust_remote_code: bool = False) -> transformers.PreTrainedTokenizerBase:
    """The model's tokenizer, with one clear sentence for whatever is wrong with it."""
    path, files = Path(find_model(name)), ("tokenizer.json", "tokenizer.model", "vocab.json")
    if path.is_dir() and not any((path / f).is_file() for f in files):
        raise UserError(f"--model {name}: the folder has no tokenizer (tokenizer.json); copy the one of its base model")
    try:
        return AutoTokenizer.from_pretrained(**where(name), trust_remote_code=trust_remote_code)
    except BROKEN as error:
        raise UserError(f"--model {name}: its tokenizer cannot be read ({first_line(error)})") from error
    except Exception as error:              # the Rust tokenizer raises the bare class on a broken tokenizer.json
        if type(error) is not Exception:
            raise
        raise UserError(f"--model {name}: its tokenizer.json is broken ({first_line(error)})") from error


def load_model(name: str, device: torch.device, dtype: torch.dtype, trust_remote_code: bool = False) -> nn.Module:
    """The weights (safetensors only), all there and of the right shapes, on `device`."""
    path = Path(find_model(name))
    if path.is_dir() and not list(path.glob("*.safetensors")):
        raise UserError(f"--model {name}: the folder has no *.safetensors weights (pickled weights are not loaded)")
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            **where(name), dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code,
            output_loading_info=True, attn_implementation="sdpa", ignore_mismatched_sizes=True)
    except BROKEN as error:
        raise UserError(f"--model {name}: its weights cannot be loaded ({first_line(error)})") from error
    if info["missing_keys"] or info.get("mismatched_keys"):
        names = sorted(info["missing_keys"]) or sorted(str(key) for key in info["mismatched_keys"])
        raise UserError(f"--model {name}: weights missing or of the wrong shape: {', '.join(names[:3])}"
                        f"{' …' if len(names) > 3 else ''}; the folder is incomplete or of another architecture")
    drop_nothing(model)
    return model.to(device).eval()


def drop_nothing(model: nn.Module) -> None:
    """Dropout, layer drop and router jitter off, wherever a family keeps them (a few read the config as they run): the
    sampler and the trainer, which recomputes activations only in training mode, must be the same function."""
    for part in [*model.modules(), model.config.get_text_config()]:
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name, value in vars(part).items():
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(part, name, 0.0)


def find_end_ids(config, generation_config, tokenizer) -> set[int]:
    """Every id that ends a sample: of the generation config, the config, the tokenizer, and a chat template's turns."""
    ids = set()
    for source in (generation_config, config, tokenizer):
        found = getattr(source, "eos_token_id", None)
        ids.update(found if isinstance(found, (list, tuple)) else [found])
    vocabulary = tokenizer.get_vocab()
    ids.update(vocabulary.get(token) for token in END_TOKENS)
    return ids - {None}


def load_policy(name: str, device: str = "auto", template: str = "auto", max_rows: int | None = None,
                trust_remote_code: bool = False) -> Policy:
    """Model, tokenizer and sampler of `name`: bfloat16 on a GPU, float32 on a CPU. UserError says what is wrong."""
    device = start_processes(device)
    config = load_config(name, trust_remote_code)
    tokenizer = load_tokenizer(name, trust_remote_code)
    vocabulary = tokenizer.get_vocab()
    vocab_size = max(vocabulary.values()) + 1
    if vocab_size > config.get_text_config().vocab_size:
        raise UserError(f"--model {name}: the tokenizer has ids up to {vocab_size - 1}, but the model's embedding only "
                        f"{config.get_text_config().vocab_size} rows; the tokenizer belongs to another model")
    model = load_model(name, device, torch.bfloat16 if device.type == "cuda" else torch.float32, trust_remote_code)
    try:
        check_output_layer(model)
    except ValueError as error:
        raise UserError(f"--model {name}: {error}") from error
    end_ids = find_end_ids(config, model.generation_config, tokenizer)
    if not end_ids:
        raise UserError(f"--model {name}: neither its config nor its tokenizer names an end token; set eos_token_id")
    if max(end_ids) >= vocab_size:
        raise UserError(f"--model {name}: its end token {max(end_ids)} is none of the tokenizer's {vocab_size} ids; "
                        "correct eos_token_id in config.json and generation_config.json")
    turn_end = next((vocabulary[token] for token in TURN_ENDS if token in vocabulary), None)
    end_id = turn_end
    if turn_end is None:
        end_id = tokenizer.eos_token_id if tokenizer.eos_token_id in end_ids else min(end_ids)
    if template == "auto":
        template = "llama" if config.model_type == "llama" else "qwen"
    sampler = Sampler(model, end_ids, vocab_size=vocab_size, max_rows=max_rows)
    return Policy(model, tokenizer, sampler, end_ids, end_id, vocab_size, device, template)
