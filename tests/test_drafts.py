"""The replay of drafts in tests/bench_drafts.py, on sequences worked out by hand."""

import json
import math

import pytest
from bench_drafts import measure, read_groups, replay


@pytest.mark.parametrize(
    "prompt, responses, k, kwargs, steps",
    [
        ([], [[1, 2, 3, 4, 5]], 0, {}, [5]),  # no drafts: one token a step
        ([], [[1, 2, 3, 4, 5]], 4, {}, [5]),  # nothing to look up
        # The prompt has what follows 8, 9: after two plain steps a draft of two, and the end.
        ([8, 9, 5, 6], [[8, 9, 5, 6, 7]], 2, {}, [3]),
        # Drafts are kept only as far as they are equal: 5 and then 0 where 6 was drafted.
        ([8, 9, 5, 6], [[8, 9, 5, 0, 7]], 2, {}, [4]),
        # With k = 4 the second 1 2 3 4 of the text itself is one draft.
        ([], [[1, 2, 3, 4, 1, 2, 3, 4]], 4, {"sizes": (2,)}, [7]),
        # Equal siblings in lock step cannot draft for each other: both are as far.
        ([], [[1, 2, 3, 4, 5]] * 2, 4, {}, [5, 5]),
        # A sibling that is one token ahead: [0, 1, 2, 3, ...] gives drafts of one to [1, 2, 3,
        # ...].
        ([], [[1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6]], 4, {"sizes": (2,)}, [6, 6]),
        # The reference has the whole response: two plain steps, then k + 1 tokens a step.
        ([], [[1, 2, 3, 4, 5, 6, 7]], 4, {"reference": [1, 2, 3, 4, 5, 6, 7]}, [3]),
        ([], [[1, 2, 3, 4, 5, 6, 7]], 8, {"reference": [1, 2, 3, 4, 5, 6, 7]}, [3]),
    ],
)
def test_worked_sequences(prompt, responses, k, kwargs, steps):
    assert replay(prompt, responses, k, **kwargs) == steps


def test_siblings_that_have_finished_are_looked_up_whole():
    long = [*range(50, 60), 1, 2, 3, 4, 5, 6]
    responses = [[1, 2, 3, 4, 5, 6], long]
    assert replay([], responses, 8) == [6, 10 + 2 + 1]
    assert replay([], responses, 8, siblings=False) == [6, 16]


def test_factors_of_groups_alone_and_together():
    reference = list(range(9))
    groups = [([], [reference, [5]], reference), ([], [list(range(20, 26))], [])]
    row, group, eight = measure(groups, 8, (3, 2), "own+siblings+reference")
    assert row == 16 / (3 + 1 + 6) and group == 15 / 9 and eight == 9 / 6
    assert measure(groups, 8, (3, 2), "own") == (1, 1, 1)


def test_both_kinds_of_folders_are_read(tmp_path):
    evaluation, run = tmp_path / "evaluation", tmp_path / "run"
    evaluation.mkdir(), run.mkdir()
    rows = [dict(task="a", problem=p, temperature=0.6, ids=[p, 1]) for p in (1, 1, 2, 2)]
    (evaluation / "responses.jsonl").write_text("\n".join(map(json.dumps, rows)))
    [(name, groups)] = read_groups(evaluation, None, None).items()
    assert name == "T = 0.6" and groups == [([], [[1, 1]] * 2, []), ([], [[2, 1]] * 2, [])]
    row = dict(step=1, question_number=1, token_texts=["a", "b"], token_injected=[False, False])
    injected = row | dict(correction="answer", token_injected=[True, True])
    rows = [row, row, injected]
    (run / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_groups(run, None, None) == {"run": [([], [["a", "b"]] * 2, [])]}
    assert math.isclose(measure(read_groups(run, None, None)["run"], 4, (3, 2), "own")[0], 1)
