"""engine/forward.py: micro-batches, and the training forward of packed and of padded rows."""

import pytest
import torch
from helpers import MODELS, Weights, random_rows, shared_rows, small_policy
from transformers import AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from engine import forward
from engine.forward import Scorer, micro_batches, response_logprobs

# --- micro-batches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
def test_micro_batches_hold_every_row_once_within_the_budget_and_with_little_padding(packed):
    prompts, responses = random_rows(64)
    responses[5] = []
    batches = micro_batches(prompts, responses, 300, "cpu", packed)
    assert sorted(i for b in batches for i in b.index) == [i for i in range(64) if i != 5]
    fed = [len(prompts[i]) + len(responses[i]) - 1 for i in range(64) if i != 5]
    padded = [rows.numel() for b in batches for rows in b.rows]
    if packed:
        assert sum(len(b.ids) for b in batches) == sum(fed)  # what the layers see is not padded
        assert all(
            sum(len(prompts[i]) + len(responses[i]) for i in b.index) <= 300 for b in batches
        )
        assert sum(fed) / sum(padded) > 0.9  # nor, much, what attention sees
    else:
        assert all(len(b.rows) == 1 and b.rows[0].numel() + len(b.index) <= 300 for b in batches)
        assert sum(fed) / sum(padded) > 0.9
    for b in batches:
        ids = [Weights(torch.tensor(r, dtype=torch.float32)) for r in responses]
        assert torch.equal(b.targets, b.tokens(ids).weights.long())
        assert [len(told) for (told,) in b.by_row(b.targets)] == [
            len(responses[i]) for i in b.index
        ]


def test_every_row_of_a_batch_reads_as_itself_and_a_prompt_stands_there_once():
    prompts, responses = shared_rows()
    batches = micro_batches(prompts, responses, 300, "cpu")
    assert any(len({tuple(prompts[i]) for i in b.index}) < len(b.index) for b in batches)
    for b in batches:
        of_prompts = sum(len(p) for p in {tuple(prompts[i]) for i in b.index})
        assert len(b.ids) == of_prompts + sum(len(responses[i]) - 1 for i in b.index)
        flat, found = torch.cat([rows.flatten() for rows in b.rows]), iter(b.index)
        assert torch.equal(flat[b.home], torch.arange(len(b.ids)))
        before = iter(b.before.tolist())
        for row in (row for rows in b.rows for row in rows):
            i = next(found)
            row = row[: len(prompts[i]) + len(responses[i]) - 1]
            assert b.ids[row].tolist() == [*prompts[i], *responses[i][:-1]]
            assert b.positions[row].tolist() == list(range(len(row)))
            assert [next(before) for _ in responses[i]] == row[len(prompts[i]) - 1 :].tolist()


def test_a_row_longer_than_the_budget_is_alone():
    prompts, responses = [[1] * 5] * 3, [[2] * 50, [3] * 2, [4] * 3]
    for packed in (True, False):
        assert [b.index for b in micro_batches(prompts, responses, 20, "cpu", packed)] == [
            [0],
            [2, 1],
        ]


def test_the_budget_is_filled_to_the_last_token():
    for packed in (True, False):
        batches = micro_batches([[1] * 4] * 5, [[2] * 6] * 5, 20, "cpu", packed)
        assert [len(b.index) for b in batches] == [2, 2, 1]


# --- the forward -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_scores_and_gradients_equal_the_models_own_forward_of_each_row_at_any_budget(name):
    """In float64; only the Llama family with full attention is packed."""
    kind, config, packed = MODELS[name]
    torch.manual_seed(0)
    model = kind(config).double().eval()
    if packed:
        for layer in model.model.layers:
            layer.self_attn.scaling *= 2.3  # some models scale by other than 1 / sqrt(D)
    prompts, responses = shared_rows()
    weights = torch.rand(30, 2, generator=torch.Generator().manual_seed(0)).double()
    expected = {}
    for i, (p, r) in enumerate(zip(prompts, responses)):
        if r:
            logp = torch.log_softmax(
                model(torch.tensor([p + r])).logits[0, len(p) - 1 : -1, :60] / 0.7, -1
            )
            expected[i] = (
                logp.gather(1, torch.tensor(r)[:, None])[:, 0],
                -(logp.exp() * logp).sum(-1),
            )
    sum(
        (torch.stack([x.sum() for x in told]) * weights[i]).sum() for i, told in expected.items()
    ).backward()
    gradient = {name: p.grad for name, p in model.named_parameters()}
    for budget in (1, 300, 10_000):
        model.zero_grad()
        scorer = Scorer(model)
        assert scorer.packed == packed
        for b in micro_batches(prompts, responses, budget, "cpu", scorer.packed):
            told = scorer(b, 0.7, 60, entropy_grad=True)
            for i, row in zip(b.index, b.by_row(*told)):
                for mine, own in zip(row, expected[i]):
                    assert torch.allclose(mine, own.float(), atol=1e-6)
            w = weights[torch.tensor(b.index).repeat_interleave(torch.tensor(b.counts))]
            (torch.stack(told, 1) * w).sum().backward()
        for name, p in model.named_parameters():
            assert (p.grad - gradient[name]).norm() <= 1e-6 * gradient[name].norm(), name


def fill_padding(batch, lengths):
    """Other tokens of the batch where its rows of these lengths are padded; returns how many those places are."""
    changed, lengths = 0, iter(lengths)
    for rows in batch.rows:
        for row in rows:
            padding = row[next(lengths) :]
            padding += 1 + torch.arange(len(padding)) % (len(batch.ids) - 1)
            changed += len(padding)
    return changed


@pytest.mark.parametrize("name", ["qwen2", "gpt2"], ids=["packed", "padded"])
def test_what_stands_in_padding_never_enters_a_score_or_its_gradient(name):
    """Padding is the first token of the batch; any other would do."""
    kind, config, packed = MODELS[name]
    torch.manual_seed(0)
    model, (prompts, responses) = kind(config).double().eval(), shared_rows()
    scorer, told, gradients, filled = Scorer(model), ([], []), [], 0
    for k in (0, 1):
        model.zero_grad()
        for b in micro_batches(prompts, responses, 300, "cpu", packed):
            if k:
                filled += fill_padding(
                    b, [len(prompts[i]) + len(responses[i]) - 1 for i in b.index]
                )
            logp, entropy = scorer(b, 0.7, 60, entropy_grad=True)
            (logp.sum() + 2 * entropy.sum()).backward()
            told[k].extend(b.by_row(logp, entropy))
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert filled > 20
    assert all(
        torch.allclose(x, y, atol=1e-6) for a, b in zip(*told, strict=True) for x, y in zip(a, b)
    )
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(*gradients))


def test_response_logprobs_are_of_each_row_in_order_and_empty_where_it_is():
    policy = small_policy()
    prompts, responses = shared_rows()
    for p, r, (logp, entropy) in zip(
        prompts, responses, response_logprobs(policy.model, prompts, responses, 0.7, 60, 200)
    ):
        assert len(logp) == len(entropy) == len(r)
        if r:
            alone = response_logprobs(policy.model, [p], [r], 0.7, 60, 200)[0]
            assert torch.allclose(logp, alone[0], atol=1e-5) and torch.allclose(
                entropy, alone[1], atol=1e-5
            )


def test_packed_scoring_makes_no_mask():
    """It would be N x N. Who else calls the model needs one."""
    policy, made = small_policy(), []
    AttentionMaskInterface.register(
        forward.ROWS, lambda *a, **k: made.append(1) or sdpa_mask(*a, **k)
    )
    try:
        response_logprobs(policy.model, *shared_rows(), 0.7, 60, 200)
        assert not made
        policy.model(
            input_ids=torch.ones(2, 9, dtype=torch.long),
            attention_mask=torch.tensor([[0] + [1] * 8] * 2),
        )
        assert made
    finally:
        AttentionMaskInterface.register(forward.ROWS, sdpa_mask)


def test_who_else_calls_a_scored_model_gets_its_usual_forward_and_its_usual_config():
    model = small_policy().model
    for layer in model.model.layers:
        layer.self_attn.scaling *= 2.3
    ids = torch.randint(1, 60, (3, 9), generator=torch.Generator().manual_seed(0))
    calls = [dict(), dict(attention_mask=torch.tensor([[0] * 4 + [1] * 5, [1] * 9, [0] + [1] * 8]))]
    before, config = (
        [model(input_ids=ids, **call).logits for call in calls],
        model.config.to_json_string(),
    )
    Scorer(model)
    for call, logits in zip(calls, before):
        assert torch.equal(model(input_ids=ids, **call).logits, logits)
    assert model.config.to_json_string() == config
