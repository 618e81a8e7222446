"""Sets of reals: equal if they agree at every end point of either, between them and beyond them."""

from fractions import Fraction

from grading.tree import Node, Undefined, names, walk
from grading.value import Evaluator, lift, mp, real

_GRID, _NEAR = (
    10**60,
    Fraction(1, 10**50),
)  # numbers have 60 decimals here; such close ones are equal
_PROBES = [
    Fraction(x) for x in ("-1e99", "-1234.5", "-17", "-2.7", "0", "1.9", "23", "4321.5", "1e99")
]


def is_region(node: Node) -> bool:
    """Inequalities, unions and the like, which only sets of reals equal."""
    return (
        node[0] in ("less", "cup", "cap", "minus")
        or node[0] == "list"
        and any(item[0] == "less" for item in node[2])
    )


def _bound(node: Node) -> set[str]:
    """The names that the inequalities of a region may bound."""
    sides = [
        side for part in walk(node) if part[0] == "less" for pair in part[1] for side in pair[::2]
    ]
    return {side[1] for side in sides if side[0] == "sym"} or set(names(*sides))


class Region:
    def __init__(self, name: str | None, evaluator: Evaluator, env: dict):
        """name: the variable; env: values for all letters."""
        self.name, self.evaluator, self.env, self.known = name, evaluator, env, {}

    def number(self, node: Node, x: Fraction | None = None) -> Fraction | float:
        """A real value, where the variable is x; an infinity is a float. Raises Undefined."""
        if node == ("sym", self.name) and x is not None:
            return x
        if node not in self.known or x is not None:
            value = real(
                self.evaluator.value(node, self.env if x is None else self.env | {self.name: x})
            )
            if mp.isfinite(value) and abs(value) > 10**300:
                raise Undefined("out of reach")
            rounded = mp.nint(lift(value) * _GRID)
            self.known[node] = Fraction(int(rounded), _GRID) if mp.isfinite(value) else float(value)
        return self.known[node]

    def ends(self, node: Node) -> list:
        """The end points, infinities too. Raises Undefined if this is no set of reals."""
        if node[0] == "less":
            return [x for left, _, right in node[1] for x in self.crossings(left, right)]
        if node[0] == "set":
            return [self.number(item) for item in node[1]]
        if node[0] == "tuple" and len(node[2]) == 2 and node[1] in "([":
            low, high = map(self.number, node[2])
            if low < high or low == high and node[1] + node[3] == "[]":
                return [low, high]
        elif is_region(node) or node[:2] == ("list", "or"):
            return [
                x for part in (node[2] if node[0] == "list" else node[1:]) for x in self.ends(part)
            ]
        raise Undefined("no set of reals")

    def crossings(self, left: Node, right: Node) -> list:
        """Where two sides meet, if they are linear near 0 or far out, as distances are; infinities too."""
        constants = [self.number(side) for side in (left, right) if self.name not in names(side)]
        if any(side == ("sym", self.name) for side in (left, right)) and constants:
            return constants
        value = lambda x: self.number(left, Fraction(x)) - self.number(right, Fraction(x))
        return [x - value(x) / slope for x in (-999, 0, 998) if (slope := value(x + 1) - value(x))]

    def contains(self, node: Node, x: Fraction) -> bool:
        kind = node[0]
        if kind == "tuple":
            low, high = map(self.number, node[2])
            return _holds(low, "<=" if node[1] == "[" else "<", x) and _holds(
                x, "<=" if node[3] == "]" else "<", high
            )
        if kind == "set":
            return any(not _holds(self.number(item), "!=", x) for item in node[1])
        if kind == "less":
            try:
                return all(
                    _holds(self.number(left, x), sign, self.number(right, x))
                    for left, sign, right in node[1]
                )
            except Undefined:
                return False
        inside = [self.contains(part, x) for part in (node[2] if kind == "list" else node[1:])]
        conditions = (
            kind == "list" and node[1] != "or" and all(item[0] == "less" for item in node[2])
        )
        if kind == "minus":
            return inside[0] and not inside[1]
        return all(inside) if conditions or kind == "cap" else any(inside)


def _holds(left, sign: str, right) -> bool:
    near = left == right or abs(left - right) < _NEAR
    return not near if sign == "!=" else sign == "<=" if near else left < right


def same_region(a: Node, b: Node, evaluator: Evaluator, draws: list[dict]) -> bool:
    """draws: values for all letters. Where one is no set of reals, they are not equal."""
    bound, bound2 = _bound(a), _bound(b)
    candidates = (
        bound & bound2 if bound and bound2 else (bound | bound2) - set(names(b if bound else a))
    )
    if (bound or bound2) and not candidates:
        return False
    compared = 0
    for env in draws:
        left, right = (Region(min(candidates, default=None), evaluator, env) for _ in (a, b))
        try:
            ends = sorted({x for x in left.ends(a) + right.ends(b) if abs(x) != mp.inf})
        except Undefined:
            continue
        compared += 1
        probes = ends + [(x + y) / 2 for x, y in zip(ends, ends[1:])] + _PROBES
        if any(left.contains(a, x) != right.contains(b, x) for x in probes):
            return False
    return compared > 0
