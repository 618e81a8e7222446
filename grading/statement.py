"""What relations and plus-minus signs state.

`settle` turns them into ("list", joiner, items), ("assign", name, value), ("chain", parts),
("record", ((name, value)...)), ("eq", a, b), ("less", ((a, sign, b)...)), ("equiv", a, b),
("residues", modulus, items, left), or leaves what it was before.
"""

import itertools

from grading.tree import Node, Unreadable, constant, elements, names, num, walk
from grading.units import hoisted

_DOTS = ("dots",)
_ORDERS = set("< <= != > >=".split())


def settle(node: Node) -> Node:
    """Raises Unreadable."""
    match node:
        case ("list", joiner, items):
            return _list(joiner, items)
        case ("set", items):
            return ("set", elements(_list(",", items)))
        case ("cong", residues, modulus):
            return _residues(settle(residues), constant(modulus))
        case ("cup" | "cap" | "minus" as kind, left, right):
            left, right = settle(left), settle(right)
            if kind == "cup" and left[0] == right[0] == "set":
                return ("set", left[1] + right[1])
            return (kind, left, right)
    variants = _variants(node)
    if len(variants) > 1:
        return _list("or", variants)
    [node] = variants
    return _relation(node[1]) if node[0] == "rel" else hoisted(node)


def _residues(listed: Node, modulus) -> Node:
    left, residues = None, set()
    for item in elements(listed):
        if item[0] in ("equiv", "assign"):
            left = left or item[1]
            item = item[2]
        residue = constant(item)
        if residue is None or not modulus:
            raise Unreadable("residues")
        residues.add(residue % modulus)
    return ("residues", modulus, tuple(sorted(residues)), left)


def _variants(node: Node) -> list[Node]:
    """The values of an expression with plus-minus signs: independent signs, unless a minus-plus
    ties them together."""
    signs = [part[0] for part in walk(node) if part[0] in ("pm", "mp")]
    if not signs:
        return [node]
    if len(signs) > 4:
        raise Unreadable("too many plus-minus signs")
    independent = 1 if "mp" in signs else len(signs)
    variants = []
    for choice in itertools.product((True, False), repeat=independent):
        variants.append(_signed(node, itertools.cycle(choice)))
    return list(dict.fromkeys(variants))


def _signed(node: Node, choice) -> Node:
    if not isinstance(node, tuple):
        return node
    if not node or node[0] not in ("pm", "mp"):
        return tuple(_signed(part, choice) for part in node)
    is_plus = next(choice) == (node[0] == "pm")
    part = _signed(node[1], choice)
    return part if is_plus or part == num(0) else ("neg", part)


def _make_points(items: list[Node]) -> None:
    """x < 0 or x = 1: the equation is a set, too."""
    bounds = tuple(item for item in items if item[0] == "less")
    for k, item in enumerate(items):
        if item[0] == "assign" and item[1] in walk(bounds):
            items[k] = ("set", (item[2],))


def _shorten_before_dots(items: list[Node]) -> None:
    """1, 2, 3, ... is 1, 2, ..."""
    while _DOTS in items[3:]:
        at = items.index(_DOTS, 3)
        a, b, c = map(constant, items[at - 3 : at])
        if None in (a, b, c) or b - a != c - b:
            return
        del items[at - 1]


def _list(joiner: str, nodes) -> Node:
    items = []
    for node in nodes:
        items += elements(settle(node))
    if joiner == "or":
        _make_points(items)
    _shorten_before_dots(items)
    named = [item for item in items if item[0] == "assign"]
    distinct = {item[1] for item in named}
    if len(named) == len(items) == len(distinct) > 1:
        return ("record", tuple(item[1:] for item in items))
    if len(distinct) == 1 and named in (items, items[:1]):  # x = 1, x = 2 or x = 1, 2
        values = [item[2] for item in named]
        items = values + items[len(named) :]
    if len(items) == 1:
        return items[0]
    return ("list", joiner, tuple(items))


def is_name(node: Node) -> bool:
    """x, x_1, f(x), a tuple or a ratio of names, dy/dx, a polygon ABC."""
    kind, *parts = node
    if kind == "div":
        return all(part[:2] == ("mul", ("sym", "d")) for part in parts)
    if kind == "tuple":
        return all(map(is_name, node[2]))
    if kind == "mul":
        return all(is_name(part) and (part[0] == "mul" or part[1][0].isupper()) for part in parts)
    return kind == "sym" and not node[1].startswith("text")


def _relation(parts: tuple) -> Node:
    operands, operators = parts[::2], parts[1::2]
    if "~" in operators:
        first = parts.index("~")
        if first > 1:
            return _relation(parts[:first])
        if is_name(parts[0]):
            return _relation((parts[0], "=", *parts[2:]))
        return ("chain", (parts[2], parts[0]))
    if set(operators) == {"="}:
        return _equation(operands)
    if _ORDERS.issuperset(operators):
        pairs = []
        for a, sign, b in zip(operands, operators, operands[1:]):
            if ">" in sign:
                a, sign, b = b, sign.replace(">", "<"), a
            pairs.append((a, sign, b))
        return ("less", tuple(pairs))
    match parts:
        case (modulus, "mid", value):
            return _residues(("equiv", value, num(0)), constant(modulus))
        case (left, "equiv", right):
            return ("equiv", left, right)
        case (name, "in", region) if is_name(name):
            return settle(region)
    raise Unreadable("mixed relations")


def _equation(operands: tuple) -> Node:
    first, *rest = operands
    if len(rest) == 1 and is_name(rest[0]) and not is_name(first):
        rest, first = [first], rest[0]
    if is_name(first):
        value = rest[0] if len(rest) == 1 else ("chain", tuple(rest))
        match first, value:
            case ("tuple", "(", names_of, _), ("tuple", _, values, _):
                if len(names_of) == len(values):
                    return ("record", tuple(zip(names_of, values)))
        return ("eq" if first in walk(value) else "assign", first, value)
    if {operand[0] for operand in operands} == {"num"}:
        raise Unreadable("a tautology or a contradiction")
    if len(rest) == 1 and names(*operands):
        return ("eq", *operands)
    return ("chain", operands)


def named_value(node: Node) -> Node:
    """What an answer says that an expression is worth: m + n = 24, |z| = 5; any other node as it
    is."""
    if node[0] == "eq":
        for name, value in (node[1:], node[:0:-1]):
            if not names(value):
                return settle(value)
    return node
