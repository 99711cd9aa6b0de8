"""Which answers most of a prompt's samples agree on, for prompts of which nobody knows the right one."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from distill.checks import Found
from distill.checks.form import answer_of
from distill.checks.forms.final import final_answer
from distill.checks.forms.keys import key_of
from distill.checks.forms.plain import plain
from distill.data.texts import is_blank

NO_ANSWER = 0
_LOOKED_AT = 20_000
"""Characters at the end of an answer, among which its final part is."""


def final_key(completion: str) -> str | None:
    """One text for all final answers that say the same (1/2 and 0.5), as far as that needs no sympy; null where there is none."""
    answer = answer_of(completion)
    if answer is None or is_blank(answer):
        return None
    return key_of(plain(final_answer(answer[-_LOOKED_AT:]).texts[0]))


def answer_number(completion: str) -> int:
    """64 bits that are equal where the final answers say the same; 0 where there is none."""
    final = final_key(completion)
    if final is None:
        return NO_ANSWER
    return int.from_bytes(hashlib.blake2b(final.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") or 1


def agreements(prompts_R: NDArray[np.uint64], answers_R: NDArray[np.uint64], min_share: float) -> Iterator[Found]:
    """What is found of each trace, in their order.

    Traces without an answer count among those of their prompt, so a share is of all its samples. Where no answer reaches it, or two are
    equally common, none is judged: nothing speaks for the one or the other.

    Args:
        prompts_R: Of each trace its prompt, `(R,)`.
        answers_R: And its answer; 0 for none.
        min_share: Of the commonest among its prompt's samples.
    """
    counts: dict[int, Counter[int]] = defaultdict(Counter)
    for prompt, answer in zip(prompts_R.tolist(), answers_R.tolist(), strict=True):
        counts[prompt][answer] += 1
    found = {prompt: _commonest(answers, min_share) for prompt, answers in counts.items()}
    for prompt, answer in zip(prompts_R.tolist(), answers_R.tolist(), strict=True):
        commonest = found[prompt]
        if isinstance(commonest, str):
            yield None, commonest
        elif answer == NO_ANSWER:
            yield False, "no_answer"
        else:
            yield (True, "agrees") if answer == commonest else (False, "disagrees")


def _commonest(answers: Counter[int], min_share: float) -> int | str:
    """The answer that is agreed on, or why there is none."""
    total = answers.total()
    if total == 1:
        return "one_sample"
    ranked = [(answer, count) for answer, count in answers.most_common() if answer != NO_ANSWER]
    if not ranked or ranked[0][1] < min_share * total or (len(ranked) > 1 and ranked[0][1] == ranked[1][1]):
        return "no_agreement"
    return ranked[0][0]
