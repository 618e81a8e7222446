r"""The tiny world: synthetic word problems, for the model in data/tiny_model/.

With it every command of the project runs on a CPU without any download, and it has the pathology
that the paper is about: on hard problems most groups are all wrong. A question and its solution:

    Mia has 30 cards. (1) multiplies by 3. (2) loses 18. (3) sells 20. How many?
    (1)30*3=90\n(2)90-18=72\n(3)72-20=52\nThe answer is \boxed{52}.

The model can work step by step. But the longer the chain, the more it prefers a bare guess,
`The answer is \boxed{7}.`, so that reinforcement learning has a behaviour to select. At temperature
1 the shipped model guesses on one problem in six of 1 to 3 steps and on nearly all of 5 to 8 steps.
There one guess in 80 is right by luck, and 85% of the groups of 8 are all wrong. The script that
made the model is results/make_tiny_model.py.
"""

import random
import re
from collections.abc import Iterator

from data import Problem, tenth_of
from errors import UserError

NAMES = "Mia Tom Ana Ben Zoe Leo Eva Sam".split()
ITEMS = "cards coins books shells stones apples pens eggs".split()
VERBS = {
    "+": "finds buys wins gets".split(),
    "-": "loses sells gives eats".split(),
    "*": ["multiplies by"],
}
MAX_STEPS = 8
SIZES = {"train": 2048, "validation": 256, "test": 2048}  # problems of a set

Chain = tuple[int, list[tuple[str, int]]]  # the first number, and (operator, operand) of each step


def problems(name: str) -> list[Problem]:
    """Return the problems of tiny:STEPS[:SPLIT[:STYLE]], such as tiny:5-8 or tiny:4:train:half.

    Every number of steps in STEPS is equally frequent. SPLIT is train (default), validation or
    test: no chain of one split occurs in another, whatever STEPS. STYLE is how the reference
    solutions are written: full (default), terse, or half (every second one terse).
    Raises UserError.
    """
    parts = r"tiny:([1-8])(?:-([1-8]))?(?::(train|validation|test))?(?::(full|terse|half))?"
    match = re.fullmatch(parts, name)
    if not match or match[1] > (match[2] or match[1]):
        raise UserError(
            f"{name!r} is not a tiny set: write tiny:STEPS[:SPLIT[:STYLE]], such as tiny:5-8:test, "
            "with STEPS from 1 to 8, SPLIT train, validation or test, and STYLE full, terse or half"
        )
    steps = range(int(match[1]), int(match[2] or match[1]) + 1)
    split, style = match[3] or "train", match[4] or "full"
    rng = random.Random(f"{steps} {split}")
    made = []
    for chain in chains(rng, steps, split):
        solution = full_solution(chain)
        if style == "terse" or (style == "half" and len(made) % 2 == 1):
            solution = terse_solution(chain)
        answers = (str(result(chain)),)
        made.append(Problem(question(chain, rng), answers, solution, f"{name}:{len(made) + 1}"))
    return made


def chains(rng: random.Random, steps: range, split: str) -> Iterator[Chain]:
    """Yield the different chains of a split, the numbers of steps in turn."""
    seen = set()
    for _ in range(100 * SIZES[split]):  # there are not 2,048 chains of one step for testing
        if len(seen) == SIZES[split]:
            return
        chain = random_chain(rng, steps[len(seen) % len(steps)])
        if split_of(chain) == split and str(chain) not in seen:
            seen.add(str(chain))
            yield chain


def random_chain(rng: random.Random, steps: int) -> Chain:
    """Return a chain whose every intermediate result is in 1..99."""
    start = value = rng.randint(2, 99)
    operations = []
    for _ in range(steps):
        ranges = {"+": (1, 99 - value), "-": (1, value - 1), "*": (2, min(9, 99 // value))}
        operator = rng.choice([sign for sign, (low, high) in ranges.items() if low <= high])
        operand = rng.randint(*ranges[operator])
        operations.append((operator, operand))
        value = apply(value, operator, operand)
    return start, operations


def apply(value: int, operator: str, operand: int) -> int:
    return {"+": value + operand, "-": value - operand, "*": value * operand}[operator]


def result(chain: Chain) -> int:
    """Return the number after the last step."""
    value, operations = chain
    for operation in operations:
        value = apply(value, *operation)
    return value


def split_of(chain: Chain) -> str:
    """Return the split of a chain, by its hash: a tenth is for validation, a tenth for test."""
    return {0: "validation", 1: "test"}.get(tenth_of(str(chain)), "train")


def question(chain: Chain, rng: random.Random) -> str:
    start, operations = chain
    steps = ""
    for k, (operator, operand) in enumerate(operations, start=1):
        steps += f"({k}) {rng.choice(VERBS[operator])} {operand}. "
    return f"{rng.choice(NAMES)} has {start} {rng.choice(ITEMS)}. {steps}How many?"


def full_solution(chain: Chain, mistake: tuple[int, int] = (0, 0)) -> str:
    """Return the solution step by step.

    `mistake` is (step from 0, what is added to its result); later steps continue from there.
    """
    value, operations = chain
    lines = ""
    for k, (operator, operand) in enumerate(operations):
        after = apply(value, operator, operand)
        if k == mistake[0]:
            after += mistake[1]
        lines += f"({k + 1}){value}{operator}{operand}={after}\n"
        value = after
    return lines + final_line(value)


def terse_solution(chain: Chain) -> str:
    r"""Return an expression and its value, `(5+3)*4-2=\boxed{30}.`; a form new to the model."""
    start, operations = chain
    expression, last = str(start), ""
    for operator, operand in operations:
        if operator == "*" and last in ("+", "-"):
            expression = f"({expression})"
        expression += f"{operator}{operand}"
        last = operator
    return f"{expression}=\\boxed{{{result(chain)}}}."


def final_line(value: int) -> str:
    return f"The answer is \\boxed{{{value}}}."
