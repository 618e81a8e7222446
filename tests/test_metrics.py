"""report/metrics.py on worked numbers. Lines of whole runs are looked at in test_update.py."""

import math

import pytest
import torch
from helpers import flags_of, group_of, response

import edge_grpo as eg
from report.metrics import mean_gap, measure, readable

NAN = math.nan


def row(tokens, accuracy, format, entropy, logp=-1.0, **more):
    """A response whose tokens all have this entropy, and this log-probability of the trainer's."""
    known = dict(
        format=format,
        entropies=[entropy] * tokens,
        trainer_entropies=torch.full((tokens,), entropy + 0.125),
        sampler_logp=[-1.0] * tokens,
        trainer_logp=torch.full((tokens,), logp),
        sampled_tokens=tokens,
    )
    return response(accuracy, [1] * tokens, **known | more)


@pytest.fixture
def groups():
    """Two groups of two: GEC lets a wrong response of the first reflect, and puts a reference in
    the place of one of the second. Responses of 12 tokens are not yet over-long."""
    kept = row(12, 1, 1, 0.5)
    wrong = row(8, 0, 0, 0.25, finished=False, text="So Wait! Something is wrong here.")
    better = row(13, 1, 1, 1.5, correction="reflect", injected=[True] * 13)
    first = group_of([kept, wrong], A=torch.tensor([1.0, -1.0]), A_hat=torch.tensor([2.0, -2.0]))
    first.responses = [kept, better]

    bad = row(4, 0, 1, 0.5, logp=-3.0)
    reference = row(20, 1, 1, 0.25, correction="reference", injected=[True] * 20, sampled_tokens=0)
    reference.trainer_entropies[:] = 9.0  # the entropy gap is of sampled rows
    second = group_of([bad, row(6, 0, 1, 0.5)], number=1)
    second.responses = [bad, reference]
    second.A, second.A_hat = torch.tensor([[-0.5, 0.5], [-1.0, 3.0]])
    for group in (first, second):
        group.P = eg.group_entropy(group)
    return [first, second]


def numbers_of(groups, everything, line="--max-new-tokens 8 --correction-tokens 4"):
    def rewards(rows):
        return torch.tensor([r.accuracy + r.format for r in rows]).double()

    return measure(groups, everything, rewards, eg.CORRECTIONS, flags_of(line))


EXPECTED = """
reward 1.75                    accuracy .1666667             accuracy_corrected .75
format .6666667                mixed_groups .6666667         mixed_groups_corrected .5
advantage_variance 1.25        mixed_accuracy .3333333       mixed_accuracy_corrected .5
advantage_variance_eda 8       truncated .1666667            self_reflection .1666667
entropy .6875                  entropy_sampled .4583333      response_tokens 5.6666667
sampled_tokens 47              logprob_gap .1632653          entropy_gap .125
over_long 2                    reflected 1                   reflect_fixed 1
answered 0                     referenced 1                  prefixed 0
prefix_fixed 0                 relative_entropy_answer null  advantage_share_answer 0
relative_entropy_right .5      relative_entropy_prefix null  advantage_share_right .25
relative_entropy_reflect 1.5   advantage_share_prefix 0      advantage_share_reflect .25
relative_entropy_wrong 1.3333333                             advantage_share_wrong .125
relative_entropy_reference .6666667                          advantage_share_reference .375
"""  # logprob_gap: 2 in 4 of the 49 tokens that both sides know


def test_each_number_is_of_the_rows_that_its_name_says(groups):
    resampled = group_of([row(2, 0, 0, 0.5), row(2, 0, 1, 0.5)], number=1)
    words = EXPECTED.replace("null", "nan").split()
    expected = dict(zip(words[::2], map(float, words[1::2])))
    numbers = numbers_of(groups, [*groups, resampled])
    for name in numbers:
        if numbers[name] is None:
            numbers[name] = NAN
    assert numbers == pytest.approx(expected, nan_ok=True)


OF_SAMPLES = """accuracy accuracy_corrected mixed_groups_corrected mixed_accuracy logprob_gap
    entropy_gap
    advantage_variance advantage_variance_eda entropy_sampled mixed_accuracy_corrected"""


def test_numbers_that_there_are_none_of_are_null(groups):
    sft = numbers_of(groups, [])
    assert {sft[name] for name in OF_SAMPLES.split()} == {None}
    assert sft["reward"] == 7 / 4
    assert sft["sampled_tokens"] == 13
    for group in groups:
        group.A_hat = torch.zeros(2)
    groups[0].responses[1].accuracy = 0.0
    collapsed = numbers_of(groups, groups, "--top-p .9")
    assert collapsed["reflected"] == 1
    assert collapsed["reflect_fixed"] == 0
    assert collapsed["advantage_share_right"] is None
    assert collapsed["logprob_gap"] is None


def test_a_gap_is_of_the_tokens_that_both_sides_know():
    half_known = [-1.0, NAN, -2.0], [-1.5, -9.0, -2.0]
    known = [-3.0], torch.tensor([-2.0])
    assert mean_gap([half_known, ([], []), known]) == pytest.approx((0.5 + 0 + 1) / 3)
    assert mean_gap([([], [])]) is None


class Words:
    """A tokenizer of one word for each id."""

    def decode(self, ids):
        return " ".join(map(str, ids))

    decode_raw = decode


SAMPLE = {
    "question_number": 1,
    "source": "x:1",
    "question": "1+1?",
    "answers": ["2"],
    "response": "So Wait! Something is wrong here.",
    "accuracy": 0,
    "tokens": 8,
    "correction": "reflect",
    "corrected": "better",
    "accuracy_corrected": 1,
    "tokens_corrected": 3,
    "segments": [["1", False], ["1", True], ["1", False]],
    "advantage": -1,
    "advantage_eda": -2,
    "entropy": 1.5,
    "relative_entropy": 1.5,
}
TOKENS = {
    "token_texts": ["1"] * 3,
    "token_injected": [False, True, False],
    "token_entropies": [1.5] * 3,
    "token_logp": [-1] * 3,
}


def test_a_row_of_samples_has_the_groups_own_numbers(groups):
    better = row(3, 1, 1, 1.5, correction="reflect", injected=[False, True, False], text="better")
    groups[0].responses[1] = better
    first, second, _, fourth = readable(Words(), groups, with_tokens=False)
    assert second == SAMPLE
    assert fourth["question_number"] == 2
    missing = {"correction", "corrected", "accuracy_corrected", "tokens_corrected"}
    assert first.keys() == SAMPLE.keys() - missing
    assert readable(Words(), groups, with_tokens=True)[1] == SAMPLE | TOKENS
    groups[0].P = torch.zeros(2)
    assert readable(Words(), groups, with_tokens=False)[0]["relative_entropy"] == 1
