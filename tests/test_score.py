"""Stage `score` through the command line: aligned by the definition, resumed, dealt out, and noticed when altered."""

from __future__ import annotations

import contextlib
import io
import json
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import commands
import numpy as np
import pytest
import torch
from conftest import build_tiny_model
from filelock import FileLock
from test_train import traces as plain_traces
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.cli import main
from distill.engines import parts, reading
from distill.engines.scored import MIN_CARRIED
from distill.engines.scoring import TeacherScorer, score_rows
from distill.errors import IntegrityError
from distill.models.chat import IGNORE, ChatFormat, chat_format
from distill.models.vocabulary import AlignedRow, VocabularyMap, align, vocabulary_map
from distill.run.files import digest_file
from distill.run.folder import StageFolder
from distill.run.manifest import check_files, read_manifest
from distill.run.owned import EARLIER
from distill.run.plan import Growth
from distill.run.schema import TRACE
from distill.targets.codec import Targets
from distill.targets.compare import Verification
from distill.targets.files import TargetReader, TargetWriter
from distill.targets.kinds import uniforms
from distill.targets.spec import ChosenToken, Sampled, TargetSpec, TopK

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = [str(Path(sys.executable).parent / "accelerate"), "launch", "--multi_gpu", "--num_processes"]
SPECS: list[TargetSpec] = [TopK(k=8), Sampled(draws=20), Sampled(draws=20, proposal_temperature=1.5), ChosenToken()]


def spec_id(spec: TargetSpec) -> str:
    return "-".join(str(value) for value in spec.model_dump().values())


def traces(count: int) -> list[dict[str, Any]]:
    """Rows of different lengths, some with letters of several bytes."""
    return plain_traces(count, " ünd so 好")


def key_of(trace: dict[str, Any]) -> str:
    return f"{trace['prompt_id']}/{trace['sample_index']}"


@pytest.fixture(scope="session")
def other_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A teacher whose vocabulary has the student's tokens elsewhere, and `<think>` not at all."""
    path = build_tiny_model(tmp_path_factory.mktemp("other-model"), seed=1)
    raw = json.loads((path / "tokenizer.json").read_text())
    size = len(raw["model"]["vocab"])
    specials = {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    moved = {token: index if token in specials else size - 1 - (index - 3) for token, index in raw["model"]["vocab"].items()}
    raw["model"]["vocab"] = dict(sorted(moved.items(), key=lambda pair: pair[1]))
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] in specials]
    (path / "tokenizer.json").write_text(json.dumps(raw))
    return path


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_dir: Path) -> Callable[..., Path]:
    """Makes a run folder with curated traces, and a recipe over it."""

    def make(
        name: str, target: str = "{kind: top_k, k: 8}", teacher: Path | None = None, rows: list[dict[str, Any]] | None = None, **score: Any
    ) -> Path:
        run_dir, found = tmp_path / name, traces(24) if rows is None else rows
        with StageFolder(run_dir / "curated", "curate", {}) as out:
            out.write_table("curated", found, TRACE)
            out.finish(rows_in=len(found), rows_kept=len(found))
        more = "".join(f", {key}: {value}" for key, value in score.items())
        path = tmp_path / f"{name}.yaml"
        path.write_text(
            f"name: {name}\nrun_dir: {run_dir}\nseed: 1\nteacher: {{model: {teacher or tiny_model_dir}}}\n"
            f"student: {{model: {tiny_model_dir}}}\nprompts: {{source: none.jsonl}}\ngenerate: {{}}\n"
            f"score: {{target: {target}{more}}}\ntrain: {{method: kd, max_length: 256}}\n"
        )
        return path

    return make


class Said(NamedTuple):
    """What a command printed, and its exit code."""

    returncode: int
    stdout: str
    stderr: str


def distill(*arguments: str | Path) -> Said:
    """The command in this process: loading torch for each call would take most of the time."""
    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["distill", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        return Said(int(end.code or 0), out.getvalue(), err.getvalue())
    finally:
        sys.argv = before
    raise AssertionError("the command did not exit")


def score(recipe: Path, *arguments: str, processes: int = 0) -> str:
    """Scores through the command line, and returns what it said."""
    if processes:
        result = commands.launch(["-m", "distill", "score", recipe, *arguments], processes)
        code, stdout, stderr = result.returncode, result.stdout, result.stderr
    else:
        code, stdout, stderr = distill("score", recipe, *arguments)
    assert code == 0, stderr[-3000:]
    return stdout


def folder_of(recipe: Path) -> Path:
    return recipe.with_suffix("") / "targets"


def rows_of(recipe: Path) -> dict[str, Targets]:
    """The stored targets of each trace."""
    reader = TargetReader([folder_of(recipe) / name for name in read_manifest(folder_of(recipe)).files])
    return {reader.key(row): reader[row] for row in range(len(reader))}


def same_targets(left: dict[str, Targets], right: dict[str, Targets]) -> None:
    """Equal up to the rounding that another batch brings, which may move a code by one."""
    assert set(left) == set(right)
    for key, one in left.items():
        np.testing.assert_array_equal(one.ids, right[key].ids)
        np.testing.assert_allclose(one.log_probs, right[key].log_probs, atol=0.02)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.targets")}


# What is stored


def load(path: Path) -> tuple[Any, ChatFormat]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():  # a random model is nearly uniform; this one has opinions
        model.get_output_embeddings().weight.mul_(16)
    return model.eval(), chat_format(AutoTokenizer.from_pretrained(path))


def dense(model: Any, row: AlignedRow, vocabulary: VocabularyMap) -> np.ndarray:
    """(supervised, V of the teacher) log-probabilities in float64 by the definition: token j from the logits at j - 1."""
    with torch.no_grad():
        logits = model.double()(torch.tensor(row.teacher_ids[None].astype(int))).logits[0, :, : vocabulary.teacher_size]
    model.float()
    log_probs = logits.log_softmax(-1).numpy()
    return np.stack([log_probs[j - 1] if j >= 0 else np.full(log_probs.shape[1], np.nan) for j in row.positions])


def check_against(found: Targets, log_probs: np.ndarray, row: AlignedRow, vocabulary: VocabularyMap, spec: TargetSpec) -> int:
    """Compares a row's targets with the dense reference, and returns how many positions have one."""
    to_student, written = vocabulary.student_ids, row.written
    has = to_student >= 0
    number = 0
    draws = uniforms(spec, row.key, len(found)) if isinstance(spec, Sampled) else None
    for place, position in enumerate(row.positions):
        got = {int(i): float(v) for i, v in zip(found.ids[place], found.log_probs[place], strict=False) if i >= 0}
        p = np.exp(log_probs[place])
        if position < 0 or p[has].sum() < MIN_CARRIED:
            assert (found.log_probs[place] == -np.inf).all() and (found.ids[place] == -1).all()
            continue
        number += 1
        if isinstance(spec, ChosenToken):
            assert found.log_probs[place, 0] == pytest.approx(log_probs[place][row.teacher_ids[position]], abs=1e-3)
            continue
        if isinstance(spec, TopK):
            best = [int(i) for i in np.argsort(-p)[: spec.k] if has[i]]
            assert list(got) == [int(to_student[i]) for i in best]
            np.testing.assert_allclose(list(got.values()), log_probs[place][best], atol=1e-3)
            assert np.exp(found.log_rest[place]) == pytest.approx(1 - p[best].sum(), abs=1e-4)
            continue
        assert draws is not None
        of_student = np.zeros(vocabulary.student_size)
        of_student[to_student[has]] = p[has] / p[has].sum()
        q = of_student ** (1 / spec.proposal_temperature)
        drawn = np.searchsorted(np.cumsum(q / q.sum()), draws[place], side="right")
        ids, counts = np.unique(drawn, return_counts=True)
        assert sorted(got) == ids.tolist()
        weights = counts / spec.draws * of_student[ids] / (q / q.sum())[ids]
        np.testing.assert_allclose([np.exp(got[int(i)]) for i in ids], weights, rtol=1e-3)
        assert written[place] < vocabulary.student_size
    return number


@pytest.mark.parametrize("other", [False, True], ids=["one tokenizer", "other tokenizer"])
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_targets_are_the_definition(spec: TargetSpec, other: bool, tiny_model_dir: Path, other_model_dir: Path) -> None:
    model, teacher = load(other_model_dir if other else tiny_model_dir)
    student = chat_format(AutoTokenizer.from_pretrained(tiny_model_dir))
    vocabulary = vocabulary_map(teacher, student)
    assert vocabulary.identical != other
    assert model.get_output_embeddings().weight.shape[0] > vocabulary.teacher_size  # rows that pad the head
    rows = [align(trace, teacher, student, vocabulary) for trace in traces(6)]
    small = TeacherScorer(model, spec, vocabulary, buffer=7 * 264).score(rows)  # a few positions at a time
    together = score_rows(model, rows, spec, vocabulary, batch_size=4)
    for row, one, two in zip(rows, small, together, strict=True):
        number = check_against(one.targets, dense(model, row, vocabulary), row, vocabulary, spec)
        assert one.key == two.key == row.key
        assert one.statistics.stored == two.statistics.stored == number > 0
        assert one.statistics.aligned == (row.positions >= 0).sum() and one.statistics.tokens == len(row.teacher_ids)
        width = min(one.targets.log_probs.shape[1], two.targets.log_probs.shape[1])  # a batch is padded to its widest row
        np.testing.assert_array_equal(one.targets.ids[:, :width], two.targets.ids[:, :width])
        np.testing.assert_allclose(one.targets.log_probs[:, :width], two.targets.log_probs[:, :width], atol=1e-3)


def test_what_the_student_lacks_is_counted(tiny_model_dir: Path, other_model_dir: Path) -> None:
    """A teacher that has `<think>`, a student that lacks it: the mass on it goes into the rest, and is measured."""
    model, teacher = load(tiny_model_dir)
    student = chat_format(AutoTokenizer.from_pretrained(other_model_dir))
    vocabulary = vocabulary_map(teacher, student)
    lost = np.flatnonzero(vocabulary.student_ids < 0)
    assert teacher.tokenizer.convert_ids_to_tokens(lost.tolist()) == ["<think>", "</think>"]
    with torch.no_grad():
        model.get_output_embeddings().weight[lost] *= 2
    rows = [align(trace, teacher, student, vocabulary) for trace in traces(8)]
    scored = score_rows(model, rows, TopK(k=8), vocabulary)
    carried, stored = [], 0
    for row, one in zip(rows, scored, strict=True):
        log_probs = dense(model, row, vocabulary)
        stored += check_against(one.targets, log_probs, row, vocabulary, TopK(k=8))
        mine = np.exp(log_probs[row.positions >= 0])
        carried.append(1 - mine[:, lost].sum(1))
        assert one.statistics.carried == pytest.approx(carried[-1].sum(), rel=1e-4)
    everywhere = np.concatenate(carried)
    assert 0 < (everywhere < MIN_CARRIED).sum() < len(everywhere), "the case that this test is about"
    assert stored == (everywhere >= MIN_CARRIED).sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_close(dtype: torch.dtype, tiny_model_dir: Path) -> None:
    model, chat = load(tiny_model_dir)
    vocabulary = vocabulary_map(chat, chat)
    rows = [align(trace, chat, chat, vocabulary) for trace in traces(6)]
    for spec in (TopK(k=8), ChosenToken()):
        exact = score_rows(model.float(), rows, spec, vocabulary)
        rounded = score_rows(model.to(dtype), rows, spec, vocabulary)
        comparison = Verification(spec, exact=False)
        for one, two in zip(exact, rounded, strict=True):
            comparison.add(one.targets, two.targets)
        assert comparison.holds and comparison.largest > 0, str(comparison)


# The command


def test_scoring_tells_what_it_did_and_does_it_once(recipe: Callable[..., Path]) -> None:
    rows = traces(24)
    rows[3]["completion"] = rows[3]["completion"] * 20
    path = recipe("plain", rows=rows)
    said = score(path)
    assert "24 in · 23 traces kept · 1 dropped (1 too_long)" in said
    assert "probability in the k most probable tokens" in said and "largest difference 0.0" in said
    manifest = check_files(folder_of(path))
    facts = manifest.facts
    assert (manifest.rows_in, manifest.rows_kept, manifest.drops) == (24, 23, {"too_long": 1})
    assert facts["aligned_share"] == facts["carried_mass"] == 1 and facts["same_tokenizer"]
    assert facts["positions"] == facts["targets"] == sum(map(len, rows_of(path).values()))
    assert facts["bytes_per_token"] == pytest.approx(facts["bytes"] / facts["positions"], abs=1e-3)
    assert 0 < facts["captured_mass"]["1"] < facts["captured_mass"]["64"] < 1
    assert facts["verification"]["rows"] == 8 and facts["author"]["parameters"] > 0 and facts["licence"] == "unknown"
    assert {file.name for file in folder_of(path).iterdir()} == {
        *("targets-00000-of-00001.targets", "journal-00000-of-00001.jsonl"),  # what each row gave: to be added to
        *("manifest.json", ".lock"),
    }
    before = contents(folder_of(path))
    assert "nothing to do" in score(path)
    assert contents(folder_of(path)) == before
    refused = distill("score", path, "--score.target.k", "4")
    assert refused.returncode == 1 and "target.k is 8 there and 4 here" in refused.stderr and "--redo" in refused.stderr
    assert "nothing to do" in score(path, "--score.min_aligned", "0.5")  # judges the result, and makes no other
    assert "nothing to do" in score(path, "--shard", "1/3")


@pytest.mark.parametrize("target", ["{kind: sampled, draws: 20}", "{kind: chosen_token}"])
def test_other_kinds_are_verified_too(target: str, recipe: Callable[..., Path]) -> None:
    path = recipe("kinds", target, rows=traces(6))
    assert ("of the draws are equal" if "sampled" in target else "largest difference 0.0") in score(path)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bytes(recipe: Callable[..., Path]) -> None:
    rows = traces(160)
    undisturbed, path = recipe("whole", rows=rows, batch_size=2), recipe("killed", rows=rows, batch_size=2)
    score(undisturbed)
    final = sum(map(len, contents(folder_of(undisturbed)).values()))
    part = folder_of(path) / "targets-00000-of-00001.targets.part"
    for share in (0.15, 0.5):
        with commands.Command(["-m", "distill", "score", path]) as command:
            command.until(lambda share=share: part.exists() and part.stat().st_size > share * final)  # type: ignore[misc]
            assert command.kill() == -signal.SIGKILL, "the kill came too late to test anything"
    assert not (folder_of(path) / "manifest.json").exists() and part.exists()
    refused = distill("score", path, "--train.max_length", "128")
    assert refused.returncode == 1 and "train.max_length is 256 there and 128 here" in refused.stderr
    score(path)
    assert contents(folder_of(path)) == contents(folder_of(undisturbed))
    left, right = (read_manifest(folder_of(run)) for run in (path, undisturbed))
    assert left.digest == right.digest
    for name in ("tokens", "positions", "captured_mass", "aligned_share", "profiled_positions"):
        assert left.facts[name] == right.facts[name]


def test_a_restart_aligns_only_what_is_missing(recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off in the third window of eight traces, of which one in the first and one in the third are too long."""
    monkeypatch.setattr(reading, "WINDOW_ROWS", 8)
    rows = traces(30)
    for index in (3, 20):
        rows[index]["completion"] *= 20
    undisturbed, path = (recipe(name, rows=rows, batch_size=2) for name in ("calm", "cut"))
    score(undisturbed)
    aligned: list[str] = []
    plain_align, plain_store, stored = reading.align, parts._store, []

    def align_and_tell(trace: dict[str, Any], *others: Any) -> AlignedRow:
        aligned.append(key_of(trace))
        return plain_align(trace, *others)

    def store(*arguments: Any) -> None:
        stored.append(arguments)
        if len(stored) == 10:
            raise KeyboardInterrupt
        plain_store(*arguments)

    monkeypatch.setattr(reading, "align", align_and_tell)
    monkeypatch.setattr(parts, "_store", store)
    assert distill("score", path).returncode != 0
    monkeypatch.setattr(parts, "_store", plain_store)
    aligned.clear()
    said = score(path, "--score.verify_rows", "0")
    assert aligned == [key_of(row) for row in rows[16:]]
    assert "28 traces kept · 2 dropped (2 too_long)" in said
    assert contents(folder_of(path)) == contents(folder_of(undisturbed))
    left, right = (read_manifest(folder_of(run)).facts for run in (path, undisturbed))
    for name in ("tokens", "positions", "captured_mass", "aligned_share", "profiled_positions"):
        assert left[name] == right[name]


def test_windows_and_parts_hold_every_trace_once(recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    whole, path = recipe("at-once", rows=traces(30)), recipe("in-windows", rows=traces(30))
    score(whole)
    monkeypatch.setattr(reading, "WINDOW_CHARS", 200)
    monkeypatch.setattr(reading, "_BYTES_AT_ONCE", 1000)
    for part in ("2/2", "1/2"):
        score(path, "--shard", part)
    same_targets(rows_of(path), rows_of(whole))


@pytest.mark.parametrize("shards", [0, 2])
def test_more_traces_are_added_to_those_that_were_read(recipe: Callable[..., Path], shards: int) -> None:
    """What is there is taken over bit by bit, with what it gave; only new traces are read."""
    grown, fresh = recipe("grown", rows=traces(24)[:15]), recipe("fresh")
    score(grown), score(fresh)
    before = rows_of(grown)
    curated = StageFolder(grown.with_suffix("") / "curated", "curate", {"count": 24}, growth=Growth({"count": 15}))
    with curated as out:
        out.write_table("curated", traces(24), TRACE)
        out.finish(rows_in=24, rows_kept=24)
    said = [score(grown, "--shard", f"{shard + 1}/{shards}") for shard in range(shards)] if shards else [score(grown)]
    assert sum(int(number) for number in re.findall(r"(\d+) traces were scored before", "".join(said))) == 15
    after = rows_of(grown)
    same_targets(after, rows_of(fresh))
    for key, targets in before.items():
        np.testing.assert_array_equal(after[key].log_probs, targets.log_probs)
    ours, theirs = read_manifest(folder_of(grown)).facts, read_manifest(folder_of(fresh)).facts
    assert [ours[name] for name in ("tokens", "positions", "targets")] == [theirs[name] for name in ("tokens", "positions", "targets")]
    assert not (folder_of(grown) / EARLIER).exists()


def test_shards_equal_one_process(recipe: Callable[..., Path]) -> None:
    whole, path = recipe("one"), recipe("shards")
    score(whole)
    assert "2 of 3 parts are not yet" in score(path, "--shard", "3/3")
    wrong = distill("score", path, "--shard", "1/4")
    assert wrong.returncode == 1 and "was begun in 3 parts, asked for 4" in wrong.stderr
    for nonsense in ("0/3", "4/3", "three"):
        assert "expected I/N" in distill("score", path, "--shard", nonsense).stderr
    other = distill("score", path, "--shard", "1/3", "--score.target.k", "4")
    assert other.returncode == 1 and "target.k is 8 there and 4 here" in other.stderr
    assert "1 of 3 parts are not yet" in score(path, "--shard", "1/3")
    assert "24 traces kept" in score(path, "--shard", "2/3")
    same_targets(rows_of(path), rows_of(whole))
    assert check_files(folder_of(path)).facts["positions"] == read_manifest(folder_of(whole)).facts["positions"]


@pytest.mark.slow
def test_parts_are_written_side_by_side(recipe: Callable[..., Path]) -> None:
    path = recipe("side-by-side")
    tasks = [commands.Command(["-m", "distill", "score", path, "--shard", f"{part}/3"]) for part in (1, 2, 3)]
    ended = [task.wait() for task in tasks]
    said = [task.stdout for task in ended]
    assert [task.returncode for task in ended] == [0, 0, 0]
    assert "".join(said).count("24 traces kept") == 1
    assert len(rows_of(path)) == 24


def test_a_plain_run_completes_what_shards_began(recipe: Callable[..., Path]) -> None:
    path = recipe("begun")
    score(path, "--shard", "2/4")
    first = contents(folder_of(path))
    with FileLock(folder_of(path) / ".lock"):
        assert "another process is working on this stage" in distill("score", path).stderr
    with FileLock(folder_of(path) / ".lock-00002-of-00004"):
        assert "another process is working on part 00002-of-00004" in distill("score", path).stderr
        assert "another process is working on part 00002-of-00004" in distill("score", path, "--shard", "3/4").stderr
    score(path)
    files = contents(folder_of(path))
    assert len(files) == 4 and files.items() >= first.items() and len(rows_of(path)) == 24
    refused = distill("score", path, "--shard", "2/4", "--redo")
    assert refused.returncode == 1 and "would delete the other parts too" in refused.stderr and contents(folder_of(path)) == files


@pytest.mark.slow
def test_two_processes_share_the_work(recipe: Callable[..., Path]) -> None:
    one, two = recipe("single"), recipe("double")
    score(one)
    said = score(two, processes=2)
    assert said.count("24 traces kept") == 1
    assert set(contents(folder_of(two))) == {"targets-00000-of-00002.targets", "targets-00001-of-00002.targets"}
    same_targets(rows_of(two), rows_of(one))
    assert "nothing to do" in score(two, processes=2)
    assert "nothing to do" in score(two)


def test_other_tokenizers_have_a_limit(recipe: Callable[..., Path], other_model_dir: Path) -> None:
    """The tiny tokenizers differ by `<think>`, so most of a trace carries over: enough for some, not for all."""
    path = recipe("other", teacher=other_model_dir, min_aligned=0.99)
    result = distill("score", path)
    assert result.returncode == 1 and "score.min_aligned: only 9" in result.stderr and "cross_tokenizer" in result.stderr
    assert "in 24 traces from all over" in result.stderr and not contents(folder_of(path))  # before the teacher has read any
    said = score(path, "--score.min_aligned", "0.5")
    assert "other tokenizers: 9" in said
    facts = read_manifest(folder_of(path)).facts
    assert 0.9 < facts["aligned_share"] < 0.99 and facts["carried_mass"] == 1 and not facts["same_tokenizer"]
    assert facts["teacher_tokenizer_digest"] != facts["tokenizer_digest"]
    for targets in rows_of(path).values():
        assert 2 <= (targets.ids < 0).all(1).sum() <= 4


def test_a_k_above_the_vocabulary_is_refused(recipe: Callable[..., Path]) -> None:
    assert "score.target.k: is 500, but the student has 261 tokens" in distill("score", recipe("large", "{kind: top_k, k: 500}")).stderr


def test_altered_shards_are_noticed(recipe: Callable[..., Path]) -> None:
    path = recipe("altered")
    score(path, "--shard", "1/2")
    shard = folder_of(path) / "targets-00000-of-00002.targets"
    whole = shard.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    shard.write_bytes(flipped)
    result = distill("score", path)
    assert result.returncode == 1 and shard.name in result.stderr and "was altered" in result.stderr
    shard.write_bytes(whole)
    score(path)
    shard.write_bytes(flipped)
    with pytest.raises(IntegrityError, match=shard.name):
        check_files(folder_of(path))


@pytest.mark.parametrize("damage", ["line", "all", "skipped", "begun"])
def test_what_a_journal_lost_is_read_again(damage: str, recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a part that was finished, and of one that was begun; as the error of a damaged line advises."""
    rows = [row | {"completion": row["completion"] * (9 if index == 5 else 1)} for index, row in enumerate(traces(12))]
    whole, path = recipe("whole", rows=rows, batch_size=3), recipe("damaged", rows=rows, batch_size=3)
    for each in (whole, path):
        monkeypatch.setattr(reading, "WINDOW_ROWS", 6)
        with monkeypatch.context() as patched, contextlib.suppress(ZeroDivisionError):
            if each == path:
                patched.setattr("distill.stages.score._complete", lambda *_: 1 // 0)
            scored = distill("score", each, "--train.max_length", "160")
    assert scored.returncode == 1 and read_manifest(folder_of(whole)).drops == {"too_long": 1}
    journal, shard = (folder_of(path) / f"{name}" for name in ("journal-00000-of-00001.jsonl", "targets-00000-of-00001.targets"))
    lines = journal.read_bytes().splitlines(keepends=True)
    place = next(index for index, line in enumerate(lines) if (b"skipped" in line) == (damage == "skipped"))
    if damage == "begun":
        shard.rename(shard.with_name(shard.name + ".part"))
    journal.write_bytes(b"".join([*lines[:place], lines[place].replace(b'"key"', b'"kez"'), *lines[place + 1 :]]))
    refused = distill("score", path, "--train.max_length", "160")
    assert refused.returncode == 1 and f"{journal}:{place + 1}: this line was altered" in refused.stderr
    journal.write_bytes(b"" if damage == "all" else b"".join(lines[:place] + lines[place + 1 :]))
    score(path, "--train.max_length", "160")
    left, right = (read_manifest(folder_of(each)) for each in (path, whole))
    assert (left.digest, left.drops) == (right.digest, right.drops)
    assert all(left.facts[name] == right.facts[name] for name in ("tokens", "positions", "captured_mass"))


@pytest.mark.parametrize("target", ["{kind: top_k, k: 8}", "{kind: sampled, draws: 20}", "{kind: chosen_token}"])
def test_targets_that_the_teacher_does_not_think_are_noticed(target: str, recipe: Callable[..., Path]) -> None:
    """A shard that is whole, but holds each row's targets one position late."""
    path = recipe("shifted", target)
    score(path, "--shard", "1/2")
    shard = folder_of(path) / "targets-00000-of-00002.targets"
    reader = TargetReader([shard])
    rows = {reader.key(row): reader[row] for row in range(len(reader))}
    shard.unlink()
    with TargetWriter(shard, reader.header) as writer:
        for key, row in rows.items():
            late = [len(row) - 1, *range(len(row) - 1)]
            writer.append(key, Targets(row.ids[late], row.log_probs[late], row.log_rest[late]))
        assert writer.close() == digest_file(shard)
    result = distill("score", path, "--score.verify_rows", "24")
    assert result.returncode == 1 and "differs from what the teacher thinks now" in result.stderr
    assert not (folder_of(path) / "manifest.json").exists()


def test_a_trace_twice_is_refused(recipe: Callable[..., Path]) -> None:
    rows = traces(3)
    result = distill("score", recipe("twice", rows=[*rows, rows[1]]))
    assert result.returncode == 1 and f"trace {key_of(rows[1])} is there twice" in result.stderr


def test_student_rollouts_are_read_as_they_were_drawn(tmp_path: Path, tiny_model_dir: Path, recipe: Callable[..., Path]) -> None:
    """In a round the ids count, not what tokenising their text would give; a cut-off one has no end of turn."""
    chat = chat_format(AutoTokenizer.from_pretrained(tiny_model_dir))
    rollouts = []
    for trace in traces(4):
        drawn = chat.tokenizer("<think>", add_special_tokens=False)["input_ids"]
        plain = [chat.tokenizer.convert_tokens_to_ids(letter) for letter in "<think>"]
        assert drawn != plain
        prompt = chat.prompt_ids(trace["messages"])
        rollouts.append({**trace, "author": "student", "completion": "<think>", "prompt_ids": prompt, "completion_ids": plain})
        rollouts[-1]["finish_reason"] = "length"
    path = recipe("rounds")
    with StageFolder(tmp_path / "rounds" / "rounds" / "01" / "rollouts", "rollouts", {}) as out:
        out.write_table("traces", rollouts, TRACE)
        out.finish(rows_in=4, rows_kept=4)
    path.write_text(path.read_text() + "rounds: 1\nrollouts: {max_new_tokens: 64}\n")
    score(path, "--round", "1")
    manifest = read_manifest(tmp_path / "rounds" / "rounds" / "01" / "targets")
    assert manifest.rows_kept == 4 and manifest.facts["positions"] == 4 * 7
    assert IGNORE not in plain
