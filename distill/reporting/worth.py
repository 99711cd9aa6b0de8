"""Whether a run was worth it: the price of a trace, of a point of accuracy, of 1,000 answers beside the teacher's and a host's; break-even.

Every figure carries what it rests on; what is not known is null, with the reason in words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from distill.reporting.ledger import Amount, Ledger
from distill.reporting.prices import ApiPrice, Rates
from distill.reporting.summary import RunSummary
from distill.run.manifest import Manifest

HOURS_A_MONTH = 730


class Traces(NamedTuple):
    """What the traces cost that were learned from."""

    kept: int
    written: int
    failed: int
    """Requests that no trace came of."""
    cost: Amount
    """Of prompts, traces and curation."""
    lost: Amount
    """Of the writing of those that were not kept, each taken to cost the same."""


class Point(NamedTuple):
    """What a point of accuracy cost, by the student's gain over the base."""

    points: float
    low: float
    high: float
    cost: Amount | None
    """Of one point; null where the gain is none, or within the noise."""
    why_not: str = ""


class Answers(NamedTuple):
    """What 1,000 answers of a model cost."""

    who: str
    """`student`, `teacher`, or the name of a host's model."""
    usd: float
    tokens: float
    """Written, an answer."""
    tokens_per_s: float | None
    """On one device; null at a host."""
    hour: float | None
    """US dollars of that device."""
    because: str
    """What it rests on."""


class Against(NamedTuple):
    """The student's answers beside another's."""

    other: Answers
    cheaper: float
    """Share of the other's price that is saved; below zero where the student's are dearer."""
    break_even: float | None
    """Answers in all that pay for the run; null where none do."""
    month: float | None
    """Answers a month from which a device that is rented all month is cheaper; null where it is not known what one costs."""
    capacity: float | None
    """Answers a month that this device can write."""


class Worth(NamedTuple):
    """All of it."""

    traces: Traces | None
    point: Point | None
    answers: dict[str, Answers]
    """By `student` and `teacher`, as far as known."""
    against: list[Against]
    unknown: list[str]
    """What could not be said, and why."""


def worth_of(summary: RunSummary, ledger: Ledger, rates: Rates, hosts: Sequence[str] = ()) -> Worth:
    """What a run's figures come to.

    Args:
        summary: What it did and found.
        ledger: What it cost.
        rates: What is counted with.
        hosts: Models of hosts to compare with, by their names in the prices.
    """
    unknown: list[str] = []
    answers = {role: found for role in ("student", "teacher") if (found := _answers(role, summary, rates, unknown)) is not None}
    others = [*([answers["teacher"]] if "teacher" in answers else []), *_hosts(summary, rates, hosts, unknown)]
    against = [_against(answers["student"], other, ledger.total) for other in others] if "student" in answers else []
    if "student" in answers and not others:
        unknown.append("nothing to compare the student's answers with: the teacher's cost is not known. Name a host's model with --api")
    return Worth(_traces(summary, ledger), _point(summary, ledger, unknown), answers, against, unknown)


def _traces(summary: RunSummary, ledger: Ledger) -> Traces | None:
    curated, wrote = summary.manifests.get("curate"), summary.manifests.get("generate")
    if curated is None or wrote is None or not curated.rows_kept:
        return None
    kept, written = curated.rows_kept, curated.rows_in or curated.rows_kept
    lost = ledger.of("generate").share(1 - kept / written)
    return Traces(kept, written, sum(wrote.drops.values()), ledger.of("prompts", "generate", "curate"), lost)


def _point(summary: RunSummary, ledger: Ledger, unknown: list[str]) -> Point | None:
    main = summary.main
    gain = None if main is None else main.differences.get(("student", "base"))
    if main is None or gain is None or gain.value is None or gain.low is None or gain.high is None:
        unknown.append("a point of accuracy: base and student were not both measured on the run's own held-out prompts")
        return None
    points, low, high = (100 * each for each in (gain.value, gain.low, gain.high))
    chance = main.by_chance.get(("student", "base"), 0.0)
    if not gain.is_beyond_noise or chance > 1 - main.confidence:
        return Point(points, low, high, None, "the gain is within the noise, so that no price of a point can be said")
    if points < 0:
        return Point(points, low, high, None, "the student got worse")
    return Point(points, low, high, ledger.making.share(1 / points))


def _answers(role: str, summary: RunSummary, rates: Rates, unknown: list[str]) -> Answers | None:
    """What 1,000 answers of a model of the run cost, by a host's price where the recipe has one, else by the seconds of a device."""
    tokens = _tokens_an_answer(role, summary)
    if tokens is None:
        unknown.append(f"1,000 answers of the {role}: how many tokens it writes was not measured")
        return None
    if (price := _recipe_price(role, summary)) is not None:
        read = _tokens_read(summary)
        return Answers(role, 1000 * price.of(read, tokens), tokens, None, None, f"by the recipe's price, {_tokens_text(read, tokens)}")
    found = _speed(role, summary)
    if found is None:
        unknown.append(f"1,000 answers of the {role}: no stage tells how fast it writes on one device")
        return None
    speed, facts, why = found
    on_gpu = not str(facts.get("device", "cpu")).startswith("cpu")
    hour = rates.gpu_price(facts.get("gpu")) if on_gpu else None
    usd = hour.usd if hour is not None else None if on_gpu else rates.cpu_hour
    if usd is None:
        which = f"its GPU, {facts.get('gpu', 'which is not recorded')} (--gpu-hour, --gpu)" if on_gpu else "its CPU (--cpu-hour)"
        unknown.append(f"1,000 answers of the {role}: the price of an hour of {which} is not known")
        return None
    priced = hour.why if hour is not None else f"${usd:g} an hour of a CPU, as given"
    because = f"{tokens:,.0f} tokens an answer, {speed:,.1f} tokens a second on one device {why}, always busy; {priced}"
    return Answers(role, 1000 * tokens / speed / 3600 * usd, tokens, speed, usd, because)


def _tokens_an_answer(role: str, summary: RunSummary) -> float | None:
    """Tokens that a model writes to a held-out prompt, or the teacher to a training prompt where it was not measured."""
    measured = next((result.mean_tokens for result in summary.results if result.role == role), None)
    if measured is not None or role != "teacher":
        return measured
    wrote = summary.manifests.get("generate")
    rows = 0 if wrote is None else wrote.rows_kept or 0
    return wrote.facts["tokens"] / rows if wrote is not None and rows and wrote.facts.get("tokens") else None


def _recipe_price(role: str, summary: RunSummary) -> ApiPrice | None:
    """What the recipe says that a model's host asks."""
    stage = summary.manifests.get("generate" if role == "teacher" else "evaluate")
    section = (stage.made_with.get(role) or {}) if stage is not None else {}
    price = (section.get("server") or {}).get("price")
    return None if price is None else ApiPrice(**price)


def _tokens_read(summary: RunSummary) -> float | None:
    """Tokens of a prompt, as a host has counted them."""
    for stage in ("generate", "evaluate"):
        spent: dict[str, Any] = (summary.manifests[stage].facts.get("server") or {}) if stage in summary.manifests else {}
        if spent.get("requests") and spent.get("input_tokens"):
            return float(spent["input_tokens"] / spent["requests"])
    return None


def _tokens_text(read: float | None, written: float) -> str:
    told = "tokens of prompts are not known and count as none" if read is None else f"{read:,.0f} tokens read"
    return f"{written:,.0f} tokens written an answer, {told}, none cached"


def _speed(role: str, summary: RunSummary) -> tuple[float, dict[str, Any], str] | None:
    """Tokens that a model writes a second on one device, the facts of the stage that shows it, and which that is."""
    evaluated = summary.manifests.get("evaluate")
    wrote = (evaluated.facts.get("writing") or {}).get(role) if evaluated is not None else None
    if evaluated is not None and wrote and wrote["seconds"] > 0 and wrote["tokens"]:
        facts = evaluated.facts | {"device": wrote.get("device", evaluated.facts.get("device", "cpu"))}
        return None if str(facts["device"]).startswith("server") else (wrote["tokens"] / wrote["seconds"], facts, "in evaluate")
    rollouts = [stages["rollouts"] for stages in summary.rounds if "rollouts" in stages]
    alone: Manifest | None = summary.manifests.get("generate") if role == "teacher" else rollouts[-1] if rollouts else None
    if alone is None or not alone.facts.get("tokens") or "server" in str(alone.facts.get("device", "server")) or not alone.facts["wall_s"]:
        return None
    return alone.facts["tokens"] / alone.facts["wall_s"], alone.facts, f"in {alone.stage}, loading among it"


def _hosts(summary: RunSummary, rates: Rates, names: Sequence[str], unknown: list[str]) -> list[Answers]:
    """What hosts' models would ask for as many tokens as the teacher writes, or the student where the teacher was not measured."""
    teacher, student = (_tokens_an_answer(role, summary) for role in ("teacher", "student"))
    tokens, whose = (teacher, "teacher") if teacher is not None else (student, "student")
    found = []
    for name in names:
        price = rates.api_price(name)
        if price is None:
            known = ", ".join(rates.prices.api) or "none"
            unknown.append(f"{name}: no price is known; known are {known}. Add it by --prices FILE")
        elif tokens is not None:
            read = _tokens_read(summary)
            because = f"if it writes as many tokens as the {whose}: {_tokens_text(read, tokens)}; {price[1].from_where}"
            found.append(Answers(price[0], 1000 * price[1].of(read, tokens), tokens, None, None, because))
    return found


def _against(student: Answers, other: Answers, run: Amount) -> Against:
    saved = other.usd - student.usd
    month = capacity = None
    if student.hour is not None and student.tokens_per_s is not None and other.usd > 0 and student.tokens > 0:
        month = student.hour * HOURS_A_MONTH / other.usd * 1000
        capacity = student.tokens_per_s * HOURS_A_MONTH * 3600 / student.tokens
    break_even = run.usd / saved * 1000 if saved > 0 and run.priced else None
    return Against(other, saved / other.usd if other.usd else 0.0, break_even, month, capacity)
