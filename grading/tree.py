"""The tree of an answer: nested tuples (kind, ...), the caps on its size, and the errors of those
who read it.

("num", value, decimals as written or None), ("sym", name), ("const", "pi" | "e" | "i" | "oo"),
("dots",), (operation, operand...): add mul div pow root neg pm mp fact fact2 deg percent abs floor
ceil binom mod, and functions, ("big", "sum" | "prod" | "int" | "lim", name, low, high, body),
("unit", a, "m^1 s^-2"),
("list", joiner, items), ("set", items), ("tuple", "(", items, ")"), ("mat", rows),
("rel", (a, op, b, op, c...)), ("cup" | "cap" | "minus", a, b), ("cong", list, modulus);
statement.py adds to them.
"""

from fractions import Fraction

MAX_TEXT, MAX_TOKENS, MAX_DEPTH = 20_000, 2_000, 40  # of one answer
MAX_BITS = 200_000  # of an exact number
MAX_STEPS = 20_000  # of one comparison

Node = tuple


class Unreadable(ValueError):
    """The text is no answer that this grader understands."""


class Undefined(ArithmeticError):
    """An expression without a value, or one whose value is out of reach."""


class NeedsSympy(Exception):
    """Only a computer algebra system can tell the value."""


def num(value, decimals: int | None = None) -> Node:
    return ("num", Fraction(value), decimals)


def constant(node: Node) -> Fraction | None:
    """The value of a number with or without a minus, None for anything else."""
    match node:
        case ("num", value, _):
            return value
        case ("neg", ("num", value, _)):
            return -value
    return None


def elements(node: Node) -> tuple:
    """The items of a list; of anything else only itself."""
    return node[2] if node[0] == "list" else (node,)


def walk(node: Node):
    """Every tuple of a tree that is a node, without recursion."""
    stack = [node]
    while stack:
        node = stack.pop()
        if node and isinstance(node[0], str):
            yield node
        stack.extend(part for part in node if isinstance(part, tuple))


def has(node: Node, *kinds: str) -> bool:
    """Whether nodes or constants of these kinds are in a tree."""
    for kind, *parts in walk(node):
        if kind in kinds or kind == "const" and parts[0] in kinds:
            return True
    return False


def names(*nodes: Node) -> list[str]:
    """The free letters, sorted."""
    letters, bound = set(), set()
    for part in walk(("list", *nodes)):
        if part[0] == "sym":
            letters.add(part[1])
        elif part[0] == "big":
            bound.add(part[2])
    return sorted(letters - bound)


def pairs(text: str) -> dict[str, str]:
    """A table of words that stand in pairs: name value name value."""
    words = text.split()
    return dict(zip(words[::2], words[1::2]))
