"""Batched sampling with a KV cache: token ids in, sampled token ids out. This module knows
nothing about text or rewards.

Sampling is most of a GRPO step, so this replaces `model.generate()`. The cache has slots, one for
each row that is being sampled, and sampling is one loop (`Sampler.sample_in_slots`):

    admit     waiting rows take free slots; each prompt is run once (prefill) for all its rows
    decode    every live row gets one more token, or several if a draft was right (part 8)
    drop      finished rows leave, and rows from the end of the cache move into their slots

Sampling does not depend on the batch. Every row has its own stream of random numbers, so its tokens
depend on the weights, its prompt, its seed and its limit, and not on other rows or on drafts (up to
the rounding of matrix products, whose last bit may change with the number of rows).

The layers of the Llama family (Llama, Qwen2, Qwen3, Mistral) run straight from the model's own
modules, so the next call sees an optimizer step. Other causal language models of transformers run
through their own forward (part 6): slower, but with the same distribution and random streams. On a
GPU the same decode step is recorded as a CUDA graph (part 7). tests/bench_rollout.py measures what
each technique brings.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import inspect
import math
from collections import Counter, deque
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from entropy import mm_wide

PREFILL_TOKENS = 8192  # tokens in one forward of a prefill, padding included
GROWTH = 16  # on a CPU the cache grows by this many positions, or by an eighth if that is more


@dataclass
class Sample:
    """One sampled response.

    ids: its tokens, including the end token if one was drawn.
    logprobs: natural logarithm of each token's probability under the distribution it was drawn
    from.
    finished: whether an end token was drawn before the limit was reached.
    entropies: of softmax(logits / temperature) at each token, in nats, whatever top_p is.
    """

    ids: list[int]
    logprobs: list[float]
    finished: bool
    entropies: list[float] = field(default_factory=list)


@dataclass
class Row:
    """A sample in progress. Its stream of random numbers is a function of `seed`, an int64."""

    prompt: tuple[int, ...]
    limit: int
    seed: int
    sample: Sample = field(default_factory=lambda: Sample([], [], False))

    def longest(self) -> int:
        """The maximum length of prompt and response together."""
        return len(self.prompt) + self.limit


# ---- 1. The sampler ------------------------------------------------------------------------------


class Sampler:
    """Draws samples from a causal language model of transformers, with the weights it has now.

    end_ids: any of these tokens ends a sample.
    vocab_size: ids from here on are padding of the embedding and are never drawn.
    max_rows: how many rows are sampled at a time; the others wait. By default this is all rows, or
        on a GPU as many as fit.
    drafts: up to this many tokens of each row are looked up and verified in a decode step (part 8).
        The samples are the same; 0 turns this off.

    Raises ValueError if an end id can never be drawn.
    """

    def __init__(
        self,
        model: nn.Module,
        end_ids: set[int],
        vocab_size: int | None = None,
        max_rows: int | None = None,
        drafts: int = 0,
    ):
        self.model = model
        self.end_ids = set(end_ids)
        self.max_rows = max_rows
        self.drafts = drafts
        device = model.device
        self.embeddings = len(model.get_input_embeddings().weight)
        self.vocab_size = min(vocab_size or self.embeddings, self.embeddings)
        outside = sorted(i for i in self.end_ids if not 0 <= i < self.vocab_size)
        if outside:
            raise ValueError(
                f"end ids {outside} are outside the {self.vocab_size} ids that can be drawn"
            )
        self.is_end = torch.zeros(self.embeddings, dtype=torch.bool, device=device)
        self.is_end[list(self.end_ids)] = True
        self.knobs = torch.ones(2, device=device)  # 1 / temperature and top_p
        # A GPU needs a cache at fixed addresses (part 7). Tests turn it on on a CPU too.
        self.fixed = device.type == "cuda"
        self.last_slots = None  # how many slots the last fixed cache had
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
        """Draws n samples for each prompt and returns a list for each prompt.

        max_new_tokens: one limit, or one for each row, prompt by prompt; 0 gives an empty sample.
        temperature: 0 is greedy, and log-probabilities are then 0. Otherwise tokens are drawn from
            softmax(logits / temperature), and log-probabilities are those of this distribution.
        top_p: below 1, only the fewest most likely tokens that together have this probability are
            drawn, and log-probabilities are those of the renormalised distribution.
        seed: an int: each row's stream is a hash of it, the prompt, and how many earlier rows had
            the same prompt. A list: one stream for each row. A token's random number depends only
            on the stream and on its position, counted from the start of the prompt. So a response
            that is cut, appended to the prompt and continued with the same stream comes out the
            same.

        Raises ValueError if an argument makes no sense or the model's logits are not finite.
        """
        if not (n >= 1 and temperature >= 0 and 0 < top_p <= 1):
            raise ValueError(
                "n must be at least 1, temperature at least 0 and top_p in (0, 1]; "
                f"got {n}, {temperature}, {top_p}"
            )
        prompts = [tuple(prompt) for prompt in prompts]
        rows = self._make_rows(prompts, n, max_new_tokens, seed)
        samples = [row.sample for row in rows]
        waiting = deque(row for row in rows if row.limit > 0)
        greedy = temperature == 0
        if not greedy:
            self.knobs[0] = 1 / temperature
        self.knobs[1] = top_p
        nucleus = not greedy and top_p < 1
        rule = Rule(greedy, nucleus, self.knobs, self.vocab_size)
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()  # dropout off
        try:
            if has_llama_layers(self.model):
                self.sample_in_slots(waiting, rule)
            else:
                self.sample_in_waves(waiting, rule)
            for sample in samples:
                if any(map(math.isnan, sample.logprobs)):
                    raise ValueError(
                        "the model's logits are not finite: nothing to sample from; "
                        "check its weights"
                    )
                sample.finished = bool(sample.ids) and sample.ids[-1] in self.end_ids
        except BaseException:  # Ctrl-C, too
            self.release()  # the next call must not find these rows or their cache
            raise
        finally:
            for module in training:
                module.training = True
        return [samples[i : i + n] for i in range(0, len(samples), n)]

    @torch.inference_mode()
    def sample_in_slots(self, waiting, rule):
        """Fills the waiting rows, each in a slot of its own as soon as one is free."""
        if not waiting:
            return
        if self.fixed:
            slots = open_fixed_slots(self, waiting, rule)
        else:
            slots = self._open_slots(waiting)
        max_rows = min(len(slots.index), self.max_rows or len(slots.index))
        # One large prefill is faster than many small ones, so wait until an eighth is free.
        eighth = max(1, max_rows // 8)
        while waiting or slots.rows:
            free = min(max_rows - len(slots.rows), len(waiting))
            if free and (free >= eighth or free == len(waiting)):
                slots.admit([waiting.popleft() for _ in range(free)])
            if self.fixed:
                replay(slots, self.graphs[rule.greedy, rule.nucleus])
            else:
                slots.make_room(max_rows if waiting else len(slots.rows))
                decode(self.model, slots, rule, len(slots.rows))
            slots.drop_finished()

    @torch.no_grad()  # and not inference mode: a model's forward may keep tensors for training
    def sample_in_waves(self, waiting, rule):
        """Fills the waiting rows through the model's own forward, max_rows at a time."""
        while waiting:
            count = min(self.max_rows or len(waiting), len(waiting))
            rows = [waiting.popleft() for _ in range(count)]
            sample_by_forward(self.model, rows, rule, self.end_ids)

    def release(self) -> None:
        """Frees the cache and the graphs; on a GPU, returns their memory to the device. The next
        call makes new ones."""
        self.slots = None
        self.graphs = {}  # by (greedy, nucleus)
        if self.model.device.type == "cuda":
            gc.collect()  # the traceback of a failed call may hold them
            torch.cuda.empty_cache()

    def _open_slots(self, waiting):
        """A cache with room for the prompts, which grows with its rows."""
        count = min(len(waiting), self.max_rows or len(waiting))
        prompt = max(len(row.prompt) for row in waiting)
        longest = max(row.longest() for row in waiting)
        return Slots(self.model, self.is_end, count, prompt + GROWTH, longest, self.drafts)

    def _make_rows(self, prompts, n, limits, seeds):
        """The rows of a call, prompt by prompt, with their limits and random streams."""
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {i} is empty")
            if min(prompt) < 0 or max(prompt) >= self.embeddings:
                raise ValueError(f"prompt {i} has an id outside 0 to {self.embeddings - 1}")
        count = len(prompts) * n
        if isinstance(limits, int):
            limits = [limits] * count
        if isinstance(seeds, int):
            seeds = row_seeds(seeds, prompts, n)
        for name, values in (("max_new_tokens", limits), ("seed", seeds)):
            if len(values) != count:
                raise ValueError(
                    f"{name} has {len(values)} entries for {len(prompts)} prompts x {n} samples"
                )
        if min(limits, default=0) < 0:
            raise ValueError(f"max_new_tokens must not be negative; got {min(limits)}")
        rows = []
        for i, (limit, seed) in enumerate(zip(limits, seeds)):
            as_int64 = (seed + 2**63) % 2**64 - 2**63
            rows.append(Row(prompts[i // n], limit, as_int64))
        return rows


def row_seeds(seed, prompts, n):
    """Each row's stream: 64 bits of a hash of the seed, the prompt, and how many earlier rows had
    the same prompt."""
    seeds = []
    earlier = Counter()
    for prompt in prompts:
        for _ in range(n):
            key = repr((seed, prompt, earlier[prompt])).encode()
            digest = hashlib.blake2b(key, digest_size=8).digest()
            seeds.append(int.from_bytes(digest, "little"))
            earlier[prompt] += 1
    return seeds


# ---- 2. Slots: where rows are, how they come and go ----------------------------------------------


class Slots:
    """The state of all live rows. Slot i of each tensor holds row i: its tokens, keys and values,
    from position 0 on. Live rows fill the first slots without a gap, so a decode step works on
    `tensor[:rows]`: it wastes no work on finished rows and concatenates nothing."""

    def __init__(self, model, is_end, count, capacity, longest, drafts):
        """Makes `count` slots, with room for `capacity` tokens at first and `longest` at most, and
        for a draft after these."""
        base = model.model
        device = is_end.device
        self.model = model
        self.is_end = is_end
        self.device = device
        self.drafts = drafts
        self.longest = longest + drafts
        self.dtype = base.embed_tokens.weight.dtype
        head_dim = base.layers[0].self_attn.head_dim
        self.flash = flash_takes(device, self.dtype, head_dim)
        self.joined = None  # see join_projections
        self.rows = []  # the live Rows; rows[i] is in slot i
        self.lengths = []  # the lengths of these rows, as the host last read them
        self.index = torch.arange(count, device=device)
        self.length = torch.ones_like(self.index)
        self.stop = torch.zeros_like(self.index)  # a row lives while its length is below this
        self.group = torch.zeros_like(self.index)  # equal where the prompts are equal
        size = (count, self.longest + 1)  # one more, because a finished row writes past its end
        self.ids = torch.zeros(size, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(size, device=device)
        self.entropies = torch.zeros(size, device=device)
        # What depends only on the position is computed once: random numbers and rotations.
        self.uniforms = torch.zeros(size, dtype=torch.float64, device=device)
        self.positions = torch.arange(self.longest + 1, device=device)
        cos, sin = base.rotary_emb(base.embed_tokens.weight, self.positions[None])
        self.cos = cos[0, :, None]  # (self.longest + 1, 1, D)
        self.sin = sin[0, :, None]
        half = self.sin.shape[-1] // 2
        self.sin[..., :half].neg_()  # `rotate` expects this
        self.keys = [None] * len(base.layers)
        self.values = [None] * len(base.layers)
        self.reserve(count, capacity)

    def reserve(self, count, capacity):
        """Moves the cache to new memory for `count` rows of `capacity` tokens, layer by layer.

        Each tensor is (count, kv heads, capacity, D), with zeros where it is unused, because a NaN
        would survive the mask. In memory, a GPU's flash kernel needs the heads of a position side
        by side, and a CPU reads fastest when the positions of a head are side by side."""
        capacity = min(capacity, self.longest)
        used = min(count, len(self.rows))
        attn = self.model.model.layers[0].self_attn
        heads = attn.config.num_key_value_heads
        gpu = self.device.type == "cuda"
        if gpu:
            shape = (count, capacity, heads, attn.head_dim)
        else:
            shape = (count, heads, capacity, attn.head_dim)
        for i in range(len(self.keys)):
            for cache in (self.keys, self.values):
                new = torch.zeros(shape, dtype=self.dtype, device=self.device)
                if gpu:
                    new = new.transpose(1, 2)
                if used:
                    new[:used, :, : self.capacity] = cache[i][:used]
                cache[i] = new
        self.capacity = capacity

    def make_room(self, count):
        """Grows the cache, to `count` slots, if the longest row needs it. It grows in small steps:
        a decode step reads the whole cache, and reading unused positions takes time too."""
        longest = max(self.lengths) + self.drafts
        if longest > self.capacity:
            self.reserve(count, longest + max(GROWTH, longest // 8))

    def admit(self, rows):
        """Puts rows into free slots. The keys and values of a prompt are copied from a live row
        with the same prompt if there is one. Otherwise they are prefilled, once for all rows."""
        first = len(self.rows)
        new = slice(first, first + len(rows))
        holders = {row.prompt: slot for slot, row in enumerate(self.rows)}
        copies = []
        targets = {}  # prompt -> the slots that it is prefilled for
        state = []
        for slot, row in enumerate(rows, first):
            length = len(row.prompt)
            state.append((length, row.longest(), hash(row.prompt), row.seed))
            self.rows.append(row)
            self.lengths.append(length)
            if row.prompt in holders:
                copies.append((holders[row.prompt], slot))
            else:
                targets.setdefault(row.prompt, []).append(slot)
        prefill(self.model, self, targets)
        self.copy_cache(copies, max(self.lengths[new]))
        length, stop, group, seeds = torch.tensor(state).T.to(self.device)
        self.length[new] = length
        self.stop[new] = stop
        self.group[new] = group
        prompts = pad([row.prompt for row in rows], self.device)
        self.ids[new, : prompts.shape[1]] = prompts
        self.uniforms[new] = random_numbers(seeds[:, None], self.positions)

    def drop_finished(self):
        """Reads finished rows out and moves the last live rows into their slots."""
        count = len(self.rows)
        state = torch.stack((self.length[:count], self.stop[:count]))
        self.lengths, stop = state.tolist()
        finished = [i for i in range(count) if self.lengths[i] >= stop[i]]
        if not finished:
            return
        self.read_out(finished)
        live = count - len(finished)
        movers = [i for i in range(live, count) if i not in finished]
        moves = list(zip(movers, finished))  # there are as many movers as free slots below `live`
        self.copy_cache(moves, max(self.lengths))
        self.swap(moves)
        for source, target in moves:
            self.rows[target] = self.rows[source]
            self.lengths[target] = self.lengths[source]
        del self.rows[live:], self.lengths[live:]
        self.stop[live:count] = 0

    def read_out(self, finished):
        """Copies what was sampled in these slots to their rows' samples."""
        longest = max(self.lengths[slot] for slot in finished)
        at = torch.tensor(finished, device=self.device)
        for name in ("ids", "logprobs", "entropies"):
            values = getattr(self, name)[at, :longest].tolist()
            for slot, of_row in zip(finished, values):
                row = self.rows[slot]
                response = of_row[len(row.prompt) : self.lengths[slot]]
                setattr(row.sample, name, response)

    def copy_cache(self, moves, length):
        """Copies the first `length` keys and values of slots, one (from, to) for each move."""
        if not moves:
            return
        source, target = torch.tensor(moves, device=self.device).T
        for cache in self.keys + self.values:
            used = cache[:, :, :length]
            used.index_copy_(0, target, used.index_select(0, source))

    def swap(self, moves):
        """Swaps all that these pairs of slots hold but keys and values, so that the text of a
        finished row stays for drafts."""
        if not moves:
            return
        source, target = torch.tensor(moves, device=self.device).T
        both = torch.cat((source, target))
        other = torch.cat((target, source))
        for tensor in (
            self.length,
            self.stop,
            self.group,
            self.ids,
            self.uniforms,
            self.logprobs,
            self.entropies,
        ):
            tensor[other] = tensor[both]


# ---- 3. Prefill and decode -----------------------------------------------------------------------
# Shapes: B is the number of rows of a step, L the capacity of the cache, D the size of a head, V
# the vocabulary, H the hidden size.


def prefill(model, slots, targets):
    """Writes the keys and values of each prompt to all its slots, with one forward for all of them.

    targets: prompt -> its slots. The last token of a prompt is left to the first decode step."""
    todo = sorted(targets, key=len, reverse=True)  # similar lengths share a forward
    while todo and len(todo[0]) > 1:
        count = max(1, PREFILL_TOKENS // (len(todo[0]) - 1))
        batch, todo = todo[:count], todo[count:]
        # Padding is on the right, where a causal model never looks, so no mask is needed.
        ids = pad([prompt[:-1] for prompt in batch], slots.device)
        source, target = [], []
        for i, prompt in enumerate(batch):
            source += [i] * len(targets[prompt])
            target += targets[prompt]
        source = torch.tensor(source, device=slots.device)
        target = torch.tensor(target, device=slots.device)
        prefill_batch(model, slots, ids, source, target)


def prefill_batch(model, slots, ids, source, target):
    """Runs prompts, ids (prompts, S), and writes the keys and values of prompt source[i] to slot
    target[i]."""
    length = ids.shape[1]
    cos = slots.cos[None, :length]
    sin = slots.sin[None, :length]

    def attend(layer, q, k, v, scale):
        q = rotate(q, cos, sin).transpose(1, 2)  # (prompts, heads, S, D)
        k = rotate(k, cos, sin).transpose(1, 2)
        v = v.transpose(1, 2)
        keys = slots.keys[layer][:, :, :length]
        values = slots.values[layer][:, :, :length]
        keys.index_copy_(0, target, k.index_select(0, source))
        values.index_copy_(0, target, v.index_select(0, source))
        if layer == len(slots.keys) - 1:
            return None  # the output of the last layer is not needed
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            is_causal=True,
            scale=scale,
            enable_gqa=True,
        )
        return out.transpose(1, 2)

    run_layers(model, ids, slots.joined, attend)


def decode(model, slots, rule, rows):
    """Draws one more token for each live row among the first `rows` slots, on the device and in
    place. Rows that have finished are computed too but do not advance."""
    k = min(slots.drafts, TOKENS_PER_STEP // rows - 1)
    if k > 0:  # part 8 does the same for up to k + 1 tokens
        return decode_drafts(model, slots, rule, rows, k)
    at = slots.index[:rows]
    length = slots.length[:rows]
    stop = slots.stop[:rows]
    position = length[:, None] - 1  # of the last token, whose keys are not in the cache yet
    hidden = run_on_cache(model, slots, position)  # (B, 1, H)
    logits = mm_wide(hidden[:, 0], model.lm_head.weight.T)  # (B, V)
    ids, logprobs, entropies = rule.draw(logits, slots.uniforms[at, length])
    # A finished row writes past its end, where nothing is read.
    slots.ids[at, length] = ids
    slots.logprobs[at, length] = logprobs
    slots.entropies[at, length] = entropies
    length += length < stop
    stop.copy_(torch.where(slots.is_end[ids], length, stop))


def run_on_cache(model, slots, position):
    """Runs the tokens at `position` (B, S) of the first B slots, the last ones of each row, whose
    keys and values are not in the cache yet -> the last hidden state (B, S, H)."""
    rows, new = position.shape
    at = slots.index[:rows, None]
    cos = slots.cos[position]
    sin = slots.sin[position]
    if slots.flash:
        attention = attend_flash
        starts = torch.arange(rows + 1, device=slots.device, dtype=torch.int32)
        valid = position[:, -1].int() + 1, starts * new, starts * slots.capacity
    else:
        attention = attend_masked
        beyond = slots.positions[: slots.capacity] > position[:, :, None]  # (B, S, L)
        mask = torch.zeros_like(beyond, dtype=slots.dtype)
        valid = mask.masked_fill_(beyond, -torch.inf)[:, None]

    def attend(layer, q, k, v, scale):
        keys = slots.keys[layer]
        values = slots.values[layer]
        q = fused(rotate_and_store, q, k, v, cos, sin, keys, values, at, position)
        return attention(q, keys[:rows], values[:rows], valid, scale)

    return run_layers(model, slots.ids[at, position], slots.joined, attend)


def attend_masked(q, keys, values, mask, scale):
    """Attention of a few queries in each row. q (B, S, heads, D), keys and values (B, kv heads, L,
    D), mask (B, 1, S, L) added to the scaled dot products -> (B, S, heads, D).

    The query heads that share keys are treated as several queries of one head, so keys and values
    are not expanded. For single queries, two matrix products are faster than PyTorch's
    attention."""
    if q.shape[1] > 1:
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            keys,
            values,
            attn_mask=mask,
            scale=scale,
            enable_gqa=True,
        )
        return out.transpose(1, 2)
    grouped = (scale * q).view(len(q), keys.shape[1], -1, q.shape[3])  # (B, kv heads, group, D)
    weights = (grouped @ keys.mT + mask).softmax(-1)  # (B, kv heads, group, L)
    return (weights @ values).view(q.shape)


def pad(sequences, device, side="right"):
    """Sequences of token ids -> (B, S) int64, padded with 0 on this side."""
    tensors = [torch.tensor(ids, dtype=torch.int64) for ids in sequences]
    return pad_sequence(tensors, batch_first=True, padding_side=side).to(device)


# ---- 4. The layers of the Llama family -----------------------------------------------------------

LLAMA_FAMILY = (
    "transformers.models.llama.modeling_llama.LlamaForCausalLM",
    "transformers.models.qwen2.modeling_qwen2.Qwen2ForCausalLM",
    "transformers.models.qwen3.modeling_qwen3.Qwen3ForCausalLM",
    "transformers.models.mistral.modeling_mistral.MistralForCausalLM",
)


def has_llama_layers(model):
    """Whether `run_layers` computes what the model's forward computes: it is one of these very
    classes (no subclass), with full attention in every layer, rotations that depend on the position
    alone, and all weights on one device."""
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    if name not in LLAMA_FAMILY or hasattr(model, "_hf_hook"):
        return False
    layer_types = getattr(model.config, "layer_types", None)
    if layer_types:
        full_attention = set(layer_types) == {"full_attention"}
    else:
        full_attention = getattr(model.config, "sliding_window", None) is None
    rope = getattr(model.model.rotary_emb, "rope_type", None)
    plain_rope = rope in ("default", "linear", "llama3", "yarn")
    devices = {p.device for p in model.parameters()}
    return full_attention and plain_rope and len(devices) == 1


def run_layers(model, ids, joined, attend):
    """Runs ids (B, S) through all layers -> the last hidden state (B, S, H), after the last norm.

    attend(layer, q (B, S, heads, D), k and v (B, S, kv heads, D), scale) rotates queries and keys,
    uses the cache, and returns the attention output (B, S, heads, D), or None to stop there, and
    then this returns None too. joined: see join_projections."""
    base = model.model
    x = base.embed_tokens(ids)  # (B, S, H)
    h = rms_norm(base.layers[0].input_layernorm, x)
    # An addition and the norm behind it are one kernel on a GPU, so each layer ends with the first
    # norm of the next one.
    norms = [layer.input_layernorm for layer in base.layers]
    norms.append(base.norm)
    for i, layer in enumerate(base.layers):
        attn = layer.self_attn
        projections = attn.q_proj, attn.k_proj, attn.v_proj
        if joined:
            sizes = [projection.out_features for projection in projections]
            q, k, v = F.linear(h, *joined[i]).split(sizes, -1)
        else:
            q, k, v = (projection(h) for projection in projections)
        heads = (-1, attn.head_dim)
        q = q.unflatten(-1, heads)
        k = k.unflatten(-1, heads)
        v = v.unflatten(-1, heads)
        if hasattr(attn, "q_norm"):  # Qwen3
            q = rms_norm(attn.q_norm, q)
            k = rms_norm(attn.k_norm, k)
        out = attend(i, q, k, v, attn.scaling)
        if out is None:
            return None
        out = attn.o_proj(out.flatten(2))
        x, h = add_to_residual(x, out, layer.post_attention_layernorm)
        x, h = add_to_residual(x, layer.mlp(h), norms[i + 1])
    return h


def add_to_residual(x, y, norm):
    """x, y (B, S, H) -> x + y, and its norm."""
    # A change of requires_grad would compile the function again, so the weight is detached.
    return fused(add_and_norm, x, y, norm.weight.detach(), norm.variance_epsilon)


def add_and_norm(x, y, weight, eps):
    x = x + y
    return x, F.rms_norm(x, weight.shape, weight, eps)


def rms_norm(norm, x):
    """The same as norm(x), but on a GPU in one kernel instead of six."""
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def rotate(x, cos, sin):
    """Rotary position embedding: the halves (a, b) of each head become (a cos - b sin, b cos + a
    sin). x (B, S, heads, D); cos and sin (B, S, 1, D), where the first half of sin is negated."""
    half = x.shape[-1] // 2
    return torch.addcmul(x * cos, x.roll(half, -1), sin)


def rotate_and_store(q, k, v, cos, sin, keys, values, at, position):
    """Takes queries, keys and values of new tokens in each row, (B, S, heads, D). Writes the
    rotated keys and the values to `position` (B, S) of the slots `at` (B, 1) of a layer's cache,
    and returns the rotated queries."""
    keys[at, :, position] = rotate(k, cos, sin)
    values[at, :, position] = v
    return rotate(q, cos, sin)


# ---- 5. Drawing a token --------------------------------------------------------------------------


@dataclass
class Rule:
    """How a token is drawn. knobs holds 1 / temperature and top_p, on the device, because recorded
    graphs read them there."""

    greedy: bool
    nucleus: bool  # top_p < 1
    knobs: Tensor
    vocab_size: int

    def draw(self, logits, u):
        """logits (B, V), which may be overwritten, and u (B,) in [0, 1) -> ids, log-probabilities
        and entropies, each (B,)."""
        logits = logits.float()
        logits[:, self.vocab_size :] = -torch.inf
        if self.greedy:
            best, ids = logits.max(-1)
            zeros = best - best  # NaN if the logits are not finite
            return ids, zeros, zeros
        logp = torch.log_softmax(logits.mul_(self.knobs[0]), -1)
        p = logp.exp()
        real = slice(self.vocab_size)  # beyond it, 0 times -inf would be NaN
        entropies = -torch.linalg.vecdot(p[:, real], logp[:, real])
        if self.nucleus:
            p = self.keep_nucleus(p)
        ids, logprobs = invert_cdf(p, u)
        return ids, logprobs, entropies

    def keep_nucleus(self, p):
        """p (B, V), with 0 for all but the fewest most likely tokens that together have top_p."""
        sorted_p, order = torch.sort(p, dim=-1, descending=True, stable=True)
        before = sorted_p.cumsum(-1) - sorted_p  # the probability of all more likely tokens
        outside = before >= self.knobs[1]
        outside[:, 0] = False
        unsorted = torch.zeros_like(outside).scatter(-1, order, outside)
        return p.masked_fill(unsorted, 0.0)


def invert_cdf(p, u):
    """Draws a token by the inverse CDF. p (B, V) float32 >= 0, u (B,) -> ids (B,) and
    log-probabilities (B,) of p normalised.

    It draws a block of 128 tokens first, and then a token in this block. With a vocabulary of 152k
    this takes a fiftieth of the time of one cumulative sum."""
    width = 128
    if p.shape[1] % width:
        p = F.pad(p, (0, -p.shape[1] % width))
    blocks = p.unflatten(-1, (-1, width))  # (B, V/128, 128)
    sums = blocks.sum(-1).double()  # (B, V/128)
    block, rest = pick(sums, u)
    rows = torch.arange(len(p), device=p.device)
    inside = blocks[rows, block].double()  # (B, 128)
    token, _ = pick(inside, rest)
    probability = inside[rows, token] / sums.sum(-1)
    return block * width + token, probability.log().float()


def pick(weights, u):
    """weights (B, K) float64 >= 0, u (B,) in [0, 1) -> the index (B,) whose share of [0, 1)
    contains u, and how far u is into this share, again in [0, 1).

    An index of weight 0 is never picked, even where a parallel sum is not quite monotone."""
    cdf = weights.cumsum(-1).masked_fill(weights <= 0, -1.0)
    target = u * cdf.amax(-1)  # below the largest, because u < 1
    above = cdf > target[:, None]
    index = above.to(torch.uint8).argmax(-1, keepdim=True)  # the first one
    upper = cdf.gather(-1, index)[:, 0]
    weight = weights.gather(-1, index)[:, 0]
    rest = 1 - (upper - target) / weight
    return index[:, 0], rest.clamp(0, 1 - 2.0**-53)


def random_numbers(seeds, positions):
    """seeds, positions int64, broadcast -> float64 in [0, 1), with 53 random bits.

    This is a hash and not a generator: it has no state, it is the same on CPU and GPU, and a number
    does not depend on those drawn before it or beside it."""
    bits = splitmix64(splitmix64(seeds) + positions * (0x9E3779B97F4A7C15 - 2**64))
    return ((bits >> 11) & (2**53 - 1)).double() * 2.0**-53


def splitmix64(x):
    """The finalizer of splitmix64 (Steele et al. 2014) on int64. Products wrap as they should, and
    shifts need a mask because int64 is signed."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return x ^ ((x >> 31) & (2**33 - 1))


# ---- 6. Any other model: its own forward and cache -----------------------------------------------


def sample_by_forward(model, rows, rule, end_ids):
    """Fills the rows through the model's own forward, called as generate() calls it: prompts padded
    on the left, and the cache that the model makes for itself. Each prompt is run once, and
    finished rows leave the cache. A model without such a cache runs whole sequences for every
    token."""
    device = model.device
    prompts = list(dict.fromkeys(row.prompt for row in rows))
    ids = pad(prompts, device, "left")
    mask = pad([[1] * len(prompt) for prompt in prompts], device, "left")
    logits, cache = next_logits(model, ids, mask, None)
    if cache is not None:  # give each row a copy of its prompt's
        place = {prompt: i for i, prompt in enumerate(prompts)}
        source = [place[row.prompt] for row in rows]
        source = torch.tensor(source, device=device)
        cache.reorder_cache(source)
        logits, mask = logits[source], mask[source]
    while rows:
        if cache is None:
            logits = recompute_logits(model, rows)
        positions = [len(row.prompt) + len(row.sample.ids) for row in rows]
        seeds = [row.seed for row in rows]
        u = random_numbers(*torch.tensor([seeds, positions], device=device))
        ids, logprobs, entropies = rule.draw(logits, u)
        keep = []
        drawn = zip(rows, ids.tolist(), logprobs.tolist(), entropies.tolist())
        for i, (row, token, logprob, entropy) in enumerate(drawn):
            row.sample.ids.append(token)
            row.sample.logprobs.append(logprob)
            row.sample.entropies.append(entropy)
            if token not in end_ids and len(row.sample.ids) < row.limit:
                keep.append(i)
        rows = [rows[i] for i in keep]
        if rows and cache is not None:
            if len(keep) < len(ids):
                cache.reorder_cache(torch.tensor(keep, device=device))
                ids, mask = ids[keep], mask[keep]
            mask = F.pad(mask, (0, 1), value=1)
            logits, cache = next_logits(model, ids[:, None], mask, cache)


def next_logits(model, ids, mask, cache):
    """ids (B, S), mask (B, all so far) -> logits of the last position (B, V) and the cache, or None
    and None if the model has no cache that can be used here."""
    parameters = inspect.signature(model.forward).parameters
    if "past_key_values" not in parameters or "position_ids" not in parameters:
        return None, None  # without position_ids it might count the padding
    options = {}
    if "logits_to_keep" in parameters:
        options["logits_to_keep"] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    out = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions[:, -ids.shape[1] :],
        past_key_values=cache,
        use_cache=True,
        **options,
    )
    cache = getattr(out, "past_key_values", None)
    if not hasattr(cache, "reorder_cache"):
        return None, None
    return out.logits[:, -1], cache


def recompute_logits(model, rows):
    """Logits of each row's next token (B, V), from whole sequences, padded on the right."""
    sequences = [row.prompt + tuple(row.sample.ids) for row in rows]
    last = [len(sequence) - 1 for sequence in sequences]
    logits = model(input_ids=pad(sequences, model.device)).logits
    return logits[range(len(rows)), last]


# ---- 7. What only a GPU needs --------------------------------------------------------------------
# A decode step launches about a thousand small kernels, and launching them takes longer than
# running them. So the step is recorded once as a CUDA graph, and a replay is a single launch. A
# graph reads and writes fixed addresses, so the cache has its full length from the start and serves
# later calls. Fused functions and joined projections make the kernels fewer and larger.

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256)  # numbers of rows that have a graph
STEPS_PER_LOOK = 16  # the host looks for finished rows this often, so that no token waits for it
CAPACITY = 2048  # minimum tokens per slot, where memory allows: a longer cache needs new graphs

# This turns off cuDNN's attention, here and in the training forward pass; on an H100 torch >= 2.11
# would prefer it. It builds a plan for each new (rows, length), which takes 0.1 s on an H200, and
# never frees it; in torch 2.9 it reads out of bounds.
torch.backends.cuda.enable_cudnn_sdp(False)


def open_fixed_slots(sampler, waiting, rule):
    """The sampler's cache at fixed addresses, with graphs for this rule. The previous cache is used
    again if it is large enough and the weights are at the same addresses (graphs read the weights
    there, so they see updates in place). A new cache is never smaller than the previous one, as far
    as memory and max_rows allow."""
    model = sampler.model
    slots = sampler.slots
    count = min(len(waiting), sampler.max_rows or len(waiting))
    length = max(row.longest() for row in waiting) + sampler.drafts
    addresses = [p.data_ptr() for p in model.parameters()]
    if (
        slots is None
        or sampler.addresses != addresses
        or slots.drafts != sampler.drafts
        or slots.capacity < length
        or sampler.enough_for < count
    ):
        if slots is not None:
            length = max(length, slots.capacity)
            count = max(count, min(len(slots.index), sampler.max_rows or math.inf))
            slots = None  # so that release() can free its memory
        sampler.release()
        length = math.ceil(length / 128) * 128
        room = tokens_that_fit(model, count * length)
        capacity = max(length, min(CAPACITY, room // count // 128 * 128))
        sampler.last_slots = max(1, min(count, room // capacity))
        sampler.addresses = addresses
        sampler.enough_for = count
        if sampler.last_slots < count:
            sampler.enough_for = math.inf  # a new cache could not have more slots
        slots = Slots(model, sampler.is_end, sampler.last_slots, capacity, capacity, sampler.drafts)
        slots.joined = join_projections(model)
        sampler.slots = slots
    elif slots.joined:
        join_projections(model, slots.joined)
    kind = rule.greedy, rule.nucleus
    if kind not in sampler.graphs:
        sampler.graphs[kind] = record(model, slots, rule)
    return slots


def tokens_that_fit(model, wanted):
    """How many tokens' keys and values fit into four fifths of the free GPU memory. Activations get
    the rest."""
    if model.device.type != "cuda":
        return wanted
    layers = model.model.layers
    attn = layers[0].self_attn
    numbers = 2 * len(layers) * attn.config.num_key_value_heads * attn.head_dim
    free, _ = torch.cuda.mem_get_info()
    free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return int(0.8 * free) // (numbers * model.dtype.itemsize)


def record(model, slots, rule):
    """The decode step as CUDA graphs: number of rows -> a function to call. Graphs share one memory
    pool, and the largest is recorded first, so that the others fit into its memory. No row may be
    alive, so that the dry runs change nothing. On a CPU, which only tests use here, the functions
    are not recorded."""
    count = len(slots.index)
    sizes = {*BUCKETS, *range(384, count, 128), count}
    steps = {}
    for rows in sorted(sizes, reverse=True):
        if rows <= count:
            steps[rows] = functools.partial(decode, model, slots, rule, rows)
    if slots.device.type != "cuda":
        return steps
    # These graphs have a stream of their own, because torch >= 2.12 destroys a graph together with
    # the cuBLAS workspaces of its stream, which another sampler's graphs may still use.
    stream = torch.cuda.Stream()
    pool = torch.cuda.graph_pool_handle()
    for rows, step in steps.items():
        step()  # libraries allocate at their first call
        graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL makes CUDA calls in a thread of its own.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            step()
        steps[rows] = graph.replay
    return steps


def replay(slots, steps):
    """Runs up to STEPS_PER_LOOK decode steps, with the smallest graph that covers all live rows."""
    rows = min(size for size in steps if size >= len(slots.rows))
    left = 0  # tokens until every row has reached its limit
    for row, length in zip(slots.rows, slots.lengths):
        left = max(left, row.longest() - length)
    for _ in range(min(STEPS_PER_LOOK, left)):
        steps[rows]()


def flash_takes(device, dtype, head_dim):
    """Whether the flash kernel can run: 16-bit floats, Ampere or newer, a head size that is a
    multiple of 8 up to 256."""
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and head_dim in range(8, 257, 8)
        and torch.cuda.get_device_capability(device)[0] >= 8
    )


def attend_flash(q, keys, values, valid, scale):
    """What `attend_masked` computes, by the FlashAttention that PyTorch ships.

    valid: three int32 tensors: the number of valid positions of each row, its new tokens included
    (B,), read on the device; where each row's queries start, 0, S, ... B S (B + 1,); where its keys
    start, 0, L, ... B L (B + 1,).

    With several queries in a row the mask is causal, and the kernel aligns it at the bottom right:
    query i of S sees `used` - S + i + 1 positions. These end with its own, because the new tokens
    are the last of the `used` ones."""
    used, starts, starts_in_cache = valid
    rows, new = q.shape[:2]
    keys = keys.transpose(1, 2).flatten(0, 1)  # (B * L, kv heads, D), no copy
    values = values.transpose(1, 2).flatten(0, 1)
    out = torch.ops.aten._flash_attention_forward(
        q.flatten(0, 1),
        keys,
        values,
        starts,
        starts_in_cache,
        new,
        len(keys) // rows,
        0.0,
        new > 1,
        False,
        scale=scale,
        seqused_k=used,
    )
    return out[0].view(q.shape)


def fused(function, x, *others):
    """function(x, *others), x (B, S, ...). On a GPU and with small S, torch.compile merges it into
    as few kernels as it can: a kernel takes about 2 microseconds, however little it does."""
    if x.is_cuda and x.shape[1] <= MAX_DRAFTS + 1:
        function = compiled(function)
    return function(x, *others)


@functools.cache
def compiled(function):
    """The compiled function, or the function itself where it cannot be compiled."""
    torch._dynamo.config.suppress_errors = True  # there may be no C compiler
    torch._dynamo.config.recompile_limit = 64
    try:
        return torch.compile(function)
    except RuntimeError:  # this Python is too new for this torch
        return function


def join_projections(model, joined=None):
    """The query, key and value matrices of each layer as one, a list of (weight, bias or None). At
    8 rows the small product for the keys takes as long as the one for the queries, so one product
    for all three is faster.

    joined: what an earlier call returned, to be overwritten with the current weights. Returns None
    if a projection is not a plain Linear, such as an adapter."""
    layers = []
    for i, layer in enumerate(model.model.layers):
        attn = layer.self_attn
        parts = attn.q_proj, attn.k_proj, attn.v_proj
        if any(type(part) is not nn.Linear for part in parts):
            return None
        weight, bias = joined[i] if joined else (None, None)
        weight = torch.cat([part.weight for part in parts], out=weight)
        if attn.q_proj.bias is not None:
            bias = torch.cat([part.bias for part in parts], out=bias)
        layers.append((weight, bias))
    return layers


# ---- 8. Drafts: several tokens in one decode step ------------------------------------------------
# Reading the weights bounds a decode step of a few rows, so several tokens of a row take hardly
# longer than one. We guess the next k tokens of each row (its draft), run them after its last token
# in one pass, and draw a token at each position with the random number of that position. As long as
# the draws equal the draft, they are what the plain sampler draws, and so is the first draw that
# differs. A wrong draft costs time and changes no sample: its keys and values lie past the row's
# end, where the mask hides them until later steps overwrite them.

MAX_DRAFTS = 8
TOKENS_PER_STEP = 64  # rows x (k + 1), as long as a step is bound by memory; not yet measured


def look_up_drafts(slots, rows, k):
    """Guesses the next k tokens of each of the first `rows` slots: (B, k) ids.

    The last three tokens of a row, else its last two, are looked up in all texts with its prompt:
    its own, those of live rows, and those of finished rows whose slots have not been used again.
    The draft is what followed their last occurrence. If there is none, the draft is arbitrary."""
    at = slots.index[:rows, None]
    last = slots.length[:rows, None] - 3 + slots.positions[:3]
    tail = slots.ids[at, last.clamp(min=0)]  # (B, 3)
    # Any three tokens of any slot, and the position of the token that follows them.
    trigrams = slots.ids[:, :-1].unfold(1, 3, 1)  # (slots, W, 3)
    follower = slots.positions[3:]  # (W,)
    equal = trigrams == tail[:, None, None]  # (B, slots, W, 3)
    same_prompt = slots.group == slots.group[:rows, None]  # (B, slots)
    in_text = follower < slots.length[:, None]  # (slots, W)
    found = equal[..., 1] & equal[..., 2] & same_prompt[..., None] & in_text
    rank = follower + len(follower) * equal[..., 0]
    best = (found * rank).flatten(1).argmax(1, keepdim=True)  # (B, 1)
    slot = best // len(follower)
    start = follower[best % len(follower)]
    return slots.ids[slot, start + slots.positions[:k]]


def decode_drafts(model, slots, rule, rows, k):
    """The same as `decode`, but draws between one and k + 1 tokens for each live row."""
    at = slots.index[:rows, None]
    length = slots.length[:rows]
    stop = slots.stop[:rows]
    drafts = look_up_drafts(slots, rows, k)  # (B, k)
    position = length[:, None] + slots.positions[: k + 1]  # of the tokens to draw
    slots.ids[at, position[:, :-1]] = drafts
    hidden = run_on_cache(model, slots, position - 1)  # (B, k + 1, H)
    logits = mm_wide(hidden.flatten(0, 1), model.lm_head.weight.T)
    drawn = rule.draw(logits, slots.uniforms[at, position].flatten())
    ids, logprobs, entropies = (values.view(position.shape) for values in drawn)
    slots.ids[at, position] = ids
    slots.logprobs[at, position] = logprobs
    slots.entropies[at, position] = entropies
    # A draw counts if all earlier ones equal their drafts and end no row.
    goes_on = (ids[:, :-1] == drafts) & ~slots.is_end[drafts]
    count = 1 + goes_on.cumprod(1).sum(1)
    room = stop - length  # below 1 if the row has finished
    length += torch.minimum(count, room).clamp(min=0)
    last = slots.ids[slots.index[:rows], length - 1]
    stop.copy_(torch.where(slots.is_end[last], length, stop))
