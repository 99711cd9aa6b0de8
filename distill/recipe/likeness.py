"""How alike a student is to its teacher, where no answer is right or wrong by itself."""

from __future__ import annotations

from distill.recipe.base import PositiveInt, Section


class Likeness(Section):
    """What base and student think of the teacher's held-out answers, and how alike their own answers are to these."""

    decides_no_row = frozenset({"batch_size"})

    max_prompts: PositiveInt | None = None
    """Read the teacher's answers to only so many of the prompts; null means all that `evaluate` asks."""
    top_k: PositiveInt = 64
    """Tokens of the teacher's distribution that are compared one by one; all others count as one. The divergence is then a lower bound,
    and exact with as many as the vocabulary has. Kept on disk, 8 bytes each, a token of an answer."""
    batch_size: PositiveInt = 8
    """Answers that are read at once; halved by itself when memory runs out."""
