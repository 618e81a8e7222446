"""What a run will need in memory, computed before any weight is loaded."""

import os
import resource
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM

from engine.console import say
from engine.modelfiles import from_model
from engine.models import load_config
from engine.processes import world_size

GIB = 2**30
ADVICE = {
    "optimizer": "add --offload-optimizer or more processes (torchrun)",
    "cache": "set --max-rows lower",
    "activations": "set --micro-batch-tokens lower or keep --gradient-checkpointing",
    "output layer": "set --micro-batch-tokens lower",
    "host optimizer": "use more CPU memory, a smaller model or --no-offload-optimizer",
}


def preflight(flags, device: torch.device, rows: int, row_tokens: int) -> int | None:
    """Print what the run of these flags will need, where, and what is there, if that is worth a thought. rows: sampled
    in a step, of at most row_tokens tokens. Returns how many to sample at a time (None: any number)."""
    cuda, rows = device.type == "cuda", min(-(-rows // world_size()), flags.max_rows or rows)
    plan = memory_plan(
        load_config(flags.model, flags.trust_remote_code),
        rows,
        row_tokens,
        flags.micro_batch_tokens,
        2 if cuda else 4,
        flags.offload_optimizer and cuda,
        flags.gradient_checkpointing,
        world_size(),
        flags.trust_remote_code,
    )
    plan |= {"reference": plan["weights"]} if flags.kl else {}
    fit = rows_that_fit(plan, rows, torch.cuda.mem_get_info(device)[0]) if cuda and rows else rows
    plan["cache"] *= fit / max(rows, 1)
    line = describe(plan, device)
    if fit < rows or sum(plan.values()) > GIB or "not fit" in line:
        say(line + (f"; sampling {fit} of {rows} rows at a time" if fit < rows else ""))
    return fit if fit < rows else flags.max_rows or None


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
    """Bytes that one process needs, by item; those of "host …" are in CPU memory. rows: sampled at a time, of at most
    row_tokens tokens; weight_bytes: 2 (bf16) or 4. Activations are those of transformers' Llama-like layers."""
    with (
        from_model(config.name_or_path, "its config.json describes no causal language model"),
        torch.device("meta"),
    ):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    c, sizes = config.get_text_config(), {name: p.numel() for name, p in model.named_parameters()}
    count, sharded = sum(sizes.values()), processes > 1
    mine = count / processes
    # Sharded: the weights are a whole replica that samples; gradients and masters are shards, all in fp32.
    gradients = mine * (4 if sharded else weight_bytes)
    optimizer = mine * (8 if weight_bytes == 4 and not offload and not sharded else 12)
    plan = {"weights": count * weight_bytes, "gradients": gradients, "optimizer": optimizer}
    if (
        offload
    ):  # FSDP2 keeps its shard of the masters on the GPU; one gradient at a time is made fp32
        scratch = 0 if sharded or weight_bytes == 4 else 4 * max(sizes.values())
        plan |= {
            "optimizer": 4 * mine if sharded else 0,
            "host optimizer": optimizer + gradients + scratch,
        }
    if sharded:
        # In the layers' backward: embedding and output layer and their gradients; a layer three times (in use, being
        # copied, coming), its gradient, and two fp32 copies of that. At its end: the two ends, gradients, an fp32 copy.
        ends = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
        plan["gathered weights"] = max(
            ends * 2 * weight_bytes + (count - ends) / c.num_hidden_layers * (4 * weight_bytes + 8),
            ends * (2 * weight_bytes + 4),
        )
    heads = getattr(c, "num_attention_heads", None) or 0  # 0: Mamba and its like
    head = getattr(c, "head_dim", None) or c.hidden_size // max(heads, 1)
    q, kv = heads * head, (getattr(c, "num_key_value_heads", None) or heads) * head
    layer = (
        8 * c.hidden_size
        + 3 * q
        + 2 * kv
        + 4 * (getattr(c, "intermediate_size", None) or 4 * c.hidden_size)
    )
    if any("q_norm" in name for name in sizes):  # Qwen3
        layer += 3 * (q + kv)
    layers = c.num_hidden_layers * layer  # numbers kept of one token
    if checkpointing:  # every layer's input, and one layer with its gradients
        layers = c.num_hidden_layers * c.hidden_size + 2 * layer
    tokens = max(micro_batch_tokens, row_tokens)
    plan["cache"] = 2 * c.num_hidden_layers * kv * weight_bytes * rows * row_tokens
    plan["activations"] = tokens * layers * weight_bytes
    blocks = (
        3 * 4 * min(2**26, tokens * c.vocab_size)
    )  # of logits (entropy.py); smaller ones on a CPU
    plan["output layer"] = blocks + c.vocab_size * c.hidden_size * weight_bytes
    return {item: size for item, size in plan.items() if size or item == "cache"}


def rows_that_fit(plan: dict[str, float], rows: int, free: float) -> int:
    """Of the `rows` rows that plan["cache"] is for, how many at a time leave room for all else of the plan, which comes
    later, in nine tenths of the `free` bytes; at least 1. A model without attention has no such cache."""
    others = sum(v for k, v in plan.items() if k != "cache" and not k.startswith("host"))
    return (
        max(1, min(rows, int((0.9 * free - others) / plan["cache"] * rows)))
        if plan["cache"]
        else rows
    )


def describe(plan: dict[str, float], device: torch.device) -> str:
    """One line: what the run will need where, what is there, and which flag to change if it does not fit."""
    host = sum(v for k, v in plan.items() if k.startswith("host")) if device.type == "cuda" else 0
    need, ram = sum(plan.values()) - host, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free, total = torch.cuda.mem_get_info(device) if device.type == "cuda" else (ram, ram)
    line = (
        f"memory (GiB): {', '.join(f'{k} {v / GIB:.1f}' for k, v in plan.items())}; {need / GIB:.1f} of "
        f"{total / GIB:.1f} on {device}"
        + (f", {host / GIB:.1f} of {ram / GIB:.1f} in CPU memory" if host else "")
    )
    if host <= ram and need <= free:
        return line
    largest = (
        "host optimizer"
        if host > ram
        else max((k for k in plan if not k.startswith("host")), key=plan.get)
    )
    return f"{line}. It will probably not fit: {ADVICE.get(largest, 'use a smaller model or more processes')}"


def peak_memory(device: torch.device) -> float:
    """GiB: allocated at most on the GPU, or resident at most in this process on the CPU, since the start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        GIB if sys.platform == "darwin" else 2**20
    )
