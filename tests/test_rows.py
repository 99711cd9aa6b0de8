"""Rows of training: what tokenising a trace alone gives, made once, found again, and replaced where anything about them is another."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_train import traces
from transformers import AutoTokenizer

from distill.engines import reading
from distill.engines.batching import one_ahead
from distill.errors import DataError
from distill.models.chat import IGNORE, ChatFormat, chat_format
from distill.recipe.learning import Train
from distill.run.folder import StageFolder
from distill.run.schema import TRACE, prompt_id
from distill.targets.codec import Targets
from distill.targets.files import TargetWriter
from distill.targets.spec import ChosenToken, TargetHeader
from distill.trainers import encoded
from distill.trainers.rows import TraceTable, TrainingRows, training_rows
from distill.trainers.targets import StoredTargets, TargetSource

TINY = [(reading, "_BYTES_AT_ONCE", 2000), (encoded, "_BYTES_PER_BATCH", 6000)]


@pytest.fixture(scope="module")
def chat(tiny_model_dir: Path) -> ChatFormat:
    return chat_format(AutoTokenizer.from_pretrained(tiny_model_dir))


@pytest.fixture(params=[[], TINY], ids=["one batch", "many batches"])
def batches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, value in request.param:
        monkeypatch.setattr(module, name, value)


def written(folder: Path, rows: list[dict[str, Any]]) -> Path:
    with StageFolder(folder, "curate", {}) as out:
        out.write_table("traces", rows, TRACE)
        out.finish(rows_in=len(rows), rows_kept=len(rows))
    return folder


def mixed(chat: ChatFormat) -> list[dict[str, Any]]:
    """A teacher's and a student's traces, some that did not end."""
    rows = [{**trace, "completion_ids": [1, 2, 3]} for trace in traces(30)]
    for index, row in enumerate(rows[10:20]):
        text = chat.tokenizer("drawn otherwise", add_special_tokens=False)["input_ids"]
        row |= {"author": "student", "prompt_ids": chat.prompt_ids(row["messages"]), "completion_ids": text[index:]}
    rows[4]["finish_reason"] = "length"
    return rows


@pytest.mark.usefixtures("batches")
def test_rows_are_those_of_each_trace_alone(chat: ChatFormat, tmp_path: Path) -> None:
    rows = mixed(chat)
    expected = [chat.trace_row(row) for row in rows]
    lengths = [len(input_ids) for input_ids, _ in expected]
    limit = sorted(lengths)[len(lengths) // 2]
    table = TraceTable(written(tmp_path / "traces", rows), "traces")
    found = training_rows([table], chat, Train(max_length=limit), tmp_path / "cache", 0)
    fitting = [row for row in expected if len(row[0]) <= limit]
    assert 0 < len(fitting) < len(rows)
    assert list(zip(found.dataset["input_ids"], found.dataset["labels"], strict=True)) == fitting
    assert found.drops == {"too_long": len(rows) - len(fitting)} and found.rows_in == len(rows)
    assert found.num_tokens == sum(length for length in lengths if length <= limit)
    cut = training_rows([table], chat, Train(max_length=limit, overlong="cut"), tmp_path / "cache", 0)
    assert list(zip(cut.dataset["input_ids"], cut.dataset["labels"], strict=True)) == [(ids[:limit], own[:limit]) for ids, own in expected]
    with pytest.raises(DataError, match=f"the shortest has {min(lengths)}"):
        training_rows([table], chat, Train(max_length=3), tmp_path / "cache", 0)


def test_prompts_kept_apart_are_drawn_by_their_hash(chat: ChatFormat, tmp_path: Path) -> None:
    """By the definition: the prompts of the lowest SHA-256, with all their samples."""
    rows = [trace | {"sample_index": sample} for trace in traces(20) for sample in range(2)]
    found = training_rows(
        [TraceTable(written(tmp_path / "traces", rows), "traces")], chat, Train(validation_prompts=5), tmp_path / "cache", seed=7
    )
    ranked = sorted({row["prompt_id"] for row in rows}, key=lambda name: hashlib.sha256(f"validation/7/{name}".encode()).digest())
    assert found.validation is not None and found.drops == {"validation": 10}
    assert found.validation["input_ids"] == [chat.trace_row(row)[0] for row in rows if row["prompt_id"] in ranked[:5]]
    assert found.dataset["input_ids"] == [chat.trace_row(row)[0] for row in rows if row["prompt_id"] not in ranked[:5]]


def test_turns_of_a_conversation_are_kept_apart_together(chat: ChatFormat, tmp_path: Path) -> None:
    """Else the loss is followed on what is trained on: a longer prompt has the shorter one's answer in it."""
    rows = []
    for trace in traces(12):
        [asked] = trace["messages"]
        goes_on = [asked, {"role": "assistant", "content": trace["completion"]}, {"role": "user", "content": "Are you sure?"}]
        for messages in ([asked], goes_on):
            rows.append(trace | {"messages": messages, "prompt_id": prompt_id(messages), "begins": asked["content"]})
    table = TraceTable(written(tmp_path / "traces", [{name: row[name] for name in row if name != "begins"} for row in rows]), "traces")
    found = training_rows([table], chat, Train(validation_prompts=5), tmp_path / "cache", seed=7)
    begins = {tuple(chat.trace_row(row)[0]): row["begins"] for row in rows}
    assert found.validation is not None and found.drops == {"validation": 10}
    apart, trained = ({begins[tuple(ids)] for ids in part["input_ids"]} for part in (found.validation, found.dataset))
    assert len(apart) == 5 and len(trained) == 7 and apart.isdisjoint(trained)


def test_a_share_of_the_teachers_is_drawn_beside_the_students(chat: ChatFormat, tmp_path: Path) -> None:
    own, teachers = (written(tmp_path / name, traces(count, name)) for name, count in (("own", 12), ("teachers", 30)))
    tables = [TraceTable(own, "traces"), TraceTable(teachers, "traces", share_of_rest=0.5, draw_seed=3)]
    found = training_rows(tables, chat, Train(), tmp_path / "cache", 0)
    drawn = np.sort(np.random.default_rng(3).choice(30, 6, replace=False))
    expected = [*traces(12, "own"), *(traces(30, "teachers")[index] for index in drawn)]
    assert found.dataset["input_ids"] == [chat.trace_row(row)[0] for row in expected]
    assert found.drops == {"not_drawn": 24}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders whose traces were tokenised, as it happens."""
    found: list[Path] = []
    plain = encoded.iter_pieces
    monkeypatch.setattr(encoded, "iter_pieces", lambda folder, *rest: (found.append(folder), plain(folder, *rest))[1])
    return found


def test_rows_are_made_once_and_kept_for_one_training(chat: ChatFormat, tmp_path: Path, made: list[Path]) -> None:
    folder, cache = written(tmp_path / "traces", traces(8)), tmp_path / "cache"

    def rows(**changes: Any) -> TrainingRows:
        return training_rows([TraceTable(folder, "traces")], chat, Train(**changes), cache, 0)

    first = rows()
    assert rows().dataset[:] == first.dataset[:] and len(made) == 1
    assert rows(validation_prompts=2).validation is not None and len(made) == 1  # nothing that decides a token
    for number, changes in enumerate([{"max_length": 200}, {"max_length": 200, "overlong": "cut"}, {}], start=2):
        rows(**changes)
        assert len(made) == number and len(list(cache.iterdir())) == 3
    for file in cache.iterdir():
        file.unlink()
    assert rows().dataset[:] == first.dataset[:] and len(made) == 5


@pytest.mark.parametrize("kind", ["arrow", "parquet", "json"])
def test_what_was_altered_is_made_again(kind: str, chat: ChatFormat, tmp_path: Path, made: list[Path], capsys: Any) -> None:
    """A flipped bit in the tokens would be trained on; packs of an earlier piece are no better known."""
    table, cache = [TraceTable(written(tmp_path / "traces", traces(8)), "traces")], tmp_path / "cache"
    expected = training_rows(table, chat, Train(), cache, 0).dataset[:]
    [file] = cache.glob(f"rows-*.{kind}")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    (cache / "cache-1.arrow").write_bytes(b"")
    assert training_rows(table, chat, Train(), cache, 0).dataset[:] == expected and len(made) == 2
    assert "was altered, so the traces are tokenised again" in capsys.readouterr().out
    assert not (cache / "cache-1.arrow").exists()
    file.unlink()
    assert training_rows(table, chat, Train(), cache, 0).dataset[:] == expected and len(made) == 3


def test_what_was_cut_off_is_made_again(chat: ChatFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = [TraceTable(written(tmp_path / "traces", traces(30)), "traces")]
    for module, name, value in TINY:
        monkeypatch.setattr(module, name, value)
    plain, calls = encoded._batch, []

    def killed(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(encoded, "_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        training_rows(table, chat, Train(), tmp_path / "cache", 0)
    assert all(path.name.endswith(".tmp") for path in (tmp_path / "cache").iterdir())
    found = training_rows(table, chat, Train(), tmp_path / "cache", 0)
    assert found.dataset["input_ids"] == [chat.trace_row(row)[0] for row in traces(30)]
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_targets_in_another_order_are_other_rows(chat: ChatFormat, tmp_path: Path) -> None:
    """Scored anew on other processes, the same targets stand elsewhere: numbers kept from before would point at a stranger's."""
    folder = written(tmp_path / "traces", traces(6))
    supervised = {f"{row['prompt_id']}/0": sum(label != IGNORE for label in chat.trace_row(row)[1]) for row in traces(6)}
    header = TargetHeader(target=ChosenToken(), vocab_size=300, teacher_model="t", teacher_revision=None, **dict.fromkeys(_DIGESTS, "0"))
    for name, keys in (("one", list(supervised)), ("two", list(supervised)[::-1])):
        with TargetWriter(tmp_path / f"{name}.targets", header) as writer:
            for key in keys:
                count = supervised[key]
                writer.append(key, Targets(np.empty((count, 0), np.int32), np.zeros((count, 1), np.float32), np.zeros(count, np.float32)))
            writer.close()
        stored = StoredTargets([TargetSource([tmp_path / f"{name}.targets"], "0", True)])
        found = training_rows([TraceTable(folder, "traces")], chat, Train(), tmp_path / "cache", 0, stored)
        places = [[place for place in row if place >= 0] for row in found.validation or _with_places(tmp_path / "cache")]
        assert [row[0] >> 24 for row in places] == (list(range(6)) if name == "one" else list(range(6))[::-1])
        assert [len(row) for row in places] == list(supervised.values())


_DIGESTS = ("teacher_tokenizer_digest", "teacher_template_digest", "tokenizer_digest", "template_digest", "traces_digest")


def _with_places(cache: Path) -> list[list[int]]:
    [file] = cache.glob("rows-*.arrow")
    return encoded.EncodedTraces(file).tokens["target_index"][:]


def test_one_is_made_while_another_is_used() -> None:
    made: list[int] = []

    def items() -> Any:
        for number in range(3):
            made.append(number)
            yield number
        raise ValueError("the last of them")

    assert list(one_ahead([])) == [] and list(one_ahead([5, 6])) == [5, 6]
    found = []
    with pytest.raises(ValueError, match="the last of them"):
        for item in one_ahead(items()):
            found.append(item)
    assert found == made == [0, 1, 2]
