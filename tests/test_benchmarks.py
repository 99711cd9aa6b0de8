"""Public benchmarks through lm-eval: own small tasks on the tiny pair, through the command line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import commands
import jsonschema
import pytest
from ruamel.yaml import YAML

pytest.importorskip("lm_eval", reason="needs the extra benchmarks: pip install 'distill-kit[benchmarks]'")

from distill.run.manifest import read_manifest
from distill.run.tables import read_rows

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = 12


def write_tasks(place: Path, *, shift: int = 0) -> Path:
    """A task that is answered in text and one with choices, on sums, and their data."""
    place.mkdir(exist_ok=True)
    rows = [{"sum": f"{a} + {a + 3}", "answer": 2 * a + 3 + shift, "wrong": str(3 * a)} for a in range(2, 2 + DOCUMENTS)]
    (place / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": str(place / "sums.jsonl")}, "test_split": "train"}
    means = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("exact_match", "acc")]
    written = {
        "task": "own_written",
        "output_type": "generate_until",
        "doc_to_text": "What is {{sum}}?",
        "doc_to_target": "It is so. #### {{answer}}",
        "generation_kwargs": {"until": ["<|im_end|>"], "max_gen_toks": 64, "do_sample": False},
        "metric_list": means[:1],
        "filter_list": [
            {
                "name": "last",
                "filter": [{"function": "regex", "regex_pattern": "(-?[0-9]+)", "group_select": -1}, {"function": "take_first"}],
            }
        ],
        "metadata": {"version": 1.5},
    }
    chosen = {
        "task": "own_chosen",
        "output_type": "multiple_choice",
        "doc_to_text": "What is {{sum}}?",
        "doc_to_choice": "{{[answer | string, wrong]}}",
        "doc_to_target": 0,
        "metric_list": means[1:],
        "metadata": {"version": 2},
    }
    for task in (written, chosen):
        with (place / f"{task['task']}.yaml").open("w") as file:
            YAML().dump(data | task, file)
    return place


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose student was trained for two steps, and benchmarked."""
    place = tmp_path_factory.mktemp("benchmarks")
    write_tasks(place / "tasks")
    recipe = {
        "name": "sums",
        "run_dir": str(place / "run"),
        "teacher": {"model": "embedded:teacher", "dtype": "float32"},
        "student": {"model": "embedded:student", "dtype": "float32", "adapter": {"type": "lora", "r": 4, "lora_alpha": 8}},
        "prompts": {"source": "embedded:arithmetic", "max_prompts": 24, "heldout_size": 4},
        "generate": {"max_new_tokens": 96, "batch_size": 32},
        "curate": {"checks": ["finish"]},
        "train": {"max_length": 256, "trainer_args": {"max_steps": 2}},
        "evaluate": None,
        "export": None,
        "benchmarks": {
            "tasks": ["own_written"],
            "forgetting": ["own_chosen"],
            "models": ["base", "student"],
            "include_path": str(place / "tasks"),
            "max_gen_toks": 24,
            "second_tasks": ["own_*"],
            "organization": "the tests",
        },
    }
    with (place / "r.yaml").open("w") as file:
        YAML().dump(recipe, file)
    ok("run", place / "r.yaml", "--no-check")
    return place


def distill(*words: Any) -> Any:
    return commands.run(["-m", "distill", *map(str, words)])


def ok(*words: Any) -> str:
    result = distill(*words)
    assert result.returncode == 0, result.stderr
    return str(result.stdout)


def scores(place: Path) -> list[dict[str, Any]]:
    return read_rows(place / "run" / "benchmarks", "scores")


def stamps(place: Path, role: str) -> dict[str, str]:
    """When lm-eval measured each task, as its files are named."""
    folders = sorted((place / "run" / "benchmarks" / role).iterdir())
    return {folder.name: next(folder.glob("results_*.json")).name for folder in folders}


@pytest.mark.slow
def test_lm_evals_own_files_are_kept_and_its_numbers_stand_in_the_table(trained: Path) -> None:
    """lm-eval's numbers, recomputed from its samples by hand; the kit's own beside them, with names and versions."""
    rows = {(row["model_role"], row["task"], row["scorer"].split(":")[0]): row for row in scores(trained)}
    for role in ("base", "student"):
        place = trained / "run" / "benchmarks" / role / "own_written"
        found = json.loads(next(place.glob("results_*.json")).read_text())
        samples = [json.loads(line) for line in next(place.glob("samples_own_written_*.jsonl")).read_text().splitlines()]
        assert len(samples) == DOCUMENTS and found["results"]["own_written"]["sample_len"] == DOCUMENTS
        right = [sample["filtered_resps"][0] == sample["target"] for sample in samples]
        row = rows[role, "own_written", "lm-eval"]
        assert row["value"] == pytest.approx(sum(right) / DOCUMENTS)
        assert (row["filter"], row["task_version"], row["num_documents"]) == ("last", "1.5", DOCUMENTS)
        assert row["scorer_version"] == read_manifest(trained / "run" / "benchmarks").facts["lm_eval"]
        beside = rows[role, "own_written", "distill-kit"]
        # The target has its answer behind ####, as GSM8K's has: lm-eval, told nothing of that, finds none right.
        last = [(re.findall(r"\d+", sample["resps"][0][0]) or [""])[-1] == sample["target"].split()[-1] for sample in samples]
        assert beside["value"] == pytest.approx(sum(last) / DOCUMENTS, abs=1.01 / DOCUMENTS) and beside["scorer"] == "distill-kit: math"
        assert "own_chosen" not in {row["task"] for row in rows.values() if row["scorer"].startswith("distill-kit")}


@pytest.mark.slow
def test_differences_are_paired_and_the_report_says_in_words_what_was_not_lost(trained: Path) -> None:
    rows = scores(trained)
    values = {row["model_role"]: row["value"] for row in rows if row["metric"] == "acc"}
    difference = next(row for row in rows if row["metric"] == "acc" and row["model_role"] == "student - base")
    assert difference["value"] == pytest.approx(values["student"] - values["base"]) and difference["interval_by"] == "paired bootstrap"
    assert difference["low"] <= difference["value"] <= difference["high"]
    forgetting = read_manifest(trained / "run" / "benchmarks").facts["forgetting"]
    assert [each["task"] for each in forgetting] == ["own_chosen"]
    text = (trained / "run" / "report" / "summary.txt").read_text()
    assert f"own_chosen (acc, lm-eval): {forgetting[0]['finding']}" in text
    page = (trained / "run" / "report" / "report.html").read_text()
    assert 'id="benchmarks"' in page and "own_written v1.5" in page and "distill-kit: math" in page
    assert "## Public benchmarks" in (trained / "run" / "report" / "report.md").read_text()
    assert "as they were written" in ok("verify", trained / "run")


STOPPED = """
import os, sys
from distill.benchmarks import kept
from distill.cli import main
from distill.stages import benchmark

what, count = sys.argv.pop(1), 0
tell, keep = kept.Kept.add_partial, benchmark._Stage._keep

def told(self, *answer):
    global count
    tell(self, *answer)
    count += 1
    if what == "answers" and count == 5:
        self.write()
        os._exit(9)

def kept_unit(self, unit):
    keep(self, unit)
    if what == "unit":
        os._exit(9)

kept.Kept.add_partial, benchmark._Stage._keep = told, kept_unit
main()
"""


@pytest.mark.slow
def test_killed_it_goes_on_with_what_is_missing(trained: Path, tmp_path: Path) -> None:
    """Behind a task, and inside of one: neither is done twice, and the numbers are those of a run that was not killed."""
    (tmp_path / "stopped.py").write_text(STOPPED)
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run, ignore=shutil.ignore_patterns("benchmarks", "report"))
    words = ["benchmark", trained / "r.yaml", "--run_dir", run, "--benchmarks.models", "[base, student]"]
    assert commands.run([tmp_path / "stopped.py", "unit", *map(str, words)]).returncode == 9
    first = next((run / "benchmarks" / "base" / "own_written").glob("results_*.json")).name
    assert commands.run([tmp_path / "stopped.py", "answers", *map(str, words)]).returncode == 9
    assert not (run / "benchmarks" / "base" / "own_chosen").exists()
    said = distill(*words)
    assert said.returncode == 0 and f"{2 * DOCUMENTS} requests, going on from 5" in said.stderr, said.stderr
    assert next((run / "benchmarks" / "base" / "own_written").glob("results_*.json")).name == first
    assert not (run / "benchmarks" / "partial").exists() and not (run / "benchmarks" / "journal.jsonl").exists()
    whole = {(row["model_role"], row["metric"], row["scorer"]): row["value"] for row in scores(trained)}
    for row in read_rows(run / "benchmarks", "scores"):
        assert row["value"] == pytest.approx(whole[row["model_role"], row["metric"], row["scorer"]])


@pytest.mark.slow
def test_a_record_of_every_eval_ever_has_what_its_schema_asks_for(trained: Path) -> None:
    """Against the fields, types and values of schema 0.3.0 that such a record uses, written down from its text."""
    share = {"type": "number", "minimum": 0, "maximum": 1}
    texts = {"type": "object", "additionalProperties": {"type": "string"}}
    result = {
        "required": ["evaluation_name", "source_data", "metric_config", "score_details"],
        "properties": {
            "source_data": {
                "required": ["dataset_name", "source_type"],
                "properties": {"source_type": {"enum": ["hf_dataset", "url", "other"]}},
            },
            "metric_config": {
                "required": ["lower_is_better", "score_type", "min_score", "max_score"],
                "properties": {
                    "lower_is_better": {"type": "boolean"},
                    "score_type": {"enum": ["binary", "continuous", "levels"]},
                    "additional_details": texts | {"required": ["scorer", "scorer_version"]},
                },
            },
            "score_details": {"required": ["score"], "properties": {"score": share}},
            "generation_config": {
                "properties": {
                    "generation_args": {"properties": {"max_tokens": {"type": "integer", "minimum": 1}}},
                    "additional_details": texts,
                }
            },
        },
    }
    schema = {
        "required": [
            "schema_version",
            "evaluation_id",
            "retrieved_timestamp",
            "source_metadata",
            "model_info",
            "eval_library",
            "evaluation_results",
        ],
        "properties": {
            "schema_version": {"const": "0.3.0"},
            "evaluation_id": {"type": "string"},
            "retrieved_timestamp": {"type": "string", "pattern": "^[0-9]+$"},
            "evaluation_timestamp": {"type": "string"},
            "source_metadata": {
                "required": ["source_type", "source_organization_name", "evaluator_relationship"],
                "properties": {
                    "source_type": {"enum": ["documentation", "evaluation_run"]},
                    "evaluator_relationship": {"enum": ["first_party", "third_party", "collaborative", "other"]},
                },
            },
            "model_info": {
                "required": ["name", "id", "additional_details"],
                "properties": {"additional_details": texts | {"required": ["deployment_type", "model_availability"]}},
            },
            "eval_library": {"required": ["name", "version"]},
            "evaluation_results": {"type": "array", "minItems": 3, "items": result},
        },
        "additionalProperties": False,
    }
    for role in ("base", "student"):
        record = json.loads((trained / "run" / "benchmarks" / "every_eval_ever" / f"{role}.json").read_text())
        jsonschema.validate(record, schema)
        assert record["eval_library"]["name"] == "lm_eval" and record["source_metadata"]["source_organization_name"] == "the tests"
        assert str(trained) not in json.dumps(record)
    assert record["model_info"]["name"] == "sums" and record["model_info"]["additional_details"]["trained_from"] == "embedded:student"


@pytest.mark.slow
def test_further_tasks_are_added_and_what_is_there_is_kept(trained: Path) -> None:
    """A task that leaves and comes back, a model that comes: nothing is measured twice; a task with other data is."""
    before = stamps(trained, "base"), stamps(trained, "student")
    ok("benchmark", trained / "r.yaml", "--benchmarks.models", "[base, student, teacher]")
    assert (stamps(trained, "base"), stamps(trained, "student")) == before
    assert set(stamps(trained, "teacher")) == {"own_written", "own_chosen"}
    rows = {(row["model_role"], row["metric"]): row["value"] for row in scores(trained)}
    assert rows["teacher", "accuracy"] >= 0
    ok("train", trained / "r.yaml", "--redo", "--train.trainer_args.max_steps", "3")
    student = stamps(trained, "student")
    ok("benchmark", trained / "r.yaml")  # without the teacher, which was paid for
    assert stamps(trained, "base") == before[0] and not set(stamps(trained, "student").values()) & set(student.values())
    assert (trained / "run" / "benchmarks" / "earlier" / "teacher" / "own_written").is_dir()
    refused = distill("benchmark", trained / "r.yaml", "--benchmarks.limit", "3")
    assert refused.returncode == 1 and "benchmarks.limit" in refused.stderr
