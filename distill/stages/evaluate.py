"""Stage `evaluate`: base, student and teacher answer held-out prompts. Reads prompts/, student/ and further sets, writes eval/.

All three go through the same engine, prompts and answer checks, and each is loaded once for all sets. An answer that could not be judged
counts as wrong; what the accuracy were if it was right, and the share of such answers, are metrics of their own. Where nothing can be right
or wrong, or where it is asked for, base and student also read what the teacher answered; see `servers.likeness`.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from distill.checks.finals import labels_of
from distill.checks.functions import digest_of
from distill.checks.judge import digest_of as judge_digest_of
from distill.checks.judging import Judges
from distill.checks.label import right_label
from distill.checks.marking import ToMark, marked
from distill.checks.references import unjudged_because
from distill.checks.tokens import Counted
from distill.data.sets import read_set, trained_on
from distill.data.sources import heldout_set
from distill.errors import DataError
from distill.measure.labels import confusion
from distill.measure.scores import Measured, scores_of
from distill.recipe.checks import Check, checks_of
from distill.recipe.experiment import Recipe
from distill.recipe.likeness import Likeness
from distill.recipe.results import Evaluate
from distill.recipe.sets import MAIN, AskedSet
from distill.run.clock import Clock
from distill.run.folder import StageFolder
from distill.run.log import say
from distill.run.manifest import Manifest, check_files, read_manifest
from distill.run.parts import Part, begun, gathered_facts, missing, part_facts, part_folders, run_part, summed, write_part
from distill.run.plan import NO_LIMIT, Growth, StagePlan, name_in_run
from distill.run.schema import ANSWER, CONFUSION, SCORE, TRACE
from distill.run.tables import TableWriter, rows_at
from distill.servers.judging import carry_over, grade_answers, is_another, with_judges
from distill.servers.preferences import compare
from distill.stages import Step, folder, open_stage, plan_of, run_dir, student_folder

if TYPE_CHECKING:
    from distill.engines import TraceTable
    from distill.engines.earlier import EarlierTraces

Row = dict[str, Any]
_NO_TEACHER = "Or name teacher in evaluate.models, with base or student, to measure how alike these are to it."
_NO_REFERENCE = "Name the column with the right answers there, or set evaluate: null."
_READING = {"calibration", "likeness", *(f"likeness.{name}" for name in Likeness.model_fields)}
_RISING = {"max_prompts": NO_LIMIT, "samples_per_prompt": 0}
_OF_SOURCE = ("source", "subset", "split", "columns", "answer_pattern", "json_reference", "system_prompt", "template", "max_prompts")
"""Settings of a further set that decide its prompts."""


class _Set(NamedTuple):
    """Prompts that are asked."""

    name: str
    asked: AskedSet
    rows: list[Row]
    """Of prompts, with `tags`, and `fields` where checks look at some."""
    left_out: dict[str, int] = {}  # noqa: RUF012
    """Reason and number of rows of a further set that are not asked."""
    sources: list[Row] = []  # noqa: RUF012
    """What a manifest says of its files."""


def plan(recipe: Recipe) -> StagePlan:
    """What the stage is asked to make.

    Raises:
        DataError: the recipe leaves it out, or leaves nothing that could be measured.
    """
    evaluate = _evaluate_of(recipe)
    if not recipe.measures:
        raise DataError(f"evaluate: prompts.columns.reference is null, so no answer could be judged. {_NO_REFERENCE} {_NO_TEACHER}")
    specs = {"student": recipe.student.identity()}
    if recipe.teacher is not None and "teacher" in evaluate.models:
        specs["teacher"] = recipe.teacher.identity()
    inputs = [folder(recipe, "prompts"), *([student_folder(recipe)] if "student" in evaluate.models else [])]
    rising = {f"evaluate.{place}{name}": least for place in ("", "sets.*.") for name, least in _RISING.items()}
    # A teacher that comes or goes; another is refused. By other checks the same answers are judged anew. A set comes or goes whole.
    free = {"models", "confidence", "checks", "preferences", "sets", "sets.*", "sets.*.checks", *_READING}
    growth = Growth(
        rising, free=frozenset({f"evaluate.{name}" for name in free} | {"python_sha256", "judge_sha256", "teacher"}), other_inputs=True
    )
    checks = recipe.checks_of_answers
    asked = evaluate.identity() | ({} if checks == checks_of("math") else {"checks": [check.identity() for check in checks]})
    asked |= {} if recipe.likeness is None else {"likeness": recipe.likeness.identity()}
    asked |= {"sets": _settings_of_sets(recipe)} if evaluate.sets else {}
    checks = [check for each in recipe.asked_sets().values() for check in each.checks]
    python, judge = digest_of(checks), judge_digest_of(checks, evaluate.preferences)
    settings = {**specs, "evaluate": asked, "seed": recipe.seed, **({"python_sha256": python} if python else {})}
    settings |= {"judge_sha256": judge} if judge else {}
    return plan_of(recipe, Step("evaluate"), settings, inputs, growth)


def run(recipe: Recipe) -> Manifest:
    """Writes the tables `traces`, `answers` and `scores`; resumes after the last answer, and finishes parts that were begun."""
    asked = plan(recipe)
    with open_stage(recipe, asked) as out:
        if out.manifest:
            return out.manifest
        count = begun(out.path)
        if count is None:
            return _evaluate(recipe, out)
        for part in missing(out.path, count):
            write_part(asked, part, partial(_write_part, recipe, out, part))
        return _evaluate(recipe, out, in_parts=True)


def run_shard(recipe: Recipe, part: Part, *, completes: bool = True) -> Manifest | None:
    """Writes the answers of one part, and judges all of them if it was the last; else null.

    Args:
        recipe: The recipe.
        part: Which.
        completes: Put all parts together, if it was the last; else another process does.

    Raises:
        StageConflictError: the stage was begun in another number of parts, or another process works on this one.
    """
    asked = plan(recipe)
    with open_stage(recipe, asked, str(part)) as out:
        if out.manifest:
            return out.manifest
        return run_part(
            out, asked, part, partial(_write_part, recipe, out, part), partial(_evaluate, recipe, out, in_parts=True) if completes else None
        )


def _evaluate_of(recipe: Recipe) -> Evaluate:
    if recipe.evaluate is None:
        raise DataError("evaluate: this recipe leaves the stage out (evaluate: null). Give it a section evaluate.")
    return recipe.evaluate


def _settings_of_sets(recipe: Recipe) -> Row:
    """By the name of each further set what decides its answers; how they are judged stands beside, and is free."""
    found = {}
    for name, each in _evaluate_of(recipe).sets.items():
        asked, source = recipe.asked_sets()[name], heldout_set(name, each)
        of_source = {key: value for key, value in asked.prompts.identity().items() if key in _OF_SOURCE}
        digest = source.recall(folder(recipe, "evaluate")) or source.sha256
        checks = [check.identity() for check in asked.checks]
        found[name] = of_source | asked.sampling.identity() | {"checks": checks, "source_sha256": digest}
    return found


def _evaluate(recipe: Recipe, out: StageFolder, *, in_parts: bool = False) -> Manifest:
    """Has the answers written, or takes those of all parts, and judges them."""
    from distill.engines import TraceTable
    from distill.engines.earlier import EarlierTraces

    clock, evaluate, sets = Clock(out.path), _evaluate_of(recipe), _sets(recipe)
    table = out.table("traces", TRACE, resume=True)
    before = _before(out)
    if in_parts:
        known = EarlierTraces(part_folders(out.path), set(evaluate.models), failed=True)
        traces = TraceTable(table, out.journal(), evaluate, recipe.seed, known)
        for role in evaluate.models:
            for each in sets:
                how: Row = {"sampling": each.asked.sampling, "silent": True}
                traces.write(None, each.rows, len(each.rows), role, _described(role, each), **how)
        facts = gathered_facts(part_facts(out.path), clock)
    else:
        traces = TraceTable(table, out.journal(), evaluate, recipe.seed, _earlier(recipe, out))
        facts = clock.facts(**_answer(recipe, out, out.path, traces, sets))
    answers = _judge(table, recipe, sets, out)
    dropped = {name for name in before.settings.get("evaluate", {}).get("sets", {}) if name not in evaluate.sets} if before else set()
    carried = carry_over(out, answers["judges"])
    fewer = before is not None and (bool(dropped) or not set(before.facts["models"]) <= set(facts["models"]))
    return out.finish(
        rows_in=sum(len(each.rows) * each.asked.sampling.samples_per_prompt for each in sets) * len(evaluate.models),
        rows_kept=answers["rows"],
        keep_earlier=fewer or is_another(out, answers["judges"]),  # what is asked for no more has been paid for
        facts=with_judges(facts, answers["judges"])
        | {"confidence": evaluate.confidence, "tokens": answers["tokens"]}
        | _facts_of_sets(sets)
        | answers["read"]
        | carried,
    )


def _facts_of_sets(sets: Sequence[_Set]) -> Row:
    """What the manifest says of the further sets; nothing where there are none."""
    further = {each.name: {"prompts": len(each.rows), "left_out": each.left_out} for each in sets if each.name != MAIN}
    return {"sets": further, "sources": [record for each in sets for record in each.sources]} if further else {}


def _write_part(recipe: Recipe, whole: StageFolder, part: Part, out: StageFolder) -> Manifest:
    """The answers of all models to a part of the prompts of each set."""
    from distill.engines import TraceTable

    clock, evaluate = Clock(out.path), _evaluate_of(recipe)
    sets = [each._replace(rows=each.rows[part.slice]) for each in _sets(recipe)]
    table = out.table("traces", TRACE, resume=True)
    traces = TraceTable(table, out.journal(), evaluate, recipe.seed, _earlier(recipe, whole))
    facts = _answer(recipe, whole, out.path, traces, sets, part.count)
    return out.finish(rows_in=sum(len(each.rows) for each in sets), rows_kept=traces.num_rows, facts=clock.facts(**facts))


def _answer(recipe: Recipe, whole: StageFolder, place: Path, traces: TraceTable, sets: Sequence[_Set], parts: int = 1) -> Row:
    """Has each model answer, one after another, all sets each, and returns what they were and cost."""
    from distill.engines.earlier import refuse_another
    from distill.servers.opening import open_writer

    evaluate, before = _evaluate_of(recipe), _before(whole)
    models: dict[str, Row] = {}
    devices, spent, warnings = [], [], []
    wrote: Row | None = {} if traces.is_new else None  # of answers that were there before nobody knows the seconds
    for role in evaluate.models:
        trained = student_folder(recipe) if role == "student" else None
        if trained is not None:
            check_files(trained)
        how: Row = {"section": "evaluate", "trained": trained, "parts": parts}
        with open_writer(recipe, role, evaluate, place, run_dir(recipe), **how) as writer:
            models[role] = writer.record
            if traces.knows(role) and before is not None:
                refuse_another(role, models[role], before.facts["models"].get(role, {}))
            begun_s, tokens_before = time.perf_counter(), traces.tokens
            for each in sets:
                sampling = each.asked.sampling
                engine = writer.engine if each.name == MAIN else writer.drawing(sampling, each.name)
                more: Row = {"sampling": sampling, "silent": each.name != MAIN}
                traces.write(engine, each.rows, len(each.rows), role, _described(role, each), writer.max_failed, **more)
            if wrote is not None:
                took = {"tokens": traces.tokens - tokens_before, "seconds": round(time.perf_counter() - begun_s, 3)}
                wrote[role] = took | {"device": writer.device}
        devices.append(writer.device)
        spent.append(writer.spent().get("server"))
        warnings += [warning for warning in writer.warnings if warning not in warnings]
    served = summed(spent)
    facts: Row = {"device": ", ".join(dict.fromkeys(devices)), "models": models} | ({"writing": wrote} if wrote else {})
    return facts | ({"server": served} if served else {}) | ({"warnings": warnings} if warnings else {})


def _described(role: str, each: _Set) -> str:
    return f"evaluate {role}" if each.name == MAIN else f"evaluate {role} on {each.name}"


def _sets(recipe: Recipe) -> list[_Set]:
    """What is asked, after prompts of which nothing can be measured were refused: the run's own prompts, then each further set."""
    source, asked = folder(recipe, "prompts"), recipe.asked_sets()
    heldout, most = read_manifest(source).rows("heldout"), asked[MAIN].max_prompts
    columns = ["prompt_id", "messages", "reference", "tags", *(["fields"] if recipe.prompts.fields else [])]
    rows = list(rows_at(source, "heldout", range(heldout if most is None else min(most, heldout)), columns))
    _refuse_unanswerable(source, rows, recipe)
    found = [_Set(MAIN, asked[MAIN], rows)]
    if len(asked) == 1:
        return found
    trained = trained_on(source)
    for name in list(asked)[1:]:
        read = read_set(recipe, name, trained)
        _refuse_unjudgeable(f"evaluate.sets.{name}", read.rows, asked[name].checks)
        if lost := {reason: count for reason, count in read.drops.items() if reason != "not_drawn"}:
            words = ", ".join(f"{count:,} {reason}" for reason, count in sorted(lost.items()))
            say(f"evaluate  {name}: {len(read.rows):,} prompts; left out: {words}")
        found.append(_Set(name, asked[name], read.rows, read.drops, read.sources))
    return found


def _before(out: StageFolder) -> Manifest | None:
    """Of what the stage grows from; null where it starts from nothing."""
    return read_manifest(out.earlier) if out.earlier else None


def _refuse_unanswerable(source: Path, prompts: list[Row], recipe: Recipe) -> None:
    """Refuses prompts of the run of which nothing can be measured, before a model is loaded."""
    if not prompts:
        raise DataError(f"{source}: holds no held-out prompt, so there is nothing to measure on. Raise prompts.heldout_size.")
    if not recipe.prompts.has_references:
        return
    asks = any(check.settings.asks_reference for check in recipe.checks_of_answers)
    if asks and all(row["reference"] is None for row in prompts):
        raise DataError(
            f"{source}: not one of {len(prompts):,} held-out prompts has a reference (prompts.columns.reference), so no answer could be "
            f"judged. {_NO_REFERENCE}"
        )
    _refuse_unjudgeable(str(source), prompts, recipe.checks_of_answers)


def _refuse_unjudgeable(where: str, prompts: list[Row], checks: Sequence[Check]) -> None:
    """Refuses prompts whose references no check could compare with."""
    if any(check.settings.asks_reference for check in checks) and (problem := unjudged_because([row["reference"] for row in prompts])):
        raise DataError(f"{where}: {problem}. {_NO_REFERENCE}")


def _earlier(recipe: Recipe, out: StageFolder) -> EarlierTraces | None:
    """What was answered before, where the stage grows: by base and teacher, and by this student, not by one before it."""
    from distill.engines.earlier import EarlierTraces

    if out.earlier is None:
        return None
    trained = student_folder(recipe) if "student" in _evaluate_of(recipe).models else None
    same = trained is not None and read_manifest(out.earlier).inputs.get(name_in_run(trained)) == read_manifest(trained).digest
    return EarlierTraces(out.earlier, {"base", "teacher", *(["student"] if same else [])})


def _judge(table: TableWriter, recipe: Recipe, sets: Sequence[_Set], out: StageFolder) -> Row:
    """Writes the tables `answers` and `scores`, and `confusion` where labels are answered; a set at a time is in memory."""
    from distill.servers.likeness import read_answers

    evaluate, counted, rows, tokens = _evaluate_of(recipe), Counted(recipe), 0, 0
    read: Row = {}
    asked: Row = {}  # judges
    answers, scores = out.table("answers", ANSWER), out.table("scores", SCORE)
    confusions = out.table("confusion", CONFUSION, optional=True)
    for checks, alike in itertools.groupby(sets, lambda each: each.asked.checks):
        with Judges(checks, evaluate.check_timeout_s) as judges:
            for each in alike:
                prompts = {row["prompt_id"]: row for row in each.rows}
                found = marked(table, ToMark(each.name, checks, prompts), counted, judges)
                asked |= grade_answers(recipe, out, run_dir(recipe), table, each.name, checks, found, prompts)
                measured = _measured(each, evaluate, recipe.seed)
                if each.name == MAIN:
                    trained = student_folder(recipe) if "student" in evaluate.models else None
                    more, read = read_answers(recipe, out, table, run_dir(recipe), trained, list(prompts)).scores(found, recipe)
                    scores.extend({"set": MAIN, "samples_per_prompt": evaluate.samples_per_prompt} | row for row in more)
                if each.name != MAIN or recipe.judges_answers:
                    scores.extend(_scores(found, measured))
                confusions.extend(_confusion(found, measured))
                answers.extend(found)
                rows, tokens = rows + len(found), tokens + sum(answer["num_tokens"] or 0 for answer in found)
    asked |= compare(recipe, out, run_dir(recipe), table, sets[0].rows)
    return {"rows": rows, "tokens": tokens, "judges": asked, "read": read}


def _measured(each: _Set, evaluate: Evaluate, seed: int) -> Measured:
    """What the answers to a set are measured by."""
    found = Measured(each.name, evaluate.models, each.asked.sampling.samples_per_prompt, evaluate.confidence, seed)
    label = labels_of(each.asked.checks)
    if label is None:
        return found
    right = {row["prompt_id"]: right_label(row["reference"], label) for row in each.rows}
    known = {prompt: name for prompt, name in right.items() if name is not None}
    return found._replace(labels=label.choices or [], right=known)


def _confusion(answers: Sequence[Row], asked: Measured) -> list[Row]:
    """Rows of the table `confusion`, but for what never was; none where there are no labels."""
    rows = []
    for role in asked.models if asked.right else ():
        mine = [answer for answer in answers if answer["model_role"] == role]
        counts = confusion(mine, asked.right, asked.labels)
        for place, named in zip(*(axis.tolist() for axis in counts.nonzero()), strict=True):
            given = asked.labels[named] if named < len(asked.labels) else None
            same = {"set": asked.name, "model_role": role, "count": int(counts[place, named])}
            rows.append(same | {"reference": asked.labels[place], "answer": given})
    return rows


def _scores(answers: Sequence[Row], asked: Measured) -> list[Row]:
    """Rows of the table `scores` of a set.

    Raises:
        DataError: no answer could be judged.
    """
    rows = scores_of(answers, asked)
    if not rows:
        reasons = Counter(answer["reason"] for answer in answers if answer["correct"] is None)
        named = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
        where, section = ("evaluate", "prompts") if asked.name == MAIN else (f"evaluate.sets.{asked.name}",) * 2
        raise DataError(
            f"{where}: no held-out prompt has an answer that could be judged ({named}). Check {section}.columns.reference, "
            f"{section}.answer_pattern and evaluate.check_timeout_s; the answers are kept, or set evaluate: null."
        )
    return rows
