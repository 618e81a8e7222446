"""entropy.py against log_softmax and softmax in float64: values, gradients, any block size, every
edge; and engine/outputlayer.py."""

import math

import pytest
import torch
from helpers import random_model
from torch.utils._python_dispatch import TorchDispatchMode

from engine.outputlayer import check_output_layer
from entropy import default_chunk, logprob_entropy, response_entropy

N, H, V = 7, 16, 101
pytestmark = pytest.mark.method


def inputs(dtype=torch.float32, n=N, scale=3.0):
    torch.manual_seed(0)
    hidden = scale * torch.randn(n, H, dtype=torch.float64)
    weight = torch.randn(V, H, dtype=torch.float64)
    targets = torch.randint(0, 90, (n,))
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def reference(hidden, weight, targets, temperature=1.0, vocab_size=None):
    """The same with the logits held whole."""
    logp = (hidden @ weight[:vocab_size].T / temperature).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(1, targets[:, None])[:, 0], entropy


def with_gradients(function, hidden, weight, *args, of_entropy=True, **kwargs):
    """logp, entropy, and the gradients of a loss in which each token has a weight of its own."""
    logp, entropy = function(hidden, weight, *args, **kwargs)
    weights = torch.linspace(-1, 2, len(logp))
    loss = (logp * weights).sum()
    if of_entropy:
        loss = loss + 0.5 * (entropy * weights.flip(0)).sum()
    gradients = torch.autograd.grad(loss, (hidden, weight))
    return [logp, entropy, *gradients]


def ours_and_exact(hidden, weight, targets, *args, entropy_grad=True, chunk=None):
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    exact = with_gradients(reference, *wide, targets, *args, of_entropy=entropy_grad)
    how = dict(entropy_grad=entropy_grad, of_entropy=entropy_grad, chunk=chunk)
    return with_gradients(logprob_entropy, hidden, weight, targets, *args, **how), exact


def check_close(ours, exact, tolerance=1e-5):
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chunk", [1, 2, 13, 50, 100, 101, 1000, None])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_values_and_gradients_equal_float64_at_any_chunk(chunk, temperature):
    for entropy_grad in (False, True):
        how = dict(entropy_grad=entropy_grad, chunk=chunk)
        ours, exact = ours_and_exact(*inputs(), temperature, **how)
        check_close(ours, exact)
        logp, entropy, *_ = ours
        assert logp.dtype == entropy.dtype == torch.float32
        assert logp.requires_grad and entropy.requires_grad == entropy_grad


def test_float64_stays_float64_inside():
    ours, exact = ours_and_exact(*inputs(torch.float64), 0.6, chunk=17)
    assert ours[0].dtype == torch.float32
    check_close(ours[2:], exact[2:], 1e-12)


@pytest.mark.parametrize("chunk", [3, 89, 90, 91, None])
def test_ids_from_vocab_size_on_are_outside_the_distribution(chunk):
    hidden, weight, targets = inputs()
    weight.data[90:] *= 100  # would swallow all probability
    ours, exact = ours_and_exact(hidden, weight, targets, 0.7, 90, chunk=chunk)
    check_close(ours, exact)
    g_weight = ours[3]
    assert (g_weight[90:] == 0).all()
    assert (g_weight[:90] != 0).any(1).all()


@pytest.mark.parametrize("scale", [0.0, 30.0, 1e4])
def test_flat_peaked_and_huge_logits(scale):
    ours, _ = ours_and_exact(*inputs(scale=scale), 0.6, chunk=10)
    logp, entropy, *_ = ours
    assert all(x.isfinite().all() for x in ours)
    assert (logp <= 0).all() and (entropy >= 0).all()
    assert (entropy <= math.log(V) + 1e-5).all()
    if scale == 0:
        torch.testing.assert_close(entropy, torch.full((N,), math.log(V)))
        torch.testing.assert_close(-logp, entropy)


def test_a_target_may_occur_twice_and_rows_do_not_mix():
    hidden, weight, targets = inputs()
    targets[:] = 5
    ours, exact = ours_and_exact(hidden, weight, targets, chunk=4)
    check_close(ours, exact)
    alone = logprob_entropy(hidden[2:3], weight, targets[2:3], chunk=4)
    check_close(alone, (ours[0][2:3], ours[1][2:3]), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    """Against float64 of the same rounded numbers: values as exact as fp32, gradients as exact as
    their own dtype."""
    ours, exact = ours_and_exact(*inputs(dtype, scale=0.1), 0.6, 95, chunk=1)
    check_close(ours[:2], exact[:2])
    for a, b in zip(ours[2:], exact[2:]):
        assert a.dtype == dtype
        assert (a.double() - b).abs().max() < 2 * torch.finfo(dtype).eps * b.abs().max()


def test_the_weight_gradient_of_many_tokens_is_not_rounded_on_the_way():
    """4096 equal tokens: a bf16 running sum would stop growing after a few hundred."""
    hidden = torch.ones(4096, 4, dtype=torch.bfloat16)
    weight = torch.zeros(64, 4, dtype=torch.bfloat16, requires_grad=True)
    logp, _ = logprob_entropy(hidden, weight, torch.zeros(4096, dtype=torch.int64))
    logp.sum().backward()
    for row, expected in enumerate((4096 * 63 / 64, -64.0)):
        assert weight.grad[row].tolist() == pytest.approx([expected] * 4, rel=0.01)


def test_no_tokens():
    ours, _ = ours_and_exact(*inputs(n=0))
    assert [tuple(x.shape) for x in ours] == [(0,), (0,), (0, H), (V, H)]
    assert (ours[3] == 0).all()


def test_only_the_gradients_asked_for():
    hidden, weight, targets = inputs()
    *_, both_hidden, both_weight = with_gradients(
        logprob_entropy, hidden, weight, targets, of_entropy=False
    )
    weights = torch.linspace(-1, 2, N)
    logp, _ = logprob_entropy(hidden, weight.detach(), targets)
    (logp * weights).sum().backward()
    logp, _ = logprob_entropy(hidden.detach(), weight, targets)
    (logp * weights).sum().backward()
    assert torch.equal(hidden.grad, both_hidden) and torch.equal(weight.grad, both_weight)
    logp, _ = logprob_entropy(hidden.detach(), weight.detach(), targets)
    assert not logp.requires_grad


class Largest(TorchDispatchMode):
    """The size of the largest tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.numel())
        return out


def test_never_more_logits_than_a_block():
    hidden = torch.randn(500, 4, requires_grad=True)
    weight = torch.randn(3000, 4, requires_grad=True)
    targets = torch.randint(0, 3000, (500,))
    with Largest() as largest:
        with_gradients(logprob_entropy, hidden, weight, targets, entropy_grad=True, chunk=100)
    assert largest.numbers <= 500 * 100  # all logits are 500 * 3000


def test_the_default_block_is_bounded():
    for n, h in [(0, 8), (64, 128), (2048, 3584), (100_000, 3584)]:
        chunk = default_chunk(torch.empty(n, h, device="meta"))
        assert chunk == 64 or chunk * (n + h) <= 2**22


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(temperature=0), "temperature"),
        (dict(temperature=math.nan), "temperature"),
        (dict(targets=torch.full((N,), V)), "targets"),
        (dict(targets=torch.full((N,), -1)), "targets"),
        (dict(vocab_size=80, targets=torch.full((N,), 80)), "targets"),
        (dict(targets=torch.zeros(N)), "int64"),
        (dict(targets=torch.zeros(N + 1, dtype=torch.int64)), "one per row"),
        (dict(hidden=torch.zeros(N, H + 1)), "H"),
        (dict(hidden=torch.zeros(1, N, H)), "hidden"),
        (dict(hidden=torch.zeros(N, H).bfloat16()), "dtype"),
        (dict(vocab_size=0), "vocab_size"),
        (dict(vocab_size=V + 1), "vocab_size"),
        (dict(chunk=0), "chunk"),
    ],
)
def test_mistakes_are_named(change, sentence):
    arguments = dict(zip(("hidden", "weight", "targets"), inputs()))
    with pytest.raises(ValueError, match=sentence):
        logprob_entropy(**arguments | change)


def test_response_entropy_is_over_a_response_s_own_tokens():
    for entropies, expected in (([2.0, 4.0], 3), ([], 0), ([5.0], 5)):
        assert response_entropy(torch.tensor(entropies)) == expected
    token = torch.tensor([1.0, 2.0], requires_grad=True)
    (response_entropy(token) + response_entropy(token[:0])).backward()
    assert token.grad.tolist() == [0.5, 0.5]


@pytest.mark.cuda
def test_bf16_on_a_gpu():
    hidden, weight, targets = inputs(torch.bfloat16)
    exact = reference(hidden.double(), weight.double(), targets, 0.6, 95)
    on_gpu = [x.detach().cuda() for x in (hidden, weight, targets)]
    ours = logprob_entropy(*on_gpu, 0.6, 95, True, chunk=32)
    check_close([x.cpu() for x in ours], exact, 1e-4)


# --- Output layers ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2", "llama", "qwen3"])
def test_plain_output_layers_are_accepted_and_give_the_model_s_numbers(name):
    model = random_model(name)
    check_output_layer(model)
    ids = torch.arange(10)[None]
    hidden = model.base_model(input_ids=ids).last_hidden_state[0, :-1]
    ours, _ = logprob_entropy(hidden, model.lm_head.weight, ids[0, 1:])
    logits = model(input_ids=ids).logits[0, :-1].double()
    exact = logits.log_softmax(-1).gather(1, ids[0, 1:, None])
    torch.testing.assert_close(ours.double(), exact[:, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name, config, sentence",
    [
        ("gemma2", dict(final_logit_softcapping=30.0), "caps its logits"),
        ("gemma2", dict(final_logit_softcapping=None), ""),
        ("cohere", dict(logit_scale=0.0625), "scale"),
        ("granite", dict(logits_scaling=8.0), "scale"),
        ("granite", dict(logits_scaling=1.0), ""),
    ],
)
def test_output_layers_that_do_more_than_a_product_are_refused(name, config, sentence):
    model = random_model(name, **config)
    if not sentence:
        check_output_layer(model)
        return
    with pytest.raises(ValueError, match=sentence):
        check_output_layer(model)


def test_a_bias_is_refused():
    model = random_model("llama")
    model.lm_head = torch.nn.Linear(64, 96, bias=True)
    with pytest.raises(ValueError, match="bias"):
        check_output_layer(model)
