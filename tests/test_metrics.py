"""report/metrics.py on worked numbers. Lines of whole runs are looked at in test_update.py."""

import pytest
import torch
from helpers import flags_of, group_of, response

import edge_grpo as eg
from report.metrics import mean_gap, measure, readable

NAN = float("nan")


def row(n, accuracy, format, entropy, logp=-1.0, **more):
    r = response(accuracy, [1] * n, format=format, entropies=[entropy] * n, sampled_tokens=n)
    r.sampler_logp, r.trainer_logp = [-1.0] * n, torch.full((n,), logp)
    r.trainer_entropies = torch.full((n,), entropy + 0.125)
    for name, value in more.items():
        setattr(r, name, value)
    return r


@pytest.fixture
def groups():
    """Two groups of two: GEC lets a wrong response of the first reflect, and puts a reference in
    the place of one of the second. A third group was sampled and resampled."""
    kept, wrong = row(10, 1, 1, 0.5), row(8, 0, 0, 0.25, finished=False)
    wrong.text = "So Wait! Something is wrong here."
    better = row(13, 1, 1, 1.5, correction="reflect", injected=[True] * 13)
    bad, worse = row(4, 0, 1, 0.5, logp=-3.0), row(6, 0, 1, 0.5)
    told = row(20, 1, 1, 0.25, correction="reference", injected=[True] * 20, sampled_tokens=0)
    pairs = [([kept, wrong], [kept, better]), ([bad, worse], [bad, told])]
    made = []
    for number, (sampled, trained) in enumerate(pairs):
        P = torch.tensor([r.entropy for r in trained], dtype=torch.float64)
        A_hat = torch.tensor([[2.0, -2.0], [-1.0, 3.0]][number])
        A = torch.tensor([[1.0, -1.0], [-0.5, 0.5]][number])
        made.append(group_of(sampled, number, A=A, A_hat=A_hat, P=P))
        made[-1].responses = trained
    return made


def numbers_of(groups, everything, line="--max-new-tokens 8 --correction-tokens 4"):
    def rewards(rows):
        return torch.tensor([r.accuracy + r.format for r in rows])

    return measure(groups, everything, rewards, eg.CORRECTIONS, flags_of(line))


def test_each_number_is_of_the_rows_that_its_name_says(groups):
    resampled = group_of([row(2, 0, 0, 0.5), row(2, 0, 1, 0.5)], number=1)
    gaps = 2.0 * 4 / (10 + 13 + 4 + 20)  # of all tokens that both sides know
    assert numbers_of(groups, [*groups, resampled]) == pytest.approx(
        dict(
            reward=7 / 4,
            accuracy=1 / 6,
            accuracy_corrected=3 / 4,
            format=4 / 6,
            mixed_groups=2 / 3,
            mixed_groups_corrected=1 / 2,
            mixed_accuracy=1 / 3,
            mixed_accuracy_corrected=1 / 2,
            advantage_variance=(2.0 + 0.5) / 2,
            advantage_variance_eda=(8.0 + 8.0) / 2,
            entropy=(0.5 + 1.5 + 0.5 + 0.25) / 4,
            entropy_sampled=(0.5 + 0.25 + 4 * 0.5) / 6,
            sampled_tokens=10 + 8 + 4 + 6 + 2 + 2 + 13,
            response_tokens=32 / 6,
            truncated=1 / 6,
            self_reflection=1 / 6,
            over_long=2,
            logprob_gap=gaps,
            entropy_gap=0.125,
            reflected=1,
            reflect_fixed=1.0,
            answered=0,
            referenced=1,
            prefixed=0,
            prefix_fixed=0,
            relative_entropy_right=0.5,
            relative_entropy_wrong=0.5 / 0.375,
            relative_entropy_reflect=1.5,
            relative_entropy_answer=None,
            relative_entropy_reference=0.25 / 0.375,
            relative_entropy_prefix=None,
            advantage_share_right=2 / 8,
            advantage_share_wrong=1 / 8,
            advantage_share_reflect=2 / 8,
            advantage_share_answer=0,
            advantage_share_reference=3 / 8,
            advantage_share_prefix=0,
        )
    )


def test_numbers_that_there_are_none_of_are_null(groups):
    for group in groups:
        group.A_hat = torch.zeros(2)
    collapsed = numbers_of(groups, groups, "--top-p .9")
    assert collapsed["advantage_share_right"] is None and collapsed["logprob_gap"] is None
    sft = numbers_of(groups, [])
    for (
        key
    ) in "accuracy_corrected mixed_groups_corrected mixed_accuracy advantage_variance".split():
        assert sft[key] is None
    for key in "advantage_variance_eda entropy_sampled logprob_gap entropy_gap accuracy".split():
        assert sft[key] is None
    assert sft["reward"] == 7 / 4 and sft["sampled_tokens"] == 13


def test_variances_of_groups_of_one_are_zero():
    one = torch.ones(1)
    group = group_of([row(3, 1, 1, 0.5)], A=one, A_hat=one, P=one)
    numbers = numbers_of([group], [group])
    assert numbers["advantage_variance"] == numbers["mixed_groups"] == 0


def test_a_gap_is_of_the_tokens_that_both_sides_know():
    pairs = [([-1.0, NAN, -2.0], [-1.5, -9.0, -2.0]), ([], []), ([-3.0], torch.tensor([-2.0]))]
    assert mean_gap(pairs) == pytest.approx((0.5 + 0 + 1) / 3)
    assert mean_gap(pairs[1:2]) is mean_gap([]) is None


class Words:
    """A tokenizer of one word for each id."""

    def decode(self, ids):
        return " ".join(map(str, ids))

    decode_raw = decode


def test_a_row_of_samples_has_the_groups_own_numbers(groups):
    groups[0].responses[1].injected = [False, True] + [False] * 11
    first, second, _, fourth = readable(Words(), groups, with_tokens=True)
    problem = groups[0].problem
    assert (first["question_number"], fourth["question_number"]) == (1, 2)
    assert (first["question"], first["source"]) == (problem.question, problem.source)
    assert first["answers"] == ["2"] and "correction" not in first
    before = second["response"], second["accuracy"], second["tokens"]
    assert before == ("So Wait! Something is wrong here.", 0, 8)
    after = [second[k] for k in ("correction", "accuracy_corrected", "tokens_corrected")]
    assert after == ["reflect", 1, 13] and second["corrected"] == groups[0].responses[1].text
    assert second["segments"] == [["1", False], ["1", True], [" ".join(["1"] * 11), False]]
    of_row = [second[k] for k in ("advantage", "advantage_eda", "entropy", "relative_entropy")]
    assert of_row == [-1, -2, 1.5, 1.5]
    assert second["token_texts"] == ["1"] * 13 and second["token_logp"] == [-1] * 13
    assert second["token_injected"][:3] == [False, True, False]
    assert second["token_entropies"] == [1.5] * 13
    assert "token_texts" not in readable(Words(), groups, with_tokens=False)[0]


def test_without_any_entropy_the_relative_entropy_is_one(groups):
    groups[0].P = torch.zeros(2)
    assert readable(Words(), groups, with_tokens=False)[0]["relative_entropy"] == 1
