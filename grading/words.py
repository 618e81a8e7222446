r"""Tables of the LaTeX and plain text that an answer may contain; rewriting of unusual spellings.

A token is (kind, value): ("num", digits), ("id", letter), ("text", word), ("money", currency),
("begin" | "end", environment), ("function", name), a command with arguments, ("pair", "div"), or
a symbol, whose kind is its value, ("+", "+").
"""

import re
import unicodedata

from grading.units import NEGATIONS, NUMBERS


def _table(rows: str) -> dict[str, tuple]:
    """Maps words to tokens. A row is a kind (op: a symbol), a value (=: the word) and words."""
    table = {}
    for row in rows.strip().splitlines():
        kind, value, *words = row.split()
        for word in words:
            name = word if value == "=" else value
            table[word] = (name if kind == "op" else kind, name)
    return table


PLAIN = _table("""
    function asin arcsin asin
    function acos arccos acos
    function atan arctan atan arctg
    function asinh arcsinh arsinh
    function acosh arccosh arcosh
    function atanh arctanh artanh
    function cot cot ctg
    function tan tan tg
    function csc csc cosec
    function acot arccot
    function = sin cos sec sinh cosh tanh exp ln log lg gcd lcm max min abs floor ceil
    function = cis det
    root = sqrt
    op oo infinity inf oo infty
    op cup union
    op = pi
""")
TEXT = """
    text textbf textit textrm mbox hbox mathrm operatorname textsf texttt textnormal emph textup
    unit""".split()
COMMANDS = PLAIN | dict.fromkeys(TEXT, ("skip", ""))
COMMANDS |= _table(r"""
    pair div frac dfrac tfrac cfrac
    pair binom binom dbinom tbinom
    integral = int
    big = sum prod lim
    accent = dot ddot hat bar vec tilde overline overrightarrow widehat widetilde mathbb
    op * cdot times ast
    op / div
    op <= le leq leqslant
    op >= ge geq geqslant
    op < lt
    op > gt
    op != ne neq
    op ~ approx simeq sim
    op +- pm
    op -+ mp
    op cup cup bigcup
    op minus setminus backslash
    op | vert lvert rvert
    op ( langle lparen
    op ) rangle rparen
    op {{ lbrace
    op }} rbrace
    op [ lbrack
    op ] rbrack
    op to to rightarrow
    op dots ldots dots cdots
    op mod bmod mod
    op or lor vee
    op and land wedge
    op deg degree textdegree
    op : colon
    op empty emptyset varnothing
    op row cr
    op % percent
    op = reals cap in mid lfloor rfloor lceil rceil equiv pmod choose over
    id epsilon varepsilon
    id theta vartheta
    id phi varphi
    id = alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau
    id = upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega hbar
    id = ell odot oplus partial nabla mho Re Im star bullet dagger square aleph perp parallel AA
    skip = left right mleft mright middle displaystyle textstyle scriptstyle limits nolimits big
    skip = Big bigl bigr Bigl Bigr bigg Bigg mathbf boldsymbol bm pmb mathop mathit mathsf mathtt
    skip = mathnormal boxed fbox bf it rm tt hline thinspace enspace space medspace mathopen
    skip = mathclose mathbin mathrel mathord mathstrut cal mathcal mathfrak mathscr quad qquad
    skip = angle measuredangle triangle tiny small normalsize large Large LARGE huge Huge
    skip = underline ensuremath nonumber notag centering
""")
WORDS = _table("""
    op % percent pct percentage
    op deg degree degrees deg
    op / per
    op = or and mod
""")
# Spellings that are others in disguise, in the order in which they are rewritten. Each rule is a
# needle, without which a text does not match (ANY: there is none), a pattern, which may go over
# several lines, and what replaces it. Names in capitals stand for the patterns of _PARTS.
_REWRITES = r"""
color
\\(?:text)?color\s?\{[^{}]*\}
=>

phantom
\\[hv]?phantom\s?\{[^{}]*\}
=>

space
\\[hv]space\*?\s?\{[^{}]*\}
=>

{
(?<!\\)\{\s?\}
=>

{
\{\s?([:=<>])\s?\}
=> \1

ANY
^(["'*]{1,2})(.+)\1$
=> \2

ANY
^(?:\s|=|\\(?:therefore|because|implies|(?:Long)?[Rr]ightarrow|to)(?![a-z]))+
=>

ANY
^(TEXT)?(?!.*\b(?:NEGATION)\b)[A-Za-z\s]*
\b(?:is|are|equals|so|thus|hence|[Tt]herefore|So|Thus|Hence)\b\s?[:,]?
=> \1

ANY
^[\s$]*(TEXT)?(?![^:]*\b(?:NEGATION)\b)[A-Za-z\s]{4,}(\}?)\s?:(?!\s?\\?[A-Z])
=> \1\2

ANY
(?<=\d)\s?\^?\s?
(?:TEXT(?:ORDINAL)\s?\}|\{\s?(?:TEXT)?(?:ORDINAL)\s?\}{1,2}|(?:ORDINAL)(?![A-Za-z]))$
=>

10
(?<=\d)\s?(?:TEXT)?[xX]\s?\}?\s?(?=10\s?\^)
=> *

ANY
\b(\d{1,2})(?:ORDINAL)?\s(?:of\s)?(MONTH)
=> \2 \1

ANY
\b(MONTH\s\d{1,2})(?:ORDINAL)?,?\s(?=\d{4}\b)
=> \1/

hundred and
hundred and(?=\s[a-z])
=> hundred

and
(\d)\s?(TEXT)?and\s(?:a|one)\s(half|third|quarter)(?(2)([a-z\s]*)\})
=> \1+\\text{\3 \4}

and
\b(?!minutes|seconds|inches|cents)([a-z]+\s?\}?\s?(?:TEXT)?)\band(?=\s?\}?\s?[\d.]+\s?(?:TEXT)?
(?:minutes?|mins?|seconds?|secs?|inch(?:es)?|cents?|oz|ounces?)\b)
=> \1+

cent
(\\\$\s?[\d.]+\s?(?:TEXT)?)\band(?=\s?\}?\s?[\d.]+\s?(?:TEXT)?cents?\b)
=> \1+

\$
\\\$(?=\s?[\d.,]+\s?(?:TEXT)?(?:US\s)?(?:dollars|USD)\b)
=>

-
\b(NUMBER)-(?=NUMBER)
=> \1~

per cent
per\scent
=> percent

frac
\\[dt]?frac\s?\{\s?((?:TEXT[^{}]*\}[^{}]*)+)\}\s?\{\s?((?:TEXT[^{}]*\}[^{}]*)+)\}
=> \1/\2

[
\]\s?([^\s,()[\]][^,()[\]]*,[^,()[\]]+)(?<!sqrt)\[
=> (\1)

]
^(?:\\left\s?)?\](?=[^()[\]]+\]$)
=> (

[
^((?:\\left\s?)?\[[^()[\]]+)(?<!sqrt)\[$
=> \1)

_
_\s?(\{)?\\text\s?\{(\w+)\}(?(1)\})
=> _{\2}

base
\s?(TEXT\(?)?(?:in\s)?\bbase(?(1)(?:\s?\}\s?(\w+)|\s(\w+)\)?\s?\})|\s(\w+))
=> _{\2\3\4}

)_
\((\w+)\)_
=> \1_

^
(\^\s?(?:\{[^{}]*\}|\w))\s?(_\s?(?:\{[^{}]*\}|\w))
=> \2\1

int
\\int\s?_GROUP\s?\^GROUP(.{0,500}?)(?:\\,)?\s?(?:d|\\mathrm\s?\{d\})([a-z])(?![a-z])
=> \\int{\1}{\2}{\3}{\4}

C
(?<![\w})\]])[\^_]INDEX\s?C_INDEX
=> \\binom{\1}{\2}

C(
\bC\((\w+),\s?(\w+)\)
=> \\binom{\1}{\2}

equiv
(\([a-z]\))\s?\\equiv(?![a-z]|.{0,60}mod)
=> \1=

=
(^|[,\s$])([A-EI-OR-Za-ei-z]|\w\^\{-1\}|\\[Pp][hs]i)\s?\((\w(?:,\s?\w)*)\)(?=\s?=)
=> \1\\bar{\2(\3)}

Delta
\\Delta\s?([a-zA-Z])
=> \\bar{\\Delta \1}

(0)
([A-Z])\(0\)
=> \\bar{\1(0)}

\over
\\over(?:line|rightarrow)\s?\{([A-Z]{2,})\}
=> \1

/
/([A-Z]{2,3})(?![A-Za-z])
=> /(\1)

prime
\^\s?\{\s?\\prime\s?\\prime\s?\}
=> ''

prime
\^\s?(?:\\prime(?![a-zA-Z])|\{\s?\\prime\s?\})
=> '

circ
(?<!\d)(\d+)\s?\^\s?\{?\\circ\}?\s?(\d+)'(?!')(?:\s?(\d+)'')?
=> (\1+\2/60+0\3/3600)^\\circ

ANY
(?:\^\s?\{?\s?\\circ\s?\}?|\\degree)\s?(?:TEXT([CF])\s?\}|([CF])\b)
=> \\text{ deg\1\2}

ANY
(?<=\d)(?:\.(?=\d{3}\.\d{3}(?!\d))|(?<=\.\d{3})\.(?=\d{3}(?!\d))|'(?=\d{3}(?!\d)))
=> \\,

'
(?<=\d)''
=> \\text{ arcsec}

'
(?<=\d)'
=> \\text{ arcmin}

m
(?i)\b([ap])\.\s?m\b\.?
=> \1m

AM
(?<=:\d\d)\s?AM\b
=> am

PM
(?<=:\d\d)\s?PM\b
=> pm

ph
(?<![a-zA-Z])(?:km|k)ph\b
=> km/h

mph
(?<![a-zA-Z])mph\b
=> mi/h

fps
(?<![a-zA-Z])fps\b
=> ft/s

sq
(?<![a-zA-Z\\])sq(?:uare\s|\.\s?|\s)([a-zA-Z]+)
=> \1^2

cu
(?<![a-zA-Z\\])cu(?:bic\s|\.\s?|\s)([a-zA-Z]+)
=> \1^3

mu
\\mu\s?\\(?:text|mathrm)\s?\{\s?
=> \\text{mu

dot
\\dot\s?\{?(\d)\}?(\d*)\\dot\s?\{?(\d)\}?
=> \\overline{\1\2\3}

.
(?<![\d.])(\d*\.\d*)\((\d+)\)
=> \1\\overline{\2}

.
(?<![\d.])(\d{0,9}\.\d{0,9}?)(\d{1,9})\2+\s?(?:\\[lc]?dots|\.\.\.)
=> \1\\overline{\2}

.
(?<=\S)\s\((?:\\approx\s?)?(\d*\.\d+)\)$
=> \\approx \1

mod
\(\s?\\?(?:TEXT)?b?mod(?![a-z])\s?\}?
=> \\pmod(

mathbb
(?<=\S)(?:[,(\s]|\\[ ,;:]|\\quad){1,6}[a-z]\s?\\in\s?\\mathbb\s?\{?[NZ]\}?\s?\)?$
=>

mathbb
^[a-z]\s?\\in\s?\\mathbb\s?\{?R\}?\s?[,:;]\s?(?=\S)
=>

\{
^\\\{\s?[a-zA-Z]\s?(?:\\in\s?\\mathbb\s?\{?R\}?\s?)?(?:\\mid|\||:)(.*)\\\}$
=> \1

mathbb
\\mathbb\s?(?:\{\s?R\s?\}|R)
=> \\reals~

&
(?<!\\)&(?!nbsp|.{0,2000}(?:matrix|array)\})
=>

to
(?<=\d)\s?(?:TEXT)?\bto\s?\}?\s?(?=\d)
=> :

.
(?<!\.)\.[\s$~]*$
=>

all
(?<=\S)(?:\\[ ,;:]|\\q?quad|[,(\s]){0,6}(?:TEXTfor\sall|\\forall)
(?![a-z]|.{0,60}\b(?:NEGATION|or|and)\b)[^=<>,;\d]{0,60}$
=>

real
(?i)(TEXT)?\b(?:all\sreal\snumbers|all\sreals|real\snumbers)\s?(?(1)\})
=> \\reals~

ANY
(?i)(TEXT)?\b(?:none|no\s(?:real\s)?solutions?|empty\sset)[\s.]*(?(1)\})[\s$]*$
=> \\emptyset~

odot
(?<=[\d}])(?:\\[ ,;:]|[~\s])*[MLR]_(?:\\odot|\{\\odot\})$
=> \\text{ suns}
"""
_PARTS = {
    "TEXT": r"\\(?:text(?:bf|rm)?|mathrm)\s?\{\s?",
    "GROUP": r"(\{(?:[^{}]|\{[^{}]*\})*\}|\\[a-zA-Z]+|\w)",
    "INDEX": r"(\d+|[a-zA-Z]|\{(?:\d+|[a-zA-Z])\})",
    "MONTH": r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]*",
    "ORDINAL": "st|nd|rd|th",
    "NEGATION": "|".join(NEGATIONS),
    "NUMBER": "(?:" + "|".join(NUMBERS) + ")",
}


def _compile(rule: str) -> tuple[str, re.Pattern, str]:
    needle, *lines, replacement = rule.strip().splitlines()
    pattern = "".join(lines)
    for name, part in _PARTS.items():
        pattern = pattern.replace(name, part)
    return needle.replace("ANY", ""), re.compile(pattern), replacement.removeprefix("=>").lstrip()


_RULES = [_compile(rule) for rule in _REWRITES.split("\n\n")]
_GAP = r"(?:[\s$~]|\\[ ,;:!])*"
_MIXED = re.compile(
    rf"(?<![\w.}}^/])(?:(\d+)|\{{(\d+)\}})"
    rf"(?:{_GAP}\\[dtc]?frac\s?(?:\{{(\d+)\}}|(\d))\s?(?:\{{(\d+)\}}|(\d))| (\d+)/(\d+)(?![\d.]))"
)
_SCRIPTS = re.compile("([⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+)(?:⁄([₀₁₂₃₄₅₆₇₈₉]+))?|([₀₁₂₃₄₅₆₇₈₉]+)")
_SPELLINGS = r"""
−–—‐‑ -
× \times
·⋅∙ \cdot
∗ *
÷ \div
⁄∕ /
∶ :
∞ \infty
∪ \cup
∩ \cap
∈ \in
≤ \le
≥ \ge
≠ \ne
≈ \approx
± \pm
∓ \mp
√ \sqrt
∛ \sqrt[3]
∜ \sqrt[4]
∅ \emptyset
°º \degree
∠ \angle
ÅÅ \AA
℃ ^\circ\text{C}
℉ ^\circ\text{F}
µ \mu
Ω \Omega
′’‘ '
″“” "
≡ \equiv
∖ \setminus
… \ldots
∴ \therefore
⇒→ \implies
⟨ \langle
⟩ \rangle
⌊ \lfloor
⌋ \rfloor
⌈ \lceil
⌉ \rceil
、 ,
。 .
"""
_UNICODE = {}
for _line in _SPELLINGS.strip().splitlines():
    _chars, _spelling = _line.split()
    _UNICODE |= dict.fromkeys(_chars, _spelling + " " * _spelling.startswith("\\"))


def _mixed(match: re.Match) -> str:
    """1\\frac45 and 1 4/5: an integer before a proper fraction of integers is a sum."""
    whole, over, under = filter(None, match.groups())
    return f"({whole}+{over}/{under})" if 0 < int(over[:99]) < int(under[:99]) else match.group()


def _script(match: re.Match) -> str:
    above, below, index = match.groups()
    if below:
        return f"\\frac{{{above}}}{{{below}}}"
    return f"^{{{above}}}" if above else f"_{{{index}}}"


def _spell(char: str) -> str:
    """A character as the lexer knows it, if it can be told from its name or class."""
    if char.isascii() or char in _UNICODE:
        return _UNICODE.get(char, char)
    kind, *_, last = unicodedata.name(char, "?").replace("LAMDA", "LAMBDA").split()
    if kind == "GREEK":
        return f"\\{last.lower() if char.islower() else last.capitalize()} "
    if kind == "DOUBLE-STRUCK":
        return f"\\mathbb{{{last}}}"
    over, slash, under = unicodedata.normalize("NFKC", char).partition("⁄")
    if slash:
        return f"\\frac{{{over}}}{{{under}}}"
    return "" if unicodedata.category(char) == "Cf" else _UNICODE.get(over, over)


def plain(text: str) -> str:
    """The text in the spelling that the lexer reads."""
    if not text.isascii():
        text = "".join(map(_spell, _SCRIPTS.sub(_script, text)))
    text = re.sub(r"\s+", " ", text).strip("` ").rstrip("`;,\\ ")
    if "\\begin" not in text:
        text = re.sub(r"\\\\(?=[A-Za-z]{2})", r"\\", text)  # \\frac: an escape too many
    for needle, pattern, replacement in _RULES:
        if needle in text:
            text = pattern.sub(replacement, text)
    return _MIXED.sub(_mixed, text)
