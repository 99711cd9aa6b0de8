"""The recipe: one strict, typed description of an experiment. Knows nothing of torch.

The docstring under a field is its only documentation; `distill keys` prints it. A field that says how fast rows are
made, or what is shown, but not which rows they are, is named in `decides_no_row`: it never makes a folder another experiment.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distill.recipe.base import OutputPath, Section
from distill.recipe.benchmarks import Benchmarks
from distill.recipe.checks import Check, answer_checks
from distill.recipe.inputs import Inputs
from distill.recipe.learning import (
    DEEPSPEED_HAS_NO_PARTS,
    FOLLOWS_EVALUATION,
    LOSS_OF_SFT,
    READING_KINDS,
    Distillation,
    Rollouts,
    Score,
    Train,
)
from distill.recipe.likeness import Likeness
from distill.recipe.models import ModelSpec, Student
from distill.recipe.prompts import Prompts
from distill.recipe.results import Evaluate, Export, Report
from distill.recipe.sets import MAIN, AskedSet
from distill.recipe.steps import PASSES
from distill.recipe.traces import Curate, Generate, Traces
from distill.recipe.trainer_values import needs_evaluation


class Recipe(Section):
    """One experiment."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Letters, digits, `.`, `_` and `-`."""
    run_dir: OutputPath | None = None
    """Folder of the run, relative to the folder the command is run in; null means `runs/<name>`."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of the split, of every sampled token and of training."""
    teacher: ModelSpec | None = None
    """The model that is learned from; may be left out where traces are brought."""
    student: Student
    """The model that learns."""
    inputs: Inputs | None = None
    """Stages of another run in place of this one's own, so that one set of traces serves several trainings; null makes all of them."""
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
    benchmarks: Benchmarks | None = None
    """Public benchmarks; null leaves the stage out."""
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
    def checks_of_answers(self) -> list[Check]:
        """What a right answer passes where base, student and teacher are measured."""
        given = self.evaluate.checks if self.evaluate is not None else None
        return given if given is not None else answer_checks(self.curate.checks)

    def asked_sets(self) -> dict[str, AskedSet]:
        """What is answered, by the name of its set: the run's own held-out prompts, then the further sets."""
        if self.evaluate is None:
            return {}
        found = {MAIN: AskedSet(self.prompts, self.evaluate, self.checks_of_answers, self.evaluate.max_prompts)}
        for name, each in self.evaluate.sets.items():
            checks = each.checks if each.checks is not None else self.checks_of_answers
            found[name] = AskedSet(each.as_prompts(self.prompts, checks), each.sampling(self.evaluate), checks, each.max_prompts)
        return found

    @property
    def judges_answers(self) -> bool:
        """Whether an answer can be right: there are references, or the checks of answers do without."""
        return self.prompts.has_references or not any(check.settings.asks_reference for check in self.checks_of_answers)

    @property
    def measures(self) -> bool:
        """Whether evaluate has something to measure: what is right, likeness, which answer is better, or a further set, which is judged."""
        if self.evaluate is None:
            return False
        preferences = self.evaluate.preferences
        compares = preferences is not None and not (preferences.asks_reference and not self.prompts.has_references)
        return self.judges_answers or self.likeness is not None or compares or bool(self.evaluate.sets)

    @property
    def likeness(self) -> Likeness | None:
        """What is looked at of the teacher's held-out answers: what evaluate says, else the defaults where no answer can be judged."""
        if self.evaluate is None or self.evaluate.likeness is not None or self.judges_answers:
            return None if self.evaluate is None else self.evaluate.likeness
        return Likeness() if self.evaluate.compares_with_teacher else None

    @property
    def teacher_tells(self) -> Literal["process", "server"] | None:
        """Where the teacher says what it thinks of a text: in this process or behind its server; null where that tells nothing."""
        if self.teacher is None or self.teacher.server is None or (self.score is not None and self.score.source == "process"):
            return None if self.teacher is None else "process"
        return "server" if self.teacher.server.kind in READING_KINDS else None

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
    def _inputs_are_stages(self) -> Recipe:
        until = self.inputs.until if self.inputs is not None else None
        there = ["prompts", *(["generate", "curate"] if self.learns_from_traces else []), *(["score"] if self.scores_traces else [])]
        if until is not None and until not in there:
            raise ValueError(f"inputs.until: this recipe has no stage {until} before its training, only {', '.join(there)}")
        if until == "generate" and self.generate is not None and self.generate.unsolved is not None:
            raise ValueError(
                "generate.unsolved goes from curate back to generate, which with inputs.until generate is another run's: leave unsolved "
                "out, or take curate, too"
            )
        return self

    @model_validator(mode="after")
    def _answers_can_be_measured(self) -> Recipe:
        evaluate = self.evaluate
        if evaluate is not None and evaluate.likeness is not None and not evaluate.compares_with_teacher:
            raise ValueError(
                "evaluate.likeness compares with answers that the teacher writes: name teacher in evaluate.models, and base or student"
            )
        if evaluate is not None and evaluate.calibration and not self.judges_answers:
            raise ValueError(
                "evaluate.calibration asks how often an answer is right, and none can be judged without a reference: name its column in "
                "prompts.columns.reference, or leave calibration out"
            )
        return self

    @model_validator(mode="after")
    def _benchmarks_fit(self) -> Recipe:
        if self.benchmarks is None:
            return self
        if self.teacher is None and "teacher" in self.benchmarks.models:
            raise ValueError("benchmarks.models names teacher, but there is no section teacher")
        for role in self.benchmarks.models:
            spec = self.teacher if role == "teacher" else self.student
            is_served = spec is not None and spec.server is not None
            if is_served and not (self.benchmarks.apply_chat_template and self.benchmarks.max_gen_toks):
                raise ValueError(
                    f"benchmarks.models names {role}, which stands behind a server: set benchmarks.apply_chat_template and "
                    "benchmarks.max_gen_toks, by which all models are then asked alike"
                )
        return self

    @model_validator(mode="after")
    def _columns_are_carried(self) -> Recipe:
        carried = self.prompts.fields or []
        judged = self.checks_of_answers if self.evaluate is not None else []
        for check in [*self.curate.checks, *judged]:
            missing = next((column for column in check.settings.columns if column not in carried), None)
            if missing is not None:
                raise ValueError(
                    f"prompts.fields: the check {check.called} looks at the column {missing!r}, which is not carried along. Add it: "
                    f"fields: [{', '.join([*carried, missing])}], or give the check the name that it has in your data"
                )
        preferences = self.evaluate.preferences if self.evaluate is not None else None
        missing = next((column for column in preferences.columns if column not in carried), None) if preferences is not None else None
        if missing is not None:
            raise ValueError(f"prompts.fields: evaluate.preferences.rubric names {{{missing}}}, which is not carried along. Add it")
        return self

    @model_validator(mode="after")
    def _verdicts_stand_for_something(self) -> Recipe:
        told = self.traces is not None and self.traces.verdict is not None
        if told and not any(check.settings.of_answers for check in self.curate.checks):
            raise ValueError(
                "traces.verdict would be ignored: it stands in place of a check that says whether an answer is right, and curate.checks "
                "has none. Add one (math, label, text, ...)"
            )
        return self

    @model_validator(mode="after")
    def _sets_can_be_judged(self) -> Recipe:
        for name, asked in self.asked_sets().items():
            if name == MAIN:
                continue
            judge = next((check.called for check in asked.checks if check.settings.asks_reference), None)
            if judge is not None and not asked.prompts.has_references:
                raise ValueError(
                    f"evaluate.sets.{name}: the check {judge} compares with the right answer, and no column has it. Give the set "
                    "columns with a reference, or other checks"
                )
            looked_at, carried = [column for check in asked.checks for column in check.settings.columns], asked.prompts.fields or []
            missing = next((column for column in looked_at if column not in carried), None)
            if missing is not None:
                raise ValueError(
                    f"evaluate.sets.{name}.fields: a check looks at the column {missing!r}, which is not carried along. Add it"
                )
        return self

    @model_validator(mode="after")
    def _samples_can_agree(self) -> Recipe:
        one = self.generate is not None and self.generate.samples_per_prompt == 1
        if one and any(check.agreement is not None for check in self.curate.checks):
            raise ValueError("curate.checks has agreement, and there is one sample of each prompt: raise generate.samples_per_prompt")
        if self.learns_from_traces:
            self.curate.check_traces(self.generate)
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
            self.score.check_source(self.teacher, self.generate, self.rounds)
            self.train.kd.objective(self.score.target)
            if self.rollouts is not None and self.rollouts.stop_kl is not None and self.score.target.kind == "sampled":
                raise ValueError("rollouts.stop_kl can't be measured from sampled targets; use top_k or chosen_token")
        return self

    def _schedule_has_parts(self) -> None:
        if self.rollouts is None or self.rounds < 2 or self.rollouts.schedule_over == "each_round":
            return
        arguments = self.train_in_rounds.trainer_args
        schedule, deepspeed = arguments.get("lr_scheduler_type"), arguments.get("deepspeed")
        if schedule in FOLLOWS_EVALUATION:
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
        if self.train.global_batch_size is not None and PASSES in self.rollouts.trainer_args:
            raise ValueError(f"rollouts.trainer_args.{PASSES} follows from train.global_batch_size, so give one of them")
        asking = needs_evaluation(self.rollouts.trainer_args)
        if asking is not None and not self.train.validation_prompts:
            raise ValueError(f"rollouts.trainer_args.{asking} needs an evaluation while the student trains; set train.validation_prompts")
        self._schedule_has_parts()
        if self.rounds == 1 and self.rollouts.first_max_new_tokens is not None:
            raise ValueError("rollouts.first_max_new_tokens would be ignored: there is one round, so nothing grows")
        if self.train.overlong == "drop" and self.rollouts.max_new_tokens >= self.train.max_length:
            raise ValueError(
                f"rollouts.max_new_tokens ({self.rollouts.max_new_tokens:,}) leaves no room for a prompt in train.max_length "
                f"({self.train.max_length:,}), so every rollout of that length would be dropped"
            )
