r"""The words of LaTeX and of plain text that an answer is made of: what each is to the parser.

A token is ("fn", name), ("op", symbol), ("id", letter), ("text", word) or ("num", digits)."""

import re

FUNCTIONS = {
    name: name
    for name in """
    sin cos tan cot sec csc arcsin arccos arctan arccot sinh cosh tanh arcsinh arccosh arctanh exp ln log gcd lcm max
    min lg abs floor ceil sqrt cis""".split()
}
FUNCTIONS |= {
    "asin": "arcsin",
    "acos": "arccos",
    "atan": "arctan",
    "ctg": "cot",
    "tg": "tan",
    "cosec": "csc",
    "arctg": "arctan",
    "arsinh": "arcsinh",
    "arcosh": "arccosh",
    "artanh": "arctanh",
}
_STRUCTURE = {name: name for name in "frac sqrt binom sum prod int lim".split()}
_STRUCTURE |= {
    "dfrac": "frac",
    "tfrac": "frac",
    "cfrac": "frac",
    "dbinom": "binom",
    "tbinom": "binom",
}
_ACCENTS = "dot ddot hat bar vec tilde overline overrightarrow widehat widetilde underline".split()
_LETTERS = """
    alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau upsilon
    phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega hbar ell odot oplus partial
    nabla mho Re Im star bullet dagger square aleph perp parallel AA""".split()
_SYMBOLS = {
    "*": "cdot times ast",
    "/": "div",
    "<=": "le leq leqslant",
    ">=": "ge geq geqslant",
    "<": "lt",
    ">": "gt",
    "!=": "ne neq",
    "~": "approx simeq",
    "+-": "pm",
    "-+": "mp",
    "cup": "cup bigcup",
    "cap": "cap",
    "minus": "setminus backslash",
    "in": "in",
    "mid": "mid",
    "|": "vert lvert rvert",
    "lfloor": "lfloor",
    "rfloor": "rfloor",
    "lceil": "lceil",
    "rceil": "rceil",
    "(": "langle lparen",
    ")": "rangle rparen",
    "{{": "lbrace",
    "}}": "rbrace",
    "[": "lbrack",
    "]": "rbrack",
    "equiv": "equiv",
    "to": "to rightarrow",
    "dots": "ldots dots cdots",
    "mod": "bmod mod",
    "pmod": "pmod",
    "or": "lor vee",
    "and": "land wedge",
    "deg": "degree",
    "choose": "choose",
    "over": "over",
    ":": "colon",
    "empty": "emptyset varnothing",
    "oo": "infty",
    "pi": "pi",
    "row": "cr",
    "%": "percent",
}
_DROPPED = """
    left right mleft mright middle displaystyle textstyle scriptstyle limits nolimits big Big bigl bigr Bigl Bigr bigg
    Bigg mathbf boldsymbol bm mathit mathsf boxed fbox bf it rm tt hline phantom thinspace mathopen mathclose mathstrut
    cal mathcal mathfrak mathscr quad qquad angle measuredangle triangle tiny small normalsize large Large LARGE huge
    Huge""".split()
TEXT = "text textbf textit textrm mbox hbox mathrm operatorname textsf texttt textnormal emph textup unit".split()

COMMANDS = {
    command: ("op", symbol) for symbol, row in _SYMBOLS.items() for command in row.split()
}  # None: dropped
COMMANDS |= {name: ("id", name.removeprefix("var")) for name in _LETTERS}
COMMANDS |= {name: ("fn", value) for name, value in (FUNCTIONS | _STRUCTURE).items()}
COMMANDS |= {name: ("fn", "accent " + name) for name in _ACCENTS} | dict.fromkeys(_DROPPED + TEXT)
WORDS = {
    "or": "or",
    "and": "and",
    "percent": "%",
    "pct": "%",
    "percentage": "%",
    "degree": "deg",
    "degrees": "deg",
    "deg": "deg",
    "mod": "mod",
    "per": "/",
}
PLAIN = {
    "pi": ("op", "pi"),
    "infinity": ("op", "oo"),
    "inf": ("op", "oo"),
    "oo": ("op", "oo"),
    "infty": ("op", "oo"),
    "union": ("op", "cup"),
    "sqrt": ("fn", "sqrt"),
}
NUMBERS = {
    name: value
    for value, name in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve".split()
    )
} | {"sixteen": 16}
PHRASES = {
    "all real numbers": "reals",
    "all reals": "reals",
    "real numbers": "reals",
    "none": "empty",
    "no solution": "empty",
    "no solutions": "empty",
    "no real solutions": "empty",
    "empty set": "empty",
}


def _mixed(match: re.Match) -> str:
    """1\\frac45 and 1 4/5: an integer before a proper fraction of integers is a sum."""
    whole, over, under = [text for text in match.groups() if text]
    return f"({whole}+{over}/{under})" if 0 < int(over[:99]) < int(under[:99]) else match.group()


# Spellings that are others in disguise.
_GAP = r"(?:[\s$~]|\\[ ,;:!])*"
_GROUP = r"(\{(?:[^{}]|\{[^{}]*\})*\}|\w)"
_INDEX = r"(\d+|[a-zA-Z]|\{(?:\d+|[a-zA-Z])\})"
_REWRITES = [
    (needle, re.compile(pattern), text)
    for needle, pattern, text in (  # needle: no match without it
        ("color", r"\\(?:text)?color\s?\{[^{}]*\}", ""),
        ("USD", r"\bUSD\b", r"\\$"),
        ("$", r"\\\$\s?((?:\d|[.,]\d|\{,\}|,?\\!)+)", r"\1\\text{ dollars}"),
        ("¢", "¢", r"\\text{ cents}"),
        ("_", r"_\s?\{\\text\s?\{(\w+)\}\}", r"_{\1}"),
        ("base ", r"\s?(?:\\text\s?\{)?\s?\bbase\s?\}?\s?(\w+)\}?", r"_{\1}"),  # 101 base two
        (")_", r"\((\w+)\)_", r"\1_"),
        ("^", r"(\^\s?(?:\{[^{}]*\}|\w))\s?(_\s?(?:\{[^{}]*\}|\w))", r"\2\1"),  # \int^1_0
        (
            "int",
            rf"\\int\s?_{_GROUP}\s?\^{_GROUP}(.{{0,500}}?)(?:\\,)?\s?(?:d|\\mathrm\s?\{{d\}})([a-z])(?![a-z])",
            r"\\int{\1}{\2}{\3}{\4}",
        ),
        (
            "C",
            rf"(?<![\w}})\]])(?:\{{\}})?[\^_]{_INDEX}\s?C_{_INDEX}",
            r"\\binom{\1}{\2}",
        ),  # {}_5C_2
        ("C(", r"\bC\((\w+),\s?(\w+)\)", r"\\binom{\1}{\2}"),
        (
            "=",
            r"(^|[,\s$])([A-EI-OR-Za-ei-z]|\w\^\{-1\}|\\[Pp][hs]i)\s?\((\w(?:,\s?\w)*)\)(?=\s?=)",  # N(n) =
            r"\1\\bar{\2(\3)}",
        ),
        ("Delta", r"\\Delta\s?([a-zA-Z])", r"\\bar{\\Delta \1}"),
        ("(0)", r"([A-Z])\(0\)", r"\\bar{\1(0)}"),
        ("/", r"/([A-Z]{2,3})(?![A-Za-z])", r"/(\1)"),  # t/RC
        (
            "circ",
            r"(?<!\d)(\d+)\s?\^\s?\{?\\circ\}?\s?(\d+)'",
            r"(\1+\2/60)^\\circ",
        ),  # 60^\circ 30'
        (
            "",
            r"(?:\^\s?\{?\s?\\circ\s?\}?|\\degree)\s?(?:\\(?:text|mathrm)\s?\{)?\s?([CF])\b\}?",
            r"\\text{ deg\1}",
        ),
        ("prime", r"\^\s?\{\s?\\prime\s?\\prime\s?\}", "''"),
        ("prime", r"\^\s?(?:\\prime(?![a-zA-Z])|\{\s?\\prime\s?\})", "'"),
        ("'", r"(?<=\d)''", r"\\text{ arcsec}"),
        ("'", r"(?<=\d)'", r"\\text{ arcmin}"),
        ("m", r"(?i)\b([ap])\.\s?m\b\.?", r"\1m"),
        ("mu", r"\\mu\s?\\(?:text|mathrm)\s?\{\s?", r"\\text{mu"),
        (".", r"(?<![\d.])(\d*\.\d*)\((\d+)\)", r"\1\\overline{\2}"),  # 0.(36)
        (
            ".",
            r"(?<![\d.])(\d{0,9}\.\d{0,9}?)(\d{1,9})\2+\s?(?:\\[lc]?dots|\.\.\.)",
            r"\1\\overline{\2}",
        ),  # 0.3636...
        (".", r"(?<=\S)\s\((?:\\approx\s?)?(\d*\.\d+)\)$", r"\\approx \1"),  # \frac38 (0.375)
        (
            "",
            rf"(?<![\w.}}^/])(\d+)(?:{_GAP}\\[dtc]?frac\s?(?:\{{(\d+)\}}|(\d))\s?(?:\{{(\d+)\}}|(\d))"
            r"| (\d+)/(\d+)(?![\d.]))",
            _mixed,
        ),
        ("mod", r"\(\s?\\?(?:(?:text|mathrm)\s?\{)?\s?b?mod(?![a-z])\s?\}?", r"\\pmod("),  # (mod 5)
        (
            "mathbb",
            r"(?<=\S)(?:[,(\s]|\\[ ,;:]|\\quad){1,6}[a-z]\s?\\in\s?\\mathbb\s?\{?[NZ]\}?\s?\)?$",
            "",
        ),
        (
            "\\{",
            r"^\\\{\s?\w\s?(?:\\in\s?\\mathbb\s?\{?R\}?\s?)?(?:\\mid|\||:)(.*)\\\}$",
            r"\1",
        ),  # \{x : x > 2\}
        ("odot", r"(?<=[\d}])(?:\\[ ,;:]|[~\s])*[MLR]_(?:\\odot|\{\\odot\})$", r"\\text{ suns}"),
    )
]
_SCRIPTS = re.compile("([⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+)|([₀₁₂₃₄₅₆₇₈₉]+)")
_SCRIPT_DIGITS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻₀₁₂₃₄₅₆₇₈₉", "0123456789-0123456789")
_UNICODE = {
    "−–—‐‑": "-",
    "×": r"\times ",
    "·⋅∙": r"\cdot ",
    "÷": r"\div ",
    "∞": r"\infty ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "±": r"\pm ",
    "∓": r"\mp ",
    "√": r"\sqrt ",
    "∅": r"\emptyset ",
    "°º": r"\degree ",
    "Å": r"\AA ",
    "′’": "'",
    "″": "''",
    "≡": r"\equiv ",
    "∖": r"\setminus ",
    "…": r"\ldots ",
    "ℝ": r"\mathbb{R}",
    "½": r"\frac{1}{2}",
    "¼": r"\frac{1}{4}",
    "¾": r"\frac{3}{4}",
    "⅓": r"\frac{1}{3}",
    "⅔": r"\frac{2}{3}",
    "、": ",",
    "。": ".",
    "\u00a0": " ",
    "⟨": r"\langle ",
    "⟩": r"\rangle ",
    "⌊": r"\lfloor ",
    "⌋": r"\rfloor ",
    "⌈": r"\lceil ",
    "⌉": r"\rceil ",
    "π": r"\pi ",
    "α": r"\alpha ",
    "β": r"\beta ",
    "γ": r"\gamma ",
    "δ": r"\delta ",
    "θ": r"\theta ",
    "λ": r"\lambda ",
    "μ": r"\mu ",
    "σ": r"\sigma ",
    "τ": r"\tau ",
    "φ": r"\phi ",
    "ω": r"\omega ",
    "ρ": r"\rho ",
    "ε": r"\epsilon ",
    "Δ": r"\Delta ",
    "Ω": r"\Omega ",
    "Φ": r"\Phi ",
    "Σ": r"\Sigma ",
    "£€¥": r"\$",
}
_TRANSLATION = {ord(char): text for chars, text in _UNICODE.items() for char in chars}
_TRANSLATION |= {c: chr(c - 0xFEE0) for c in range(0xFF01, 0xFF5F)}  # full width
_TRANSLATION |= dict.fromkeys(
    [0xAD, 0xFEFF, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x206A)], ""
)


def plain(text: str) -> str:
    """The text in the spelling that the lexer reads."""
    text = re.sub(r"\s+", " ", text).strip("` ").rstrip("`;,\\ ")
    if not text.isascii():
        text = _SCRIPTS.sub(
            lambda m: ("^{" if m[1] else "_{") + m[0].translate(_SCRIPT_DIGITS) + "}", text
        )
        text = text.translate(_TRANSLATION)
    if "\\begin" not in text:
        text = re.sub(r"\\\\(?=[A-Za-z]{2})", r"\\", text)  # \\frac: an escape too many
    for needle, pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text) if needle in text else text
    return text
