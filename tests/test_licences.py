"""Terms of teachers and students. What each family demands is written out here from its licence text, not from the catalogue."""

from __future__ import annotations

import pytest

from distill.data.catalogue import UNKNOWN
from distill.data.licences import check_terms, hub_licence, licence_of
from distill.errors import LicenceError


@pytest.mark.parametrize(
    ("model", "licence"),
    [
        ("embedded:teacher", "Apache-2.0"),
        ("deepseek-ai/DeepSeek-R1", "MIT"),
        ("deepseek-ai/DeepSeek-R1-0528-Qwen3-8B", "MIT"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "MIT"),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "llama3.1"),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-70B", "llama3.3"),
        ("deepseek-ai/DeepSeek-V3", "deepseek"),
        ("deepseek-ai/DeepSeek-V3.2-Exp", "MIT"),
        ("meta-llama/Llama-3.2-1B-Instruct", "llama3.2"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama3"),
        ("meta-llama/Llama-4-Scout-17B-16E-Instruct", "llama4"),
        ("Qwen/Qwen3-8B", "Apache-2.0"),
        ("Qwen/Qwen2.5-1.5B-Instruct", "Apache-2.0"),
        ("Qwen/Qwen2.5-32B", "Apache-2.0"),
        ("Qwen/Qwen2.5-Math-7B", "Apache-2.0"),
        ("Qwen/Qwen2.5-3B-Instruct", "qwen-research"),
        ("Qwen/Qwen2.5-72B-Instruct", "qwen"),
        ("openai/gpt-oss-120b", "Apache-2.0"),
        ("google/gemma-4-31b-it", "Apache-2.0"),
        ("google/gemma-3-4b-it", "gemma"),
        ("zai-org/GLM-4.6", "MIT"),
        ("moonshotai/Kimi-K2-Instruct", "modified-MIT"),
        ("MiniMaxAI/MiniMax-M2", "modified-MIT"),
        ("gpt-4o-2024-08-06", "OpenAI-terms"),
        ("somebody/a-model-of-their-own", UNKNOWN),
        ("/models/student", UNKNOWN),
        (None, UNKNOWN),
    ],
)
def test_licence_of_a_family(model: str | None, licence: str) -> None:
    assert licence_of(model, None) == licence


def test_a_stated_licence_is_recorded() -> None:
    assert licence_of("Qwen/Qwen3-8B", "CC-BY-4.0") == "CC-BY-4.0"
    assert licence_of(None, "MIT") == "MIT"


@pytest.mark.parametrize("author", ["meta-llama/Llama-3.3-70B-Instruct", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"])
def test_llama_outputs_ask_for_the_name(author: str) -> None:
    for name in ("small-reasoner", "my-Llama", "somebody/small-reasoner"):
        with pytest.raises(LicenceError, match=r"begins with 'Llama', got .*export\.model_name"):
            check_terms(author, name)
    for name in ("Llama-small-reasoner", "somebody/Llama-small-reasoner"):
        assert any("Built with Llama" in note for note in check_terms(author, name))


def test_llama_weights_ask_for_the_name_whoever_wrote_the_traces() -> None:
    with pytest.raises(LicenceError, match="meta-llama/Llama"):
        check_terms("Qwen/Qwen3-8B", "small-reasoner", student="meta-llama/Llama-3.2-1B")
    assert check_terms("Qwen/Qwen3-8B", "Llama-small", student="meta-llama/Llama-3.2-1B")


def test_the_first_llama_3_improves_nothing_but_itself() -> None:
    author = "meta-llama/Meta-Llama-3-70B-Instruct"
    for student in ("Qwen/Qwen3-0.6B", "meta-llama/Llama-3.2-1B", None):
        with pytest.raises(LicenceError, match="do not allow training"):
            check_terms(author, "Llama-3-small", student=student)
    assert check_terms(author, "Llama-3-small", student="meta-llama/Meta-Llama-3-8B")
    with pytest.raises(LicenceError, match="'Llama 3'"):
        check_terms(author, "Llama-small", student="meta-llama/Meta-Llama-3-8B")


@pytest.mark.parametrize("author", ["gpt-4o", "openai/gpt-5-mini", "gpt-3.5-turbo", "o3", "o4-mini", "chatgpt-4o-latest"])
def test_openai_outputs_are_refused(author: str) -> None:
    with pytest.raises(LicenceError, match=f"{author}: its terms .* Use another teacher"):
        check_terms(author, "small-reasoner", student="Qwen/Qwen3-0.6B")


def test_brought_traces_without_an_author_are_held_to_their_licence() -> None:
    with pytest.raises(LicenceError, match="'Llama'"):
        check_terms(None, "small-reasoner", licence="llama3.1")
    assert "Gemma" in check_terms(None, "small-reasoner", licence="gemma")[0]
    assert check_terms(None, "small-reasoner", licence="CC-BY-4.0") == []


def test_a_stated_licence_takes_no_demand_away() -> None:
    with pytest.raises(LicenceError):
        check_terms("gpt-4o", "small-reasoner", licence="MIT")


@pytest.mark.parametrize(("author", "words"), [("google/gemma-2-9b-it", "Gemma Terms"), ("moonshotai/Kimi-K2-Instruct", "show the name")])
def test_terms_that_travel_are_noted(author: str, words: str) -> None:
    assert any(words in note for note in check_terms(author, "small-reasoner"))


def test_unknown_terms_are_said_and_free_ones_need_no_note() -> None:
    assert "not known" in check_terms("somebody/own", "small-reasoner")[0]
    assert "not known" in check_terms(None, "small-reasoner", licence=UNKNOWN)[0]
    assert check_terms("Qwen/Qwen3-8B", "small-reasoner", student="Qwen/Qwen3-0.6B") == []


@pytest.mark.parametrize(
    ("student", "traces", "keys"),
    [
        ("Apache-2.0", "MIT", {"license": "apache-2.0"}),
        ("llama3.2", "llama3.2", {"license": "llama3.2"}),
        ("unknown", "Apache-2.0", {"license": "unknown"}),
        ("Apache-2.0", "gemma", {"license": "other", "license_name": "apache-2.0-and-gemma"}),
        ("Apache-2.0", "unknown", {"license": "other", "license_name": "apache-2.0-and-unknown"}),
        ("Our Own: Terms", "MIT", {"license": "other", "license_name": "our-own-terms"}),
    ],
)
def test_the_hub_gets_names_it_knows(student: str, traces: str, keys: dict[str, str]) -> None:
    assert hub_licence(student, traces) == keys
