"""The value of a tree: a Fraction where it is exact, else a number of 160 digits.

mpmath computes in a context of our own, whose precision is never changed: its sec, cot and csc would change it for
the time of the call, which other threads would see. Its exponents have no bound, so each size is bounded here.
"""

from __future__ import annotations

from fractions import Fraction
from math import comb, factorial, gcd, isqrt, lcm, log2

from mpmath import MPContext

from grading.tree import MAX_BITS, MAX_STEPS, NeedsSympy, Node, Undefined, num

mp = MPContext()
mp.dps = 160
TOLERANCE = mp.mpf("1e-120")                              # relative: numbers closer than that are equal
CANCELLED = mp.mpf("1e-20")                               # a sum that much smaller than its terms is partly noise
MAX_EXPONENT, MAX_COMPLEX_EXPONENT, MAX_ANGLE = 4 * 10 ** 12, 100_000, 10 ** 12
Number = Fraction | mp.mpf | mp.mpc

_FUNCTIONS = {
    "exp": mp.exp, "sin": mp.sin, "cos": mp.cos, "sinh": mp.sinh, "cosh": mp.cosh, "tanh": mp.tanh,
    "arcsin": mp.asin, "arccos": mp.acos, "arctan": mp.atan, "arccot": lambda x: mp.pi / 2 - mp.atan(x)}
_QUOTIENTS = {"tan": (mp.sin, mp.cos), "cot": (mp.cos, mp.sin), "sec": (lambda x: mp.one, mp.cos),
              "csc": (lambda x: mp.one, mp.sin)}


def lift(value: Number):
    """A number of mpmath."""
    return mp.convert(value) if isinstance(value, Fraction) else value


def size(value):
    """The absolute value. (mpmath's own adds exactly, which huge exponents do not allow.)"""
    return mp.sqrt(value.real ** 2 + value.imag ** 2) if value.imag else abs(value.real)


def is_close(x: Number, y: Number, scale=mp.zero) -> bool:
    """Equal to all digits; scale: what cancellation started from, see Evaluator."""
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    x, y = lift(x), lift(y)
    if not (mp.isfinite(x) and mp.isfinite(y)):
        return x == y
    difference, noise = size(x - y), scale * TOLERANCE
    return difference <= TOLERANCE * max(size(x), size(y)) or difference <= noise < 1e-50


def is_unreal(value) -> bool:
    return isinstance(value, mp.mpc) and abs(value.imag) > 1e-50 * (1 + abs(value.real))


def _bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()


def _exact_root(value: int, n: int) -> int | None:
    """The exact n-th root of an integer >= 0, None if there is none."""
    if n == 2:
        root = isqrt(value)
    elif value.bit_length() > 1500 or n > 64:
        return None
    else:
        root = int(mp.nint(mp.root(value, n)))
    return root if root ** n == value else None


def _bounded(value: Number) -> Number:
    """The value, if its exponents are in reach. Raises Undefined."""
    if isinstance(value, mp.mpc):
        exponents, most = (value.real._mpf_[2], value.imag._mpf_[2]), MAX_COMPLEX_EXPONENT
    else:
        exponents, most = (() if isinstance(value, Fraction) else (value._mpf_[2],)), MAX_EXPONENT
    if any(abs(exponent) > most for exponent in exponents):
        raise Undefined("exponent out of reach")
    return value


class Evaluator:
    """Evaluates trees. All its evaluations share one budget of steps.

    After `value`, unreal tells that a root or logarithm left the reals, rounded that an integer was too large to hold,
    and scale is the largest number whose digits cancelled to almost nothing: the result is exact to scale * 1e-160."""

    def __init__(self):
        self.degree, self.decimal_log, self.steps = False, False, MAX_STEPS

    def value(self, node: Node, env: dict) -> Number:
        """env maps names to values. Raises Undefined (no value, or out of reach) and NeedsSympy."""
        self.env, self.unreal, self.rounded, self.scale = env, False, False, mp.zero
        try:
            return self.eval(node)
        except (ArithmeticError, ValueError, RecursionError) as error:
            raise Undefined(type(error).__name__) from None

    def eval(self, node: Node) -> Number:
        kind, *args = node
        self.steps -= 1
        if self.steps < 0:
            raise Undefined("too many steps")
        if kind in _FUNCTIONS or kind in _QUOTIENTS:
            return _bounded(self.function(kind, *args))
        method = getattr(self, "_" + kind, None)
        if method is None:
            raise Undefined(f"{kind} has no value")
        return _bounded(method(*args))

    def real(self, node: Node) -> Number:
        value = self.eval(node)
        if is_unreal(value):
            raise Undefined("not real")
        return value if isinstance(value, Fraction) else value.real

    def integer(self, node: Node, most: int = 10 ** 6) -> int:
        value = self.eval(node)
        if not isinstance(value, Fraction) or value.denominator != 1 or abs(value) > most:
            raise Undefined("not a small integer")
        return int(value)

    def sized(self, value: Fraction) -> Number:
        """Exact numbers beyond the cap are rounded."""
        if _bits(value) <= MAX_BITS:
            self.steps -= _bits(value) // 40
            return value
        self.rounded = True
        return lift(value)

    # -- letters and constants
    def _num(self, value, digits):
        return value

    def _sym(self, name):
        if name not in self.env:
            raise Undefined("unbound")
        return self.env[name]

    def _const(self, name):
        return {"pi": +mp.pi, "e": +mp.e, "i": mp.j, "oo": mp.inf}[name]

    # -- arithmetic
    def _neg(self, a):
        return -self.eval(a)

    def _add(self, a, b):
        terms = [b]                                       # a long sum leans left: walk down instead of recursing
        while a[0] == "add":
            a, b = a[1:]
            terms.append(b)
        total = self.eval(a)
        for term in reversed(terms):
            total = self.plus(total, self.eval(term))
        return total

    def plus(self, a: Number, b: Number) -> Number:
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            return self.sized(a + b)
        a, b = lift(a), lift(b)
        return self.noisy(a + b, max(size(a), size(b)))

    def noisy(self, value, before):
        """Remembers what cancelled if the value is much smaller than what it was made from."""
        if mp.isfinite(before) and size(value) < before * CANCELLED:
            self.scale = max(self.scale, before)
        return value

    def _mul(self, a, b):
        return self.times(self.eval(a), self.eval(b))

    def times(self, a: Number, b: Number) -> Number:
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            return self.sized(a * b)
        return lift(a) * lift(b)

    def _div(self, a, b):
        return self.over(self.eval(a), self.eval(b))

    def over(self, a: Number, b: Number) -> Number:
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            return self.sized(a / b)
        b = lift(b)
        if size(b) <= self.scale * TOLERANCE:
            raise Undefined("division by what rounds to zero")
        return lift(a) / b

    def _pow(self, a, b):
        if a == ("const", "e"):
            return self.function("exp", b)
        return self.power(self.eval(a), self.eval(b))

    def power(self, a: Number, b: Number) -> Number:
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            if b.denominator == 1:
                return self.integer_power(a, int(b))
            roots = [_exact_root(part, b.denominator) for part in (a.numerator, a.denominator) if a >= 0]
            if roots and None not in roots:
                return self.integer_power(Fraction(*roots), b.numerator)
        return self.rounded_power(lift(a), lift(b))

    def integer_power(self, a: Fraction, n: int) -> Number:
        if not a and n <= 0:
            raise Undefined("0^0")
        if abs(a) in (0, 1):
            return a ** (n % 2 if a < 0 else 1)
        if _bits(a) * abs(n) <= MAX_BITS:
            return self.sized(a ** n)
        self.rounded = True
        return self.rounded_power(lift(a), lift(Fraction(n)))

    def rounded_power(self, a, b) -> Number:
        self.steps -= 20
        if not a:
            raise Undefined("power of zero")
        if not a.imag and a.real < 0 and not mp.isint(b):
            self.unreal = True
        most = MAX_EXPONENT if not a.imag and not b.imag else MAX_COMPLEX_EXPONENT
        if mp.isfinite(a) and mp.isfinite(b) and size(b) * (abs(mp.mag(a)) + 1) > most:
            raise Undefined("power out of reach")
        return a ** b

    def log(self, value: Number):
        value = lift(value)
        self.steps -= 20
        self.unreal = self.unreal or not value.imag and value.real < 0
        return self.noisy(mp.ln(value), mp.one)

    def _root(self, a, n):
        a, n = self.eval(a), self.eval(n)
        if not isinstance(n, Fraction) or not n:
            return self.power(a, self.over(Fraction(1), n))
        if not lift(a).imag and lift(a).real < 0 and n % 2 == 1:
            return -self.power(-a, 1 / n)                 # the cube root of -8 is -2
        return self.power(a, 1 / n)

    def _deg(self, a):
        return self.times(self.eval(a), mp.pi / 180) if self.degree else self.eval(a)

    def _percent(self, a):
        return self.times(self.eval(a), Fraction(1, 100))

    # -- functions
    def function(self, name, *args):
        if len(args) != 1:
            raise Undefined("number of arguments")
        degrees, self.degree = self.degree, True          # sin 30^\circ is a half in any reading
        x = lift(self.eval(args[0]))
        self.degree = degrees
        self.steps -= 20
        if size(x) > MAX_ANGLE or name in ("arcsin", "arccos") and size(x) > 1:
            raise Undefined("out of reach")
        if name in _FUNCTIONS:
            value = _FUNCTIONS[name](x)
            return self.noisy(value, size(x)) if name in ("sin", "cos") else value
        over, under = _QUOTIENTS[name]
        return self.over(over(x), self.noisy(under(x), size(x)))

    def _ln(self, a):
        value = self.eval(a)
        return Fraction(0) if value == 1 else self.log(value)

    def _lg(self, a):
        value = self.eval(a)
        if isinstance(value, Fraction) and value > 0:     # log10 of a power of ten is exact
            digits = len(str(max(value.numerator, value.denominator))) - 1 if _bits(value) < 5000 else 0
            for exact in (digits, -digits):
                if Fraction(10) ** exact == value:
                    return Fraction(exact)
        return self.over(self.log(value), self.log(Fraction(10)))

    def _log(self, a):
        return self._lg(a) if self.decimal_log else self._ln(a)

    def _abs(self, a):
        value = self.eval(a)
        return abs(value) if isinstance(value, Fraction) else size(value)

    def _floor(self, a):
        value = self.real(a)
        if isinstance(value, Fraction):
            return Fraction(value.__floor__())
        if not abs(value) < 10 ** 40:
            raise Undefined("floor")
        nearest = mp.nint(value)
        return Fraction(int(nearest if abs(value - nearest) < 1e-30 else mp.floor(value)))  # floor(log2 8) is 3

    def _ceil(self, a):
        return -self._floor(("neg", a))

    def _fact(self, a):
        n = self.integer(a)
        if n < 0 or n * max(1.0, log2(n + 1) - 1.45) > MAX_BITS:
            raise Undefined("factorial")
        return self.sized(Fraction(factorial(n)))

    def _fact2(self, a):
        product = 1
        for k in range(self.integer(a, 5000), 1, -2):
            product *= k
        return self.sized(Fraction(product))

    def _binom(self, n, k):
        n, k = self.integer(n), self.integer(k)
        if k < 0 or n < 0 or min(k, n - k) * max(1.0, log2(n + 1)) > MAX_BITS:
            raise Undefined("binomial")
        return self.sized(Fraction(comb(n, k)))

    def _mod(self, a, b):
        a, b = self.eval(a), self.eval(b)
        if not isinstance(a, Fraction) or not isinstance(b, Fraction):
            raise Undefined("mod")
        return a % b

    def _gcd(self, *args):
        return Fraction(gcd(*(self.integer(arg, 10 ** 30) for arg in args)))

    def _lcm(self, *args):
        return self.sized(Fraction(lcm(*(self.integer(arg, 10 ** 30) for arg in args))))

    def _min(self, *args):
        return min((self.real(arg) for arg in args), key=lift)

    def _max(self, *args):
        return max((self.real(arg) for arg in args), key=lift)

    # -- sums and products, limits and integrals
    def _big(self, kind, name, low, high, body):
        if high == ("const", "oo"):
            if kind == "sum":
                return self.series(name, low, body)
            return self.symbolic(("big", kind, name, low, high, body))
        low, high = self.integer(low, 10 ** 12), self.integer(high, 10 ** 12)
        if (high - low) * 3 > self.steps:
            return self.symbolic(("big", kind, name, num(low), num(high), body))
        total, outer = Fraction(kind == "prod"), self.env
        for k in range(low, high + 1):
            self.env = outer | {name: Fraction(k)}
            total = (self.times if kind == "prod" else self.plus)(total, self.eval(body))
        self.env = outer
        return total

    def series(self, name, low, body):
        """An infinite sum term by term, if its terms fall fast enough to bound the rest by a geometric series."""
        start, total, sizes, outer = self.integer(low), mp.zero, [], self.env
        for k in range(start, start + 600):
            self.env = outer | {name: Fraction(k)}
            term = lift(self.eval(body))
            total = self.plus(total, term)
            sizes.append(size(term))
            ratios = [b / a if a else 1 for a, b in zip(sizes[-6:], sizes[-5:])]
            if len(sizes) > 8 and max(ratios) < 0.7 and sizes[-1] < 1e-150:
                self.env = outer
                return total
        self.env = outer
        return self.symbolic(("big", "sum", name, low, ("const", "oo"), body))

    def _int(self, *node):
        return self.symbolic(("int", *node))

    def _lim(self, *node):
        return self.symbolic(("lim", *node))

    def symbolic(self, node: Node) -> Number:
        """The value of what needs sympy; the process that has it puts its own function here."""
        raise NeedsSympy
