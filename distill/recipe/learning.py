"""The sections of a recipe that say how the student learns: stored targets, the loss on them, training, on-policy rounds."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, ValidationInfo, field_validator, model_validator

from distill.errors import RecipeError
from distill.losses.settings import Divergence, Objective, default_divergence
from distill.recipe.base import PositiveInt, Sampling, Section, Share, TrainerArgs
from distill.recipe.models import ModelSpec
from distill.recipe.steps import AT_ONCE, PASSES
from distill.recipe.traces import Generate
from distill.recipe.trainer_args import ConfigName, check_trainer_args
from distill.recipe.trainer_values import needs_evaluation
from distill.targets.spec import ChosenToken, Sampled, TargetSpec, TopK

Method = Literal["sft", "kd", "on_policy", "cross_tokenizer"]
LIVE_METHODS = ("on_policy", "cross_tokenizer")
"""Methods in which the student writes while it trains, and a teacher beside it judges."""
LOSS_OF_SFT = frozenset({"loss_type", "label_smoothing_factor", "router_aux_loss_coef", "use_liger_kernel"})
"""Fields of SFTConfig that nothing reads where the loss is the one on stored targets."""

Source = Literal["process", "server", "generation"]
"""Where a teacher's thoughts come from."""
READING_KINDS = ("vllm", "sglang")
"""Kinds of servers that tell the log-probabilities of a prompt."""
DEFAULT_EPOCHS = 2.0
"""Passes over the traces where trainer_args has no num_train_epochs."""
FOLLOWS_EVALUATION = ("reduce_lr_on_plateau", "greedy")
"""Schedules of the learning rate that an evaluation decides."""
DEEPSPEED_HAS_NO_PARTS = (
    "the scheduler of the DeepSpeed config can't run over all rounds. Leave it out of the config, so that "
    "trainer_args.lr_scheduler_type decides, or set each_round."
)


class SchedulePart(NamedTuple):
    """A part of the learning rate's schedule: the first of two is (1, 2)."""

    number: int = 1
    of: int = 1


class Score(Section):
    """The teacher reads finished traces, and what it thinks of every supervised token is stored."""

    decides_no_row = frozenset({"batch_size", "verify_rows"})

    target: Annotated[TopK | Sampled | ChosenToken, Field(discriminator="kind")] = TopK()
    """What is stored of a distribution: `{kind: top_k, k: 64}`, `{kind: sampled, draws: 50}` or `{kind: chosen_token}`."""
    source: Source | Literal["auto"] = "auto"
    """Where the thoughts come from: read in this process, read by `teacher.server` (vllm, sglang; top_k and chosen_token), or kept
    while it wrote (generate.logprobs). auto: by its server if it has one, else in this process."""
    batch_size: PositiveInt = 8
    """Traces at once; halved by itself when memory runs out."""
    verify_rows: Annotated[int, Field(ge=0)] = 8
    """Traces read once more, one at a time, and compared with what was stored."""
    min_aligned: Share = 0.8
    """Least share of supervised tokens that must get a target, where teacher and student have other tokens; less is an error."""
    min_carried_mass: Share = 0.9
    """Least share of the teacher's probability, at those tokens, that lies on tokens the student has; less is an error."""

    def resolved(self, teacher: ModelSpec | None) -> Source:
        """Where the thoughts come from, `auto` decided."""
        if self.source != "auto":
            return self.source
        return "process" if teacher is None or teacher.server is None else "server"

    def identity(self, source: str | None = None) -> dict[str, Any]:
        """The settings that decide the rows; where they come from only if that is not this process.

        Args:
            source: As `resolved` says; null takes the key as it is.
        """
        source = source or self.source
        settings = super().identity()
        del settings["source"]
        return settings if source in ("auto", "process") else settings | {"source": source}

    def check_source(self, teacher: ModelSpec, generate: Generate | None, rounds: int) -> None:
        """Refuses what the source of the thoughts can't give.

        Raises:
            ValueError: naming the keys that don't go together, and what to set.
        """
        source, kind = self.resolved(teacher), teacher.server.kind if teacher.server is not None else None
        if source == "process":
            return
        if kind is None:
            raise ValueError(f"score.source: {source} needs teacher.server, which is not set. Set it, or score.source: process")
        if isinstance(self.target, Sampled):
            raise ValueError(
                f"score.target: kind sampled needs the teacher's whole distributions, which teacher.server ({kind}) does not tell. They "
                "need the teacher in this process: set score.source: process, or take kind top_k"
            )
        if source == "server" and kind not in READING_KINDS:
            raise ValueError(
                f"score.source: {self.source} would read through teacher.server, but kind {kind} tells no log-probabilities of a prompt "
                "(vllm and sglang do). Set score.source: process, or generation with generate.logprobs"
            )
        if source == "generation":
            self._check_generation(kind, generate, rounds)

    def _check_generation(self, kind: str, generate: Generate | None, rounds: int) -> None:
        if rounds:
            raise ValueError(
                "score.source: generation has nothing on what the student writes in rounds. Set score.source: server or process"
            )
        if generate is None or generate.logprobs is None:
            raise ValueError(
                "score.source: generation needs generate.logprobs, e.g. 20: log-probabilities that are kept while the teacher writes"
            )
        if isinstance(self.target, TopK) and self.target.k > generate.logprobs:
            raise ValueError(
                f"score.target.k: is {self.target.k}, but generate.logprobs keeps {generate.logprobs}. "
                f"Set score.target.k: {generate.logprobs}"
            )
        if kind == "sglang" and generate.temperature != 1:
            raise ValueError(
                f"score.source: generation, with generate.temperature {generate.temperature:g}: sglang tells log-probabilities at the "
                "temperature that it draws at. Set generate.temperature: 1, or score.source: server"
            )


class Distillation(Section):
    """The loss on stored targets: weight x divergence(teacher, student) + nll_weight x negative log-likelihood."""

    divergence: Divergence | None = None
    """`forward_kl`, `reverse_kl`, `jsd`, or `policy_gradient`; null takes forward_kl, for chosen_token targets policy_gradient."""
    jsd_beta: float | None = None
    """Share of the teacher in the mixture of `jsd`, between 0 and 1."""
    temperature: float = 1.0
    """Divides the log-probabilities of both; only where a target holds every token of the vocabulary."""
    weight: float = 1.0
    """Of the divergence."""
    nll_weight: float = 0.0
    """Of the negative log-likelihood of the written tokens; tokens without a target keep at least this term."""
    early_half_life: PositiveInt | None = None
    """Number of tokens into an answer after which a token counts half, a quarter, ...; null weighs all alike."""

    @model_validator(mode="after")
    def _something_is_learned(self) -> Distillation:
        if self.weight == self.nll_weight == 0:
            raise ValueError("weight and nll_weight are both 0, so nothing would be learned; raise one of them")
        return self

    def objective(self, target: TargetSpec) -> Objective:
        """These settings for one kind of targets, checked against it."""
        divergence = self.divergence or default_divergence(target.kind)
        return Objective(target.kind, divergence, self.jsd_beta, self.temperature, self.weight, self.nll_weight)

    def check_size(self, target: TargetSpec, vocab_size: int) -> None:
        """Refuses what shows only once the student's vocabulary is known.

        Raises:
            RecipeError: more candidates are asked for than there are tokens, or a temperature with fewer.
        """
        if target.kind != "top_k":
            return
        if target.k > vocab_size:
            raise RecipeError(f"score.target.k: is {target.k:,}, but the student has {vocab_size:,} tokens. Lower it.")
        if self.temperature != 1 and (target.k < vocab_size or target.min_probability):
            raise RecipeError(
                f"train.kd.temperature: {self.temperature:g} needs the teacher's whole distribution, but score.target keeps "
                f"{target.k:,} of {vocab_size:,} tokens. Use temperature 1, or keep them all (k, without min_probability)."
            )


class OnPolicy(Section):
    """How the student writes and is judged while it trains: methods on_policy and cross_tokenizer."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "reverse_kl"
    """Of the student from the teacher on what the student wrote; cross_tokenizer uses it for the tokens both have. A served
    teacher tells only its best tokens (forward_kl: `trainer_args.loss_top_k` of them) and the written one (the others)."""
    jsd_beta: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the teacher in the mixture of `jsd`; towards 0 it is like forward_kl, towards 1 like reverse_kl."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of the student's sampling, and with on_policy of both distributions in the loss."""
    max_new_tokens: PositiveInt = 512
    """Longest completion, in tokens; one that is cut off here is learned from like any other."""
    teacher_server: str | None = None
    """URL of a `vllm serve` that holds the teacher, which is then not loaded here; null loads it beside the student."""
    stop_truncation_rate: Share | None = None
    """Stop with an error where a larger share of completions than this, over the last ten logged steps, does not end by itself."""

    @model_validator(mode="after")
    def _beta_has_its_mixture(self) -> OnPolicy:
        if (self.divergence == "jsd") != (self.jsd_beta is not None):
            raise ValueError(f"jsd_beta goes with divergence jsd and only with it, got {self.jsd_beta} with {self.divergence}")
        return self

    @property
    def beta(self) -> float:
        """The divergence as TRL counts it: 0 is forward, 1 is reverse, between them lies the Jensen-Shannon divergence."""
        return {"forward_kl": 0.0, "reverse_kl": 1.0}.get(self.divergence, self.jsd_beta or 0.5)


class Rollouts(Sampling):
    """On-policy rounds: the student writes, the teacher scores, the student trains on its own traces."""

    temperature: Annotated[float, Field(ge=0)] = 1.0
    """1 draws from the student as it is."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus: the smallest set of tokens whose probability reaches this."""
    max_new_tokens: PositiveInt = 1024
    """Longest rollout, in tokens; a rollout cut off here is learned from like any other."""
    first_max_new_tokens: PositiveInt | None = None
    """Longest rollout of the first round; it grows by a constant factor to max_new_tokens in the last. Null: the same in all."""
    prompts_per_round: PositiveInt | None = None
    """Training prompts of a round, drawn anew for each; null means all."""
    start: Literal["student", "base"] = "student"
    """Who writes in the first round: the student trained on the teacher's traces, or the one before any training."""
    teacher_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a round's rows that are traces of the teacher."""
    trainer_args: TrainerArgs = Field(default_factory=dict)
    """Laid over train.trainer_args in the rounds, e.g. a lower learning_rate."""
    schedule_over: Literal["all_rounds", "each_round"] = "all_rounds"
    """What the learning rate's schedule runs over: once over all rounds, or anew over each. Of one over all, each round takes an equal
    share whatever its number of steps (so give every round as many where warmup or decay are numbers of steps), more rounds can't be
    added to finished ones, and rounds that a stop condition ends early have not come to its end. The optimizer's own averages start
    anew in each round."""
    stop_truncation_rate: Share | None = None
    """End the rounds where a larger share of rollouts than this does not end by itself within max_new_tokens."""
    stop_mean_tokens: PositiveInt | None = None
    """End the rounds where rollouts are longer than this on average."""
    stop_kl: Annotated[float, Field(ge=0)] | None = None
    """End the rounds where the divergence from the teacher, in nats a token, has fallen below this. Of top_k targets it is measured as
    `kl_lower_bound`, which a small k makes too small."""

    @field_validator("trainer_args")
    @classmethod
    def _known_fields(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in sorted(LOSS_OF_SFT & set(value)):
            raise ValueError(f"{name} belongs to the loss of method sft; the rounds have their own, see train.kd")
        return check_trainer_args(value)

    @model_validator(mode="after")
    def _horizon_grows(self) -> Rollouts:
        if self.first_max_new_tokens is not None and self.first_max_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"first_max_new_tokens ({self.first_max_new_tokens:,}) is above max_new_tokens ({self.max_new_tokens:,}), to which it grows"
            )
        return self

    def horizon(self, number: int, rounds: int) -> int:
        """Longest rollout of round `number`, counted from 1, of so many rounds."""
        if self.first_max_new_tokens is None or rounds == 1:
            return self.max_new_tokens
        growth: float = (self.max_new_tokens / self.first_max_new_tokens) ** ((number - 1) / (rounds - 1))
        return round(self.first_max_new_tokens * growth)


# Fields of TRL's configs that show, keep or hasten, and leave the weights alone.
_SHOWS_AND_KEEPS = (
    *("logging_", "log_", "report_to", "run_name", "project", "trackio_", "disable_tqdm", "num_completions_to_print"),
    *("include_num_input_tokens_seen", "skip_memory_metrics", "push_to_hub", "hub_", "enable_jit_checkpoint", "ddp_timeout"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
    *("dataset_num_proc", "torch_empty_cache_steps"),
)
_MEASURES = ("save_", "eval_", "per_device_eval_batch_size", "prediction_loss_only")
"""These, too, unless the best checkpoint is taken, or the learning rate follows the evaluation."""


class Train(Section):
    """The student learns."""

    method: Method = "sft"
    """sft: negative log-likelihood on the traces. kd: the teacher's stored distributions on them. on_policy: the student writes,
    a live teacher judges. cross_tokenizer: the same, for a teacher with another vocabulary."""
    kd: Distillation = Distillation()
    """The loss of method kd, and of on-policy rounds."""
    on_policy: OnPolicy | None = None
    """What the student writes, and the loss on it, in methods on_policy and cross_tokenizer; null takes the defaults there."""
    max_length: PositiveInt = 4096
    """Longest prompt + completion, in the student's tokens."""
    overlong: Literal["drop", "cut"] = "drop"
    """What happens to longer rows: dropped and counted, or cut at the end (which loses the answer)."""
    global_batch_size: PositiveInt | None = None
    """Rows of an optimizer step over all processes (with packing, packs): every step takes the same ones on any number of processes.
    `trainer_args.per_device_train_batch_size` then only says how many a process takes at once. Null: 16, or, where trainer_args has
    that or gradient_accumulation_steps, what these two make on so many processes."""
    trainer_args: TrainerArgs = Field(default_factory=dict)
    """Any field of the config class behind the method: learning_rate, num_train_epochs, report_to, packing, ... It is
    `trl.SFTConfig` for sft and kd, `DistillationConfig` for on_policy, `ServerDistillationConfig` with a served teacher,
    `GOLDConfig` for cross_tokenizer."""
    validation_prompts: Annotated[int, Field(ge=0)] = 0
    """Prompts whose traces are not trained on, to follow the loss on them; with kd also the divergence from the teacher. The turns of a
    conversation count as one and stay together. With sft the divergence is followed, too, where the recipe has a section score, which
    then scores all curated traces (with rounds: where they have a teacher_share)."""

    @model_validator(mode="before")
    @classmethod
    def _live_has_its_section(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("method") in LIVE_METHODS and data.get("on_policy") is None:
            return {**data, "on_policy": {}}
        return data

    @field_validator("trainer_args")
    @classmethod
    def _known_fields(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "method" not in info.data or "on_policy" not in info.data:  # they have errors of their own
            return value
        return check_trainer_args(value, config_class(info.data["method"], info.data["on_policy"]))

    def identity(self) -> dict[str, Any]:
        """The settings that decide the weights: without what only shows, keeps or hastens."""
        given = self.trainer_args
        measured = given.get("load_best_model_at_end") or given.get("lr_scheduler_type") in FOLLOWS_EVALUATION
        aside: tuple[str, ...] = _SHOWS_AND_KEEPS if measured else (*_SHOWS_AND_KEEPS, *_MEASURES)
        aside += (AT_ONCE,) if self.global_batch_size else ()
        return super().identity() | {"trainer_args": {name: value for name, value in given.items() if not name.startswith(aside)}}

    @property
    def is_live(self) -> bool:
        """Whether the student writes while it trains, so that it needs prompts alone."""
        return self.method in LIVE_METHODS

    @model_validator(mode="after")
    def _one_size_of_a_step(self) -> Train:
        if self.global_batch_size is not None and PASSES in self.trainer_args:
            raise ValueError(f"train.trainer_args.{PASSES} follows from train.global_batch_size, so give one of them")
        return self

    @model_validator(mode="after")
    def _no_ignored_loss(self) -> Train:
        ignored = LOSS_OF_SFT & set(self.trainer_args)
        if self.method == "kd" and ignored:
            raise ValueError(f"train.trainer_args.{min(ignored)} belongs to the loss of method sft; kd has its own, see train.kd")
        return self

    @model_validator(mode="after")
    def _evaluates_on_something(self) -> Train:
        asking = needs_evaluation(self.trainer_args)
        if asking is not None and not self.validation_prompts:
            instead = "leave it out: there are no traces to evaluate on" if self.is_live else "set train.validation_prompts"
            raise ValueError(f"train.trainer_args.{asking} needs an evaluation while the student trains; {instead}")
        return self

    @model_validator(mode="after")
    def _live_fits(self) -> Train:
        if not self.is_live:
            if self.on_policy is not None:
                raise ValueError("train.on_policy would be ignored: set train.method on_policy or cross_tokenizer")
            return self
        assert self.on_policy is not None  # put in before the fields were read
        if self.method == "cross_tokenizer" and self.on_policy.teacher_server is not None:
            raise ValueError(
                "train.on_policy.teacher_server goes with method on_policy: cross_tokenizer needs the teacher's whole distributions"
            )
        if self.overlong == "cut":
            raise ValueError(
                f"train.overlong cut would be ignored: with method {self.method} a prompt without room for its answer is dropped"
            )
        if self.validation_prompts:
            raise ValueError(f"train.validation_prompts would be ignored: method {self.method} has no traces to follow the loss on")
        if self.on_policy.max_new_tokens >= self.max_length:
            raise ValueError(
                f"train.on_policy.max_new_tokens ({self.on_policy.max_new_tokens:,}) leaves no room for a prompt in "
                f"train.max_length ({self.max_length:,})"
            )
        return self


def config_class(method: Method, on_policy: OnPolicy | None) -> ConfigName:
    """Name of TRL's config class behind a method."""
    if method == "cross_tokenizer":
        return "GOLDConfig"
    if method == "on_policy":
        return "ServerDistillationConfig" if on_policy is not None and on_policy.teacher_server else "DistillationConfig"
    return "SFTConfig"
