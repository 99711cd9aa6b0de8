"""A judge behind a server, for tests: it passes answers that hold a word, and prefers those that do; what it is asked is kept."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from answering import Answering

GOOD = "certainly"
_BETWEEN = r"<({})-(\w{{8}})>\n(.*?)\n</\1-\2>"


def shown(content: str, name: str) -> str:
    """What a question shows between the marks of a name."""
    found = re.search(_BETWEEN.format(name), content, re.DOTALL)
    assert found is not None, content
    return found[3]


def by_word(content: str, count: int) -> str:
    """The verdict of a judge that is sure of itself."""
    if "<A-" not in content:
        return "pass" if GOOD in shown(content, "answer") else "fail"
    first, second = (GOOD in shown(content, name) for name in ("A", "B"))
    return "tie" if first == second else "A" if first else "B"


def first_is_better(content: str, count: int) -> str:
    """That of one which likes what stands first."""
    return "A"


@dataclass
class Judging(Answering):
    """`verdict` says what it answers, by the question and its number; what is no verdict is its whole reply."""

    verdict: Callable[[str, int], str] = by_word
    questions: list[str] = field(default_factory=list)

    def _written(self, body: dict[str, Any]) -> tuple[str, int, str]:
        content = body["messages"][-1]["content"]
        self.questions.append(content)
        word = self.verdict(content, len(self.questions))
        if word not in ("pass", "fail", "unclear", "A", "B", "tie"):
            return word, 3, "stop"
        return f"It says so.\n{json.dumps({'reason': 'it says so', 'verdict': word})}", 12, "stop"

    def asked_of(self, content: str) -> int:
        """How often a question was put so far."""
        return self.questions.count(content)

    def model_section(self, **server: Any) -> dict[str, Any]:
        """The judge as a recipe names it."""
        where = {"kind": "openai", "url": f"{self.url}/v1", "model": self.model, "price": {"input": 1.0, "output": 2.0}}
        return {"model": "some/judge", "server": where | server}
