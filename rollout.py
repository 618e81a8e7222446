"""Batched sampling with a KV cache: token ids in, sampled token ids out. Nothing here knows of text or rewards.

Sampling is most of a GRPO step, so this replaces `model.generate()`; nothing in the paper depends on how it is done.
It is exact: a row's tokens depend on the weights, its prompt, its seed and its limit, not on which rows share the batch
(up to the rounding of matrix products, whose last bit may change with the number of rows). In five parts: sampling
(logits -> one token a row), prefill (the keys and values of a prompt), decode (one token more for every live row),
slots (where rows lie, come and go) and graphs (the decode step, recorded on a GPU).

The layers of the Llama family (Llama, Qwen2, Qwen3, Mistral) are run straight from the model's own modules: an
optimizer step is seen at once and no weight is copied. Every other causal language model of transformers goes through
its own forward (`sample_by_forward`): same distribution, same random streams, less speed.

A factor such as (x 1.2 / 1.3) is what a trick brings to a model of 1M / 30M parameters on a CPU, by the ablations of
tests/bench_rollout.py. Not worth keeping there: fewer rows at a time so that their cache fits the processor's, keys
and values side by side in one tensor. The CUDA path has not been measured.
"""
import hashlib
import inspect
import math
from collections import Counter, deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256)    # rows that a CUDA graph is recorded for
STEPS_PER_LOOK = 16       # on a GPU the host looks for finished rows this often, so that no token waits for it
PREFILL_TOKENS = 8192     # most prompt tokens in one forward, padding included
GROWTH = 16               # on a CPU the cache gets this many positions more at a time, or an eighth if that is more


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
    """One sample to be drawn. Rows with the same prompt_index have the same prompt and share its prefill."""
    prompt: tuple[int, ...]
    prompt_index: int
    limit: int
    seed: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)


# ---- 1. Sampling ----------------------------------------------------------------------------------------------------

def _int64(n: int) -> int:
    return (n + 2**63) % 2**64 - 2**63


def _splitmix64(x: Tensor) -> Tensor:
    """The finalizer of splitmix64 (Steele et al. 2014) on int64, where products wrap and shifts need a mask."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _int64(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _int64(0x94D049BB133111EB)
    return x ^ ((x >> 31) & (2**33 - 1))


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """seeds (B,), positions (B,) int64 -> (B,) float64 in [0, 1), 53 bits. A hash and not a generator: no state, equal
    on CPU and GPU, and a position's number does not depend on what was drawn before it or beside it."""
    bits = _splitmix64(_splitmix64(seeds) + positions * _int64(0x9E3779B97F4A7C15))
    return ((bits >> 11) & (2**53 - 1)).double() * 2.0**-53


def _pick(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse CDF. weights (B, K) float64 >= 0, u (B,) -> index (B,), and what is left of u within it, in [0, 1).
    Only an index of positive weight is ever picked, also where a parallel cumulative sum is not quite monotone."""
    cdf = weights.cumsum(-1).masked_fill(weights <= 0, -1.0)
    target = u * cdf.amax(-1)                                                   # below the largest, because u < 1
    index = (cdf > target[:, None]).to(torch.uint8).argmax(-1, keepdim=True)    # the first one above the target
    left = 1 - (cdf.gather(-1, index)[:, 0] - target) / weights.gather(-1, index)[:, 0]
    return index[:, 0], left.clamp(0, 1 - 2.0**-53)


def _invert(p: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """p (B, V) float32 >= 0, u (B,) -> ids (B,), logprobs (B,) of p normalised. One uniform a row instead of one a
    token (x 1.1 / 1.2), and a cumulative sum over blocks and then within one, not over the vocabulary (x 1.0 / 1.0, but
    with 152k ids this function alone takes a fiftieth of the time)."""
    width = 128
    if p.shape[1] % width:
        p = F.pad(p, (0, -p.shape[1] % width))
    blocks = p.unflatten(-1, (-1, width))                                       # (B, V/128, 128)
    sums = blocks.sum(-1).double()                                              # (B, V/128)
    block, left = _pick(sums, u)
    inside = blocks[torch.arange(len(p), device=p.device), block].double()      # (B, 128)
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
        logits[:, self.vocab_size:] = -torch.inf             # rows of the embedding that belong to no token
        if self.greedy:
            best, ids = logits.max(-1)
            return ids, best - best, best - best             # 0, a point mass; NaN if the logits are not finite
        logp = torch.log_softmax(logits.mul_(self.knobs[0]), -1)
        p = logp.exp()
        entropies = -torch.linalg.vecdot(p[:, :self.vocab_size], logp[:, :self.vocab_size])
        return *_invert(self._cut(p) if self.nucleus else p, u), entropies

    def _cut(self, p: Tensor) -> Tensor:
        """p (B, V) with 0 for all but the fewest most likely tokens that hold top_p."""
        sorted_p, order = torch.sort(p, dim=-1, descending=True, stable=True)
        outside = sorted_p.cumsum(-1) - sorted_p >= self.knobs[1]        # those before it already hold top_p
        outside[:, 0] = False
        return p.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), 0.0)


# ---- The layers of the Llama family, shared by prefill and decode ---------------------------------------------------

LLAMA_FAMILY = {f"transformers.models.{name.lower()}.modeling_{name.lower()}.{name}ForCausalLM"
                for name in ("Llama", "Qwen2", "Qwen3", "Mistral")}


def has_llama_layers(model: nn.Module) -> bool:
    """Whether `run_layers` computes what this model's forward computes: one of these very classes (no subclass), full
    attention in every layer, rotations that depend on the position alone, all weights on one device."""
    if f"{type(model).__module__}.{type(model).__qualname__}" not in LLAMA_FAMILY or hasattr(model, "_hf_hook"):
        return False
    kinds = getattr(model.config, "layer_types", None)
    full = set(kinds) == {"full_attention"} if kinds else getattr(model.config, "sliding_window", None) is None
    plain_rope = getattr(model.model.rotary_emb, "rope_type", None) in ("default", "linear", "llama3", "yarn")
    return full and plain_rope and len({p.device for p in model.parameters()}) == 1


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)    # on a GPU one kernel instead of six


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding. x (B, S, heads, D); cos, sin (B, S, 1, D)."""
    a, b = x.chunk(2, -1)
    return torch.addcmul(x * cos, torch.cat((-b, a), -1), sin)


def run_layers(model: nn.Module, ids: Tensor, cos: Tensor, sin: Tensor, attend) -> Tensor | None:
    """ids (B, S), cos and sin of their positions (B or 1, S, 1, D) -> last hidden state (B, S, H), after the last norm.
    attend(layer, q (B, S, heads, D), k and v (B, S, kv heads, D), scale) -> (B, S, heads, D), or None to stop there."""
    base = model.model
    x = base.embed_tokens(ids)                                                # (B, S, H)
    for i, layer in enumerate(base.layers):
        attn = layer.self_attn
        h = _norm(layer.input_layernorm, x)
        q, k, v = (proj(h).view(*ids.shape, -1, attn.head_dim) for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
        if "q_norm" in attn._modules:                                         # Qwen3
            q, k = _norm(attn.q_norm, q), _norm(attn.k_norm, k)
        q, k = _rotate(torch.cat((q, k), 2), cos, sin).split((q.shape[2], k.shape[2]), 2)
        out = attend(i, q, k, v, attn.scaling)
        if out is None:
            return None
        x = x + attn.o_proj(out.flatten(2))
        x = x + layer.mlp(_norm(layer.post_attention_layernorm, x))
    return _norm(base.norm, x)


# ---- 2. Prefill -----------------------------------------------------------------------------------------------------

def prefill(model: nn.Module, slots: "Slots", prompts: list[tuple[int, ...]], targets: list[list[int]]) -> None:
    """Writes the keys and values of each prompt, but for its last token, which the first decode step feeds, into all of
    its target slots: one forward for all samples of a prompt (x 1.3 / 1.3). Padding is on the right, where a causal
    model never looks, so no mask is needed. The last layer stops at its keys and values."""
    longest_first = sorted(range(len(prompts)), key=lambda j: -len(prompts[j]))
    while longest_first:
        width = len(prompts[longest_first[0]]) - 1
        count = max(1, PREFILL_TOKENS // max(1, width))
        chunk, longest_first = longest_first[:count], longest_first[count:]
        if width == 0:
            return
        ids = torch.tensor([prompts[j][:-1] + (0,) * (width + 1 - len(prompts[j])) for j in chunk], device=slots.device)
        to = torch.tensor([slot for j in chunk for slot in targets[j]], device=slots.device)
        source = torch.tensor([c for c, j in enumerate(chunk) for _ in targets[j]], device=slots.device)

        def attend(i, q, k, v, scale):
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))                  # (prompts, heads, S, D)
            slots.keys[i][:, :, :width].index_copy_(0, to, k.index_select(0, source))
            slots.values[i][:, :, :width].index_copy_(0, to, v.index_select(0, source))
            if i == len(slots.keys) - 1:
                return None
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)

        run_layers(model, ids, slots.cos[None, :width], slots.sin[None, :width], attend)


# ---- 3. Decode ------------------------------------------------------------------------------------------------------

def attend_masked(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """q (B, 1, heads, D), keys and values (B, kv heads, L, D), mask (B, 1, 1, L) to be added -> (B, 1, heads, D).
    The heads that share keys stand as so many queries, so keys and values are not expanded (x 1.5 / 1.7). Two matrix
    products are faster here than PyTorch's attention, which is made for long queries (x 1.2 / 1.0)."""
    grouped = (scale * q).view(len(q), keys.shape[1], -1, q.shape[3])         # (B, kv heads, group, D)
    scores = grouped @ keys.mT + mask                                         # (B, kv heads, group, L)
    return (scores.softmax(-1) @ values).view(q.shape)


def attend_flash(q: Tensor, keys: Tensor, values: Tensor, valid: tuple, scale: float) -> Tensor:
    """The same by the FlashAttention that PyTorch ships. valid: each row's number of valid positions (B,), which lies
    on the device and bounds what is read; 0, 1 … B; and 0, L … B L (B + 1,), all int32. L is that of the whole cache,
    whose address and size a graph may keep."""
    used, starts, starts_in_cache = valid
    keys, values = (t.transpose(1, 2).flatten(0, 1) for t in (keys, values))  # (B * L, kv heads, D), no copy
    return torch.ops.aten._flash_attention_forward(q[:, 0], keys, values, starts, starts_in_cache, 1,
                                                   len(keys) // len(q), 0.0, False, False, scale=scale,
                                                   seqused_k=used)[0][:, None]


def flash_takes(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernel can be asked: half precision, Ampere or newer, heads of 8, 16, ... 256."""
    return (device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and head_dim in range(8, 257, 8)
            and torch.cuda.get_device_capability(device)[0] >= 8)


def decode(model: nn.Module, slots: "Slots", rule: Rule, rows: int) -> None:
    """One token more in each of the first `rows` slots that is alive; everything happens on the device and in place.
    Rows that have finished are computed with the others but do not advance."""
    at, length, alive = slots.index[:rows], slots.length[:rows], slots.alive[:rows]
    position = length - 1                            # of the last token, which has no keys and values yet
    if slots.flash:
        starts = torch.arange(rows + 1, device=slots.device, dtype=torch.int32)
        attention, valid = attend_flash, (length.int(), starts, starts * slots.capacity)
    else:
        beyond = slots.positions[:slots.capacity] >= length[:, None]          # (B, L)
        attention = attend_masked
        valid = torch.zeros_like(beyond, dtype=slots.dtype).masked_fill_(beyond, -torch.inf)[:, None, None]

    def attend(i, q, k, v, scale):
        slots.keys[i][at, :, position] = k[:, 0]
        slots.values[i][at, :, position] = v[:, 0]
        return attention(q, slots.keys[i][:rows], slots.values[i][:rows], valid, scale)

    hidden = run_layers(model, slots.token[:rows, None], slots.cos[position, None], slots.sin[position, None], attend)
    ids, logprobs, entropies = rule.draw(model.lm_head(hidden[:, 0]), slots.uniforms[at, length])
    slots.ids[at, length] = ids                      # a finished row writes behind its end, where nobody reads
    slots.logprobs[at, length], slots.entropies[at, length] = logprobs, entropies
    slots.token[:rows] = torch.where(alive, ids, slots.token[:rows])
    length += alive
    alive &= (length < slots.stop[:rows]) & ~slots.is_end[ids]


# ---- 4. Slots -------------------------------------------------------------------------------------------------------

class Slots:
    """Row i's tokens, keys and values lie in slot i of each tensor, from position 0 on. Live rows are contiguous from
    slot 0, so a step works on `tensor[:rows]`: nothing is concatenated (x 1.3 / 1.2), no finished row computed (x 2.4 /
    2.4)."""

    def __init__(self, model: nn.Module, is_end: Tensor, slots: int, capacity: int, longest: int):
        """capacity: tokens of a row that the cache has room for at first; longest: the most that a row can come to."""
        self.model, self.is_end, self.device, self.longest = model, is_end, is_end.device, longest
        self.dtype = model.model.embed_tokens.weight.dtype
        self.flash = flash_takes(self.device, self.dtype, model.model.layers[0].self_attn.head_dim)
        self.rows: list[Row] = []                                             # the live ones; rows[i] is in slot i
        self.lengths: list[int] = []                                          # theirs, as the host last saw them
        self.index = torch.arange(slots, device=self.device)
        self.token, self.stop = torch.zeros(2, slots, dtype=torch.int64, device=self.device)
        self.length = torch.ones_like(self.index)
        self.alive = torch.zeros(slots, dtype=torch.bool, device=self.device)
        self.ids = torch.zeros(slots, longest + 1, dtype=torch.int64, device=self.device)
        self.logprobs, self.entropies = torch.zeros(2, slots, longest + 1, device=self.device)
        # What depends on a position alone is computed once, not at every step: rotations, and the rows' random numbers.
        self.positions = torch.arange(longest + 1, device=self.device)
        self.uniforms = torch.zeros(slots, longest + 1, dtype=torch.float64, device=self.device)
        base = model.model
        self.cos, self.sin = (t[0, :, None] for t in base.rotary_emb(base.embed_tokens.weight, self.positions[None]))
        self.keys: list[Tensor] = [None] * len(base.layers)
        self.values: list[Tensor] = [None] * len(base.layers)
        self.reserve(slots, capacity)

    def reserve(self, slots: int, capacity: int) -> None:
        """Moves the cache to new memory for `slots` rows of `capacity` tokens, one layer after the other."""
        used, capacity = min(slots, len(self.rows)), min(capacity, self.longest)
        for i, layer in enumerate(self.model.model.layers):
            for cache in (self.keys, self.values):
                new = self._empty(slots, capacity, layer.self_attn)
                if used:
                    new[:used, :, :self.capacity] = cache[i][:used]
                cache[i] = new
        self.capacity = capacity

    def _empty(self, slots: int, capacity: int, attn: nn.Module) -> Tensor:
        """(slots, kv heads, capacity, D), zeros because NaN survives a mask. In memory a position's heads lie together
        on a GPU, as the flash kernel needs them, and a head's positions lie together on a CPU."""
        heads, like = attn.config.num_key_value_heads, dict(dtype=self.dtype, device=self.device)
        if self.device.type == "cuda":
            return torch.zeros(slots, capacity, heads, attn.head_dim, **like).transpose(1, 2)
        return torch.zeros(slots, heads, capacity, attn.head_dim, **like)

    def make_room(self, slots: int) -> None:
        """Grows in steps when the longest row needs it, and keeps only that many slots then. Small steps: each decode
        step reads the whole cache as one stream, which gaps behind the rows would slow down (x 1.1 / 1.0)."""
        if (reach := max(self.lengths)) > self.capacity:
            self.reserve(slots, reach + max(GROWTH, reach // 8))

    def admit(self, rows: list[Row]) -> None:
        """Puts rows into free slots. A prompt that a live row holds is copied from it, any other is prefilled once."""
        first = len(self.rows)
        holder = {row.prompt_index: slot for slot, row in enumerate(self.rows)}
        copies, fresh = [], {}
        for slot, row in enumerate(rows, first):
            if row.prompt_index in holder:
                copies.append((holder[row.prompt_index], slot))
            else:
                fresh.setdefault(row.prompt_index, (row.prompt, []))[1].append(slot)
        prefill(self.model, self, [prompt for prompt, _ in fresh.values()], [to for _, to in fresh.values()])
        self._copy(self._cache(max(len(row.prompt) for row in rows)), copies)
        here = slice(first, first + len(rows))
        state = torch.tensor([(row.prompt[-1], len(row.prompt), len(row.prompt) + row.limit) for row in rows])
        self.token[here], self.length[here], self.stop[here] = state.T.to(self.device)
        self.alive[here] = True
        self.rows += rows
        seeds = torch.tensor([row.seed for row in rows], device=self.device)
        self.uniforms[here] = uniform(seeds[:, None], self.positions)
        self.lengths += [len(row.prompt) for row in rows]

    def _cache(self, reach: int) -> list[Tensor]:
        return [cache[:, :, :reach] for cache in (*self.keys, *self.values)]

    def _copy(self, tensors, moves: list[tuple[int, int]]) -> None:
        if moves:
            source, to = torch.tensor(moves, device=self.device).T
            for tensor in tensors:
                tensor.index_copy_(0, to, tensor.index_select(0, source))

    def drop_finished(self) -> None:
        """Reads the finished rows out and moves rows from the tail into their holes."""
        count = len(self.rows)
        alive, self.lengths = torch.stack((self.alive[:count].long(), self.length[:count])).tolist()
        done = [slot for slot in range(count) if not alive[slot]]
        if not done:
            return
        self._read_out(done)
        left = count - len(done)
        moves = list(zip([slot for slot in range(left, count) if alive[slot]], [slot for slot in done if slot < left]))
        self._copy((*self._cache(max(self.lengths)), self.token, self.length, self.stop, self.uniforms, self.alive,
                    self.ids, self.logprobs, self.entropies), moves)
        for source, to in moves:
            self.rows[to], self.lengths[to] = self.rows[source], self.lengths[source]
        del self.rows[left:], self.lengths[left:]
        self.alive[left:count] = False

    def _read_out(self, done: list[int]) -> None:
        at, reach = torch.tensor(done, device=self.device), max(self.lengths[slot] for slot in done)
        told = (t[at, :reach].tolist() for t in (self.ids, self.logprobs, self.entropies))
        for slot, *of_row in zip(done, *told):
            row = self.rows[slot]
            row.ids, row.logprobs, row.entropies = (t[len(row.prompt):self.lengths[slot]] for t in of_row)


# ---- 5. Graphs ------------------------------------------------------------------------------------------------------

class Graphs:
    """The decode step as CUDA graphs, one per number of rows in BUCKETS, in one memory pool: the largest first, so that
    the others fit into what it left. A replay is one launch instead of some thousand. Made while no row is alive, so
    that the dry runs change nothing. On a CPU the steps are called as they are, which is how tests get here."""

    def __init__(self, model: nn.Module, slots: Slots, rule: Rule):
        most = len(slots.index)
        self.replay = {}
        self.pool = torch.cuda.graph_pool_handle() if slots.device.type == "cuda" else None
        for rows in sorted({min(most, bucket) for bucket in (*BUCKETS, *range(384, most, 128), most)}, reverse=True):
            step = partial(decode, model, slots, rule, rows)
            self.replay[rows] = self._record(step) if self.pool else step

    def _record(self, step):
        step()                                                # libraries allocate at their first call
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):     # NCCL has its own thread
            step()
        return graph.replay

    def step(self, rows: int) -> None:
        self.replay[min(bucket for bucket in self.replay if bucket >= rows)]()


def slots_that_fit(model: nn.Module, capacity: int) -> int:
    """Rows of `capacity` tokens for which four fifths of the free GPU memory have room; activations get the rest."""
    attn = model.model.layers[0].self_attn
    per_token = 2 * len(model.model.layers) * attn.config.num_key_value_heads * attn.head_dim * model.dtype.itemsize
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return max(1, int(0.8 * free) // (per_token * capacity))


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
    held = [place[row.prompt] for row in rows]                # where in the cache each live row's keys are
    logits, cache = _forward(model, ids, mask, None)
    logits = logits[held] if cache is not None else _recompute(model, live)
    while live:
        seeds = torch.tensor([row.seed for row in live], device=device)
        lengths = torch.tensor([len(row.prompt) + len(row.ids) for row in live], device=device)
        ids, logprobs, entropies = rule.draw(logits, uniform(seeds, lengths))
        for row, id_, logprob, entropy in zip(live, ids.tolist(), logprobs.tolist(), entropies.tolist()):
            row.ids.append(id_)
            row.logprobs.append(logprob)
            row.entropies.append(entropy)
        going = [i for i, row in enumerate(live) if len(row.ids) < row.limit and row.ids[-1] not in end_ids]
        live = [live[i] for i in going]
        if not live or cache is None:
            logits = _recompute(model, live) if live else None
            continue
        if (rows_left := [held[i] for i in going]) != list(range(len(mask))):
            cache.reorder_cache(torch.tensor(rows_left, device=device))
            mask = mask[rows_left]
        mask, held = torch.cat((mask, torch.ones_like(mask[:, :1])), 1), list(range(len(live)))
        logits, cache = _forward(model, ids[going, None], mask, cache)


def _forward(model: nn.Module, ids: Tensor, mask: Tensor, cache) -> tuple[Tensor | None, object]:
    """ids (B, S), mask (B, all so far) -> logits of the last position (B, V) and the cache; None, None without one."""
    takes = inspect.signature(model.forward).parameters
    if not {"past_key_values", "position_ids"} <= takes.keys():        # it may count positions from the padding on
        return None, None
    inputs = {"past_key_values": cache, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1]:],
              "logits_to_keep": 1}
    out = model(input_ids=ids, attention_mask=mask, use_cache=True, **{k: v for k, v in inputs.items() if k in takes})
    cache = getattr(out, "past_key_values", None)
    return (out.logits[:, -1], cache) if hasattr(cache, "reorder_cache") else (None, None)


def _recompute(model: nn.Module, rows: list[Row]) -> Tensor:
    """Logits of each row's next token (B, V), from the whole sequences, padded on the right."""
    sequences = [row.prompt + tuple(row.ids) for row in rows]
    width = max(map(len, sequences))
    ids = torch.tensor([s + (0,) * (width - len(s)) for s in sequences], device=model.device)
    return model(input_ids=ids).logits[range(len(rows)), [len(s) - 1 for s in sequences]]


# ---- The sampler ----------------------------------------------------------------------------------------------------

class Sampler:
    """Draws samples from a causal language model of transformers, with the weights that it has at that moment.

    end_ids: any of them ends a sample. vocab_size: ids from there on (padding of the embedding) are outside the
    distribution. max_rows: most rows in the cache at a time (default: as many as are asked for, on a GPU as fit); more
    rows than that wait in a queue for a free slot. Raises ValueError if an end id can never be drawn."""

    def __init__(self, model: nn.Module, end_ids: set[int], vocab_size: int | None = None, max_rows: int | None = None):
        self.model, self.end_ids, self.max_rows = model, set(end_ids), max_rows
        self.embeddings = model.get_input_embeddings().weight.shape[0]
        self.vocab_size = min(vocab_size or self.embeddings, self.embeddings)
        if strange := sorted(i for i in self.end_ids if not 0 <= i < self.vocab_size):
            raise ValueError(f"end ids {strange} are outside the {self.vocab_size} ids that can be drawn")
        self.is_end = torch.zeros(self.embeddings, dtype=torch.bool, device=model.device)
        self.is_end[list(self.end_ids)] = True
        self.knobs = torch.ones(2, device=model.device)
        self.last_slots: int | None = None                    # of the last cache with fixed addresses
        self.fixed = model.device.type == "cuda"              # fixed addresses and graphs; tests set it on a CPU too
        self.release()

    def sample(self, prompts: list[list[int]], n: int, max_new_tokens: int | list[int], temperature: float,
               seed: int | list[int], top_p: float = 1.0) -> list[list[Sample]]:
        """n samples per prompt, as a list per prompt.

        max_new_tokens: one limit, or one per row, prompt-major; 0 gives an empty sample. temperature: 0 is greedy, and
        its log-probabilities are 0.0, those of the point mass that was drawn from; otherwise they belong to
        softmax(logits / temperature), with top_p < 1 cut to the fewest most likely tokens that hold top_p, and
        renormalised. seed: an int, from which a row's stream follows by way of its prompt's ids and of how many rows
        of the same prompt came before; or a list with one stream per row. A stream's number for a token depends on the
        token's position in the whole sequence, so a row cut anywhere and continued with its own stream goes on as it
        did. Raises ValueError for an empty prompt, an id outside the model, a list of the wrong length, a number out
        of its range, and for logits that are not finite."""
        if n < 1 or not temperature >= 0 or not 0 < top_p <= 1:
            raise ValueError(f"n must be at least 1, temperature at least 0 and top_p in (0, 1]; "
                             f"got {n}, {temperature}, {top_p}")
        rows = self._rows(prompts, n, max_new_tokens, seed)
        waiting = deque(row for row in rows if row.limit > 0)
        self.knobs.copy_(torch.tensor([1 / temperature if temperature else 1.0, top_p]))
        rule = Rule(temperature == 0, 0 < temperature and top_p < 1, self.knobs, self.vocab_size)
        fast = has_llama_layers(self.model)                   # any other forward may keep tensors that training needs
        with _evaluating(self.model), torch.inference_mode() if fast else torch.no_grad():
            while waiting:
                if fast:
                    self._sample_in_slots(waiting, rule)
                else:
                    wave = [waiting.popleft() for _ in range(min(self.max_rows or len(rows), len(waiting)))]
                    sample_by_forward(self.model, wave, rule, self.end_ids)
        if any(math.isnan(logprob) for row in rows for logprob in row.logprobs):
            self.release()                                    # NaN in the cache would outlast a mask
            raise ValueError("the model's logits are not finite, so there is nothing to sample from; check its weights")
        samples = [Sample(row.ids, row.logprobs, bool(row.ids) and row.ids[-1] in self.end_ids, row.entropies)
                   for row in rows]
        return [samples[i:i + n] for i in range(0, len(samples), n)]

    def _rows(self, prompts, n: int, limits, seeds) -> list[Row]:
        count = len(prompts) * n
        for i, prompt in enumerate(prompts):
            if not prompt or min(prompt) < 0 or max(prompt) >= self.embeddings:
                what = f"has an id outside 0 to {self.embeddings - 1}" if prompt else "is empty"
                raise ValueError(f"prompt {i} {what}")
        for name, value in (("max_new_tokens", limits), ("seed", seeds)):
            if not isinstance(value, int) and len(value) != count:
                raise ValueError(f"{name} has {len(value)} entries for {len(prompts)} prompts x {n} samples")
        limits = [limits] * count if isinstance(limits, int) else limits
        if min(limits, default=0) < 0:
            raise ValueError(f"max_new_tokens must not be negative; got {min(limits)}")
        rows, index, seen = [], {}, Counter()
        for i in range(count):
            prompt = tuple(prompts[i // n])
            seed = _stream(seeds, prompt, seen[prompt]) if isinstance(seeds, int) else seeds[i]
            seen[prompt] += 1
            rows.append(Row(prompt, index.setdefault(prompt, len(index)), limits[i], _int64(seed)))
        return rows

    def _sample_in_slots(self, waiting: deque[Row], rule: Rule) -> None:
        try:
            self._fill(self._open(waiting, rule), waiting, rule)
        except BaseException:       # say out of memory: the next call must find neither these rows nor their cache
            self.release()
            raise
        if not self.fixed:
            self.release()

    def _fill(self, slots: Slots, waiting: deque[Row], rule: Rule) -> None:
        """Draws the waiting rows, each in a slot of its own as soon as one is free."""
        most = min(len(slots.index), self.max_rows or len(slots.index))
        while waiting or slots.rows:
            free = most - len(slots.rows)
            if waiting and free >= min(len(waiting), max(1, most // 8)):      # an eighth at a time: larger prefills
                slots.admit([waiting.popleft() for _ in range(min(free, len(waiting)))])
            if self.fixed:
                left = max(len(row.prompt) + row.limit - length for row, length in zip(slots.rows, slots.lengths))
                for _ in range(min(STEPS_PER_LOOK, left)):
                    self.graphs[rule.greedy, rule.nucleus].step(len(slots.rows))
            else:
                slots.make_room(most if waiting else len(slots.rows))
                decode(self.model, slots, rule, len(slots.rows))
            slots.drop_finished()

    def _open(self, waiting: deque[Row], rule: Rule) -> Slots:
        """On a CPU a cache of the prompts' length that grows. On a GPU addresses must not change, so it has its full
        length from the start and as many slots as fit, and serves later calls as long as it is large enough and the
        weights lie where they lay (an update in place leaves the graphs valid). It only grows: many short rows and a
        few long ones, taking turns, would otherwise make it anew at every call."""
        wanted = min(len(waiting), self.max_rows or len(waiting))
        needed = max(len(row.prompt) + row.limit for row in waiting)
        if not self.fixed:
            return Slots(self.model, self.is_end, wanted, max(len(row.prompt) for row in waiting) + GROWTH, needed)
        weights = [p.data_ptr() for p in self.model.parameters()]
        if self.slots is None or self.weights != weights or self.slots.capacity < needed or self.most < wanted:
            if self.slots is not None:
                needed = max(needed, self.slots.capacity)
                wanted = max(wanted, min(len(self.slots.index), self.max_rows or math.inf))
            self.release()
            capacity = -(-needed // 128) * 128
            fit = slots_that_fit(self.model, capacity) if self.model.device.type == "cuda" else wanted
            self.weights, self.most = weights, wanted if fit >= wanted else math.inf    # no more fit: do not try again
            self.last_slots = min(wanted, fit)
            self.slots = Slots(self.model, self.is_end, self.last_slots, capacity, capacity)
        kind = rule.greedy, rule.nucleus
        if kind not in self.graphs:
            self.graphs[kind] = Graphs(self.model, self.slots, rule)
        return self.slots

    def release(self) -> None:
        """Gives the cache and the graphs back to PyTorch's allocator. The next call makes them anew."""
        self.slots: Slots | None = None
        self.graphs: dict[tuple[bool, bool], Graphs] = {}


def _stream(seed: int, prompt: tuple[int, ...], before: int) -> int:
    """A row's stream: 64 bits from the seed, the prompt and the number of rows of the same prompt before this one."""
    return int.from_bytes(hashlib.blake2b(repr((seed, prompt, before)).encode(), digest_size=8).digest(), "little")


@contextmanager
def _evaluating(model: nn.Module):
    """Dropout off, and afterwards every module's mode as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
