"""Further held-out sets: through the command line, one that comes, one that goes, a kill between two, and what is refused before a run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import commands
import pytest
from fabricated import recipe_for
from faulty import Faulty

from distill.data.sources import read_source
from distill.errors import DataError, RecipeError
from distill.recipe.experiment import Recipe
from distill.recipe.reading import load_recipe
from distill.run.journal import Journal
from distill.run.manifest import read_manifest
from distill.run.parts import Part
from distill.run.tables import read_rows
from distill.stages import evaluate, prompts

RECIPE = """
name: sets
run_dir: RUN
teacher: {model: embedded:teacher}
student: {model: embedded:student}
prompts: {source: embedded:arithmetic, max_prompts: 12, heldout_size: 6}
generate: {max_new_tokens: 8}
curate: {checks: [finish, math]}
evaluate:
  models: [base, teacher]
  max_new_tokens: 64
  batch_size: 16
  sets:
    levels:
      source: levels.jsonl
      columns: {prompt: question, reference: answer, tags: level}
      samples_per_prompt: 2
      temperature: 0.8
"""
FURTHER = {"source": "signs.jsonl", "columns": {"prompt": "text", "reference": "sign"}, "checks": [{"label": {"choices": ["even", "odd"]}}]}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def ok(*words: str | Path) -> str:
    result = commands.run(["-m", "distill", *words])
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout + result.stderr


def answers(run: Path) -> dict[tuple[Any, ...], Any]:
    return {(row["author"], row["prompt_id"], row["sample_index"]): row for row in read_rows(run / "eval", "traces")}


def named(score: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(score[name] for name in ("set", "tag", "model_role", "metric"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe of one further set, six new prompts and two that are trained on, and its run."""
    folder = tmp_path_factory.mktemp("sets")
    (folder / "r.yaml").write_text(RECIPE.replace("RUN", str(folder / "run")))
    ok("prompts", folder / "r.yaml")
    trained = [row["messages"][-1]["content"] for row in read_rows(folder / "run" / "prompts", "train")]
    fresh = [row for row in read_source("embedded:arithmetic") if row["question"] not in trained][:6]
    rows = [*({"question": text, "answer": "1"} for text in trained[:2]), *fresh, fresh[0]]
    write_rows(folder / "levels.jsonl", [row | {"level": ["low", "high"][place % 2]} for place, row in enumerate(rows)])
    write_rows(folder / "signs.jsonl", [{"text": f"Is {n} even or odd?", "sign": ["even", "odd"][n % 2]} for n in range(5)])
    said = ok("evaluate", folder / "r.yaml")
    assert "levels: 6 prompts; left out: 1 duplicate, 2 in_training" in said
    return folder


@pytest.mark.slow
def test_each_set_has_its_own_sampling_scores_and_tags(made: Path) -> None:
    rows = read_rows(made / "run" / "eval", "answers")
    assert {(row["set"], row["prompt_id"].startswith("levels/")) for row in rows} == {("heldout", False), ("levels", True)}
    assert len(rows) == 2 * (6 + 6 * 2) and {tag for row in rows for tag in row["tags"]} == {"low", "high"}
    scores = read_rows(made / "run" / "eval", "scores")
    assert {(row["set"], row["samples_per_prompt"]) for row in scores} == {("heldout", 1), ("levels", 2)}
    assert {row["metric"] for row in scores if row["set"] == "levels"} - {row["metric"] for row in scores if row["set"] == "heldout"} == {
        "pass@2",
        "maj@2",
    }
    for role in ("base", "teacher"):
        right = [row["correct"] for row in rows if row["set"] == "levels" and row["model_role"] == role]
        [found] = [row["value"] for row in scores if named(row) == ("levels", None, role, "accuracy")]
        assert found == pytest.approx(sum(right) / len(right))
    assert read_manifest(made / "run" / "eval").facts["sets"]["levels"]["left_out"] == {"in_training": 2, "duplicate": 1}
    assert "nothing to do" in ok("evaluate", made / "r.yaml")


@pytest.mark.slow
def test_a_set_comes_and_goes_and_nothing_else_is_asked_again(made: Path) -> None:
    before = answers(made / "run")
    said = ok("evaluate", made / "r.yaml", "--evaluate.sets.signs", json.dumps(FURTHER | {"source": str(made / "signs.jsonl")}))
    assert "traces were written before" in said
    grown = answers(made / "run")
    assert len(grown) == len(before) + 2 * 5 and all(grown[key] == row for key, row in before.items())
    scores = {(row["set"], row["model_role"], row["metric"]): row["value"] for row in read_rows(made / "run" / "eval", "scores")}
    assert 0 <= scores["signs", "base", "macro_f1"] <= 1 and 0 <= scores["signs", "base", "format_rate"] <= 1
    counts = read_rows(made / "run" / "eval", "confusion")
    assert sum(row["count"] for row in counts if row["model_role"] == "base") == 5 and {row["set"] for row in counts} == {"signs"}
    ok("evaluate", made / "r.yaml")
    assert answers(made / "run") == before and "confusion" not in read_manifest(made / "run" / "eval").tables


@pytest.mark.slow
def test_another_sampling_of_a_set_or_another_content_is_refused(made: Path) -> None:
    for key, value in (("temperature", "0.9"), ("max_new_tokens", "32")):
        result = commands.run(["-m", "distill", "evaluate", made / "r.yaml", f"--evaluate.sets.levels.{key}", value])
        assert result.returncode == 1 and f"evaluate.sets.levels.{key}" in result.stderr
    kept = (made / "levels.jsonl").read_text()
    (made / "levels.jsonl").write_text(kept.replace("low", "mid"))
    result = commands.run(["-m", "distill", "evaluate", made / "r.yaml"])
    (made / "levels.jsonl").write_text(kept)
    assert result.returncode == 1 and "evaluate.sets.levels.source_sha256: its content has changed" in result.stderr


@pytest.mark.slow
def test_other_checks_judge_what_a_set_was_answered(made: Path) -> None:
    before = answers(made / "run")
    ok("evaluate", made / "r.yaml", "--evaluate.sets.levels.checks", "[{text: {reference: contains}}]")
    assert answers(made / "run") == before
    ok("evaluate", made / "r.yaml")


def served(place: Path, model: Path, url: str) -> Recipe:
    """A recipe whose teacher stands behind a server that answers at once."""
    place.mkdir(parents=True, exist_ok=True)
    write_rows(place / "p.jsonl", [{"question": f"How much is {n} and 1?", "answer": str(n + 1)} for n in range(12)])
    write_rows(place / "s.jsonl", [{"question": f"How much is {n} and 9?", "answer": str(n + 9)} for n in range(7)])
    server = {"kind": "vllm", "url": url, "model": "stub"}
    each = {"source": str(place / "s.jsonl"), "samples_per_prompt": 2, "temperature": 0.5}
    return recipe_for(
        place / "run",
        teacher={"model": str(model), "server": server},
        student={"model": str(model)},
        prompts={"source": str(place / "p.jsonl"), "heldout_size": 5},
        evaluate={"models": ["teacher"], "max_new_tokens": 32, "sets": {"further": each}},
    )


def test_parts_make_the_folder_that_one_process_makes(tmp_path: Path, tiny_model_dir: Path) -> None:
    with Faulty() as server:
        whole, parts = (served(tmp_path / name, tiny_model_dir, server.url) for name in ("whole", "parts"))
        for each in (whole, parts):
            prompts.run(each)
        assert evaluate.run_shard(parts, Part(1, 2)) is None
        made = [evaluate.run(whole), evaluate.run_shard(parts, Part(0, 2))]
    assert made[1] is not None and made[0].tables == made[1].tables and made[0].rows("answers") == 5 + 14


@pytest.mark.parametrize("further", [False, True])
def test_a_kill_loses_no_answer_of_either_set(further: bool, tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Faulty() as server:
        whole, killed = (served(tmp_path / name, tiny_model_dir, server.url) for name in ("whole", "killed"))
        for each in (whole, killed):
            prompts.run(each)
        made, plain = evaluate.run(whole), Journal.append

        def append(self: Journal, rows: Any) -> None:
            plain(self, rows)
            if rows and "prompt_id" in rows[0] and ("/" in rows[0]["prompt_id"]) == further:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Journal, "append", append)
            with pytest.raises(KeyboardInterrupt):
                evaluate.run(killed)
        asked = evaluate.run(killed)
    assert asked.tables == made.tables


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "nowhere.jsonl"}, "there is no such file"),
        ({"columns": {"prompt": "text", "reference": "answer"}}, r"evaluate\.sets\.more: .*text"),
        ({"checks": [{"label": {"choices": ["a", "b"]}}]}, r"evaluate\.sets\.more: label can't judge"),
        ({"columns": {"prompt": "question", "reference": "nothing"}}, r"evaluate\.sets\.more: none of 3 prompts has a reference"),
    ],
)
def test_a_wrong_set_is_refused_before_anything_is_spent(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    from distill.before.findings import Findings
    from distill.before.judging import check_sets
    from distill.stages.prompts import survey

    write_rows(tmp_path / "more.jsonl", [{"question": f"What is {n} + 70?", "answer": str(n + 70), "nothing": None} for n in range(3)])
    each = {"source": str(tmp_path / "more.jsonl")} | change
    recipe = recipe_for(tmp_path, prompts={"source": "embedded:arithmetic", "heldout_size": 4}, evaluate={"sets": {"more": each}})
    found = Findings()
    check_sets(recipe, survey(recipe.prompts, 0, 2), found)
    assert len(found.refuted) == 1
    with pytest.raises(DataError, match=message):
        raise DataError(found.refuted[0])


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({"heldout": {"source": "x"}}, "Give this set another name"),
        ({"a.b": {"source": "x"}}, "pattern"),
        ({"more": {"source": "x", "samples_per_prompt": 4}}, r"evaluate\.sets\.more: .*temperature 0 writes the same answer"),
        ({"more": {"source": "x", "columns": {"prompt": "q"}}}, r"evaluate\.sets\.more: the check math compares"),
        ({"more": {"source": "x", "checks": []}}, "names no check"),
        ({"more": {"source": "x", "template": "no place"}}, r"must contain \{prompt\}"),
    ],
)
def test_what_a_recipe_says_of_a_set_is_looked_at_when_it_is_read(sets: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.replace("RUN", str(tmp_path / "run")))
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "r.yaml", {"evaluate.sets": sets})


def test_a_set_takes_from_evaluate_what_it_does_not_say(tmp_path: Path) -> None:
    sets = {"greedy": {"temperature": 0.0}, "same": {}, "own": {"samples_per_prompt": 2, "top_k": 5}}
    main: dict[str, Any] = {"samples_per_prompt": 8, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 77}
    main["sets"] = {name: each | {"source": "x"} for name, each in sets.items()}
    drawn = {name: each.sampling for name, each in recipe_for(tmp_path, evaluate=main).asked_sets().items()}
    found = {name: (each.samples_per_prompt, each.temperature, each.top_p, each.top_k) for name, each in drawn.items()}
    assert found == {"heldout": (8, 0.7, 0.9, 0), "greedy": (1, 0.0, 0.95, 0), "same": (8, 0.7, 0.9, 0), "own": (2, 0.7, 0.9, 5)}
    assert {each.max_new_tokens for each in drawn.values()} == {77}


@pytest.mark.parametrize(
    ("each", "meant"),
    [({"colums": {"prompt": "q"}}, "evaluate.sets.more.columns"), ({"columns": {"promt": "q"}}, "evaluate.sets.more.columns.prompt")],
)
def test_a_misspelt_key_of_a_set_is_guessed(each: dict[str, Any], meant: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.replace("RUN", str(tmp_path / "run")))
    with pytest.raises(RecipeError, match=rf"Did you mean {re.escape(meant)}\?"):
        load_recipe(tmp_path / "r.yaml", {"evaluate.sets.more": {"source": "x"} | each})


def test_a_set_without_a_column_of_the_runs_template_is_none_of_its_prompts(tmp_path: Path) -> None:
    from distill.before.findings import Findings
    from distill.before.judging import check_sets
    from distill.stages.prompts import survey

    write_rows(tmp_path / "run.jsonl", [{"question": f"{n}?", "answer": n, "unit": "m"} for n in range(4)])
    write_rows(tmp_path / "more.jsonl", [{"question": f"{n}?", "answer": n} for n in range(2)])
    main = {"source": str(tmp_path / "run.jsonl"), "heldout_size": 1, "template": "{prompt} In {unit}."}
    each = {"source": str(tmp_path / "more.jsonl"), "template": "{prompt}"}
    recipe = recipe_for(tmp_path, prompts=main, evaluate={"sets": {"more": each}})
    found = Findings()
    check_sets(recipe, survey(recipe.prompts, 0, 2), found)
    assert found.refuted == []
