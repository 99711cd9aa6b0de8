"""Recipes: what a valid one says, and one clear error, without torch, for each of a hundred damaged ones."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distill.errors import RecipeError
from distill.recipe.experiment import Recipe
from distill.recipe.keys import keys
from distill.recipe.reading import load_recipe, recipe_text

ROOT = Path(__file__).resolve().parent.parent

GOOD = """\
name: good
seed: 3
teacher:
  model: some/teacher
student:
  model: some/student
  adapter: {type: lora, r: 8}
prompts:
  source: problems.jsonl
  columns: {prompt: question, reference: answer}
generate:
  temperature: 0.7
curate:
  checks: [finish, math]
train:
  max_length: 512
  trainer_args:
    learning_rate: 1e-5
evaluate:
  models: [base, student]
"""


LIVE = """\
name: live
teacher:
  model: some/teacher
student:
  model: some/student
prompts:
  source: problems.jsonl
train:
  method: on_policy
  on_policy: {max_new_tokens: 256}
  trainer_args: {learning_rate: 1e-5}
evaluate:
  models: [base, student]
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_a_good_recipe_says_what_it_says(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    assert recipe.train.trainer_args == {"learning_rate": 1e-5}  # YAML 1.1 readers make this a string
    assert recipe.generate is not None and recipe.generate.temperature == 0.7
    assert recipe.student.adapter.type == "lora" and recipe.student.adapter.r == 8


def test_overrides_are_typed_and_win(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    recipe = load_recipe(
        path, ["--generate.samples_per_prompt", "8", "--seed=9", "--student.adapter.use_dora", "true", "--evaluate", "null"]
    )
    assert recipe.generate is not None and recipe.generate.samples_per_prompt == 8
    assert recipe.seed == 9
    assert recipe.student.adapter.type == "lora" and recipe.student.adapter.use_dora is True
    assert recipe.evaluate is None


@pytest.mark.parametrize(
    ("key", "word", "value"),
    [
        ("prompts.answer_pattern", r"####\s*(.+)", r"####\s*(.+)"),
        ("prompts.system_prompt", "####", "####"),
        ("run_dir", "runs/exp #3", "runs/exp #3"),
        ("prompts.template", "Q: {prompt}", "Q: {prompt}"),
        ("prompts.template", '"{prompt}"', '"{prompt}"'),
        ("student.revision", "1234567", "1234567"),
        ("student.revision", "0123_4", "0123_4"),
        ("run_dir", "2026-01-31", "2026-01-31"),
        ("run_dir", "1e3", "1e3"),
        ("run_dir", "runs/s*", "runs/s*"),
        ("run_dir", "exp[1]", "exp[1]"),
        ("run_dir", "exp:1", "exp:1"),
        ("run_dir", "[a", "[a"),
        ("run_dir", "null", None),
        ("teacher.licence", "no", "no"),
        ("student.adapter.target_modules", "7", "7"),
        ("student.adapter.target_modules", "[q_proj, 7]", ["q_proj", "7"]),
        ("train.trainer_args", "{run_name: 2026-01-31, learning_rate: 1e-4}", {"run_name": "2026-01-31", "learning_rate": 1e-4}),
        ("train.trainer_args.run_name", "3 # of 5", "3 # of 5"),
        ("train.trainer_args.deepspeed", "zero #2.json", "zero #2.json"),
        ("train.trainer_args.deepspeed", "{zero_optimization: {stage: 2}}", {"zero_optimization": {"stage": 2}}),
        ("student.chat_template_kwargs.mode", "a # b", "a # b"),
        ("student.chat_template_kwargs.mode", '"5"', "5"),
        ("student.chat_template_kwargs.mode", "true", True),
        ("student.chat_template_kwargs.date", "2026-01-31", "2026-01-31"),
    ],
)
def test_a_word_for_a_key_that_takes_text_is_what_it_is(key: str, word: str, value: object, tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    for given in ([f"--{key}", word], [f"--{key}={word}"]):
        found = load_recipe(path, given).model_dump()
        for name in key.split("."):
            found = found[name]
        assert found == value


def test_a_number_is_a_place_in_a_list(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.replace("[finish, math]", "[finish, math, {length: {max_tokens: 9}}, {text: {pattern: a}}]"))
    recipe = load_recipe(
        path, ["--curate.checks.2.length.max_tokens", "7", "--curate.checks.3.text.pattern", "5", "--curate.checks.1", "number"]
    )
    found = recipe.curate.checks
    assert found[2].length is not None and found[3].text is not None and found[1].number is not None
    assert (found[2].length.max_tokens, found[3].text.pattern) == (7, "5")
    for key in ("4", "-1", "length.max_tokens"):
        with pytest.raises(RecipeError, match=rf"curate.checks.{key}: is in a list of 4 here"):
            load_recipe(path, [f"--curate.checks.{key}", "7"])
    with pytest.raises(RecipeError, match="0 is a plain value here"):
        load_recipe(path, ["--curate.checks.0.finish.x", "7"])


def test_the_home_is_meant_by_a_tilde_alone(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, GOOD), ["--run_dir", "~"]).run_dir == str(Path.home())


def test_text_in_a_file_needs_no_quotes_to_be_text(tmp_path: Path) -> None:
    text = GOOD.replace("some/student", "3").replace("adapter: {", "revision: 1234567\n  licence: 2026-02-30\n  adapter: {")
    recipe = load_recipe(write(tmp_path, text))
    assert (recipe.student.model, recipe.student.revision, recipe.student.licence) == ("3", "1234567", "2026-02-30")
    (tmp_path / "resolved.yaml").write_text(recipe_text(recipe))
    assert load_recipe(tmp_path / "resolved.yaml") == recipe


def test_an_alias_is_a_copy(tmp_path: Path) -> None:
    text = GOOD.replace("model: some/teacher", "&a\n  model: some/teacher").replace(
        "student:\n  model: some/student\n  adapter: {type: lora, r: 8}", "student: *a"
    )
    recipe = load_recipe(write(tmp_path, text), ["--student.model", "another"])
    assert recipe.teacher is not None and (recipe.teacher.model, recipe.student.model) == ("some/teacher", "another")
    merged = load_recipe(write(tmp_path, text.replace("student: *a", "student:\n  <<: *a\n  dtype: float32")))
    assert (merged.student.model, merged.student.dtype) == ("some/teacher", "float32")


@pytest.mark.parametrize(
    ("override", "words", "not_said"),
    [
        (("--score.target", "{kind: top_k, draws: 50}"), ["score.target.draws", "goes with kind sampled", "here kind is top_k"], "mean"),
        (("--student.adapter", "{type: full, r: 8}"), ["student.adapter.r", "goes with type lora", "here type is full"], "mean"),
        (("--student.adapter", "{type: lora, rr: 8}"), ["student.adapter.rr", "Did you mean student.adapter.r?"], "goes with"),
        (("--generate.dtype", "auto"), ["generate.dtype", "Did you mean teacher.dtype?"], "goes with"),
        (("--nonsense.word", "1"), ["nonsense", "`distill keys` lists"], "mean"),
    ],
)
def test_what_is_suggested_is_never_what_was_refused(override: tuple[str, str], words: list[str], not_said: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, GOOD), override)
    assert all(word in str(caught.value) for word in words) and not_said not in str(caught.value), caught.value


@pytest.mark.parametrize(
    ("key", "instead"),
    [
        ("train.trainer_args.hub_token", "HF_TOKEN"),
        ("student.token", "environment variable"),
        ("student.chat_template_kwargs.apiKey", "environment variable"),
        ("teacher.chat_template_kwargs.tools.password", "environment variable"),
        ("rollouts.trainer_args.hub_token", "HF_TOKEN"),
        ("wandb_api_key", "WANDB_API_KEY"),
    ],
)
def test_a_secret_has_no_place_in_a_recipe_and_is_not_shown(key: str, instead: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, GOOD), [f"--{key}", "hf_abcdef"])
    assert key in str(caught.value) and instead in str(caught.value) and "abcdef" not in str(caught.value)


def test_a_secret_in_a_file_is_refused_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.replace("    learning_rate: 1e-5", "    learning_rate: 1e-5\n    hub_token: hf_abcdef"))
    with pytest.raises(RecipeError, match=rf"^{path}:19: train.trainer_args.hub_token: a recipe is no place for a secret"):
        load_recipe(path)


@pytest.mark.parametrize("secret", ["hf_" + "aB3" * 9, "sk-proj-" + "x9" * 12, "https://user:geheim@host/data.jsonl"])
def test_a_secret_inside_a_text_is_refused_and_not_shown(secret: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"command line: prompts.system_prompt: holds what looks like a token or a password") as caught:
        load_recipe(write(tmp_path, GOOD), ["--prompts.system_prompt", f"use {secret}"])
    assert secret[-8:] not in str(caught.value)
    assert load_recipe(write(tmp_path, GOOD), ["--run_dir", "runs/sk-learn-experiments"]).run_dir.endswith("sk-learn-experiments")


def test_what_only_sounds_like_a_secret_is_taken(tmp_path: Path) -> None:
    fields = ["--student.pad_token", "<pad>", "--student.chat_template_kwargs.image_token", "<image>"]
    recipe = load_recipe(write(tmp_path, GOOD), [*fields, "--train.trainer_args.include_num_input_tokens_seen", "all"])
    assert recipe.student.chat_template_kwargs == {"image_token": "<image>"}
    kwargs = {"add_bos_token": True, "thinking_budget_tokens": 1024, "bot_token": "<bot>"}
    assert load_recipe(tmp_path / "recipe.yaml", {"student.chat_template_kwargs": kwargs}).student.chat_template_kwargs == kwargs
    assert load_recipe(tmp_path / "recipe.yaml", ["--train.trainer_args.hub_token", "null"]).train.trainer_args == {
        "learning_rate": 1e-5,
        "hub_token": None,
    }


def test_the_resolved_recipe_reads_back_the_same(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    (tmp_path / "resolved.yaml").write_text(recipe_text(recipe))
    assert load_recipe(tmp_path / "resolved.yaml") == recipe


def test_every_key_is_documented_and_described() -> None:
    described = list(keys())
    assert len(described) > 60
    assert [info.key for info in described if len(info.help) < 10 and not info.key.endswith(("type", "kind"))] == []
    assert "train.trainer_args" in {info.key for info in described}


def test_a_live_recipe_needs_prompts_alone_and_is_checked_against_its_own_trainer(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, LIVE), ["--train.trainer_args.repetition_penalty", "1.1"])
    assert recipe.generate is None and not recipe.learns_from_traces and recipe.train.on_policy is not None
    assert recipe.train.on_policy.beta == 1.0
    (tmp_path / "resolved.yaml").write_text(recipe_text(recipe))
    assert load_recipe(tmp_path / "resolved.yaml") == recipe
    bare = load_recipe(write(tmp_path, LIVE.replace("  on_policy: {max_new_tokens: 256}\n", "")))
    assert bare.train.on_policy is not None and bare.train.on_policy.max_new_tokens == 512
    served = load_recipe(
        tmp_path / "recipe.yaml", ["--train.on_policy.teacher_server", "http://localhost:8000", "--train.trainer_args.loss_top_k", "20"]
    )
    assert served.train.trainer_args["loss_top_k"] == 20
    gold = load_recipe(tmp_path / "recipe.yaml", ["--train.method", "cross_tokenizer", "--train.trainer_args.num_generations", "2"])
    assert gold.train.trainer_args["num_generations"] == 2


def test_speed_settings_do_not_change_the_identity(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    faster = load_recipe(write(tmp_path, GOOD), ["--generate.batch_size", "64", "--curate.workers", "7"])
    hotter = load_recipe(write(tmp_path, GOOD), ["--generate.temperature", "0.8"])
    assert recipe.generate is not None and faster.generate is not None and hotter.generate is not None
    assert recipe.generate.identity() == faster.generate.identity()
    assert recipe.curate.identity() == faster.curate.identity()
    assert recipe.generate.identity() != hotter.generate.identity()


def _replace(old: str, new: str) -> str:
    assert old in GOOD, old
    return GOOD.replace(old, new)


# Each: what is damaged -> (text of the recipe, words the error must have, line it must name or None)
DAMAGED: dict[str, tuple[str, list[str], int | None]] = {}


def _unknown_keys() -> None:
    """A misspelt key in every section, which must name the nearest valid one."""
    for section, wrong, right in [
        ("teacher", "modle", "model"),
        ("teacher", "quantisation", "quantization"),
        ("teacher", "d_type", "dtype"),
        ("student", "adaptor", "adapter"),
        ("student", "chat_template_kwarg", "chat_template_kwargs"),
        ("prompts", "sources", "source"),
        ("prompts", "answer_patern", "answer_pattern"),
        ("prompts", "held_out_size", "heldout_size"),
        ("prompts", "max_prompt", "max_prompts"),
        ("generate", "temprature", "temperature"),
        ("generate", "max_tokens", "max_new_tokens"),
        ("generate", "sample_per_prompt", "samples_per_prompt"),
        ("generate", "batchsize", "batch_size"),
        ("curate", "check", "checks"),
        ("curate", "prefers", "prefer"),
        ("curate", "max_per_promt", "max_per_prompt"),
        ("train", "max_len", "max_length"),
        ("train", "trainer_arg", "trainer_args"),
        ("train", "over_long", "overlong"),
        ("evaluate", "model", "models"),
        ("evaluate", "confidense", "confidence"),
    ]:
        text = GOOD.replace(f"{section}:\n", f"{section}:\n  {wrong}: 1\n", 1)
        DAMAGED[f"unknown {section}.{wrong}"] = (
            text,
            [f"{section}.{wrong}", "unknown key", right],
            text.split("\n").index(f"  {wrong}: 1") + 1,
        )
    for wrong, right in [("sede", "seed"), ("studnet", "student"), ("promts", "prompts"), ("exports", "export"), ("rundir", "run_dir")]:
        DAMAGED[f"unknown {wrong}"] = (f"{wrong}: 1\n{GOOD}", [wrong, "unknown key", right], 1)
    for elsewhere in ("learning_rate", "num_train_epochs", "packing", "report_to"):
        text = _replace("  max_length: 512", f"  {elsewhere}: 1")
        DAMAGED[f"misplaced {elsewhere}"] = (text, ["unknown key", f"train.trainer_args.{elsewhere}"], 16)


def _missing_keys() -> None:
    DAMAGED["missing name"] = (_replace("name: good\n", ""), ["name", "missing"], None)
    DAMAGED["missing student"] = (
        _replace("student:\n  model: some/student\n  adapter: {type: lora, r: 8}\n", ""),
        ["student", "missing"],
        None,
    )
    DAMAGED["missing student.model"] = (_replace("  model: some/student\n", ""), ["student.model", "missing"], 5)
    DAMAGED["missing teacher.model"] = (_replace("  model: some/teacher", "  dtype: auto"), ["teacher.model", "missing"], 3)
    DAMAGED["missing prompts"] = (
        _replace("prompts:\n  source: problems.jsonl\n  columns: {prompt: question, reference: answer}\n", ""),
        ["prompts", "missing"],
        None,
    )
    DAMAGED["missing prompts.source"] = (_replace("  source: problems.jsonl\n", ""), ["prompts.source", "missing"], 8)
    DAMAGED["missing teacher"] = (_replace("teacher:\n  model: some/teacher\n", ""), ["generate needs a teacher"], None)
    DAMAGED["neither generate nor traces"] = (_replace("generate:\n  temperature: 0.7\n", ""), ["exactly one", "generate", "traces"], None)
    DAMAGED["no prompt column"] = (
        _replace("{prompt: question, reference: answer}", "{reference: answer}"),
        ["prompts.columns", "exactly one of prompt and messages"],
        10,
    )


def _mistyped_values() -> None:
    for old, new, key in [
        ("seed: 3", "seed: three", "seed"),
        ("seed: 3", "seed: 3.5", "seed"),
        ("seed: 3", "seed: true", "seed"),
        ("seed: 3", 'seed: "3"', "seed"),
        ("seed: 3", "seed: [3]", "seed"),
        ("name: good", "name: [good]", "name"),
        ("model: some/teacher", "model: {name: x}", "teacher.model"),
        ("r: 8", 'r: "8"', "student.adapter.r"),
        ("r: 8", "r: 8.5", "student.adapter.r"),
        ("r: 8", "r: null", "student.adapter.r"),
        ("{type: lora, r: 8}", "lora", "student.adapter"),
        ("{type: lora, r: 8}", "{type: lorra}", "student.adapter"),
        ("{type: lora, r: 8}", "{type: full, r: 8}", "student.adapter.r"),
        ("temperature: 0.7", "temperature: hot", "generate.temperature"),
        ("temperature: 0.7", 'temperature: "0.7"', "generate.temperature"),
        ("temperature: 0.7", "max_new_tokens: 1e3", "generate.max_new_tokens"),
        ("temperature: 0.7", "engine: vllm", "generate.engine"),
        ("checks: [finish, math]", "checks: math", "curate.checks"),
        ("checks: [finish, math]", "checks: [finish, maths]", "curate.checks"),
        ("checks: [finish, math]", "prefer: best", "curate.prefer"),
        ("checks: [finish, math]", "keep_unjudged: yes", "curate.keep_unjudged"),
        ("max_length: 512", "max_length: long", "train.max_length"),
        ("max_length: 512", "overlong: truncate", "train.overlong"),
        ("max_length: 512", "method: rl", "train.method"),
        ("models: [base, student]", "models: base", "evaluate.models"),
        ("models: [base, student]", "models: [base, pupil]", "evaluate.models"),
        ("generate:\n  temperature: 0.7", "generate: fast", "generate"),
        ("learning_rate: 1e-5", 'learning_rate: "1e-5"', "learning_rate"),
        ("learning_rate: 1e-5", "num_train_epochs: many", "num_train_epochs"),
        ("learning_rate: 1e-5", "packing: 1", "packing"),
        ("learning_rate: 1e-5", "learning_rat: 1e-5", "Did you mean learning_rate"),
        ("learning_rate: 1e-5", "max_length: 100", "set train.max_length"),
        ("learning_rate: 1e-5", "output_dir: out", "run folder"),
        ("learning_rate: 1e-5", "assistant_only_loss: true", "labels"),
        ("learning_rate: 1e-5", "seed: 1", "the recipe's seed"),
    ]:
        DAMAGED[f"mistyped {new}"] = (_replace(old, new), [key], None)


def _values_out_of_range() -> None:
    for old, new, key in [
        ("seed: 3", "seed: -1", "seed"),
        ("name: good", "name: a/b", "name"),
        ("name: good", "name: ''", "name"),
        ("r: 8", "r: 0", "student.adapter.r"),
        ("r: 8", "lora_alpha: 0", "student.adapter.lora_alpha"),
        ("r: 8", "lora_dropout: 1.0", "student.adapter.lora_dropout"),
        ("r: 8", "target_modules: lm_head", "lm_head"),
        ("{type: lora, r: 8}", "{type: full}\n  quantization: nf4", "QLoRA"),
        ("temperature: 0.7", "temperature: -0.1", "generate.temperature"),
        ("temperature: 0.7", "top_p: 0", "generate.top_p"),
        ("temperature: 0.7", "top_p: 1.5", "generate.top_p"),
        ("temperature: 0.7", "top_k: -1", "generate.top_k"),
        ("temperature: 0.7", "min_p: 1", "generate.min_p"),
        ("temperature: 0.7", "batch_size: 0", "generate.batch_size"),
        ("temperature: 0.7", "samples_per_prompt: 0", "generate.samples_per_prompt"),
        ("temperature: 0.7", "max_new_tokens: 0", "generate.max_new_tokens"),
        ("temperature: 0.7", "temperature: 0\n  samples_per_prompt: 4", "same answer every time"),
        ("temperature: 0.7", "temperature: 0\n  top_p: 0.9", "temperature 0 ignores"),
        ("checks: [finish, math]", "max_per_prompt: 0", "curate.max_per_prompt"),
        ("checks: [finish, math]", "check_timeout_s: 0", "curate.check_timeout_s"),
        ("max_length: 512", "max_length: 0", "train.max_length"),
        ("models: [base, student]", "models: []", "evaluate.models"),
        ("models: [base, student]", "models: [base, base]", "evaluate.models"),
        ("models: [base, student]", "confidence: 1.0", "evaluate.confidence"),
        ("source: problems.jsonl", "source: problems.jsonl\n  heldout_size: 0", "evaluate needs held-out prompts"),
        ("source: problems.jsonl", "source: problems.jsonl\n  template: solve it", "{prompt}"),
        ("source: problems.jsonl", "source: problems.jsonl\n  answer_pattern: '####'", "one group"),
        ("source: problems.jsonl", "source: problems.jsonl\n  answer_pattern: '(('", "regular expression"),
        ("columns: {prompt: question, reference: answer}", "columns: {prompt: question}\n  answer_pattern: '(a)'", "columns.reference"),
        ("prompt: question,", "prompt: question, messages: m,", "exactly one of prompt and messages"),
        ("generate:\n", "traces: {source: t.jsonl}\ngenerate:\n", "exactly one of the sections"),
    ]:
        DAMAGED[f"out of range {new}"] = (_replace(old, new), [key], None)


def _live_methods() -> None:
    method, section = "method: on_policy", "{max_new_tokens: 256}"
    for old, new, key in [
        ("teacher:\n  model: some/teacher\n", "", "train.method on_policy needs a teacher"),
        ("train:\n", "generate: {}\ntrain:\n", "leave the sections generate and traces out"),
        ("train:\n", "score: {}\ntrain:\n", "score goes with train.method kd or with rounds"),
        ("train:\n", "curate: {prefer: longest}\ntrain:\n", "curate would be ignored"),
        ("train:\n", "rounds: 2\nrollouts: {}\nscore: {}\ntrain:\n", "on-policy by itself"),
        (method, "method: sft", "train.on_policy would be ignored"),
        (method, method + "\n  kd: {nll_weight: 0.5}", "train.kd would be ignored"),
        (method, method + "\n  overlong: cut", "train.overlong cut would be ignored"),
        (method, method + "\n  validation_prompts: 5", "train.validation_prompts would be ignored"),
        (method, method + "\n  max_length: 256", "leaves no room for a prompt"),
        (section, "{max_token: 256}", "Did you mean train.on_policy.max_new_tokens"),
        (section, "{divergence: kl}", "train.on_policy.divergence"),
        (section, "{divergence: jsd}", "jsd_beta goes with divergence jsd"),
        (section, "{jsd_beta: 0.5}", "jsd_beta goes with divergence jsd"),
        (section, "{divergence: jsd, jsd_beta: 1.0}", "train.on_policy.jsd_beta"),
        (section, "{temperature: 0}", "train.on_policy.temperature"),
        (section, "{stop_truncation_rate: 2}", "train.on_policy.stop_truncation_rate"),
        ("learning_rate: 1e-5", "packing: true", "packing is no field of trl.DistillationConfig"),
        ("learning_rate: 1e-5", "repetition_penalti: 1.0", "Did you mean repetition_penalty"),
        ("learning_rate: 1e-5", "repetition_penalty: high", "repetition_penalty must be float"),
        ("learning_rate: 1e-5", "loss_top_k: 5", "loss_top_k is no field of trl.DistillationConfig"),
        ("learning_rate: 1e-5", "beta: 0.5", "set train.on_policy.divergence"),
        ("learning_rate: 1e-5", "temperature: 0.5", "set train.on_policy.temperature"),
        ("learning_rate: 1e-5", "teacher_model_name_or_path: x", "set the section teacher"),
    ]:
        assert old in LIVE, old
        text = LIVE.replace(old, new, 1)
        DAMAGED[f"live {new}"] = (text, [key], None)
    cross = LIVE.replace(method, "method: cross_tokenizer")
    served = cross.replace(section, "{teacher_server: 'http://localhost:8000'}")
    DAMAGED["live cross served"] = (served, ["train.on_policy.teacher_server goes with method on_policy"], None)
    for field, words in [("lmbda: 0.5", "the student writes every completion itself"), ("packing: true", "row by row")]:
        DAMAGED[f"live cross {field}"] = (cross.replace("learning_rate: 1e-5", field), [words], 11)
    DAMAGED["live key's line"] = (LIVE.replace(method, method + "\n  overlong: cut"), [": train.overlong cut would be"], 10)
    DAMAGED["live field's line"] = (LIVE.replace("learning_rate: 1e-5", "packing: true"), ["train.trainer_args: packing"], 11)


def _wrong_files() -> None:
    DAMAGED["empty file"] = ("", ["not a mapping"], None)
    DAMAGED["a list"] = ("- name: x\n", ["not a mapping"], None)
    DAMAGED["plain text"] = ("hello world\n", ["not a mapping"], None)
    DAMAGED["bad indentation"] = (_replace("  model: some/student", "   model: some/student"), ["not valid YAML"], None)
    DAMAGED["tab"] = (_replace("  model: some/student", "\tmodel: some/student"), ["not valid YAML"], None)
    DAMAGED["unclosed bracket"] = (_replace("[finish, math]", "[finish, math"), ["not valid YAML"], None)
    DAMAGED["repeated key"] = (_replace("seed: 3", "seed: 3\nseed: 4"), ["not valid YAML", "seed"], None)
    DAMAGED["json lines"] = ('{"a": 1}\n{"b": 2}\n', ["not valid YAML"], None)


for _fill in (_unknown_keys, _missing_keys, _mistyped_values, _values_out_of_range, _live_methods, _wrong_files):
    _fill()


def test_there_are_a_hundred_damaged_recipes() -> None:
    assert len(DAMAGED) >= 100


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_recipe_gives_one_clear_error(name: str, tmp_path: Path) -> None:
    text, words, line = DAMAGED[name]
    path = write(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert message.startswith(str(path)) and len(message.splitlines()) == 1, message
    if line is not None:
        assert message.startswith(f"{path}:{line}:"), message


def test_damaged_recipes_import_no_torch(tmp_path: Path) -> None:
    """All of them again in one fresh interpreter, which must not have torch or transformers loaded at the end."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    for index, (text, _, _) in enumerate(DAMAGED.values()):
        (folder / f"{index}.yaml").write_text(text)
    code = """
import json, pathlib, sys
from distill.errors import RecipeError
from distill.recipe.reading import load_recipe
refused = 0
for path in pathlib.Path(sys.argv[1]).iterdir():
    try: load_recipe(path)
    except RecipeError: refused += 1
print(json.dumps([refused, sorted({"torch", "transformers", "trl", "pyarrow", "numpy"} & set(sys.modules))]))
"""
    result = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True, cwd=ROOT)
    assert json.loads(result.stdout) == [len(DAMAGED), []]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--generate.temprature", "1"], ["command line", "generate.temprature", "Did you mean generate.temperature"]),
        (["--seed"], ["--seed has no value"]),
        (["seed", "3"], ["'seed' is not expected"]),
        (["--seed", "many"], ["command line", "seed", "many"]),
        (["--name.first", "x"], ["name is a plain value"]),
        (["--train.trainer_args.lerning_rate", "1"], ["Did you mean learning_rate"]),
    ],
)
def test_a_wrong_override_is_an_error_of_the_command_line(overrides: list[str], words: list[str], tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, GOOD), overrides)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="can't be read"):
        load_recipe(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(RecipeError, match="not a text file"):
        load_recipe(tmp_path / "binary.yaml")


def test_recipes_of_the_project_load_and_say_what_they_cost() -> None:
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    assert recipes
    for path in recipes:
        assert isinstance(load_recipe(path), Recipe)
        header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#")).lower()
        for word in ("source", "hardware", "memory", "time", "result", "command"):
            assert f"# {word}:" in header, f"{path.name} lacks `# {word}:` in its header"
        assert len([line for line in path.read_text().splitlines() if line and not line.startswith("#")]) <= 60


@pytest.mark.parametrize(
    ("key", "section"), [("prompts.near_duplicates", "prompts.near_duplicates"), ("curate.checks.0.label", "curate.checks.label")]
)
def test_a_value_in_the_place_of_a_section_is_said_in_words_of_the_recipe(tmp_path: Path, key: str, section: str) -> None:
    says = f"{key}: should be a section with keys of its own, got 7. `distill keys {section}` lists them."
    with pytest.raises(RecipeError, match=re.escape(says)):
        load_recipe(write(tmp_path, GOOD), ["--curate.checks", "[label: {choices: [a, b]}]", f"--{key}", "7"])
