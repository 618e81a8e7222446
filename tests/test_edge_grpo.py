"""The method against its equations: group advantages, EDA, the loss, GEC, and one whole update."""

import copy
import json
import math
from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import data
import edge_grpo as eg
import engine
from data import Problem
from engine import run
from engine.processes import stream
from engine.trainer import Trainer
from report.metrics import measure

BRANCHES = {"reflect", "answer", "reference"}  # of the paper's GEC


@pytest.fixture(scope="module")
def policy():
    return engine.load_policy("tiny", "cpu")


def flags_of(*argv):
    return eg.parse_flags(list(argv))


# --- group advantages, EDA -------------------------------------------------------------------------------------------


def test_group_advantages_on_worked_numbers():
    r = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.float64)
    A = eg.group_advantages(r)
    # mean 1/4, unbiased variance (9/16 + 3/16)/3 = 1/4, std 1/2
    assert A[0].tolist() == pytest.approx([0.75 / 0.5001] + [-0.25 / 0.5001] * 3, abs=1e-12)
    assert A[1:].abs().max() == 0


def test_a_group_of_one_has_no_advantage():
    assert eg.group_advantages(torch.ones(3, 1)).tolist() == [[0.0]] * 3


def test_format_reward_that_is_constant_changes_no_advantage():
    accuracy = torch.tensor([[1.0, 0, 0, 1]], dtype=torch.float64)
    assert torch.allclose(
        eg.group_advantages(accuracy), eg.group_advantages(accuracy + 1.0), atol=1e-12
    )


def test_eda_on_worked_numbers():
    A = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    P = torch.tensor([[0.2, 0.6]], dtype=torch.float64)  # mean .4, relative .5 and 1.5
    assert eg.entropy_driven_advantages(A, P)[0].tolist() == pytest.approx([2.0, -2 / 3])
    assert eg.entropy_driven_advantages(A, P, (0.8, 1.2))[0].tolist() == pytest.approx(
        [1 / 0.8, -1 / 1.2]
    )


def test_eda_uses_each_groups_own_mean():
    A = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    P = torch.tensor([[0.2, 0.6], [2.0, 6.0]])
    A_hat = eg.entropy_driven_advantages(A, P)
    assert torch.allclose(A_hat[0], A_hat[1])


def test_eda_cannot_revive_a_collapsed_group_and_survives_zero_entropy():
    P = torch.tensor([[0.5, 0.1, 0.9]])
    assert eg.entropy_driven_advantages(torch.zeros(1, 3), P).abs().max() == 0
    A = torch.tensor([[1.0, -0.5, -0.5]])
    assert torch.equal(eg.entropy_driven_advantages(A, torch.zeros(1, 3)), A)
    assert torch.isfinite(eg.entropy_driven_advantages(A, torch.tensor([[0.0, 1.0, 1.0]]))).all()


def test_eda_gradient_flows_through_each_responses_own_entropy_only_if_it_has_one():
    A, P = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.2, 0.6]], requires_grad=True)
    eg.entropy_driven_advantages(A, P).sum().backward()
    # A^_1 = mean / P_1 with the mean as it is, 0.4: d/dP1 = -0.4 / P1^2; A^_2 = -mean / P_2: d/dP2 = 0.4 / P2^2
    assert P.grad[0].tolist() == pytest.approx([-0.4 / 0.04, 0.4 / 0.36])


# --- the loss --------------------------------------------------------------------------------------------------------

LENGTHS = [9, 1, 4, 7, 3]


def padded(seed=0, B=5, T=9):
    """logp (B, T), old logp (B, T), advantages (B,) and the mask (B, T) of responses of those LENGTHS."""
    g = torch.Generator().manual_seed(seed)
    logp = -torch.rand(B, T, generator=g, dtype=torch.float64)
    old = logp + 0.5 * torch.randn(B, T, generator=g, dtype=torch.float64)
    mask = (torch.arange(T)[None] < torch.tensor(LENGTHS)[:, None]).double()
    return logp.requires_grad_(), old, torch.randn(B, generator=g, dtype=torch.float64), mask


def trl_loss(logp, old, advantages, mask, low, high, loss_type):
    """GRPOTrainer's loss, written from its formulas (grpo, bnpo and dr_grpo with max_completion_length = T)."""
    coef_1 = torch.exp(logp - old)
    coef_2 = torch.clamp(coef_1, 1 - low, 1 + high)
    per_token = -torch.min(coef_1 * advantages.unsqueeze(1), coef_2 * advantages.unsqueeze(1))
    if loss_type == "grpo":
        return ((per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
    if loss_type == "bnpo":
        return (per_token * mask).sum() / mask.sum().clamp(min=1.0)
    return (per_token * mask).sum() / (per_token.size(0) * per_token.size(1))


@pytest.mark.parametrize(
    "ours, theirs", [("sequence", "grpo"), ("token", "bnpo"), ("constant", "dr_grpo")]
)
def test_the_loss_equals_trls_formula_in_value_and_gradient(ours, theirs):
    """token_weights and policy_loss on the tokens of five responses, one after the other: what a step is trained on.
    There is no padding in it, so what would stand there (infinities) cannot enter."""
    logp, old, advantages, mask = padded()
    expected = trl_loss(logp, old, advantages, mask, 0.2, 0.3, theirs)
    (g_expected,) = torch.autograd.grad(expected, logp)
    real, lengths = mask.bool(), torch.tensor(LENGTHS)
    weights = torch.tensor(eg.token_weights(LENGTHS, ours, 9), dtype=torch.float64)  # (B,)
    dirty = logp.detach().masked_fill(~real, -math.inf).requires_grad_()
    A, w = (of_row.repeat_interleave(lengths) for of_row in (advantages, weights))  # (M,)
    loss = eg.policy_loss(dirty[real], old[real], A, w, 0.2, 0.3)
    (gradient,) = torch.autograd.grad(loss, dirty)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    assert torch.allclose(gradient, g_expected, atol=1e-12) and g_expected.abs().max() > 0


@pytest.mark.parametrize(
    "ours, theirs", [("sequence", "grpo"), ("token", "bnpo"), ("constant", "dr_grpo")]
)
def test_a_step_hands_that_loss_what_it_needs_of_each_token(ours, theirs):
    """From responses and advantages to the loss of all their tokens, as `update` goes."""
    logp, old, advantages, mask = padded()
    flags = flags_of("--loss", ours, "--max-new-tokens", "9", "--eps-high", "0.3")
    responses = [eg.Response(None, [1], [5] * n, [False] * n, finished=True) for n in LENGTHS]
    tokens = eg.tokens_of(responses, advantages.view(1, 5), flags)
    for t, row, n in zip(tokens, old, LENGTHS):
        t.old_logp = row[:n]
    parts = [eg.loss_of_tokens(row[:n], None, t, flags) for row, n, t in zip(logp, LENGTHS, tokens)]
    assert sum(parts).item() == pytest.approx(
        trl_loss(logp, old, advantages, mask, 0.2, 0.3, theirs).item(), abs=1e-7
    )


def test_clipping_on_worked_numbers():
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5]).log()
    A = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss = [
        eg.policy_loss(*(x[k : k + 1] for x in (ratio, torch.zeros(4), A, torch.ones(4)))).item()
        for k in range(4)
    ]
    assert loss == pytest.approx([-1.2, 1.5, -0.5, 0.8])


def test_kl_penalty_is_zero_at_equality_and_positive_elsewhere():
    penalty = eg.kl_penalty(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -1.0]))
    assert penalty.tolist() == pytest.approx([0.0, math.e - 2])


# --- GEC -------------------------------------------------------------------------------------------------------------


def wrong_and_right(policy, n=40):
    """n responses, every fourth of them right, half of them cut by the limit (no end token)."""
    problems, rows = data.load("tiny:1-3"), []
    for k in range(n):
        p = problems[k]
        right = k % 4 == 0
        ids = policy.encode(
            "(1)1+1=2\nThe answer is \\boxed{%s}" % (data.gold_text(p) if right else "1000")
        )
        finished = k % 2 == 0
        ids = ids + [policy.end_id] * finished
        unknown = [math.nan] * len(ids)
        rows.append(
            eg.Response(
                p,
                policy.prompt_ids(p.question),
                ids,
                [False] * len(ids),
                [-0.5] * len(ids),
                unknown,
                sampled=len(ids),
                finished=finished,
            )
        )
    eg.grade(policy, rows)
    assert [r.accuracy for r in rows] == [float(k % 4 == 0) for k in range(n)]
    return rows


def test_branch_frequencies():
    probabilities = eg.correction_probabilities(flags_of())
    assert probabilities == {"reflect": 0.5, "answer": 0.25, "reference": 0.25}
    drawn = [eg.draw_correction(probabilities, stream(0, "test", k) / 2**63) for k in range(20000)]
    for branch, p in probabilities.items():
        assert drawn.count(branch) / 20000 == pytest.approx(
            p, abs=4 * math.sqrt(p * (1 - p) / 20000)
        )


def test_a_draw_at_its_edges():
    def draw(probabilities, u):
        return eg.draw_correction(dict(zip(("reflect", "answer", "reference"), probabilities)), u)

    assert draw([0.5, 0.25, 0.25], 0.0) == "reflect"
    assert draw([0.5, 0.25, 0.25], 0.5) == "answer"
    assert draw([0.5, 0.25, 0.25], 1 - 2**-53) == "reference"
    assert draw([1 / 3, 1 / 3, 1 / 3 - 1e-9], 1 - 1e-12) == "reference"
    assert draw([], 0.0) == ""
    assert {draw([1], u) for u in (0.0, 0.5, 1 - 2**-53)} == {"reflect"}


def test_right_responses_are_untouched_and_wrong_ones_keep_their_prefix(policy):
    rows = wrong_and_right(policy)
    before = copy.deepcopy(rows)
    corrected = eg.correct_errors(policy, rows, flags_of(), step=3)
    for r, b, c in zip(rows, before, corrected):
        assert (r.ids, r.injected, r.logprobs, r.finished) == (
            b.ids,
            b.injected,
            b.logprobs,
            b.finished,
        )
        if r.accuracy:
            assert c is r
            continue
        kept = len(r.ids) - r.finished
        assert c.correction in BRANCHES and c.accuracy is None
        assert len(c.ids) == len(c.injected) == len(c.logprobs) == len(c.entropies)
        assert all(math.isnan(p) == x for p, x in zip(c.logprobs, c.injected))
        if c.correction == "reference":
            assert (
                c.ids == policy.encode(r.problem.solution) + [policy.end_id]
                and all(c.injected)
                and c.finished
            )
            continue
        assert c.ids[:kept] == r.ids[:kept] and not any(c.injected[:kept])
        text = (
            eg.REFLECT if c.correction == "reflect" else eg.ANSWER.format(data.gold_text(r.problem))
        )
        added = policy.encode(text)
        assert c.ids[kept : kept + len(added)] == added and all(
            c.injected[kept : kept + len(added)]
        )
        if c.correction == "answer":
            assert c.ids[kept + len(added) :] == [policy.end_id] and c.finished
        else:
            assert not any(c.injected[kept + len(added) :])
            assert c.finished == (c.ids[-1] in policy.end_ids)
    assert {c.correction for c in corrected} == {"", *BRANCHES}


def test_end_tokens_inside_a_response_are_only_at_its_end(policy):
    for c in eg.correct_errors(policy, wrong_and_right(policy), flags_of(), step=1):
        assert not set(c.ids[:-1]) & policy.end_ids


def test_injected_answers_and_references_grade_right(policy):
    corrected = eg.correct_errors(policy, wrong_and_right(policy), flags_of(), step=2)
    eg.grade(policy, corrected)
    fixed = [c.accuracy for c in corrected if c.correction in ("answer", "reference")]
    assert fixed and all(fixed)


def test_force_r_reflects_on_every_wrong_response_and_none_on_nothing(policy):
    rows = wrong_and_right(policy)
    forced = eg.correct_errors(policy, rows, flags_of("--method", "force-r"), step=0)
    assert all(c.correction == ("" if r.accuracy else "reflect") for r, c in zip(rows, forced))
    untouched = eg.correct_errors(policy, rows, flags_of("--method", "grpo"), step=0)
    assert all(c is r for r, c in zip(rows, untouched))


def test_a_corrected_row_does_not_depend_on_the_others(policy):
    """Same row of the same step, continued among other rows or with another number of sampler rows: the same tokens."""
    flags, rows = flags_of("--method", "force-r"), wrong_and_right(policy)
    together = eg.correct_errors(policy, rows, flags, step=5)
    policy.sampler.max_rows = 3
    try:
        again = eg.correct_errors(policy, rows, flags, step=5)
    finally:
        policy.sampler.max_rows = None
    assert [c.ids for c in together] == [c.ids for c in again]
    wrong = [i for i, r in enumerate(rows) if not r.accuracy]
    rows[wrong[0]].accuracy = 1.0
    fewer = eg.correct_errors(policy, rows, flags, step=5)
    assert [fewer[i].ids for i in wrong[1:]] == [together[i].ids for i in wrong[1:]]


def test_caps_of_reflection_and_of_corrected_length(policy):
    rows = wrong_and_right(policy)
    reflected = eg.correct_errors(
        policy, rows, flags_of("--method", "force-r", "--correction-tokens", "2"), step=0
    )
    for r, c in zip(rows, reflected):
        if c.correction:
            added = len(c.ids) - (len(r.ids) - r.finished) - len(policy.encode(eg.REFLECT))
            assert added <= 2
    capped = eg.correct_errors(policy, rows, flags_of("--max-corrected-tokens", "9"), step=0)
    for r, c in zip(rows, capped):
        same = len(c.ids) == len(c.injected) == len(c.logprobs) == len(c.entropies)
        assert (len(c.ids) <= 9 and same) if c.correction else c is r


@pytest.mark.parametrize("method", ["edge-grpo", "force-r", "sft"])
def test_no_correction_goes_past_the_models_context(policy, method):
    """Learned positions end there. A cut response has no end, and what can be scored can be trained on."""
    own, flags, rows = (
        copy.deepcopy(policy.model),
        flags_of("--method", method),
        wrong_and_right(policy),
    )
    longest = max(len(r.prompt) + len(r.ids) for r in rows)
    own.config.max_position_embeddings = longest
    small = replace(policy, model=own)
    corrected = (
        eg.references(small, [r.problem for r in rows])
        if method == "sft"
        else eg.correct_errors(small, rows, flags, step=0)
    )
    assert all(len(c.prompt) + len(c.ids) <= longest for c in corrected)
    cut = [c for c in corrected if c.correction and len(c.prompt) + len(c.ids) == longest]
    assert cut and not any(c.finished and c.ids[-1] not in policy.end_ids for c in cut)
    assert all(not c.finished for c in cut if c.ids[-1] not in policy.end_ids)
    for c in corrected:
        assert len(c.ids) == len(c.injected) == len(c.logprobs) == len(c.entropies)


def test_every_sample_of_a_step_has_its_own_stream_and_no_step_repeats_another(policy):
    flags, problems = (
        flags_of("--temperature", "9", "--max-new-tokens", "12"),
        data.load("tiny:5-8")[:2] * 2,
    )
    first, second = (eg.sample(policy, problems, flags, step) for step in (0, 1))
    assert (
        len({tuple(r.ids) for r in first}) == len(first) == 32
    )  # also of one problem that comes twice
    assert not {tuple(r.ids) for r in first} & {tuple(r.ids) for r in second}
    for r in first:
        r.accuracy, r.finished = 0.0, False
    reflect = flags_of("--method", "force-r", "--temperature", "9")
    once, twice = (eg.correct_errors(policy, first, reflect, step) for step in (0, 1))
    assert all(a.ids != b.ids for a, b in zip(once, twice))
    guided = [
        [c.correction for c in eg.correct_errors(policy, first, flags, step)] for step in (0, 1)
    ]
    assert guided[0] != guided[1]


def test_reflections_draw_from_another_stream_than_samples(policy, monkeypatch):
    """A stream's numbers belong to positions, and a reflection comes where the sample may have been."""
    seen, plain = [], policy.sampler.sample
    monkeypatch.setattr(
        policy.sampler,
        "sample",
        lambda p, n, most, T, seeds, top_p: (
            seen.append((seeds, top_p)) or plain(p, n, most, T, seeds, top_p)
        ),
    )
    flags = flags_of(
        "--method", "force-r", "--max-new-tokens", "4", "--correction-tokens", "2", "--top-p", "0.9"
    )
    rows = eg.sample(policy, data.load("tiny:5-8")[:2], flags, step=0)
    for r in rows:
        r.accuracy = 0.0
    eg.correct_errors(policy, rows, flags, step=0)
    assert (
        len(seen) == 2 and not set(seen[0][0]) & set(seen[1][0]) and seen[0][1] == seen[1][1] == 0.9
    )


# --- the update ------------------------------------------------------------------------------------------------------


def trainer_of(policy, flags, **more):
    """A trainer as the run makes it."""
    return Trainer(
        policy,
        flags.micro_batch_tokens,
        temperature=1.0 if flags.sft else flags.temperature,
        entropy_grad=flags.eda_grad,
        betas=tuple(flags.betas),
        offload=flags.offload_optimizer,
        checkpointing=flags.gradient_checkpointing,
        **more,
    )


def a_step(trainer, responses, flags, lr, A=None):
    """From graded responses to the weights, as the run does it; returns update's numbers and (A, A^, P)."""
    A_hat = A = eg.advantages_of(responses, flags) if A is None else A
    P = None
    if flags.eda:
        P = eg.response_entropy(trainer, responses, A.shape[1]).requires_grad_(flags.eda_grad)
        A_hat = eg.entropy_driven_advantages(A, P)
    return eg.update(trainer, responses, A_hat, P, flags, lr=lr), (A, A_hat, P)


def test_a_disagreement_of_sampler_and_trainer_is_told(policy):
    """The sampler's numbers stay beside the trainer's; tokens of which it has told nothing take those."""
    flags = flags_of("--method", "grpo", "--max-new-tokens", "6", "--temperature", "0.7")
    own = replace(policy, model=copy.deepcopy(policy.model))
    rows = eg.sample(own, data.load("tiny:5-8")[:1], flags, step=0)
    eg.grade(own, rows)
    for r in rows:
        r.entropies, r.logprobs = (
            [h + 0.5 for h in r.entropies],
            [logp - 0.25 for logp in r.logprobs],
        )
    told, rows[0].entropies[0] = [list(r.entropies) for r in rows], math.nan
    _, (A, A_hat, _) = a_step(trainer_of(own, flags), rows, flags, lr=0.0)
    assert [r.entropies[1:] for r in rows] == [h[1:] for h in told]
    assert rows[0].entropies[0] == pytest.approx(told[0][0] - 0.5, abs=1e-4)
    metrics = measure(rows, rows, A, A_hat, partial(eg.rewards, flags=flags), eg.CORRECTIONS, flags)
    assert metrics["logprob_gap"] == pytest.approx(0.25, abs=1e-4)
    count = sum(len(r.ids) for r in rows)
    assert metrics["entropy_gap"] == pytest.approx(0.5 * (count - 1) / count, abs=1e-4)


def step_gradient(policy, flags, responses, micro_batch_tokens=None, reference=None, A=None):
    """The gradient of one step as {name: tensor}, without an optimizer step."""
    own = replace(policy, model=copy.deepcopy(policy.model))
    trainer = trainer_of(
        own, replace(flags, micro_batch_tokens=micro_batch_tokens or flags.micro_batch_tokens)
    )
    trainer.reference = reference
    grads = {}

    def catch(lr, clip):
        grads.update({name: p.grad.clone() for name, p in trainer.params.items()})
        trainer.skip()
        return 1.0

    trainer.step = catch
    return grads, *a_step(trainer, responses, flags, 1e-3, A)


def graded_groups(policy, groups=2):
    rows = wrong_and_right(policy, 8 * groups)
    corrected = eg.correct_errors(policy, rows, flags_of(), step=4)
    eg.grade(policy, corrected)
    return corrected


def naive_loss(model, responses, A_hat, flags, entropy=False):
    """One row at a time, float64, whole logits, no padding: sum_i 1/B 1/|o_i| sum_t -A^_i exp(logp - sg(logp))."""
    total, P = 0.0, []
    for r, a in zip(responses, A_hat.flatten()):
        logits = (
            model(torch.tensor([r.prompt + r.ids])).logits[0, len(r.prompt) - 1 : -1]
            / flags.temperature
        )
        logits = logits[:, : flags.vocab_size] if hasattr(flags, "vocab_size") else logits
        logp_all = torch.log_softmax(logits, -1)
        logp = logp_all.gather(1, torch.tensor(r.ids)[:, None])[:, 0]
        P.append(-(logp_all.exp() * logp_all).sum(-1).mean())
        total = total - (torch.exp(logp - logp.detach()) * a).mean() / len(responses)
    return total, torch.stack(P)


def test_the_steps_gradient_equals_a_naive_float64_one_and_not_the_micro_batching(policy):
    flags, responses = flags_of("--temperature", "0.7"), graded_groups(policy)
    by_budget = [step_gradient(policy, flags, responses, budget) for budget in (1, 300, 100_000)]
    model = copy.deepcopy(policy.model).double()
    loss, P = naive_loss(model, responses, by_budget[0][2][1], flags)
    loss.backward()
    assert torch.allclose(P, by_budget[0][2][2].flatten(), atol=1e-5)
    assert by_budget[0][1]["loss"] == pytest.approx(loss.item(), abs=1e-6)
    for grads, stats, _ in by_budget:
        for name, p in model.named_parameters():
            assert torch.allclose(grads[name].double(), p.grad, atol=2e-6, rtol=1e-4), name
    assert max(p.grad.abs().max() for p in model.parameters()) > 1e-3


def test_eda_grad_equals_autograd_through_the_whole_expression(policy):
    flags, responses = flags_of("--eda-grad", "--temperature", "1"), graded_groups(policy)
    grads, _, (A, _, _) = step_gradient(policy, flags, responses, 300)
    plain, _, _ = step_gradient(policy, flags_of("--temperature", "1"), responses, 300)
    model = copy.deepcopy(policy.model).double()
    _, P = naive_loss(model, responses, A, flags)
    A_hat = eg.entropy_driven_advantages(A, P.view_as(A))
    naive_loss(model, responses, A_hat, flags)[0].backward()
    for name, p in model.named_parameters():
        assert (grads[name].double() - p.grad).norm() < 1e-4 * p.grad.norm(), name
        assert (plain[name].double() - p.grad).norm() > 0.1 * p.grad.norm(), (
            name
        )  # the flag does something


def test_entropies_come_from_the_sampler_and_a_pass_over_injected_rows_only(policy, monkeypatch):
    """Three sources, one function: what a scoring pass over everything would tell. Without EDA the update tells it."""
    flags, scored, score = (
        flags_of("--questions-per-step", "4", "--max-new-tokens", "30"),
        [],
        Trainer.score,
    )
    responses = eg.sample(policy, data.load("tiny:1-3")[:4], flags, step=0)
    eg.grade(policy, responses)
    corrected = eg.correct_errors(policy, responses, flags, step=0)
    eg.grade(policy, corrected)
    assert {r.correction for r in corrected} == {"", *BRANCHES}
    trainer = trainer_of(replace(policy, model=copy.deepcopy(policy.model)), flags)
    expected = [
        entropy.tolist()
        for _, entropy in score(trainer, [r.prompt for r in corrected], [r.ids for r in corrected])
    ]
    unscored = [copy.copy(r) for r in corrected]
    monkeypatch.setattr(
        Trainer, "score", lambda self, prompts, ids: scored.extend(ids) or score(self, prompts, ids)
    )
    eg.response_entropy(trainer, corrected, flags.group_size)
    assert len(scored) == sum(any(r.injected) for r in corrected) < len(corrected)
    step_gradient(policy, flags_of("--no-eda"), unscored)
    assert len(scored) == sum(any(r.injected) for r in corrected)  # no pass of its own
    for r, u, entropies in zip(corrected, unscored, expected):
        assert r.entropies == pytest.approx(entropies, abs=1e-5) == u.entropies
        assert len(u.logp) == len(u.ids)


def test_injected_weight_zero_leaves_only_sampled_tokens(policy):
    responses = graded_groups(policy)
    flags = flags_of("--injected-weight", "0", "--no-eda")
    grads, _, (A, _, _) = step_gradient(policy, flags, responses)
    model, total = copy.deepcopy(policy.model), 0.0
    for r, a in zip(responses, A.flatten()):
        logits = (
            model(torch.tensor([r.prompt + r.ids])).logits[0, len(r.prompt) - 1 : -1]
            / flags.temperature
        )
        logp = torch.log_softmax(logits, -1).gather(1, torch.tensor(r.ids)[:, None])[:, 0]
        total = total - a * (logp * ~torch.tensor(r.injected)).sum() / len(r.ids) / len(responses)
    total.backward()
    for name, p in model.named_parameters():
        assert torch.allclose(grads[name], p.grad, atol=2e-6, rtol=1e-3), name


def test_ratios_differ_from_one_only_after_the_first_of_several_updates(policy, monkeypatch):
    seen, plain = [], eg.policy_loss
    monkeypatch.setattr(
        eg,
        "policy_loss",
        lambda logp, old_logp, *rest: (
            plain(logp, old_logp, *rest)
            if seen.append((logp - old_logp).abs().max().item()) is None
            else None
        ),
    )
    flags, responses = (
        flags_of("--updates-per-rollout", "3", "--micro-batch-tokens", "100000"),
        graded_groups(policy),
    )
    own = replace(policy, model=copy.deepcopy(policy.model))
    a_step(trainer_of(own, flags), responses, flags, lr=1e-5)
    assert len(seen) == 3 and seen[0] < 1e-5 and seen[1] > 1e-3 and seen[2] > seen[1]


def independent_step(model, reference, responses, flags, lr):
    """The updates of one rollout in float64: a row at a time, whole logits, autograd through everything, torch's
    AdamW. Changes the model; returns its mean loss and gradient norm."""
    Q, G = flags.questions_per_step, flags.group_size

    def told(m, r):
        logits = (
            m(torch.tensor([r.prompt + r.ids])).logits[0, len(r.prompt) - 1 : -1]
            / flags.temperature
        )
        logp = torch.log_softmax(logits, -1)
        return logp[range(len(r.ids)), r.ids], -(logp.exp() * logp).sum(-1)

    accuracy = torch.tensor([r.accuracy for r in responses], dtype=torch.float64).view(Q, G)
    A = (accuracy - accuracy.mean(1, keepdim=True)) / (accuracy.std(1, keepdim=True) + 1e-4)
    tokens = sum(len(r.ids) for r in responses)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, betas=tuple(flags.betas), weight_decay=0.0
    )
    losses, norms = [], []
    for k in range(flags.updates_per_rollout):
        now = [told(model, r) for r in responses]
        if k == 0:
            old = [logp.detach() for logp, _ in now]
            P = torch.stack([entropy.sum() / max(len(entropy), 1) for _, entropy in now]).view(Q, G)
            P = (
                P if flags.eda_grad else P.detach()
            )  # the gradient is that of each row's own entropy
            A_hat = A / (P / P.mean(1, keepdim=True).detach()).clamp(min=1e-4) if flags.eda else A
        loss = 0.0
        for r, (logp, _), before, a in zip(responses, now, old, A_hat.flatten()):
            weight = {
                "sequence": 1 / (Q * G * max(len(r.ids), 1)),
                "token": 1 / tokens,
                "constant": 1 / (Q * G * flags.max_new_tokens),
            }[flags.loss]
            of_token = torch.tensor(
                [flags.injected_weight if x else 1.0 for x in r.injected], dtype=torch.float64
            )
            ratio = (logp - before).exp()
            d = told(reference, r)[0].detach() - logp
            term = -torch.min(ratio * a, ratio.clamp(1 - flags.eps_low, 1 + flags.eps_high) * a)
            kl = (d.exp() - d - 1) * ~torch.tensor(
                r.injected, dtype=torch.bool
            )  # of what the policy has drawn
            loss = loss + weight * (of_token * (term + flags.kl * kl)).sum()
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), flags.grad_clip).item())
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses), sum(norms) / len(norms)


@pytest.mark.parametrize(
    "argv",
    [
        "--eda-grad --injected-weight 0.5",
        "--updates-per-rollout 4 --loss token --offload-optimizer",
        "--updates-per-rollout 2 --loss constant --no-eda --injected-weight 0 --grad-clip 0.05",
        "--updates-per-rollout 3 --eps-low 0.02 --eps-high 0.5 --gradient-checkpointing",
    ],
)
def test_a_whole_step_equals_an_independent_one_in_float64(policy, argv):
    """Weights, loss and gradient norm, with KL, empty responses, responses of one token, one prompt in two groups."""
    flags = flags_of(
        "--kl",
        "0.7",
        "--temperature",
        "0.8",
        "--questions-per-step",
        "3",
        "--group-size",
        "4",
        "--micro-batch-tokens",
        "150",
        *argv.split(),
    )
    draw, responses = torch.Generator().manual_seed(3), []
    prompts = [policy.prompt_ids(p.question) for p in data.load("tiny:1-3")[:2]]
    for row, length in enumerate([0, 1, 5, 30, 1, 2, 0, 40, 12, 1, 3, 20]):
        ids = torch.randint(300, (length,), generator=draw).tolist()
        r = eg.Response(
            None,
            prompts[row // 4 % 2],
            ids,
            (torch.rand(length, generator=draw) < 0.4).tolist(),
            [math.nan] * length,
            [math.nan] * length,
        )
        r.accuracy, r.format = float(row % 4 in (1, row // 4 + 1)), 0.0
        responses.append(r)
    own = replace(policy, model=copy.deepcopy(policy.model))
    expected, start = copy.deepcopy(own.model).double(), copy.deepcopy(own.model).double()
    trainer = trainer_of(own, flags, keep_reference=True)
    with torch.no_grad():
        for p in trainer.reference.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=draw))
    loss, norm = independent_step(
        expected, copy.deepcopy(trainer.reference).double(), responses, flags, lr=1e-4
    )
    stats, _ = a_step(trainer, responses, flags, lr=1e-4)
    assert stats["loss"] == pytest.approx(
        loss, rel=1e-5, abs=1e-5
    )  # float32; it is a sum of terms that cancel
    assert stats["grad_norm"] == pytest.approx(norm, rel=1e-4)
    moved, off = (
        [(x.double() - y).norm() ** 2 for x, y in zip(a.parameters(), expected.parameters())]
        for a in (start, own.model)
    )
    assert sum(off) ** 0.5 < 2e-3 * sum(moved) ** 0.5


def test_kl_pulls_towards_the_reference(policy):
    responses = graded_groups(policy)
    flags = flags_of("--kl", "0.5", "--no-eda")
    zero = torch.zeros(2, 8, dtype=torch.float64)
    grads, stats, _ = step_gradient(policy, flags, responses, reference=policy.model, A=zero)
    assert (
        stats["loss"] == pytest.approx(0, abs=1e-7)
        and max(g.abs().max() for g in grads.values()) < 1e-6
    )
    other = copy.deepcopy(policy.model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    grads, stats, _ = step_gradient(policy, flags, responses, reference=other, A=zero)
    assert stats["loss"] > 0.01 and max(g.abs().max() for g in grads.values()) > 1e-3


def test_sft_is_the_mean_log_likelihood_of_the_references(policy):
    flags = flags_of("--method", "sft")
    responses = eg.references(policy, data.load("tiny:5-8")[:4])
    eg.grade(policy, responses)
    grads, stats, _ = step_gradient(policy, flags, responses)
    model, total = copy.deepcopy(policy.model), 0.0
    for r in responses:
        labels = torch.tensor([[-100] * len(r.prompt) + r.ids])
        total = total + model(torch.tensor([r.prompt + r.ids]), labels=labels).loss / len(responses)
    total.backward()
    assert stats["loss"] == pytest.approx(total.item(), rel=1e-5)
    for name, p in model.named_parameters():
        assert torch.allclose(grads[name], p.grad, atol=2e-6, rtol=1e-3), name


# --- data order, metrics ---------------------------------------------------------------------------------------------


def test_every_epoch_is_a_permutation_and_epochs_differ():
    problems = [Problem(str(k), ("1",), None, str(k)) for k in range(10)]
    flags = flags_of("--questions-per-step", "4")
    order = [p.question for step in range(5) for p in eg.batch_of_problems(problems, flags, step)]
    assert (
        sorted(order[:10]) == sorted(order[10:]) == sorted(str(k) for k in range(10))
        and order[:10] != order[10:]
    )


def test_a_dataset_shorter_than_a_step_goes_round():
    problems = [Problem(str(k), ("1",), None, str(k)) for k in range(3)]
    batch = eg.batch_of_problems(problems, flags_of("--questions-per-step", "8"), 0)
    assert len(batch) == 8 and {p.question for p in batch} == {"0", "1", "2"}


def test_tokens_per_second_counts_what_was_sampled_and_nothing_else(policy, monkeypatch, tmp_path):
    flags, rows = flags_of(), wrong_and_right(policy)
    corrected = eg.correct_errors(policy, rows, flags, step=3)
    added = 0
    for r, c in zip(rows, corrected):
        if c.correction == "reflect":
            added += len(c.ids) - (len(r.ids) - r.finished) - len(policy.encode(eg.REFLECT))
    eg.grade(policy, corrected)
    for c in corrected:  # as after the update
        c.logp = c.trainer_entropies = torch.zeros(len(c.ids))
    A = eg.advantages_of(corrected, flags)
    m = eg.measure(rows, corrected, A, A, partial(eg.rewards, flags=flags), eg.CORRECTIONS, flags)
    assert m["sampled_tokens"] == sum(len(r.ids) for r in rows) + added and added > 0
    monkeypatch.setattr(run, "SECONDS", Counter(sample=3.0, correct=1.0, grade=9.0, update=9.0))
    around = SimpleNamespace(
        bad_steps=0, out=tmp_path, policy=policy, progress=SimpleNamespace(show=lambda line: None)
    )
    run.Run.log(around, 0, m | dict(skipped_updates=0), [])
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["tokens_per_second"] == (sum(len(r.ids) for r in rows) + added) / 4


# --- flags -----------------------------------------------------------------------------------------------------------


def test_method_rows_and_overrides():
    force_r_eda = flags_of("--method", "force-r-eda")
    assert (force_r_eda.correction, force_r_eda.eda) == ("reflect", True)
    gec_only = flags_of("--method", "edge-grpo", "--no-eda")
    assert gec_only.correction == "guided" and not gec_only.eda
    eda_only = flags_of("--method", "grpo", "--eda")
    assert eda_only.correction == "none" and eda_only.eda


def test_the_papers_settings_are_the_defaults_of_a_real_model():
    f = flags_of("--model", "Qwen2.5-Math-7B")
    assert (f.questions_per_step, f.group_size, f.steps, f.lr, f.temperature) == (
        1,
        8,
        1000,
        1e-6,
        0.6,
    )
    assert (f.max_new_tokens, f.correction_tokens, f.max_prompt_tokens, f.grad_clip) == (
        1024,
        256,
        512,
        1.0,
    )
    assert (f.betas, f.weight_decay, f.seed, f.kl, f.eps_low) == ([0.9, 0.999], 0, 42, 0, 0.2)
    assert f.data == "deepscaler-hard-1k" and f.guided_probs == [0.5, 0.25, 0.25]


@pytest.mark.parametrize(
    "argv", [["--stepz", "3"], ["--step", "3"], ["--loss", "mean"], ["--steps", "many"]]
)
def test_unknown_flags_and_values_fail(argv):
    with pytest.raises(data.UserError, match=argv[0]):
        flags_of(*argv)
