"""How many tokens a trace has, where the check of its length or the measuring asks."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from distill.errors import ModelError
from distill.recipe.experiment import Recipe

if TYPE_CHECKING:
    from distill.models.chat import ChatFormat


class Counted:
    """Tokens of a completion: of its ids, else of its text by its model's tokenizer; null where neither is to be had."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._chats: dict[str, ChatFormat | None] = {}

    def __call__(self, trace: dict[str, Any]) -> int | None:
        """Of a trace with `num_tokens` (null where its ids are not known), `author`, `completion` and `finish_reason`."""
        if trace["num_tokens"] is not None or trace["finish_reason"] == "error":
            count: int | None = trace["num_tokens"]
            return count
        chat = self._chat(trace["author"])
        return None if chat is None else len(chat.completion_ids(trace["completion"], finished=trace["finish_reason"] == "stop"))

    def _chat(self, role: str) -> ChatFormat | None:
        from distill.models.loading import load_chat_format

        if role not in self._chats:
            spec = self._recipe.teacher if role == "teacher" else self._recipe.student
            assert spec is not None  # the recipe was validated
            self._chats[role] = None
            with contextlib.suppress(ModelError):  # of a host
                self._chats[role] = load_chat_format(spec)
        return self._chats[role]
