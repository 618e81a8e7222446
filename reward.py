r"""Grades one response against its gold answers: the accuracy and format rewards of the paper
(arXiv 2507.21848, Section 3).

The answer is the content of the last closed `\boxed{}`. It is tokenized, parsed into a small tree
of tuples and compared with the gold by type (grading/). Expressions are compared by value: exactly
where rational arithmetic suffices, otherwise to 120 digits, and at random points where they have
variables. No text ever reaches `eval`, `sympify` or any other parser than grading/parser.py.

Every size (text, tokens, nesting, bits of a number, evaluation steps) is capped before work is
done, so that grading in this process is bounded. What cannot be bounded (limits, integrals,
infinite sums) goes to a process that runs sympy with a limit on memory and on CPU time; the caller
waits for its reply. The limit is on CPU time so that rewards do not depend on the machine's load.
An error inside the grader counts as a wrong answer.

What counts as equal, decided once:
- Value, not form: expanded or factored, reduced or not, `2^3` or `8`, `2\pi/4` or `\pi/2`, `52_8`
  or `42`. So a response that copies an expression from the problem into the box is right if the
  expression has the answer's value. This works on 50 of the 500 problems of MATH and 10 of the 675
  of OlympiadBench (tests/bench_reward.py measures it).
- Percent: `p%` equals `p` and `p/100` (golds are written both ways); `p%` and `q%` are equal only
  if p = q.
- Degrees, units and money: a unit that only one side gives is ignored, also after a minus or a
  sum; two different units or currencies are not equal unless one converts into the other (`1.5
  km`, `1500 m`; `\$5.50`, `5 dollars and 50 cents`). A degree sign may also mean pi/180. A value
  may be followed by known units, counted things (any plural; after 1 or 1/2 any noun), remarks in
  brackets, anything after "of" and "per", and number words, which change it (`3 dozen`, `2
  thirds`). Any other word makes the answer unreadable, and so does a word of negation or doubt
  anywhere before a value.
- Decimals are exact: `0.33` is not `1/3`, `5` is not `5.001`. The exception: a decimal of at least
  ten significant digits equals the value that it rounds or truncates, if that value has no shorter
  decimal expansion (with sixteen digits or more, the last may be off by one). `0.3636\ldots`
  recurs. In `7/3 = 2.33` the last side is the answer, in `7/3 \approx 2.33` the first, and every
  side must agree with it.
- Letters: i, e and pi are the constants; j..n and N are positive integers; x, y and z are real;
  any other letter is a positive quantity. Expressions are compared at small and at large values of
  their letters. A bare `log` is natural or decimal, whichever fits.
- `k=5` or `f(x)=5` equals `5`; two named answers must agree in the name, except that `y` and
  `f(x)` are one name. An answer may also name its value by words or an expression (`\text{Area} =
  5`, `m+n = 5`); a gold may not.
- A comma list equals its permutations and the set of its elements; `x=1, y=2` is the point (1,2)
  in the order of the names. Tuples and intervals keep their order and brackets (`]1,2[` is
  `(1,2)`); a column is a tuple; `(a,b)` is a point or, with a < b, an interval, as the other side
  asks. Several candidates (`5 or 6`, `(A) or (B)`, `A. 5 B. 7`) are a list, not the first of them.
  `1,2,3,\ldots` is `1,2,\ldots`.
- Inequalities are sets of reals, and so is `x<0 or x=1`; they keep the name of their variable where
  both sides give one.
- Equations are equal up to a constant factor, never by both being true (`0=0`).
- `2:3` is `4:6` and 2/3; what reads as a time of day (`4:20`) or a date (`7/4/2021`) equals only
  itself.
- `1,234` is a number unless the other side is plainly a list.

Known gaps, which only adversarial answers reach: differences below 1e-120 (`\pi+10^{-130}`), and
expressions that differ only where a letter is above 5,000 (`n \bmod 10000` for n).
"""

import re

from grading import sympy_process
from grading.answer import readable, same
from grading.tree import NeedsSympy

# \boxed{, or \boxed with TeX's other arguments (a number, a letter, a command); or a brace.
_BOX = re.compile(
    r"\\{1,2}boxed\s*"
    r"(?P<open>\{|(?P<bare>\d+(?:\.\d+)?|[A-Z](?![A-Za-z])|\\[a-zA-Z]+(?!\s*[{a-zA-Z\d])))"
    r"|\\.|[{}]",
    re.DOTALL,
)


def _boxes(text: str) -> list[tuple[int, int, int]]:
    """(start, start of the content, end of the content) of every closed \\boxed{...}, in the order
    of their ends, in linear time."""
    opened, closed = [], []
    for match in _BOX.finditer(text):
        token = match.group()
        if match["bare"]:
            closed.append((match.start(), *match.span("bare")))
        elif match["open"]:
            opened.append((match.start(), match.end()))
        elif token == "{":
            opened.append(None)
        elif token == "}" and opened:
            box = opened.pop()
            if box:
                closed.append((*box, match.start()))
    return closed


def final_answer(response: str) -> str | None:
    """The content of the last closed \\boxed{...}, or None if there is none. If a box holds only
    another box, the content of the inner one."""
    if not isinstance(response, str):
        return None
    if response.count("{") + response.count("}") > 60_000:
        response = response[-60_000:]
    closed = _boxes(response)
    if not closed:
        return None
    _, content, end = closed.pop()
    while closed:
        start, inner, inner_end = closed.pop()
        around = response[content:start] + response[inner_end + 1 : end]
        if start < content or around.strip():
            break
        content, end = inner, inner_end
    return response[content:end]


def _texts(gold) -> list[str]:
    """The golds as texts, without their boxes. A gold of several boxes side by side gives two: the
    last box, and all of them as a comma list."""
    if isinstance(gold, (list, tuple)):
        return sum(map(_texts, gold), [])
    if gold is None or gold != gold:  # None, NaN
        return []
    text = str(gold)
    boxes = _boxes(text)
    if not boxes:
        return [text]
    texts = [final_answer(text)]
    if all(first[2] < second[0] for first, second in zip(boxes, boxes[1:])):
        texts.append(", ".join(text[content:end] for _, content, end in boxes))
    return texts


def grade(response: str, gold) -> bool:
    """Whether the last closed \\boxed{} of the response equals the gold (str, int, float), or one
    of a list of golds."""
    return score(response, gold)[1] == 1.0


def score(response: str, gold) -> tuple[float, float]:
    """Returns (format, accuracy), each 0.0 or 1.0. Format is 1.0 if there is a closed, non-empty
    box whose content parses. Never raises: an error inside the grader is 0.0."""
    answer = (_safely(final_answer, response) or "").strip()
    if not answer:
        return 0.0, 0.0
    return float(_safely(readable, answer)), float(_safely(_is_right, answer, gold))


def _safely(judge, *args):
    """judge(*args), or False if it raises: no response may crash the training run."""
    try:
        return judge(*args)
    except Exception:  # whatever a hostile text makes the grader raise
        return False


def _is_right(answer: str, gold) -> bool:
    """Whether the answer equals one of the golds. Sympy is asked only if no gold is equal without
    it."""
    undecided = []
    for text in _texts(gold):
        text = text.strip()
        try:
            if same(answer, text):
                return True
        except NeedsSympy:
            undecided.append(text)
    return bool(undecided) and sympy_process.ask(answer, undecided)


def score_all(responses: list[str], golds: list) -> list[tuple[float, float]]:
    """Returns (format, accuracy) of each response, in order; golds has the gold, or list of golds,
    of each. Raises ValueError if their numbers differ."""
    if len(responses) != len(golds):
        raise ValueError(f"{len(responses)} responses for {len(golds)} golds")
    return list(map(score, responses, golds))
