"""Two trees -> equal? The rules are told in words at the top of reward.py."""

import random
from fractions import Fraction
from math import ceil

from grading.region import is_region, same_region
from grading.statement import settle
from grading.tree import Node, Undefined, constant, has, names, num
from grading.units import ratio
from grading.value import Evaluator, is_close, lift, mp, real, size

_INTEGERS = set("jklmnN")
_SAMPLES = 12  # points at which expressions are compared
# The first of these kinds that either tree has says how they are compared.
_KINDS = "chain assign residues record eq region unit set list mat tuple".split()


class Judge:
    """Compares two settled trees. One judge per answer: its evaluator's step budget bounds the
    whole comparison."""

    def __init__(self):
        self.evaluator = Evaluator()

    def same(self, a: Node, b: Node) -> bool:
        """Raises Undefined, Unreadable and NeedsSympy."""
        if a == b:
            return True
        kinds = [_kind(a), _kind(b)]
        for kind in _KINDS:
            if kind in kinds:
                compare = getattr(self, "same_" + kind)
                return compare(a, b) if kinds[0] == kind else compare(b, a)
        return self.same_expression(a, b)

    def both(self, a: Node, b: Node) -> bool:
        return self.same(settle(a), settle(b))

    def each(self, left, right) -> bool:
        return len(left) == len(right) and all(map(self.both, left, right))

    # -- names and statements
    def same_chain(self, a, b):
        """sqrt(4) = 2: the last value counts, if those before agree with it."""
        *steps, result = map(settle, a[1])
        return all(self.agree(step, result) for step in steps) and self.same(result, b)

    def agree(self, a, b) -> bool:
        """Whether two values are equal, or one is a decimal that comes within one unit of its last
        place; yes, if they are not computed at once."""
        if not (_is_constant(a) and _is_constant(b)) or self.same(a, b):
            return True
        for value, decimal in ((a, b), (b, a)):
            if decimal[0] == "num" and decimal[2]:
                error = lift(real(self.evaluator.value(value, {}))) - lift(decimal[1])
                if abs(error) <= mp.mpf(10) ** -decimal[2]:
                    return True
        return False

    def same_residues(self, a, b):
        _, _, residues, left = a
        if b[0] != "residues":  # 5 mod 7
            if left or len(residues) > 1:
                return False
            return self.same(num(residues[0]), b)
        if left and b[3] and not self.same(left, b[3]):
            return False
        return a[1:3] == b[1:3]

    def same_assign(self, a, b):
        if b[0] == "assign":
            left, right = a[1][1], b[1][1]
            are_functions = "y" in (left, right) and "(" in (*left, *right)
            if left == right or are_functions:
                return self.both(a[2], b[2])
        if b[0] in ("assign", "eq"):
            return self.proportional(*a[1:], *b[1:])
        return self.same(settle(a[2]), b)

    def same_record(self, a, b):
        keys, values = zip(*sorted(a[1], key=str))
        if b[0] == "record":
            keys2, values2 = zip(*sorted(b[1], key=str))
            return keys == keys2 and self.each(values, values2)
        letters = {str(name[1]).partition("_")[0] for name in keys}
        if b[0] == "list" and len(letters) == 1:
            return self.same_list(("list", ",", values), b)  # x_1 = 2, x_2 = 3: in any order
        is_point = b[0] == "list" or b[:2] == ("tuple", "(")
        return is_point and self.each(values, b[2])

    def same_eq(self, a, b):
        if b[0] != "eq":
            return False
        return self.proportional(*a[1:], *b[1:])

    def proportional(self, left, right, left2, right2) -> bool:
        """left - right = c (left2 - right2) with a constant c not 0, at random points."""
        quotients = []
        first = ("add", left, ("neg", right))
        second = ("add", left2, ("neg", right2))
        for f, g in self.samples(first, second):
            f, g = lift(f), lift(g)
            if size(f) < 1e-35 or size(g) < 1e-35:
                return False
            quotients.append(f / g)
            if not is_close(quotients[0], quotients[-1]):
                return False
        return len(quotients) > 2

    # -- collections
    def same_set(self, a, b):
        if b[0] not in ("list", "set"):
            return len(a[1]) == 1 and self.same(a[1][0], b)
        return self.covers(a[1], b[-1]) and self.covers(b[-1], a[1])

    def covers(self, left, right) -> bool:
        for item in left:
            if not any(self.both(item, other) for other in right):
                return False
        return True

    def same_list(self, a, b):
        if b[0] != "list" or len(a[2]) != len(b[2]):
            return False
        remaining = list(b[2])
        for item in a[2]:
            for other in remaining:
                if self.both(item, other):
                    remaining.remove(other)
                    break
            else:
                return False
        return True

    def same_tuple(self, a, b):
        if b[0] != "tuple":
            is_ratio = a[1] == ":" and len(a[2]) == 2
            return is_ratio and self.same(("div", *a[2]), b)
        (_, opening, left, closing), (_, opening2, right, closing2) = a, b
        are_times = opening == opening2 == "clock"
        if closing == closing2 == ":" and not are_times and num(0) not in left:
            scaled = [("mul", item, right[0]) for item in left]  # 2:3 = 4:6
            scaled2 = [("mul", item, left[0]) for item in right]
            return self.each(scaled, scaled2)
        same_brackets = opening == opening2 and closing == closing2
        return same_brackets and self.each(left, right)

    def same_mat(self, a, b):
        left, right = _as_matrix(a), _as_matrix(b)
        if b[:2] == ("tuple", "(") and len(left[0]) == 1:
            right = [(item,) for item in b[2]]
        if not right or len(left) != len(right):
            return False
        return all(map(self.each, left, right))

    def same_region(self, a, b):
        letters = names(a, b)
        draws = [_draw(letters, attempt) for attempt in range(6 if letters else 1)]
        return same_region(a, b, self.evaluator, draws)

    # -- values
    def same_unit(self, a, b):
        if b[0] == "unit":
            factor = ratio(a[2], b[2])
            value = a[1] if factor == 1 else ("mul", num(factor or 0), a[1])
            return factor is not None and self.same(value, b[1])
        if self.same(settle(a[1]), b):
            return True
        spelt = a[1]
        for letter in a[2].partition("^")[0]:  # 5 m or 5 kT, where k and T could be letters
            spelt = ("mul", spelt, ("sym", letter))
        return self.same_expression(spelt, b)

    def same_expression(self, a, b):
        evaluator, both = self.evaluator, ("list", a, b)
        readings = [(False, False)]
        if has(both, "deg", "percent"):
            readings.append((True, False))
        if has(both, "log"):
            readings.append((False, True))
        for evaluator.scaled, evaluator.decimal_log in readings:
            if self.same_values(a, b):
                return True
        return False

    def same_values(self, a, b):
        letters = names(a, b)
        for x, y in self.samples(a, b):
            if not is_close(x, y):
                return not letters and (_rounds_to(a, b, y) or _rounds_to(b, a, x))
        return self.sampled > (2 if letters else 0)

    def samples(self, a, b):
        """(value of a, of b) at random points where both have one; where nothing leaves the reals,
        if there are such points. self.sampled counts them."""
        letters, evaluator = names(a, b), self.evaluator
        self.sampled, unreal = 0, []
        for attempt in range(4 * _SAMPLES if letters else 1):
            env = _draw(letters, attempt)
            evaluator.unreal = False
            try:
                pair = evaluator.value(a, env), evaluator.value(b, env)
            except Undefined:
                if attempt > _SAMPLES and not self.sampled and not unreal:
                    break
                continue
            if evaluator.unreal:
                unreal.append(pair)
            else:
                self.sampled += 1
                yield pair
                if self.sampled == _SAMPLES:
                    return
        if not self.sampled:
            self.sampled = len(unreal)
            yield from unreal[:_SAMPLES]


def _kind(node: Node) -> str:
    if is_region(node):
        return "region"
    return "mat" if _as_matrix(node) else node[0]


def _is_constant(node: Node) -> bool:
    """A value without letters that is computed at once."""
    return not names(node) and not has(node, "unit", "dots", "big", "list", "rel")


def _draw(letters: list[str], attempt: int) -> dict[str, Fraction]:
    """A value for each letter: near, farther and far out by turns, of both signs for x, y and z."""
    env = {}
    for k, name in enumerate(letters):
        rng = random.Random(97 * attempt + k)
        value = Fraction(rng.randint(300, 3000), 1009) * 12 ** (0, 1, 3)[attempt % 3]
        if name[0] in _INTEGERS:
            value = Fraction(ceil(value))
        elif attempt >> min(k, 2) & 1 and name[0] in "xyz":
            value = -value
        if not name.startswith("text "):
            env[name] = value
    return env


def _rounds_to(decimal: Node, other: Node, value) -> bool:
    """A decimal of at least ten significant digits that rounds or cuts a value with no shorter
    decimal expansion."""
    power = Fraction(0)
    match decimal:
        case ("mul", mantissa, ("pow", ("num", 10, _), exponent)):
            decimal, power = mantissa, constant(exponent)
    written, number = constant(decimal), decimal[1] if decimal[0] == "neg" else decimal
    if written is None or not number[2] or power is None or abs(power) > 400:
        return False
    if other[0] == "num" and other[2]:  # two decimals
        return False
    written = lift(written) * 10 ** number[2]
    scaled = lift(value) * mp.mpf(10) ** (number[2] - int(power))
    if abs(written) < 10**9 or not mp.isfinite(scaled):
        return False
    if scaled.imag or scaled * written < 0:
        return False
    low = -1 if abs(written) > 10**15 else -0.5  # a double's last digit may be off by one
    return low < abs(scaled) - abs(written) < 1


def _as_matrix(node: Node) -> tuple | None:
    """The rows of a matrix, also of a multiple of one."""
    kind, *parts = node
    if kind == "mat":
        return parts[0]
    if kind not in ("neg", "mul", "div"):
        return None
    for k, part in enumerate(parts):
        others = parts[:k] + parts[k + 1 :]
        multiples = []
        for row in _as_matrix(part) or ():
            multiples.append(tuple((kind, cell, *others) for cell in row))
        if multiples:
            return tuple(multiples)
    return None
