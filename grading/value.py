"""The value of a tree: a Fraction where it is exact, else a number of 160 digits.

mpmath computes in a context of our own, whose precision is never changed: its sec, cot and csc would change it for
the time of the call, which other threads would see. Its exponents have no bound, so each size is bounded here.
"""

import operator
from fractions import Fraction
from math import comb, factorial, gcd, lcm, log2, prod

from mpmath import MPContext

from grading.tree import MAX_BITS, MAX_STEPS, NeedsSympy, Node, Undefined, num

mp = MPContext()
mp.dps = 160
TOLERANCE = mp.mpf("1e-120")  # relative: numbers closer than that are equal
CANCELLED = mp.mpf("1e-20")  # a sum that much smaller than its terms is partly noise
MAX_EXPONENT, MAX_COMPLEX_EXPONENT, MAX_ANGLE = 4 * 10**12, 100_000, 10**12
Number = Fraction | mp.mpf | mp.mpc

_CONSTANTS = {"pi": +mp.pi, "e": +mp.e, "i": mp.j, "oo": mp.inf}
_FUNCTIONS = {
    "exp": mp.exp,
    "sin": mp.sin,
    "cos": mp.cos,
    "sinh": mp.sinh,
    "cosh": mp.cosh,
    "tanh": mp.tanh,
    "arcsin": mp.asin,
    "arccos": mp.acos,
    "arctan": mp.atan,
    "arcsinh": mp.asinh,
    "arccosh": mp.acosh,
    "arctanh": mp.atanh,
    "arccot": lambda x: mp.pi / 2 - mp.atan(x),
    "cis": lambda x: mp.mpc(mp.cos(x), mp.sin(x)),
}
_QUOTIENTS = {
    "tan": (mp.sin, mp.cos),
    "cot": (mp.cos, mp.sin),
    "sec": (lambda x: mp.one, mp.cos),
    "csc": (lambda x: mp.one, mp.sin),
}


def lift(value: Number):
    """A number of mpmath."""
    return mp.convert(value) if isinstance(value, Fraction) else value


def size(value):
    """The absolute value. (mpmath's own adds exactly, which huge exponents do not allow.)"""
    return mp.sqrt(value.real**2 + value.imag**2) if value.imag else abs(value.real)


def is_close(x: Number, y: Number, scale=mp.zero) -> bool:
    """Equal to all digits; scale: what cancellation started from, see Evaluator."""
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    x, y = lift(x), lift(y)
    if not (mp.isfinite(x) and mp.isfinite(y)):
        return x == y
    difference, noise = size(x - y), scale * TOLERANCE
    return difference <= TOLERANCE * max(size(x), size(y)) or difference <= noise < 1e-50


def real(value: Number) -> Number:
    """Raises Undefined for a number that has an imaginary part."""
    if isinstance(value, Fraction) or not abs(value.imag) > 1e-50 * (1 + abs(value.real)):
        return value if isinstance(value, Fraction) else value.real
    raise Undefined("not real")


def _bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()


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
        value = (
            _OPERATIONS[kind](self, *args) if kind in _OPERATIONS else self.function(kind, *args)
        )
        value = mp.mpf(value) if isinstance(value, float) else value  # an infinite end of a region
        if not isinstance(value, Fraction):
            most = MAX_COMPLEX_EXPONENT if isinstance(value, mp.mpc) else MAX_EXPONENT
            if max(abs(part._mpf_[2]) for part in (value.real, value.imag)) > most:
                raise Undefined("exponent out of reach")
        return value

    def integer(self, node: Node, most: int = 10**6) -> int:
        value = real(self.eval(node))
        if abs(value) <= most and is_close(value, nearest := Fraction(int(mp.nint(lift(value))))):
            return int(nearest)
        raise Undefined("not a small integer")

    # -- arithmetic
    def exact(self, operation, a: Number, b: Number) -> Number:
        """Exact where both sides are; numbers beyond the cap are rounded."""
        if not (isinstance(a, Fraction) and isinstance(b, Fraction)):
            return operation(lift(a), lift(b))
        value = operation(a, b)
        self.steps -= min(_bits(value), MAX_BITS) // 40
        self.rounded = self.rounded or _bits(value) > MAX_BITS
        return value if _bits(value) <= MAX_BITS else lift(value)

    def add(self, a, b):
        terms = [b]  # a long sum leans left: walk down instead of recursing
        while a[0] == "add":
            a, b = a[1:]
            terms.append(b)
        total = self.eval(a)
        for term in reversed(terms):
            total = self.plus(total, self.eval(term))
        return total

    def plus(self, a: Number, b: Number) -> Number:
        total = self.exact(operator.add, a, b)
        return (
            total
            if isinstance(total, Fraction)
            else self.noisy(total, max(size(lift(a)), size(lift(b))))
        )

    def noisy(self, value, before):
        """Remembers what cancelled if the value is much smaller than what it was made from."""
        if mp.isfinite(before) and size(value) < before * CANCELLED:
            self.scale = max(self.scale, before)
        return value

    def times(self, a: Number, b: Number) -> Number:
        return self.exact(operator.mul, a, b)

    def over(self, a: Number, b: Number) -> Number:
        if not isinstance(b, Fraction) and size(b) <= self.scale * TOLERANCE:
            raise Undefined("division by what rounds to zero")
        return self.exact(operator.truediv, a, b)

    def pow(self, a, b):
        return (
            self.function("exp", b)
            if a == ("const", "e")
            else self.power(self.eval(a), self.eval(b))
        )

    def power(self, a: Number, b: Number) -> Number:
        integer = isinstance(a, Fraction) and isinstance(b, Fraction) and b.denominator == 1
        if not a and not lift(b).real > 0:
            raise Undefined("0^0")
        if integer and abs(a) in (0, 1):
            return a ** (int(b) % 2 if a < 0 else 1)
        if integer and _bits(a) * abs(b) <= MAX_BITS:
            return self.exact(operator.pow, a, b)
        self.rounded = self.rounded or integer
        self.steps -= 20
        a, b = lift(a), lift(b)
        self.unreal = self.unreal or not a.imag and a.real < 0 and not mp.isint(b)
        most = MAX_EXPONENT if not a.imag and not b.imag else MAX_COMPLEX_EXPONENT
        if a and mp.isfinite(a) and mp.isfinite(b) and size(b) * (abs(mp.mag(a)) + 1) > most:
            raise Undefined("power out of reach")
        return a**b

    def root(self, a, n):
        a, n = self.eval(a), self.eval(n)
        if isinstance(n, Fraction) and n % 2 == 1 and not lift(a).imag and lift(a).real < 0:
            return -self.power(-a, 1 / n)  # the cube root of -8 is -2
        return self.power(a, self.over(Fraction(1), n))

    # -- functions
    def function(self, name, node):
        degrees, self.degree = self.degree, True  # sin 30^\circ is a half in any reading
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
        if not value:
            raise Undefined("logarithm of zero")
        self.steps -= 20
        self.unreal = self.unreal or not value.imag and value.real < 0
        return self.noisy(mp.ln(value), mp.one)

    def floor(self, a):
        value = lift(real(self.eval(a)))
        if not abs(value) < 10**40:
            raise Undefined("floor")
        nearest = mp.nint(value)
        return Fraction(
            int(nearest if abs(value - nearest) < 1e-30 else mp.floor(value))
        )  # floor(log2 8) is 3

    def fact(self, a):
        n = self.integer(a)
        if n < 0 or n * max(1.0, log2(n + 1) - 1.45) > MAX_BITS:
            raise Undefined("factorial")
        return self.times(Fraction(factorial(n)), Fraction(1))

    def fact2(self, a):
        n = self.integer(a, 10**4)
        if n < 0:
            raise Undefined("factorial")
        return self.times(Fraction(prod(range(n, 0, -2))), Fraction(1))

    def binom(self, n, k):
        n, k = self.integer(n), self.integer(k)
        if k < 0 or n < 0 or min(k, n - k) * max(1.0, log2(n + 1)) > MAX_BITS:
            raise Undefined("binomial")
        return self.times(Fraction(comb(n, k)), Fraction(1))

    def big(self, kind, name, low, high, body):
        """A sum or a product, term by term if that is not too long."""
        start, end = (
            self.integer(low, 10**12),
            high != ("const", "oo") and self.integer(high, 10**12),
        )
        if end is False or (end - start) * 3 > (self.steps // 8 if self.env else self.steps):
            if self.env:
                raise Undefined("too long a sum")
            return self.symbolic(("big", kind, name, num(start), high, body))
        total, outer = Fraction(kind == "prod"), self.env
        for k in range(start, end + 1):
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
    "lg": lambda self, a: self.over(self.ln(a), mp.ln(10)),
    "log": lambda self, a: self.over(self.ln(a), mp.ln(10)) if self.decimal_log else self.ln(a),
    "abs": lambda self, a: (
        abs(value) if isinstance(value := self.eval(a), Fraction) else size(value)
    ),
    "ceil": lambda self, a: -self.floor(("neg", a)),
    "gcd": lambda self, *args: Fraction(gcd(*[self.integer(arg, 10**30) for arg in args])),
    "lcm": lambda self, *args: Fraction(lcm(*[self.integer(arg, 10**30) for arg in args])),
    "min": lambda self, *args: min((real(self.eval(arg)) for arg in args), key=lift),
    "max": lambda self, *args: max((real(self.eval(arg)) for arg in args), key=lift),
    "int": lambda self, *node: self.symbolic(("int", *node)),
    "lim": lambda self, *node: self.symbolic(("lim", *node)),
    **{name: getattr(Evaluator, name) for name in "add pow root ln floor fact fact2 binom big".split()},
}
