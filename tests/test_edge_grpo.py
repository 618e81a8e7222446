"""edge_grpo.py up to its loss: flags, groups of responses, advantages, EDA, GEC. test_update.py
has the loss, the update and whole runs, test_bad_input.py the flags that are refused."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import (
    corrected_groups,
    flags_of,
    group_of,
    logprobs_of,
    own_copy,
    response,
    rows_of,
    sampled_groups,
    trainer_of,
    wrong_and_right,
)

import data
import edge_grpo as eg
import engine
import reward
from data import Problem
from errors import UserError

pytestmark = pytest.mark.method
PROBLEMS = [Problem(str(k), ("1",), None, str(k)) for k in range(10)]


def numbers(text):
    return [float(x) for x in text.split()]


def cells(row):
    return [cell.strip() for cell in row.split("|")]


# --- Flags -----------------------------------------------------------------------------------

PAPER = """questions_per_step=1 group_size=8 steps=1000 lr=1e-06 temperature=0.6 top_p=1.0 seed=42
    max_new_tokens=1024 correction_tokens=256 max_prompt_tokens=512 data=deepscaler-hard-1k
    grad_clip=1.0 betas=[0.9,0.999] weight_decay=0.0 kl=0.0 eps_low=0.2 eps_high=0.2 loss=sequence
    correction=guided guided_probs=[0.5,0.25,0.25] eda=True advantage_std=group sft=False
    updates_per_rollout=1"""


@pytest.mark.parametrize(
    "argv, expected",
    [
        ("--model Qwen2.5-Math-7B", PAPER),
        ("--model tiny --profile paper", PAPER),
        ("--model tiny", "steps=60 data=tiny:5-8 lr=0.0001 correction=guided eda=True"),
        ("--model tiny --steps 3 --method grpo", "steps=3 lr=0.0001 eda=False"),
        ("--method force-r-eda", "correction=reflect eda=True"),
        ("--method force-r", "correction=reflect eda=False"),
        ("--no-eda", "correction=guided eda=False"),
        ("--method grpo --eda", "correction=none eda=True"),
        ("--method dr-grpo", "correction=none eda=False advantage_std=none loss=constant"),
        ("--method dapo", "eda=False eps_high=0.28 loss=token mask_truncated=True"),
        ("--method dapo --eps-high .3", "eps_high=0.3 resample_rounds=10"),
        ("--method sft", "sft=True correction=none eda=False"),
        ("--eda-grad --updates-per-rollout 2 --injected-shaping .1", "eda_grad=True"),
        ("--group-size 1 --all-wrong-advantage -1", "group_size=1"),
        ("--group-size 1 --method sft", "group_size=1"),
    ],
)
def test_flags_are_the_profile_then_the_methods_row_then_what_is_given(argv, expected):
    flags = vars(flags_of(argv))
    for setting in expected.split():
        name, _, value = setting.partition("=")
        assert str(flags[name]).replace(" ", "") == value, name


def test_the_tiny_settings_belong_to_the_profile_not_to_the_name():
    tiny, other = flags_of("--model tiny"), flags_of("--model runs/X/final --profile tiny")
    assert replace(other, model="tiny", out=tiny.out, profile="auto") == tiny


# --- Groups of responses ---------------------------------------------------------------------


def questions(line, *steps):
    batches = [eg.batch_of_problems(PROBLEMS, flags_of(line), *step) for step in steps]
    return [p.question for batch in batches for p in batch]


def test_epochs_are_permutations_and_rounds_of_resampling_have_their_own():
    everything = sorted(p.question for p in PROBLEMS)
    order = questions("--questions-per-step 4", (0,), (1,), (2,), (3,), (4,))
    assert sorted(order[:10]) == sorted(order[10:]) == everything
    assert order[:10] != order[10:]
    long = questions("--questions-per-step 25", (0,), (1,))  # more than there are
    assert sorted(long) == sorted(everything * 5)
    assert long[:20] == order
    of_seed = questions("--questions-per-step 4 --seed 1", (0,))
    of_round = questions("--questions-per-step 4", (0, 1))
    assert of_seed != of_round != order[:4] != of_seed


def columns(r):
    return r.ids, r.injected, r.sampler_logp, r.entropies


def same_length(r):
    return len(set(map(len, columns(r)))) == 1


def test_a_step_samples_groups_within_the_limit_each_row_with_a_stream_of_its_own(policy):
    flags = flags_of("--temperature 9 --max-new-tokens 12 --group-size 4")
    problems = data.load("tiny:5-8")[:2] * 2  # each problem comes twice
    seen = set()
    for key in ((0,), (1,), (0, 1)):
        for number, group in enumerate(eg.sample(policy, problems, flags, *key)):
            assert group.number == number and group.row(3) == 4 * number + 3
            assert group.problem is problems[number]
            assert group.prompt == policy.prompt_ids(group.problem.question)
            for r in group.sampled:
                assert same_length(r)
                assert 0 < len(r.ids) == r.sampled_tokens <= 12
                assert r.finished == (r.ids[-1] in policy.end_ids)
                assert not any(r.injected)
                seen.add(tuple(r.ids))
    assert len(seen) == 3 * 16


def test_reflections_draw_from_other_streams_than_samples(policy, monkeypatch):
    """A stream's numbers belong to positions, and a reflection begins where a sample may end."""
    seeds, plain = [], engine.Policy.sample

    def spy(self, prompts, limits, of_rows, *rest):
        assert rest == (2.0, 0.9)
        seeds.extend(of_rows)
        return plain(self, prompts, limits, of_rows, *rest)

    monkeypatch.setattr(engine.Policy, "sample", spy)
    flags = flags_of("--method force-r --temperature 2 --top-p .9 --max-new-tokens 4")
    for step in (0, 1):
        groups = eg.sample(policy, data.load("tiny:5-8")[:2], flags, step)
        for _, r in rows_of(groups):
            r.accuracy = 0.0
        eg.correct_errors(policy, groups, flags, step)
    assert len(set(seeds)) == len(seeds) == 4 * 16


def test_grading_fills_in_what_is_missing_and_nothing_else(policy, monkeypatch):
    calls, score_all = [], reward.score_all

    def spy(*call):
        calls.append(call)
        return score_all(*call)

    monkeypatch.setattr(reward, "score_all", spy)
    known = response(0.5, text="as it was", format=0.25)
    ids = policy.encode("\\boxed{2}") + [policy.end_id]
    new = response(None, ids, format=None)
    eg.grade(policy, [group_of([known, new])])
    assert (new.text, new.format, new.accuracy) == ("\\boxed{2}", 1.0, 1.0)
    assert calls.pop() == ([new.text], [["2"]])
    assert (known.text, known.format, known.accuracy) == ("as it was", 0.25, 0.5)


def mixed(group):
    return len({r.accuracy for r in group.sampled}) > 1


def test_dapo_replaces_equal_groups_by_new_questions_and_counts_all_that_was_sampled(policy):
    flags = flags_of("--method dapo --questions-per-step 6 --resample-rounds 3 --temperature 1")
    problems = data.load("tiny:3-5")
    first = sampled_groups(policy, flags, eg.batch_of_problems(problems, flags, 4), step=4)
    kept, again = list(first), list(first)
    everything = eg.resample_equal_groups(policy, kept, problems, flags, 4)
    eg.resample_equal_groups(policy, again, problems, flags, 4)  # a resumed run draws the same
    assert [r.ids for _, r in rows_of(kept)] == [r.ids for _, r in rows_of(again)]
    was_mixed = [mixed(group) for group in first]
    assert [new is old for new, old in zip(kept, first)] == was_mixed
    assert [group.number for group in kept] == [0, 1, 2, 3, 4, 5]
    assert 0 < sum(was_mixed) < sum(map(mixed, kept))
    assert everything[:6] == first
    new = everything[6:]
    assert len(new) <= 3 * 6
    assert all(group in everything for group in kept)
    unmixed = 6 - sum(was_mixed)
    asked = eg.batch_of_problems(problems, flags, 4, 1)[:unmixed]
    assert [group.problem for group in new[:unmixed]] == asked
    assert eg.resample_equal_groups(policy, first, problems, flags_of(), 4) == first


def test_with_a_dense_reward_collapse_is_still_one_of_accuracy(monkeypatch):
    """Shorter is better. (That advantages follow the reward: test_update.py, test_new_equations)"""

    def shorter(responses, flags):
        return torch.tensor([r.accuracy - 0.1 * len(r.ids) for r in responses]).double()

    def sample(policy, problems, *rest):
        return [group_of([response(1), response(0)], k) for k in range(len(problems))]

    monkeypatch.setattr(eg, "rewards", shorter)
    monkeypatch.setattr(eg, "sample", sample)
    groups = []
    for accuracies in ((1, 1), (0, 0), (1, 0)):
        rows = [response(a, ids) for a, ids in zip(accuracies, ([5] * 4, [5] * 2))]
        groups.append(group_of(rows, len(groups)))
    punish = flags_of("--all-wrong-advantage -1")
    A = [eg.advantages(group, punish).tolist() for group in groups]
    assert A[1] == [-1, -1] and -1 < A[0][0] < 0 < A[0][1]
    flags, kept = flags_of("--method dapo --questions-per-step 3"), list(groups)
    everything = eg.resample_equal_groups(None, kept, PROBLEMS, flags, 0)
    assert kept == [*everything[3:], groups[2]] and everything[:3] == groups


# --- Advantages ------------------------------------------------------------------------------


def test_a_random_reward_is_one_half_the_time_whatever_is_right_and_drawn_anew_in_each_step(policy):
    flags = flags_of("--random-reward --questions-per-step 8 --max-new-tokens 4")
    problems = data.load("tiny:1-3")[:8]

    def rewards(groups):
        return torch.stack([eg.rewards(group.responses, flags) for group in groups])

    draws = []
    for step in (0, 1, 1):
        groups = sampled_groups(policy, flags, problems, step)
        draws.append(rewards(groups))
        eg.correct_errors(policy, groups, flags, step)
        eg.grade(policy, groups)
        assert torch.equal(rewards(groups), draws[-1])  # a correction draws no second time
    assert torch.equal(draws[1], draws[2])
    assert not torch.equal(draws[0], draws[1])
    values = torch.stack(draws[:2])
    assert values.unique().tolist() == [0, 1]
    assert 0.35 < values.mean() < 0.65


@pytest.mark.parametrize(
    "row",  # of rewards: mean 1/4, unbiased variance (9/16 + 3/16) / 3 = 1/4
    [
        "group | 1 0 0 0 | 1.499700 -0.499900 -0.499900 -0.499900",
        "group | 2 1 1 1 | 1.499700 -0.499900 -0.499900 -0.499900",
        "none  | 1 0 0 0 | 0.75 -0.25 -0.25 -0.25",
        "group | 1 1 1 1 | 0 0 0 0",
        "none  | 0 0     | 0 0",
        "group | 1       | 0",
    ],
)
def test_group_advantages_on_worked_numbers(row):
    std, rewards, expected = cells(row)
    both = torch.tensor([numbers(rewards)] * 2)
    for A in eg.group_advantages(both.double(), std=std):
        assert A.tolist() == pytest.approx(numbers(expected), rel=1e-6)


@pytest.mark.parametrize(
    "row",
    [
        "| 1 0 | 0.707007 -0.707007",
        "--method dr-grpo | 1 0 | 0.5 -0.5",
        "--method dr-grpo --format-weight .5 | 1 0 | 0.25 -0.25",
        "--all-wrong-advantage -1 | 0 0 0 | -1 -1 -1",
        "--all-wrong-advantage -1 | 1 1 1 | 0 0 0",
        "--all-wrong-advantage -1 --method dr-grpo | 1 0 | 0.5 -0.5",
        "--all-wrong-advantage -1 --correction-factors 1 3 | 0 0 0 | -1 -3 -1",
        "--method dr-grpo --correction guided --correction-factors 2 3 | 1 0 1 0 | 0.5 -1.5 1 -0.5",
    ],
)
def test_advantages_of_a_group_with_its_flags(row):
    """The first is not well formed, an answer corrected the second, a reflection the third."""
    line, accuracies, expected = cells(row)
    group = group_of([response(a) for a in numbers(accuracies)])
    group.responses[0].format = 0.0
    for r, correction in zip(group.responses[1:], ("answer", "reflect")):
        r.correction = correction
    A = eg.advantages(group, flags_of(line))
    assert A.tolist() == pytest.approx(numbers(expected), rel=1e-6)


# --- Entropy-Driven Advantage ----------------------------------------------------------------


@pytest.mark.parametrize(
    "row",  # A | P | clamp | A^
    [
        "1 -1       | .2 .6       |          | 2 -0.6666667",  # mean .4, relative .5 and 1.5
        "1 -1       | .2 .6       | .8 1.2   | 1.25 -0.8333333",
        "1 1 -1 -1  | .2 .6 .2 .6 | 1 2 .5 1 | 1 0.6666667 -2 -1",
        "1 1 -1 -1  | .2 .6 .2 .6 | .5 1 1 2 | 2 1 -1 -0.6666667",
        "0 0 0      | .5 .1 .9    |          | 0 0 0",  # it cannot revive a collapsed group
        "1 -.5 -.5  | 0 0 0       |          | 1 -.5 -.5",
        "1 -.5 -.5  | 1e-45 0 0   |          | 1e4 -5e3 -5e3",
        "1 -.5 -.5  | 0 .8 .4     |          | 1e4 -.25 -.5",  # one repeated token
        "1 -.5 -.5  | 0 .8 .4     | .5 2     | 2 -.25 -.5",
    ],
)
def test_entropy_driven_advantages_on_worked_numbers(row):
    A, P, clamp, expected = map(numbers, cells(row))
    other = [1.0] * len(A)  # another group of the batch, with a mean of its own
    A, P = torch.tensor([A, other]).double(), torch.tensor([P, other]).double()
    A_hat = eg.entropy_driven_advantages(A, P, clamp or None).tolist()
    assert A_hat == [pytest.approx(expected), other]


def test_the_gradient_goes_through_each_responses_own_entropy_and_not_through_the_mean():
    A, P = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.2, 0.6]], requires_grad=True)
    eg.entropy_driven_advantages(A, P).sum().backward()
    # A^_1 = c / P_1 with c = .4 held fixed: -c / P_1^2; A^_2 = -c / P_2: c / P_2^2
    assert P.grad[0].tolist() == pytest.approx([-0.4 / 0.04, 0.4 / 0.36])


@pytest.mark.parametrize(
    "row",
    [
        "| 2 -2.6666667 0.5714286",
        "--eda-rows right | 2 -2 0.5714286",
        "--eda-rows wrong | 1 -2.6666667 1",
        "--eda-rows reference | 1 -2 0.5714286",
        "--eda-rows not-reference | 2 -2.6666667 1",
        "--eda-clamp .5 1 | 2 -2.6666667 1",
    ],
)
def test_eda_divides_the_rows_that_the_flag_names(row):
    line, expected = cells(row)
    rows = [response(1, correction="answer"), response(0), response(1, correction="reference")]
    A, P = torch.tensor([[1, -2, 1], [0.2, 0.3, 0.7]]).double()  # relative .5, .75, 1.75
    A_hat = eg.eda(group_of(rows, A=A), P, flags_of(line))
    assert A_hat.tolist() == pytest.approx(numbers(expected))


def test_entropies_come_from_the_sampler_and_one_pass_over_injected_rows(policy):
    flags = flags_of("--max-new-tokens 30")
    groups = sampled_groups(policy, flags, data.load("tiny:1-3")[:4])
    eg.correct_errors(policy, groups, flags, step=0)
    trainer, passes = trainer_of(own_copy(policy), flags), []
    expected, logprobs = logprobs_of(trainer, groups), trainer.logprobs

    def spy(prompts, ids):
        passes.append(ids)
        return logprobs(prompts, ids)

    trainer.logprobs = spy
    eg.fill_in_entropies(trainer, groups)
    rows = [r for _, r in rows_of(groups)]
    injected = [r.ids for r in rows if any(r.injected)]
    assert passes == [injected] and 0 < len(injected) < len(rows)
    for r, (_, entropies) in zip(rows, expected, strict=True):
        assert r.entropies == pytest.approx(entropies.tolist(), abs=1e-5)


# --- Guided Error Correction -----------------------------------------------------------------


def test_branches_are_drawn_as_often_as_their_probabilities_say_and_anew_in_each_step(policy):
    probabilities = eg.correction_probabilities(flags_of())
    assert probabilities == {"reflect": 0.5, "answer": 0.25, "reference": 0.25}
    drawn = [eg.draw_correction(probabilities, eg.uniform_from(0, "test", k)) for k in range(20000)]
    for branch, p in probabilities.items():
        assert drawn.count(branch) / 20000 == pytest.approx(p, abs=0.015)
    steps = [rows_of(corrected_groups(policy, step=step)) for step in (3, 4)]
    assert [r.correction for _, r in steps[0]] != [r.correction for _, r in steps[1]]


@pytest.mark.parametrize(
    "row",
    [
        ".5 .25 .25 | 0 | reflect",
        ".5 .25 .25 | .5 | answer",
        ".5 .25 .25 | .75 | reference",
        ".5 .25 .25 | 0.9999999999999999 | reference",
        ".333333333 .333333333 .333333333 | 0.999999999999 | reference",
        "0 1 | 0 | answer",
        ".3333337 .666666 0 | 0.9999999999999999 | answer",  # what has none is never drawn
        "1 | 0.9999999999999999 | reflect",
    ],
)
def test_a_draw_at_its_edges(row):
    probabilities, u, expected = cells(row)
    flags = flags_of("--guided-probs " + probabilities)
    assert eg.draw_correction(eg.correction_probabilities(flags), float(u)) == expected


def test_a_problem_without_a_solution_leaves_its_share_to_the_other_corrections():
    flags, without = flags_of("--guided-probs .5 .2 .2 .1"), PROBLEMS[0]
    shares = eg.correction_probabilities(flags, without)
    assert shares == pytest.approx({"reflect": 5 / 7, "answer": 2 / 7})
    assert list(eg.correction_probabilities(flags)) == list(eg.CORRECTIONS)[:4]
    for line in ("--correction reference", "--method grpo"):
        assert eg.correction_probabilities(flags_of(line), without) == {}


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


def test_right_responses_are_untouched_and_wrong_ones_corrected_as_the_paper_says(policy):
    kinds, end = set(), [policy.end_id]
    for group, before in zip(corrected_groups(policy, step=3), wrong_and_right(policy)):
        for r, old, c in zip(group.sampled, before.sampled, group.responses):
            assert repr(columns(r)) == repr(columns(old))  # byte for byte; NaN is not equal to NaN
            kinds.add(c.correction)
            if r.accuracy:
                assert c is r
                continue
            kept = r.ids[: len(r.ids) - r.finished]
            if c.correction == "reference":
                kept, added = [], policy.encode(group.problem.solution) + end
            elif c.correction == "answer":
                added = policy.encode(eg.ANSWER.format(data.gold_text(group.problem))) + end
            else:
                added = policy.encode(eg.REFLECT)
            n, injected = len(kept), len(added)
            continued = c.ids[n + injected :]
            assert c.ids == kept + added + continued and same_length(c)
            assert c.injected == [False] * n + [True] * injected + [False] * len(continued)
            assert list(map(math.isnan, c.sampler_logp)) == c.injected
            assert c.sampler_logp[:n] == r.sampler_logp[:n]
            assert c.sampled_tokens == len(continued)
            assert bool(continued) == (c.correction == "reflect")
            assert c.finished == (c.ids[-1] in policy.end_ids)
            assert not set(c.ids[:-1]) & policy.end_ids
            assert continued or c.accuracy == 1
    assert kinds == {"", "reflect", "answer", "reference"}


def test_force_r_reflects_on_every_wrong_response_and_no_correction_on_none(policy):
    for line, kind in (("--method force-r", "reflect"), ("--method grpo", "")):
        for group in corrected_groups(policy, line):
            for r, c in zip(group.sampled, group.responses):
                assert c.correction == ("" if r.accuracy else kind)
                assert (c is r) == (not c.correction)


def test_a_corrected_row_does_not_depend_on_the_others(policy, monkeypatch):
    """Beside other rows, or with another number of sampler rows: the same tokens."""
    flags, together, fewer = flags_of("--method force-r"), *map(wrong_and_right, [policy] * 2)
    eg.correct_errors(policy, together, flags, step=5)
    monkeypatch.setattr(policy.sampler, "max_rows", 3)
    fewer[0].responses[1].accuracy = 1.0
    eg.correct_errors(policy, fewer, flags, step=5)
    same = [a.ids == b.ids for (_, a), (_, b) in zip(rows_of(together), rows_of(fewer))]
    assert same == [True, False] + [True] * 38


def test_caps_of_reflections_and_of_corrected_responses(policy):
    reflected = corrected_groups(policy, "--method force-r --correction-tokens 2")
    assert max(r.sampled_tokens for _, r in rows_of(reflected)) == 2
    lengths = []
    for _, r in rows_of(corrected_groups(policy, "--max-corrected-tokens 9")):
        assert same_length(r)
        if r.correction:
            lengths.append(len(r.ids))
            assert r.finished == (r.ids[-1] in policy.end_ids)
        else:
            assert len(r.ids) > 9
    assert max(lengths) == 9


@pytest.mark.parametrize("line", ["", "--method force-r --max-corrected-tokens 999", "sft"])
def test_nothing_goes_past_the_models_context(policy, line):
    """Learned positions end there. A response that is cut there has no end."""
    groups, small, room = wrong_and_right(policy), own_copy(policy), []
    longest = max(len(prompt) + len(r.ids) for prompt, r in rows_of(groups))
    small.model.config.max_position_embeddings = longest
    if line == "sft":
        groups = eg.references(small, [group.problem for group in groups])
    else:
        eg.correct_errors(small, groups, flags_of(line), step=0)
    for prompt, r in rows_of(groups):
        assert same_length(r)
        if r.correction:
            room.append(longest - len(prompt) - len(r.ids))
            assert r.finished == (r.ids[-1] in policy.end_ids)
    assert min(room) == 0


def test_a_prefix_is_a_quarter_a_half_or_three_quarters_of_the_reference(policy):
    """The policy goes on behind it."""
    groups, quarters = [], []
    for number, problem in enumerate(data.load("tiny:5-8")[:90]):
        groups.append(group_of([response(0)], number, problem))
    eg.correct_errors(policy, groups, flags_of("--correction prefix"), step=0)
    for group in groups:
        [r] = group.responses
        solution, n = policy.encode(group.problem.solution), sum(r.injected)
        assert r.correction == "prefix" and r.ids[:n] == solution[:n]
        assert r.injected == [True] * n + [False] * r.sampled_tokens and r.sampled_tokens > 0
        quarters.append([math.ceil(len(solution) * k / 4) for k in (1, 2, 3)].index(n))
    assert all(15 < quarters.count(k) < 45 for k in range(3))


# --- The problems of a run -------------------------------------------------------------------

SOLUTIONS = """{"problem": "1+1?", "answer": "2", "solution": "It is \\\\boxed{2}."}
{"problem": "1+2?", "answer": "3", "solution": "It is three."}"""


def test_wrong_references_are_told_and_can_be_left_out(policy, tmp_path, capsys):
    path, right, wrong = tmp_path / "two.jsonl", "It is \\boxed{2}.", "It is three."
    path.write_text(SOLUTIONS)
    for line, expected in (
        ("", [right, wrong]),
        ("--drop-wrong-references", [right, None]),
        ("--method sft --drop-wrong-references", [right]),
    ):
        problems, _, told = eg.training_problems(flags_of(f"--data {path} {line}"), policy, True)
        assert [p.solution for p in problems] == expected and len(told) == 1
        assert "1 of 2 reference solutions are not graded right" in capsys.readouterr().out


def test_a_reference_that_the_context_cuts_is_told(policy, tmp_path, capsys):
    path, small = tmp_path / "two.jsonl", own_copy(policy)
    path.write_text(SOLUTIONS)
    sources = data.load(str(path))
    needs = [len(policy.prompt_ids(p.question) + policy.encode(p.solution)) + 1 for p in sources]
    for context, cut in ((max(needs), 0), (max(needs) - 1, 1)):
        small.model.config.max_position_embeddings = context
        eg.training_problems(flags_of(f"--data {path}"), small, True)
        assert ("1 of 2 references are cut" in capsys.readouterr().out) == cut


def test_a_prompt_leaves_room_for_a_response(policy, tmp_path):
    path, small = tmp_path / "two.jsonl", own_copy(policy)
    path.write_text(SOLUTIONS.replace("1+2?", "How many are 1 and 2?"))
    flags = flags_of(f"--data {path}")
    longest = max(len(policy.prompt_ids(p.question)) for p in data.load(str(path)))
    for context, kept in ((longest + 1, 2), (longest, 1)):
        small.model.config.max_position_embeddings = context
        problems, left_out, _ = eg.training_problems(flags, small, False)
        assert (len(problems), len(left_out)) == (kept, 2 - kept)
    small.model.config.max_position_embeddings = 1
    with pytest.raises(UserError, match="no room for a response in the model's context"):
        eg.training_problems(flags, small, False)
