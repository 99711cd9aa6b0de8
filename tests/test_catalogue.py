"""The catalogue of teachers: its form, names in any spelling, a gate that no spelling opens, the advice of check, and the command."""

from __future__ import annotations

import datetime
import io
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from distill.before.advice import check_advice
from distill.before.findings import Findings
from distill.cli import app
from distill.data.catalogue import UNKNOWN, Catalogue, catalogue, families, spelled, terms_named
from distill.data.licences import check_terms, licence_of
from distill.errors import LicenceError
from distill.recipe.models import ModelSpec
from distill.recipe.reading import load_recipe
from distill.recipe.shelf import shipped

FAMILIES = catalogue().families
CLOSED = [
    "gpt-4o",
    "gpt-5-mini",
    "gpt-3.5-turbo",
    "chatgpt-4o-latest",
    "o3",
    "o4-mini",
    "claude-3-opus",
    "claude-sonnet-4",
    "gemini-2.5-pro",
]
CLOSED += ["gemini-1.5-flash-8b", "grok-4"]
QWEN = "Qwen/Qwen3-0.6B"


def teaches(author: str | None, **more: Any) -> list[str]:
    return check_terms(author, "small-reasoner", student=QWEN, **more)


def served(model: str, kind: str = "openai", url: str | None = "http://gateway:8000/v1", **more: Any) -> ModelSpec:
    server = {"kind": kind, "url": url, "model": more.pop("called", None)}
    return ModelSpec.model_validate({"model": model, "server": server, **more})


# --- the file


@pytest.mark.parametrize("name", sorted(catalogue().terms))
def test_terms_have_a_source_and_a_date_or_say_that_it_is_unknown(name: str) -> None:
    terms = catalogue().terms[name]
    assert terms.source.startswith("http") and terms.says and terms.read <= datetime.date(2030, 1, 1)
    assert terms.date == UNKNOWN or datetime.date(2004, 1, 1) <= terms.date <= terms.read
    assert any(family.terms == name for family in FAMILIES.values()), "no model has these terms"
    assert terms_named(name) == (name, terms) and all(terms_named(other) == (name, terms) for other in terms.also)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_an_entry_can_be_found_and_says_where_it_is_from(name: str) -> None:
    family = FAMILIES[name]
    assert family.terms_source and (family.terms == UNKNOWN) == (family.terms_source == UNKNOWN)
    for called in [*family.names, *family.alone, *(f"{maker}/some-model" for maker in family.makers)]:
        assert [found.name for found in families(called)][:1] == [name], called
        assert [found.name for found in families(f"somebody/{called.upper()}")][:1] == [name], called
    assert all(one.source for one in family.sampling if not isinstance(one, str))
    assert all(families(student) for student in family.students if family.students != UNKNOWN), "of a family that is not there"
    assert family.weights == "open" or not isinstance(family.sampling, list)


def test_what_the_form_forbids_is_refused() -> None:
    whole = catalogue().model_dump(by_alias=True)
    for change in (
        lambda one: one["families"]["Qwen3"].update(terms="no such terms"),
        lambda one: one["families"]["Qwen3"].pop("sizes"),
        lambda one: one["families"]["Qwen3"].update(colour="red"),
        lambda one: one["families"]["Qwen3"]["template"].update(default=None),
        lambda one: one["terms"]["MIT"].update(date="some day"),
        lambda one: one["terms"]["OpenAI-terms"].update(asks=["Say so."]),
    ):
        broken = json.loads(json.dumps(whole, default=str))
        for terms in broken["terms"].values():
            terms.update({key: datetime.date.fromisoformat(terms[key]) for key in ("date", "read") if terms[key] != UNKNOWN})
        gone = broken["families"]["DeepSeek, hosted"]["retired"]
        gone["date"] = datetime.date.fromisoformat(gone["date"])
        Catalogue.model_validate(broken)
        change(broken)
        with pytest.raises(ValueError):
            Catalogue.model_validate(broken)


# --- names


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("deepseek_r1", "DeepSeek-R1"),
        ("deepseek-ai/DeepSeek-R1-0528", "DeepSeek-R1-0528"),
        ("deepseek-ai/DeepSeek-R1-0528-Qwen3-8B", "DeepSeek-R1-0528-Qwen3"),
        ("accounts/fireworks/models/deepseek-v3p2", "DeepSeek-V3.2"),
        ("accounts/fireworks/models/llama-v3p1-8b-instruct", "Llama 3.1"),
        ("deepseek/deepseek-chat-v3-0324", "DeepSeek-V3-0324"),
        ("deepseek-v3-671b", "DeepSeek-V3"),
        ("deepseek-r1:70b", "DeepSeek-R1-Distill-Llama-70B"),
        ("llama3.1:8b", "Llama 3.1"),
        ("meta.llama3-2-1b-instruct-v1:0", "Llama 3.2"),
        ("Llama 3 8B", "Llama 3"),
        ("openlm-research/open_llama_3b", None),
        ("Qwen/Qwen3-8B-AWQ", "Qwen3"),
        ("qwen3.8-27b", "Qwen3.8-27B"),
        ("Qwen/Qwen3.8-2.4T-A95B", "Qwen3.8-2.4T"),
        ("Qwen/Qwen3-30B-A3B-Thinking-2507", "Qwen3-Thinking-2507"),
        ("gemma2:9b", "Gemma"),
        ("google/gemma-3-270m-it", "Gemma 3"),
        ("glm-4-5-air", "GLM-4.5 to 4.7"),
        ("ministral-3b-2410", None),
    ],
)
def test_a_name_belongs_to_one_family_however_it_is_spelled(name: str, family: str | None) -> None:
    assert next((found.name for found in families(name)), None) == family


def test_a_spelling_changes_nothing() -> None:
    assert spelled("  GPT\u200b_4O ") == spelled("gpt 4o") == "gpt-4o"
    assert (
        spelled("\uff27\uff30\uff34\uff0d\uff14\uff4f") == "gpt-4o"
        and spelled("Qwen2.5") == "qwen2.5"
        and spelled("us.anthropic.claude") == "us-anthropic-claude"
    )


# --- the gate


@pytest.mark.parametrize(
    "author",
    [
        *(
            "azure/gpt-4o",
            "openrouter/openai/gpt-4o",
            "GPT 4o",
            "gpt4o",
            "g.p.t-4",
            "gpt-35-turbo",
            "ft:gpt-4o:acme::1",
            "prod-gpt-4o",
            "\uff27pt-4o",
        ),
        *("openai/o1-preview", "prod-o3-mini", "openai/our-deployment", "text-davinci-003", "mistral-7b/gpt-4o", "gpt-oss-gpt-4o"),
        *("anthropic/anything", "us.anthropic.claude-3-haiku-20240307-v1:0", "claude_3", "vertex_ai/claude-3-5-sonnet@20240620"),
        *("models/gemini-1.5-pro", "google/gemini-2.5-flash", "x-ai/grok-4", "xai/grok-beta", "xai/anything", "CLAUDE OPUS"),
        *CLOSED,
    ],
)
def test_a_closed_model_teaches_nobody_in_any_spelling(author: str) -> None:
    for more in ({}, {"licence": "MIT"}, {"spec": served(author, licence="MIT", terms="a page")}):
        with pytest.raises(LicenceError, match="do not allow training"):
            teaches(author, **more)
    with pytest.raises(LicenceError, match="do not allow training"):
        teaches("Qwen/Qwen3-8B", spec=served("Qwen/Qwen3-8B", called=author))


def test_no_prefix_separator_or_case_opens_the_gate() -> None:
    draw = random.Random(0)
    for _ in range(400):
        name = draw.choice(CLOSED)
        parts = name.split("-")
        written = parts[0] + "".join(draw.choice(["-", "_", " ", ".", "--", "/", ":"]) + part for part in parts[1:])
        written = "".join(letter.upper() if draw.random() < 0.5 else letter for letter in written)
        before = draw.choice(
            ["", "azure/", "openrouter/openai/", "models/", "my-", "PROD ", "eu.", "litellm_proxy/", "a/b/c/", "acme:", "\u200b"]
        )
        behind = draw.choice(["", "-2025-01-01", "@latest", ":free", "_v2", " (ours)", "/chat"])
        with pytest.raises(LicenceError):
            teaches(before + written + behind, licence="Apache-2.0")


@pytest.mark.parametrize(
    "author",
    [
        *("my-gpt2-student", "openai-community/gpt2", "openai/gpt-oss-120b", "openrouter/openai/gpt-oss-20b", "EleutherAI/gpt-neox-20b"),
        *(
            "EleutherAI/gpt-j-6b",
            "cerebras/Cerebras-GPT-6.7B",
            "ai-forever/ruGPT-3.5-13B",
            "AIDC-AI/Marco-o1",
            "nomic-ai/gpt4all-13b-snoozy",
        ),
        *("openlm-research/open_llama_3b", "GSM8K annotators", "Qwen/QwQ-32B", "foo3-mini", "somebody/own", "Grokking-notes-0.5B"),
    ],
)
def test_other_names_are_not_taken_for_closed_ones(author: str) -> None:
    teaches(author)


@pytest.mark.parametrize("author", ["Mistral-7B-Claude-chat", "somebody/Qwen3-8B-Gemini-distill", "x/gpt-oss-20b-claude-opus"])
def test_open_weights_that_learned_from_a_closed_model_are_noted(author: str) -> None:
    assert any("learned from" in note and "can't give what these took" in note for note in teaches(author))


def test_a_folder_here_is_no_closed_model(tmp_path: Path) -> None:
    folder = tmp_path / "claude" / "gpt-4o-student"
    folder.mkdir(parents=True)
    assert any("learned from" in note for note in teaches(str(folder)))
    with pytest.raises(LicenceError):
        teaches(str(tmp_path / "gone" / "gpt-4o-student"))


def test_an_endpoints_name_is_not_enough() -> None:
    for model in ("prod-7", "azure/prod-7", "litellm_proxy/prod-7"):
        with pytest.raises(LicenceError, match=r"does not say which model answers there.*licence MIT alone.*teacher\.server\.model"):
            teaches(model, licence="MIT", spec=served(model, licence="MIT"))
        noted = teaches(model, licence="MIT", spec=served(model, licence="MIT", terms="contract with Acme of 2026-05-01, 4"))
        assert noted == [f"The terms of {model}: contract with Acme of 2026-05-01, 4"]
    assert teaches("Qwen/Qwen3-8B", spec=served("Qwen/Qwen3-8B", called="prod-7")) == []
    assert "not known" in teaches("acme/own-13b", spec=served("acme/own-13b", called="prod-7"))[0]
    assert teaches("acme/own-13b", licence="MIT", spec=served("acme/own-13b", called="prod-7")) == []
    started = ModelSpec.model_validate({"model": "prod-7", "licence": "MIT", "server": {"kind": "vllm"}})
    assert teaches("prod-7", licence="MIT", spec=started) == []  # the stage starts it, so its weights are there to be looked at


def test_a_host_of_closed_models_serves_closed_models() -> None:
    for kind, url in (("openai", None), ("openai", "https://acme.openai.azure.com"), ("openai", "https://api.anthropic.com/v1")):
        with pytest.raises(LicenceError, match="do not allow"):
            teaches("somebody/own", spec=served("somebody/own", kind, url, called="prod-7"))
    google = "https://generativelanguage.googleapis.com/v1beta/openai"
    assert any("Gemma Terms" in note for note in teaches("google/gemma-3-27b-it", spec=served("google/gemma-3-27b-it", "openai", google)))
    deepseek = served("deepseek-ai/DeepSeek-V4-Flash", "deepseek", None, called="deepseek-v4-flash")
    assert any("Open Platform" in note for note in teaches("deepseek-ai/DeepSeek-V4-Flash", spec=deepseek))


def test_terms_that_are_no_setting_of_rows_lock_no_folder() -> None:
    assert ModelSpec(model="x", terms="a page").identity() == ModelSpec(model="x").identity()


def test_terms_new_to_the_gate_are_held() -> None:
    assert licence_of("Qwen/Qwen3.8-2.4T-A95B", None) == "qwen3.8-max" and licence_of("deepseek-chat", None) == "deepseek-platform"
    assert any("Attachment A" in note for note in teaches("deepseek-ai/DeepSeek-V3"))
    assert "not known" in teaches("qwen-max")[0]
    with pytest.raises(LicenceError, match="do not allow"):
        teaches("meta-llama/Llama-2-7b-chat-hf")
    with pytest.raises(LicenceError, match="do not allow"):
        teaches(None, licence="Anthropic terms")


# --- the advice of check


def advised(
    tmp_path: Path, teacher: dict[str, Any], *, generate: str = "{}", checks: str = "[finish, think, math]", prompts: str = ""
) -> list[str]:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: advised\nteacher: {json.dumps(teacher)}\nstudent: {{model: embedded:student}}\n"
        f"prompts: {{source: embedded:arithmetic{prompts}}}\ngenerate: {generate}\ncurate: {{checks: {checks}}}\n"
    )
    found = Findings(Console(file=io.StringIO()))
    check_advice(load_recipe(recipe), found)
    return found.warnings


def test_other_sampling_than_advised_is_named_with_both_values_and_the_source(tmp_path: Path) -> None:
    qwen = {"model": "Qwen/Qwen3-8B"}
    (warning,) = advised(tmp_path, qwen)
    assert (
        "top_k 0 (advised 20)" in warning
        and "Qwen3 (thinking)" in warning
        and "qwen.readthedocs.io" in warning
        and "if you mean it" in warning
    )
    assert advised(tmp_path, qwen, generate="{top_k: 20}") == []
    plain = {"model": "Qwen/Qwen3-8B", "chat_template_kwargs": {"enable_thinking": False}}
    (warning,) = advised(tmp_path, plain, generate="{top_k: 20}", checks="[finish, math]")
    assert "temperature 0.6 (advised 0.7), top_p 0.95 (advised 0.8)" in warning and "Qwen3 (plain)" in warning
    assert advised(tmp_path, {"model": "somebody/own"}) == []  # nothing is known, so nothing is said


def test_whole_distributions_are_no_mistake(tmp_path: Path) -> None:
    hosted = {"model": "deepseek-ai/DeepSeek-V3.2", "server": {"kind": "openrouter", "model": "deepseek/deepseek-v3.2"}}
    assert advised(tmp_path, hosted, generate="{temperature: 1.0, top_p: 1.0, logprobs: 20}", checks="[finish, math]") == []
    assert advised(tmp_path, hosted, generate="{temperature: 1.0, top_p: 1.0}", checks="[finish, math]")


def test_a_template_that_thinks_otherwise_than_the_checks_want(tmp_path: Path) -> None:
    (warning,) = advised(tmp_path, {"model": "deepseek-ai/DeepSeek-V3.1"})
    assert "thinking is left out" in warning and "Set {thinking: true}" in warning
    assert advised(tmp_path, {"model": "deepseek-ai/DeepSeek-V3.1", "chat_template_kwargs": {"thinking": True}}) == []
    asks_none = "[finish, think: {reasoning: none}, math]"
    (warning,) = advised(tmp_path, {"model": "Qwen/Qwen3-8B"}, generate="{top_k: 20}", checks=asks_none)
    assert "Set {enable_thinking: false}" in warning
    (warning,) = advised(tmp_path, {"model": "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"}, prompts=", system_prompt: Think.")
    assert "advise against a system turn" in warning


def test_a_name_that_its_host_has_retired(tmp_path: Path) -> None:
    hosted = {"model": "deepseek-ai/DeepSeek-V3.2", "server": {"kind": "deepseek", "model": "deepseek-chat"}}
    assert "retired since 2026-07-24" in advised(tmp_path, hosted, generate="{temperature: 1.0}", checks="[finish, math]")[0]


@pytest.mark.parametrize("recipe", shipped(), ids=lambda recipe: recipe.name)
def test_a_recipe_of_the_kit_asks_its_teacher_as_advised(recipe: Any) -> None:
    found = Findings(Console(file=io.StringIO()))
    check_advice(load_recipe(recipe.path), found)
    assert [warning for warning in found.warnings if "is retired" not in warning] == []


# --- the commands


def test_models_prints_all_or_one_whole() -> None:
    table = CliRunner().invoke(app, ["models"]).output
    assert all(name in table for name in FAMILIES)
    one = " ".join(CliRunner().invoke(app, ["models", "deepseek r1 distill llama 8b"]).output.split())
    for expected in (
        "llama3_1/LICENSE",
        "2024-07-23",
        "begins with 'Llama'",
        "700,000,000",
        "temperature 0.6 top_p 0.95",
        "<think>",
        "llama-3.2",
    ):
        assert expected in one, expected
    both = json.loads(CliRunner().invoke(app, ["models", "GPT4o", "--json"]).output)
    assert both["terms"]["OpenAI-terms"]["trains"] == "none" and list(both["families"]) == ["OpenAI"]


def test_a_model_that_is_not_there_is_said_to_be_unknown() -> None:
    told = subprocess.run([sys.executable, "-m", "distill", "models", "qwne3"], capture_output=True, text=True, check=False)
    assert told.returncode == 1 and "unknown here. Did you mean" in told.stderr and "qwen3" in told.stderr


def test_check_shows_terms_and_advice(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: gate\nteacher: {model: prod-7, licence: MIT, server: {kind: openai, url: 'http://gateway:8000/v1'}}\n"
        "student: {model: Qwen/Qwen3-0.6B}\nprompts: {source: embedded:arithmetic}\ngenerate: {}\n"
    )
    told = CliRunner().invoke(app, ["check", str(recipe), "--quick"])
    assert told.exit_code == 1 and "terms of the traces: teacher.model: 'prod-7' is an endpoint's name" in told.output
