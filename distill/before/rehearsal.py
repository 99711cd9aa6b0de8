"""A recipe's own stages on a few rows and on miniatures of its models with random weights: what fails late fails here.

The teacher writes and scores, the student takes two steps, is stopped behind its first checkpoint and goes on from it, and a round
is gone through: by the stages themselves, in a folder that is deleted, with the trainer's arguments as they are given but for sizes.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import random
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from distill.before.findings import Findings
from distill.before.machine import model_config
from distill.before.packages import reporters
from distill.before.servers import is_loaded
from distill.errors import DistillError, RecipeError
from distill.models.adapters import lora_config
from distill.models.loading import free_memory, load_tokenizer, pick_device
from distill.models.miniature import miniature
from distill.recipe.experiment import Recipe
from distill.recipe.learning import Train
from distill.recipe.models import ModelSpec
from distill.recipe.steps import AT_ONCE, PASSES, step_size
from distill.run.folder import StageFolder
from distill.run.log import silence
from distill.run.manifest import Manifest
from distill.run.schema import FIELDS, PROMPT, TRACE, prompt_id
from distill.stages import Step, call, folder

Row = dict[str, Any]
_PROMPTS = 16
_TOKENS = 8  # that are written of an answer
_STEPS = 2
_BATCH = 2
_SIZES = {"max_steps": _STEPS, "save_steps": 1, "eval_steps": 1, "logging_steps": 1, "eval_delay": 0, "push_to_hub": False}
_STAGES = ("generate", "score", "train", "rollouts")  # that are rehearsed


class _StoppedError(Exception):
    """What ends the first training, as a kill would."""


class _StopAtCheckpoint(TrainerCallback):
    """Ends training behind the first checkpoint."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Raises what the rehearsal waits for."""
        raise _StoppedError


def rehearse(recipe: Recipe, rows: list[Row], found: Findings) -> None:
    """Rehearses what teaches and learns; one claim for each stage, up to the first that is refuted.

    Args:
        recipe: The recipe, without what can't be done here.
        rows: With `messages` and `completion`, as they would be trained on; the shortest are taken.
        found: Where it is said.
    """
    specs = {"student": recipe.student, **({"teacher": recipe.teacher} if _needs_teacher(recipe) and recipe.teacher is not None else {})}
    server = recipe.train.on_policy.teacher_server if recipe.train.on_policy is not None else None
    if server is not None:
        found.unknown("rehearsal", f"the teacher is behind {server}")
        return
    if recipe.teacher is not None and "teacher" in specs and not is_loaded(recipe, "teacher"):
        recipe = _without_server(recipe)  # which is asked by itself
        assert recipe.teacher is not None
        specs["teacher"] = recipe.teacher
    configs = {role: model_config(spec) for role, spec in specs.items()}
    if missing := [specs[role].model for role, config in configs.items() if config is None]:
        found.unknown("rehearsal", f"the config of {' and '.join(missing)} can't be reached from here")
        return
    with tempfile.TemporaryDirectory(prefix="distill-rehearsal-") as name, _undisturbed() as patched:
        place = Path(name)
        names = {str(place / role): spec.model for role, spec in specs.items()} | {str(place / "run"): "the rehearsal"}

        def prepare() -> str:
            sizes = [patched.add(_random_model(configs[role], spec, place / role)) for role, spec in specs.items()]
            return f"of {' and '.join(f'{size:,} weights' for size in sizes)}"

        if not found.prove("miniatures", _silent(prepare, names)):
            return
        small = _small(recipe, place, _targets(recipe, configs["student"]))
        _write_rows(small, rows)
        for step in _steps(small):
            if not found.prove(f"rehearsal of {step}", _silent(lambda step=step: _play(step, small), names)):  # type: ignore[misc]
                return


def _without_server(recipe: Recipe) -> Recipe:
    """The recipe with a teacher in this process, for which the student's miniature stands where its own config is a host's."""
    teacher = recipe.teacher
    assert teacher is not None and teacher.server is not None
    if teacher.server.is_hosted or model_config(teacher) is None:
        keys = ("model", "revision", "tokenizer", "chat_template", "chat_template_kwargs", "pad_token", "trust_remote_code")
        teacher = teacher.model_copy(update={key: getattr(recipe.student, key) for key in keys})
    return recipe.model_copy(update={"teacher": teacher.model_copy(update={"server": None})})


def _needs_teacher(recipe: Recipe) -> bool:
    return recipe.generate is not None or recipe.score is not None or recipe.train.is_live or recipe.likeness is not None


def _steps(recipe: Recipe) -> list[Step]:
    """What is rehearsed: of the rounds the first."""
    wanted = {
        "generate": recipe.generate is not None,
        "score": recipe.scores_traces,
        "train": recipe.trains_on_traces or recipe.train.is_live,
    }
    return [
        *(Step(stage) for stage, asked in wanted.items() if asked),
        *(Step(stage, 1) for stage in ("rollouts", "score", "train") if recipe.rounds),
        *([Step("evaluate")] if recipe.likeness is not None else []),
    ]


def _play(step: Step, recipe: Recipe) -> str:
    if step.stage != "train":
        manifest: Manifest = call(step, recipe, "run")
        return f"{manifest.rows_kept:,} rows"
    train = importlib.import_module("distill.stages.train")
    again = ""
    with contextlib.suppress(_StoppedError):
        train.run(recipe, step.number, watchers=[_StopAtCheckpoint()])
        again = "no checkpoint is asked for"
    manifest = train.run(recipe, step.number)  # goes on from the checkpoint, or finds that all is done
    return f"{manifest.facts['steps']} steps, loss {manifest.facts['train_loss']:.3g}, {again or 'stopped and gone on with'}"


def _silent(attempt: Callable[[], str], names: dict[str, str]) -> Callable[[], str]:
    """An attempt of which nothing is heard but its end, with the recipe's names for paths of the rehearsal."""

    def silent() -> str:
        try:
            with silence(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                return attempt()
        except DistillError as error:
            reason = str(error)
            for path, name in names.items():
                reason = reason.replace(path, name)
            raise type(error)(reason) from None

    return silent


def _targets(recipe: Recipe, config: Any) -> Any:
    """What the adapter is put on, by names that a model with fewer layers has, too: those of one layer stand for it in each."""
    from peft.tuners.tuners_utils import check_target_module_exists

    adapter = recipe.student.adapter
    if adapter.type == "full" or not any(character.isdigit() for character in "".join(adapter.target_modules)):
        return None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.student.trust_remote_code)
    try:
        targets = lora_config(adapter, model)
    except RecipeError:  # which the claim about the adapter names
        return None
    found = [name for name, _ in model.named_modules() if check_target_module_exists(targets, name)]
    return sorted({re.split(r"\.\d+\.", name)[-1] for name in found}) or None


def _small(recipe: Recipe, place: Path, targets: list[str] | None) -> Recipe:
    """The recipe with miniatures for models, and few short rows and steps; what only says how is as it was."""
    changed = recipe.model_dump(mode="json") | {"run_dir": str(place / "run"), "inputs": None, "benchmarks": None, "export": None}
    changed |= _small_reading(recipe, changed["prompts"])
    for role in ("student", "teacher"):
        if changed[role] is not None:
            changed[role] |= {"model": str(place / role), "revision": None, "server": None}
    if targets is not None:
        changed["student"]["adapter"]["target_modules"] = targets
    for section in ("generate", "rollouts"):
        if changed[section] is not None:
            longest = min(changed[section]["max_new_tokens"], _TOKENS)
            changed[section] |= {"max_new_tokens": longest, "samples_per_prompt": 1, "batch_size": _BATCH}
    if changed["generate"] is not None:
        changed["generate"] |= {"logprobs": None, "unsolved": None}  # no model in this process keeps them; and one sample is all
    # Of one sample there is nothing to choose.
    changed["curate"] |= {"prefer": "first", "long_share": None, "min_pass_rate": None, "max_pass_rate": None}
    if recipe.rollouts is not None:
        changed["rollouts"] |= {"first_max_new_tokens": None, "prompts_per_round": None}
        changed["rollouts"] |= dict.fromkeys(("stop_truncation_rate", "stop_mean_tokens", "stop_kl"))
        given = _small_arguments(recipe.train_in_rounds)
        changed["rollouts"]["trainer_args"] = {name: given[name] for name in recipe.rollouts.trainer_args if name in given}
    if recipe.score is not None:
        # Random weights carry no mass to anywhere in particular.
        changed["score"] |= {"batch_size": _BATCH, "min_carried_mass": 0.0, "source": "process"}
    train = changed["train"]
    if train["on_policy"] is not None:
        train["on_policy"] |= {"max_new_tokens": min(train["on_policy"]["max_new_tokens"], _TOKENS), "stop_truncation_rate": None}
    train["validation_prompts"] = min(train["validation_prompts"], _BATCH)
    train["trainer_args"], train["global_batch_size"] = _small_arguments(recipe.train), None
    return Recipe.model_validate(changed)


def _small_reading(recipe: Recipe, prompts: Row) -> Row:
    """The evaluation as far as models read in it, without references; of several rounds the student is not there."""
    if recipe.evaluate is None or recipe.likeness is None:
        return {"evaluate": None}
    roles = ["base", "teacher"] if recipe.rounds else recipe.evaluate.models
    likeness = recipe.likeness.model_dump(mode="json") | {"batch_size": _BATCH}
    small = {"models": roles, "max_new_tokens": _TOKENS, "batch_size": _BATCH, "checks": ["math"], "likeness": likeness}
    none = {"columns": prompts["columns"] | {"reference": None}, "answer_pattern": None, "json_reference": False}
    return {"evaluate": small, "prompts": prompts | none}


def _small_arguments(train: Train) -> dict[str, Any]:
    """A trainer's arguments for a few steps of few rows; passes are summed up where they would be."""
    given = train.trainer_args
    size = step_size(train.global_batch_size, given, 1, pick_device().type == "cpu", whole=train.is_live)
    small = {
        AT_ONCE: max(min(size.at_once, _BATCH), given.get("num_generations", 1)),
        PASSES: min(size.passes, _BATCH),
        "per_device_eval_batch_size": min(given.get("per_device_eval_batch_size", _BATCH), _BATCH),
        "dataloader_num_workers": min(given.get("dataloader_num_workers", 0), 1),
        # Files alone are written to: what is behind a network is not told of rehearsals.
        "report_to": [name for name in reporters(given) if name == "tensorboard"] or "none",
    }
    return given | _SIZES | small


def _random_model(config: Any, spec: ModelSpec, place: Path) -> torch.nn.Module:
    """Saves a miniature with random weights, and the tokenizer where it goes by the model's name."""
    small = miniature(config)
    if hasattr(small, "quantization_config"):  # random weights are in no packed format
        del small.quantization_config
    model = AutoModelForCausalLM.from_config(small, trust_remote_code=spec.trust_remote_code, dtype=torch.float32)
    model.save_pretrained(place)
    if spec.tokenizer is None:
        load_tokenizer(spec).save_pretrained(place)
    return model  # type: ignore[no-any-return]


def _write_rows(recipe: Recipe, rows: list[Row]) -> None:
    """The shortest rows as prompts and as curated traces, as often as it takes to have enough."""
    shortest = sorted(rows, key=lambda row: len(row["completion"]) + sum(len(turn["content"]) for turn in row["messages"]))[:_PROMPTS]
    traces = []
    for number in range(_PROMPTS):
        row = shortest[number % len(shortest)]
        identity = {"prompt_id": prompt_id(row["messages"]), "sample_index": number // len(shortest), "author": "teacher"}
        traces.append({"messages": row["messages"], "completion": row["completion"], **identity})
    prompts = [{name: row[name] for name in ("prompt_id", "messages")} for row in traces]
    with StageFolder(folder(recipe, "prompts"), "prompts", {}) as out:
        out.write_table("train", prompts, PROMPT)
        out.write_table("heldout", prompts[:1], PROMPT.append(FIELDS) if recipe.prompts.fields else PROMPT)
        out.finish(rows_in=len(prompts), rows_kept=len(prompts))
    with StageFolder(folder(recipe, "curate"), "curate", {}) as out:
        out.write_table("curated", traces, TRACE)
        out.finish(rows_in=len(traces), rows_kept=len(traces))


class _Patched:
    """Modules of models as they were: some libraries put their own kernels into them, for good."""

    def __init__(self) -> None:
        self._before: dict[str, dict[str, Any]] = {}

    def add(self, model: torch.nn.Module) -> int:
        """Remembers the module that a model is from; returns its number of weights."""
        name = type(model).__module__
        self._before.setdefault(name, dict(vars(sys.modules[name])))
        return sum(parameter.numel() for parameter in model.parameters())

    def restore(self) -> None:
        """Puts back what is another now."""
        for name, before in self._before.items():
            vars(sys.modules[name]).update(before)


@contextlib.contextmanager
def _undisturbed() -> Iterator[_Patched]:
    """Inside anything may be set for the whole process; afterwards it is as it was, so that a run is the same with and without."""
    patched, environment = _Patched(), dict(os.environ)
    states = random.getstate(), np.random.get_state()
    kernels = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    exact = torch.are_deterministic_algorithms_enabled()
    os.environ.pop("TENSORBOARD_LOGGING_DIR", None)
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            yield patched
    finally:
        patched.restore()
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = kernels
        torch.use_deterministic_algorithms(exact)
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        os.environ.update(environment)
        free_memory()
