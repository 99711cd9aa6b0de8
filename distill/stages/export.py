"""Stage `export`: the student as others will load it. Reads student/ and, for the card, the other stages; writes export/.

    export/model/     merged safetensors with tokenizer, template and generation config
    export/adapter/   the adapter alone
    export/README.md  model card: data, settings, results, lineage
    export/provenance.cdx.json  the lineage for machines: models and data with their terms, as CycloneDX has it

What is written is read back and compared with base + adapter before the stage counts as complete.
"""

from __future__ import annotations

import json
import math
import shutil
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.data.catalogue import UNKNOWN
from distill.data.licences import check_terms, hub_licence, licence_of
from distill.errors import DataError, ModelError
from distill.recipe.base import Sampling
from distill.recipe.experiment import Recipe
from distill.recipe.models import ModelSpec
from distill.recipe.reading import recipe_text
from distill.recipe.results import Evaluate, Export
from distill.reporting import provenance
from distill.reporting.pages import render
from distill.reporting.public import file_or_name, hide_secrets, public_name, public_names, published, published_recipe
from distill.reporting.results import results_tables, win_tables
from distill.reporting.summary import lineage, summarise
from distill.run.clock import Clock
from distill.run.files import copy_file, write_text
from distill.run.folder import StageFolder
from distill.run.log import progress, say
from distill.run.manifest import Manifest, check_files, read_manifest
from distill.run.plan import Growth, StagePlan
from distill.run.schema import THINK_CLOSE
from distill.run.tables import iter_rows, rows_at
from distill.stages import Step, as_made, folder, folders_to_show, last_round, open_stage, plan_of, student_folder

if TYPE_CHECKING:
    import torch

    from distill.models.chat import ChatFormat

    Answer = tuple[list[int], int, torch.Tensor]

_ANSWER_TOKENS = 64  # of each parity prompt's answer that are compared
_LOOKED_AT = 200  # traces that show whether they reason
_HEADROOM = 1.5  # times the weights: what merging and a forward pass take beside them


def plan(recipe: Recipe) -> StagePlan:
    """What the stage is asked to make; what was exported of another student, or in another form, is kept beside it.

    Raises:
        DataError: the recipe leaves it out.
    """
    export, recipe = _export_of(recipe), _as_made(recipe)
    names = {"name": model_name(recipe, export), "models": sorted(public_names(recipe).values())}
    settings = {"export": export.identity(), "student": published(recipe.student.identity_here()), **names}
    inputs = [student_folder(recipe), *([folder(recipe, "evaluate")] if recipe.evaluate is not None else [])]
    asked = plan_of(recipe, Step("export"), settings, inputs, Growth(anything=True, adds=False))
    return asked._replace(made_with=published(asked.made_with))  # the manifest travels with the model


def run(recipe: Recipe) -> Manifest:
    """Writes the merged model, the adapter and the card, and the comparison into the manifest."""
    with open_stage(recipe, plan(recipe)) as out:
        return out.manifest or _export(_as_made(recipe), _export_of(recipe), out)


def _as_made(recipe: Recipe) -> Recipe:
    """The recipe of the student that is exported, and how this command wants it exported."""
    return as_made(recipe).model_copy(update={"export": recipe.export})


def _export_of(recipe: Recipe) -> Export:
    if recipe.export is None:
        raise DataError("export: this recipe leaves the stage out (export: null). Give it a section export.")
    return recipe.export


def model_name(recipe: Recipe, export: Export) -> str:
    """The name under which the student goes out."""
    return export.model_name or recipe.name


def _export(recipe: Recipe, export: Export, out: StageFolder) -> Manifest:
    clock = Clock(out.path)
    author, licence, notes = _terms(recipe, export)
    check_files(student_folder(recipe))
    for leftover in ("model", "adapter"):
        shutil.rmtree(out.path / leftover, ignore_errors=True)

    from distill.models.loading import free_memory, load_chat_format, load_model, num_parameters
    from distill.models.portable import make_loadable

    chat = load_chat_format(recipe.student)
    original = _load_original(recipe)
    device = original.device
    _refuse_non_finite(original, "trained", "Train again with a lower learning rate.")
    drawing = _generation_config(recipe.evaluate, chat, original.generation_config)  # before the answers, which are drawn otherwise
    expected = _answers(original, chat, _parity_prompts(recipe, export))
    merged = _save(recipe, export, original, chat, drawing, out.path)
    parameters, least = num_parameters(merged), make_loadable(out.path / "model")
    del original, merged
    free_memory()
    written = load_model(recipe.student.model_copy(update=_PLAIN | {"model": str(out.path / "model"), "revision": None}), device)
    _refuse_non_finite(written, "merged", "Export with export.dtype: bfloat16 or float32 and --redo.")
    parity = _compare(written, expected)
    _refuse_difference(export, parity, out.path)
    facts = clock.facts(
        device=str(device), parity=parity, parameters=parameters, notes=notes, author=author, licence=licence, least_transformers=least
    )
    write_text(out.path / "README.md", _card(recipe, export, facts))
    write_text(out.path / provenance.FILE, _bill(recipe, export, facts))
    files = [path for name in ("model", "adapter") for path in (out.path / name).rglob("*") if path.is_file()]
    files += [out.path / "README.md", out.path / provenance.FILE]
    return out.finish(files=files, facts=facts)


_PLAIN = {"quantization": "none", "dtype": "float32", "attn_implementation": "auto"}
"""How both models are loaded: FlashAttention has no fp32, and an adapter is merged into whole weights."""


def _terms(recipe: Recipe, export: Export) -> tuple[str | None, str, list[str]]:
    """Whose outputs the student learned from, under which terms, and what must be noted of them.

    Whoever wrote the traces, and the teacher whose distributions were learned from: they can be two.

    Raises:
        LicenceError: the terms of one exclude this student, or ask for another name.
    """
    sources: list[tuple[str | None, str, ModelSpec | None]] = []
    teacher = recipe.teacher
    if recipe.learns_from_traces:
        facts = read_manifest(folder(recipe, "generate")).facts
        writer = teacher if recipe.traces is None else None
        sources.append(((facts.get("author") or {}).get("model"), str(facts.get("licence") or UNKNOWN), writer))
    if teacher is not None and (recipe.score is not None or recipe.train.is_live):
        sources.append((teacher.model, licence_of(teacher.model, teacher.licence), teacher))
    notes: list[str] = []
    names = public_names(recipe)
    for author, licence, spec in sources:
        notes += check_terms(author, model_name(recipe, export), licence=licence, student=recipe.student.model, spec=spec)
        if author in names:  # what it is called elsewhere has terms, too
            notes += check_terms(names[author], model_name(recipe, export), licence=licence, student=names[recipe.student.model])
    authors = [names.get(author) or file_or_name(author) for author, _, _ in sources if author is not None]
    licences = dict.fromkeys(licence for _, licence, _ in sources)
    return " and ".join(dict.fromkeys(authors)) or None, " and ".join(licences), list(dict.fromkeys(notes))


def _load_original(recipe: Recipe) -> Any:
    """Base with adapter, or the fully trained model, in fp32; on the GPU if it has room, else on the CPU."""
    import torch

    from distill.models.loading import load_trained, num_parameters, pick_device

    spec, device = recipe.student.model_copy(update=_PLAIN), pick_device()
    model: Any = load_trained(spec, recipe.student.adapter, student_folder(recipe), torch.device("cpu"), merge=False)
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] > _HEADROOM * 4 * num_parameters(model):
        model.to(device)
    return model


def _refuse_non_finite(model: Any, which: str, advice: str) -> None:
    import torch

    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ModelError(f"export: the {which} weights are not all numbers: {name} has NaN or infinity. {advice}")


def _parity_prompts(recipe: Recipe, export: Export) -> list[list[dict[str, str]]]:
    prompts = folder(recipe, "prompts")
    manifest = read_manifest(prompts)
    table = "heldout" if manifest.rows("heldout") else "train"
    wanted = range(min(export.parity_prompts, manifest.rows(table)))
    return [row["messages"] for row in rows_at(prompts, table, wanted, ["messages"])]


def _answers(model: Any, chat: ChatFormat, prompts: list[list[dict[str, str]]]) -> list[Answer]:
    """For each prompt the ids of prompt and greedy answer, where the answer begins, and the log-probabilities there."""
    from distill.engines import requests_for
    from distill.engines.hf import HFEngine

    rows = [{"prompt_id": str(index), "messages": messages, "reference": None} for index, messages in enumerate(prompts)]
    engine = HFEngine(model, chat, Sampling(temperature=0.0, max_new_tokens=_ANSWER_TOKENS))
    answers = []
    with progress(len(rows), "prompts", "compare") as bar:
        for completion in engine.complete(requests_for(rows, 1, 0)):
            prompt_ids, written = completion.prompt_ids or [], completion.completion_ids or []
            ids, start = prompt_ids + written, len(prompt_ids)
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
        "mean_kl_nats": kl_sum / positions if math.isnan(kl_sum) else max(0.0, kl_sum / positions),  # rounding goes below 0
        "max_log_prob_difference": largest,
    }


def _refuse_difference(export: Export, parity: dict[str, Any], target: Path) -> None:
    agreement, kl_nats = parity["token_agreement"], parity["mean_kl_nats"]
    say(f"export    written model against base + adapter on {parity['prompts']} prompts: {agreement:.1%} of "
        f"{parity['positions']:,} next tokens equal, KL {kl_nats:.1e} nats a token")  # fmt: skip
    if agreement < export.min_token_agreement or not math.isfinite(kl_nats):
        raise ModelError(
            f"{target}: the written model agrees with base + adapter on {agreement:.1%} of the tokens (KL {kl_nats:.1e} nats a token), "
            f"export.min_token_agreement asks for {export.min_token_agreement:.1%}. Export with export.dtype: float32 and --redo."
        )


def _save(recipe: Recipe, export: Export, model: Any, chat: ChatFormat, drawing: Any, target: Path) -> Any:
    """Writes the merged weights with tokenizer and generation config, and the adapter as it was trained; returns the merged."""
    import torch

    from distill.models.loading import model_record
    from distill.models.portable import publish_adapter, save_tokenizer

    student = recipe.student
    if student.adapter.type == "lora":
        _copy_adapter(student_folder(recipe), target)
        publish_adapter(target / "adapter", public_name(student), model_record(student, model.get_base_model())["revision"])
        model = model.merge_and_unload()
    model = model.to(getattr(torch, _own_dtype(student) if export.dtype == "auto" else export.dtype))
    model.generation_config = drawing
    model.save_pretrained(target / "model")
    save_tokenizer(student, chat, target / "model")
    return model


def _copy_adapter(student: Path, target: Path) -> None:
    """Copies the files that the manifest lists, and no other: what lies beside them, or is linked to, is not the student's."""
    for name in read_manifest(student).files:
        if Path(name).parts[0] == "adapter":
            copy_file(student / name, target / name)


def _own_dtype(student: ModelSpec) -> str:
    """The type that the student's own checkpoint names, of a model of several kinds of input that of its language model; else fp32."""
    from transformers import AutoConfig

    from distill import embedded

    own = AutoConfig.from_pretrained(
        embedded.resolve(student.model), revision=student.revision, trust_remote_code=student.trust_remote_code
    )
    return str(own.dtype or own.get_text_config().dtype or "float32").removeprefix("torch.")


def _generation_config(measured: Evaluate | None, chat: ChatFormat, own: Any) -> Any:
    """Ends where the student learned to end, and draws tokens as when it was measured, or else as its own checkpoint says."""
    from transformers import GenerationConfig

    ends = {"eos_token_id": list(chat.stop_ids), "pad_token_id": chat.pad_id}
    if measured is None or "student" not in measured.models:
        drawing = {name: getattr(own, name, None) for name in ("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
        return GenerationConfig(**ends, **{name: value for name, value in drawing.items() if value is not None})
    if measured.temperature == 0:
        return GenerationConfig(**ends, do_sample=False)
    drawing = {name: getattr(measured, name) for name in ("temperature", "top_p", "top_k")}
    return GenerationConfig(**ends, do_sample=True, **drawing, min_p=measured.min_p or None)


def _reasons(recipe: Recipe) -> bool:
    """Whether most of the traces that the student learned from, or else of its own answers, think before they answer."""
    number = last_round(recipe)
    if recipe.learns_from_traces:
        rows = iter_rows(folder(recipe, "curate"), "curated", columns=["completion"])
    elif number:
        rows = iter_rows(folder(recipe, "rollouts", number), "traces", columns=["completion"])
    elif recipe.evaluate is not None:
        written = iter_rows(folder(recipe, "evaluate"), "traces", columns=["author", "completion"])
        rows = (row for row in written if row["author"] == "student")
    else:
        return False
    thinks = [THINK_CLOSE in row["completion"] for row in islice(rows, _LOOKED_AT)]
    return 2 * sum(thinks) > len(thinks)


def _card(recipe: Recipe, export: Export, facts: dict[str, Any]) -> str:
    """The model card. Of this machine it names nothing."""
    from distill.models.portable import why_no_gguf

    student, prompts = recipe.student, recipe.prompts
    summary = summarise(*folders_to_show(recipe), public_names(recipe))
    licence = licence_of(student.model, student.licence)
    adapter = folder(recipe, "export") / "adapter" if student.adapter.type == "lora" else None
    return render(
        "model_card.md.j2",
        name=model_name(recipe, export),
        keys=provenance.card_keys(recipe, summary, model_name(recipe, export)) | hub_licence(licence, facts["licence"]),
        tags=["distillation", *(["reasoning"] if _reasons(recipe) else []), *(["lora"] if adapter else [])],
        base_model=public_name(student),
        least_transformers=facts["least_transformers"],
        no_gguf=why_no_gguf(adapter) if adapter else "",
        author=facts["author"] or "traces brought from elsewhere",
        adapter=adapter is not None,
        quantised=student.quantization != "none",
        summary=summary,
        results=results_tables(summary),
        wins=win_tables(summary),
        lineage=lineage(recipe, summary),
        parity=facts["parity"],
        notes=facts["notes"],
        student_licence=licence,
        terms_of="Traces" if recipe.learns_from_traces else "Teacher",
        trace_licence=facts["licence"],
        system_prompt=prompts.system_prompt,
        user_template=prompts.template,
        template_kwargs=student.chat_template_kwargs,
        recipe=recipe_text(published_recipe(recipe)),
    )


def _bill(recipe: Recipe, export: Export, facts: dict[str, Any]) -> str:
    """The lineage for machines. Of this machine it names nothing."""
    summary = summarise(*folders_to_show(recipe), public_names(recipe))
    keys = hub_licence(licence_of(recipe.student.model, recipe.student.licence), facts["licence"])
    licence = keys.get("license_name", keys["license"])
    bill = provenance.bill_of_materials(recipe, summary, model_name(recipe, export), licence, facts["notes"])
    return hide_secrets(json.dumps(bill, indent=1, ensure_ascii=False)) + "\n"
