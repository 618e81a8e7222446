"""Sets of reals: equal if they agree at every end point of either, between them and beyond them."""

from fractions import Fraction
from math import inf

from grading.tree import Node, Undefined, names, walk
from grading.value import Evaluator, mp, real

_GRID = 10**60  # numbers have 60 decimals here
_NEAR = Fraction(1, 10**50)  # such close ones are equal
_PROBES = [Fraction(x) for x in "-1e99 -1234.5 -17 -2.7 0 1.9 23 4321.5 1e99".split()]
_ENDS = {"(": "<", ")": "<", "[": "<=", "]": "<="}


def is_region(node: Node) -> bool:
    """Inequalities, unions and the like, which only sets of reals equal."""
    if node[0] == "list":
        return any(item[0] == "less" for item in node[2])
    return node[0] in ("less", "cup", "cap", "minus")


def _bound(node: Node) -> set[str]:
    """The names that the inequalities of a region may bound."""
    sides = []
    for part in walk(node):
        if part[0] == "less":
            for left, _, right in part[1]:
                sides += [left, right]
    letters = {side[1] for side in sides if side[0] == "sym"}
    return letters or set(names(*sides))


class Region:
    def __init__(self, name: str | None, evaluator: Evaluator, env: dict):
        """name: the variable; env: values for all letters."""
        self.name, self.evaluator, self.env = name, evaluator, env

    def number(self, node: Node, x: Fraction | None = None) -> Fraction | float:
        """A real value, where the variable is x; an infinity is a float. Raises Undefined."""
        env = self.env if x is None else self.env | {self.name: x}
        value = real(self.evaluator.value(node, env))
        if isinstance(value, Fraction):
            return value
        if not mp.isfinite(value):
            return float(value)
        if abs(value) > 10**300:
            raise Undefined("out of reach")
        return Fraction(int(mp.nint(value * _GRID)), _GRID)

    def ends(self, node: Node) -> list:
        """The end points, infinities too. Raises Undefined if this is no set of reals."""
        match node:
            case ("less", relations):
                ends = []
                for left, _, right in relations:
                    ends += self.crossings(left, right)
                return ends
            case ("set", items):
                return list(map(self.number, items))
            case ("tuple", "(" | "[" as opening, (low, high), closing):
                low = self.number(low)
                high = self.number(high)
                if low > high or low == high and opening + closing != "[]":
                    raise Undefined("an empty interval")
                return [low, high]
            case ("cup" | "cap" | "minus", *parts):
                return sum(map(self.ends, parts), [])
            case ("list", joiner, parts) if joiner == "or" or is_region(node):
                return sum(map(self.ends, parts), [])
        raise Undefined("no set of reals")

    def crossings(self, left: Node, right: Node) -> list:
        """Where two sides meet, if they are linear near 0 or far out, as distances are."""

        def difference(x: int):
            return self.number(left, Fraction(x)) - self.number(right, Fraction(x))

        ends = []
        for x in (-999, 0, 998):
            value = difference(x)
            slope = difference(x + 1) - value
            if 0 < abs(slope) < inf:
                ends.append(x - value / slope)
        return ends

    def contains(self, node: Node, x: Fraction) -> bool:
        match node:
            case ("less", relations):
                return all(self.holds(*relation, x) for relation in relations)
            case ("set", items):
                return any(not _holds(self.number(item), "!=", x) for item in items)
            case ("tuple", opening, (low, high), closing):
                above = _holds(self.number(low), _ENDS[opening], x)
                below = _holds(x, _ENDS[closing], self.number(high))
                return above and below
            case ("minus", whole, removed):
                return self.contains(whole, x) and not self.contains(removed, x)
            case ("list", joiner, parts) | (joiner, *parts):
                inside = [self.contains(part, x) for part in parts]
                are_conditions = joiner == "," and {part[0] for part in parts} == {"less"}
                return all(inside) if joiner == "cap" or are_conditions else any(inside)

    def holds(self, left: Node, sign: str, right: Node, x: Fraction) -> bool:
        try:
            return _holds(self.number(left, x), sign, self.number(right, x))
        except Undefined:
            return False


def _holds(left, sign: str, right) -> bool:
    near = left == right or abs(left - right) < _NEAR
    if sign == "!=":
        return not near
    return sign == "<=" if near else left < right


def same_region(a: Node, b: Node, evaluator: Evaluator, draws: list[dict]) -> bool:
    """draws: values for all letters. Where one is no set of reals, they are not equal."""
    bound, bound2 = _bound(a), _bound(b)
    if bound and bound2:
        candidates = bound & bound2
    else:
        candidates = (bound | bound2) - set(names(b if bound else a))
    if (bound or bound2) and not candidates:
        return False
    name, compared = min(candidates, default=None), False
    for env in draws:
        region = Region(name, evaluator, env)
        try:
            ends = {*region.ends(a), *region.ends(b)}
        except Undefined:
            continue
        compared = True
        ends = sorted(ends - {inf, -inf})
        between = [(x + y) / 2 for x, y in zip(ends, ends[1:])]
        for x in ends + between + _PROBES:
            if region.contains(a, x) != region.contains(b, x):
                return False
    return compared
