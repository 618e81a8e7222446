"""Grades one response against its gold answers: the accuracy and format rewards of the paper (PAPER.md, "Reward").

First version: exact text, integers, decimals and plain fractions.
"""

from __future__ import annotations

import re
from fractions import Fraction

_BRACES = re.compile(r"\\{1,2}boxed\s*\{|\\.|[{}]", re.DOTALL)
_NUMBER = re.compile(r"[-+]?(?:\d{1,400}(?:\.\d{0,400})?|\.\d{1,400})")
_FRACTION = re.compile(r"(-?)\\[dt]?frac\{(-?\d{1,400})\}\{(-?\d{1,400})\}|(-?)(\d{1,400})/(\d{1,400})")


def final_answer(response: str) -> str | None:
    """The content of the last closed \\boxed{...}, None if there is none. One linear pass."""
    stack, last = [], None
    for match in _BRACES.finditer(response):
        token = match.group()
        if token[-1] == "{" and token != "\\{":
            stack.append(match.end() if "boxed" in token else None)
        elif token == "}" and stack:
            start = stack.pop()
            if start is not None:
                last = response[start:match.start()]
    return last


def _plain(text: str) -> Fraction | str:
    text = "".join(text.replace("$", "").split())
    if _NUMBER.fullmatch(text):
        return Fraction(text)
    found = _FRACTION.fullmatch(text)
    if found:
        sign, over, under = found.group(1, 2, 3) if found.group(2) else found.group(4, 5, 6)
        if int(under):
            return Fraction(int(over), int(under)) * (-1 if sign else 1)
    return text


def grade(response: str, gold) -> bool:
    """True if the last closed \\boxed{} of the response equals the gold, or any of a list of golds."""
    answer = final_answer(response)
    if not answer or not answer.strip():
        return False
    golds = gold if isinstance(gold, (list, tuple)) else [gold]
    return any(_plain(answer) == _plain(str(one)) for one in golds if one is not None)


def score(response: str, gold) -> tuple[float, float]:
    """(format, accuracy), each 0.0 or 1.0."""
    return float(bool((final_answer(response) or "").strip())), float(grade(response, gold))


def score_all(responses: list[str], golds: list) -> list[tuple[float, float]]:
    """score of each pair."""
    return [score(response, gold) for response, gold in zip(responses, golds, strict=True)]
