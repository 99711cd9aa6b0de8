"""Renders the kit's templates. HTML is escaped by jinja2, Markdown's markup by `md`; no control character reaches either."""

from __future__ import annotations

import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from distill.errors import visible


def render(template: str, **values: Any) -> str:
    """A template of `distill/reporting/templates` with these values; a value it misses is an error.

    Args:
        template: File name; `.html.j2` is escaped as HTML.
        values: What it shows.
    """
    environment = Environment(
        loader=PackageLoader("distill.reporting"),
        autoescape=lambda name: bool(name and name.endswith(".html.j2")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    environment.filters |= {"md": markdown_text, "fenced": fenced, "excerpt": excerpt, "sentence": sentence}
    return environment.get_template(template).render(**values)


def markdown_text(value: Any) -> str:
    """Text that Markdown shows as it is: on one line, with nothing taken for markup or mathematics."""
    return re.sub(r"([\\`*_{}\[\]<>|#&$~])", r"\\\1", " ".join(visible(str(value)).split()))


def sentence(text: str) -> str:
    """A clause as the beginning of a sentence; the rest of it as it is."""
    return text[:1].upper() + text[1:]


def excerpt(text: str, length: int = 1500) -> str:
    """The beginning of a long text, and how much of it is left out."""
    return text if len(text) <= length else f"{text[:length]} ... ({len(text) - length:,} more characters)"


def fenced(text: str, language: str = "") -> str:
    """A Markdown code block, with a fence longer than any run of backticks in the text."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
