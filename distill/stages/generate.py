"""Stage `generate`: the teacher writes traces for the training prompts, here or behind a server. Reads prompts/, writes traces/."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.errors import DataError
from distill.recipe.experiment import Recipe
from distill.recipe.traces import Generate
from distill.run.clock import Clock
from distill.run.folder import StageFolder
from distill.run.manifest import MANIFEST, Manifest, read_manifest
from distill.run.owned import EARLIER
from distill.run.parts import (
    WHOLE,
    Part,
    begun,
    gathered_facts,
    missing,
    num_tokens,
    part_facts,
    part_folders,
    run_part,
    write_part,
)
from distill.run.plan import Growth, StagePlan, name_in_run
from distill.run.schema import ALTERNATIVES, DROPPED_TRACE, TRACE
from distill.run.tables import iter_rows, rows_at
from distill.stages import Step, folder, open_stage, plan_of, run_dir

if TYPE_CHECKING:
    from distill.engines import TraceTable
    from distill.engines.earlier import EarlierTraces

_COLUMNS = ["prompt_id", "messages", "reference"]


def plan(recipe: Recipe) -> StagePlan:
    """What the stage is asked to make: samples of all prompts and, where a curation has found unsolved ones, more of these."""
    assert recipe.teacher is not None and recipe.generate is not None  # the recipe was validated
    further = _further(recipe, recipe.generate)
    settings = {"teacher": recipe.teacher.identity(), "generate": recipe.generate.identity() | further, "seed": recipe.seed}
    rising = {} if further else {"generate.samples_per_prompt": 0}  # the temperature of each sample follows from its number
    growth = Growth(rising, free=frozenset(f"generate.unsolved{name}" for name in ("", ".passes", ".samples", ".after")))
    return plan_of(recipe, Step("generate"), settings, [folder(recipe, "prompts")], growth)


def _further(recipe: Recipe, sampling: Generate) -> dict[str, Any]:
    """What is asked for beyond samples of all prompts: that of what is there, or, by a curation of it, one pass more.

    A pass writes for the unsolved prompts that have the fewest samples, so that all it writes has one temperature. While it is under way
    the curation stands as it was, so that a restart asks for the same.
    """
    place, curated = folder(recipe, "generate"), folder(recipe, "curate")
    there = next((read_manifest(each) for each in (place, place / EARLIER) if (each / MANIFEST).exists()), None)
    if there is None or "generate" not in there.settings:  # brought traces stood there: that is refused elsewhere
        return {}
    before: dict[str, Any] = there.settings["generate"].get("unsolved", {})
    if sampling.unsolved is not None and (curated / MANIFEST).exists():
        verdicts, prompts = read_manifest(curated), folder(recipe, "prompts")
        is_last = (prompts / MANIFEST).exists() and there.inputs == {name_in_run(prompts): read_manifest(prompts).digest}
        if is_last and verdicts.inputs.get(name_in_run(place)) == there.digest:
            fewest = min((int(samples) for samples in verdicts.facts.get("unsolved", {})), default=sampling.unsolved.max_samples)
            if fewest < sampling.unsolved.max_samples:
                before = {"passes": before.get("passes", 0) + 1, "samples": fewest, "after": verdicts.digest}
    temperatures = sampling.unsolved.temperatures if sampling.unsolved is not None else None
    return {"unsolved": before | {"temperatures": temperatures}} if before else {}


def run(recipe: Recipe) -> Manifest:
    """Writes the table `traces`, a row a prompt and sample, and `dropped`; resumes after the last answer, and finishes parts."""
    asked = plan(recipe)
    with open_stage(recipe, asked) as out:
        if out.manifest:
            return out.manifest
        count = begun(out.path)
        if count is None:
            return _write(recipe, out, out.earlier)
        for part in missing(out.path, count):
            write_part(asked, part, partial(_write, recipe, earlier=out.earlier, part=part))
        return _complete(recipe, out)


def run_shard(recipe: Recipe, part: Part, *, completes: bool = True) -> Manifest | None:
    """Writes one part, and completes the stage if it was the last; else null.

    Args:
        recipe: The recipe.
        part: Which.
        completes: Put all parts together, if it was the last; else another process does.

    Raises:
        StageConflictError: the stage was begun in another number of parts, or another process works on this one.
    """
    asked = plan(recipe)
    with open_stage(recipe, asked, str(part)) as out:
        if out.manifest:
            return out.manifest
        write = partial(_write, recipe, earlier=out.earlier, part=part)
        return run_part(out, asked, part, write, partial(_complete, recipe, out) if completes else None)


def _write(recipe: Recipe, out: StageFolder, earlier: Path | None, part: Part = WHOLE) -> Manifest:
    """The traces of a part of the prompts, into the folder of the stage or of its part."""
    # Imported here, so that a finished stage answers without loading torch.
    from distill.data.licences import licence_of
    from distill.engines.earlier import EarlierTraces, refuse_another
    from distill.servers.opening import open_writer

    teacher, sampling = recipe.teacher, recipe.generate
    assert teacher is not None and sampling is not None  # the recipe was validated
    clock, source = Clock(out.path), folder(recipe, "prompts")
    wanted = range(read_manifest(source).rows("train"))[part.slice]
    more = _More(recipe, sampling, earlier)
    sampling = more.sampling
    with open_writer(recipe, "teacher", sampling, out.path, run_dir(recipe), logprobs=sampling.logprobs, parts=part.count) as writer:
        known = None
        if earlier:
            before = read_manifest(earlier).facts
            refuse_another("teacher", writer.record | writer.rendering, before | before.get("author", {}))  # both have a `server`
            # What failed among the first samples is not asked for at the temperature of later ones.
            known = EarlierTraces(earlier, {"teacher"}, failed=more.passes > 0)
        traces = _table(out, recipe, sampling, known)
        rows = more.asked(rows_at(source, "train", wanted, _COLUMNS))
        further = more.count(rows_at(source, "train", wanted, ["prompt_id"]))
        traces.write(writer.engine, rows, len(wanted), "teacher", "generate", writer.max_failed, further=further)
    facts = {
        "device": writer.device,
        "author": writer.record,
        "licence": licence_of(teacher.model, teacher.licence),
        **writer.rendering,
        "control_ids": sorted(writer.chat.control_ids) if writer.chat is not None else [],
        **writer.spent(),
    }
    return _finish(out, traces, len(wanted), clock.facts(**facts))


def _complete(recipe: Recipe, out: StageFolder) -> Manifest:
    """Puts all parts together: the same tables as if one process had written them."""
    from distill.engines.earlier import EarlierTraces

    assert recipe.generate is not None  # the recipe was validated
    clock, source = Clock(out.path), folder(recipe, "prompts")
    num_prompts, more = read_manifest(source).rows("train"), _More(recipe, recipe.generate, out.earlier)
    traces = _table(out, recipe, more.sampling, EarlierTraces(part_folders(out.path), {"teacher"}, failed=True))
    rows = more.asked(iter_rows(source, "train", columns=_COLUMNS))
    further = more.count(iter_rows(source, "train", columns=["prompt_id"]))
    traces.write(None, rows, num_prompts, "teacher", "generate", further=further, silent=True)
    return _finish(out, traces, num_prompts, gathered_facts(part_facts(out.path), clock))


class _More:
    """How many samples are asked for of each prompt, and how those are drawn that are not there.

    Args:
        recipe: The recipe.
        sampling: Of all prompts.
        earlier: What the stage grows from; null where it begins.
    """

    def __init__(self, recipe: Recipe, sampling: Generate, earlier: Path | None) -> None:
        asked = _further(recipe, sampling).get("unsolved", {}) if earlier is not None else {}
        self.passes: int = asked.get("passes", 0)
        self._samples: dict[str, int] = {}
        """Of prompts that have, or are to have, more than all."""
        self._all = sampling.samples_per_prompt
        self.sampling = sampling
        if earlier is None or not self.passes:
            return
        for table in {"traces", "dropped"} & set(read_manifest(earlier).tables):
            for row in iter_rows(earlier, table, columns=["prompt_id", "sample_index"]):
                if row["sample_index"] >= max(self._all, self._samples.get(row["prompt_id"], 0)):
                    self._samples[row["prompt_id"]] = row["sample_index"] + 1
        if self.passes == read_manifest(earlier).settings["generate"].get("unsolved", {}).get("passes", 0):
            return  # there are more prompts, and the unsolved ones wait for the next curation
        assert sampling.unsolved is not None  # or no pass would be asked for
        fewest = asked["samples"]
        self.sampling = sampling.further(fewest)
        for row in iter_rows(folder(recipe, "curate"), "unsolved"):
            if row["samples"] == fewest:
                self._samples[row["prompt_id"]] = min(fewest + self._all, sampling.unsolved.max_samples)

    def asked(self, prompts: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Rows of prompts with the number of their samples."""
        return (row | {"samples": self._samples.get(row["prompt_id"], self._all)} for row in prompts)

    def count(self, prompts: Iterator[dict[str, Any]]) -> int:
        """Samples of prompts beyond those of all."""
        return sum(row["samples"] - self._all for row in self.asked(prompts)) if self._samples else 0


def _table(out: StageFolder, recipe: Recipe, sampling: Generate, known: EarlierTraces | None) -> TraceTable:
    from distill.engines import TraceTable

    dropped = out.table("dropped", DROPPED_TRACE, resume=True, optional=True)
    alternatives = None if sampling.logprobs is None else out.table("alternatives", ALTERNATIVES, resume=True)
    table = out.table("traces", TRACE, resume=True)
    return TraceTable(table, out.journal(), sampling, recipe.seed, known, dropped=dropped, alternatives=alternatives)


def _finish(out: StageFolder, traces: TraceTable, num_prompts: int, facts: dict[str, Any]) -> Manifest:
    if num_prompts and not traces.num_rows:
        raise DataError(f"{out.path}: not one of {num_prompts:,} prompts was answered ({dict(traces.drops)}). See server.max_failed.")
    written = {"tokens": num_tokens(traces, facts), "finish_reasons": dict(traces.finish_reasons)}
    return out.finish(rows_in=num_prompts, rows_kept=traces.num_rows, drops=dict(traces.drops), facts=facts | written)
