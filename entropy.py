"""Log-probabilities and entropies of given tokens, from hidden states, without holding the logits.

With a vocabulary of 152k, the logits of 2048 tokens are 1.2 GB in fp32, and autograd keeps several
copies of them. So the output matrix is processed in blocks of vocabulary entries:

    forward     from each block's logits, keep two numbers per token: log Z (the log of the sum of
                exp(logits)) and the entropy within the block. At the end, combine those of all
                blocks.
    backward    compute each block's logits again, and from them its part of the gradients.

Because the blocks split the vocabulary and not the tokens, one matrix product over all tokens gives
finished rows of the weight's gradient. They are summed in fp32 and rounded to bf16 once, so no fp32
copy of a 152k x 3584 gradient is needed.

The entropy is the paper's token entropy H_t = -sum_v p_t(v) log p_t(v) with p_t = softmax(z_t / T),
in nats, and `response_entropy` is its Eq. 3. tests/bench_entropy.py measures time and memory.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def logprob_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    entropy_grad: bool = False,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of softmax(hidden @ weight.T / temperature).

    hidden (N, H) and weight (V, H) are the output layer's input and matrix, targets (N,) the token
    ids. Pass real tokens only, no padding. Returns logp (N,) and entropy (N,), float32, in nats.
    logp is differentiable in hidden and weight, entropy only with `entropy_grad`.

    vocab_size: the rows of weight beyond it are padding, with probability 0 and gradient 0.
    chunk: vocabulary entries per block, which changes results only by rounding; by default a block
        fits a fixed amount of memory.

    bf16 inputs are multiplied as bf16 and summed in fp32; everything after that is fp32.

    Raises ValueError if shapes, dtypes, targets, vocab_size, temperature or chunk are invalid.
    Targets on a GPU are not checked, because that would wait for the GPU: check them beforehand."""
    if vocab_size is None:
        vocab_size = len(weight)
    if chunk is None:
        chunk = default_chunk(hidden)
    _check(hidden, weight, targets, temperature, vocab_size, chunk)
    return _LogprobEntropy.apply(
        hidden, weight, targets, temperature, vocab_size, entropy_grad, chunk
    )


def response_entropy(entropies: Tensor) -> Tensor:
    """P_i of Eq. 3 for one response: 1/|o_i| sum_t H_t over all of its tokens, injected ones too.
    (T,) -> scalar, float32; 0 if T = 0. Every P in this project is computed here."""
    return entropies.float().sum() / max(len(entropies), 1)


def default_chunk(hidden: Tensor) -> int:
    """Vocabulary entries per block: on a CPU few enough for its cache, on a GPU enough to keep it
    busy. It is a multiple of 64: with unaligned rows a matrix product takes a third longer."""
    numbers = 2**26 if hidden.is_cuda else 2**22  # that a block may hold
    entries = numbers // max(sum(hidden.shape), 1)  # an entry: N logits, H numbers of the gradient
    return max(1, entries // 64) * 64


class _LogprobEntropy(torch.autograd.Function):
    """With logits z (N, V) divided by T, Z = sum_v exp(z_v), p = exp(z) / Z, and v the target:

    log p_v = z_v - log Z           its gradient: d log p_v / dz = 1[target] - p
    H = -sum_v p_v log p_v          its gradient: dH / dz = -p (log p + H)
    H = H(block) + E_block[H(token | block)], for the sum over blocks of the vocabulary
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, vocab_size, entropy_grad, chunk):
        blocks = _blocks(vocab_size, chunk, weight)
        dtype = _wide(hidden)
        target_logit = torch.zeros_like(targets, dtype=dtype)
        # Allocated before the loop: small tensors between large ones would fragment the heap.
        blocks_logz = target_logit.new_empty(len(blocks), len(targets))
        blocks_entropy = torch.empty_like(blocks_logz)
        for i, (start, stop, end) in enumerate(blocks):
            logits = mm_wide(hidden, weight[start:end].T)[:, : stop - start]
            index, inside = _position(targets, start, stop)
            of_target = logits.gather(1, index[:, None])[:, 0]
            target_logit += of_target * inside
            # Divide by T and subtract the largest, in place.
            top = logits.amax(1) / temperature
            torch.add(-top[:, None], logits, alpha=1 / temperature, out=logits)
            exp_logits = logits.exp()
            Z = exp_logits.sum(1)
            blocks_logz[i] = top + Z.log()
            mean_logit = exp_logits.mul_(logits).sum(1) / Z
            blocks_entropy[i] = Z.log() - mean_logit
        logz = blocks_logz.logsumexp(0)  # (N,)
        # H = H(block) + E_block[H(token | block)]
        logp_block = blocks_logz - logz
        entropy = (logp_block.exp() * (blocks_entropy - logp_block)).sum(0)
        entropy.clamp_(min=0)
        logp = (target_logit / temperature - logz).clamp_(max=0)
        ctx.save_for_backward(hidden, weight, targets, logz, entropy)
        ctx.temperature = temperature
        ctx.vocab_size = vocab_size
        ctx.entropy_grad = entropy_grad
        ctx.chunk = chunk
        logp = logp.float()
        entropy = entropy.float()
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, g_logp, g_entropy):
        hidden, weight, targets, logz, entropy = ctx.saved_tensors
        # The chain rule through logits / T: from here on, gradients are of the undivided logits.
        g_logp = g_logp.to(logz.dtype) / ctx.temperature
        g_entropy = g_entropy.to(logz.dtype) / ctx.temperature
        g_hidden = g_weight = None
        if ctx.needs_input_grad[0]:
            g_hidden = torch.zeros_like(hidden, dtype=_wide(hidden))
        if ctx.needs_input_grad[1]:
            g_weight = torch.empty_like(weight)
            g_weight[ctx.vocab_size :] = 0
        for start, stop, end in _blocks(ctx.vocab_size, ctx.chunk, weight):
            # One piece of memory: first the logits of the block, then log p, then the gradient.
            block = mm_wide(hidden, weight[start:end].T)
            block[:, stop - start :] = 0  # padding rows of the matrix have no gradient
            logp = block[:, : stop - start]
            torch.add(-logz[:, None], logp, alpha=1 / ctx.temperature, out=logp)
            slope = -g_logp[:, None]
            if ctx.entropy_grad:
                slope = slope - g_entropy[:, None] * (logp + entropy[:, None])
            logp.exp_().mul_(slope)  # the terms with p
            index, inside = _position(targets, start, stop)
            of_target = g_logp * inside
            logp.scatter_add_(1, index[:, None], of_target[:, None])  # the term 1[target]
            g_logits = block.to(hidden.dtype)
            if g_hidden is not None:
                g_hidden += mm_wide(g_logits, weight[start:end])
            if g_weight is not None:
                g_weight[start:end] = mm_wide(g_logits.T, hidden)
        if g_hidden is not None:
            g_hidden = g_hidden.to(hidden.dtype)
        return g_hidden, g_weight, None, None, None, None, None


def _blocks(vocab_size: int, chunk: int, weight: Tensor) -> list[tuple[int, int, int]]:
    """(start, stop, end) of each block: its vocabulary entries are start:stop, the rows of the
    matrix that are multiplied start:end. Only in the last block may end be larger: it takes padding
    rows along, to a multiple of 64 if there are enough, because an aligned product is faster."""
    blocks = []
    for start in range(0, vocab_size, chunk):
        stop = min(start + chunk, vocab_size)
        blocks.append((start, stop, stop))
    start, stop, _ = blocks[-1]
    aligned = start + -(-(stop - start) // 64) * 64
    blocks[-1] = start, stop, min(aligned, len(weight))
    return blocks


def _position(targets: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """The index (N,) of each target within the block, 0 if it is in another block, and whether it
    is in this one (N,)."""
    inside = (targets >= start) & (targets < stop)
    return (targets - start) * inside, inside


def _wide(x: Tensor) -> torch.dtype:
    """The dtype of sums: fp32, or fp64 for fp64 inputs."""
    return torch.promote_types(x.dtype, torch.float32)


def mm_wide(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of two matrices, summed in fp32 and not rounded to bf16 at the end.

    The sampler and the training forward pass both compute their logits here. Rounding these to bf16
    would change a log-probability by 0.03 on average at T = 0.6."""
    wide = _wide(a)
    if a.is_cuda and a.dtype != wide:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.to(wide), b.to(wide))  # a CPU has no product of bf16 into fp32


def _check(hidden, weight, targets, temperature, vocab_size, chunk) -> None:
    shapes = [tuple(t.shape) for t in (hidden, weight, targets)]
    fits = [len(shape) for shape in shapes] == [2, 2, 1]
    if not fits or shapes[0] != (len(targets), weight.shape[1]):
        raise ValueError(
            "hidden must be (N, H), weight (V, H) and targets (N,), one per row of hidden, not "
            f"{shapes[0]}, {shapes[1]}, {shapes[2]}."
        )
    dtypes = [t.dtype for t in (hidden, weight, targets)]
    if dtypes != [weight.dtype, weight.dtype, torch.int64] or not weight.is_floating_point():
        raise ValueError(
            "hidden and weight must share a floating-point dtype, and targets be int64, not "
            f"{dtypes}."
        )
    if not (temperature > 0 and 0 < vocab_size <= len(weight) and chunk > 0):
        raise ValueError(
            f"temperature must be above 0, vocab_size between 1 and the {len(weight)} rows of "
            f"weight, and chunk at least 1, not {temperature}, {vocab_size} and {chunk}."
        )
    if targets.is_cuda or len(targets) == 0:
        return
    if targets.min() < 0 or targets.max() >= vocab_size:
        raise ValueError(
            f"targets must be between 0 and {vocab_size - 1}; they reach from {targets.min()} to "
            f"{targets.max()}."
        )
