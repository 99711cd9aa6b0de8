"""`distill check`: proves a recipe before anything is spent. Loads tokenizers, never weights; writes nothing.

Each line is one claim: proved, refuted, or not to be checked here (offline, say), which is not the same as proved.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.text import Text

from distill.data.licences import check_terms
from distill.errors import DistillError
from distill.recipe.experiment import Recipe
from distill.recipe.models import ModelSpec
from distill.run.manifest import MANIFEST
from distill.run.schema import THINK_CLOSE, THINK_OPEN, prompt_id
from distill.run.tables import read_rows
from distill.stages import folder, run_dir

if TYPE_CHECKING:
    from distill.models.chat import ChatFormat

Row = dict[str, Any]
_MIN_FREE_GIB = 1.0
_ALIGNED_ROWS = 200
_NAMELESS = {"prompt_id": "", "sample_index": 0}  # a brought trace gets its name when it is imported
_EXAMPLE_REASONING = "First this, then that."


@dataclass
class _Findings:
    """What was found so far, printed as it is found."""

    console: Console = field(default_factory=lambda: Console(highlight=False, soft_wrap=True))
    failed: int = 0

    def good(self, claim: str, detail: str = "") -> None:
        self.console.print(Text.assemble(("  ok    ", "green"), claim, (f"  {detail}" if detail else "", "dim")))

    def bad(self, claim: str, reason: str) -> None:
        self.failed += 1
        self.console.print(Text.assemble(("  FAIL  ", "bold red"), f"{claim}: {reason}"))

    def unknown(self, claim: str, reason: str) -> None:
        self.console.print(Text.assemble(("  ?     ", "yellow"), f"{claim}: not checked, {reason}"))

    def prove(self, claim: str, attempt: Callable[[], str]) -> bool:
        """Runs an attempt that returns a detail, or raises what refutes the claim."""
        try:
            self.good(claim, attempt())
        except DistillError as error:
            self.bad(claim, str(error))
            return False
        return True


def run(recipe: Recipe) -> bool:
    """Prints every finding; true if none refutes the recipe."""
    from distill.models.loading import load_chat_format

    found = _Findings()
    found.good("recipe", f"{recipe.name}, run folder {run_dir(recipe)}")
    _check_folder(recipe, found)
    found.prove("trainer arguments", lambda: _trainer_arguments(recipe))
    found.prove("terms of the traces", lambda: _terms(recipe))
    prompts = _check_prompts(recipe, found)
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
    if "student" in chats and prompts and recipe.train.is_live:
        _check_room(recipe, chats["student"], prompts, found)
    elif "student" in chats and prompts:
        rows = _check_traces(recipe, prompts, found)
        example = rows[0] if rows else _made_up(prompts[0])
        found.prove("supervised tokens", lambda: _supervision(chats["student"], example))
        if recipe.score is not None and rows and "teacher" in chats:
            found.prove("targets", lambda: _targets(recipe, chats, rows))
        _print_example(chats["student"], example, found.console)
        _check_lengths(recipe, chats["student"], rows, prompts, found)
    found.console.print(f"\n{found.failed} of these claims failed" if found.failed else "\nnothing speaks against running this recipe")
    return not found.failed


def _check_folder(recipe: Recipe, found: _Findings) -> None:
    place = run_dir(recipe).absolute()
    while not place.exists():
        place = place.parent
    free_gib = shutil.disk_usage(place).free / 2**30
    if not os.access(place, os.W_OK):
        found.bad("run folder", f"{place} can't be written to. Set run_dir.")
    elif free_gib < _MIN_FREE_GIB:
        found.bad("run folder", f"only {free_gib:.2f} GiB are free at {place}. Free some, or set run_dir.")
    else:
        found.good("run folder", f"writable, {free_gib:,.0f} GiB free")


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


def _terms(recipe: Recipe) -> str:
    teacher = (recipe.teacher.model, recipe.teacher.licence) if recipe.teacher else (None, None)
    brought = (recipe.traces.author_model, recipe.traces.licence) if recipe.traces else None
    name = recipe.export.model_name if recipe.export and recipe.export.model_name else recipe.name
    # Brought traces have an author of their own; the teacher is learned from where it writes, scores or judges.
    sources = [*([brought] if brought else []), *([teacher] if not brought or recipe.score is not None else [])]
    notes = [note for author, licence in sources for note in check_terms(author, name, licence=licence, student=recipe.student.model)]
    return "; ".join(dict.fromkeys(notes)) or "nothing to note"


def _check_prompts(recipe: Recipe, found: _Findings) -> list[Row]:
    from distill.stages.prompts import split

    train: list[Row] = []

    def attempt() -> str:
        rows, heldout, dropped, _ = split(recipe.prompts, recipe.seed)
        train.extend(rows)
        return f"{len(rows):,} to train on, {len(heldout):,} held out, {len(dropped):,} dropped"

    found.prove("prompts", attempt)
    if (
        train
        and recipe.learns_from_traces
        and "math" in recipe.curate.checks
        and all(row["reference"] is None for row in train)
        and not recipe.curate.keep_unjudged
    ):
        found.bad("references", "curate.checks has math, but no prompt has a reference. Set prompts.columns.reference, or leave math out.")
    return train


def _check_rows_of_head(role: str, spec: ModelSpec, chat: ChatFormat, found: _Findings) -> None:
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


def _compare_vocabularies(teacher: ChatFormat, student: ChatFormat, found: _Findings) -> None:
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
    positions = np.concatenate([align(_NAMELESS | row, teacher, student, vocabulary).positions for row in rows[:_ALIGNED_ROWS]])
    share = float((positions >= 0).mean())
    if share < recipe.score.min_aligned:
        raise DataError(
            f"only {share:.1%} of the supervised tokens are tokens of the teacher too, under score.min_aligned "
            f"({recipe.score.min_aligned:.0%}). Take a teacher with the student's tokenizer, or train.method cross_tokenizer."
        )
    return f"{share:.1%} of the supervised tokens of {min(len(rows), _ALIGNED_ROWS):,} traces are tokens of the teacher too"


def _live_pair(recipe: Recipe, chats: dict[str, ChatFormat], prompts: list[Row]) -> str:
    from distill.trainers.live import check_pair

    check_pair(recipe, chats["student"])
    if recipe.train.method == "cross_tokenizer":
        return "both work on bytes, by which their texts are aligned"
    teacher, student = (chats[role].prompt_text(prompts[0]["messages"]) if prompts else "" for role in ("teacher", "student"))
    return "same tokens, same ids, same end of a turn" + ("" if teacher == student else "; it reads them in the student's chat template")


def _check_room(recipe: Recipe, chat: ChatFormat, prompts: list[Row], found: _Findings) -> None:
    """How many prompts leave room for an answer of the student, who writes while it trains."""
    assert recipe.train.on_policy is not None  # the recipe was validated
    longest, limit = recipe.train.on_policy.max_new_tokens, recipe.train.max_length
    lengths = np.array([len(chat.prompt_ids(row["messages"])) for row in prompts])
    over = int((lengths > limit - longest).sum())
    detail = f"prompts have {np.median(lengths):,.0f} tokens, the longest {lengths.max():,}; answers up to {longest:,}"
    if over == len(lengths):
        found.bad("lengths", f"{detail}; not one fits into train.max_length ({limit:,}). Raise it.")
    else:
        found.good(
            "lengths", f"{detail}; {over:,} of {len(lengths):,} prompts would not fit into train.max_length ({limit:,}), and be dropped"
        )


def _check_traces(recipe: Recipe, prompts: list[Row], found: _Findings) -> list[Row]:
    """Rows with messages and completion: those an earlier run has curated, or brought ones; none before they are written."""
    rows: list[Row] = []
    curated = folder(recipe, "curate")
    if (curated / MANIFEST).exists():
        found.prove("traces", lambda: _curated(curated, rows))
    elif recipe.traces is not None and found.prove("traces", lambda: _brought(recipe, prompts, rows)) and not rows:
        found.bad("traces", "none has a prompt of this run. Their text must be the same; check traces.columns.")
    return rows


def _curated(curated: Path, rows: list[Row]) -> str:
    rows.extend(read_rows(curated, "curated"))
    return f"{len(rows):,} curated ones in {curated}"


def _brought(recipe: Recipe, prompts: list[Row], rows: list[Row]) -> str:
    from distill.data.mapping import PromptMapping
    from distill.data.sources import brought_traces
    from distill.stages.import_traces import completion_of

    traces = recipe.traces
    assert traces is not None
    known = {row["prompt_id"] for row in prompts}
    mapping = PromptMapping(recipe.prompts, traces.columns, traces.source)
    count = 0
    for where, raw in brought_traces(traces).rows():
        count += 1
        messages = mapping.messages(raw, where) or []
        completion, reason = completion_of(traces, raw, where)
        if reason is None and prompt_id(messages) in known:
            rows.append({"messages": messages, "completion": completion})
    return f"{len(rows):,} of {count:,} belong to a training prompt"


def _made_up(prompt: Row) -> Row:
    answer = f"\\boxed{{{prompt['reference'] or '...'}}}"
    return {"messages": prompt["messages"], "completion": f"{THINK_OPEN}\n{_EXAMPLE_REASONING}\n{THINK_CLOSE}\n\n{answer}"}


def _supervision(chat: ChatFormat, example: Row) -> str:
    from distill.errors import ModelError
    from distill.models.chat import IGNORE

    input_ids, labels = chat.row(example["messages"], example["completion"])
    supervised = [token for token, label in zip(input_ids, labels, strict=True) if label != IGNORE]
    text = str(chat.tokenizer.decode(supervised))
    reasoning = example["completion"].partition(THINK_OPEN)[2].partition(THINK_CLOSE)[0].strip()
    if not supervised or supervised[-1] != chat.end_of_turn_id:
        raise ModelError("the end of the turn is not among them: the student would never stop.")
    if chat.pad_id in chat.stop_ids:
        raise ModelError("padding and the end of a turn are the same token.")
    if reasoning and reasoning not in text:
        raise ModelError("the reasoning is not among them: the student would learn answers without thinking.")
    if example["completion"].split(THINK_CLOSE)[-1].strip() not in text:
        raise ModelError("the answer is not among them, or not as it was written.")
    return f"{len(supervised)} of {len(input_ids)}: {'the reasoning, ' if reasoning else ''}the answer and the end of the turn"


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


def _check_lengths(recipe: Recipe, chat: ChatFormat, rows: list[Row], prompts: list[Row], found: _Findings) -> None:
    """The distribution of lengths against `train.max_length`, and how many rows would go."""
    limit = recipe.train.max_length
    if rows:
        lengths = np.array([len(chat.row(row["messages"], row["completion"])[0]) for row in rows])
    else:
        lengths = np.array([len(chat.prompt_ids(row["messages"])) for row in prompts])
    median, most, nearly_all, longest = np.quantile(lengths, [0.5, 0.9, 0.99, 1])
    what = "prompt and completion" if rows else "prompt alone"
    detail = f"{what}: median {median:,.0f}, 90 % {most:,.0f}, 99 % {nearly_all:,.0f}, longest {longest:,.0f} tokens"
    over = int((lengths > limit).sum())
    if over == len(lengths):
        found.bad("lengths", f"{detail}; not one fits into train.max_length ({limit:,}). Raise it.")
        return
    fate = {"drop": "dropped", "cut": "cut"}[recipe.train.overlong]
    found.good("lengths", f"{detail}; {over:,} of {len(lengths):,} rows are over train.max_length ({limit:,}) and would be {fate}")
    prompt = max(len(chat.prompt_ids(row["messages"])) for row in prompts) if rows and recipe.rollouts else int(longest)
    for section, sampling in (("generate", None if rows else recipe.generate), ("rollouts", recipe.rollouts)):
        if sampling is not None and prompt + sampling.max_new_tokens > limit:
            possible = prompt + sampling.max_new_tokens
            found.unknown(
                "lengths of traces", f"none is written yet; with {section}.max_new_tokens one can have {possible:,}, and would be {fate}"
            )
