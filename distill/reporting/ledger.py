"""What a run cost, from its manifests: device seconds, tokens and money of each stage; unknown stays unknown, and is said."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from distill.reporting.prices import Rates
from distill.run.manifest import Manifest

_SERVER = re.compile(r"server \((\w+), (\d+)\)(?:, in batches)?")
_OWN = ("vllm", "sglang", "llama_cpp", "ollama", "transformers")
"""Kinds of servers that run on devices of one's own, unless a price says otherwise."""
_MEASURING = ("evaluate", "benchmark", "report")


class Amount(NamedTuple):
    """US dollars as far as they are known, and what is not in them."""

    usd: float = 0.0
    missing: tuple[str, ...] = ()
    """Stages with something unpriced."""
    priced: bool = False
    """Whether anything in it has a price."""

    def plus(self, other: Amount) -> Amount:
        """Both together."""
        return Amount(self.usd + other.usd, (*self.missing, *other.missing), self.priced or other.priced)

    def share(self, part: float) -> Amount:
        """A part of it, or several times it."""
        return self._replace(usd=self.usd * part)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is missing."""
        return not self.missing


class StageCost(NamedTuple):
    """What one stage took."""

    name: str
    measures: bool
    """Whether it measures the student, and does not make it."""
    wall_s: float
    devices: int | None
    """That worked at once in this process and those beside it; null: those of servers, which manifests don't tell."""
    device: str
    device_s: float | None
    tokens_in: int | None
    tokens_out: int | None
    requests: int | None
    retries: int | None
    cost: Amount
    notes: tuple[str, ...]
    """What is not in it, or not known."""
    why: tuple[str, ...]
    """By which prices."""


class Ledger(NamedTuple):
    """All stages of a run, in the order they ran."""

    stages: list[StageCost]

    @property
    def total(self) -> Amount:
        """What all of them cost."""
        return _sum(self.stages)

    @property
    def making(self) -> Amount:
        """What the student cost, without measuring it."""
        return _sum([stage for stage in self.stages if not stage.measures])

    def of(self, *names: str) -> Amount:
        """What these stages cost."""
        return _sum([stage for stage in self.stages if stage.name in names])


def ledger_of(stages: Sequence[tuple[str, Manifest]], rates: Rates) -> Ledger:
    """The ledger of finished stages.

    Args:
        stages: Names and manifests, as `RunSummary.stages` has them.
        rates: What is counted with.
    """
    return Ledger([_of_stage(name, manifest, rates) for name, manifest in stages])


def _sum(stages: Sequence[StageCost]) -> Amount:
    total = Amount()
    for stage in stages:
        total = total.plus(stage.cost)
    return total


def _of_stage(name: str, manifest: Manifest, rates: Rates) -> StageCost:
    facts, device = manifest.facts, str(manifest.facts.get("device", "cpu"))
    wall_s, served = float(facts["wall_s"]), _SERVER.findall(device)
    here = [each for each in _SERVER.sub("", device).split(",") if each.strip()]
    devices = int(facts.get("world_size") or 1) if here else None
    spent: dict[str, Any] = facts.get("server") or {}
    cost, why, missing = Amount(), [], []
    if here:
        on_gpu = not all(each.strip().startswith("cpu") for each in here)
        hour = rates.gpu_price(facts.get("gpu")) if on_gpu else None
        usd = hour.usd if hour is not None else rates.cpu_hour if not on_gpu else None
        if usd is None:
            missing.append(f"the price of an hour of {facts.get('gpu') or 'its GPU'}" if on_gpu else "the price of an hour of its CPU")
        else:
            cost = cost.plus(Amount(wall_s * (devices or 1) / 3600 * usd, (), True))
            why.append(hour.why if hour is not None else f"${usd:g} an hour of a CPU, as given")
    if spent.get("cost_usd") is not None:
        cost = cost.plus(Amount(float(spent["cost_usd"]), (), True))
        why.append("tokens of servers by the recipe's own price")
    elif served or spent:
        own = bool(served) and all(kind in _OWN for kind, _ in served)
        hour = rates.gpu_price(facts.get("gpu")) if own and rates.server_gpus is not None else None
        if hour is None:
            missing.append("the GPUs behind its servers (--server-gpus)" if own else "a price of its server's tokens (server.price)")
        else:
            gpus = sum(int(count) for _, count in served) * (rates.server_gpus or 0)
            cost = cost.plus(Amount(wall_s * gpus / 3600 * hour.usd, (), True))
            why.append(f"{gpus} GPUs behind its servers, as given; {hour.why}")
    notes = [*_unrecorded(name, manifest), *(f"not priced: {what}" for what in missing)]
    at_least = bool(missing) or bool(_unrecorded(name, manifest))
    tokens_in, tokens_out = _tokens(manifest, spent, bool(here))
    return StageCost(
        name=name,
        measures=name in _MEASURING,
        wall_s=wall_s,
        devices=devices,
        device=str(facts["gpu"]) if facts.get("gpu") and not served else device,
        device_s=None if devices is None else wall_s * devices,
        tokens_in=tokens_in,
        tokens_out=tokens_out,
        requests=spent.get("requests"),
        retries=spent.get("retries"),
        cost=cost._replace(missing=(name,) if at_least else ()),
        notes=tuple(notes),
        why=tuple(why),
    )


def _unrecorded(name: str, manifest: Manifest) -> list[str]:
    """What a manifest can't tell of what its stage took."""
    notes = []
    if manifest.grew_from:
        notes.append("it grew: what it took before is not in its manifest")
    parts = sum(file.endswith(".targets") for file in manifest.files)
    if name.endswith("score") and parts > 1:
        notes.append(f"it was scored in {parts} parts: the seconds are those of the last process")
    return notes


def _tokens(manifest: Manifest, spent: dict[str, Any], here: bool) -> tuple[int | None, int | None]:
    """Tokens that models read and wrote in a stage; null where no manifest tells."""
    facts, stage = manifest.facts, manifest.stage
    if stage == "train":
        return facts.get("tokens"), None
    if stage == "score":
        return facts.get("positions"), spent.get("output_tokens")
    if stage in ("generate", "rollouts", "evaluate"):
        read = None if here else spent.get("input_tokens")  # of prompts that are read in this process none are counted
        return read, facts.get("tokens", spent.get("output_tokens"))
    return spent.get("input_tokens"), spent.get("output_tokens")
