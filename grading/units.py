"""Units: what converts into what, and what says nothing."""

from __future__ import annotations

from fractions import Fraction

_ROWS = {
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
    "other": "rad 1 radian 1 mol 1 rpm 1 pa 1 kpa 1000"}
UNITS = {name: (dimension, Fraction(factor)) for dimension, row in _ROWS.items()
         for name, factor in zip(row.split()[::2], row.split()[1::2])}
_SPEEDS = {"mph": (("mile", 1), ("hour", -1)), "kph": (("km", 1), ("hour", -1))}
COUNTS = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10 ** 6, "billion": 10 ** 9, "trillion": 10 ** 12}
NOT_UNITS = set("""
    is are was not no isn't the a wrong right than least most to where for if when answer plus minus times over
    squared cubed half third quarter with without except but then all some only both mod hence so also""".split())


def unit(text: str) -> tuple[dict, Fraction] | None:
    """({dimension: power}, factor) of a product of units, "m^1 s^-2"; None if it says nothing ("square units")."""
    dimensions, factor, power_of_next = {}, Fraction(1), 1
    parts = [part.rpartition("^") for part in text.split()]
    for name, power in [pair for name, _, power in parts for pair in _SPEEDS.get(name, ((name, int(power)),))]:
        if name.lower() in ("square", "sq", "cubic"):
            power_of_next = 3 if name.lower() == "cubic" else 2
            continue
        singular = name if name in UNITS else name.lower().removesuffix("s")
        power, power_of_next = power * power_of_next, 1
        dimension, scale = UNITS.get(singular, ("named " + singular, Fraction(1)))
        if dimension != "named unit":
            dimension = singular if dimension == "other" else dimension
            dimensions[dimension] = dimensions.get(dimension, 0) + power
            factor *= scale ** max(-9, min(9, power))
    return (dimensions, factor) if dimensions else None
