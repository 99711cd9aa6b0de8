"""Which of two models' answers a judge prefers, asked in both orders: a pair is won only where both say so.

A judge that likes what stands first, or says anything, gives ties so, and no win.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distill.checks.fields import as_fields
from distill.checks.form import answer_of
from distill.checks.judge import CHOICES, Case, Vote, question_id, question_of_two, winner_of
from distill.data.texts import is_blank
from distill.measure.wins import TIE, win_rate
from distill.recipe.experiment import Recipe
from distill.recipe.judge import Preferences
from distill.run.folder import StageFolder
from distill.run.log import say
from distill.run.schema import PREFERENCE, WINS
from distill.run.tables import TableWriter, rows_of
from distill.servers.judging import CASE, Asked, Question, ask, case_of

PAIRS = (("student", "teacher"), ("base", "teacher"), ("student", "base"))
"""Whose answers are compared with whose."""
ROLE = "judge_of_pairs"


class _Pair(NamedTuple):
    first: Case
    second: Case
    known: tuple[str | None, str] | None
    """Winner and reason, where nobody has to be asked."""


def compare(recipe: Recipe, out: StageFolder, run: Path, table: TableWriter, prompts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Has a judge compare the answers of models; writes the tables `preferences` and `wins`, and returns what is to be known of the judge.

    Args:
        recipe: The recipe.
        out: The stage's folder.
        run: The run's folder.
        table: Of the answers as traces: of each model in one order.
        prompts: Those of the run's own held-out set, with `fields` where checks look at some.
    """
    evaluate = recipe.evaluate
    if evaluate is None or evaluate.preferences is None:
        return {}
    preferences = evaluate.preferences
    pairs = [pair for pair in PAIRS if {*pair} <= {*evaluate.models}]
    fields, identity = {row["prompt_id"]: as_fields(row.get("fields")) for row in prompts}, preferences.identity()

    def all_pairs() -> Iterator[_Pair]:
        return (pair for roles in pairs for pair in _pairs(table, roles, fields, preferences))

    def both_orders(pair: _Pair) -> Iterator[Question]:
        for order in (pair[:2], pair[1::-1]) if pair.known is None else ():
            messages = question_of_two(preferences, *order)
            yield Question(question_id(identity, messages, *order), messages)

    def questions() -> Iterator[Question]:
        return (question for pair in all_pairs() for question in both_orders(pair))

    number = 2 * sum(pair.known is None for pair in all_pairs())
    replies = ask(recipe, preferences, Asked(ROLE, "compared", "compare answers", answers=2), out, run, questions, number)
    votes = replies.votes(CHOICES)
    rows = [_row(pair, [votes[question.name] for question in both_orders(pair)]) for pair in all_pairs()]
    out.write_table("preferences", rows, PREFERENCE)
    wins = []
    for role, against in pairs:
        of_pair = [row for row in rows if (row["model_role"], row["against"]) == (role, against)]
        found = win_rate(of_pair, recipe.seed, evaluate.confidence)
        if found is None:
            say(f"evaluate  no pair of answers of {role} and {against} could be judged")
        else:
            wins.append(found)
    out.write_table("wins", wins, WINS)
    return {ROLE: replies.facts}


def _pairs(table: TableWriter, roles: tuple[str, str], fields: Mapping[str, dict[str, Any]], preferences: Preferences) -> Iterator[_Pair]:
    """The answers of two models to the same prompts, in their order."""
    for first, second in zip(*(_answers(table, role, fields) for role in roles), strict=True):
        yield _Pair(first[0], second[0], _known(first, second, preferences))


def _answers(table: TableWriter, role: str, fields: Mapping[str, dict[str, Any]]) -> Iterator[tuple[Case, bool]]:
    """A model's answers, and whether each was given at all."""
    for piece in table.pieces([*CASE, "finish_reason"]):
        for row in rows_of(piece):
            if row["author"] == role and row["prompt_id"] in fields:
                yield case_of(row, fields[row["prompt_id"]]), row["finish_reason"] != "error"


def _known(first: tuple[Case, bool], second: tuple[Case, bool], preferences: Preferences) -> tuple[str | None, str] | None:
    if not (first[1] and second[1]):
        return None, "no_answer"
    texts = [(answer_of(case.completion) or "").strip() for case, _ in (first, second)]
    if texts[0] == texts[1]:
        return TIE, "equal"
    if is_blank(texts[0]) or is_blank(texts[1]):
        return ("second" if is_blank(texts[0]) else "first"), "the_other_is_empty"
    return (None, "no_reference") if preferences.asks_reference and first[0].reference is None else None


def _row(pair: _Pair, votes: Sequence[Sequence[Vote]]) -> dict[str, Any]:
    winner, reason = pair.known if pair.known is not None else winner_of(*votes)
    role, against = pair.first.author, pair.second.author
    return {
        "model_role": role,
        "against": against,
        "prompt_id": pair.first.prompt_id,
        "sample_index": pair.first.sample_index,
        "winner": {"first": role, "second": against}.get(winner or "", winner),
        "reason": reason,
    }
