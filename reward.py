"""Grades one response against its gold answers: the accuracy and format rewards of the paper (PAPER.md, "Equations").

The answer is the content of the last closed `\\boxed{}`. It is tokenized, parsed into a small tree of tuples and
compared with the gold by type (grading/). Expressions are compared by value: exactly where rational arithmetic
carries, otherwise to 120 digits, at random points where they have variables. No text ever reaches `eval`, `sympify`
or any other parser than grading/parser.py. Every size (text, tokens, nesting, bits of a number, evaluation steps) is
capped before work is done, so that grading in this process is bounded; what cannot be bounded (limits, integrals,
infinite sums) goes to a process that runs sympy under a memory limit and a clock kept here.

What counts as equal, decided once:
- Value, not form: expanded or factored, reduced or not, `2^3` or `8`, `2\\pi/4` or `\\pi/2`, `52_8` or `42`.
- Percent: `p%` equals `p` and `p/100` (golds are written both ways); two percentages must agree as they stand.
- Degrees, units and money: a unit that only one side gives is ignored, two different units are not equal unless one
  converts into the other (`1.5 km`, `1500 m`). A degree sign may also stand for pi/180.
- Decimals are exact: `0.33` is not `1/3`, `5` is not `5.001`. Only a decimal of at least ten significant digits that
  rounds (or cuts) a value with no shorter decimal expansion equals it.
- Letters: i, e and pi are the constants; j..n and N are integers; x, y and z are real; any other letter is a positive
  quantity. A bare `log` is natural or decimal, whichever fits.
- `k=5` or `f(x)=5` equals `5`; two named answers must agree in the name, except that `y` and `f(x)` are one name.
- A comma list equals its permutations and the set of its elements; tuples and intervals keep their order and
  brackets; `(a,b)` is a point or an interval as the other side asks; inequalities are intervals.
- Equations are equal up to a constant factor, never by both being true (`0=0`).
- `1,234` is a number unless the other side is plainly a list.
"""

from __future__ import annotations

import re

from grading import sympy_process
from grading.answer import readable, same
from grading.tree import NeedsSympy

_BOX = re.compile(r"\\{1,2}boxed\s*\{|\\.|[{}]", re.DOTALL)


def final_answer(response: str) -> str | None:
    """The content of the last closed \\boxed{...}, None if there is none; of boxes around boxes the innermost.
    Linear time."""
    if not isinstance(response, str):
        return None
    if response.count("{") + response.count("}") > 60_000:
        response = response[-60_000:]
    opened, closed = [], []
    for match in _BOX.finditer(response):
        token = match.group()
        if token == "}" and opened:
            start, content = opened.pop()
            if content is not None:
                closed.append((start, content, match.start()))
        elif token == "{":
            opened.append((match.start(), None))
        elif len(token) > 2:
            opened.append((match.start(), match.end()))
    if not closed:
        return None
    _, content, end = closed.pop()
    while closed and not response[content:closed[-1][0]].strip() and not response[closed[-1][2] + 1:end].strip():
        _, content, end = closed.pop()
    return response[content:end]


def _texts(gold) -> list[str]:
    """The golds as texts, without their boxes."""
    if isinstance(gold, (list, tuple)):
        return [text for one in gold for text in _texts(one)]
    if gold is None or gold != gold:                      # None, NaN
        return []
    text = str(gold)
    return [inner if (inner := final_answer(text)) is not None else text]


def grade(response: str, gold) -> bool:
    """True if the last closed \\boxed{} of the response equals the gold (str, int, float), or any of a list of them."""
    answer = final_answer(response)
    return answer is not None and _accuracy(answer.strip(), gold) == 1.0


def _accuracy(answer: str, gold, patience: float = 0.0) -> float:
    undecided = []
    for one in _texts(gold):
        try:
            if same(answer, one.strip()):
                return 1.0
        except NeedsSympy:
            undecided.append(one)
    reply = sympy_process.ask(answer, undecided, patience) if undecided else None
    return reply[1] if reply else 0.0


def score(response: str, gold) -> tuple[float, float]:
    """(format, accuracy), each 0.0 or 1.0. Format: a closed, non-empty box whose content parses."""
    return _score((final_answer(response) or "").strip(), gold)


def _score(answer: str, gold, patience: float = 0.0) -> tuple[float, float]:
    return (float(readable(answer)), _accuracy(answer, gold, patience)) if answer else (0.0, 0.0)


def score_all(responses: list[str], golds: list) -> list[tuple[float, float]]:
    """score of each pair, in order. Raises ValueError if there are not as many golds as responses.

    Unlike `score` it waits for a sympy process that is still starting or gets little processor time, so that a run's
    rewards do not depend on what else the machine is doing; the process's own limit, CLOCK seconds of processor time,
    holds all the same.
    """
    if len(responses) != len(golds):
        raise ValueError(f"{len(responses)} responses for {len(golds)} golds")
    return [_score((final_answer(response) or "").strip(), gold, sympy_process.PATIENCE)
            for response, gold in zip(responses, golds)]
