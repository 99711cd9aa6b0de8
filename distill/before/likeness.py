"""What evaluate measures where no answer can be judged, and what that needs. Without torch."""

from __future__ import annotations

from distill.before.findings import Findings
from distill.errors import DataError
from distill.recipe.experiment import Recipe

_GIB = 2**30
_OF_A_TOKEN = 8  # bytes of a candidate: its id and its log-probability


def check_likeness(recipe: Recipe, found: Findings) -> None:
    """A claim on what is compared with the teacher; none where nothing is asked, and a warning where only other things are measured."""
    evaluate = recipe.evaluate
    if evaluate is not None and recipe.measures and recipe.likeness is None and not recipe.judges_answers:
        found.warn(
            "what is measured",
            "no answer to the run's own held-out prompts can be judged right or wrong (prompts.columns.reference is null), and nothing is "
            "compared with the teacher's: only what evaluate.preferences and evaluate.sets ask is measured",
        )
    elif evaluate is not None and (recipe.likeness is not None or not recipe.judges_answers):
        found.prove("likeness to the teacher", lambda: _claim(recipe))
        if recipe.likeness is not None and recipe.teacher_tells is None:
            assert recipe.teacher is not None and recipe.teacher.server is not None
            found.warn(
                "likeness to the teacher",
                f"its server ({recipe.teacher.server.kind}) tells nothing of what it thinks of an answer: no divergence is measured, only "
                "perplexity, chrF and how often the written token is the most probable. vllm, sglang and this process tell.",
            )


def _claim(recipe: Recipe) -> str:
    """What is measured, by whom it is read, and the room that it takes on disk at most.

    Raises:
        DataError: no answer can be judged, and there is no teacher to compare with.
    """
    evaluate, asked = recipe.evaluate, recipe.likeness
    assert evaluate is not None
    if asked is None:
        raise DataError(
            "no answer can be judged (prompts.columns.reference is null), and evaluate.models names no teacher beside base or student to "
            "compare with. Name the column with the right answers, or the teacher, or set evaluate: null."
        )
    what = "measured beside what is right" if recipe.judges_answers else "measured in place of accuracy: there are no references"
    compared = " and ".join(role for role in evaluate.models if role != "teacher")
    text = f"{what}; {compared} read its answers in this process"
    if recipe.teacher_tells is None:
        return text
    prompts = min(recipe.prompts.heldout_size, evaluate.max_prompts or recipe.prompts.heldout_size, asked.max_prompts or 2**31)
    most = prompts * evaluate.samples_per_prompt * evaluate.max_new_tokens * asked.top_k * _OF_A_TOKEN / _GIB
    here = "in this process too" if recipe.teacher_tells == "process" else "behind its server"
    return f"{text}, the teacher {here}; {asked.top_k:,} candidates a token, at most {most:,.1f} GiB"
