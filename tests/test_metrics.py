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
    the place of one of the second. Responses of 12 tokens are not yet over-long."""
    kept, wrong = row(12, 1, 1, 0.5), row(8, 0, 0, 0.25, finished=False)
    wrong.text = "So Wait! Something is wrong here."
    better = row(13, 1, 1, 1.5, correction="reflect", injected=[True] * 13)
    bad, worse = row(4, 0, 1, 0.5, logp=-3.0), row(6, 0, 1, 0.5)
    told = row(20, 1, 1, 0.25, correction="reference", injected=[True] * 20, sampled_tokens=0)
    told.trainer_entropies = torch.full((20,), 9.0)  # the entropy gap is of sampled rows
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
    numbers |= {name: NAN for name, value in numbers.items() if value is None}
    assert numbers == pytest.approx(expected, nan_ok=True)


OF_SAMPLES = """accuracy accuracy_corrected mixed_groups_corrected mixed_accuracy logprob_gap
    entropy_gap
    advantage_variance advantage_variance_eda entropy_sampled mixed_accuracy_corrected"""


def test_numbers_that_there_are_none_of_are_null(groups):
    sft = numbers_of(groups, [])
    assert {sft[name] for name in OF_SAMPLES.split()} == {None}
    assert sft["reward"] == 7 / 4 and sft["sampled_tokens"] == 13
    for group in groups:
        group.A_hat = torch.zeros(2)
    groups[0].responses[1].accuracy = 0.0
    collapsed = numbers_of(groups, groups, "--top-p .9")
    assert (collapsed["reflected"], collapsed["reflect_fixed"]) == (1, 0)
    assert collapsed["advantage_share_right"] is None and collapsed["logprob_gap"] is None


def test_a_gap_is_of_the_tokens_that_both_sides_know():
    pairs = [([-1.0, NAN, -2.0], [-1.5, -9.0, -2.0]), ([], []), ([-3.0], torch.tensor([-2.0]))]
    assert mean_gap(pairs) == pytest.approx((0.5 + 0 + 1) / 3)
    assert mean_gap(pairs[1:2]) is mean_gap([]) is None


class Words:
    """A tokenizer of one word for each id."""

    def decode(self, ids):
        return " ".join(map(str, ids))

    decode_raw = decode


SAMPLE = dict(question_number=1, source="x:1", question="1+1?", answers=["2"])
SAMPLE |= dict(response="So Wait! Something is wrong here.", accuracy=0, tokens=8)
SAMPLE |= dict(correction="reflect", corrected="better", accuracy_corrected=1, tokens_corrected=3)
SAMPLE |= dict(segments=[["1", False], ["1", True], ["1", False]], advantage=-1, advantage_eda=-2)
SAMPLE |= dict(entropy=1.5, relative_entropy=1.5)
TOKENS = dict(token_texts=["1"] * 3, token_injected=[False, True, False])
TOKENS |= dict(token_entropies=[1.5] * 3, token_logp=[-1] * 3)


def test_a_row_of_samples_has_the_groups_own_numbers(groups):
    better = row(3, 1, 1, 1.5, correction="reflect", injected=[False, True, False], text="better")
    groups[0].responses[1] = better
    first, second, _, fourth = readable(Words(), groups, with_tokens=False)
    assert second == SAMPLE and fourth["question_number"] == 2
    assert first.keys() == {k for k in SAMPLE if "correct" not in k}
    assert readable(Words(), groups, with_tokens=True)[1] == SAMPLE | TOKENS
    groups[0].P = torch.zeros(2)
    assert readable(Words(), groups, with_tokens=False)[0]["relative_entropy"] == 1
