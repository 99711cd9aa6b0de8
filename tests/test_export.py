"""Export of a tiny LoRA student and a fully trained one: what is written is what was trained, or nothing counts as written."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_model
from fabricated import make_run, recipe_for
from peft import LoraConfig, PeftModel, get_peft_model
from ruamel.yaml import YAML
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from distill.errors import DataError, IntegrityError, LicenceError, ModelError
from distill.recipe.experiment import Recipe
from distill.run.folder import StageFolder
from distill.run.manifest import MANIFEST, check_files
from distill.stages import export

LORA = {"type": "lora", "r": 4, "lora_alpha": 8}


def make_student(run_dir: Path, base: Path, *, std: float = 0.05, poison: str | None = None, full: bool = False) -> None:
    """Replaces the student of a fabricated run by a real one: random adapter weights, or all weights random."""
    make_run(run_dir)
    shutil.rmtree(run_dir / "student")
    torch.manual_seed(1)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    if not full:
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, weight in model.named_parameters():
        if full or "lora_" in name:
            torch.nn.init.normal_(weight, std=std)
        if poison is not None and poison in name:
            weight.data.view(-1)[3] = math.nan
    with StageFolder(run_dir / "student", "train", {}, [run_dir / "curated"]) as out:
        target = out.path / ("model" if full else "adapter")
        model.save_pretrained(target)
        facts = {"wall_s": 1.0, "finished_at": "2026-11-23T20:00:00+00:00", "parameters": 1, "trainable_parameters": 1, "steps": 3}
        out.finish(rows_in=30, rows_kept=30, files=list(target.iterdir()), facts=facts)


def recipe_of(run_dir: Path, base: Path, *, adapter: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    sections = {"student": {"model": str(base), "adapter": adapter or LORA}, "export": {"parity_prompts": 4}}
    return recipe_for(run_dir, **(sections | changes))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    run_dir = tmp_path_factory.mktemp("export") / "run"
    make_student(run_dir, tiny_model_dir)
    export.run(recipe_of(run_dir, tiny_model_dir))
    return run_dir


def logits_of(model: Any) -> torch.Tensor:
    ids = torch.randint(3, 250, (2, 40), generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        result: torch.Tensor = model.eval()(ids).logits
    return result


def test_the_merged_model_is_base_and_adapter(exported: Path, tiny_model_dir: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    before = logits_of(base)
    unmerged = logits_of(PeftModel.from_pretrained(base, str(exported / "student" / "adapter")))
    merged = logits_of(AutoModelForCausalLM.from_pretrained(exported / "export" / "model"))
    assert (unmerged - before).abs().max() > 0.05  # the adapter does something
    torch.testing.assert_close(merged, unmerged, atol=1e-5, rtol=1e-4)
    parity = check_files(exported / "export").facts["parity"]
    assert parity["prompts"] == 4 and 4 <= parity["positions"] <= 4 * 64
    assert parity["token_agreement"] == 1.0 and 0 <= parity["mean_kl_nats"] < 1e-6 and parity["max_log_prob_difference"] < 1e-3


def test_it_is_a_folder_that_others_can_load(exported: Path, tiny_model_dir: Path) -> None:
    model = exported / "export" / "model"
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny_model_dir).chat_template
    config = GenerationConfig.from_pretrained(model)
    assert config.eos_token_id == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert config.pad_token_id == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert config.do_sample is False  # as it was measured
    assert {path.name for path in (exported / "export" / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    listed = set(check_files(exported / "export").files)
    assert {"README.md", "model/config.json", "model/model.safetensors", "adapter/adapter_model.safetensors"} <= listed


def test_the_weights_have_the_type_asked_for(tmp_path: Path, tiny_model_dir: Path) -> None:
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(base)
    make_student(tmp_path / "run", base)
    for dtype, expected in [("auto", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)]:
        shutil.rmtree(tmp_path / "run" / "export", ignore_errors=True)
        export.run(recipe_of(tmp_path / "run", base, export={"parity_prompts": 2, "dtype": dtype, "min_token_agreement": 0.0}))
        model = tmp_path / "run" / "export" / "model"
        assert {weight.dtype for weight in load_file(model / "model.safetensors").values()} == {expected}
        assert json.loads((model / "config.json").read_text())["dtype"] == str(expected).removeprefix("torch.")


def test_a_fully_trained_student_is_written_whole(tmp_path: Path, tiny_model_dir: Path) -> None:
    make_student(tmp_path, tiny_model_dir, full=True)
    manifest = export.run(recipe_of(tmp_path, tiny_model_dir, adapter={"type": "full"}))
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "student" / "model")
    torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "export" / "model")), logits_of(trained))
    assert manifest.facts["parity"]["token_agreement"] == 1.0
    assert not (tmp_path / "export" / "adapter").exists() and '"lora"' not in (tmp_path / "export" / "README.md").read_text()


def test_a_4_bit_student_is_merged_into_whole_weights(exported: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "run", ignore=shutil.ignore_patterns("export"))
    student = {"model": str(tiny_model_dir), "adapter": LORA, "quantization": "nf4"}
    export.run(recipe_of(tmp_path / "run", tiny_model_dir, student=student))
    weights = [load_file(run / "export" / "model" / "model.safetensors") for run in (exported, tmp_path / "run")]
    torch.testing.assert_close(weights[1], weights[0], atol=0, rtol=0)
    assert "trained on 4-bit weights" in (tmp_path / "run" / "export" / "README.md").read_text()


def test_a_second_run_does_nothing(exported: Path, tiny_model_dir: Path) -> None:
    weights = exported / "export" / "model" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    again = export.run(recipe_of(exported, tiny_model_dir))
    assert again.facts["parity"]["token_agreement"] == 1.0 and weights.stat().st_mtime_ns == before


def test_half_written_leftovers_are_replaced(exported: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "run")
    target = tmp_path / "run" / "export"
    manifest = json.loads((target / MANIFEST).read_text())
    (target / "plan.json").write_text(json.dumps({key: manifest[key] for key in ("schema_version", "stage", "settings", "inputs")}))
    (target / MANIFEST).unlink()
    (target / "model" / "model.safetensors").write_bytes(b"torn")
    (target / "model" / "model-00001-of-00002.safetensors").write_bytes(b"of an older attempt")
    files = export.run(recipe_of(tmp_path / "run", tiny_model_dir)).files
    weights = {name: digest for name, digest in files.items() if name.endswith(".safetensors")}
    assert weights == {name: manifest["files"][name] for name in ("model/model.safetensors", "adapter/adapter_model.safetensors")}


@pytest.mark.parametrize("poison", ["layers.1.mlp.up_proj.lora_A", "layers.0.self_attn.q_proj.lora_B"])
def test_an_adapter_with_nan_is_refused_by_the_name_of_the_tensor(tmp_path: Path, tiny_model_dir: Path, poison: str) -> None:
    make_student(tmp_path, tiny_model_dir, poison=poison)
    with pytest.raises(ModelError, match=f"{poison}.*NaN or infinity"):
        export.run(recipe_of(tmp_path, tiny_model_dir))
    assert not (tmp_path / "export" / "model").exists() and not (tmp_path / "export" / MANIFEST).exists()


def test_weights_too_large_for_their_type_are_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    make_student(tmp_path, tiny_model_dir, std=400.0)  # products beyond 65,504
    with pytest.raises(ModelError, match=r"merged weights .*layers\..*export\.dtype: bfloat16 or float32"):
        export.run(recipe_of(tmp_path, tiny_model_dir, export={"parity_prompts": 1, "dtype": "float16"}))
    assert not (tmp_path / "export" / MANIFEST).exists()


def test_a_merged_model_that_differs_is_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    """bf16 keeps 8 bits: beside an adapter as large as the weights, some next tokens of a random model change."""
    make_student(tmp_path, tiny_model_dir, std=1.0)
    strict = {"parity_prompts": 8, "dtype": "bfloat16", "min_token_agreement": 1.0}
    with pytest.raises(ModelError, match=r"agrees .* on \d\d\.\d% .* asks for 100\.0%.*float32"):
        export.run(recipe_of(tmp_path, tiny_model_dir, export=strict))
    assert not (tmp_path / "export" / MANIFEST).exists()


def test_another_model_in_the_folder_has_low_agreement_and_a_known_kl(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The comparison itself, against sums written from the definitions."""
    original = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    other = AutoModelForCausalLM.from_pretrained(build_tiny_model(tmp_path / "other", seed=5)).eval()
    ids, start = list(range(3, 23)), 12
    with torch.inference_mode():
        p, q = (model(torch.tensor([ids])).logits[0].double().softmax(-1) for model in (original, other))
    kl = sum(float(p[t, v] * math.log(p[t, v] / q[t, v])) for t in range(start - 1, len(ids) - 1) for v in range(p.shape[1]))
    found = export._compare(other, [(ids, start, export._log_probs(original, ids, start))])
    assert found["positions"] == len(ids) - start
    assert found["mean_kl_nats"] == pytest.approx(kl / found["positions"], rel=1e-4) and kl > 0
    assert found["token_agreement"] == sum(int(p[t].argmax() == q[t].argmax()) for t in range(start - 1, len(ids) - 1)) / found["positions"]


def test_answers_that_are_no_numbers_are_a_difference(tiny_model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    expected = [([3, 4, 5, 6], 2, export._log_probs(model, [3, 4, 5, 6], 2))]
    model.model.norm.weight.data[0] = math.nan
    parity = export._compare(model, expected) | {"token_agreement": 1.0}
    with pytest.raises(ModelError, match="KL nan"):
        export._refuse_difference(export.Export(), parity, Path("export"))


def test_an_altered_adapter_is_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    make_student(tmp_path, tiny_model_dir)
    weights = tmp_path / "student" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(IntegrityError, match=r"adapter_model\.safetensors: is gone or was altered"):
        export.run(recipe_of(tmp_path, tiny_model_dir))


def test_terms_are_checked_before_a_model_is_loaded(tmp_path: Path) -> None:
    """The student does not exist, so a load would fail with another error."""
    make_run(tmp_path)
    recipe = recipe_for(tmp_path, student={"model": "meta-llama/Llama-3.2-1B"})
    with pytest.raises(LicenceError, match=r"'Llama', got 'small-run'.*export\.model_name"):
        export.run(recipe)
    with pytest.raises(DataError, match="export: null"):
        export.run(recipe_for(tmp_path, export=None))


def test_terms_of_brought_traces_hold_too(tmp_path: Path, tiny_model_dir: Path) -> None:
    make_student(tmp_path, tiny_model_dir)
    manifest = json.loads((tmp_path / "traces" / MANIFEST).read_text())
    manifest["facts"] |= {"author": {"model": None}, "licence": "llama3.1"}
    (tmp_path / "traces" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(LicenceError, match=r"llama3\.1"):
        export.run(recipe_of(tmp_path, tiny_model_dir))
    export.run(recipe_of(tmp_path, tiny_model_dir, export={"parity_prompts": 1, "model_name": "Llama-small"}))
    card = (tmp_path / "export" / "README.md").read_text()
    assert "# Llama-small" in card and "Built with Llama" in card and "traces brought from elsewhere" in card


def front_matter(card: str) -> dict[str, Any]:
    return dict(YAML(typ="safe").load(card.split("---\n")[1]))


def test_the_card_says_what_it_is(exported: Path, tiny_model_dir: Path) -> None:
    card = (exported / "export" / "README.md").read_text()
    keys = front_matter(card)
    assert keys["library_name"] == "transformers" and keys["license"] == "unknown" and keys["tags"] == ["distillation", "reasoning", "lora"]
    assert "base_model" not in keys  # a folder of this machine is no model of the Hub
    for expected in (
        "| student | 71.0 % | \\[66.0 %, 76.0 %\\] |".replace("\\", ""),
        "gap recovered: 0.71",
        "100.0% of",
        "Qwen/Qwen3-8B at feedc0de1234, 8.19B parameters",
        "Traces: Apache-2.0. Student before training: unknown.",
        "## Limits",
        "samples_per_prompt: 1",
    ):
        assert expected in card.replace("\\", ""), expected


def test_the_card_of_a_student_from_the_hub(tmp_path: Path, exported: Path) -> None:
    """Rendering alone: the card names the base model, the turns it was trained with, and 4-bit training."""
    make_run(tmp_path)
    student = {"model": "Qwen/Qwen3-0.6B", "quantization": "nf4", "chat_template_kwargs": {"enable_thinking": True}}
    prompts = {"source": "x.jsonl", "system_prompt": "Think. ```", "template": "{prompt}\nEnd with \\boxed{}."}
    parity = check_files(exported / "export").facts["parity"]
    recipe = recipe_for(tmp_path, student=student, prompts=prompts)
    card = export._card(recipe, export.Export(), {"author": "Qwen/Qwen3-8B", "licence": "gemma", "parity": parity, "notes": ["a note"]})
    keys = front_matter(card)
    assert keys["base_model"] == "Qwen/Qwen3-0.6B"
    assert keys["license"] == "other" and keys["license_name"] == "apache-2.0-and-gemma"
    for expected in (
        "measured with its base in 4 bits",
        "trained on 4-bit weights",
        "````\nThink. ```\n````",
        "{prompt}\nEnd with \\boxed{}.",
        '{"enable_thinking": true}',
        "- a note",
    ):
        assert expected in card, expected


def test_without_evaluation_the_card_says_not_measured(tmp_path: Path, tiny_model_dir: Path) -> None:
    make_student(tmp_path, tiny_model_dir)
    export.run(recipe_of(tmp_path, tiny_model_dir, evaluate=None, generate={"temperature": 0.7, "top_p": 0.8, "min_p": 0.05}))
    assert "Not measured." in (tmp_path / "export" / "README.md").read_text()
    config = GenerationConfig.from_pretrained(tmp_path / "export" / "model")
    assert (config.do_sample, config.temperature, config.top_p, config.top_k, config.min_p) == (True, 0.7, 0.8, 0, 0.05)
