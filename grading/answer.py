"""Two texts -> equal? What needs no tree (integers, the same text, words, letters of a choice), then what does."""

from __future__ import annotations

import re
from functools import lru_cache

from grading.equal import Judge
from grading.parser import parse
from grading.statement import named_value, settle
from grading.tree import Node, Unreadable
from grading.words import TEXT

_INTEGER = re.compile(r"-?\d{1,18}")
_MARKUP = rf"\\(?:{'|'.join(TEXT)}|mathbf)(?![a-z])"
_CHOICE = re.compile(rf"(?:{_MARKUP}\s*\{{)?\s*(?:option|choice)?\s*\(?(?-i:([A-J]))"
                     r"(?:[).:]\s*\}?(?:\\?[ ~]+(?!.*(?:\b(?:or|and|not)\b|[A-J]\)))[^,;]*)?|\}?)",
                     re.IGNORECASE | re.DOTALL)
_DATE = re.compile(r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*", re.IGNORECASE)
_cached_parse = lru_cache(maxsize=2048)(parse)


def _tree(text: str, as_list: bool = False) -> Node:
    return _cached_parse(text, as_list) if len(text) < 300 else parse(text, as_list)


def _squash(text: str) -> str:
    """The text without the spaces that mean nothing: 1 1/2 is not 11/2."""
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text.replace("$", " ")).strip().rstrip(".")


def _prose(text: str) -> str | None:
    """The letters of an answer that consists of words, None if it does not."""
    text = re.sub(_MARKUP + r"|[\s{}()$~]", "", text).rstrip(".")
    return text if text.isalpha() else None


def _same_choice(a: str, b: str) -> bool:
    """C and \\textbf{(C)}\\ 12: one of them must be nothing but the letter."""
    found, other = _CHOICE.fullmatch(a), _CHOICE.fullmatch(b)
    return bool(found and other) and found[1] == other[1] and found[1] in (_prose(a), _prose(b))


def _same_prose(a: str, b: str) -> bool:
    a, b = _prose(a), _prose(b)
    if not a or not b or a == b:
        return bool(a) and a == b
    return len(a) > 2 and a.lower() == b.lower() and not (a.isupper() or b.isupper())


def _same_date(a: str, b: str) -> bool:
    """July 4 and 4 July."""
    a, b = (sorted(re.findall(r"[a-z]+|\d+", re.sub(_MARKUP, "", text).lower())) for text in (a, b))
    return a == b and len(a) == 2 and bool(_DATE.fullmatch(a[1]))


def same(answer: str, gold: str) -> bool:
    """Whether two answers are equal. Raises NeedsSympy."""
    if _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(gold):
        return int(answer) == int(gold)
    if not _squash(answer) or not _squash(gold):
        return False
    if _squash(answer) == _squash(gold):
        return True
    if max(len(answer), len(gold)) < 500 and any(rule(answer, gold) for rule in (_same_prose, _same_choice, _same_date)):
        return True
    try:
        left, right = _tree(answer), _tree(gold)
        if (left[0] == "list") != (right[0] == "list"):
            left, right = _tree(answer, left[0] != "list"), _tree(gold, right[0] != "list")
        left, right = settle(left), settle(right)
        named = right[0] in ("eq", "assign", "chain", "record", "less")
        return Judge().same(right, left if named else named_value(left))
    except (Unreadable, ArithmeticError, RecursionError):
        return False


def readable(answer: str) -> bool:
    """Whether an answer is one that can be compared."""
    if _INTEGER.fullmatch(answer) or _prose(answer[:500]):
        return True
    try:
        return bool(_tree(answer))
    except (Unreadable, RecursionError):
        return False
