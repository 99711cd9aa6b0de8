"""The recipe: one strict, typed description of an experiment. Knows nothing of torch.

The docstring under a field is its only documentation; `distill keys` prints it. A field that changes how fast rows
are made but not which rows are made is named in `speed_only`, and so does not make an existing folder another experiment.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from distill.recipe.base import PositiveInt, Sampling, Section
from distill.recipe.learning import DEEPSPEED_HAS_NO_PARTS, LOSS_OF_SFT, Distillation, Rollouts, Score, Train

CheckName = Literal["finish", "think", "math"]
ModelRole = Literal["base", "student", "teacher"]


class ModelSpec(Section):
    """A model by name, with everything needed to load it and to speak to it."""

    speed_only = frozenset({"attn_implementation"})

    model: str
    """Hub id, local folder, or `embedded:teacher` / `embedded:student` (the tiny pair shipped with the kit)."""
    revision: str | None = None
    """Git revision on the Hub; null means the newest, and the manifest records which that was."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer, where it is not the model's own."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Weights in memory. auto: bf16 where the device computes in it (a CPU is timed once, ~/.cache/distill-kit/cpu-precision.json), else
    fp16 on a GPU, else fp32. On a CPU the student's is also what it is trained in: a bit-equal resume on another CPU needs float32."""
    quantization: Literal["none", "nf4"] = "none"
    """nf4 loads the frozen weights in 4 bits through bitsandbytes (double quantisation): QLoRA, or a cheap teacher."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to the chat template, e.g. `{enable_thinking: true}`."""
    pad_token: str | None = None
    """Padding token, only where none that differs from the end of a turn can be found in the vocabulary."""
    licence: str | None = None
    """SPDX id or name of the terms; null looks the model up in the kit's own table and else records "unknown"."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention kernel; auto takes what transformers takes."""
    trust_remote_code: bool = False
    """Run code that a model repository brings along."""


class LoraAdapter(Section):
    """Low-rank adapters through peft; the names are peft's own."""

    type: Literal["lora"] = "lora"
    """`lora`, or `full` for full fine-tuning."""
    r: PositiveInt = 32
    """Rank of the update."""
    lora_alpha: Annotated[float, Field(gt=0)] = 64
    """Scale: the update is multiplied by alpha / r, or by alpha / sqrt(r) under rsLoRA."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    target_modules: str | list[str] = "all-linear"
    """Modules that get an adapter; all-linear is every linear layer but the head."""
    use_dora: bool = False
    """Weight-decomposed LoRA (DoRA)."""
    use_rslora: bool = False
    """Rank-stabilised scaling (rsLoRA)."""

    @field_validator("target_modules")
    @classmethod
    def _no_head(cls, value: str | list[str]) -> str | list[str]:
        if "lm_head" in ([value] if isinstance(value, str) else value):
            raise ValueError("an adapter on lm_head would never be trained, because the loss reads its weight directly")
        return value


class FullFinetune(Section):
    """No adapter: every weight is trained."""

    type: Literal["full"]
    """`full`."""


Adapter = Annotated[LoraAdapter | FullFinetune, Field(discriminator="type")]


class Student(ModelSpec):
    """The model that learns."""

    adapter: Adapter = Field(default_factory=LoraAdapter)
    """What is trained: `{type: lora, r: 32, ...}` or `{type: full}`."""

    @model_validator(mode="after")
    def _quantised_needs_adapter(self) -> Student:
        if self.quantization != "none" and self.adapter.type == "full":
            raise ValueError("quantization: nf4 can't be trained in full; use adapter.type: lora (QLoRA)")
        return self


class Columns(Section):
    """Which columns of a source hold what."""

    prompt: str | None = None
    """Column with the user's text."""
    messages: str | None = None
    """Column with a list of chat messages, instead of `prompt`."""
    reference: str | None = None
    """Column with the reference answer; null where there is none."""
    tags: str | None = None
    """Column with a string or a list of strings carried along."""

    @model_validator(mode="after")
    def _one_prompt_column(self) -> Columns:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("name exactly one of prompt and messages")
        return self


def _check_pattern(value: str | None) -> str | None:
    """A regular expression with exactly one group, or null."""
    if value is not None:
        try:
            groups = re.compile(value).groups
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        if groups != 1:
            raise ValueError(f"must have exactly one group, has {groups}")
    return value


class Prompts(Section):
    """Where the problems come from, and how they are put to a model."""

    source: str
    """File (jsonl, json, csv, parquet), Hub data set id, or `embedded:arithmetic`."""
    subset: str | None = None
    """Configuration of a Hub data set, e.g. `main`."""
    split: str = "train"
    """Split of a Hub data set."""
    columns: Columns = Columns(prompt="question", reference="answer")
    """Column names of the source."""
    answer_pattern: str | None = None
    """Regular expression whose one group is the final answer inside the reference; its last match counts."""
    system_prompt: str | None = None
    """Put before every prompt."""
    template: str = "{prompt}"
    """The user's turn; `{prompt}` stands for the text of the source."""
    max_prompts: PositiveInt | None = None
    """Use only so many training prompts, drawn by the seed; null means all."""
    heldout_size: Annotated[int, Field(ge=0)] = 200
    """Prompts kept out of training for `evaluate`."""
    heldout_source: str | None = None
    """Take the held-out prompts from this source instead of splitting them off; prompts in both are not trained on."""
    heldout_split: str = "test"
    """Split of `heldout_source` on the Hub."""

    _pattern = field_validator("answer_pattern")(_check_pattern)

    @field_validator("template")
    @classmethod
    def _has_prompt(cls, value: str) -> str:
        if "{prompt}" not in value:
            raise ValueError("must contain {prompt}")
        return value

    @model_validator(mode="after")
    def _pattern_has_its_column(self) -> Prompts:
        if self.answer_pattern is not None and self.columns.reference is None:
            raise ValueError("answer_pattern looks inside the reference: name its column in columns.reference, or leave answer_pattern out")
        return self


class Traces(Section):
    """Finished traces from elsewhere, instead of generating them."""

    source: str
    """File (jsonl, json, csv, parquet) or Hub data set id."""
    subset: str | None = None
    """Configuration of a Hub data set."""
    split: str = "train"
    """Split of a Hub data set."""
    columns: Columns = Columns(prompt="question")
    """Column names of the prompt; a trace belongs to the prompt whose text is the same."""
    completion: str = "completion"
    """Column with the answer (the reasoning inside it, or in a column of its own)."""
    reasoning: str | None = None
    """Column with the reasoning, where it is apart; it is put between `<think>` and `</think>`."""
    answer_separator: str | None = None
    """Text inside the completion before which stands the reasoning and after which the answer (`####` in GSM8K)."""
    author_model: str | None = None
    """Who wrote them, for the record."""
    licence: str | None = None
    """Terms of the traces, for the record."""

    @model_validator(mode="after")
    def _one_way_to_find_reasoning(self) -> Traces:
        if self.reasoning is not None and self.answer_separator is not None:
            raise ValueError("reasoning and answer_separator exclude each other: the reasoning is in one place")
        return self


class Generate(Sampling):
    """The teacher writes traces, through transformers in this process, on CPU or GPU."""


class Curate(Section):
    """Which traces are good enough to learn from."""

    speed_only = frozenset({"workers"})

    checks: list[CheckName] = Field(default_factory=lambda: list(get_args(CheckName)))
    """Every one must pass. finish: ended by itself; think: reasoning, then an answer; math: the answer is right."""
    keep_unjudged: bool = False
    """Keep traces that a check could not judge (no reference, or the checker ran out of time)."""
    max_per_prompt: PositiveInt = 4
    """Traces kept for each prompt."""
    prefer: Literal["first", "shortest", "longest"] = "first"
    """Which of a prompt's passing traces are kept."""
    check_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """Hard limit for one answer check, in seconds; the checking process is killed at it."""
    workers: PositiveInt | None = None
    """Processes that check answers; null means one a core."""


class Evaluate(Sampling):
    """Base, student and teacher answer the held-out prompts."""

    models: list[ModelRole] = Field(default_factory=lambda: list(get_args(ModelRole)))
    """Who is measured; base is the student before training."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 takes the most probable token."""
    max_prompts: PositiveInt | None = None
    """Use only so many held-out prompts; null means all."""
    check_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """Hard limit for one answer check, in seconds."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Coverage of the printed intervals."""

    @field_validator("models")
    @classmethod
    def _distinct(cls, value: list[str]) -> list[str]:
        if not value or len(set(value)) != len(value):
            raise ValueError("name each of base, student, teacher at most once, and at least one")
        return value


class Report(Section):
    """A page about the run, made from its files alone."""

    examples: Annotated[int, Field(ge=0)] = 12
    """Example traces shown."""


class Export(Section):
    """The student as others will load it."""

    model_name: str | None = None
    """Name on the model card; null means the recipe's name."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Stored weights; auto keeps the type of the student's own checkpoint."""
    parity_prompts: Annotated[int, Field(ge=1)] = 20
    """Held-out prompts on which the merged model is compared with base + adapter."""
    min_token_agreement: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Least share of equal next tokens between the two; less refuses the export."""


class Recipe(Section):
    """One experiment."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Letters, digits, `.`, `_` and `-`."""
    run_dir: str | None = None
    """Folder of the run; null means `runs/<name>`."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the split, of every sampled token and of training."""
    teacher: ModelSpec | None = None
    """The model that is learned from; may be left out where traces are brought."""
    student: Student
    """The model that learns."""
    prompts: Prompts
    """The problems."""
    generate: Generate | None = None
    """How the teacher writes traces. Exactly one of `generate` and `traces` is given."""
    traces: Traces | None = None
    """Finished traces from elsewhere. Exactly one of `generate` and `traces` is given."""
    curate: Curate = Curate()
    """Which traces are kept."""
    score: Score | None = None
    """What is stored of the teacher's thoughts on the traces; needed by train.method kd and by on-policy rounds."""
    train: Train = Train()
    """How the student learns."""
    rounds: Annotated[int, Field(ge=0)] = 0
    """On-policy rounds after the training on traces: the student writes, the teacher scores, the student trains (method kd)."""
    rollouts: Rollouts | None = None
    """What the student writes in the rounds, and when they end."""
    evaluate: Evaluate | None = Evaluate()
    """How it is measured; null leaves the stage out."""
    report: Report = Report()
    """What the report shows."""
    export: Export | None = Export()
    """How it is written out; null leaves the stage out."""

    @property
    def learns_from_traces(self) -> bool:
        """Whether traces are written or brought before training: not where a student only learns from its own."""
        only_own = self.rounds > 0 and self.rollouts is not None and self.rollouts.start == "base" and self.rollouts.teacher_share == 0
        return not self.train.is_live and not only_own

    @property
    def trains_on_traces(self) -> bool:
        """Whether a student is trained on traces before the rounds, if any: not where these start from the base."""
        from_base = self.rounds > 0 and self.rollouts is not None and self.rollouts.start == "base"
        return self.learns_from_traces and not from_base

    @property
    def scores_traces(self) -> bool:
        """Whether the teacher scores the curated traces, beside the student's own in the rounds."""
        shared = self.rounds > 0 and self.rollouts is not None and self.rollouts.teacher_share > 0
        return (self.trains_on_traces and self.train.method == "kd") or shared or self.follows_teacher

    @property
    def follows_teacher(self) -> bool:
        """Whether method sft is to measure the student's divergence from the teacher, on validation prompts."""
        scores = self.score is not None and (self.rollouts is None or self.rollouts.teacher_share > 0)
        return scores and self.trains_on_traces and self.train.method == "sft" and self.train.validation_prompts > 0

    @property
    def train_in_rounds(self) -> Train:
        """How the student learns in an on-policy round; checked with the recipe, which has a section rollouts."""
        assert self.rollouts is not None
        arguments = {**self.train.trainer_args, **self.rollouts.trainer_args}
        return self.train.model_copy(update={"method": "kd", "trainer_args": arguments})

    @model_validator(mode="after")
    def _sections_fit(self) -> Recipe:
        if self.learns_from_traces and (self.generate is None) == (self.traces is None):
            raise ValueError("give exactly one of the sections generate (a teacher writes) and traces (you bring them)")
        if not self.learns_from_traces and (self.generate is not None or self.traces is not None):
            raise ValueError("nothing here learns from traces, so leave the sections generate and traces out")
        if not self.learns_from_traces and self.curate != Curate():
            raise ValueError("curate would be ignored: nothing here learns from traces")
        if self.train.is_live and self.teacher is None:
            raise ValueError(f"train.method {self.train.method} needs a teacher: add a section teacher with a key model")
        if self.generate is not None and self.teacher is None:
            raise ValueError("generate needs a teacher: add a section teacher with a key model")
        if self.evaluate is not None:
            if self.teacher is None and "teacher" in self.evaluate.models:
                raise ValueError("evaluate.models names teacher, but there is no section teacher")
            if self.prompts.heldout_size == 0:
                raise ValueError("evaluate needs held-out prompts: raise prompts.heldout_size, or set evaluate: null")
        return self

    @model_validator(mode="after")
    def _distillation_fits(self) -> Recipe:
        if (self.rounds > 0) != (self.rollouts is not None):
            raise ValueError("rounds and the section rollouts go together: give both or neither")
        if self.rounds and self.train.is_live:
            raise ValueError(f"rounds repeat stored-target distillation; train.method {self.train.method} is on-policy by itself")
        uses_targets = self.rounds > 0 or self.train.method == "kd"
        if uses_targets != (self.score is not None) and not self.follows_teacher:
            advice = "add it" if uses_targets else "leave it out, or, with sft, set train.validation_prompts to follow the divergence on"
            raise ValueError(f"the section score goes with train.method kd or with rounds: {advice}")
        self._rounds_fit()
        if not uses_targets and self.train.kd != Distillation():
            raise ValueError("train.kd would be ignored: set train.method kd, or rounds")
        if self.score is not None:
            if self.teacher is None:
                raise ValueError("score needs a teacher: add a section teacher with a key model")
            self.train.kd.objective(self.score.target)
            if self.rollouts is not None and self.rollouts.stop_kl is not None and self.score.target.kind == "sampled":
                raise ValueError("rollouts.stop_kl can't be measured from sampled targets; use top_k or chosen_token")
        return self

    def _schedule_has_parts(self) -> None:
        if self.rollouts is None or self.rounds < 2 or self.rollouts.schedule_over == "each_round":
            return
        arguments = self.train_in_rounds.trainer_args
        schedule, deepspeed = arguments.get("lr_scheduler_type"), arguments.get("deepspeed")
        if schedule in ("reduce_lr_on_plateau", "greedy"):
            raise ValueError(f"rollouts.schedule_over: {schedule} follows the evaluation, so it can't run over all rounds; set each_round")
        if isinstance(deepspeed, dict) and "scheduler" in deepspeed:
            raise ValueError(f"rollouts.schedule_over: {DEEPSPEED_HAS_NO_PARTS}")
        if "num_stable_steps" in (arguments.get("lr_scheduler_kwargs") or {}):
            raise ValueError(
                "rollouts.schedule_over: num_stable_steps can't be meant for all rounds and for one; leave it out (what warmup and decay "
                "leave is stable), or set each_round"
            )

    def _rounds_fit(self) -> None:
        if self.rollouts is None:
            return
        ignored = LOSS_OF_SFT & set(self.train.trainer_args)
        if ignored:
            raise ValueError(f"train.trainer_args.{min(ignored)} would be ignored in the rounds: their loss is that of train.kd")
        self._schedule_has_parts()
        if self.rounds == 1 and self.rollouts.first_max_new_tokens is not None:
            raise ValueError("rollouts.first_max_new_tokens would be ignored: there is one round, so nothing grows")
        if self.train.overlong == "drop" and self.rollouts.max_new_tokens >= self.train.max_length:
            raise ValueError(
                f"rollouts.max_new_tokens ({self.rollouts.max_new_tokens:,}) leaves no room for a prompt in train.max_length "
                f"({self.train.max_length:,}), so every rollout of that length would be dropped"
            )
