"""
Log-probabilities and entropies of given tokens, straight from hidden states: the logits are never held whole.

A vocabulary of 152k makes the logits of 2048 tokens 1.2 GB in fp32, and autograd keeps several copies of them. Here
the output matrix is taken in blocks of vocabulary entries. The forward pass keeps two numbers per token, the log of
the softmax's denominator and the entropy; the backward pass makes each block of logits again. Blocks of the
vocabulary, rather than of tokens, mean that each row of the weight gradient comes out of a single matrix product over
all tokens: it is summed in fp32 and rounded once, so a bf16 model needs no fp32 copy of a 152k x 3584 gradient.

The entropy is the token entropy H_t of the paper, H_t = -sum_v p_t(v) log p_t(v) with p_t = softmax(z_t / T) in nats,
and `mean_entropy` is its Eq. 3.

Cost: four matrix products of tokens x vocabulary x hidden (logits, logits again, two gradients) against three in
plain autograd, and far fewer passes over memory. By tests/bench_entropy.py, with 2048 tokens x 151,936 in fp32 on one
CPU core and hidden size 256, it is 2.1x as fast as log_softmax with autograd and needs 73x less memory beyond the
gradients. The fourth product weighs more as the hidden size grows: at 896 it is 1.2x as fast, with 50x less memory.
Not measured on a GPU.

Tried and left out: the "fused" form, which makes the gradient in the forward pass and needs three products. It has to
know each token's factor in the loss beforehand, so it fits only one update per rollout with entropies known by then;
and it must go through the tokens in blocks and add up the weight's gradient in fp32. It took 9.1 s where this takes
9.3 (hidden size 256, blocks of 256 tokens), with 5 times the memory.
"""
import torch
from torch.autograd.function import once_differentiable


def logprob_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0,
                    vocab_size: int | None = None, entropy_grad: bool = False,
                    chunk: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Log-probability of each target and entropy of the whole distribution softmax(hidden @ weight.T / temperature).

    hidden (N, H) and weight (V, H) are the output layer's input and matrix, targets (N,) the token ids. Only real
    positions belong here: whoever has padding leaves it out. Returns logp (N,) and entropy (N,), float32, in nats.
    Both are differentiable in hidden and weight, but the entropy only with `entropy_grad`.

    Ids >= vocab_size pad the matrix and are outside the distribution: probability 0, gradient 0. `chunk` is the number
    of vocabulary entries taken at a time (any gives the same numbers); by default it fits a fixed amount of memory.
    bf16 inputs are multiplied as bf16, summed in fp32, and everything after that is fp32.

    Raises ValueError for shapes, dtypes, targets, vocab_size, temperature or chunk that make no sense.
    """
    vocab_size = weight.shape[0] if vocab_size is None else vocab_size
    _check(hidden, weight, targets, temperature, vocab_size, chunk)
    chunk = chunk or default_chunk(hidden)
    return _LogprobEntropy.apply(hidden, weight, targets, temperature, vocab_size, entropy_grad, chunk)


def mean_entropy(entropies: list[torch.Tensor]) -> torch.Tensor:
    """
    Entropy P_i of each response (Eq. 3): the mean over its own tokens. From B tensors (T_i,) to (B,), float32.
    A response without tokens has entropy 0.
    """
    if not entropies:
        return torch.zeros(0)
    return torch.stack([e.float().sum() / max(len(e), 1) for e in entropies])


@torch.no_grad()
def check_output_layer(model: torch.nn.Module) -> None:
    """
    Raises ValueError unless the model's logits are hidden @ weight.T and nothing else, which `logprob_entropy` takes
    for granted: no bias, no soft cap (Gemma 2), no scale (Cohere, Granite). The model must be in eval mode.

    A soft cap is looked up in the config, because it hardly shows in small logits; everything else is found by
    comparing the model's own logits of a few tokens with the product.
    """
    name, head = type(model).__name__, model.get_output_embeddings()
    if head is None or not hasattr(head, "weight"):
        raise ValueError(f"{name} has no output matrix; take a causal language model.")
    if getattr(head, "bias", None) is not None:
        raise ValueError(f"The output layer of {name} has a bias, which entropy.py does not add; take another model.")
    for cap in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):     # Gemma, Griffin, xLSTM
        if getattr(model.config.get_text_config(), cap, None):
            raise ValueError(f"{name} caps its logits ({cap} in its config), which entropy.py does not do; take "
                             "another model.")
    ids = torch.arange(4, device=head.weight.device)[None]                          # (1, 4)
    logits = model(input_ids=ids).logits.float()
    product = _mm(model.base_model(input_ids=ids).last_hidden_state[0], head.weight.T)
    if (logits[0] - product).abs().max() > 0.02 * product.abs().max():      # bf16 logits are within 0.4%
        raise ValueError(f"The logits of {name} are not the last hidden state times the output matrix (some models "
                         "scale them), which entropy.py takes for granted; take another model.")


def default_chunk(hidden: torch.Tensor) -> int:
    """
    Vocabulary entries per block: small enough for the cache on a CPU, large enough to fill a GPU. A multiple of 64,
    because matrix products are a third slower where the rows of a block are not aligned.
    """
    budget = 2 ** 26 if hidden.is_cuda else 2 ** 22     # numbers in a block of logits and its part of the gradient
    return max(1, budget // max(sum(hidden.shape), 1) // 64) * 64


class _LogprobEntropy(torch.autograd.Function):

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, vocab_size, entropy_grad, chunk):
        blocks, target_logit = _blocks(vocab_size, chunk), hidden.new_zeros(len(targets), dtype=_wide(hidden))
        # Made before the loop: small tensors that stayed behind between the large ones would tear holes in the heap.
        blocks_logz, blocks_entropy = target_logit.new_empty(2, len(blocks), len(targets))
        for i, block in enumerate(blocks):
            logits = _mm(hidden, weight[block].T, 1 / temperature)                                  # (N, chunk)
            index, inside = _position(targets, block)
            target_logit += logits.gather(1, index[:, None])[:, 0] * inside
            top = logits.amax(1)
            p = logits.sub_(top[:, None]).exp()                 # not yet divided by its sum
            total = p.sum(1)
            blocks_logz[i] = top + total.log()
            blocks_entropy[i] = total.log() - p.mul_(logits).sum(1) / total
        logz = blocks_logz.logsumexp(0)                                                             # (N,)
        # H = H(which block) + the mean of the blocks' entropies, the chain rule of entropy.
        logp_block = blocks_logz - logz
        entropy = (logp_block.exp() * (blocks_entropy - logp_block)).sum(0).clamp_(min=0)
        ctx.save_for_backward(hidden, weight, targets, logz, entropy)
        ctx.temperature, ctx.vocab_size, ctx.chunk, ctx.entropy_grad = temperature, vocab_size, chunk, entropy_grad
        out = (target_logit - logz).clamp_(max=0).float(), entropy.float()
        if not entropy_grad:
            ctx.mark_non_differentiable(out[1])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, g_logp, g_entropy):                                                           # (N,), (N,)
        hidden, weight, targets, logz, entropy = ctx.saved_tensors
        g_logp, g_entropy = (g.to(logz.dtype) / ctx.temperature for g in (g_logp, g_entropy))       # of the raw logits
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        g_hidden = torch.zeros_like(hidden, dtype=_wide(hidden)) if want_hidden else None
        g_weight = torch.empty_like(weight) if want_weight else None
        if want_weight:
            g_weight[ctx.vocab_size:] = 0
        for block in _blocks(ctx.vocab_size, ctx.chunk):
            logp = _mm(hidden, weight[block].T, 1 / ctx.temperature).sub_(logz[:, None])            # (N, chunk)
            # d logp / dz = 1[target] - p;   d entropy / dz = -p (log p + H)
            slope = -g_logp[:, None]
            if ctx.entropy_grad:
                slope = slope - g_entropy[:, None] * (logp + entropy[:, None])
            g_logits = logp.exp_().mul_(slope)
            index, inside = _position(targets, block)
            g_logits.scatter_add_(1, index[:, None], (g_logp * inside)[:, None])
            g_logits = g_logits.to(hidden.dtype)
            if want_hidden:
                g_hidden += _mm(g_logits, weight[block])
            if want_weight:
                g_weight[block] = _mm(g_logits.T, hidden)
        return g_hidden if g_hidden is None else g_hidden.to(hidden.dtype), g_weight, None, None, None, None, None


def _blocks(vocab_size: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, vocab_size)) for start in range(0, vocab_size, chunk)]


def _position(targets: torch.Tensor, block: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each target (N,) is within the block, and whether it is there at all (if not, the index means nothing)."""
    inside = (targets >= block.start) & (targets < block.stop)
    return (targets - block.start) * inside, inside


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _mm(a: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """scale * a @ b, summed in fp32 and not rounded to bf16 at the end."""
    if a.is_cuda and a.dtype != _wide(a):
        return torch.mm(a, b, out_dtype=torch.float32).mul_(scale)
    a, b = a.to(_wide(a)), b.to(_wide(b))                                   # a CPU has no product of bf16 into fp32
    return torch.addmm(a.new_empty(1), a, b, beta=0, alpha=scale)           # beta = 0: the first is not even read


def _check(hidden, weight, targets, temperature, vocab_size, chunk) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden must be (N, H) and weight (V, H), not {tuple(hidden.shape)} and "
                         f"{tuple(weight.shape)}.")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must be ({len(hidden)},), one per row of hidden, not {tuple(targets.shape)}.")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden and weight must share a floating-point dtype, not {hidden.dtype} and {weight.dtype}.")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64 token ids, not {targets.dtype}.")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}.")
    if not 0 < vocab_size <= len(weight):
        raise ValueError(f"vocab_size must be between 1 and the {len(weight)} rows of weight, not {vocab_size}.")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, not {chunk}.")
    if len(targets) and not 0 <= targets.min() <= targets.max() < vocab_size:
        raise ValueError(f"targets must be between 0 and {vocab_size - 1}; they reach from {targets.min()} to "
                         f"{targets.max()}.")
