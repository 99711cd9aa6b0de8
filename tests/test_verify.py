"""A run that is looked at again: what is missing, altered or extra is named; what is not a stage's is left alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from distill.errors import IntegrityError, StageConflictError
from distill.pipeline import show_report, verify_run
from distill.recipe.experiment import Recipe
from distill.recipe.models import ModelSpec
from distill.run import digests
from distill.run.files import is_whole_record, read_json, write_record
from distill.run.folder import StageFolder, delete_stage
from distill.run.manifest import JOURNAL, MANIFEST, PLAN, SHARDS, check_files, read_manifest
from distill.run.owned import EARLIER, own_cache
from distill.run.plan import Growth, StagePlan, relation
from distill.run.tables import read_rows
from distill.run.verify import Layout, refuse_damaged_inputs, verify

NUMBERS = pa.schema([("number", pa.int64())])
WRITES = ("numbers-*.parquet", "log.jsonl", "model.bin")
LAYOUT = Layout("recipe.yaml", "cache", ("failed-*.log",), ("rows-*.json",), {"numbers": WRITES})


def rows(count: int) -> list[dict[str, Any]]:
    return [{"number": number} for number in range(count)]


def make(folder: Path, count: int = 3, inputs: tuple[Path, ...] = ()) -> Path:
    with StageFolder(folder, "numbers", {"count": count}, inputs, writes=WRITES) as out:
        out.write_table("numbers", rows(count), NUMBERS)
        (folder / "log.jsonl").write_text("{}\n")
        (folder / "model.bin").write_bytes(b"weights")
        out.finish(files=[folder / "model.bin"], records=[folder / "log.jsonl"])
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    make(tmp_path / "run" / "first")
    make(tmp_path / "run" / "rounds" / "01" / "second", inputs=(tmp_path / "run" / "first",))
    write_record(tmp_path / "run" / "recipe.yaml", "name: x\n")
    (tmp_path / "run" / "cache").mkdir()
    return tmp_path / "run"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def found(run: Path) -> list[tuple[str, str]]:
    return [(fault.kind, str(fault.path.relative_to(run))) for fault in verify(run, LAYOUT).faults]


@pytest.mark.parametrize(
    "damage, expected",
    [
        (lambda run: None, []),
        (lambda run: flip(run / "first/numbers-00000.parquet"), [("altered", "first/numbers-00000.parquet")]),
        (lambda run: flip(run / "first/log.jsonl"), [("altered", "first/log.jsonl")]),
        (lambda run: flip(run / "rounds/01/second/manifest.json"), [("altered", "rounds/01/second/manifest.json")]),
        (lambda run: flip(run / "recipe.yaml"), [("altered", "recipe.yaml")]),
        (lambda run: (run / "first/model.bin").unlink(), [("missing", "first/model.bin")]),
        (lambda run: (run / "first/notes.txt").touch(), [("extra", "first/notes.txt")]),
        (lambda run: [(run / place / ".DS_Store").write_text("") for place in ("", "first", "rounds/01/second")], []),
        (lambda run: (run / "rounds/notes.txt").touch(), [("extra", "rounds/notes.txt")]),
        (lambda run: shutil.rmtree(run / "first"), [("missing", "first")]),
        (lambda run: (shutil.rmtree(run / "first"), make(run / "first", 4)), [("altered", "first")]),
    ],
)
def test_whatever_is_not_as_it_was_written_is_named(run: Path, damage: Callable[[Path], Any], expected: list[Any]) -> None:
    damage(run)
    assert found(run) == expected
    assert verify_run(run) == (not expected)


def test_of_a_stage_under_way_its_journals_and_shards_are_looked_at(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.run.tables.ROWS_PER_SHARD", 2)
    with StageFolder(run / "third", "numbers", {"count": 5}) as out:
        table = out.table("numbers", NUMBERS, resume=True)
        table.extend(rows(4))
        table.end_shard()
        out.journal().append(rows(1))
    assert found(run) == [] and verify(run, LAYOUT).unknown == 2
    shard, journal = run / "third" / "numbers-00001.parquet", run / "third" / JOURNAL
    for path in (shard, journal, run / "third" / SHARDS, run / "third" / PLAN):
        whole = path.read_bytes()
        flip(path)
        assert [kind for kind, _ in found(run)] == ["altered"], path
        path.write_bytes(whole)


def test_a_manifest_is_noticed_at_every_byte_that_says_something(tmp_path: Path) -> None:
    path = make(tmp_path / "n") / MANIFEST
    whole, content = path.read_bytes(), read_json(path)
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            assert read_json(path) == content, place
            read_manifest(tmp_path / "n")
        except IntegrityError:
            continue


def test_a_run_notices_a_finished_stage_of_which_a_file_is_gone_or_cut(tmp_path: Path) -> None:
    plan = StagePlan(make(tmp_path / "n"), "numbers", {"count": 3})
    assert relation(plan).kind == "complete"
    for damage, words in ((lambda path: path.write_bytes(b"w"), "has 1 bytes, not 7"), (lambda path: path.unlink(), "is gone")):
        damage(tmp_path / "n" / "model.bin")  # type: ignore[no-untyped-call]
        with pytest.raises(IntegrityError, match=rf"model\.bin: {words}.*--redo"):
            relation(plan)


def test_a_record_of_times_is_no_part_of_the_content(tmp_path: Path) -> None:
    first, second = make(tmp_path / "a"), make(tmp_path / "b")
    (second / "log.jsonl").write_text('{"seconds": 3}\n')
    with pytest.raises(IntegrityError, match=r"log\.jsonl"):
        check_files(second)
    assert read_manifest(first).digest == read_manifest(second).digest


def test_a_folder_that_is_not_empty_and_holds_no_stage_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "n" / "model").mkdir(parents=True)
    (tmp_path / "n" / "model" / "mine.bin").write_bytes(b"x")
    with (
        pytest.raises(StageConflictError, match=r"holds no stage of a run, but model/mine\.bin.*Move the folder away"),
        StageFolder(tmp_path / "n", "numbers", {}),
    ):
        pass
    assert [path.name for path in (tmp_path / "n").rglob("*")] == ["model", "mine.bin"]
    assert relation(StagePlan(tmp_path / "n", "numbers", {})).kind == "refused"


@pytest.mark.parametrize("finished", [True, False])
def test_a_stage_is_not_deleted_with_what_it_has_not_written(tmp_path: Path, finished: bool) -> None:
    if finished:
        make(tmp_path / "n")
    else:
        with StageFolder(tmp_path / "n", "numbers", {}) as out:
            out.write_table("numbers", rows(3), NUMBERS)
            out.journal().append(rows(1))
    (tmp_path / "n" / "thesis.tex").write_text("x")
    with pytest.raises(StageConflictError, match=r"what no stage wrote: thesis\.tex"):
        delete_stage(tmp_path / "n")
    (tmp_path / "n" / "thesis.tex").unlink()
    (tmp_path / "n" / ".DS_Store").touch()  # what looking into a folder leaves is nobody's
    delete_stage(tmp_path / "n")
    assert not (tmp_path / "n").exists()


def test_a_stage_with_a_damaged_manifest_can_still_be_made_anew(tmp_path: Path) -> None:
    """As its error advises."""
    make(tmp_path / "n")
    (tmp_path / "n" / MANIFEST).write_text("{")
    with pytest.raises(IntegrityError, match="--redo"):
        read_manifest(tmp_path / "n")
    delete_stage(tmp_path / "n", WRITES)
    assert not (tmp_path / "n").exists()


def test_a_stage_of_an_earlier_kit_is_whole_and_can_be_made_anew(run: Path) -> None:
    """Its manifest names neither records nor sizes, and has no digest of itself; nor has the recipe."""
    for folder in (run / "first", run / "rounds/01/second"):
        content = read_json(folder / MANIFEST)
        (folder / MANIFEST).write_text(json.dumps({name: value for name, value in content.items() if name not in ("records", "sizes")}))
    (run / "recipe.yaml").write_text("name: x\n")
    assert found(run) == []
    (run / "first" / "thesis.tex").touch()
    assert found(run) == [("extra", "first/thesis.tex")]
    delete_stage(run / "rounds/01/second", WRITES)
    assert not (run / "rounds/01/second").exists()


def test_growing_moves_and_deletes_only_what_is_the_stages(tmp_path: Path) -> None:
    growth = Growth({"count": 0})
    make(tmp_path / "n")
    (tmp_path / "n" / "thesis.tex").write_text("x")
    with StageFolder(tmp_path / "n", "numbers", {"count": 5}, (), growth, writes=WRITES) as out:
        assert read_rows(out.earlier or Path(), "numbers") == rows(3) and (tmp_path / "n" / EARLIER / "model.bin").exists()
        out.write_table("numbers", rows(5), NUMBERS)
        out.finish()
    left = sorted(path.name for path in (tmp_path / "n").iterdir() if path.name != ".lock")
    assert left == [MANIFEST, "numbers-00000.parquet", "thesis.tex"]


def test_a_cache_is_only_one_that_is_marked(tmp_path: Path) -> None:
    assert own_cache(own_cache(tmp_path / "cache")) == tmp_path / "cache"
    before = (tmp_path / "cache" / "CACHEDIR.TAG").stat().st_mtime_ns
    own_cache(tmp_path / "cache")
    assert (tmp_path / "cache" / "CACHEDIR.TAG").stat().st_mtime_ns == before  # processes of a launch would write it at once
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "rows-of-mine.csv").touch()
    with pytest.raises(StageConflictError, match=r"rows-of-mine\.csv.*CACHEDIR\.TAG"):
        own_cache(tmp_path / "mine")


def test_an_altered_shard_of_a_stage_under_way_is_made_again_as_its_error_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.run.tables.ROWS_PER_SHARD", 2)

    def go_on(until: int) -> list[str]:
        with StageFolder(tmp_path / "n", "numbers", {"count": 6}) as out:
            table = out.table("numbers", NUMBERS, resume=True)
            table.extend(rows(until)[table.num_rows :])
            table.end_shard()
            if until == 6:
                return [shard.sha256 for shard in out.finish().tables["numbers"]]
            table.stop()
        return []

    digests = go_on(6)
    delete_stage(tmp_path / "n")
    go_on(4)
    shard = tmp_path / "n" / "numbers-00000.parquet"
    data = shard.read_bytes()
    shard.write_bytes(data[:10] + bytes([data[10] ^ 1]) + data[11:])  # where no reader of the footer looks
    with pytest.raises(IntegrityError, match=r"numbers-00000\.parquet: was altered.*Delete it"):
        go_on(6)
    shard.unlink()
    assert go_on(6) == digests and not (tmp_path / "n" / SHARDS).exists()


def test_shards_whose_record_is_lost_are_noted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.run.tables.ROWS_PER_SHARD", 2)
    for until in (2, 4, 6):
        with StageFolder(tmp_path / "n", "numbers", {"count": 6}) as out:
            table = out.table("numbers", NUMBERS, resume=True)
            table.extend(rows(until)[table.num_rows :])
            table.end_shard()
            table.stop()
            if until == 2:
                (tmp_path / "n" / SHARDS).unlink()
            if until == 6:
                assert out.finish().rows("numbers") == 6


def test_lines_of_another_journal_are_not_taken_for_ones_own(tmp_path: Path) -> None:
    for name, settings in (("a", {"seed": 1}), ("b", {"seed": 2})):
        with StageFolder(tmp_path / name, "numbers", settings) as out:
            out.journal().append(rows(2))
    shutil.copyfile(tmp_path / "a" / JOURNAL, tmp_path / "b" / JOURNAL)
    with StageFolder(tmp_path / "b", "numbers", {"seed": 2}) as out, pytest.raises(IntegrityError, match=r":1: .* another run"):
        out.journal()


def test_a_record_says_whether_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    write_record(path, "name: x\n")
    whole = path.read_bytes()
    assert is_whole_record(path)
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert not is_whole_record(path), place


def test_other_files_under_the_path_of_a_model_are_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(digests, "_SETTLED_S", 0.0)
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(bytes(1000))
    (model / "tokenizer.json").write_text("{}")
    (model / "README.md").write_text("x")
    spec, named = ModelSpec(model=str(model)), ModelSpec(model="org/name")
    before, words = spec.identity(), spec.tokenizer_identity()
    assert named.identity()["files"] is None and len(before["files"]) == 64
    (model / "README.md").write_text("y")
    assert spec.identity() == before
    (model / "model.safetensors").write_bytes(bytes(500) + b"\1" + bytes(499))  # the same size, in the middle
    assert spec.identity() != before and spec.tokenizer_identity() == words
    (model / "tokenizer.json").write_text('{"a": 1}')
    assert spec.tokenizer_identity() != words


def test_files_of_a_model_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(digests, "_SETTLED_S", -1.0)
    read: list[Path] = []
    monkeypatch.setattr(digests, "digest_file", lambda path: read.append(path) or "d" * 64)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"1")
    for _ in range(2):
        digests._known.clear()  # as in another process
        assert digests.digests_of([file]) == ["d" * 64]
    assert len(read) == 1 and str(file) in json.loads((tmp_path / "home" / "distill-kit" / "digests.json").read_text())
    (tmp_path / "home" / "distill-kit" / "digests.json").write_text("[1]")
    digests._known.clear()
    assert digests.digests_of([file]) == ["d" * 64] and len(read) == 2


def test_a_page_that_was_altered_is_not_shown(tmp_path: Path) -> None:
    recipe = Recipe.model_validate(
        {"name": "x", "run_dir": str(tmp_path), "student": {"model": "none"}, "prompts": {"source": "x"}, "traces": {"source": "x"}}
        | {"evaluate": None, "export": None}
    )
    for altered in (b"\xffable", None):
        shutil.rmtree(tmp_path / "report", ignore_errors=True)
        with StageFolder(tmp_path / "report", "report", {}, writes=WRITES) as out:
            (out.path / "summary.txt").write_bytes(b"a table")
            out.finish(files=[out.path / "summary.txt"])
        if altered:
            (tmp_path / "report" / "summary.txt").write_bytes(altered)
        else:
            (tmp_path / "report" / "summary.txt").unlink()
        with pytest.raises(IntegrityError, match=r"summary\.txt: is gone or was altered.*--redo"):
            show_report(recipe)


def test_a_stage_that_is_being_made_anew_is_not_missing(run: Path) -> None:
    shutil.rmtree(run / "first")
    (run / "first").mkdir()
    (run / "first" / PLAN).write_text(json.dumps({"stage": "numbers", "settings": {}, "inputs": {}}))
    assert ("missing", "first") not in found(run)
    shutil.rmtree(run / "first")
    assert ("missing", "first") in found(run)


def test_nothing_is_deleted_to_be_made_from_what_is_damaged(run: Path) -> None:
    second = run / "rounds" / "01" / "second"
    refuse_damaged_inputs(run, [second])
    flip(run / "first/numbers-00000.parquet")
    with pytest.raises(IntegrityError, match=r"numbers-00000\.parquet: is altered.*nothing was deleted.*--redo numbers"):
        refuse_damaged_inputs(run, [second])
    refuse_damaged_inputs(run, [run / "first", second])  # both are made anew


def test_what_was_made_from_a_stage_as_it_was_before_is_outdated(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = Growth(anything=True, adds=False)
    with StageFolder(run / "first", "numbers", {"count": 4}, growth=plain, writes=WRITES) as out:
        out.write_table("numbers", rows(4), NUMBERS)
        out.finish(keep_earlier=True)
    assert found(run) == [("outdated", "rounds/01/second")] and verify_run(run)
    assert "first was made anew since" in capsys.readouterr().out
    flip(run / "first" / "numbers-00000.parquet")
    assert ("altered", "first/numbers-00000.parquet") in found(run) and not verify_run(run)
    shutil.rmtree(run / "first")
    make(run / "first", 4)  # swapped, with nothing of before
    assert found(run) == [("altered", "first")]
