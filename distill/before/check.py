"""`distill check`: proves a recipe before anything is spent. Loads tokenizers, never weights; writes nothing.

Each line is one claim: proved, refuted, or not to be checked here (offline, say), which is not the same as proved.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from distill.before.findings import Findings, evenly
from distill.before.quick import common
from distill.recipe.experiment import Recipe
from distill.recipe.models import ModelSpec
from distill.recipe.traces import Curate
from distill.run.log import progress
from distill.run.manifest import MANIFEST, read_manifest
from distill.run.schema import THINK_CLOSE, THINK_OPEN, prompt_id
from distill.run.tables import iter_rows
from distill.stages import folder, run_dir

if TYPE_CHECKING:
    from distill.models.chat import ChatFormat
    from distill.stages.prompts import Survey

Row = dict[str, Any]
SAMPLE = 2000
"""Rows that are tokenised, of any number; evenly drawn."""
_ROWS = 200  # that are tokenised together, and those whose tokens are compared with the teacher's
_NAMELESS = {"prompt_id": "", "sample_index": 0}  # a brought trace gets its name when it is imported
_EXAMPLE_REASONING = "First this, then that."


def run(recipe: Recipe) -> bool:
    """Prints every finding; true if none refutes the recipe."""
    from distill.models.loading import load_chat_format

    found = Findings()
    common(recipe, found)
    found.prove("trainer arguments", lambda: _trainer_arguments(recipe))
    survey = _check_prompts(recipe, found)
    prompts = survey.sample if survey else []
    chats: dict[str, ChatFormat] = {}

    def load(role: str, spec: ModelSpec) -> str:
        chats[role] = load_chat_format(spec)
        chat = chats[role]
        name = chat.tokenizer.convert_ids_to_tokens
        return f"{len(chat.tokenizer):,} entries, a turn ends with {name(chat.end_of_turn_id)!r}, padding {name(chat.pad_id)!r}"

    for role, spec in (("student", recipe.student), ("teacher", recipe.teacher)):
        if spec is not None and found.prove(f"{role}'s tokenizer and template", lambda r=role, s=spec: load(r, s)):  # type: ignore[misc]
            _check_rows_of_head(role, spec, chats[role], found)
    if "student" in chats and recipe.score is not None:
        found.prove("loss on targets", lambda: _loss(recipe, chats["student"]))
    if len(chats) == 2 and recipe.train.is_live:
        found.prove("the teacher can judge the student's tokens", lambda: _live_pair(recipe, chats, prompts))
    elif len(chats) == 2:
        _compare_vocabularies(chats["teacher"], chats["student"], found)
    if "student" in chats and survey:
        _check_rows(recipe, chats, survey, found)
    return found.end("nothing speaks against running this recipe")


def _check_rows(recipe: Recipe, chats: dict[str, ChatFormat], survey: Survey, found: Findings) -> None:
    """What the student reads and learns."""
    student = chats["student"]
    if recipe.train.is_live:
        if found.prove("rows", lambda: _rows_hold(student, [], survey)):
            _check_room(recipe, student, survey, found)
        return
    rows, of_all = _check_traces(recipe, survey, found)
    if not found.prove("rows", lambda: _rows_hold(student, rows, survey)):
        return
    example = rows[0] if rows else _made_up(survey.sample[0], recipe, student)
    if found.prove("supervised tokens", lambda: _supervision(student, example)):
        _print_example(student, example, found.console)
    if recipe.score is not None and rows and "teacher" in chats:
        found.prove("targets", lambda: _targets(recipe, chats, rows))
    _check_lengths(recipe, student, rows, survey, of_all, found)


def _trainer_arguments(recipe: Recipe) -> str:
    from distill.models.loading import pick_device
    from distill.trainers.arguments import precision_name, training_arguments

    device, folder_of_checkpoints = pick_device(), run_dir(recipe) / "checkpoints"
    arguments: Any
    if recipe.train.is_live:
        from distill.trainers.live import live_arguments

        arguments = live_arguments(recipe, folder_of_checkpoints, device)
    else:
        arguments = training_arguments(recipe, recipe.train, folder_of_checkpoints, device)
    if recipe.rounds:
        training_arguments(recipe, recipe.train_in_rounds, folder_of_checkpoints, device)
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    return f"{precision_name(arguments)} on {device}, {batch} rows an optimizer step and process, learning rate {arguments.learning_rate:g}"


def _check_prompts(recipe: Recipe, found: Findings) -> Survey | None:
    from distill.stages.prompts import survey

    surveys: list[Survey] = []

    def attempt() -> str:
        surveys.append(survey(recipe.prompts, recipe.seed, SAMPLE, spread=True))
        seen = surveys[0]
        return f"{seen.train:,} to train on, {seen.heldout:,} held out, {sum(seen.drops.values()):,} dropped"

    if not found.prove("prompts", attempt):
        return None
    if recipe.learns_from_traces and "math" in recipe.curate.checks and not surveys[0].with_reference and not recipe.curate.keep_unjudged:
        found.bad("references", "curate.checks has math, but no prompt has a reference. Set prompts.columns.reference, or leave math out.")
    return surveys[0]


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
            f"({recipe.score.min_aligned:.0%}). Take a teacher with the student's tokenizer, or train.method cross_tokenizer."
        )
    return f"{share:.1%} of the supervised tokens of {len(some):,} traces are tokens of the teacher too"


def _live_pair(recipe: Recipe, chats: dict[str, ChatFormat], prompts: list[Row]) -> str:
    from distill.trainers.live import check_pair

    check_pair(recipe, chats["student"])
    if recipe.train.method == "cross_tokenizer":
        return "both work on bytes, by which their texts are aligned"
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


def _check_traces(recipe: Recipe, survey: Survey, found: Findings) -> tuple[list[Row], int]:
    """Some rows with messages and completion, and of how many: of those an earlier run has curated, or of brought ones.

    Evenly drawn; none before they are written.
    """
    curated = folder(recipe, "curate")
    drawn: tuple[list[Row], int] = [], 0

    def attempt() -> str:
        nonlocal drawn
        if (curated / MANIFEST).exists():
            total = read_manifest(curated).rows("curated")
            drawn = list(iter_rows(curated, "curated", step=-(-total // SAMPLE), columns=["messages", "completion"])), total
            return f"{total:,} curated ones in {curated}"
        seen: Counter[bool] = Counter()
        drawn = evenly(_brought(recipe, survey, seen), SAMPLE)
        return f"{seen[True]:,} of {seen.total():,} belong to a training prompt"

    if ((curated / MANIFEST).exists() or recipe.traces is not None) and found.prove("traces", attempt) and not drawn[0]:
        found.bad("traces", "none has a prompt of this run. Their text must be the same; check traces.columns.")
    return _well_formed(recipe.curate, drawn[0], found), drawn[1]


def _well_formed(curate: Curate, rows: list[Row], found: Findings) -> list[Row]:
    """The rows whose form curate would let through."""
    from distill.checks.form import check_finish, check_think

    looks = {
        "finish": lambda row: check_finish(row.get("finish_reason"), row["completion"]),
        "think": lambda row: check_think(row["completion"]),
    }
    failed: Counter[str] = Counter()
    kept = []
    for row in rows:
        verdict = next((verdict for name in curate.checks if name in looks and not (verdict := looks[name](row)).passed), None)
        if verdict is None:
            kept.append(row)
        else:
            failed[f"{verdict.check}:{verdict.reason}"] += 1
    if rows and not kept:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in failed.most_common())
        found.bad("form of the traces", f"curate would drop all {len(rows):,} looked at: {counts}. Look at them, or change curate.checks.")
    return kept


def _rows_hold(chat: ChatFormat, rows: list[Row], survey: Survey) -> str:
    """Puts every prompt and trace of the sample into the template, which refuses what it can't take; and counts what stays text."""
    for prompt in survey.sample:
        chat.prompt_text(prompt["messages"])
    chat.trace_rows(rows)
    texts = ["\n".join(message["content"] for message in row["messages"]) + row.get("completion", "") for row in [*rows, *survey.sample]]
    named = sum(map(chat.mentions_controls, texts))
    fits = f"{len(survey.sample):,} prompts and {len(rows):,} traces fit into the chat template"
    return fits + (f"; {named:,} of them name control tokens, which are read as text" if named else "")


def _brought(recipe: Recipe, survey: Survey, seen: Counter[bool]) -> Iterator[Row]:
    """Brought traces of training prompts; counts all, by whether they are."""
    from distill.data.completions import brought, columns_of
    from distill.data.identities import Identities, as_numbers
    from distill.data.mapping import PromptMapping
    from distill.data.sources import brought_traces

    traces = recipe.traces
    assert traces is not None
    known = Identities(survey.ids)
    mapping = PromptMapping(recipe.prompts, traces.columns, traces.source)
    rows = brought_traces(traces).rows([*mapping.columns, *columns_of(traces)], "traces")
    while batch := list(islice(rows, _ROWS)):
        talks = [mapping.messages(raw, where) or [] for where, raw in batch]
        places = known.places(as_numbers([prompt_id(messages) for messages in talks]))
        for (where, raw), messages, place in zip(batch, talks, places, strict=True):
            found = brought(traces, raw, where)
            fits = found.reason is None and place >= 0
            seen[fits] += 1
            if fits:
                yield {"messages": messages, "completion": found.text, "finish_reason": found.finish_reason}


def _made_up(prompt: Row, recipe: Recipe, chat: ChatFormat) -> Row:
    """A trace as the recipe wants it: with a thought, unless nothing asks for one."""
    answer = f"\\boxed{{{prompt['reference'] or '...'}}}"
    thinks = "think" in recipe.curate.checks or chat.opening(prompt["messages"])
    thought = f"{THINK_OPEN}\n{_EXAMPLE_REASONING}\n{THINK_CLOSE}\n\n" if thinks else ""
    return {"messages": prompt["messages"], "completion": thought + answer}


def _supervision(chat: ChatFormat, example: Row) -> str:
    from distill.errors import ModelError
    from distill.models.chat import IGNORE

    input_ids, labels = chat.row(example["messages"], example["completion"])
    supervised = [token for token, label in zip(input_ids, labels, strict=True) if label != IGNORE]
    text = _same_form(str(chat.tokenizer.decode(supervised)))
    reasoning = _same_form(example["completion"].partition(THINK_OPEN)[2].partition(THINK_CLOSE)[0].strip())
    if not supervised or supervised[-1] != chat.end_of_turn_id:
        raise ModelError("the end of the turn is not among them: the student would never stop.")
    if chat.pad_id in chat.stop_ids:
        raise ModelError("padding and the end of a turn are the same token.")
    if reasoning and reasoning not in text:
        raise ModelError("the reasoning is not among them: the student would learn answers without thinking.")
    if _same_form(example["completion"].split(THINK_CLOSE)[-1].strip()) not in text:
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
    prompt, answer = (str(chat.tokenizer.decode(part)) for part in (input_ids[:start], input_ids[start:]))
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
