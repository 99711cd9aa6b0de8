"""Stored targets beside what the teacher thinks of the same rows now: equal up to what storing and computing round."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from distill.targets.codec import CANDIDATE_BITS, SINGLE_BITS, Targets, square_grid_error
from distill.targets.spec import ChosenToken, Sampled, TargetSpec, TopK

_LOG_SEEN = math.log(1e-4)  # less probable tokens are not compared


class Verification:
    """How stored targets differ from what the teacher thinks of the same rows now.

    Args:
        target: What was stored.
        exact: Whether the teacher computes in float32; in 16 bits a batch of another size gives noticeably other logits.
    """

    def __init__(self, target: TargetSpec, exact: bool) -> None:
        self._target = target
        self._slack = 1e-3 if exact else 0.25
        # A logit of 40 in bfloat16 is a multiple of 0.25, so rounding alone moves some log-probabilities by more than the
        # slack, and some of the draws from a long tail to a neighbour. Measured on an H200 (2026-11-26, tests/test_gpu_numbers.py:
        # eight random layers, whose rounding trained ones don't reach), a batch of 8 against a row alone: in bfloat16 4.7 % of
        # top_k, 1.3 % of chosen_token and 2.3 % of the draws, in float16 none, none and 1.6 %. Of the next position's targets
        # over 75 % differ by more.
        self.least_agreement = 0.98 if exact else 0.75
        """Least share of equal draws."""
        self.most_beyond = 0.0 if exact else 0.1
        """Largest share of log-probabilities that may differ by more."""
        self.largest = 0.0
        """Largest difference of a log-probability above ln 1e-4, in nats; not for `sampled`."""
        self.beyond = 0
        """Log-probabilities that differ by more than storing and computing them can explain."""
        self.compared = 0
        """Log-probabilities above ln 1e-4, counted on each side."""
        self.moved = 0
        """Positions that have a target on one side only."""
        self.positions = 0
        self._equal, self._drawn = 0.0, 0.0

    @property
    def agreement(self) -> float | None:
        """Share of draws that are equal; null for other kinds than `sampled`."""
        return self._equal / self._drawn if self._drawn else None

    @property
    def holds(self) -> bool:
        """Whether the differences are explained; a few positions may lie at the border of having a target."""
        drawn = self.agreement is None or self.agreement >= self.least_agreement
        return drawn and self.beyond <= self.most_beyond * self.compared and self.moved <= max(1, self.positions // 50)

    def facts(self, rows: int) -> dict[str, Any]:
        """What a manifest says of it."""
        measured = {"largest_nats": round(self.largest, 6)} if self.agreement is None else {"equal_draws": round(self.agreement, 6)}
        return {"rows": rows, "positions": self.positions, **measured}

    def __str__(self) -> str:
        drawn = f"{self.agreement:.2%} of the draws are equal" if self.agreement is not None else ""
        parts = [drawn or f"largest difference {self.largest:.4f} nats"]
        parts += [f"{self.beyond} of {self.compared:,} log-probabilities beyond rounding"] if self.beyond else []
        parts += [f"{self.moved} of {self.positions:,} positions with a target on one side only"] if self.moved else []
        return ", ".join(parts)

    def add(self, stored: Targets, fresh: Targets) -> None:
        """Compares a row."""
        self.positions += len(stored)
        if len(stored) != len(fresh):
            self.moved += max(len(stored), len(fresh))
            return
        there, here = ((side.log_probs > -np.inf).any(1) for side in (stored, fresh))
        self.moved += int((there != here).sum())
        for place in np.flatnonzero(there & here):
            one, other = (_candidates(side, int(place)) for side in (stored, fresh))
            if isinstance(self._target, Sampled):
                # For plain counts the share of draws that both have.
                self._equal += sum(min(math.exp(value), math.exp(other.get(index, -math.inf))) for index, value in one.items())
                self._drawn += sum(math.exp(value) for value in [*one.values(), *other.values()]) / 2
            else:
                self._compare(one, other)
                self._compare(other, one)

    def _compare(self, one: dict[int, float], other: dict[int, float]) -> None:
        """Differences at the candidates of one side; where the other has none, it has less than its last one."""
        chosen = isinstance(self._target, ChosenToken)
        least = min(other.values())
        if isinstance(self._target, TopK) and self._target.min_probability:
            least = max(least, math.log(self._target.min_probability))
        for index, value in one.items():
            if value <= _LOG_SEEN:
                continue
            difference = abs(value - other[index]) if index in other else max(value - least, 0.0)
            stored = square_grid_error(np.array([min(-value, 88.0)]).clip(min=0), SINGLE_BITS if chosen else CANDIDATE_BITS)
            self.largest = max(self.largest, difference)
            self.compared += 1
            self.beyond += difference > float(stored[0]) + self._slack


def _candidates(targets: Targets, place: int) -> dict[int, float]:
    """Log-probabilities of a position by id; `chosen_token` has but one, of the written token."""
    values = targets.log_probs[place].tolist()
    ids = targets.ids[place].tolist() or [0]
    return {index: value for index, value in zip(ids, values, strict=True) if value > -math.inf}
