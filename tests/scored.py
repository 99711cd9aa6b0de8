"""Targets made by hand for tests of training: the dense definition, no stage involved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from distill.chat import IGNORE
from distill.models import load_chat_format, load_model
from distill.recipe import ModelSpec
from distill.storage import StageFolder, read_manifest, read_rows
from distill.targets import kinds
from distill.targets.codec import Targets
from distill.targets.files import TargetWriter
from distill.targets.spec import ChosenToken, Sampled, TargetHeader, TargetSpec


def score_by_hand(run: Path, teacher: Path, target: TargetSpec, *, table: tuple[str, str] = ("curated", "curated")) -> Path:
    """Writes `targets/` for a run whose student has the teacher's tokenizer, a row at a time through the whole vocabulary."""
    chat = load_chat_format(ModelSpec(model=str(teacher)))
    model = load_model(ModelSpec(model=str(teacher)), torch.device("cpu"))
    vocab_size = max(chat.tokenizer.get_vocab().values()) + 1
    digests = {"tokenizer_digest": chat.tokenizer_digest, "template_digest": chat.template_digest}
    header = TargetHeader(
        target=target,
        vocab_size=vocab_size,
        teacher_model=str(teacher),
        teacher_revision=None,
        traces_digest=read_manifest(run / table[0]).digest,
        **digests,
        **{f"teacher_{name}": value for name, value in digests.items() if f"teacher_{name}" in TargetHeader.model_fields},
    )
    with StageFolder(run / "targets", "score", {}, [run / table[0]]) as out:
        shard = out.path / "targets-00000-of-00001.targets"
        with TargetWriter(shard, header) as writer:
            for trace in read_rows(run / table[0], table[1]):
                writer.append(f"{trace['prompt_id']}/{trace['sample_index']}", _targets(model, chat, trace, target, vocab_size))
            writer.close()
        out.finish(files=[shard])
    return run / "targets"


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
