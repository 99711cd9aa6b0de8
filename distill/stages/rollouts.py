"""Stage `rollouts` of an on-policy round: the current student writes traces. Reads prompts/ and the last student/.

A rollout that is cut off at the horizon is as good as any other: the teacher judges every token of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distill.errors import RecipeError
from distill.recipe.base import Sampling
from distill.recipe.experiment import Recipe
from distill.recipe.learning import Rollouts
from distill.run.clock import Clock
from distill.run.folder import StageFolder
from distill.run.manifest import Manifest, check_files, read_manifest
from distill.run.plan import Growth, StagePlan
from distill.run.schema import TRACE
from distill.run.tables import rows_at
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
    return plan_of(recipe, Step("rollouts", number), settings, inputs, Growth(inputs="ignore"))  # a round that is over stays as it is


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
    from distill.engines import TraceTable, request_seed
    from distill.engines.hf import HFEngine
    from distill.models.loading import free_memory, load_chat_format, load_model, load_trained, model_record, pick_device

    clock, device = Clock(out.path), pick_device()
    prompts = folder(recipe, "prompts")
    drawn = _drawn(read_manifest(prompts).rows("train"), rollouts.prompts_per_round, f"{recipe.seed}/{number}")
    chat = load_chat_format(recipe.student)
    if writer is not None:
        check_files(writer)
    adapter = recipe.student.adapter
    model = load_model(recipe.student, device) if writer is None else load_trained(recipe.student, adapter, writer, device)
    # A seed of its own for each round: the same prompt should not meet the same random numbers again.
    seed = request_seed(recipe.seed, "round", number)
    traces = TraceTable(out.table("traces", TRACE, resume=True), out.journal(), sampling, seed)
    rows = rows_at(prompts, "train", drawn, ["prompt_id", "messages", "reference"])
    traces.write(HFEngine(model, chat, sampling), rows, len(drawn), "student", f"round {number} rollouts")
    record = model_record(recipe.student, model)
    del model
    free_memory()
    mean_tokens, cut_off = traces.tokens / traces.num_rows, traces.finish_reasons["length"] / traces.num_rows
    return out.finish(
        rows_in=len(drawn),
        rows_kept=traces.num_rows,
        facts=clock.facts(
            device=str(device),
            author=record,
            tokenizer_digest=chat.tokenizer_digest,
            template_digest=chat.template_digest,
            horizon=sampling.max_new_tokens,
            tokens=traces.tokens,
            finish_reasons=dict(traces.finish_reasons),
            **_stop(rollouts, sampling.max_new_tokens, mean_tokens, cut_off),
        ),
    )


def _drawn(num_prompts: int, count: int | None, salt: str) -> Sequence[int]:
    """The numbers of so many prompts, rising; other ones in each round."""
    if count is None or count >= num_prompts:
        return range(num_prompts)
    seed = int.from_bytes(hashlib.sha256(salt.encode()).digest()[:8], "big")
    drawn: list[int] = np.sort(np.random.default_rng(seed).choice(num_prompts, count, replace=False)).tolist()
    return drawn


def _stop(rollouts: Rollouts, horizon: int, mean_tokens: float, truncation_rate: float) -> dict[str, str]:
    """The fact `stop` where the student has begun to write without end."""
    limit, longest = rollouts.stop_truncation_rate, rollouts.stop_mean_tokens
    advice = "Lower the learning rate (rollouts.trainer_args), raise rollouts.teacher_share, or raise the horizon"
    if limit is not None and horizon == rollouts.max_new_tokens and truncation_rate > limit:
        return {"stop": f"{truncation_rate:.0%} of the rollouts were cut off, over rollouts.stop_truncation_rate ({limit:.0%}). {advice}."}
    if longest is not None and mean_tokens > longest:
        return {"stop": f"rollouts have {mean_tokens:,.0f} tokens on average, over rollouts.stop_mean_tokens ({longest:,}). {advice}."}
    return {}
