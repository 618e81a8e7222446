"""Two texts -> equal? What needs no tree (integers, the same text, words, letters of a choice), then what does."""

import re
from functools import lru_cache

from grading.equal import Judge
from grading.parser import parse
from grading.statement import named_value, settle
from grading.tree import Node, Undefined, Unreadable
from grading.words import TEXT

_INTEGER = re.compile(r"-?\d{1,18}")
_MARKUP = rf"\\(?:{'|'.join(TEXT)}|mathbf)(?![a-z])"
_CHOICE = re.compile(
    rf"(?:{_MARKUP}\s*\{{)?\s*(?:option|choice)?\s*\(?(?-i:([A-J]))"
    r"(?:[).:]\s*\}?(?:\\?[ ~]+(?!.*(?:\b(?:or|and|not)\b|[A-J]\)))[^,;]*)?|\}?)",
    re.IGNORECASE | re.DOTALL,
)
_MONTH = re.compile(r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*")
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


def _same_words(a: str, b: str) -> bool:
    """East and east; C and \\textbf{(C)}\\ 12, if one is nothing but the letter; July 4 and 4 July."""
    left, right = _prose(a), _prose(b)
    if (
        left
        and right
        and (
            left == right
            or len(left) > 2
            and left.lower() == right.lower()
            and not (left.isupper() or right.isupper())
        )
    ):
        return True
    choice, other = _CHOICE.fullmatch(a), _CHOICE.fullmatch(b)
    if choice and other and choice[1] == other[1] and choice[1] in (left, right):
        return True
    words, words2 = (
        sorted(re.findall(r"[a-z]+|\d+", re.sub(_MARKUP, "", text).lower())) for text in (a, b)
    )
    return words == words2 and len(words) == 2 and bool(_MONTH.fullmatch(words[1]))


def same(answer: str, gold: str) -> bool:
    """Whether two answers are equal; not, if one is unreadable or has no value. Raises NeedsSympy."""
    if _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(gold):
        return int(answer) == int(gold)
    if not _squash(answer) or not _squash(gold):
        return False
    if (
        _squash(answer) == _squash(gold)
        or max(len(answer), len(gold)) < 500
        and _same_words(answer, gold)
    ):
        return True
    try:
        left, right = _tree(answer), _tree(gold)
        if (left[0] == "list") != (right[0] == "list"):
            left, right = _tree(answer, left[0] != "list"), _tree(gold, right[0] != "list")
        left, right = settle(left), settle(right)
        stated = right[0] in ("eq", "assign", "chain", "record", "less")
        return Judge().same(right, left if stated else named_value(left))
    except (Unreadable, Undefined):
        return False


def readable(answer: str) -> bool:
    """Whether an answer is one that can be compared."""
    if _INTEGER.fullmatch(answer) or _prose(answer[:500]):
        return True
    try:
        return bool(_tree(answer))
    except Unreadable:
        return False
