"""engine/folder.py: what is written is JSON, whatever the numbers."""

import json

from engine.folder import append


def not_json(constant):
    raise AssertionError(f"{constant} is not JSON")


def test_not_even_a_nan_makes_a_metrics_line_that_is_no_json(tmp_path):
    append(
        tmp_path / "x.jsonl",
        [dict(a=float("nan"), b=float("-inf"), c=1.5, d="NaN", e=None, f=3, g=[0.5, float("nan")])],
    )
    row = json.loads((tmp_path / "x.jsonl").read_text(), parse_constant=not_json)
    assert row == dict(a=None, b=None, c=1.5, d="NaN", e=None, f=3, g=[0.5, None])
