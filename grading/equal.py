"""Two trees -> equal? The rules are told in words at the top of reward.py."""

import random
from collections import Counter
from fractions import Fraction

from grading.region import is_region, same_region
from grading.statement import settle
from grading.tree import MAX_LIST, Node, Undefined, constant, has, names, num
from grading.units import ratio
from grading.value import Evaluator, is_close, lift, mp, size

_INTEGERS = set("jklmnN")


class Judge:
    """Compares two settled trees. One judge per answer: its evaluator's step budget bounds the whole comparison."""

    def __init__(self):
        self.evaluator = Evaluator()

    def same(self, a: Node, b: Node) -> bool:
        """Raises Undefined, Unreadable and NeedsSympy."""
        if a == b:
            return True
        compare = {
            "approx": lambda a, b: self.same(a[1], b),
            "chain": lambda a, b: self.same(
                settle(a[1][-1]), b
            ),  # sqrt(4) = 2: the last value counts
            "assign": self.assigned,
            "residues": self.congruence,
            "record": self.record,
            "eq": lambda a, b: b[0] in ("eq", "assign") and self.proportional(*a[1:], *b[1:]),
            "region": self.region,
            "unit": self.unit,
            "set": self.listed,
            "list": self.listed,
            "mat": self.matrix,
            "tuple": self.tuple,
            "dots": lambda a, b: False,
            "percent": self.percent,
        }
        kinds = [
            "region" if is_region(node) else "mat" if _as_matrix(node) else node[0]
            for node in (a, b)
        ]
        for (
            kind,
            method,
        ) in compare.items():  # in this order: the first kind that either has decides
            if kind in kinds:
                return method(a, b) if kinds[0] == kind else method(b, a)
        return self.same_expression(a, b)

    def both(self, a: Node, b: Node) -> bool:
        return self.same(settle(a), settle(b))

    # -- names and statements
    def congruence(self, a, b):
        _, modulus, residues, left = a
        if b[0] != "residues":  # 5 mod 7
            return left is None and len(residues) == 1 and self.same(residues[0], b)
        reduced = [{constant(residue) % modulus for residue in node[2]} for node in (a, b)]
        return (
            modulus == b[1]
            and reduced[0] == reduced[1]
            and (None in (left, b[3]) or self.same(left, b[3]))
        )

    def assigned(self, a, b):
        if b[0] == "assign":
            left, right = a[1][1], b[1][1]
            if left == right or "y" in (left, right) and "(" in (*left, *right):
                return self.both(a[2], b[2])
        if b[0] in ("assign", "eq"):
            return self.proportional(*a[1:], *b[1:])
        return b[0] not in ("record", "less") and self.same(settle(a[2]), b)

    def record(self, a, b):
        if b[0] == "record":
            left, right = dict(a[1]), dict(b[1])
            return left.keys() == right.keys() and all(
                self.both(left[name], right[name]) for name in left
            )
        values = tuple(settle(value) for _, value in sorted(a[1], key=str))
        if b[0] == "list" and len({str(name[1]).partition("_")[0] for name, _ in a[1]}) == 1:
            return self.listed(("list", ",", values), b)  # x_1 = 2, x_2 = 3: roots, in any order
        return (b[0] == "list" or b[:2] == ("tuple", "(")) and self.each(values, b[2])

    def each(self, left, right) -> bool:
        return len(left) == len(right) and all(map(self.both, left, right))

    def proportional(self, left, right, left2, right2) -> bool:
        """left - right = c (left2 - right2) with a constant c not 0, at random points."""
        first, second, ratio = ("add", left, ("neg", right)), ("add", left2, ("neg", right2)), None
        for f, g, _ in self.samples(first, second):
            f, g = lift(f), lift(g)
            if size(f) < 1e-35 or size(g) < 1e-35:
                return False
            ratio = f / g if ratio is None else ratio
            if not is_close(ratio, f / g):
                return False
        return self.sampled > 2

    # -- collections
    def listed(self, a, b):
        if b[0] not in ("list", "set"):
            return a[0] == "set" and len(a[1]) == 1 and self.same(a[1][0], b)
        left, right = (node[1] if node[0] == "set" else node[2] for node in (a, b))
        once = a[0] == b[0] == "list"
        if max(len(left), len(right)) > MAX_LIST:
            return Counter(left) == Counter(right)
        remaining = list(right)
        for item in left:
            partner = next((other for other in remaining if self.both(item, other)), None)
            if partner is None:
                return False
            if once:
                remaining.remove(partner)
        return (
            not remaining
            if once
            else all(any(self.both(item, other) for item in left) for other in right)
        )

    def tuple(self, a, b):
        if b[0] != "tuple":
            return a[1] == ":" and len(a[2]) == 2 and self.same(("div", *a[2]), b)
        if a[3] == b[3] == ":" and (a[1], b[1]) != ("clock", "clock") and num(0) not in a[2] + b[2]:
            return self.each(
                [("mul", x, b[2][0]) for x in a[2]], [("mul", y, a[2][0]) for y in b[2]]
            )  # 2:3 = 4:6
        return (a[1], a[3]) == (b[1], b[3]) and self.each(a[2], b[2])

    def matrix(self, a, b):
        left, right = _as_matrix(a), _as_matrix(b)
        if b[:2] == ("tuple", "(") and len(left[0]) == 1:
            right = [(item,) for item in b[2]]
        return bool(right) and len(left) == len(right) and all(map(self.each, left, right))

    def region(self, a, b):
        letters = names(a, b)
        draws = [
            {name: _sample(name, attempt, k) for k, name in enumerate(letters)}
            for attempt in range(6)
        ]
        return same_region(a, b, self.evaluator, draws if letters else [{}])

    # -- values
    def unit(self, a, b):
        if b[0] != "unit":
            spelt = ("mul", a[1], ("sym", a[2].partition("^")[0]))  # 5 m, where m could be a letter
            return (
                self.same(settle(a[1]), b)
                or " " not in a[2]
                and bool(names(b))
                and self.same_expression(spelt, b)
            )
        factor = ratio(a[2], b[2])
        return factor is not None and self.same(
            a[1] if factor == 1 else ("mul", num(factor), a[1]), b[1]
        )

    def percent(self, a, b):
        if b[0] == "percent":
            return self.same(a[1], b[1])
        return self.same_expression(a[1], b) or self.same_expression(("div", a[1], num(100)), b)

    def same_expression(self, a, b):
        degree, log = has(a, "deg") != has(b, "deg"), has(a, "log") or has(b, "log")
        readings = [(False, False)] + [(True, False)] * degree + [(False, True)] * log
        return any(self.same_value(a, b, *reading) for reading in readings)

    def same_value(self, a, b, degree=False, decimal_log=False):
        self.evaluator.degree, self.evaluator.decimal_log = degree, decimal_log
        if not names(a, b):
            return self.same_number(a, b)
        return all(is_close(*sample) for sample in self.samples(a, b)) and self.sampled > 2

    def same_number(self, a, b):
        try:
            x, big, scale = (
                self.evaluator.value(a, {}),
                self.evaluator.rounded,
                self.evaluator.scale,
            )
            y, big2 = self.evaluator.value(b, {}), self.evaluator.rounded
        except Undefined:
            return False
        if is_close(x, y, max(scale, self.evaluator.scale)):
            return not (big or big2)
        return _rounds_to(a, b, y) or _rounds_to(b, a, x)

    def samples(self, a, b):
        """(value of a, of b, scale of both) at random points where both have one; where nothing leaves the reals, if
        possible. self.sampled counts them."""
        letters, both = names(a, b), ("list", a, b)
        coarse = has(both, "floor", "ceil", "mod") or all(name[0] in _INTEGERS for name in letters)
        wanted, self.sampled = (20 if coarse else 12), 0
        for unreal_allowed in [True] if has(both, "i") else [False, True]:
            for attempt in range(4 * wanted):
                env = {
                    name: _sample(name, attempt, k)
                    for k, name in enumerate(letters)
                    if name[:5] != "text "
                }
                try:
                    x, unreal, scale = (
                        self.evaluator.value(a, env),
                        self.evaluator.unreal,
                        self.evaluator.scale,
                    )
                    y = self.evaluator.value(b, env)
                except Undefined:
                    if attempt > 11 and not self.sampled:
                        break
                    continue
                if (unreal or self.evaluator.unreal) and not unreal_allowed:
                    continue
                self.sampled += 1
                yield x, y, max(scale, self.evaluator.scale)
                if self.sampled == wanted:
                    return
            if self.sampled:
                return


def _sample(name: str, attempt: int, position: int) -> Fraction:
    """A value for a letter: near, farther and far out by turns, of both signs for x, y and z."""
    rng = random.Random(97 * attempt + position)
    if name[0] in _INTEGERS:
        return Fraction(
            attempt + 1
            if attempt < 3
            else rng.randint(*((1, 20), (20, 200), (200, 5000))[attempt % 3])
        )
    value = Fraction(rng.randint(300, 3000), 1009) * (1, 12, 12**3)[attempt % 3]
    return -value if attempt >> min(position, 2) & 1 and name[0] in "xyz" else value


def _rounds_to(decimal: Node, other: Node, value) -> bool:
    """A decimal of at least ten significant digits that rounds or cuts a value with no shorter decimal expansion."""
    shift, sign, other_digits = 0, 1, other[0] == "num" and (other[2] or other[1].denominator == 1)
    if decimal[0] == "neg":
        sign, decimal = -1, decimal[1]
    if (
        decimal[0] == "mul"
        and decimal[2][:2] == ("pow", num(10))
        and abs(constant(decimal[2][2]) or 999) < 400
    ):
        shift, decimal = int(constant(decimal[2][2])), decimal[1]
    if decimal[0] != "num" or not decimal[2] or other_digits:
        return False
    scaled, written = (
        sign * lift(value) * mp.mpf(10) ** (decimal[2] - shift),
        decimal[1] * 10 ** decimal[2],
    )
    if written < 10**9 or not mp.isfinite(scaled) or scaled.imag:
        return False
    return abs(scaled - lift(written)) <= 1 and abs(scaled - mp.nint(scaled)) > 1e-30


def _as_matrix(node: Node) -> tuple | None:
    """The rows of a matrix, also of a multiple of one."""
    if node[0] == "mat":
        return node[1]
    for k in range(1, len(node) if node[0] in ("neg", "mul") else 2 if node[0] == "div" else 0):
        rows, scalars = _as_matrix(node[k]), node[1:k] + node[k + 1 :]
        if rows and not has(("list", *scalars), "mat"):
            return tuple(tuple((node[0], cell, *scalars) for cell in row) for row in rows)
    return None
