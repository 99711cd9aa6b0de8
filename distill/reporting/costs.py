"""The ledger of a run as people and machines read it: a table a stage, and what the money bought."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from distill.errors import visible
from distill.reporting.ledger import Amount, Ledger
from distill.reporting.worth import Against, Worth
from distill.run.log import duration_text, money_text

_COLUMNS = ["stage", "wall time", "devices", "device time", "tokens in", "tokens out", "requests", "sent again", "US dollars", "where"]
_SMALL = 0.0001


def amount_text(amount: Amount) -> str:
    """Dollars as far as they are known: `at least` where something is missing, `unknown` where all is."""
    if not amount.priced:
        return "unknown" if amount.missing else "$0"
    return ("" if amount.is_whole else "at least ") + dollars(amount.usd)


def dollars(usd: float) -> str:
    """US dollars; what is less than a hundredth of a cent with two digits that say something."""
    return f"${usd:.{1 - math.floor(math.log10(usd))}f}" if 0 < usd < _SMALL else money_text(usd)


def as_text(name: str, ledger: Ledger, worth: Worth, width: int) -> str:
    """The whole account of a run, for people.

    Args:
        name: Of the run.
        ledger: What it cost.
        worth: What that bought.
        width: Columns of the terminal.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=None)
    for index, column in enumerate(_COLUMNS):
        table.add_column(column, justify="left" if index in (0, len(_COLUMNS) - 1) else "right", overflow="fold")
    for stage in ledger.stages:
        counts = (stage.tokens_in, stage.tokens_out, stage.requests, stage.retries)
        table.add_row(
            stage.name,
            duration_text(stage.wall_s),
            "" if stage.devices is None else str(stage.devices),
            "unknown" if stage.device_s is None else duration_text(stage.device_s),
            *("" if count is None else f"{count:,}" for count in counts),
            amount_text(stage.cost),
            visible(stage.device),
        )
    wall_s, device_s = sum(each.wall_s for each in ledger.stages), sum(each.device_s or 0.0 for each in ledger.stages)
    table.add_row("together", duration_text(wall_s), "", duration_text(device_s), "", "", "", "", amount_text(ledger.total), "")
    text = io.StringIO()
    Console(file=text, width=max(width, 100), no_color=True).print(table, markup=False)
    shown = "\n".join(line.rstrip() for line in text.getvalue().splitlines()).strip("\n")
    return "\n".join([visible(name), "", shown, "", *_lines(ledger, worth)])


def _lines(ledger: Ledger, worth: Worth) -> Iterator[str]:
    """What the table's figures come to, a line each; then what they are counted by, and what is missing."""
    making, total = ledger.making, ledger.total
    yield f"making the student: {amount_text(making)}; with measuring it: {amount_text(total)}"
    if traces := worth.traces:
        each = amount_text(traces.cost.share(1 / traces.kept))
        yield f"an accepted trace: {each} ({traces.kept:,} kept of {traces.written:,} written, with prompts and curation)"
        failed = f", and {traces.failed:,} requests gave none: what these cost is not recorded" if traces.failed else ""
        yield f"  lost to traces that were not kept: {amount_text(traces.lost)}, if each cost the same{failed}"
    retries = sum(stage.retries or 0 for stage in ledger.stages)
    again = f"{retries:,} requests were sent again: hosts don't tell what these cost; " if retries else ""
    yield f"  {again}seconds of pieces that were ended early are in the table, but for at most five before a kill"
    if point := worth.point:
        gain = f"{point.points:.1f} points [{point.low:.1f}, {point.high:.1f}] gained over the base"
        if point.cost is None:
            yield f"a point of accuracy: {gain}: {point.why_not}"
        else:
            ends = f"[{dollars(point.cost.usd * point.points / point.high)}, {dollars(point.cost.usd * point.points / point.low)}]"
            yield f"a point of accuracy: {amount_text(point.cost)} {'' if not point.cost.priced else ends + ' '}({gain})"
    for role, answers in worth.answers.items():
        yield f"1,000 answers of the {role}: {dollars(answers.usd)} ({answers.because})"
    for beside in worth.against:
        yield from _against(beside, total)
    yield from (f"not known: {why}" for why in worth.unknown)
    for stage in ledger.stages:
        yield from (f"{stage.name}: {note}" for note in stage.notes)
    if why := dict.fromkeys(each for stage in ledger.stages for each in stage.why):
        yield "counted with: " + "; ".join(why)


def _against(found: Against, total: Amount) -> Iterator[str]:
    other = found.other
    who = f"the {other.who}'s" if other.who == "teacher" else f"those of {other.who}"
    if other.who != "teacher":
        yield f"1,000 answers of {other.who}: {dollars(other.usd)} ({other.because})"
    share = abs(100 * found.cheaper)
    yield f"the student's answers are {share:.0f} % {'cheaper' if found.cheaper >= 0 else 'dearer'} than {who}, by these figures"
    if found.cheaper > 0 and found.break_even is not None:
        least = "" if total.is_whole else "at least "
        yield f"  break-even: {least}{found.break_even:,.0f} answers in all pay for the run ({amount_text(total)})"
    elif found.cheaper <= 0:
        yield "  break-even: never, by these figures"
    if found.month is not None and found.capacity is not None:
        if found.month <= found.capacity:
            yield f"  a device rented all month is cheaper from {found.month:,.0f} answers a month on (it can write {found.capacity:,.0f})"
        else:
            yield f"  a device rented all month is never cheaper: that takes {found.month:,.0f}, and it writes {found.capacity:,.0f}"


def as_object(name: str, ledger: Ledger, worth: Worth) -> dict[str, Any]:
    """The same for machines."""
    return {
        "run": name,
        "stages": [stage._asdict() | {"cost": amount_object(stage.cost)} for stage in ledger.stages],
        "making": amount_object(ledger.making),
        "total": amount_object(ledger.total),
        "accepted_trace": None
        if worth.traces is None
        else worth.traces._asdict()
        | {
            "cost": amount_object(worth.traces.cost),
            "lost": amount_object(worth.traces.lost),
            "each": amount_object(worth.traces.cost.share(1 / worth.traces.kept)),
        },
        "point_of_accuracy": None
        if worth.point is None
        else worth.point._asdict() | {"cost": None if worth.point.cost is None else amount_object(worth.point.cost)},
        "answers_1000": {role: answers._asdict() for role, answers in worth.answers.items()},
        "against": [each._asdict() | {"other": each.other._asdict()} for each in worth.against],
        "unknown": worth.unknown,
    }


def amount_object(amount: Amount) -> dict[str, Any]:
    """Dollars as far as they are known, null where nothing is, and the stages with something unpriced."""
    return {"usd": amount.usd if amount.priced else None, "missing": list(amount.missing)}
