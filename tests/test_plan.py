"""What is asked against what is there: equal, growing, refused; and a folder that grows survives a kill at any step."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from distill.errors import StageConflictError
from distill.run.folder import StageFolder
from distill.run.manifest import MANIFEST, PLAN, read_manifest
from distill.run.owned import EARLIER
from distill.run.plan import NO_LIMIT, Growth, StagePlan, relation
from distill.run.tables import read_rows

NUMBERS = pa.schema([("number", pa.int64())])
GROWTH = Growth(rising={"count": 0, "limit": NO_LIMIT}, free=frozenset({"source"}))


def plan_of(path: Path, inputs: tuple[Path, ...] = (), growth: Growth = GROWTH, **settings: Any) -> StagePlan:
    return StagePlan(path, "numbers", {"count": 3} | settings, inputs, growth, {"name": "x"})


def make(plan: StagePlan) -> list[int]:
    """Numbers below `count`; those that were there before are taken over, and returned."""
    with StageFolder(*plan) as out:
        if out.complete:
            return []
        before = [row["number"] for row in read_rows(out.earlier, "numbers")] if out.earlier else []
        out.write_table("numbers", [{"number": number} for number in range(plan.settings["count"])], NUMBERS)
        out.finish()
        return before


@pytest.mark.parametrize(
    "changed, kind, clause",
    [
        ({}, "complete", None),
        ({"count": 5}, "grows", "count is 3 there and 5 here"),
        ({"count": 2}, "refused", "count is 3 there and 2 here"),
        ({"limit": None}, "grows", "limit is 10 there and None here"),
        ({"limit": 4}, "refused", "limit is 10 there and 4 here"),
        ({"source": "b" * 64}, "grows", "source: its content has changed"),
        ({"count": 5, "colour": "red"}, "refused", "colour is 'blue' there and 'red' here"),
    ],
)
def test_only_what_adds_may_change(tmp_path: Path, changed: dict[str, Any], kind: str, clause: str | None) -> None:
    plan = plan_of(tmp_path / "n", limit=10, source="a" * 64, colour="blue")
    assert relation(plan).kind == "new"
    make(plan)
    found = relation(plan._replace(settings=plan.settings | changed))
    assert found == (kind, [clause] if clause else [])


def test_a_folder_grows_from_what_is_there(tmp_path: Path) -> None:
    make(plan_of(tmp_path / "n"))
    first = read_manifest(tmp_path / "n")
    assert first.made_with == {"name": "x"} and first.grew_from == []
    assert make(plan_of(tmp_path / "n", count=5)) == [0, 1, 2]
    second = read_manifest(tmp_path / "n")
    assert second.grew_from == [first.digest] and second.rows("numbers") == 5
    assert make(plan_of(tmp_path / "n", count=6)) == [0, 1, 2, 3, 4]
    assert read_manifest(tmp_path / "n").grew_from == [second.digest, first.digest]
    assert not (tmp_path / "n" / EARLIER).exists()  # all of it is a part of what is there now


def test_what_was_made_from_it_grows_in_its_turn(tmp_path: Path) -> None:
    first, second = plan_of(tmp_path / "first"), plan_of(tmp_path / "second", (tmp_path / "first",))
    make(first)
    make(second)
    make(plan_of(tmp_path / "first", count=4))
    assert relation(second) == ("grows", ["first/ has grown since"])
    shutil.rmtree(tmp_path / "first")
    make(plan_of(tmp_path / "first", count=7))
    assert relation(second) == ("refused", ["first/ has changed since"])
    assert relation(second._replace(growth=Growth(other_inputs=True))).kind == "grows"


def test_a_student_is_made_anew_and_the_one_before_is_kept(tmp_path: Path) -> None:
    growth = Growth(rising={"count": 0}, adds=False)
    make(plan_of(tmp_path / "n", growth=growth))
    make(plan_of(tmp_path / "n", count=4, growth=growth))
    make(plan_of(tmp_path / "n", count=5, growth=growth))
    assert read_manifest(tmp_path / "n").grew_from == []  # what was made from the one before can't go on
    assert read_manifest(tmp_path / "n" / EARLIER).rows("numbers") == 4
    assert read_manifest(tmp_path / "n" / EARLIER / EARLIER).rows("numbers") == 3


class Killed(BaseException):
    """As a kill is: nothing may catch it."""


@pytest.mark.parametrize("step", range(7))
def test_a_kill_while_the_folder_begins_to_grow_loses_nothing(tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before each renaming in turn, it goes on; and nobody takes it for finished meanwhile."""
    make(plan_of(tmp_path / "n"))
    asked, renamed, rename = plan_of(tmp_path / "n", count=5), [0], Path.rename

    def counted(self: Path, target: Path) -> Path:
        if renamed[0] == step:
            raise Killed
        renamed[0] += 1
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", counted)
    try:
        with StageFolder(*asked):
            pass
    except Killed:
        assert (tmp_path / "n" / PLAN).exists()
    monkeypatch.undo()
    try:
        assert make(plan_of(tmp_path / "n")) == []  # it comes back, as nothing was made yet
    except StageConflictError as refused:
        assert "is under way with other settings or inputs: count is 5 there and 3 here" in str(refused)
    assert make(asked) == [0, 1, 2]
    assert relation(asked).kind == "complete" and not (tmp_path / "n" / EARLIER).exists()


def test_a_kill_between_the_manifest_and_the_end_of_the_plan_is_the_end(tmp_path: Path) -> None:
    first, second = plan_of(tmp_path / "n"), plan_of(tmp_path / "n", count=5)
    for plan, before in ((first, []), (second, [0, 1, 2])):
        with StageFolder(*plan) as out:
            assert (read_rows(out.earlier, "numbers") if out.earlier else []) == [{"number": number} for number in before]
            out.write_table("numbers", [{"number": number} for number in range(plan.settings["count"])], NUMBERS)
            left = (tmp_path / "n" / PLAN).read_bytes()
            out.finish()
        (tmp_path / "n" / PLAN).write_bytes(left)
        assert relation(plan).kind == "complete"
        with StageFolder(*plan) as out:
            assert out.complete
    assert relation(plan_of(tmp_path / "n", count=7)).kind == "grows"
    assert make(plan_of(tmp_path / "n", count=7)) == [0, 1, 2, 3, 4]


def test_a_stage_that_looks_itself_leaves_everything_in_its_place_until_then(tmp_path: Path) -> None:
    growth = Growth(free=frozenset({"source"}), looks_itself=True)
    make(plan_of(tmp_path / "n", source="a", growth=growth))
    asked = plan_of(tmp_path / "n", source="b", growth=growth)
    with pytest.raises(ZeroDivisionError), StageFolder(*asked) as out:
        assert out.earlier == tmp_path / "n"
        raise ZeroDivisionError
    assert relation(plan_of(tmp_path / "n", source="a", growth=growth)).kind == "complete" and not (tmp_path / "n" / PLAN).exists()
    with StageFolder(*asked) as out:
        out.grow()
        assert out.earlier == tmp_path / "n" / EARLIER
    assert make(asked) == [0, 1, 2]


def test_a_plan_of_which_nothing_was_made_binds_nobody(tmp_path: Path) -> None:
    with StageFolder(*plan_of(tmp_path / "n")):
        pass
    assert relation(plan_of(tmp_path / "n", count=1)).kind == "new"
    assert relation(plan_of(tmp_path / "n", count=1), shared=True).kind == "refused"
    assert not (tmp_path / "n" / MANIFEST).exists()


def test_what_was_there_comes_back_if_it_is_asked_for_before_anything_was_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the way back was cut short; what was added meanwhile is not thrown away for it."""
    old, more = plan_of(tmp_path / "n"), plan_of(tmp_path / "n", count=5)
    make(old)
    before = read_manifest(tmp_path / "n")
    for kills in (0, 1, 2, 3):
        with pytest.raises(ZeroDivisionError), StageFolder(*more):
            raise ZeroDivisionError  # the model could not be loaded, say
        left, rename = [kills], Path.rename

        def counted(self: Path, target: Path, left: list[int] = left, rename: Any = rename) -> Path:
            if not left[0]:
                raise Killed
            left[0] -= 1
            return rename(self, target)  # type: ignore[no-any-return]

        if kills:
            monkeypatch.setattr(Path, "rename", counted)
            with contextlib.suppress(Killed):
                StageFolder(*old).__enter__()
            monkeypatch.undo()
        assert make(old) == [] and read_manifest(tmp_path / "n") == before
        assert not (tmp_path / "n" / PLAN).exists() and not (tmp_path / "n" / EARLIER).exists()
    with pytest.raises(ZeroDivisionError), StageFolder(*more) as out:
        out.journal().append([{"paid": 1}])
        raise ZeroDivisionError
    with pytest.raises(StageConflictError, match=r"count is 5 there and 3 here.* comes back if it is asked for"):
        StageFolder(*old).__enter__()
    assert make(more) == [0, 1, 2]


def test_nothing_comes_back_while_others_work_on_parts(tmp_path: Path) -> None:
    """A process that reads its first batch has left no file but the lock of its part."""
    old, more = plan_of(tmp_path / "n"), plan_of(tmp_path / "n", count=5)
    make(old)
    with StageFolder(*more, part="0-of-2"):
        with pytest.raises(StageConflictError, match="count is 5 there and 3 here"):
            StageFolder(*old).__enter__()
        assert (tmp_path / "n" / EARLIER / MANIFEST).exists()
