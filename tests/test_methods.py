"""What reviewers asked for beside the paper's rows: each flag by a worked number, a frequency or exact comparison."""

import math
from dataclasses import replace

import pytest
import torch

import data
import edge_grpo as eg
import engine
from data import Problem
from errors import UserError
from report.metrics import share_mixed


@pytest.fixture(scope="module")
def policy():
    return engine.load_policy("tiny", "cpu")


def flags_of(*argv):
    return eg.parse_flags(list(argv))


def response(accuracy, ids=(5, 6, 7), injected=None, finished=True, problem=None):
    injected = list(injected or [False] * len(ids))
    return eg.Response(
        problem or data.load("tiny:1-3")[0],
        [1, 2],
        list(ids),
        injected,
        [-0.5] * len(ids),
        [0.3] * len(ids),
        finished=finished,
        accuracy=float(accuracy),
        format=1.0,
    )


# --- advantages ------------------------------------------------------------------------------------------------------


def test_advantages_divided_by_the_groups_std_by_the_batchs_or_not_at_all():
    r = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.float64)
    assert eg.group_advantages(r, std="none")[0].tolist() == pytest.approx(
        [0.75, -0.25, -0.25, -0.25]
    )
    std = math.sqrt((3 * (5 / 8) ** 2 + 5 * (3 / 8) ** 2) / 7)  # of 3 ones and 5 zeros, n - 1
    assert eg.group_advantages(r, std="batch")[1].tolist() == pytest.approx(
        [0.5 / (std + 1e-4)] * 2 + [-0.5 / (std + 1e-4)] * 2
    )
    dr_grpo = flags_of("--method", "dr-grpo")
    assert (dr_grpo.advantage_std, dr_grpo.loss, dr_grpo.eda, dr_grpo.correction) == (
        "none",
        "constant",
        False,
        "none",
    )


def test_groups_without_a_right_response_get_the_advantage_that_the_flag_says():
    responses = [response(a) for a in (1, 0, 0, 0, 0, 0)]
    grpo = ["--method", "grpo", "--group-size", "3"]
    plain = eg.advantages_of(responses, flags_of(*grpo))
    punished = eg.advantages_of(responses, flags_of(*grpo, "--all-wrong-advantage", "-1"))
    assert plain[1].tolist() == [0, 0, 0] and punished[1].tolist() == [-1, -1, -1]
    assert torch.equal(plain[0], punished[0])


def test_another_reward_is_any_number(monkeypatch):
    """Advantages follow it; what GEC corrects is still what the grader calls wrong."""
    plain = eg.rewards
    monkeypatch.setattr(
        eg,
        "rewards",
        lambda rs, flags: (
            plain(rs, flags)
            - 0.1
            * torch.tensor([float(len(r.ids)) for r in rs], dtype=torch.float64).view(
                -1, flags.group_size
            )
        ),
    )
    flags = flags_of("--group-size", "2")
    responses = [
        response(1, ids=[5] * 4),
        response(1, ids=[5] * 2),
        response(0, ids=[5] * 2),
        response(0, ids=[5] * 2),
    ]
    A = eg.advantages_of(responses, flags)
    assert A[0, 0] < 0 < A[0, 1] and A[1].abs().max() == 0
    assert eg.to_be_corrected(responses, flags) == [2, 3]


def test_clamps_of_positive_and_negative_advantages_apart():
    A, P = (
        torch.tensor([[1.0, 1, -1, -1]]),
        torch.tensor([[0.2, 0.6, 0.2, 0.6]]),
    )  # relative .5, 1.5
    assert eg.entropy_driven_advantages(A, P, (1, 2, 0.5, 1))[0].tolist() == pytest.approx(
        [1, 1 / 1.5, -2, -1]
    )
    assert eg.entropy_driven_advantages(A, P, (0.5, 1, 1, 2))[0].tolist() == pytest.approx(
        [2, 1, -1, -1 / 1.5]
    )


def test_the_mean_entropy_is_detached_as_in_the_release():
    A, P = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.2, 0.6]], requires_grad=True)
    eg.entropy_driven_advantages(A, P).sum().backward()
    # A^_1 = c / P_1 with c = .4 held fixed: -c / P_1^2; A^_2 = -c / P_2: c / P_2^2
    assert P.grad[0].tolist() == pytest.approx([-0.4 / 0.04, 0.4 / 0.36])


# --- guidance --------------------------------------------------------------------------------------------------------


def test_only_groups_without_a_right_response_are_guided_and_at_most_so_many_of_each():
    responses = [response(a) for a in (1, 0, 0, 0, 0, 0)]
    rows = {
        argv: eg.to_be_corrected(responses, flags_of("--group-size", "3", *argv.split()))
        for argv in (
            "",
            "--guide all-wrong",
            "--guide-at-most 1",
            "--guide all-wrong --guide-at-most 2",
        )
    }
    assert list(rows.values()) == [[1, 2, 3, 4, 5], [3, 4, 5], [1, 3], [3, 4]]


def test_a_prefix_is_a_quarter_a_half_or_three_quarters_of_the_reference_and_the_policy_goes_on(
    policy,
):
    flags, problems = flags_of("--correction", "prefix"), data.load("tiny:5-8")[:90]
    rows = [response(0, problem=p) for p in problems]
    for r in rows:
        r.prompt = policy.prompt_ids(r.problem.question)
    shares = []
    for c in eg.correct_errors(policy, rows + rows[:6], flags, step=0)[:90]:
        solution, injected = policy.encode(c.problem.solution), sum(c.injected)
        assert (
            c.correction == "prefix"
            and c.ids[:injected] == solution[:injected]
            and not any(c.injected[injected:])
        )
        assert len(c.ids) > injected and c.sampled == len(c.ids) - injected
        shares.append(min((1, 2, 3), key=lambda k: abs(injected - len(solution) * k / 4)))
    assert all(15 < shares.count(k) < 45 for k in (1, 2, 3))


def test_a_problem_without_a_solution_leaves_its_share_to_the_other_corrections():
    flags = flags_of("--guided-probs", ".5", ".2", ".2", ".1")
    without = Problem("1+1?", ("2",), None, "x:1")
    assert eg.correction_probabilities(flags, without) == pytest.approx(
        {"reflect": 5 / 7, "answer": 2 / 7}
    )
    assert eg.correction_probabilities(flags_of("--correction", "reference"), without) == {}
    assert list(eg.correction_probabilities(flags)) == list(eg.CORRECTIONS)


def test_what_has_no_probability_is_never_drawn():
    probabilities = eg.correction_probabilities(
        flags_of("--guided-probs", ".3333337", ".666666", "0")
    )
    assert (
        eg.draw_correction(probabilities, 0.9999998)
        == "answer"
        == eg.draw_correction(probabilities, 1 - 2**-53)
    )
    assert eg.draw_correction({}, 0.0) == ""
    assert all(0 <= eg.uniform("x", k) < 1 for k in range(1000))


# --- what injected and truncated tokens count for --------------------------------------------------------------------


def test_masked_tokens_are_in_no_count_and_weighted_ones_in_all():
    """A row of 10 sampled and 30 injected tokens, one of injected tokens alone, one truncated."""
    rows = [
        response(1, [5] * 40, [False] * 10 + [True] * 30),
        response(1, [5] * 20, [True] * 20),
        response(0, [5] * 30, finished=False),
    ]
    A = torch.ones(1, 3, dtype=torch.float64)

    def weights(*argv):
        return [t.weights for t in eg.tokens_of(rows, A, flags_of("--group-size", "3", *argv))]

    plain, off, masked = weights(), weights("--injected-weight", "0"), weights("--mask-injected")
    assert plain[0].tolist() == pytest.approx([1 / 120] * 40)
    assert off[0].tolist() == pytest.approx([1 / 120] * 10 + [0] * 30) and not off[1].any()
    assert masked[0].tolist() == pytest.approx(
        [1 / 20] * 10 + [0] * 30
    )  # B is 2: one row is masked whole
    assert not masked[1].any() and masked[2].tolist() == pytest.approx([1 / 60] * 30)
    token = weights("--mask-injected", "--loss", "token")
    assert token[0][0] == token[2][0] == pytest.approx(1 / 40)
    truncated = weights("--mask-truncated")
    assert not truncated[2].any() and truncated[0].tolist() == pytest.approx([1 / 80] * 40)


def test_shaped_injected_tokens_have_luffys_gradient_and_sampled_ones_their_own():
    """d/d logp of -A p/(p + g) is -A p g/(p + g)^2; an unlikely token is not driven as hard as if it were sampled."""
    flags = flags_of("--injected-shaping", "0.1")
    logp = torch.tensor([math.log(0.5), math.log(0.01), math.log(0.5)], requires_grad=True)
    t = eg.Tokens(
        torch.full((3,), 0.25), torch.tensor([2.0, 2.0, 2.0]), torch.tensor([1.0, 1.0, 0.0])
    )
    loss = eg.loss_of_tokens(logp, torch.zeros(3), t, flags)
    assert loss.item() == pytest.approx(-0.25 * 2 * (0.5 / 0.6 + 0.01 / 0.11 + 1))
    loss.backward()
    expected = [-0.5 * 0.5 * 0.1 / 0.6**2, -0.5 * 0.01 * 0.1 / 0.11**2, -0.5]
    assert logp.grad.tolist() == pytest.approx(expected)


def test_the_kl_penalty_is_on_sampled_tokens_alone():
    flags = flags_of("--kl", "0.5")
    t = eg.Tokens(
        torch.ones(2),
        torch.zeros(2),
        torch.tensor([0.0, 1.0]),
        reference_logp=torch.tensor([-1.0, 500.0]),
    )
    loss = eg.loss_of_tokens(torch.tensor([-2.0, -2.0]), torch.zeros(2), t, flags)
    assert loss.item() == pytest.approx(0.5 * (math.e - 2))


# --- DAPO ------------------------------------------------------------------------------------------------------------


def test_groups_of_equal_rewards_are_replaced_by_new_questions_and_all_that_was_sampled_counts(
    policy,
):
    flags = flags_of(
        "--method",
        "dapo",
        "--questions-per-step",
        "6",
        "--resample-rounds",
        "3",
        "--temperature",
        "1",
    )
    problems = data.load("tiny:3-5")
    batch = eg.batch_of_problems(problems, flags, 4)
    first = eg.sample(policy, batch, flags, 4)
    eg.grade(policy, first)
    kept, everything = eg.resample_equal_groups(policy, first, problems, flags, 4)
    again = eg.resample_equal_groups(policy, first, problems, flags, 4)[0]
    assert [r.ids for r in kept] == [r.ids for r in again]  # a resumed run draws the same
    mixed = [len({r.accuracy for r in first[q * 8 : q * 8 + 8]}) > 1 for q in range(6)]
    for q, was_mixed in enumerate(mixed):
        assert (kept[q * 8] is first[q * 8]) == was_mixed
        assert len({id(r.problem) for r in kept[q * 8 : q * 8 + 8]}) == 1
    assert 0 < sum(mixed) < 6 and len(kept) == 48 < len(everything) <= 4 * 48
    assert everything[:48] == first and {id(r) for r in kept} <= {id(r) for r in everything}
    assert share_mixed(eg.rewards(kept, flags)) > share_mixed(eg.rewards(first, flags))


def test_rounds_of_resampling_ask_other_questions_than_the_step():
    problems, flags = [Problem(str(k), ("1",), None, str(k)) for k in range(50)], flags_of()
    rounds = [
        [p.question for p in eg.batch_of_problems(problems, flags, 2, *again)]
        for again in ((), (1,), (2,))
    ]
    assert rounds[0] != rounds[1] != rounds[2] != rounds[0]


# --- profiles, references --------------------------------------------------------------------------------------------


def test_the_tiny_settings_belong_to_the_profile_not_to_the_name():
    tiny, other, paper = (
        flags_of(*argv.split())
        for argv in (
            "--model tiny",
            "--model runs/X/final --profile tiny",
            "--model tiny --profile paper",
        )
    )
    assert replace(other, model="tiny", out=tiny.out, profile="auto") == tiny
    assert paper.steps == 1000 and paper.data == "deepscaler-hard-1k" and tiny.steps == 60


def test_references_that_are_not_right_are_told_and_can_be_left_out(policy, tmp_path, capsys):
    rows = [
        '{"problem": "1+1?", "answer": "2", "solution": "It is \\\\boxed{2}."}',
        '{"problem": "1+2?", "answer": "3", "solution": "It is three."}',
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(rows))
    argv = ["--data", str(tmp_path / "d.jsonl")]
    told = eg.training_problems(flags_of(*argv), policy, True)[0]
    assert "1 of 2 reference solutions are not graded right" in capsys.readouterr().out
    assert [p.solution for p in told] == ["It is \\boxed{2}.", "It is three."]
    left = eg.training_problems(flags_of(*argv, "--drop-wrong-references"), policy, True)[0]
    assert [p.solution for p in left] == ["It is \\boxed{2}.", None]
    kept = eg.training_problems(
        flags_of(*argv, "--method", "sft", "--drop-wrong-references"), policy, True
    )[0]
    assert [p.question for p in kept] == ["1+1?"]


@pytest.mark.parametrize("name", ["gsm8k", "math", "tiny:5-8:test"])
def test_nobody_trains_on_a_test_set_without_a_word(policy, name):
    with pytest.raises(UserError, match=f"--data {name} is for testing"):
        eg.training_problems(flags_of("--data", name), policy, False)


@pytest.mark.parametrize(
    "argv, says",
    [
        ("--group-size 1", "a group of one has no advantage"),
        ("--correction wait", "must be none, guided, reflect"),
        ("--guided-probs .2 .2 .2 .2 .2", "at most 4"),
        ("--guided-probs .5 .4", "must sum to 1, not 0.9"),
        ("--eda-clamp 1", "LO HI"),
        ("--eda-clamp 1 2 3", "LO HI"),
        ("--eda-clamp .5 1 2 1", "0 < LO < HI"),
        ("--method grpo --guide all-wrong", "--guide"),
        ("--eda-grad --injected-shaping .1", "--injected-shaping 0"),
        ("--method sft --mask-injected", "drop --injected-weight"),
        ("--all-wrong-advantage 1", "--all-wrong-advantage"),
    ],
)
def test_flags_that_would_do_nothing_or_make_no_sense_are_refused(argv, says):
    with pytest.raises(UserError, match=says):
        flags_of(*argv.split())
