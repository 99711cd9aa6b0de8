"""The answers of a stage as rows of the table `answers`: each judged by the checks of its set, with what it puts forward as final."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from distill.checks import Found, Given
from distill.checks.fields import as_fields
from distill.checks.finals import final_of, in_form
from distill.checks.judging import Judges, columns_read, combined, given_of
from distill.checks.tokens import Counted
from distill.data.sets import SEPARATOR
from distill.recipe.checks import Check
from distill.recipe.sets import MAIN
from distill.run.log import progress
from distill.run.tables import TableWriter

Row = dict[str, Any]
NO_ANSWER = "no answer"
_READ = ("author", "prompt_id", "sample_index", "reference", "completion", "finish_reason", "completion_ids")


class ToMark(NamedTuple):
    """A set whose answers are there."""

    name: str
    checks: Sequence[Check]
    """What a right one passes."""
    prompts: Mapping[str, Row]
    """By id, with `tags`, and `fields` where checks look at some."""


def marked(table: TableWriter, asked: ToMark, counted: Counted, judges: Judges) -> list[Row]:
    """A row for each answer to a set, in the order of the traces; of the texts a piece at a time is in memory.

    Args:
        table: Of the traces; those of other sets are passed over.
        asked: The set.
        counted: Counts tokens.
        judges: Of its checks.
    """
    answers: list[Row] = []
    here = [check for check in asked.checks if check.judge is None]  # who asks a model does so when all others are done
    verdicts: dict[int, dict[str, Found]] = {}
    texts: dict[int, Given] = {}  # of answers that are with the judges

    def given() -> Iterator[tuple[int, Given]]:
        for trace in _traces(table, asked):
            prompt = asked.prompts.get(trace["prompt_id"], {})
            answers.append(_unmarked(asked.name, trace, prompt.get("tags"), counted(trace)))
            if trace["finish_reason"] == "error":
                bar.update()
            else:
                number = len(answers) - 1
                verdicts[number] = {}
                if not here:  # a judge alone decides, later
                    answers[number] |= {"correct": True, "reason": "right"}
                    bar.update()
                texts[number] = given_of(trace | {"num_tokens": answers[-1]["num_tokens"]}, as_fields(prompt.get("fields")))
                yield number, texts[number]

    total = sum(len(piece) for piece in _pieces(table, asked.name, ["prompt_id"]))
    with progress(total, "answers", _described(asked.name)) as bar:
        for number, verdict in judges.stream(given()):
            found = verdicts[number]
            found[verdict.check] = verdict[1:]
            if len(found) == len(here):
                correct, reason = combined(here, verdicts.pop(number))
                text = texts.pop(number)
                shape = {"final": final_of(text, asked.checks), "in_form": in_form(text, found, asked.checks)}
                answers[number] |= {"correct": correct, "reason": reason, **shape}
                bar.update()
    return answers


def _described(name: str) -> str:
    return "check answers" if name == MAIN else f"check answers to {name}"


def _unmarked(name: str, trace: Row, tags: list[str] | None, num_tokens: int | None) -> Row:
    """The row of an answer before it is judged."""
    return {
        "set": name,
        "tags": tags or [],
        "model_role": trace["author"],
        "prompt_id": trace["prompt_id"],
        "sample_index": trace["sample_index"],
        "correct": None,
        "reason": NO_ANSWER,
        "truncated": trace["finish_reason"] == "length",
        "num_tokens": num_tokens,
        "final": None,
        "in_form": None,
    }


def _traces(table: TableWriter, asked: ToMark) -> Iterator[Row]:
    """What is asked and noted of each trace, with the number of its tokens."""
    for piece in _pieces(table, asked.name, [*_READ, *columns_read(asked.checks)]):
        lengths = pc.list_value_length(piece["completion_ids"])
        yield from piece.drop_columns("completion_ids").append_column("num_tokens", lengths).to_pylist()


def _pieces(table: TableWriter, name: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The traces of a set, some hundred at a time."""
    for piece in table.pieces(columns):
        is_other = pc.match_substring(piece["prompt_id"], SEPARATOR)
        mine = pc.invert(is_other) if name == MAIN else pc.starts_with(piece["prompt_id"], f"{name}{SEPARATOR}")
        yield piece.filter(mine)
