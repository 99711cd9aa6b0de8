"""Brought conversations with tools, from import to report: learned with a teacher's distributions, measured, gone on with in a round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import commands
import pytest
from conftest import build_tiny_model
from transformers import AutoTokenizer

from distill.models.chat import IGNORE
from distill.models.loading import load_chat_format
from distill.recipe.reading import load_recipe
from distill.run.calls import parted
from distill.run.manifest import read_manifest
from distill.run.tables import read_rows
from distill.stages import folder

TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{% if m.content or not loop.first %}\n{% endif %}OPEN{{ c.function.name }}NAMED{{ c.function.arguments | tojson }}CLOSE"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HERMES = {"OPEN": '<tool_call>\n{"name": "', "NAMED": '", "arguments": ', "CLOSE": "}\n</tool_call>"}
OTHERS = {"OPEN": '[TOOL_CALLS][{"name": "', "NAMED": '", "arguments": ', "CLOSE": "}]"}
TOOLS = [
    {"type": "function", "function": {"name": "get_order", "parameters": {"type": "object", "properties": {"id": {"type": "string"}}}}}
]


def model(place: Path, form: dict[str, str], **settings: Any) -> Path:
    build_tiny_model(place, **settings)
    tokenizer = AutoTokenizer.from_pretrained(place)
    tokenizer.chat_template = TEMPLATE
    for name, text in form.items():
        tokenizer.chat_template = tokenizer.chat_template.replace(name, text)
    tokenizer.save_pretrained(place)
    return place


def talk(number: int) -> dict[str, Any]:
    call = {"id": f"c{number}", "type": "function", "function": {"name": "get_order", "arguments": json.dumps({"id": str(number)})}}
    return {
        "tools": TOOLS,
        "messages": [
            {"role": "user", "content": f"Where is order {number}?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": f"sent on day {number}", "tool_call_id": f"c{number}"},
            {"role": "assistant", "content": f"It was sent on day {number}."},
        ],
    }


def recipe_of(place: Path, student: Path, teacher: Path) -> Path:
    (place / "talks.jsonl").write_text("".join(json.dumps(talk(number)) + "\n" for number in range(20)))
    path = place / "recipe.yaml"
    path.write_text(
        f"name: talks\nrun_dir: {place / 'run'}\nseed: 3\nteacher: {{model: {teacher}}}\n"
        f"student: {{model: {student}, adapter: {{type: lora, r: 4}}}}\n"
        f"prompts: {{source: {place / 'talks.jsonl'}, columns: {{messages: messages}}, fields: [tools], turns: all, "
        "answer_as_reference: true, heldout_size: 6}\n"
        f"traces: {{source: {place / 'talks.jsonl'}, columns: {{messages: messages}}, author_model: some-teacher}}\n"
        "curate: {checks: [finish]}\n"
        "score: {target: {kind: top_k, k: 16}, verify_rows: 1, min_aligned: 0.5}\n"
        "train: {method: kd, max_length: 768, trainer_args: {max_steps: 2, per_device_train_batch_size: 4}}\n"
        "rounds: 1\nrollouts: {prompts_per_round: 4, max_new_tokens: 6, batch_size: 4}\n"
        "evaluate: {models: [base, student], max_new_tokens: 6, checks: [tool_calls: {reference: equal}]}\n"
    )
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a student that writes calls otherwise than its teacher does."""
    place = tmp_path_factory.mktemp("talks")
    recipe = recipe_of(place, model(place / "student", OTHERS), model(place / "teacher", HERMES, seed=5, hidden_size=48))
    result = commands.run(["-m", "distill", "run", recipe, "--no-check"])
    assert result.returncode == 0, result.stderr[-3000:]
    return recipe


@pytest.mark.slow
def test_every_answer_is_learned_with_the_teachers_distributions(finished: Path) -> None:
    recipe = load_recipe(finished)
    chat = load_chat_format(recipe.student)
    rows = read_rows(folder(recipe, "curate"), "curated")
    assert len(rows) == 34 and sum(bool(parted(row["completion"])[1]) for row in rows) == 17
    for row in rows:
        input_ids, labels = chat.trace_row(row)
        prompt = chat.prompt_text(row["messages"])
        learned = chat.tokenizer.decode([label for label in labels if label != IGNORE])
        number = row["messages"][0]["content"].split()[-1].rstrip("?")
        call = f'{OTHERS["OPEN"]}get_order{OTHERS["NAMED"]}{{"id": "{number}"}}{OTHERS["CLOSE"]}'
        assert learned in (f"{call}<|im_end|>", f"It was sent on day {number}.<|im_end|>")
        assert chat.tokenizer.decode(input_ids) == prompt + learned
        assert json.dumps(TOOLS) in prompt and (call in prompt) == (row["messages"][-1]["role"] == "tool")
    scored, trained = (read_manifest(folder(recipe, stage)) for stage in ("score", "train"))
    supervised = sum(label != IGNORE for row in rows for label in chat.trace_row(row)[1])
    assert scored.facts["positions"] == supervised
    assert 0.5 < scored.facts["aligned_share"] < 1, "names and arguments of calls, and all text, but not how a family writes calls"
    assert trained.rows_kept == 34 and trained.facts["method"] == "kd"


@pytest.mark.slow
def test_held_out_conversations_are_answered_and_judged_by_what_stands_there(finished: Path) -> None:
    recipe = load_recipe(finished)
    heldout = read_rows(folder(recipe, "prompts"), "heldout")
    assert sorted(len(row["messages"]) for row in heldout) == [1, 1, 1, 3, 3, 3]
    assert json.loads(heldout[0]["reference"])[0]["name"] == "get_order" if len(heldout[0]["messages"]) == 1 else True
    answers = read_rows(folder(recipe, "evaluate"), "answers")
    calling = {row["prompt_id"] for row in heldout if len(row["messages"]) == 1}
    reasons = {(row["prompt_id"] in calling, row["correct"]) for row in answers}
    assert reasons <= {(True, False), (True, True), (False, None)}
    assert (folder(recipe, "report") / "report.md").exists()
    rollouts = read_rows(folder(recipe, "rollouts", 1), "traces")
    assert len(rollouts) == 4 and all("tools" in row["messages"][0] for row in rollouts)
    assert read_manifest(folder(recipe, "score", 1)).facts["positions"] == sum(len(row["completion_ids"]) for row in rollouts)


@pytest.mark.slow
def test_check_says_how_many_and_pair_measures_on_them(finished: Path) -> None:
    told = commands.run(["-m", "distill", "check", finished])
    assert told.returncode == 0, told.stdout[-3000:]
    said = " ".join(told.stdout.split())
    assert "34 rows are parts of conversations, each with one supervised turn, of which 17 call tools and 17 answer their results" in said
    paired = commands.run(["-m", "distill", "pair", finished, "--prompts", "4"])
    assert paired.returncode in (0, 3), paired.stderr[-2000:]
    assert "answers to 4 prompts" in paired.stdout
