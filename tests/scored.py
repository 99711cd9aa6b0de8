"""Targets made by hand for tests of training: the dense definition, no stage involved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import build_tiny_model

from distill.models.chat import IGNORE
from distill.models.loading import load_chat_format, load_model
from distill.recipe.models import ModelSpec
from distill.run.folder import StageFolder
from distill.run.manifest import read_manifest
from distill.run.tables import read_rows
from distill.targets import kinds
from distill.targets.codec import Targets
from distill.targets.files import TargetWriter
from distill.targets.spec import ChosenToken, Sampled, TargetHeader, TargetSpec


def peaked_model(path: Path, *, seed: int, hidden_size: int = 32, norm: float = 4.0, padding: int = 0) -> Path:
    """A tiny model with an opinion on every token; one of another seed has another.

    Args:
        path: Where it is saved.
        seed: Of its weights.
        hidden_size: Its width.
        norm: Factor of its logits.
        padding: Rows that are added to its head.
    """
    build_tiny_model(path, seed=seed, hidden_size=hidden_size)
    model: Any = load_model(ModelSpec(model=str(path)), torch.device("cpu"))
    model.resize_token_embeddings(model.config.vocab_size + padding, mean_resizing=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3 if parameter.ndim > 1 else 1
        model.model.norm.weight *= norm
    model.save_pretrained(path)
    return path


def score_by_hand(
    run: Path, teacher: Path, target: TargetSpec, *, table: tuple[str, str] = ("curated", "curated"), holes: int = 0, **header_fields: Any
) -> Path:
    """Writes `targets/` for a run whose student has the teacher's tokenizer, a row at a time through the whole vocabulary.

    Args:
        run: The run, or a round of it.
        teacher: Who scores.
        target: What is stored.
        table: Folder in the run and table of the traces.
        holes: Every so many-th token of a trace gets no target; 0 gives all of them one.
        header_fields: Written into the header in place of the true ones.
    """
    chat = load_chat_format(ModelSpec(model=str(teacher)))
    model = load_model(ModelSpec(model=str(teacher)), torch.device("cpu"))
    vocab_size = max(chat.tokenizer.get_vocab().values()) + 1
    digests = {"tokenizer_digest": chat.tokenizer_digest, "template_digest": chat.template_digest}
    fields: dict[str, Any] = {
        "target": target,
        "vocab_size": vocab_size,
        "teacher_model": str(teacher),
        "teacher_revision": None,
        "traces_digest": read_manifest(run / table[0]).digest,
        **digests,
        **{f"teacher_{name}": value for name, value in digests.items() if f"teacher_{name}" in TargetHeader.model_fields},
    }
    header = TargetHeader(**fields | header_fields)
    with StageFolder(run / "targets", "score", {}, [run / table[0]]) as out:
        shard = out.path / "targets-00000-of-00001.targets"
        with TargetWriter(shard, header) as writer:
            for trace in read_rows(run / table[0], table[1]):
                targets = _targets(model, chat, trace, target, vocab_size)
                writer.append(f"{trace['prompt_id']}/{trace['sample_index']}", _with_holes(targets, holes) if holes else targets)
            writer.close()
        out.finish(files=[shard])
    return run / "targets"


def _with_holes(targets: Targets, every: int) -> Targets:
    ids, log_probs, log_rest = targets.ids.copy(), targets.log_probs.copy(), targets.log_rest.copy()
    ids[::every], log_probs[::every], log_rest[::every] = -1, -np.inf, 0
    return Targets(ids, log_probs, log_rest)


def _targets(model: Any, chat: Any, trace: dict[str, Any], target: TargetSpec, vocab_size: int) -> Targets:
    input_ids, labels = chat.trace_row(trace)
    with torch.no_grad():
        logits = model(torch.tensor([input_ids])).logits[0, :-1]
    supervised = torch.tensor([label != IGNORE for label in labels[1:]])
    written = torch.tensor(input_ids[1:])[supervised]
    logits = logits[supervised]
    if isinstance(target, ChosenToken):
        return kinds.chosen_token(logits, written, vocab_size)
    if isinstance(target, Sampled):
        key = f"{trace['prompt_id']}/{trace['sample_index']}"
        return kinds.sampled(logits, target, vocab_size, kinds.uniforms(target, key, len(logits)))
    return kinds.top_k(logits, target, vocab_size)
