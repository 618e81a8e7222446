"""Sets of reals: equal if they agree at every end point of either, between them and beyond them.

Letters other than the variable are drawn at random, a few times, as expressions are compared."""

from __future__ import annotations

from fractions import Fraction

from grading.statement import is_name
from grading.tree import Node, Undefined, names, walk
from grading.value import Evaluator, is_unreal, lift, mp

_GRID, _CLOSE = 10 ** 60, Fraction(1, 10 ** 50)           # numbers are compared to 50 places
_PROBES = tuple(Fraction(x) for x in ("-1e9", "-1234.5", "-17", "-2.7", "-0.31", "0", "0.43", "1.9", "23", "4321.5", "1e9"))


def is_region(node: Node) -> bool:
    """Inequalities, unions and the like, which only sets of reals equal."""
    inequalities = node[0] == "list" and any(item[0] == "less" for item in node[2])
    return inequalities or node[0] in ("less", "cup", "cap", "minus")


def _bound(node: Node) -> set[str]:
    """The names that the inequalities of a region may bound."""
    pairs = [pair for part in walk(node) if part[0] == "less" for pair in part[1]]
    return {side[1] for pair in pairs for side in pair[::2] if side[0] == "sym"} or set(
        names(*[side for pair in pairs for side in pair[::2]]))


class Region:
    def __init__(self, node: Node, name: str | None, evaluator: Evaluator, env: dict):
        self.node, self.name, self.evaluator, self.env = node, name, evaluator, env

    def number(self, node: Node, at: Fraction | None = None):
        """A real value, where the variable is at. Raises Undefined."""
        value = self.evaluator.value(node, self.env if at is None else self.env | {self.name: at})
        if is_unreal(value):
            raise Undefined("not real")
        return lift(value).real

    def end(self, value) -> list[Fraction]:
        """A number as an end point, rounded so that equal ones are equal; an infinity is none. Raises Undefined."""
        if mp.isinf(value):
            return []
        if not abs(value) < 10 ** 300:
            raise Undefined("out of reach")
        return [Fraction(int(mp.nint(value * _GRID)), _GRID)]

    def ends(self, node: Node) -> list[Fraction]:
        """Raises Undefined if this is no set of reals."""
        if node[0] == "tuple" and len(node[2]) == 2 and node[1] in "([":
            low, high = map(self.number, node[2])
            if low > high or low == high and (node[1], node[3]) != ("[", "]"):
                raise Undefined("a point, or nothing")
            return self.end(low) + self.end(high)
        if node[0] == "set":
            return [end for part in node[1] for end in self.end(self.number(part))]
        if node[0] == "less":
            return [end for left, _, right in node[1] for end in self.crossings(left, right)]
        if node[0] in ("cup", "cap", "minus") or is_region(node) or node[:2] == ("list", "or"):
            return [end for part in (node[2] if node[0] == "list" else node[1:]) for end in self.ends(part)]
        raise Undefined("no set of reals")

    def crossings(self, left: Node, right: Node) -> list[Fraction]:
        """Where two sides meet, if their difference (of their squares, for distances) is quadratic or linear."""
        power = 2 if "abs" in (left[0], right[0]) else 1
        try:
            at = [self.number(left, Fraction(x)) ** power - self.number(right, Fraction(x)) ** power
                  for x in (-1, 0, 1, 2, 3)]
        except Undefined:
            return []
        c, b, a = at[1], (at[2] - at[0]) / 2, (at[2] + at[0]) / 2 - at[1]
        discriminant = b * b - 4 * a * c
        if any(abs(a * x * x + b * x + c - at[x + 1]) > 1e-50 for x in (2, 3)) or discriminant < 0:
            return []
        if abs(a) < 1e-50:
            return self.end(-c / b) if abs(b) > 1e-50 else []
        return [end for sign in (1, -1) for end in self.end((-b + sign * mp.sqrt(discriminant)) / (2 * a))]

    def contains(self, node: Node, x: Fraction) -> bool:
        kind = node[0]
        if kind == "tuple":
            return self.holds(node[2][0], "<=" if node[1] == "[" else "<", x) and \
                self.holds(node[2][1], ">=" if node[3] == "]" else ">", x)
        if kind == "set":
            return any(self.holds(item, "=", x) for item in node[1])
        if kind == "less":
            return all(self.holds(("add", left, ("neg", right)), sign, x, Fraction(0)) for left, sign, right in node[1])
        inside = [self.contains(part, x) for part in (node[2] if kind == "list" else node[1:])]
        if kind == "list":
            conditions = node[1] != "or" and all(item[0] == "less" for item in node[2])
            return all(inside) if conditions else any(inside)
        return {"cup": any(inside), "cap": all(inside), "minus": inside[0] and not inside[1]}[kind]

    def holds(self, node: Node, sign: str, x: Fraction, than: Fraction | None = None) -> bool:
        """Whether the node, where the variable is x, is on that side of x or of another number."""
        try:
            difference = self.number(node, x) - lift(x if than is None else than)
        except Undefined:
            return False
        near = abs(difference) < lift(_CLOSE)
        return near if sign == "=" else not near if sign == "!=" else near and "=" in sign or not near and (
            difference < 0 if "<" in sign else difference > 0)


def same_region(a: Node, b: Node, evaluator: Evaluator, draws: list[dict]) -> bool:
    """draws: values for all letters. Raises Undefined if one is no set of reals with any of them."""
    both = [_bound(node) for node in (a, b)]
    candidates = both[0] & both[1] if all(both) else (both[0] | both[1]) - (set(names(b if both[0] else a)))
    if any(both) and not candidates:
        return False
    compared = 0
    for env in draws:
        left, right = (Region(node, min(candidates, default=None), evaluator, env) for node in (a, b))
        try:
            ends = sorted({*left.ends(a), *right.ends(b)})
        except Undefined:
            continue
        compared += 1
        probes = {*ends, *_PROBES, *((x + y) / 2 for x, y in zip(ends, ends[1:]))}
        probes |= {ends[0] - 1, ends[-1] + 1} if ends else set()
        if any(left.contains(a, x) != right.contains(b, x) for x in probes):
            return False
    return compared > 0
