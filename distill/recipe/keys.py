"""Every key a recipe can have, in plain words: what it takes, its default, what it means; and how to find one."""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from distill.errors import RecipeError
from distill.recipe.base import expanded, located
from distill.recipe.experiment import Recipe
from distill.recipe.learning import Method, config_class
from distill.recipe.trainer_args import KIT_DEFAULTS, RESERVED, annotation_of, trainer_fields

_TRAINER_SECTIONS = ("train.trainer_args", "rollouts.trainer_args")
_WORDS = {str: "text", int: "whole number", float: "number", bool: "yes/no", dict: "mapping", list: "list", Any: "anything"}
_PLACES: dict[Any, str] = {located: "path or name", expanded: "path"}


class KeyInfo(typing.NamedTuple):
    """One key of the recipe."""

    key: str
    kind: str
    """What it takes, in plain words."""
    default: str
    """`required` where there is none."""
    help: str


def keys(
    model: type[BaseModel] = Recipe, prefix: str = "", given: Any = None, listed: list[type[BaseModel]] | None = None
) -> Iterator[KeyInfo]:
    """Every key of the kit's own, depth first, in the order of the sections.

    Args:
        model: The section.
        prefix: Of its keys, with the dot.
        given: What a recipe without this section has in its place.
        listed: Sections in lists that were shown before.
    """
    listed = [] if listed is None else listed
    for name, info in model.model_fields.items():
        key = f"{prefix}{name}"
        default = getattr(given, name) if isinstance(given, model) else info.get_default(call_default_factory=True)
        sections = list(_sections_in(info.annotation))
        is_list = _is_list(info.annotation)
        if not sections or is_list or getattr(sections[0], "shown", False):
            shown = "required" if info.is_required() else _plain(default)
            yield KeyInfo(key, kind_of(info.annotation, info.metadata), shown, info.description or "")
        if is_list and sections:  # those of a list that is there a second time are the same ones
            if sections[0] in listed:
                continue
            listed.append(sections[0])
        found: dict[str, KeyInfo] = {}
        below = f"{key}.NAME." if _is_mapping(info.annotation) else f"{key}."
        for item in (item for section in sections for item in keys(section, below, default, listed)):
            # Sections that stand for each other, such as lora and full, share the key that chooses between them.
            before = found.get(item.key, item)
            found[item.key] = before if before.kind == item.kind else before._replace(kind=_either(before.kind, item.kind))
        yield from found.values()


def trainer_keys(method: str = "sft") -> Iterator[KeyInfo]:
    """What `train.trainer_args` takes with a method, and `rollouts.trainer_args`: the fields of the config class behind it.

    Raises:
        RecipeError: there is no such method.
    """
    methods = typing.get_args(Method)
    if method not in methods:
        raise RecipeError(f"keys: there is no method {method!r}. Give one of {', '.join(methods)}.")
    for section in _TRAINER_SECTIONS:
        config = config_class(typing.cast(Method, method), None) if section.startswith("train") else "SFTConfig"
        for name, field in trainer_fields(config).items():
            if name in RESERVED[config]:
                yield KeyInfo(f"{section}.{name}", "can't be set here", "", RESERVED[config][name])
            else:
                # What isn't built in are enumerations of the library's, which are written as text.
                kind = kind_of(annotation_of(field.annotation, unknown=str))
                yield KeyInfo(f"{section}.{name}", kind, KIT_DEFAULTS.get(name, field.default), field.help)


def find_keys(section: str = "", search: str = "", method: str = "sft") -> list[KeyInfo]:
    """The keys that begin with `section`, or where none does so have it in them; with `search`, those that speak of it.

    The trainer's own fields, some hundred and fifty, are among them where they are asked for: by their section, or by a search.

    Raises:
        RecipeError: there is none.
    """
    own, trainers = list(keys()), list(trainer_keys(method))
    if not search:
        asks_trainer = section.startswith(_TRAINER_SECTIONS)
        found = [info for info in (*own, *(trainers if asks_trainer else ())) if info.key.startswith(section)]
        if found:
            return found
    # The rounds' trainer_args are the same fields once more, and would only be noise in a search.
    wide = [*own, *(info for info in trainers if info.key.startswith("train."))]
    places = [part.casefold() for part in (section, search) if part]
    found = [info for info in wide if all(part in f"{info.key} {info.help}".casefold() for part in places)]
    if not found:
        word = search or section
        close = difflib.get_close_matches(word, {part for info in wide for part in (info.key, *info.key.split("."))}, n=3)
        hint = f"Did you mean {', '.join(close)}?" if close else "`distill keys` lists all."
        raise RecipeError(f"keys: none begins with {word!r} or speaks of it. {hint}")
    return found


def suggest(key: str, loc: Sequence[str] = ()) -> str:
    """What may have been meant by a key that its section doesn't know: one like it there, else one of that name elsewhere.

    Args:
        key: Dotted.
        loc: Where pydantic found it: where sections stand for each other, the chosen one is named behind their key.
    """
    *parents, last = key.split(".")
    siblings, others = _beside(list(loc[:-1]) or parents)
    if last in others:
        asks = siblings[0]
        return f"It goes with {asks} {' or '.join(sorted(others[last]))}, and here {asks} is {loc[-2]}. Leave it out, or change {asks}."
    close = difflib.get_close_matches(last, siblings, n=1)
    if close:
        return f"Did you mean {'.'.join([*parents, close[0]])}?"
    known = [info.key for info in keys()]
    sections = {name.rsplit(".", 1)[0] for name in known if "." in name}
    elsewhere = [name for name in [*known, *sorted(sections)] if name.split(".")[-1] == last and name != key]
    if last in trainer_fields():
        elsewhere.append(f"train.trainer_args.{last}")
    if elsewhere:
        return f"Did you mean {elsewhere[0]}?"
    section = parents[0] if parents and parents[0] in sections else ""
    return f"`distill keys {section}` lists the valid ones.".replace(" `", "`")


def _beside(loc: Sequence[str]) -> tuple[list[str], dict[str, set[str]]]:
    """The keys of the section at a place; and those that it would have if another that stands for it were chosen, with its name."""
    sections: list[type[BaseModel]] = [Recipe]
    others: dict[str, set[str]] = {}
    below_mapping = False
    for name in (part for part in loc if not part.isdecimal()):
        if below_mapping:  # a name of the user's own
            below_mapping = False
            continue
        found = [info for section in sections if (info := section.model_fields.get(name))]
        if found:
            sections, others = list(_sections_in(found[0].annotation)), {}
            below_mapping = bool(sections) and _is_mapping(found[0].annotation)
            continue
        chosen = [section for section in sections if name in _names_of(section)]
        for section in sections:
            for field in section.model_fields if section not in chosen else ():
                others.setdefault(field, set()).update(_names_of(section))
        sections = chosen
    return [name for section in sections for name in section.model_fields], others


def _names_of(section: type[BaseModel]) -> list[str]:
    """The values by which a section is chosen among those that stand for each other."""
    first = next(iter(section.model_fields.values())).annotation
    return [str(value) for value in typing.get_args(first)] if typing.get_origin(first) is typing.Literal else []


def kind_of(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """What a type takes, in plain words: `whole number ≥ 1, or null`, `one of a, b`, `list of text`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return kind_of(arguments[0], arguments[1:])
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, arguments))}" if len(arguments) > 1 else str(arguments[0])
    if origin in (typing.Union, types.UnionType):
        kinds = [kind_of(part, metadata) for part in arguments if part is not type(None)]
        kinds = [kind for kind in dict.fromkeys(kinds) if not (kind == "whole number" and "number" in kinds)]
        return " or ".join(kinds) + (", or null" if type(None) in arguments else "")
    if origin in (list, tuple) and arguments:
        return f"list of {kind_of(arguments[0])}".replace("list of one of", "list of any of")
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return getattr(annotation, "words", "section")
    word = _WORDS.get(origin or annotation, str(getattr(annotation, "__name__", annotation)))
    word = next((_PLACES[item.func] for item in metadata if isinstance(item, AfterValidator) and item.func in _PLACES), word)
    return " ".join(filter(None, (word, _limits(metadata))))


def _limits(metadata: Sequence[Any]) -> str:
    """`≥ 1`, `> 0`, or `in [0, 1)` where both ends are limited."""
    low = high = None
    for item in (part for entry in metadata for part in (entry.metadata if isinstance(entry, FieldInfo) else [entry])):
        if isinstance(item, Ge | Gt):
            low = ("≥", "[", item.ge) if isinstance(item, Ge) else (">", "(", item.gt)
        elif isinstance(item, Le | Lt):
            high = ("≤", "]", item.le) if isinstance(item, Le) else ("<", ")", item.lt)
    if low and high:
        return f"in {low[1]}{low[2]}, {high[2]}{high[1]}"
    return f"{low[0]} {low[2]}" if low else f"{high[0]} {high[2]}" if high else ""


def _either(left: str, right: str) -> str:
    return f"one of {left.removeprefix('one of ')}, {right}"


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The recipe sections inside an annotation such as `Generate | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    else:
        for part in typing.get_args(annotation):
            yield from _sections_in(part)


def _is_list(annotation: Any) -> bool:
    """Whether an annotation is a list, or one is among those that it stands for."""
    inner = typing.get_origin(annotation) in (typing.Annotated, typing.Union, types.UnionType)
    return typing.get_origin(annotation) is list or (inner and any(map(_is_list, typing.get_args(annotation))))


def _is_mapping(annotation: Any) -> bool:
    """Whether sections stand in an annotation under names of the user's own."""
    inner = typing.get_origin(annotation) in (typing.Annotated, typing.Union, types.UnionType)
    return typing.get_origin(annotation) is dict or (inner and any(map(_is_mapping, typing.get_args(annotation))))


def _plain(value: Any) -> str:
    """A default as a recipe would have it."""
    if value is None or value is PydanticUndefined:
        return "null"
    value = to_jsonable_python(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, bool | list | dict) or value == "" else str(value)
