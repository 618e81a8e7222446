"""Batched sampling with a KV cache: token ids in, sampled token ids out. Nothing here knows of text or rewards.

Sampling is most of a GRPO step, so this replaces `model.generate()`. It is exact: a row's tokens depend on the weights,
its prompt, its seed and its limit, not on which rows share the batch (up to the rounding of matrix products, whose last
bit may change with the number of rows). In five parts: sampling (logits -> one token a row), prefill (the keys and
values of a prompt), decode (one token more for every live row), slots (where rows lie, come and go) and graphs (the
decode step, recorded on a GPU). What each trick in them brings is measured by tests/bench_rollout.py.

The layers of the Llama family (Llama, Qwen2, Qwen3, Mistral) are run straight from the model's own modules: an
optimizer step is seen at the next call, and no weight is copied but, on a GPU, those of queries, keys and values. Every
other causal language model of transformers goes through its own forward (`sample_by_forward`): same distribution, same
random streams, less speed.
"""

import functools
import gc
import hashlib
import inspect
import math
from collections import Counter, deque
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from entropy import mm_wide

# On an H100 torch >= 2.11 gives scaled_dot_product_attention to cuDNN first, here and in the training forward. That
# builds a plan for each new (rows, length), 0.1 s each on an H200, kept for ever; in 2.9 it reads out of bounds.
torch.backends.cuda.enable_cudnn_sdp(False)

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256)  # rows that a CUDA graph is recorded for
STEPS_PER_LOOK = (
    16  # on a GPU the host looks for finished rows this often, so that no token waits for it
)
PREFILL_TOKENS = 8192  # most prompt tokens in one forward, padding included
CAPACITY = 2048  # on a GPU a row has room for so many tokens, if that costs no row: a new cache is new graphs
GROWTH = (
    16  # on a CPU the cache gets this many positions more at a time, or an eighth if that is more
)


@dataclass
class Sample:
    """ids: the sampled tokens, with the end id if one was drawn; logprobs: of each token, natural logarithm, under the
    distribution it was drawn from; finished: an end id was drawn before the limit was reached; entropies: at each token
    that of softmax(logits / temperature), in nats, over the whole vocabulary whatever top_p is."""

    ids: list[int]
    logprobs: list[float]
    finished: bool
    entropies: list[float] = field(default_factory=list)


@dataclass
class Row:
    """One sample to be drawn. Rows of the same prompt share its prefill."""

    prompt: tuple[int, ...]
    limit: int
    seed: int
    sample: Sample = field(default_factory=lambda: Sample([], [], False))


# ---- 1. Sampling ----------------------------------------------------------------------------------------------------


def _splitmix64(x: Tensor) -> Tensor:
    """The finalizer of splitmix64 (Steele et al. 2014) on int64, where products wrap and shifts need a mask."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return x ^ ((x >> 31) & (2**33 - 1))


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """seeds (B,), positions (B,) int64 -> (B,) float64 in [0, 1), 53 bits. A hash and not a generator: no state, equal
    on CPU and GPU, and a position's number does not depend on what was drawn before it or beside it."""
    bits = _splitmix64(_splitmix64(seeds) + positions * (0x9E3779B97F4A7C15 - 2**64))
    return ((bits >> 11) & (2**53 - 1)).double() * 2.0**-53


def _pick(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse CDF. weights (B, K) float64 >= 0, u (B,) -> index (B,), and what is left of u within it, in [0, 1).
    Only an index of positive weight is ever picked, also where a parallel cumulative sum is not quite monotone."""
    cdf = weights.cumsum(-1).masked_fill(weights <= 0, -1.0)
    target = u * cdf.amax(-1)  # below the largest, because u < 1
    index = (
        (cdf > target[:, None]).to(torch.uint8).argmax(-1, keepdim=True)
    )  # the first one above the target
    left = 1 - (cdf.gather(-1, index)[:, 0] - target) / weights.gather(-1, index)[:, 0]
    return index[:, 0], left.clamp(0, 1 - 2.0**-53)


def _invert(p: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """p (B, V) float32 >= 0, u (B,) -> ids (B,), logprobs (B,) of p normalised. The cumulative sum is over blocks and
    then within one, not over the vocabulary: with 152k ids that takes a fiftieth of the time."""
    width = 128
    if p.shape[1] % width:
        p = F.pad(p, (0, -p.shape[1] % width))
    blocks = p.unflatten(-1, (-1, width))  # (B, V/128, 128)
    sums = blocks.sum(-1).double()  # (B, V/128)
    block, left = _pick(sums, u)
    inside = blocks[torch.arange(len(p), device=p.device), block].double()  # (B, 128)
    token, _ = _pick(inside, left)
    chosen = inside.gather(-1, token[:, None])[:, 0]
    return block * width + token, (chosen / sums.sum(-1)).log().float()


@dataclass
class Rule:
    """How a token is drawn. knobs holds 1/temperature and top_p on the device, where a recorded graph reads them."""

    greedy: bool
    nucleus: bool
    knobs: Tensor
    vocab_size: int

    def draw(self, logits: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """logits (B, V), which may be overwritten; u (B,) in [0, 1) -> ids, logprobs and entropies, each (B,)."""
        logits = logits.float()
        logits[:, self.vocab_size :] = -torch.inf  # rows of the embedding that belong to no token
        if self.greedy:
            best, ids = logits.max(-1)
            return (
                ids,
                best - best,
                best - best,
            )  # 0, a point mass; NaN if the logits are not finite
        logp = torch.log_softmax(logits.mul_(self.knobs[0]), -1)
        p = logp.exp()
        entropies = -torch.linalg.vecdot(p[:, : self.vocab_size], logp[:, : self.vocab_size])
        return *_invert(self._cut(p) if self.nucleus else p, u), entropies

    def _cut(self, p: Tensor) -> Tensor:
        """p (B, V) with 0 for all but the fewest most likely tokens that hold top_p."""
        sorted_p, order = torch.sort(p, dim=-1, descending=True, stable=True)
        outside = (
            sorted_p.cumsum(-1) - sorted_p >= self.knobs[1]
        )  # those before it already hold top_p
        outside[:, 0] = False
        return p.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), 0.0)


# ---- The layers of the Llama family, shared by prefill and decode ---------------------------------------------------

LLAMA_FAMILY = {
    f"transformers.models.{name.lower()}.modeling_{name.lower()}.{name}ForCausalLM"
    for name in ("Llama", "Qwen2", "Qwen3", "Mistral")
}


def has_llama_layers(model: nn.Module) -> bool:
    """Whether `run_layers` computes what this model's forward computes: one of these very classes (no subclass), full
    attention in every layer, rotations that depend on the position alone, all weights on one device."""
    if f"{type(model).__module__}.{type(model).__qualname__}" not in LLAMA_FAMILY or hasattr(
        model, "_hf_hook"
    ):
        return False
    kinds = getattr(model.config, "layer_types", None)
    full = (
        set(kinds) == {"full_attention"}
        if kinds
        else getattr(model.config, "sliding_window", None) is None
    )
    plain_rope = getattr(model.model.rotary_emb, "rope_type", None) in (
        "default",
        "linear",
        "llama3",
        "yarn",
    )
    return full and plain_rope and len({p.device for p in model.parameters()}) == 1


def rms_norm(norm: nn.Module, x: Tensor) -> Tensor:
    return F.rms_norm(
        x, norm.weight.shape, norm.weight, norm.variance_epsilon
    )  # on a GPU one kernel instead of six


def fused(function):
    """The function, but for one token a row on a GPU as few kernels (torch.compile): each small kernel takes some 2
    microseconds, however little it does. Where that cannot be had, for want of a C compiler say, it runs as written.
    The first argument is (B, S, ...); weights come detached, or each change of requires_grad would compile it again."""

    @functools.cache
    def compiled():
        torch._dynamo.config.suppress_errors, torch._dynamo.config.recompile_limit = True, 64
        try:
            return torch.compile(function)
        except RuntimeError:  # this Python is too new for this torch
            return function

    @functools.wraps(function)
    def run(x: Tensor, *others):
        return (compiled() if x.is_cuda and x.shape[1] == 1 else function)(x, *others)

    return run


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding: the halves (a, b) of each head become (a cos - b sin, b cos + a sin). x (B, S, heads,
    D); cos and sin (B, S, 1, D), sin negative in its first half."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


@fused
def rotate_and_store(q, k, v, cos, sin, keys, values, at, position) -> Tensor:
    """Queries, keys and values of one token a row, (B, 1, heads, D): keys and values go to `position` (B,) of slots
    `at` (B,) of a layer's cache, keys rotated; returns the rotated queries."""
    keys[at, :, position] = rotate(k, cos, sin)[:, 0]
    values[at, :, position] = v[:, 0]
    return rotate(q, cos, sin)


@fused
def add_and_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y, and its RMS norm."""
    x = x + y
    return x, F.rms_norm(x, weight.shape, weight, eps)


def join_projections(model: nn.Module, into: list | None = None) -> list | None:
    """Query, key and value matrices of each layer as one, (weight, bias or None): at 8 rows the product of the few keys
    takes as long as that of the queries, and one does for all three. None if one is no plain Linear (an adapter). into:
    what an earlier call returned, to write to."""

    def join(kind: str, parts: list[nn.Module], out: Tensor | None) -> Tensor | None:
        tensors = [getattr(part, kind) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors, out=out)

    layers = [
        [getattr(layer.self_attn, f"{name}_proj") for name in "qkv"] for layer in model.model.layers
    ]
    if {type(part) for parts in layers for part in parts} != {nn.Linear}:
        return None
    return [
        (join("weight", parts, weight), join("bias", parts, bias))
        for parts, (weight, bias) in zip(layers, into or [(None, None)] * len(layers))
    ]


def run_layers(model: nn.Module, ids: Tensor, joined: list | None, attend) -> Tensor | None:
    """ids (B, S) -> last hidden state (B, S, H), after the last norm. joined: see join_projections; None: not joined.
    attend(layer, q (B, S, heads, D), k and v (B, S, kv heads, D), scale) -> (B, S, heads, D), or None to stop there;
    the rotation is its part."""
    base = model.model
    x = base.embed_tokens(ids)  # (B, S, H)
    h = rms_norm(base.layers[0].input_layernorm, x)
    norms = [layer.input_layernorm for layer in base.layers][1:] + [
        base.norm
    ]  # what comes after each layer
    for i, (layer, norm) in enumerate(zip(base.layers, norms)):
        attn, after = layer.self_attn, layer.post_attention_layernorm
        parts = attn.q_proj, attn.k_proj, attn.v_proj
        qkv = (
            F.linear(h, *joined[i]).split([p.out_features for p in parts], -1)
            if joined
            else [p(h) for p in parts]
        )
        q, k, v = (t.unflatten(-1, (-1, attn.head_dim)) for t in qkv)
        if "q_norm" in attn._modules:  # Qwen3
            q, k = rms_norm(attn.q_norm, q), rms_norm(attn.k_norm, k)
        out = attend(i, q, k, v, attn.scaling)
        if out is None:
            return None
        x, h = add_and_norm(
            x, attn.o_proj(out.flatten(2)), after.weight.detach(), after.variance_epsilon
        )
        x, h = add_and_norm(x, layer.mlp(h), norm.weight.detach(), norm.variance_epsilon)
    return h


# ---- 2. Prefill -----------------------------------------------------------------------------------------------------


def prefill(
    model: nn.Module, slots: "Slots", prompts: list[tuple[int, ...]], targets: list[list[int]]
) -> None:
    """Writes the keys and values of each prompt, but for its last token, which the first decode step feeds, into all of
    its target slots: one forward for all samples of a prompt. Padding is on the right, where a causal model never
    looks, so no mask is needed. The last layer stops at its keys and values."""
    left = sorted(range(len(prompts)), key=lambda j: -len(prompts[j]))
    while left and (width := len(prompts[left[0]]) - 1):  # of the longest of them
        count = max(1, PREFILL_TOKENS // width)
        chunk, left = left[:count], left[count:]
        ids = torch.tensor(
            [prompts[j][:-1] + (0,) * (width + 1 - len(prompts[j])) for j in chunk],
            device=slots.device,
        )
        to = torch.tensor([slot for j in chunk for slot in targets[j]], device=slots.device)
        source = torch.tensor(
            [c for c, j in enumerate(chunk) for _ in targets[j]], device=slots.device
        )

        def attend(i, q, k, v, scale):
            q, k = (rotate(t, slots.cos[None, :width], slots.sin[None, :width]) for t in (q, k))
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (prompts, heads, S, D)
            slots.keys[i][:, :, :width].index_copy_(0, to, k.index_select(0, source))
            slots.values[i][:, :, :width].index_copy_(0, to, v.index_select(0, source))
            if i == len(slots.keys) - 1:
                return None
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=True
            ).transpose(1, 2)

        run_layers(model, ids, slots.joined, attend)


# ---- 3. Decode ------------------------------------------------------------------------------------------------------


def attend_masked(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """q (B, 1, heads, D), keys and values (B, kv heads, L, D), mask (B, 1, 1, L) to be added -> (B, 1, heads, D).
    The heads that share keys stand as so many queries, so keys and values are not expanded. Two matrix products are
    faster here than PyTorch's attention, which is made for long queries."""
    grouped = (scale * q).view(len(q), keys.shape[1], -1, q.shape[3])  # (B, kv heads, group, D)
    scores = grouped @ keys.mT + mask  # (B, kv heads, group, L)
    return (scores.softmax(-1) @ values).view(q.shape)


def attend_flash(q: Tensor, keys: Tensor, values: Tensor, valid: tuple, scale: float) -> Tensor:
    """The same by the FlashAttention that PyTorch ships. valid: each row's number of valid positions (B,), which lies
    on the device and bounds what is read; 0, 1 … B; and 0, L … B L (B + 1,), all int32. L is the whole cache's."""
    used, starts, starts_in_cache = valid
    keys, values = (
        t.transpose(1, 2).flatten(0, 1) for t in (keys, values)
    )  # (B * L, kv heads, D), no copy
    return torch.ops.aten._flash_attention_forward(
        q[:, 0],
        keys,
        values,
        starts,
        starts_in_cache,
        1,
        len(keys) // len(q),
        0.0,
        False,
        False,
        scale=scale,
        seqused_k=used,
    )[0][:, None]


def flash_takes(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernel can be asked: half precision, Ampere or newer, heads of 8, 16, ... 256."""
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and head_dim in range(8, 257, 8)
        and torch.cuda.get_device_capability(device)[0] >= 8
    )


def decode(model: nn.Module, slots: "Slots", rule: Rule, rows: int) -> None:
    """One token more in each of the first `rows` slots that is alive; everything happens on the device and in place.
    Rows that have finished are computed with the others but do not advance."""
    at, length, stop = slots.index[:rows], slots.length[:rows], slots.stop[:rows]
    position = length - 1  # of the last token, which has no keys and values yet
    if slots.flash:
        starts = torch.arange(rows + 1, device=slots.device, dtype=torch.int32)
        attention, valid = attend_flash, (length.int(), starts, starts * slots.capacity)
    else:
        beyond = slots.positions[: slots.capacity] >= length[:, None]  # (B, L)
        attention = attend_masked
        valid = torch.zeros_like(beyond, dtype=slots.dtype).masked_fill_(beyond, -torch.inf)[
            :, None, None
        ]

    def attend(i, q, k, v, scale):
        q = rotate_and_store(q, k, v, cos, sin, slots.keys[i], slots.values[i], at, position)
        return attention(q, slots.keys[i][:rows], slots.values[i][:rows], valid, scale)

    cos, sin = slots.cos[position, None], slots.sin[position, None]
    hidden = run_layers(model, slots.ids[at, position, None], slots.joined, attend)
    ids, logprobs, entropies = rule.draw(
        mm_wide(hidden[:, 0], model.lm_head.weight.T), slots.uniforms[at, length]
    )
    slots.ids[at, length] = ids  # a finished row writes behind its end, where nobody reads
    slots.logprobs[at, length], slots.entropies[at, length] = logprobs, entropies
    length += length < stop
    stop.copy_(torch.where(slots.is_end[ids], length, stop))


# ---- 4. Slots -------------------------------------------------------------------------------------------------------


class Slots:
    """Row i's tokens, keys and values lie in slot i of each tensor, from position 0 on. Live rows are contiguous from
    slot 0, so a step works on `tensor[:rows]`: nothing is concatenated, no finished row computed."""

    def __init__(
        self,
        model: nn.Module,
        is_end: Tensor,
        slots: int,
        capacity: int,
        longest: int,
        join: bool = False,
    ):
        """capacity: tokens of a row that the cache has room for at first; longest: the most that a row can come to;
        join: run joined projections, made here and in need of `join_projections(model, self.joined)` at each update."""
        self.model, self.is_end, self.device, self.longest = model, is_end, is_end.device, longest
        self.joined = join_projections(model) if join else None
        self.dtype = model.model.embed_tokens.weight.dtype
        self.flash = flash_takes(self.device, self.dtype, model.model.layers[0].self_attn.head_dim)
        self.rows: list[Row] = []  # the live ones; rows[i] is in slot i
        self.lengths: list[int] = []  # theirs, as the host last saw them
        self.index = torch.arange(slots, device=self.device)
        self.length = torch.ones_like(self.index)
        self.stop = torch.zeros_like(
            self.index
        )  # the length that ends a row: it is alive while below
        self.ids = torch.zeros(slots, longest + 1, dtype=torch.int64, device=self.device)
        self.logprobs, self.entropies = torch.zeros(2, slots, longest + 1, device=self.device)
        # What depends on a position alone is computed once, not at every step: rotations, and the rows' random numbers.
        self.positions = torch.arange(longest + 1, device=self.device)
        self.uniforms = torch.zeros(slots, longest + 1, dtype=torch.float64, device=self.device)
        base = model.model
        self.cos, self.sin = (
            t[0, :, None] for t in base.rotary_emb(base.embed_tokens.weight, self.positions[None])
        )
        self.sin[..., : self.sin.shape[-1] // 2].neg_()  # as `rotate` takes it
        self.keys, self.values = [None] * len(base.layers), [None] * len(base.layers)
        self.reserve(slots, capacity)

    def reserve(self, slots: int, capacity: int) -> None:
        """Moves the cache to new memory for `slots` rows of `capacity` tokens, one layer after the other: (slots, kv
        heads, capacity, D), zeros because NaN survives a mask. In memory a position's heads lie together on a GPU, as
        the flash kernel needs them, and a head's positions lie together on a CPU."""
        used, capacity, gpu = (
            min(slots, len(self.rows)),
            min(capacity, self.longest),
            self.device.type == "cuda",
        )
        attn = self.model.model.layers[0].self_attn
        heads = attn.config.num_key_value_heads
        shape = (
            (slots, capacity, heads, attn.head_dim)
            if gpu
            else (slots, heads, capacity, attn.head_dim)
        )
        for i in range(len(self.keys)):
            for cache in (self.keys, self.values):
                new = torch.zeros(shape, dtype=self.dtype, device=self.device).transpose(
                    1, 2 if gpu else 1
                )
                if used:
                    new[:used, :, : self.capacity] = cache[i][:used]
                cache[i] = new
        self.capacity = capacity

    def make_room(self, slots: int) -> None:
        """Grows in steps when the longest row needs it, and keeps only that many slots then. Small steps: each decode
        step reads the whole cache as one stream, which gaps behind the rows would slow down."""
        if (reach := max(self.lengths)) > self.capacity:
            self.reserve(slots, reach + max(GROWTH, reach // 8))

    def admit(self, rows: list[Row]) -> None:
        """Puts rows into free slots. A prompt that a live row holds is copied from it, any other is prefilled once."""
        first = len(self.rows)
        holder = {row.prompt: slot for slot, row in enumerate(self.rows)}
        copies = [
            (holder[row.prompt], slot)
            for slot, row in enumerate(rows, first)
            if row.prompt in holder
        ]
        fresh = {row.prompt: [] for row in rows if row.prompt not in holder}
        for slot, row in enumerate(rows, first):
            fresh.get(row.prompt, []).append(slot)
        prefill(self.model, self, list(fresh), list(fresh.values()))
        self._copy(copies, max(len(row.prompt) for row in rows))
        here, lengths = slice(first, first + len(rows)), [len(row.prompt) for row in rows]
        state = [(n, n + row.limit, row.prompt[-1], row.seed) for n, row in zip(lengths, rows)]
        self.length[here], self.stop[here], last, seeds = torch.tensor(state).T.to(self.device)
        self.ids[self.index[here], self.length[here] - 1] = last  # what the first step feeds
        self.uniforms[here] = uniform(seeds[:, None], self.positions)
        self.rows += rows
        self.lengths += lengths

    def _copy(self, moves: list[tuple[int, int]], reach: int) -> None:
        """Copies rows from slot to slot, their first `reach` keys and values and all else."""
        if moves:
            source, to = torch.tensor(moves, device=self.device).T
            of_rows = self.length, self.stop, self.uniforms, self.ids, self.logprobs, self.entropies
            for tensor in (
                *of_rows,
                *(cache[:, :, :reach] for cache in (*self.keys, *self.values)),
            ):
                tensor.index_copy_(0, to, tensor.index_select(0, source))

    def drop_finished(self) -> None:
        """Reads the finished rows out and moves rows from the tail into their holes."""
        count = len(self.rows)
        stop, self.lengths = torch.stack((self.stop[:count], self.length[:count])).tolist()
        done = [slot for slot in range(count) if self.lengths[slot] >= stop[slot]]
        if not done:
            return
        at, reach = torch.tensor(done, device=self.device), max(self.lengths[slot] for slot in done)
        told = (t[at, :reach].tolist() for t in (self.ids, self.logprobs, self.entropies))
        for slot, *of_row in zip(done, *told):
            row, own = self.rows[slot], slice(len(self.rows[slot].prompt), self.lengths[slot])
            row.sample.ids, row.sample.logprobs, row.sample.entropies = (t[own] for t in of_row)
        left = count - len(done)
        moves = list(
            zip([slot for slot in range(left, count) if slot not in done], done)
        )  # into the first of them
        self._copy(moves, max(self.lengths))
        for source, to in moves:
            self.rows[to], self.lengths[to] = self.rows[source], self.lengths[source]
        del self.rows[left:], self.lengths[left:]
        self.stop[left:count] = 0


# ---- 5. Graphs ------------------------------------------------------------------------------------------------------


def record(model: nn.Module, slots: Slots, rule: Rule) -> dict:
    """The decode step as CUDA graphs, one per number of rows in BUCKETS, in one memory pool: the largest first, so that
    the others fit into what it left. A replay is one launch instead of some thousand. Made while no row is alive, so
    that the dry runs change nothing. On a CPU the steps are called as they are, which is how tests get here."""
    most = len(slots.index)
    buckets = sorted(
        {min(most, bucket) for bucket in (*BUCKETS, *range(384, most, 128), most)}, reverse=True
    )
    steps = {rows: partial(decode, model, slots, rule, rows) for rows in buckets}
    if slots.device.type == "cuda":
        # A stream of their own: where graphs are destroyed, torch >= 2.12 frees the cuBLAS workspaces of the stream
        # they were recorded on, also those that another sampler's graphs still use.
        place = dict(pool=torch.cuda.graph_pool_handle(), stream=torch.cuda.Stream())
        for rows, step in steps.items():
            step()  # libraries allocate at their first call
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                graph, capture_error_mode="thread_local", **place
            ):  # NCCL has its own thread
                step()
            steps[rows] = graph.replay
    return steps


def tokens_that_fit(model: nn.Module, wanted: int) -> int:
    """For how many tokens' keys and values four fifths of the free GPU memory have room; activations get the rest."""
    if model.device.type != "cuda":
        return wanted
    attn = model.model.layers[0].self_attn
    per_token = (
        2
        * len(model.model.layers)
        * attn.config.num_key_value_heads
        * attn.head_dim
        * model.dtype.itemsize
    )
    free = (
        torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    )
    return int(0.8 * free) // per_token


# ---- Any other model: its own forward and cache ---------------------------------------------------------------------


def sample_by_forward(model: nn.Module, rows: list[Row], rule: Rule, end_ids: set[int]) -> None:
    """Fills the rows through the model's own forward, called as generate() calls it: prompts padded on the left, and
    the cache that the model makes for itself. Each prompt is run once, and finished rows leave the cache. A model
    without a transformers cache is run over the whole sequences at every token."""
    device, live = model.device, list(rows)
    place = {prompt: i for i, prompt in enumerate(dict.fromkeys(row.prompt for row in rows))}
    width = max(map(len, place))
    ids = torch.tensor([(0,) * (width - len(p)) + p for p in place], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in place], device=device)
    held = [place[row.prompt] for row in rows]  # where in the cache each live row's keys are
    logits, cache = _forward(model, ids, mask, None)
    while live:
        logits = logits[held] if cache is not None else _recompute(model, live)
        state = torch.tensor(
            [(row.seed, len(row.prompt) + len(row.sample.ids)) for row in live], device=device
        )
        ids, logprobs, entropies = rule.draw(logits, uniform(*state.T))
        for row, id_, logprob, entropy in zip(
            live, ids.tolist(), logprobs.tolist(), entropies.tolist()
        ):
            row.sample.ids.append(id_)
            row.sample.logprobs.append(logprob)
            row.sample.entropies.append(entropy)
        going = [
            i
            for i, r in enumerate(live)
            if len(r.sample.ids) < r.limit and r.sample.ids[-1] not in end_ids
        ]
        live, held = [live[i] for i in going], [held[i] for i in going]
        if live and cache is not None:
            if held != list(range(len(mask))):
                cache.reorder_cache(torch.tensor(held, device=device))
            mask = torch.cat((mask[held], torch.ones_like(mask[held, :1])), 1)
            logits, cache = _forward(model, ids[going, None], mask, cache)
            held = list(range(len(live)))


def _forward(model: nn.Module, ids: Tensor, mask: Tensor, cache) -> tuple[Tensor | None, object]:
    """ids (B, S), mask (B, all so far) -> logits of the last position (B, V) and the cache; None, None without one."""
    takes = inspect.signature(model.forward).parameters
    if (
        not {"past_key_values", "position_ids"} <= takes.keys()
    ):  # it may count positions from the padding on
        return None, None
    more = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    more["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    out = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **more)
    cache = getattr(out, "past_key_values", None)
    return (out.logits[:, -1], cache) if hasattr(cache, "reorder_cache") else (None, None)


def _recompute(model: nn.Module, rows: list[Row]) -> Tensor:
    """Logits of each row's next token (B, V), from the whole sequences, padded on the right."""
    sequences = [row.prompt + tuple(row.sample.ids) for row in rows]
    width = max(map(len, sequences))
    ids = torch.tensor([s + (0,) * (width - len(s)) for s in sequences], device=model.device)
    return model(input_ids=ids).logits[range(len(rows)), [len(s) - 1 for s in sequences]]


# ---- The sampler ----------------------------------------------------------------------------------------------------


class Sampler:
    """Draws samples from a causal language model of transformers, with the weights that it has at that moment.

    end_ids: any of them ends a sample. vocab_size: ids from there on (padding of the embedding) are outside the
    distribution. max_rows: most rows in the cache at a time (default: as many as are asked for, on a GPU as fit); more
    rows than that wait in a queue for a free slot. Raises ValueError if an end id can never be drawn."""

    def __init__(
        self,
        model: nn.Module,
        end_ids: set[int],
        vocab_size: int | None = None,
        max_rows: int | None = None,
    ):
        self.model, self.end_ids, self.max_rows = model, set(end_ids), max_rows
        self.embeddings = model.get_input_embeddings().weight.shape[0]
        self.vocab_size = min(vocab_size or self.embeddings, self.embeddings)
        if strange := sorted(i for i in self.end_ids if not 0 <= i < self.vocab_size):
            raise ValueError(
                f"end ids {strange} are outside the {self.vocab_size} ids that can be drawn"
            )
        self.is_end = torch.zeros(self.embeddings, dtype=torch.bool, device=model.device)
        self.is_end[list(self.end_ids)] = True
        self.knobs = torch.ones(2, device=model.device)
        self.last_slots: int | None = None  # of the last cache with fixed addresses
        self.fixed = (
            model.device.type == "cuda"
        )  # fixed addresses and graphs; tests set it on a CPU too
        self.release()

    def sample(
        self,
        prompts: list[list[int]],
        n: int,
        max_new_tokens: int | list[int],
        temperature: float,
        seed: int | list[int],
        top_p: float = 1.0,
    ) -> list[list[Sample]]:
        """n samples per prompt, as a list per prompt.

        max_new_tokens: one limit, or one per row, prompt-major; 0 gives an empty sample. temperature: 0 is greedy, with
        log-probabilities of 0.0, those of the point mass that was drawn from; otherwise they belong to softmax(logits /
        temperature), with top_p < 1 cut to the fewest most likely tokens that hold top_p, and renormalised. seed: an
        int, which with a prompt's ids and the number of rows that had them before makes a row's stream; or one stream
        per row. A stream's number for a token depends on the position in the whole sequence: a row cut anywhere and
        continued with its own stream goes on as it did. Raises ValueError for arguments or logits of no sense."""
        if not (n >= 1 and temperature >= 0 and 0 < top_p <= 1):
            raise ValueError(
                "n must be at least 1, temperature at least 0 and top_p in (0, 1]; "
                f"got {n}, {temperature}, {top_p}"
            )
        rows = self._rows(prompts, n, max_new_tokens, seed)
        waiting = deque(row for row in rows if row.limit > 0)
        self.knobs.copy_(torch.tensor([1 / temperature if temperature else 1.0, top_p]))
        rule = Rule(temperature == 0, 0 < temperature and top_p < 1, self.knobs, self.vocab_size)
        fast = has_llama_layers(
            self.model
        )  # any other forward may keep tensors that training needs
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()  # dropout off
        try:
            with torch.inference_mode() if fast else torch.no_grad():
                if fast and waiting:
                    self._sample_in_slots(waiting, rule)
                while waiting:
                    wave = [
                        waiting.popleft()
                        for _ in range(min(self.max_rows or len(rows), len(waiting)))
                    ]
                    sample_by_forward(self.model, wave, rule, self.end_ids)
            if any(math.isnan(logprob) for row in rows for logprob in row.sample.logprobs):
                raise ValueError(
                    "the model's logits are not finite: nothing to sample from; check its weights"
                )
        except (
            BaseException
        ):  # the next call must find neither these rows nor their cache, with NaN or the like
            self.release()
            raise
        finally:
            for module in training:  # every module's mode as it was
                module.training = True
        for sample in (row.sample for row in rows):
            sample.finished = bool(sample.ids) and sample.ids[-1] in self.end_ids
        return [[row.sample for row in rows[i : i + n]] for i in range(0, len(rows), n)]

    def _rows(self, prompts, n: int, limits, seeds) -> list[Row]:
        count = len(prompts) * n
        for i, prompt in enumerate(prompts):
            if not prompt or not 0 <= min(prompt) <= max(prompt) < self.embeddings:
                what = f"has an id outside 0 to {self.embeddings - 1}" if prompt else "is empty"
                raise ValueError(f"prompt {i} {what}")
        limits = [limits] * count if isinstance(limits, int) else limits
        for name, value in (("max_new_tokens", limits), ("seed", seeds)):
            if not isinstance(value, int) and len(value) != count:
                raise ValueError(
                    f"{name} has {len(value)} entries for {len(prompts)} prompts x {n} samples"
                )
        if min(limits, default=0) < 0:
            raise ValueError(f"max_new_tokens must not be negative; got {min(limits)}")
        rows, seen = [], Counter()
        for i, prompt in enumerate(tuple(prompt) for prompt in prompts for _ in range(n)):
            # From one seed: 64 bits of it, of the prompt and of how many rows had that prompt before.
            key = repr((seeds, prompt, seen[prompt])).encode() if isinstance(seeds, int) else b""
            seed = (
                int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
                if key
                else seeds[i]
            )
            rows.append(Row(prompt, limits[i], (seed + 2**63) % 2**64 - 2**63))  # as an int64
            seen[prompt] += 1
        return rows

    def _sample_in_slots(self, waiting: deque[Row], rule: Rule) -> None:
        """Draws the waiting rows, each in a slot of its own as soon as one is free."""
        slots = self._open(waiting, rule)
        most = min(len(slots.index), self.max_rows or len(slots.index))
        while waiting or slots.rows:
            free = most - len(slots.rows)
            if waiting and free >= min(
                len(waiting), max(1, most // 8)
            ):  # an eighth at a time: larger prefills
                slots.admit([waiting.popleft() for _ in range(min(free, len(waiting)))])
            if self.fixed:
                steps, live = self.graphs[rule.greedy, rule.nucleus], len(slots.rows)
                left = max(
                    len(row.prompt) + row.limit - length
                    for row, length in zip(slots.rows, slots.lengths)
                )
                for _ in range(min(STEPS_PER_LOOK, left)):
                    steps[min(bucket for bucket in steps if bucket >= live)]()
            else:
                slots.make_room(most if waiting else len(slots.rows))
                decode(self.model, slots, rule, len(slots.rows))
            slots.drop_finished()

    def _open(self, waiting: deque[Row], rule: Rule) -> Slots:
        """On a CPU a cache of the prompts' length that grows. On a GPU addresses must not change, so it has its full
        length from the start and as many slots as fit, and serves later calls as long as it is large enough and the
        weights lie where they lay (an update in place leaves the graphs valid). It only grows."""
        wanted = min(len(waiting), self.max_rows or len(waiting))
        needed = max(len(row.prompt) + row.limit for row in waiting)
        if not self.fixed:
            return Slots(
                self.model,
                self.is_end,
                wanted,
                max(len(row.prompt) for row in waiting) + GROWTH,
                needed,
            )
        weights = [p.data_ptr() for p in self.model.parameters()]
        if (
            self.slots is None
            or self.weights != weights
            or self.slots.capacity < needed
            or self.most < wanted
        ):
            if self.slots is not None:
                needed = max(needed, self.slots.capacity)
                wanted = max(wanted, min(len(self.slots.index), self.max_rows or math.inf))
            self.release()
            needed = -(-needed // 128) * 128
            room = tokens_that_fit(self.model, wanted * needed)
            capacity = max(needed, min(CAPACITY, room // wanted // 128 * 128))
            self.last_slots = max(1, min(wanted, room // capacity))
            self.weights, self.most = (
                weights,
                wanted if self.last_slots == wanted else math.inf,
            )  # no more fit
            self.slots = Slots(self.model, self.is_end, self.last_slots, capacity, capacity, True)
        elif self.slots.joined:
            join_projections(self.model, self.slots.joined)
        if (rule.greedy, rule.nucleus) not in self.graphs:
            self.graphs[rule.greedy, rule.nucleus] = record(self.model, self.slots, rule)
        return self.slots

    def release(self) -> None:
        """Gives the cache and the graphs back, on a GPU to the device. The next call makes them anew."""
        self.slots, self.graphs = None, {}  # graphs by rule: greedy or not, nucleus or not
        if self.model.device.type == "cuda":
            gc.collect()  # the traceback of a failed call may have held them
            torch.cuda.empty_cache()
