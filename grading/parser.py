"""Tokens -> tree (the nodes: tree.py), by precedence, loosest first."""

from decimal import Decimal
from fractions import Fraction
from functools import lru_cache

from grading.lexer import Lexer
from grading.tree import MAX_DEPTH, Node, Unreadable, constant, elements, names, num
from grading.units import CHANGING, NEGATIONS, NUMBERS, UNITS, known, multiplier, number_word

_RELATIONS = "= < > <= >= != ~ in mid equiv to".split()
_SETS = {"cup": "cup", "cap": "cap", "minus": "minus", "choose": "binom", "over": "div"}
_SIGNS = {"+": "", "-": "neg", "+-": "pm", "-+": "mp"}
_PRODUCTS = {"*": "mul", "/": "div", "mod": "mod"}
_MARKS = {"!": "fact", "!!": "fact2", "%": "percent", "deg": "deg"}
_APPLIED = set("fghFGHPQ")  # P(x) is a value of P; n(n+1) is a product
_BARS = {"|": ("|", "abs"), "lfloor": ("rfloor", "floor"), "lceil": ("rceil", "ceil")}
_BRACKETS = {"(": ")]", "[": ")]", "{": "}", "{{": ("}}",)}  # what may close them
_COMMANDS = "function pair integral root big accent".split()
_INFINITY = ("const", "oo")
_ATOMS = {
    "pi": ("const", "pi"),
    "oo": _INFINITY,
    "empty": ("set", ()),
    "dots": ("dots",),
    "reals": ("tuple", "(", (("neg", _INFINITY), _INFINITY), ")"),
}
# Which method reads what begins with a token of a kind.
_READERS = {"num": "number", "id": "name", "text": "words", "begin": "matrix"}
_READERS |= {name: name for name in _COMMANDS}
_READERS |= dict.fromkeys(_BRACKETS, "bracket") | dict.fromkeys(_BARS, "bars_group")
_STARTS = {*_READERS, *_ATOMS} - {"text"}  # of a factor
_INVERTED = {"sin", "cos", "tan", "cot", "sinh", "cosh", "tanh"}


@lru_cache(maxsize=256)  # a group of responses has one gold
def parse(text: str, as_list: bool = False) -> Node:
    """The tree of an answer. as_list: the other side is a list, so 1,234 is two numbers. Raises
    Unreadable."""
    return Parser(Lexer(text, as_list).tokens).answer()


def _listed(joiner: str, items: list[Node]) -> Node:
    return items[0] if len(items) == 1 else ("list", joiner, tuple(items))


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


class Parser:
    """Raises Unreadable."""

    def __init__(self, tokens: list[tuple]):
        self.tokens = [*tokens, *[("", "")] * 9]
        self.at, self.depth, self.bars, self.bound = 0, 0, False, []

    # -- the stream
    def peek(self, ahead: int = 0):
        return self.tokens[self.at + ahead]

    def take(self):
        self.at += 1
        return self.tokens[self.at - 1]

    def next_is(self, *kinds, ahead: int = 0) -> bool:
        return self.peek(ahead)[0] in kinds

    def accept(self, *kinds) -> str | None:
        return self.take()[1] if self.next_is(*kinds) else None

    def expect(self, *kinds) -> str:
        if not self.next_is(*kinds):
            raise Unreadable(f"expected {kinds}")
        return self.take()[1]

    def nested(self, read, *args):
        """read, one level deeper; a bar inside brackets does not close one outside."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("nested too deeply")
        bars, self.bars = self.bars, False
        node = read(*args)
        self.bars = bars
        self.depth -= 1
        return node

    def spelt(self) -> str:
        """One token or one group, as text."""
        words, depth = [], 0
        while not words or depth > 0:
            kind, value = self.take()
            if not kind:
                raise Unreadable("unbalanced")
            words.append(value)
            depth += (kind in ("(", "{")) - (kind in (")", "}"))
        return "".join(words[1:-1] if words[0] == "{" else words)

    # -- lists and relations
    def answer(self) -> Node:
        node = self.sequence()
        if self.accept("pmod"):
            node = ("cong", node, self.signed(self.atom))
        if not self.next_is(""):
            raise Unreadable("something is left over")
        return node

    def sequence(self) -> Node:
        """A list; x=1,y=2; x=3,y=4 and x=1,y=2 or x=3,y=4 are lists of lists."""
        kind, groups = ",", [[self.relation()]]
        while joiner := self.accept(",", ";", "or", "and"):
            while second := self.accept("or", "and"):
                joiner = second
            if joiner == "or":
                kind = "or"
            if joiner in (";", "or"):
                groups.append([])
            groups[-1].append(self.relation())
        lists = [_listed(",", items) for items in groups]
        return _listed(kind, lists)

    def relation(self) -> Node:
        self.accept("~")
        parts = [self.side()]
        while self.next_is(*_RELATIONS) or self.next_is("|") and not self.bars and self.depth == 0:
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
        node, sign = None, self.accept(*_SIGNS) or "+"
        while sign:
            term = self.signed(self.product)
            if sign == "-" and term[0] == "set" and node:  # R - {0}
                node = ("minus", node, term)
            else:
                term = (_SIGNS[sign], term) if _SIGNS[sign] else term
                node = ("add", node, term) if node else term
            sign = self.accept(*_SIGNS)
        return node

    def signed(self, read) -> Node:
        """What read finds behind signs of its own."""
        if self.accept("-"):
            return ("neg", self.nested(self.signed, read))
        self.accept("+")
        return read()

    def product(self) -> Node:
        if currency := self.accept("money"):
            return self.price(currency)
        node = self.power()
        while True:
            if self.next_is("text") or self.next_is("/") and self.next_is("text", ahead=1):
                node = self.unit(node)
            elif operator := self.accept(*_PRODUCTS):
                node = (_PRODUCTS[operator], node, self.signed(self.power))
            elif self.next_is("(", "[") and self.next_is("text", ahead=1) and not names(node):
                self.take()  # 24 [cm], 2 (double root)
                node = self.unit(node, remark=True)
                self.expect(")", "]")
            elif self.starts_atom():
                node = self.juxtaposed(node)
            else:
                return node

    def price(self, currency: str) -> Node:
        node = self.signed(self.product)
        units = f"{currency}^1"
        if node[0] == "unit":  # $5 per hour
            _, node, other_units = node
            units = f"{units} {other_units}"
        return ("unit", node, units)

    def starts_atom(self) -> bool:
        if self.next_is("|"):  # a bar that opens, not one that closes, nor the one of divides
            is_paired = self.depth > 0 or ("|", "|") in self.tokens[self.at + 1 :]
            return not self.bars and is_paired
        return self.next_is(*_STARTS)

    def juxtaposed(self, left: Node) -> Node:
        (kind, _), (previous, _) = self.peek(), self.peek(-1)
        if kind == "num" and previous == "text":  # 5 feet 6 inches, 5 thousand 3 hundred
            return ("add", left, self.product())
        side_by_side = kind == previous == "num" and not self.next_is("^", ahead=-2)  # 2^6 3^5
        right = self.power()
        if left[0] == right[0] == "num" and kind != "(" and previous != ")":  # {5}{6}
            side_by_side = True
        if side_by_side:
            raise Unreadable("two numbers side by side")
        if right[0] == "tuple" and left[0] in ("tuple", "list"):
            return ("list", ",", (*elements(left), right))
        return ("mul", left, right)

    def unit(self, node: Node, remark: bool = False) -> Node:
        """kcal m^{-2} yr^{-1}, square inches, 3 dozen eggs, 5 cups of flour, 5 per apple, 1 way.
        What stands in a remark, or after "of" or "per", may be any words."""
        units, aside = [], False
        while (
            self.next_is("text")
            or self.next_is("*", "/")
            and (self.next_is("text", ahead=1) or units and self.peek(1)[1] in UNITS)
        ):
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

    # -- powers
    def power(self) -> Node:
        node = self.atom()
        for _ in range(MAX_DEPTH):
            if mark := self.accept(*_MARKS):
                node = (_MARKS[mark], node)
            elif self.accept("^"):
                node = ("pow", node, self.signed(self.atom))
            else:
                return node
        raise Unreadable("nested too deeply")

    # -- atoms
    def argument(self) -> Node:
        kind, value = self.peek()
        if kind == "num" and value.isdigit() and len(value) > 1:  # \\frac12: single digits
            self.tokens[self.at : self.at + 1] = [(kind, value[0]), (kind, value[1:])]
        return self.signed(self.atom)

    def atom(self) -> Node:
        kind, value = self.take()
        if kind in _ATOMS:
            return _ATOMS[kind]
        if kind not in _READERS:
            raise Unreadable(f"unexpected {value!r}")
        return self.nested(getattr(self, _READERS[kind]), value)

    def number(self, text: str) -> Node:
        """12, 1.5, 1.5e-3, 4:20, A5_16, 52_eight, and 0.1(6), whose bracket recurs."""
        if ":" in text:
            return ("tuple", "clock", tuple(map(self.number, text.split(":"))), ":")
        if "_" in text:
            digits, _, base = text.partition("_")
            try:
                return num(int(digits, int(NUMBERS.get(base.lower()) or base)))
            except ValueError:
                raise Unreadable("base") from None
        if "(" in text:
            head, _, tail = text.rstrip(")").partition("(")
            places = len(head.partition(".")[2])
            return num(Fraction("0" + head) + Fraction(f"{tail}e-{places}") / (10 ** len(tail) - 1))
        mantissa, _, exponent = text.lower().partition("e")
        node = num(Decimal(mantissa), len(mantissa.partition(".")[2]) or None)
        if exponent:
            node = ("mul", node, ("pow", num(10), num(Decimal(exponent))))
        return node

    def accent(self, mark: str) -> Node:
        """\\dot{x}, \\overline{AB}: a name."""
        return self.name(f"{mark} {self.spelt()}")

    def name(self, value: str) -> Node:
        if value in ("i", "e") and not self.next_is("_", "'") and value not in self.bound:
            return ("const", value)
        if self.accept("_"):
            value += "_" + self.spelt()
        while self.accept("'"):
            value += "'"
        if self.next_is("(") and value.rstrip("'") in _APPLIED:
            value += self.spelt()
        return ("sym", value)

    def words(self, first: str) -> Node:
        words, is_number = [first], number_word(first) is not None
        while self.next_is("text") and (not is_number or number_word(self.peek()[1]) is not None):
            words.append(self.take()[1])
        if is_number:
            return num(_spoken(words))
        phrase = " ".join(words).lower()
        if not set(NEGATIONS).isdisjoint(phrase.split()):
            raise Unreadable("a negation")
        return ("sym", first if len(phrase) == 1 else "text " + phrase)

    def bracket(self, opening: str) -> Node:
        if opening == "{{" and self.accept("}}"):
            return ("set", ())
        node = self.sequence()
        closing = self.expect(*_BRACKETS[opening])
        items = elements(node)
        if opening == "{{":
            return ("set", items)
        if opening == "{" or len(items) == 1 and opening + closing in ("()", "[]"):
            return node
        if node[0] != "list" or node[1] == "or":
            raise Unreadable("bracket")
        return ("tuple", opening, items, closing)

    def bars_group(self, opening: str) -> Node:
        closing, name = _BARS[opening]
        self.bars = opening == "|"
        node = self.sum()
        self.expect(closing)
        return (name, node)

    def matrix(self, kind: str) -> Node:
        rows = [[]]
        if kind == "array":
            self.atom()
        while not self.accept("end"):
            if self.accept("row", ",", "and"):
                rows.append([])
            elif not self.accept("&"):
                rows[-1].append(self.relation())
        rows = tuple(tuple(row) for row in rows if row)
        if not kind.endswith(("matrix", "array")):  # cases, aligned
            return ("list", ",", sum(rows, ()))
        if len(set(map(len, rows))) != 1:
            raise Unreadable("matrix")
        return ("det", ("mat", rows)) if kind == "vmatrix" else ("mat", rows)

    # -- forms and functions
    def pair(self, kind: str) -> Node:
        return (kind, self.argument(), self.argument())

    def integral(self, _) -> Node:  # \int{0}{1}{x^2}{x}, see words.py
        low, high, body = self.argument(), self.argument(), self.argument()
        return ("big", "int", self.spelt(), low, high, body)

    def root(self, _) -> Node:
        index = num(2)
        if self.accept("["):
            index = self.sum()
            self.expect("]")
        return ("root", self.signed(self.atom), index)

    def script(self, mark: str) -> Node | None:
        return self.signed(self.atom) if self.accept(mark) else None

    def function(self, name: str) -> Node:
        if self.next_is("="):  # \\max = 5
            return ("sym", name)
        base = self.script("_")
        if name == "log" and self.next_is("num", ahead=-1) and not self.starts_atom():  # \\log_28
            self.at -= 1
            base = self.argument()
        power = self.script("^")
        if power == ("neg", num(1)) and name in _INVERTED:
            name, power = "a" + name, None
        args = self.function_arguments()
        if base and name != "log":
            raise Unreadable("subscript of a function")
        node = ("div", ("ln", *args), ("ln", base)) if base else (name, *args)
        return ("pow", node, power) if power else node

    def function_arguments(self) -> tuple:
        if self.next_is("{{", "(", "{", "["):  # max{a, b}
            node = self.atom()
            if node[0] == "set":
                return node[1]
            return node[2] if node[0] == "tuple" else elements(node)
        negative = self.accept("-")
        node = self.power()
        while self.starts_atom() and not self.next_is("("):
            if self.next_is(*_COMMANDS) and (self.peek() != ("pair", "div") or node[0] != "num"):
                break
            node = ("mul", node, self.power())
        return (("neg", node),) if negative else (node,)

    def big(self, name: str) -> Node:
        """A sum, a product or a limit, with its bound name; without bounds it is itself a name."""
        low, high = self.script("_"), self.script("^")
        if not low:
            return ("mul", ("sym", name), self.product())
        match low:
            case ("rel", (("sym" | "const", variable), "=" | "to", start)) if high or name == "lim":
                self.bound.append(variable)
                body = self.product()
                self.bound.pop()
                return ("big", name, variable, start, high or start, body)
        raise Unreadable("bounds")
