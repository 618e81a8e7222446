"""engine/forward.py: micro-batches, and the training forward pass of packed and padded rows."""

import pytest
import torch
from helpers import LLAMA_FAMILY, random_model, random_rows, shared_rows, small_policy
from transformers import AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from edge_grpo import Tokens
from engine.forward import PACKED, ForwardPass, make_batch, make_batches, response_logprobs

CPU = torch.device("cpu")


def batches_of(prompts, responses, budget, packed=True, rows=None):
    if rows is None:
        rows = range(len(responses))
    return make_batches(prompts, responses, list(rows), budget, CPU, packed)


# --- Micro-batches ---------------------------------------------------------------------------


def check_batch(batch, prompts, responses, packed):
    """Each row reads as itself, and a prompt stands there once. Returns the numbers of tokens: fed,
    padded, and counted against the budget."""
    own_prompts = {tuple(prompts[row]) for row in batch.rows}
    targets = []
    fed = padded = counted = 0
    indices = [index for block in batch.padded_rows for index in block]
    for row, index in zip(batch.rows, indices, strict=True):
        targets += responses[row]
        ids = prompts[row] + responses[row][:-1]
        length = len(ids)
        assert batch.ids[index[:length]].tolist() == ids
        assert batch.positions[index[:length]].tolist() == list(range(length))
        fed += length
        padded += len(index)
        counted += length + 1
    assert batch.targets.tolist() == targets
    of_prompts = sum(map(len, own_prompts))
    assert len(batch.ids) == of_prompts + len(targets) - len(batch.rows)
    if not packed:
        [block] = batch.padded_rows
        counted = padded + len(block)
    return fed, padded, counted


def test_the_example_of_make_batch_is_what_it_makes():
    a, b, c, d, e, f, g = range(1, 8)
    batch = make_batch([[a, b]] * 2, [[c, d], [e, f, g]], [0, 1], CPU, packed=True)
    assert batch.rows == [1, 0]
    assert batch.ids.tolist() == [a, b, e, f, c]
    assert batch.positions.tolist() == [0, 1, 2, 3, 2]
    assert [block.tolist() for block in batch.padded_rows] == [[[0, 1, 2, 3]], [[0, 1, 4]]]
    assert batch.place.tolist() == [4, 5, 2, 3, 6]
    assert batch.targets.tolist() == [e, f, g, c, d]
    assert batch.previous.tolist() == [1, 2, 3, 1, 4]


@pytest.mark.parametrize("packed", [True, False])
def test_micro_batches_hold_every_row_once_within_the_budget_with_little_padding(packed):
    few_shared = random_rows(64), 0.1
    many_shared = shared_rows(), 1
    for (prompts, responses), most_padding in (few_shared, many_shared):
        responses[5] = []
        asked = [*range(9, -1, -1), *range(12, len(responses))]
        rows = []
        counts = []
        for batch in batches_of(prompts, responses, 300, packed, asked):
            rows += batch.rows
            counts.append(check_batch(batch, prompts, responses, packed))
        assert sorted(rows) == [row for row in sorted(asked) if responses[row]]
        fed, padded, counted = zip(*counts)
        assert max(counted) <= 300
        assert 1 - sum(fed) / sum(padded) < most_padding


@pytest.mark.parametrize("packed", [True, False])
def test_the_budget_is_filled_to_the_last_token_and_a_longer_row_is_alone(packed):
    prompts, responses = [[1] * 4] * 5, [[2] * 6] * 5
    full = batches_of(prompts, responses, 20, packed)
    assert [len(b.rows) for b in full] == [2, 2, 1]
    responses = [[2] * 50, [3] * 2, [4] * 3]
    long = batches_of(prompts[:3], responses, 20, packed)
    assert [b.rows for b in long] == [[0], [2, 1]]


def test_columns_of_the_rows_become_those_of_the_batch_and_keep_their_type():
    prompts, responses = random_rows(6)
    tokens = []
    for r in responses:
        ids = torch.tensor(r)
        odd = ids % 2 == 1
        tokens.append(Tokens(weights=ids, advantages=ids.double(), injected=odd))
    empty = make_batch(prompts, responses, [], CPU, True)
    for batch in [*batches_of(prompts, responses, 100), empty]:
        ids = batch.targets
        t = batch.join(tokens)
        assert t.old_logp is None
        torch.testing.assert_close(t.weights, ids)  # in type too
        torch.testing.assert_close(t.advantages, ids.double())
        torch.testing.assert_close(t.injected, ids % 2 == 1)
        for row, (column,) in batch.by_row(ids.float().requires_grad_()).items():
            found = column.tolist()
            assert found == responses[row]
            assert not column.requires_grad


# --- The forward pass ------------------------------------------------------------------------


def whole_logits(model, prompt, response):
    """logp and entropy (2, T) of a response, from the model's own forward on this row alone."""
    ids = torch.tensor([prompt + response])
    logits = model(ids).logits[0, len(prompt) - 1 : -1, :60]
    logp = torch.log_softmax(logits / 0.7, -1)
    entropy = -(logp.exp() * logp).sum(-1)
    of_targets = logp[range(len(response)), response]
    return torch.stack([of_targets, entropy])


@pytest.mark.parametrize("name", [*LLAMA_FAMILY, "mistral_window", "gpt2"])
def test_numbers_and_gradients_equal_the_models_own_forward_at_any_budget(name):
    """In float64."""
    model = random_model(name).double()
    packed = name in LLAMA_FAMILY
    if packed:
        for layer in model.model.layers:
            layer.self_attn.scaling *= 2.3  # some models scale by other than 1 / sqrt(D)
    prompts, responses = shared_rows()
    torch.manual_seed(0)
    factors = torch.rand(30, 2, 1).double()
    expected = []
    for row in range(30):
        expected.append(whole_logits(model, prompts[row], responses[row]))
        (factors[row] * expected[row]).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    forward_pass = ForwardPass(model)
    assert forward_pass.packed == packed
    for budget in (1, 300, 10_000):
        model.zero_grad()
        for batch in batches_of(prompts, responses, budget, packed):
            numbers = forward_pass(batch, 0.7, 60, entropy_grad=True)
            columns = torch.stack(numbers).split(batch.lengths, dim=1)  # (2, T) each
            loss = 0.0
            for row, ours in zip(batch.rows, columns):
                assert torch.allclose(ours, expected[row].float(), atol=1e-6)
                loss = loss + (factors[row] * ours).sum()
            loss.backward()
        for name, p in model.named_parameters():
            exact = gradients[name]
            assert (p.grad - exact).norm() <= 1e-6 * exact.norm(), name


def test_response_logprobs_are_of_each_row_in_order_and_empty_where_it_is():
    model = small_policy().model
    prompts, responses = shared_rows()
    rows = response_logprobs(model, prompts, responses, 0.7, 60, 200)
    for p, r, numbers in zip(prompts, responses, rows, strict=True):
        [alone] = response_logprobs(model, [p], [r], 0.7, 60, 200)
        for ours, wanted in zip(numbers, alone):
            assert len(ours) == len(r)
            assert torch.allclose(ours, wanted, atol=1e-5)


def test_an_id_beyond_the_vocabulary_is_refused():
    """Before a GPU sees it, where it would be read out of bounds."""
    with pytest.raises(ValueError, match="has the id 60, but the vocabulary ends at 59"):
        response_logprobs(small_policy().model, [[1]], [[60]], 1.0, 60, 200)


def test_whoever_else_calls_the_model_gets_its_usual_forward_mask_and_config():
    """A packed forward pass needs no mask, which would be N x N."""
    model = small_policy().model
    ids = torch.arange(1, 19).view(2, 9)
    padding = torch.ones_like(ids)
    padding[0, :4] = 0
    before = model(input_ids=ids, attention_mask=padding).logits
    config = model.config.to_json_string()
    masks = []

    def count(*arguments, **more):
        masks.append(1)
        return sdpa_mask(*arguments, **more)

    AttentionMaskInterface.register(PACKED, count)
    try:
        response_logprobs(model, *shared_rows(), 0.7, 60, 200)
        assert not masks
        assert torch.equal(model(input_ids=ids, attention_mask=padding).logits, before)
        assert masks
    finally:
        AttentionMaskInterface.register(PACKED, sdpa_mask)
    assert model.config.to_json_string() == config
