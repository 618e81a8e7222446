"""edge_grpo.py up to its loss: flags, groups of responses, advantages, EDA, GEC. test_update.py
has the loss, the update and whole runs."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from helpers import (
    corrected_groups,
    flags_of,
    group_of,
    own_copy,
    response,
    trainer_of,
    wrong_and_right,
)

import data
import edge_grpo as eg
import engine
import reward
from data import Problem
from engine.processes import stream
from engine.trainer import Trainer
from errors import UserError

pytestmark = pytest.mark.method
PROBLEMS = [Problem(str(k), ("1",), None, str(k)) for k in range(10)]


@pytest.fixture(scope="module")
def policy():
    return engine.load_policy("tiny", "cpu")


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


# --- Flags -----------------------------------------------------------------------------------

PAPER = dict(questions_per_step=1, group_size=8, steps=1000, lr=1e-6, temperature=0.6, top_p=1)
PAPER |= dict(max_new_tokens=1024, correction_tokens=256, max_prompt_tokens=512, grad_clip=1)
PAPER |= dict(betas=[0.9, 0.999], weight_decay=0, seed=42, kl=0, eps_low=0.2, eps_high=0.2)
PAPER |= dict(data="deepscaler-hard-1k", guided_probs=[0.5, 0.25, 0.25], correction="guided")
PAPER |= dict(eda=True, loss="sequence", advantage_std="group", updates_per_rollout=1, sft=False)


@pytest.mark.parametrize(
    "argv, expected",
    [
        ("--model Qwen2.5-Math-7B", PAPER),
        ("--model tiny --profile paper", PAPER),
        ("--model tiny", dict(steps=60, data="tiny:5-8", lr=1e-4, eda=True)),
        ("--model tiny --steps 3 --method grpo", dict(steps=3, lr=1e-4, eda=False)),
        ("--method force-r-eda", dict(correction="reflect", eda=True)),
        ("--method force-r", dict(correction="reflect", eda=False)),
        ("--no-eda", dict(correction="guided", eda=False)),
        ("--method grpo --eda", dict(correction="none", eda=True)),
        ("--method dr-grpo", dict(advantage_std="none", loss="constant", eda=False)),
        ("--method dapo", dict(eps_high=0.28, loss="token", mask_truncated=True, eda=False)),
        ("--method dapo --eps-high .3", dict(eps_high=0.3, resample_rounds=10)),
        ("--method sft", dict(sft=True, correction="none", eda=False)),
        ("--eda-grad --updates-per-rollout 2 --injected-shaping .1", dict(eda_grad=True)),
        ("--group-size 1 --all-wrong-advantage -1", dict(group_size=1)),
        ("--group-size 1 --method sft", dict(group_size=1)),
    ],
)
def test_flags_are_the_profile_then_the_methods_row_then_what_is_given(argv, expected):
    flags = vars(flags_of(argv))
    assert {name: flags[name] for name in expected} == expected


def test_the_tiny_settings_belong_to_the_profile_not_to_the_name():
    tiny, other = flags_of("--model tiny"), flags_of("--model runs/X/final --profile tiny")
    assert replace(other, model="tiny", out=tiny.out, profile="auto") == tiny


SFT_REFUSES = (
    "correction reflect, eda, kl .1, injected-shaping .1, mask-injected, updates-per-rollout 2"
)


@pytest.mark.parametrize(
    "argv, says",
    [
        ("--stepz 3", "--stepz"),
        ("--step 3", "--step"),
        ("--loss mean", "--loss"),
        ("--steps many", "--steps"),
        ("--all-wrong-advantage 1", "--all-wrong-advantage"),
        ("--group-size 1", "a group of one has no advantage"),
        ("--correction wait", "must be none, guided, reflect"),
        ("--guided-probs .2 .2 .2 .2 .2", "at most 4"),
        ("--guided-probs .5 .4", "sum to 1"),
        ("--method force-r --guided-probs 0 .5 .5", "belongs to --correction guided"),
        ("--method grpo --guide all-wrong", "--guide"),
        ("--method grpo --guide-at-most 1", "--guide-at-most"),
        ("--correction-factors 1 1 1 1 1", "at most 4"),
        ("--eda-clamp 1", "LO HI"),
        ("--eda-clamp 1 2 3", "LO HI"),
        ("--eda-clamp 0 1", "0 < LO < HI"),
        ("--eda-clamp .5 1 2 1", "0 < LO < HI"),
        ("--no-eda --eda-clamp .5 2", "need EDA"),
        ("--no-eda --eda-grad", "need EDA"),
        ("--no-eda --eda-rows right", "need EDA"),
        ("--betas .9 1", "below 1"),
        ("--resume --overwrite", "one of the two"),
        *[(f"--method sft --{flag}", "--sft trains") for flag in SFT_REFUSES.split(", ")],
    ],
)
def test_flags_in_conflict_are_refused_in_a_sentence_that_names_them(argv, says):
    with pytest.raises(UserError, match=says):
        flags_of(argv)


@pytest.mark.xfail(strict=True, reason="argparse reads --no-echo as the negation of a flag --echo")
def test_no_echo_can_be_turned_on():
    assert flags_of("--no-echo").no_echo


# --- Groups of responses ---------------------------------------------------------------------


def questions(line, *steps):
    batches = [eg.batch_of_problems(PROBLEMS, flags_of(line), *step) for step in steps]
    return [p.question for batch in batches for p in batch]


def test_epochs_are_permutations_and_rounds_of_resampling_have_their_own():
    everything = sorted(p.question for p in PROBLEMS)
    order = questions("--questions-per-step 4", *[(step,) for step in range(5)])
    assert sorted(order[:10]) == sorted(order[10:]) == everything and order[:10] != order[10:]
    long = questions("--questions-per-step 25", (0,), (1,))  # more than there are
    assert sorted(long) == sorted(everything * 5) and long[:20] == order
    assert questions("--questions-per-step 4 --seed 1", (0,)) != order[:4]
    rounds = {tuple(questions("", (2, *again))) for again in ((), (1,), (2,))}
    assert len(rounds) == 3


def test_a_step_samples_groups_within_the_limit_each_row_with_a_stream_of_its_own(policy):
    flags = flags_of("--temperature 9 --max-new-tokens 12 --group-size 4")
    problems = data.load("tiny:5-8")[:2] * 2  # each of them comes twice
    steps = [eg.sample(policy, problems, flags, *key) for key in ((0,), (1,), (0, 1))]
    for groups in steps:
        assert [group.problem for group in groups] == problems
        assert [group.number for group in groups] == [0, 1, 2, 3]
        assert [group.row(3) for group in groups] == [3, 7, 11, 15]
        for group in groups:
            assert group.prompt == policy.prompt_ids(group.problem.question)
            for r in group.sampled:
                assert 0 < len(r.ids) == len(r.sampler_logp) == len(r.entropies) <= 12
                assert r.injected == [False] * len(r.ids) and r.sampled_tokens == len(r.ids)
                assert r.finished == (r.ids[-1] in policy.end_ids)
    rows = {tuple(r.ids) for groups in steps for group in groups for r in group.sampled}
    assert len(rows) == 3 * 16


def test_reflections_draw_from_other_streams_and_branches_differ_by_step(policy, monkeypatch):
    """A stream's numbers belong to positions, and a reflection begins where a sample may end."""
    seen, plain = [], engine.Policy.sample

    def spy(self, prompts, limits, seeds, *rest):
        seen.append((seeds, *rest))
        return plain(self, prompts, limits, seeds, *rest)

    monkeypatch.setattr(engine.Policy, "sample", spy)
    flags = flags_of("--method force-r --temperature 2 --top-p .9 --max-new-tokens 4")
    branches = []
    for step in (0, 1):
        groups = eg.sample(policy, data.load("tiny:5-8")[:2], flags, step)
        for r in [r for group in groups for r in group.responses]:
            r.accuracy = 0.0
        guided = copy.deepcopy(groups)
        eg.correct_errors(policy, groups, flags, step)
        eg.correct_errors(policy, guided, flags_of(), step)
        branches.append([r.correction for group in guided for r in group.responses])
    assert branches[0] != branches[1]
    samples, reflections = [seen[k] for k in (0, 3)], [seen[k] for k in (1, 4)]
    assert all(tuple(call[1:]) == (2.0, 0.9) for call in samples + reflections)
    assert len(set(sum([call[0] for call in samples + reflections], []))) == 4 * 16


def test_grading_fills_in_what_is_missing_and_nothing_else(policy, monkeypatch):
    calls, score_all = [], reward.score_all

    def spy(texts, golds, questions):
        calls.append((texts, golds, questions))
        return score_all(texts, golds, questions)

    monkeypatch.setattr(reward, "score_all", spy)
    known = response(accuracy=0.5, text="as it was", format=0.25)
    ids = policy.encode("\\boxed{2}") + [policy.end_id]
    for no_echo, question in ((False, ""), (True, "1+1?")):
        new = replace(response(ids=ids), accuracy=None, format=None)
        eg.grade(policy, [group_of([known, new])], replace(flags_of(), no_echo=no_echo))
        assert (new.text, new.format, new.accuracy) == ("\\boxed{2}", 1.0, 1.0)
        assert calls.pop() == (["\\boxed{2}"], [["2"]], [question])
    assert (known.text, known.format, known.accuracy) == ("as it was", 0.25, 0.5)


def test_dapo_replaces_equal_groups_by_new_questions_and_counts_all_that_was_sampled(policy):
    flags = flags_of("--method dapo --questions-per-step 6 --resample-rounds 3 --temperature 1")
    problems = data.load("tiny:3-5")
    first = eg.sample(policy, eg.batch_of_problems(problems, flags, 4), flags, 4)
    eg.grade(policy, first, flags)
    kept, again = list(first), list(first)
    everything = eg.resample_equal_groups(policy, kept, problems, flags, 4)
    eg.resample_equal_groups(policy, again, problems, flags, 4)

    def mixed(group):
        return len({r.accuracy for r in group.sampled}) > 1

    was_mixed = [mixed(group) for group in first]
    assert [k is f for k, f in zip(kept, first)] == was_mixed
    assert 0 < sum(was_mixed) < sum(map(mixed, kept))
    assert [group.number for group in kept] == list(range(6))
    for one, other in zip(kept, again):  # a resumed run draws the same
        assert [r.ids for r in one.sampled] == [r.ids for r in other.sampled]
    assert everything[:6] == first and 6 < len(everything) <= 4 * 6
    assert {id(group) for group in kept} <= {id(group) for group in everything}
    new_questions = [group.problem.question for group in everything[6:]]
    in_second_round = eg.batch_of_problems(problems, flags, 4, 1)[: 6 - sum(was_mixed)]
    assert new_questions[: len(in_second_round)] == [p.question for p in in_second_round]
    assert eg.resample_equal_groups(policy, first, problems, flags_of(), 4) == first


def test_with_a_dense_reward_collapse_and_corrections_still_follow_the_accuracy(monkeypatch):
    """Shorter is better: advantages follow the reward, everything else the grader."""

    def shorter(responses, flags):
        return float64(*[r.accuracy - 0.1 * len(r.ids) for r in responses])

    monkeypatch.setattr(eg, "rewards", shorter)
    right = group_of([response(1, [5] * 4), response(1, [5] * 2)])
    wrong = group_of([response(0, [5] * 4), response(0, [5] * 2)], number=1)
    mixed = group_of([response(1, [5] * 9), response(0, [5] * 2)], number=2)
    for group in (right, wrong):
        A = 0.1 / (0.02**0.5 + 1e-4)
        assert eg.advantages(group, flags_of()).tolist() == pytest.approx([-A, A])
    assert eg.advantages(wrong, flags_of("--all-wrong-advantage -1")).tolist() == [-1, -1]
    guide = flags_of("--guide all-wrong")
    assert [eg.rows_to_correct(g, guide) for g in (right, wrong, mixed)] == [[], [0, 1], []]
    asked, flags = [], flags_of("--method dapo --resample-rounds 1 --questions-per-step 3")

    def sample(policy, problems, flags, step, *again):
        asked.append(len(problems))
        return [group_of([response(1), response(0)]) for _ in problems]

    monkeypatch.setattr(eg, "sample", sample)
    groups = [right, wrong, mixed]
    everything = eg.resample_equal_groups(None, groups, PROBLEMS, flags, 0)
    assert asked == [2] and groups[2] is mixed and everything[:3] == [right, wrong, mixed]
    assert groups[0] is everything[3] and groups[1] is everything[4]


# --- Advantages ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rewards, std, expected",
    [
        # mean 1/4, unbiased variance (9/16 + 3/16) / 3 = 1/4
        ([1, 0, 0, 0], "group", [0.75 / 0.5001] + [-0.25 / 0.5001] * 3),
        ([2, 1, 1, 1], "group", [0.75 / 0.5001] + [-0.25 / 0.5001] * 3),
        ([1, 0, 0, 0], "none", [0.75, -0.25, -0.25, -0.25]),
        ([1, 1, 1, 1], "group", [0, 0, 0, 0]),
        ([0, 0], "none", [0, 0]),
        ([1], "group", [0]),
    ],
)
def test_group_advantages_on_worked_numbers(rewards, std, expected):
    A = eg.group_advantages(float64(rewards, rewards), std=std)
    assert A[0].tolist() == pytest.approx(expected, abs=1e-12) and torch.equal(A[0], A[1])


@pytest.mark.parametrize(
    "line, accuracies, expected",
    [
        ("", [1, 0], [0.5**0.5, -(0.5**0.5)]),
        ("--method dr-grpo", [1, 0], [0.5, -0.5]),
        ("--method dr-grpo --format-weight .5", [1, 0], [0.5, -0.5]),  # all are well formed
        ("--all-wrong-advantage -1", [0, 0, 0], [-1, -1, -1]),
        ("--all-wrong-advantage -1", [1, 1, 1], [0, 0, 0]),
        ("--all-wrong-advantage -1", [1, 0], [0.5**0.5, -(0.5**0.5)]),
        ("--all-wrong-advantage -1 --correction-factors 1 3", [0, 0, 0], [-1, -3, -1]),
        ("--method dr-grpo --correction-factors 2 3", [1, 0, 1, 0], [0.5, -1.5, 1, -0.5]),
    ],
)
def test_advantages_of_a_group_with_its_flags(line, accuracies, expected):
    """The second response was corrected by an answer, the third by a reflection."""
    corrections = ["", "answer", "reflect", ""]
    rows = [response(a, correction=c) for a, c in zip(accuracies, corrections)]
    assert eg.advantages(group_of(rows), flags_of(line)).tolist() == pytest.approx(
        expected, abs=3e-4
    )


def test_the_format_counts_as_much_as_its_weight():
    rows = [response(1, format=0.0), response(0, format=1.0)]
    assert eg.rewards(rows, flags_of()).tolist() == [1, 0]
    assert eg.rewards(rows, flags_of("--format-weight .25")).tolist() == [1, 0.25]


# --- Entropy-Driven Advantage ----------------------------------------------------------------


@pytest.mark.parametrize(
    "A, P, clamp, expected",
    [
        ([1, -1], [0.2, 0.6], None, [2, -2 / 3]),  # mean .4, relative .5 and 1.5
        ([1, -1], [2.0, 6.0], None, [2, -2 / 3]),
        ([1, -1], [0.2, 0.6], (0.8, 1.2), [1 / 0.8, -1 / 1.2]),
        ([1, 1, -1, -1], [0.2, 0.6] * 2, (1, 2, 0.5, 1), [1, 1 / 1.5, -2, -1]),
        ([1, 1, -1, -1], [0.2, 0.6] * 2, (0.5, 1, 1, 2), [2, 1, -1, -1 / 1.5]),
        ([0, 0, 0], [0.5, 0.1, 0.9], None, [0, 0, 0]),  # it cannot revive a collapsed group
        ([1, -0.5, -0.5], [0, 0, 0], None, [1, -0.5, -0.5]),
        ([1, -0.5, -0.5], [0, 0.8, 0.4], None, [1e4, -0.25, -0.5]),  # one repeated token
        ([1, -0.5, -0.5], [0, 0.8, 0.4], (0.5, 2), [2, -0.25, -0.5]),
    ],
)
def test_entropy_driven_advantages_on_worked_numbers(A, P, clamp, expected):
    other = torch.ones(len(A))  # another group of the batch, with a mean of its own
    A_hat = eg.entropy_driven_advantages(float64(A, other), float64(P, other), clamp)
    assert A_hat[0].tolist() == pytest.approx(expected) and torch.equal(A_hat[1], A_hat[1] * 0 + 1)


def test_entropies_that_vanish_give_finite_advantages():
    A, P = float64([1.0, -0.5, -0.5]), torch.full((1, 3), 1e-45)
    assert eg.entropy_driven_advantages(A, P).isfinite().all()


def test_the_gradient_goes_through_each_responses_own_entropy_and_not_through_the_mean():
    A, P = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.2, 0.6]], requires_grad=True)
    eg.entropy_driven_advantages(A, P).sum().backward()
    # A^_1 = c / P_1 with c = .4 held fixed: -c / P_1^2; A^_2 = -c / P_2: c / P_2^2
    assert P.grad[0].tolist() == pytest.approx([-0.4 / 0.04, 0.4 / 0.36])


@pytest.mark.parametrize(
    "line, divided",
    [
        ("", [True, True, True]),
        ("--eda-rows right", [True, False, True]),
        ("--eda-rows wrong", [False, True, False]),
        ("--eda-rows not-reference", [True, True, False]),
        ("--eda-clamp .5 1", [True, True, True]),
    ],
)
def test_eda_divides_the_rows_that_the_flag_names(line, divided):
    rows = [response(1, correction="answer"), response(0), response(1, correction="reference")]
    group = group_of(rows, A=float64(1, -2, 1))
    relative = [0.5, 0.75, 1.0 if "clamp" in line else 1.75]
    A_hat = eg.eda(group, float64(0.2, 0.3, 0.7), flags_of(line))
    expected = [a / p if d else a for a, p, d in zip([1, -2, 1], relative, divided)]
    assert A_hat.tolist() == pytest.approx(expected)


def test_the_entropy_of_a_response_is_the_mean_over_its_tokens():
    rows = [response(ids=[5] * n, entropies=[h] * n) for n, h in ((1, 0.5), (3, 0.25), (0, 0.0))]
    rows[1].entropies[2] = 1.0
    assert eg.group_entropy(group_of(rows)).tolist() == [0.5, 0.5, 0.0]
    rows[1].entropies[0] = math.nan
    assert math.isnan(rows[1].entropy)


def test_entropies_come_from_the_sampler_and_one_pass_over_injected_rows(policy, monkeypatch):
    flags = flags_of("--max-new-tokens 30")
    groups = eg.sample(policy, data.load("tiny:1-3")[:4], flags, step=0)
    eg.grade(policy, groups, flags)
    eg.correct_errors(policy, groups, flags, step=0)
    rows = [(group.prompt, r) for group in groups for r in group.responses]
    injected = [r.ids for _, r in rows if any(r.injected)]
    assert 0 < len(injected) < len(rows)
    trainer, passes, logprobs = trainer_of(own_copy(policy), flags), [], Trainer.logprobs
    expected = trainer.logprobs([prompt for prompt, _ in rows], [r.ids for _, r in rows])

    def spy(self, prompts, ids):
        passes.append(ids)
        return logprobs(self, prompts, ids)

    monkeypatch.setattr(Trainer, "logprobs", spy)
    eg.fill_in_entropies(trainer, groups)
    assert passes == [injected]
    for (_, r), (_, entropies) in zip(rows, expected):
        assert r.entropies == pytest.approx(entropies.tolist(), abs=1e-5)


# --- Guided Error Correction -----------------------------------------------------------------


def test_branches_are_drawn_as_often_as_their_probabilities_say():
    probabilities = eg.correction_probabilities(flags_of())
    assert probabilities == {"reflect": 0.5, "answer": 0.25, "reference": 0.25}
    drawn = [eg.draw_correction(probabilities, stream(0, "test", k) / 2**63) for k in range(20000)]
    for branch, p in probabilities.items():
        error = math.sqrt(p * (1 - p) / 20000)
        assert drawn.count(branch) / 20000 == pytest.approx(p, abs=4 * error)
    assert all(0 <= eg.uniform("x", k) < 1 for k in range(1000))


@pytest.mark.parametrize(
    "probabilities, u, expected",
    [
        ([0.5, 0.25, 0.25], 0.0, "reflect"),
        ([0.5, 0.25, 0.25], 0.5, "answer"),
        ([0.5, 0.25, 0.25], 0.75, "reference"),
        ([0.5, 0.25, 0.25], 1 - 2**-53, "reference"),
        ([1 / 3, 1 / 3, 1 / 3 - 1e-9], 1 - 1e-12, "reference"),
        ([0, 1], 0.0, "answer"),
        ([0.3333337, 0.666666, 0], 1 - 2**-53, "answer"),  # what has none is never drawn
        ([1], 1 - 2**-53, "reflect"),
    ],
)
def test_a_draw_at_its_edges(probabilities, u, expected):
    line = "--guided-probs " + " ".join(map(str, probabilities))
    assert eg.draw_correction(eg.correction_probabilities(flags_of(line)), u) == expected


def test_a_problem_without_a_solution_leaves_its_share_to_the_other_corrections():
    flags, without = flags_of("--guided-probs .5 .2 .2 .1"), PROBLEMS[0]
    shares = eg.correction_probabilities(flags, without)
    assert shares == pytest.approx({"reflect": 5 / 7, "answer": 2 / 7})
    assert list(eg.correction_probabilities(flags)) == list(eg.CORRECTIONS)
    for line in ("--correction reference", "--method grpo"):
        assert eg.correction_probabilities(flags_of(line), without) == {}
    assert eg.draw_correction({}, 0.0) == ""


@pytest.mark.parametrize(
    "line, rows",
    [
        ("", [[1, 2], [0, 1, 2]]),
        ("--guide all-wrong", [[], [0, 1, 2]]),
        ("--guide-at-most 1", [[1], [0]]),
        ("--guide all-wrong --guide-at-most 2", [[], [0, 1]]),
    ],
)
def test_which_wrong_responses_are_corrected(line, rows):
    groups = [group_of([response(a) for a in accuracies]) for accuracies in ([1, 0, 0], [0, 0, 0])]
    assert [eg.rows_to_correct(group, flags_of(line)) for group in groups] == rows


def columns(r):
    return r.ids, r.injected, r.sampler_logp, r.entropies, r.finished


def test_right_responses_are_untouched_and_wrong_ones_corrected_as_the_paper_says(policy):
    before = wrong_and_right(policy)
    groups, seen = corrected_groups(policy, step=3), set()
    for group, was in zip(groups, before):
        for r, b, c in zip(group.sampled, was.sampled, group.responses):
            assert repr(columns(r)) == repr(columns(b))  # byte for byte (NaN is not equal to NaN)
            seen.add(c.correction)
            if r.accuracy:
                assert c is r
                continue
            assert len({len(column) for column in columns(c)[:4]}) == 1
            assert [math.isnan(x) for x in c.sampler_logp] == c.injected
            assert not set(c.ids[:-1]) & policy.end_ids
            kept, end, continued = len(r.ids) - r.finished, [policy.end_id], 0
            if c.correction == "reference":
                kept, added = 0, policy.encode(group.problem.solution) + end
            elif c.correction == "answer":
                text = eg.ANSWER.format(data.gold_text(group.problem))
                added = policy.encode(text) + end
            else:
                added = policy.encode(eg.REFLECT)
                continued = len(c.ids) - kept - len(added)
                assert 0 < continued <= flags_of().correction_tokens
                assert c.finished == (c.ids[-1] in policy.end_ids)
            first = kept + len(added)
            assert c.ids[:first] == r.ids[:kept] + added
            assert c.injected == [False] * kept + [True] * len(added) + [False] * continued
            assert c.sampler_logp[:kept] == r.sampler_logp[:kept]
            assert c.sampled_tokens == continued
            if c.correction != "reflect":
                assert c.finished and c.accuracy == 1
    assert seen == {"", "reflect", "answer", "reference"}


def test_force_r_reflects_on_every_wrong_response_and_no_correction_on_none(policy):
    forced = corrected_groups(policy, "--method force-r")
    for r in [r for group in forced for r in group.responses]:
        assert r.correction in ("", "reflect")
    for group in forced:
        assert [bool(r.correction) for r in group.responses] == [
            not r.accuracy for r in group.sampled
        ]
    untouched = corrected_groups(policy, "--method grpo")
    for group in untouched:
        assert all(c is r for c, r in zip(group.responses, group.sampled))


def test_a_corrected_row_does_not_depend_on_the_others(policy, monkeypatch):
    """Beside other rows, or with another number of sampler rows: the same tokens."""
    flags, together = flags_of("--method force-r"), wrong_and_right(policy)
    monkeypatch.setattr(policy.sampler, "max_rows", 3)
    eg.correct_errors(policy, together, flags, step=5)
    monkeypatch.undo()
    fewer = wrong_and_right(policy)
    fewer[0].responses[1].accuracy = 1.0
    eg.correct_errors(policy, fewer, flags, step=5)
    ids = [[r.ids for group in groups for r in group.responses] for groups in (together, fewer)]
    assert ids[0][1] != ids[1][1] and ids[0][2:] == ids[1][2:]


def test_caps_of_reflections_and_of_corrected_responses(policy):
    phrase = len(policy.encode(eg.REFLECT))
    for group in corrected_groups(policy, "--method force-r --correction-tokens 2"):
        for r, c in zip(group.sampled, group.responses):
            if c.correction:
                assert len(c.ids) - (len(r.ids) - r.finished) - phrase <= 2
    lengths = []
    for group in corrected_groups(policy, "--max-corrected-tokens 9"):
        for r, c in zip(group.sampled, group.responses):
            assert len({len(column) for column in columns(c)[:4]}) == 1
            if c.correction:
                lengths.append(len(c.ids))
                assert not c.finished or len(c.ids) < 9
            else:
                assert c is r and len(c.ids) > 9
    assert max(lengths) == 9


@pytest.mark.parametrize("method", ["edge-grpo", "force-r", "sft"])
def test_nothing_goes_past_the_models_context(policy, method):
    """Learned positions end there. A response that is cut there has no end."""
    groups, small = wrong_and_right(policy), own_copy(policy)
    longest = max(len(group.prompt) + len(r.ids) for group in groups for r in group.sampled)
    small.model.config.max_position_embeddings = longest
    if method == "sft":
        groups = eg.references(small, [group.problem for group in groups])
    else:
        eg.correct_errors(small, groups, flags_of(f"--method {method}"), step=0)
    cut = 0
    for group in groups:
        for r in group.responses:
            assert len(group.prompt) + len(r.ids) <= longest
            assert len({len(column) for column in columns(r)[:4]}) == 1
            if r.correction and len(group.prompt) + len(r.ids) == longest:
                cut += 1
                assert r.finished == (r.ids[-1] in policy.end_ids)
    assert cut


def test_a_prefix_is_a_quarter_a_half_or_three_quarters_of_the_reference(policy):
    """The policy goes on behind it."""
    groups = []
    for number, problem in enumerate(data.load("tiny:5-8")[:90]):
        groups.append(group_of([response(0)], number, problem))
        groups[-1].prompt = policy.prompt_ids(problem.question)
    eg.correct_errors(policy, groups, flags_of("--correction prefix"), step=0)
    quarters = []
    for group in groups:
        [c] = group.responses
        solution, n = policy.encode(group.problem.solution), sum(c.injected)
        assert c.correction == "prefix" and c.ids[:n] == solution[:n]
        assert c.injected == [True] * n + [False] * c.sampled_tokens and c.sampled_tokens > 0
        quarters.append([math.ceil(len(solution) * k / 4) for k in (1, 2, 3)].index(n))
    assert all(15 < quarters.count(k) < 45 for k in range(3))


# --- The problems of a run -------------------------------------------------------------------


def test_wrong_references_are_told_and_can_be_left_out(policy, tmp_path, capsys):
    rows = [
        '{"problem": "1+1?", "answer": "2", "solution": "It is \\\\boxed{2}."}',
        '{"problem": "1+2?", "answer": "3", "solution": "It is three."}',
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(rows))
    right, wrong = "It is \\boxed{2}.", "It is three."
    for line, expected in (
        ("", [right, wrong]),
        ("--drop-wrong-references", [right, None]),
        ("--method sft --drop-wrong-references", [right]),
    ):
        flags = flags_of(f"--data {tmp_path / 'd.jsonl'} {line}")
        problems, _, told = eg.training_problems(flags, policy, True)
        assert [p.solution for p in problems] == expected and len(told) == 1
        assert "1 of 2 reference solutions are not graded right" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["gsm8k", "math", "tiny:5-8:test"])
def test_a_test_set_is_refused_for_training(policy, name):
    with pytest.raises(UserError, match=f"--data {name} is for testing"):
        eg.training_problems(flags_of(f"--data {name}"), policy, False)


def test_a_prompt_leaves_room_for_a_response(policy):
    flags, small = flags_of("--data tiny:1-2"), own_copy(policy)
    lengths = [len(policy.prompt_ids(p.question)) for p in data.load("tiny:1-2")]
    small.model.config.max_position_embeddings = max(lengths)
    kept, left_out, _ = eg.training_problems(flags, small, needs_solution=False)
    assert len(kept) == sum(n < max(lengths) for n in lengths) > 0
    assert len(left_out) == len(lengths) - len(kept) > 0
    small.model.config.max_position_embeddings = min(lengths)
    with pytest.raises(UserError, match="no room for a response in the model's context"):
        eg.training_problems(flags, small, needs_solution=False)
