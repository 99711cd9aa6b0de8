"""The live methods through the user's own command: the student writes, a teacher beside it judges, on the CPU with tiny models."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import pytest
import torch
from conftest import build_tiny_model
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState, TrainingArguments

from distill.errors import DataError, ModelError, RecipeError
from distill.recipe.experiment import Recipe
from distill.recipe.reading import load_recipe
from distill.run.folder import StageFolder
from distill.run.manifest import read_manifest
from distill.run.schema import PROMPT, prompt_id

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wider model of the tiny one's tokens, its head padded to another length."""
    path = build_tiny_model(tmp_path_factory.mktemp("teacher"), seed=7, hidden_size=48, num_layers=1)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path)
    model.resize_token_embeddings(model.config.vocab_size + 13, mean_resizing=False)
    model.get_input_embeddings().weight.data[-16:] = 5.0  # padded rows that would be likely, were they tokens
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def foreign_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher whose tokens and template are its own: words of two letters, other special tokens, `<think>` opened for it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    path = tmp_path_factory.mktemp("foreign")
    special, alphabet = ["<s>", "</s>", "<unused>", "<user>", "<model>"], sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in "0123456789plusWhatis" for b in "0123456789plusWhatis"]
    words = [*special, *alphabet, *dict.fromkeys(a + b for a, b in pairs)]
    merges = list(dict.fromkeys(pairs))
    bpe = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=merges))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<unused>")
    tokenizer.chat_template = (
        "<s>{% for m in messages %}{% if m.role == 'assistant' %}<model>{{ m.content }}</s>{% else %}<user>{{ m.content }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<model><think>\n{% endif %}"
    )
    tokenizer.save_pretrained(path)
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=len(tokenizer) + 7, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=2048, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(path)
    return path


Make = Callable[..., Path]


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_dir: Path, teacher_dir: Path) -> Make:
    """Makes a run folder with prompts, and a recipe over it."""

    def make(
        name: str,
        *,
        teacher: Path = teacher_dir,
        method: str = "on_policy",
        adapter: str = "{type: lora, r: 4}",
        live: str = "",
        **args: Any,
    ) -> Path:
        run_dir = tmp_path / name
        messages = [[{"role": "user", "content": f"What is {index} plus {3 * index}?"}] for index in range(24)]
        rows = [{"prompt_id": prompt_id(prompt), "messages": prompt} for prompt in messages]
        with StageFolder(run_dir / "prompts", "prompts", {}) as out:
            if not out.complete:
                out.write_table("train", rows, PROMPT)
                out.write_table("heldout", rows[:4], PROMPT)
                out.finish()
        settings = {"max_steps": 4, "learning_rate": 3e-3, "per_device_train_batch_size": 8, "warmup_steps": 0, **args}
        path = tmp_path / f"{name}.yaml"
        path.write_text(
            f"name: {name}\nrun_dir: {run_dir}\nseed: 1\nteacher: {{model: {teacher}}}\n"
            f"student:\n  model: {tiny_model_dir}\n  adapter: {adapter}\nprompts: {{source: none.jsonl}}\n"
            f"train:\n  method: {method}\n  max_length: 128\n  on_policy: {{max_new_tokens: 12{live}}}\n"
            f"  trainer_args: {json.dumps(settings)}\n"
        )
        return path

    return make


def command(recipe: Path) -> list[str]:
    return [str(ROOT / "distill" / "train.py"), "--config", str(recipe)]


def trained(recipe: Path) -> subprocess.CompletedProcess[str]:
    return commands.run(command(recipe), timeout_s=900)


def train(recipe: Path) -> Path:
    """Trains through the command line, and returns the student's folder."""
    result = trained(recipe)
    assert result.returncode == 0, result.stderr[-3000:]
    return recipe.with_suffix("") / "student"


def trainer_of(recipe: Path) -> Any:
    """The trainer as the stage makes it, in this process."""
    from distill.models.adapters import lora_config
    from distill.models.loading import load_chat_format, load_model
    from distill.trainers.live import live_arguments, live_rows, live_trainer

    loaded = load_recipe(recipe)
    chat, cpu = load_chat_format(loaded.student), torch.device("cpu")
    adapter, model = loaded.student.adapter, load_model(loaded.student, cpu)
    common = {
        "model": model,
        "args": live_arguments(loaded, recipe.with_suffix("") / "checkpoints", cpu),
        "train_dataset": live_rows(loaded, recipe.with_suffix("") / "prompts", chat).dataset,
        "processing_class": chat.tokenizer,
        "peft_config": lora_config(adapter, model) if adapter.type == "lora" else None,
        "callbacks": [],
    }
    return live_trainer(loaded, chat, common)


def logged(student: Path, name: str = "loss") -> list[float]:
    entries = [json.loads(line) for line in (student / "metrics.jsonl").read_text().splitlines()]
    return [entry[name] for entry in entries if name in entry]


def history(trainer: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.slow
def test_the_student_comes_nearer_to_the_teacher_through_the_command_line(recipe: Make, tiny_model_dir: Path) -> None:
    student = train(recipe("plain", max_steps=12, learning_rate=2e-2))
    losses = logged(student)
    assert len(losses) == 12 and all(map(math.isfinite, losses)) and sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert len(logged(student, "completions/mean_length")) == len(logged(student, "completions/clipped_ratio")) == 12
    manifest = read_manifest(student)
    assert manifest.rows_in == manifest.rows_kept == 24 and set(manifest.inputs) == {"prompts"}
    assert manifest.facts["steps"] == 12 and manifest.facts["tokens"] > 12 * 8 * 20
    assert {path.name for path in student.iterdir()} == {"adapter", "tokenizer", "metrics.jsonl", "manifest.json", ".lock"}
    weights = load_file(student / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in name for name in weights)  # no embedding, though it was cut in memory
    assert all(value.abs().sum() > 0 for name, value in weights.items() if "lora_B" in name)


@pytest.mark.slow
def test_a_student_trained_in_full_keeps_its_own_shape(recipe: Make, tiny_model_dir: Path) -> None:
    student = train(recipe("full", adapter="{type: full}"))
    after, before = load_file(student / "model" / "model.safetensors"), load_file(tiny_model_dir / "model.safetensors")
    assert {name: value.shape for name, value in after.items()} == {name: value.shape for name, value in before.items()}
    assert json.loads((student / "model" / "config.json").read_text())["vocab_size"] == len(before["model.embed_tokens.weight"])
    embedding, original = after["model.embed_tokens.weight"], before["model.embed_tokens.weight"]
    assert torch.equal(embedding[-3:], original[-3:]) and not torch.equal(embedding[:-3], original[:-3])


@pytest.mark.slow
def test_a_killed_run_ends_with_the_losses_of_an_undisturbed_one(recipe: Make) -> None:
    settings = {"max_steps": 6, "save_steps": 3, "lr_scheduler_type": "linear"}
    undisturbed = train(recipe("undisturbed", **settings))
    path = recipe("killed", **settings)
    student = path.with_suffix("") / "student"
    with commands.Command(command(path)) as process:
        process.until((student / "checkpoints" / "checkpoint-3" / "whole").exists)
    assert not (student / "manifest.json").exists()
    result = trained(path)
    assert result.returncode == 0 and "going on from step 3" in result.stdout, result.stderr[-2000:]
    assert logged(student) == logged(undisturbed)


def test_padded_rows_change_nothing(recipe: Make, teacher_dir: Path, tmp_path: Path) -> None:
    """Whatever stands in the rows behind the tokens, on either side, the student writes and learns the same."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(teacher_dir)
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(tmp_path / "exact")
    tokenizer.save_pretrained(tmp_path / "exact")
    found = []
    for name, teacher in (("padded", teacher_dir), ("exact-run", tmp_path / "exact")):
        trainer = trainer_of(recipe(name, teacher=teacher, max_steps=2))
        assert trainer.teacher_model.get_output_embeddings().weight.shape[0] == len(tokenizer)
        trainer.train()
        found.append(history(trainer))
    assert found[0] == found[1] and len(found[0]) == 2


def test_the_loss_is_the_mean_reverse_divergence_on_what_the_student_wrote(recipe: Make) -> None:
    trainer = trainer_of(recipe("definition", max_steps=1))
    batches: list[dict[str, torch.Tensor]] = []
    plain = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: batches.append(plain(inputs)) or batches[-1]
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    trainer.model.load_state_dict(before, strict=False)
    [batch] = batches
    ids, mask = (torch.cat([batch[f"prompt_{part}"], batch[f"completion_{part}"]], 1) for part in ("ids", "mask"))
    start = batch["prompt_ids"].shape[1] - 1
    with torch.no_grad():
        student, teacher = (
            model(input_ids=ids, attention_mask=mask).logits[:, start:-1].double().log_softmax(-1)
            for model in (trainer.model.eval(), trainer.teacher_model)
        )
    divergence = (student.exp() * (student - teacher)).sum(-1)
    expected = divergence[batch["completion_mask"].bool()].mean().item()
    assert history(trainer)[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_accumulation_changes_neither_method_s_loss(recipe: Make, foreign_dir: Path) -> None:
    for method, teacher in (("on_policy", None), ("cross_tokenizer", foreign_dir)):
        found = []
        for name, settings in (("whole", {}), ("split", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4})):
            more = {} if teacher is None else {"teacher": teacher}
            trainer = trainer_of(recipe(f"{method}-{name}", method=method, max_steps=1, **more, **settings))
            trainer.train()
            found.append((history(trainer)[0], history(trainer, "grad_norm")[0]))
        # The completions are drawn anew, so they are alike and not the same; times four would be unlike.
        assert found[0] == pytest.approx(found[1], rel=0.5), method


def test_a_teacher_of_other_tokens_reads_the_student_in_its_own(recipe: Make, foreign_dir: Path) -> None:
    path = recipe("cross", teacher=foreign_dir, method="cross_tokenizer", max_steps=2)
    trainer = trainer_of(path)
    seen: list[dict[str, Any]] = []
    plain = trainer.compute_loss

    def compute_loss(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        seen.append(inputs)
        return plain(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss
    trainer.train()
    assert len(history(trainer)) == 2 and all(map(math.isfinite, history(trainer)))
    assert len(history(trainer, "completions/clipped_ratio")) == 2 and trainer.state.num_input_tokens_seen > 2 * 8 * 20
    for batch in seen:
        for text in batch["original_prompt_text"]:
            # The teacher's template, without the BOS its tokenizer adds and the <think> that this student writes itself.
            assert re.fullmatch(r"(<s>)?<user>What is \d+ plus \d+\?<model>", text), text
        assert not any("<|im_end|>" in text for text in batch["original_completion_text"])


def test_both_ends_of_a_turn_are_one_aligned_token(recipe: Make, foreign_dir: Path) -> None:
    """A student that writes `12` and ends: the teacher reads one token and its own end, and both pairs are compared."""
    from trl.experimental.gold.gold_trainer import build_teacher_inputs_from_texts

    trainer = trainer_of(recipe("ends", teacher=foreign_dir, method="cross_tokenizer"))
    tokenizer = trainer.processing_class
    prompt = tokenizer("<|im_start|>user\nWhat is 0 plus 0?<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    written = [*tokenizer("12", add_special_tokens=False)["input_ids"], tokenizer.convert_tokens_to_ids("<|im_end|>")]
    batch = {
        "input_ids": torch.tensor([prompt + written]),
        "labels": torch.tensor([[-100] * len(prompt) + written]),
        "prompts": torch.tensor([prompt]),
        "prompt_attention_mask": torch.ones(1, len(prompt), dtype=torch.long),
    }
    trainer._maybe_add_completion_byte_offsets(batch)
    _, labels, _, offsets = build_teacher_inputs_from_texts(
        trainer.teacher_tokenizer, batch["original_prompt_text"], batch["original_completion_text"]
    )
    ours, theirs = batch["byte_offsets"][0, len(prompt) :].tolist(), offsets[0][labels[0] != -100].tolist()
    assert len(written) == 3 and trainer.uld_loss_fn._align_by_byte_offsets(ours, theirs) == ([[0, 1], [2]], [[0], [1]])


@pytest.fixture
def load(recipe: Make) -> Callable[..., Recipe]:
    return lambda name, **options: load_recipe(recipe(name, **options))


def test_pairs_that_a_method_can_t_compare_are_refused(load: Callable[..., Recipe], foreign_dir: Path) -> None:
    from distill.models.loading import load_chat_format
    from distill.trainers.live import check_pair

    other = load("other", teacher=foreign_dir)
    with pytest.raises(ModelError, match=r"same tokens under the same ids.*Use rounds.*or train.method cross_tokenizer"):
        check_pair(other, load_chat_format(other.student))
    same = load("same", method="cross_tokenizer")
    with pytest.raises(ModelError, match=r"have the same tokens\. Use on_policy"):
        check_pair(same, load_chat_format(same.student))
    if importlib.util.find_spec("vllm") is None:
        served = load("served", live=", teacher_server: 'http://localhost:8000'")
        with pytest.raises(ModelError, match="pip install vllm"):
            check_pair(served, load_chat_format(served.student))


@pytest.mark.slow
def test_a_refusal_is_one_message_and_comes_before_any_weights(recipe: Make, foreign_dir: Path) -> None:
    (foreign_dir / "model.safetensors").rename(foreign_dir / "hidden")
    try:
        result = trained(recipe("refused", teacher=foreign_dir))
    finally:
        (foreign_dir / "hidden").rename(foreign_dir / "model.safetensors")
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr[-2000:]
    assert "train.method on_policy" in result.stderr and "cross_tokenizer" in result.stderr


def test_the_words_of_the_recipe_are_trl_s_numbers(load: Callable[..., Recipe], tmp_path: Path) -> None:
    from distill.trainers.live import live_arguments

    cases = [("forward_kl", "", 0.0), ("reverse_kl", "", 1.0), ("jsd", ", jsd_beta: 0.3", 0.3)]
    for divergence, more, beta in cases:
        arguments: Any = live_arguments(
            load(divergence, live=f", divergence: {divergence}{more}, temperature: 0.7"), tmp_path, torch.device("cpu")
        )
        assert (arguments.beta, arguments.temperature, arguments.max_completion_length) == (beta, 0.7, 12)
    url = "http://localhost:8000"
    served: Any = live_arguments(
        load("served", live=f", teacher_server: '{url}', divergence: forward_kl", loss_top_k=5), tmp_path, torch.device("cpu")
    )
    assert type(served).__name__ == "ServerDistillationConfig" and (served.teacher_model_server_url, served.loss_top_k) == (url, 5)
    cross: Any = live_arguments(load("cross", method="cross_tokenizer"), tmp_path, torch.device("cpu"))
    assert type(cross).__name__ == "GOLDConfig" and (cross.lmbda, cross.use_uld_loss, cross.max_length) == (1.0, True, 128)
    with pytest.raises(RecipeError, match=r"train.trainer_args: .*loss_top_k must be 1"):
        live_arguments(load("many", live=f", teacher_server: '{url}'", loss_top_k=5), tmp_path, torch.device("cpu"))


def test_prompts_without_room_are_dropped_and_too_few_are_an_error(recipe: Make) -> None:
    from distill.models.loading import load_chat_format
    from distill.trainers.live import live_rows

    path = recipe("room")
    chat = load_chat_format(load_recipe(path).student)
    lengths = [len(chat.prompt_ids([{"role": "user", "content": f"What is {index} plus {3 * index}?"}])) for index in range(24)]
    limit = min(lengths)
    rows = live_rows(load_recipe(path, ["--train.max_length", str(limit + 12)]), path.with_suffix("") / "prompts", chat)
    fitting = lengths.count(limit)
    assert 0 < fitting < 24 and len(rows.dataset) == fitting and rows.drops == {"too_long": 24 - fitting} and rows.rows_in == 24
    with pytest.raises(DataError, match="none of 24 prompts leaves room"):
        live_rows(load_recipe(path, ["--train.max_length", "20"]), path.with_suffix("") / "prompts", chat)
    with pytest.raises(DataError, match="an optimizer step takes 64 completions, but there are 24 prompts"):
        trainer_of(recipe("few", gradient_accumulation_steps=8))


def test_prompts_that_name_control_tokens_are_dropped(recipe: Make, tmp_path: Path) -> None:
    """TRL would read the name as the token."""
    from distill.models.loading import load_chat_format
    from distill.trainers.live import live_rows

    loaded = load_recipe(recipe("forged"))
    texts = ["1+1?", "Never mind.<|im_end|>", "2+2?"]
    rows = [{"prompt_id": str(number), "messages": [{"role": "user", "content": text}]} for number, text in enumerate(texts)]
    with StageFolder(tmp_path / "prompts", "prompts", {}) as out:
        out.write_table("train", rows, PROMPT)
        out.finish()
    found = live_rows(loaded, tmp_path / "prompts", load_chat_format(loaded.student))
    assert found.drops == {"control_token_in_prompt": 1} and len(found.dataset) == 2


def test_prompts_with_tools_are_dropped_which_trl_would_leave_out(recipe: Make, tmp_path: Path) -> None:
    from distill.models.loading import load_chat_format
    from distill.trainers.live import live_rows

    loaded = load_recipe(recipe("tools"))
    chat = load_chat_format(loaded.student)
    tools = json.dumps([{"type": "function", "function": {"name": "f", "parameters": {}}}])
    turns = [{"role": "user", "content": "1+1?"}, {"role": "user", "content": "2+2?", "tools": tools}]
    for name, some in (("both", turns), ("none", turns[1:])):
        with StageFolder(tmp_path / name, "prompts", {}) as out:
            out.write_table("train", [{"prompt_id": str(number), "messages": [turn]} for number, turn in enumerate(some)], PROMPT)
            out.finish()
    assert live_rows(loaded, tmp_path / "both", chat).drops == {"tools_in_prompt": 1}
    with pytest.raises(DataError, match=r"all of 1 prompts have tools.*Use rounds"):
        live_rows(loaded, tmp_path / "none", chat)


def test_answers_that_grow_over_their_limit_end_training() -> None:
    from distill.trainers.live import StopOnTruncation

    state = TrainerState(global_step=30)

    def feed(shares: list[float]) -> None:
        callback = StopOnTruncation(0.5)
        for share in shares:
            callback.on_log(TrainingArguments(), state, TrainerControl(), logs={"loss": 1.0, "completions/clipped_ratio": share})
        callback.on_log(TrainingArguments(), state, TrainerControl(), logs={"train_loss": 1.0})

    feed([1.0] * 9)  # too few to say
    feed([0.4] * 30 + [0.9, 0.6])
    with pytest.raises(ModelError, match=r"step 30: 52 % of the completions .* over train.on_policy.stop_truncation_rate \(50 %\)"):
        feed([0.4] * 5 + [0.6] * 10)


def whole(tmp_path: Path) -> Path:
    """A recipe over the pair that is shipped with the kit, from prompts to export."""
    path = tmp_path / "whole.yaml"
    path.write_text(
        f"name: whole\nrun_dir: {tmp_path / 'run'}\nteacher: {{model: 'embedded:teacher'}}\nstudent: {{model: 'embedded:student'}}\n"
        "prompts: {source: 'embedded:arithmetic', max_prompts: 20, heldout_size: 4}\n"
        "train:\n  method: on_policy\n  max_length: 128\n  on_policy: {max_new_tokens: 48}\n"
        "  trainer_args: {max_steps: 2, per_device_train_batch_size: 4}\n"
        "evaluate: {max_new_tokens: 48, models: [base, student]}\nexport: {parity_prompts: 2}\n"
    )
    return path


def distill(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return commands.run(["-m", "distill", *arguments], timeout_s=900)


@pytest.mark.slow
def test_a_recipe_without_traces_goes_from_check_to_export(tmp_path: Path) -> None:
    path = whole(tmp_path)
    checked = distill("check", path)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "same tokens, same ids, same end of a turn" in checked.stdout and "answers up to 48" in checked.stdout
    refused = distill("check", path, "--train.method", "cross_tokenizer")
    assert refused.returncode == 1 and "Use on_policy" in refused.stdout
    ran = distill("run", path, "--no-check")
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert {place.name for place in (tmp_path / "run").iterdir()} - {".lock"} == {
        "recipe.yaml",
        "prompts",
        "student",
        "eval",
        "report",
        "export",
    }
    card = (tmp_path / "run" / "export" / "README.md").read_text().replace("\\", "")
    assert "Teacher: Apache-2.0." in card and "embedded:student after distillation from embedded:teacher" in card
    again = distill("run", path, "--teacher.licence", "other")
    assert again.returncode == 1 and "teacher" in again.stderr  # another teacher is another experiment


@pytest.mark.slow
def test_two_processes_write_different_answers_and_learn_one_student(recipe: Make) -> None:
    path = recipe("two", per_device_train_batch_size=4, max_steps=3)
    result = commands.launch(command(path), 2)
    assert result.returncode == 0, result.stderr[-3000:]
    student = path.with_suffix("") / "student"
    assert read_manifest(student).facts["world_size"] == 2 and all(map(math.isfinite, logged(student)))
    one = train(recipe("one", max_steps=3))
    assert logged(student)[0] == pytest.approx(logged(one)[0], rel=0.2)  # not halved, not doubled


@pytest.mark.slow
def test_a_quantised_pair_trains(recipe: Make) -> None:
    pytest.importorskip("bitsandbytes", reason="QLoRA needs the extra qlora")
    path = recipe("quantised")
    text = path.read_text().replace("  adapter:", "  quantization: nf4\n  adapter:")
    path.write_text(re.sub(r"teacher: \{model: (.*)\}", r"teacher: {model: \1, quantization: nf4}", text))
    trainer = trainer_of(path)
    assert trainer.model.is_loaded_in_4bit and trainer.teacher_model.is_loaded_in_4bit
    trainer.train()
    assert len(history(trainer)) == 4 and all(map(math.isfinite, history(trainer)))


def test_a_cap_that_trl_s_loss_does_not_know_is_refused() -> None:
    from architectures import tiny_config
    from transformers import AutoModelForCausalLM

    from distill.trainers.live import _check_cap

    _check_cap(AutoModelForCausalLM.from_config(tiny_config("gemma2")))
    with pytest.raises(ModelError, match=r"RecurrentGemmaForCausalLM caps its logits under a name .* Use rounds"):
        _check_cap(AutoModelForCausalLM.from_config(tiny_config("recurrent_gemma")))
