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
    hidden = hidden.to(dtype).requires_grad_()
    weight = weight.to(dtype).requires_grad_()
    return hidden, weight, targets


def reference(hidden, weight, targets, temperature=1.0, vocab_size=None):
    """The same with the logits held whole."""
    logits = hidden @ weight[:vocab_size].T / temperature
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return logp[range(len(targets)), targets], entropy


def with_gradients(function, hidden, weight, *args, of_entropy=True, **kwargs):
    """logp, entropy, and the gradients of a loss in which each token has a weight of its own."""
    logp, entropy = function(hidden, weight, *args, **kwargs)
    weights = torch.linspace(-1, 2, len(logp))
    loss = (logp * weights).sum()
    if of_entropy:
        weights = 0.5 * weights.flip(0)
        loss = loss + (entropy * weights).sum()
    gradients = torch.autograd.grad(loss, (hidden, weight))
    return [logp, entropy, *gradients]


def ours_and_exact(hidden, weight, targets, *args, entropy_grad=True, chunk=None):
    args = targets, *args
    how = dict(entropy_grad=entropy_grad, of_entropy=entropy_grad, chunk=chunk)
    ours = with_gradients(logprob_entropy, hidden, weight, *args, **how)
    hidden = hidden.detach().double().requires_grad_()
    weight = weight.detach().double().requires_grad_()
    exact = with_gradients(reference, hidden, weight, *args, of_entropy=entropy_grad)
    return ours, exact


def check_close(ours, exact, tolerance=1e-5):
    for a, b in zip(ours, exact, strict=True):
        a, b = a.double(), b.double()
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chunk", [1, 2, 50, 100, 101, 1000, None])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_values_and_gradients_equal_float64_at_any_chunk(chunk, temperature):
    for entropy_grad in (False, True):
        how = dict(entropy_grad=entropy_grad, chunk=chunk)
        call = *inputs(), temperature
        ours, exact = ours_and_exact(*call, **how)
        check_close(ours, exact)
        logp, entropy, *_ = ours
        assert logp.dtype == torch.float32
        assert entropy.dtype == torch.float32
        assert logp.requires_grad
        assert entropy.requires_grad == entropy_grad


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
    used, padding = g_weight[:90], g_weight[90:]
    assert not padding.any()
    assert used.any(1).all()


@pytest.mark.parametrize("scale", [0.0, 30.0, 1e4])
def test_flat_peaked_and_huge_logits(scale):
    ours, _ = ours_and_exact(*inputs(scale=scale), 0.6, chunk=10)
    logp, entropy, *_ = ours
    most = math.log(V)
    for x in ours:
        assert x.isfinite().all()
    assert logp.max() <= 0
    assert entropy.min() >= 0
    assert entropy.max() <= most + 1e-5
    if scale == 0:
        assert entropy.tolist() == pytest.approx([most] * N)
        assert logp.tolist() == pytest.approx([-most] * N)


def test_a_target_may_occur_twice_and_rows_do_not_mix():
    hidden, weight, targets = inputs()
    targets[:] = 5
    ours, exact = ours_and_exact(hidden, weight, targets, chunk=4)
    check_close(ours, exact)
    logp, entropy, *_ = ours
    row = slice(2, 3)
    alone = logprob_entropy(hidden[row], weight, targets[row], chunk=4)
    check_close(alone, [logp[row], entropy[row]], 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    """Against float64 of the same rounded numbers: values as exact as fp32, gradients as exact as
    their own dtype."""
    call = *inputs(dtype, scale=0.1), 0.6, 95
    ours, exact = ours_and_exact(*call, chunk=1)
    check_close(ours[:2], exact[:2])
    for a, b in zip(ours[2:], exact[2:]):
        assert a.dtype == dtype
        error = (a.double() - b).abs().max()
        assert error < 2 * torch.finfo(dtype).eps * b.abs().max()


def test_the_weight_gradient_of_many_tokens_is_not_rounded_on_the_way():
    """4096 equal tokens: a bf16 running sum would stop growing after a few hundred."""
    hidden = torch.ones(4096, 4, dtype=torch.bfloat16)
    weight = torch.zeros(64, 4, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(4096, dtype=torch.int64)
    logp, _ = logprob_entropy(hidden, weight, targets)
    logp.sum().backward()
    of_target, of_another = weight.grad[:2, 0].tolist()
    assert of_target == pytest.approx(4096 * 63 / 64, rel=0.01)
    assert of_another == pytest.approx(-4096 / 64, rel=0.01)


def test_no_tokens():
    ours, exact = ours_and_exact(*inputs(n=0))
    check_close(ours, exact)  # with their shapes
    assert len(ours[0]) == 0


def test_only_the_gradients_asked_for():
    hidden, weight, targets = inputs()
    call = logprob_entropy, hidden, weight, targets
    *_, both_hidden, both_weight = with_gradients(*call, of_entropy=False)
    weights = torch.linspace(-1, 2, N)
    for call in ((hidden, weight.detach()), (hidden.detach(), weight)):
        logp, _ = logprob_entropy(*call, targets)
        loss = (logp * weights).sum()
        loss.backward()
    assert torch.equal(hidden.grad, both_hidden)
    assert torch.equal(weight.grad, both_weight)
    with torch.no_grad():
        logp, _ = logprob_entropy(hidden, weight, targets)
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
    hidden = torch.randn(500, 4)
    weight = torch.randn(3000, 4)
    hidden.requires_grad_()
    weight.requires_grad_()
    targets = torch.arange(500)
    how = dict(entropy_grad=True, chunk=100)
    with Largest() as largest:
        with_gradients(logprob_entropy, hidden, weight, targets, **how)
    assert largest.numbers <= 500 * 100  # all logits are 500 * 3000


def test_the_default_block_is_bounded():
    for n, h in [
        (0, 8),
        (64, 128),
        (2048, 3584),
        (100_000, 3584),
    ]:
        hidden = torch.empty(n, h, device="meta")
        chunk = default_chunk(hidden)
        assert chunk == 64 or chunk * (n + h) <= 2**22


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(temperature=0), "temperature"),
        (dict(temperature=math.nan), "temperature"),
        (dict(targets=torch.full([N], V)), "targets"),
        (dict(targets=torch.full([N], -1)), "targets"),
        (dict(vocab_size=5), "targets"),
        (dict(targets=torch.zeros(N)), "int64"),
        (dict(targets=torch.arange(N + 1)), "one per row"),
        (dict(hidden=torch.zeros(N, H + 1)), "H"),
        (dict(hidden=torch.zeros(N, H).half()), "dtype"),
        (dict(vocab_size=0), "vocab_size"),
        (dict(chunk=0), "chunk"),
    ],
)
def test_mistakes_are_named(change, sentence):
    hidden, weight, targets = inputs()
    call = dict(hidden=hidden, weight=weight, targets=targets)
    with pytest.raises(ValueError, match=sentence):
        logprob_entropy(**call | change)


@pytest.mark.paper
def test_response_entropy_is_the_mean_over_a_response_s_own_tokens():
    tokens = torch.tensor([2.0, 4.0], requires_grad=True)
    P = response_entropy(tokens)
    assert P == 3
    P.backward()
    assert tokens.grad.tolist() == [0.5, 0.5]


def test_the_entropy_of_an_empty_response_is_0():
    assert response_entropy(torch.zeros(0)) == 0


@pytest.mark.cuda
def test_bf16_on_a_gpu():
    hidden, weight, targets = inputs(torch.bfloat16)
    how = 0.6, 95
    exact = reference(hidden.double(), weight.double(), targets, *how)
    on_gpu = [x.detach().cuda() for x in (hidden, weight, targets)]
    ours = logprob_entropy(*on_gpu, *how, chunk=32)
    check_close([x.cpu() for x in ours], exact, 1e-4)


# --- Output layers ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2", "llama", "qwen3"])
def test_plain_output_layers_are_accepted_and_give_the_model_s_numbers(name):
    model = random_model(name)
    check_output_layer(model)
    ids = torch.arange(10)
    hidden = model.base_model(input_ids=ids[None]).last_hidden_state[0]
    ours, _ = logprob_entropy(hidden, model.lm_head.weight, ids)
    logits = model(input_ids=ids[None]).logits[0].double()
    exact = logits.log_softmax(-1).diagonal()
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name, config, sentence",
    [
        ("gemma2", dict(final_logit_softcapping=30.0), "caps its logits"),
        ("recurrent_gemma", dict(attention_window_size=8), "logits_soft_cap"),
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
