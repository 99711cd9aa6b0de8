"""What teacher and student read: tokenizers, templates, vocabularies, and rows as tokens, the supervised ones among them."""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from distill.before.brought import check_traces
from distill.before.findings import Findings
from distill.before.servers import is_loaded
from distill.before.supervised import conversations, is_conversation
from distill.errors import visible
from distill.recipe.experiment import Recipe
from distill.recipe.models import ModelSpec
from distill.run.calls import parted
from distill.run.log import progress
from distill.run.schema import THINK_CLOSE, THINK_OPEN

if TYPE_CHECKING:
    from distill.models.chat import ChatFormat
    from distill.stages.prompts import Survey

Row = dict[str, Any]
_ROWS = 200  # that are tokenised together, and those whose tokens are compared with the teacher's
_NAMELESS = {"prompt_id": "", "sample_index": 0}  # a brought trace gets its name when it is imported
_EXAMPLE_REASONING = "First this, then that."
_SHOWN = 4000  # characters of an example


def load_chats(recipe: Recipe, found: Findings) -> dict[str, ChatFormat]:
    """The tokenizers and templates that can be loaded, by role."""
    from distill.models.loading import load_chat_format

    chats: dict[str, ChatFormat] = {}

    def load(role: str, spec: ModelSpec) -> str:
        chats[role] = load_chat_format(spec)
        chat = chats[role]
        name = chat.tokenizer.convert_ids_to_tokens
        return f"{len(chat.tokenizer):,} entries, a turn ends with {name(chat.end_of_turn_id)!r}, padding {name(chat.pad_id)!r}"

    for role, spec in (("student", recipe.student), ("teacher", recipe.teacher)):
        if spec is None:
            continue
        claim = f"{role}'s tokenizer and template"
        if spec.server is not None and spec.server.is_hosted and not is_loaded(recipe, role):
            _load_of_host(claim, spec, chats, lambda r=role, s=spec: load(r, s), found)  # type: ignore[misc]
        elif found.prove(claim, lambda r=role, s=spec: load(r, s)):  # type: ignore[misc]
            _check_rows_of_head(role, spec, chats[role], found)
    return chats


def _load_of_host(claim: str, spec: ModelSpec, chats: dict[str, ChatFormat], load: Callable[[], str], found: Findings) -> None:
    """The host has tokenizer and template of its own, so the model may have none that can be loaded here."""
    silent = Findings(Console(file=io.StringIO()))
    if silent.prove(claim, load):
        found.good(claim, "the host has its own; those of the model are here to compare with")
    else:
        chats.pop("teacher", None)
        found.unknown(claim, f"the host has its own, and those of {spec.model} can't be loaded from here")


def check_pair(recipe: Recipe, chats: dict[str, ChatFormat], survey: Survey | None, found: Findings) -> None:
    """Whether what the teacher thinks can be told to the student."""
    if "student" in chats and recipe.score is not None:
        found.prove("loss on targets", lambda: _loss(recipe, chats["student"]))
    if len(chats) == 2 and recipe.train.is_live:
        found.prove("the teacher can judge the student's tokens", lambda: _live_pair(recipe, chats, survey.sample if survey else []))
    elif len(chats) == 2:
        _compare_vocabularies(chats["teacher"], chats["student"], found)


def check_rows(recipe: Recipe, chats: dict[str, ChatFormat], survey: Survey, found: Findings) -> tuple[list[Row], int]:
    """What the student reads and learns; returns some of the rows that are there already, and the number of all."""
    student = chats["student"]
    if recipe.train.is_live:
        if found.prove("rows", lambda: _rows_hold(student, [], survey)):
            _check_room(recipe, student, survey, found)
        return [], 0
    rows, of_all = check_traces(recipe, survey, found)
    if not found.prove("rows", lambda: _rows_hold(student, rows, survey)):
        return rows, of_all
    example = rows[0] if rows else made_up(survey.sample[0], recipe, student)
    if found.prove("supervised tokens", lambda: _supervision(student, example)):
        _print_example(student, example, found.console)
    if any(is_conversation(row) for row in rows):
        found.prove("conversations", lambda: conversations(student, rows, of_all))
    if recipe.score is not None and recipe.score.source != "generation" and rows and "teacher" in chats:
        found.prove("targets", lambda: _targets(recipe, chats, rows))
    _check_lengths(recipe, student, rows, survey, of_all, found)
    return rows, of_all


def _rows_hold(chat: ChatFormat, rows: list[Row], survey: Survey) -> str:
    """Puts every prompt and trace of the sample into the template, which refuses what it can't take; and counts what stays text."""
    for prompt in survey.sample:
        chat.prompt_text(prompt["messages"])
    chat.trace_rows(rows)
    texts = ["\n".join(message["content"] for message in row["messages"]) + row.get("completion", "") for row in [*rows, *survey.sample]]
    named = sum(map(chat.mentions_controls, texts))
    fits = f"{len(survey.sample):,} prompts and {len(rows):,} traces fit into the chat template"
    return fits + (f"; {named:,} of them name control tokens, which are read as text" if named else "")


def _check_rows_of_head(role: str, spec: ModelSpec, chat: ChatFormat, found: Findings) -> None:
    from distill.models.loading import config_vocab_size

    size = config_vocab_size(spec)
    highest = max(chat.tokenizer.get_vocab().values())
    claim = f"{role}'s embedding has a row for every token"
    if size is None:
        found.unknown(claim, f"the config of {spec.model} can't be reached from here")
    elif highest >= size:
        found.bad(claim, f"the tokenizer has id {highest:,}, the model {size:,} rows. They do not belong together; see {role}.tokenizer.")
    else:
        found.good(claim, f"{size:,} rows, {size - highest - 1:,} of them padding")


def _compare_vocabularies(teacher: ChatFormat, student: ChatFormat, found: Findings) -> None:
    ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    same = sum(ours.get(token) == index for token, index in theirs.items())
    detail = f"{same:,} of the teacher's {len(theirs):,} tokens have the same id"
    found.good("vocabularies", detail + ("" if same == len(theirs) == len(ours) else "; traces are carried over as text"))


def _loss(recipe: Recipe, student: ChatFormat) -> str:
    assert recipe.score is not None
    target = recipe.score.target
    recipe.train.kd.check_size(target, max(student.tokenizer.get_vocab().values()) + 1)
    if recipe.follows_teacher and not recipe.rounds:
        return f"the likelihood; the divergence from the teacher is followed on {recipe.train.validation_prompts:,} prompts"
    return f"{recipe.train.kd.objective(target).divergence} from {target.kind} targets"


def _targets(recipe: Recipe, chats: dict[str, ChatFormat], rows: list[Row]) -> str:
    """How many supervised tokens of some traces the teacher writes too, so that its thoughts on them can be stored."""
    from distill.errors import DataError
    from distill.models.vocabulary import align, vocabulary_map

    assert recipe.score is not None
    teacher, student = chats["teacher"], chats["student"]
    vocabulary = vocabulary_map(teacher, student)
    some = rows[:: -(-len(rows) // _ROWS)]
    positions = np.concatenate([align(_NAMELESS | row, teacher, student, vocabulary).positions for row in some])
    share = float((positions >= 0).mean())
    if share < recipe.score.min_aligned:
        raise DataError(
            f"only {share:.1%} of the supervised tokens are tokens of the teacher too, under score.min_aligned "
            f"({recipe.score.min_aligned:.0%}). {vocabulary.advice}"
        )
    return f"{share:.1%} of the supervised tokens of {len(some):,} traces are tokens of the teacher too"


def _live_pair(recipe: Recipe, chats: dict[str, ChatFormat], prompts: list[Row]) -> str:
    from distill.trainers.live import check_pair

    check_pair(recipe, chats["student"])
    if recipe.train.method == "cross_tokenizer":
        if recipe.train.trainer_args.get("use_extended_uld", True):
            return "both work on bytes, by which their texts are aligned"
        return "tokens are compared by their place alone (use_extended_uld: false), though not both may have the same there"
    teacher, student = (chats[role].prompt_text(prompts[0]["messages"]) if prompts else "" for role in ("teacher", "student"))
    return "same tokens, same ids, same end of a turn" + ("" if teacher == student else "; it reads them in the student's chat template")


def _check_room(recipe: Recipe, chat: ChatFormat, survey: Survey, found: Findings) -> None:
    """How many prompts leave room for an answer of the student, who writes while it trains."""
    assert recipe.train.on_policy is not None  # the recipe was validated
    longest, limit = recipe.train.on_policy.max_new_tokens, recipe.train.max_length
    lengths = _prompt_lengths(chat, survey.sample)
    over = int((lengths > limit - longest).sum())
    of_all = "" if len(lengths) == survey.train else f" ({len(lengths):,} of {survey.train:,} looked at)"
    detail = f"prompts have {np.median(lengths):,.0f} tokens, the longest {lengths.max():,}{of_all}; answers up to {longest:,}"
    if over == len(lengths):
        found.bad("lengths", f"{detail}; not one fits into train.max_length ({limit:,}). Raise it.")
    else:
        found.good(
            "lengths", f"{detail}; {over:,} of {len(lengths):,} prompts would not fit into train.max_length ({limit:,}), and be dropped"
        )


def made_up(prompt: Row, recipe: Recipe, chat: ChatFormat) -> Row:
    """A trace as the recipe wants it: with a thought, unless the template has closed it and no check asks for one."""
    answer = f"\\boxed{{{_right_answer(prompt['reference'], recipe) or '...'}}}"
    asked = recipe.curate.reasoning
    thinks = asked == "always" or (asked == "optional" and not chat.prompt_text(prompt["messages"]).rstrip().endswith(THINK_CLOSE))
    thought = f"{THINK_OPEN}\n{_EXAMPLE_REASONING}\n{THINK_CLOSE}\n\n" if thinks else ""
    return {"messages": prompt["messages"], "completion": thought + answer}


def _right_answer(reference: str | None, recipe: Recipe) -> str | None:
    """A reference as an answer has it: of a label's number the label, of several texts the first."""
    from distill.checks.label import right_label
    from distill.checks.text import references_of

    for check in recipe.checks_of_answers:
        if check.label is not None:
            return right_label(reference, check.label) or reference
        if check.text is not None:
            return next(iter(references_of(reference)), None)
    return reference


def _supervision(chat: ChatFormat, example: Row) -> str:
    from distill.errors import ModelError
    from distill.models.chat import IGNORE

    input_ids, labels = chat.row(example["messages"], example["completion"])
    supervised = [token for token, label in zip(input_ids, labels, strict=True) if label != IGNORE]
    text = _same_form(str(chat.tokenizer.decode(supervised)))
    reasoning = _same_form(example["completion"].partition(THINK_OPEN)[2].partition(THINK_CLOSE)[0].strip())
    if not supervised or supervised[-1] not in (chat.end_of_turn_id, chat.calls.end_id):
        raise ModelError("the end of the turn is not among them: the student would never stop.")
    if chat.pad_id in chat.stop_ids:
        raise ModelError("padding and the end of a turn are the same token.")
    if reasoning and reasoning not in text:
        raise ModelError("the reasoning is not among them: the student would learn answers without thinking.")
    answer = parted(example["completion"])[0].rpartition(THINK_CLOSE)[2]
    if _same_form(answer.strip()) not in text:
        raise ModelError("the answer is not among them, or not as it was written.")
    return f"{len(supervised)} of {len(input_ids)}: {'the reasoning, ' if reasoning else ''}the answer and the end of the turn"


def _same_form(text: str) -> str:
    """Letters that a tokenizer's normalisation takes for the same, written the same way."""
    return unicodedata.normalize("NFKC", text)


def _print_example(chat: ChatFormat, example: Row, console: Console) -> None:
    """One training row as the student sees it, its supervised part marked: green on a terminal, between arrows elsewhere."""
    from distill.models.chat import IGNORE

    input_ids, labels = chat.row(example["messages"], example["completion"])
    start = next(place for place, label in enumerate(labels) if label != IGNORE)
    prompt, answer = (visible(str(chat.tokenizer.decode(part)), _SHOWN) for part in (input_ids[:start], input_ids[start:]))
    marks = ("", "") if console.is_terminal else ("»»", "««")
    console.print("\n  one training row, its supervised part marked:")
    console.print(Text.assemble((prompt, "dim"), marks[0], (answer, "green"), marks[1]))
    console.print()


def _check_lengths(recipe: Recipe, chat: ChatFormat, rows: list[Row], survey: Survey, of_all: int, found: Findings) -> None:
    """The distribution of lengths against `train.max_length`, and how many rows would go."""
    limit = recipe.train.max_length
    prompts = _prompt_lengths(chat, survey.sample)
    if rows:
        with progress(len(rows), "rows", "tokenise", passing=True) as bar:
            found_lengths = []
            for start in range(0, len(rows), _ROWS):
                found_lengths += [len(input_ids) for input_ids, _ in chat.trace_rows(rows[start : start + _ROWS])]
                bar.update(min(_ROWS, len(rows) - start))
        lengths = np.array(found_lengths)
    else:
        lengths, of_all = prompts, survey.train
    median, most, nearly_all, longest = np.quantile(lengths, [0.5, 0.9, 0.99, 1])
    what = "prompt and completion" if rows else "prompt alone"
    what += "" if len(lengths) == of_all else f", {len(lengths):,} of {of_all:,} rows looked at"
    detail = f"{what}: median {median:,.0f}, 90 % {most:,.0f}, 99 % {nearly_all:,.0f}, longest {longest:,.0f} tokens"
    over = int((lengths > limit).sum())
    if over == len(lengths):
        found.bad("lengths", f"{detail}; not one fits into train.max_length ({limit:,}). Raise it.")
        return
    fate = {"drop": "dropped", "cut": "cut"}[recipe.train.overlong]
    found.good("lengths", f"{detail}; {over:,} of {len(lengths):,} rows are over train.max_length ({limit:,}) and would be {fate}")
    for section, sampling in (("generate", None if rows else recipe.generate), ("rollouts", recipe.rollouts)):
        possible = int(prompts.max()) + sampling.max_new_tokens if sampling is not None else 0
        if possible > limit:
            found.unknown(
                "lengths of traces", f"none is written yet; with {section}.max_new_tokens one can have {possible:,}, and would be {fate}"
            )


def _prompt_lengths(chat: ChatFormat, prompts: list[Row]) -> NDArray[np.int64]:
    return np.array([len(chat.prompt_ids(row["messages"])) for row in prompts])
