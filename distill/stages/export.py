"""Stage `export`: the student as others will load it. Reads student/, writes export/.

    export/model/     merged safetensors with tokenizer, template and generation config
    export/adapter/   the adapter alone
    export/README.md  model card: data, settings, results, lineage

What is written is read back and compared with base + adapter before the stage counts as complete.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.errors import DataError, ModelError
from distill.licences import check_terms, licence_of
from distill.pages import render
from distill.recipe import Export, Recipe
from distill.recipe_io import recipe_text
from distill.runlog import Clock, progress, say
from distill.stages import FOLDERS, folder, run_dir
from distill.storage import Manifest, StageFolder, check_files, read_manifest, read_rows, write_text
from distill.summary import RESULT_COLUMNS, lineage, results_rows, summarise

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from distill.chat import ChatFormat

    Answer = tuple[list[int], int, torch.Tensor]

_ANSWER_TOKENS = 64  # of each parity prompt's answer that are compared


def run(recipe: Recipe) -> Manifest:
    """Writes the merged model, the adapter and the card, and the comparison into the manifest."""
    export = recipe.export
    if export is None:
        raise DataError("export: this recipe leaves the stage out (export: null). Give it a section export.")
    settings = {"export": export.identity(), "student": recipe.student.identity(), "name": model_name(recipe, export)}
    inputs = [folder(recipe, "train"), *([folder(recipe, "evaluate")] if recipe.evaluate is not None else [])]
    with StageFolder(folder(recipe, "export"), "export", settings, inputs) as out:
        return out.manifest or _export(recipe, export, out)


def model_name(recipe: Recipe, export: Export) -> str:
    """The name under which the student goes out."""
    return export.model_name or recipe.name


def _export(recipe: Recipe, export: Export, out: StageFolder) -> Manifest:
    from distill.models import free_memory, load_chat_format, load_model, num_parameters, pick_device

    clock, device, trained = Clock(), pick_device(), folder(recipe, "train")
    check_files(trained)
    notes = check_terms(_author(recipe), model_name(recipe, export))
    for leftover in ("model", "adapter"):
        shutil.rmtree(out.path / leftover, ignore_errors=True)
    chat = load_chat_format(recipe.student)
    original = _load_original(recipe, trained, device)
    _refuse_nan(original, "the trained weights")
    expected = _answers(original, chat, _parity_prompts(recipe, export))
    parameters = num_parameters(original)
    _save(recipe, export, original, chat, out.path)
    del original
    free_memory()
    written = load_model(recipe.student.model_copy(update=_AS_WRITTEN | {"model": str(out.path / "model")}), device, _float32())
    _refuse_nan(written, "the merged weights")
    parity = _compare(written, expected)
    say(f"export    merged against adapter on {len(expected)} prompts: {parity['token_agreement']:.1%} of next tokens equal, "
        f"KL {parity['mean_kl_nats']:.2e} nats a token")  # fmt: skip
    if parity["token_agreement"] < export.min_token_agreement:
        raise ModelError(
            f"{out.path}: the merged model agrees with base + adapter on {parity['token_agreement']:.1%} of the tokens, less than "
            f"export.min_token_agreement ({export.min_token_agreement:.1%}). Export with export.dtype: float32."
        )
    facts = clock.facts(device=str(device), parity=parity, parameters=parameters, notes=notes, author=_author(recipe))
    write_text(out.path / "README.md", _card(recipe, export, facts))
    files = [path for path in out.path.rglob("*") if path.is_file() and path.parent != out.path] + [out.path / "README.md"]
    return out.finish(files=files, facts=facts)


_AS_WRITTEN = {"revision": None, "tokenizer": None, "quantization": "none"}


def _float32() -> torch.dtype:
    import torch

    return torch.float32


def _author(recipe: Recipe) -> str | None:
    """The model that wrote the traces, as the trace folder says."""
    author = read_manifest(folder(recipe, "generate")).facts.get("author") or {}
    name = author.get("model")
    return None if name is None else str(name)


def _load_original(recipe: Recipe, trained: Path, device: torch.device) -> PreTrainedModel:
    """Base with adapter, or the fully trained model, in fp32; a 4-bit student's adapter goes onto whole weights."""
    from distill.models import load_trained

    spec = recipe.student.model_copy(update={"quantization": "none", "dtype": "float32"})
    model: Any = load_trained(spec, recipe.student.adapter, trained, device, merge=False)
    return model  # type: ignore[no-any-return]


def _refuse_nan(model: Any, what: str) -> None:
    import torch

    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ModelError(f"export: {what} are not all numbers: {name} has NaN or infinity. Train again with a lower learning rate.")


def _parity_prompts(recipe: Recipe, export: Export) -> list[list[dict[str, str]]]:
    prompts = folder(recipe, "prompts")
    rows = read_rows(prompts, "heldout") or read_rows(prompts, "train")
    return [row["messages"] for row in rows[: export.parity_prompts]]


def _answers(model: Any, chat: ChatFormat, prompts: list[list[dict[str, str]]]) -> list[Answer]:
    """For each prompt the ids of prompt and greedy answer, where the answer begins, and the log-probabilities there."""
    from distill.engines import requests_for
    from distill.engines.hf import HFEngine
    from distill.recipe import Sampling

    rows = [{"prompt_id": str(index), "messages": messages, "reference": None} for index, messages in enumerate(prompts)]
    engine = HFEngine(model, chat, Sampling(temperature=0.0, max_new_tokens=_ANSWER_TOKENS))
    answers = []
    with progress(len(rows), "prompts", "compare") as bar:
        for completion in engine.complete(requests_for(rows, 1, 0)):
            ids, start = completion.prompt_ids + completion.completion_ids, len(completion.prompt_ids)
            answers.append((ids, start, _log_probs(model, ids, start)))
            bar.update()
    return answers


def _log_probs(model: Any, ids: list[int], start: int) -> torch.Tensor:
    """Log-probabilities of the next token at each position of the answer, fp32 `(answer tokens, V)`, on the CPU."""
    import torch

    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([ids], device=model.device)).logits[0, start - 1 : len(ids) - 1]
    return logits.float().log_softmax(-1).cpu()


def _compare(model: Any, expected: list[Answer]) -> dict[str, Any]:
    """How far the written model is from the original, over all positions of the original's greedy answers."""
    equal, positions, kl_sum, largest = 0, 0, 0.0, 0.0
    for ids, start, original_TV in expected:
        written_TV = _log_probs(model, ids, start)
        equal += int((written_TV.argmax(-1) == original_TV.argmax(-1)).sum())
        positions += len(original_TV)
        kl_sum += float((original_TV.exp() * (original_TV - written_TV)).sum())
        largest = max(largest, float((original_TV - written_TV).abs().max()))
    return {
        "prompts": len(expected),
        "positions": positions,
        "token_agreement": equal / positions,
        "mean_kl_nats": max(0.0, kl_sum / positions),
        "max_log_prob_difference": largest,
    }


def _save(recipe: Recipe, export: Export, model: Any, chat: ChatFormat, target: Path) -> None:
    """Writes the merged weights with tokenizer and generation config, and the adapter as it was trained."""
    import torch
    from transformers import AutoConfig, GenerationConfig

    from distill import embedded

    if recipe.student.adapter.type == "lora":
        shutil.copytree(folder(recipe, "train") / "adapter", target / "adapter")
        model = model.merge_and_unload()
    dtype: str = export.dtype
    if dtype == "auto":
        config = AutoConfig.from_pretrained(
            embedded.resolve(recipe.student.model), revision=recipe.student.revision, trust_remote_code=recipe.student.trust_remote_code
        )
        dtype = str(config.dtype or torch.float32).removeprefix("torch.")
    model = model.to(getattr(torch, dtype))
    model.generation_config = GenerationConfig(eos_token_id=list(chat.stop_ids), pad_token_id=chat.pad_id, do_sample=True)
    model.save_pretrained(target / "model")
    chat.tokenizer.save_pretrained(target / "model")


def _card(recipe: Recipe, export: Export, facts: dict[str, Any]) -> str:
    """The model card."""
    stages = {stage: name for stage, name in FOLDERS.items() if stage not in ("report", "export")}
    summary = summarise(run_dir(recipe), stages if recipe.evaluate is not None else {**stages, "evaluate": "left-out"})
    return render(
        "model_card.md.j2",
        name=model_name(recipe, export),
        base_model=recipe.student.model,
        author=facts["author"] or "brought traces",
        adapter=recipe.student.adapter.type == "lora",
        quantised=recipe.student.quantization != "none",
        summary=summary,
        columns=RESULT_COLUMNS,
        results=results_rows(summary),
        lineage=lineage(recipe, summary),
        parity=facts["parity"],
        notes=facts["notes"],
        licence=licence_of(recipe.student.model, recipe.student.licence),
        student_licence=licence_of(recipe.student.model, recipe.student.licence),
        trace_licence=summary.manifests["generate"].facts.get("licence"),
        recipe=recipe_text(recipe),
    )
