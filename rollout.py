"""Batched sampling with a KV cache: token ids in, sampled token ids out. Nothing here knows of text or rewards.

Sampling is most of a GRPO step, so this file replaces `model.generate()`; the paper does not depend on how it is done.
It is exact: a row's tokens depend on the model, its prompt, its seed and its limit, and not on which rows share the
batch (up to the rounding of matrix products, whose last bit may change with the number of rows). It has five parts:

    1. sampling   logits -> one token a row, from a random stream that belongs to the row
    2. prefill    the keys and values of a prompt, once, whatever the number of samples drawn from it
    3. decode     one token more for all live rows
    4. slots      where each row's keys, values and ids lie, and how rows come and go
    5. graphs     on a GPU, the decode step recorded once per number of rows and replayed

Parts 2 to 5 run the layers of the Llama family (Llama, Qwen2, Qwen3, Mistral) straight from the model's own modules, so
an optimizer step is seen at once and no weight is copied. Every other causal language model of transformers goes
through its own forward (`sample_by_forward`, at the end): same samples, less speed.
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
from torch import Tensor

BUCKETS = (256, 192, 128, 96, 64, 32, 16, 8, 4, 2, 1)     # rows a CUDA graph is recorded for; largest first
STEPS_PER_LOOK = 16       # on a GPU the host looks for finished rows this often, so that no token waits for it
PREFILL_TOKENS = 8192     # most prompt tokens in one forward, padding included
GROWTH = 64               # on a CPU the cache gets this many more positions at a time (or a quarter more, if larger)


@dataclass
class Sample:
    """ids: the sampled tokens, with the end id if one was drawn; logprobs: of each token, natural logarithm, under the
    distribution it was drawn from; finished: an end id was drawn before the limit was reached."""
    ids: list[int]
    logprobs: list[float]
    finished: bool


@dataclass
class Row:
    """One sample to be drawn. prompt_index numbers the distinct prompts: rows with the same number share a prefill."""
    index: int
    prompt: tuple[int, ...]
    prompt_index: int
    limit: int
    seed: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------------------------------
# 1. Sampling
# ---------------------------------------------------------------------------------------------------------------------

def _int64(n: int) -> int:
    return (n + 2**63) % 2**64 - 2**63


def _splitmix64(x: Tensor) -> Tensor:
    """The finalizer of splitmix64 (Steele et al. 2014) on int64, whose products wrap and whose shifts are masked."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _int64(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _int64(0x94D049BB133111EB)
    return x ^ ((x >> 31) & (2**33 - 1))


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """seeds (B,), positions (B,) int64 -> (B,) float64 in [0, 1), 53 bits. A hash, not a generator: it has no state, is
    the same on CPU and GPU, and the number for a position does not depend on what was drawn before or beside it."""
    bits = _splitmix64(_splitmix64(seeds) + positions * _int64(0x9E3779B97F4A7C15))
    return ((bits >> 11) & (2**53 - 1)).double() * 2.0**-53


def _pick(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse CDF. weights (B, K) float64 >= 0, u (B,) -> index (B,) and what is left of u within it, in [0, 1).
    Only indices of positive weight can be picked, also where a parallel cumulative sum is not quite monotone."""
    cdf = weights.cumsum(-1).masked_fill(weights <= 0, -1.0)
    target = u * cdf.amax(-1)                                                   # < the largest, because u < 1
    index = (cdf > target[:, None]).to(torch.uint8).argmax(-1, keepdim=True)    # the first one above the target
    width = weights.gather(-1, index)[:, 0]
    left = (target - cdf.gather(-1, index)[:, 0]) / width + 1
    return index[:, 0], left.clamp(0, 1 - 2.0**-53)


@dataclass
class Rule:
    """How a token is drawn. knobs holds 1/temperature and top_p on the device, where a recorded graph reads them."""
    greedy: bool
    nucleus: bool
    knobs: Tensor
    vocab_size: int

    def draw(self, logits: Tensor, seeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """logits (B, V), which may be overwritten; seeds, positions (B,) -> ids (B,), logprobs (B,) float32."""
        logits = logits.float()
        logits[:, self.vocab_size:] = -torch.inf          # rows of the embedding that no token of the tokenizer uses
        if self.greedy:
            best, ids = logits.max(-1)
            return ids, best - best                       # 0: a point mass; NaN if the logits are not finite
        p = torch.softmax(logits.mul_(self.knobs[0]), -1)
        if self.nucleus:
            sorted_p, order = p.sort(-1, descending=True, stable=True)
            outside = sorted_p.cumsum(-1) - sorted_p >= self.knobs[1]     # the tokens before it already hold top_p
            outside[:, 0] = False
            p = p.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), 0.0)
        return _invert(p, uniform(seeds, positions))


def _invert(p: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """p (B, V) float32 >= 0, u (B,) -> ids (B,), logprobs (B,) of p normalised. One uniform a row instead of V, and a
    cumulative sum over blocks, then inside one block, instead of over the vocabulary (1.1 times on the 27M model)."""
    width = 128
    blocks = F.pad(p, (0, -p.shape[1] % width)).unflatten(-1, (-1, width))    # (B, V/128, 128)
    sums = blocks.sum(-1).double()                                             # (B, V/128)
    block, left = _pick(sums, u)
    inside = blocks[torch.arange(len(p), device=p.device), block].double()     # (B, 128)
    token, _ = _pick(inside, left)
    chosen = inside.gather(-1, token[:, None])[:, 0]
    return block * width + token, (chosen / sums.sum(-1)).log().float()


# ---------------------------------------------------------------------------------------------------------------------
# 2. and 3. Prefill and decode, for the Llama family
# ---------------------------------------------------------------------------------------------------------------------

LLAMA_FAMILY = {"transformers.models.llama.modeling_llama.LlamaForCausalLM",
                "transformers.models.qwen2.modeling_qwen2.Qwen2ForCausalLM",
                "transformers.models.qwen3.modeling_qwen3.Qwen3ForCausalLM",
                "transformers.models.mistral.modeling_mistral.MistralForCausalLM"}


def has_llama_layers(model: torch.nn.Module) -> bool:
    """Whether `run_layers` computes what this model's forward does: exactly one of the classes read for it (no
    subclass), full attention in every layer, rotations that depend on the position alone, all weights on one device."""
    if f"{type(model).__module__}.{type(model).__qualname__}" not in LLAMA_FAMILY or hasattr(model, "_hf_hook"):
        return False
    config = model.config
    kinds = getattr(config, "layer_types", None)
    full = set(kinds) == {"full_attention"} if kinds else getattr(config, "sliding_window", None) is None
    rope = getattr(model.model.rotary_emb, "rope_type", None)
    one_device = len({p.device for p in model.parameters()}) == 1
    return full and one_device and rope in ("default", "linear", "llama3", "yarn")


def _norm(norm: torch.nn.Module, x: Tensor) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)    # one fused kernel, not six


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, S, heads, D); cos, sin (B, S, 1, D): rotary position embedding, halves paired."""
    a, b = x.chunk(2, -1)
    return torch.addcmul(x * cos, torch.cat((-b, a), -1), sin)


def run_layers(model: torch.nn.Module, ids: Tensor, positions: Tensor, attend) -> Tensor | None:
    """ids, positions (B, S) -> last hidden state (B, S, H), after the final norm.
    attend(layer, q (B, S, heads, D), k and v (B, S, kv heads, D), scale) -> (B, S, heads, D), or None to stop there."""
    base = model.model
    x = base.embed_tokens(ids)                                                # (B, S, H)
    cos, sin = (t.unsqueeze(2) for t in base.rotary_emb(x, positions))        # (B, S, 1, D)
    for i, layer in enumerate(base.layers):
        attn = layer.self_attn
        h = _norm(layer.input_layernorm, x)
        q, k, v = (proj(h).unflatten(-1, (-1, attn.head_dim)) for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
        if hasattr(attn, "q_norm"):
            q, k = _norm(attn.q_norm, q), _norm(attn.k_norm, k)
        q, k = _rotate(torch.cat((q, k), 2), cos, sin).split((q.shape[2], k.shape[2]), 2)
        out = attend(i, q, k, v, attn.scaling)
        if out is None:
            return None
        x = x + attn.o_proj(out.flatten(2))
        x = x + layer.mlp(_norm(layer.post_attention_layernorm, x))
    return _norm(base.norm, x)


def prefill(model: torch.nn.Module, slots: "Slots", prompts: list[tuple[int, ...]], targets: list[list[int]]) -> None:
    """Writes the keys and values of each prompt but its last token, which the first decode step feeds, into its target
    slots. Padding is on the right, where a causal model never looks, so plain causal attention is right; the last layer
    stops at its keys. One forward for all samples of a prompt: 1.2 times on the bench."""
    device, last = slots.device, len(model.model.layers) - 1
    for chunk in _chunks(prompts, PREFILL_TOKENS):
        width = max(len(prompts[j]) for j in chunk) - 1
        if width == 0:
            continue
        ids = torch.tensor([prompts[j][:-1] + (0,) * (width + 1 - len(prompts[j])) for j in chunk], device=device)
        to = torch.tensor([slot for j in chunk for slot in targets[j]], device=device)
        source = torch.tensor([c for c, j in enumerate(chunk) for _ in targets[j]], device=device)

        def attend(i, q, k, v, scale):
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))                  # (Q, heads, S, D)
            slots.keys[i][to, :, :width] = k[source]
            slots.values[i][to, :, :width] = v[source]
            if i == last:
                return None
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)

        run_layers(model, ids, torch.arange(width, device=device)[None], attend)


def _chunks(prompts: list[tuple[int, ...]], most_tokens: int) -> list[list[int]]:
    """Indices of the prompts, longest first, cut so that a padded chunk has at most that many tokens."""
    chunks: list[list[int]] = []
    for j in sorted(range(len(prompts)), key=lambda j: -len(prompts[j])):
        if not chunks or (len(chunks[-1]) + 1) * len(prompts[chunks[-1][0]]) > most_tokens:
            chunks.append([])
        chunks[-1].append(j)
    return chunks


def attend_masked(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """q (B, 1, heads, D), keys and values (B, kv heads, L, D), mask (B, 1, 1, L) added -> (B, 1, heads, D).
    The heads that share keys stand as so many queries, so that keys and values are never expanded."""
    grouped = q.unflatten(2, (keys.shape[1], -1))[:, 0]                       # (B, kv heads, group, D)
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
    return out.flatten(1, 2)[:, None]


def attend_flash(q: Tensor, keys: Tensor, values: Tensor, used: Tensor, scale: float) -> Tensor:
    """The same from the FlashAttention that PyTorch ships: used (B,) int32 is each row's number of valid positions. It
    lies on the device and bounds what is read, so neither the host nor the size of the allocation matters."""
    rows, _, length, _ = keys.shape
    starts = torch.arange(rows + 1, device=q.device, dtype=torch.int32)
    keys, values = (t.transpose(1, 2).flatten(0, 1) for t in (keys, values))  # (B * L, kv heads, D), views
    return torch.ops.aten._flash_attention_forward(q[:, 0], keys, values, starts, starts * length, 1, length, 0.0,
                                                   False, False, scale=scale, seqused_k=used)[0][:, None]


def decode(model: torch.nn.Module, slots: "Slots", rule: Rule, rows: int, reach: int) -> None:
    """One token more in each of the first `rows` slots that is alive; all that changes is on the device and in place.
    reach: no row has more than this many tokens. Rows that have finished are computed but do not advance."""
    at = slots.index[:rows]
    length = slots.length[:rows]                     # tokens so far; the last one has no keys yet
    position = length - 1
    if slots.flash:
        attention, valid = attend_flash, length.int()
    else:
        beyond = slots.positions[:reach] >= length[:, None]                   # (B, L)
        attention, valid = attend_masked, torch.zeros_like(beyond, dtype=slots.dtype).masked_fill_(
            beyond, -torch.inf)[:, None, None]

    def attend(i, q, k, v, scale):
        slots.keys[i][at, :, position] = k[:, 0]
        slots.values[i][at, :, position] = v[:, 0]
        return attention(q, slots.keys[i][:rows, :, :reach], slots.values[i][:rows, :, :reach], valid, scale)

    hidden = run_layers(model, slots.token[:rows, None], position[:, None], attend)
    ids, logprobs = rule.draw(model.lm_head(hidden[:, 0]), slots.seed[:rows], length)
    slots.ids[at, length] = ids                      # a finished row writes behind its end, where nobody reads
    slots.logprobs[at, length] = logprobs
    alive = slots.alive[:rows]
    slots.token[:rows] = torch.where(alive, ids, slots.token[:rows])
    length += alive
    alive &= (length < slots.stop[:rows]) & ~slots.is_end[ids]


# ---------------------------------------------------------------------------------------------------------------------
# 4. Slots
# ---------------------------------------------------------------------------------------------------------------------

class Slots:
    """Room for a number of rows. Row i's tokens, keys and values lie in slot i of each tensor, from position 0 on, and
    live rows are contiguous from slot 0: a step reads `tensor[:rows]`, a view, and nothing is concatenated (1.5 times)
    or computed for rows that are done (2.2 times)."""

    def __init__(self, model: torch.nn.Module, is_end: Tensor, slots: int, capacity: int):
        self.model, self.is_end, self.device = model, is_end, is_end.device
        self.dtype = model.model.embed_tokens.weight.dtype
        self.flash = self.device.type == "cuda" and self.dtype in (torch.bfloat16, torch.float16)
        self.rows: list[Row] = []                                             # the live ones; rows[i] is in slot i
        self.lengths: list[int] = []                                          # theirs, as the host last saw them
        integers = dict(dtype=torch.int64, device=self.device)
        self.index = torch.arange(slots, **integers)
        self.token, self.stop, self.seed = (torch.zeros(slots, **integers) for _ in range(3))
        self.length = torch.ones(slots, **integers)
        self.alive = torch.zeros(slots, dtype=torch.bool, device=self.device)
        self.keys: list[Tensor] = [None] * len(model.model.layers)
        self.values: list[Tensor] = [None] * len(model.model.layers)
        self.capacity = 0
        self.ids = torch.zeros(slots, 0, **integers)
        self.logprobs = torch.zeros(slots, 0, device=self.device)
        self.reserve(slots, capacity)

    def reserve(self, slots: int, capacity: int) -> None:
        """Makes room for `capacity` positions in `slots` slots, at new addresses, one layer after the other."""
        used, capacity_before, self.capacity = min(slots, len(self.rows)), self.capacity, capacity
        for i, layer in enumerate(self.model.model.layers):
            for cache in (self.keys, self.values):
                new = self._empty(slots, layer.self_attn)
                if used:
                    new[:used, :, :capacity_before] = cache[i][:used]
                cache[i] = new
        more = capacity + 1 - self.ids.shape[1]
        self.ids, self.logprobs = F.pad(self.ids, (0, more)), F.pad(self.logprobs, (0, more))
        self.positions = torch.arange(capacity, device=self.device)

    def _empty(self, slots: int, attn: torch.nn.Module) -> Tensor:
        """(slots, kv heads, capacity, D), zeros because a masked NaN is still NaN. In memory a position's heads lie
        together on a GPU, as the flash kernel wants them; a head's positions lie together on a CPU."""
        heads = attn.config.num_key_value_heads
        if self.device.type == "cuda":
            return torch.zeros(slots, self.capacity, heads, attn.head_dim, dtype=self.dtype,
                               device=self.device).transpose(1, 2)
        return torch.zeros(slots, heads, self.capacity, attn.head_dim, dtype=self.dtype, device=self.device)

    def make_room(self, reach: int, slots: int) -> None:
        """Grows to at least `reach` positions, in steps, and keeps only that many slots then."""
        if reach > self.capacity:
            self.reserve(slots, reach + max(GROWTH, reach // 4))

    def admit(self, rows: list[Row]) -> None:
        """Puts rows into the free slots behind the live ones. A prompt that a live row still holds is copied from it,
        any other is prefilled once."""
        first = len(self.rows)
        holder = {row.prompt_index: slot for slot, row in enumerate(self.rows)}
        fresh: dict[int, list[int]] = {}
        copies = []
        for slot, row in enumerate(rows, first):
            if row.prompt_index in holder:
                copies.append((holder[row.prompt_index], slot))
            else:
                fresh.setdefault(row.prompt_index, []).append(slot)
        prompts = [rows[to[0] - first].prompt for to in fresh.values()]
        prefill(self.model, self, prompts, list(fresh.values()))
        self._copy_cache(copies, max(len(row.prompt) for row in rows))
        state = [(row.prompt[-1], len(row.prompt), len(row.prompt) + row.limit, row.seed) for row in rows]
        here = slice(first, first + len(rows))
        for tensor, column in zip((self.token, self.length, self.stop, self.seed), torch.tensor(state).T):
            tensor[here] = column.to(self.device)
        self.alive[here] = True
        self.rows += rows
        self.lengths += [len(row.prompt) for row in rows]

    def _copy_cache(self, moves: list[tuple[int, int]], reach: int) -> None:
        if moves:
            source, to = torch.tensor(moves, device=self.device).T
            for cache in (*self.keys, *self.values):
                cache[to, :, :reach] = cache[source, :, :reach]

    def drop_finished(self) -> None:
        """Reads the finished rows out and moves rows from the tail into their holes."""
        count = len(self.rows)
        state = torch.stack((self.alive[:count].long(), self.length[:count]), 1).tolist()
        self.lengths = [length for _, length in state]
        done = [slot for slot, (alive, _) in enumerate(state) if not alive]
        if not done:
            return
        self._read_out(done)
        left = count - len(done)
        holes = [slot for slot in done if slot < left]
        moves = list(zip([slot for slot in range(left, count) if state[slot][0]], holes))
        self._copy_cache(moves, max(self.lengths))
        if moves:
            source, to = torch.tensor(moves, device=self.device).T
            for tensor in (self.token, self.length, self.stop, self.seed, self.alive, self.ids, self.logprobs):
                tensor[to] = tensor[source]
        for source, to in moves:
            self.rows[to], self.lengths[to] = self.rows[source], self.lengths[source]
        del self.rows[left:], self.lengths[left:]
        self.alive[left:count] = False

    def _read_out(self, done: list[int]) -> None:
        at, reach = torch.tensor(done, device=self.device), max(self.lengths[slot] for slot in done)
        for slot, ids, logprobs in zip(done, self.ids[at, :reach].tolist(), self.logprobs[at, :reach].tolist()):
            row = self.rows[slot]
            new = slice(len(row.prompt), self.lengths[slot])
            row.ids, row.logprobs = ids[new], logprobs[new]


# ---------------------------------------------------------------------------------------------------------------------
# 5. Graphs
# ---------------------------------------------------------------------------------------------------------------------

class Graphs:
    """The decode step as CUDA graphs, one per number of rows in BUCKETS, all in one memory pool (largest first, so that
    the smaller ones fit into what it used). A replay is one launch instead of some thousand."""

    def __init__(self, model: torch.nn.Module, slots: Slots, rule: Rule):
        most = len(slots.token)
        self.replay = {}
        self.pool = torch.cuda.graph_pool_handle() if slots.device.type == "cuda" else None
        for rows in sorted({min(most, bucket) for bucket in (*BUCKETS, *range(384, most, 128), most)}, reverse=True):
            step = partial(decode, model, slots, rule, rows, slots.capacity)
            self.replay[rows] = step if self.pool is None else self._record(step)

    def _record(self, step):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):                     # a dry run: libraries allocate at their first call
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            step()
        return graph.replay

    def step(self, rows: int) -> None:
        self.replay[min(bucket for bucket in self.replay if bucket >= rows)]()


# ---------------------------------------------------------------------------------------------------------------------
# Any other model: its own forward and cache
# ---------------------------------------------------------------------------------------------------------------------

def sample_by_forward(model: torch.nn.Module, rows: list[Row], rule: Rule, end_ids: set[int]) -> None:
    """Fills the rows through the model's own forward, as generate() would call it: prompts padded on the left, the
    cache that the model makes for itself. Prompts are run once each and finished rows leave the cache. A model that
    gives back no transformers cache is run over the whole sequences at every token, padded on the right."""
    device = model.device
    prompts = {row.prompt_index: row.prompt for row in rows}
    order = {key: i for i, key in enumerate(prompts)}
    width = max(map(len, prompts.values()))
    ids = torch.tensor([(0,) * (width - len(p)) + p for p in prompts.values()], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts.values()], device=device)
    logits, cache = _forward(model, ids, mask, None)
    keep = torch.tensor([order[row.prompt_index] for row in rows], device=device)
    seeds = torch.tensor([row.seed for row in rows], device=device)
    live = list(rows)
    while live:
        if cache is None:
            logits, keep = _recompute(model, live), None
        elif keep is not None:                                                # rows are shared out, or some have left
            cache.reorder_cache(keep)
            logits, mask = logits[keep], mask[keep]
        positions = torch.tensor([len(row.prompt) + len(row.ids) for row in live], device=device)
        token, logprobs = rule.draw(logits, seeds, positions)
        for row, id_, logprob in zip(live, token.tolist(), logprobs.tolist()):
            row.ids.append(id_)
            row.logprobs.append(logprob)
        going = [i for i, row in enumerate(live) if len(row.ids) < row.limit and row.ids[-1] not in end_ids]
        keep = torch.tensor(going, device=device) if len(going) < len(live) else None
        if going and cache is not None:
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
            if keep is not None:
                cache.reorder_cache(keep)
                token, mask = token[keep], mask[keep]
            logits, cache = _forward(model, token[:, None], mask, cache)
        seeds, live, keep = seeds[going], [live[i] for i in going], None


def _forward(model: torch.nn.Module, ids: Tensor, mask: Tensor, cache) -> tuple[Tensor, object]:
    """ids (B, S), mask (B, all so far) -> logits of the last position (B, V), the cache or None if it cannot be used."""
    takes = inspect.signature(model.forward).parameters
    extra = {"past_key_values": cache, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1]:],
             "logits_to_keep": 1}
    if "past_key_values" not in takes:
        return None, None
    out = model(input_ids=ids, attention_mask=mask, use_cache=True, **{k: v for k, v in extra.items() if k in takes})
    cache = out.past_key_values
    return out.logits[:, -1], cache if hasattr(cache, "reorder_cache") else None


def _recompute(model: torch.nn.Module, rows: list[Row]) -> Tensor:
    """Logits of each row's next token (B, V) from the whole sequences."""
    sequences = [row.prompt + tuple(row.ids) for row in rows]
    width = max(map(len, sequences))
    ids = torch.tensor([s + (0,) * (width - len(s)) for s in sequences], device=model.device)
    last = torch.tensor([len(s) - 1 for s in sequences], device=model.device)
    return model(input_ids=ids).logits[torch.arange(len(rows), device=model.device), last]


# ---------------------------------------------------------------------------------------------------------------------
# The sampler
# ---------------------------------------------------------------------------------------------------------------------

class Sampler:
    """Draws samples from a causal language model of transformers, with the weights that it has at that moment.

    end_ids: any of them ends a sample. vocab_size: ids from there on (padding of the embedding) are outside the
    distribution. max_rows: most rows in the cache at a time (default: as many as asked for, or as fit on the GPU); more
    rows than that wait in a queue for a free slot. Raises ValueError if an end id could never be drawn."""

    def __init__(self, model: torch.nn.Module, end_ids: set[int], vocab_size: int | None = None,
                 max_rows: int | None = None):
        self.model, self.end_ids, self.max_rows = model, set(end_ids), max_rows
        self.rows_of_embedding = model.get_input_embeddings().weight.shape[0]
        self.vocab_size = min(vocab_size or self.rows_of_embedding, self.rows_of_embedding)
        if strange := sorted(i for i in self.end_ids if not 0 <= i < self.vocab_size):
            raise ValueError(f"end ids {strange} are outside the vocabulary of {self.vocab_size} ids: they never end a sample")
        self.is_end = torch.zeros(self.rows_of_embedding, dtype=torch.bool, device=model.device)
        self.is_end[list(self.end_ids)] = True
        self.fixed = model.device.type == "cuda"          # fixed addresses and graphs; tests set it on a CPU too
        self.knobs = torch.ones(2, device=model.device)
        self.release()

    def sample(self, prompts: list[list[int]], n: int, max_new_tokens: int | list[int], temperature: float,
               seed: int | list[int], top_p: float = 1.0) -> list[list[Sample]]:
        """n samples per prompt, as a list per prompt.

        max_new_tokens: one limit, or one per row, prompt-major; 0 gives an empty sample. temperature: 0 is greedy, and
        its log-probabilities are 0.0, those of the point mass that was drawn from; otherwise they belong to
        softmax(logits / temperature), with top_p < 1 cut to the fewest most likely tokens that hold top_p and
        renormalised. seed: an int, from which a row's stream follows by way of its prompt's ids and of how many rows
        of the same prompt came before; or a list with one stream per row. A stream's number for a token depends on the
        token's position in the whole sequence, so a row cut anywhere and continued with its seed goes on as it did.
        Raises ValueError for an empty prompt, an id outside the model, or lists of the wrong length."""
        rows = self._rows(prompts, n, max_new_tokens, seed)
        if not temperature >= 0 or not 0 < top_p <= 1:
            raise ValueError(f"temperature must be at least 0 and top_p in (0, 1], not {temperature} and {top_p}")
        self.knobs.copy_(torch.tensor([1 / temperature if temperature else 1.0, top_p]))
        rule = Rule(temperature == 0, 0 < temperature and top_p < 1, self.knobs, self.vocab_size)
        waiting = deque(row for row in rows if row.limit > 0)
        with _evaluating(self.model), torch.no_grad():
            while waiting:
                if has_llama_layers(self.model):
                    self._sample_in_slots(waiting, rule)
                else:
                    wave = [waiting.popleft() for _ in range(min(self.max_rows or len(rows), len(waiting)))]
                    sample_by_forward(self.model, wave, rule, self.end_ids)
        samples = [self._finish(row) for row in rows]
        return [samples[i:i + n] for i in range(0, len(samples), n)]

    def _rows(self, prompts, n, limits, seeds) -> list[Row]:
        count = len(prompts) * n
        if n < 1:
            raise ValueError(f"n must be at least 1, not {n}")
        for name, value in (("max_new_tokens", limits), ("seed", seeds)):
            if isinstance(value, (list, tuple)) and len(value) != count:
                raise ValueError(f"{name} has {len(value)} entries for {len(prompts)} prompts x {n} samples")
        limits = list(limits) if isinstance(limits, (list, tuple)) else [limits] * count
        if count and min(limits) < 0:
            raise ValueError(f"max_new_tokens must not be negative, but one is {min(limits)}")
        for i, prompt in enumerate(prompts):
            if not prompt or min(prompt) < 0 or max(prompt) >= self.rows_of_embedding:
                raise ValueError(f"prompt {i} is empty" if not prompt else f"prompt {i} has an id outside the model's "
                                 f"{self.rows_of_embedding} embeddings: {min(prompt)} to {max(prompt)}")
        rows, indices, seen = [], {}, Counter()
        for i in range(count):
            prompt = tuple(prompts[i // n])
            stream = seeds[i] if isinstance(seeds, (list, tuple)) else _stream(seeds, prompt, seen[prompt])
            seen[prompt] += 1
            rows.append(Row(i, prompt, indices.setdefault(prompt, len(indices)), limits[i], _int64(stream)))
        return rows

    def _finish(self, row: Row) -> Sample:
        if any(map(math.isnan, row.logprobs)):
            raise ValueError("the model's logits are not finite, so nothing can be sampled from them: "
                             "check the weights, for example whether the last update made them NaN")
        return Sample(row.ids, row.logprobs, bool(row.ids) and row.ids[-1] in self.end_ids)

    def _sample_in_slots(self, waiting: deque[Row], rule: Rule) -> None:
        slots = self._open(waiting, rule)
        most = len(slots.token)
        while waiting or slots.rows:
            free = most - len(slots.rows)
            if waiting and free >= min(len(waiting), max(1, most // 8)):      # an eighth at a time: fewer, larger prefills
                slots.admit([waiting.popleft() for _ in range(min(free, len(waiting)))])
            if self.fixed:
                self._replay(slots, rule)
            else:
                slots.make_room(max(slots.lengths), most if waiting else len(slots.rows))
                decode(self.model, slots, rule, len(slots.rows), max(slots.lengths))
            slots.drop_finished()
        if not self.fixed:
            self.release()

    def _open(self, waiting: deque[Row], rule: Rule) -> Slots:
        """The slots for these rows. On a CPU the cache starts with the prompts' length and grows. On a GPU its address
        must not change, so it has its full length from the start, as many slots as the free memory allows, and stays
        for the next call as long as that needs no more and the weights lie where they lay."""
        wanted = min(len(waiting), self.max_rows or len(waiting))
        longest = max(len(row.prompt) for row in waiting)
        if not self.fixed:
            self.slots = Slots(self.model, self.is_end, wanted, longest + GROWTH)
            return self.slots
        weights = [p.data_ptr() for p in self.model.parameters()]
        needed = max(len(row.prompt) + row.limit for row in waiting)
        if self.slots is None or weights != self.weights or self.slots.capacity < needed \
                or len(self.slots.token) < min(wanted, self.fits):
            self.release()
            self.weights, capacity = weights, -(-needed // 128) * 128
            self.fits = _slots_that_fit(self.model, capacity)
            self.slots = Slots(self.model, self.is_end, min(wanted, self.fits), capacity)
        kind = rule.greedy, rule.nucleus
        if kind not in self.graphs:                       # now, while no row is alive
            self.graphs[kind] = Graphs(self.model, self.slots, rule)
        return self.slots

    def _replay(self, slots: Slots, rule: Rule) -> None:
        longest = max(len(row.prompt) + row.limit - length for row, length in zip(slots.rows, slots.lengths))
        for _ in range(min(STEPS_PER_LOOK, longest)):
            self.graphs[rule.greedy, rule.nucleus].step(len(slots.rows))

    def release(self) -> None:
        """Gives the cache and the graphs back to the allocator. The next call makes them anew."""
        self.slots, self.graphs = None, {}


def _slots_that_fit(model: torch.nn.Module, capacity: int) -> int:
    """Rows of `capacity` positions for which four fifths of the free memory have room; the rest is for the activations."""
    if model.device.type != "cuda":
        return 2**31
    attn = model.model.layers[0].self_attn
    position = 2 * len(model.model.layers) * attn.config.num_key_value_heads * attn.head_dim * model.dtype.itemsize
    held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    free = int(0.8 * (torch.cuda.mem_get_info()[0] + held))
    return max(1, free // (position * capacity))


def _stream(seed: int, prompt: tuple[int, ...], before: int) -> int:
    """A row's stream: 64 bits from the seed, the prompt and the number of rows of the same prompt before this one."""
    return int.from_bytes(hashlib.blake2b(repr((seed, prompt, before)).encode(), digest_size=8).digest(), "little")


@contextmanager
def _evaluating(model: torch.nn.Module):
    """Dropout off, and every module's mode afterwards as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
