"""Methods in which the student writes while it trains, and a live teacher judges: `on_policy` and `cross_tokenizer`.

| method | TRL's trainer | what the teacher tells |
| --- | --- | --- |
| on_policy | `DistillationTrainer` | its whole distribution at every token, of one vocabulary with the student's |
| with `teacher_server` | `ServerDistillationTrainer` (experimental) | log-probabilities of its best tokens and of the written one |
| cross_tokenizer | `GOLDTrainer` (experimental), see `trainers.gold` | its whole distribution, aligned by the bytes of the text |

The served teacher's loss is a mean over each batch, not over the tokens of the optimizer step, and cross_tokenizer's one over
rows; cross_tokenizer holds the logits of both models whole, so keep its batches small.

Before training both heads are cut to the ids that are tokens. Families pad theirs to different lengths (Qwen2.5 has 151,936
rows or 152,064 for the same tokens), which TRL refuses; and a padded row that does not exist has probability 0.
"""

from __future__ import annotations

import importlib.util
import os
from collections import deque
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.data_loader import get_sampler
from datasets import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import DistillationConfig, DistillationTrainer, SFTConfig

from distill.errors import DataError, ModelError
from distill.models.chat import ChatFormat
from distill.models.heads import head_of
from distill.models.loading import load_chat_format, load_model, loads_whole, pick_device, pick_dtype
from distill.models.vocabulary import vocabulary_map
from distill.recipe.experiment import Recipe
from distill.recipe.launches import kind_here
from distill.recipe.learning import OnPolicy, config_class
from distill.run.schema import Message, extras_of
from distill.run.tables import read_rows
from distill.trainers.arguments import (
    build_arguments,
    default_arguments,
    precision_flags,
    save_steps,
    step_arguments,
    training_dtype,
)
from distill.trainers.rows import TrainingRows

_WINDOW = 10  # logged steps over which the share of cut-off completions is taken


def live_arguments(recipe: Recipe, output_dir: Path, device: torch.device) -> DistillationConfig | SFTConfig:
    """The arguments of the trainer behind the method.

    Args:
        recipe: The recipe.
        output_dir: For checkpoints.
        device: Where.

    Raises:
        RecipeError: TRL or transformers refuses a value of `train.trainer_args`.
    """
    train, settings = recipe.train, _settings(recipe)
    defaults = {**default_arguments(recipe, device), **save_steps(train), **_method_arguments(recipe)}
    given = {**defaults, **train.trainer_args, **step_arguments(train, device)}
    if not {"bf16", "fp16"} & set(train.trainer_args):
        given |= precision_flags(device, recipe.student.dtype)
    given |= {
        "output_dir": str(output_dir),
        "seed": recipe.seed,
        "use_cpu": device.type == "cpu",
        "beta": settings.beta,
        "temperature": settings.temperature,
        "max_completion_length": settings.max_new_tokens,
    }
    arguments: DistillationConfig | SFTConfig = build_arguments(_config(recipe), given)
    return arguments


def _settings(recipe: Recipe) -> OnPolicy:
    assert recipe.train.on_policy is not None  # the recipe was validated
    return recipe.train.on_policy


def _config(recipe: Recipe) -> Any:
    name = config_class(recipe.train.method, recipe.train.on_policy)
    if name == "GOLDConfig":
        from trl.experimental.gold import GOLDConfig

        return GOLDConfig
    if name == "ServerDistillationConfig":
        from trl.experimental.server_distillation import ServerDistillationConfig

        return ServerDistillationConfig
    return DistillationConfig


def _method_arguments(recipe: Recipe) -> dict[str, Any]:
    """What the kit sets of the fields that only some of the config classes have."""
    if recipe.train.method == "cross_tokenizer":
        return {
            "max_length": recipe.train.max_length,
            "top_p": 1.0,
            "lmbda": 1.0,
            "use_uld_loss": True,
            "uld_use_hybrid_loss": True,
            # TRL's default compares the distributions behind a token, not the ones it was drawn from.
            "uld_token_merge_strategy": "bayesian",
            # The end of a turn is a token like the others, else the student never learns to end.
            "uld_skip_student_eos": False,
            "uld_skip_teacher_eos": False,
        }
    server = _settings(recipe).teacher_server
    return {"chat_template_kwargs": recipe.student.chat_template_kwargs} | ({"teacher_model_server_url": server} if server else {})


def check_pair(recipe: Recipe, student: ChatFormat) -> ChatFormat:
    """The teacher's tokenizer, after everything was refused that this method can't do with the two.

    Raises:
        ModelError: the tokenizers differ (on_policy), are the same or not of bytes (cross_tokenizer), or a library is missing.
    """
    assert recipe.teacher is not None  # the recipe was validated
    teacher = load_chat_format(recipe.teacher)
    vocabulary = vocabulary_map(teacher, student)
    identical = vocabulary.identical
    if recipe.train.method == "on_policy" and not identical:
        raise ModelError(
            f"train.method on_policy: {recipe.teacher.model} and {recipe.student.model} do not have the same tokens under the same ids, "
            "so the teacher can't judge the student's tokens. Use rounds with a section score, whose targets are aligned, or "
            f"{vocabulary.other_method}."
        )
    if recipe.train.method == "cross_tokenizer":
        if identical:
            raise ModelError(
                "train.method cross_tokenizer: teacher and student have the same tokens. Use on_policy, which compares them all."
            )
        if recipe.train.trainer_args.get("use_extended_uld", True):
            _check_bytes({recipe.teacher.model: teacher, recipe.student.model: student})
    if _settings(recipe).teacher_server and importlib.util.find_spec("vllm") is None:
        raise ModelError(
            "train.on_policy.teacher_server: TRL asks a served teacher through a module of vllm, which is not installed here. "
            "`pip install vllm` beside the kit (it needs a GPU and a transformers that both accept), set teacher_server: null, "
            "or use rounds with a section score."
        )
    return teacher


def _check_bytes(chats: dict[str, ChatFormat]) -> None:
    from trl.experimental.utils import is_byte_level_tokenizer

    for name, chat in chats.items():
        backend = getattr(chat.tokenizer, "backend_tokenizer", None)
        if backend is None or not is_byte_level_tokenizer(backend):
            raise ModelError(
                f"train.method cross_tokenizer: the tokenizer of {name} does not work on bytes, by which the two texts are aligned. "
                "Set train.trainer_args.use_extended_uld: false (then tokens are compared by their place alone), or use train.method sft, "
                "which needs the teacher's text alone."
            )


def live_rows(recipe: Recipe, prompts: Path, chat: ChatFormat) -> TrainingRows:
    """The training prompts that leave room for an answer, in the form TRL takes them.

    Args:
        recipe: The recipe.
        prompts: Folder of stage `prompts`.
        chat: The student's tokenizer and template.

    Raises:
        DataError: no prompt leaves room.
        ModelError: see `check_pair`, which comes first.
    """
    teacher = check_pair(recipe, chat)
    room = recipe.train.max_length - _settings(recipe).max_new_tokens
    messages = [row["messages"] for row in read_rows(prompts, "train")]
    # TRL renders prompts itself: without their tools, and it would read the name of a control token as the token.
    without = [prompt for prompt in messages if recipe.train.method == "cross_tokenizer" or not any(map(extras_of, prompt))]
    plain = [prompt for prompt in without if not (_mentions(chat, prompt) or _mentions(teacher, prompt))]
    lengths = [len(chat.prompt_ids(prompt)) for prompt in plain]
    kept = [prompt for prompt, length in zip(plain, lengths, strict=True) if length <= room]
    if not without:
        raise DataError(
            f"train.method {recipe.train.method}: all of {len(messages):,} prompts have tools, calls or their results, which TRL would "
            "leave out. Use rounds with a section score, or train.method sft or kd."
        )
    if not kept:
        raise DataError(
            f"train.max_length: none of {len(messages):,} prompts leaves room for train.on_policy.max_new_tokens; the shortest has "
            f"{min(lengths, default=0):,} tokens, {room:,} are left. Raise train.max_length."
        )
    drops = {
        "tools_in_prompt": len(messages) - len(without),
        "control_token_in_prompt": len(without) - len(plain),
        "too_long": len(plain) - len(kept),
    }
    rows: list[dict[str, Any]]
    if recipe.train.method == "cross_tokenizer":
        # GOLD wants a completion, to be replaced by the student's; a special token can't melt into the prompt's last one.
        end = str(chat.tokenizer.convert_ids_to_tokens(chat.end_of_turn_id))
        rows = [
            {"prompt": chat.prompt_text(prompt), "completion": end, "teacher_prompt": teacher_prompt(chat, teacher, prompt)}
            for prompt in kept
        ]
    else:
        rows = [{"prompt": prompt} for prompt in kept]
    return TrainingRows(
        dataset=Dataset.from_list(rows),
        validation=None,
        drops={reason: count for reason, count in drops.items() if count},
        rows_in=len(messages),
        num_tokens=sum(length for length in lengths if length <= room),
    )


def _mentions(chat: ChatFormat, prompt: list[Message]) -> bool:
    return any(chat.mentions_controls(text) for turn in prompt for text in turn.values())


def live_trainer(recipe: Recipe, chat: ChatFormat, common: dict[str, Any], teacher: PreTrainedModel | None = None) -> Trainer:
    """TRL's trainer for the method, with the teacher loaded beside the student.

    Args:
        recipe: The recipe.
        chat: The student's tokenizer and template.
        common: What every trainer of the kit is given: `model`, `args`, `train_dataset`, `processing_class`, `callbacks`, ...
            The model is cut to its tokens in place; see `restore_head` for whole weights.
        teacher: The teacher, which is cut likewise; None loads the recipe's.

    Raises:
        DataError: there are fewer prompts than an optimizer step takes.
    """
    settings, student, arguments = _settings(recipe), common["model"], common["args"]
    step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * PartialState().num_processes
    if len(common["train_dataset"]) < step // getattr(arguments, "num_generations", 1):
        raise DataError(
            f"train.trainer_args: an optimizer step takes {step:,} completions, but there are {len(common['train_dataset']):,} prompts. "
            "Lower train.global_batch_size, or give more prompts."
        )
    config = student.config.get_text_config()
    rows = config.vocab_size
    cut_head(student, chat, recipe.student.model)
    student.generation_config.eos_token_id = list(chat.stop_ids)
    callbacks = [*common["callbacks"], SeedEpochs()]
    if settings.stop_truncation_rate is not None:
        callbacks.append(StopOnTruncation(settings.stop_truncation_rate))
    common = common | {"callbacks": callbacks}
    trainer: Trainer
    if recipe.train.method == "cross_tokenizer":
        from distill.trainers.gold import CrossTokenizerTrainer

        assert recipe.teacher is not None  # the recipe was validated
        trainer = CrossTokenizerTrainer(teacher_model=_teacher(recipe, teacher), pair=(chat, load_chat_format(recipe.teacher)), **common)
    elif settings.teacher_server:
        from trl.experimental.server_distillation import ServerDistillationTrainer

        _check_cap(student)
        trainer = ServerDistillationTrainer(**common)
    else:
        judge = _teacher(recipe, teacher)
        _check_cap(student)
        _check_cap(judge)
        trainer = DistillationTrainer(teacher_model=judge, **common)
    if recipe.student.adapter.type == "lora":
        config.vocab_size = rows  # else peft takes the embedding for a trained one, and saves it with the adapter
    return trainer


def _teacher(recipe: Recipe, model: PreTrainedModel | None) -> PreTrainedModel:
    """The teacher, with no row in its head that is no token."""
    spec, device = recipe.teacher, pick_device()
    assert spec is not None  # the recipe was validated
    if model is None:
        # The trainer moves plain weights to the device itself; 4-bit ones must be loaded there.
        dealt_out = kind_here(os.environ, recipe.train.trainer_args).sharding == "FSDP"
        place = device if spec.quantization == "nf4" else torch.device("cpu")
        model = load_model(spec, place, pick_dtype(device, spec.dtype), dealt_out=dealt_out)
    cut_head(model, load_chat_format(spec), spec.model)
    return model


def _check_cap(model: PreTrainedModel) -> None:
    """Refuses a model whose cap on the logits TRL's loss doesn't know by its name, and so would leave out."""
    if head_of(model).softcap is not None and getattr(model.config.get_text_config(), "final_logit_softcapping", None) is None:
        raise ModelError(
            f"train.method on_policy: {type(model).__name__} caps its logits under a name that TRL's loss doesn't know. Use rounds with a "
            "section score, whose losses do."
        )


def teacher_prompt(student: ChatFormat, teacher: ChatFormat, messages: list[Message]) -> str:
    """A prompt in the teacher's template, opened as far as the student's: whoever writes `<think>`, it stands there once."""
    text = teacher.prompt_text(messages)
    text = text[: len(text) - len(teacher.opening(messages))] + student.opening(messages)
    bos = teacher.tokenizer.bos_token
    # The template has written it, and GOLD's tokenisation writes it again.
    return text.removeprefix(bos) if bos and teacher.tokenizer("")["input_ids"] else text


def cut_head(model: PreTrainedModel, chat: ChatFormat, name: str) -> None:
    """Takes the rows of embedding and head away that stand for no token.

    Raises:
        ModelError: there are fewer rows than tokens.
    """
    tokens, rows = max(chat.tokenizer.get_vocab().values()) + 1, model.config.get_text_config().vocab_size
    if rows < tokens:
        raise ModelError(f"{name}: has {rows:,} rows for {tokens:,} tokens. The tokenizer does not belong to it; see its key tokenizer.")
    if rows > tokens:
        model.resize_token_embeddings(tokens, mean_resizing=False)


def restore_head(recipe: Recipe, weights: Path) -> None:
    """Gives a saved student, trained in full, the rows back that `cut_head` took, as they were before training.

    Args:
        recipe: Whose student before training has them.
        weights: Folder of the saved model, written anew.
    """
    spec, dtype, cpu = recipe.student, training_dtype(recipe, pick_device()), torch.device("cpu")
    with loads_whole():  # only the first process is here
        before = load_model(spec, cpu, dtype)
        rows = before.config.get_text_config().vocab_size
        trained = load_model(spec.model_copy(update={"model": str(weights), "revision": None}), cpu, dtype)
    tokens = trained.config.get_text_config().vocab_size
    if tokens == rows:
        return
    trained.resize_token_embeddings(rows, mean_resizing=False)
    for part in ("get_input_embeddings", "get_output_embeddings"):
        new: Any = getattr(trained, part)()
        old: Any = getattr(before, part)()
        for parameter in ("weight", "bias"):
            if getattr(new, parameter, None) is not None:
                getattr(new, parameter).data[tokens:] = getattr(old, parameter).data[tokens:]
    trained.save_pretrained(str(weights))


class SeedEpochs(TrainerCallback):
    """Shuffles each epoch by its own seed: TRL's sampler draws one epoch after the other, and a resumed run would begin anew."""

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Seeds the sampler before it is iterated over."""
        generator = getattr(get_sampler(kwargs["train_dataloader"]), "generator", None)
        if generator is not None:
            generator.manual_seed(args.seed + int((state.epoch or 0) + 1e-6))


class StopOnTruncation(TrainerCallback):
    """Ends training where the student's answers grow over their limit, as they do when it forgets how to end."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._shares: deque[float] = deque(maxlen=_WINDOW)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Raises ModelError once the mean share of the last logged steps is over the limit."""
        share = (kwargs.get("logs") or {}).get("completions/clipped_ratio")
        if share is None:
            return
        self._shares.append(share)
        mean = sum(self._shares) / len(self._shares)
        if len(self._shares) == _WINDOW and mean > self._limit:
            raise ModelError(
                f"step {state.global_step}: {100 * mean:.0f} % of the completions of the last {_WINDOW} logged steps were cut off, over "
                f"train.on_policy.stop_truncation_rate ({100 * self._limit:.0f} %). Raise max_new_tokens, lower "
                "train.trainer_args.learning_rate, or start from a student that has learned to end on traces; the last checkpoint is kept."
            )
