"""Stage `generate`: the teacher writes traces for the training prompts. Reads prompts/, writes traces/."""

from __future__ import annotations

from distill.recipe.experiment import Recipe
from distill.recipe.models import ModelSpec
from distill.recipe.traces import Generate
from distill.run.clock import Clock
from distill.run.folder import StageFolder
from distill.run.manifest import Manifest, read_manifest
from distill.run.plan import Growth, StagePlan
from distill.run.schema import TRACE
from distill.run.tables import iter_rows
from distill.stages import Step, folder, open_stage, plan_of


def plan(recipe: Recipe) -> StagePlan:
    """What the stage is asked to make."""
    assert recipe.teacher is not None and recipe.generate is not None  # the recipe was validated
    settings = {"teacher": recipe.teacher.identity(), "generate": recipe.generate.identity(), "seed": recipe.seed}
    return plan_of(recipe, Step("generate"), settings, [folder(recipe, "prompts")], Growth({"generate.samples_per_prompt": 0}))


def run(recipe: Recipe) -> Manifest:
    """Writes the table `traces`, a row a prompt and sample; resumes after the last finished batch."""
    teacher, sampling = recipe.teacher, recipe.generate
    assert teacher is not None and sampling is not None  # the recipe was validated
    with open_stage(recipe, plan(recipe)) as out:
        return out.manifest or _generate(recipe, teacher, sampling, out)


def _generate(recipe: Recipe, teacher: ModelSpec, sampling: Generate, out: StageFolder) -> Manifest:
    # Imported here, so that a finished stage answers without loading torch.
    from distill.data.licences import licence_of
    from distill.engines import TraceTable
    from distill.engines.earlier import EarlierTraces, refuse_another
    from distill.engines.hf import HFEngine
    from distill.models.loading import load_chat_format, load_model, model_record, pick_device

    clock = Clock(out.path)
    prompts = folder(recipe, "prompts")
    num_prompts = read_manifest(prompts).rows("train")
    chat = load_chat_format(teacher)
    device = pick_device()
    model = load_model(teacher, device)
    record = model_record(teacher, model)
    rendering = {"tokenizer_digest": chat.tokenizer_digest, "template_digest": chat.template_digest}
    earlier = None
    if out.earlier:
        before = read_manifest(out.earlier).facts
        refuse_another("teacher", record | rendering, before.get("author", {}) | before)
        earlier = EarlierTraces(out.earlier, {"teacher"})
    traces = TraceTable(out.table("traces", TRACE, resume=True), out.journal(), sampling, recipe.seed, earlier)
    rows = iter_rows(prompts, "train", columns=["prompt_id", "messages", "reference"])
    traces.write(HFEngine(model, chat, sampling), rows, num_prompts, "teacher", "generate")
    return out.finish(
        rows_in=num_prompts,
        rows_kept=traces.num_rows,
        facts=clock.facts(
            device=str(device),
            author=record,
            licence=licence_of(teacher.model, teacher.licence),
            **rendering,
            control_ids=sorted(chat.control_ids),
            tokens=traces.tokens,
            finish_reasons=dict(traces.finish_reasons),
        ),
    )
