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
from fabricated import change_manifest, make_run, recipe_for, trace
from huggingface_hub.repocard_data import model_index_to_eval_results
from peft import LoraConfig, PeftModel, get_peft_model
from ruamel.yaml import YAML
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from distill.errors import DataError, IntegrityError, LicenceError, ModelError
from distill.models.loading import load_chat_format
from distill.recipe.experiment import Recipe
from distill.recipe.models import FullFinetune, ModelSpec
from distill.recipe.results import Evaluate, Export
from distill.run.folder import StageFolder
from distill.run.manifest import MANIFEST, check_files
from distill.run.schema import TRACE
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
        (target / "README.md").unlink(missing_ok=True)  # as the stage does
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
        export._refuse_difference(Export(), parity, Path("export"))


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
    change_manifest(tmp_path / "traces", lambda manifest: manifest["facts"].update({"author": {"model": None}, "licence": "llama3.1"}))
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


def test_provenance_is_there_for_machines(tmp_path: Path) -> None:
    """Who wrote, from which data, each under which terms: on the card as the Hub reads it, and as a bill of materials."""
    make_run(tmp_path)
    student = {"model": "Qwen/Qwen3-0.6B"}
    prompts = {"source": "openai/gsm8k", "heldout_source": "somebody/held-out"}
    recipe = recipe_for(tmp_path, student=student, prompts=prompts, teacher={"model": "Qwen/Qwen3-8B", "terms": "see their page"})
    bill = json.loads(export._bill(recipe, Export(), {"licence": "gemma", "notes": ["Pass the terms on."]}))
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    made = bill["metadata"]["component"]
    assert made["licenses"] == [{"license": {"name": "apache-2.0-and-gemma"}}]
    assert made["pedigree"]["ancestors"][0]["name"] == "Qwen/Qwen3-0.6B"
    assert made["modelCard"]["quantitativeAnalysis"]["performanceMetrics"][0]["value"] == "71 %"
    parts = {
        part["name"]: {told["name"].removeprefix("distill-kit:"): told["value"] for told in part["properties"]}
        for part in bill["components"]
    }
    assert parts["Qwen/Qwen3-8B"]["role"] == "wrote the traces" and parts["Qwen/Qwen3-8B"]["terms"] == "see their page"
    assert parts["openai/gsm8k"]["role"] == "problems" and parts["somebody/held-out"]["role"] == "held-out problems"
    refs = {"base", *(part["bom-ref"] for part in bill["components"])}
    assert (
        set(bill["dependencies"][0]["dependsOn"]) == refs
        and {one["ref"] for one in made["modelCard"]["modelParameters"]["datasets"]} < refs
    )
    facts = {"author": "Qwen/Qwen3-8B", "licence": "Apache-2.0", "notes": [], "least_transformers": "5"}
    parity = {"prompts": 1, "token_agreement": 1.0, "positions": 1, "mean_kl_nats": 0.0}
    full = recipe.model_copy(update={"student": recipe.student.model_copy(update={"adapter": FullFinetune(type="full")})})
    keys = front_matter(export._card(full, Export(), facts | {"parity": parity}))
    assert keys["datasets"] == ["openai/gsm8k"]  # what it learned from, not what it was measured on
    found = model_index_to_eval_results(keys["model-index"])[1]
    assert [(one.metric_type, one.metric_value, one.dataset_type) for one in found] == [("accuracy", 71.0, "somebody/held-out")]


def change_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_card_of_a_student_from_the_hub(tmp_path: Path, exported: Path) -> None:
    """Rendering alone: the card names the base model, the turns it was trained with, and 4-bit training."""
    make_run(tmp_path)
    student = {"model": "Qwen/Qwen3-0.6B", "quantization": "nf4", "chat_template_kwargs": {"enable_thinking": True}}
    prompts = {"source": "x.jsonl", "system_prompt": "Think. ```", "template": "{prompt}\nEnd with \\boxed{}."}
    parity = check_files(exported / "export").facts["parity"]
    recipe = recipe_for(tmp_path, student=student, prompts=prompts)
    shutil.copytree(exported / "export" / "adapter", tmp_path / "export" / "adapter")
    change_json(tmp_path / "export" / "adapter" / "adapter_config.json", {"use_rslora": True})
    card = export._card(
        recipe,
        Export(),
        {"author": "Qwen/Qwen3-8B", "licence": "gemma", "parity": parity, "notes": ["a note"], "least_transformers": "4.57"},
    )
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
        "needs transformers 4.57 or newer",
        "`convert_lora_to_gguf.py` can't be given `adapter/`: it knows nothing of rsLoRA",
        "Measured on the 300 prompts above and nowhere else.",
    ):
        assert expected in card, expected


def test_without_evaluation_the_card_says_not_measured_and_the_student_draws_as_its_base(tmp_path: Path, tiny_model_dir: Path) -> None:
    """How the teacher's traces were drawn says nothing of the student."""
    shutil.copytree(tiny_model_dir, tmp_path / "base")
    GenerationConfig(do_sample=True, temperature=0.9, top_k=7, max_length=99).save_pretrained(tmp_path / "base")
    make_student(tmp_path / "run", tmp_path / "base")
    student = {"model": str(tmp_path / "base"), "adapter": LORA, "public_name": "somebody/small"}
    export.run(recipe_of(tmp_path / "run", tmp_path / "base", student=student, evaluate=None, generate={"temperature": 0.7, "min_p": 0.05}))
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert "Not measured: this recipe" in card and "measured nowhere" in card and "Measured on" not in card
    assert front_matter(card)["base_model"] == "somebody/small" and "\nsomebody/small after distillation" in card
    config = GenerationConfig.from_pretrained(tmp_path / "run" / "export" / "model")
    assert (config.do_sample, config.temperature, config.top_p, config.top_k, config.min_p) == (True, 0.9, None, 7, None)


def test_a_measured_student_draws_as_it_was_measured(tiny_model_dir: Path) -> None:
    chat, own = load_chat_format(ModelSpec(model=str(tiny_model_dir))), GenerationConfig(do_sample=True, temperature=0.9)
    drawn = export._generation_config(Evaluate(temperature=0.7, top_p=0.8, min_p=0.05), chat, own)
    assert (drawn.do_sample, drawn.temperature, drawn.top_p, drawn.top_k, drawn.min_p) == (True, 0.7, 0.8, 0, 0.05)
    others = export._generation_config(Evaluate(models=["teacher"], temperature=0.7), chat, own)
    assert (others.temperature, others.top_p) == (0.9, None)


def test_only_listed_files_travel(tmp_path: Path, tiny_model_dir: Path) -> None:
    make_student(tmp_path / "run", tiny_model_dir)
    (tmp_path / "id_rsa").write_text("a key")
    adapter = tmp_path / "run" / "student" / "adapter"
    (adapter / "linked").symlink_to(tmp_path / "id_rsa")
    (adapter / "notes").mkdir()
    (adapter / "notes" / "unlisted.txt").write_text("mine")
    weights = adapter / "adapter_model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")  # a listed one is copied, whatever it lies behind
    files = set(export.run(recipe_of(tmp_path / "run", tiny_model_dir)).files)
    assert files >= {"adapter/adapter_model.safetensors"} and not {name for name in files if "linked" in name or "notes" in name}
    there = {path for path in (tmp_path / "run" / "export").rglob("*") if path.is_file() and path.name not in (MANIFEST, ".lock")}
    assert {str(path.relative_to(tmp_path / "run" / "export")) for path in there} == files and not any(map(Path.is_symlink, there))


def test_nothing_of_this_machine_is_published(tmp_path: Path, tiny_model_dir: Path) -> None:
    make_student(tmp_path / "run", tiny_model_dir)
    change_manifest(tmp_path / "run" / "traces", lambda manifest: manifest["facts"]["author"].update({"model": str(tmp_path / "big-one")}))
    secret = "hf_" + "a1B2" * 8
    prompts = {"source": str(tmp_path / "problems.jsonl"), "system_prompt": "/no_think"}
    train = {"trainer_args": {"deepspeed": str(tmp_path / "zero.json"), "run_name": secret, "hub_token": "mine"}}
    teacher = {"model": str(tmp_path / "big-one")}
    export.run(recipe_of(tmp_path / "run", tiny_model_dir, teacher=teacher, prompts=prompts, train=train))
    for path in (tmp_path / "run" / "export").rglob("*"):
        if path.is_file():
            assert str(tmp_path.parent).encode() not in path.read_bytes() and secret.encode() not in path.read_bytes(), path
    card = (tmp_path / "run" / "export" / "README.md").read_text().replace("\\", "")
    said = ("distillation from big-one", "| problems | problems.jsonl |", "system_prompt: /no_think", "run_name: '***'", "hub_token: '***'")
    for expected in said:
        assert expected in card, expected
    settings = json.loads((tmp_path / "run" / "export" / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == tiny_model_dir.name
    assert export.run(
        recipe_of(tmp_path / "run", tiny_model_dir, teacher={"model": str(tmp_path / "big-one")}, prompts=prompts, train=train)
    )


def test_the_type_of_the_weights_stands_deeper_in_some_configs(tmp_path: Path) -> None:
    text = {"model_type": "gemma3_text", "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    assert export._own_dtype(ModelSpec(model=str(tmp_path))) == "bfloat16"


def test_a_student_that_does_not_reason_is_not_said_to(tmp_path: Path) -> None:
    make_run(tmp_path)
    assert export._reasons(recipe_for(tmp_path))
    traces = [trace(index, f"What is {index}?", f"It is {index}.") for index in range(6)]
    shutil.rmtree(tmp_path / "curated")
    with StageFolder(tmp_path / "curated", "curate", {}, [tmp_path / "traces"]) as out:
        out.write_table("curated", traces, TRACE)
        out.finish(rows_in=6, rows_kept=6)
    assert not export._reasons(recipe_for(tmp_path))
    live = recipe_for(tmp_path, train={"method": "on_policy"}, generate=None)
    shutil.rmtree(tmp_path / "eval")
    with StageFolder(tmp_path / "eval", "evaluate", {}, [tmp_path / "prompts"]) as out:
        own = trace(0, "What is 3?", "<think>\nThree.\n</think>\n\n3") | {"author": "student"}
        out.write_table("traces", [row | {"author": "base"} for row in traces] + [own], TRACE)
        out.finish(rows_in=7, rows_kept=7)
    assert export._reasons(live) and not export._reasons(recipe_for(tmp_path, train={"method": "on_policy"}, generate=None, evaluate=None))
