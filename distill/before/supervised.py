"""What is learned of conversations, row by row: what the model must write at inference, behind what it would read there; nothing else."""

from __future__ import annotations

import json
import unicodedata
from typing import TYPE_CHECKING, Any

from distill.checks.tool_calls import AsWritten, calls_in
from distill.errors import ModelError, visible
from distill.run.calls import Call, parted
from distill.run.schema import THINK_CLOSE, extras_of

if TYPE_CHECKING:
    from distill.models.chat import ChatFormat

Row = dict[str, Any]
_ROWS = 200  # that are looked at


def is_conversation(row: Row) -> bool:
    """Whether a row has more before its answer than a question."""
    return any(turn["role"] in ("assistant", "tool") or extras_of(turn) for turn in row["messages"])


def conversations(chat: ChatFormat, rows: list[Row], of_all: int) -> str:
    """What there is of conversations among some rows, each of them proved.

    Args:
        chat: The student's.
        rows: With messages and completion.
        of_all: How many rows there are.

    Raises:
        ModelError: of one, what is learned is not what must be written, or not behind what is read.
    """
    talks = [row for row in rows if is_conversation(row)]
    some = talks[:: -(-len(talks) // _ROWS)]
    for row in some:
        _prove(chat, row)
    calling = sum(bool(parted(row["completion"])[1]) for row in talks)
    behind = sum(row["messages"][-1]["role"] == "tool" for row in talks)
    looked_at = "" if len(rows) == of_all else f" of {len(rows):,} looked at"
    return (
        f"{len(talks):,} rows{looked_at} are parts of conversations, each with one supervised turn, of which {calling:,} call tools and "
        f"{behind:,} answer their results. In {len(some):,} of them it was proved that what is learned is that turn, behind the prompt of "
        "inference, and nothing of users and tools"
    )


def _prove(chat: ChatFormat, row: Row) -> None:
    from distill.models.chat import IGNORE

    input_ids, labels = chat.trace_row(row)
    prompt, opening = chat.prompt_ids(row["messages"]), chat.opening(row["messages"])
    start = len(prompt)
    if input_ids[:start] != prompt or any(label != IGNORE for label in labels[:start]):
        raise _fault(row, "is not learned behind the prompt of inference, or something of that is learned, too")
    if labels[start:] != input_ids[start:]:
        raise _fault(row, "is not learned as a whole")
    if row.get("finish_reason") != "length" and labels[-1] not in chat.stop_ids:
        raise _fault(row, "has no end: the student would never stop")
    raw = chat.text_of(labels[start:], opening)
    text = _same_form(raw)
    said, calls = parted(row["completion"])
    if not calls and text.split() != _same_form(row["completion"]).split():
        raise _fault(row, f"is learned as other text: {visible(text, 100)!r}")
    if calls and not any(_calls_follow(form(raw), form(said), calls) for form in (str, _same_form)):
        raise _fault(row, f"calls tools, and what is learned are not these calls: {visible(text, 200)!r}")


def _calls_follow(text: str, said: str, calls: list[Call]) -> bool:
    """Whether a text is what was said, and then these calls."""
    answer = said.rpartition(THINK_CLOSE)[2].strip()
    behind = (text.partition(THINK_CLOSE)[2] if THINK_CLOSE in said else text).strip()
    return behind.startswith(answer) and _equal(calls_in(behind.removeprefix(answer)), calls)


def _equal(read: list[Call] | None, meant: list[Call]) -> bool:
    """Whether calls that a check reads are those that are meant; some forms write no types."""
    if read is None or [call.name for call in read] != [call.name for call in meant]:
        return False
    pairs = [(left.arguments, right.arguments) for left, right in zip(read, meant, strict=True)]
    return all(left.keys() == right.keys() and all(_same(left[name], right[name]) for name in left) for left, right in pairs)


def _same(read: Any, meant: Any) -> bool:
    if isinstance(read, AsWritten):
        meant = meant if isinstance(meant, str) else json.dumps(meant, ensure_ascii=False)
    return _same_form(json.dumps(read, sort_keys=True)) == _same_form(json.dumps(meant, sort_keys=True))


def _same_form(text: str) -> str:
    """Letters that a tokenizer's normalisation takes for the same, written the same way."""
    return unicodedata.normalize("NFKC", text)


def _fault(row: Row, what: str) -> ModelError:
    return ModelError(
        f"the answer {visible(row['completion'], 60)!r} {what}. Take such rows out, or give another template with the key chat_template of "
        "the student."
    )
