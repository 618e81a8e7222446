"""Text -> tokens (kind, value, glued): kinds are num, id, text, fn, op and env; glued: no space stands before it."""

from __future__ import annotations

import re

from grading.tree import MAX_DIGITS, MAX_TEXT, MAX_TOKENS, Unreadable
from grading.units import UNITS
from grading.words import COMMANDS, FUNCTIONS, PLAIN, TEXT, UNICODE, WORDS

_SCRIPTS = re.compile("([⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+)|([₀₁₂₃₄₅₆₇₈₉]+)")
_SCRIPT_DIGITS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻₀₁₂₃₄₅₆₇₈₉", "0123456789-0123456789")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_LEX = re.compile(r"""
    (?P<space>(?:\s|~|\\[ ,;:!>]|\$|\\[()\[\]]|&nbsp;)+)
  | (?P<repeating>\d{0,50}\.\d{0,50}\\(?:overline|bar|dot)\s*\{\d{1,50}\})
  | (?P<thousands>\d{1,3}(?:(?:,\\!\s*|\{,\}\s*|\\[,;:\ ]|~|\ )\d{3})+(?!\d)(?:\.\d+)?)
  | (?P<comma>[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)(?:\.\d+)?)
  | (?P<scientific>(?:\d{1,400}(?:\.\d{0,400})?|\.\d{1,400})[eE][-+]?\d+(?![A-Za-z\d]))
  | (?P<number>\d+(?:\.\d+)?|\.\d+)
  | (?P<deg>\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z])))
  | (?P<prime>\^\s*(?:\\prime(?![a-zA-Z])|\{\s*(?:\\prime\s*)+\}))
  | (?P<double>\\\\(?=[A-Za-z]{2}))
  | (?P<row>\\\\(?:\[\s*-?[\d.]+\s*[a-z]{2}\s*\])?)
  | (?P<environment>\\(?:begin|end)\s*\{[A-Za-z]+\*?\})
  | (?P<blackboard>\\(?:mathbb|Bbb)\s*\{?\s*[A-Z]\s*\}?)
  | (?P<edge>\\(?:left|right)(?![A-Za-z])\.?)
  | (?P<command>\\[A-Za-z]+)
  | (?P<escape>\\[{}$%&_\#|])
  | (?P<letters>[A-Za-z]+)
  | (?P<dots>\.\.\.)
  | (?P<operator>\*\*|<=|>=|!=|==|[-+*/^_=<>()\[\]{}|,;:!'%&.])
""", re.VERBOSE | re.ASCII)


class Lexer:
    """One method for each group of the expression above: it adds tokens and tells where to go on."""

    def __init__(self, text: str, as_list: bool):
        """as_list: the other side is a list, so 1,234 is two numbers. Raises Unreadable."""
        if not text.isascii():
            text = _SCRIPTS.sub(lambda m: ("^{" if m[1] else "_{") + m[0].translate(_SCRIPT_DIGITS) + "}", text)
            text = text.translate(UNICODE)
        if len(text) > MAX_TEXT:
            raise Unreadable("too long")
        self.text, self.as_list = text, as_list
        self.tokens, self.parens, self.matrix, self.text_end, self.money = [], 0, 0, [], False
        self.closing = self.closing_braces()

    def closing_braces(self) -> dict[int, int]:
        opened, closing = [], {}
        for match in _BRACES.finditer(self.text):
            if match.group() == "{":
                opened.append(match.start())
            elif match.group() == "}" and opened:
                closing[opened.pop()] = match.start()
        return closing

    def run(self) -> list[tuple]:
        """The tokens. Raises Unreadable."""
        at, self.glued = 0, False
        while at < len(self.text):
            match = _LEX.match(self.text, at)
            if not match:
                raise Unreadable(f"unknown character at {at}")
            end = getattr(self, match.lastgroup)(match.group(), match.start())
            at, self.glued = match.end() if end is None else end, match.lastgroup != "space"
            if len(self.tokens) > MAX_TOKENS:
                raise Unreadable("too many tokens")
        return self.tokens

    def add(self, kind: str, value) -> None:
        if value == "mod" and self.tokens and self.tokens[-1][1] == "(":       # (mod 5) is \\pmod{5}
            self.tokens[-1:] = [("op", "pmod", True)]
            value = "("
        self.tokens.append((kind, value, self.glued))
        self.glued = True

    def after(self, *kinds: str) -> bool:
        return bool(self.tokens) and self.tokens[-1][0] in kinds

    def space(self, value, at):
        pass

    edge = space                                           # \left, and the \right. that closes nothing

    # -- numbers
    def number(self, value, at):
        if len(value) > MAX_DIGITS:
            raise Unreadable("too many digits")
        self.add("num", value)
        return at + len(value)

    scientific = number

    def thousands(self, value, at):
        if value[0] == "0":
            return self.number(re.match(r"\d+", value).group(), at)
        self.number(re.sub(r"[^\d.]", "", value), at)

    def comma(self, value, at):
        if ",0" not in value and (self.as_list or self.parens or self.after_comma()):
            return self.number(value[:value.index(",")], at)
        self.thousands(value, at)

    def after_comma(self) -> bool:
        return len(self.tokens) > 1 and self.tokens[-1][1] == "," and self.tokens[-2][0] == "num"

    def repeating(self, value, at):
        self.add("num", re.sub(r"\\[a-z]+\s*\{(\d+)\}", r"(\1)", value))

    # -- signs
    def deg(self, value, at):
        self.add("op", "deg")

    def dots(self, value, at):
        self.add("op", "dots")

    def row(self, value, at):
        self.add("op", "row")

    def prime(self, value, at):
        for _ in range(value.count("prime")):
            self.add("op", "'")

    def double(self, value, at):
        if not self.matrix:
            return at + 1                                  # \\frac: an escape too many
        self.add("op", "row")

    def escape(self, value, at):
        if value == "\\$":
            self.money = True
            return
        self.add("op", {"\\{": "{{", "\\}": "}}", "\\%": "%", "\\|": "|"}.get(value, "bad"))
        self.parens += {"\\{": 1, "\\}": -1}.get(value, 0)

    def operator(self, value, at):
        if value in "{}" and self.text_end:
            if value == "}" and at >= self.text_end[-1]:
                self.text_end.pop()
            return
        if value == "!=" and self.glued:                   # 5!=120
            self.add("op", "!")
            value = "="
        self.parens = max(0, self.parens + {"(": 1, "[": 1, ")": -1, "]": -1}.get(value, 0))
        self.add("op", {"**": "^", "==": "="}.get(value, value))

    # -- words
    def letters(self, value, at):
        low = value.lower()
        if low in WORDS:
            self.add("op", WORDS[low])
        elif self.text_end:
            self.add("text", value)
        elif value in UNITS and len(value) > 1 and (self.after("num", "text") or self.tokens[-1:] and
                                                    self.tokens[-1][1] in ("}", ")")):
            self.add("text", value)
        elif low in PLAIN and value in (low, low.capitalize()):
            self.add(*PLAIN[low])
        elif value in FUNCTIONS:
            self.add("fn", FUNCTIONS[value])
        elif match := re.fullmatch(r"(sin|cos|tan|ln|log)([a-z])", value):
            self.add("fn", match[1])
            self.add("id", match[2])
        elif self.is_word(value):
            self.add("text", value)
        else:
            for letter in value:
                self.add("id", letter)

    @staticmethod
    def is_word(value: str) -> bool:
        """Four letters and more are a word, unless they look like a product: capitals, or letters in their order."""
        return len(value) > 3 and not value.isupper() and list(value) != sorted(set(value))

    def environment(self, value, at):
        self.matrix += 1 if value[1] == "b" else -1
        self.add("op", "begin" if value[1] == "b" else "end")
        self.add("env", re.search(r"\{([A-Za-z]+)", value)[1])

    def blackboard(self, value, at):
        letter = value.rstrip("} \t\n")[-1]
        self.add(*("op", "reals") if letter == "R" else ("id", "set " + letter))

    def command(self, value, at):
        name = value[1:]
        if name in TEXT:
            return self.text_group(name, at + len(value))
        if name not in COMMANDS:
            raise Unreadable("unknown command")
        if COMMANDS[name]:
            self.add(*COMMANDS[name])

    def text_group(self, name, at):
        r"""\text{...}: its letters are words. \mathrm{e}, \operatorname{lcm} and the like are what they spell."""
        start = at + len(self.text[at:at + 50]) - len(self.text[at:at + 50].lstrip())
        end = self.closing.get(start)
        if end is None or self.text_end:
            return at
        content = self.text[start + 1:end].strip().strip("~")
        after_number = self.after("num") or any(token[0] == "text" for token in self.tokens)
        letter = len(content) == 1 and content.isalpha() and (content in "ie" or not after_number)
        if name in ("mathrm", "operatorname", "textrm", "text") and content in FUNCTIONS and not after_number:
            self.add("fn", FUNCTIONS[content])
            return end + 1
        if letter and name in ("mathrm", "operatorname"):
            self.add("id", content)
            return end + 1
        self.text_end.append(end)
        return start + 1
