"""The sections of a recipe that say how the student learns: stored targets, the loss on them, training, on-policy rounds."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from distill.losses.settings import Divergence, Objective, default_divergence
from distill.recipe_base import PositiveInt, Sampling, Section, Share
from distill.targets.spec import ChosenToken, Sampled, TargetSpec, TopK
from distill.trainer_args import check_trainer_args

Method = Literal["sft", "kd", "on_policy", "cross_tokenizer"]


class Score(Section):
    """The teacher reads finished traces, and what it thinks of every supervised token is stored."""

    speed_only = frozenset({"batch_size", "verify_rows"})

    target: Annotated[TopK | Sampled | ChosenToken, Field(discriminator="kind")] = TopK()
    """What is stored of a distribution: `{kind: top_k, k: 64}`, `{kind: sampled, draws: 50}` or `{kind: chosen_token}`."""
    batch_size: PositiveInt = 8
    """Traces at once; halved by itself when memory runs out."""
    verify_rows: Annotated[int, Field(ge=0)] = 8
    """Traces read once more, one at a time, and compared with what was stored."""
    min_aligned: Share = 0.8
    """Least share of supervised tokens that must get a target, where teacher and student have other tokens; less is an error."""
    min_carried_mass: Share = 0.9
    """Least share of the teacher's probability, at those tokens, that lies on tokens the student has; less is an error."""


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

    def objective(self, target: TargetSpec) -> Objective:
        """These settings for one kind of targets, checked against it."""
        divergence = self.divergence or default_divergence(target.kind)
        return Objective(target.kind, divergence, self.jsd_beta, self.temperature, self.weight, self.nll_weight)


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
    trainer_args: dict[str, Any] = Field(default_factory=dict)
    """Laid over train.trainer_args in the rounds, e.g. a lower learning_rate."""
    stop_truncation_rate: Share | None = None
    """End the rounds where a larger share of rollouts than this does not end by itself."""
    stop_mean_tokens: PositiveInt | None = None
    """End the rounds where rollouts are longer than this on average."""
    stop_kl: Annotated[float, Field(ge=0)] | None = None
    """End the rounds where the divergence from the teacher, in nats a token, has fallen below this."""

    _known_fields = field_validator("trainer_args")(check_trainer_args)

    def horizon(self, number: int, rounds: int) -> int:
        """Longest rollout of round `number`, counted from 1, of so many rounds."""
        if self.first_max_new_tokens is None or rounds == 1:
            return self.max_new_tokens
        growth: float = (self.max_new_tokens / self.first_max_new_tokens) ** ((number - 1) / (rounds - 1))
        return round(self.first_max_new_tokens * growth)


class Train(Section):
    """The student learns."""

    method: Method = "sft"
    """sft: negative log-likelihood on the traces. kd: the teacher's stored distributions on them. on_policy: the student writes,
    a live teacher judges. cross_tokenizer: the same, for a teacher with another vocabulary."""
    kd: Distillation = Distillation()
    """The loss of method kd, and of on-policy rounds."""
    max_length: PositiveInt = 4096
    """Longest prompt + completion, in the student's tokens."""
    overlong: Literal["drop", "cut"] = "drop"
    """What happens to longer rows: dropped and counted, or cut at the end (which loses the answer)."""
    trainer_args: dict[str, Any] = Field(default_factory=dict)
    """Any field of `trl.SFTConfig`: learning_rate, num_train_epochs, packing, report_to, ..."""
    validation_prompts: Annotated[int, Field(ge=0)] = 0
    """Prompts whose traces are not trained on, to follow the loss (with kd also the divergence from the teacher) on them."""

    @field_validator("trainer_args")
    @classmethod
    def _known_fields(cls, value: dict[str, Any]) -> dict[str, Any]:
        return check_trainer_args(value)

    @model_validator(mode="after")
    def _no_ignored_loss(self) -> Train:
        ignored = {"loss_type", "label_smoothing_factor", "router_aux_loss_coef", "use_liger_kernel"} & set(self.trainer_args)
        if self.method == "kd" and ignored:
            raise ValueError(f"train.trainer_args.{min(ignored)} belongs to the loss of method sft; kd has its own, see train.kd")
        return self
