"""What is said to people who are not on this machine: models by a public name, files without their folders, servers without their hosts,
nothing secret.
"""

from __future__ import annotations

from pathlib import PurePath, PureWindowsPath
from typing import Any, get_args
from urllib.parse import urlsplit

from distill.recipe.experiment import Recipe
from distill.recipe.models import ModelSpec
from distill.recipe.secrets import SECRET, is_secret
from distill.recipe.servers import HostedKind

_SERVERS = frozenset({"url", "teacher_server"})
"""Keys with addresses."""
_TEXTS = frozenset({"system_prompt", "template", "answer_pattern", "answer_separator"})  # `/no_think` is no path there
_TEXTS |= {"pattern", "choices", "units", "decimal", "fields", "column", "context", "second_reference", "think_end"}


def file_or_name(value: str) -> str:
    """A name as it is, and of a file or folder that this machine alone has its last part."""
    path = PureWindowsPath(value) if PureWindowsPath(value).drive else PurePath(value)
    return path.name or value if path.is_absolute() or value.startswith((".", "~")) else value


def hide_secrets(text: str) -> str:
    """A text in which `***` stands for what looks like a token or a password."""
    return SECRET.sub("***", text)


def published(value: Any, key: str = "") -> Any:
    """A recipe's values, or a part of them, without folders of this machine and without secrets.

    Args:
        value: As JSON has it.
        key: Under which it stands.
    """
    if key in _SERVERS:
        return _without_hosts(value)
    if isinstance(value, dict):
        if key == "server" and value.get("kind") in get_args(HostedKind) and _are_public(value.get("url")):
            return published(value | {"url": None}) | {"url": value["url"]}
        return {name: "***" if isinstance(item, str) and is_secret(name) else published(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [published(item, key) for item in value]
    if not isinstance(value, str):
        return value
    return hide_secrets(value if key in _TEXTS else file_or_name(value))


def _are_public(urls: Any) -> bool:
    """Whether addresses are those of a host: one's own machines are seldom reached by https."""
    return all(urlsplit(url).scheme == "https" for url in ([urls] if isinstance(urls, str) else urls or []))


def _without_hosts(urls: Any) -> Any:
    """As many addresses, of which none is of a machine of one's own."""
    if isinstance(urls, list):
        return [f"http://server-{number}:8000" for number in range(1, len(urls) + 1)]
    return urls if urls is None else "http://server:8000"


def published_recipe(recipe: Recipe) -> Recipe:
    """A recipe for people elsewhere; whoever repeats it puts in folders of their own, and makes what came from another run by it, too."""
    return Recipe.model_validate(published(recipe.model_dump(mode="json")) | {"inputs": None})


def public_name(spec: ModelSpec) -> str:
    """How a model is called elsewhere."""
    return spec.public_name or file_or_name(spec.model)


def public_names(recipe: Recipe) -> dict[str, str]:
    """Public names of a recipe's models, by the names that they are loaded and recorded by."""
    return {spec.model: public_name(spec) for spec in (recipe.teacher, recipe.student) if spec is not None}
