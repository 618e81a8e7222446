"""What a run will need in memory, computed before any weight is loaded."""

import os
import resource
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM

from engine.console import say
from engine.modelfiles import from_model
from engine.models import choose_dtype, load_config
from engine.processes import world_size

GIB = 2**30
ADVICE = (
    "set --micro-batch-tokens or --max-rows lower, add --offload-optimizer, keep "
    "--gradient-checkpointing, or use more processes (torchrun) or a smaller model"
)


def preflight(flags, device: torch.device, rows: int, row_tokens: int) -> int | None:
    """Print how much memory a run with these flags needs and how much there is, if it needs more
    than 1 GiB or more than there is.

    rows: sampled in a step, each of at most row_tokens tokens. Returns how many to sample at a time
    (None: any number).
    """
    cuda = device.type == "cuda"
    rows = -(-rows // world_size())
    rows = min(rows, flags.max_rows or rows)
    plan = memory_plan(
        load_config(flags.model, flags.trust_remote_code),
        rows,
        row_tokens,
        flags.micro_batch_tokens,
        choose_dtype(flags.dtype, device).itemsize,
        flags.offload_optimizer and cuda,
        flags.gradient_checkpointing,
        world_size(),
        flags.trust_remote_code,
    )
    if flags.kl:
        plan["reference"] = plan["weights"]
    fit = rows_that_fit(plan, rows, available(device)[0]) if cuda and rows else rows
    plan["cache"] *= fit / max(rows, 1)
    line = describe(plan, device)
    if fit < rows:
        line += f"; sampling {fit} of {rows} rows at a time"
    if fit < rows or sum(plan.values()) > GIB or ADVICE in line:
        say(line)
    return fit if fit < rows else flags.max_rows or None


def available(device: torch.device) -> tuple[int, int]:
    """Bytes of the GPU that are free, and all of them; without a GPU those of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return memory, memory


def memory_plan(
    config: transformers.PretrainedConfig,
    rows: int,
    row_tokens: int,
    micro_batch_tokens: int,
    weight_bytes: int,
    offload: bool,
    checkpointing: bool,
    processes: int = 1,
    trust_remote_code: bool = False,
) -> dict[str, float]:
    """Bytes that one process needs, by item; "host optimizer" is in CPU memory.

    rows: sampled at a time, each of at most row_tokens tokens. weight_bytes: 2 (bf16) or 4 (fp32).
    Tests hold the plan within 20% of what small models take."""
    with (
        from_model(config.name_or_path, "its config.json describes no causal language model"),
        torch.device("meta"),
    ):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    c = config.get_text_config()
    count = sum(p.numel() for p in model.parameters())
    embedding = c.vocab_size * c.hidden_size
    layers = c.num_hidden_layers
    heads = getattr(c, "num_attention_heads", None) or 0  # a Mamba has none, and no cache either
    head_size = getattr(c, "head_dim", None) or c.hidden_size // max(heads, 1)
    key_size = (getattr(c, "num_key_value_heads", None) or heads) * head_size
    inner_size = getattr(c, "intermediate_size", None) or 4 * c.hidden_size
    tokens = max(micro_batch_tokens, row_tokens)
    sharded = processes > 1

    # AdamW keeps two fp32 moments, and an fp32 master where the weight itself is not one.
    is_master = weight_bytes == 4 and not offload and not sharded
    optimizer = count * (8 if is_master else 12) / processes
    gradients = count * (4 if sharded else weight_bytes) / processes
    plan = {"weights": count * weight_bytes, "gradients": gradients, "optimizer": optimizer}
    if offload:  # FSDP2's shards are masters, and stay on the GPU
        plan["optimizer"] = 4 * count / processes if sharded else 0
        plan["host optimizer"] = optimizer + gradients
    if sharded:
        # The weights above are the replica that samples. In the backward pass FSDP2 gathers both
        # ends of the model and one layer, with their gradients, while it fetches the next layer and
        # reduces the last one's gradient in fp32.
        ends = embedding * (1 if c.tie_word_embeddings else 2)
        layer = (count - ends) / layers
        plan["gathered weights"] = ends * 2 * weight_bytes + layer * (4 * weight_bytes + 8)
    plan["cache"] = 2 * layers * key_size * weight_bytes * rows * row_tokens

    # What autograd keeps of one token in one layer of a Llama, in numbers. Qwen3 also normalises
    # queries and keys. With checkpointing: each layer's input, and twice the numbers of one layer.
    kept = 8 * c.hidden_size + 3 * heads * head_size + 2 * key_size + 4 * inner_size
    if c.model_type.startswith("qwen3"):
        kept += 3 * (heads * head_size + key_size)
    numbers = layers * c.hidden_size + 2 * kept if checkpointing else layers * kept
    plan["activations"] = tokens * numbers * weight_bytes
    logits = min(2**26, tokens * c.vocab_size)  # of a block in entropy.py; three of them, in fp32
    plan["output layer"] = 12 * logits + embedding * weight_bytes
    return {item: size for item, size in plan.items() if size or item == "cache"}


def rows_that_fit(plan: dict[str, float], rows: int, free: float) -> int:
    """How many of `rows` rows can be sampled at a time, at least 1.

    plan["cache"] is for all of them. With the rest of the plan, which is not allocated yet when the
    cache is made, it may take 9/10 of the `free` bytes."""
    if not plan["cache"]:  # a model without attention
        return rows
    others = on_device(plan) - plan["cache"]
    fit = int((0.9 * free - others) / plan["cache"] * rows)
    return max(1, min(rows, fit))


def on_device(plan: dict[str, float]) -> float:
    return sum(plan.values()) - plan.get("host optimizer", 0)


def describe(plan: dict[str, float], device: torch.device) -> str:
    """One line: what the run will need, what is there, and which flags to change if it does not
    fit."""
    need, host = on_device(plan), plan.get("host optimizer", 0)
    free, total = available(device)
    _, host_total = available(torch.device("cpu"))
    items = ", ".join(f"{item} {size / GIB:.1f}" for item, size in plan.items())
    line = f"memory (GiB): {items}; {need / GIB:.1f} of {total / GIB:.1f} on {device}"
    if host:
        line += f", {host / GIB:.1f} of {host_total / GIB:.1f} in CPU memory"
    if need > free or host > host_total:
        line += f". It will probably not fit: {ADVICE}"
    return line


def peak_memory(device: torch.device) -> float:
    """GiB: the most allocated on the GPU, or resident in this process on the CPU, since the
    start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = GIB if sys.platform == "darwin" else 2**20  # bytes or KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
