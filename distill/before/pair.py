"""`distill pair`: measures on a few prompts whether a teacher can teach a student, before anything is spent on training.

One model is in memory at a time: the student writes, the teacher writes and reads both, the student reads both. They write behind their
servers, if they have any; the student reads in this process, the teacher behind a server that can. What was found is printed and kept in
the run's folder `pair`, which resumes and is not made twice, like a stage.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel

from distill.before import teachers
from distill.checks.fields import as_fields
from distill.checks.judging import Judges, given_of
from distill.engines import requests_for, write_traces
from distill.engines.hf import HFEngine
from distill.engines.scored import Statistics
from distill.engines.scoring import score_rows
from distill.errors import RecipeError
from distill.measure.intervals import resampled_means
from distill.measure.pairing import NUM_DEPTHS, TOP_K, Answers, Findings, read, verdict
from distill.models.chat import ChatFormat
from distill.models.loading import free_memory, load_chat_format, load_model, pick_device
from distill.models.vocabulary import AlignedRow, VocabularyMap, align, vocabulary_map
from distill.recipe.base import Sampling
from distill.recipe.checks import checks_of
from distill.recipe.experiment import Recipe
from distill.recipe.learning import READING_KINDS, Score
from distill.recipe.models import ModelSpec
from distill.run.clock import Clock
from distill.run.files import write_text
from distill.run.folder import StageFolder, delete_stage
from distill.run.log import progress, say
from distill.run.manifest import check_files
from distill.run.schema import TRACE
from distill.servers.opening import open_writer
from distill.servers.reading import Read, open_reader
from distill.stages import run_dir
from distill.stages.prompts import survey
from distill.targets.codec import Targets
from distill.targets.spec import ChosenToken, TopK

Row = dict[str, Any]
_FOLDER, _FINDINGS = "pair", "findings.json"
_WRITES = ("traces-*.parquet", _FINDINGS, "batches*.json")
_CONFIDENCE = 0.95
_PROMPTS, _TRACES = 32, 200  # that are looked at, unless another number is asked for; of 200 traces the ratios are as good as of all
_WIDTH = 100  # of the tables, where the output is no terminal


def run(recipe: Recipe, prompts: int | None = None, traces: Sequence[str] = (), *, redo: bool = False) -> bool:
    """Measures, prints, and keeps what was found; whether this teacher can teach this student.

    Args:
        recipe: The recipe.
        prompts: Training prompts to look at; null for the usual number.
        traces: Compare the teachers that wrote these instead, see `teachers`; whether one can teach is then left open.
        redo: Delete what an earlier call found.

    Raises:
        RecipeError: it has no teacher.
    """
    if traces:
        teachers.run(recipe, traces, prompts or _TRACES, redo=redo)
        return True
    num_prompts = prompts or _PROMPTS
    if recipe.teacher is None:
        raise RecipeError(f"{recipe.name}: has no teacher to pair the student with. Add a section teacher.")
    server = recipe.teacher.server
    if server is not None and server.is_hosted:
        raise RecipeError(
            f"teacher.server.kind {server.kind}: tells nothing of what it thinks of the student's answers, which a pair is judged by. Try "
            "the pair with an open teacher of the same family, here or behind vllm or sglang."
        )
    sampling, checks = _sampling(recipe), recipe.checks_of_answers
    settings = {
        "teacher": recipe.teacher.identity(),
        "student": recipe.student.identity(),
        "prompts": recipe.prompts.identity(),
        "sampling": sampling.identity(),
        "num_prompts": num_prompts,
        "min_aligned": (recipe.score or Score()).min_aligned,
        "seed": recipe.seed,
        **({} if checks == checks_of("math") else {"checks": [check.identity() for check in checks]}),
    }
    if redo:
        delete_stage(run_dir(recipe) / _FOLDER, _WRITES)
    with StageFolder(run_dir(recipe) / _FOLDER, _FOLDER, settings, writes=_WRITES) as out:
        if out.manifest is None:
            _measure(recipe, recipe.teacher, sampling, survey(recipe.prompts, recipe.seed, num_prompts).sample, out)
        check_files(out.path)
        found = json.loads((out.path / _FINDINGS).read_text(encoding="utf-8"))
    _print(found)
    say(f"\nkept in {out.path / _FINDINGS}")
    return bool(found["good"])


def _sampling(recipe: Recipe) -> Sampling:
    """As the student will write in rounds, else as the teacher writes, else drawn from the model as it is."""
    source = recipe.rollouts or recipe.generate or Sampling(temperature=1.0, top_p=1.0)
    return source.plain(samples_per_prompt=1)


def _measure(recipe: Recipe, teacher: ModelSpec, sampling: Sampling, prompts: list[Row], out: StageFolder) -> None:
    clock, journal, device = Clock(out.path), out.journal(), pick_device()
    say(f"pair      {len(prompts)} prompts, up to {sampling.max_new_tokens:,} tokens an answer, temperature {sampling.temperature:g}")
    student_chat, teacher_chat = load_chat_format(recipe.student), load_chat_format(teacher)
    to_student, own = vocabulary_map(teacher_chat, student_chat), vocabulary_map(student_chat, student_chat)
    requests = requests_for(prompts, 1, recipe.seed)

    def written(model: PreTrainedModel, chat: ChatFormat, author: str) -> list[Row]:
        return write_traces(HFEngine(model, chat, sampling), requests, sampling, journal, author, f"{author} writes")

    def served(role: str) -> list[Row]:
        section = "rollouts" if recipe.rollouts is not None else "generate"
        with open_writer(recipe, role, sampling, out.path, run_dir(recipe), section=section, needs_ids=True) as writer:
            return write_traces(writer.engine, requests, sampling, journal, role, f"{role} writes")

    by_student = served("student")  # in this process where it names no server
    by_teacher = served("teacher") if teacher.server is not None else []
    with _teacher_reads(recipe, teacher, out, to_student) as (reads, model):
        by_teacher = by_teacher or written(model, teacher_chat, "teacher")
        traces = by_student + by_teacher
        teacher_reads, statistics = _read(reads, [align(trace, teacher_chat, student_chat, to_student) for trace in traces])
    del model
    free_memory()
    reads = _reads_here(load_model(recipe.student, device), own)
    student_reads, _ = _read(reads, [align(trace, student_chat, student_chat, own) for trace in traces])
    right = _judged(recipe, prompts, traces)
    half = len(by_student)
    found = Findings(
        aligned_share=statistics.aligned_share,
        carried_mass=min(1.0, statistics.most_carried),  # what a server does not tell may be the student's too
        student=_answers(by_student, right[:half]),
        teacher=_answers(by_teacher, right[half:]),
        on_student=read(teacher_reads[:half], student_reads[:half], student_wrote=True),
        on_teacher=read(teacher_reads[half:], student_reads[half:], student_wrote=False),
        difference=_difference(right[:half], right[half:], recipe.seed),
    )
    good, sentences = verdict(found, min_aligned=(recipe.score or Score()).min_aligned, advice=to_student.advice)
    kept = {"num_prompts": len(prompts), **asdict(found), "good": good, "verdict": sentences}
    write_text(out.path / _FINDINGS, json.dumps(kept, indent=2))
    out.write_table("traces", traces, TRACE)
    out.finish(rows_in=len(prompts), rows_kept=len(traces), files=[out.path / _FINDINGS], facts=clock.facts(device=str(device)))


def _reads_here(model: PreTrainedModel, vocabulary: VocabularyMap) -> Read:
    return lambda rows, target: score_rows(model, rows, target, vocabulary)


@contextmanager
def _teacher_reads(recipe: Recipe, teacher: ModelSpec, out: StageFolder, vocabulary: VocabularyMap) -> Iterator[tuple[Read, Any]]:
    """How the teacher reads, and its model where that is in this process."""
    if teacher.server is not None and teacher.server.kind in READING_KINDS:
        with open_reader(recipe, out.path, run_dir(recipe), vocabulary, TOP_K) as reads:
            yield reads, None
        return
    model = load_model(teacher, pick_device())
    yield _reads_here(model, vocabulary), model


def _read(reads: Read, rows: list[AlignedRow]) -> tuple[list[tuple[Targets, Targets]], Statistics]:
    """For each row what a model thinks of it: its most probable tokens, and the written ones."""
    best, chosen = reads(rows, TopK(k=TOP_K)), reads(rows, ChosenToken())
    statistics = Statistics()
    for row in best:
        statistics.add(row.statistics)
    return [(top.targets, written.targets) for top, written in zip(best, chosen, strict=True)], statistics


def _judged(recipe: Recipe, prompts: list[Row], traces: list[Row]) -> list[bool | None]:
    """Whether each answer is right, by the checks of the recipe; null where it could not be judged.

    Nor is any where a model is among the checks: it is not asked here, and the others don't say that an answer is right.
    """
    asked = next((check.called for check in recipe.checks_of_answers if check.judge is not None), None)
    if asked is not None:
        say(f"pair      whether answers are right is left open: the check {asked} is a model, which is not asked here")
        return [None] * len(traces)
    fields = {row["prompt_id"]: as_fields(row.get("fields")) for row in prompts}
    given = (given_of(trace | {"num_tokens": len(trace["completion_ids"])}, fields[trace["prompt_id"]]) for trace in traces)
    right: dict[int, bool | None] = {}
    with progress(len(traces), "answers", "check answers") as bar, Judges(recipe.checks_of_answers, 10.0) as judges:
        for number, (passed, _) in judges.answers(enumerate(given)):
            right[number] = passed
            bar.update()
    return [right[number] for number in range(len(traces))]


def _answers(traces: list[Row], right: list[bool | None]) -> Answers:
    judged = [mark for mark in right if mark is not None]
    return Answers(
        finished=float(np.mean([trace["finish_reason"] == "stop" for trace in traces])),
        mean_tokens=float(np.mean([len(trace["completion_ids"]) for trace in traces])),
        accuracy=float(np.mean(judged)) if judged else None,
    )


def _difference(student: list[bool | None], teacher: list[bool | None], seed: int) -> tuple[float, float] | None:
    """95 % interval of the teacher's accuracy less the student's, by the paired bootstrap over prompts."""
    marks = [(mine, theirs) for mine, theirs in zip(student, teacher, strict=True) if mine is not None and theirs is not None]
    if not marks:
        return None
    draws_RB = resampled_means(np.array(marks, dtype=np.float64).T, seed)
    low, high = np.quantile(draws_RB[1] - draws_RB[0], [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return float(low), float(high)


def _print(found: dict[str, Any]) -> None:
    """The findings as two tables and the verdict."""
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, _WIDTH)
    table = Table(box=box.SIMPLE_HEAD, title_justify="left", title=f"answers to {found['num_prompts']} prompts")
    for name in ("model", "right", "end by themselves", "tokens an answer"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for role in ("student", "teacher"):
        answers = found[role]
        table.add_row(role, _percent(answers["accuracy"]), _percent(answers["finished"]), f"{answers['mean_tokens']:,.0f}")
    console.print(table)
    if found["difference"] is not None:
        low, high = found["difference"]
        console.print(f"  the teacher is right on {low:+.1%} to {high:+.1%} more of them (95 % interval)\n")
    table = Table(box=box.SIMPLE_HEAD, title_justify="left", title="what they think of each other's answers")
    table.add_column("", no_wrap=True)
    for author in ("student", "teacher"):
        table.add_column(f"written by the {author}", justify="right")
    reads = [found["on_student"], found["on_teacher"]]
    table.add_row("divergence, nats a token", *(f"{one['divergence']:.3f}" for one in reads))
    table.add_row(f"common among the {TOP_K} best", *(_percent(one["overlap"]) for one in reads))
    table.add_row("probability the student gives those", *(_percent(one["shared_mass_student"]) for one in reads))
    table.add_row("probability the teacher gives those", *(_percent(one["shared_mass_teacher"]) for one in reads))
    for depth in range(NUM_DEPTHS):
        means = (one["advantage"][depth][0] for one in reads)
        table.add_row(f"teacher's advantage, part {depth + 1} of {NUM_DEPTHS}", *(f"{mean:+.3f}" for mean in means))
    console.print(table)
    console.print(
        f"  {found['aligned_share']:.1%} of the tokens are tokens of both; of the teacher's probability there {found['carried_mass']:.1%} "
        "lies on tokens the student has\n"
    )
    colour = "green" if found["good"] else "red"
    for place, sentence in enumerate(found["verdict"]):
        console.print(Text(sentence, style=f"bold {colour}" if not place else ""))


def _percent(value: float | None) -> str:
    return "not judged" if value is None else f"{value:.1%}"
