"""Stage folders: complete or absent, resumable, refused to other settings, and noticed when altered."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from distill.errors import IntegrityError, MissingStageError, StageConflictError
from distill.run.files import read_json, write_json
from distill.run.folder import StageFolder, delete_stage
from distill.run.manifest import JOURNAL, MANIFEST, check_files, read_manifest
from distill.run.schema import TRACE
from distill.run.tables import ROWS_PER_SHARD, TableWriter, iter_rows, read_rows, rows_at, table_files

NUMBERS = pa.schema([("number", pa.int64()), ("text", pa.string())])


def rows(count: int) -> list[dict[str, object]]:
    return [{"number": index, "text": f"row {index}"} for index in range(count)]


def make(path: Path, count: int = 10, settings: dict[str, object] | None = None, inputs: list[Path] | None = None) -> Path:
    with StageFolder(path, "numbers", settings or {"a": 1}, inputs or []) as out:
        out.write_table("numbers", rows(count), NUMBERS)
        out.finish(rows_in=count, rows_kept=count)
    return path


def test_rows_come_back_across_shards(tmp_path: Path) -> None:
    count = ROWS_PER_SHARD + 3
    folder = make(tmp_path / "numbers", count)
    assert len(list(table_files(folder, "numbers"))) == 2
    assert read_rows(folder, "numbers") == rows(count)
    assert read_manifest(folder).rows("numbers") == count


def test_an_empty_table_keeps_its_schema(tmp_path: Path) -> None:
    folder = make(tmp_path / "numbers", 0)
    assert read_rows(folder, "numbers") == []
    assert pa.parquet.read_schema(next(table_files(folder, "numbers"))).names == NUMBERS.names


def test_a_column_that_the_schema_lacks_is_an_error(tmp_path: Path) -> None:
    with StageFolder(tmp_path / "numbers", "numbers", {}) as out, pytest.raises(KeyError, match="colour"):
        out.write_table("numbers", [{"number": 1, "colour": "red"}], NUMBERS)


def test_rows_and_pieces_keep_their_order_and_their_bytes(tmp_path: Path) -> None:
    """A table is the same however it was handed over, and whatever the thread that writes it is doing meanwhile."""
    given = rows(10_000)
    whole = TableWriter(tmp_path, "whole", NUMBERS)
    whole.extend(given)
    mixed = TableWriter(tmp_path, "mixed", NUMBERS)
    mixed.extend(given[:3])
    for start, end in ((3, 3), (3, 700), (700, 701), (701, 9000)):
        mixed.add(pa.RecordBatch.from_pylist(given[start:end], schema=NUMBERS))
        assert mixed.num_rows == end
    mixed.extend(given[9000:])
    assert [(shard.rows, shard.sha256) for shard in mixed.close()] == [(shard.rows, shard.sha256) for shard in whole.close()]
    assert [row for shard in range(3) for row in pa.parquet.read_table(tmp_path / f"mixed-{shard:05d}.parquet").to_pylist()] == given


def test_an_error_of_the_writing_thread_comes_out(tmp_path: Path) -> None:
    writer = TableWriter(tmp_path / "gone", "numbers", NUMBERS)
    (tmp_path / "gone").mkdir()
    writer.extend(rows(600))
    shutil.rmtree(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"numbers-00000\.parquet"):
        writer.close()


def test_tables_made_in_one_go_are_all_made_or_none(tmp_path: Path) -> None:
    with StageFolder(tmp_path / "n", "n", {}) as out:
        (out.path / "old-00007.parquet.tmp").write_bytes(b"of a killed attempt")
        with pytest.raises(ZeroDivisionError), out.in_one_go():
            assert not list(out.path.glob("*.tmp"))
            out.table("numbers", NUMBERS).extend(rows(ROWS_PER_SHARD + 600))
            raise ZeroDivisionError
        assert not list(out.path.glob("*.parquet*"))
    with StageFolder(tmp_path / "n", "n", {"other": 1}) as out, out.in_one_go():  # what left nothing behind ties to nothing
        out.write_table("numbers", rows(3), NUMBERS)
        out.finish()
    assert read_rows(tmp_path / "n", "numbers") == rows(3)


def test_a_finished_stage_is_complete_and_leaves_nothing_else(tmp_path: Path) -> None:
    folder = make(tmp_path / "numbers")
    with StageFolder(folder, "numbers", {"a": 1}) as out:
        assert out.complete and out.manifest is not None and out.manifest.rows_kept == 10
    assert sorted(path.name for path in folder.iterdir() if path.name != ".lock") == [MANIFEST, "numbers-00000.parquet"]


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused_naming_both(tmp_path: Path, finished: bool) -> None:
    folder = tmp_path / "numbers"
    if finished:
        make(folder, settings={"sampling": {"temperature": 0.6}})
    else:
        with StageFolder(folder, "numbers", {"sampling": {"temperature": 0.6}}) as out:
            out.journal().append(rows(1))
    with pytest.raises(
        StageConflictError, match=r"(under way|made) with other settings or inputs: sampling\.temperature is 0\.6 there and 0\.7 here"
    ):
        StageFolder(folder, "numbers", {"sampling": {"temperature": 0.7}}).__enter__()


def test_a_changed_input_is_refused_but_an_equal_one_is_not(tmp_path: Path) -> None:
    first = make(tmp_path / "first")
    second = make(tmp_path / "second", inputs=[first])
    delete_stage(first)
    make(first)  # the same rows at another time
    with StageFolder(second, "numbers", {"a": 1}, [first]) as out:
        assert out.complete
    delete_stage(first)
    make(first, count=11)
    with pytest.raises(StageConflictError, match="first/ has changed since"):
        StageFolder(second, "numbers", {"a": 1}, [first]).__enter__()


def test_an_absent_and_an_unfinished_input_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(MissingStageError, match="is not there"):
        StageFolder(tmp_path / "x", "x", {}, [tmp_path / "absent"])
    with StageFolder(tmp_path / "begun", "begun", {}):
        pass
    with pytest.raises(MissingStageError, match="is not finished"):
        StageFolder(tmp_path / "x", "x", {}, [tmp_path / "begun"])


def test_two_processes_cannot_write_one_stage(tmp_path: Path) -> None:
    code = "import sys, pathlib; from distill.run.folder import StageFolder as F; F(pathlib.Path(sys.argv[1]), 'n', {}).__enter__()"
    with StageFolder(tmp_path / "n", "n", {}):
        other = subprocess.run([sys.executable, "-c", code, str(tmp_path / "n")], capture_output=True, text=True)
    assert "another process is working on this stage" in other.stderr
    with StageFolder(tmp_path / "n", "n", {}):  # free again
        pass


def test_an_altered_shard_is_noticed_at_every_byte(tmp_path: Path) -> None:
    folder = make(tmp_path / "numbers")
    shard = folder / "numbers-00000.parquet"
    whole = shard.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 40)):
        shard.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(IntegrityError, match="was altered"):
            read_rows(folder, "numbers")
    shard.write_bytes(whole[:-10])
    with pytest.raises(IntegrityError, match="was altered"):
        read_rows(folder, "numbers")
    shard.unlink()
    with pytest.raises(IntegrityError, match="is gone"):
        read_rows(folder, "numbers")


def test_an_altered_file_and_a_damaged_manifest_are_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with StageFolder(folder, "model", {}) as out:
        (folder / "weights.bin").write_bytes(b"123")
        out.finish(files=[folder / "weights.bin"])
    assert check_files(folder).files.keys() == {"weights.bin"}
    (folder / "weights.bin").write_bytes(b"124")
    with pytest.raises(IntegrityError, match=r"weights\.bin"):
        check_files(folder)
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text[: len(text) // 2])
    with pytest.raises(IntegrityError, match="is damaged"):
        read_manifest(folder)
    (folder / MANIFEST).write_text(text)
    write_json(folder / MANIFEST, read_json(folder / MANIFEST) | {"schema_version": 99})
    with pytest.raises(IntegrityError, match="schema version 99"):
        read_manifest(folder)


def test_the_journal_loses_only_a_torn_last_line(tmp_path: Path) -> None:
    """Cut at every byte of the last batch, the earlier ones are read, and new ones can be added."""
    with StageFolder(tmp_path / "n", "n", {}) as out:
        journal = out.journal()
        journal.append(rows(2))
        first = (tmp_path / "n" / JOURNAL).stat().st_size
        journal.append(rows(3))
        whole = (tmp_path / "n" / JOURNAL).read_bytes()
        for cut in range(first, len(whole), 7):
            (tmp_path / "n" / JOURNAL).write_bytes(whole[:cut])
            torn = out.journal()
            assert list(torn.rows()) == rows(2), cut
            torn.append(rows(1))
            assert list(out.journal().rows()) == rows(2) + rows(1)


def test_an_altered_journal_line_is_noticed(tmp_path: Path) -> None:
    with StageFolder(tmp_path / "n", "n", {}) as out:
        out.journal().append(rows(2))
        path = tmp_path / "n" / JOURNAL
        path.write_bytes(path.read_bytes().replace(b"row 1", b"row 7"))
        with pytest.raises(IntegrityError, match=r"journal\.jsonl:1"):
            out.journal()


def test_only_folders_of_the_kit_are_deleted(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(StageConflictError, match="not deleted"):
        delete_stage(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()
    delete_stage(make(tmp_path / "numbers"))
    assert not (tmp_path / "numbers").exists()


@pytest.mark.parametrize("at_line", [3, 40, 150])
def test_a_process_killed_while_it_writes_loses_no_finished_batch(tmp_path: Path, at_line: int) -> None:
    code = """
import sys
from pathlib import Path
from distill.run.folder import StageFolder
with StageFolder(Path(sys.argv[1]), "n", {}) as out:
    journal = out.journal()
    for index in range(10_000):
        journal.append([{"number": index, "text": "x" * 500}])
        print(index, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "n")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    acknowledged = -1
    for line in process.stdout:
        acknowledged = int(line)
        if acknowledged >= at_line:
            os.kill(process.pid, signal.SIGKILL)
            break
    process.wait()
    with StageFolder(tmp_path / "n", "n", {}) as out:
        found = [row["number"] for row in out.journal().rows()]
    assert found == list(range(len(found))) and len(found) > acknowledged


def test_rows_are_dealt_out_across_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.run.tables.ROWS_PER_SHARD", 5)
    with StageFolder(tmp_path / "traces", "generate", {}) as out:
        out.write_table("traces", [{"prompt_id": str(index)} for index in range(17)], TRACE)
        out.finish()
    for step in (1, 2, 3, 7, 20):
        dealt = [[int(row["prompt_id"]) for row in iter_rows(tmp_path / "traces", "traces", first, step)] for first in range(step)]
        assert dealt == [list(range(first, 17, step)) for first in range(step)]


def test_rows_at_places_are_read_from_their_shards_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.run.tables.ROWS_PER_SHARD", 50)
    monkeypatch.setattr("distill.run.tables._ROWS_PER_PIECE", 7)
    folder = make(tmp_path / "numbers", 170)
    for places in ([], [0], [169], [0, 6, 7, 49, 50, 51, 120], range(170), range(60, 61)):
        assert list(rows_at(folder, "numbers", places)) == [rows(170)[place] for place in places]
    assert list(rows_at(folder, "numbers", [3, 60], ["number"])) == [{"number": 3}, {"number": 60}]
    (folder / "numbers-00000.parquet").write_bytes(b"")
    assert [row["number"] for row in rows_at(folder, "numbers", [60, 100])] == [60, 100]
    with pytest.raises(IntegrityError, match=r"numbers-00000.*was altered"):
        list(rows_at(folder, "numbers", [3]))


def test_parts_are_held_apart(tmp_path: Path) -> None:
    with StageFolder(tmp_path, "score", {"k": 1}, part="0-of-2") as one, StageFolder(tmp_path, "score", {"k": 1}, part="1-of-2") as other:
        for taken in ("0-of-2", "1-of-2"):
            with pytest.raises(StageConflictError, match=f"part {taken}"), StageFolder(tmp_path, "score", {"k": 1}, part=taken):
                pass
        with pytest.raises(StageConflictError, match="k is 1 there and 2 here"), StageFolder(tmp_path, "score", {"k": 2}, part="2-of-3"):
            pass
        with StageFolder(tmp_path, "score", {"k": 1}) as whole, pytest.raises(StageConflictError), whole.part("1-of-2"):
            pass
        with one.whole():
            assert not one.complete
            one.finish()
        with other.whole():
            assert other.complete
