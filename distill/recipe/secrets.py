"""Keeps secrets out of recipes, which are copied into the run's folder, its report and the model card."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from distill.errors import RecipeError, visible

_SECRETS = frozenset(
    {"token", "tokens", "key", "keys", "secret", "secrets", "password", "passwords", "passwd", "credential", "credentials"}
)
# Names that end in such a word and mean something else: entries of a tokenizer, counts, and what is read of a mapping.
_HARMLESS = re.compile(
    r"(bos|eos|pad|unk|sep|cls|mask|sot|eot|eom|think|image|audio|video|vision|boi|eoi|special|start|stop|end|max|min|num|new|sort|label|dict)_"
    r"(tokens?|keys?)$|.*(num|max|min|new|seen|special|all|stop|input|per|extra|additional|prompt|completion)_(\w+_)?(tokens|keys)$"
)
SECRET = re.compile(
    r"\b(hf_|sk-|gh[opsur]_|github_pat_|xox[abprs]-|glpat-|AKIA|AIza)[\w-]{12,}|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
"""Tokens of well-known services, those that name themselves (JWT), and the password in an address."""
_VARIABLES = {"hub": "HF_TOKEN", "hf": "HF_TOKEN", "huggingface": "HF_TOKEN", "wandb": "WANDB_API_KEY", "comet": "COMET_API_KEY"}


def is_secret(name: str) -> bool:
    """Whether a key is called a token, a key, a secret or a password: `hub_token`, `apiKey`, `password`."""
    words = re.sub(r"([a-z])([A-Z])", r"\1_\2", name).replace("-", "_").casefold()
    return words.rsplit("_", 1)[-1] in _SECRETS and not _HARMLESS.match(words)


def _may_be_one(value: Any) -> bool:
    """Whether a value can be secret: not `add_bos_token: true`, `thinking_budget_tokens: 1024` or `bot_token: <bot>`, say."""
    if isinstance(value, list):
        return any(map(_may_be_one, value))
    return isinstance(value, str) and not value.startswith(("<", "[")) and value != ""


def _looks_like_one(text: str) -> bool:
    """Whether a text holds a token or a password, and not a name that only begins so, as a folder `sk-learn-experiments`."""
    return any(found.group(1) is None or any(map(str.isdigit, found.group())) for found in SECRET.finditer(text))


def refuse_secrets(values: Any, place_of: Callable[[Sequence[str]], str], path: tuple[str, ...] = ()) -> None:
    """Looks at every key of a recipe, whatever section it stands in.

    Args:
        values: Of the recipe, or of a part.
        place_of: Says where the key of a path was given.
        path: Of the part.

    Raises:
        RecipeError: a key is called like a secret and has a value, or a text holds what looks like one; the message doesn't show it.
    """
    if isinstance(values, str) and _looks_like_one(values):
        raise RecipeError(
            f"{place_of(path)}: {visible('.'.join(path), 200)}: holds what looks like a token or a password, and a recipe is copied into "
            "the run, its report and the model card. Remove it; tokens are read from environment variables, as HF_TOKEN is."
        )
    if isinstance(values, list):
        for item in values:
            refuse_secrets(item, place_of, path)
    if not isinstance(values, dict):
        return
    for name, value in values.items():
        if is_secret(name) and _may_be_one(value):
            variable = _VARIABLES.get(re.split(r"[_\W]", name.casefold())[0])
            instead = variable or "that its reader knows, such as HF_TOKEN"
            raise RecipeError(
                f"{place_of((*path, name))}: {visible('.'.join((*path, name)), 200)}: a recipe is no place for a secret, because it is "
                f"copied into the run, its report and the model card. Remove it, and set the environment variable {instead}."
            )
        refuse_secrets(value, place_of, (*path, name))
