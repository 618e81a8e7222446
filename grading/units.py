"""Units and counted things: what converts into what, what says nothing, and words that change the number."""

from fractions import Fraction

from grading.tree import Node, Unreadable, num

_ROWS = {
    "length": "nm 1e-9 mm 0.001 millimeter 0.001 cm 0.01 centimeter 0.01 centimetre 0.01 m 1 meter 1 metre 1 km 1000 "
    "kilometer 1000 kilometre 1000 in 0.0254 inch 0.0254 inche 0.0254 ft 0.3048 foot 0.3048 feet 0.3048 "
    "yd 0.9144 yard 0.9144 mi 1609.344 mile 1609.344 mum 1e-6 AA 1e-10",
    "length^3": "ml 1e-6 mL 1e-6 milliliter 1e-6 l 1e-3 L 1e-3 liter 1e-3 litre 1e-3 cc 1e-6",
    "mass": "mug 1e-9 mg 1e-6 g 0.001 gram 0.001 kg 1 kilogram 1 lb 0.45359237 pound 0.45359237 oz 0.028349523125 "
    "ounce 0.028349523125 ton 1000",
    "time": "mus 1e-6 ms 0.001 s 1 sec 1 second 1 min 60 minute 60 h 3600 hr 3600 hour 3600 day 86400 "
    "week 604800 yr 31557600 year 31557600",
    "money": "cent 0.01 dollar 1 usd 1",
    "frequency": "Hz 1 hz 1 kHz 1000 MHz 1000000 GHz 1000000000",
    "force": "N 1 newton 1 kN 1000",
    "energy": "J 1 joule 1 kJ 1000 eV 1.602176634e-19 erg 1e-7",
    "power": "W 1 watt 1 kW 1000",
    "angle": "arcmin 1 arcsec 1/60",
}
UNITS = {
    name: (dimension, Fraction(factor))
    for dimension, row in _ROWS.items()
    for name, factor in zip(row.split()[::2], row.split()[1::2])
}
UNITS |= {
    name: (name, Fraction(1))
    for name in """
    rad radian mol rpm pa kpa Pa kPa C V A K T F ohm Omega coulomb volt ampere kelvin tesla farad kcal cal calorie month
    euro gbp yen degC degF am pm""".split()
}
_SPEEDS = {"mph": "mile^1 hour^-1", "kph": "km^1 hour^-1"}
_NUMBERS = {
    "half": "1/2",
    "third": "1/3",
    "quarter": "1/4",
    "fourth": "1/4",
    "fifth": "1/5",
    "sixth": "1/6",
    "seventh": "1/7",
    "eighth": "1/8",
    "ninth": "1/9",
    "tenth": "1/10",
    "hundredth": "1/100",
    "thousandth": "1/1000",
    "dozen": 12,
    "score": 20,
    "hundred": 100,
    "thousand": 1000,
    "lakh": 10**5,
    "million": 10**6,
    "crore": 10**7,
    "billion": 10**9,
    "trillion": 10**12,
}
_COUNTED = set(
    """
    unit people person men women children mice geese feet sheep fish deer dice data square sq cubic cu any text approx
    in of total each left more different full whole old tall long wide high deep away percent""".split()
)
_NOT_COUNTED = set(
    """
    times plus minus is was has does always perhaps otherwise equals this others thus his its yes as fails exceeds
    negatives inverses reciprocals zeros ones twos threes fours fives sixes sevens eights nines tens""".split()
)


def multiplier(word: str) -> Fraction | None:
    """What a number word after a number makes of it: 3 dozen, 2 thirds."""
    word = word.lower()
    found = (
        _NUMBERS.get(word)
        or _NUMBERS.get(word.removesuffix("s"))
        or _NUMBERS.get(word.replace("ves", "f"))
    )
    return Fraction(found) if found else None


def known(word: str) -> bool:
    """A unit, a counted thing (a plural, as good as any word of that form), or a word that goes with one."""
    low = word.lower()
    plural = (
        low.endswith("s")
        and not low.endswith(("ss", "us", "is"))
        and len(low) > 3
        and low not in _NOT_COUNTED
    )
    return plural or any(
        name in UNITS or name in _SPEEDS or name in _COUNTED for name in (word, low)
    )


def _dimensions(text: str) -> tuple[dict, Fraction]:
    """({dimension: power}, factor) of a product of units, "m^1 s^-2"; nothing for what says nothing ("units")."""
    dimensions, factor, power_of_next = {}, Fraction(1), 1
    text = " ".join(_SPEEDS.get(part.rpartition("^")[0], part) for part in text.split())
    for name, _, power in [part.rpartition("^") for part in text.split()]:
        low = name.lower()
        if low in ("square", "sq", "cubic", "cu"):
            power_of_next = 3 if low[0] == "c" else 2
            continue
        singular = next(
            (one for one in (name, low, low.removesuffix("s")) if one in UNITS),
            low.removesuffix("s"),
        )
        power, power_of_next = int(power) * power_of_next, 1
        dimension, scale = UNITS.get(singular, (singular, Fraction(1)))
        if dimension not in _COUNTED:
            dimension, _, cube = dimension.partition("^")
            dimensions[dimension] = dimensions.get(dimension, 0) + power * int(cube or 1)
            factor *= scale ** max(-9, min(9, power))
    return {name: power for name, power in dimensions.items() if power}, factor


def ratio(text: str, text2: str) -> Fraction | None:
    """How many of the second unit the first is: 1 if one of them says nothing, None if they do not convert."""
    (left, factor), (right, factor2) = _dimensions(text), _dimensions(text2)
    if not left or not right:
        return Fraction(1)
    return factor / factor2 if left == right else None


def hoisted(node: Node) -> Node:
    """A value with its unit outside: -(5 cm), -(5%), 2 pi + 4 cm, 1 hour + 30 minutes. Raises Unreadable."""
    if node[0] not in ("neg", "add"):
        return node
    *rest, last = map(hoisted, node[1:])
    if (
        last[0] == "percent"
        and not rest
        or last[0] == "unit"
        and (not rest or rest[0][0] != "unit")
    ):
        return (last[0], (node[0], *rest, last[1]), *last[2:])
    if last[0] != "unit":
        return node
    left, right = rest[0], last
    factor = ratio(right[2], left[2])
    if factor is None:
        raise Unreadable("a sum of different units")
    return ("unit", ("add", left[1], ("mul", num(factor), right[1])), left[2])
