"""Can this teacher teach this student? The numbers that tell, and a verdict in words. Knows no models, only what they think.

After "Rethinking On-Policy Distillation" (arXiv 2604.13016): a student learns on-policy where both think alike, so that at the
places the student visits the tokens that either holds probable are the same few, and where the teacher can do what the
student can't. Where they don't think alike yet, training on the teacher's traces first makes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill.targets.codec import Targets

TOP_K = 16
"""Tokens of each model that are compared at a position."""
NUM_DEPTHS = 4
"""Parts of an answer, from its beginning to its end."""

# A rule of thumb each: what the paper saw in runs that worked (shared tokens hold 97 to 99 % of the mass), with room below.
_ALIKE, _FAR_APART = 0.9, 0.6
_ENDS = 0.5


class Depth(NamedTuple):
    """Advantages of one part of the answers, in nats a token."""

    mean: float
    tokens: int


@dataclass(frozen=True)
class Reading:
    """What both models think of the traces of one of them."""

    overlap: float
    """Share of the student's `TOP_K` most probable tokens that are among the teacher's, averaged over tokens."""
    shared_mass_student: float
    """Probability that the student gives to the tokens both have among their `TOP_K`."""
    shared_mass_teacher: float
    """The same of the teacher."""
    divergence: float
    """Nats a token: on the student's traces an estimate of KL(student ‖ teacher), on the teacher's of KL(teacher ‖ student)."""
    advantage: list[Depth]
    """log p of the teacher less log q of the student on the written tokens, by depth."""
    tokens: int


@dataclass(frozen=True)
class Answers:
    """How one model does on the prompts."""

    finished: float
    """Share of answers that end by themselves."""
    mean_tokens: float
    accuracy: float | None
    """Share of right answers among those that could be judged; null where none could."""


@dataclass(frozen=True)
class Findings:
    """Everything that was measured of a pair."""

    aligned_share: float
    carried_mass: float
    teacher: Answers
    student: Answers
    on_student: Reading
    on_teacher: Reading
    difference: tuple[float, float] | None
    """Interval of the teacher's accuracy less the student's; null where too few answers could be judged."""


def read(teacher: list[tuple[Targets, Targets]], student: list[tuple[Targets, Targets]], *, student_wrote: bool) -> Reading:
    """Compares what the two think of the same rows.

    Args:
        teacher: For each row its `top_k` and its `chosen_token` targets, in the student's ids.
        student: The same of the student.
        student_wrote: Whose traces they are.
    """
    overlaps: list[NDArray[np.float64]] = []
    masses: list[NDArray[np.float64]] = []
    ratios: list[NDArray[np.float64]] = []
    places: list[NDArray[np.int64]] = []
    for (p_top, p_written), (q_top, q_written) in zip(teacher, student, strict=True):
        known = (p_written.log_probs[:, 0] > -np.inf) & (p_top.ids >= 0).any(1)
        if not known.any():
            continue
        depths = np.arange(len(known)) * NUM_DEPTHS // len(known)
        ratios.append((p_written.log_probs - q_written.log_probs)[known, 0].astype(np.float64))
        places.append(depths[known])
        overlap, shared = _shared(p_top, q_top)
        overlaps.append(overlap[known])
        masses.append(shared[known])
    ratio, place = np.concatenate(ratios or [np.empty(0)]), np.concatenate(places or [np.empty(0, np.int64)])
    mass = np.concatenate(masses or [np.empty((0, 2))])
    return Reading(
        overlap=_mean(np.concatenate(overlaps or [np.empty(0)])),
        shared_mass_student=_mean(mass[:, 1]),
        shared_mass_teacher=_mean(mass[:, 0]),
        divergence=_mean(-ratio if student_wrote else ratio),
        advantage=[Depth(_mean(ratio[place == depth]), int((place == depth).sum())) for depth in range(NUM_DEPTHS)],
        tokens=len(ratio),
    )


def _shared(teacher: Targets, student: Targets) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(n,) share of the student's best tokens that are among the teacher's, and (n, 2) what each gives to the common ones."""
    p_ids, q_ids = teacher.ids[:, :TOP_K], student.ids[:, :TOP_K]
    same = (p_ids[:, :, None] == q_ids[:, None, :]) & (p_ids >= 0)[:, :, None]
    p, q = np.exp(teacher.log_probs[:, :TOP_K].astype(np.float64)), np.exp(student.log_probs[:, :TOP_K].astype(np.float64))
    overlap = same.any(1).sum(1) / np.maximum((q_ids >= 0).sum(1), 1)
    return overlap, np.stack([(p * same.any(2)).sum(1), (q * same.any(1)).sum(1)], 1)


def verdict(found: Findings, *, min_aligned: float, advice: str) -> tuple[bool, list[str]]:
    """Whether to go on, and why or what to do first, a sentence each.

    Args:
        found: What was measured.
        min_aligned: Least share of tokens that must have a target.
        advice: What to do where fewer have.
    """
    if found.aligned_share < min_aligned:
        share = f"{found.aligned_share:.0%}"
        return False, [f"No: only {share} of the student's tokens are tokens of this teacher too. {advice}"]
    reasons = []
    good = True
    if found.difference is not None and found.difference[1] <= 0:
        good = False
        reasons.append("The teacher answers these prompts no better than the student: there is nothing new to learn. Take harder prompts.")
    elif found.difference is not None and found.difference[0] <= 0:
        reasons.append("That the teacher is better is not certain on so few prompts; look at more of them (--prompts).")
    if found.teacher.finished < _ENDS:
        good = False
        reasons.append("Most of the teacher's answers are cut off. Raise the limit of tokens, or take a teacher that thinks shorter.")
    shared = found.on_student.shared_mass_student
    if shared < _FAR_APART:
        good = False
        reasons.append(
            f"On its own answers the tokens both hold probable have only {shared:.0%} of the student's probability: they don't think "
            "alike. Train on the teacher's traces first (generate, train), then on-policy (rounds)."
        )
    elif shared < _ALIKE:
        reasons.append(
            f"On its own answers the common tokens have {shared:.0%} of the student's probability; 97 % and more is usual where on-policy "
            "training works. Some training on the teacher's traces first will help."
        )
    if found.student.finished < _ENDS <= found.teacher.finished:
        reasons.append(
            "Most of the student's answers don't end by themselves, the teacher's do. Train on the teacher's traces first, or its rollouts "
            "will grow without end; set rollouts.stop_truncation_rate."
        )
    first, last = found.on_student.advantage[0], found.on_student.advantage[-1]
    if last.tokens and first.tokens and last.mean < 3 * first.mean - 0.5:
        reasons.append(
            f"Late in the student's answers the teacher finds them far less probable ({last.mean:.2f} nats a token, {first.mean:.2f} "
            "at the start): there its advice is worth little. Begin with a short horizon (rollouts.first_max_new_tokens)."
        )
    opening = "Yes: this teacher can teach this student." if good and not reasons else "Yes, with care." if good else "Not like this."
    return good, [opening, *reasons]


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else float("nan")
