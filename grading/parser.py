"""Tokens -> tree (the nodes: tree.py), by precedence, loosest first."""

from decimal import Decimal
from fractions import Fraction
from functools import lru_cache

from grading.lexer import Lexer
from grading.tree import MAX_DEPTH, Node, Unreadable, constant, elements, names, num
from grading.units import CHANGING, NEGATIONS, NUMBERS, UNITS, known, multiplier, number_word, ratio
from grading.words import PHRASES

_PRODUCTS = {"*": "mul", "/": "div", "mod": "mod"}
_MARKS = {"!": "fact", "!!": "fact2", "%": "percent", "deg": "deg"}
_RELATIONS = "= < > <= >= != ~ in mid equiv to".split()
_SIGNS = {"+": "add", "-": "add", "+-": "pm", "-+": "mp"}
_SETS = {"cup": "cup", "cap": "cap", "minus": "minus", "choose": "binom", "over": "div"}
_APPLIED = set("fghFGHPQ")  # P(x) is a value of P; n(n+1) is a product
_BARS = {"|": ("|", "abs"), "lfloor": ("rfloor", "floor"), "lceil": ("rceil", "ceil")}
_INFINITY = ("const", "oo")
_COMMANDS = ("fn", "form", "big", "accent")
_ATOM_KINDS = ("num", "id", *_COMMANDS)
_ATOMS = {
    "pi": ("const", "pi"),
    "oo": _INFINITY,
    "empty": ("set", ()),
    "dots": ("dots",),
    "reals": ("tuple", "(", (("neg", _INFINITY), _INFINITY), ")"),
}
_READERS = dict.fromkeys(("(", "[", "{", "{{"), "bracket") | dict.fromkeys(_BARS, "bars_group")
_READERS["begin"] = "matrix"
_INVERTED = {"sin", "cos", "tan", "cot", "sinh", "cosh", "tanh"}


@lru_cache(maxsize=256)  # a group of responses has one gold
def parse(text: str, as_list: bool = False) -> Node:
    """The tree of an answer. as_list: the other side is a list, so 1,234 is two numbers. Raises
    Unreadable."""
    return Parser(Lexer(text, as_list).run()).answer()


def number(text: str) -> Node:
    """12, 1.5, 1.5e-3, 4:20, A5_16, 52_eight, and 0.1(6), whose bracket recurs. Raises
    Unreadable."""
    if ":" in text:
        return ("tuple", "clock", tuple(map(number, text.split(":"))), ":")
    if "_" in text:
        digits, _, base = text.partition("_")
        try:
            return num(int(digits, int(NUMBERS.get(base.lower()) or base)))
        except ValueError:
            raise Unreadable("base") from None
    if "(" in text:
        head, _, tail = text.rstrip(")").partition("(")
        period = 10 ** len(tail) - 1
        places = len(head.partition(".")[2])
        return num(Fraction("0" + head) + Fraction(int(tail), period * 10**places))
    mantissa, _, exponent = text.lower().partition("e")
    decimals = len(mantissa.partition(".")[2]) or None
    node = num(Decimal(mantissa), decimals)  # int() refuses long numerals
    if exponent:
        node = ("mul", node, ("pow", num(10), num(Decimal(exponent))))
    return node


def _listed(joiner: str, items: list[Node]) -> Node:
    return items[0] if len(items) == 1 else ("list", joiner, tuple(items))


def _continues(item: Node, previous: Node) -> bool:
    """Whether a value with a unit goes on with a smaller one: 2 hours and 30 minutes."""
    if item[0] != "unit" or previous[0] != "unit":
        return False
    factor = ratio(item[2], previous[2])
    return factor is not None and factor < 1


def _is_part(node: Node) -> bool:
    """1 or a fraction below it, which a noun in the singular may follow."""
    over, under = node[1:] if node[0] == "div" else (node, num(1))
    return 0 < (constant(over) or 0) <= (constant(under) or 0)


def _spoken(words: list[str]) -> Fraction:
    """twenty five, three hundred, three quarters."""
    total = current = Fraction(0)
    for word in words:
        value = number_word(word)
        if value < 1 or multiplier(word):
            current = (current or 1) * value
        else:
            current += value
        if value >= 1000:
            total, current = total + current, Fraction(0)
    return total + current


def _determinant(rows: tuple) -> Node:
    if len(rows) > 5:
        raise Unreadable("determinant")
    total = num(0) if rows else num(1)
    for k, cell in enumerate(rows[0] if rows else ()):
        minor = [row[:k] + row[k + 1 :] for row in rows[1:]]
        term = ("mul", cell, _determinant(minor))
        total = ("add", total, ("neg", term) if k % 2 else term)
    return total


class Parser:
    """Raises Unreadable."""

    def __init__(self, tokens: list[tuple]):
        self.tokens = [*tokens, *[("end", "")] * 9]
        self.at, self.depth, self.bars, self.bound = 0, 0, 0, []

    # -- the stream
    def peek(self, ahead: int = 0):
        return self.tokens[self.at + ahead]

    def take(self):
        self.at += 1
        return self.tokens[self.at - 1]

    def is_op(self, *values, ahead: int = 0) -> bool:
        kind, value = self.tokens[self.at + ahead]
        return kind == "op" and value in values

    def accept(self, *values) -> str | None:
        return self.take()[1] if self.is_op(*values) else None

    def expect(self, *values) -> str:
        if not self.is_op(*values):
            raise Unreadable(f"expected {values}")
        return self.take()[1]

    def nested(self, read, *args):
        """read, one level deeper; a bar inside brackets does not close one outside."""
        self.depth += 1
        if self.depth > MAX_DEPTH or self.peek()[0] == "end":
            raise Unreadable("nested too deeply, or not finished")
        bars, self.bars = self.bars, 0
        node = read(*args)
        self.bars = bars
        self.depth -= 1
        return node

    def spelt(self) -> str:
        """One token or one group, as text."""
        words, depth = [], 0
        while True:
            kind, value = self.take()
            if kind == "end":
                raise Unreadable("unbalanced")
            words.append(value)
            depth += (kind == "op" and value in ("(", "{")) - (kind == "op" and value in (")", "}"))
            if depth <= 0:
                return "".join(words[1:-1] if words[0] == "{" else words)

    # -- lists and relations
    def answer(self) -> Node:
        node = self.sequence()
        if self.accept("pmod"):
            node = ("cong", node, self.signed(self.atom))
        while self.accept("."):
            pass
        if self.peek()[0] != "end":
            raise Unreadable("something is left over")
        return node

    def sequence(self) -> Node:
        """A list; x=1,y=2; x=3,y=4 and x=1,y=2 or x=3,y=4 are lists of lists."""
        groups, joiners = [[self.relation()]], set()
        while joiner := self.accept(",", ";", "or", "and"):
            while second := self.accept("or", "and"):
                joiner = second
            joiners.add(joiner)
            item, items = self.relation(), groups[-1]
            if joiner == "and" and _continues(item, items[-1]):
                items[-1] = ("add", items[-1], item)
            elif joiner in (";", "or"):
                groups.append([item])
            else:
                items.append(item)
        kind = "or" if "or" in joiners else ","
        lists = [_listed(",", items) for items in groups]
        return _listed(kind, lists)

    def relation(self) -> Node:
        self.accept("~")
        parts = [self.side()]
        while self.is_op(*_RELATIONS) or self.is_op("|") and not self.bars and self.depth == 0:
            operator = self.take()[1]
            parts += ["mid" if operator == "|" else operator, self.side()]
        return parts[0] if len(parts) == 1 else ("rel", tuple(parts))

    def side(self) -> Node:
        """A side of a relation: a ratio, a set, a sum."""
        parts = [self.sets()]
        while self.accept(":"):
            parts.append(self.sets())
        return parts[0] if len(parts) == 1 else ("tuple", ":", tuple(parts), ":")

    def sets(self) -> Node:
        node = self.sum()
        while op := self.accept(*_SETS):
            node = (_SETS[op], node, self.sum())
        return node

    # -- sums and products
    def sum(self) -> Node:
        node, op = None, self.accept(*_SIGNS) or "+"
        while op:
            term = self.signed(self.product)
            if op == "-" and term[0] == "set" and node:  # R - {0}
                op = "minus"
            elif op == "-":
                term = ("neg", term)
            if node or op in ("+-", "-+"):
                term = (_SIGNS.get(op, op), node, term)
            node = term
            op = self.accept(*_SIGNS)
        return node

    def signed(self, read) -> Node:
        """What read finds behind signs of its own."""
        if self.accept("-"):
            return ("neg", self.nested(self.signed, read))
        self.accept("+")
        return read()

    def product(self) -> Node:
        if self.peek()[0] == "money":
            return self.price(self.take()[1])
        node = self.power()
        while True:
            if self.peek()[0] == "text" or self.is_op("/") and self.peek(1)[0] == "text":
                node = self.unit(node)
            elif operator := self.accept(*_PRODUCTS):
                node = (_PRODUCTS[operator], node, self.signed(self.power))
            elif self.is_op("(", "[") and self.peek(1)[0] == "text" and not names(node):
                self.take()  # 24 [cm], 2 (double root)
                node = self.unit(node, remark=True)
                self.expect(")", "]")
            elif self.starts_atom():
                node = self.juxtaposed(node)
            else:
                return node

    def price(self, currency: str) -> Node:
        node = self.signed(self.product)
        if node[0] != "unit":
            return ("unit", node, currency + "^1")
        if ratio(currency + "^1", node[2]) is not None:  # $5 dollars
            return node
        return ("unit", node[1], f"{currency}^1 {node[2]}")

    def starts_atom(self) -> bool:
        kind, value = self.peek()
        if kind != "op":
            return kind in _ATOM_KINDS
        if value == "|":  # a bar that opens, not one that closes, nor the one of divides
            is_paired = self.depth > 0 or ("op", "|") in self.tokens[self.at + 1 :]
            return not self.bars and is_paired
        return value in _ATOMS or value in _READERS

    def juxtaposed(self, left: Node) -> Node:
        (kind, opening), (previous_kind, closing) = self.peek(), self.peek(-1)
        if kind == "num" and previous_kind == "text":  # 5 feet 6 inches, 5 thousand 3 hundred
            return ("add", left, self.product())
        right = self.power()
        if left[0] == right[0] == "num" and opening != "(" and closing != ")":
            raise Unreadable("two numbers side by side")
        if right[0] == "tuple" and left[0] in ("tuple", "list"):
            return ("list", ",", (*elements(left), right))
        return ("mul", left, right)

    def unit(self, node: Node, remark: bool = False) -> Node:
        """kcal m^{-2} yr^{-1}, square inches, 3 dozen eggs, 5 cups of flour, 5 per apple, 1 way.
        What stands in a remark, or after "of" or "per", may be any words."""
        units, aside = [], False
        while self.peek()[0] == "text" or self.is_op("*", "/") and self.goes_on(units):
            over = self.accept("/")
            self.accept("*")
            name = self.take()[1]
            power = constant(self.signed(self.atom)) if self.accept("^") else 1
            factor, is_number = multiplier(name), number_word(name) is not None
            if power is None or name.lower() in CHANGING or is_number and (aside or not factor):
                raise Unreadable("prose after a value")
            if factor:
                node = ("mul", node, num(factor))
            elif known(name) and not aside:
                units.append(f"{name}^{int(-power if over else power)}")
            elif not (aside or over or remark) and (units or not _is_part(node)):
                raise Unreadable("prose after a value")
            aside = aside or name.lower() == "of" or bool(over) and not known(name)
        return ("unit", node, " ".join(units)) if units else node

    def goes_on(self, units: list[str]) -> bool:
        kind, value = self.peek(1)
        return kind == "text" or bool(units) and value in UNITS

    # -- powers
    def power(self) -> Node:
        node = self.atom()
        for _ in range(MAX_DEPTH):
            mark = self.accept("^", *_MARKS)
            if not mark:
                return node
            if mark == "^":
                node = ("pow", node, self.signed(self.atom))
            else:
                if mark == "!" and self.accept("!"):
                    mark = "!!"
                node = (_MARKS[mark], node)
        raise Unreadable("nested too deeply")

    # -- atoms
    def argument(self) -> Node:
        kind, value = self.peek()
        if kind == "num" and value.isdigit() and len(value) > 1:  # \\frac12: single digits
            self.tokens[self.at : self.at + 1] = [(kind, value[0]), (kind, value[1:])]
        return self.signed(self.atom)

    def atom(self) -> Node:
        kind, value = self.take()
        if kind == "num":
            return number(value)
        if kind == "id":
            return self.name(value)
        if kind == "text":
            return self.words(value)
        if kind == "fn":
            return self.nested(self.function, value)
        if kind == "big":
            return self.nested(self.binding, value)
        if kind == "form":
            return self.nested(getattr(self, value))
        if kind == "accent":  # \\dot{x}, \\overline{AB}: a name
            return self.name(f"{value} {self.spelt()}")
        if kind == "op" and value in _ATOMS:
            return _ATOMS[value]
        if kind == "op" and value in _READERS:
            return self.nested(getattr(self, _READERS[value]), value)
        raise Unreadable(f"unexpected {value!r}")

    def name(self, value: str) -> Node:
        if value in ("i", "e") and not self.is_op("_", "'") and value not in self.bound:
            return ("const", value)
        if self.accept("_"):
            value += "_" + self.spelt()
        while self.accept("'"):
            value += "'"
        if self.is_op("(") and value.rstrip("'") in _APPLIED:
            value += self.spelt()
        return ("sym", value)

    def words(self, first: str) -> Node:
        words, is_number = [first], number_word(first) is not None
        while self.peek()[0] == "text":
            if is_number and number_word(self.peek()[1]) is None:
                break
            words.append(self.take()[1])
        if is_number:
            return num(_spoken(words))
        phrase = " ".join(words).lower()
        if phrase in PHRASES:
            return _ATOMS[PHRASES[phrase]]
        ends = self.peek()[1] in ("", ",", ";", "or", "and")
        if not ends and not set(NEGATIONS).isdisjoint(phrase.split()):
            raise Unreadable("a negation")
        return ("sym", first if len(phrase) == 1 else "text " + phrase)

    def bracket(self, opening: str) -> Node:
        if opening == "{{" and self.accept("}}"):
            return ("set", ())
        node = self.sequence()
        closing = self.expect(*{"{": ("}",), "{{": ("}}",)}.get(opening, (")", "]")))
        items = elements(node)
        if opening == "{{":
            return ("set", items)
        brackets = opening + closing
        if opening == "{" or len(items) == 1 and brackets in ("()", "[]"):
            return node
        half_open = brackets in ("(]", "[)")
        if node[0] != "list" or node[1] == "or" or half_open and len(items) != 2:
            raise Unreadable("bracket")
        return ("tuple", opening, items, closing)

    def bars_group(self, opening: str) -> Node:
        closing, name = _BARS[opening]
        self.bars += opening == "|"
        node = self.sum()
        self.expect(closing)
        self.bars -= opening == "|"
        if node[0] == "mat" and name == "abs":
            return _determinant(node[1])
        return (name, node)

    def matrix(self, _) -> Node:
        kind, rows = self.take()[1], [[]]
        if kind == "array":
            self.nested(self.atom)
        while not self.accept("end"):
            rows[-1].append(self.relation())
            if self.accept("row", ",", "and"):
                while self.accept("row"):
                    pass
                rows.append([])
            elif not self.accept("&") and not self.is_op("end"):
                raise Unreadable("matrix")
        self.take()
        rows = tuple(tuple(row) for row in rows if row)
        if kind == "system":  # of equations
            return ("list", ",", sum(rows, ()))
        if len(set(map(len, rows))) != 1:
            raise Unreadable("matrix")
        return _determinant(rows) if kind == "vmatrix" else ("mat", rows)

    # -- forms and functions
    def fraction(self) -> Node:
        return ("div", self.argument(), self.argument())

    def binomial(self) -> Node:
        return ("binom", self.argument(), self.argument())

    def integral(self) -> Node:  # \\int{0}{1}{x^2}{x}, see words.py
        low, high, body = self.argument(), self.argument(), self.argument()
        return ("int", self.spelt(), low, high, body)

    def root(self) -> Node:
        index = num(2)
        if self.accept("["):
            index = self.sum()
            self.expect("]")
        return ("root", self.signed(self.atom), index)

    def script(self, mark: str) -> Node | None:
        return self.signed(self.atom) if self.accept(mark) else None

    def function(self, name: str) -> Node:
        if self.is_op("="):  # \\max = 5
            return ("sym", name)
        base = self.script("_")
        if name == "log" and self.peek(-1)[0] == "num" and not self.starts_atom():  # \\log_28
            self.at -= 1
            base = self.argument()
        power = self.script("^")
        if power == ("neg", num(1)) and name in _INVERTED:
            name, power = "arc" + name, None
        args = self.function_arguments()
        if base and name != "log":
            raise Unreadable("subscript of a function")
        if name == "det" and args[0][0] == "mat":
            return _determinant(args[0][1])
        node = ("div", ("ln", *args), ("ln", base)) if base else (name, *args)
        return ("pow", node, power) if power else node

    def function_arguments(self) -> tuple:
        if self.is_op("{{", "(", "{", "["):  # max{a, b}
            node = self.nested(self.atom)
            if node[0] == "set":
                return node[1]
            return node[2] if node[0] == "tuple" else elements(node)
        negative = self.accept("-")
        node = self.power()
        while self.starts_atom() and not self.is_op("("):
            kind, value = self.peek()
            if kind in _COMMANDS and (value != "fraction" or node[0] != "num"):
                break
            node = ("mul", node, self.power())
        return (("neg", node),) if negative else (node,)

    def binding(self, name: str) -> Node:
        """A sum, a product or a limit, with its bound name; without bounds it is itself a name."""
        low, high = self.script("_"), self.script("^")
        if not low:
            return ("mul", ("sym", name), self.product())
        sign = "to" if name == "lim" else "="
        if low[0] != "rel" or low[1][1::2] != (sign,) or bool(high) == (name == "lim"):
            raise Unreadable("bounds")
        (kind, variable, *_), _, start = low[1]
        if kind not in ("sym", "const"):
            raise Unreadable("bounds")
        self.bound.append(variable)
        body = self.product()
        self.bound.pop()
        if name == "lim":
            return ("lim", variable, start, body)
        return ("big", name, variable, start, high, body)
