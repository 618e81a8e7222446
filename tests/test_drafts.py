"""The replay of drafts in tests/bench_drafts.py, on sequences worked out by hand."""

import pytest
from bench_drafts import measure, replay


@pytest.mark.parametrize(
    "row",  # prompt | responses | reference | k | steps of each response
    [
        "| 12345 | | 0 | 5",  # no drafts: one token a step
        "| 12345 | | 4 | 5",  # nothing to look up
        "8956 | 89567 | | 2 | 3",  # the prompt has what follows 8, 9
        "8956 | 89507 | | 2 | 4",  # a draft is kept only as far as it is right
        "| 12341234 | | 4 | 7",  # the text itself
        "| 12345 12345 | | 4 | 5 5",  # equal siblings in lock step cannot draft for each other
        "| 123456 0123456 | | 4 | 6 6",  # one that is a token ahead can
        "| 1234567 | 1234567 | 4 | 3",  # two plain steps, then k + 1 tokens a step
    ],
)
def test_worked_sequences(row):
    prompt, responses, reference, k, steps = row.split("|")
    responses = [list(response) for response in responses.split()]
    sizes = (3, 2) if reference.strip() else (2,)
    made = replay(prompt.strip(), responses, int(k), sizes, reference=reference.strip())
    assert made == list(map(int, steps.split()))


def test_factors_of_groups_alone_and_together():
    reference = list(range(9))
    groups = [([], [reference, [5]], reference), ([], [list(range(20, 26))], [])]
    row, group, eight = measure(groups, 8, (3, 2), "own+siblings+reference")
    assert row == 16 / (3 + 1 + 6) and group == 15 / 9 and eight == 9 / 6
    assert measure(groups, 8, (3, 2), "own") == (1, 1, 1)
