"""Short texts whose case says something: formulas of chemistry and products of letters."""

from __future__ import annotations

import re

_SYMBOLS = (
    "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd "
    "In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np "
    "Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og"
)
_ELEMENTS = re.compile(rf"(?:(?:{'|'.join(sorted(_SYMBOLS.split(), key=len, reverse=True))})\d*)+")
_WORDS = frozenset(("no", "si", "in"))
"""Words that are symbols too: yes and no are answered in any case."""
_PRODUCT = re.compile(r"[A-Za-z]{2,3}")


def cased(text: str) -> str:
    """The letters of a short text of which the case may count, without what sets its numbers low; empty for other text."""
    bare = re.sub(r"\\text(?![a-z])|[\s_{}]", "", text[:40])
    is_short = len(text) < 40 and bare.lower() not in _WORDS
    return bare if is_short and (_ELEMENTS.fullmatch(bare) or _PRODUCT.fullmatch(bare)) else ""


def differ(one: str, other: str) -> bool:
    """Whether two texts that are the same but for case are not: two formulas, or letters of which each is small where the other is not."""
    if not one or not other or one == other:
        return False
    if _ELEMENTS.fullmatch(one) and _ELEMENTS.fullmatch(other):
        return True
    pairs = [(a, b) for a, b in zip(one, other, strict=False) if a != b]
    return any(a.islower() for a, _ in pairs) and any(b.islower() for _, b in pairs)
