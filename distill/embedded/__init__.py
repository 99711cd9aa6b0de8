"""The tiny pair shipped with the kit: a teacher, a base student and problems, for a first run without a network.

`scripts/build_tiny_pair.py` makes them; `RECORD.json` says from which seeds, with which accuracies and digests.
"""

from __future__ import annotations

from pathlib import Path

from distill.errors import DataError

_FOLDER = Path(__file__).resolve().parent
_PREFIX = "embedded:"
_FILES = {"teacher": "teacher", "student": "student", "arithmetic": "problems.jsonl"}


def resolve(name: str) -> str:
    """The path that a name such as `embedded:teacher` stands for; any other name unchanged.

    Raises:
        DataError: nothing of that name is embedded.
    """
    if not name.startswith(_PREFIX):
        return name
    key = name.removeprefix(_PREFIX)
    if key not in _FILES:
        raise DataError(f"{name}: nothing of that name is embedded. There are {', '.join(_PREFIX + known for known in _FILES)}.")
    return str(_FOLDER / _FILES[key])
