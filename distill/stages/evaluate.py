"""Stage `evaluate`: base, student and teacher answer the held-out prompts. Reads prompts/ and student/, writes eval/.

All three go through the same engine, prompts and answer check. An answer that could not be judged counts neither as
right nor as wrong: its prompt is left out of the comparison, and the share of such answers is a metric of its own.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc

from distill.checks.references import unjudged_because
from distill.errors import DataError
from distill.measure.intervals import gap_recovered, mean_interval, resampled_means
from distill.recipe.experiment import Recipe
from distill.recipe.results import Evaluate
from distill.run.clock import Clock
from distill.run.folder import StageFolder
from distill.run.log import progress
from distill.run.manifest import Manifest, check_files, read_manifest
from distill.run.plan import NO_LIMIT, Growth, StagePlan, name_in_run
from distill.run.schema import ANSWER, SCORE, TRACE
from distill.run.tables import TableWriter, rows_at
from distill.stages import Step, folder, open_stage, plan_of, student_folder

if TYPE_CHECKING:
    from distill.engines.earlier import EarlierTraces

TASK = "heldout"
_NO_REFERENCE = "Name the column with the right answers there, or set evaluate: null."


def plan(recipe: Recipe) -> StagePlan:
    """What the stage is asked to make.

    Raises:
        DataError: the recipe leaves it out, or names no reference, without which no answer can be judged.
    """
    evaluate = _evaluate_of(recipe)
    if recipe.prompts.columns.reference is None:
        raise DataError(f"evaluate: prompts.columns.reference is null, so no answer could be judged. {_NO_REFERENCE}")
    specs = {"student": recipe.student.identity()}
    if recipe.teacher is not None and "teacher" in evaluate.models:
        specs["teacher"] = recipe.teacher.identity()
    inputs = [folder(recipe, "prompts"), *([student_folder(recipe)] if "student" in evaluate.models else [])]
    growth = Growth(
        {"evaluate.max_prompts": NO_LIMIT, "evaluate.samples_per_prompt": 0},
        free=frozenset({"evaluate.models", "evaluate.confidence", "teacher"}),  # a teacher that comes or goes; another is refused
        other_inputs=True,
    )
    return plan_of(recipe, Step("evaluate"), {**specs, "evaluate": evaluate.identity(), "seed": recipe.seed}, inputs, growth)


def run(recipe: Recipe) -> Manifest:
    """Writes the tables `traces`, `answers` and `scores`; resumes after the last finished batch."""
    with open_stage(recipe, plan(recipe)) as out:
        return out.manifest or _evaluate(recipe, _evaluate_of(recipe), out)


def _evaluate_of(recipe: Recipe) -> Evaluate:
    if recipe.evaluate is None:
        raise DataError("evaluate: this recipe leaves the stage out (evaluate: null). Give it a section evaluate.")
    return recipe.evaluate


def _evaluate(recipe: Recipe, evaluate: Evaluate, out: StageFolder) -> Manifest:
    clock = Clock(out.path)
    source = folder(recipe, "prompts")
    heldout = read_manifest(source).rows("heldout")
    wanted = range(heldout if evaluate.max_prompts is None else min(evaluate.max_prompts, heldout))
    prompts = list(rows_at(source, "heldout", wanted, ["prompt_id", "messages", "reference"]))
    _refuse_unanswerable(source, prompts)

    from distill.engines import TraceTable
    from distill.engines.earlier import refuse_another
    from distill.models.loading import pick_device

    table = out.table("traces", TRACE, resume=True)
    earlier, before = _earlier(recipe, out), read_manifest(out.earlier).facts if out.earlier else {"models": {}}
    traces = TraceTable(table, out.journal(), evaluate, recipe.seed, earlier)
    models: dict[str, dict[str, Any]] = {}
    for role in evaluate.models:
        engine, models[role] = _engine(recipe, evaluate, role)
        if earlier is not None and earlier.count(role):
            refuse_another(role, models[role], before["models"].get(role, {}))
        traces.write(engine, prompts, len(prompts), role, f"evaluate {role}")
        del engine
    answers = _judge(table, evaluate)
    out.write_table("answers", answers, ANSWER)
    out.write_table("scores", _scores(answers, evaluate, recipe.seed), SCORE)
    return out.finish(
        rows_in=len(prompts) * evaluate.samples_per_prompt * len(evaluate.models),
        rows_kept=len(answers),
        keep_earlier=not set(before["models"]) <= set(models),  # a model that is asked for no more has been paid for
        facts=clock.facts(
            device=str(pick_device()),
            models=models,
            confidence=evaluate.confidence,
            tokens=traces.tokens,
        ),
    )


def _refuse_unanswerable(source: Path, prompts: list[dict[str, Any]]) -> None:
    """Refuses prompts of which nothing can be measured, before a model is loaded."""
    if not prompts:
        raise DataError(f"{source}: holds no held-out prompt, so there is nothing to measure on. Raise prompts.heldout_size.")
    if all(row["reference"] is None for row in prompts):
        raise DataError(
            f"{source}: not one of {len(prompts):,} held-out prompts has a reference (prompts.columns.reference), so no answer could be "
            f"judged. {_NO_REFERENCE}"
        )
    if problem := unjudged_because([row["reference"] for row in prompts]):
        raise DataError(f"{source}: {problem}. {_NO_REFERENCE}")


def _earlier(recipe: Recipe, out: StageFolder) -> EarlierTraces | None:
    """What was answered before, where the stage grows: by base and teacher, and by this student, not by one before it."""
    from distill.engines.earlier import EarlierTraces

    if out.earlier is None:
        return None
    trained = student_folder(recipe) if "student" in _evaluate_of(recipe).models else None
    same = trained is not None and read_manifest(out.earlier).inputs.get(name_in_run(trained)) == read_manifest(trained).digest
    return EarlierTraces(out.earlier, {"base", "teacher", *(["student"] if same else [])})


def _engine(recipe: Recipe, evaluate: Evaluate, role: str) -> tuple[Any, dict[str, Any]]:
    """The engine of a role and the record of its model. One model is in memory at a time."""
    from distill.engines.hf import HFEngine
    from distill.models.loading import free_memory, load_chat_format, load_model, load_trained, model_record, pick_device

    free_memory()
    device = pick_device()
    spec = recipe.teacher if role == "teacher" else recipe.student
    assert spec is not None  # the recipe was validated
    if role == "student":
        trained = student_folder(recipe)
        check_files(trained)
        model = load_trained(spec, recipe.student.adapter, trained, device)
    else:
        model = load_model(spec, device)
    return HFEngine(model, load_chat_format(spec), evaluate), model_record(spec, model)


def _judge(table: TableWriter, evaluate: Evaluate) -> list[dict[str, Any]]:
    """Rows of the table `answers`, one for each trace; of the texts a piece at a time is in memory."""
    from distill.checks.math import MathJudge, Pair

    answers: list[dict[str, Any]] = []

    def pairs() -> Iterator[tuple[int, Pair]]:
        for trace in _judged_parts(table):
            answers.append(
                {
                    "model_role": trace["author"],
                    "prompt_id": trace["prompt_id"],
                    "sample_index": trace["sample_index"],
                    "truncated": trace["finish_reason"] == "length",
                    "num_tokens": trace["num_tokens"],
                }
            )
            yield len(answers) - 1, (trace["completion"], trace["reference"])

    with progress(table.num_rows, "answers", "check answers") as bar, MathJudge(evaluate.check_timeout_s) as math:
        for number, verdict in math.stream(pairs()):
            answers[number] |= {"correct": verdict.passed, "reason": verdict.reason}
            bar.update()
    return answers


def _judged_parts(table: TableWriter) -> Iterator[dict[str, Any]]:
    """What is asked and noted of each trace, with the number of its tokens."""
    for piece in table.pieces(["author", "prompt_id", "sample_index", "reference", "completion", "finish_reason", "completion_ids"]):
        yield from (
            piece.drop_columns("completion_ids").append_column("num_tokens", pc.list_value_length(piece["completion_ids"])).to_pylist()
        )


def _scores(answers: list[dict[str, Any]], evaluate: Evaluate, seed: int) -> list[dict[str, Any]]:
    """Rows of the table `scores`."""
    accuracy_RP = _accuracy_by_prompt(answers, evaluate.models)
    if not accuracy_RP.shape[1]:
        reasons = Counter(answer["reason"] for answer in answers if answer["correct"] is None)
        found = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
        raise DataError(
            f"evaluate: no held-out prompt has answers that could all be judged ({found}). Check prompts.columns.reference, "
            "prompts.answer_pattern and evaluate.check_timeout_s; the answers are kept, or set evaluate: null."
        )
    draws_RB = resampled_means(accuracy_RP, seed)
    scores = []
    for index, role in enumerate(evaluate.models):
        mine = [answer for answer in answers if answer["model_role"] == role]
        estimate = mean_interval(accuracy_RP[index], draws_RB[index], evaluate.confidence)
        scores.append({"model_role": role, "metric": "accuracy", **estimate._asdict(), "num_prompts": accuracy_RP.shape[1]})
        plain = {
            "mean_tokens": np.mean([answer["num_tokens"] for answer in mine]),
            "truncation_rate": np.mean([answer["truncated"] for answer in mine]),
            "unjudged_rate": np.mean([answer["correct"] is None for answer in mine]),
        }
        num_prompts = len({answer["prompt_id"] for answer in mine})
        scores += [{"model_role": role, "metric": name, "value": float(value), "num_prompts": num_prompts} for name, value in plain.items()]
    if {"base", "student", "teacher"} <= set(evaluate.models):
        order = [evaluate.models.index(role) for role in ("base", "student", "teacher")]
        base, student, teacher = (float(value) for value in accuracy_RP[order].mean(axis=1))
        gap = gap_recovered((base, student, teacher), draws_RB[order], evaluate.confidence)
        scores.append({"model_role": "gap", "metric": "gap_recovered", **gap._asdict(), "num_prompts": accuracy_RP.shape[1]})
    return [{"task": TASK, "samples_per_prompt": evaluate.samples_per_prompt, **score} for score in scores]


def _accuracy_by_prompt(answers: list[dict[str, Any]], roles: list[Any]) -> np.ndarray:
    """Share of right answers, `(roles, prompts)`, over the prompts of which every answer of every role was judged."""
    by_prompt: dict[str, dict[str, list[bool | None]]] = defaultdict(lambda: defaultdict(list))
    for answer in answers:
        by_prompt[answer["prompt_id"]][answer["model_role"]].append(answer["correct"])
    judged = [marks for marks in by_prompt.values() if not any(None in marks[role] for role in roles)]
    return np.array([[np.mean([mark is True for mark in marks[role]]) for marks in judged] for role in roles], dtype=np.float64).reshape(
        len(roles), len(judged)
    )
