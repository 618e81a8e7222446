"""What training needs and no paper describes: processes, models, the training forward, AdamW, checkpoints, memory.

This file knows nothing of groups, advantages or rewards; edge_grpo.py is the method, and calls these pieces.
Read it in six parts: processes, models and prompts, the training forward, the optimizer, checkpoints, memory.
"""
import copy
import fcntl
import functools
import hashlib
import json
import math
import os
import re
import resource
import shutil
import sys
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, NoReturn

import jinja2
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from data import UserError
from entropy import check_output_layer, logprob_entropy
from rollout import Sampler, has_llama_layers

transformers.utils.logging.disable_progress_bar()          # the run prints its own

GIB = 2**30
TINY_MODEL = Path(__file__).parent / "data" / "tiny_model"


# --- Processes -------------------------------------------------------------------------------------------------------
# One process, no launcher, is the plain path: then `spread` is a plain call and every weight a plain tensor. Under
# torchrun every process runs the same program on the same list of rows; `spread` lets each work on its share and gives
# all of them everything. All that several processes need, and one does not, is in this section.

def start_processes(device: str) -> torch.device:
    """The device of this process ("auto", "cpu", "cuda", "cuda:1"); joins the group if torchrun started it."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = device.split(":")[0]
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"--device {device}: must be auto, cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {device}: this machine has no CUDA GPU that torch {torch.__version__} can use; "
                        "take --device cpu, or install a CUDA build of torch")
    if device.startswith("cuda:") and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"--device {device}: puts every process on the same GPU; take --device cuda under torchrun")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if kind == "cuda":
        if (torch.device(device).index or 0) >= torch.cuda.device_count():
            raise UserError(f"--device {device}: this machine has {torch.cuda.device_count()} GPUs; start as many "
                            "processes (--nproc-per-node) as there are GPUs")
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
                                timeout=timedelta(hours=2))         # a checkpoint on a slow disk takes its time
    return torch.device(device)


def stop_processes() -> None:
    """Leave the group. Only after success: with NCCL this waits for the others, who may be waiting for us."""
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process. One of several ends without tearing Python down: a thread of gloo may still hold a tensor then,
    and the process aborts after all is done (seen in two of many launches; pytorch/pytorch#179291)."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


@contextmanager
def one_error() -> Iterator[None]:
    """Let only the first process that fails tell its error; the others fail after it, often because of it, silently.

    (torchrun then ends them.) Every process sees torchrun's own store, even before it has joined the group.
    """
    try:
        yield
    except BaseException:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and int(os.environ["WORLD_SIZE"]) > 1:
            store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                                  timeout=timedelta(seconds=10))
            if store.add("processes that failed", 1) > 1:
                raise SystemExit(1) from None
        raise


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """True on the one process that prints and writes."""
    return rank() == 0


def gather(value: object) -> list:
    """Every process's `value`, by rank. (A collective: every process must call it.)"""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def spread(items: list, work: Callable[[list], list]) -> list:
    """`work` on this process's share of `items` (every W-th); returns the results of all of them, in order.

    `work` takes a list and returns a list of the same length; it must cope with an empty one.
    """
    if world_size() == 1:
        return work(items)
    results = [None] * len(items)
    for r, part in enumerate(gather(work(items[rank()::world_size()]))):
        results[r::world_size()] = part
    return results


def stream(*key) -> int:
    """A 63-bit number that depends on `key` alone, for random choices that are the same in any order and on any number
    of processes."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


def shard(model: nn.Module) -> nn.Module:
    """A Scorer on a second copy of the model, its fp32 weights cut by rows over all processes (FSDP2); it computes in
    the model's own dtype and adds up gradients in fp32.

    Layer by layer: beside the model and its own shards, a process never holds more than one whole fp32 layer, or the
    embedding and output layer (7B: 4.4 GB; a whole fp32 copy would be 30).
    """
    param = next(model.parameters())
    mesh = init_device_mesh(param.device.type, (world_size(),))     # FSDP2's own choice is a GPU whenever there is one
    precision = MixedPrecisionPolicy(param_dtype=param.dtype, reduce_dtype=torch.float32)
    empty = {id(p): nn.Parameter(p.new_empty(0, dtype=torch.float32)) for p in model.parameters()}
    scorer = Scorer(copy.deepcopy(model, empty))                    # the same modules, no weights yet
    originals = dict(zip(scorer.parameters(), model.parameters()))
    layers = [m for m in scorer.modules() if type(m).__name__ in (model._no_split_modules or ())]
    del empty                                                       # or it would keep every layer whole
    for module in [*layers, scorer]:
        for p in list(module.parameters()):
            if p in originals:
                p.data = originals.pop(p).detach().float()
        fully_shard(module, mesh=mesh, mp_policy=precision)
    return scorer


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a sharded tensor; any other tensor is its own shard."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def share(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's rows of a tensor that every process has whole, cut as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    rows = -(-len(tensor) // world_size())
    return tensor[rank() * rows:(rank() + 1) * rows]


def whole(tensor: Tensor, like: Tensor) -> Tensor:
    """The inverse of `share` (a collective)."""
    if not isinstance(like, DTensor):
        return tensor
    sharded = DTensor.from_local(tensor, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
    return sharded.full_tensor()


@torch.no_grad()
def refresh(replica: nn.Module, params: dict[str, Tensor]) -> None:
    """Copy sharded weights into a whole model, in its dtype before they travel (bf16: half the traffic)."""
    for name, weight in replica.named_parameters():
        if isinstance(params[name], DTensor):
            weight.copy_(params[name].to(weight.dtype).full_tensor())


# --- Models and prompts ----------------------------------------------------------------------------------------------

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


def wrong_flag(message: str) -> NoReturn:
    """For ArgumentParser.error: its complaint as one sentence, without the page of usage before it."""
    raise UserError(f"{message} (--help lists every flag)")


def first_line(error: BaseException) -> str:
    """The first line of an error's text: enough to say what was wrong inside one sentence."""
    if "trust_remote_code" in str(error):
        return "it brings its own code, which runs only with --trust-remote-code"
    return (str(error).strip().split("\n") or [""])[0][:200] or type(error).__name__


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


def frozen_copy(model: nn.Module) -> nn.Module:
    """The model as it is now, never trained (the reference of the KL penalty)."""
    return copy.deepcopy(model).requires_grad_(False)


# --- The training forward --------------------------------------------------------------------------------------------

def attend_rows(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None = None,
                rows: list[Tensor] | None = None, home: Tensor | None = None, **others) -> tuple[Tensor, None]:
    """Attention of a packed micro-batch. q (1, heads, N, D), k and v (1, kv heads, N, D); rows and home as in `Batch`
    -> (1, N, heads, D). Without rows it is transformers' own attention, for whoever else calls the model.

    No mask is needed: with padding on the right, causal attention never looks at it from a real token.
    """
    if rows is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, mask, scaling=scaling, **others)
    q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))                                         # (N, heads, D)
    outputs = []
    for tokens in rows:                                                                         # (b, S)
        of_rows = (t.index_select(0, tokens.flatten()).unflatten(0, tokens.shape).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(*of_rows, is_causal=True, scale=scaling, enable_gqa=True)
        outputs.append(out.transpose(1, 2).flatten(0, 1))                                       # (b * S, heads, D)
    return torch.cat(outputs).index_select(0, home)[None], None


ROWS = "rows_of_a_packed_batch"             # the name under which transformers' models call it
AttentionInterface.register(ROWS, attend_rows)
AttentionMaskInterface.register(ROWS, sdpa_mask)


class Scorer(nn.Module):
    """Log-probability and entropy of given tokens: the trunk, then the output layer on response positions only.

    packed (the Llama family): the layers see a micro-batch as one string of tokens, in which the prompt of several
    responses stands once and nothing is padding; only attention takes it apart into rows. That is exact, because a
    prompt does not look at what follows it. Other models see padded rows. With prompts of 32 and responses of 51 tokens
    on average, eight of each prompt, the update is x 1.4 / 1.5 as fast as on padded rows sorted by length (models of 1M
    / 30M parameters on a CPU, tests/bench_step.py with --padded and without; not measured on a GPU).

    It is a module so that a sharded model (FSDP2) gathers its weights around the whole of it, output layer included.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.packed = model, has_llama_layers(model)
        if self.packed:
            model.set_attn_implementation(ROWS)

    def forward(self, batch: "Batch", temperature: float, vocab_size: int,
                entropy_grad: bool = False) -> tuple[Tensor, Tensor]:
        """logp (M,) and entropy (M,) of the batch's M response tokens."""
        if self.packed:
            unused = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.ids.device)  # else one is made, (N, N)
            out = self.model.base_model(input_ids=batch.ids[None], position_ids=batch.positions[None],
                                        attention_mask=unused, use_cache=False, rows=batch.rows, home=batch.home)
            hidden = out.last_hidden_state[0]                                           # (N, H)
        else:
            [rows] = batch.rows
            out = self.model.base_model(input_ids=batch.ids[rows], use_cache=False)     # (b, S, H)
            hidden = out.last_hidden_state.flatten(0, 1).index_select(0, batch.home)
        weight = self.model.get_output_embeddings().weight                              # (V, H)
        return logprob_entropy(hidden.index_select(0, batch.before), weight, batch.targets, temperature, vocab_size,
                               entropy_grad)


@dataclass
class Batch:
    """A micro-batch: some rows of a step (prompt and response, but for its last token, which is only predicted) as N
    tokens, each prompt once, and M response tokens to be scored."""
    index: list[int]            # which rows of the step
    ids: Tensor                 # (N,)
    positions: Tensor           # (N,) of each token in its row
    rows: list[Tensor]          # (b, S) each: the tokens (of N) that make up b rows of about one length, right-padded
    home: Tensor                # (N,) where each token is found in the flat concatenation of `rows`
    before: Tensor              # (M,) the token (of N) that precedes each response token
    targets: Tensor             # (M,) the response tokens, row after row
    counts: list[int]           # how many of them each row has

    def flat(self, values: list) -> Tensor:
        """Per-row lists or (T_i,) tensors of the whole step -> one value per response token of this batch, (M,)."""
        parts = [torch.as_tensor(values[i], dtype=torch.float32) for i in self.index]
        return torch.cat(parts or [torch.zeros(0)]).to(self.ids.device)

    def by_row(self, *columns: Tensor) -> list[tuple[Tensor, ...]]:
        """The inverse: columns of one value per response token (M,) -> for each row of this batch its part of each,
        (T_i,) tensors on the CPU."""
        return list(zip(*(column.detach().cpu().split(self.counts) for column in columns))) if self.index else []


def micro_batches(prompts: list[list[int]], responses: list[list[int]], budget: int, device: torch.device,
                  packed: bool = True) -> list[Batch]:
    """Rows cut so that a batch holds at most `budget` tokens, every row counted with its prompt (a longer row is
    alone). Packed: in their order, so that rows of one prompt stay together. Otherwise sorted by length, which keeps
    padding to a few percent, and padding counts. Rows with an empty response are left out."""
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses)]
    order, groups, room = [i for i, r in enumerate(responses) if r], [], 0
    if not packed:
        order.sort(key=lambda i: -lengths[i])
    for i in order:
        cost = lengths[i] if packed or not groups else lengths[groups[-1][0]]
        if not groups or cost > room:
            groups.append([])
            cost, room = lengths[i], budget
        groups[-1].append(i)
        room -= cost
    return [make_batch(group, prompts, responses, device, packed) for group in groups]


def make_batch(index: list[int], prompts: list[list[int]], responses: list[list[int]], device: torch.device,
               packed: bool = True) -> Batch:
    """These rows as one micro-batch. Packed: rows at least 0.85 times as long as another are padded to it, so that
    little of attention is padding. Otherwise all are padded to the longest, for a single forward."""
    index = sorted(index, key=lambda i: -len(prompts[i]) - len(responses[i]))
    ids, before, rows, starts = [], [], [], {}
    for i in index:
        prompt, fed = tuple(prompts[i]), responses[i][:-1]
        if prompt not in starts:
            starts[prompt] = len(ids)
            ids += prompt
        row = [*range(starts[prompt], starts[prompt] + len(prompt)), *range(len(ids), len(ids) + len(fed))]
        ids += fed
        before += row[len(prompt) - 1:]
        rows.append(row)
    positions, home, padded, offset = [0] * len(ids), [0] * len(ids), [], 0
    while rows:
        width = len(rows[0])
        alike = sum(len(row) >= 0.85 * width for row in rows) if packed else len(rows)
        for row in rows[:alike]:
            for column, token in enumerate(row):
                positions[token], home[token] = column, offset + column
            offset += width
        padded.append([row + [0] * (width - len(row)) for row in rows[:alike]])
        rows = rows[alike:]
    tensor = functools.partial(torch.tensor, dtype=torch.long, device=device)
    return Batch(index, tensor(ids), tensor(positions), [tensor(row) for row in padded], tensor(home), tensor(before),
                 tensor([token for i in index for token in responses[i]]), [len(responses[i]) for i in index])


@torch.no_grad()
def response_logprobs(model: nn.Module, prompts: list[list[int]], responses: list[list[int]], temperature: float,
                      vocab_size: int, budget: int) -> list[tuple[Tensor, Tensor]]:
    """Scoring pass: per row (logp (T_i,), entropy (T_i,)), float32 on the CPU; an empty response has empty tensors."""
    scored = [(torch.zeros(0), torch.zeros(0)) for _ in responses]
    scorer = Scorer(model)
    for batch in micro_batches(prompts, responses, budget, next(model.parameters()).device, scorer.packed):
        logp, entropy = scorer(batch, temperature, vocab_size)
        for i, told in zip(batch.index, batch.by_row(logp, entropy)):
            scored[i] = told
    return scored


# --- The optimizer ---------------------------------------------------------------------------------------------------

class Trainer:
    """The trainable side of a policy: weights, gradients and AdamW on fp32 master weights.

    One process: the scorer's weights are the sampler's own; bf16 weights get fp32 masters and moments beside them, on
    the GPU or (offload) in CPU memory. Several processes: the scorer is a second, sharded copy (FSDP2: fp32 master
    shards, compute in the policy's dtype), and the sampler's full replica is refreshed from it after each update.
    """

    def __init__(self, policy: Policy, micro_batch_tokens: int, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0, offload: bool = False, checkpointing: bool = False):
        self.policy, self.sharded, self.micro_batch_tokens = policy, world_size() > 1, micro_batch_tokens
        self.scorer = shard(policy.model) if self.sharded else Scorer(policy.model)
        model = self.scorer.model.requires_grad_(True)
        self.checkpointing = checkpointing
        if checkpointing:
            with warnings.catch_warnings():             # renamed in late 5.x; the new name is not in early 5.x
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable({"use_reentrant": False})
        self.params = dict(model.named_parameters())                       # tied weights once
        self.offload = offload
        self.masters = {name: self._master(local(p)) for name, p in self.params.items()}
        # One optimizer per parameter: only one fp32 gradient exists at a time (7B: 2 GB instead of 30).
        self.adam = {name: torch.optim.AdamW([m], lr=0.0, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
                     for name, m in self.masters.items()}
        self.host_grads, self.last_backward = {}, False
        if self.offload:
            self._copy_gradients_during_backward()

    def _master(self, weight: Tensor) -> Tensor:
        """fp32 master of a weight: the weight itself where it is fp32 already and stays where it is."""
        if weight.dtype == torch.float32 and not self.offload:
            return weight.detach()
        return weight.detach().to(device="cpu" if self.offload else weight.device, dtype=torch.float32, copy=True)

    def _copy_gradients_during_backward(self) -> None:
        """Offload: as soon as the last backward has a gradient, it leaves for pinned CPU memory on its own stream."""
        cuda = self.policy.device.type == "cuda"
        self.stream = torch.cuda.Stream() if cuda else None
        sizes = [-(-local(p).nbytes // 16) * 16 for p in self.params.values()]
        # One block, because each is rounded up to a power of two (7B: 16 GiB instead of 27).
        block = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=cuda)
        for (name, p), part in zip(self.params.items(), block.split(sizes)):
            self.host_grads[name] = part[:local(p).nbytes].view(p.dtype).view(local(p).shape)

            def copy_out(p, name=name):
                if self.last_backward:
                    if self.stream is not None:
                        self.stream.wait_stream(torch.cuda.current_stream())
                    with torch.cuda.stream(self.stream):
                        self.host_grads[name].copy_(local(p.grad), non_blocking=True)
            p.register_post_accumulate_grad_hook(copy_out)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate gradients; `last` says that the step's gradients are complete after this call."""
        self.last_backward = last
        (loss * world_size()).backward()            # FSDP2 averages over processes, the step's loss is a sum

    def micro_batches(self, prompts: list[list[int]], responses: list[list[int]]) -> list[Batch]:
        """These rows, cut as this trainer's memory and model want it."""
        return micro_batches(prompts, responses, self.micro_batch_tokens, self.policy.device, self.scorer.packed)

    def in_step(self, batches: list[Batch]) -> Iterator[tuple[Batch, bool]]:
        """Yields (batch, is it the last): as many on every process, since a sharded forward is a collective; a process
        with fewer gets empty batches (one token, no rows), whose loss is 0."""
        count = max(gather(max(len(batches), 1)))
        empty = make_batch([0], [[0]], [[0]], self.policy.device)
        empty.index = []
        self.scorer.train(self.checkpointing)           # transformers recomputes only in training mode (dropout is off)
        for k in range(count):
            yield (batches[k] if k < len(batches) else empty), k == count - 1
        self.scorer.eval()

    def skip(self) -> float:
        """Drop the gradients of a step; returns NaN for its norm."""
        for p in self.params.values():
            p.grad = None
        return float("nan")

    def step(self, lr: float, clip: float) -> float:
        """One AdamW step with the gradient clipped to norm `clip` (0: not clipped); returns the norm before clipping.

        A non-finite norm leaves the weights as they are. Gradients are freed.
        """
        norm = self.gradient_norm()
        if math.isfinite(norm):
            self._apply(lr, min(1.0, clip / (norm + 1e-6)) if clip > 0 else 1.0)
            refresh(self.policy.model, self.params)
        self.skip()
        return norm

    def gradient_norm(self) -> float:
        """L2 norm of the whole gradient, over all processes; read back to the host."""
        grads = [local(p.grad) for p in self.params.values() if p.grad is not None]
        norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads if g.numel()]
        square = torch.stack(norms).square().sum() if norms else torch.zeros((), device=self.policy.device)
        if self.sharded:
            dist.all_reduce(square)
        return square.sqrt().item()

    @torch.no_grad()
    def _apply(self, lr: float, scale: float) -> None:
        if self.offload and self.stream is not None:
            self.stream.synchronize()
        for name, p in self.params.items():
            if p.grad is None:
                continue
            weight, master, adam = local(p), self.masters[name], self.adam[name]
            gradient = self.host_grads[name] if self.offload else local(p.grad)
            master.grad = gradient.to(master.dtype).mul_(scale) if master.dtype != gradient.dtype else gradient * scale
            adam.param_groups[0]["lr"] = lr
            adam.step()
            master.grad = None
            if self.offload:            # back by the same pinned memory, rounded first: half the traffic
                weight.copy_(gradient.copy_(master), non_blocking=True)
            elif master.data_ptr() != weight.data_ptr():
                weight.copy_(master)
        if self.offload and self.stream is not None:
            torch.cuda.current_stream().synchronize()

    def state(self) -> Iterator[tuple[str, Tensor | None]]:
        """Yields (name, tensor on CPU) of masters and moments, whole, on rank 0; every process must iterate."""
        for name, p in self.params.items():
            moments = self.adam[name].state.get(self.masters[name], {})
            parts = {"exp_avg": moments.get("exp_avg"), "exp_avg_sq": moments.get("exp_avg_sq")}
            if self.sharded or self.masters[name].data_ptr() != local(p).data_ptr():
                parts["master"] = self.masters[name]
            for part, tensor in parts.items():
                if tensor is not None:
                    gathered = whole(tensor.detach(), p)
                    yield f"{part}.{name}", gathered.cpu() if is_main() else None

    @torch.no_grad()
    def load_state(self, read: Callable[[str], Tensor | None], adam_steps: int) -> None:
        """Inverse of `state`: `read(name)` gives a whole tensor, or None if there is none of that name."""
        for name, p in self.params.items():
            master, adam = self.masters[name], self.adam[name]
            saved = read(f"master.{name}")
            if saved is None:
                saved = read(name)
            master.copy_(share(saved, p))
            if adam_steps:
                adam.state[master] = {"step": torch.tensor(float(adam_steps), device=master.device)}
                for part in ("exp_avg", "exp_avg_sq"):
                    moment = torch.zeros_like(master)
                    moment.copy_(share(read(f"{part}.{name}"), p))
                    adam.state[master][part] = moment
            local(p).copy_(master)
        refresh(self.policy.model, self.params)


# --- Checkpoints -----------------------------------------------------------------------------------------------------
# checkpoints/step-N/ holds the model in Hugging Face format, optimizer-*.safetensors (masters and moments) and
# checkpoint.json (step, log positions, and size and sha256 of every file). It is written beside and renamed: a folder
# named step-N is whole or damaged, never half-written. Nothing in it is unpickled.

SHARD_BYTES = 4 * GIB


def claim(folder: Path) -> IO:
    """Make a folder, and keep other processes from working in it until the file that is returned is closed.

    Raises UserError if another one is at work there, for example a job that was started anew before its last attempt
    had ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"--out {folder}: another process is at work in it; wait until it has ended, or give another "
                        "--out") from None
    except OSError:                                             # a file system without locks
        pass
    return file


def append(path: Path, rows: Iterable[dict]) -> None:
    """Append rows to a JSONL file; an error names the file, which that of a write does not."""
    try:
        with open(path, "a", encoding="utf-8") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def save_model(policy: Policy, folder: Path) -> None:
    """Model and tokenizer in Hugging Face format."""
    policy.model.save_pretrained(folder, max_shard_size=SHARD_BYTES)        # a file is gathered in CPU memory
    policy.tokenizer.save_pretrained(folder)


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


def publish(unfinished: Path, target: Path) -> None:
    """Flush every file to the disk, then give the folder its name in one move."""
    for path in [*unfinished.rglob("*"), unfinished]:
        flush(path)
    unfinished.rename(target)
    flush(target.parent)


def flush(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


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


# --- Memory ----------------------------------------------------------------------------------------------------------

def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left: on the GPU, on the CPU, or there to pin for a GPU."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and re.search(
        "out of memory|can't allocate memory|not enough memory", str(error)) is not None)


def halve_rows_on_oom(policy: Policy, work: Callable[[list], list], items: list) -> list:
    """`work(items)`, which samples; if the GPU runs out of memory, once more with half the sampler's rows."""
    try:
        return work(items)
    except ValueError as error:                     # the sampler's own sentence, for example about logits that are NaN
        raise UserError(str(error)) from error
    except torch.cuda.OutOfMemoryError:
        sampler, most = policy.sampler, len(items)          # which may have had fewer slots than it was asked for
        rows = max(1, min(sampler.max_rows or most, sampler.last_slots or most, most) // 2)
    torch.cuda.empty_cache()
    print(f"out of GPU memory while sampling: going on with --max-rows {rows}", file=sys.stderr)
    policy.sampler.max_rows = rows
    try:
        return work(items)
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(f"out of GPU memory while sampling {rows} rows: set a lower --max-rows or "
                        "--max-new-tokens") from error


def halve_batch_on_oom(trainer: Trainer, work: Callable[[], object]) -> object:
    """`work()`; if the GPU runs out of memory, once more with half the --micro-batch-tokens (one process only)."""
    try:
        return work()
    except torch.cuda.OutOfMemoryError as error:
        trainer.skip()
        trainer.policy.sampler.release()
        if trainer.sharded:
            raise UserError("out of GPU memory in the update: set --micro-batch-tokens below "
                            f"{trainer.micro_batch_tokens}") from error
    torch.cuda.empty_cache()
    trainer.micro_batch_tokens = max(1, trainer.micro_batch_tokens // 2)
    print(f"out of GPU memory in the update: going on with --micro-batch-tokens {trainer.micro_batch_tokens}",
          file=sys.stderr)
    try:
        return work()
    except torch.cuda.OutOfMemoryError as error:
        raise UserError("out of GPU memory in the update: set --micro-batch-tokens, --max-new-tokens or --group-size "
                        "lower, or add --offload-optimizer") from error


def memory_plan(config: transformers.PretrainedConfig, rows: int, row_tokens: int, micro_batch_tokens: int,
                weight_bytes: int, offload: bool, checkpointing: bool, processes: int = 1,
                trust_remote_code: bool = False) -> dict[str, float]:
    """Bytes that one process needs, by item; items that begin with "host" are in CPU memory when the model is on a GPU.

    rows: sampled at a time by this process; row_tokens: their longest prompt and response; weight_bytes: 2 (bf16) or 4.
    Weights, gradients, optimizer and cache (keys and values) are exact; activations are those of transformers'
    Llama-like layers.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except BROKEN as error:
        raise UserError(f"--model {config.name_or_path}: its config.json describes no causal language model "
                        f"({first_line(error)})") from error
    count = sum(p.numel() for p in model.parameters())
    c = config.get_text_config()
    heads = getattr(c, "num_attention_heads", None) or 0                        # 0: Mamba and its like
    head = getattr(c, "head_dim", None) or c.hidden_size // max(heads, 1)
    kv_heads = getattr(c, "num_key_value_heads", None) or heads
    inner = getattr(c, "intermediate_size", None) or 4 * c.hidden_size
    q, kv = heads * head, kv_heads * head
    layer = 8 * c.hidden_size + 3 * q + 2 * kv + 4 * inner                      # kept of one token in one layer
    if any("q_norm" in name for name, _ in model.named_parameters()):           # Qwen3
        layer += 3 * (q + kv)
    layer *= weight_bytes
    layers = c.num_hidden_layers * layer
    if checkpointing:                                       # every layer's input, and one layer with its gradients
        layers = c.num_hidden_layers * c.hidden_size * weight_bytes + 2 * layer
    plan = {"weights": count * weight_bytes, "gradients": count * weight_bytes}
    moments = count * (8 if weight_bytes == 4 and not offload else 12)      # and masters, unless the weights are fp32
    if offload:
        plan["host optimizer"] = moments + count * weight_bytes                 # and gradients
    else:
        plan["optimizer"] = moments
    if processes > 1:           # the weights are a whole replica that samples; beside it the shards, all in fp32
        ends = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)       # embedding and output layer
        one_layer = (count - ends) / c.num_hidden_layers
        plan = {"weights": count * weight_bytes, "gradients": 4 * count / processes,
                "optimizer": 12 * count / processes}
        if offload:             # the GPU keeps its shard of the masters, the host gets a copy of the gradients
            plan.update({"optimizer": 4 * count / processes, "host optimizer": 16 * count / processes})
        # In the layers' backward: the ends, gathered, and their gradients; a layer three times (in use, being copied,
        # coming), its gradient, and two fp32 copies of that being summed. At its end: the ends, their gradients and an
        # fp32 copy.
        plan["gathered weights"] = max(ends * 2 * weight_bytes + one_layer * (4 * weight_bytes + 8),
                                       ends * (2 * weight_bytes + 4))
    plan["cache"] = 2 * c.num_hidden_layers * kv_heads * head * weight_bytes * rows * row_tokens
    tokens = max(micro_batch_tokens, row_tokens)
    plan["activations"] = tokens * layers
    blocks = 3 * 4 * min(2**26, tokens * c.vocab_size)              # of logits (entropy.py); smaller ones on a CPU
    plan["output layer"] = blocks + c.vocab_size * c.hidden_size * weight_bytes
    return plan


def rows_that_fit(plan: dict[str, float], rows: int, free: float) -> int:
    """Of the `rows` rows that plan["cache"] is for, how many at a time leave room for all else of the plan, which comes
    after the cache, in nine tenths of the `free` bytes; at least 1. A model without attention has no such cache."""
    if not plan["cache"]:
        return rows
    others = sum(v for k, v in plan.items() if k != "cache" and not k.startswith("host"))
    return max(1, min(rows, int((0.9 * free - others) / plan["cache"] * rows)))


def preflight(plan: dict[str, float], device: torch.device) -> str:
    """One line: what the run will need where, what is there, and which flag to change if it does not fit."""
    host = sum(v for k, v in plan.items() if k.startswith("host")) if device.type == "cuda" else 0
    need = sum(plan.values()) - host
    text = ", ".join(f"{k} {v / GIB:.1f}" for k, v in plan.items())
    ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free, total = torch.cuda.mem_get_info(device) if device.type == "cuda" else (ram, ram)
    line = f"memory (GiB): {text}; {need / GIB:.1f} of {total / GIB:.1f} on {device}"
    line += f", {host / GIB:.1f} of {ram / GIB:.1f} in CPU memory" if host else ""
    if host > ram:
        return f"{line}. It will probably not fit: use more CPU memory, a smaller model or --no-offload-optimizer"
    if need <= free:
        return line
    largest = max((k for k in plan if not k.startswith("host")), key=plan.get)
    advice = {"optimizer": "add --offload-optimizer or more processes (torchrun)", "cache": "set --max-rows lower",
              "activations": "set --micro-batch-tokens lower or keep --gradient-checkpointing",
              "output layer": "set --micro-batch-tokens lower"}
    otherwise = "use a smaller model or more processes (torchrun)"
    return f"{line}. It will probably not fit: {advice.get(largest, otherwise)}"


def peak_memory(device: torch.device) -> float:
    """GiB: allocated at most on the GPU, or resident at most in this process on the CPU, since the start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (GIB if sys.platform == "darwin" else 2**20)
