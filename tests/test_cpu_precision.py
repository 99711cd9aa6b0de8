"""What a CPU computes in: decided from times, asked once, and what training makes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import test_train
import torch
from safetensors.torch import load_file
from test_train import ROOT, losses, train

from distill.errors import ModelError
from distill.models import cpu_precision
from distill.models.loading import pick_dtype
from distill.run.manifest import read_manifest
from distill.trainers.arguments import precision_flags

recipe = test_train.recipe
UNITS = {"cpu_name": "A CPU", "avx512_bf16": True, "amx_bf16": False}
CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of the record; the CPU has units for bf16, with which a product takes half the time."""
    monkeypatch.delenv("DISTILL_CPU_DTYPE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found(monkeypatch)
    yield tmp_path / "distill-kit" / "cpu-precision.json"
    cpu_precision.cpu_computes_in_bf16.cache_clear()


def found(monkeypatch: pytest.MonkeyPatch, times: tuple[float, float] | None = (2.0, 1.0), **units: object) -> None:
    """In what seems a new process: the units, and the times, which can't be taken if they are None."""
    monkeypatch.setattr(cpu_precision, "capabilities", lambda: UNITS | units)
    monkeypatch.setattr(cpu_precision, "least_times", lambda: times if times else pytest.fail("measured"))
    cpu_precision.cpu_computes_in_bf16.cache_clear()


@pytest.mark.parametrize(("bfloat16_s", "dtype"), [(0.25, "bfloat16"), (1.0, "bfloat16"), (1.01, "float32"), (6.0, "float32")])
def test_bf16_must_be_half_as_fast_again(bfloat16_s: float, dtype: str) -> None:
    entry = cpu_precision.decide(1.5, bfloat16_s)
    assert entry == {"float32_s": 1.5, "bfloat16_s": bfloat16_s, "ratio": 1.5 / bfloat16_s, "dtype": dtype}


def test_times_are_taken_without_moving_the_seed() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert min(cpu_precision.least_times()) > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_what_torch_knows_has_the_names_that_are_asked_for() -> None:
    """A unit that torch called otherwise would never be found."""
    known = cpu_precision.capabilities()
    names = {"x86_64": {"amx_bf16", "avx512_bf16"}, "arm64": {"bf16", "sve_bf16"}}.get(known.get("architecture", ""), set())
    assert names <= set(known) and bool(known)


def test_without_units_nothing_is_timed_or_written(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, None, avx512_bf16=False)
    assert not cpu_precision.cpu_computes_in_bf16() and not cache.parent.exists()


def test_the_answer_is_kept_for_each_cpu_and_version(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu_precision.cpu_computes_in_bf16()
    name = f"A CPU with avx512_bf16, torch {torch.__version__}"
    assert json.loads(cache.read_text()) == {name: {"float32_s": 2.0, "bfloat16_s": 1.0, "ratio": 2.0, "dtype": "bfloat16"}}
    found(monkeypatch, None)
    assert cpu_precision.cpu_computes_in_bf16()
    for number, other in enumerate(({"cpu_name": "Another"}, {"amx_bf16": True}), start=2):
        found(monkeypatch, (1.0, 1.0), **other)
        assert not cpu_precision.cpu_computes_in_bf16() and len(json.loads(cache.read_text())) == number
    cache.write_text(cache.read_text().replace(f"torch {torch.__version__}", "torch 1.0"))
    found(monkeypatch, (1.0, 1.0))
    assert not cpu_precision.cpu_computes_in_bf16() and len(json.loads(cache.read_text())) == 4


@pytest.mark.parametrize("damage", ["", '{"A CPU', "[]", "\udc80", "null", "no dtype"])
def test_a_damaged_record_is_measured_anew(cache: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    assert cpu_precision.cpu_computes_in_bf16()
    whole = cache.read_text()
    cache.write_text(whole.replace('"dtype"', '"type"') if damage == "no dtype" else damage, errors="surrogateescape")
    found(monkeypatch)
    assert cpu_precision.cpu_computes_in_bf16() and cache.read_text() == whole


@pytest.mark.parametrize(("ranks", "answer"), [("1", True), ("2", False)])
def test_where_nothing_can_be_written_a_process_answers_for_itself(
    cache: Path, monkeypatch: pytest.MonkeyPatch, ranks: str, answer: bool
) -> None:
    """Processes of a launch don't: they might disagree."""
    cache.parent.write_text("a file where the folder would be")
    monkeypatch.setenv("WORLD_SIZE", ranks)
    assert cpu_precision.cpu_computes_in_bf16() is answer


def test_of_processes_that_start_at_once_one_measures(cache: Path, tmp_path: Path) -> None:
    code = (
        "import pathlib, sys\nfrom distill.models import cpu_precision\n"
        f"cpu_precision.capabilities = lambda: {UNITS!r}\n"
        "def times():\n    with open(sys.argv[1], 'a') as log: log.write('measured\\n')\n    return 2.0, 1.0\n"
        "cpu_precision.least_times = times\nprint(cpu_precision.cpu_computes_in_bf16())\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "log")]
    started = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate(timeout=300)[0] for process in started] == ["True\n"] * 3
    assert (tmp_path / "log").read_text() == "measured\n"


def test_the_environment_can_answer(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, None)
    for word in ("bfloat16", "float32"):
        monkeypatch.setenv("DISTILL_CPU_DTYPE", word)
        cpu_precision.cpu_computes_in_bf16.cache_clear()
        assert cpu_precision.cpu_computes_in_bf16() == (word == "bfloat16")
    monkeypatch.setenv("DISTILL_CPU_DTYPE", "bf16")
    cpu_precision.cpu_computes_in_bf16.cache_clear()
    with pytest.raises(ModelError, match="DISTILL_CPU_DTYPE: must be one of float32, bfloat16, got 'bf16'"):
        cpu_precision.cpu_computes_in_bf16()


@pytest.mark.parametrize("fast", [True, False])
def test_a_cpu_computes_in_what_the_recipe_says_and_else_in_what_it_is_good_at(
    cache: Path, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    found(monkeypatch, (2.0, 1.0 if fast else 2.0))
    chosen = {setting: precision_flags(CPU, setting)["bf16"] for setting in ("auto", "bfloat16", "float16", "float32")}
    assert chosen == {"auto": fast, "bfloat16": True, "float16": False, "float32": False}
    assert not any(precision_flags(CPU, setting)["fp16"] for setting in chosen)
    weights = [pick_dtype(CPU, setting) for setting in chosen]
    assert weights == [torch.bfloat16 if fast else torch.float32, torch.bfloat16, torch.float16, torch.float32]
    # Elsewhere the type of the weights says nothing about the products. (An MPS device can be named on any machine.)
    assert all(precision_flags(torch.device("mps"), setting) == {"bf16": False, "fp16": False} for setting in chosen)
    assert all(precision_flags(torch.device("xpu"), setting)["bf16"] for setting in chosen)


def test_training_in_bf16_stays_close_to_fp32(recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILL_CPU_DTYPE", "bfloat16")
    steps = {"max_steps": 3}
    narrow, plain = train(recipe("narrow", trainer_args=steps)), train(recipe("plain", trainer_args=steps, student="  dtype: float32\n"))
    assert [read_manifest(student).facts["precision"] for student in (narrow, plain)] == ["bf16", "fp32"]
    assert losses(narrow) == pytest.approx(losses(plain), rel=2e-2) and losses(narrow) != losses(plain)


@pytest.mark.slow
def test_weights_that_are_trained_stay_in_fp32(recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def trained_in_full(name: str) -> Path:
        path = recipe(name, trainer_args={"max_steps": 3})
        path.write_text(path.read_text().replace("{type: lora, r: 4}", "{type: full}"))
        return train(path)

    plain = trained_in_full("plain")
    monkeypatch.setenv("DISTILL_CPU_DTYPE", "bfloat16")
    narrow = trained_in_full("narrow")
    assert read_manifest(narrow).facts["precision"] == "bf16"
    assert losses(narrow) == pytest.approx(losses(plain), rel=2e-2) and losses(narrow) != losses(plain)
    assert all(value.dtype == torch.float32 for value in load_file(narrow / "model" / "model.safetensors").values())
