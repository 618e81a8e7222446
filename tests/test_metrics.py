"""results/metrics.py on worked numbers. The lines of whole runs are looked at in test_run.py and test_numbers.py."""
from types import SimpleNamespace

import pytest
import torch

from results.metrics import mean_gap, mean_variance, share_mixed


def test_mixed_groups_and_variances():
    r = torch.tensor([[1.0, 0], [1, 1], [0, 0], [0, 1]])
    assert share_mixed(r) == 0.5
    assert mean_variance(r) == pytest.approx(0.25)
    assert mean_variance(torch.ones(3, 1)) == 0


def test_a_gap_is_of_the_tokens_that_both_sides_know():
    nan = float("nan")
    rows = [SimpleNamespace(mine=[-1.0, nan, -2.0], other=torch.tensor([-1.5, -9.0, -2.0])),
            SimpleNamespace(mine=[], other=torch.zeros(0)), SimpleNamespace(mine=[-3.0], other=torch.tensor([-2.0]))]
    assert mean_gap(rows, lambda r: r.mine, lambda r: r.other) == pytest.approx((0.5 + 0 + 1) / 3)
    assert mean_gap(rows[1:2], lambda r: r.mine, lambda r: r.other) is None
    assert mean_gap([], lambda r: r.mine, lambda r: r.other) is None
