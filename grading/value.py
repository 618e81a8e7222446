"""The value of a tree: a Fraction where it is exact, else a number of 160 digits.

mpmath computes in a context of our own, whose precision is never changed: its sec, cot and csc would change it for
the time of the call, which other threads would see. Its exponents have no bound, so each size is bounded here.
"""

from __future__ import annotations

from fractions import Fraction
from math import comb, factorial, gcd, isqrt, lcm, log2, prod

from mpmath import MPContext

from grading.tree import MAX_BITS, MAX_STEPS, NeedsSympy, Node, Undefined, num

mp = MPContext()
mp.dps = 160
TOLERANCE = mp.mpf("1e-120")                              # relative: numbers closer than that are equal
CANCELLED = mp.mpf("1e-20")                               # a sum that much smaller than its terms is partly noise
MAX_EXPONENT, MAX_COMPLEX_EXPONENT, MAX_ANGLE = 4 * 10 ** 12, 100_000, 10 ** 12
Number = Fraction | mp.mpf | mp.mpc

_CONSTANTS = {"pi": +mp.pi, "e": +mp.e, "i": mp.j, "oo": mp.inf}
_FUNCTIONS = {
    "exp": mp.exp, "sin": mp.sin, "cos": mp.cos, "sinh": mp.sinh, "cosh": mp.cosh, "tanh": mp.tanh, "arcsin": mp.asin,
    "arccos": mp.acos, "arctan": mp.atan, "arcsinh": mp.asinh, "arccosh": mp.acosh, "arctanh": mp.atanh,
    "arccot": lambda x: mp.pi / 2 - mp.atan(x), "cis": lambda x: mp.mpc(mp.cos(x), mp.sin(x))}
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
    if n != 2 and (value.bit_length() > 1500 or n > 64):
        return None
    root = isqrt(value) if n == 2 else int(mp.nint(mp.root(value, n)))
    return root if root ** n == value else None


def _bounded(value: Number) -> Number:
    """The value, if its exponents are in reach. Raises Undefined."""
    if isinstance(value, Fraction):
        return value
    parts, most = ((value.real, value.imag), MAX_COMPLEX_EXPONENT) if isinstance(value, mp.mpc) else (
        (value,), MAX_EXPONENT)
    if any(abs(part._mpf_[2]) > most for part in parts):
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
        except (ArithmeticError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise Undefined(type(error).__name__) from None

    def eval(self, node: Node) -> Number:
        kind, *args = node
        self.steps -= 1
        if self.steps < 0:
            raise Undefined("too many steps")
        if kind in _FUNCTIONS or kind in _QUOTIENTS:
            return _bounded(self.function(kind, *args))
        return _bounded(_OPERATIONS[kind](self, *args))

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

    # -- arithmetic
    def add(self, a, b):
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

    def times(self, a: Number, b: Number) -> Number:
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            return self.sized(a * b)
        return lift(a) * lift(b)

    def over(self, a: Number, b: Number) -> Number:
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            return self.sized(a / b)
        b = lift(b)
        if size(b) <= self.scale * TOLERANCE:
            raise Undefined("division by what rounds to zero")
        return lift(a) / b

    def pow(self, a, b):
        return self.function("exp", b) if a == ("const", "e") else self.power(self.eval(a), self.eval(b))

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
        self.unreal = self.unreal or not a.imag and a.real < 0 and not mp.isint(b)
        most = MAX_EXPONENT if not a.imag and not b.imag else MAX_COMPLEX_EXPONENT
        if mp.isfinite(a) and mp.isfinite(b) and size(b) * (abs(mp.mag(a)) + 1) > most:
            raise Undefined("power out of reach")
        return a ** b

    def root(self, a, n):
        a, n = self.eval(a), self.eval(n)
        if isinstance(n, Fraction) and n % 2 == 1 and not lift(a).imag and lift(a).real < 0:
            return -self.power(-a, 1 / n)                 # the cube root of -8 is -2
        return self.power(a, self.over(Fraction(1), n))

    # -- functions
    def function(self, name, node):
        degrees, self.degree = self.degree, True          # sin 30^\circ is a half in any reading
        x = lift(self.eval(node))
        self.degree = degrees
        self.steps -= 20
        if size(x) > MAX_ANGLE or name in ("arcsin", "arccos") and size(x) > 1:
            raise Undefined("out of reach")
        if name in _FUNCTIONS:
            value = _FUNCTIONS[name](x)
            return self.noisy(value, size(x)) if name in ("sin", "cos") else value
        over, under = _QUOTIENTS[name]
        return self.over(over(x), self.noisy(under(x), size(x)))

    def ln(self, a):
        value = lift(self.eval(a))
        self.steps -= 20
        self.unreal = self.unreal or not value.imag and value.real < 0
        return self.noisy(mp.ln(value), mp.one)

    def lg(self, a):
        return self.over(self.ln(a), mp.ln(10))

    def floor(self, a):
        value = self.real(a)
        if isinstance(value, Fraction):
            return Fraction(value.__floor__())
        if not abs(value) < 10 ** 40:
            raise Undefined("floor")
        nearest = mp.nint(value)
        return Fraction(int(nearest if abs(value - nearest) < 1e-30 else mp.floor(value)))  # floor(log2 8) is 3

    def fact(self, a, step: int = 1):
        n = self.integer(a)
        if n < 0 or n * max(1.0, log2(n + 1) - 1.45) > MAX_BITS * step:
            raise Undefined("factorial")
        return self.sized(Fraction(factorial(n) if step == 1 else prod(range(n, 1, -step))))

    def binom(self, n, k):
        n, k = self.integer(n), self.integer(k)
        if k < 0 or n < 0 or min(k, n - k) * max(1.0, log2(n + 1)) > MAX_BITS:
            raise Undefined("binomial")
        return self.sized(Fraction(comb(n, k)))

    def integers(self, args) -> list[int]:
        return [self.integer(arg, 10 ** 30) for arg in args]

    # -- sums and products, limits and integrals
    def big(self, kind, name, low, high, body):
        if high == ("const", "oo"):
            return self.symbolic(("big", kind, name, low, high, body))
        low, high = self.integer(low, 10 ** 12), self.integer(high, 10 ** 12)
        if (high - low) * 3 > (self.steps if not self.env else self.steps // 8):
            if self.env:
                raise Undefined("too long a sum")
            return self.symbolic(("big", kind, name, num(low), num(high), body))
        total, outer = Fraction(kind == "prod"), self.env
        for k in range(low, high + 1):
            self.env = outer | {name: Fraction(k)}
            total = (self.times if kind == "prod" else self.plus)(total, self.eval(body))
        self.env = outer
        return total

    def symbolic(self, node: Node) -> Number:
        """The value of what needs sympy; the process that has it puts its own function here."""
        raise NeedsSympy


_OPERATIONS = {
    "num": lambda self, value, decimals: value,
    "sym": lambda self, name: self.env[name],
    "const": lambda self, name: _CONSTANTS[name],
    "neg": lambda self, a: -self.eval(a),
    "mul": lambda self, a, b: self.times(self.eval(a), self.eval(b)),
    "div": lambda self, a, b: self.over(self.eval(a), self.eval(b)),
    "mod": lambda self, a, b: Fraction(self.eval(a) % self.eval(b)),
    "percent": lambda self, a: self.times(self.eval(a), Fraction(1, 100)),
    "deg": lambda self, a: self.times(self.eval(a), mp.pi / 180) if self.degree else self.eval(a),
    "log": lambda self, a: self.lg(a) if self.decimal_log else self.ln(a),
    "abs": lambda self, a: abs(value) if isinstance(value := self.eval(a), Fraction) else size(value),
    "ceil": lambda self, a: -self.floor(("neg", a)),
    "fact2": lambda self, a: self.fact(a, 2),
    "gcd": lambda self, *args: Fraction(gcd(*self.integers(args))),
    "lcm": lambda self, *args: self.sized(Fraction(lcm(*self.integers(args)))),
    "min": lambda self, *args: min(map(self.real, args), key=lift),
    "max": lambda self, *args: max(map(self.real, args), key=lift),
    "int": lambda self, *node: self.symbolic(("int", *node)),
    "lim": lambda self, *node: self.symbolic(("lim", *node)),
    **{name: getattr(Evaluator, name) for name in "add pow root ln lg floor fact binom big".split()}}
