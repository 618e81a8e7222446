"""The value of a tree: a Fraction where it is exact, else a number of 160 digits.

mpmath computes in a context of our own, whose precision is never changed: its sec, cot and csc
would change it for the time of the call, which other threads would see. Its exponents have no
bound, so each size is bounded here.
"""

import operator
from fractions import Fraction
from math import comb, factorial, gcd, inf, lcm, prod

from mpmath import MPContext

from grading.tree import MAX_BITS, MAX_STEPS, NeedsSympy, Node, Undefined, num

mp = MPContext()
mp.dps = 160
TOLERANCE = mp.mpf("1e-120")  # numbers closer than that are equal, relative to their size,
NOISE = mp.mpf("1e-130")  # and so are those that differ by less: cancellation leaves that
MAX_EXPONENT, MAX_COMPLEX_EXPONENT, MAX_ANGLE = 4 * 10**12, 100_000, 10**12
Number = Fraction | mp.mpf | mp.mpc

_CONSTANTS = {"pi": +mp.pi, "e": +mp.e, "i": mp.j, "oo": mp.inf}
_FUNCTIONS = {
    "acot": lambda x: mp.pi / 2 - mp.atan(x),
    "cis": lambda x: mp.mpc(mp.cos(x), mp.sin(x)),
    "one": lambda x: mp.one,
}
for _name in "exp sin cos sinh cosh tanh asin acos atan asinh acosh atanh".split():
    _FUNCTIONS[_name] = getattr(mp, _name)
_ARITHMETIC = {"add": operator.add, "mul": operator.mul, "div": operator.truediv}
_ARITHMETIC |= {"sum": operator.add, "prod": operator.mul, "mod": operator.mod, "neg": operator.neg}
_EXTREMES = {"min": min, "max": max}
_QUOTIENTS = {"tan": ("sin", "cos"), "cot": ("cos", "sin")}
_QUOTIENTS |= {"sec": ("one", "cos"), "csc": ("one", "sin")}
_OF_INTEGERS = {  # and the largest integer that each takes
    "gcd": (gcd, 10**30),
    "lcm": (lcm, 10**30),
    "fact": (factorial, 15_000),
    "fact2": (lambda n: prod(range(n, 0, -2)), 15_000),
    "binom": (comb, 20_000),
}
_METHODS = set("pow root ln lg log abs floor ceil".split())
_SCALES = {"deg": mp.pi / 180, "percent": Fraction(1, 100)}


def lift(value: Number):
    """A number of mpmath."""
    return mp.convert(value) if isinstance(value, Fraction) else value


def size(value):
    """The absolute value. (mpmath's own adds exactly, which huge exponents do not allow.)"""
    if value.imag:
        return mp.sqrt(value.real**2 + value.imag**2)
    return abs(value.real)


def is_close(x: Number, y: Number) -> bool:
    """Equal to all digits."""
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    x, y = lift(x), lift(y)
    largest = max(size(x), size(y))
    return x == y or size(x - y) < max(NOISE, TOLERANCE * largest)


def real(value: Number) -> Number:
    """Raises Undefined for a number that has an imaginary part."""
    if value.imag and abs(value.imag) > 1e-50 * (1 + abs(value.real)):
        raise Undefined("not real")
    return value.real


def _bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()


def _determinant(rows: tuple) -> Node:
    if len(rows) > 5:
        raise Undefined("too large a determinant")
    total = num(0) if rows else num(1)
    for k, cell in enumerate(rows[0] if rows else ()):
        minor = [row[:k] + row[k + 1 :] for row in rows[1:]]
        term = ("mul", cell, _determinant(minor))
        total = ("add", total, ("neg", term) if k % 2 else term)
    return total


class Evaluator:
    """Evaluates trees. All its evaluations share one budget of steps. scaled: a percent sign is a
    hundredth and a degree sign pi/180, else both are 1. unreal is set when a root or a logarithm
    leaves the reals."""

    def __init__(self):
        self.steps = MAX_STEPS
        self.scaled = self.decimal_log = self.unreal = False

    def value(self, node: Node, env: dict) -> Number:
        """env maps names to values. Raises Undefined (no value, or out of reach) and NeedsSympy."""
        self.env = env
        try:
            return self.eval(node)
        except (ArithmeticError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise Undefined(type(error).__name__) from None

    def eval(self, node: Node) -> Number:
        kind, *args = node
        self.steps -= 1
        if self.steps < 0:
            raise Undefined("too many steps")
        value = self.compute(kind, args)
        if isinstance(value, Fraction):
            return value
        value = mp.convert(value)  # an infinite end of a region is a float
        largest = MAX_COMPLEX_EXPONENT if isinstance(value, mp.mpc) else MAX_EXPONENT
        for part in (value.real, value.imag):
            if abs(part._mpf_[2]) > largest:
                raise Undefined("exponent out of reach")
        return value

    def compute(self, kind: str, args: list) -> Number:
        if kind == "num":
            return args[0]
        if kind == "sym":
            return self.env[args[0]]
        if kind == "const":
            return _CONSTANTS[args[0]]
        if kind == "big":
            return self.big(*args)
        if kind in ("det", "abs") and args[0][0] == "mat":
            return self.eval(_determinant(args[0][1]))
        if kind in _QUOTIENTS:
            over, under = _QUOTIENTS[kind]
            return self.eval(("div", (over, *args), (under, *args)))
        scaled = self.scaled
        self.scaled = scaled or kind in _FUNCTIONS  # sin 30^\circ is a half in any reading
        values = list(map(self.eval, args))
        self.scaled = scaled
        if kind in _FUNCTIONS:
            return self.function(kind, lift(*values))
        if kind in _ARITHMETIC:
            return self.apply(_ARITHMETIC[kind], *values)
        if kind in _SCALES:
            scale = _SCALES[kind] if scaled else Fraction(1)
            return self.apply(operator.mul, *values, scale)
        if kind in _EXTREMES:
            return _EXTREMES[kind](map(real, values), key=lift)
        if kind in _OF_INTEGERS:
            function, largest = _OF_INTEGERS[kind]
            return Fraction(function(*[self.integer(value, largest) for value in values]))
        if kind in _METHODS:
            return getattr(self, kind)(*values)
        raise Undefined("no value")

    def integer(self, value: Number, largest: int) -> int:
        value = real(value)
        if abs(value) <= largest:
            nearest = Fraction(int(mp.nint(lift(value))))
            if is_close(value, nearest):
                return int(nearest)
        raise Undefined("not a small integer")

    def function(self, name: str, x) -> Number:
        self.steps -= 20
        if size(x) > (1 if name in ("asin", "acos") else MAX_ANGLE):
            raise Undefined("out of reach")
        return _FUNCTIONS[name](x)

    def apply(self, operation, *values: Number) -> Number:
        """Exact where all values are, unless that is too large to hold."""
        if not all(isinstance(value, Fraction) for value in values):
            values = [lift(value) for value in values]
            if operation == operator.truediv and size(values[1]) <= NOISE:
                raise Undefined("division by what rounds to zero")
            return operation(*values)
        value = operation(*values)
        self.steps -= _bits(value) // 40
        return value if _bits(value) <= MAX_BITS else self.rounded(value)

    def rounded(self, value: Fraction) -> Number:
        """A number too large to hold: at random points its digits will do, as an answer not."""
        if not self.env:
            raise Undefined("too large a number")
        return lift(value)

    def pow(self, a: Number, b: Number) -> Number:
        if not a and not b.real > 0:
            raise Undefined("0^0")
        if isinstance(a, Fraction) and isinstance(b, Fraction) and b.denominator == 1:
            if _bits(a) * abs(b) <= MAX_BITS:
                return self.apply(operator.pow, a, b)
            a = self.rounded(a)
        self.steps -= 20
        a, b = lift(a), lift(b)
        if not a.imag and a.real < 0 and not mp.isint(b):
            self.unreal = True
        largest = MAX_COMPLEX_EXPONENT if a.imag or b.imag else MAX_EXPONENT
        if a and size(b) * (abs(mp.mag(a)) + 1) > largest:
            raise Undefined("power out of reach")
        return a**b

    def root(self, a: Number, n: Number) -> Number:
        inverse = self.apply(operator.truediv, Fraction(1), n)
        if not a.imag and a.real < 0 and isinstance(n, Fraction) and n % 2 == 1:
            return -self.pow(-a, inverse)  # the cube root of -8 is -2
        return self.pow(a, inverse)

    def ln(self, a: Number) -> Number:
        a = lift(a)
        if not a:
            raise Undefined("logarithm of zero")
        self.steps -= 20
        if not a.imag and a.real < 0:
            self.unreal = True
        return mp.ln(a)

    def lg(self, a: Number) -> Number:
        return self.ln(a) / mp.ln(10)

    def log(self, a: Number) -> Number:
        return self.lg(a) if self.decimal_log else self.ln(a)

    def abs(self, a: Number) -> Number:
        return size(a)

    def floor(self, a: Number) -> Number:
        a = lift(real(a))
        if not abs(a) < 10**40:
            raise Undefined("floor")
        return Fraction(int(mp.floor(a + mp.mpf("1e-30"))))  # floor(log2 8) is 3

    def ceil(self, a: Number) -> Number:
        return -self.floor(-a)

    def big(self, kind: str, name: str, low: Node, high: Node, body: Node) -> Number:
        """A sum or a product, term by term if that is not too long; integrals and limits."""
        if kind in ("int", "lim"):
            return self.symbolic(("big", kind, name, low, high, body))
        start, end = self.integer(self.eval(low), 10**12), inf
        if high != ("const", "oo"):
            end = self.integer(self.eval(high), 10**12)
        if (end - start) * 3 > (self.steps // 8 if self.env else self.steps):
            if self.env:
                raise Undefined("too long a sum")
            return self.symbolic(("big", kind, name, num(start), high, body))
        total, outer = Fraction(kind == "prod"), self.env
        for k in range(start, end + 1):
            self.env = outer | {name: Fraction(k)}
            total = self.apply(_ARITHMETIC[kind], total, self.eval(body))
        self.env = outer
        return total

    def symbolic(self, node: Node) -> Number:
        """The value of what needs sympy; the process that has it puts its own function here."""
        raise NeedsSympy
