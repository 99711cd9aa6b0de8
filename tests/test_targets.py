"""Stored targets: small, within the stated error, unbiased, resumable, and noticed when altered."""

from __future__ import annotations

import json
import math
import pickle
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.errors import DataError, IntegrityError, ModelError, StageConflictError
from distill.run.files import digest_file
from distill.run.folder import StageFolder
from distill.run.manifest import check_files
from distill.targets.bits import BitReader, BitWriter
from distill.targets.codec import Codec, Targets, concatenate, log_one_minus_exp, square_grid, square_grid_error, weight_grid
from distill.targets.files import TargetReader, TargetWriter
from distill.targets.kinds import MassSummary, chosen_token, sampled, top_k, uniforms
from distill.targets.spec import ChosenToken, Sampled, TargetHeader, TargetSpec, TopK

VOCAB_SIZES = [2, 3, 256, 151_936, 262_144]
SPECS: list[TargetSpec] = [
    TopK(k=8),
    TopK(k=8, min_probability=0.01),
    Sampled(draws=20),
    Sampled(draws=20, stratified=True),
    Sampled(draws=20, proposal_temperature=1.5),
    Sampled(draws=20, proposal_temperature=0.7),
    ChosenToken(),
]


def spec_id(spec: TargetSpec) -> str:
    return "-".join(str(value) for value in spec.model_dump().values())


def header(target: TargetSpec, vocab_size: int = 50, **changes: object) -> TargetHeader:
    fields = {
        "teacher_model": "teacher",
        "teacher_revision": None,
        "tokenizer_digest": "t" * 64,
        "template_digest": "c" * 64,
        "teacher_tokenizer_digest": "u" * 64,
        "teacher_template_digest": "d" * 64,
        "traces_digest": "r" * 64,
    }
    return TargetHeader(target=target, vocab_size=vocab_size, **(fields | changes))


def targets_of(spec: TargetSpec, logits: torch.Tensor, vocab_size: int, key: str = "trace") -> Targets:
    if isinstance(spec, TopK):
        return top_k(logits, spec.model_copy(update={"k": min(spec.k, vocab_size)}), vocab_size)
    if isinstance(spec, Sampled):
        return sampled(logits, spec, vocab_size, uniforms(spec, key, len(logits)))
    return chosen_token(logits, torch.arange(len(logits)) % vocab_size, vocab_size)


def random_logits(positions: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    """Positions from almost certain to almost uniform."""
    generator = torch.Generator().manual_seed(seed)
    sharpness = torch.logspace(-1, 1.2, max(positions, 1))[:positions, None]
    return torch.randn(positions, vocab_size, generator=generator) * sharpness


def stated_error(nats: np.ndarray, last_code: int) -> np.ndarray:
    """The bound of FORMAT.md, with a little for float32."""
    return np.sqrt(88 * nats) / last_code + 22 / last_code**2 + 1e-6 * (1 + nats)


def assert_close(decoded: Targets, original: Targets, spec: TargetSpec) -> None:
    """Equal ids, and probabilities within what FORMAT.md states for the kind."""
    np.testing.assert_array_equal(decoded.ids, original.ids)
    assert (decoded.ids.dtype, decoded.log_probs.dtype, decoded.log_rest.dtype) == (np.int32, np.float32, np.float32)
    assert decoded.log_probs.shape == original.log_probs.shape
    known = original.log_probs > -np.inf
    np.testing.assert_array_equal(decoded.log_probs > -np.inf, known)
    exact, got = original.log_probs[known].astype(float), decoded.log_probs[known].astype(float)
    if isinstance(spec, Sampled):
        limit = 1e-6 if spec.proposal_temperature == 1 else 1 / 128 + 1e-5
        assert (np.abs(got - exact) <= limit).all()
        assert (decoded.log_rest == -np.inf).all()
        return
    floored = np.maximum(exact, -88)
    assert (np.abs(got - floored) <= stated_error(-floored, 2046 if isinstance(spec, TopK) else 16382)).all()
    if isinstance(spec, TopK):
        np.testing.assert_array_equal(decoded.log_rest == -np.inf, original.log_rest == -np.inf)
        rest = np.maximum(original.log_rest.astype(float), -88)
        assert (np.abs(np.maximum(decoded.log_rest, -88) - rest) <= stated_error(-rest, 16382)).all()


def round_trip(spec: TargetSpec, targets: Targets, vocab_size: int) -> Targets:
    codec = Codec(spec, vocab_size)
    return codec.decode(codec.encode(targets))


# The codec


@pytest.mark.parametrize("width", [0, 1, 2, 7, 8, 9, 17, 31, 32])
def test_fixed_streams_come_back(width: int) -> None:
    for count in (0, 1, 7, 8, 9, 100):
        values = np.random.default_rng(count).integers(0, 2**width, count)
        values[:1] = 2**width - 1
        writer = BitWriter()
        writer.fixed(values, width)
        writer.fixed(values[::-1], width)
        data = writer.to_bytes()
        assert len(data) == 4 + 2 * math.ceil(count * width / 8)
        reader = BitReader(data)
        assert reader.fixed(count, width).tolist() == values.tolist()
        assert reader.fixed(count, width).tolist() == values[::-1].tolist()


def test_rice_streams_come_back() -> None:
    streams = [np.array(values, np.int64) for values in ([], [0], [0] * 9, [3, 1000, 0, 2**31 - 1], range(500), [2**31] * 3)]
    writer = BitWriter()
    for values in streams:
        writer.rice(values)
    reader = BitReader(writer.to_bytes())
    for values in streams:
        assert reader.rice(len(values)).tolist() == values.tolist()


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_every_kind_comes_back_within_the_stated_error(spec: TargetSpec, vocab_size: int) -> None:
    original = targets_of(spec, random_logits(9, vocab_size), vocab_size)
    assert_close(round_trip(spec, original, vocab_size), original, spec)


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
@pytest.mark.parametrize("vocab_size", [8, 151_936])
def test_extreme_distributions_come_back(spec: TargetSpec, vocab_size: int) -> None:
    rows = torch.zeros(6, vocab_size)
    rows[0] = -torch.inf
    rows[0, -1] = 3.0  # all mass on the last id
    rows[1] = 0.0  # uniform
    rows[2, 1:] = -torch.inf
    rows[2, 1] = 0.0  # two equal ones, nothing else
    rows[3, 0] = 60.0  # a rest that rounds to 0 beside 1
    rows[4, :4] = -200.0  # below the floor, and the rest nearly 1 of a large vocabulary
    rows[5, 2:5] = 1.0  # ties at the top
    original = targets_of(spec, rows, vocab_size)
    assert_close(round_trip(spec, original, vocab_size), original, spec)


def test_all_of_a_tiny_vocabulary_leaves_no_rest() -> None:
    logits = random_logits(5, 6)
    original = top_k(logits, TopK(k=6), 6)
    assert (original.log_rest == -np.inf).all()
    decoded = round_trip(TopK(k=6), original, 6)
    dense = np.zeros((5, 6))
    np.put_along_axis(dense, decoded.ids.astype(int), np.exp(decoded.log_probs), 1)
    np.testing.assert_allclose(dense, logits.softmax(-1), atol=2e-3)


def test_tokens_without_probability_are_no_candidates() -> None:
    logits = torch.full((2, 50), -torch.inf)
    logits[0, [3, 7]] = torch.tensor([0.0, 1.0])
    logits[1, 9] = 0.0
    targets = top_k(logits, TopK(k=8), 50)
    assert targets.ids.tolist() == [[7, 3], [9, -1]]
    assert (targets.log_rest == -np.inf).all()


@pytest.mark.parametrize("spec", [TopK(k=8), Sampled(draws=20), Sampled(draws=20, proposal_temperature=1.5)], ids=spec_id)
def test_ids_that_come_back_are_written_once(spec: TargetSpec) -> None:
    vocab_size, used = 151_936, np.random.default_rng(0).permutation(151_936)[:32]
    logits = torch.full((100, vocab_size), -torch.inf)
    logits[:, used] = random_logits(100, 32)
    original = targets_of(spec, logits, vocab_size)
    codec = Codec(spec, vocab_size)
    payload = codec.encode(original)
    assert_close(codec.decode(payload), original, spec)
    candidates = int((original.ids >= 0).sum())
    assert len(payload) < candidates * (17 + 1) / 8  # less than the ids alone in full, one bit for each value added
    about = json.loads(header(spec, vocab_size).model_dump_json())
    for (ids, _, _), row in zip(slow_decode(payload, about), original.ids, strict=True):
        assert row[: len(ids)].tolist() == ids


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_a_trace_without_supervised_tokens_comes_back(spec: TargetSpec) -> None:
    original = targets_of(spec, torch.zeros(0, 50), 50)
    decoded = round_trip(spec, original, 50)
    assert len(decoded) == 0
    assert decoded.log_probs.shape[0] == decoded.ids.shape[0] == 0


def without_some(targets: Targets, spec: TargetSpec, places: list[int]) -> Targets:
    """The same with no target at some positions."""
    ids, log_probs, log_rest = targets.ids.copy(), targets.log_probs.copy(), targets.log_rest.copy()
    ids[places], log_probs[places] = -1, -np.inf
    log_rest[places] = -np.inf if isinstance(spec, Sampled) else 0
    return Targets(ids, log_probs, log_rest)


@pytest.mark.parametrize("places", [[0], [8], [0, 3, 4, 8], list(range(9))], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_positions_without_a_target_come_back(spec: TargetSpec, places: list[int]) -> None:
    original = without_some(targets_of(spec, random_logits(9, 50), 50), spec, places)
    codec = Codec(spec, 50)
    payload = codec.encode(original)
    decoded = codec.decode(payload)
    width = decoded.log_probs.shape[1]
    assert_close(decoded, Targets(original.ids[:, :width], original.log_probs[:, :width], original.log_rest), spec)
    assert (original.ids[:, width:] == -1).all()
    assert decoded.log_rest[places] == pytest.approx(-np.inf if isinstance(spec, Sampled) else 0)
    about = json.loads(header(spec, 50).model_dump_json())
    for (ids, probs, _), row in zip(slow_decode(payload, about), original.ids, strict=True):
        assert row[row >= 0].tolist() == ids
        assert len(probs) == (len(ids) or isinstance(spec, ChosenToken))


@pytest.mark.parametrize(("bits", "last_code"), [(11, 2046), (14, 16382)])
def test_the_grid_keeps_the_stated_error_everywhere(bits: int, last_code: int) -> None:
    grid = square_grid(bits)
    nats = np.concatenate([np.linspace(0, 88, 200_001), np.logspace(-9, 1.9, 10_001)]).astype(np.float32)
    error = np.abs(grid.values[grid.codes(-nats)].astype(float) + nats)
    assert (error <= stated_error(nats.astype(float), last_code)).all()
    np.testing.assert_allclose(square_grid_error(nats.astype(float), bits), stated_error(nats.astype(float), last_code), atol=1e-4)
    ends = grid.values[grid.codes(np.array([0.0, -88.0, -1e30, -np.inf], np.float32))]
    assert ends.tolist() == [0.0, -88.0, -88.0, -np.inf]


@pytest.mark.parametrize("tau", [0.5, 0.8, 1.25, 4.0])
def test_weights_keep_the_stated_error(tau: float) -> None:
    grid = weight_grid(Sampled(proposal_temperature=tau), 151_936)
    log_weights = np.linspace(-87, math.log(151_936) * max(1 - 1 / tau, 0), 10_001).astype(np.float32)
    ratio = np.exp(grid.values[grid.codes(log_weights)].astype(float) - log_weights)
    assert np.abs(ratio - 1).max() <= 0.008


@pytest.mark.parametrize(
    ("spec", "ids", "log_probs", "log_rest", "said"),
    [
        (TopK(k=2), [[7, 50]], [[-1.0, -2.0]], [-1.0], "below the vocabulary's 50"),
        (TopK(k=2), [[-1, 7]], [[-np.inf, -2.0]], [-1.0], "padded"),
        (TopK(k=2), [[7, 8]], [[-2.0, -1.0]], [-1.0], "must not rise"),
        (TopK(k=2), [[7, 8]], [[np.nan, -1.0]], [-1.0], "NaN"),
        (TopK(k=2), [[7, 8]], [[0.1, -1.0]], [-1.0], "above 0"),
        (TopK(k=2), [[7, -1]], [[-1.0, -2.0]], [-1.0], "padded"),
        (TopK(k=2), [[7, 8]], [[-1.0, -2.0]], [0.5], "above 0"),
        (TopK(k=2), [[7, 8]], [[-1.0, -2.0]], [-1.0, -1.0], "shapes"),
        (Sampled(draws=4), [[7, 8]], [np.log([0.5, 0.25])], [-np.inf], "sum to 4"),
        (Sampled(draws=4), [[8, 7]], [np.log([0.5, 0.5])], [-np.inf], "must rise"),
        (ChosenToken(), [[7, 8]], [[-1.0, -2.0]], [-1.0], "one log-probability"),
    ],
)
def test_what_breaks_the_promises_is_refused(spec: TargetSpec, ids: list, log_probs: list, log_rest: list, said: str) -> None:
    targets = Targets(np.array(ids, np.int32), np.array(log_probs, np.float32), np.array(log_rest, np.float32))
    with pytest.raises(ValueError, match=said):
        Codec(spec, 50).encode(targets)


def test_parts_of_a_trace_go_together() -> None:
    logits = random_logits(7, 50)
    for spec in SPECS:
        whole = targets_of(spec, logits, 50)
        again = concatenate([whole[:3], whole[3:4], whole[4:]])
        for name in ("ids", "log_probs", "log_rest"):
            np.testing.assert_array_equal(getattr(again, name), getattr(whole, name))


def test_the_rest_of_a_chosen_token_is_one_minus_it() -> None:
    log_probs = np.array([0.0, -1e-6, -0.5, -1.0, -30.0, -np.inf], np.float32)
    expected = [1 - math.exp(float(x)) if x < -1e-3 else -math.expm1(float(x)) for x in log_probs]
    np.testing.assert_allclose(np.exp(log_one_minus_exp(log_probs)), expected, rtol=1e-6)


def test_the_bars_on_size() -> None:
    """Bytes a token at V = 151,936, 50 draws hitting about 12 ids that are anywhere in the vocabulary (the hardest case)."""
    vocab_size, positions = 151_936, 512
    rng = np.random.default_rng(0)
    sharpness = np.exp(rng.normal(2.37, 0.8, positions)).astype(np.float32)
    sizes: dict[str, int] = {"sampled": 0, "top_k": 0, "chosen_token": 0}
    parts: dict[str, list[Targets]] = {name: [] for name in sizes}
    specs: dict[str, TargetSpec] = {"sampled": Sampled(), "top_k": TopK(), "chosen_token": ChosenToken()}
    for start in range(0, positions, 64):
        logits = torch.from_numpy(rng.standard_normal((64, vocab_size), dtype=np.float32) * sharpness[start : start + 64, None])
        for name, spec in specs.items():
            parts[name].append(targets_of(spec, logits, vocab_size, f"{start}"))
    whole = {name: concatenate(part) for name, part in parts.items()}
    assert 10 < (whole["sampled"].ids >= 0).sum(1).mean() < 15
    size = {name: len(Codec(specs[name], vocab_size).encode(targets)) / positions for name, targets in whole.items()}
    assert size["sampled"] <= 36
    assert size["top_k"] <= 200
    assert size["chosen_token"] <= 2


# Files


def write(path: Path, spec: TargetSpec, lengths: list[int], first: int = 0, vocab_size: int = 50) -> list[Targets]:
    rows = [targets_of(spec, random_logits(length, vocab_size, seed=first + index), vocab_size) for index, length in enumerate(lengths)]
    with TargetWriter(path, header(spec, vocab_size)) as writer:
        for index, row in enumerate(rows):
            writer.append(f"prompt-{first + index}/ä", row)
        assert writer.close() == digest_file(path)
    return rows


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_rows_are_read_in_any_order_and_across_shards(tmp_path: Path, spec: TargetSpec) -> None:
    paths = [tmp_path / f"targets-{shard:05d}.targets" for shard in range(3)]
    rows = write(paths[0], spec, [5, 0, 12]) + write(paths[1], spec, [], 3) + write(paths[2], spec, [1, 30], 3)
    reader = TargetReader(paths)
    assert len(reader) == 5
    assert reader.header == header(spec)
    assert reader.positions.tolist() == [5, 0, 12, 1, 30]
    in_order = [reader[row] for row in range(5)]
    for row in (3, 0, 4, 1, 2, 3):
        assert reader.key(row) == f"prompt-{row}/ä"
        assert reader.find(f"prompt-{row}/ä") == row
        np.testing.assert_array_equal(reader[row].ids, in_order[row].ids)
        np.testing.assert_array_equal(reader[row].log_probs, in_order[row].log_probs)
        if len(rows[row]):
            assert_close(reader[row], rows[row], spec)
    assert [len(row) for row in reader] == [5, 0, 12, 1, 30]
    with pytest.raises(IndexError, match="no row 5, only 5"):
        reader[5]
    with pytest.raises(KeyError):
        reader.find("prompt-9/ä")
    copy = pickle.loads(pickle.dumps(reader))
    np.testing.assert_array_equal(copy[4].ids, reader[4].ids)


def test_a_row_cut_anywhere_is_cut_off_and_the_shard_goes_on(tmp_path: Path) -> None:
    spec = Sampled(draws=20)
    whole = tmp_path / "whole.targets"
    rows = write(whole, spec, [4, 6, 3])
    begun = tmp_path / "begun.targets"
    with TargetWriter(begun, header(spec)) as writer:
        ends = []
        for index, row in enumerate(rows):
            writer.append(f"prompt-{index}/ä", row)
            ends.append((tmp_path / "begun.targets.part").stat().st_size)
    data = (tmp_path / "begun.targets.part").read_bytes()
    index = whole.read_bytes()[len(data) :]
    cuts = [(data[:cut], 2) for cut in range(ends[1], ends[2])]
    cuts += [(data + index[:cut], 3) for cut in range(len(index) + 1)]
    cuts += [(data[:cut], 0) for cut in range(ends[0])]
    for torn, survivors in cuts:
        path = tmp_path / "torn.targets"
        (tmp_path / "torn.targets.part").write_bytes(torn)
        with TargetWriter(path, header(spec)) as writer:
            assert len(writer) == survivors
            assert [f"prompt-{index}/ä" in writer for index in range(3)] == [index < survivors for index in range(3)]
            for number in range(survivors, 3):
                writer.append(f"prompt-{number}/ä", rows[number])
            writer.close()
        assert path.read_bytes() == whole.read_bytes()
        path.unlink()
    short = tmp_path / "short.targets"
    with TargetWriter(short, header(spec)) as writer:
        writer.append("prompt-0/ä", rows[0])
        writer.close()
    for torn in (data[: ends[1] - 1], data[: ends[0]] + index):
        (tmp_path / "torn.targets.part").write_bytes(torn)
        with TargetWriter(tmp_path / "torn.targets", header(spec)) as writer:
            writer.close()
        assert (tmp_path / "torn.targets").read_bytes() == short.read_bytes()
        (tmp_path / "torn.targets").unlink()


def test_a_complete_shard_that_was_cut_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "targets.targets"
    write(path, TopK(k=3), [2, 3])
    data = path.read_bytes()
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        with pytest.raises(IntegrityError, match=r"targets\.targets"):
            TargetReader([path])


def read_all(path: Path) -> None:
    reader = TargetReader([path])
    for row in range(len(reader)):
        reader.key(row)
        _ = reader[row]


@pytest.mark.parametrize("bit", [0, 7])
def test_a_flipped_bit_anywhere_is_noticed(tmp_path: Path, bit: int) -> None:
    path, part = tmp_path / "targets.targets", tmp_path / "targets.targets.part"
    write(path, Sampled(draws=20), [3, 0, 4])
    read_all(path)
    data = path.read_bytes()
    (index_offset,) = struct.unpack_from("<Q", data, len(data) - 16)
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << bit
        path.write_bytes(flipped)
        with pytest.raises(IntegrityError, match=r"targets\.targets"):
            read_all(path)
        if place < index_offset:
            path.unlink()
            part.write_bytes(flipped[:index_offset])
            with pytest.raises(IntegrityError, match=r"targets\.targets\.part"):
                TargetWriter(path, header(Sampled(draws=20)))
            part.unlink()


def test_rows_survive_a_kill(tmp_path: Path) -> None:
    program = """
import os, signal, sys
from pathlib import Path
import numpy as np
from distill.targets.codec import Targets
from distill.targets.files import TargetWriter
from distill.targets.spec import TargetHeader
writer = TargetWriter(Path(sys.argv[1]), TargetHeader.model_validate_json(sys.argv[2]))
row = Targets(np.empty((2, 0), np.int32), np.array([[-1.0], [-2.0]], np.float32), np.zeros(2, np.float32))
for key in "abc":
    writer.append(key, row)
assert "torch" not in sys.modules
os.kill(os.getpid(), signal.SIGKILL)
"""
    path = tmp_path / "targets.targets"
    about = header(ChosenToken())
    killed = subprocess.run(
        [sys.executable, "-c", program, str(path), about.model_dump_json()], capture_output=True, text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with pytest.raises(IntegrityError, match="not finished"):
        TargetReader([path])
    with TargetWriter(path, about) as writer:
        assert len(writer) == 3
        writer.close()
    np.testing.assert_allclose(TargetReader([path])[2].log_probs[:, 0], [-1, -2], atol=1e-3)


def test_other_settings_and_second_rows_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "targets.targets"
    row = targets_of(TopK(k=3), random_logits(2, 50), 50)
    with TargetWriter(path, header(TopK(k=3))) as writer:
        writer.append("a", row)
        with pytest.raises(ValueError, match="'a' already"):
            writer.append("a", row)
    with pytest.raises(StageConflictError, match=r"vocab_size is 50, asked for 51"):
        TargetWriter(path, header(TopK(k=3), 51))
    with TargetWriter(path, header(TopK(k=3))) as writer:
        writer.close()
    with pytest.raises(StageConflictError, match="is complete"):
        TargetWriter(path, header(TopK(k=3)))
    other = tmp_path / "other.targets"
    with TargetWriter(other, header(TopK(k=3), teacher_revision="main")) as writer:
        writer.close()
    with pytest.raises(IntegrityError, match=r"teacher_revision is main, asked for None"):
        TargetReader([path, other])
    with pytest.raises(IntegrityError, match="is gone"):
        TargetReader([tmp_path / "none.targets"])
    with pytest.raises(IntegrityError, match="no shard"):
        TargetReader([])
    with pytest.raises(ValueError, match="lower k"):
        header(TopK(k=51), 50)


def test_a_newer_format_is_told_apart_from_damage(tmp_path: Path) -> None:
    path = tmp_path / "targets.targets"
    write(path, ChosenToken(), [2])
    data = bytearray(path.read_bytes())
    data[7] = 2
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="format version 2, this kit reads 1"):
        TargetReader([path])


def test_a_stage_keeps_the_digest_of_its_shards(tmp_path: Path) -> None:
    with StageFolder(tmp_path / "targets", "score", {}) as out:
        path = out.path / "targets-00000.targets"
        write(path, TopK(k=3), [2, 3])
        manifest = out.finish(files=[path])
    assert manifest.files == {path.name: digest_file(path)}
    check_files(tmp_path / "targets")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(IntegrityError, match=path.name):
        check_files(tmp_path / "targets")


class SlowReader:
    """A row's block of streams read bit by bit, as FORMAT.md describes it."""

    def __init__(self, block: bytes) -> None:
        self.block = block
        self.at = 4
        self.unary_bit = 8 * int.from_bytes(block[:4], "little")

    def bit(self, index: int) -> int:
        return self.block[index // 8] >> (index % 8) & 1

    def fixed(self, count: int, width: int) -> list[int]:
        start = 8 * self.at
        self.at += -(-count * width // 8)
        return [sum(self.bit(start + v * width + i) << i for i in range(width)) for v in range(count)]

    def rice(self, count: int) -> list[int]:
        shift = self.block[self.at]
        self.at += 1
        values = self.fixed(count, shift)
        for place in range(count):
            while not self.bit(self.unary_bit):
                values[place] += 1 << shift
                self.unary_bit += 1
            self.unary_bit += 1
        return values


def slow_decode(payload: bytes, about: dict) -> list[tuple[list[int], list[float], float]]:
    """Ids, probabilities or weights, and rest of each position, as FORMAT.md describes them."""
    target, vocab_size = about["target"], about["vocab_size"]
    kind = target["kind"]

    def grid(width: int, code: int) -> float:
        return math.exp(-88 * (code / (2**width - 2)) ** 2) if code < 2**width - 1 else 0.0

    (n,) = struct.unpack_from("<I", payload)
    if kind == "chosen_token":
        return [([], [grid(14, code)], 1 - grid(14, code)) for code in SlowReader(payload[4:]).rice(n)]
    entries, fewest, number_width, place_width = struct.unpack_from("<IIBB", payload, 4)
    streams = SlowReader(payload[14:])
    numbers = [fewest + number for number in streams.fixed(n, number_width)]
    rests = [grid(14, code) for code in streams.rice(n)] if kind == "top_k" else [0.0] * n
    counted = kind == "sampled" and target["proposal_temperature"] == 1
    gaps = streams.rice(sum(numbers) - counted * sum(number > 0 for number in numbers))
    dictionary: list[int] = []
    for gap in streams.rice(entries):
        dictionary.append(gap + (dictionary[-1] + 1 if dictionary else 0))
    probs: list[list[float]] = []
    ties: list[list[bool]] = []
    for number in numbers:
        if counted and number:
            own, gaps = gaps[: number - 1], gaps[number - 1 :]
            counts = [1 + sum(own[j:]) for j in range(number - 1)]
            counts = [target["draws"] - sum(counts), *counts]
            probs.append([count / target["draws"] for count in counts])
            ties.append([j > 0 and counts[j] == counts[j - 1] for j in range(number)])
            continue
        own, gaps = gaps[:number], gaps[number:]
        codes = [sum(own[: j + 1]) for j in range(number)]
        tau = target.get("proposal_temperature", 1)
        highest = math.ceil(math.log(vocab_size) * (1 - 1 / tau)) + 1 if tau > 1 else 89
        probs.append([grid(11, code) if kind == "top_k" else math.exp(highest - code / 64) for code in codes])
        ties.append([False] * number)
    num_tied = sum(map(sum, ties))
    steps, heads = iter(streams.rice(num_tied)), iter(streams.fixed(sum(numbers) - num_tied, place_width))
    rows = []
    for tied, values, rest in zip(ties, probs, rests, strict=True):
        places: list[int] = []
        for is_tied in tied:
            places.append(places[-1] + 1 + next(steps) if is_tied else next(heads))
        rows.append(([dictionary[place] if dictionary else place for place in places], values, rest))
    return rows


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
@pytest.mark.parametrize("vocab_size", [50, 151_936])
def test_a_reader_written_from_the_format_alone_agrees(tmp_path: Path, spec: TargetSpec, vocab_size: int) -> None:
    path = tmp_path / "targets.targets"
    write(path, spec, [4, 0, 20], vocab_size=vocab_size)
    reader = TargetReader([path])
    data = path.read_bytes()
    size, crc = struct.unpack_from("<II", data, 8)
    assert data[:8] == b"DSTLTGT\x01"
    assert crc == zlib.crc32(data[:8] + data[16 : 16 + size])
    about = json.loads(data[16 : 16 + size])
    offset, offsets, keys = 16 + size, [], []
    for row in range(3):
        tag, payload_bytes, n, key_bytes, body_crc, frame_crc = struct.unpack_from("<4sIIIII", data, offset)
        body = data[offset + 24 : offset + 24 + key_bytes + payload_bytes]
        assert tag == b"ROW\n"
        assert (body_crc, frame_crc) == (zlib.crc32(body), zlib.crc32(data[offset : offset + 20]))
        keys.append(body[:key_bytes].decode())
        slow, fast = slow_decode(body[key_bytes:], about), reader[row]
        assert len(slow) == len(fast) == n
        for (ids, probs, rest), fast_ids, log_probs, log_rest in zip(slow, fast.ids, fast.log_probs, fast.log_rest, strict=True):
            assert fast_ids[: len(ids)].tolist() == ids
            assert (fast_ids[len(ids) :] == -1).all()
            np.testing.assert_allclose(np.exp(log_probs[: len(probs)]), probs, rtol=2e-5)
            assert (log_probs[len(probs) :] == -np.inf).all()
            np.testing.assert_allclose(np.exp(log_rest), rest, rtol=2e-5, atol=1e-7)
        offsets.append(offset)
        offset += 24 + len(body)
    assert keys == [reader.key(row) for row in range(3)]
    assert data[offset : offset + 4] == b"IDX\n"
    assert [struct.unpack_from("<QQI", data, offset + 4 + 20 * row)[0] for row in range(3)] == offsets
    assert [struct.unpack_from("<QQI", data, offset + 4 + 20 * row)[2] for row in range(3)] == [4, 0, 20]
    assert struct.unpack_from("<QII", data, offset + 64) == (offset, 3, zlib.crc32(data[offset:-4]))
    assert len(data) == offset + 80


# Kinds


def test_top_k_is_the_definition() -> None:
    logits = random_logits(20, 50).double()
    targets = top_k(logits.float(), TopK(k=5), 50)
    for position, row in enumerate(logits.numpy()):
        p = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        best = np.argsort(-p)[:5]
        assert targets.ids[position].tolist() == best.tolist()
        np.testing.assert_allclose(np.exp(targets.log_probs[position]), p[best], rtol=1e-5)
        np.testing.assert_allclose(np.exp(targets.log_rest[position]), np.delete(p, best).sum(), rtol=1e-5)


def test_improbable_candidates_go_to_the_rest() -> None:
    p = torch.tensor([[0.7, 0.2, 0.09, 0.009, 0.001], [0.2, 0.2, 0.2, 0.2, 0.2]])
    targets = top_k(p.log(), TopK(k=4, min_probability=0.05), 5)
    assert targets.ids[0].tolist() == [0, 1, 2, -1]
    assert (targets.ids[1] >= 0).all()
    np.testing.assert_allclose(np.exp(targets.log_rest), [0.01, 0.2], rtol=1e-5)
    only_best = top_k(p.log(), TopK(k=4, min_probability=0.9), 5)
    assert only_best.ids.shape == (2, 1)
    np.testing.assert_allclose(np.exp(only_best.log_rest), [0.3, 0.8], rtol=1e-5)


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_pad_the_vocabulary_count_for_nothing(spec: TargetSpec, dtype: torch.dtype) -> None:
    logits = random_logits(8, 50).to(dtype)
    padded = torch.cat([logits, torch.full((8, 14), 30.0, dtype=dtype)], dim=1)
    plain, masked = targets_of(spec, logits, 50), targets_of(spec, padded, 50)
    for name in ("ids", "log_probs", "log_rest"):
        np.testing.assert_array_equal(getattr(masked, name), getattr(plain, name))


def test_chosen_token_reads_the_written_ids() -> None:
    logits = random_logits(6, 50)
    written = torch.tensor([3, 49, 0, 7, 7, 12])
    expected = torch.nn.functional.cross_entropy(logits.double(), written, reduction="none")
    np.testing.assert_allclose(-chosen_token(logits, written, 50).log_probs[:, 0], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(DataError, match="token id 50, the teacher's vocabulary ends at 49"):
        chosen_token(logits, torch.tensor([3, 49, 0, 7, 50, 12]), 50)


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_logits_that_are_no_distribution_are_refused(spec: TargetSpec) -> None:
    for value in (torch.nan, torch.inf):
        logits = random_logits(4, 50)
        logits[2, 7] = value
        with pytest.raises(ModelError, match="1 of 4 positions"):
            targets_of(spec, logits, 50)
    with pytest.raises(ModelError, match="40 logits, fewer than"):
        targets_of(spec, torch.zeros(2, 40), 50)


def test_draws_are_the_quantiles_of_the_distribution() -> None:
    p = torch.tensor([[0.0, 0.5, 0.0, 0.25, 0.25, 0.0]])
    edges = np.array([[0.0, 0.499, 0.501, 0.749, 0.751, np.nextafter(1.0, 0.0)]])
    targets = sampled(p.log(), Sampled(draws=6), 6, edges)
    assert targets.ids.tolist() == [[1, 3, 4]]
    np.testing.assert_allclose(np.exp(targets.log_probs), [[2 / 6] * 3], rtol=1e-6)
    first = sampled(p.log(), Sampled(draws=6), 6, np.array([[0.1, 0.1, 0.1, 0.9, 0.9, 0.6]]))
    assert first.ids.tolist() == [[1, 4, 3]]
    np.testing.assert_allclose(np.exp(first.log_probs), [[3 / 6, 2 / 6, 1 / 6]], rtol=1e-6)


def test_no_draw_falls_behind_the_last_possible_token() -> None:
    logits = random_logits(200, 50)
    logits[:, 40:] = -torch.inf
    for tau in (1.0, 1.5):
        spec = Sampled(draws=2, proposal_temperature=tau)
        # The last stratum's number (N - 1 + u) / N can round to 1.
        targets = sampled(logits, spec, 50, np.ones((200, 2)))
        assert targets.ids.max() < 40
        assert np.isfinite(targets.log_probs[:, 0]).all()


def test_a_long_tail_is_drawn_from_evenly() -> None:
    """Tokens of 7e-10 each behind one of 0.9999: sums in float32 could not tell most of them apart."""
    tail = 150_000
    p = torch.full((1, tail + 1), 1e-4 / tail, dtype=torch.float64)
    p[0, 0] = 1 - 1e-4
    quantiles = 1 - 1e-4 * (1 - (np.arange(2000) + 0.5) / 2000)
    targets = sampled(p.log().float(), Sampled(draws=2000), tail + 1, quantiles[None])
    assert targets.ids.shape[1] >= 1990
    np.testing.assert_allclose(np.sort(targets.ids[0]), tail * (np.arange(targets.ids.shape[1]) + 0.5) / 2000, atol=0.01 * tail)


@pytest.mark.parametrize("stratified", [False, True], ids=["independent", "stratified"])
@pytest.mark.parametrize("tau", [1.0, 1.5, 0.8])
def test_sampled_is_unbiased_after_storing(stratified: bool, tau: float) -> None:
    """The mean of the decoded weights over many seeds is p, within four standard errors, for every token."""
    vocab_size, seeds = 12, 4000
    p = torch.tensor([0.5, 0.2, 0.1, 0.08, 0.05, 0.03, 0.02, 0.01, 0.005, 0.003, 0.002, 0.0])
    spec = Sampled(draws=10, proposal_temperature=tau, stratified=stratified)
    numbers = np.concatenate([uniforms(spec, f"trace {seed}", 1) for seed in range(seeds)])
    targets = round_trip(spec, sampled(p.log().expand(seeds, -1), spec, vocab_size, numbers), vocab_size)
    weights = np.zeros((seeds, vocab_size + 1))
    np.put_along_axis(weights, targets.ids.astype(int) % (vocab_size + 1), np.exp(targets.log_probs), 1)
    mean, error = weights[:, :-1].mean(0), weights[:, :-1].std(0) / math.sqrt(seeds)
    # A tempered weight is rounded by at most 0.8 %; counts are exact.
    rounding = p.numpy() * (0 if tau == 1 else 0.008)
    assert (np.abs(mean - p.numpy()) <= 4 * error + rounding + 1e-7).all()
    assert (weights[:, 11] == 0).all()
    if tau == 1:
        np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)


def test_stratified_draws_scatter_less() -> None:
    p = torch.tensor([0.45, 0.3, 0.2, 0.05])
    scatter = []
    for stratified in (False, True):
        spec = Sampled(draws=10, stratified=stratified)
        numbers = np.concatenate([uniforms(spec, f"{seed}", 1) for seed in range(500)])
        targets = sampled(p.log().expand(500, -1), spec, 4, numbers)
        scatter.append(np.where(targets.ids == 0, np.exp(targets.log_probs), 0).sum(1).std())
    assert scatter[1] < scatter[0] / 2


@pytest.mark.parametrize("spec", [s for s in SPECS if isinstance(s, Sampled)], ids=spec_id)
def test_draws_depend_on_seed_and_trace_alone(spec: Sampled) -> None:
    logits = random_logits(12, 50)
    whole = targets_of(spec, logits, 50, "a")
    numbers = uniforms(spec, "a", 30)  # a longer trace with the same key begins with the same numbers
    parts = [sampled(logits[start : start + 5], spec, 50, numbers[start : start + 5][: 12 - start]) for start in (0, 5, 10)]
    np.testing.assert_array_equal(concatenate(parts).ids, whole.ids)
    np.testing.assert_allclose(concatenate(parts).log_probs, whole.log_probs, atol=1e-6)
    assert not np.array_equal(uniforms(spec, "a", 12), uniforms(spec, "b", 12))
    assert not np.array_equal(uniforms(spec, "a", 12), uniforms(spec.model_copy(update={"seed": 1}), "a", 12))


def test_the_summary_counts_captured_mass_and_distinct_ids() -> None:
    logits = random_logits(30, 60)
    summary = MassSummary(50, ks=(1, 4, 50, 64), draws=(5, 50))
    for chunk in logits.split(7):
        summary.add(chunk)
    p = np.exp(logits[:, :50].double().log_softmax(-1).numpy())
    falling = -np.sort(-p, 1)
    assert summary.positions == 30
    assert list(summary.captured_mass) == [1, 4, 50]
    for k, mass in summary.captured_mass.items():
        assert mass == pytest.approx(falling[:, :k].sum(1).mean(), rel=1e-5)
    for draws, distinct in summary.distinct_ids.items():
        assert distinct == pytest.approx((1 - (1 - p) ** draws).sum(1).mean(), rel=1e-4)
    spec = Sampled(draws=50)
    found = [(targets_of(spec, logits[:, :50], 50, f"{seed}").ids >= 0).sum(1).mean() for seed in range(40)]
    assert np.mean(found) == pytest.approx(summary.distinct_ids[50], abs=4 * np.std(found) / math.sqrt(40) + 1e-3)
