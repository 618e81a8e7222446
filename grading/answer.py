"""Two texts -> equal? What needs no tree (integers, the same text, words, letters of a choice),
then what does."""

import re

from grading.equal import Judge
from grading.parser import parse
from grading.statement import named_value, settle
from grading.tree import Undefined, Unreadable
from grading.words import TEXT

_INTEGER = re.compile(r"-?\d{1,18}")
_MARKUP = rf"\\(?:{'|'.join(TEXT)}|mathbf)(?![a-z])"
_CHOICE = re.compile(  # (B), Option B, (B) 12; not (A) or (B), not A. 5 B. 7
    rf"(?:{_MARKUP}\s*\{{)?\s*(?:option|choice)?\s*\(?(?-i:([A-J]))"
    r"(?:[).:]\s*\}?(?:\\?[ ~]+(?!.*(?:\b(?:or|and|not)\b|(?-i:\b[A-J]\b)))[^,;]*)?|\}?)",
    re.IGNORECASE | re.DOTALL,
)
_ARTICLE = re.compile(r"^(?:an?|the)\s+(?=[a-z]{4})(?!\w*(?:sin|cos|tan|cot|log|exp|sqrt))", re.I)


def _squash(text: str) -> str:
    """The text without the spaces that mean nothing: 1 1/2 is not 11/2."""
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text.replace("$", " ")).strip().rstrip(".")


def _prose(text: str) -> str | None:
    """The letters of an answer that consists of words, None if it does not."""
    text = re.sub(_MARKUP + r"|[{}()$~\"]", "", text).strip()
    text = re.sub(r"\s", "", _ARTICLE.sub("", text)).rstrip(".")
    return text if text.isalpha() else None


def _same_words(a: str, b: str) -> bool:
    """East and east, No and no, but not AB and ab; C and \\textbf{(C)}\\ 12, if one is nothing but
    the letter."""
    left, right = _prose(a), _prose(b)
    if left and right and left.lower() == right.lower():
        return left == right or len(left) > 2 or left.lower() == "no"
    choice, other = _CHOICE.fullmatch(a), _CHOICE.fullmatch(b)
    return bool(choice and other and choice[1] == other[1] and choice[1] in (left, right))


def same(answer: str, gold: str) -> bool:
    """Whether two answers are equal; not, if one is unreadable or has no value. Raises
    NeedsSympy."""
    if _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(gold):
        return int(answer) == int(gold)
    left, right = _squash(answer), _squash(gold)
    if left == right != "" or len(answer) < 500 > len(gold) and _same_words(answer, gold):
        return True
    try:
        left, right = parse(answer), parse(gold)
        if (left[0] == "list") != (right[0] == "list"):
            left, right = parse(answer, left[0] != "list"), parse(gold, right[0] != "list")
        left, right = settle(left), settle(right)
        if right[0] not in ("eq", "assign", "chain", "record", "less"):
            left = named_value(left)
        return Judge().same(right, left)
    except (Unreadable, Undefined):
        return False


def readable(answer: str) -> bool:
    """Whether an answer is one that can be compared."""
    if _INTEGER.fullmatch(answer) or _prose(answer[:500]):
        return True
    try:
        return bool(parse(answer))
    except Unreadable:
        return False
