"""Where a teacher's thoughts on traces come from: who aligns them, who reads, and what is known of the teacher."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, Protocol

from distill.engines.reading import Reader
from distill.engines.scored import ScoredRow
from distill.models.chat import ChatFormat
from distill.models.loading import free_memory, load_chat_format, load_model, model_record, pick_device
from distill.models.vocabulary import AlignedRow, VocabularyMap, vocabulary_map
from distill.recipe.experiment import Recipe
from distill.recipe.learning import Score
from distill.recipe.models import ModelSpec
from distill.targets.spec import TargetHeader


class Scorer(Protocol):
    """Something that says what a teacher thinks of rows."""

    exact: bool
    """Whether it computes in float32, so that what is beside a row changes next to nothing."""

    def read(self, batches: Iterable[Sequence[AlignedRow]]) -> Iterator[list[ScoredRow]]:
        """The rows of all batches, some at a time, in their order."""
        ...

    def score(self, rows: Sequence[AlignedRow]) -> list[ScoredRow]:
        """Some rows, in their order."""
        ...


class Thoughts:
    """What all sources have in common; this one loads the teacher into this process, when it is first asked.

    Args:
        recipe: With a teacher and a section score.
    """

    unverified: str | None = None
    """Why nothing can be read once more; null where it can."""

    def __init__(self, recipe: Recipe) -> None:
        assert recipe.teacher is not None and recipe.score is not None  # the recipe was validated
        self.recipe = recipe
        self.teacher: ModelSpec = recipe.teacher
        self.settings: Score = recipe.score

    @cached_property
    def student_chat(self) -> ChatFormat:
        """Tokenizer and template of the student."""
        return load_chat_format(self.recipe.student)

    @cached_property
    def teacher_chat(self) -> ChatFormat:
        """Tokenizer and template of the teacher."""
        return load_chat_format(self.teacher)

    @cached_property
    def vocabulary(self) -> VocabularyMap:
        """The teacher's tokens as the student's."""
        found = vocabulary_map(self.teacher_chat, self.student_chat)
        self.recipe.train.kd.check_size(self.settings.target, found.student_size)
        return found

    @cached_property
    def reader(self) -> Reader:
        """How traces are put to the teacher."""
        return Reader(self.teacher_chat, self.student_chat, self.vocabulary, self.recipe.train)

    @property
    def identical(self) -> bool:
        """Whether teacher and student have one vocabulary, so that every token is aligned."""
        return self.vocabulary.identical

    @property
    def advice(self) -> str:
        """What can be done where too few tokens get a target."""
        return self.vocabulary.advice

    @property
    def teacher_size(self) -> int:
        """Number of the teacher's token ids."""
        return self.vocabulary.teacher_size

    @property
    def device(self) -> str:
        """What the teacher computes on."""
        return str(pick_device())

    @cached_property
    def model(self) -> Any:
        """The teacher, alone in memory."""
        free_memory()
        return load_model(self.teacher, pick_device())

    @cached_property
    def scorer(self) -> Scorer:
        """The teacher, ready to read."""
        from distill.engines.scoring import TeacherScorer

        return TeacherScorer(self.model, self.settings.target, self.vocabulary)

    @cached_property
    def record(self) -> dict[str, Any]:
        """Name, revision and size of the teacher."""
        return model_record(self.teacher, self.model)

    def facts(self) -> dict[str, Any]:
        """What a manifest says besides; nothing of a teacher in this process."""
        return {}

    def header(self, traces_digest: str) -> TargetHeader:
        """What every shard says of itself.

        Args:
            traces_digest: Of the traces that are scored.
        """
        digests = self._teacher_digests()
        return TargetHeader(
            target=self.settings.target,
            vocab_size=self._student_size(),
            tokenizer_digest=self.student_chat.tokenizer_digest,
            template_digest=self.student_chat.template_digest,
            teacher_model=self.teacher.model,
            teacher_revision=self.record["revision"],
            teacher_tokenizer_digest=digests[0],
            teacher_template_digest=digests[1],
            traces_digest=traces_digest,
        )

    def _teacher_digests(self) -> tuple[str, str]:
        return self.teacher_chat.tokenizer_digest, self.teacher_chat.template_digest

    def _student_size(self) -> int:
        return self.vocabulary.student_size
