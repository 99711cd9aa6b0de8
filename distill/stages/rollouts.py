"""Stage `rollouts` of an on-policy round: the current student writes traces. Reads prompts/ and the last student/.

A rollout that is cut off at the horizon is as good as any other: the teacher judges every token of it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from distill.errors import RecipeError
from distill.recipe.base import Sampling
from distill.recipe.experiment import Recipe
from distill.recipe.learning import Rollouts
from distill.run.clock import Clock
from distill.run.folder import StageFolder
from distill.run.manifest import Manifest, check_files
from distill.run.plan import StagePlan
from distill.run.schema import TRACE
from distill.run.tables import read_rows
from distill.stages import Step, folder, open_stage, plan_of, previous_student


def plan(recipe: Recipe, number: int) -> StagePlan:
    """What the stage is asked to make in a round.

    Raises:
        RecipeError: the recipe has no such round.
    """
    rollouts = _rollouts_of(recipe, number)
    settings = {
        "student": recipe.student.identity(),
        "rollouts": {
            **_sampling(recipe, number).identity(),
            **{name: getattr(rollouts, name) for name in ("prompts_per_round", "stop_truncation_rate", "stop_mean_tokens")},
        },
        "seed": recipe.seed,
        "round": number,
    }
    writer = previous_student(recipe, number)
    inputs = [folder(recipe, "prompts"), *([] if writer is None else [writer])]
    return plan_of(recipe, Step("rollouts", number), settings, inputs)


def run(recipe: Recipe, number: int) -> Manifest:
    """Writes the table `traces`, a row a prompt and sample; resumes after the last finished batch.

    Args:
        recipe: The recipe.
        number: Of the round, from 1.

    Raises:
        RecipeError: the recipe has no such round.
    """
    with open_stage(recipe, plan(recipe, number)) as out:
        if out.manifest:
            return out.manifest
        return _write(recipe, _rollouts_of(recipe, number), number, _sampling(recipe, number), previous_student(recipe, number), out)


def _rollouts_of(recipe: Recipe, number: int) -> Rollouts:
    if recipe.rollouts is None or not 1 <= number <= recipe.rounds:
        raise RecipeError(f"round {number}: the recipe has {recipe.rounds} rounds. Raise rounds, or give --round from 1 up to that.")
    return recipe.rollouts


def _sampling(recipe: Recipe, number: int) -> Sampling:
    rollouts = _rollouts_of(recipe, number)
    return rollouts.plain(max_new_tokens=rollouts.horizon(number, recipe.rounds))


def _write(recipe: Recipe, rollouts: Rollouts, number: int, sampling: Sampling, writer: Path | None, out: StageFolder) -> Manifest:
    # Imported here, so that a finished stage answers without loading torch.
    from distill.engines import request_seed, requests_for, write_traces
    from distill.engines.hf import HFEngine
    from distill.models.loading import free_memory, load_chat_format, load_model, load_trained, model_record, pick_device

    clock, device = Clock(out.path), pick_device()
    prompts = _drawn(read_rows(folder(recipe, "prompts"), "train"), rollouts.prompts_per_round, f"{recipe.seed}/{number}")
    chat = load_chat_format(recipe.student)
    if writer is not None:
        check_files(writer)
    adapter = recipe.student.adapter
    model = load_model(recipe.student, device) if writer is None else load_trained(recipe.student, adapter, writer, device)
    # A seed of its own for each round: the same prompt should not meet the same random numbers again.
    requests = requests_for(prompts, sampling.samples_per_prompt, request_seed(recipe.seed, "round", number))
    rows = write_traces(HFEngine(model, chat, sampling), requests, sampling, out.journal(), "student", f"round {number} rollouts")
    record = model_record(recipe.student, model)
    del model
    free_memory()
    out.write_table("traces", rows, TRACE)
    tokens = sum(len(row["completion_ids"]) for row in rows)
    reasons = Counter(row["finish_reason"] for row in rows)
    return out.finish(
        rows_in=len(prompts),
        rows_kept=len(rows),
        facts=clock.facts(
            device=str(device),
            author=record,
            tokenizer_digest=chat.tokenizer_digest,
            template_digest=chat.template_digest,
            horizon=sampling.max_new_tokens,
            tokens=tokens,
            finish_reasons=dict(reasons),
            **_stop(rollouts, sampling.max_new_tokens, tokens / len(rows), reasons["length"] / len(rows)),
        ),
    )


def _drawn(prompts: list[dict[str, Any]], count: int | None, salt: str) -> list[dict[str, Any]]:
    """So many prompts, in their order, other ones in each round."""
    if count is None or count >= len(prompts):
        return prompts
    seed = int.from_bytes(hashlib.sha256(salt.encode()).digest()[:8], "big")
    chosen = np.random.default_rng(seed).choice(len(prompts), count, replace=False)
    return [prompts[index] for index in np.sort(chosen)]


def _stop(rollouts: Rollouts, horizon: int, mean_tokens: float, truncation_rate: float) -> dict[str, str]:
    """The fact `stop` where the student has begun to write without end."""
    limit, longest = rollouts.stop_truncation_rate, rollouts.stop_mean_tokens
    advice = "Lower the learning rate (rollouts.trainer_args), raise rollouts.teacher_share, or raise the horizon"
    if limit is not None and horizon == rollouts.max_new_tokens and truncation_rate > limit:
        return {"stop": f"{truncation_rate:.0%} of the rollouts were cut off, over rollouts.stop_truncation_rate ({limit:.0%}). {advice}."}
    if longest is not None and mean_tokens > longest:
        return {"stop": f"rollouts have {mean_tokens:,.0f} tokens on average, over rollouts.stop_mean_tokens ({longest:,}). {advice}."}
    return {}
