"""entropy.py against log_softmax and softmax in float64: values, gradients, any block size, every
edge."""

import pytest
import torch

from engine.outputlayer import check_output_layer
from entropy import default_chunk, logprob_entropy, response_entropy

N, H, V = 7, 16, 101
pytestmark = pytest.mark.method


def inputs(dtype=torch.float32, n=N, scale=3.0, seed=0):
    torch.manual_seed(seed)
    hidden = (torch.randn(n, H, dtype=torch.float64) * scale).to(dtype).requires_grad_()
    weight = torch.randn(V, H, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, 90, (n,))


def reference(hidden, weight, targets, temperature, vocab_size=None):
    """The same in float64 with the logits held whole; hidden and weight are float64 leaves."""
    logp = (hidden @ weight[:vocab_size].T / temperature).log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def gradients(function, hidden, weight, *args, g_entropy=0.5, **kwargs):
    """Values of function and its gradients for a loss with other weights for each token."""
    logp, entropy = function(hidden, weight, *args, **kwargs)
    weights = torch.linspace(-1, 2, len(logp))
    loss = (logp * weights).sum()
    if g_entropy:
        loss = loss + g_entropy * (entropy * weights.flip(0)).sum()
    return logp, entropy, *torch.autograd.grad(loss, (hidden, weight))


def assert_equal(got, want, tolerance=1e-5):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chunk", [1, 2, 13, 50, 100, 101, 1000, None])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_values_and_gradients_equal_float64_at_any_chunk(chunk, temperature):
    hidden, weight, targets = inputs()
    exact = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    for entropy_grad in (False, True):
        got = gradients(
            logprob_entropy,
            hidden,
            weight,
            targets,
            temperature,
            entropy_grad=entropy_grad,
            chunk=chunk,
            g_entropy=0.5 * entropy_grad,
        )
        assert_equal(
            got, gradients(reference, *exact, targets, temperature, g_entropy=0.5 * entropy_grad)
        )
        assert got[0].dtype == got[1].dtype == torch.float32 and got[0].shape == got[1].shape == (
            N,
        )
        assert got[0].requires_grad and got[1].requires_grad == entropy_grad


def test_float64_stays_float64_inside():
    hidden, weight, targets = inputs(torch.float64)
    got = gradients(logprob_entropy, hidden, weight, targets, 0.6, entropy_grad=True, chunk=17)
    want = gradients(reference, hidden, weight, targets, 0.6)
    assert got[0].dtype == got[1].dtype == torch.float32
    assert_equal(got[2:], want[2:], 1e-12)


@pytest.mark.parametrize("chunk", [3, 89, 90, 91, None])
def test_ids_from_vocab_size_on_are_outside_the_distribution(chunk):
    hidden, weight, targets = inputs()
    with torch.no_grad():
        weight[90:] *= 100  # would swallow all probability
    exact = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    got = gradients(logprob_entropy, hidden, weight, targets, 0.7, 90, True, chunk=chunk)
    assert_equal(got, gradients(reference, *exact, targets, 0.7, 90))
    assert (got[3][90:] == 0).all() and (got[3][:90] != 0).any(1).all()


@pytest.mark.parametrize("scale", [0.0, 30.0, 1e4])
def test_flat_peaked_and_huge_logits(scale):
    hidden, weight, targets = inputs(scale=scale)
    logp, entropy, g_hidden, g_weight = gradients(
        logprob_entropy, hidden, weight, targets, 0.6, None, True, chunk=10
    )
    assert all(x.isfinite().all() for x in (logp, entropy, g_hidden, g_weight))
    assert (
        (logp <= 0).all()
        and (entropy >= 0).all()
        and (entropy <= torch.tensor(float(V)).log() + 1e-5).all()
    )
    if scale == 0:
        torch.testing.assert_close(entropy, torch.full((N,), float(V)).log())
        torch.testing.assert_close(-logp, entropy)


def test_a_target_may_occur_twice_and_rows_do_not_mix():
    hidden, weight, targets = inputs()
    targets[:] = 5
    exact = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    got = gradients(logprob_entropy, hidden, weight, targets, chunk=4, entropy_grad=True)
    assert_equal(got, gradients(reference, *exact, targets, 1.0))
    alone = logprob_entropy(hidden[2:3], weight, targets[2:3], chunk=4)
    assert_equal(alone, (got[0][2:3], got[1][2:3]), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    """Against float64 of the same rounded numbers: values as exact as fp32, gradients as exact as
    their own dtype."""
    hidden, weight, targets = inputs(dtype, scale=0.1)
    exact = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    got = gradients(
        logprob_entropy, hidden, weight, targets, 0.6, 95, True, chunk=1
    )  # as many sums as can be
    want = gradients(reference, *exact, targets, 0.6, 95)
    assert_equal(got[:2], want[:2])
    assert got[2].dtype == got[3].dtype == dtype
    epsilon = torch.finfo(dtype).eps
    for a, b in zip(got[2:], want[2:]):
        assert (a.double() - b).abs().max() < 2 * epsilon * b.abs().max()


def test_the_weight_gradient_of_many_tokens_is_not_rounded_on_the_way():
    """4096 equal tokens: a bf16 running sum would stop growing after a few hundred."""
    hidden = torch.ones(4096, 4, dtype=torch.bfloat16)
    weight = torch.zeros(64, 4, dtype=torch.bfloat16, requires_grad=True)
    logp, _ = logprob_entropy(hidden, weight, torch.zeros(4096, dtype=torch.int64))
    (grad,) = torch.autograd.grad(logp.sum(), weight)
    torch.testing.assert_close(grad[0].float(), torch.full((4,), 4096 * 63 / 64), rtol=0.01, atol=0)
    torch.testing.assert_close(grad[1].float(), torch.full((4,), -64.0), rtol=0.01, atol=0)


def test_no_tokens():
    hidden, weight, targets = inputs(n=0)
    logp, entropy, g_hidden, g_weight = gradients(
        logprob_entropy, hidden, weight, targets, entropy_grad=True
    )
    assert logp.shape == entropy.shape == (0,) and g_hidden.shape == (0, H)
    assert (g_weight == 0).all() and g_weight.shape == (V, H)


def test_only_the_gradients_asked_for():
    hidden, weight, targets = inputs()
    both = gradients(logprob_entropy, hidden, weight, targets, g_entropy=0)
    weights = torch.linspace(-1, 2, N)
    (g_hidden,) = torch.autograd.grad(
        (logprob_entropy(hidden, weight.detach(), targets)[0] * weights).sum(), hidden
    )
    (g_weight,) = torch.autograd.grad(
        (logprob_entropy(hidden.detach(), weight, targets)[0] * weights).sum(), weight
    )
    assert torch.equal(g_hidden, both[2]) and torch.equal(g_weight, both[3])
    assert not logprob_entropy(hidden.detach(), weight.detach(), targets)[0].requires_grad


def test_never_more_logits_than_a_block():
    """No tensor of the size of all logits is made, forward or backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    self.numbers = max(self.numbers, x.numel())
            return out

    hidden = torch.randn(500, 4, requires_grad=True)
    weight, targets = torch.randn(3000, 4, requires_grad=True), torch.randint(0, 3000, (500,))
    with Largest() as largest:
        gradients(logprob_entropy, hidden, weight, targets, entropy_grad=True, chunk=100)
    assert largest.numbers <= 500 * 100  # all logits are 500 * 3000


def test_the_default_block_is_bounded():
    for n, h in [(0, 8), (1, 8), (64, 128), (2048, 3584), (100_000, 3584)]:
        chunk = default_chunk(torch.empty(n, h, device="meta"))
        assert chunk == 64 or chunk * (n + h) <= 2**22


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(temperature=0), "temperature"),
        (dict(temperature=-1), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
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
def test_mistakes_are_told(change, sentence):
    hidden, weight, targets = inputs()
    arguments = dict(hidden=hidden, weight=weight, targets=targets) | change
    with pytest.raises(ValueError, match=sentence):
        logprob_entropy(**arguments)


def test_response_entropy_is_over_a_response_s_own_tokens():
    assert [response_entropy(torch.tensor(h)) for h in ([2.0, 4.0], [], [5.0])] == [3, 0, 5]
    token = torch.tensor([1.0, 2.0], requires_grad=True)
    (response_entropy(token) + response_entropy(token[:0])).backward()
    assert token.grad.tolist() == [0.5, 0.5]


def tiny(name, **config):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, name + "Config")(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
        **config,
    )
    return getattr(transformers, name + "ForCausalLM")(config).eval()


@pytest.mark.parametrize("name", ["Qwen2", "Llama", "Qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_output_layers_are_accepted_and_give_the_model_s_numbers(name, dtype):
    model = tiny(name).to(dtype)
    check_output_layer(model)
    ids = torch.randint(0, 60, (1, 9))
    hidden = model.base_model(input_ids=ids).last_hidden_state[0, :-1]
    logp, _ = logprob_entropy(hidden, model.lm_head.weight, ids[0, 1:])
    want = (
        model(input_ids=ids)
        .logits[0, :-1]
        .double()
        .log_softmax(-1)
        .gather(1, ids[0, 1:, None])[:, 0]
    )
    torch.testing.assert_close(
        logp.double(), want, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05
    )


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: tiny("Gemma2", final_logit_softcapping=30.0), "caps its logits"),
        (lambda: tiny("Cohere", logit_scale=0.0625), "scale"),
        (lambda: tiny("Granite", logits_scaling=8.0), "scale"),
    ],
)
def test_other_output_layers_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_output_layer(make())


def test_a_bias_is_refused():
    model = tiny("Llama")
    model.lm_head = torch.nn.Linear(32, 60, bias=True)
    with pytest.raises(ValueError, match="bias"):
        check_output_layer(model)


def test_gemma_without_a_cap_and_granite_without_a_scale_are_accepted():
    check_output_layer(tiny("Gemma2", final_logit_softcapping=None))
    check_output_layer(tiny("Granite", logits_scaling=1.0))


@pytest.mark.cuda
def test_bf16_on_a_gpu():
    hidden, weight, targets = inputs(torch.bfloat16)
    exact = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    on_gpu = [x.detach().cuda().requires_grad_() for x in (hidden, weight)]
    logp, entropy = logprob_entropy(*on_gpu, targets.cuda(), 0.6, 95, True, chunk=32)
    want = reference(*exact, targets, 0.6, 95)
    assert_equal((logp.cpu(), entropy.cpu()), want, 1e-4)
