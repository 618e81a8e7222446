"""Text -> tokens (their kinds: words.py)."""

import re

from grading.tree import MAX_TEXT, MAX_TOKENS, Unreadable
from grading.units import CURRENCIES, GLUED, UNITS, known, number_word
from grading.words import COMMANDS, PLAIN, TEXT, WORDS, plain

_LEX = re.compile(
    rf"""
    (?P<space>(?:\s|~|\\[ ,;:!>]|\$|\\[()\[\]]|&nbsp;|\\(?:left|right)(?![A-Za-z])\.?)+)
  | (?P<repeating>\d{{0,50}}\.\d{{0,50}}\\(?:overline|bar|dot)\s*(?:\{{\d{{1,50}}\}}|\d))
  | (?P<clock>\d{{1,2}}\s?:\s?[0-5]\d(?![\d.:]|\s?:))
  | (?P<date>\d{{1,2}}/\d{{1,2}}/(?:19|20)\d\d(?!\d)|(?:19|20)\d\d-[01]\d-[0-3]\d(?!\d))
  | (?P<thousands>
        (?<![_^])[1-9]\d{{0,2}}(?:(?:,\\!\s*|\{{,\}}\s*|\\[,;:\ ]|~|\ )\d{{3}})+(?!\d)(?:\.\d+)?
        |\d*\.(?:\d{{3}}\\,)+\d{{1,3}})
  | (?P<comma>[1-9]\d{{0,2}}(?:,\d{{3}})+(?!,?\d)(?:\.\d+)?)
  | (?P<scientific>(?:\d{{1,400}}(?:\.\d{{0,400}})?|\.\d{{1,400}})[eE][-+]?\d+(?![A-Za-z\d]))
  | (?P<based>(?=[A-F]{{0,60}}\d)[\dA-F]{{1,60}}_(?:\d{{1,2}}(?!\d)|\{{\(?\w{{1,7}}\)?\}}))
  | (?P<number>\d+(?:\.\d+)?|\.\d+)
  | (?P<deg>\^\s*(?:\{{\s*\\(?:circ|degree)\s*\}}|\\(?:circ|degree)(?![a-zA-Z]))
        |(?<=[\d}})])\^(?:\{{o\}}|o(?![a-zA-Z])))
  | (?P<currency>(?:US\s?)?\\\$|[€£¥₹¢]|(?:USD|EUR|GBP|JPY|INR|Rs)(?![A-Za-z])\.?)
  | (?P<row>\\\\(?:\[\s*-?[\d.]+\s*[a-z]{{2}}\s*\])?)
  | (?P<environment>\\(?P<edge>begin|end)\s*\{{(?P<name>[A-Za-z]+)\*?\}})
  | (?P<group>\\(?:{"|".join(TEXT)})\s*\{{(?P<inner>(?:[^{{}}]|\{{[^{{}}]*\}})*)\}})
  | (?P<command>\\[A-Za-z]+)
  | (?P<letters>[A-Za-z]+)
  | (?P<dots>\.\.\.)
  | (?P<operator>\\[{{}}%&_\#|]|\*\*|<=|>=|!!|!=|==|[-+*/^_=<>()\[\]{{}}|,;:!'%&.])
""",
    re.VERBOSE | re.ASCII,
)
_NUMBERS = {  # group -> what is replaced in it by what
    "number": ("", ""),
    "scientific": ("", ""),
    "thousands": (r"[^\d.]", ""),
    "clock": (r"\s", ""),
    "based": (r"[{}()]", ""),
    "repeating": (r"\\[a-z]+\s*\{?(\d+)\}?", r"(\1)"),
}
_OPERATORS = {"**": "^", "==": "=", "\\{": "{{", "\\}": "}}", "\\%": "%", "\\|": "|"}
_OPENS = {"(": 1, "[": 1, "\\{": 1, ")": -1, "]": -1, "\\}": -1}
_ENDS = ("num", "text", "}", ")", "pi", "deg", "%")  # of a value
_BARE_UNITS = set("m s g h L N J W".split())  # 5 m


class Lexer:
    """Has a method for each group of the expression above that takes more than a line: it adds
    tokens, and returns where to go on if that is not the end of what it was given."""

    def __init__(self, text: str, as_list: bool):
        """as_list: the other side is a list, so 1,234 is two numbers. Raises Unreadable."""
        if len(text) > MAX_TEXT:
            raise Unreadable("too long")
        self.text, self.as_list = plain(text), as_list
        self.tokens, self.parens = [], 0
        self.glued = False  # whether no space stands before what comes next
        self.run(0, len(self.text), False)

    def run(self, at: int, end: int, in_text: bool) -> None:
        """Raises Unreadable."""
        self.glued = False
        while at < end:
            match = _LEX.match(self.text, at, end)
            if not match or len(self.tokens) > MAX_TOKENS:
                raise Unreadable(f"unknown character at {at}, or too many tokens")
            group, text = match.lastgroup, match.group()
            at, self.in_text = match.end(), in_text
            if group in _NUMBERS:
                self.add("num", re.sub(*_NUMBERS[group], text))
            elif group in ("deg", "row", "dots"):
                self.add(group)
            elif group != "space":
                at = getattr(self, group)(text, match) or at
            self.glued = group != "space"

    def add(self, kind: str, value: str = "") -> None:
        self.tokens.append((kind, value or kind))
        self.glued = True

    def previous(self) -> list[str]:
        """The kinds of the last two tokens."""
        return ["", "", *[kind for kind, _ in self.tokens[-2:]]][-2:]

    def after_value(self) -> bool:
        before, last = self.previous()
        return before == "text" if last == "/" else last in _ENDS  # km/hr

    def comma(self, text, match):
        before, last = self.previous()
        is_listed = self.as_list or self.parens or last == "," and before == "num"
        if is_listed and ",0" not in text:
            text = text.partition(",")[0]
        self.add("num", text.replace(",", ""))
        return match.start() + len(text)

    def operator(self, text, match):
        if text == "." and self.in_text:
            return  # it abbreviates
        if text == "!=" and self.glued and self.after_value():  # 5!=120, but x!=5
            self.add("!")
            text = "="
        self.parens = max(0, self.parens + _OPENS.get(text, 0))
        self.add(_OPERATORS.get(text, text))

    def currency(self, text, match):
        name = next(name for sign, name in CURRENCIES.items() if sign in text)
        self.add("text" if self.after_value() else "money", name)

    def environment(self, text, match):
        self.add(match["edge"], match["name"])

    def date(self, text, match):
        self.add("text", text)

    def letters(self, text, match):
        low, next_char = text.lower(), self.text[match.end() : match.end() + 9].lstrip()[:1]
        if low in WORDS:
            self.add(*WORDS[low])
        elif number_word(text) is not None:
            self.add("text", text)
        elif self.in_text:  # a single letter that is no unit is a variable
            is_word = len(text) > 1 or text in UNITS and self.after_value()
            self.add("text" if is_word else "id", text)
        elif self.after_value() and self.is_unit(text, next_char):
            self.add("text", text)
        elif found := re.fullmatch(r"(sin|cos|tan|ln|log)([a-z])", text):
            self.add("function", found[1])
            self.add("id", found[2])
        elif low in PLAIN and text in (low, low.capitalize()):
            self.add(*PLAIN[low])
        elif len(text) > 3 and not text.isupper() and list(text) != sorted(set(text)):
            self.add("text", text)
        else:  # short, capitals, or letters in their order: a product
            for letter in text:
                self.add("id", letter)

    def is_unit(self, text: str, next_char: str) -> bool:
        """Whether letters outside \\text{} that follow a value are its unit."""
        if len(text) == 1:
            return text in _BARE_UNITS and not self.glued and next_char in ("", "/", ",", ";")
        if text in GLUED or text.removesuffix("s") in GLUED:
            return True
        is_function = text in PLAIN or next_char == "("
        return not self.glued and not is_function and known(text)

    def command(self, text, match):
        if text[1:] not in COMMANDS:
            raise Unreadable("unknown command")
        kind, value = COMMANDS[text[1:]]
        if value in ("Omega", "AA") and self.after_value():
            kind = "text"
        if kind != "skip":
            self.add(kind, value)

    def group(self, text, match):
        r"""\text{...}: its letters are words. \operatorname{lcm} and the like are what they
        spell."""
        content = match["inner"].strip().strip("~")
        if content not in PLAIN or content in UNITS and self.after_value():
            self.run(match.start("inner"), match.end("inner"), True)
        else:
            self.add(*PLAIN[content])
