"""The plan of a recipe as `distill plan` prints it: a table, the cards it fits, what to change; or one JSON object. Or in one line."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from distill.planning import sizes
from distill.planning.fitting import Change, Most, most, remedies
from distill.planning.memory import Place, Planner
from distill.planning.sizes import GIB, MARKETED, Range, StageMemory
from distill.recipe.experiment import Recipe
from distill.recipe.launches import LaunchKind, kind_of, refuse_launch

PROMPT_TOKENS = 512
"""Of a prompt, where nothing is said of it."""
_HONEST = (
    "Reckoned from configs, not measured on a GPU yet: low to high, expected in the middle. Fits is said by the high end; close means that "
    "only the expected fits. Hours and money are not reckoned yet."
)


@dataclass(frozen=True)
class Plan:
    """What a recipe takes of the memory of one process's device."""

    place: Place
    stages: list[StageMemory]
    notes: list[str]
    most: dict[str, Most] = field(default_factory=dict)
    """By the card."""
    changes: list[Change] = field(default_factory=list)
    """Of which each makes a stage fit; only where a card is given."""
    hopeless: list[str] = field(default_factory=list)
    """Stages that don't fit whatever is changed of what is known here."""

    @property
    def tightest(self) -> StageMemory | None:
        """The stage that takes most."""
        return max((stage for stage in self.stages if not stage.unknown), key=lambda stage: stage.total.expected, default=None)

    @property
    def unknown(self) -> list[StageMemory]:
        """Of which nothing is known here."""
        return [stage for stage in self.stages if stage.unknown]

    @property
    def is_impossible(self) -> bool:
        """Whether a card is given, and even the low end of a stage is more than it has."""
        return self.place.room is not None and any(stage.total.low > self.place.room for stage in self.stages if not stage.unknown)


def make(recipe: Recipe, place: Place, *, whole: bool = True) -> Plan:
    """The plan of a recipe.

    Args:
        recipe: The recipe.
        place: Where it is to run.
        whole: With what still fits, and what to change.
    """
    planner = Planner(place)
    stages = planner.stages(recipe)
    found, changes, hopeless = {}, [], []
    if whole and any(stage.stage == "train" and not stage.unknown for stage in stages):
        cards = {f"{size} GB": sizes.sold_bytes(size) for size in MARKETED} if place.room is None else {"this card": place.room}
        found = {name: most(planner, recipe, room) for name, room in cards.items()}
    for stage in stages if whole and place.room is not None else ():
        if not stage.unknown and place.room is not None and stage.total.high > place.room:
            better = remedies(planner, recipe, stage, place.room)
            changes += better
            hopeless += [] if better else [f"{stage.stage} ({stage.what})"]
    return Plan(place, stages, list(planner.notes), found, changes, hopeless)


def place_of(recipe: Recipe, gpu: str, gpus: int, nodes: int, launch: Path | None, prompt_tokens: int) -> Place:
    """Where a recipe is to run, as the command line says.

    Args:
        recipe: The recipe.
        gpu: A card's name or size, `cpu`, or nothing for any.
        gpus: Of a node; one process each.
        nodes: Of them.
        launch: The launch file by which several processes train; null for DDP.
        prompt_tokens: Of a prompt.

    Raises:
        RecipeError: the card or the file is not known, or the launch can't train the recipe.
    """
    kind = kind_of(launch) if launch is not None else LaunchKind()
    refuse_launch(recipe, kind)
    on_cpu = gpu.lower() == "cpu"
    return Place(gpus * nodes, kind, on_cpu, sizes.card_bytes(gpu) if gpu and not on_cpu else None, prompt_tokens)


def one_line(plan: Plan) -> str:
    """The plan's essence."""
    tightest = plan.tightest
    if tightest is None:
        return "of no stage is it known here what it takes: " + "; ".join(stage.unknown for stage in plan.unknown)
    cards = [f"{size} GB" for size in MARKETED if tightest.total.high <= sizes.sold_bytes(size)]
    fits = f"fits cards from {cards[0]}" if cards else f"more than the {MARKETED[-1]} GB of a card"
    room = plan.place.room
    if room is not None:
        fits = f"{_verdict(tightest.total, room)} the {room / GIB:.1f} GiB of this card"
    behind = f"; not known: {', '.join(stage.stage for stage in plan.unknown)}" if plan.unknown else ""
    return f"{tightest.stage} takes most, about {_gib(tightest.total)} GiB a process: {fits}{behind}"


def _verdict(total: Range, room: float) -> str:
    return "fits" if total.high <= room else "is close to" if total.expected <= room else "is too large for"


def as_json(plan: Plan) -> str:
    """All of it, sizes in bytes."""
    stages: list[dict[str, Any]] = [
        {"stage": stage.stage, "what": stage.what, "unknown": stage.unknown}
        if stage.unknown
        else {
            "stage": stage.stage,
            "what": stage.what,
            "total": _whole(stage.total),
            "parts": {name: _whole(part) for name, part in stage.parts.items()},
            "fits": {f"{size} GB": _verdict(stage.total, sizes.sold_bytes(size)) for size in MARKETED},
        }
        for stage in plan.stages
    ]
    tightest = plan.tightest
    found = {
        "processes": plan.place.processes,
        "launch": str(plan.place.kind),
        "room": plan.place.room,
        "prompt_tokens": plan.place.prompt_tokens,
        "stages": stages,
        "tightest": None if tightest is None else tightest.stage,
        "most": {name: each._asdict() for name, each in plan.most.items()},
        "changes": [{"stage": change.stage, "overrides": change.overrides} for change in plan.changes],
        "hopeless": plan.hopeless,
        "notes": plan.notes,
    }
    return json.dumps(found, indent=1)


def _whole(size: Range) -> dict[str, int]:
    return {name: round(number) for name, number in size._asdict().items()}


def show(plan: Plan) -> None:
    """Prints it."""
    console = Console(highlight=False)
    for stage in plan.stages:
        console.print(
            _table(stage) if not stage.unknown else f"\n{stage.stage}, {stage.what}: not known here, {stage.unknown}", markup=False
        )
    console.print(_cards(plan))
    for name, each in plan.most.items() if plan.place.room is not None else ():
        console.print(f"{name} has room for (each alone): {_most(each)}")
    for change in plan.changes:
        console.print(f"{change.stage} would fit with: {change}", markup=False, soft_wrap=True)
    for stage_name in plan.hopeless:
        console.print(f"{stage_name}: no setting that is known here makes it fit. Take a smaller model, or deal weights out: --launch.")
    for note in plan.notes:
        console.print(f"Note: {note}.", markup=False, soft_wrap=True)
    console.print(f"Prompts are taken to have {plan.place.prompt_tokens:,} tokens (--prompt-tokens).")
    console.print(_HONEST, soft_wrap=True)
    console.print(f"\n{one_line(plan)}", markup=False, soft_wrap=True)


def _table(stage: StageMemory) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"{stage.stage}: {stage.what}", title_justify="left")
    for column in ("GiB a process", "low", "expected", "high"):
        table.add_column(column, justify="left" if column == "GiB a process" else "right", no_wrap=True)
    for name, part in [*stage.parts.items(), ("together", stage.total)]:
        table.add_row(name, *(f"{size / GIB:,.2f}" for size in part), style="bold" if name == "together" else "")
    return table


def _cards(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("card", no_wrap=True)
    known = [stage for stage in plan.stages if not stage.unknown]
    for stage in known:
        table.add_column(f"{stage.stage}: {stage.what}")
    table.add_column("training has room for, each alone")
    for size in MARKETED:
        room = sizes.sold_bytes(size)
        verdicts = [{"fits": "fits", "is close to": "close"}.get(_verdict(stage.total, room), "no") for stage in known]
        there = plan.most.get(f"{size} GB")
        table.add_row(f"{size} GB", *verdicts, "" if there is None else _most(there))
    return table


def _most(there: Most) -> str:
    said = {"tokens a row": there.tokens, "rows at once": there.rows, "rank": there.rank}
    return ", ".join(f"{name} {number:,}" for name, number in said.items() if number is not None) if any(there[:2]) else "nothing"


def _gib(size: Range) -> str:
    return f"{size.expected / GIB:,.1f} ({size.low / GIB:,.1f} to {size.high / GIB:,.1f})"
