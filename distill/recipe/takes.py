"""What a key of the recipe takes, by its type: whether a word given for it is text as it stands, and what lies below it."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import AfterValidator, BaseModel
from pydantic.fields import FieldInfo

from distill.recipe.base import TrainerArgs, located_in
from distill.recipe.experiment import Recipe
from distill.recipe.trainer_args import ConfigName, annotation_of, trainer_fields


class Takes(NamedTuple):
    """What may stand at a place of the recipe."""

    annotations: tuple[Any, ...]
    """Types that stand for each other; none where anything is taken, or nothing is known."""

    @property
    def text(self) -> bool:
        """Whether a word is text, whatever it looks like: no number, yes or no is taken here."""
        kinds = self._kinds()
        return str in kinds and not kinds & {int, float, bool, Any}

    @property
    def null(self) -> bool:
        """Whether null is taken."""
        return type(None) in self._kinds()

    @property
    def sections(self) -> bool:
        """Whether a list or a mapping is taken."""
        return bool(self._kinds() & {list, dict, Any})

    def _kinds(self) -> set[Any]:
        return {kind for annotation in self.annotations for kind in _kinds(annotation)} or {Any}

    def item(self) -> Takes:
        """What the items of a list are."""
        inner = (typing.get_args(part) for part in self._parts() if typing.get_origin(part) in (list, tuple))
        return Takes(tuple(arguments[0] for arguments in inner if arguments))

    def under(self, name: str) -> Takes:
        """What stands under a name of a mapping, or at a number of a list."""
        found: list[Any] = [*self.item().annotations] if name.isdecimal() else []
        for part in self._parts():
            if isinstance(part, type) and issubclass(part, BaseModel) and name in part.model_fields:
                found.append(_with_place(part.model_fields[name]))
            elif part is _TRAINER_ARGS:
                found += _of_trainer(name)
            elif typing.get_origin(part) is dict:
                found.append(typing.get_args(part)[1])
        return Takes(tuple(found))

    def _parts(self) -> Iterator[Any]:
        for annotation in self.annotations:
            yield from _parts(annotation)


_TRAINER_ARGS = TrainerArgs
_CONFIGS: tuple[ConfigName, ...] = typing.get_args(ConfigName)


def takes_of_recipe(path: tuple[str, ...]) -> Takes:
    """What stands in a recipe under a path of names."""
    takes = Takes((Recipe,))
    for name in path:
        takes = takes.under(name)
    return takes


def _with_place(info: FieldInfo) -> Any:
    """A field's type, with the mark of a trainer's arguments, which pydantic keeps beside it."""
    marked = any(isinstance(item, AfterValidator) and item.func is located_in for item in info.metadata)
    return _TRAINER_ARGS if marked else info.annotation


def _of_trainer(name: str) -> list[Any]:
    """Types of a field in the config classes that have it; the method, which decides the class, may stand below."""
    fields = (trainer_fields(config).get(name) for config in _CONFIGS)
    # What isn't built in are enumerations of the library's, which are written as text.
    return [annotation_of(field.annotation, unknown=str) for field in fields if field is not None]


def _parts(annotation: Any) -> Iterator[Any]:
    """The types that a union is made of."""
    if annotation is _TRAINER_ARGS:
        yield annotation
    elif typing.get_origin(annotation) is typing.Annotated:
        yield from _parts(typing.get_args(annotation)[0])
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for part in typing.get_args(annotation):
            yield from _parts(part)
    else:
        yield annotation


def _kinds(annotation: Any) -> Iterator[Any]:
    """`str`, `int`, `float`, `bool`, `list`, `dict`, the type of null, or `Any`."""
    for part in _parts(annotation):
        origin = typing.get_origin(part)
        if part is _TRAINER_ARGS or (isinstance(part, type) and issubclass(part, BaseModel)):
            yield dict
        elif origin is typing.Literal:
            yield from (type(value) for value in typing.get_args(part))
        elif origin in (list, tuple) or part in (list, tuple):
            yield list
        elif origin is dict or part is dict:
            yield dict
        else:
            yield part
