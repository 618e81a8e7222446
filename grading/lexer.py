"""Text -> tokens (kind, value, glued): kinds are num, id, text, fn, op and env; glued: no space stands before it."""

from __future__ import annotations

import re

from grading.tree import MAX_DIGITS, MAX_TEXT, MAX_TOKENS, Unreadable
from grading.units import UNITS
from grading.words import COMMANDS, FUNCTIONS, PLAIN, TEXT, WORDS, plain

_LEX = re.compile(rf"""
    (?P<space>(?:\s|~|\\[ ,;:!>]|\$|\\[()\[\]]|&nbsp;)+)
  | (?P<repeating>\d{{0,50}}\.\d{{0,50}}\\(?:overline|bar|dot)\s*\{{\d{{1,50}}\}})
  | (?P<clock>\d{{1,2}}\s?:\s?[0-5]\d(?![\d.:]|\s?:))
  | (?P<thousands>\d{{1,3}}(?:(?:,\\!\s*|\{{,\}}\s*|\\[,;:\ ]|~|\ )\d{{3}})+(?!\d)(?:\.\d+)?)
  | (?P<comma>[1-9]\d{{0,2}}(?:,\d{{3}})+(?!,?\d)(?:\.\d+)?)
  | (?P<scientific>(?:\d{{1,400}}(?:\.\d{{0,400}})?|\.\d{{1,400}})[eE][-+]?\d+(?![A-Za-z\d]))
  | (?P<based>(?=\d{{0,60}}[A-F])(?=[A-F]{{0,60}}\d)[\dA-F]{{2,60}}_\{{?1[1-6](?:\}}|(?!\d)))
  | (?P<number>\d+(?:\.\d+)?|\.\d+)
  | (?P<deg>\^\s*(?:\{{\s*\\circ\s*\}}|\\circ(?![a-zA-Z])))
  | (?P<prime>\^\s*(?:\\prime(?![a-zA-Z])|\{{\s*(?:\\prime\s*)+\}}))
  | (?P<double>\\\\(?=[A-Za-z]{{2}}))
  | (?P<row>\\\\(?:\[\s*-?[\d.]+\s*[a-z]{{2}}\s*\])?)
  | (?P<environment>\\(?:begin|end)\s*\{{[A-Za-z]+\*?\}})
  | (?P<blackboard>\\(?:mathbb|Bbb)\s*\{{?\s*[A-Z]\s*\}}?)
  | (?P<space2>\\(?:left|right)(?![A-Za-z])\.?)
  | (?P<text_group>\\(?:{"|".join(TEXT)})\s*\{{(?P<inner>(?:[^{{}}]|\{{[^{{}}]*\}})*)\}})
  | (?P<command>\\[A-Za-z]+)
  | (?P<escape>\\[{{}}$%&_\#|])
  | (?P<letters>[A-Za-z]+)
  | (?P<dots>\.\.\.)
  | (?P<operator>\*\*|<=|>=|!=|==|[-+*/^_=<>()\[\]{{}}|,;:!'%&.])
""", re.VERBOSE | re.ASCII)
_ESCAPES = {"\\{": "{{", "\\}": "}}", "\\%": "%", "\\|": "|"}
_OPERATORS = {"**": "^", "==": "="}
_BARE_UNITS = set("m s g h L N J W".split())              # 5 m


class Lexer:
    """One method for each group of the expression above: it adds tokens, and tells where to go on if it is not at the
    end of what it was given."""

    def __init__(self, text: str, as_list: bool):
        """as_list: the other side is a list, so 1,234 is two numbers. Raises Unreadable."""
        if len(text) > MAX_TEXT:
            raise Unreadable("too long")
        self.text, self.as_list = plain(text), as_list
        self.tokens, self.parens, self.environments, self.money = [], 0, [], False

    def run(self, at: int = 0, end: int | None = None, in_text: bool = False) -> list[tuple]:
        """The tokens. Raises Unreadable."""
        end, self.glued = len(self.text) if end is None else end, False
        while at < end:
            match = _LEX.match(self.text, at, end)
            if not match:
                raise Unreadable(f"unknown character at {at}")
            self.in_text = in_text
            to = getattr(self, match.lastgroup)(match.group(), match)
            at, self.glued = match.end() if to is None else to, not match.lastgroup.startswith("space")
            if len(self.tokens) > MAX_TOKENS:
                raise Unreadable("too many tokens")
        return self.tokens

    def add(self, kind: str, value) -> None:
        if value == "mod" and self.tokens and self.tokens[-1][1] == "(":       # (mod 5) is \pmod{5}
            self.tokens[-1:] = [("op", "pmod", True)]
            value = "("
        self.tokens.append((kind, value, self.glued))
        self.glued = True

    def after_value(self) -> bool:
        kind, value = self.tokens[-1][:2] if self.tokens else ("", "")
        return kind in ("num", "text") or kind == "op" and value in ("}", ")", "pi", "deg", "%")

    def space(self, value, match):
        pass

    space2 = space                                         # \left, and the \right. that closes nothing

    # -- numbers
    def number(self, value, match):
        if len(value) > MAX_DIGITS:
            raise Unreadable("too many digits")
        self.add("num", value)
        return match.start() + len(value)

    scientific = number

    def clock(self, value, match):
        self.add("num", re.sub(r"\s", "", value))

    def based(self, value, match):
        digits, _, base = value.partition("_")
        self.add("num", f"{digits}_{base.strip('{}')}")

    def thousands(self, value, match):
        if value[0] == "0":
            return self.number(re.match(r"\d+", value).group(), match)
        self.number(re.sub(r"[^\d.]", "", value), match)

    def comma(self, value, match):
        listed = len(self.tokens) > 1 and self.tokens[-1][1] == "," and self.tokens[-2][0] == "num"
        if ",0" not in value and (self.as_list or self.parens or listed):
            return self.number(value[:value.index(",")], match)
        self.thousands(value, match)

    def repeating(self, value, match):
        self.add("num", re.sub(r"\\[a-z]+\s*\{(\d+)\}", r"(\1)", value))

    # -- signs
    def deg(self, value, match):
        self.add("op", match.lastgroup)

    dots = row = deg

    def prime(self, value, match):
        for _ in range(value.count("prime")):
            self.add("op", "'")

    def double(self, value, match):
        if not self.environments:
            return match.start() + 1                       # \\frac: an escape too many
        self.add("op", "row")

    def escape(self, value, match):
        if value == "\\$":
            self.money = True
            return
        self.add("op", _ESCAPES.get(value, "bad"))
        self.parens += {"\\{": 1, "\\}": -1}.get(value, 0)

    def operator(self, value, match):
        if value == "&" and self.environments[-1:] == ["system"] or value == "." and self.in_text:
            return                                         # what aligns, what abbreviates
        if value == "!=" and self.glued:                   # 5!=120
            self.add("op", "!")
            value = "="
        self.parens = max(0, self.parens + {"(": 1, "[": 1, ")": -1, "]": -1}.get(value, 0))
        self.add("op", _OPERATORS.get(value, value))

    def environment(self, value, match):
        name = re.search(r"\{([A-Za-z]+)", value)[1]
        name = "system" if name in ("cases", "aligned", "align", "gathered", "split") else name
        if value[1] == "b":
            self.environments.append(name)
        elif self.environments:
            self.environments.pop()
        self.add("op", "begin" if value[1] == "b" else "end")
        self.add("env", name)

    # -- words
    def letters(self, value, match):
        low, rest = value.lower(), self.text[match.end():match.end() + 9].lstrip()[:1]
        if low in WORDS:
            self.add("op", WORDS[low])
        elif self.in_text:
            self.word(value)
        elif (value in UNITS or low in ("am", "pm")) and self.after_value() and (len(value) > 1 or not self.glued and value in _BARE_UNITS
                                                        and rest in ("", "/", ",", ";")):
            self.add("text", value)
        elif low in PLAIN and value in (low, low.capitalize()):
            self.add(*PLAIN[low])
        elif value in FUNCTIONS:
            self.add("fn", FUNCTIONS[value])
        elif found := re.fullmatch(r"(sin|cos|tan|ln|log)([a-z])", value):
            self.add("fn", found[1])
            self.add("id", found[2])
        elif self.is_word(value):
            self.add("text", value)
        else:
            for letter in value:
                self.add("id", letter)

    def word(self, value):
        """A word inside \\text{...}: a single letter that is no unit is a variable."""
        variable = len(value) == 1 and not (value in UNITS and self.after_value())
        self.add(*("op", ":") if value == "to" else ("id" if variable else "text", value))

    @staticmethod
    def is_word(value: str) -> bool:
        """Four letters and more are a word, unless they look like a product: capitals, or letters in their order."""
        return len(value) > 3 and not value.isupper() and list(value) != sorted(set(value))

    def blackboard(self, value, match):
        letter = value.rstrip("} \t\n")[-1]
        self.add(*("op", "reals") if letter == "R" else ("id", "set " + letter))

    def command(self, value, match):
        name = value[1:]
        if name not in COMMANDS:
            raise Unreadable("unknown command")
        if name in ("Omega", "AA") and self.after_value():
            self.add("text", name)
        elif COMMANDS[name]:
            self.add(*COMMANDS[name])

    def text_group(self, value, match):
        r"""\text{...}: its letters are words. \operatorname{lcm} and the like are what they spell."""
        content = match["inner"].strip().strip("~")
        if content in FUNCTIONS and not self.after_value():
            self.add("fn", FUNCTIONS[content])
        else:
            self.run(match.start("inner"), match.end("inner"), True)
