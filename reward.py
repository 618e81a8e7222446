"""Grades one response against its gold answers: the accuracy and format rewards of the paper (PAPER.md, "Equations").

The answer is the content of the last closed `\\boxed{}`. It is tokenized, parsed into a small tree of tuples and
compared with the gold by type. Expressions are compared by value: exactly where rational arithmetic carries,
otherwise to 40 digits in complex decimal arithmetic, at random points where they have variables. No text ever reaches
`eval`, `sympify` or any other parser than the one below. Every size (text, tokens, nesting, bits of a number,
evaluation steps) is capped before work is done, so that grading in this process is bounded; what cannot be bounded
(limits, integrals, infinite sums) goes to a worker process that runs sympy under a memory limit and a clock kept
here. The worker starts when it is first needed.

What counts as equal, decided once:
- Value, not form: expanded or factored, reduced or not, `2^3` or `8`, `2\\pi/4` or `\\pi/2`, `52_8` or `42`.
- Percent: `p%` equals `p` and `p/100` (golds are written both ways); two percentages must agree as they stand.
- Degrees, units and money: a unit that only one side gives is ignored, two different units are not equal unless one
  converts into the other (`1.5 km`, `1500 m`). A degree sign may also stand for pi/180.
- Decimals are exact: `0.33` is not `1/3`, `5` is not `5.001`. Only a decimal of at least ten significant digits that
  rounds (or cuts) a value with no shorter decimal expansion equals it.
- Letters: i, e and pi are the constants; j..n and N are integers; x, y and z are real; any other letter is a positive
  quantity. A bare `log` is natural or decimal, whichever fits.
- `k=5` or `f(x)=5` equals `5`; two named answers must agree in the name, except that `y` and `f(x)` are one name.
- A comma list equals its permutations and the set of its elements; tuples and intervals keep their order and
  brackets; `(a,b)` is a point or an interval as the other side asks; inequalities are intervals.
- Equations are equal up to a constant factor, never by both being true (`0=0`).
- `1,234` is a number unless the other side is plainly a list.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import queue
import random
import re
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from decimal import Context, Decimal, DecimalException, localcontext
from fractions import Fraction
from functools import lru_cache
from math import comb, factorial, gcd, isqrt, lcm, log2

MAX_TEXT, MAX_TOKENS, MAX_DEPTH, MAX_LIST = 20_000, 2_000, 40, 40  # of one answer
MAX_DIGITS, MAX_BITS, MAX_STEPS = 10_000, 200_000, 20_000  # of a literal, of an exact number, of one comparison
CLOCK, WORKER_MEMORY = 0.7, 900 << 20                     # seconds a worker may take for one answer; bytes
PATIENCE = 60.0                                           # seconds more that `score_all` waits on a crowded machine
WORTH_SPREADING = 2_000                                   # answers: below, the workers' start costs more than it saves

Node = tuple  # (kind, ...): see _Parser


class _Unreadable(ValueError):
    """The text is no answer that this grader understands."""


class _Undefined(ArithmeticError):
    """An expression without a value, or one whose value is out of reach."""


class _NeedsSympy(Exception):
    """Only a computer algebra system can tell the value."""


# ------------------------------------------------------------------------------------------------------------- the box

_BOX = re.compile(r"\\{1,2}boxed\s*\{|\\.|[{}]", re.DOTALL)


def final_answer(response: str) -> str | None:
    """The content of the last closed \\boxed{...}, None if there is none; of boxes
    around boxes the innermost. Linear time."""
    if not isinstance(response, str):
        return None
    if response.count("{") + response.count("}") > 60_000:
        response = response[-60_000:]
    opened, closed = [], []
    for match in _BOX.finditer(response):
        token = match.group()
        if token == "}" and opened:
            start, content = opened.pop()
            if content is not None:
                closed.append((start, content, match.start()))
        elif token == "{":
            opened.append((match.start(), None))
        elif len(token) > 2:
            opened.append((match.start(), match.end()))
    if not closed:
        return None
    _, content, end = closed.pop()
    while closed and not response[content:closed[-1][0]].strip() and not response[closed[-1][2] + 1:end].strip():
        _, content, end = closed.pop()
    return response[content:end]


# ---------------------------------------------------------------------------------------------------------- the tokens

_FUNCTIONS = {name: name for name in """
    sin cos tan cot sec csc arcsin arccos arctan arccot sinh cosh tanh exp ln log gcd lcm max min""".split()}
_FUNCTIONS |= {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "lg": "lg", "abs": "abs", "floor": "floor",
               "ceil": "ceil", "ctg": "cot", "tg": "tan", "cosec": "csc", "arctg": "arctan", "sqrt": "sqrt"}
_GREEK = set("""
    alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau upsilon
    phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega hbar ell odot oplus partial
    nabla mho Re Im star bullet dagger square prime aleph perp parallel triangle""".split())
_SYMBOLS = {  # command -> token
    "cdot": "*", "times": "*", "ast": "*", "div": "/", "le": "<=", "leq": "<=", "leqslant": "<=", "ge": ">=",
    "geq": ">=", "geqslant": ">=", "lt": "<", "gt": ">", "ne": "!=", "neq": "!=", "approx": "~", "simeq": "~",
    "pm": "+-", "mp": "-+", "cup": "cup", "bigcup": "cup", "cap": "cap", "setminus": "minus", "backslash": "minus",
    "in": "in", "mid": "mid", "vert": "|", "lvert": "|", "rvert": "|", "lfloor": "lfloor", "rfloor": "rfloor",
    "lceil": "lceil", "rceil": "rceil", "langle": "(", "rangle": ")", "lbrace": "{{", "rbrace": "}}",
    "lbrack": "[", "rbrack": "]", "equiv": "equiv", "to": "to", "rightarrow": "to", "ldots": "dots",
    "dots": "dots", "cdots": "dots", "bmod": "mod", "mod": "mod", "pmod": "pmod", "lor": "or", "vee": "or",
    "land": "and", "wedge": "and", "degree": "deg", "lparen": "(", "rparen": ")", "choose": "choose",
    "over": "over", "colon": ":", "emptyset": "empty", "varnothing": "empty", "infty": "oo", "pi": "pi",
    "cr": "row", "percent": "%", "quad": "gap", "qquad": "gap"}
_DROPPED = set("""
    left right middle displaystyle textstyle scriptstyle limits nolimits big Big bigl bigr Bigl Bigr bigg Bigg mathbf
    boldsymbol bm mathit mathsf boxed fbox bf it rm tt hline phantom thinspace mathopen mathclose mathstrut cal
    mathcal mathfrak mathscr""".split())
_TEXT = set("text textbf textit textrm mbox hbox mathrm operatorname textsf texttt textnormal emph textup unit".split())
_STRUCTURE = {name: name for name in "frac sqrt binom sum prod int lim angle".split()}
_STRUCTURE |= {"dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "dbinom": "binom", "tbinom": "binom",
               "measuredangle": "angle"}
_ACCENTS = set("dot ddot hat bar vec tilde overline overrightarrow widehat widetilde underline".split())
_WORDS = {"or": "or", "and": "and", "percent": "%", "pct": "%", "percentage": "%", "degree": "deg", "degrees": "deg",
          "deg": "deg", "mod": "mod", "per": "/"}
_PLAIN = {"pi": "pi", "infinity": "oo", "inf": "oo", "oo": "oo", "infty": "oo", "union": "cup", "sqrt": "sqrt"}

_UNITS = {}  # name -> (dimension, factor)
for _dimension, _row in {
        "length": "nm 1e-9 mm 0.001 millimeter 0.001 cm 0.01 centimeter 0.01 m 1 meter 1 metre 1 km 1000 "
                  "kilometer 1000 in 0.0254 inch 0.0254 inche 0.0254 ft 0.3048 foot 0.3048 feet 0.3048 yd 0.9144 "
                  "yard 0.9144 mi 1609.344 mile 1609.344",
        "mass": "mg 1e-6 g 0.001 gram 0.001 kg 1 kilogram 1 lb 0.45359237 pound 0.45359237 oz 0.028349523125 "
                "ounce 0.028349523125 ton 1000",
        "time": "ms 0.001 s 1 sec 1 second 1 min 60 minute 60 h 3600 hr 3600 hour 3600 day 86400 week 604800 "
                "yr 31557600 year 31557600",
        "volume": "ml 0.001 mL 0.001 milliliter 0.001 l 1 L 1 liter 1 litre 1",
        "money": "cent 0.01 dollar 1 usd 1", "frequency": "Hz 1 hz 1 kHz 1000 MHz 1000000",
        "force": "N 1 newton 1 kN 1000", "energy": "J 1 joule 1 kJ 1000 eV 1.602176634e-19",
        "power": "W 1 watt 1 kW 1000",
        "other": "rad 1 radian 1 mol 1 rpm 1 pa 1 kpa 1000"}.items():
    _pairs = _row.split()
    _UNITS |= {name: (_dimension, Fraction(value)) for name, value in zip(_pairs[::2], _pairs[1::2])}
_SPEEDS = {"mph": (("mile", 1), ("hour", -1)), "kph": (("km", 1), ("hour", -1))}
_COUNTS = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10 ** 6, "billion": 10 ** 9, "trillion": 10 ** 12}
_NOT_UNITS = set("""
    is are was not no isn't the a wrong right than least most to where for if when answer plus minus times over
    squared cubed half third quarter with without except but then all some only both mod hence so also""".split())

_UNICODE = {ord(a): b for a, b in {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ",
    "÷": r"\div ",
    "∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ",
    "≈": r"\approx ",
    "±": r"\pm ", "∓": r"\mp ", "√": r"\sqrt ", "∅": r"\emptyset ", "°": r"\degree ", "º": r"\degree ",
    "′": "'", "’": "'", "″": "''", "≡": r"\equiv ", "∖": r"\setminus ", "…": r"\ldots ", "ℝ": r"\mathbb{R}",
    "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}",
    "、": ",", "。": ".", "\u00a0": " ",
    "⟨": r"\langle ", "⟩": r"\rangle ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ",
    "π": r"\pi ", "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ", "θ": r"\theta ", "λ": r"\lambda ",
    "μ": r"\mu ", "σ": r"\sigma ", "τ": r"\tau ", "φ": r"\phi ", "ω": r"\omega ", "ρ": r"\rho ", "ε": r"\epsilon ",
    "Δ": r"\Delta ", "Ω": r"\Omega ", "Φ": r"\Phi ", "Σ": r"\Sigma "}.items()}
_UNICODE |= {c: chr(c - 0xFEE0) for c in range(0xFF01, 0xFF5F)}                                       # full width
_UNICODE |= dict.fromkeys([0xAD, 0xFEFF, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x206A)], "")
_SCRIPTS = re.compile("([⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+)|([₀₁₂₃₄₅₆₇₈₉]+)")
_SCRIPT_DIGITS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻₀₁₂₃₄₅₆₇₈₉", "0123456789-0123456789")

_LEX = re.compile(r"""
    (?P<space>(?:\s|~|\\[ ,;:!>]|\$|\\[()\[\]]|&nbsp;)+)
  | (?P<repeating>\d{0,50}\.\d{0,50}\\(?:overline|bar|dot)\s*\{\d{1,50}\})
  | (?P<thousands>\d{1,3}(?:(?:,\\!\s*|\{,\}\s*|\\[,;:\ ]|~|\ )\d{3})+(?!\d)(?:\.\d+)?)
  | (?P<comma>[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)(?:\.\d+)?)
  | (?P<scientific>(?:\d{1,400}(?:\.\d{0,400})?|\.\d{1,400})[eE][-+]?\d+(?![A-Za-z\d]))
  | (?P<number>\d+(?:\.\d+)?|\.\d+)
  | (?P<deg>\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z])))
  | (?P<double>\\\\(?=[A-Za-z]{2}))
  | (?P<row>\\\\(?:\[\s*-?[\d.]+\s*[a-z]{2}\s*\])?)
  | (?P<command>\\[A-Za-z]+)
  | (?P<escape>\\[{}$%&_\#|])
  | (?P<letters>[A-Za-z]+)
  | (?P<dots>\.\.\.)
  | (?P<operator>\*\*|<=|>=|!=|==|[-+*/^_=<>()\[\]{}|,;:!'%&.])
""", re.VERBOSE | re.ASCII)


class _Lexer:
    """Text to tokens (kind, value, glued): kinds are num, id, text, fn, op; glued: no space before it."""

    def __init__(self, text: str, as_list: bool):
        if not text.isascii():
            text = _SCRIPTS.sub(lambda m: ("^{" if m[1] else "_{") + m[0].translate(_SCRIPT_DIGITS) + "}", text)
            text = text.translate(_UNICODE)
        if len(text) > MAX_TEXT:
            raise _Unreadable("too long")
        self.text, self.as_list = text, as_list
        self.tokens, self.parens, self.matrix, self.text_end, self.money = [], 0, 0, [], False
        self.closing = self._closing_braces()

    def _closing_braces(self) -> dict[int, int]:
        opened, closing = [], {}
        for match in _BOX.finditer(self.text):
            if match.group() == "}":
                if opened:
                    closing[opened.pop()] = match.start()
            elif match.group()[-1] == "{" and match.group() != "\\{":
                opened.append(match.end() - 1)
        return closing

    def run(self) -> list[tuple]:
        at, glued = 0, False
        while at < len(self.text):
            match = _LEX.match(self.text, at)
            if not match:
                raise _Unreadable(f"unknown character at {at}")
            kind, value, start, at = match.lastgroup, match.group(), at, match.end()
            if kind == "space":
                glued = False
                continue
            if kind == "comma" and ",0" not in value and (self.as_list or self.parens or self._after_comma()):
                at = start + value.index(",")
                kind, value = "number", value[:value.index(",")]
            if kind == "thousands" and value[0] == "0":
                at = start + re.match(r"\d+", value).end()
                kind, value = "number", self.text[start:at]
            if kind in ("deg", "dots", "row"):
                self._add("op", kind, glued)
            else:
                at = getattr(self, "_" + kind)(value, at, glued)
            glued = True
            if len(self.tokens) > MAX_TOKENS:
                raise _Unreadable("too many tokens")
        return self.tokens

    def _after_comma(self) -> bool:
        return len(self.tokens) > 1 and self.tokens[-1][1] == "," and self.tokens[-2][0] == "num"

    def _add(self, kind: str, value, glued: bool = True) -> None:
        self.tokens.append((kind, value, glued))

    def _number(self, value, at, glued):
        if len(value) > MAX_DIGITS:
            raise _Unreadable("too many digits")
        self._add("num", value, glued)
        return at

    def _thousands(self, value, at, glued):
        return self._number(re.sub(r"[^\d.]", "", value), at, glued)

    _comma = _thousands
    _scientific = _number

    def _repeating(self, value, at, glued):
        self._add("num", re.sub(r"\\[a-z]+\s*\{(\d+)\}", r"(\1)", value), glued)
        return at

    def _double(self, value, at, glued):
        if not self.matrix:
            return at - 1                                  # \\frac: an escape too many
        self._add("op", "row", glued)
        return at

    def _escape(self, value, at, glued):
        if value == "\\$":
            self.money = True
        else:
            self._add("op", {"\\{": "{{", "\\}": "}}", "\\%": "%", "\\|": "|"}.get(value, "bad"), glued)
            self.parens += {"\\{": 1, "\\}": -1}.get(value, 0)
        return at

    def _operator(self, value, at, glued):
        if value in "{}" and self.text_end:
            if value == "}" and at > self.text_end[-1]:
                self.text_end.pop()
            return at
        if value == "!=" and glued:                        # 5!=120
            self._add("op", "!", glued)
            value = "="
        self.parens = max(0, self.parens + {"(": 1, "[": 1, ")": -1, "]": -1}.get(value, 0))
        self._add("op", {"**": "^", "==": "=", "!=": "!="}.get(value, value), glued)
        return at

    def _letters(self, value, at, glued):
        low = value.lower()
        previous = self.tokens[-1] if self.tokens else ("", "", False)
        if low in _WORDS and not (low == "deg" and len(value) != 3):
            self._add("op", _WORDS[low], glued)
        elif self.text_end:
            self._add("text", value, glued)
        elif value in _UNITS and len(value) > 1 and (previous[0] in ("num", "text") or previous[1] in ("}", ")")):
            self._add("text", value, glued)
        elif low in _PLAIN and value in (low, low.capitalize()):
            self._add("fn" if low == "sqrt" else "op", _PLAIN[low], glued)
        elif value in _FUNCTIONS:
            self._add("fn", _FUNCTIONS[value], glued)
        elif match := re.fullmatch(r"(sin|cos|tan|ln|log)([a-z])", value):
            self._add("fn", match[1], glued)
            self._add("id", match[2])
        elif self._is_word(value):
            self._add("text", value, glued)
        else:
            for index, letter in enumerate(value):
                self._add("id", letter, glued or index > 0)
        return at

    @staticmethod
    def _is_word(value: str) -> bool:
        """Four letters and more are a word, unless they look like a product: capitals, or letters in their order."""
        return len(value) > 3 and not value.isupper() and list(value) != sorted(set(value))

    def _command(self, value, at, glued):
        name = value[1:]
        if name in _TEXT:
            return self._text_group(name, at, glued)
        if name in ("mathbb", "Bbb"):
            match = re.compile(r"\s*\{?\s*([A-Z])\s*\}?").match(self.text, at)
            if not match:
                raise _Unreadable("blackboard letter")
            self._add(*("op", "reals") if match[1] == "R" else ("id", "set " + match[1]), glued)
            return match.end()
        if name in _DROPPED:
            if name in ("left", "right") and self.text[at:at + 1] == ".":
                return at + 1
            return at
        if name in ("begin", "end"):
            match = re.compile(r"\s*\{([a-zA-Z]+)\*?\}").match(self.text, at)
            if not match:
                raise _Unreadable("environment")
            self.matrix += 1 if name == "begin" else -1
            self._add("op", name, glued)
            self._add("env", match[1])
            return match.end()
        if name in _STRUCTURE or name in _ACCENTS:
            self._add("fn", _STRUCTURE.get(name, "accent " + name), glued)
        elif name in _FUNCTIONS:
            self._add("fn", _FUNCTIONS[name], glued)
        elif name in _SYMBOLS:
            if _SYMBOLS[name] != "gap":
                self._add("op", _SYMBOLS[name], glued)
        elif name in _GREEK:
            self._add("id", name.removeprefix("var"), glued)
        else:
            raise _Unreadable("unknown command")
        return at

    def _text_group(self, name, at, glued):
        """\\text{...}: its letters are words. \\mathrm{e}, \\operatorname{lcm} and the like are what they spell."""
        start = at + len(self.text[at:at + 50]) - len(self.text[at:at + 50].lstrip())
        end = self.closing.get(start)
        if end is None or self.text_end:
            return at
        content = self.text[start + 1:end].strip().strip("~")
        after_number = self.tokens and self.tokens[-1][0] == "num" or any(token[0] == "text" for token in self.tokens)
        if name in ("mathrm", "operatorname", "textrm", "text") and content in _FUNCTIONS and not after_number:
            self._add("fn", _FUNCTIONS[content], glued)
            return end + 1
        letter = len(content) == 1 and content.isalpha() and (content in "ie" or not after_number)
        if letter and name in ("mathrm", "operatorname"):
            self._add("id", content, glued)
            return end + 1
        self.text_end.append(end)
        return start + 1


# ---------------------------------------------------------------------------------------------------------- the parser

_RELATIONS = {"=", "<", ">", "<=", ">=", "!=", "~", "in", "mid", "equiv", ":"}
_STARTS = {"(", "[", "{", "{{", "lfloor", "lceil", "pi", "oo", "begin", "empty", "reals", "dots"}


def _num(value, digits=None) -> Node:
    return ("num", Fraction(value), digits)


def _constant(node: Node) -> Fraction | None:
    """The value of a number with or without a minus, None for anything else."""
    if node[0] == "neg" and node[1][0] == "num":
        return -node[1][1]
    return node[1] if node[0] == "num" else None


def _integer(digits: str) -> int:
    """int(), in pieces that Python's limit on the length of numerals allows."""
    return int(digits) if len(digits) < 4000 else _integer(digits[:-4000]) * 10 ** 4000 + int(digits[-4000:])


class _Parser:
    """Precedence parser. Nodes: ("num", value, significant digits of a decimal or None), ("sym", name),
    ("const", name), ("add" | "mul" | "div" | "pow" | "pm" | "mp", a, b),
    ("neg" | "fact" | "fact2" | "deg" | "percent", a), ("root", a, n), ("fn", name, args...),
    ("big", "sum" | "prod", name, low, high, body), ("int", name, low, high, body), ("lim", name, point, body),
    ("unit", a, ((name, power), ...)), ("list", joiner, items), ("set", items),
    ("tuple", "(", items, ")"), ("mat", rows), ("rel", (a, op, b, op, c...)), ("cup" | "cap" | "minus", a, b),
    ("cong", list, modulus), ("dots",)."""

    def __init__(self, tokens: list[tuple]):
        self.tokens = [*tokens, ("end", "", False)]
        self.at, self.depth, self.bars, self.bound = 0, 0, 0, []

    # -- the stream
    def peek(self, ahead: int = 0):
        return self.tokens[min(self.at + ahead, len(self.tokens) - 1)]

    def take(self):
        self.at += 1
        return self.tokens[self.at - 1]

    def is_op(self, *values, ahead: int = 0) -> bool:
        kind, value, _ = self.peek(ahead)
        return kind == "op" and value in values

    def accept(self, *values) -> str | None:
        return self.take()[1] if self.is_op(*values) else None

    def expect(self, *values) -> str:
        found = self.accept(*values)
        if found is None:
            raise _Unreadable(f"expected {values}")
        return found

    def nested(self, parse, *args):
        """parse, one level deeper; a bar inside brackets does not close one outside."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _Unreadable("nested too deeply")
        bars, self.bars = self.bars, 0
        node = parse(*args)
        self.bars = bars
        self.depth -= 1
        return node

    # -- levels, loosest first
    def answer(self) -> Node:
        node = self.sequence()
        if self.is_op("pmod") or self.is_op("mod", ahead=1) and self.is_op("("):
            node = ("cong", node, self.modulus())
        while self.accept("."):
            pass
        if self.peek()[0] != "end":
            raise _Unreadable("something is left over")
        return node

    def modulus(self) -> Node:
        if self.accept("pmod"):
            return self.argument()
        self.take(), self.take()
        node = self.sum()
        self.expect(")")
        return node

    def sequence(self) -> Node:
        items, joiners = [self.relation()], set()
        while joiner := self.accept(",", ";", "or", "and"):
            while second := self.accept("or", "and"):
                joiner = second
            joiners.add(joiner)
            items.append(self.relation())
        if len(items) == 1:
            return items[0]
        return ("list", "or" if "or" in joiners else ",", tuple(items))

    def relation(self) -> Node:
        self.accept("~")
        parts = [self.definition() or self.sets()]
        while self.is_op(*_RELATIONS) or self.is_op("|") and not self.bars and self.depth == 0:
            operator = self.take()[1]
            parts.append("mid" if operator == "|" else operator)
            parts.append(self.definition() or self.sets())
        return parts[0] if len(parts) == 1 else ("rel", tuple(parts))

    def definition(self) -> Node | None:
        """f(x, y) before an equals sign is a name."""
        inverse = [token[1] for token in self.tokens[self.at + 1:self.at + 6]] == ["^", "{", "-", "1", "}"]
        if self.peek()[0] == "id" and (inverse or self.is_op("(", "_", ahead=1)):
            ahead = 6 if inverse else 1
            while self.peek(ahead)[0] in ("id", "num") or self.is_op("_", "(", ",", "{", "}", ahead=ahead):
                ahead += 1
            if self.is_op(")", ahead=ahead) and self.is_op("=", ahead=ahead + 1):
                words = [self.take()[1] for _ in range(ahead + 1)]
                if "(" in words:
                    return ("sym", "".join(word for word in words if word not in "{}"))
                self.at -= ahead + 1
        return None

    def sets(self) -> Node:
        node = self.sum()
        if infix := self.accept("choose", "over"):
            node = ("fn", "binom", node, self.sum()) if infix == "choose" else ("div", node, self.sum())
        while op := self.accept("cup", "cap", "minus"):
            node = (op, node, self.sum())
        return node

    def sum(self) -> Node:
        op = self.accept("+", "-", "+-", "-+")
        node = self.product()
        node = {"-": ("neg", node), "+-": ("pm", None, node), "-+": ("mp", None, node)}.get(op, node)
        while op := self.accept("+", "-", "+-", "-+"):
            right = ("neg", self.sum_term()) if op == "-" else self.sum_term()
            node = ({"+-": "pm", "-+": "mp"}.get(op, "add"), node, right)
        return node

    def sum_term(self) -> Node:
        if self.accept("-"):
            return ("neg", self.product())
        self.accept("+")
        return self.product()

    def product(self) -> Node:
        node = self.mixed_number() or self.power()
        while True:
            if self.accept("*"):
                node = ("mul", node, self.signed())
            elif self.is_op("/"):
                self.take()
                node = ("div", node, self.denominator())
            elif self.is_op("mod"):
                self.take()
                node = ("fn", "mod", node, self.power())
            elif self.peek()[0] == "text":
                node = self.unit(node)
            elif self.starts_atom():
                if self.peek()[0] == "num" and self.tokens[self.at - 1][0] == "num":
                    raise _Unreadable("two numbers side by side")
                right = self.power()
                node = self.juxtaposed(node, right)
            else:
                return node

    @staticmethod
    def juxtaposed(left: Node, right: Node) -> Node:
        if right[0] == "tuple" and left[0] in ("tuple", "list"):
            return ("list", ",", (*(left[2] if left[0] == "list" else (left,)), right))
        return ("mul", left, right)

    def starts_atom(self) -> bool:
        kind, value, _ = self.peek()
        if kind in ("num", "id", "fn"):
            return True
        if kind != "op" or self.is_op("(") and self.is_op("mod", ahead=1):
            return False
        return value in _STARTS or value == "|" and not self.bars and (self.depth > 0 or self.closing_bar())

    def closing_bar(self) -> bool:
        return any(token[:2] == ("op", "|") for token in self.tokens[self.at + 1:])

    def signed(self) -> Node:
        if self.accept("-"):
            return ("neg", self.signed())
        self.accept("+")
        return self.mixed_number() or self.power()

    def denominator(self) -> Node:
        """t/RC: letters written as one word after a slash are one denominator."""
        node = self.signed()
        while node[0] in ("sym", "mul") and self.peek()[0] == "id" and self.peek()[2]:
            node = ("mul", node, self.power())
        return node

    def mixed_number(self) -> Node | None:
        """1\\frac45 and 1 4/5: an integer before a proper fraction of integers."""
        kind, whole, _ = self.peek()
        if kind != "num" or not whole.isdigit():
            return None
        start = self.at
        self.take()
        over = under = ""
        if self.peek()[:2] == ("fn", "frac"):
            self.take()
            over, under = self.plain_argument(), self.plain_argument()
        elif self.peek()[0] == "num" and self.is_op("/", ahead=1) and self.peek(2)[0] == "num":
            over, under = self.peek()[1], self.peek(2)[1]
            self.at += 3
        if over.isdigit() and under.isdigit() and 0 < int(over) < int(under):
            return _num(Fraction(int(whole)) + Fraction(int(over), int(under)))
        self.at = start
        return None

    def plain_argument(self) -> str:
        """The digits of {12} or of a bare 1; what is not such an argument gives an empty string."""
        if self.is_op("{") and self.peek(1)[0] == "num" and self.is_op("}", ahead=2):
            self.at += 3
            return self.peek(-2)[1]
        self.split_digit()
        return self.take()[1] if self.peek()[0] == "num" else ""

    def split_digit(self) -> None:
        """\\frac12: the arguments are single digits."""
        kind, value, glued = self.peek()
        if kind == "num" and value.isdigit() and len(value) > 1:
            self.tokens[self.at:self.at + 1] = [(kind, value[0], glued), (kind, value[1:], True)]

    def unit(self, node: Node) -> Node:
        """kcal m^{-2} yr^{-1}, square inches, any text."""
        names = []
        while self.peek()[0] == "text" or names and (self.is_op("*") or self.is_op("/")) and self.peek(1)[0] == "text":
            sign = -1 if self.accept("/") else 1
            self.accept("*")
            name = self.take()[1]
            if self.accept("^"):
                power = _constant(self.exponent())
                if power is None:
                    raise _Unreadable("power of a unit")
                sign *= power
            if name.lower() in _COUNTS:
                node = ("mul", node, _num(_COUNTS[name.lower()]))
            elif name.lower() in _NOT_UNITS:
                raise _Unreadable("prose after a value")
            else:
                names.append((name, sign))
        if len(names) > 4:
            raise _Unreadable("prose after a value")
        return ("unit", node, tuple(names)) if names else node

    def power(self) -> Node:
        node = self.postfix(self.atom())
        while True:
            if self.is_op("_") and node[0] == "num":
                self.take()
                node = self.based(node)
            elif self.accept("^"):
                node = self.raised(node)
            elif self.is_op("!", "%", "deg", "'"):
                node = self.postfix(node)
            else:
                return node

    def raised(self, base: Node) -> Node:
        primes = self.primes()
        if primes and base[0] == "sym":
            return ("sym", base[1] + "'" * primes)
        if primes:
            return ("unit", base, (("arcsec" if primes == 2 else "arcmin", 1),))
        exponent = self.exponent()
        if self.is_op("_") and base[0] == "sym" and "_" not in base[1]:
            base = ("sym", base[1] + self.subscript())
        return ("pow", base, exponent)

    def primes(self) -> int:
        """How many \\prime an exponent consists of."""
        ahead, count, braced = 0, 0, self.is_op("{")
        ahead += braced
        while self.peek(ahead)[:2] == ("id", "prime"):
            ahead, count = ahead + 1, count + 1
        if not count or braced and not self.is_op("}", ahead=ahead):
            return 0
        self.at += ahead + braced
        return count

    def exponent(self) -> Node:
        if self.is_op("{", "("):
            return self.nested(self.atom) if not self.is_op("(") else self.nested(self.power)
        if self.accept("-"):
            return ("neg", self.nested(self.exponent))
        self.accept("+")
        if self.peek()[0] == "num":                        # v^2_0: the subscript is not the exponent's
            node = self.number(self.take()[1])
            return ("pow", node, self.nested(self.exponent)) if self.accept("^") else node
        return self.nested(self.power)

    def postfix(self, node: Node) -> Node:
        while op := self.accept("!", "%", "deg", "'"):
            if op == "!" and self.accept("!"):
                node = ("fact2", node)
            elif op == "!":
                node = ("fact", node)
            elif op == "'":
                if node[0] != "sym":
                    raise _Unreadable("prime")
                node = ("sym", node[1] + "'")
            elif op == "deg":
                node = ("deg", node)
                if self.peek()[0] in ("id", "text") and self.peek()[1] in ("C", "F"):
                    node = ("unit", node[1], (("deg" + self.take()[1], 1),))
            else:
                node = ("percent", node)
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise _Unreadable("nested too deeply")
        return node

    def subscript(self) -> str:
        """_{...} as a part of a name."""
        self.expect("_")
        if not self.accept("{"):
            return "_" + str(self.take()[1])
        words, depth = [], 1
        while depth:
            kind, value, _ = self.take()
            if kind == "end":
                raise _Unreadable("subscript")
            depth += (kind, value) == ("op", "{")
            depth -= (kind, value) == ("op", "}")
            words.append(str(value))
        return "_" + "".join(words[:-1])

    def based(self, node: Node) -> Node:
        """52_8: a number in another base."""
        if self.accept("{"):
            kind, value, _ = self.take()
            self.expect("}")
        else:
            kind, value, _ = self.take()
        base = int(value) if kind == "num" and value.isdigit() and len(value) < 3 else _BASES.get(str(value).lower(), 0)
        digits = str(node[1])
        if not 2 <= base <= 36 or node[2] is not None or any(int(digit) >= base for digit in digits):
            raise _Unreadable("base")
        return _num(int(digits, base))

    # -- atoms
    def argument(self) -> Node:
        if self.is_op("{"):
            return self.nested(self.atom)
        self.split_digit()
        if self.accept("-"):
            return ("neg", self.argument())
        return self.nested(self.atom)

    def atom(self) -> Node:
        kind, value, glued = self.take()
        if kind == "num":
            return self.number(value)
        if kind == "id":
            return self.name(value)
        if kind == "text":
            return self.words(value)
        if kind == "fn":
            return self.nested(self.function, value)
        if kind == "op" and value in ("(", "[", "{"):
            return self.nested(self.bracket, value)
        if kind == "op" and value == "{{":
            return self.nested(self.braces)
        if kind == "op" and value in ("|", "lfloor", "lceil"):
            return self.nested(self.bars_group, value)
        if kind == "op" and value == "begin":
            return self.nested(self.matrix)
        if kind == "op" and value in ("pi", "oo"):
            return ("const", value)
        if kind == "op" and value == "empty":
            return ("set", ())
        if kind == "op" and value == "reals":
            return ("tuple", "(", (("neg", ("const", "oo")), ("const", "oo")), ")")
        if kind == "op" and value == "dots":
            return ("dots",)
        raise _Unreadable(f"unexpected {value!r}")

    @staticmethod
    def number(text: str) -> Node:
        if "(" in text:
            head, _, tail = text.rstrip(")").partition("(")
            places = len(head.partition(".")[2])
            return _num(Fraction("0" + head) + Fraction(int(tail), (10 ** len(tail) - 1) * 10 ** places))
        mantissa, _, exponent = text.lower().partition("e")
        whole, point, decimals = mantissa.partition(".")
        digits = len((whole + decimals).lstrip("0")) if point else None
        node = _num(Fraction(_integer(whole + decimals), 10 ** len(decimals)), digits)
        if exponent:
            if len(exponent) > 12:
                raise _Unreadable("exponent")
            node = ("mul", node, ("pow", _num(10), _num(int(exponent))))
        return node

    def name(self, value: str) -> Node:
        if value in ("i", "e") and not self.is_op("_", "'") and value not in self.bound:
            return ("const", value)
        if value == "Delta" and self.peek()[0] == "id":
            value += " " + self.take()[1]
        if self.is_op("_"):
            value += self.subscript()
        if self.is_op("(") and (value in _APPLIED or self.peek(1)[:2] == ("num", "0") and self.is_op(")", ahead=2)):
            value += self.raw_group()
        while self.accept("'"):
            value += "'"
        return ("sym", value)

    def raw_group(self) -> str:
        """(x, y) after the name of a function, as text."""
        words, depth = [], 0
        while True:
            kind, value, _ = self.take()
            if kind == "end":
                raise _Unreadable("unbalanced")
            words.append(str(value))
            depth += (kind, value) == ("op", "(")
            depth -= (kind, value) == ("op", ")")
            if not depth:
                return "".join(words)

    def words(self, first: str) -> Node:
        names = [first]
        while self.peek()[0] == "text":
            names.append(self.take()[1])
        return ("sym", names[0] if len(names) == 1 and len(first) == 1 else "text " + " ".join(names).lower())

    def bracket(self, opening: str) -> Node:
        node = self.sequence()
        closing = self.expect("}") if opening == "{" else self.expect(")", "]")
        items = node[2] if node[0] == "list" else (node,)
        if opening == "{" or len(items) == 1 and (opening, closing) in (("(", ")"), ("[", "]")):
            return node
        if node[0] != "list" or "or" == node[1] or opening + closing in ("(]", "[)") and len(items) != 2:
            raise _Unreadable("bracket")
        return ("tuple", opening, items, closing)

    def braces(self) -> Node:
        if self.accept("}}"):
            return ("set", ())
        end = 1 if not self.is_op("in", ahead=1) else 3 if self.is_op("reals", ahead=2) else 0
        if self.peek()[0] == "id" and end and self.is_op("|", "mid", ":", ahead=end):  # {x | ...}, {x in R : ...}
            self.at += end + 1
            node = self.sequence()
            self.expect("}}")
            return node
        node = self.sequence()
        self.expect("}}")
        return ("set", node[2] if node[0] == "list" else (node,))

    def bars_group(self, opening: str) -> Node:
        self.bars += opening == "|"
        node = self.sum()
        self.expect({"|": "|", "lfloor": "rfloor", "lceil": "rceil"}[opening])
        self.bars -= opening == "|"
        return ("fn", {"|": "abs", "lfloor": "floor", "lceil": "ceil"}[opening], node)

    def matrix(self) -> Node:
        kind = self.take()[1]
        if kind in ("cases", "aligned"):
            return self.system()
        if kind not in ("pmatrix", "bmatrix", "matrix", "vmatrix", "Bmatrix", "smallmatrix", "array"):
            raise _Unreadable("environment")
        if kind == "array":
            self.nested(self.atom)
        rows, row = [], []
        while True:
            if self.is_op("end") and not row:
                break
            row.append(self.sets())
            if self.accept("&"):
                continue
            rows.append(tuple(row))
            row = []
            if not self.accept("row"):
                break
        self.expect("end")
        self.take()
        if not rows or len({len(row) for row in rows}) != 1:
            raise _Unreadable("matrix")
        return ("fn", "det", ("mat", tuple(rows))) if kind == "vmatrix" else ("mat", tuple(rows))

    def system(self) -> Node:
        """The rows of a system of equations, as a list."""
        rows = [self.relation()]
        while self.accept("row", ",", "&"):
            if not self.is_op("end", "row"):
                rows.append(self.relation())
        self.expect("end")
        self.take()
        return ("list", ",", tuple(rows))

    def function(self, name: str) -> Node:
        if name == "frac":
            return ("div", self.argument(), self.argument())
        if name == "binom":
            return ("fn", "binom", self.argument(), self.argument())
        if name == "sqrt":
            return self.root()
        if name in ("sum", "prod"):
            return self.big(name)
        if name == "int":
            return self.integral()
        if name == "lim":
            return self.limit()
        if name == "angle" or name.startswith("accent"):
            return self.decorated(name)
        return self.applied(name)

    def root(self) -> Node:
        index = _num(2)
        if self.is_op("["):
            self.take()
            index = self.sum()
            self.expect("]")
        if not self.is_op("{", "(", "-"):
            return ("root", self.nested(self.atom), index)
        return ("root", self.argument(), index)

    def applied(self, name: str) -> Node:
        base = power = None
        while self.is_op("_", "^"):
            if self.take()[1] == "^":
                power = self.exponent()
            else:
                base = self.argument() if self.is_op("{") else self.nested(self.atom)
        inverse = power == ("neg", _num(1)) and name in ("sin", "cos", "tan", "cot")
        if inverse:
            name, power = "arc" + name, None
        args = self.function_arguments(name)
        node = ("fn", name, *args) if base is None else ("div", ("fn", "ln", *args), ("fn", "ln", base))
        if base is not None and name != "log":
            raise _Unreadable("subscript of a function")
        return node if power is None else ("pow", node, power)

    def function_arguments(self, name: str) -> tuple:
        if self.is_op("{{"):                               # max{a, b}
            return self.atom()[1]
        if self.is_op("(", "{", "["):
            node = self.nested(self.bracket, self.take()[1])
            return node[2] if node[0] in ("tuple", "list") else (node,)
        negative = self.accept("-")
        node = self.power()
        while self.starts_atom() and self.peek()[0] != "fn" and not self.is_op("("):
            node = ("mul", node, self.power())
        if self.peek()[:2] == ("fn", "frac") and node[0] == "num":
            node = ("mul", node, self.power())
        return (("neg", node),) if negative else (node,)

    def decorated(self, name: str) -> Node:
        """\\angle ABC, \\dot{x}, \\overline{AB}: a name."""
        if name != "angle":
            self.tokens.insert(self.at, ("op", "_", True))
            group = self.subscript()[1:]
            return ("sym", name[7:] + " " + group + (self.subscript() if self.is_op("_") else ""))
        words = []
        while self.peek()[0] == "id" or self.is_op("_"):
            words.append(self.subscript() if self.is_op("_") else self.take()[1])
        if not words:
            raise _Unreadable("angle")
        return ("sym", "angle " + "".join(words))

    def bound_name(self) -> str:
        kind, value, _ = self.take()
        if kind != "id":
            raise _Unreadable("bound variable")
        return value

    def big(self, name: str) -> Node:
        self.expect("_")
        self.expect("{")
        variable = self.bound_name()
        self.expect("=")
        low = self.sum()
        self.expect("}")
        self.expect("^")
        high = self.exponent()
        self.bound.append(variable)
        body = self.product()
        self.bound.pop()
        return ("big", name, variable, low, high, body)

    def integral(self) -> Node:
        self.expect("_")
        low = self.argument()
        self.expect("^")
        high = self.exponent()
        start = self.at
        end = next((k for k in range(self.at, len(self.tokens) - 1)
                    if self.tokens[k][:2] == ("id", "d") and self.tokens[k + 1][0] == "id"), None)
        if end is None:
            raise _Unreadable("integral")
        variable = self.tokens[end + 1][1]
        inner = _Parser(self.tokens[start:end] or [("num", "1", True)])
        inner.depth, inner.bound = self.depth, [variable]
        body = inner.answer()
        self.at = end + 2
        return ("int", variable, low, high, body)

    def limit(self) -> Node:
        self.expect("_")
        self.expect("{")
        variable = self.bound_name()
        self.expect("to")
        point = self.sum()
        self.expect("}")
        self.bound.append(variable)
        body = self.product()
        self.bound.pop()
        return ("lim", variable, point, body)


_APPLIED = set("fghFGHPQ")                                 # P(x) is a value of P; n(n+1) is a product
_BASES = {name: index for index, name in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve".split())} | {"sixteen": 16}


def _parse(text: str, as_list: bool = False) -> Node:
    """The tree of an answer. Raises _Unreadable."""
    text = text.strip().rstrip("\\").strip()
    lexer = _Lexer(text, as_list)
    tokens = lexer.run()
    if not tokens:
        raise _Unreadable("empty")
    try:
        node = _Parser(tokens).answer()
    except RecursionError:
        raise _Unreadable("the caller is nested too deeply") from None
    return ("unit", node, (("dollar", 1),)) if lexer.money and node[0] != "unit" else node


# ----------------------------------------------------------------------------------------------------------- the value

_PRECISION, _TOLERANCE = 70, Decimal("1e-40")
_CONTEXT = Context(prec=_PRECISION, Emax=10 ** 12, Emin=-10 ** 12)  # exponents beyond that have no value here
_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803482534211706798")
_INTEGERS = set("jklmnN")
Complex = tuple  # (Decimal, Decimal)
_ZERO, _ONE = Decimal(0), Decimal(1)


def _decimal(value: Fraction) -> Decimal:
    """The nearest decimal, without converting more bits than the precision needs."""
    over, under, shift = value.numerator, value.denominator, 0
    for_over, for_under = max(0, abs(over).bit_length() - 400), max(0, under.bit_length() - 400)
    shift = for_over - for_under
    return Decimal(over >> for_over) / Decimal(under >> for_under) * (Decimal(2) ** shift if shift else 1)


def _lift(value: Fraction | Complex) -> Complex:
    return (_decimal(value), _ZERO) if isinstance(value, Fraction) else value


def _size(value: Complex) -> Decimal:
    re_, im = value
    return abs(re_) if not im else abs(im) if not re_ else (re_ * re_ + im * im).sqrt()


def _times(a: Complex, b: Complex) -> Complex:
    if not a[1] and not b[1]:
        return (a[0] * b[0], _ZERO)
    return (a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0])


def _over(a: Complex, b: Complex) -> Complex:
    if not b[1]:
        return (a[0] / b[0], a[1] / b[0])
    square = b[0] * b[0] + b[1] * b[1]
    re_, im = _times(a, (b[0], -b[1]))
    return (re_ / square, im / square)


def _cos_sin(x: Decimal) -> tuple[Decimal, Decimal]:
    """Taylor series after reduction by 2 pi and seven halvings of the angle."""
    if abs(x) > 10 ** 15:
        raise _Undefined("angle out of reach")
    x = (x - 2 * _PI * (x / (2 * _PI)).to_integral_value()) / 128
    square, term, cos_less_1, sin, k = x * x, x, _ZERO, x, 1
    while abs(term) > Decimal("1e-90"):
        term *= x / (k + 1)
        cos_less_1 += term if k % 4 == 3 else -term
        term *= x / (k + 2)
        sin += term if k % 4 == 3 else -term
        k += 2
        if not square:
            break
    for _ in range(7):                                   # cos 2x - 1 = -2 sin^2 x: no cancellation
        cos_less_1, sin = -2 * sin * sin, 2 * sin * (1 + cos_less_1)
    return 1 + cos_less_1, sin


def _arctan(x: Decimal) -> Decimal:
    for _ in range(4):
        x = x / (1 + (1 + x * x).sqrt())
    square, power, total, k = x * x, x, x, 1
    while abs(power) > Decimal("1e-90"):
        power *= -square
        k += 2
        total += power / k
    return 16 * total


def _angle(value: Complex) -> Decimal:
    re_, im = value
    if not re_:
        return _PI / 2 * (1 if im > 0 else -1) if im else _ZERO
    return _arctan(im / re_) + (0 if re_ > 0 else _PI if im >= 0 else -_PI)


def _exp(z: Complex) -> Complex:
    size = z[0].exp()
    if not z[1]:
        return (size, _ZERO)
    cos, sin = _cos_sin(z[1])
    return (size * cos, size * sin)


def _log(z: Complex) -> Complex:
    return (_size(z).ln(), _angle(z) if z[1] or z[0] < 0 else _ZERO)


def _trigonometric(name: str, x: Decimal) -> Decimal:
    cos, sin = _cos_sin(x)
    over, under = {"sin": (sin, _ONE), "cos": (cos, _ONE), "tan": (sin, cos), "cot": (cos, sin), "sec": (_ONE, cos),
                   "csc": (_ONE, sin)}[name]
    if abs(under) < Decimal("1e-50"):
        raise _Undefined("pole")
    return over / under


def _hyperbolic(name: str, x: Decimal) -> Decimal:
    plus, minus = x.exp(), (-x).exp()
    return {"sinh": (plus - minus) / 2, "cosh": (plus + minus) / 2, "tanh": (plus - minus) / (plus + minus)}[name]


def _inverse(name: str, x: Decimal) -> Decimal:
    if name == "arctan":
        return _arctan(x)
    if name == "arccot":
        return _PI / 2 - _arctan(x)
    if abs(x) > 1:
        raise _Undefined("not real")
    arcsin = _angle(((1 - x * x).sqrt(), x))
    return arcsin if name == "arcsin" else _PI / 2 - arcsin


def _bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()


def _root(value: int, n: int) -> int | None:
    """The exact n-th root of an integer >= 0, None if there is none."""
    if n == 2:
        root = isqrt(value)
    elif value.bit_length() > 2000 or n > 64:
        return None
    else:
        low, high = 0, 1 << value.bit_length() // n + 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if middle ** n <= value else (low, middle - 1)
        root = low
    return root if root ** n == value else None


class _Evaluator:
    """The value of a tree: a Fraction where it is exact, else a complex decimal. env maps names to values.

    After `value`, unreal tells that a root or logarithm left the reals, rounded that an integer was too large to hold,
    and scale bounds the absolute rounding error (in units of 10^-PRECISION) that cancellation may have left."""

    def __init__(self):
        self.degree, self.decimal_log, self.steps = False, False, MAX_STEPS

    def value(self, node: Node, env: dict) -> Fraction | Complex:
        """Raises _Undefined (no value, or out of reach) and _NeedsSympy."""
        self.env, self.unreal, self.rounded, self.scale = env, False, False, _ZERO
        try:
            return self.eval(node)
        except (DecimalException, ArithmeticError, OverflowError, RecursionError) as error:
            raise _Undefined(type(error).__name__) from None

    def eval(self, node: Node) -> Fraction | Complex:
        self.steps -= 1
        if self.steps < 0:
            raise _Undefined("too many steps")
        method = getattr(self, "_" + node[0], None)
        if method is None:
            raise _Undefined(f"{node[0]} has no value")
        return method(*node[1:])

    def real(self, node: Node) -> Fraction | Complex:
        value = self.eval(node)
        if isinstance(value, Fraction):
            return value
        if abs(value[1]) > Decimal("1e-50") * (1 + abs(value[0])):
            raise _Undefined("not real")
        return (value[0], _ZERO)

    def integer(self, node: Node, most: int = 10 ** 6) -> int:
        value = self.eval(node)
        if not isinstance(value, Fraction) or value.denominator != 1 or abs(value) > most:
            raise _Undefined("not a small integer")
        return int(value)

    def sized(self, value: Fraction) -> Fraction | Complex:
        """Exact numbers beyond the cap are rounded."""
        if _bits(value) <= MAX_BITS:
            self.steps -= _bits(value) // 40
            return value
        self.rounded = True
        return _lift(value)

    def _num(self, value, digits):
        return value

    def _sym(self, name):
        if name not in self.env:
            raise _Undefined("unbound")
        return self.env[name]

    def _const(self, name):
        return {"pi": (_PI, _ZERO), "e": (_ONE.exp() if name == "e" else _ONE, _ZERO), "i": (_ZERO, _ONE),
                "oo": (Decimal("Infinity"), _ZERO)}[name]

    def _neg(self, a):
        a = self.eval(a)
        return -a if isinstance(a, Fraction) else (-a[0], -a[1])

    def _add(self, a, b):
        terms = [b]                                      # a long sum leans left: walk down instead of recursing
        while a[0] == "add":
            a, b = a[1:]
            terms.append(b)
        total = self.eval(a)
        for term in reversed(terms):
            total = self.plus(total, self.eval(term))
        return total

    def plus(self, a, b):
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            return self.sized(a + b)
        a, b = _lift(a), _lift(b)
        self.scale = max(self.scale, _size(a), _size(b))
        return (a[0] + b[0], a[1] + b[1])

    def _mul(self, a, b):
        return self.times(self.eval(a), self.eval(b))

    def times(self, a, b):
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            return self.sized(a * b)
        return _times(_lift(a), _lift(b))

    def _div(self, a, b):
        a, b = self.eval(a), self.eval(b)
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            return self.sized(a / b)
        b = _lift(b)
        if _size(b) < self.scale * Decimal("1e-55"):
            raise _Undefined("division by what rounds to zero")
        return _over(_lift(a), b)

    def _pow(self, a, b):
        if a == ("const", "e"):
            return _exp(_lift(self.eval(b)))
        a, b = self.eval(a), self.eval(b)
        if isinstance(b, Fraction):
            return self.power(a, b)
        return _exp(_times(b, self.log(_lift(a))))

    def power(self, a, b: Fraction):
        if isinstance(a, Fraction):
            if b.denominator == 1:
                return self.integer_power(a, int(b))
            roots = [_root(part, b.denominator) for part in (a.numerator, a.denominator) if a >= 0]
            if roots and None not in roots:
                return self.integer_power(Fraction(*roots), b.numerator)
        a = _lift(a)
        self.steps -= 20
        if not a[1] and (a[0] >= 0 or b.denominator == 1):
            return (a[0] ** _decimal(b), _ZERO)
        if b.denominator == 1 and abs(b) <= 64:
            return self.repeated(a, int(b))
        return _exp(_times(_lift(b), self.log(a)))

    @staticmethod
    def repeated(a: Complex, n: int) -> Complex:
        product = (_ONE, _ZERO)
        for _ in range(abs(n)):
            product = _times(product, a)
        return product if n >= 0 else _over((_ONE, _ZERO), product)

    def integer_power(self, a: Fraction, n: int):
        if not a and n <= 0:
            raise _Undefined("0^0")
        if abs(a) in (0, 1):
            return a ** (n % 2 if a < 0 else 1)
        if _bits(a) * abs(n) <= MAX_BITS:
            return self.sized(a ** n)
        self.rounded = True
        return (_decimal(a) ** Decimal(n), _ZERO)

    def log(self, z: Complex) -> Complex:
        if not z[0] and not z[1]:
            raise _Undefined("log 0")
        self.unreal = self.unreal or z[0] < 0 and not z[1]
        self.scale = max(self.scale, _ONE)
        self.steps -= 20
        return _log(z)

    def _root(self, a, n):
        n = self.eval(n)
        if not isinstance(n, Fraction) or n.denominator != 1 or n < 1:
            inverse = _over((_ONE, _ZERO), _lift(n))
            return _exp(_times(inverse, self.log(_lift(self.eval(a)))))
        a = self.eval(a)
        negative = isinstance(a, Fraction) and a < 0 or not isinstance(a, Fraction) and a[0] < 0 and not a[1]
        if negative and n % 2:                           # the cube root of -8 is -2
            root = self.power(-a if isinstance(a, Fraction) else (-a[0], _ZERO), 1 / n)
            return -root if isinstance(root, Fraction) else (-root[0], -root[1])
        return self.power(a, 1 / n)

    def _deg(self, a):
        return self.times(self.eval(a), (_PI / 180, _ZERO)) if self.degree else self.eval(a)

    def _percent(self, a):
        return self.times(self.eval(a), Fraction(1, 100))

    def _fact(self, a):
        n = self.integer(a)
        if n < 0:
            raise _Undefined("factorial")
        if n * max(1.0, log2(n + 1) - 1.45) > MAX_BITS:
            raise _Undefined("factorial out of reach")
        return self.sized(Fraction(factorial(n)))

    def _fact2(self, a):
        n = self.integer(a, 5000)
        product = 1
        for k in range(n, 1, -2):
            product *= k
        return self.sized(Fraction(product))

    def _fn(self, name, *args):
        method = getattr(self, "fn_" + name, None)
        if method:
            return method(*args)
        if len(args) != 1:
            raise _Undefined("number of arguments")
        degrees, self.degree = self.degree, True
        x, im = _lift(self.eval(args[0]))
        self.degree = degrees
        self.scale = max(self.scale, _ONE)
        self.steps -= 20
        if im:
            raise _Undefined("complex argument")
        compute = _inverse if name.startswith("arc") else _hyperbolic if name.endswith("h") else _trigonometric
        return (compute(name, x), _ZERO)

    def fn_exp(self, a):
        return _exp(_lift(self.eval(a)))

    def fn_ln(self, a):
        value = self.eval(a)
        return Fraction(0) if value == 1 else self.log(_lift(value))

    def fn_lg(self, a):
        value = self.eval(a)
        if isinstance(value, Fraction) and value > 0:      # log10 of a power of ten is exact
            size = len(str(max(value.numerator, value.denominator))) - 1 if _bits(value) < 5000 else 0
            for exact in (Fraction(size), Fraction(-size)):
                if Fraction(10) ** int(exact) == value:
                    return exact
        return _over(self.log(_lift(value)), self.log((Decimal(10), _ZERO)))

    def fn_log(self, a):
        return self.fn_lg(a) if self.decimal_log else self.fn_ln(a)

    def fn_abs(self, a):
        value = self.eval(a)
        return abs(value) if isinstance(value, Fraction) else (_size(value), _ZERO)

    def fn_floor(self, a):
        value = self.real(a)
        if isinstance(value, Fraction):
            return Fraction(value.__floor__())
        value = value[0]
        if not abs(value) < Decimal("1e40"):
            raise _Undefined("floor")
        nearest = value.to_integral_value()
        if abs(value - nearest) < Decimal("1e-30"):      # floor(log2 8) is 3
            return Fraction(int(nearest))
        return Fraction(value.__floor__())

    def fn_ceil(self, a):
        return -self.fn_floor(("neg", a))

    def fn_binom(self, n, k):
        n, k = self.integer(n), self.integer(k)
        if k < 0 or n < 0:
            raise _Undefined("binomial")
        if min(k, n - k) * max(1.0, log2(n + 1)) > MAX_BITS:
            raise _Undefined("binomial out of reach")
        return self.sized(Fraction(comb(n, k)))

    def fn_mod(self, a, b):
        a, b = self.eval(a), self.eval(b)
        if not isinstance(a, Fraction) or not isinstance(b, Fraction):
            raise _Undefined("mod")
        return a % b

    def fn_gcd(self, *args):
        return Fraction(gcd(*(self.integer(arg, 10 ** 30) for arg in args)))

    def fn_lcm(self, *args):
        return self.sized(Fraction(lcm(*(self.integer(arg, 10 ** 30) for arg in args))))

    def fn_min(self, *args):
        return min((self.real(arg) for arg in args), key=lambda value: _lift(value)[0])

    def fn_max(self, *args):
        return max((self.real(arg) for arg in args), key=lambda value: _lift(value)[0])

    def fn_det(self, matrix):
        rows = matrix[1]
        if len(rows) != len(rows[0]) or len(rows) > 5:
            raise _Undefined("determinant")
        return self.determinant([[self.eval(cell) for cell in row] for row in rows])

    def determinant(self, rows):
        if len(rows) == 1:
            return rows[0][0]
        total = Fraction(0)
        for column, cell in enumerate(rows[0]):
            minor = self.determinant([row[:column] + row[column + 1:] for row in rows[1:]])
            total = self.plus(total, self.times(self.times(cell, Fraction((-1) ** column)), minor))
        return total

    def _big(self, kind, name, low, high, body):
        if high == ("const", "oo"):
            if kind == "sum":
                return self.series(name, low, body)
            return self.symbolic(("big", kind, name, low, high, body))
        low, high = self.integer(low, 10 ** 12), self.integer(high, 10 ** 12)
        if (high - low) * 3 > self.steps:
            return self.symbolic(("big", kind, name, _num(low), _num(high), body))
        total, outer = Fraction(kind == "prod"), self.env
        for k in range(low, high + 1):
            self.env = outer | {name: Fraction(k)}
            total = (self.times if kind == "prod" else self.plus)(total, self.eval(body))
        self.env = outer
        return total

    def series(self, name, low, body):
        """An infinite sum term by term, if its terms fall fast enough to bound the rest by a geometric series."""
        start, total, sizes, outer = self.integer(low), (_ZERO, _ZERO), [], self.env
        for k in range(start, start + 300):
            self.env = outer | {name: Fraction(k)}
            term = _lift(self.eval(body))
            total = self.plus(total, term)
            sizes.append(_size(term))
            ratios = [b / a if a else _ONE for a, b in zip(sizes[-6:], sizes[-5:])]
            if len(sizes) > 8 and max(ratios) < Decimal("0.7") and sizes[-1] < Decimal("1e-60"):
                break
        self.env = outer
        if len(sizes) < 300:
            return total
        return self.symbolic(("big", "sum", name, low, ("const", "oo"), body))

    def _int(self, *node):
        return self.symbolic(("int", *node))

    def _lim(self, *node):
        return self.symbolic(("lim", *node))

    def symbolic(self, node: Node) -> Complex:
        if not _IN_WORKER:
            raise _NeedsSympy
        re_, im = _sympy_value(node, self.env)
        self.scale = max(self.scale, _ONE)
        return (Decimal(re_), Decimal(im))


def _walk(node: Node):
    """Every tuple of a tree that is a node, without recursion."""
    stack = [node]
    while stack:
        node = stack.pop()
        if node and isinstance(node[0], str):
            yield node
        stack.extend(part for part in node if isinstance(part, tuple))


def _has(node: Node, *kinds: str) -> bool:
    return any(part[0] in kinds or part[0] in ("fn", "const") and part[1] in kinds for part in _walk(node))


def _names(*nodes: Node) -> list[str]:
    parts = [part for node in nodes for part in _walk(node)]
    bound = {part[2] for part in parts if part[0] == "big"} | {part[1] for part in parts if part[0] in ("int", "lim")}
    return sorted({part[1] for part in parts if part[0] == "sym"} - bound)


# ----------------------------------------------------------------------------------------------------- what was stated
#
# _settle turns relations and plus-minus signs into what they state: ("list", joiner, items), ("assign", name, value),
# ("chain", parts), ("record", ((name, value)...)), ("eq", a, b), ("less", ((a, strict, b)...)), ("noteq", a, b),
# ("equiv", a, b), or what it was before.


def _variants(node: Node) -> list[Node]:
    """The values of an expression with plus-minus signs: independent signs, unless a minus-plus ties them together."""
    signs = [part[0] for part in _walk(node) if part[0] in ("pm", "mp")]
    if not signs:
        return [node]
    if len(signs) > 4:
        raise _Unreadable("too many plus-minus signs")
    choices = itertools.product((1, -1), repeat=len(signs))
    if "mp" in signs:
        choices = [(1,) * len(signs), (-1,) * len(signs)]
    return [_signed(node, iter(choice)) for choice in choices]


def _signed(node: Node, choice) -> Node:
    if node[0] in ("pm", "mp"):
        sign = next(choice) * (1 if node[0] == "pm" else -1)
        left = node[1] and _signed(node[1], choice)
        right = _signed(node[2], choice)
        right = right if sign > 0 else ("neg", right)
        return ("add", left, right) if left else right
    return tuple(_signed(part, choice) if isinstance(part, tuple) else part for part in node)


def _settle(node: Node) -> Node:
    if node[0] == "list":
        return _settle_list(node[1], node[2])
    if node[0] == "set":
        items = _settle_list(",", node[1]) if node[1] else ("list", ",", ())
        return ("set", items[2] if items[0] == "list" else (items,))
    if node[0] == "cong":
        return node
    if node[0] in ("cup", "cap", "minus"):
        return (node[0], _settle(node[1]), _settle(node[2]))
    variants = _variants(node)
    if len(variants) > 1:
        return _settle_list("or", variants)
    if node[0] == "rel":
        return _settle_relation(node[1])
    if node[0] == "unit" and node[1][0] in ("rel", "list"):
        return _settle(node[1])
    return node


def _settle_list(joiner: str, nodes) -> Node:
    items = []
    for node in map(_settle, (node for node in nodes if not _is_condition(node))):
        items += node[2] if node[0] == "list" else (node,)
    named = [item for item in items if item[0] == "assign"]
    names = {item[1] for item in named}
    if len(named) == len(items) > 1 and len(names) == len(items):
        return ("record", tuple(item[1:] for item in items))
    if len(names) == 1 and (len(named) == len(items) or items[0] == named[0] and len(named) == 1):
        items = [item[2] if item[0] == "assign" else item for item in items]
    return items[0] if len(items) == 1 else ("list", joiner, tuple(items))


def _is_condition(node: Node) -> bool:
    """k in Z, after a comma."""
    return node[0] == "rel" and node[1][1] == "in" and node[1][2][0] == "sym" and node[1][2][1].startswith("set ")


def _is_name(node: Node) -> bool:
    if node[0] == "div":                                 # dy/dx
        return all(part[:2] == ("mul", ("sym", "d")) for part in node[1:])
    if node[0] == "mul":                                 # a segment: AB
        return all(part[0] == "sym" and part[1][0].isupper() for part in node[1:])
    return node[0] == "sym" and not node[1].startswith("text") or node[0] == "tuple" and all(map(_is_name, node[2]))


def _is_distance(node: Node) -> bool:
    return node[:2] == ("fn", "abs") and len(_names(node)) == 1


def _settle_relation(parts: tuple) -> Node:
    operands, operators = parts[::2], set(parts[1::2])
    if "~" in operators:
        first = parts.index("~")
        if first == 1 and _is_name(parts[0]):
            return _settle_relation(tuple("=" if part == "~" else part for part in parts))
        return _settle(parts[0]) if first == 1 else _settle_relation(parts[:first])
    if operators == {"="}:
        return _settle_equation(operands)
    if operators <= {"<", "<=", ">", ">="}:
        pairs = tuple(_less(*parts[k:k + 3]) for k in range(0, len(parts) - 2, 2))
        return ("less", pairs[::-1] if operators <= {">", ">="} else pairs)
    if operators == {":"}:
        return ("tuple", ":", tuple(operands), ":")
    if len(operands) > 2 or "in" in operators and not _is_name(operands[0]):
        raise _Unreadable("mixed relations")
    left, right = operands
    return {"in": _settle(right), "!=": ("noteq", left, right), "equiv": ("equiv", left, right),
            "mid": ("cong", ("rel", (right, "equiv", _num(0))), left)}[operators.pop()]


def _less(left: Node, operator: str, right: Node) -> Node:
    return (left, operator in "<>", right) if operator[0] == "<" else (right, operator in "<>", left)


def _settle_equation(operands: tuple) -> Node:
    first, last = operands[0], operands[-1]
    if _is_name(first):
        return _settle_named(first, last if len(operands) == 2 else ("chain", operands[1:]))
    if len(operands) == 2 and _is_name(last):
        return _settle_named(last, first)
    if all(operand[0] == "num" for operand in operands):
        raise _Unreadable("a tautology or a contradiction")
    if not _names(*operands):
        return ("chain", operands)
    if len(operands) == 2:
        return ("eq", first, last)
    return ("chain", operands)


def _settle_named(name: Node, value: Node) -> Node:
    if name[0] == "tuple" and value[0] == "tuple" and len(name[2]) == len(value[2]):
        return ("record", tuple(zip(name[2], value[2])))
    return ("eq", name, value) if name in _walk(value) else ("assign", name, value)


# --------------------------------------------------------------------------------------------------------- the verdict


def _kind(node: Node) -> str:
    """What decides how a settled tree is compared."""
    inequalities = node[0] == "list" and any(item[0] in ("less", "noteq") for item in node[2])
    if inequalities or node[0] in ("less", "noteq", "cup", "cap", "minus"):
        return "region"
    return "mat" if _as_matrix(node) else node[0]


class _Judge:
    """Compares two settled trees. One judge per answer: its evaluator's step budget bounds the whole comparison."""

    def __init__(self):
        self.evaluator = _Evaluator()

    def same(self, a: Node, b: Node) -> bool:
        if a == b:
            return True
        compare = {"chain": self.chain, "assign": self.assigned, "cong": self.congruence, "record": self.record,
                   "eq": self.equation, "region": self.region, "unit": self.unit, "set": self.listed,
                   "list": self.listed, "tuple": self.tuple, "mat": self.matrix, "dots": self.never}
        kinds = [_kind(a), _kind(b)]
        for kind, method in compare.items():             # in this order: the first kind that either has decides
            if kind in kinds:
                return method(a, b) if kinds[0] == kind else method(b, a)
        return self.same_expression(a, b)

    def never(self, a, b):
        return False

    def chain(self, a, b):
        """sqrt(4) = 2: the last value counts, if the others do not contradict it."""
        last = a[1][-1]
        if not all(self.same_or_unknown(part, last) for part in a[1][:-1]):
            return False
        return self.same(_settle(last), b)

    def same_or_unknown(self, a, b):
        try:
            return bool(_names(a)) != bool(_names(b)) or _has(a, "lim", "int", "big", "dots") or self.same(a, b)
        except _Undefined:
            return False

    def congruence(self, a, b):
        if b[0] != "cong":
            return False
        (modulus, left, residues), (modulus2, left2, residues2) = self.residues(a), self.residues(b)
        return (modulus, residues) == (modulus2, residues2) and (None in (left, left2) or self.same(left, left2))

    def residues(self, node):
        modulus = self.exact(node[2])
        listed = _settle(node[1])
        items = listed[2] if listed[0] == "list" else (listed,)
        left = next((item[1] for item in items if item[0] == "equiv"), None)
        return modulus, left, {self.exact(item[2] if item[0] == "equiv" else item) % modulus for item in items}

    def exact(self, node) -> Fraction:
        value = self.evaluator.value(node, {})
        if not isinstance(value, Fraction):
            raise _Undefined("not rational")
        return value

    def assigned(self, a, b):
        if b[0] == "assign":
            names = {a[1][1], b[1][1]}
            if len(names) == 1 or "y" in names and any("(" in name for name in names if isinstance(name, str)):
                return self.same(_settle(a[2]), _settle(b[2]))
            return self.proportional(*a[1:], *b[1:])
        if b[0] == "eq":
            return self.proportional(*a[1:], *b[1:])
        return b[0] not in ("record", "less", "noteq") and self.same(_settle(a[2]), b)

    def record(self, a, b):
        values = [_settle(value) for _, value in a[1]]
        if b[0] == "record":
            left, right = dict(a[1]), dict(b[1])
            return left.keys() == right.keys() and all(
                self.same(_settle(left[name]), _settle(right[name])) for name in left)
        if b[0] == "list" and len({str(name[1]).partition("_")[0] for name, _ in a[1]}) == 1:
            return self.listed(("list", ",", values), b)  # x_1 = 2, x_2 = 3: roots, in any order
        if b[0] != "list" and b[:2] != ("tuple", "("):
            return False
        return len(values) == len(b[2]) and all(self.same(value, _settle(item)) for value, item in zip(values, b[2]))

    def equation(self, a, b):
        return b[0] in ("eq", "assign") and self.proportional(*a[1:], *b[1:])

    def proportional(self, left, right, left2, right2, positive: bool = False) -> bool:
        """left - right = c (left2 - right2) with a constant c not 0, at random points."""
        first, second, pairs = ("add", left, ("neg", right)), ("add", left2, ("neg", right2)), []
        for f, g in self.samples(first, second):
            f, g = _lift(f), _lift(g)
            small = Decimal("1e-35")
            if _size(f) < small or _size(g) < small or positive and (f[0] > 0) != (g[0] > 0):
                return False
            pairs.append(_over(f, g))
            if not self.close(pairs[0], pairs[-1]):
                return False
        return self.sampled > 2

    # -- collections
    def listed(self, a, b):
        if b[0] not in ("list", "set"):
            return a[0] == "set" and len(a[1]) == 1 and self.same(a[1][0], b)
        left, right = (node[1] if node[0] == "set" else node[2] for node in (a, b))
        as_lists = a[0] == b[0] == "list"
        if as_lists and len(left) != len(right):
            return False
        if max(len(left), len(right)) > MAX_LIST:
            return Counter(left) == Counter(right)
        return self.matched(left, right, as_lists)

    def matched(self, left, right, once: bool) -> bool:
        remaining = list(right)
        for item in left:
            partner = next((other for other in remaining if self.same(_settle(item), _settle(other))), None)
            if partner is None:
                return False
            if once:
                remaining.remove(partner)
        return once or all(any(self.same(_settle(item), _settle(other)) for item in left) for other in right)

    def tuple(self, a, b):
        if b[0] != "tuple":
            return a[1] == ":" and len(a[2]) == 2 and self.same(("div", *a[2]), b)
        if a[1] == ":" == b[1] and len(a[2]) == len(b[2]) and _num(0) not in a[2] + b[2]:
            return all(self.same(("mul", x, b[2][0]), ("mul", y, a[2][0])) for x, y in zip(a[2], b[2]))
        return (a[1], a[3], len(a[2])) == (b[1], b[3], len(b[2])) and all(
            self.same(_settle(x), _settle(y)) for x, y in zip(a[2], b[2]))

    def matrix(self, a, b):
        left, right = _as_matrix(a), _as_matrix(b)
        if left is None or right is None or len(left) != len(right) or len(left[0]) != len(right[0]):
            return False
        return all(self.same(x, y) for row, row2 in zip(left, right) for x, y in zip(row, row2))

    # -- the real line
    def region(self, a, b):
        """Sets of reals: equal if they agree at every end point of either, between them and beyond them."""
        try:
            ends = sorted({end for node in (a, b) for end in self.ends(node)})
        except (_Undefined, _Unreadable):
            return self.symbolic_region(a, b)
        probes = ends + [(x + y) / 2 for x, y in zip(ends, ends[1:])]
        probes += [ends[0] - 1, ends[-1] + 1] if ends else [_ZERO]
        return all(self.contains(a, x) == self.contains(b, x) for x in probes)

    def number(self, node) -> Decimal:
        """A real constant, to 40 digits so that equal ones are equal."""
        value = _lift(self.evaluator.value(node, {}))
        if value[1]:
            raise _Undefined("not real")
        return Context(prec=40).plus(value[0]) if abs(value[0]) > Decimal("1e-40") else _ZERO

    def ends(self, node) -> list[Decimal]:
        if node[0] == "tuple" and len(node[2]) == 2 and node[1] in "([":
            parts = node[2]
        elif node[0] == "set":
            parts = node[1]
        elif node[0] == "list":
            return [end for item in node[2] for end in self.ends(item)]
        elif node[0] in ("cup", "cap", "minus"):
            return self.ends(node[1]) + self.ends(node[2])
        elif node[0] == "less":
            if len(_names(node)) != 1:
                raise _Undefined("not one variable")
            sides = [part for pair in node[1] for part in (pair[0], pair[2])]
            distance = next(filter(_is_distance, sides), None)
            parts = [part for part in sides if not _is_name(part) and not _is_distance(part)]
            if distance:
                return [end for part in parts for end in self.reached(distance[2], part)]
        elif node[0] == "noteq" and _is_name(node[1]):
            parts = node[2:]
        else:
            raise _Undefined("no set of reals")
        return [end for end in map(self.number, parts) if end.is_finite()]

    def reached(self, inside, part) -> list[Decimal]:
        """Where |mx + c| equals a constant."""
        name, distance = _names(inside)[0], self.number(part)
        at = [_lift(self.evaluator.value(inside, {name: Fraction(x)}))[0] for x in (0, 1, 2)]
        if at[2] - at[1] != at[1] - at[0] or at[1] == at[0]:
            raise _Undefined("not linear")
        return [Context(prec=40).plus((side - at[0]) / (at[1] - at[0])) for side in (distance, -distance)]

    def side(self, node, x: Decimal) -> Decimal:
        """A side of an inequality in one variable, at x."""
        if _is_name(node):
            return x
        if not _is_distance(node):
            return self.number(node)
        value = self.evaluator.value(node, {_names(node)[0]: (x, _ZERO)})
        return Context(prec=40).plus(_lift(value)[0])

    def contains(self, node, x: Decimal) -> bool:
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
        if kind == "list":
            inside = [self.contains(item, x) for item in node[2]]
            conditions = node[1] != "or" and all(item[0] in ("less", "noteq") for item in node[2])
            return all(inside) if conditions else any(inside)
        left, right = (self.contains(part, x) for part in node[1:])
        return {"cup": left or right, "cap": left and right, "minus": left and not right}[kind]

    def symbolic_region(self, a, b):
        """Intervals and inequalities with letters: the same shape with the same ends, or the same difference."""
        if a[0] == b[0] == "noteq":
            return self.proportional(*a[1:], *b[1:])
        if a[0] == b[0] == "less" and len(a[1]) == len(b[1]):
            return all(x[1] == y[1] and self.proportional(x[0], x[2], y[0], y[2], positive=True)
                       for x, y in zip(a[1], b[1]))
        left, right = _intervals(a), _intervals(b)
        return bool(left and right) and self.matched(left, right, once=True)

    # -- values
    def unit(self, a, b):
        if b[0] != "unit":
            spelt = ("mul", a[1], ("sym", a[2][0][0]))     # 5 m, where m could be a letter
            return self.same(a[1], b) or len(a[2]) == 1 and bool(_names(b)) and self.same_expression(spelt, b)
        left, right = _unit(a[2]), _unit(b[2])
        if left is None or right is None:
            return self.same(a[1], b[1])
        scaled = (node[1] if factor == 1 else ("mul", _num(factor), node[1])
                  for node, (_, factor) in ((a, left), (b, right)))
        return left[0] == right[0] and self.same(*scaled)

    def same_expression(self, a, b):
        (left, percent), (right, percent2) = _without_percent(a), _without_percent(b)
        if percent != percent2:
            plain, other = (left, right) if percent else (right, left)
            return self.same_value(plain, other) or self.same_value(("div", plain, _num(100)), other)
        readings = [(False, False)]
        if _has(left, "deg") != _has(right, "deg"):
            readings.append((True, False))
        if _has(left, "log") or _has(right, "log"):
            readings.append((False, True))
        return any(self.same_value(left, right, *reading) for reading in readings)

    def same_value(self, a, b, degree=False, decimal_log=False):
        self.evaluator.degree, self.evaluator.decimal_log = degree, decimal_log
        if not _names(a, b):
            return self.same_number(a, b)
        return all(self.close(x, y, scale) for x, y, scale in self.samples(a, b, scaled=True)) and self.sampled > 2

    def same_number(self, a, b):
        try:
            x, big = self.evaluator.value(a, {}), self.evaluator.rounded
            scale = self.evaluator.scale
            y, big2 = self.evaluator.value(b, {}), self.evaluator.rounded
        except _Undefined:
            return False
        if isinstance(x, Fraction) and isinstance(y, Fraction) and x == y:
            return True
        if self.close(x, y, max(scale, self.evaluator.scale)):
            return not (big or big2)
        return _rounds_to(a, b, y) or _rounds_to(b, a, x)

    @staticmethod
    def close(x, y, scale=_ZERO) -> bool:
        if isinstance(x, Fraction) and isinstance(y, Fraction):
            return x == y
        x, y = _lift(x), _lift(y)
        if not (x[0].is_finite() and y[0].is_finite()):
            return x == y
        difference = _size((x[0] - y[0], x[1] - y[1]))
        noise = scale * Decimal("1e-45")                   # what cancellation leaves
        return difference <= _TOLERANCE * max(_size(x), _size(y)) or difference <= noise < Decimal("1e-30")

    def samples(self, a, b, scaled: bool = False):
        """Values of both at random points where both have one; where nothing leaves the reals, if possible."""
        names, rng, both = _names(a, b), random.Random(0), ("list", a, b)
        coarse = _has(both, "floor", "ceil", "mod") or all(name[0] in _INTEGERS for name in names)
        wanted, self.sampled = (20 if coarse else 6), 0
        complex_allowed = _has(both, "i")
        for allowed in ([True] if complex_allowed else [False, True]):
            for attempt in range(3 * wanted):
                env = {name: _sample(name, rng, attempt >> min(k, 2) & 1) for k, name in enumerate(names)}
                try:
                    x, unreal, scale = self.evaluator.value(a, env), self.evaluator.unreal, self.evaluator.scale
                    y = self.evaluator.value(b, env)
                except _Undefined:
                    continue
                if (unreal or self.evaluator.unreal) and not allowed:
                    continue
                self.sampled += 1
                yield (x, y, max(scale, self.evaluator.scale)) if scaled else (x, y)
                if self.sampled == wanted:
                    return
            if self.sampled:
                return


def _sample(name: str, rng: random.Random, negative: int) -> Fraction:
    if name[0] in _INTEGERS:
        return Fraction(rng.randint(1, 20))
    value = Fraction(rng.randint(300, 3000), 1009)
    return -value if negative and name[0] in "xyz" else value


def _without_percent(node: Node) -> tuple[Node, bool]:
    if node[0] == "neg" and node[1][0] == "percent":
        return ("neg", node[1][1]), True
    return (node[1], True) if node[0] == "percent" else (node, False)


def _literal(node: Node) -> tuple[Fraction, int] | None:
    """(value, significant digits) of a decimal as written, also times a power of ten."""
    if node[0] == "neg" and (inner := _literal(node[1])):
        return -inner[0], inner[1]
    if node[0] == "num" and node[2]:
        return node[1], node[2]
    if node[0] == "mul" and node[1][0] == "num" and node[1][2] and node[2][:2] == ("pow", _num(10)):
        exponent = _constant(node[2][2])
        if exponent is not None and abs(exponent) < 400 and exponent.denominator == 1:
            return node[1][1] * Fraction(10) ** int(exponent), node[1][2]
    return None


def _rounds_to(decimal: Node, other: Node, value) -> bool:
    """The rule for decimals of ten and more significant digits (see the top of this file)."""
    found = _literal(decimal)
    if not found or found[1] < 10 or _literal(other) or other[0] == "num" and other[1].denominator == 1:
        return False
    written, digits = found
    exact = _lift(value)
    if exact[1] or not exact[0].is_finite() or not written:
        return False
    place = Decimal(10) ** (_decimal(abs(written)).adjusted() - digits + 1)
    shorter = Context(prec=digits).plus(exact[0]) == exact[0]
    allowed = max(place, abs(exact[0]) * Decimal("4e-16") if digits > 14 else _ZERO)
    return not shorter and abs(_decimal(written) - exact[0]) <= allowed


def _unit(names: tuple) -> tuple[dict, Fraction] | None:
    """({dimension: power}, factor) of a product of units; None for "units", "square units", which say nothing."""
    dimensions, factor, power_of_next = {}, Fraction(1), 1
    for name, power in itertools.chain.from_iterable(_SPEEDS.get(name, ((name, power),)) for name, power in names):
        if name.lower() in ("square", "sq", "cubic"):
            power_of_next = 3 if name.lower() == "cubic" else 2
            continue
        singular = name if name in _UNITS else name.lower().removesuffix("s")
        power, power_of_next = int(power) * power_of_next, 1
        dimension, scale = _UNITS.get(singular, ("named " + singular, Fraction(1)))
        if dimension != "named unit":
            dimensions[dimension if dimension != "other" else singular] = dimensions.get(dimension, 0) + power
            factor *= scale ** max(-9, min(9, power))
    return (dimensions, factor) if dimensions else None


def _as_matrix(node: Node) -> tuple | None:
    """The rows of a matrix, also of a multiple of one."""
    if node[0] == "mat":
        return node[1]
    if node[0] == "neg" and (rows := _as_matrix(node[1])):
        return tuple(tuple(("neg", cell) for cell in row) for row in rows)
    if node[0] in ("mul", "div"):
        for scalar, matrix in ((node[2], node[1]), (node[1], node[2]))[:1 if node[0] == "div" else 2]:
            rows = _as_matrix(matrix)
            if rows and not _has(scalar, "mat"):
                return tuple(tuple((node[0], cell, scalar) for cell in row) for row in rows)
    return None


def _intervals(node: Node) -> list[Node] | None:
    """Intervals with letters in their ends, as tuples."""
    infinity = ("const", "oo")
    if node[0] == "tuple":
        return [node]
    if node[0] == "cup":
        left, right = _intervals(node[1]), _intervals(node[2])
        return left + right if left and right else None
    if node[0] == "list":
        parts = [_intervals(item) for item in node[2]]
        return None if None in parts else [part for group in parts for part in group]
    if node[0] != "less":
        return None
    if len(node[1]) == 1:
        left, strict, right = node[1][0]
        if _is_name(left):
            return [("tuple", "(", (("neg", infinity), right), ")" if strict else "]")]
        return [("tuple", "(" if strict else "[", (left, infinity), ")")] if _is_name(right) else None
    pairs = node[1] if node[1][0][2] == node[1][1][0] else node[1][::-1]
    if len(pairs) != 2 or pairs[0][2] != pairs[1][0] or not _is_name(pairs[0][2]):
        return None
    return [("tuple", "(" if pairs[0][1] else "[", (pairs[0][0], pairs[1][2]), ")" if pairs[1][1] else "]")]


# ---------------------------------------------------------------------------------------------------------- the grades

_INTEGER = re.compile(r"-?\d{1,18}")
_cached_parse = lru_cache(maxsize=2048)(_parse)


def _tree(text: str, as_list: bool = False) -> Node:
    return _cached_parse(text, as_list) if len(text) < 300 else _parse(text, as_list)


def _squash(text: str) -> str:
    """The text without the spaces that mean nothing: 1 1/2 is not 11/2."""
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text.replace("$", " ")).strip(" .")


_MARKUP = r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)(?![a-z])"
_CHOICE = re.compile(rf"(?:{_MARKUP}\s*\{{)?\s*(?:option|choice)?\s*\(?(?-i:([A-J]))"
                     r"(?:[).:]\s*\}?(?:\\?[ ,~].*)?|\}?)",
                     re.IGNORECASE | re.DOTALL)


def _prose(text: str) -> str | None:
    """The letters of an answer that consists of words, None if it does not."""
    text = re.sub(_MARKUP + r"|[\s{}()$~]", "", text).rstrip(".")
    return text if text.isalpha() else None


def _same_choice(a: str, b: str) -> bool:
    """C and \\textbf{(C)}\\ 12: one of them must be nothing but the letter."""
    found, other = _CHOICE.fullmatch(a), _CHOICE.fullmatch(b)
    return bool(found and other) and found[1] == other[1] and found[1] in (_prose(a), _prose(b))


def _same_prose(a: str, b: str) -> bool:
    a, b = _prose(a), _prose(b)
    if not a or not b or a == b:
        return bool(a) and a == b
    return len(a) > 2 and a.lower() == b.lower() and {a.isupper(), b.isupper()} == {False}


def _decide(answer: str, gold: str) -> bool:
    """Whether two answers are equal. Raises _NeedsSympy."""
    if _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(gold):
        return int(answer) == int(gold)
    if not _squash(answer) or not _squash(gold):
        return False
    if _squash(answer) == _squash(gold) or max(len(answer), len(gold)) < 500 and _same_prose(answer, gold):
        return True
    if _same_choice(answer[:500], gold[:500]):
        return True
    try:
        left, right = _tree(answer), _tree(gold)
        if (left[0] == "list") != (right[0] == "list"):
            left, right = _tree(answer, left[0] != "list"), _tree(gold, right[0] != "list")
        with localcontext(_CONTEXT):
            return _Judge().same(_settle(right), _settle(left))
    except (_Unreadable, ArithmeticError, RecursionError):
        return False


def _golds(gold) -> list[str]:
    if isinstance(gold, (list, tuple)):
        return [text for one in gold for text in _golds(one)]
    if gold is None or gold != gold:                     # None, NaN
        return []
    if not isinstance(gold, str):
        return [str(gold)]
    return [inner if (inner := final_answer(gold)) is not None else gold]


def grade(response: str, gold) -> bool:
    """True if the last closed \\boxed{} of the response equals the gold (str, int, float), or any of a list of them."""
    answer = final_answer(response)
    return answer is not None and _matches(answer.strip(), gold)


def _matches(answer: str, gold, patience: float = 0.0) -> bool:
    undecided = []
    for one in _golds(gold):
        try:
            if _decide(answer, one.strip()):
                return True
        except _NeedsSympy:
            undecided.append(one)
    reply = _ask_worker(answer, undecided, patience) if undecided else None
    return reply is not None and reply[1] == 1.0


def score(response: str, gold) -> tuple[float, float]:
    """(format, accuracy), each 0.0 or 1.0. Format: a closed, non-empty box whose content parses."""
    return _score((final_answer(response) or "").strip(), gold)


def _score(answer: str, gold, patience: float = 0.0) -> tuple[float, float]:
    return (float(_readable(answer)), float(_matches(answer, gold, patience))) if answer else (0.0, 0.0)


def _readable(answer: str) -> bool:
    if _INTEGER.fullmatch(answer) or _prose(answer[:500]):
        return True
    try:
        return bool(_tree(answer))
    except _Unreadable:
        return False


def score_all(responses: list[str], golds: list) -> list[tuple[float, float]]:
    """score of each pair, in order. Long lists are spread over the cores, except for what is quicker done than sent.

    Unlike `score` it waits for a worker that is still starting or gets little processor time, so that a run's rewards
    do not depend on what else the machine is doing; the worker's own limit, CLOCK seconds of processor time, holds all
    the same.
    """
    if len(responses) != len(golds):
        raise ValueError(f"{len(responses)} responses for {len(golds)} golds")
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    answers = [(final_answer(response) or "").strip() for response in responses]
    hard = [k for k, answer in enumerate(answers) if 0 < len(answer) <= MAX_TEXT and not _INTEGER.fullmatch(answer)]
    scores = {}
    if cores > 1 and len(hard) >= WORTH_SPREADING:
        with ThreadPoolExecutor(cores) as threads:
            replies = threads.map(lambda k: _ask_worker(answers[k], _golds(golds[k]), PATIENCE), hard)
            scores = {k: tuple(reply or (float(_readable(answers[k])), 0.0)) for k, reply in zip(hard, replies)}
    return [scores.get(k) or _score(answer, golds[k], PATIENCE) for k, answer in enumerate(answers)]


# ---------------------------------------------------------------------------------------------------------- the worker
#
# A separate Python process: a JSON line [answer, golds] in, a JSON line [format, accuracy] out. It imports sympy,
# limits its own memory and processor time, and ends when its standard input closes, so that it does not outlive its
# parent. An answer that needs it while it is still starting, or for longer than CLOCK, counts as wrong.


class _Worker:
    def __init__(self):
        self.process = subprocess.Popen([sys.executable, os.path.abspath(__file__), "--worker"], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0)
        self.ready, self.buffer = False, b""

    def starts(self, deadline: float) -> bool:
        self.ready = self.ready or self.line(deadline) == b"ready"
        return self.ready

    def ask(self, request: list, deadline: float) -> list | None:
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
        except OSError:                                  # it has ended
            return None
        line = self.line(deadline)
        return json.loads(line) if line else None

    def line(self, deadline: float) -> bytes | None:
        poll = select.poll()
        poll.register(self.process.stdout, select.POLLIN)
        while b"\n" not in self.buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                return None
            chunk = os.read(self.process.stdout.fileno(), 65536)
            if not chunk:
                return None
            self.buffer += chunk
        line, self.buffer = self.buffer.split(b"\n", 1)
        return line

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


_idle: queue.LifoQueue = queue.LifoQueue()
_slots = threading.BoundedSemaphore(os.cpu_count() or 1)


def _forget_workers() -> None:
    """A forked child must not talk to its parent's workers."""
    global _idle, _slots
    _idle, _slots = queue.LifoQueue(), threading.BoundedSemaphore(os.cpu_count() or 1)


def _end_workers() -> None:
    while not _idle.empty():
        _idle.get().end()


os.register_at_fork(after_in_child=_forget_workers)
atexit.register(_end_workers)


def _ask_worker(answer: str, golds: list[str], patience: float = 0.0) -> list | None:
    """[format, accuracy] as a worker sees it, None without an answer in CLOCK seconds (plus patience)."""
    deadline, slots = time.monotonic() + CLOCK, _slots
    if not slots.acquire(timeout=CLOCK + patience):
        return None
    try:
        try:
            worker = _idle.get_nowait()
        except queue.Empty:
            worker = _Worker()
        reply = None
        if worker.starts(deadline + patience) and (patience or deadline - time.monotonic() > CLOCK / 2):
            reply = worker.ask([answer, golds], time.monotonic() + CLOCK + patience if patience else deadline)
            alive = reply is not None
        else:
            alive = worker.process.poll() is None        # it started too late for this answer, not for the next
        if not alive:
            worker.end()
            worker = _Worker()
        _idle.put(worker)
        return reply
    except OSError:                                      # no process to be had
        return None
    finally:
        slots.release()


def _work() -> None:
    """The worker's side."""
    global _IN_WORKER
    _IN_WORKER = True
    for number in (signal.SIGINT, signal.SIGTERM):       # meant for its parent, which may have answers yet to grade
        signal.signal(number, signal.SIG_IGN)
    import sympy  # noqa: F401  before the limit and before "ready", so that the clock measures only the work
    resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY, WORKER_MEMORY))
    print("ready", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, CLOCK)      # of processor time: the signal it sends ends this process
        answer, golds = json.loads(line)
        print(json.dumps([float(_readable(answer)), float(any(_decide(answer, gold) for gold in golds))]), flush=True)


def _sympy_value(node: Node, env: dict) -> tuple[str, str]:
    """Real and imaginary part of a limit, integral or sum, to 60 digits."""
    value = _to_sympy(node, dict(env)).doit().evalf(60)
    parts = value.as_real_imag()
    if not all(part.is_Float or part.is_Integer or part.is_Rational for part in parts):
        raise _Undefined("no number")
    return str(parts[0].evalf(60)), str(parts[1].evalf(60))


def _to_sympy(node: Node, env: dict):
    """The sympy expression of a tree. env maps names to Fractions and bound names to symbols. Only nodes and numbers
    are handed to sympy, a constant power or factorial only after this module's guards have passed it."""
    import sympy
    kind = node[0]
    if kind in ("pow", "fact", "fact2", "num") or kind == "fn" and node[1] == "binom":
        evaluator = _Evaluator()
        try:
            value = evaluator.value(node, {name: value for name, value in env.items() if isinstance(value, Fraction)})
        except _Undefined:
            if not any(isinstance(env.get(name), sympy.Symbol) for name in _names(node)):
                raise
        else:
            if evaluator.rounded:
                raise _Undefined("out of reach")
            if isinstance(value, Fraction):
                return sympy.Rational(value.numerator, value.denominator)
    if kind == "sym":
        value = env.get(node[1])
        if value is None:
            raise _Undefined("unbound")
        return sympy.Rational(value.numerator, value.denominator) if isinstance(value, Fraction) else value
    if kind == "const":
        return {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "oo": sympy.oo}[node[1]]
    if kind == "fn":
        name = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "abs": "Abs", "ceil": "ceiling", "ln": "log",
                "binom": "binomial"}.get(node[1], node[1])
        if name not in "asin acos atan Abs ceiling floor log binomial sin cos tan cot sec csc sinh cosh exp".split():
            raise _Undefined("function")
        return getattr(sympy, name)(*(_to_sympy(part, env) for part in node[2:]))
    if kind in ("big", "int", "lim"):
        name = node[2] if kind == "big" else node[1]
        symbol = sympy.Dummy(name, integer=True) if kind == "big" else sympy.Dummy(name)
        bounds = [_to_sympy(part, env) for part in node[-3 if kind != "lim" else -2:-1]]
        body = _to_sympy(node[-1], env | {name: symbol})
        if kind == "lim":
            return sympy.Limit(body, symbol, bounds[0])
        operation = {"sum": sympy.Sum, "prod": sympy.Product}[node[1]] if kind == "big" else sympy.Integral
        return operation(body, (symbol, *bounds))
    parts = [_to_sympy(part, env) for part in node[1:]]
    operations = {"add": lambda a, b: a + b, "mul": lambda a, b: a * b, "div": lambda a, b: a / b, "neg": lambda a: -a,
                  "pow": lambda a, b: a ** b, "root": lambda a, n: a ** (1 / n), "fact": sympy.factorial}
    if kind not in operations:
        raise _Undefined(f"{kind} in a limit, integral or sum")
    return operations[kind](*parts)


_IN_WORKER = False

if __name__ == "__main__" and sys.argv[1:] == ["--worker"]:
    _work()
