"""Tests of grading/: nothing inside raises, hangs or takes data for code; its pieces; and values
next to the real golds. The answers that are equal and that are not: answers.txt, test_reward.py."""

import random
import re

import pytest
from test_reward import benchmarks, box

import reward
from grading import answer as grading_answer
from grading.parser import parse
from grading.tree import NeedsSympy, Undefined
from grading.value import Evaluator
from grading.words import COMMANDS, PLAIN, WORDS
from reward import final_answer, grade, score, score_all

# -- nothing raises


MACROS = r"""text{ mathrm{ begin{pmatrix} end{pmatrix} begin{cases} end{cases}
    begin{aligned} end{aligned} mathbb{R} mathbb{Z}"""
OTHERS = r"""{ } \\ \{ \} \% \$ 0.\overline{3} _{15} dx \text{pm} \text{sym} \text{num}"""
GOLDS = r"""1 \sqrt{2} x^2+1 1,2 (0,1)
    x<1 \begin{pmatrix}1\\2\end{pmatrix} 5\text{cm} n\equiv1\pmod3
    x=1,y=2    2:3 50\% x+y=1 \{1,2\} 4:20 \text{pm}"""


def pieces() -> list[str]:
    """Tokens of the grammar, and what looks like them."""
    words = [*COMMANDS, *MACROS.split()]
    characters = "0123456789+-*/^_=<>()[]{}|,;:!'%&. xyzabnieEABC\n$"
    numbers = ["9" * 4000, "1" * 8000]
    own = [*WORDS, *PLAIN]
    return [*characters, *OTHERS.split(), *numbers, *own, *["\\" + word for word in words]]


def fuzz(count: int, seed: int) -> list[tuple[str, str, str]]:
    """(answer, gold, error) of what raised inside: random tokens against golds and each other,
    both ways."""
    rng, tokens, raised, previous = random.Random(seed), pieces(), [], "1"
    for _ in range(count):
        text = "".join(rng.choices(tokens, k=rng.randint(1, 9)))
        gold = rng.choice([*GOLDS.split(), "1" * 4000, previous])
        for judge, args in (
            (grading_answer.readable, (text,)),
            (grading_answer.same, (text, gold)),
            (grading_answer.same, (gold, text)),
        ):
            try:
                judge(*args)
            except NeedsSympy:
                pass
            except Exception as error:
                raised.append((text, gold, repr(error)))
        if len(text) < 200:
            previous = text
    return raised


def test_random_tokens_raise_nothing_inside():
    assert not fuzz(3000, seed=1)  # bench_reward.py tries 200,000


def test_whatever_goes_wrong_inside_counts_as_wrong(monkeypatch):
    def broken(*_):
        raise KeyError("a fault of ours")

    monkeypatch.setattr(reward, "same", broken)
    assert score(box("1"), "1") == (1.0, 0.0) and not grade(box("1"), "1")
    monkeypatch.setattr(reward, "readable", broken)
    assert score_all([box("1"), "no box"], ["1", "2"]) == [(0.0, 0.0)] * 2
    monkeypatch.undo()

    class Odd:
        def __str__(self):
            raise ValueError("no text")

    assert score(box("1"), Odd()) == (1.0, 0.0) and score(None, "1") == (0.0, 0.0)


@pytest.mark.parametrize("digits", [3999, 4000, 4001, 8000, 9900])
def test_long_numbers_on_either_side(digits):
    number = "7" * digits
    assert grade(box("\\, " + number), number) and not grade(box(number), number[:-1] + "8")
    assert grade(box(number + ".0"), number) and score(box(number), "1") == (1.0, 0.0)


# -- values


OUT_OF_REACH = r"""
10^{10^{13}}  e^{10^{13}}  \sin{10^{13}}  (1+i)^{10^9}  0^0  0^{-1}  \binom{10^6}{500000}  (10^6)!
\tan\frac{\pi}{2}  \frac{1}{\sin\pi}  \arcsin{2}  \log{0}  \lfloor{10^{50}\sqrt2}\rfloor"""


@pytest.mark.parametrize("text", OUT_OF_REACH.split())
def test_what_is_out_of_reach_has_no_value(text):
    with pytest.raises(Undefined):
        Evaluator().value(parse(text), {})


def test_a_gold_of_several_boxes_is_their_list_or_the_last():
    gold = r"Either $\boxed{3}$ or $\boxed{\frac12}$."
    assert grade(box(r"3, 0.5"), gold) and grade(box(r"\frac12"), gold)
    assert not grade(box("3"), gold) and not grade(box("4, 0.5"), gold)
    assert final_answer(gold) == r"\frac12"


# -- the real golds


def mutations(gold: str) -> list[str]:
    """Other values, spelt almost as the gold is."""
    changed = [str(int(gold) + 1), str(int(gold) + 10)]
    for form in (
        "-({})",
        r"{}\cdot 7",
        "3({})+1",
        ".{}",
        r"{}\text{{ tenths}}",
        r"\text{{not }}{}",
        r"{} \text{{ or }} 17",
    ):
        changed.append(form.format(gold))
    return changed


def test_values_next_to_real_golds_are_refused():
    for problems in benchmarks().values():
        for problem in problems[::7]:
            gold = str(problem.answers[0])
            if re.fullmatch(r"-?[1-9]\d*", gold):
                for answer in mutations(gold):
                    assert not grade(box(answer), problem.answers), (answer, gold)


@pytest.mark.parametrize(
    "constant",
    [
        r"\emptyset",
        "x<0, x>1",
        "|x|<-1",
        ".17",
        r"\dots",
        r"\text{not } 0",
        "y=x",
        "5 \\text{ or } 6",
        r"\text{units}",
    ],
)
def test_no_constant_is_worth_more_than_the_golds_that_spell_it(constant):
    for name, problems in benchmarks().items():
        if set(constant) & set("<>"):
            problems = problems[::8]  # a region is slow against expressions
        hits = share = 0
        for problem in problems:
            hits += grade(box(constant), problem.answers)
            share += constant in map(str, problem.answers)
        assert hits <= share, name
