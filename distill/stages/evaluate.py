"""Stage `evaluate`: base, student and teacher answer the held-out prompts. Reads prompts/ and student/, writes eval/.

All three go through the same engine, prompts and answer check. An answer that could not be judged counts as wrong; what the
accuracy were if it was right, and the share of such answers, are metrics of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc

from distill.checks import Given
from distill.checks.fields import as_fields
from distill.checks.functions import digest_of
from distill.checks.judge import digest_of as judge_digest_of
from distill.checks.judging import Judges, columns_read, given_of
from distill.checks.references import unjudged_because
from distill.checks.tokens import Counted
from distill.errors import DataError
from distill.measure.intervals import gap_recovered, mean_interval, resampled_means
from distill.measure.marks import shares
from distill.recipe.checks import Check, checks_of
from distill.recipe.experiment import Recipe
from distill.recipe.results import Evaluate
from distill.run.clock import Clock
from distill.run.folder import StageFolder
from distill.run.log import progress
from distill.run.manifest import Manifest, check_files, read_manifest
from distill.run.parts import Part, begun, gathered_facts, missing, part_facts, part_folders, run_part, summed, write_part
from distill.run.plan import NO_LIMIT, Growth, StagePlan, name_in_run
from distill.run.schema import ANSWER, SCORE, TRACE
from distill.run.tables import TableWriter, iter_rows, rows_at
from distill.servers.judging import grade_answers, with_judges
from distill.servers.preferences import compare
from distill.stages import Step, folder, open_stage, plan_of, run_dir, student_folder

if TYPE_CHECKING:
    from distill.engines import TraceTable
    from distill.engines.earlier import EarlierTraces

TASK = "heldout"
_NO_ANSWER = "no answer"
_NO_REFERENCE = "Name the column with the right answers there, or set evaluate: null."


def plan(recipe: Recipe) -> StagePlan:
    """What the stage is asked to make.

    Raises:
        DataError: the recipe leaves it out, or names no reference, without which no answer can be judged.
    """
    evaluate = _evaluate_of(recipe)
    if recipe.prompts.columns.reference is None and _needs_reference(recipe):
        raise DataError(f"evaluate: prompts.columns.reference is null, so no answer could be judged. {_NO_REFERENCE}")
    specs = {"student": recipe.student.identity()}
    if recipe.teacher is not None and "teacher" in evaluate.models:
        specs["teacher"] = recipe.teacher.identity()
    inputs = [folder(recipe, "prompts"), *([student_folder(recipe)] if "student" in evaluate.models else [])]
    growth = Growth(
        {"evaluate.max_prompts": NO_LIMIT, "evaluate.samples_per_prompt": 0},
        # A teacher that comes or goes; another is refused. By other checks the same answers are judged anew.
        free=frozenset(
            {
                "evaluate.models",
                "evaluate.confidence",
                "evaluate.checks",
                "evaluate.preferences",
                "python_sha256",
                "judge_sha256",
                "teacher",
            }
        ),
        other_inputs=True,
    )
    checks = recipe.checks_of_answers
    asked = evaluate.identity() | ({} if checks == checks_of("math") else {"checks": [check.identity() for check in checks]})
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


def _needs_reference(recipe: Recipe) -> bool:
    """Whether a check of answers compares them with the right ones."""
    return any(check.settings.asks_reference for check in recipe.checks_of_answers)


def _evaluate_of(recipe: Recipe) -> Evaluate:
    if recipe.evaluate is None:
        raise DataError("evaluate: this recipe leaves the stage out (evaluate: null). Give it a section evaluate.")
    return recipe.evaluate


def _evaluate(recipe: Recipe, out: StageFolder, *, in_parts: bool = False) -> Manifest:
    """Has the answers written, or takes those of all parts, and judges them."""
    from distill.engines import TraceTable
    from distill.engines.earlier import EarlierTraces

    clock, evaluate, prompts = Clock(out.path), _evaluate_of(recipe), _prompts(recipe)
    table = out.table("traces", TRACE, resume=True)
    before = _before(out)
    if in_parts:
        known = EarlierTraces(part_folders(out.path), set(evaluate.models), failed=True)
        traces = TraceTable(table, out.journal(), evaluate, recipe.seed, known)
        for role in evaluate.models:
            traces.write(None, prompts, len(prompts), role, f"evaluate {role}", in_parts=True)
        facts = gathered_facts(part_facts(out.path), clock)
    else:
        traces = TraceTable(table, out.journal(), evaluate, recipe.seed, _earlier(recipe, out))
        facts = clock.facts(**_answer(recipe, out, out.path, traces, prompts))
    answers = _judge(table, recipe)
    judges = grade_answers(recipe, out, run_dir(recipe), table, answers, _fields(recipe))
    judges |= compare(recipe, out, run_dir(recipe), table, _fields(recipe))
    out.write_table("answers", answers, ANSWER)
    out.write_table("scores", _scores(answers, evaluate, recipe.seed), SCORE)
    return out.finish(
        rows_in=len(prompts) * evaluate.samples_per_prompt * len(evaluate.models),
        rows_kept=len(answers),
        keep_earlier=not set(before) <= set(facts["models"]),  # a model that is asked for no more has been paid for
        facts=with_judges(facts, judges)
        | {"confidence": evaluate.confidence, "tokens": sum(answer["num_tokens"] or 0 for answer in answers)},
    )


def _write_part(recipe: Recipe, whole: StageFolder, part: Part, out: StageFolder) -> Manifest:
    """The answers of all models to a part of the prompts."""
    from distill.engines import TraceTable

    clock, prompts = Clock(out.path), _prompts(recipe)[part.slice]
    evaluate = _evaluate_of(recipe)
    table = out.table("traces", TRACE, resume=True)
    traces = TraceTable(table, out.journal(), evaluate, recipe.seed, _earlier(recipe, whole))
    facts = _answer(recipe, whole, out.path, traces, prompts, part.count)
    return out.finish(rows_in=len(prompts), rows_kept=traces.num_rows, facts=clock.facts(**facts))


def _answer(
    recipe: Recipe, whole: StageFolder, place: Path, traces: TraceTable, prompts: list[dict[str, Any]], parts: int = 1
) -> dict[str, Any]:
    """Has each model answer, one after another, and returns what they were and cost."""
    from distill.engines.earlier import refuse_another
    from distill.servers.opening import open_writer

    evaluate, before = _evaluate_of(recipe), _before(whole)
    models: dict[str, dict[str, Any]] = {}
    devices, spent, warnings = [], [], []
    for role in evaluate.models:
        trained = student_folder(recipe) if role == "student" else None
        if trained is not None:
            check_files(trained)
        how: dict[str, Any] = {"section": "evaluate", "trained": trained, "parts": parts}
        with open_writer(recipe, role, evaluate, place, run_dir(recipe), **how) as writer:
            models[role] = writer.record
            if traces.knows(role):
                refuse_another(role, models[role], before.get(role, {}))
            traces.write(writer.engine, prompts, len(prompts), role, f"evaluate {role}", writer.max_failed)
        devices.append(writer.device)
        spent.append(writer.spent().get("server"))
        warnings += [warning for warning in writer.warnings if warning not in warnings]
    served = summed(spent)
    facts: dict[str, Any] = {"device": ", ".join(dict.fromkeys(devices)), "models": models}
    return facts | ({"server": served} if served else {}) | ({"warnings": warnings} if warnings else {})


def _prompts(recipe: Recipe) -> list[dict[str, Any]]:
    """The prompts that are asked, after those of which nothing can be measured were refused."""
    source, most = folder(recipe, "prompts"), _evaluate_of(recipe).max_prompts
    heldout = read_manifest(source).rows("heldout")
    wanted = range(heldout if most is None else min(most, heldout))
    prompts = list(rows_at(source, "heldout", wanted, ["prompt_id", "messages", "reference"]))
    _refuse_unanswerable(source, prompts, recipe)
    return prompts


def _before(out: StageFolder) -> dict[str, dict[str, Any]]:
    """The models of what the stage grows from."""
    found: dict[str, dict[str, Any]] = read_manifest(out.earlier).facts["models"] if out.earlier else {}
    return found


def _refuse_unanswerable(source: Path, prompts: list[dict[str, Any]], recipe: Recipe) -> None:
    """Refuses prompts of which nothing can be measured, before a model is loaded."""
    if not prompts:
        raise DataError(f"{source}: holds no held-out prompt, so there is nothing to measure on. Raise prompts.heldout_size.")
    if _needs_reference(recipe) and all(row["reference"] is None for row in prompts):
        raise DataError(
            f"{source}: not one of {len(prompts):,} held-out prompts has a reference (prompts.columns.reference), so no answer could be "
            f"judged. {_NO_REFERENCE}"
        )
    is_math = any(check.math is not None for check in recipe.checks_of_answers)
    if is_math and (problem := unjudged_because([row["reference"] for row in prompts])):
        raise DataError(f"{source}: {problem}. {_NO_REFERENCE}")


def _earlier(recipe: Recipe, out: StageFolder) -> EarlierTraces | None:
    """What was answered before, where the stage grows: by base and teacher, and by this student, not by one before it."""
    from distill.engines.earlier import EarlierTraces

    if out.earlier is None:
        return None
    trained = student_folder(recipe) if "student" in _evaluate_of(recipe).models else None
    same = trained is not None and read_manifest(out.earlier).inputs.get(name_in_run(trained)) == read_manifest(trained).digest
    return EarlierTraces(out.earlier, {"base", "teacher", *(["student"] if same else [])})


def _judge(table: TableWriter, recipe: Recipe) -> list[dict[str, Any]]:
    """Rows of the table `answers`, one for each trace; of the texts a piece at a time is in memory."""
    answers: list[dict[str, Any]] = []
    counted, checks, fields = Counted(recipe), recipe.checks_of_answers, _fields(recipe)

    def given() -> Iterator[tuple[int, Given]]:
        for trace in _judged_parts(table, checks):
            answers.append(
                {
                    "model_role": trace["author"],
                    "prompt_id": trace["prompt_id"],
                    "sample_index": trace["sample_index"],
                    "truncated": trace["finish_reason"] == "length",
                    "num_tokens": counted(trace),
                }
            )
            if trace["finish_reason"] == "error":
                answers[-1] |= {"correct": None, "reason": _NO_ANSWER}
                bar.update()
            else:
                known = {"num_tokens": answers[-1]["num_tokens"]}
                yield len(answers) - 1, given_of(trace | known, fields.get(trace["prompt_id"]))

    timeout_s = _evaluate_of(recipe).check_timeout_s
    with progress(table.num_rows, "answers", "check answers") as bar, Judges(checks, timeout_s) as judges:
        for number, (correct, reason) in judges.answers(given()):
            answers[number] |= {"correct": correct, "reason": reason}
            bar.update()
    return answers


def _fields(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """What checks look at beside an answer and its reference, by the held-out prompt's id."""
    if not recipe.prompts.fields:
        return {}
    rows = iter_rows(folder(recipe, "prompts"), "heldout", columns=["prompt_id", "fields"])
    return {row["prompt_id"]: as_fields(row["fields"]) for row in rows}


def _judged_parts(table: TableWriter, checks: list[Check]) -> Iterator[dict[str, Any]]:
    """What is asked and noted of each trace, with the number of its tokens."""
    names = ["author", "prompt_id", "sample_index", "reference", "completion", "finish_reason", "completion_ids"]
    for piece in table.pieces([*names, *columns_read(checks)]):
        yield from (
            piece.drop_columns("completion_ids").append_column("num_tokens", pc.list_value_length(piece["completion_ids"])).to_pylist()
        )


def _scores(answers: list[dict[str, Any]], evaluate: Evaluate, seed: int) -> list[dict[str, Any]]:
    """Rows of the table `scores`."""
    accuracy_RP, most_RP = found = shares(answers, evaluate.models)
    if not found.num_prompts:
        reasons = Counter(answer["reason"] for answer in answers if answer["correct"] is None)
        named = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
        raise DataError(
            f"evaluate: no held-out prompt has an answer that could be judged ({named}). Check prompts.columns.reference, "
            "prompts.answer_pattern and evaluate.check_timeout_s; the answers are kept, or set evaluate: null."
        )
    draws_RB, scores = resampled_means(accuracy_RP, seed), []
    for index, role in enumerate(evaluate.models):
        mine = [answer for answer in answers if answer["model_role"] == role]
        known = [answer["num_tokens"] for answer in mine if answer["num_tokens"] is not None]
        estimate = mean_interval(accuracy_RP[index], draws_RB[index], evaluate.confidence)
        scores.append({"model_role": role, "metric": "accuracy", **estimate._asdict(), "num_prompts": found.num_prompts})
        plain = {
            "accuracy_if_unjudged_right": most_RP[index].mean(),
            "mean_tokens": np.mean(known) if known else np.nan,
            "truncation_rate": np.mean([answer["truncated"] for answer in mine]),
            "unjudged_rate": np.mean([answer["correct"] is None for answer in mine]),
        }
        num_prompts = len({answer["prompt_id"] for answer in mine})
        scores += [
            {"model_role": role, "metric": name, "value": None if np.isnan(value) else float(value), "num_prompts": num_prompts}
            for name, value in plain.items()
        ]
    if {"base", "student", "teacher"} <= set(evaluate.models):
        order = [evaluate.models.index(role) for role in ("base", "student", "teacher")]
        base, student, teacher = (float(value) for value in accuracy_RP[order].mean(axis=1))
        gap = gap_recovered((base, student, teacher), draws_RB[order], evaluate.confidence)
        scores.append({"model_role": "gap", "metric": "gap_recovered", **gap._asdict(), "num_prompts": found.num_prompts})
    return [{"task": TASK, "samples_per_prompt": evaluate.samples_per_prompt, **score} for score in scores]
