"""edge_grpo.py from its loss on: the loss, the update, SFT, whole runs, and a reader's changes."""

import ast
import copy
import json
import math
import os
import re
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import (
    corrected_groups,
    flags_of,
    group_of,
    own_copy,
    response,
    train_step,
    trainer_of,
)

import data
import edge_grpo as eg
import engine
import eval as evaluation
from engine.trainer import Trainer
from report.metrics import measure
from rollout import Sample

pytestmark = pytest.mark.method
NAN = float("nan")


@pytest.fixture(scope="module")
def policy():
    return engine.load_policy("tiny", "cpu")


# --- The loss --------------------------------------------------------------------------------

LENGTHS = [9, 1, 4, 7, 3]


def trl_loss(logp, old, A, mask, loss):
    """GRPOTrainer's loss from its formulas (grpo, bnpo, and dr_grpo with T as its limit)."""
    coef_1 = torch.exp(logp - old)
    coef_2 = torch.clamp(coef_1, 1 - 0.2, 1 + 0.3)
    per_token = -torch.min(coef_1 * A.unsqueeze(1), coef_2 * A.unsqueeze(1)) * mask
    if loss == "sequence":
        return (per_token.sum(-1) / mask.sum(-1)).mean()
    return per_token.sum() / (mask.sum() if loss == "token" else mask.numel())


@pytest.mark.parametrize("loss", ["sequence", "token", "constant"])
def test_the_loss_equals_trls_formula_in_value_and_gradient(loss):
    """Five responses, one after the other: there is no padding that could enter."""
    g, lengths = torch.Generator().manual_seed(0), torch.tensor(LENGTHS)
    logp = -torch.rand(5, 9, generator=g, dtype=torch.float64)
    old = logp + 0.5 * torch.randn(5, 9, generator=g, dtype=torch.float64)
    A = torch.randn(5, generator=g, dtype=torch.float64)
    mask = torch.arange(9) < lengths[:, None]
    ours, theirs = logp.clone().requires_grad_(), logp.clone().requires_grad_()
    expected = trl_loss(theirs, old, A, mask, loss)
    weights = torch.tensor(eg.token_weights(LENGTHS, loss, 9)).double()
    of_tokens = [column.repeat_interleave(lengths) for column in (A, weights)]  # (M,)
    value = eg.policy_loss(ours[mask], old[mask], *of_tokens, 0.2, 0.3)
    for total in (value, expected):
        total.backward()
    assert value.item() == pytest.approx(expected.item(), abs=1e-7)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-7) and theirs.grad.abs().max() > 0.01


@pytest.mark.parametrize(
    "ratio, A, expected", [(1.5, 1, -1.2), (1.5, -1, 1.5), (0.5, 1, -0.5), (0.5, -1, 0.8)]
)
def test_clipping_on_worked_numbers(ratio, A, expected):
    numbers = [torch.tensor([float(x)]) for x in (math.log(ratio), 0, A, 1)]
    assert eg.policy_loss(*numbers).item() == pytest.approx(expected)


def test_the_kl_penalty_on_worked_numbers():
    penalty = eg.kl_penalty(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -1.0]))
    assert penalty.tolist() == pytest.approx([0, math.e - 2])


def test_shaped_tokens_have_luffys_gradient():
    """d/d logp of -A p/(p + g) is -A p g/(p + g)^2."""
    logp = torch.tensor([0.5, 0.01]).log().requires_grad_()
    loss = eg.shaped_loss(logp, torch.tensor([2.0, 2.0]), torch.full((2,), 0.25), 0.1)
    loss.backward()
    assert loss.item() == pytest.approx(-0.25 * 2 * (0.5 / 0.6 + 0.01 / 0.11))
    expected = [-0.5 * 0.5 * 0.1 / 0.6**2, -0.5 * 0.01 * 0.1 / 0.11**2]
    assert logp.grad.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    "line, expected",  # of the sampled and injected tokens of row 0, of row 1, of row 2
    [
        ("", [1 / 120, 1 / 120, 1 / 60, 1 / 90]),
        ("--mask-injected", [1 / 20, 0, 0, 1 / 60]),  # B is 2: row 1 is masked whole
        ("--mask-injected --loss token", [1 / 40, 0, 0, 1 / 40]),
        ("--mask-truncated", [1 / 80, 1 / 80, 1 / 40, 0]),
        ("--loss constant --max-new-tokens 50", [1 / 150] * 4),
        ("--loss constant --max-new-tokens 50 --mask-truncated", [1 / 100] * 3 + [0]),
    ],
)
def test_masked_tokens_are_in_no_count(line, expected):
    """Row 0 has 10 sampled and 30 injected tokens, row 1 injected ones only, row 2 is truncated."""
    mixed, injected = response(1, [5] * 40, [False] * 10 + [True] * 30), [True] * 20
    rows = [mixed, response(1, [5] * 20, injected), response(0, [5] * 30, finished=False)]
    group = group_of(rows, A_hat=torch.tensor([1.0, -2.0, 3.0]))
    tokens = eg.tokens_of([group], flags_of(line))
    first = tokens[0].weights.tolist()
    assert [first[:10], first[10:]] == [pytest.approx([w] * n) for w, n in zip(expected, (10, 30))]
    for t, weight, a_hat, r in zip(tokens[1:], expected[2:], (-2, 3), rows[1:]):
        assert t.weights.tolist() == pytest.approx([weight] * len(r.ids))
        assert t.advantages.tolist() == [a_hat] * len(r.ids)
        assert t.injected.dtype == torch.bool and t.injected.tolist() == r.injected


def test_tokens_cannot_be_built_by_position():
    with pytest.raises(TypeError):
        eg.Tokens(torch.ones(1), torch.ones(1), torch.ones(1))


# --- The update ------------------------------------------------------------------------------


def random_groups(policy):
    """Three groups of four, with empty responses, responses of one token and one prompt in two
    groups. Nothing is known of any token but whether it was injected, and some are truncated."""
    draw, groups = torch.Generator().manual_seed(3), []
    lengths = iter([0, 1, 5, 30, 1, 2, 0, 40, 12, 1, 3, 20])
    for number in range(3):
        rows = []
        for i in range(4):
            n = next(lengths)
            ids = torch.randint(300, (n,), generator=draw).tolist()
            injected = torch.rand(n, generator=draw) < 0.4
            r = response(i in (1, number + 1), ids, injected.tolist(), entropies=[NAN] * n)
            r.correction = ("", "answer", "reference", "reflect")[i]
            r.finished, r.sampler_logp = i != 3 or number != 2, [NAN] * n
            rows.append(r)
        groups.append(group_of(rows, number))
        groups[-1].prompt = policy.prompt_ids(data.load("tiny:1-3")[number % 2].question)
    return groups


def logp_and_entropy(model, prompt, response, temperature):
    """(T,) each, from whole logits of one row."""
    logits = model(torch.tensor([prompt + response.ids])).logits[0, len(prompt) - 1 : -1]
    logp = torch.log_softmax(logits / temperature, -1)
    return logp[range(len(response.ids)), response.ids], -(logp.exp() * logp).sum(-1)


def independent_step(model, reference, groups, flags, lr):
    """The updates of one rollout in float64: a row at a time, autograd through everything, torch's
    AdamW. Changes the model; returns mean loss, mean norm, gradients, and the share of clipped
    tokens in each update."""
    rows = [(group, r) for group in groups for r in group.responses]
    factors = dict(zip(eg.CORRECTIONS, flags.correction_factors))
    A = torch.tensor([[r.accuracy for r in group.responses] for group in groups]).double()
    A = (A - A.mean(1, keepdim=True)) / (A.std(1, keepdim=True) + 1e-4)
    A = A.flatten() * torch.tensor([factors.get(r.correction, 1.0) for _, r in rows])
    masks = []
    for _, r in rows:
        mask = ~torch.tensor(r.injected, dtype=torch.bool) if flags.mask_injected else None
        mask = torch.ones(len(r.ids), dtype=torch.bool) if mask is None else mask
        masks.append(mask & (r.finished or not flags.mask_truncated))
    B = sum(bool(mask.any()) or not r.ids for mask, (_, r) in zip(masks, rows))
    total = sum(int(mask.sum()) for mask in masks)
    how = dict(betas=tuple(flags.betas), weight_decay=flags.weight_decay)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, **how)
    losses, norms, gradients, clipped = [], [], [], []
    for k in range(flags.updates_per_rollout):
        now = [logp_and_entropy(model, group.prompt, r, flags.temperature) for group, r in rows]
        P_now = torch.stack([H.sum() / max(len(H), 1) for _, H in now])
        if k == 0:
            old, P_old = [logp.detach() for logp, _ in now], P_now.detach()
        A_hat = A
        if flags.eda:  # the value stays that of the policy that sampled
            P = (P_old + (P_now - P_now.detach()) * flags.eda_grad).view(len(groups), -1)
            mean = P_old.view_as(P).mean(1, keepdim=True)
            A_hat = A / (P / mean).clamp(*(flags.eda_clamp or [1e-4])).flatten()
        loss, outside = 0.0, 0
        for (group, r), (logp, _), before, a, mask in zip(rows, now, old, A_hat, masks):
            weight = {
                "sequence": 1 / (B * max(int(mask.sum()), 1)),
                "token": 1 / total,
                "constant": 1 / (B * flags.max_new_tokens),
            }[flags.loss]
            injected = torch.tensor(r.injected, dtype=torch.bool)
            ratio = (logp - before).exp()
            inside = ratio.clamp(1 - flags.eps_low, 1 + flags.eps_high)
            outside += int((inside != ratio).sum())
            term = -torch.min(ratio * a, inside * a)
            if flags.injected_shaping:
                p = logp.exp()
                term = torch.where(injected, -a * p / (p + flags.injected_shaping), term)
            d = logp_and_entropy(reference, group.prompt, r, flags.temperature)[0].detach() - logp
            term = term + flags.kl * (d.exp() - d - 1) * ~injected  # of what the policy has drawn
            loss = loss + weight * (mask * term).sum()
        optimizer.zero_grad()
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), flags.grad_clip).item())
        optimizer.step()
        losses.append(loss.item())
        clipped.append(outside / sum(map(len, old)))
    return sum(losses) / len(losses), sum(norms) / len(norms), gradients, clipped


def distance(a, b):
    """|a - b| / |b| of all weights or gradients together."""
    pairs = [(a[name].double(), b[name].double()) for name in b]
    off = sum((x - y).norm() ** 2 for x, y in pairs)
    return (off / sum(y.norm() ** 2 for _, y in pairs)).sqrt().item()


@pytest.mark.parametrize(
    "line",
    [
        "--micro-batch-tokens 1",
        "--kl .7 --correction-factors 2 .5 3 --weight-decay 10",
        "--micro-batch-tokens 100000 --no-eda --grad-clip .05 --loss constant",
        "--eda-grad --updates-per-rollout 2",
        "--eda-grad --eda-clamp .5 1.1 --loss token --gradient-checkpointing",
        "--updates-per-rollout 4 --loss token --offload-optimizer --mask-truncated --kl .7",
        "--updates-per-rollout 3 --eps-low .02 --eps-high .5 --mask-injected --mask-truncated",
        "--updates-per-rollout 2 --injected-shaping .1 --kl .7 --eps-low .01 --eps-high .01",
    ],
)
def test_a_whole_step_equals_an_independent_one_in_float64(policy, line, monkeypatch):
    """Loss, norm, the gradient of each update, weights, and the share of clipped tokens as one
    would add it to `sums`: over the micro-batches of each update."""
    flags = flags_of("--temperature .8 --group-size 4 --micro-batch-tokens 150 " + line)
    own, groups, clipped, policy_loss = own_copy(policy), random_groups(policy), [], eg.policy_loss
    expected, start = copy.deepcopy(own.model).double(), own_copy(own).model.state_dict()
    trainer = trainer_of(own, flags, keep_reference=True)
    with torch.no_grad():
        for p in trainer.reference.parameters():
            draw = torch.Generator().manual_seed(p.numel())
            p.add_(0.02 * torch.randn(p.shape, generator=draw))

    def count_clipped(logp, old_logp, A, weights, eps_low, eps_high):
        ratio = torch.exp(logp - old_logp)
        clipped.append(((ratio < 1 - eps_low) | (ratio > 1 + eps_high)).sum().item())
        return policy_loss(logp, old_logp, A, weights, eps_low, eps_high)

    monkeypatch.setattr(eg, "policy_loss", count_clipped)
    reference = copy.deepcopy(trainer.reference).double()
    loss, norm, gradients, shares = independent_step(expected, reference, groups, flags, lr=1e-4)
    stats, ours = train_step(trainer, groups, flags, lr=1e-4)
    assert stats["loss"] == pytest.approx(loss, rel=1e-5, abs=1e-5)  # terms that cancel
    assert stats["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert (stats["skipped_updates"], stats["lr"]) == (0, 1e-4)
    for k, (gradient, wanted) in enumerate(zip(ours, gradients, strict=True)):
        assert distance(gradient, wanted) < (1e-3 if k else 1e-5)
    moved = {name: p.detach() - start[name] for name, p in expected.named_parameters()}
    ours = {name: p.detach() - start[name] for name, p in own.model.named_parameters()}
    assert distance(ours, moved) < 2e-3
    count = sum(len(r.ids) for group in groups for r in group.responses)
    parts = len(clipped) // len(shares)
    for k, share in enumerate(shares):
        assert sum(clipped[k * parts : (k + 1) * parts]) / count == pytest.approx(share, abs=0.01)
    assert (max(shares) > 0) == (flags.updates_per_rollout > 1) and shares[0] == 0


def test_eda_and_its_gradient_make_a_difference(policy):
    """So that the comparisons above say something."""
    plain, *others = [
        train_step(trainer_of(own_copy(policy), flags), random_groups(policy), flags)[1][0]
        for flags in map(flags_of, ("", "--eda-grad", "--no-eda", "--kl .5" * 0 + "--loss token"))
    ]
    assert all(distance(other, plain) > 0.1 for other in others)


def test_sft_is_the_mean_log_likelihood_of_the_references(policy):
    flags, total = flags_of("--method sft --micro-batch-tokens 300"), 0.0
    groups = eg.references(policy, data.load("tiny:5-8")[:4])
    eg.grade(policy, groups, flags)
    own, model = own_copy(policy), copy.deepcopy(policy.model)
    stats, [gradient] = train_step(trainer_of(own, flags), groups, flags)
    for group in groups:
        [r] = group.responses
        assert r.ids == policy.encode(group.problem.solution) + [policy.end_id]
        assert r.correction == "reference" and r.finished and not group.sampled
        labels = torch.tensor([[-100] * len(group.prompt) + r.ids])
        total += model(torch.tensor([group.prompt + r.ids]), labels=labels).loss / 4
        P = logp_and_entropy(model, group.prompt, r, 1.0)[1].mean().item()
        assert group.P.item() == pytest.approx(P, abs=1e-5)
    total.backward()
    assert stats["loss"] == pytest.approx(total.item(), rel=1e-5)
    assert distance(gradient, {name: p.grad for name, p in model.named_parameters()}) < 1e-4


def test_a_disagreement_of_sampler_and_trainer_is_told(policy):
    """The sampler's numbers stay beside the trainer's; unknown entropies become the trainer's."""
    flags = flags_of("--method grpo --max-new-tokens 6")
    groups = eg.sample(policy, data.load("tiny:5-8")[:1], flags, step=0)
    eg.grade(policy, groups, flags)
    rows = groups[0].responses
    for r in rows:
        r.entropies = [h + 0.5 for h in r.entropies]
        r.sampler_logp = [logp - 0.25 for logp in r.sampler_logp]
    known = [list(r.entropies) for r in rows]
    rows[0].entropies[0] = NAN
    train_step(trainer_of(own_copy(policy), flags), groups, flags, lr=0.0)
    assert [r.entropies[1:] for r in rows] == [h[1:] for h in known]
    assert rows[0].entropies[0] == pytest.approx(known[0][0] - 0.5, abs=1e-4)
    assert groups[0].P.tolist() == [r.entropy for r in rows]
    numbers = measure(groups, groups, lambda rows: eg.rewards(rows, flags), eg.CORRECTIONS, flags)
    assert numbers["logprob_gap"] == pytest.approx(0.25, abs=1e-4)
    count = sum(len(r.ids) for r in rows)
    assert numbers["entropy_gap"] == pytest.approx(0.5 * (count - 1) / count, abs=1e-4)


def test_without_eda_entropies_come_from_the_update_at_no_extra_pass(policy, monkeypatch):
    groups, flags = corrected_groups(policy, groups=2), flags_of("--no-eda --updates-per-rollout 2")
    trainer = trainer_of(own_copy(policy), flags)
    rows = [(group.prompt, r) for group in groups for r in group.responses]
    expected = trainer.logprobs([prompt for prompt, _ in rows], [r.ids for _, r in rows])
    monkeypatch.setattr(Trainer, "logprobs", None)
    train_step(trainer, groups, flags)
    for (_, r), (logp, entropies) in zip(rows, expected):  # of the policy that sampled
        assert torch.allclose(r.trainer_logp, logp, atol=1e-5)
        assert torch.allclose(r.trainer_entropies, entropies, atol=1e-5)
        if any(r.injected):
            assert r.entropies == pytest.approx(entropies.tolist(), abs=1e-5)
    P = [r.entropy for group in groups for r in group.responses]
    assert torch.cat([group.P for group in groups]).tolist() == P


# --- Whole runs ------------------------------------------------------------------------------

SMALL = (
    "--questions-per-step 1 --group-size 4 --max-new-tokens 12 --correction-tokens 6 --save-every 1"
    " --steps 4 --eval-tasks"
)


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """A file of nine problems with solutions."""
    path = tmp_path_factory.mktemp("data") / "nine.jsonl"
    with open(path, "w") as file:
        for p in data.load("tiny:1-2")[:9]:
            row = dict(problem=p.question, answer=p.answers[0], solution=p.solution)
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture
def run(tmp_path, problems, monkeypatch):
    """run(flags, main) -> exit code. run.lines() are those of metrics.jsonl, run.samples() those
    of samples.jsonl, run.weights the weights before each update and after the last."""

    def start(line="", main=eg.main):
        start.weights.clear()
        argv = [*SMALL.split(), "--data", str(problems), "--out", str(start.out), *line.split()]
        return main(argv)

    def read(name):
        lines = (start.out / name).read_text().splitlines()
        return [json.loads(line, parse_constant=pytest.fail) for line in lines]  # NaN is not JSON

    update = eg.update

    def keep_weights(trainer, *rest, **more):
        before = {name: p.detach().clone() for name, p in trainer.params.items()}
        stats = update(trainer, *rest, **more)
        start.weights[-1:] = [before, {n: p.detach().clone() for n, p in trainer.params.items()}]
        return stats

    monkeypatch.setattr(eg, "update", keep_weights)
    start.out, start.weights = tmp_path / "run", []
    start.lines, start.samples = lambda: read("metrics.jsonl"), lambda: read("samples.jsonl")
    start.checkpoints = lambda: sorted(f.name for f in start.out.glob("checkpoints/*"))
    return start


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def finite(lines):
    return all(v is None or math.isfinite(v) for m in lines for v in m.values())


def spoil(monkeypatch, calls, value=NAN, gradient=False, stop_at=None):
    """The loss, or only its gradient, is not finite in these calls (one for each update)."""
    policy_loss, count = eg.policy_loss, [-1]

    def spoiled(logp, *rest):
        count[0] += 1
        if count[0] == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        loss = policy_loss(logp, *rest)
        if count[0] not in calls:
            return loss
        if gradient:
            return loss + (logp.sum() - logp.sum().detach()).sqrt()  # 0, but its slope is infinite
        return loss * value

    monkeypatch.setattr(eg, "policy_loss", spoiled)


@pytest.mark.parametrize("value, gradient", [(NAN, False), (math.inf, False), (NAN, True)])
def test_a_step_that_is_not_finite_changes_no_weight(run, monkeypatch, capsys, value, gradient):
    spoil(monkeypatch, [1], value, gradient)
    assert run("--keep 9") == 0
    lines, after = run.lines(), run.weights[1:]
    assert [m["skipped_updates"] for m in lines] == [0, 1, 0, 0]
    assert [m["grad_norm"] is None for m in lines] == [False, True, False, False]
    assert (lines[1]["loss"] is None) == (not gradient)
    printed = [line for line in capsys.readouterr().out.splitlines() if "not finite" in line]
    assert [line[:7] for line in printed] == ["step 2:", "warning"]  # then, and at the end
    assert run.checkpoints() == ["step-1", "step-3", "step-4"]  # never go back to a bad step
    assert same(after[0], after[1]) and not same(after[1], after[2])
    assert all(p.isfinite().all() for p in after[-1].values())


def test_five_bad_steps_in_a_row_end_the_run_and_fewer_do_not(run, monkeypatch, capsys):
    spoil(monkeypatch, [1, 2, 3, 4, *range(6, 99)])
    assert run("--steps 20 --keep 1") == 2
    assert [m["skipped_updates"] for m in run.lines()] == [0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1]
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "in 5 steps in a row" in error and "checkpoint" in error
    assert run.checkpoints() == ["step-6"] and not (run.out / "final").exists()


def test_bad_steps_are_counted_on_after_a_signal_and_a_resume(run, monkeypatch):
    spoil(monkeypatch, range(1, 99), stop_at=3)
    assert run("--steps 20 --keep 9") == 143
    assert run("--steps 20 --keep 9 --resume") == 2
    assert len(run.lines()) == 1 + 5 and "step-1" in run.checkpoints()


def test_each_of_several_updates_is_judged_by_itself(run, monkeypatch):
    spoil(monkeypatch, [1])
    assert run("--updates-per-rollout 3 --steps 1") == 0
    assert run.lines()[0]["skipped_updates"] == 1


def test_weights_that_explode_end_the_run_in_one_sentence(run, capsys):
    assert run("--lr 1e30") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "logits are not finite" in error and "lower --lr" in error
    assert not run.checkpoints()  # a policy that cannot be sampled is not saved


@pytest.fixture
def nothing_sampled(monkeypatch):
    def sample(self, prompts, *rest):
        return [Sample([], [], False) for _ in prompts]

    monkeypatch.setattr(engine.Policy, "sample", sample)


@pytest.mark.parametrize("loss", ["sequence", "token", "constant"])
def test_empty_responses_teach_nothing(run, nothing_sampled, loss):
    assert run(f"--method grpo --loss {loss} --steps 2") == 0
    for m in run.lines():
        for key in ("response_tokens", "loss", "grad_norm", "entropy", "accuracy"):
            assert m[key] == 0
        assert m["truncated"] == 1 and m["logprob_gap"] is None
    assert finite(run.lines()) and same(run.weights[0], run.weights[-1])


def test_empty_responses_can_be_corrected(run, nothing_sampled):
    assert run() == 0 and finite(run.lines())
    assert sum(m["answered"] + m["referenced"] for m in run.lines()) > 0
    assert max(m["grad_norm"] for m in run.lines()) > 0


@pytest.mark.parametrize("accuracy", [0.0, 1.0], ids=["all wrong", "all right"])
def test_groups_of_equal_rewards_teach_nothing(run, monkeypatch, accuracy):
    monkeypatch.setattr(eg.reward, "score_all", lambda texts, *_: [(1.0, accuracy)] * len(texts))
    assert run() == 0 and finite(run.lines())
    for m in run.lines():
        assert m["accuracy"] == m["accuracy_corrected"] == m["reward"] == accuracy
        assert m["mixed_groups"] == m["mixed_groups_corrected"] == m["loss"] == m["grad_norm"] == 0
        corrected = m["reflected"] + m["answered"] + m["referenced"]
        assert corrected == (4 if accuracy == 0 else 0)
    assert same(run.weights[0], run.weights[-1])


@pytest.mark.parametrize("method", ["edge-grpo", "grpo", "force-r-eda"])
def test_responses_of_one_token_and_corrections_of_none(run, method):
    assert run(f"--max-new-tokens 1 --correction-tokens 0 --method {method}") == 0
    for m in run.lines():
        assert m["response_tokens"] == m["truncated"] == 1 and m["accuracy"] == 0
        if method == "grpo":  # all wrong: nothing to learn
            assert m["loss"] == m["grad_norm"] == m["mixed_groups"] == 0
        if method == "force-r-eda":
            assert m["reflected"] == m["sampled_tokens"] == 4
    assert finite(run.lines())


def test_a_policy_without_entropy_gives_finite_advantages(run, monkeypatch):
    """Its logits are so sharp that every response repeats the same tokens (EDA divides by 0)."""
    load = engine.load_policy

    def sharp(*arguments, **more):
        policy = load(*arguments, **more)
        policy.model.model.norm.weight.data.mul_(1e4)
        return policy

    monkeypatch.setattr(engine, "load_policy", sharp)
    assert run("--steps 2 --lr 0") == 0 and finite(run.lines())
    assert all(m["skipped_updates"] == 0 and m["entropy_sampled"] < 1e-3 for m in run.lines())


@pytest.mark.parametrize("method", ["edge-grpo", "grpo"])
def test_in_a_group_of_one_only_the_advantage_of_wrong_ones_teaches(run, method):
    assert run(f"--group-size 1 --method {method} --no-eda --all-wrong-advantage -.5") == 0
    for m in run.lines():
        wrong = m["accuracy_corrected"] == 0
        assert m["mixed_groups"] == m["advantage_variance"] == 0
        assert m["loss"] == pytest.approx(0.5 * wrong) and (m["grad_norm"] > 0) == wrong
    assert finite(run.lines())


def test_a_run_leaves_out_long_prompts_repeats_what_is_left_and_counts_its_tokens(run, tmp_path):
    longer, row = tmp_path / "two.jsonl", dict(problem="How many? " * 100, answer="1")
    longer.write_text(json.dumps(row) + "\n" + json.dumps(row | dict(problem="1+1?")))
    line = f"--max-prompt-tokens 90 --data {longer} --questions-per-step 3 --method force-r"
    assert run(f"{line} --lr 1e-3") == 0 and finite(run.lines())
    config = json.loads((run.out / "config.json").read_text())
    assert config["problems"] == 1 and config["problems_left_out"] == [f"{longer}:1"]
    for step, m in enumerate(run.lines()):
        assert m["lr"] == pytest.approx(1e-3 * (1 - step / 4))
        seconds = m["seconds_sample"] + m["seconds_correct"]
        assert m["tokens_per_second"] * seconds == pytest.approx(m["sampled_tokens"])


def out_of_memory(*_, **__):
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0")


@pytest.mark.parametrize(
    "seam, flag",
    [
        ((eg, "policy_loss"), "--micro-batch-tokens"),
        ((Trainer, "logprobs"), "--micro-batch-tokens"),
        ((engine.models.Sampler, "sample"), "--max-rows"),
        ((eg, "Trainer"), "--offload-optimizer"),
    ],
    ids=["update", "entropies", "sample", "load"],
)
def test_out_of_memory_ends_the_run_with_the_flag_to_set(run, monkeypatch, capsys, seam, flag):
    monkeypatch.setattr(*seam, out_of_memory)
    assert run() == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and "out of" in last and flag in last


def test_out_of_memory_while_sampling_halves_the_rows_once(run, monkeypatch, capsys):
    assert run("--steps 2") == 0
    expected, rows, sample = run.lines(), [], engine.models.Sampler.sample

    def limited(self, prompts, *rest):
        rows.append(min(self.max_rows or len(prompts), len(prompts)))
        return out_of_memory() if rows[-1] > 2 else sample(self, prompts, *rest)

    monkeypatch.setattr(engine.models.Sampler, "sample", limited)
    assert run("--steps 2 --overwrite") == 0
    message = "out of GPU memory while sampling: going on with --max-rows 2\n"
    assert capsys.readouterr().err == message and rows[:2] == [4, 2] and max(rows[1:]) == 2
    for m, e in zip(run.lines(), expected, strict=True):
        assert m["reflected"] == e["reflected"] and m["loss"] == pytest.approx(e["loss"], abs=1e-5)


def test_no_cache_of_an_evaluation_stands_in_the_way_of_the_update(tmp_path):
    flags, policy = flags_of(f"--out {tmp_path}"), engine.load_policy("tiny", "cpu")
    policy.sampler.fixed = True  # as on a GPU, where the cache outlives the call
    evaluation.while_training(policy, {"easy": data.load("tiny:1-3:validation")[:2]}, flags, 0)
    assert policy.sampler.slots is None
    assert json.loads((tmp_path / "evals.jsonl").read_text())["problems"] == 2


# --- A reader's changes ----------------------------------------------------------------------
# Each is a run of edge_grpo.py with one function written anew, or one row and one function added.

SOURCE = Path(eg.__file__).read_text(encoding="utf-8")
IDEA = "--steps 3 --save-every 0 --questions-per-step 2 --max-new-tokens 48 --temperature 1.3 "


def edited(function, row=None):
    """main() of edge_grpo.py with this function in place of the one of its name. With a row: the
    function stands before CORRECTIONS, and the row at the end of it."""
    lines, name = SOURCE.splitlines(), "CORRECTIONS" if row else ast.parse(function).body[0].name
    for node in ast.parse(SOURCE).body:
        names = [getattr(target, "id", "") for target in getattr(node, "targets", [])]
        if name in (getattr(node, "name", None), *names):
            first, after = node.lineno - 1, node.end_lineno
    if row:
        function = "\n".join([function, *lines[first : after - 1], row, "}"])
    module = sys.modules["edited"] = ModuleType("edited")
    source = "\n".join([*lines[:first], function, *lines[after:]])
    exec(compile(source, "edge_grpo.py, edited", "exec"), module.__dict__)
    return module.main


def final(sample):
    return sample.get("accuracy_corrected", sample["accuracy"])


def by_group(samples):
    return [samples[k : k + 4] for k in range(0, len(samples), 4)]


def test_a_new_advantage(run):
    """Leave-one-out: each reward against the mean of the other ones."""
    main = edited("""
def group_advantages(rewards, eps=1e-4, std="group"):
    others = (rewards.sum(dim=1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return rewards - others
""")
    assert run(IDEA + "--no-eda", main) == 0
    for rows in by_group(run.samples()):
        r = [final(s) for s in rows]
        expected = pytest.approx([x - (sum(r) - x) / 3 for x in r])
        assert [s["advantage"] for s in rows] == expected
        assert [s["advantage_eda"] for s in rows] == expected
    assert len({final(s) for s in run.samples()}) == 2


def test_a_new_use_of_entropy(run):
    main = edited("""
def entropy_driven_advantages(advantages, response_entropy, clamp=None):
    return advantages * torch.exp(-response_entropy)
""")
    assert run(IDEA, main) == 0
    for s in run.samples():
        expected = s["advantage"] * math.exp(-s["entropy"])
        assert s["advantage_eda"] == pytest.approx(expected, rel=1e-5)
    assert any(s["advantage"] for s in run.samples())
    assert any(m["grad_norm"] > 0 for m in run.lines())


HINT = """
def hint(policy, group, i, u):
    sibling = group.responses[i - 1]
    return policy.encode(f" Another one has {len(sibling.ids)} tokens.")
"""
HINT_ROW = """    "hint": Correction(
        adds=hint, keeps=True, goes_on=True, needs_solution=False, count="hinted"),"""
NONE = "0 " * len(eg.CORRECTIONS)


@pytest.mark.parametrize("line", ["--correction hint", f"--guided-probs {NONE} 1"])
def test_a_new_correction_is_one_row_and_one_function_which_sees_its_group(run, line):
    """It can be drawn, is counted, is seen in the samples, and the policy goes on behind it."""
    assert run(IDEA + line, edited(HINT, HINT_ROW)) == 0
    lines, samples = run.lines(), run.samples()
    wrong = [s for s in samples if s["accuracy"] == 0]
    assert len(wrong) == sum(m["hinted"] for m in lines) > 0
    continued = set()
    for s in wrong:
        kept, _, rest = s["corrected"].partition(" Another one has ")
        assert s["correction"] == "hint" and kept == s["response"]
        assert re.match(r"\d+ tokens\.", rest)
        continued.add(not rest.endswith("tokens."))
    assert True in continued
    assert all(0 <= m["hint_fixed"] <= m["hinted"] for m in lines)
    assert not any(m[c.count] for m in lines for c in eg.CORRECTIONS.values())
    assert all("advantage_share_hint" in m for m in lines)


def test_a_new_correction_among_the_papers(run):
    none = "0 " * (len(eg.CORRECTIONS) - 3)
    assert run(f"{IDEA} --guided-probs .3 .2 .2 {none} .3", edited(HINT, HINT_ROW)) == 0
    assert {s.get("correction") for s in run.samples()} > {None, "hint", "reflect"}
    counts = [m[k] for m in run.lines() for k in ("hinted", "reflected", "answered", "referenced")]
    assert sum(counts) == sum(s["accuracy"] == 0 for s in run.samples())


def test_another_weight_of_injected_tokens(run):
    main = edited("""
def tokens_of(groups, flags):
    tokens = []
    rows = [r for group in groups for r in group.responses]
    A_hat = torch.cat([group.A_hat for group in groups]).tolist()
    for r, a in zip(rows, A_hat):
        weights = [(0.0 if x else 1.0) / len(r.ids) / len(rows) for x in r.injected]
        weights = torch.tensor(weights)
        tokens.append(Tokens(weights=weights, advantages=torch.full_like(weights, a),
                             injected=torch.tensor(r.injected)))
    return tokens
""")
    line = "--correction reference --no-eda --all-wrong-advantage -1"
    assert run(IDEA + line, main) == 0
    for m, rows in zip(run.lines(), by_group(by_group(run.samples()))):
        rows = sum(rows, [])
        right = [s["advantage"] for s in rows if "correction" not in s]
        assert m["loss"] == pytest.approx(-sum(right) / len(rows), abs=1e-6)


def test_another_reward(run):
    """Any float: here shorter is better. GEC corrects what is wrong, whatever the reward."""
    main = edited("""
def rewards(responses, flags):
    values = [r.accuracy - 0.01 * len(r.text) for r in responses]
    return torch.tensor(values, dtype=torch.float64)
""")
    assert run(IDEA, main) == 0
    means = []
    for rows in by_group(run.samples()):
        r = [final(s) - 0.01 * len(s.get("corrected", s["response"])) for s in rows]
        r = torch.tensor(r, dtype=torch.float64)
        A = (r - r.mean()) / (r.std() + 1e-4)
        assert [s["advantage"] for s in rows] == pytest.approx(A.tolist())
        assert all(bool(s.get("correction")) == (s["accuracy"] == 0) for s in rows)
        means.append(r.mean().item())
    for step, m in enumerate(run.lines()):
        assert m["reward"] == pytest.approx(sum(means[2 * step : 2 * step + 2]) / 2)


def test_the_readme_names_functions_and_tables_that_are_there():
    readme = (Path(eg.__file__).parent / "README.md").read_text(encoding="utf-8")
    paragraph = readme[readme.index("To try an idea") :].split("\n\n")[0]
    names = set(re.findall(r"`([A-Za-z_]\w*(?:\.\w+)*)`", paragraph)) - {"edge_grpo.py"}
    assert len(names) >= 3
    for name in names:
        head, *rest = name.removeprefix("edge_grpo.").split(".")
        assert hasattr(eg, head), f"README: {name} is not in edge_grpo.py"
        fields = getattr(getattr(eg, head), "__dataclass_fields__", {})
        assert all(part in fields or hasattr(getattr(eg, head), part) for part in rest), name
