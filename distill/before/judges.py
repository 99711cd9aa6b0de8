"""Models that judge: whether one that can be reached answers so that its verdict can be read, found by asking it one question."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.before.findings import Findings
from distill.before.servers import all_are_silent, plainly
from distill.checks.fields import as_fields
from distill.checks.judge import CHOICES, GRADES, Case, question_of, question_of_two, vote_of
from distill.errors import ServerError, visible
from distill.recipe.experiment import Recipe
from distill.recipe.judge import Preferences
from distill.recipe.kinds import Judge
from distill.recipe.servers import Server
from distill.stages import run_dir

if TYPE_CHECKING:
    from distill.stages.prompts import Survey

_PATIENCE_S, _RETRIES = 180.0, 1
_NOTHING = "I do not know."


def judges_of(recipe: Recipe) -> dict[str, Judge | Preferences]:
    """The models of a recipe that judge, each once, by where they stand in it."""
    told = recipe.traces is not None and recipe.traces.verdict is not None
    places = {"curate.checks": recipe.curate.checks} if recipe.learns_from_traces and not told else {}
    evaluate = recipe.evaluate
    if evaluate is not None:
        places |= {"curate.checks" if evaluate.checks is None else "evaluate.checks": recipe.checks_of_answers}
        places |= {f"evaluate.sets.{name}.checks": each.checks for name, each in evaluate.sets.items() if each.checks is not None}
    found: dict[str, Judge | Preferences] = {}
    for place, checks in places.items():
        for check in checks:
            if check.judge is not None and check.judge not in found.values():
                found[f"{place}.{check.called}"] = check.judge
    preferences = evaluate.preferences if evaluate is not None else None
    return found | ({} if preferences is None else {"evaluate.preferences": preferences})


def check_judges(recipe: Recipe, survey: Survey, found: Findings, *, here: bool) -> None:
    """A claim for each judge, and one for its server.

    Args:
        recipe: The recipe.
        survey: The prompts, one of which is asked about.
        found: Where it is said.
        here: Whether this machine is the one that the recipe is to be run on.
    """
    for name, judge in judges_of(recipe).items():
        claim, server = f"{name} answers", judge.model.server
        if server is None:
            found.unknown(claim, "the stage loads it")
            continue
        if not found.prove(f"{name}'s server", lambda n=name, s=server: plainly(n, s)):  # type: ignore[misc]
            continue
        no_key = server.key_variable and server.is_hosted and not os.environ.get(server.key_variable)
        if server.is_started:
            found.unknown(claim, "the stage starts it")
        elif server.batch:
            found.unknown(claim, "it answers in batches, of which one may take a day")
        elif no_key:
            reason = f"there is no key in {server.key_variable}"
            found.bad(claim, f"{reason}. Export it.") if here else found.unknown(claim, reason)
        elif not all_are_silent(server, claim, found):
            found.prove(claim, lambda n=name, j=judge, s=server: _asked(recipe, n, j, s, survey.sample[0]))  # type: ignore[misc]


def _asked(recipe: Recipe, name: str, judge: Judge | Preferences, server: Server, row: dict[str, Any]) -> str:
    """Puts a question to a judge, about a prompt's own reference where it has one.

    Raises:
        ServerError: no answer comes, or none whose verdict can be read.
    """
    from distill.engines import Failure, requests_for
    from distill.servers.opening import open_writer

    first = Case("", row["prompt_id"], 0, row["messages"], row["reference"] or _NOTHING, row["reference"], as_fields(row.get("fields")))
    words: tuple[str, ...]
    if isinstance(judge, Judge):
        messages, words = question_of(judge, first), GRADES
    else:
        messages, words = question_of_two(judge, first, first._replace(completion=_NOTHING)), CHOICES
    patience = {"max_retries": _RETRIES, "timeout_s": min(server.timeout_s, _PATIENCE_S)}
    spec = judge.model.model_copy(update={"server": server.model_copy(update=patience)})
    requests = requests_for([row | {"messages": messages}], 1, recipe.seed)
    with tempfile.TemporaryDirectory(prefix="distill-judge-") as place:
        how: dict[str, Any] = {"section": name, "spec": spec}
        with open_writer(recipe, name, judge.sampling, Path(place), run_dir(recipe), **how) as writer:
            [written] = [result for ended in writer.engine.write(requests) for _, result in ended]
    if isinstance(written, Failure):
        raise ServerError(f"a question failed: {written.reason} ({visible(written.detail, 200)}). Mend the server, or take another.")
    vote = vote_of(written.text, written.finish_reason, words)
    if vote.word is None:
        raise ServerError(
            f"no verdict can be read from its reply ({vote.reason}), which ends in {visible(written.text[-120:], 120)!r}. Take another "
            f"model, or raise max_new_tokens ({judge.max_new_tokens:,})."
        )
    return f"{vote.word}, because: {visible(vote.reason, 120)}" if vote.reason else vote.word
