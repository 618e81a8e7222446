"""Sets of reals: equal if they agree at every end point of either, between them and beyond them."""

from __future__ import annotations

from fractions import Fraction

from grading.statement import is_name
from grading.tree import Node, Undefined, names
from grading.value import Evaluator, is_unreal, lift, mp

Interval = ("(", "[")
_GRID = 10 ** 60                                          # numbers are compared to 60 places


def is_region(node: Node) -> bool:
    """Inequalities, unions and the like, which only sets of reals equal."""
    inequalities = node[0] == "list" and any(item[0] in ("less", "noteq") for item in node[2])
    return inequalities or node[0] in ("less", "noteq", "cup", "cap", "minus")


def _is_distance(node: Node) -> bool:
    return node[0] == "abs" and len(names(node)) == 1


class Region:
    def __init__(self, node: Node, evaluator: Evaluator):
        self.node, self.evaluator = node, evaluator

    def number(self, node: Node, env: dict | None = None) -> Fraction | float:
        """A real value, rounded so that equal ones are equal; an infinity stays one. Raises Undefined."""
        value = self.evaluator.value(node, env or {})
        if is_unreal(value):
            raise Undefined("not real")
        if not isinstance(value, Fraction):
            value = value.real
            if mp.isinf(value):
                return float(value)
            if not abs(value) < 10 ** 1000:
                raise Undefined("out of reach")
        return Fraction(int(mp.nint(lift(value) * _GRID)) if not isinstance(value, Fraction) else
                        round(value * _GRID), _GRID)

    def ends(self, node: Node | None = None) -> list[Fraction]:
        """The end points. Raises Undefined."""
        node = node or self.node
        if node[0] == "tuple" and len(node[2]) == 2 and node[1] in Interval:
            parts = node[2]
        elif node[0] == "set":
            parts = node[1]
        elif node[0] in ("list", "cup", "cap", "minus"):
            return [end for part in (node[2] if node[0] == "list" else node[1:]) for end in self.ends(part)]
        elif node[0] == "less":
            return self.ends_of_inequality(node)
        elif node[0] == "noteq" and is_name(node[1]):
            parts = node[2:]
        else:
            raise Undefined("no set of reals")
        return [end for end in map(self.number, parts) if abs(end) != mp.inf]

    def ends_of_inequality(self, node: Node) -> list[Fraction]:
        if len(names(node)) != 1:
            raise Undefined("not one variable")
        sides = [part for pair in node[1] for part in (pair[0], pair[2])]
        distance = next(filter(_is_distance, sides), None)
        parts = [part for part in sides if not is_name(part) and not _is_distance(part)]
        if distance:
            return [end for part in parts for end in self.reached(distance[1], part)]
        return [end for end in map(self.number, parts) if abs(end) != mp.inf]

    def reached(self, inside: Node, part: Node) -> list[Fraction]:
        """Where |mx + c| equals a constant."""
        name, distance = names(inside)[0], self.number(part)
        at = [self.number(inside, {name: Fraction(x)}) for x in (0, 1, 2)]
        if at[2] - at[1] != at[1] - at[0] or at[1] == at[0]:
            raise Undefined("not linear")
        return [Fraction(round((side - at[0]) / (at[1] - at[0]) * _GRID), _GRID) for side in (distance, -distance)]

    def side(self, node: Node, x: Fraction) -> Fraction:
        """A side of an inequality in one variable, at x."""
        return x if is_name(node) else self.number(node, {name: x for name in names(node) if _is_distance(node)})

    def contains(self, x: Fraction, node: Node | None = None) -> bool:
        node = node or self.node
        kind = node[0]
        if kind == "tuple":
            low, high = map(self.number, node[2])
            return low < x < high or low <= high and (x == low and node[1] == "[" or x == high and node[3] == "]")
        if kind == "set":
            return any(self.number(item) == x for item in node[1])
        if kind == "noteq":
            return self.number(node[2]) != x
        if kind == "less":
            pairs = [(self.side(left, x), strict, self.side(right, x)) for left, strict, right in node[1]]
            return all(left < right or not strict and left == right for left, strict, right in pairs)
        inside = [self.contains(x, part) for part in (node[2] if kind == "list" else node[1:])]
        if kind == "list":
            conditions = node[1] != "or" and all(item[0] in ("less", "noteq") for item in node[2])
            return all(inside) if conditions else any(inside)
        left, right = inside
        return {"cup": left or right, "cap": left and right, "minus": left and not right}[kind]


def same_region(a: Node, b: Node, evaluator: Evaluator) -> bool:
    """Raises Undefined if one is no set of reals with end points that are numbers."""
    a, b = Region(a, evaluator), Region(b, evaluator)
    ends = sorted({*a.ends(), *b.ends()})
    probes = ends + [(x + y) / 2 for x, y in zip(ends, ends[1:])]
    probes += [ends[0] - 1, ends[-1] + 1] if ends else [Fraction(0)]
    return all(a.contains(x) == b.contains(x) for x in probes)


def intervals(node: Node) -> list[Node] | None:
    """The intervals of a region with letters in its ends, as tuples; None if it has another form."""
    infinity = ("const", "oo")
    if node[0] == "tuple":
        return [node]
    if node[0] in ("cup", "list"):
        parts = [intervals(part) for part in (node[2] if node[0] == "list" else node[1:])]
        return None if None in parts else [part for group in parts for part in group]
    if node[0] != "less":
        return None
    if len(node[1]) == 1:
        left, strict, right = node[1][0]
        if is_name(left):
            return [("tuple", "(", (("neg", infinity), right), ")" if strict else "]")]
        return [("tuple", "(" if strict else "[", (left, infinity), ")")] if is_name(right) else None
    pairs = node[1] if node[1][0][2] == node[1][1][0] else node[1][::-1]
    if len(pairs) != 2 or pairs[0][2] != pairs[1][0] or not is_name(pairs[0][2]):
        return None
    return [("tuple", "(" if pairs[0][1] else "[", (pairs[0][0], pairs[1][2]), ")" if pairs[1][1] else "]")]
