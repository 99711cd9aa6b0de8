"""When a checkpoint is written: by time, where the recipe doesn't say it by steps; and before training ends early on a signal.

All processes do both behind the same step. Each tells the others at every step whether a signal asked it to end, the first also whether
by its clock a checkpoint is due; they read the answer a step later, when it has long come, so that no step waits for it.
"""

from __future__ import annotations

import os
import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from distill.models.processes import Poll, Processes
from distill.run import early
from distill.run.log import duration_text, say

_SHARE = 0.02  # of the time that checkpoints may take
_SHORTEST_S, _LONGEST_S = 300.0, 3600.0
_PARTS = 10  # of a job's time, of which one may be lost
_BEFORE_END_S = 120.0  # and as long as three checkpoints take
_END = "SLURM_JOB_END_TIME"


class Interval:
    """Seconds from one checkpoint to the next, by the clock of the first process.

    They follow from what a checkpoint costs, so that all together take a fiftieth of the time; between 5 minutes and an hour, and where the
    scheduler tells when the job ends, a tenth of its time at most. One more comes shortly before that end.
    """

    def __init__(self) -> None:
        self.cost_s: float | None = None
        """Of the last checkpoint."""
        self._last_s = time.monotonic()
        end = os.environ.get(_END, "")
        self._end_s = self._last_s + float(end) - time.time() if end.isdecimal() else None
        left_s = None if self._end_s is None else max(self._end_s - self._last_s, 0.0)
        self._longest_s = _LONGEST_S if left_s is None else min(_LONGEST_S, left_s / _PARTS)

    @property
    def seconds(self) -> float:
        """From one to the next."""
        return min(max((self.cost_s or 0.0) / _SHARE, _SHORTEST_S), self._longest_s)

    def is_due(self) -> bool:
        """Whether it is time for one."""
        now_s = time.monotonic()
        if now_s - self._last_s >= self.seconds:
            return True
        before_s = _BEFORE_END_S + 3 * (self.cost_s or 0.0)
        return self._end_s is not None and self._last_s < self._end_s - before_s <= now_s

    def written(self, cost_s: float) -> None:
        """One was, just now."""
        self.cost_s, self._last_s = cost_s, time.monotonic()

    def __str__(self) -> str:
        span = f"{duration_text(min(_SHORTEST_S, self._longest_s))} to {duration_text(self._longest_s)}"
        return f"a checkpoint every {span}, so that writing them takes {_SHARE:.0%} of the time (train.trainer_args.save_steps sets it)"


class Endings(TrainerCallback):
    """Asks for a checkpoint where one is due by time, and for one and the end where a signal came; behind the last step it is too late.

    It stands behind all callbacks that ask for something.

    Args:
        processes: That agree.
        interval: Of checkpoints by time; null where the recipe sets it by steps.
    """

    def __init__(self, processes: Processes, interval: Interval | None) -> None:
        self._processes, self._poll, self.interval = processes, Poll(processes), interval
        self._since_s = 0.0
        self._ends = False
        self._ended_at: int | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Raises EndedEarly where a signal came before the first step: there is nothing new to keep."""
        if state.global_step < state.max_steps:
            self._processes.agree()
        if self.interval is not None:
            say(f"train     {self.interval}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Decides, on all processes alike."""
        self._since_s = time.monotonic()
        due = self.interval is not None and not self._processes.rank and self.interval.is_due()
        ends, saves = self._poll.ask(early.asked() is not None, due)
        if control.should_training_stop:  # at its end
            return
        self._ends = ends
        if not ends:
            control.should_save |= saves
        elif not (_acts_by_epoch(args) and state.epoch == int(state.epoch or 0)):  # else it ends when the epoch has been looked at
            self._end(args, state, control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ends training here where it was to be, or leaves undone what belongs to the end of an epoch that is cut."""
        if self._ends and control.should_training_stop:
            control.should_log = control.should_evaluate = control.should_save = False
        elif self._ends:
            self._end(args, state, control)

    def _end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        control.should_save = control.should_training_stop = True
        self._ended_at = state.global_step
        args.load_best_model_at_end = False
        if args.save_strategy == SaveStrategy.BEST:  # an evaluation behind the same step would decide whether to save
            args.save_strategy = SaveStrategy.NO

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """What is logged costs no checkpoint."""
        self._since_s = time.monotonic()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Nor what is evaluated."""
        self._since_s = time.monotonic()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Notes what it cost."""
        if self.interval is not None:
            self.interval.written(time.monotonic() - self._since_s)

    def leave(self, steps: int) -> None:
        """Ends the stage where training ended early, once all processes have written all.

        Args:
            steps: That there are.

        Raises:
            EndedEarly: it did.
        """
        self._poll.last(2)
        if self._ended_at is None:
            return
        names = self._processes.gather(early.asked())
        early.end(next(filter(None, names)), f" behind step {self._ended_at:,} of {steps:,}, with a checkpoint")

    def facts(self) -> dict[str, Any]:
        """When checkpoints were written, for the manifest."""
        if self.interval is None:
            return {"checkpoints": {"by": "steps"}}
        cost_s = None if self.interval.cost_s is None else round(self.interval.cost_s, 3)
        return {"checkpoints": {"by": "time", "every_s": round(self.interval.seconds, 1), "last_took_s": cost_s}}


def _acts_by_epoch(args: TrainingArguments) -> bool:
    """Whether anything is done at the end of an epoch, which a checkpoint behind its last step would come before."""
    by_epoch = args.logging_strategy == IntervalStrategy.EPOCH or args.eval_strategy == IntervalStrategy.EPOCH
    return by_epoch or args.save_strategy == SaveStrategy.EPOCH


def by_time(given: dict[str, Any]) -> bool:
    """Whether checkpoints are written by time: where the trainer's arguments say nothing of when.

    Args:
        given: `train.trainer_args`.
    """
    return not {"save_strategy", "save_steps", "load_best_model_at_end", "metric_for_best_model"} & given.keys()
