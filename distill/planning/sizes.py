"""Bytes by arithmetic: of cards, optimizers, what a launch shares out, and ranges of them. Imports no torch.

What is not reckoned from shapes is an allowance, and stands here: it is what is known of these libraries in general, not measured yet.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from distill.errors import RecipeError, shown
from distill.losses.settings import Objective
from distill.recipe.launches import LaunchKind
from distill.recipe.models import FullFinetune, LoraAdapter

GIB = 2**30
MARKETED = (8, 12, 16, 24, 48, 80)
"""Sizes of cards, as they are sold."""
_REPORTED = 0.975  # of that, what a program can have
_CARDS = {
    **{"T4": 14.6, "P100": 15.9, "V100": 15.8, "V100 32GB": 31.7, "A10": 22.0, "L4": 22.0, "A40": 44.4, "L40S": 44.4, "RTX A6000": 47.4},
    **{"A100 40GB": 39.4, "A100": 79.1, "H100": 79.1, "H200": 139.7, "RTX 3060": 11.7, "RTX 3070": 7.7, "RTX 3080": 9.7, "RTX 3090": 23.6},
    **{"RTX 4060": 7.7, "RTX 4070": 11.7, "RTX 4080": 15.7, "RTX 4090": 23.6, "RTX 5090": 31.3},
}
"""GiB that a card gives, about: a driver and error correction take a little."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A weight's half byte, its share of a scale a block of 64 in one byte, and of the scale of 256 of these."""
_STATES = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_apex_fused"), 2.0),
    **dict.fromkeys(("paged_adamw", "paged_adamw_32bit", "stable_adamw"), 2.0),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "adamw_torch_8bit"), 2 * (1 / 4 + 1 / 256)),
    "adamw_torch_4bit": 2 * (1 / 8 + 1 / 128),
    **dict.fromkeys(("lion", "lion_32bit", "paged_lion", "paged_lion_32bit", "adagrad", "rmsprop", "rmsprop_bnb"), 1.0),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit", "rmsprop_bnb_8bit"), 1 / 4 + 1 / 256),
    **dict.fromkeys(("ademamix", "paged_ademamix_32bit"), 3.0),
    **dict.fromkeys(("ademamix_8bit", "paged_ademamix_8bit"), 3 * (1 / 4 + 1 / 256)),
    "adafactor": 0.01,
    "sgd": 0.0,
}
"""What an optimizer keeps of a weight that is trained, as a multiple of four bytes."""


class Asked(NamedTuple):
    """A step, of which is to be known what it takes."""

    rows: int
    tokens: int
    """Of each row."""
    dtype: str
    """Of the weights, as torch calls it."""
    compute: str
    """Of the products."""
    adapter: LoraAdapter | FullFinetune | None = None
    """What is trained; null only reads."""
    objective: Objective | None = None
    """The loss; null where nothing is trained."""
    candidates: int = 0
    """Of a target, at most."""
    buffer: int = 2**25
    """Logits in memory at once."""
    checkpointing: bool = False
    """Whether only what goes into each layer is kept for the backward pass."""
    eager: bool = False
    """Whether attention keeps a matrix of all positions."""
    caches: bool = False
    """Whether keys and values are kept."""


class Walk(NamedTuple):
    """Bytes that a step takes, at most at a time, in each part of it; linear in depth, and in the number of tokens."""

    stored: int
    """At the end of the forward pass: what the backward pass needs, or keys and values."""
    forward: int
    loss: int
    backward: int

    @property
    def peak(self) -> int:
        """Over all parts."""
        return max(self)

    def extended(self, further: Walk, by: float) -> Walk:
        """On the line through two, the second of which is at 1.

        Args:
            further: What is at 1, this one being at 0.
            by: Where.
        """
        return Walk(*(max(0, round(here + by * (there - here))) for here, there in zip(self, further, strict=True)))


class Range(NamedTuple):
    """Bytes."""

    low: float
    expected: float
    high: float

    @staticmethod
    def exactly(size: float) -> Range:
        """What is reckoned from shapes."""
        return Range(size, size, size)


@dataclass(frozen=True)
class StageMemory:
    """What a stage takes of the memory of one process's device."""

    stage: str
    what: str
    """Whose model does what."""
    parts: dict[str, Range] = field(default_factory=dict)
    unknown: str = ""
    """Why it is not known; then there are no parts."""

    @property
    def total(self) -> Range:
        """Of all parts."""
        return Range(*(sum(part[place] for part in self.parts.values()) for place in range(3)))


class Sharing(NamedTuple):
    """Which share of what is trained a process holds."""

    weights: float = 1.0
    gradients: float = 1.0
    optimizer: float = 1.0


def sharing(kind: LaunchKind, processes: int) -> Sharing:
    """Of a launch of so many processes."""
    part = 1 / processes
    if kind.sharding == "FSDP" or (kind.sharding == "DEEPSPEED" and kind.stage == 3):
        return Sharing(part, part, part)
    if kind.sharding == "DEEPSPEED":
        return Sharing(1.0, part if kind.stage == 2 else 1.0, part if kind.stage >= 1 else 1.0)
    return Sharing()


def optimizer_bytes(name: str, trained: float, item: int) -> float | None:
    """What an optimizer keeps; null where this kit does not know it.

    Args:
        name: As in `trainer_args.optim`.
        trained: Weights that are trained.
        item: Bytes of one. Averages in 8 or 4 bits, and those in 32, are of that size whatever the weights are.
    """
    if name not in _STATES:
        return None
    follows = name.startswith(("adamw_torch", "adamw_apex", "stable", "ada", "rmsprop")) and "bit" not in name and name != "adafactor"
    return _STATES[name] * trained * (item if follows else 4)


def context(on_cpu: bool) -> Range:
    """Of a process before there is a model: the device's context, its libraries and their workspaces; on a CPU the program itself."""
    return Range(0.6 * GIB, 0.9 * GIB, 1.3 * GIB) if on_cpu else Range(0.4 * GIB, 0.7 * GIB, 1.3 * GIB)


def allocator(size: float) -> Range:
    """What an allocator holds beside what is asked of it."""
    return Range(0, 0.03 * size, 0.12 * size)


def card_bytes(given: str) -> float:
    """The memory of a card: by its name, or as a size such as 24GiB or 24GB.

    Raises:
        RecipeError: nobody here knows the name.
    """
    if size := re.fullmatch(r"(\d{1,3}(?:\.\d+)?)\s*(GiB|GB|G)?", given.strip(), re.I):  # more digits are a card's name
        return float(size[1]) * (1 if (size[2] or "").lower() == "gib" else _REPORTED) * GIB
    spelled = {_spelled(name): size for name, size in _CARDS.items()}
    wanted = _spelled(given)
    found = spelled.get(wanted, next((size for name, size in spelled.items() if wanted == name.removeprefix("rtx")), None))
    if found is None:
        raise RecipeError(f"--gpu: {shown(given)} is not known here. Give its memory, e.g. 24GiB, or one of {', '.join(_CARDS)}.")
    return found * GIB


def sold_bytes(size: int) -> float:
    """What a card gives that is sold with so many GB."""
    return size * _REPORTED * GIB


def _spelled(name: str) -> str:
    return re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", name.lower()).removesuffix("80gb").removesuffix("sxm").removesuffix("pcie")
