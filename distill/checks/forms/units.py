r"""Units behind a number: which text is one, whether two mean the same, and what a value in one is in another.

pint knows the units of measure and of money made known here; whatever it does not know (`marbles`, `个`) is a word that counts things.
Case counts (mW, MW), but where a spelling means no unit at all (`Kg`), the lower-case one is meant.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

from distill.checks.forms import locales
from distill.checks.forms.plain import as_words
from distill.checks.forms.scales import is_value_word

PERCENT = "%"
_MONEY = {
    **{"$": "USD", "us$": "USD", "usd": "USD", "dollar": "USD", "dollars": "USD", "us dollars": "USD", "bucks": "USD", "美元": "USD"},
    **{"€": "EUR", "eur": "EUR", "euro": "EUR", "euros": "EUR", "欧元": "EUR", "£": "GBP", "gbp": "GBP"},
    **{"¥": "CNY", "yuan": "CNY", "cny": "CNY", "rmb": "CNY", "元": "CNY", "yen": "JPY", "jpy": "JPY", "円": "JPY"},
    **{
        "₹": "INR",
        "inr": "INR",
        "rupee": "INR",
        "rupees": "INR",
        "रुपये": "INR",
        "rs": "INR",
        "rs.": "INR",
        "₩": "KRW",
        "won": "KRW",
        "krw": "KRW",
    },
    **{"₽": "RUB", "rub": "RUB", "ruble": "RUB", "rubles": "RUB", "¢": "USD_cent", "cent": "USD_cent", "cents": "USD_cent"},
}
MONEY_SIGN = re.compile(r"(?:US\$|[$€£¥₹₩₽]|(?:USD|EUR|GBP|JPY|CNY|INR|Rs\.?)(?![A-Za-z]))\s*")
"""What stands before an amount of money."""
_AMBIGUOUS = {frozenset({"GBP", "pound"}), frozenset({"¥", "JPY"})}  # £ and a pound; ¥ is read as Chinese money, and may be Japanese
_SHORT = (
    "m g s h L l K N J W V A C F km cm mm nm um μm dm kg mg lb lbs oz ft mi yd mph kmh kph mL ml kJ MJ kcal kW MW mW GW kWh mV kV mA Pa "
    "kPa MPa hPa bar atm mol ms ns min hr hrs sec rad deg eV keV MeV Hz kHz MHz GHz MB GB TB kB Ω st nd rd th USD EUR GBP"
)
_GLUED = frozenset(_SHORT.split())
"""What may stand at a number without a space between, or be a single letter: else `2x` were two x."""
_OTHER = (
    "or and if when to is are was were mod pi sin cos tan cot sec csc log ln exp sqrt frac not plus minus times over remainder r than of "
    "by for inf infinity therefore because where with below above under choose zero"
)
_NO_UNIT = frozenset(_OTHER.split())
_REST = r"[^\d<>=+!?,;:|&@#\[\]]*"
_SHAPE = re.compile(rf"[^\W\d_]{_REST}(?:(?:\^ ?\{{? ?-?|(?<=[A-Za-z])(?=[23]\b))\d\b{_REST}){{0,4}}|[°%$€£¥₹₩₽¢Ω]{_REST}")
_SPELLINGS = {
    r"\\(?:cdot|times)\s*|[·⋅]": "*",
    r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}": r"(\1)/(\2)",
    r"\b[sS]q(?:uare)?\.?\s+([A-Za-z]+)": r"\1**2",
    r"\b[cC]u(?:bic)?\.?\s+([A-Za-z]+)": r"\1**3",
    r"\b([A-Za-z]+)\s+squared\b": r"\1**2",
    r"\b([A-Za-z]+)\s+cubed\b": r"\1**3",
    r"\s+per\s+": "/",
    r"(?:°|\bdeg(?:rees?)?)\s*(?:C\b|Celsius\b|celsius\b)": "degC",
    r"(?:°|\bdeg(?:rees?)?)\s*(?:F\b|Fahrenheit\b|fahrenheit\b)": "degF",
    r"°": "degree",
    r"\^\s*\{?\s*(-?\d)\s*\}?": r"**\1",
    r"(?<=[A-Za-z])([23])\b": r"**\1",
    r"\bkmh\b": "km/h",
    r"\bNm\b": "N*m",
}
_STEPS = [(re.compile(old), new) for old, new in _SPELLINGS.items()]
_SAFE = re.compile(r"(?:[A-Za-zμΩ_ /()]|\*(?!\*)|\*\*-?\d(?!\d))+")
_WORD = re.compile(r"[^\W\d_]+")


def unit_in(rest: str, *, alone: bool = False) -> str | None:
    """The unit that the rest of a text behind its number is; null where it is something else.

    Args:
        rest: What follows the number, as it stands.
        alone: Whether it is set apart, as upright text is.
    """
    set_apart = alone or rest[:1] == " " or rest.lstrip().startswith("\\text")
    unit = as_words(rest).replace("\\Omega", "Ω")
    unit = re.sub(r"\\mu\s*", "μ", unit)
    if (
        unit in ("", "μ")
        or len(unit) > 60
        or is_value_word(unit)
        or _SHAPE.fullmatch(re.sub(r"\\(?:cdot|times|frac)|[{}]", " ", unit).strip()) is None
    ):
        return None
    words = _WORD.findall(unit.replace("\\cdot", " ").replace("\\frac", " ").replace("\\times", " "))
    if any(word.lower() in _NO_UNIT for word in words) and _known(unit) is None:
        return None
    if unit.lower().rstrip(".") in ("%", "per cent", "percentage", "pct") or locales.units().get(locales.folded(unit)) == "percent":
        return PERCENT
    is_ascii = unit[0].isascii() and unit[0].isalpha()
    if is_ascii and not set_apart and not all(word in _GLUED for word in words):
        return None
    if (
        not alone
        and not rest.lstrip().startswith("\\text")
        and any(len(word) == 1 and word not in _GLUED and word.isascii() for word in words)
    ):
        return None
    return unit


def is_measure(unit: str) -> bool:
    """Whether a text is certainly a unit of measure, so that it needs no space or upright letters to be told from a product."""
    words = _WORD.findall(unit)
    return bool(words) and all(word in _GLUED or len(word) > 2 for word in words) and _known(unit) is not None


def factor_free(one: str, other: str) -> bool:
    """Whether two units mean the same, so that values in them are compared as they are."""
    if one == other:
        return True
    first, second = _known(one), _known(other)
    if first is not None and second is not None:
        return bool(first == second) or any(frozenset({_code(a), _code(b)}) in _AMBIGUOUS for a, b in ((one, other), (other, one)))
    return _same_words(one, other)


def converted(value: Fraction, one: str, other: str) -> Fraction | None:
    """What a value in one unit is in another; null where they measure different things or are words."""
    first, second = _known(one), _known(other)
    if first is None or second is None:
        return None
    try:
        return Fraction(_registry().Quantity(value, first).to(second).magnitude)
    except Exception:  # pint has an error for each way in which units differ
        return None


def prepare() -> None:
    """Loads what takes half a second the first time."""
    _registry()
    locales.units()
    locales.scales()
    locales.months()
    locales.halves_of_day()


@lru_cache(maxsize=1)
def _registry() -> Any:
    import pint

    registry: Any = pint.UnitRegistry(non_int_type=Fraction)
    for code in ("USD", "EUR", "GBP", "CNY", "JPY", "INR", "KRW", "RUB"):
        registry.define(f"{code} = [{code}]")
    registry.define("USD_cent = USD / 100")
    return registry


@lru_cache(maxsize=4096)
def _known(unit: str) -> Any:
    """The unit as pint has it, or null."""
    money = _MONEY.get(unit.lower()) or locales.money().get(locales.folded(unit))
    text = (
        money or _in_english(unit) or " ".join(_MONEY.get(word.lower(), word) for word in re.split(r"(?<=[$€£¥₹])|(?=/)|\s", unit) if word)
    )
    for pattern, new in _STEPS:
        text = pattern.sub(new, text)
    text = re.sub(r"(?<=[\w)])\s+(?=[\w(])", "*", text.strip().rstrip("."))
    if not 0 < len(text) <= 40 or _SAFE.fullmatch(text) is None:
        return None
    for spelling in dict.fromkeys([text, text.lower()] if money is None else [text]):
        try:
            return _registry().parse_units(spelling)
        except Exception:  # an unknown name, or no name at all
            continue
    return None


def _in_english(unit: str) -> str | None:
    """The unit of measure that a name in some language is, whole or part by part; null where it is none or has case to tell."""
    if unit.isascii() and len(unit) < 3:
        return None
    names, name = locales.units(), locales.folded(unit)
    if name in names or name == "千米":
        return names.get(name, "kilometer")
    parts = [names.get(locales.folded(part)) for part in unit.split("/")]
    return "/".join(part for part in parts if part) if len(parts) == 2 and all(parts) else None


def _code(unit: str) -> str:
    return "¥" if unit.strip() == "¥" else _MONEY.get(unit.lower()) or _singular(unit.lower())


def _same_words(one: str, other: str) -> bool:
    """Whether two words that count things are one: in the singular and the plural, or one of them said with more words."""
    if re.findall(r"\d", one) != re.findall(r"\d", other):
        return False
    first, second = ({_singular(word) for word in _WORD.findall(unit.casefold())} for unit in (one, other))
    return bool(first and second) and (first <= second or second <= first)


def _singular(word: str) -> str:
    if not word.isascii() or len(word) < 4:
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    return word.removesuffix("es") if word.endswith(("shes", "ches", "xes", "sses")) else word.removesuffix("s")
