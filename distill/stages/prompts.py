"""Stage `prompts`: reads the problems and splits held-out ones off. Writes prompts/."""

from __future__ import annotations

import hashlib
from collections import Counter

from distill.data.sources import PromptMapping, Row, read_source, source_digest
from distill.errors import DataError
from distill.recipe.experiment import Recipe
from distill.recipe.prompts import Prompts
from distill.run.folder import StageFolder
from distill.run.log import Clock
from distill.run.manifest import Manifest
from distill.run.schema import DROPPED_PROMPT, PROMPT
from distill.stages import folder


def run(recipe: Recipe) -> Manifest:
    """Writes the tables `train`, `heldout` and `dropped`."""
    prompts = recipe.prompts
    settings = {
        "prompts": prompts.identity(),
        "seed": recipe.seed,
        "source_sha256": source_digest(prompts.source),
        "heldout_source_sha256": source_digest(prompts.heldout_source) if prompts.heldout_source else None,
    }
    with StageFolder(folder(recipe, "prompts"), "prompts", settings) as out:
        if out.manifest:
            return out.manifest
        clock = Clock()
        train, heldout, dropped, rows_in = split(prompts, recipe.seed)
        out.write_table("train", train, PROMPT)
        out.write_table("heldout", heldout, PROMPT)
        out.write_table("dropped", dropped, DROPPED_PROMPT)
        return out.finish(
            rows_in=rows_in,
            rows_kept=len(train) + len(heldout),
            drops=dict(Counter(row["reason"] for row in dropped)),
            facts=clock.facts(train=len(train), heldout=len(heldout)),
        )


def split(prompts: Prompts, seed: int) -> tuple[list[Row], list[Row], list[Row], int]:
    """Prompt rows for training, held-out ones, dropped ones with their reason, and the number of rows read.

    Which prompts are held out depends on their content and the seed alone, not on their order in the file.

    Raises:
        DataError: there are fewer prompts than asked for, or none is left to train on.
    """
    rows, dropped, rows_in = _distinct(prompts, prompts.source, prompts.subset, prompts.split)
    if prompts.heldout_source is not None:
        others, dropped_others, others_in = _distinct(prompts, prompts.heldout_source, prompts.subset, prompts.heldout_split)
        heldout, not_drawn = _draw(others, prompts.heldout_size, f"heldout/{seed}", prompts.heldout_source)
        kept_out = {row["prompt_id"] for row in others}
        dropped += [*dropped_others, *_because("not_drawn", not_drawn)]
        dropped += _because("in_heldout_source", [row for row in rows if row["prompt_id"] in kept_out])
        rows = [row for row in rows if row["prompt_id"] not in kept_out]
        rows_in += others_in
    else:
        heldout, rows = _draw(rows, prompts.heldout_size, f"heldout/{seed}", prompts.source)
    if prompts.max_prompts is not None and prompts.max_prompts < len(rows):
        rows, not_drawn = _draw(rows, prompts.max_prompts, f"train/{seed}", prompts.source)
        dropped += _because("not_drawn", not_drawn)
    if not rows:
        raise DataError(f"{prompts.source}: no prompt is left to train on. Lower prompts.heldout_size ({prompts.heldout_size}).")
    return rows, heldout, dropped, rows_in


def _distinct(prompts: Prompts, name: str, subset: str | None, split_name: str) -> tuple[list[Row], list[Row], int]:
    """Mapped rows of a source in their order, each prompt once; dropped ones; and the number read."""
    mapping = PromptMapping(prompts, prompts.columns, name)
    kept: dict[str, Row] = {}
    dropped: list[Row] = []
    source = read_source(name, subset, split_name)
    for number, raw in enumerate(source, start=1):
        row, reason = mapping.prompt_row(raw, number)
        first = kept.get(row["prompt_id"])
        if reason is None and first is not None:
            reason = "duplicate" if first["reference"] == row["reference"] else "duplicate_other_reference"
        if reason is None:
            kept[row["prompt_id"]] = row
        else:
            dropped += _because(reason, [row])
    return list(kept.values()), dropped, len(source)


def _draw(rows: list[Row], count: int, salt: str, name: str) -> tuple[list[Row], list[Row]]:
    """`count` rows of the lowest hash, and the others, both in their order."""
    if count > len(rows):
        raise DataError(f"{name}: prompts.heldout_size asks for {count:,} prompts, but there are {len(rows):,}. Lower it.")
    ranked = sorted((row["prompt_id"] for row in rows), key=lambda identity: hashlib.sha256(f"{salt}/{identity}".encode()).digest())
    drawn = set(ranked[:count])
    return [row for row in rows if row["prompt_id"] in drawn], [row for row in rows if row["prompt_id"] not in drawn]


def _because(reason: str, rows: list[Row]) -> list[Row]:
    return [{**row, "reason": reason} for row in rows]
