"""Log-probabilities and entropies of given tokens, straight from hidden states: the logits are never held whole.

A vocabulary of 152k makes the logits of 2048 tokens 1.2 GB in fp32, and autograd keeps several copies of them. Here
the output matrix is taken in blocks of vocabulary entries. The forward pass keeps two numbers per token, the log of
the softmax's denominator and the entropy; the backward pass makes each block of logits again. Blocks of the
vocabulary, rather than of tokens, mean that each row of the weight gradient comes out of a single matrix product over
all tokens: it is summed in fp32 and rounded once, so a bf16 model needs no fp32 copy of a 152k x 3584 gradient.

The entropy is the token entropy H_t of the paper, H_t = -sum_v p_t(v) log p_t(v) with p_t = softmax(z_t / T) in nats,
and `mean_entropy` is its Eq. 3. tests/bench_entropy.py says what it costs.
"""

import torch
from torch.autograd.function import once_differentiable


def logprob_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    entropy_grad: bool = False,
    chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target and entropy of the whole distribution softmax(hidden @ weight.T / temperature).

    hidden (N, H) and weight (V, H) are the output layer's input and matrix, targets (N,) the token ids. Only real
    positions belong here: whoever has padding leaves it out. Returns logp (N,) and entropy (N,), float32, in nats.
    Both are differentiable in hidden and weight, but the entropy only with `entropy_grad`.

    Ids >= vocab_size pad the matrix and are outside the distribution: probability 0, gradient 0. `chunk` is the number
    of vocabulary entries taken at a time (any gives the same numbers); by default it fits a fixed amount of memory.
    bf16 inputs are multiplied as bf16, summed in fp32, and everything after that is fp32.

    Raises ValueError for shapes, dtypes, targets, vocab_size, temperature or chunk that make no sense; targets on a GPU
    are not looked at, since every look would wait for it, and must have been checked where they were made."""
    vocab_size = weight.shape[0] if vocab_size is None else vocab_size
    chunk = default_chunk(hidden) if chunk is None else chunk
    _check(hidden, weight, targets, temperature, vocab_size, chunk)
    return _LogprobEntropy.apply(
        hidden, weight, targets, temperature, vocab_size, entropy_grad, chunk
    )


def mean_entropy(entropies: list[torch.Tensor]) -> torch.Tensor:
    """Entropy P_i of each response (Eq. 3): the mean over its own tokens; 0 if it has none. (T_i,) each -> (B,)."""
    means = [e.float().sum() / max(len(e), 1) for e in entropies]
    return torch.stack(means) if means else torch.zeros(0)


SOFT_CAPS = (
    "final_logit_softcapping",
    "logits_soft_cap",
    "output_logit_soft_cap",
)  # Gemma, Griffin, xLSTM


@torch.no_grad()
def check_output_layer(model: torch.nn.Module) -> None:
    """Raises ValueError unless the model's logits are hidden @ weight.T and nothing else, which `logprob_entropy` takes
    for granted: no bias, no soft cap (Gemma 2; it hardly shows in small logits, so the config is asked), no scale
    (Cohere, Granite; found by comparing the logits of a few tokens). The model must be in eval mode."""
    head = model.get_output_embeddings()
    if getattr(head, "weight", None) is None:
        why = "it has no output matrix"
    elif getattr(head, "bias", None) is not None:
        why = "its output layer has a bias"
    elif caps := [
        name for name in SOFT_CAPS if getattr(model.config.get_text_config(), name, None)
    ]:
        why = f"it caps its logits ({caps[0]} in its config)"
    else:
        ids = torch.arange(4, device=head.weight.device)[None]  # (1, 4)
        product = mm_wide(model.base_model(input_ids=ids).last_hidden_state[0], head.weight.T)
        gap = (model(input_ids=ids).logits[0] - product).abs().max()
        if not gap > 0.02 * product.abs().max():  # bf16 logits are within 0.4%
            return
        why = "some models scale them"
    raise ValueError(
        f"The logits of {type(model).__name__} are not the last hidden state times the output matrix, "
        f"which entropy.py takes for granted: {why}; take another model."
    )


def default_chunk(hidden: torch.Tensor) -> int:
    """Vocabulary entries per block: small enough for the cache on a CPU, large enough to fill a GPU. A multiple of 64,
    because matrix products are a third slower where the rows of a block are not aligned."""
    budget = (
        2**26 if hidden.is_cuda else 2**22
    )  # numbers in a block of logits and its part of the gradient
    return max(1, budget // max(sum(hidden.shape), 1) // 64) * 64


class _LogprobEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, vocab_size, entropy_grad, chunk):
        blocks = _blocks(vocab_size, chunk, weight)
        target_logit = torch.zeros_like(targets, dtype=_wide(hidden))
        # Made before the loop: small tensors that stayed behind between the large ones would tear holes in the heap.
        blocks_logz, blocks_entropy = target_logit.new_empty(2, len(blocks), len(targets))
        for i, (start, stop, end) in enumerate(blocks):
            logits = mm_wide(hidden, weight[start:end].T)[:, : stop - start]  # not yet divided by T
            index, inside = _position(targets, start, stop)
            target_logit += logits.gather(1, index[:, None])[:, 0] * inside
            top = logits.amax(1) / temperature
            torch.add(-top[:, None], logits, alpha=1 / temperature, out=logits)
            p = logits.exp()  # nor by its sum
            total = p.sum(1)
            blocks_logz[i] = top + total.log()
            blocks_entropy[i] = total.log() - p.mul_(logits).sum(1) / total
        logz = blocks_logz.logsumexp(0)  # (N,)
        # H = H(which block) + the mean of the blocks' entropies, the chain rule of entropy.
        logp_block = blocks_logz - logz
        entropy = (logp_block.exp() * (blocks_entropy - logp_block)).sum(0).clamp_(min=0)
        ctx.save_for_backward(hidden, weight, targets, logz, entropy)
        ctx.temperature, ctx.vocab_size, ctx.chunk, ctx.entropy_grad = (
            temperature,
            vocab_size,
            chunk,
            entropy_grad,
        )
        out = (target_logit / temperature - logz).clamp_(max=0).float(), entropy.float()
        if not entropy_grad:
            ctx.mark_non_differentiable(out[1])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, g_logp, g_entropy):  # (N,), (N,)
        hidden, weight, targets, logz, entropy = ctx.saved_tensors
        g_logp, g_entropy = (
            g.to(logz.dtype) / ctx.temperature for g in (g_logp, g_entropy)
        )  # of the raw logits
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        g_hidden = torch.zeros_like(hidden, dtype=_wide(hidden)) if want_hidden else None
        g_weight = torch.empty_like(weight) if want_weight else None
        if want_weight:
            g_weight[ctx.vocab_size :] = 0
        for start, stop, end in _blocks(ctx.vocab_size, ctx.chunk, weight):
            block = mm_wide(hidden, weight[start:end].T)
            logp = block[:, : stop - start]
            torch.add(-logz[:, None], logp, alpha=1 / ctx.temperature, out=logp)
            # d logp / dz = 1[target] - p;   d entropy / dz = -p (log p + H)
            slope = -g_logp[:, None]
            if ctx.entropy_grad:
                slope = slope - g_entropy[:, None] * (logp + entropy[:, None])
            g_logits = logp.exp_().mul_(slope)
            index, inside = _position(targets, start, stop)
            g_logits.scatter_add_(1, index[:, None], (g_logp * inside)[:, None])
            block[:, stop - start :] = 0  # rows of no token have no gradient
            block = block.to(hidden.dtype)
            if want_hidden:
                g_hidden += mm_wide(block, weight[start:end])
            if want_weight:
                g_weight[start:end] = mm_wide(block.T, hidden)
        return (
            g_hidden if g_hidden is None else g_hidden.to(hidden.dtype),
            g_weight,
            None,
            None,
            None,
            None,
            None,
        )


def _blocks(vocab_size: int, chunk: int, weight: torch.Tensor) -> list[tuple[int, int, int]]:
    """(start, stop, end) of each block: start to stop are tokens, and start to end the rows of the matrix that are
    multiplied. The last block is filled up with rows of no token, where there are some, for the sake of alignment."""
    stops = [min(start + chunk, vocab_size) for start in range(0, vocab_size, chunk)]
    aligned = min(stops[-1] + (range(0, vocab_size, chunk)[-1] - vocab_size) % 64, len(weight))
    return list(zip(range(0, vocab_size, chunk), stops, [*stops[:-1], aligned]))


def _position(targets: torch.Tensor, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each target (N,) is within the block, and whether it is there at all (if not, the index means nothing)."""
    inside = (targets >= start) & (targets < stop)
    return (targets - start) * inside, inside


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def mm_wide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b of two matrices, summed in fp32 and not rounded to bf16 at the end. The sampler's logits and those of the
    training forward both come from here: rounded ones would move a log-probability by 0.03 on average at T = 0.6."""
    if a.is_cuda and a.dtype != _wide(a):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.to(_wide(a)), b.to(_wide(b)))  # a CPU has no product of bf16 into fp32


def _check(hidden, weight, targets, temperature, vocab_size, chunk) -> None:
    shapes, dtypes = (
        [getattr(t, what) for t in (hidden, weight, targets)] for what in ("shape", "dtype")
    )
    if [len(shape) for shape in shapes] != [2, 2, 1] or shapes[0] != (
        len(targets),
        weight.shape[1],
    ):
        raise ValueError(
            "hidden must be (N, H), weight (V, H) and targets (N,), one per row of hidden, not "
            f"{', '.join(str(tuple(shape)) for shape in shapes)}."
        )
    if dtypes != [weight.dtype, weight.dtype, torch.int64] or not weight.is_floating_point():
        raise ValueError(
            f"hidden and weight must share a floating-point dtype, and targets be int64, not {dtypes}."
        )
    if not (temperature > 0 and 0 < vocab_size <= len(weight) and chunk > 0):
        raise ValueError(
            f"temperature must be above 0, vocab_size between 1 and the {len(weight)} rows of weight, and "
            f"chunk at least 1, not {temperature}, {vocab_size} and {chunk}."
        )
    if (
        len(targets)
        and not targets.is_cuda
        and not 0 <= targets.min() <= targets.max() < vocab_size
    ):
        raise ValueError(
            f"targets must be between 0 and {vocab_size - 1}; they reach from {targets.min()} to "
            f"{targets.max()}."
        )
