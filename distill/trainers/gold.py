"""GOLD, TRL's on-policy distillation across tokenizers, with three things put right.

TRL's trainer shows the teacher the prompt in the student's template, reads the student's end of a turn to it letter by letter, and
scales its loss with gradient accumulation. Here the teacher reads its own template, both ends of a turn are one aligned token,
and the loss is the mean over the rows of a step however they are split.
"""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import torch
from datasets import Dataset
from trl.experimental.gold import GOLDTrainer

from distill.models.chat import IGNORE, ChatFormat


class CrossTokenizerTrainer(GOLDTrainer):
    """The student writes, the teacher reads the same text in its own tokens, and the two are aligned by bytes.

    Args:
        pair: The student's and the teacher's tokenizer and template.
        train_dataset: With columns `prompt` (the student's text), `completion` (any) and `teacher_prompt` (the teacher's text).
        common: What GOLD is given besides.
    """

    # A mean over rows, which TRL takes for one over the tokens of the whole step.
    loss_is_scaled_for_ga: Any = False

    def __init__(self, *, pair: tuple[ChatFormat, ChatFormat], train_dataset: Dataset, **common: Any) -> None:
        student, teacher = pair
        ids = student.tokenizer(train_dataset["prompt"][:], add_special_tokens=False)["input_ids"]
        self._teacher_prompts = dict(zip(map(tuple, ids), train_dataset["teacher_prompt"], strict=True))
        tokenizer = copy.deepcopy(teacher.tokenizer)
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(teacher.end_of_turn_id)  # what GOLD ends the teacher's text with
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            common["args"].teacher_tokenizer_name_or_path = folder
            super().__init__(train_dataset=train_dataset.remove_columns("teacher_prompt"), **common)
        common["args"].teacher_tokenizer_name_or_path = teacher.tokenizer.name_or_path
        self._student = student

    def _maybe_add_completion_byte_offsets(self, updated_slice: dict[str, Any]) -> None:
        """Called by TRL on every batch the student has written, before the teacher reads it; here it is put right."""
        super()._maybe_add_completion_byte_offsets(updated_slice)
        offsets = updated_slice.get("byte_offsets")
        completions, lengths, cut = [], [], []
        pairs = zip(updated_slice["input_ids"].tolist(), updated_slice["labels"].tolist(), strict=True)
        for row, (row_ids, row_labels) in enumerate(pairs):
            places = [place for place, label in enumerate(row_labels) if label != IGNORE]
            ended = bool(places) and row_ids[places[-1]] in self._student.stop_ids
            written = places[:-1] if ended else places
            completions.append(self._student.tokenizer.decode([row_ids[place] for place in written], clean_up_tokenization_spaces=False))
            if ended and offsets is not None:
                offsets[row, places[-1]] = offsets[row, places[-1], 0]  # no bytes of the text, as TRL counts the teacher's end
            lengths.append(len(places))
            cut.append(not ended)
        prompts = [
            tuple(row_ids[mask.bool()].tolist())
            for row_ids, mask in zip(updated_slice["prompts"], updated_slice["prompt_attention_mask"], strict=True)
        ]
        updated_slice["original_completion_text"] = completions
        updated_slice["original_prompt_text"] = [self._teacher_prompts[prompt] for prompt in prompts]
        self._count(lengths, cut, sum(map(len, prompts)))

    def _count(self, lengths: list[int], cut: list[bool], prompt_tokens: int) -> None:
        """Logs under the names of TRL's other on-policy trainers how long the completions are and how many were cut off."""
        device = self.accelerator.device
        mean_length, clipped = (torch.tensor(values, dtype=torch.float32, device=device).mean() for values in (lengths, cut))
        tokens = torch.tensor(sum(lengths) + prompt_tokens, device=device)
        mean_length, clipped, tokens = (self.accelerator.gather(value) for value in (mean_length, clipped, tokens))
        self._metrics["train"]["completions/mean_length"].append(mean_length.mean().item())
        self._metrics["train"]["completions/clipped_ratio"].append(clipped.mean().item())
        self.state.num_input_tokens_seen += int(tokens.sum().item())
