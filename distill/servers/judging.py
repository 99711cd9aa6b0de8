"""A model that grades, here or behind a server: questions in, replies out; what was answered is never paid for twice.

Questions go the way of every prompt: the same engine and servers, journal and shards. Replies stay in the stage's folder, as a table of
traces whose author is the judge. A reply belongs to the question of its name, wherever it stands: which questions there are depends on what
other checks find, and after a restart one of them may find something else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distill.checks import Found
from distill.checks.fields import as_fields
from distill.checks.judge import GRADES, Case, Vote, grade_of, question_id, question_of, unasked, vote_of
from distill.engines import TraceTable
from distill.engines.earlier import EarlierTraces
from distill.recipe.checks import Check
from distill.recipe.experiment import Recipe
from distill.recipe.judge import Grader
from distill.recipe.sets import MAIN
from distill.run.folder import StageFolder
from distill.run.journal import Journal
from distill.run.log import say
from distill.run.manifest import Manifest, read_manifest
from distill.run.parts import summed
from distill.run.schema import TRACE, Message
from distill.run.tables import TableWriter, iter_pieces, rows_of
from distill.servers.needs import ROOM_FOR_A_PROMPT, ServerNeeds
from distill.servers.opening import open_writer

_NAMES = ("prompt_id", "sample_index")  # of a reply: its question, and which of the replies to it
_ASKED_NO_MORE = "judges_asked_no_more"  # among a manifest's facts
_UNSAID = Vote(None, "no_reply")
_MANY_SILENT = 0.1  # share of the replies
_PER_TOKEN = 2  # texts that are shown may have so many times the tokens that the author's own tokenizer counts


class Question(NamedTuple):
    """What a judge is asked."""

    name: str
    """Of the question: equal only for equal ones."""
    messages: list[Message]


class Asked(NamedTuple):
    """A judge among the models of a stage."""

    role: str
    """Its name there: that of no model of the recipe's own."""
    table: str
    """Of its replies."""
    doing: str
    """For the progress bar."""
    answers: int = 1
    """That a question shows."""

    @classmethod
    def of_check(cls, name: str, of_set: str = MAIN) -> Asked:
        """The judge that a check of this name is, in a further held-out set one of its own."""
        role = name if name == "judge" else f"judge-{name}"
        further = "" if of_set == MAIN else f"+{of_set}"
        return cls(f"{role}{further}", f"judged_{name}{further}", f"ask {role}{f' of {of_set}' if further else ''}")


class Replies(NamedTuple):
    """What a judge has said of all questions."""

    table: TableWriter
    repeats: int
    facts: dict[str, Any]
    """Of the judge, for the manifest: which model, its terms, what it used, and the table of its replies."""

    def votes(self, words: tuple[str, ...]) -> dict[str, list[Vote]]:
        """By the name of a question what its replies say, without the words for it; those of questions asked no more are there, too."""
        found: dict[str, list[Vote]] = {}
        for piece in self.table.pieces([*_NAMES, "completion", "finish_reason"]):
            for row in piece.to_pylist():
                vote = vote_of(row["completion"], row["finish_reason"], words)
                of_question = found.setdefault(row["prompt_id"], [_UNSAID] * self.repeats)
                of_question[row["sample_index"]] = vote if vote.word is None else Vote(vote.word, "")
        _tell_of_silence([vote for votes in found.values() for vote in votes], self.table.name)
        return found


def _tell_of_silence(votes: Sequence[Vote], table: str) -> None:
    """Says so where many replies say nothing, because then they are few that decide."""
    silent = Counter(vote.reason for vote in votes if vote.word is None)
    if silent.total() > _MANY_SILENT * len(votes):
        named = ", ".join(f"{count:,} {reason}" for reason, count in silent.most_common())
        say(
            f"note      {table}: of {len(votes):,} replies of the judge {named}, so what they are about is not judged. Raise its "
            "max_new_tokens where they are cut; read the table."
        )


def ask(
    recipe: Recipe,
    grader: Grader,
    asked: Asked,
    out: StageFolder,
    run: Path,
    questions: Callable[[], Iterable[Question]],
    number: int,
) -> Replies:
    """Puts questions to a judge, as far as they have not been answered; goes on after a kill, be they others by then.

    Args:
        recipe: The recipe.
        grader: The judge.
        asked: Who the judge is, and where its replies stand.
        out: The stage's folder.
        run: The run's folder.
        questions: All of them.
        number: How many.

    Raises:
        ServerError: more requests failed than the recipe allows.
    """
    role = asked.role
    table = out.table(asked.table, TRACE, resume=True)
    sampling, journal = grader.sampling, out.journal(f"journal-{role}.jsonl")
    answered, begun = _settle(table, journal, grader.repeats)
    if not number:
        return Replies(table, grader.repeats, {})

    def missing() -> Iterator[Question]:
        # What is begun comes first, into the window that the journal is read for.
        yield from (one for one in questions() if one.name in begun) if begun else ()
        yield from (one for one in questions() if one.name not in answered and one.name not in begun)

    left = number - sum(one.name in answered for one in questions()) if answered else number
    needs = ServerNeeds(_PER_TOKEN * _shown(recipe, asked.answers) + sampling.max_new_tokens)
    how: dict[str, Any] = {"section": role, "spec": grader.model, "needs": needs}
    with open_writer(recipe, role, sampling, out.path, run, **how) as writer:
        known = _known(out, asked, writer.record)
        traces = TraceTable(table, journal, sampling, recipe.seed, known, behind=True)
        rows = ({"prompt_id": one.name, "messages": one.messages, "reference": None} for one in missing())
        if left:
            traces.write(writer.engine, rows, left, role, asked.doing, writer.max_failed)
    from distill.data.licences import licence_of

    licence = licence_of(grader.model.model, grader.model.licence)
    facts = {"author": writer.record, "table": asked.table, "licence": licence, "device": writer.device}
    return Replies(table, grader.repeats, {**facts, **writer.rendering, **writer.spent()})


def _settle(table: TableWriter, journal: Journal, repeats: int) -> tuple[set[str], set[str]]:
    """Puts whole what a killed run left in the journal into the table; returns the questions answered, and those with a reply too few.

    The journal is read for the window of requests under way, which is another one where the questions are.
    """
    there = {tuple(row.values()) for piece in table.pieces(_NAMES) for row in piece.to_pylist()}
    waiting = {key for row in journal.rows() if (key := (row["prompt_id"], row["sample_index"])) not in there}
    counts = Counter(name for name, _ in (*there, *waiting))
    answered = {name for name, count in counts.items() if count == repeats}
    begun: list[dict[str, Any]] = []
    for row in journal.rows():
        if (key := (row["prompt_id"], row["sample_index"])) in waiting:
            waiting.remove(key)
            (table if row["prompt_id"] in answered else begun).append(row)
    table.end_shard()
    journal.replace(begun)
    return answered, counts.keys() - answered


Cases = Callable[[], Iterable[tuple[int, Case]]]
"""Numbered traces, as often as they are asked for, in one order."""
CASE = ["author", "prompt_id", "sample_index", "messages", "reference", "completion"]
"""Columns of a table of traces that make a case."""


def case_of(trace: Mapping[str, Any], fields: Mapping[str, Any] | None) -> Case:
    """A row of traces, and the fields of its prompt, as a case."""
    return Case(**{name: trace[name] for name in CASE}, fields=fields or {})


def grade(
    recipe: Recipe, check: Check, out: StageFolder, run: Path, cases: Cases, of_set: str = MAIN
) -> tuple[Iterator[tuple[int, Found]], dict[str, Any]]:
    """What a judge finds of each case, and what is to be known of the judge.

    Args:
        recipe: The recipe.
        check: The judge's.
        out: The stage's folder.
        run: The run's folder.
        cases: Those that the judge is asked of.
        of_set: The held-out set that they belong to.
    """
    judge = check.judge
    assert judge is not None  # whoever asks looks
    known, number_asked, identity = dict[int, Found](), 0, judge.identity()
    for number, case in cases():
        if (verdict := unasked(judge, case)) is not None:
            known[number] = verdict
        else:
            number_asked += 1

    def asked() -> Iterator[tuple[int, Question]]:
        for number, case in cases():
            if number not in known:
                messages = question_of(judge, case)
                yield number, Question(question_id(identity, messages, case), messages)

    who = Asked.of_check(check.called, of_set)
    replies = ask(recipe, judge, who, out, run, lambda: (question for _, question in asked()), number_asked)

    def all_found() -> Iterator[tuple[int, Found]]:
        yield from known.items()
        votes = replies.votes(GRADES)
        yield from ((number, grade_of(votes[question.name])) for number, question in asked())

    return all_found(), replies.facts


def grade_answers(
    recipe: Recipe,
    out: StageFolder,
    run: Path,
    table: TableWriter,
    of_set: str,
    checks: Sequence[Check],
    answers: Sequence[dict[str, Any]],
    prompts: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Has the judges among a set's checks look at answers that no other check has failed; returns what is to be known of each.

    Args:
        recipe: The recipe.
        out: The stage's folder.
        run: The run's folder.
        table: Of the answers as traces.
        of_set: Its name.
        checks: Of its answers.
        answers: To its prompts, a row each; `correct` and `reason` are changed.
        prompts: By their ids, with `fields` where checks look at some.
    """
    facts: dict[str, dict[str, Any]] = {}
    for check in checks:
        if check.judge is None:
            continue
        waiting = {_key(answer, "model_role"): number for number, answer in enumerate(answers) if answer["correct"] is not False}

        def cases(waiting: dict[tuple[str, str, int], int] = waiting) -> Iterator[tuple[int, Case]]:
            for row in (row for piece in table.pieces([*CASE, "finish_reason"]) for row in rows_of(piece)):
                number = waiting.get(_key(row, "author"))
                if number is not None and row["finish_reason"] != "error":
                    yield number, case_of(row, as_fields(prompts[row["prompt_id"]].get("fields")))

        found, facts[Asked.of_check(check.called, of_set).role] = grade(recipe, check, out, run, cases, of_set)
        for number, (passed, reason) in found:
            if passed is False or answers[number]["correct"] is True:
                named = reason if len(checks) == 1 else "right" if passed else f"{check.called}:{reason}"
                answers[number].update(correct=passed, reason=named)
    return facts


def _key(row: Mapping[str, Any], author: str) -> tuple[str, str, int]:
    return row[author], row["prompt_id"], row["sample_index"]


def with_judges(facts: dict[str, Any], judges: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Facts of a stage with those of its judges, whose costs are among the stage's."""
    if not judges:
        return facts
    spent = summed([facts.get("server"), *(judge.get("server") for judge in judges.values())])
    return facts | {"judges": judges} | ({"server": spent} if spent else {})


def carry_over(out: StageFolder, judges: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Keeps the replies of judges that are asked no more where a stage grows: they are paid for. Returns whose, for the manifest.

    Args:
        out: The stage's folder.
        judges: What is known of those that are asked, by their roles.
    """
    if out.earlier is None:
        return {}
    before = read_manifest(out.earlier)
    gone = {role: facts for role, facts in _judges_of(before).items() if role not in judges and facts.get("table") in before.tables}
    for facts in gone.values():
        table = out.table(facts["table"], TRACE)
        for piece in iter_pieces(out.earlier, facts["table"], TRACE.names):
            table.add(piece)
    return {_ASKED_NO_MORE: {role: {name: facts[name] for name in ("author", "table")} for role, facts in gone.items()}} if gone else {}


def is_another(out: StageFolder, judges: Mapping[str, dict[str, Any]]) -> bool:
    """Whether a stage grows from one in which a judge of the same role was another model, or was asked something and is not now."""
    before = _judges_of(read_manifest(out.earlier)) if out.earlier is not None else {}
    return any(role in judges and "author" in facts and judges[role].get("author") != facts["author"] for role, facts in before.items())


def _judges_of(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Whose replies a stage holds, by the judge's role."""
    return {**(manifest.facts.get(_ASKED_NO_MORE) or {}), **(manifest.facts.get("judges") or {})}


def _shown(recipe: Recipe, answers: int) -> int:
    """Tokens of the longest prompt with so many answers, the longest that are shown."""
    written = [each.sampling.max_new_tokens for each in recipe.asked_sets().values()]
    longest = max([*written, recipe.generate.max_new_tokens if recipe.generate is not None else 0])
    return max(recipe.train.max_length, ROOM_FOR_A_PROMPT + longest) + (answers - 1) * longest


def _known(out: StageFolder, asked: Asked, record: dict[str, Any]) -> EarlierTraces | None:
    """What this judge has said before, where the stage grows; of another one nothing."""
    if out.earlier is None:
        return None
    same = _judges_of(read_manifest(out.earlier)).get(asked.role, {}).get("author") == record
    return EarlierTraces(out.earlier, {asked.role}, table=asked.table) if same else None
