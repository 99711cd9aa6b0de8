"""Memory of every stage of a recipe, by part, for one process: from configs, a launch, and steps that are walked through."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from distill import embedded
from distill.losses.budget import buffer_elements, elements_of
from distill.losses.chunked import LARGEST_BUFFER
from distill.losses.settings import likelihood
from distill.models.loading import pick_dtype
from distill.planning import sizes
from distill.planning.sizes import NF4_BYTES, Asked, Range, StageMemory, Walk
from distill.planning.walked import Counts, counts, walk
from distill.recipe.base import Sampling
from distill.recipe.experiment import Recipe
from distill.recipe.launches import LaunchKind
from distill.recipe.learning import Train
from distill.recipe.models import FullFinetune, LoraAdapter, ModelSpec
from distill.recipe.steps import step_size
from distill.stages import steps_of

# Tokens up to and from which a step is linear in their number: so many fill a chunk of logits, if the vocabulary is not tiny.
_BEND, _LATEST_BEND = 1024, 16384
_DRAWN_BYTES = 24  # of each logit that a token is drawn from: float32, sorted, its place, and probabilities
_READ_BYTES = 10  # of each in a chunk that is read: 16 and 32 bits, and a logarithm
_PACKED_BYTES = (0.53, 0.6, 2.0)  # a weight of a checkpoint that brings its own packing
_DDP_BUCKET, _ZERO_BUCKET = 1.0, 5e8  # gradients once more, and DeepSpeed's numbers at once


class Place(NamedTuple):
    """Where a recipe is to run."""

    processes: int = 1
    """That train."""
    kind: LaunchKind = LaunchKind()
    on_cpu: bool = False
    room: float | None = None
    """Bytes of one device; null where any is thought of."""
    prompt_tokens: int = 512
    """Of a prompt: that much is taken for granted, since no data are read."""

    @property
    def buffer(self) -> int:
        """Logits in memory at once."""
        if self.on_cpu:
            return buffer_elements(torch.device("cpu"), LARGEST_BUFFER)
        return LARGEST_BUFFER if self.room is None else elements_of(self.room, LARGEST_BUFFER)


class Model:
    """What is known of a model by its config.

    Args:
        spec: As the recipe names it.
        config: Of transformers.
    """

    def __init__(self, spec: ModelSpec, config: Any) -> None:
        self.spec, self.config = spec, config
        self._walked: dict[str, Walk] = {}
        self._counted: dict[str, Counts] = {}
        self._rank = 0

    def counts(self, adapter: LoraAdapter | FullFinetune | None = None) -> Counts:
        """Numbers of its weights; of an adapter by its rank, in which they are linear."""
        if adapter is None or adapter.type == "full":
            if "" not in self._counted:
                self._counted[""] = counts(self.config, None)
            plain = self._counted[""]
            return plain if adapter is None else plain._replace(trained=plain.all)
        key = adapter.model_copy(update={"r": 1}).model_dump_json()
        if key not in self._counted:
            self._counted[key] = counts(self.config, adapter.model_copy(update={"r": 1}))
        found = self._counted[key]
        return found._replace(trained=found.trained * adapter.r)

    def step(self, asked: Asked) -> Walk:
        """What a step takes, on lines through ranks and lengths; itself walked through where masks or caches are no matter of lines."""
        if asked.eager or asked.caches or self.has_windows:
            return self._exactly(asked)
        adapter = asked.adapter
        if adapter is None or adapter.type == "full":
            return self._by_length(asked)
        self._rank = self._rank or adapter.r
        first, second = (adapter.model_copy(update={"r": rank}) for rank in (self._rank, 4 * self._rank))
        found = self._by_length(asked._replace(adapter=first))
        if adapter.r == self._rank:
            return found
        return found.extended(self._by_length(asked._replace(adapter=second)), (adapter.r / self._rank - 1) / 3)

    def _by_length(self, asked: Asked) -> Walk:
        number, full = asked.rows * asked.tokens, asked.buffer // self.vocab_size
        bend = max(_BEND, full) if full <= _LATEST_BEND else _BEND
        start = bend if number >= bend else bend // 4
        low, high = (self._exactly(asked._replace(rows=1, tokens=tokens)) for tokens in (start, 4 * start))
        return low.extended(high, (number / start - 1) / 3)

    def _exactly(self, asked: Asked) -> Walk:
        key = repr(asked)  # an adapter may have a list, by which nothing is looked up
        if key not in self._walked:
            self._walked[key] = walk(self.config, asked)
        return self._walked[key]

    @functools.cached_property
    def vocab_size(self) -> int:
        """Rows of its embedding."""
        return int(self.config.get_text_config(decoder=True).vocab_size)

    @functools.cached_property
    def layers(self) -> int:
        """Their number."""
        return int(self.config.get_text_config(decoder=True).num_hidden_layers)

    @functools.cached_property
    def has_windows(self) -> bool:
        """Whether some layers see a window alone, for which there is a mask from some length on: nothing linear."""
        text = self.config.get_text_config(decoder=True)
        kinds = getattr(text, "layer_types", None) or ()
        return any("sliding" in kind or "chunked" in kind for kind in kinds) or (not kinds and bool(getattr(text, "sliding_window", None)))

    def weights(self, dtype: torch.dtype) -> Range:
        """Bytes of its weights in memory."""
        found = self.counts()
        if self.spec.quantization == "nf4":
            return Range.exactly(found.linear * NF4_BYTES + (found.all - found.linear) * dtype.itemsize)
        if getattr(self.config, "quantization_config", None) is not None:
            rest = (found.all - found.linear) * dtype.itemsize
            return Range(*(found.linear * each + rest for each in _PACKED_BYTES))
        return Range.exactly(found.all * dtype.itemsize)


class Planner:
    """Plans the stages of a recipe, and of changed copies of it; a model is walked through once.

    Args:
        place: Where it is to run.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.notes: dict[str, None] = {}
        """What a reader must know of the numbers, each once."""
        self._models: dict[str, Model | None] = {}

    def stages(self, recipe: Recipe) -> list[StageMemory]:
        """Of all stages that have a model in memory, in order; a round's as those of the last, which is the longest."""
        asked = dict.fromkeys(step.stage for step in steps_of(recipe) if step.number in (0, recipe.rounds))
        found: list[StageMemory] = []
        for stage in asked:
            if stage == "generate" and recipe.generate is not None:
                found += self._writes(recipe, stage, ["teacher"], recipe.generate)
            elif stage == "score":
                found += self._scores(recipe)
            elif stage == "train":
                found.append(self.training(recipe))
            elif stage == "rollouts" and recipe.rollouts is not None:
                found += self._writes(recipe, stage, ["student"], recipe.rollouts)
            elif stage == "evaluate" and recipe.evaluate is not None:
                roles = ["student", *(["teacher"] if "teacher" in recipe.evaluate.models else [])]
                found += self._writes(recipe, stage, roles, recipe.evaluate)
            elif stage == "benchmark":
                found.append(StageMemory(stage, "lm-eval", unknown="its tasks decide it"))
        return found

    def training(self, recipe: Recipe, rows: int | None = None) -> StageMemory:
        """Of the student's training; of the last round, where there are rounds alone.

        Args:
            recipe: The recipe.
            rows: Of one pass, in place of the recipe's.
        """
        spec, adapter = recipe.student, recipe.student.adapter
        train = recipe.train if recipe.train.is_live or recipe.trains_on_traces or not recipe.rounds else recipe.train_in_rounds
        what = f"student, {'in full' if adapter.type == 'full' else f'LoRA r {adapter.r}'}{', nf4' if spec.quantization == 'nf4' else ''}"
        model = self.model(spec)
        if model is None:
            return StageMemory("train", what, unknown=_unreachable(spec))
        size = step_size(train.global_batch_size, train.trainer_args, self.place.processes, self.place.on_cpu, whole=train.is_live)
        asked = self._step_of(recipe, train, rows or size.at_once)
        parts = self._kept(model, train, asked)
        walked = model.step(asked)
        packed = bool(train.trainer_args.get("packing")) or asked.rows > 1
        mask = self._mask(model, asked) if packed and spec.attn_implementation != "flash_attention_2" else 0
        least = walked.stored - self._copies(model, asked)
        parts["activations"] = Range(max(least, 0), walked.stored + mask, 1.05 * walked.stored + mask)
        beyond = max(walked.peak - walked.stored, 0)
        parts["loss, backward"] = Range(0.8 * beyond, beyond, 1.2 * beyond)
        if train.is_live:
            self._add_live(recipe, asked, parts)
        return self._whole("train", what, parts)

    def model(self, spec: ModelSpec) -> Model | None:
        """By its config; null where that can't be reached from here."""
        from transformers import AutoConfig

        key = f"{spec.model}@{spec.revision}"
        if key not in self._models:
            try:
                name = embedded.resolve(spec.model)
                config = AutoConfig.from_pretrained(name, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
                self._models[key] = Model(spec, config)
            except (OSError, ValueError):
                self._models[key] = None
        there = self._models[key]
        if there is not None:
            there.spec = spec
        return there

    def _copies(self, model: Model, asked: Asked) -> float:
        """Of dealt out weights those in 16 bits that autocast makes, and may keep to the end of the forward pass."""
        assert asked.adapter is not None
        dealt_out = sizes.sharing(self.place.kind, self.place.processes).weights < 1
        if not dealt_out or asked.adapter.type != "full" or asked.compute == asked.dtype:
            return 0
        self.notes["whether autocast's copies of weights stay where these are dealt out is not known: low is without them"] = None
        item: int = getattr(torch, asked.compute).itemsize
        return item * model.counts().all

    def _mask(self, model: Model, asked: Asked) -> float:
        """Of rows that are padded or packed: a pair of positions in one byte, and as a number for each layer that is kept."""
        layers = 1 if asked.checkpointing or asked.adapter is None else model.layers
        item: int = getattr(torch, asked.compute).itemsize
        return asked.rows * asked.tokens**2 * (1.0 + item * layers)

    def _dtype(self, setting: str) -> torch.dtype:
        if self.place.on_cpu:
            return pick_dtype(torch.device("cpu"), setting)
        return torch.bfloat16 if setting == "auto" else getattr(torch, setting)

    def _step_of(self, recipe: Recipe, train: Train, rows: int) -> Asked:
        spec, given = recipe.student, train.trainer_args
        own = torch.float32 if spec.dtype == "auto" and spec.adapter.type == "full" else self._dtype(spec.dtype)
        compute = self._dtype(spec.dtype if self.place.on_cpu else "auto")
        if {"bf16", "fp16"} & set(given):
            compute = torch.bfloat16 if given.get("bf16") else torch.float16 if given.get("fp16") else torch.float32
        on_targets = train.method == "kd" and recipe.score is not None
        kind = recipe.score.target if recipe.score is not None else None
        if given.get("use_liger_kernel") or given.get("loss_type") or given.get("activation_offloading"):
            self.notes["liger's kernels, a loss of TRL's own and activations in the machine's memory are not walked through"] = None
        return Asked(
            rows=rows,
            tokens=min(self.place.prompt_tokens + train.on_policy.max_new_tokens, 2**20) if train.on_policy else train.max_length,
            dtype=_name(own),
            compute=_name(compute),
            adapter=spec.adapter,
            objective=train.kd.objective(kind) if on_targets and kind is not None else likelihood("chosen_token"),
            candidates=int(getattr(kind, "k", 0) or getattr(kind, "draws", 0) or 0) if on_targets else 0,
            buffer=self.place.buffer,
            checkpointing=bool(given.get("gradient_checkpointing", not self.place.on_cpu)),
            eager=spec.attn_implementation == "eager",
        )

    def _kept(self, model: Model, train: Train, asked: Asked) -> dict[str, Range]:
        """What is there from step to step: weights, adapter, gradients, averages, and what a launch gathers."""
        place, spec, adapter = self.place, model.spec, asked.adapter
        assert adapter is not None
        found, share = model.counts(adapter), sizes.sharing(place.kind, place.processes)
        full, deepspeed = adapter.type == "full", place.kind.sharding == "DEEPSPEED"
        own: torch.dtype = getattr(torch, asked.dtype)
        held = model.weights(own)
        # The adapter in fp32, as peft has it; of a quantised model in 16 bits, as TRL has it.
        item = own.itemsize if full else 2 if spec.quantization == "nf4" else max(own.itemsize, 4)
        name = str(train.trainer_args.get("optim", "adamw_torch_fused"))
        states = sizes.optimizer_bytes(name, found.trained, item)
        if states is None:
            self.notes[f"what optim {name} keeps is not known here: taken as AdamW's"] = None
            states = 2.0 * found.trained * item
        if deepspeed and asked.compute != "float32":  # it keeps weights in 16 bits, and those it trains once more
            held, states = Range(*(min(size, 2 * found.all) for size in held)), 12.0 * found.trained
            item = 2
            self.notes["what a DeepSpeed file moves to the machine's memory is not taken off"] = None
        parts = {"weights": Range(*(size * share.weights for size in held))}
        if not full:
            parts["adapter"] = Range.exactly(found.trained * item * share.weights)
        gradients = found.trained * item
        parts["gradients"] = Range(0.5 * gradients * share.gradients, *[gradients * share.gradients] * 2)
        parts["optimizer"] = Range.exactly(states * share.optimizer)
        if place.processes > 1:
            parts["launch"] = self._gathered(found, gradients, item if full else own.itemsize)
        return parts

    def _gathered(self, found: Counts, gradients: float, item: int) -> Range:
        kind = self.place.kind
        if kind.sharding == "FSDP" or kind.stage == 3:
            return Range(
                (found.layer + found.ends) * item, (2 * found.layer + found.ends) * item, (3 * found.layer + 2 * found.ends) * item
            )
        if kind.sharding == "DEEPSPEED":
            return Range(0, 2 * min(found.trained, _ZERO_BUCKET) * 2, 4 * min(found.trained, _ZERO_BUCKET) * 2)
        return Range.exactly(_DDP_BUCKET * gradients)

    def _add_live(self, recipe: Recipe, asked: Asked, parts: dict[str, Range]) -> None:
        """A live teacher beside the student, what the student writes, and TRL's own loss."""
        self.notes["a live method has TRL's own loss, which is not walked through: taken as the kit's, with a wide range"] = None
        walked = parts["loss, backward"]
        student = self.model(recipe.student)
        logits = 4.0 * asked.rows * asked.tokens * (student.vocab_size if student is not None else 0)
        whole = 6 * logits if recipe.train.method == "cross_tokenizer" else 0.0  # both models', their logarithms and gradients
        parts["loss, backward"] = Range(walked.low, walked.expected + whole / 2, 1.5 * walked.high + whole)
        if student is not None:
            cache = student.step(asked._replace(rows=1, adapter=None, objective=None, caches=True)).stored * asked.rows
            parts["KV cache"] = Range(0.5 * cache, cache, 1.5 * cache)
        policy = recipe.train.on_policy
        if recipe.teacher is not None and not (policy is not None and policy.teacher_server):
            teacher = self.model(recipe.teacher)
            if teacher is None:
                self.notes[f"the live teacher is left out: {_unreachable(recipe.teacher)}"] = None
            else:
                parts["teacher"] = teacher.weights(self._dtype(recipe.teacher.dtype))

    def _writes(self, recipe: Recipe, stage: str, roles: list[str], sampling: Sampling) -> list[StageMemory]:
        found = []
        for role in roles:
            spec = recipe.student if role == "student" else recipe.teacher
            if spec is None:
                continue
            if spec.server is not None:
                self.notes[f"the {role} writes behind a server, whose memory it divides itself"] = None
                continue
            model = self.model(spec)
            if model is None:
                found.append(StageMemory(stage, role, unknown=_unreachable(spec)))
                continue
            own = _name(self._dtype(spec.dtype))
            asked = Asked(
                1, self.place.prompt_tokens + sampling.max_new_tokens, own, own, caches=True, eager=spec.attn_implementation == "eager"
            )
            cache = model.step(asked).stored * sampling.batch_size
            first = model.step(asked._replace(rows=sampling.batch_size, tokens=self.place.prompt_tokens, caches=False, eager=False)).peak
            drawn = _DRAWN_BYTES * sampling.batch_size * model.vocab_size
            parts = {"weights": model.weights(self._dtype(spec.dtype)), "KV cache": Range(0.5 * cache, 1.12 * cache, 1.3 * cache)}
            parts["activations"] = Range(0.5 * first, first, 1.2 * first)
            parts["logits"] = Range(drawn / 4, drawn / 2, drawn)
            found.append(self._whole(stage, f"{role} writes", parts))
        return found

    def _scores(self, recipe: Recipe) -> list[StageMemory]:
        spec, score = recipe.teacher, recipe.score
        if spec is None or score is None:
            return []
        if score.resolved(spec) != "process":
            self.notes["the teacher's thoughts come from its server, whose memory it divides itself"] = None
            return []
        model = self.model(spec)
        if model is None:
            return [StageMemory("score", "teacher reads", unknown=_unreachable(spec))]
        own = _name(self._dtype(spec.dtype))
        asked = Asked(score.batch_size, recipe.train.max_length, own, own, eager=spec.attn_implementation == "eager")
        read = model.step(asked).peak + self._mask(model, asked)
        logits = _READ_BYTES * min(self.place.buffer, asked.rows * asked.tokens * model.vocab_size)
        parts = {"weights": model.weights(self._dtype(spec.dtype)), "activations": Range(0.8 * read, read, 1.2 * read)}
        parts["logits"] = Range(0.5 * logits, logits, 1.5 * logits)
        return [self._whole("score", "teacher reads", parts)]

    def _whole(self, stage: str, what: str, parts: dict[str, Range]) -> StageMemory:
        size = sum(part.expected for part in parts.values())
        return StageMemory(stage, what, parts | {"context": sizes.context(self.place.on_cpu), "allocator": sizes.allocator(size)})


def _unreachable(spec: ModelSpec) -> str:
    return f"the config of {spec.model} can't be reached from here"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
