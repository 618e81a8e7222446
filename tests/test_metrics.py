"""results/metrics.py on worked numbers. The lines of whole runs are looked at in test_run.py and test_numbers.py."""

from types import SimpleNamespace

import pytest
import torch

from report.metrics import mean_gap, mean_variance, measure, share_mixed


def test_mixed_groups_and_variances():
    r = torch.tensor([[1.0, 0], [1, 1], [0, 0], [0, 1]])
    assert share_mixed(r) == 0.5
    assert mean_variance(r) == pytest.approx(0.25)
    assert mean_variance(torch.ones(3, 1)) == 0


def test_a_gap_is_of_the_tokens_that_both_sides_know():
    nan = float("nan")
    rows = [
        SimpleNamespace(mine=[-1.0, nan, -2.0], other=torch.tensor([-1.5, -9.0, -2.0])),
        SimpleNamespace(mine=[], other=torch.zeros(0)),
        SimpleNamespace(mine=[-3.0], other=torch.tensor([-2.0])),
    ]
    assert mean_gap(rows, lambda r: r.mine, lambda r: r.other) == pytest.approx((0.5 + 0 + 1) / 3)
    assert mean_gap(rows[1:2], lambda r: r.mine, lambda r: r.other) is None
    assert mean_gap([], lambda r: r.mine, lambda r: r.other) is None


def test_what_was_sampled_and_what_is_trained_on_are_told_apart():
    """A group of two, of which GEC replaces one: each number is of the rows that its name says."""

    def row(length, accuracy, format, entropy, text="", correction="", finished=True):
        logs = dict(logprobs=[-1.0] * length, logp=torch.full((length,), -1.0))
        H = dict(
            entropies=[entropy] * length,
            trainer_entropies=torch.full((length,), entropy),
            entropy=entropy,
        )
        return SimpleNamespace(
            ids=[1] * length,
            injected=[False] * length,
            sampled=length,
            text=text,
            finished=finished,
            accuracy=accuracy,
            format=format,
            correction=correction,
            **logs,
            **H,
        )

    kept, wrong = (
        row(10, 1.0, 1.0, 0.5),
        row(8, 0.0, 0.0, 0.25, "Wait! Something is wrong here.", finished=False),
    )
    better = row(13, 1.0, 1.0, 1.5, correction="reflect")
    flags = SimpleNamespace(max_new_tokens=8, correction_tokens=4, top_p=1, sft=False)
    corrections = dict(reflect=SimpleNamespace(count="reflected", goes_on=True))
    A, A_hat = torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0, -2.0]])

    def rewards(rows):
        return torch.tensor([[r.accuracy for r in rows]])

    assert measure([kept, wrong], [kept, better], A, A_hat, rewards, corrections, flags) == dict(
        reward=1.0,
        accuracy=0.5,
        accuracy_corrected=1.0,
        format=0.5,
        mixed_groups=1.0,
        mixed_groups_corrected=0.0,
        advantage_variance=2.0,
        advantage_variance_eda=8.0,
        entropy=1.0,
        entropy_sampled=0.375,
        sampled_tokens=10 + 8 + 13,
        response_tokens=9.0,
        truncated=0.5,
        self_reflection=0.5,
        over_long=1,
        logprob_gap=0.0,
        entropy_gap=0.0,
        reflected=1,
        reflect_fixed=1.0,
    )
