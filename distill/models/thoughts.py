"""Where a prompt has opened a thought, what is left of an answer to be written behind it."""

from __future__ import annotations

import re
from typing import Any

from distill.errors import ModelError, visible
from distill.run.schema import THINK_CLOSE, THINK_OPEN


def opening_of(prompt: str) -> str:
    r"""What a prompt has already written of the answer: `<think>\n` for some families, else ``."""
    match = re.search(rf"{THINK_OPEN}\s*\Z", prompt)
    return match.group() if match else ""


def after(opening: str, completion: str) -> str:
    """What is left of a completion to be written behind what the template has opened, with whatever space is its own."""
    thought = completion.lstrip()
    if not opening or not thought.startswith(THINK_OPEN):
        return completion
    rest, space = thought.removeprefix(THINK_OPEN), opening.removeprefix(THINK_OPEN)
    same = next((place for place, pair in enumerate(zip(rest, space, strict=False)) if pair[0] != pair[1]), min(len(rest), len(space)))
    return rest[same:]


def rest_of(prompt: str, trace: dict[str, Any]) -> str:
    """What is left of a trace's completion to be written behind its prompt.

    Raises:
        ModelError: a thought would be opened twice, or never closed.
    """
    opening, completion = opening_of(prompt), trace["completion"]
    rest = after(opening, completion)
    opens = rest.lstrip().startswith(THINK_OPEN)
    fault = advice = ""
    if opens and opening:
        fault, advice = f"opens a thought that the chat template has opened ({opening!r} ends the prompt)", "Take one of the two out"
    elif opens and prompt.rstrip().endswith(THINK_CLOSE):
        fault = "opens a thought behind the one that the chat template has closed"
        advice = "Let the template think (chat_template_kwargs), or take the reasoning out of the traces"
    elif (opening or opens) and THINK_CLOSE not in rest and trace.get("finish_reason") != "length":
        fault = "never closes the thought that " + ("the chat template has opened" if opening else "it opens")
        advice = "Use a template that opens none, traces that think, or curate.checks with think, which drops such traces"
    if fault:
        asked = visible(trace["messages"][-1]["content"], 60)
        raise ModelError(f"the answer to {asked!r} {fault}: {visible(completion, 60)!r}. {advice}.")
    return rest
