"""The models of an evaluation read: base and student the teacher's answers, each its own; the teacher, here or where its server tells.

Everything is written in windows of some answers, a shard each, so that a restart goes on behind the last; what was read of the same
models before the stage grew is not read again. One model at a time is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from distill.checks.form import answer_of
from distill.engines.answers import final, num_ids, sums, whole, windows
from distill.engines.comparing import Comparer
from distill.engines.comparing import Row as Asked
from distill.engines.remembered import packed, unpacked
from distill.engines.thoughts import Thoughts
from distill.errors import DataError, ModelError
from distill.measure.calibration import calibration_scores
from distill.measure.likeness import lengths, likeness_scores
from distill.measure.texts import chrf
from distill.models.chat import ChatFormat
from distill.models.loading import free_memory, load_chat_format, load_model, load_trained, pick_device
from distill.models.vocabulary import AlignedRow, VocabularyMap, align, vocabulary_map
from distill.recipe.experiment import Recipe
from distill.recipe.learning import Distillation, Score
from distill.recipe.likeness import Likeness
from distill.run.folder import StageFolder
from distill.run.log import progress, say
from distill.run.manifest import read_manifest
from distill.run.plan import name_in_run
from distill.run.schema import CERTAINTY, LIKENESS, THOUGHT
from distill.run.tables import TableWriter, iter_rows, rows_at, rows_of
from distill.servers.thinking import open_thoughts
from distill.targets.codec import Targets
from distill.targets.spec import TopK

Row = dict[str, Any]
Key = tuple[str, int]
_COLUMNS = ["author", "prompt_id", "sample_index", "messages", "completion", "prompt_ids", "completion_ids", "finish_reason"]
_UNFIT = "does_not_fit"


@dataclass(frozen=True)
class Read:
    """What reading gave."""

    likeness: list[Row]
    """Of the table `likeness`."""
    certainty: list[Row]
    """Of the table `certainty`."""
    facts: dict[str, Any]

    def scores(self, answers: list[Row], recipe: Recipe) -> tuple[list[Row], dict[str, Any]]:
        """Rows of the table `scores`, without task and samples, and facts for the manifest.

        Args:
            answers: Of the table `answers`.
            recipe: As it was read by.
        """
        evaluate, facts = recipe.evaluate, self.facts
        assert evaluate is not None
        scores = [] if recipe.judges_answers else lengths(answers, evaluate.models)
        if "likeness" in facts:
            scores += likeness_scores(self.likeness, evaluate.models, evaluate.confidence, recipe.seed, exact=facts["likeness"]["exact"])
        if evaluate.calibration:
            of_label = any(check.label is not None for check in recipe.checks_of_answers)
            how: Row = {"of_label": of_label, "confidence": evaluate.confidence, "seed": recipe.seed}
            found, bins = calibration_scores(self.certainty, answers, evaluate.models, **how)
            scores += found
            facts = facts | {"calibration": {"of_label": of_label, "bins": bins}}
        return scores, facts


def read_answers(recipe: Recipe, out: StageFolder, traces: TableWriter, run: Path, trained: Path | None, prompts: Sequence[str]) -> Read:
    """Has the models of an evaluation read what is asked, and writes the tables `thoughts`, `likeness` and `certainty`.

    Args:
        recipe: With a section evaluate.
        out: The stage's folder.
        traces: All answers, in whole shards.
        run: The run's folder.
        trained: The folder of the train stage whose student answered; null where none did.
        prompts: Whose answers count, by their ids: the held-out ones of the run itself.

    Raises:
        DataError: the teacher has no answer that both models can be given.
    """
    assert recipe.evaluate is not None
    if recipe.likeness is None and not recipe.evaluate.calibration:
        return Read([], [], {})
    return _Reading(recipe, out, traces, run, trained, prompts).all()


class _Reading:
    def __init__(
        self, recipe: Recipe, out: StageFolder, traces: TableWriter, run: Path, trained: Path | None, prompts: Sequence[str]
    ) -> None:
        assert recipe.evaluate is not None
        self.recipe, self.out, self.run, self.trained = recipe, out, run, trained
        self.asked, self.calibrates = recipe.likeness, recipe.evaluate.calibration
        self.source = recipe.teacher_tells
        everything = pa.Table.from_batches(traces.pieces(_COLUMNS))
        everything = everything.filter(pc.is_in(everything["prompt_id"], pa.array(prompts, pa.string())))
        self.answers: dict[str, pa.Table] = {role: _written(everything, role) for role in recipe.evaluate.models}
        self.read_here: list[str] = [role for role in recipe.evaluate.models if role != "teacher"]
        self.tables: dict[str, TableWriter] = {}
        self.ahead = {"thoughts": 0, "likeness": 0, "certainty": 0}  # rows that belong into each so far

    def all(self) -> Read:
        """Has all read, the teacher first."""
        facts: Row = {}
        if self.asked is not None:
            facts = {"likeness": self._prepare(self.asked)}
            self.tables |= {"likeness": self.out.table("likeness", LIKENESS, resume=True)}
        if self.calibrates:
            self.tables |= {"certainty": self.out.table("certainty", CERTAINTY, resume=True)}
        if "teacher" in self.answers and self.source is not None and (self.asked is not None or self.source == "process"):
            self._teacher_reads()
        if self.calibrates and "teacher" in self.answers and self.source != "process":
            say("note      the teacher is behind a server, so how sure it is of its answers is not measured")
        for role in self.read_here:
            self._student_reads(role)
        rows = {name: [row for piece in table.pieces() for row in rows_of(piece)] for name, table in self.tables.items()
                if name != "thoughts"}  # fmt: skip
        self._refuse_nothing(rows.get("likeness", []))
        return Read(rows.get("likeness", []), rows.get("certainty", []), facts)

    def _prepare(self, asked: Likeness) -> Row:
        """Cuts the teacher's answers to those asked for, and says by what they are judged; what is returned is for the manifest."""
        theirs = self.answers["teacher"]
        wanted = pc.unique(theirs["prompt_id"])[: asked.max_prompts]
        self.theirs = theirs.filter(pc.is_in(theirs["prompt_id"], wanted))
        if not len(self.theirs):
            raise DataError("evaluate.likeness: the teacher has answered no held-out prompt, so nothing can be compared. See eval/traces.")
        if self.source is None:
            assert self.recipe.teacher is not None and self.recipe.teacher.server is not None
            kind = self.recipe.teacher.server.kind
            say(f"note      the teacher's server ({kind}) tells nothing of what it thinks of an answer: no divergence is measured")
            return {"answers": len(self.theirs), "read_by": None, "top_k": None, "exact": False}
        self.vocabulary: VocabularyMap = vocabulary_map(load_chat_format(self._teacher), load_chat_format(self.recipe.student))
        sizes = self.vocabulary.student_size, self.vocabulary.teacher_size
        self.top_k = min(asked.top_k, *sizes)
        self.tables["thoughts"] = self.out.table("thoughts", THOUGHT, resume=True)
        exact = self.vocabulary.identical and self.top_k == max(sizes)
        return {"answers": len(self.theirs), "read_by": self.source, "top_k": self.top_k, "exact": exact}

    @property
    def _teacher(self) -> Any:
        return self.recipe.teacher

    def _teacher_reads(self) -> None:
        """The teacher's thoughts on its answers and, in this process, how sure it is of them."""
        target = Score(target=TopK(k=self.top_k if self.asked is not None else 1), source=self.source or "auto")
        train = self.recipe.train.model_copy(update={"kd": Distillation()})  # which limits what can be learned from, not what can be read
        recipe = self.recipe.model_copy(update={"score": target, "train": train})
        with open_thoughts(recipe, self.out.path, self.run, self.out.path) as thoughts:
            if self.asked is not None:
                self._fill("thoughts", "teacher", self.theirs, lambda rows, _: self._thoughts(thoughts, rows))
            if self.source == "process":
                chat = thoughts.teacher_chat
                with _lazily(lambda: Comparer(thoughts.model, num_ids(chat))) as comparer:
                    self._reads("teacher", chat, comparer)

    def _thoughts(self, thoughts: Thoughts, traces: list[Row]) -> list[Targets | None]:
        """What the teacher thinks of some answers; null of one that can't be put to both."""
        aligned: dict[int, AlignedRow] = {}
        for place, trace in enumerate(traces):
            try:
                aligned[place] = align(trace, thoughts.teacher_chat, thoughts.student_chat, self.vocabulary)
            except ModelError:  # the templates of the two don't think alike
                continue
        assert self.asked is not None
        places = sorted(aligned, key=lambda place: -len(aligned[place].teacher_ids))
        size = self.asked.batch_size
        batches = ([aligned[place] for place in places[start : start + size]] for start in range(0, len(places), size))
        scored = (row for rows in thoughts.scorer.read(batches) for row in rows) if places else iter(())
        found = dict(zip(places, (row.targets for row in scored), strict=True))
        return [found.get(place) for place in range(len(traces))]

    def _student_reads(self, role: str) -> None:
        """Base or student."""
        chat = load_chat_format(self.recipe.student)
        with _lazily(lambda: self._load(role, chat)) as comparer:
            self._reads(role, chat, comparer)

    def _load(self, role: str, chat: ChatFormat) -> Comparer:
        """Base or student, alone in memory."""
        free_memory()
        spec, device = self.recipe.student, pick_device()
        trained = self.trained if role == "student" else None
        model: Any = load_model(spec, device) if trained is None else load_trained(spec, self.recipe.student.adapter, trained, device)
        return Comparer(model, num_ids(chat))

    def _reads(self, role: str, chat: ChatFormat, comparer: Callable[[], Comparer]) -> None:
        if self.asked is not None:
            texts = _answers(self.answers[role]) if role != "teacher" else {}
            self._fill("likeness", role, self.theirs, lambda rows, told: self._opinions(role, chat, comparer, rows, told), texts)
        if self.calibrates:
            self._fill("certainty", role, self.answers[role], lambda rows, _: self._certainty(role, chat, comparer, rows))

    def _fill(self, name: str, role: str, answers: pa.Table, read: Callable[..., list[Any]], texts: dict[Key, str] | None = None) -> None:
        """Adds a row for each answer to a table, as far as they are not there, by reading those that no earlier reading knows."""
        table, before = self.tables[name], self._before(name, role)
        told = self.tables["thoughts"].pieces() if name == "likeness" and "thoughts" in self.tables else None
        with progress(len(answers), "answers", f"{role} reads") as bar:
            for window in windows(answers):
                self.ahead[name] += len(window)
                thoughts = unpacked(next(told)) if told is not None else [None] * len(window)
                if table.num_rows < self.ahead[name]:
                    rows = rows_of(window)
                    new = [place for place, row in enumerate(rows) if _key(row) not in before]
                    found = read([rows[place] for place in new], [thoughts[place] for place in new]) if new else []
                    self._store(name, role, rows, dict(zip(new, found, strict=True)), before, texts)
                bar.update(len(window))

    def _store(self, name: str, role: str, rows: list[Row], found: dict[int, Any], before: dict[Key, Any], texts: Any) -> None:
        table = self.tables[name]
        if name == "thoughts":
            known = {} if self.out.earlier is None else _at(self.out.earlier, [before[_key(row)] for row in rows if _key(row) in before])
            table.add(packed(rows, [found[place] if place in found else known[_key(row)] for place, row in enumerate(rows)]))
        else:
            for place, row in enumerate(rows):
                told = found[place] if place in found else before[_key(row)]
                table.append(told | {"chrf": _alike(row, texts)} if name == "likeness" else told)
        table.end_shard()

    def _before(self, name: str, role: str) -> dict[Key, Any]:
        """What was read before the stage grew, by answer: rows, of thoughts their number in the table."""
        earlier = self.out.earlier
        if earlier is None or name not in (made := read_manifest(earlier)).tables:
            return {}
        if role == "student" and (self.trained is None or made.inputs.get(name_in_run(self.trained)) != read_manifest(self.trained).digest):
            return {}
        then = made.facts.get("likeness") or {}
        if name != "certainty" and (then.get("read_by") != self.source or then.get("top_k") != getattr(self, "top_k", None)):
            return {}
        if name == "thoughts":
            keys = iter_rows(earlier, name, columns=["prompt_id", "sample_index"])
            return {_key(row): number for number, row in enumerate(keys)}
        answered = {_key(row) for row in self.answers[role].select(["prompt_id", "sample_index"]).to_pylist()}
        rows = {_key(row): row for row in iter_rows(earlier, name) if row["model_role"] == role}
        return {key: row for key, row in rows.items() if name == "likeness" or (key in answered and row["log_prob"] is not None)}

    def _opinions(
        self, role: str, chat: ChatFormat, comparer: Callable[[], Comparer], traces: list[Row], told: Sequence[Targets | None]
    ) -> list[Row]:
        """Rows of the table `likeness`, without chrF."""
        found: list[Row] = []
        asked: dict[int, Asked] = {}
        for place, (trace, thoughts) in enumerate(zip(traces, told, strict=True)):
            found.append({"model_role": role, "prompt_id": trace["prompt_id"], "sample_index": trace["sample_index"], "reason": _UNFIT})
            row = whole(chat, trace, thoughts if role != "teacher" else None)
            if row is not None and (thoughts is not None or self.source is None):
                asked[place] = row
        assert self.asked is not None
        read = comparer().read(list(asked.values()), self.asked.batch_size) if asked else []
        for (place, row), opinion in zip(asked.items(), read, strict=True):
            found[place] |= {"reason": None, "num_bytes": len(traces[place]["completion"].encode()), **sums(row, opinion)}
        return found

    def _certainty(self, role: str, chat: ChatFormat, comparer: Callable[[], Comparer], traces: list[Row]) -> list[Row]:
        """Rows of the table `certainty`."""
        found = [{"model_role": role, "prompt_id": row["prompt_id"], "sample_index": row["sample_index"]} for row in traces]
        asked = {place: row for place, trace in enumerate(traces) if (row := _final(chat, trace)) is not None}
        read = comparer().read(list(asked.values())) if asked else []
        for place, opinion in zip(asked, read, strict=True):
            found[place] |= {"num_tokens": len(opinion.log_probs), "log_prob": float(opinion.log_probs.sum())}
        return found

    def _refuse_nothing(self, rows: list[Row]) -> None:
        if self.asked is None or any(row["reason"] is None for row in rows):
            return
        raise DataError(
            f"evaluate.likeness: not one of the teacher's {len(self.theirs):,} answers can be given to the student: their templates don't "
            "think alike. Let both think, or neither (chat_template_kwargs), or leave likeness out."
        )


def _written(everything: pa.Table, role: str) -> pa.Table:
    """The answers of a model that did not fail."""
    return everything.filter(pc.and_(pc.equal(everything["author"], role), pc.not_equal(everything["finish_reason"], "error")))


@contextmanager
def _lazily(make: Callable[[], Comparer]) -> Iterator[Callable[[], Comparer]]:
    """A model that is loaded when it is first asked, and is out of memory behind the context."""
    loaded: list[Comparer] = []

    def comparer() -> Comparer:
        if not loaded:
            loaded.append(make())
        return loaded[0]

    try:
        yield comparer
    finally:
        loaded.clear()
        free_memory()


def _answers(answers: pa.Table) -> dict[Key, str]:
    """The texts behind the reasoning, by prompt and sample."""
    return {_key(row): _text(row) for row in answers.select(["prompt_id", "sample_index", "completion"]).to_pylist()}


def _alike(theirs: Row, texts: dict[Key, str]) -> float | None:
    """The chrF of a model's answer to the teacher's; null where it failed, or where the teacher has none behind its reasoning."""
    own, wanted = texts.get(_key(theirs)), _text(theirs)
    return None if own is None or not wanted else chrf(own, wanted)


def _text(trace: Row) -> str:
    return (answer_of(trace["completion"]) or "").strip()


def _final(chat: ChatFormat, trace: Row) -> Asked | None:
    """The tokens behind the reasoning; null where no answer stands there: reasoning that was cut is none."""
    return final(chat, trace) if _text(trace) else None


def _key(row: Row) -> Key:
    return row["prompt_id"], row["sample_index"]


def _at(earlier: Path, numbers: list[int]) -> dict[Key, Targets | None]:
    """Thoughts of an earlier reading."""
    rows = list(rows_at(earlier, "thoughts", sorted(numbers)))
    if not rows:
        return {}
    return dict(zip(map(_key, rows), unpacked(pa.RecordBatch.from_pylist(rows, schema=THOUGHT)), strict=True))
