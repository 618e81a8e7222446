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
    equal,
    flags_of,
    group_of,
    json_lines,
    logprobs_of,
    own_copy,
    response,
    rows_of,
    sampled_groups,
    train_step,
    trainer_of,
    write_problems,
)

import data
import edge_grpo as eg
import engine
import eval as evaluation
from engine.trainer import Trainer
from errors import UserError
from rollout import Sample, Sampler

pytestmark = pytest.mark.method
NAN = math.nan


# --- The loss --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ratio, A, expected",
    [
        (1.5, 1, -1.2),
        (1.5, -1, 1.5),
        (0.5, 1, -0.5),
        (0.5, -1, 0.8),
        (1.5, 0, 0),
    ],
)
def test_the_clipped_loss_on_worked_numbers(ratio, A, expected):
    """LUFFY's shaping is in the whole step below."""
    logp, one = torch.tensor([math.log(ratio)]), torch.ones(1)
    loss = eg.policy_loss(logp, torch.zeros(1), A * one, one)
    assert loss.item() == pytest.approx(expected)


def test_the_kl_penalty_on_worked_numbers():
    logp, reference_logp = torch.tensor([[-1.0, -2.0], [-1.0, -1.0]])
    penalty = eg.kl_penalty(logp, reference_logp)
    assert penalty.tolist() == pytest.approx([0, math.e - 2])


@pytest.mark.parametrize(
    "line, weights",
    [
        ("", [1 / 120, 1 / 120, 1 / 60, 1 / 90]),
        ("--mask-injected", [1 / 20, 0, 0, 1 / 60]),  # B is 2: row 1 is masked whole
        ("--mask-injected --loss token", [1 / 40, 0, 0, 1 / 40]),
        ("--mask-truncated", [1 / 80, 1 / 80, 1 / 40, 0]),
        ("--loss constant --max-new-tokens 50 --mask-truncated", [0.01, 0.01, 0.01, 0]),
    ],
)
def test_masked_tokens_are_in_no_count(line, weights):
    """Row 0 has 10 sampled and 30 injected tokens, row 1 injected ones only, row 2 is truncated."""
    rows = [
        response(1, [5] * 40, [False] * 10 + [True] * 30),
        response(1, [5] * 20, [True] * 20),
        response(0, [5] * 30, finished=False),
    ]
    group = group_of(rows, A_hat=torch.tensor([1.0, 1.0, -2.0]))
    tokens = eg.tokens_of([group], flags_of(line))
    sampled, injected = tokens[0].weights[[9, 10]].tolist()
    found = [sampled, injected, tokens[1].weights[0].item(), tokens[2].weights[29].item()]
    assert found == pytest.approx(weights)
    assert [t.advantages[0].item() for t in tokens] == [1, 1, -2]


def test_tokens_cannot_be_built_by_position():
    with pytest.raises(TypeError):
        eg.Tokens(None, None, None)


# --- The update ------------------------------------------------------------------------------


def random_groups(policy):
    """Three groups of four, with empty responses, responses of one token, truncated ones, and one
    prompt in two groups. Nothing is known of any token but whether it was injected."""
    draw = torch.Generator().manual_seed(3)
    problems = data.load("tiny:1-3")
    groups = []
    lengths_of_groups = (0, 1, 5, 30), (1, 2, 0, 40), (12, 1, 3, 20)
    for number, lengths in enumerate(lengths_of_groups):
        rows = []
        for i, n in enumerate(lengths):
            ids = torch.randint(300, (n,), generator=draw).tolist()
            injected = torch.rand(n, generator=draw) < 0.4
            r = response(float(i in (1, number + 1)), ids, injected.tolist())
            r.entropies = [NAN] * n
            r.finished = i != number + 1
            r.correction = ("", "answer", "reference", "reflect")[i]
            rows.append(r)
        groups.append(group_of(rows, number))
        groups[number].prompt = policy.prompt_ids(problems[number % 2].question)
    return groups


def forward(model, prompt, ids, temperature):
    """logp and entropy (T,), from whole logits of one row."""
    rows = torch.tensor([prompt + ids])
    logits = model(rows).logits[0, len(prompt) - 1 : -1]
    logp = torch.log_softmax(logits / temperature, -1)
    entropy = -(logp.exp() * logp).sum(-1)
    return logp[range(len(ids)), ids], entropy


def independent_advantages(rows, flags):
    """A (B,) of groups of four."""
    accuracies = [r.accuracy for _, r in rows]
    A = torch.tensor(accuracies).double().view(-1, 4)
    centred = A - A.mean(1, keepdim=True)
    A = (centred / (A.std(1, keepdim=True) + 1e-4)).flatten()
    of_correction = dict(zip(eg.CORRECTIONS, flags.correction_factors))
    factors = [of_correction.get(r.correction, 1.0) for _, r in rows]
    return A * torch.tensor(factors)


def independent_masks(rows, flags):
    masks = []
    for _, r in rows:
        mask = torch.ones(len(r.ids), dtype=torch.bool)
        if flags.mask_injected:
            mask &= ~torch.tensor(r.injected, dtype=torch.bool)
        if flags.mask_truncated and not r.finished:
            mask[:] = False
        masks.append(mask)
    return masks


def independent_terms(logp, old, reference, injected, A_hat, flags):
    """The loss (T,) of each token of a row, and how many of its ratios are clipped."""
    ratio = (logp - old).exp()
    inside = ratio.clamp(1 - flags.eps_low, 1 + flags.eps_high)
    term = -torch.min(ratio * A_hat, inside * A_hat)
    if flags.injected_shaping:
        p = logp.exp()
        shaped = -A_hat * p / (p + flags.injected_shaping)
        term = torch.where(injected, shaped, term)
    d = reference.detach() - logp
    penalty = (d.exp() - d - 1) * ~injected  # of the policy's own tokens
    return term + flags.kl * penalty, (inside != ratio).sum().item()


def independent_updates(model, reference, groups, flags, lr):
    """The updates of one rollout in float64: a row at a time, autograd through everything, torch's
    AdamW. Changes the model. Yields loss, norm, gradient, share of clipped tokens."""
    rows = rows_of(groups)
    A = independent_advantages(rows, flags)
    masks = independent_masks(rows, flags)
    lengths = [mask.sum().item() for mask in masks]
    B = sum(n > 0 or not r.ids for n, (_, r) in zip(lengths, rows))
    how = dict(betas=tuple(flags.betas), weight_decay=flags.weight_decay)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, **how)
    old = None
    for _ in range(flags.updates_per_rollout):
        passes = [forward(model, prompt, r.ids, flags.temperature) for prompt, r in rows]
        means = [entropy.sum() / max(len(entropy), 1) for _, entropy in passes]
        P = torch.stack(means)
        if old is None:
            old = [logp.detach() for logp, _ in passes]
            P_old = P.detach()
        A_hat = A
        if flags.eda:  # the value stays that of the policy that sampled
            mean = P_old.view(-1, 4).mean(1).repeat_interleave(4)
            relative = (P_old + (P - P.detach()) * flags.eda_grad) / mean
            A_hat = A / relative.clamp(*(flags.eda_clamp or [1e-4]))
        loss, clipped = 0.0, 0
        for i, (prompt, r) in enumerate(rows):
            of_reference, _ = forward(reference, prompt, r.ids, flags.temperature)
            injected = torch.tensor(r.injected, dtype=torch.bool)
            term, count = independent_terms(
                passes[i][0], old[i], of_reference, injected, A_hat[i], flags
            )
            clipped += count
            weight = {
                "sequence": 1 / (B * max(lengths[i], 1)),
                "token": 1 / sum(lengths),
                "constant": 1 / (B * flags.max_new_tokens),
            }
            loss = loss + weight[flags.loss] * (masks[i] * term).sum()
        optimizer.zero_grad()
        loss.backward()
        gradient = {name: p.grad.clone() for name, p in model.named_parameters()}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), flags.grad_clip)
        optimizer.step()
        share = clipped / sum(map(len, old))
        yield loss.item(), norm.item(), gradient, share


def distance(a, b):
    """|a - b| / |b| of all weights or gradients together."""
    square = of_b = 0.0
    for name in b:
        square += (a[name].double() - b[name].double()).square().sum().item()
        of_b += b[name].double().square().sum().item()
    return math.sqrt(square / of_b)


@pytest.mark.paper
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
    """Losses, gradients, weights, and the share of clipped tokens as one would add it to `sums`:
    over the micro-batches of an update."""
    flags = flags_of("--temperature .8 --group-size 4 --micro-batch-tokens 150 " + line)
    own, groups = own_copy(policy), random_groups(policy)
    trainer = trainer_of(own, flags, keep_initial=True)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in trainer.initial_model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=noise))
    start = copy.deepcopy(own.model.state_dict())
    model = copy.deepcopy(own.model).double()
    reference = copy.deepcopy(trainer.initial_model).double()
    updates = list(independent_updates(model, reference, groups, flags, lr=1e-4))
    losses, norms, gradients, shares = zip(*updates)

    clipped, policy_loss = [], eg.policy_loss

    def count_clipped(logp, old_logp, A, weights, low, high):
        ratio = torch.exp(logp - old_logp)
        outside = (ratio < 1 - low) | (ratio > 1 + high)
        clipped.append(outside.sum())
        return policy_loss(logp, old_logp, A, weights, low, high)

    monkeypatch.setattr(eg, "policy_loss", count_clipped)
    stats, ours = train_step(trainer, groups, flags, lr=1e-4)
    n = len(updates)
    assert stats["loss"] == pytest.approx(sum(losses) / n, rel=1e-5, abs=1e-5)
    assert stats["grad_norm"] == pytest.approx(sum(norms) / n, rel=1e-4)
    assert (stats["skipped_updates"], stats["lr"]) == (0, 1e-4)
    off = [distance(*pair) for pair in zip(ours, gradients, strict=True)]
    assert off[0] < 1e-5
    assert max(off) < 1e-3
    moves = []
    for weights in (own.model.state_dict(), model.state_dict()):
        moves.append({name: weights[name].double() - start[name] for name in gradients[0]})
    assert distance(*moves) < 2e-3
    tokens = sum(len(r.ids) for _, r in rows_of(groups))
    for share, counts in zip(shares, torch.stack(clipped).view(n, -1)):
        assert counts.sum() / tokens == pytest.approx(share, abs=0.01)
    assert shares[0] == 0
    assert (max(shares) > 0) == (n > 1)


@pytest.mark.paper
def test_sft_is_the_mean_log_likelihood_of_the_references(policy):
    flags = flags_of("--method sft --micro-batch-tokens 300")
    groups = eg.references(policy, data.load("tiny:5-8")[:4])
    model = copy.deepcopy(policy.model)
    loss = 0.0
    eg.grade(policy, groups)
    stats, [gradient] = train_step(trainer_of(own_copy(policy), flags), groups, flags)
    for group in groups:
        [r] = group.responses
        assert r.ids == policy.encode(group.problem.solution) + [policy.end_id]
        assert r.correction == "reference"
        assert r.finished
        assert not group.sampled
        logp, _ = forward(model, group.prompt, r.ids, temperature=1.0)
        loss = loss - logp.mean() / 4
    loss.backward()
    assert stats["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert stats["skipped_updates"] == 0
    expected = {name: p.grad for name, p in model.named_parameters()}
    assert distance(gradient, expected) < 1e-4


def test_the_first_update_tells_the_trainers_numbers_of_the_policy_that_sampled(policy):
    """Without EDA at no extra pass. The sampler's numbers stay beside them, where it has some."""
    flags = flags_of("--no-eda --updates-per-rollout 2 --max-new-tokens 9")
    groups = sampled_groups(policy, flags, data.load("tiny:5-8")[:2]) + corrected_groups(policy)
    for _, r in rows_of(groups):
        r.entropies = [h + 0.5 for h in r.entropies]
    known = [r.entropies.copy() for _, r in rows_of(groups)]
    trainer = trainer_of(own_copy(policy), flags)
    expected, trainer.logprobs = logprobs_of(trainer, groups), None
    train_step(trainer, groups, flags)
    for (_, r), before, (logp, entropies) in zip(rows_of(groups), known, expected):
        assert torch.allclose(r.trainer_logp, logp, atol=1e-5)
        assert torch.allclose(r.trainer_entropies, entropies, atol=1e-5)
        wanted = [e if math.isnan(h) else h for h, e in zip(before, entropies.tolist())]
        assert r.entropies == pytest.approx(wanted, abs=1e-5)
    for group in groups:
        assert group.P.tolist() == [r.entropy for r in group.responses]


# --- Whole runs ------------------------------------------------------------------------------

SMALL = (
    "--questions-per-step 1 --group-size 4 --max-new-tokens 12 --correction-tokens 6 --save-every 1"
    " --steps 4 --eval-tasks"
)


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    return write_problems(tmp_path_factory.mktemp("data") / "nine.jsonl", data.load("tiny:1-2")[:9])


@pytest.fixture
def run(tmp_path, problems, monkeypatch):
    """run(flags, main) -> exit code. run.lines() are those of metrics.jsonl, run.samples() those
    of samples.jsonl, run.weights the weights before each update and after the last."""

    def start(line="", main=eg.main):
        argv = [*SMALL.split(), "--data", str(problems), "--out", str(out), *line.split()]
        return main(argv)

    def keep_weights(trainer, *rest, **more):
        before = copy.deepcopy(trainer.params)
        stats = update(trainer, *rest, **more)
        start.weights[-1:] = [before, copy.deepcopy(trainer.params)]
        return stats

    out, update, start.weights = tmp_path / "run", eg.update, []
    monkeypatch.setattr(eg, "update", keep_weights)
    start.out, start.samples = out, lambda: json_lines(out / "samples.jsonl")
    start.lines = lambda: json_lines(out / "metrics.jsonl")
    start.checkpoints = lambda: sorted(f.name for f in out.glob("checkpoints/*"))
    return start


def spoil(monkeypatch, calls, value=NAN, gradient=False, stop_at=None):
    """The loss, or only its gradient, is not finite in these calls (one for each update)."""
    policy_loss, call = eg.policy_loss, iter(range(99))

    def spoiled(logp, *rest):
        number, loss = next(call), policy_loss(logp, *rest)
        if number == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        if number not in calls:
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
    assert capsys.readouterr().out.count("not finite") == 2  # then, and at the end
    assert run.checkpoints() == ["step-1", "step-3", "step-4"]  # never go back to a bad step
    assert equal(after[0], after[1])
    assert not equal(after[1], after[2])


def test_five_bad_steps_in_a_row_end_the_run_and_fewer_do_not(run, monkeypatch, capsys):
    spoil(monkeypatch, [1, 2, 3, 4, *range(6, 99)])
    assert run("--steps 20 --keep 1") == 2
    skipped = "".join(str(m["skipped_updates"]) for m in run.lines())
    assert skipped == "01111011111"
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "in 5 steps in a row" in error
    assert f"newest checkpoint: {run.out / 'checkpoints' / 'step-6'}" in error
    assert run.checkpoints() == ["step-6"]
    assert not (run.out / "final").exists()


def test_bad_steps_are_counted_on_after_a_signal_and_a_resume(run, monkeypatch):
    spoil(monkeypatch, range(1, 99), stop_at=3)
    assert run("--steps 20 --keep 9") == 143
    assert run("--steps 20 --keep 9 --resume") == 2
    assert len(run.lines()) == 1 + 5
    assert "step-1" in run.checkpoints()


def test_each_of_several_updates_is_judged_by_itself(run, monkeypatch):
    spoil(monkeypatch, [1])
    assert run("--updates-per-rollout 3 --steps 1") == 0
    assert run.lines()[0]["skipped_updates"] == 1


def test_weights_that_explode_end_the_run_in_one_sentence(run, capsys):
    assert run("--lr 1e30") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "logits are not finite" in error
    assert "lower --lr; newest checkpoint: none was saved" in error
    assert not run.checkpoints()  # a policy that cannot be sampled is not saved


COLLAPSED = "mixed_groups=0 mixed_groups_corrected=0 advantage_variance=0 loss=0 grad_norm=0 "
EMPTY = "response_tokens=0 truncated=1 accuracy=0 "
ONE_TOKEN = "response_tokens=1 truncated=1 accuracy=0 "


@pytest.mark.paper
@pytest.mark.parametrize(
    "case, line, expected, learns",
    [
        ("empty", "--method grpo --loss sequence", COLLAPSED + EMPTY + "entropy=0", False),
        ("empty", "--method grpo --loss token", COLLAPSED + EMPTY, False),
        ("empty", "", EMPTY, True),
        ("wrong", "", COLLAPSED + "accuracy=0 accuracy_corrected=0 reward=0", False),
        ("right", "", COLLAPSED + "accuracy=1 reward=1 reflected=0 answered=0", False),
        ("short", "--method edge-grpo", ONE_TOKEN, True),
        ("short", "--method grpo", COLLAPSED + ONE_TOKEN, False),
        ("short", "--method force-r-eda", ONE_TOKEN + "reflected=4 sampled_tokens=4", False),
        ("no pass", "--no-eda", "skipped_updates=0", True),
        ("sharp", "", "entropy_sampled=0 skipped_updates=0", True),
        (
            "",
            "--group-size 1 --no-eda --all-wrong-advantage -.5",
            "mixed_groups=0 advantage_variance=0",
            True,
        ),
    ],
)
def test_rows_at_the_edge_give_finite_numbers(run, monkeypatch, case, line, expected, learns):
    """Nothing is sampled; the grader says always the same; one token and reflections of none; no
    pass over injected rows; a policy without entropy (EDA divides by it); groups of one."""
    load = engine.load_policy

    def sharp(*arguments):
        policy = load(*arguments)
        policy.model.model.norm.weight.data.mul_(1e4)
        return policy

    if case == "empty":
        nothing = Sample([], [], False)
        monkeypatch.setattr(
            engine.Policy, "sample", lambda _, prompts, *rest: [nothing] * len(prompts)
        )
    if case in ("wrong", "right"):
        score = (1.0, float(case == "right"))
        monkeypatch.setattr(eg.reward, "score_all", lambda texts, *rest: [score] * len(texts))
    if case == "short":
        line += " --max-new-tokens 1 --correction-tokens 0"
    if case == "no pass":
        monkeypatch.setattr(Trainer, "logprobs", None)
    if case == "sharp":
        monkeypatch.setattr(engine, "load_policy", sharp)
    assert run(line) == 0
    for m in run.lines():
        assert all(value is None or math.isfinite(value) for value in m.values())
        for setting in expected.split():
            name, _, value = setting.partition("=")
            assert m[name] == pytest.approx(float(value), abs=1e-3), name
    assert equal(run.weights[0], run.weights[-1]) != learns


def test_a_run_leaves_out_long_prompts_repeats_what_is_left_and_counts_its_tokens(run, tmp_path):
    path = tmp_path / "two.jsonl"
    rows = [dict(problem=text, answer="1") for text in ("How many? " * 100, "1+1?")]
    path.write_text("\n".join(map(json.dumps, rows)))
    line = "--max-prompt-tokens 90 --questions-per-step 3 --method force-r --lr 1e-3 --data "
    assert run(line + str(path)) == 0
    config = json.loads((run.out / "config.json").read_text())
    assert config["problems"] == 1
    assert config["problems_left_out"] == [f"{path}:1"]
    for step, m in enumerate(run.lines()):
        assert m["lr"] == pytest.approx(1e-3 * (1 - step / 4))
        seconds = m["seconds_sample"] + m["seconds_correct"]
        assert m["tokens_per_second"] * seconds == pytest.approx(m["sampled_tokens"])


TRAINER = dict(temperature=1.0, entropy_grad=False, betas=(0.9, 0.99), weight_decay=0.0)
TRAINER |= dict(offload=False, checkpointing=False, keep_initial=False)
OTHER = dict(temperature=0.7, entropy_grad=True, betas=(0.5, 0.6), weight_decay=0.1)
OTHER |= dict(offload=True, checkpointing=True, keep_initial=True)
FLAGS = "--temperature .7 --eda-grad --betas .5 .6 --weight-decay .1 --offload-optimizer --kl .1 "


@pytest.mark.parametrize(
    "line, expected",
    [("--method sft --temperature .7", TRAINER), (FLAGS + "--gradient-checkpointing", OTHER)],
)
def test_a_run_makes_the_trainer_that_its_flags_ask_for(run, monkeypatch, line, expected):
    made = []

    def spy(policy, micro_batch_tokens, **more):
        made.append((micro_batch_tokens, more))
        raise UserError("this is enough")

    monkeypatch.setattr(eg, "Trainer", spy)
    assert run(line + " --micro-batch-tokens 99") == 2
    assert made == [(99, expected)]


def out_of_memory(*_, **__):
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0")


@pytest.mark.parametrize(
    "owner, name, flag",
    [
        (eg, "policy_loss", "--micro-batch-tokens"),
        (Trainer, "logprobs", "--micro-batch-tokens"),
        (Sampler, "sample", "--max-rows"),
        (eg, "Trainer", "--offload-optimizer"),
    ],
)
def test_out_of_memory_ends_the_run_with_the_flag_to_set(
    run, monkeypatch, capsys, owner, name, flag
):
    monkeypatch.setattr(owner, name, out_of_memory)
    assert run() == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "out of" in last
    assert flag in last


def test_no_cache_of_an_evaluation_stands_in_the_way_of_the_update(tmp_path):
    flags, policy = flags_of(f"--out {tmp_path}"), engine.load_policy("tiny", "cpu")
    policy.sampler.fixed = True  # as on a GPU, where the cache outlives the call
    tasks = {"easy": data.load("tiny:1-3:validation")[:2]}
    evaluation.while_training(policy, tasks, flags, 0)
    assert policy.sampler.slots is None


# --- A reader's changes ----------------------------------------------------------------------
# Each is a run of edge_grpo.py with functions written anew, or one row and one function added.

SOURCE = Path(eg.__file__).read_text(encoding="utf-8")
IDEA = "--steps 3 --save-every 0 --questions-per-step 2 --max-new-tokens 48 --temperature 1.3 "


def edited(functions, row=None):
    """main() of edge_grpo.py with these functions in place of those of their names. With a row:
    it stands at the end of CORRECTIONS, and the function before."""
    lines, new = SOURCE.splitlines(), {}
    for node in ast.parse(functions).body:
        new[node.name] = ast.get_source_segment(functions, node)
    for node in reversed(ast.parse(SOURCE).body):
        first, after = node.lineno - 1, node.end_lineno
        if getattr(node, "name", "") in new:
            lines[first:after] = new[node.name].splitlines()
        if row and lines[first].startswith("CORRECTIONS"):
            lines[first:after] = [functions, *lines[first : after - 1], row, "}"]
    module = sys.modules["edited"] = ModuleType("edited")
    exec(compile("\n".join(lines), "edge_grpo.py, edited", "exec"), module.__dict__)
    return module.main


EQUATIONS = """
def rewards(responses, flags):  # any float: here shorter is better
    values = [r.accuracy - 0.01 * len(r.text) for r in responses]
    return torch.tensor(values, dtype=torch.float64)

def group_advantages(rewards, eps=1e-4, std="group"):  # against the mean of the other ones
    others = (rewards.sum(dim=1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return rewards - others

def entropy_driven_advantages(advantages, response_entropy, clamp=None):
    return advantages * torch.exp(-response_entropy)
"""


def test_new_equations(run):
    """What GEC corrects is still what the grader calls wrong."""
    assert run(IDEA, edited(EQUATIONS)) == 0
    samples, rewards = run.samples(), []
    for s in samples:
        accuracy = s.get("accuracy_corrected", s["accuracy"])
        rewards.append(accuracy - 0.01 * len(s.get("corrected", s["response"])))
        assert bool(s.get("correction")) == (s["accuracy"] == 0)
    of_groups = torch.tensor(rewards).view(-1, 4)  # (Q of all steps, G)
    A = (of_groups - of_groups.mean(1, keepdim=True)) * 4 / 3
    assert [s["advantage"] for s in samples] == pytest.approx(A.flatten().tolist(), abs=1e-5)
    for s in samples:
        expected = s["advantage"] * math.exp(-s["entropy"])
        assert s["advantage_eda"] == pytest.approx(expected, rel=1e-5)
    for m, of_step in zip(run.lines(), of_groups.view(3, 8)):
        assert m["reward"] == pytest.approx(of_step.mean().item())


HINT = """
def sibling_hint(policy, group, i, u):
    sibling = group.responses[i - 1]
    return policy.encode(f" Another one has {len(sibling.ids)} tokens.")
"""
HINT_ROW = """    "sibling_hint": Correction(
        adds=sibling_hint, keeps=True, continues=True, needs_solution=False, count="hinted"),"""


ALL_BUT_PREFIX = ["0"] * (len(eg.CORRECTIONS) + 1)  # the new row is the last one
ALL_BUT_PREFIX[:3] = [".3", ".2", ".2"]
ALL_BUT_PREFIX[-1] = ".3"


@pytest.mark.parametrize(
    "line", ["--correction sibling_hint", "--guided-probs " + " ".join(ALL_BUT_PREFIX)]
)
def test_a_new_correction_is_one_row_and_one_function_which_sees_its_group(run, line):
    """It can be drawn, is counted, is seen in the samples, and the policy goes on behind it."""
    assert run(IDEA + line, edited(HINT, HINT_ROW)) == 0
    lines, wrong = run.lines(), [s for s in run.samples() if s["accuracy"] == 0]
    hinted = [s for s in wrong if s["correction"] == "sibling_hint"]
    assert len(hinted) == sum(m["hinted"] for m in lines) > 0
    others = sum(m[c.count] for m in lines for c in eg.CORRECTIONS.values())
    assert len(hinted) + others == len(wrong)
    assert (others > 0) == ("probs" in line)
    rests = [s["corrected"].removeprefix(s["response"]) for s in hinted]
    assert all(re.match(r" Another one has \d+ tokens\.", rest) for rest in rests)
    assert any(not rest.endswith("tokens.") for rest in rests)
    for m in lines:
        assert 0 <= m["sibling_hint_fixed"] <= m["hinted"] and "advantage_share_sibling_hint" in m


def test_another_weight_of_injected_tokens(run):
    """None: then right responses alone are trained on, where a reference replaces all others."""
    weights = edited("""
def tokens_of(groups, flags):
    tokens = []
    rows = [r for group in groups for r in group.responses]
    A_hat = torch.cat([group.A_hat for group in groups]).tolist()
    for r, a in zip(rows, A_hat):
        injected = torch.tensor(r.injected)
        weights = ~injected / (len(r.ids) * len(rows))
        advantages = torch.full_like(weights, a)
        tokens.append(Tokens(weights=weights, advantages=advantages, injected=injected))
    return tokens
""")
    line = "--correction reference --correction-factors 1 1 5 --all-wrong-advantage -1"
    assert run(IDEA + line, weights) == 0
    right = [0.0, 0.0, 0.0]
    for s in run.samples():
        right[s["step"] - 1] += 0 if "correction" in s else s["advantage_eda"]
    assert [-8 * m["loss"] for m in run.lines()] == pytest.approx(right, abs=1e-5)


def test_the_readme_names_functions_and_tables_that_are_there():
    readme = (Path(eg.__file__).parent / "README.md").read_text(encoding="utf-8")
    paragraph = readme[readme.index("To try an idea") :].split("\n\n")[0]
    names = {*re.findall(r"`(?:edge_grpo\.)?(\w+)`", paragraph)}
    assert len(names) >= 3
    for name in names:
        assert hasattr(eg, name), name
