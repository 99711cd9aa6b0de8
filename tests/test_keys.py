"""`distill keys`: every key in plain words, how it is found, and the trainer's own fields beside the kit's."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from distill.errors import RecipeError
from distill.recipe.keys import find_keys, keys, kind_of, trainer_keys
from distill.recipe.trainer_args import KIT_DEFAULTS, RESERVED, trainer_fields

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (str, "text"),
        (bool, "yes/no"),
        (str | None, "text, or null"),
        (Annotated[int, Field(ge=1)], "whole number ≥ 1"),
        (Annotated[int, Field(ge=1)] | None, "whole number ≥ 1, or null"),
        (Annotated[float, Field(gt=0, le=1)], "number in (0, 1]"),
        (Annotated[float, Field(lt=2)], "number < 2"),
        (Literal["a", "b"], "one of a, b"),
        (Literal["a", "b"] | None, "one of a, b, or null"),
        (str | list[str], "text or list of text"),
        (list[Literal["a", "b"]], "list of any of a, b"),
        (int | float, "number"),
        (dict[str, Any], "mapping"),
    ],
)
def test_a_type_in_plain_words(annotation: Any, words: str) -> None:
    assert kind_of(annotation) == words


def test_no_key_is_described_by_the_name_of_a_class() -> None:
    for info in [*keys(), *trainer_keys("sft"), *trainer_keys("on_policy"), *trainer_keys("cross_tokenizer")]:
        shown = info.kind + info.default.replace("</think>", "")
        assert not any(sign in shown for sign in ("None", "typing", "[str", "Annotated", "True", "Literal", "<")), info
        assert info.help and info.kind, info


def test_a_key_of_sections_that_stand_for_each_other_names_them_all() -> None:
    kinds = {info.key: info.kind for info in keys()}
    assert kinds["student.adapter.type"] == "one of lora, full"
    assert kinds["score.target.kind"] == "one of top_k, sampled, chosen_token"


def test_a_default_is_that_of_a_recipe_without_the_section() -> None:
    defaults = {info.key: info.default for info in keys()}
    assert defaults["prompts.columns.prompt"] == "question" and defaults["prompts.source"] == "required"
    assert defaults["student.trust_remote_code"] == "false" and defaults["curate.checks"].startswith('["finish"')


def test_keys_are_found_by_their_beginning_then_by_any_part_then_by_meaning() -> None:
    assert {info.key for info in find_keys("student.adapter")} == {key.key for key in keys() if key.key.startswith("student.adapter")}
    assert "student.adapter.r" in {info.key for info in find_keys("adapter")}
    assert "train.kd.nll_weight" in {info.key for info in find_keys(search="likelihood")}
    assert "train.trainer_args.loss_type" in {info.key for info in find_keys(search="LOSS")}
    assert {info.key.split(".")[0] for info in find_keys("train", search="batch")} == {"train"}
    with pytest.raises(RecipeError, match="Did you mean learning_rate"):
        find_keys("lerning_rate")
    with pytest.raises(RecipeError, match="sft, kd"):
        find_keys("train.trainer_args", method="ppo")


def test_the_trainers_fields_are_all_there_with_their_own_defaults() -> None:
    from trl import SFTConfig

    described = {info.key.removeprefix("train.trainer_args."): info for info in find_keys("train.trainer_args.")}
    actual = {field.name: field for field in dataclasses.fields(SFTConfig) if not field.name.startswith("_")}
    assert set(described) == set(actual)
    for name, info in described.items():
        default = actual[name].default
        if isinstance(default, bool | int | float) and name not in KIT_DEFAULTS and name not in RESERVED["SFTConfig"]:
            assert info.default == str(default).lower(), name
    assert described["seed"].kind == "can't be set here" and described["lr_scheduler_type"].kind == "text"
    assert "repetition_penalty" in {info.key.rsplit(".")[-1] for info in find_keys("train.trainer_args", method="on_policy")}
    assert set(KIT_DEFAULTS) <= set(trainer_fields())


def test_the_kits_defaults_are_those_that_are_set() -> None:
    import torch
    from fabricated import recipe_for

    from distill.trainers.arguments import default_arguments

    for place, device in enumerate(("cuda", "cpu")):
        for name, value in default_arguments(recipe_for(Path("run")), torch.device(device)).items():
            words = KIT_DEFAULTS[name].split(", on a CPU ")
            word = words[min(place, len(words) - 1)].split(",")[0]
            assert float(word) == value if isinstance(value, float) else word == str(value).lower(), name


def test_the_command_prints_them_without_torch() -> None:
    code = "import sys; sys.argv = ['distill', 'keys', 'train.trainer_args.bf16']\nfrom distill.cli import main\n"
    code += "try: main()\nfinally: assert not {'torch', 'trl', 'transformers'} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0 and "train.trainer_args.bf16  (yes/no, or null; default where" in result.stdout, result.stderr
