"""Units and counted things: what converts into what, what says nothing, and words that change a
number or contradict it."""

from fractions import Fraction

from grading.tree import Node, Unreadable, num, pairs

# dimension: unit factor unit factor ...
_UNITS = """
length: nm 1e-9 mm 0.001 millimeter 0.001 cm 0.01 centimeter 0.01 centimetre 0.01 m 1 meter 1
length: metre 1 km 1000 kilometer 1000 kilometre 1000 in 0.0254 inch 0.0254 inche 0.0254 ft 0.3048
length: foot 0.3048 feet 0.3048 yd 0.9144 yard 0.9144 mi 1609.344 mile 1609.344 mum 1e-6 AA 1e-10
length^3: ml 1e-6 mL 1e-6 milliliter 1e-6 l 1e-3 L 1e-3 liter 1e-3 litre 1e-3 cc 1e-6
length^3: gal 0.003785411784 gallon 0.003785411784
mass: mug 1e-9 mg 1e-6 g 0.001 gram 0.001 kg 1 kilogram 1 lb 0.45359237 pound 0.45359237
mass: oz 0.028349523125 ounce 0.028349523125 ton 1000
time: mus 1e-6 ms 0.001 s 1 sec 1 second 1 min 60 minute 60 h 3600 hr 3600 hour 3600 day 86400
time: week 604800 yr 31557600 year 31557600
dollar: dollar 1 cent 0.01
frequency: Hz 1 hz 1 kHz 1000 MHz 1000000 GHz 1000000000
force: N 1 newton 1 kN 1000
energy: J 1 joule 1 kJ 1000 eV 1.602176634e-19 erg 1e-7 Wh 3600 cal 4.184 calorie 4.184 kcal 4184
power: W 1 watt 1 kW 1000 hp 745.7
pressure: Pa 1 pa 1 kPa 1000 kpa 1000 atm 101325 bar 100000 psi 6894.757 mmHg 133.322 torr 133.322
angle: arcmin 1 arcminute 1 arcsec 1/60 arcsecond 1/60
resistance: ohm 1 Omega 1
celsius: celsius 1 degC 1
fahrenheit: fahrenheit 1 degF 1
rate: bpm 1 ppm 1 rpm 1
euro: euro 1
"""
_OTHER_UNITS = """
rad radian mol C V A K T F coulomb volt ampere kelvin tesla farad month gbp yen rupee
am pm dB""".split()
_PREFIXES = "p 1e-12 n 1e-9 mu 1e-6 m 1e-3 c 1e-2 k 1e3 M 1e6 G 1e9 T 1e12"
_PREFIXED = "m g s A K mol N J W V Pa Hz eV L l F T C ohm Omega Wh cal bar".split()
CURRENCIES = pairs("""
    $ dollar USD dollar € euro EUR euro £ gbp GBP gbp ¥ yen JPY yen ₹ rupee INR rupee
    Rs rupee ¢ cent
""")
UNITS = {name: (name, Fraction(1)) for name in _OTHER_UNITS}
for _row in _UNITS.strip().splitlines():
    _dimension, _, _entries = _row.partition(": ")
    for _name, _factor in pairs(_entries).items():
        UNITS[_name] = (_dimension, Fraction(_factor))
GLUED = {*UNITS}  # read without a space before them: 0.64N
for _prefix, _factor in pairs(_PREFIXES).items():
    for _base in _PREFIXED:
        _dimension, _size = UNITS[_base]
        UNITS.setdefault(_prefix + _base, (_dimension, _size * Fraction(_factor)))

# Words that say nothing after a value: people, nouns without a plural s, and what goes with nouns.
_COUNTED = """
    unit people person man men woman women child children mice geese sheep fish deer dice data way
    any text approx approximately of total altogether each left more remaining ago away later old
    tall long wide high deep different full whole apart us st nd rd th""".split()
UNITS |= {name: ("", Fraction(1)) for name in _COUNTED}
NEGATIONS = """
no not but never cannot wrong incorrect incorrectly false except without impossible invalid rejected
extraneous unlike neither nor isn untrue mistake mistaken error unless maybe perhaps than""".split()
CHANGING = {
    *NEGATIONS,
    *"""
    times plus minus is was has does always otherwise equals this others thus his its yes as fails
    exceeds differs means gives makes seems appears becomes lacks misses needs requires contradicts
    less fewer greater smaller least most between negatives inverses reciprocals""".split(),
}

_NUMBERS = """
zero 0 one 1 two 2 three 3 four 4 five 5 six 6 seven 7 eight 8 nine 9 ten 10 eleven 11 twelve
12 thirteen 13 fourteen 14 fifteen 15 sixteen 16 seventeen 17 eighteen 18 nineteen 19 twenty 20
thirty 30 forty 40 fifty 50 sixty 60 seventy 70 eighty 80 ninety 90 dozen 12 score 20 hundred
100 thousand 1e3 lakh 1e5 million 1e6 crore 1e7 billion 1e9 trillion 1e12 quadrillion 1e15
quintillion 1e18 sextillion 1e21 septillion 1e24 octillion 1e27 nonillion 1e30 decillion 1e33
half 1/2 third 1/3 quarter 1/4 fourth 1/4 fifth 1/5 eighth 1/8 ninth 1/9 twelfth 1/12 twentieth
1/20 thirtieth 1/30 fortieth 1/40 fiftieth 1/50 sixtieth 1/60 seventieth 1/70 eightieth 1/80
ninetieth 1/90"""
NUMBERS = {name: Fraction(value) for name, value in pairs(_NUMBERS).items()}
for _name, _value in list(NUMBERS.items()):
    if _value > 3:
        NUMBERS.setdefault(_name + "th", 1 / _value)


def number_word(word: str) -> Fraction | None:
    """The value of a number word, also of a plural."""
    word = word.lower()
    for singular in (word, word.removesuffix("s"), word.replace("ves", "f")):
        if singular in NUMBERS:
            return NUMBERS[singular]
    return None


def multiplier(word: str) -> Fraction | None:
    """What a number word after a number makes of it: 3 dozen, 2 thirds."""
    value = number_word(word)
    is_digit = value is None or value.denominator == 1 and value < 100
    return None if is_digit and word.lower() not in ("dozen", "score") else value


def _unit(word: str) -> tuple[str, Fraction] | None:
    """The dimension of a unit, also of a plural, and its factor."""
    low = word.lower()
    for spelling in (word, word.removesuffix("s"), low, low.removesuffix("s")):
        if spelling in UNITS:
            return UNITS[spelling]
    return None


def known(word: str) -> bool:
    """A unit, a counted thing (a plural, as good as any word of that form), or a word that goes
    with one."""
    low = word.lower()
    if low in CHANGING or number_word(word) is not None:
        return False
    is_plural = low.endswith("s") and not low.endswith(("ss", "us", "is")) and len(low) > 3
    return is_plural or _unit(word) is not None


def _dimensions(text: str) -> tuple[dict, Fraction]:
    """({dimension: power}, factor) of a product of units, "m^1 s^-2"."""
    dimensions, factor = {}, Fraction(1)
    for part in text.split():
        name, _, power = part.rpartition("^")
        dimension, scale = _unit(name) or (name.lower().removesuffix("s"), Fraction(1))
        dimension, _, cube = dimension.partition("^")
        dimensions[dimension] = dimensions.get(dimension, 0) + int(power) * int(cube or 1)
        factor *= scale ** max(-9, min(9, int(power)))
    dimensions.pop("", None)  # of what is only counted
    return {name: power for name, power in dimensions.items() if power}, factor


def ratio(text: str, text2: str) -> Fraction | None:
    """How many of the second unit the first is: 1 if one of them says nothing, None if they do not
    convert."""
    (left, factor), (right, factor2) = _dimensions(text), _dimensions(text2)
    if not left or not right:
        return Fraction(1)
    return factor / factor2 if left == right else None


def hoisted(node: Node) -> Node:
    """A value with its unit outside: -(5 cm), 2 pi + 4 cm, 1 hour + 30 minutes. Raises
    Unreadable."""
    if node[0] not in ("neg", "add"):
        return node
    *rest, last = map(hoisted, node[1:])
    if last[0] != "unit":
        return node
    if not rest or rest[0][0] != "unit":
        return ("unit", (node[0], *rest, last[1]), last[2])
    left = rest[0]
    factor = ratio(last[2], left[2])
    if factor is None:
        raise Unreadable("a sum of different units")
    return ("unit", ("add", left[1], ("mul", num(factor), last[1])), left[2])
