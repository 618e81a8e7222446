"""engine/forward.py: micro-batches, and the training forward pass of packed and padded rows."""

import pytest
import torch
from helpers import MODELS, random_rows, shared_rows, small_policy
from transformers import AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from edge_grpo import Tokens
from engine.forward import PACKED, ForwardPass, make_batch, make_batches, response_logprobs

CPU = torch.device("cpu")


def batches_of(prompts, responses, budget, packed=True, rows=None):
    rows = range(len(responses)) if rows is None else rows
    return make_batches(prompts, responses, list(rows), budget, CPU, packed)


def model_of(name, scaling=1.0):
    """(model in float64, whether its batches are packed)"""
    kind, config, packed = MODELS[name]
    torch.manual_seed(0)
    model = kind(config).double().eval()
    if packed:
        for layer in model.model.layers:
            layer.self_attn.scaling *= scaling  # some models scale by other than 1 / sqrt(D)
    return model, packed


# --- Micro-batches ---------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
def test_micro_batches_hold_every_row_once_within_the_budget_with_little_padding(packed):
    """Each row reads as itself, and a prompt stands there once."""
    for (prompts, responses), padding in ((random_rows(64), 0.1), (shared_rows(), 1)):
        responses[5] = []
        asked = [row for row in range(9, -1, -1)] + list(range(12, len(responses)))
        batches, fed, padded, twice = batches_of(prompts, responses, 300, packed, asked), 0, 0, 0
        rows = [row for b in batches for row in b.rows]
        assert sorted(rows) == sorted(row for row in asked if responses[row])
        for b in batches:
            own_prompts = {tuple(prompts[row]) for row in b.rows}
            twice += len(b.rows) - len(own_prompts)
            assert len(b.ids) == sum(map(len, own_prompts)) + sum(b.lengths) - len(b.rows)
            assert b.targets.tolist() == [token for row in b.rows for token in responses[row]]
            size = 0
            for row, index in zip(b.rows, [index for block in b.padded_rows for index in block]):
                length = len(prompts[row]) + len(responses[row]) - 1
                padded, fed = padded + len(index), fed + length
                size += (length if packed else len(index)) + 1
                assert b.ids[index[:length]].tolist() == prompts[row] + responses[row][:-1]
                assert b.positions[index[:length]].tolist() == list(range(length))
            assert size <= 300 and (packed or len(b.padded_rows) == 1)
        assert 1 - fed / padded < padding and (padding < 1 or twice)


@pytest.mark.parametrize("packed", [True, False])
def test_the_budget_is_filled_to_the_last_token_and_a_longer_row_is_alone(packed):
    full = batches_of([[1] * 4] * 5, [[2] * 6] * 5, 20, packed)
    assert [len(b.rows) for b in full] == [2, 2, 1]
    long = batches_of([[1] * 5] * 3, [[2] * 50, [3] * 2, [4] * 3], 20, packed)
    assert [b.rows for b in long] == [[0], [2, 1]]


def test_columns_of_the_rows_become_those_of_the_batch_and_keep_their_type():
    prompts, responses = random_rows(6)
    tokens = []
    for r in responses:
        ids = torch.tensor(r)
        tokens.append(Tokens(weights=ids, advantages=ids.double(), injected=ids % 2 == 0))
    for b in [*batches_of(prompts, responses, 100), make_batch(prompts, responses, [], CPU, True)]:
        t, ids = b.join(tokens), b.targets
        assert isinstance(t, Tokens) and t.old_logp is None
        pairs = [(t.weights, ids), (t.advantages, ids.double()), (t.injected, ids % 2 == 0)]
        for ours, wanted in pairs:
            assert ours.dtype == wanted.dtype and torch.equal(ours, wanted)
        for row, (column,) in b.by_row(ids.float().requires_grad_()).items():
            assert column.tolist() == responses[row] and not column.requires_grad


# --- The forward pass ------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_numbers_and_gradients_equal_the_models_own_forward_at_any_budget(name):
    """A row at a time, in float64."""
    model, packed = model_of(name, scaling=2.3)
    prompts, responses = shared_rows()
    factors = torch.rand(30, 2, generator=torch.Generator().manual_seed(0)).double()
    expected = {}
    for row, (p, r) in enumerate(zip(prompts, responses)):
        logits = model(torch.tensor([p + r])).logits[0, len(p) - 1 : -1, :60]
        logp = torch.log_softmax(logits / 0.7, -1)
        expected[row] = torch.stack([logp[range(len(r)), r], -(logp.exp() * logp).sum(-1)])
        (factors[row] @ expected[row]).sum().backward()
    gradient = {name: p.grad for name, p in model.named_parameters()}
    forward_pass = ForwardPass(model)
    assert forward_pass.packed == packed
    for budget in (1, 300, 10_000):
        model.zero_grad()
        for b in batches_of(prompts, responses, budget, packed):
            numbers = forward_pass(b, 0.7, 60, entropy_grad=True)
            for row, ours in b.by_row(*numbers).items():
                assert torch.allclose(torch.stack(ours), expected[row].float(), atol=1e-6)
            of_token = torch.tensor(b.rows).repeat_interleave(torch.tensor(b.lengths))
            (torch.stack(numbers, 1) * factors[of_token]).sum().backward()
        for name, p in model.named_parameters():
            assert (p.grad - gradient[name]).norm() <= 1e-6 * gradient[name].norm(), name


def test_response_logprobs_are_of_each_row_in_order_and_empty_where_it_is():
    model, (prompts, responses) = small_policy().model, shared_rows()
    rows = response_logprobs(model, prompts, responses, 0.7, 60, 200)
    for p, r, numbers in zip(prompts, responses, rows, strict=True):
        [alone] = response_logprobs(model, [p], [r], 0.7, 60, 200)
        for ours, wanted in zip(numbers, alone):
            assert len(ours) == len(r) and torch.allclose(ours, wanted, atol=1e-5)


def test_an_id_beyond_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="has the id 60, but the vocabulary ends at 59"):
        response_logprobs(small_policy().model, [[1]], [[60]], 1.0, 60, 200)


def test_whoever_else_calls_the_model_gets_its_usual_forward_mask_and_config():
    """A packed forward pass needs no mask, which would be N x N."""
    model, made = small_policy().model, []
    for layer in model.model.layers:
        layer.self_attn.scaling *= 2.3
    ids = torch.randint(1, 60, (3, 9), generator=torch.Generator().manual_seed(0))
    padding = torch.tensor([[0] * 4 + [1] * 5, [1] * 9, [0] + [1] * 8])
    calls = [dict(), dict(attention_mask=padding)]
    before = [model(input_ids=ids, **call).logits for call in calls]
    config = model.config.to_json_string()

    def count(*arguments, **more):
        made.append(1)
        return sdpa_mask(*arguments, **more)

    AttentionMaskInterface.register(PACKED, count)
    try:
        response_logprobs(model, *shared_rows(), 0.7, 60, 200)
        assert not made
        for call, logits in zip(calls, before):
            assert torch.equal(model(input_ids=ids, **call).logits, logits)
        assert made
    finally:
        AttentionMaskInterface.register(PACKED, sdpa_mask)
    assert model.config.to_json_string() == config
