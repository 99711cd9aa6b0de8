"""What was found of each model as a record of Every Eval Ever (schema 0.3.0), the form in which the EvalEval coalition collects results.

https://github.com/evaleval/every_eval_ever, `eval.schema.json`. A number of which lm-eval does not say whether more of it is better is
left out, because the schema asks for that.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import distill
from distill.benchmarks.measuring import folder_name, results_in
from distill.recipe.benchmarks import Benchmarks
from distill.recipe.experiment import Recipe
from distill.recipe.servers import HostedKind
from distill.run.files import write_text

SCHEMA = "0.3.0"
FOLDER = "every_eval_ever"
_SHARES = frozenset({"acc", "acc_norm", "accuracy", "em", "exact_match", "f1"})
"""Metrics that lie between 0 and 1."""
_CANONICAL = {"acc": "accuracy", "accuracy": "accuracy", "exact_match": "exact_match", "f1": "f1"}
_LOADERS = frozenset({"json", "csv", "parquet", "text", "arrow"})
"""What names no data set, but how local files are read."""

Row = dict[str, Any]


def write_records(recipe: Recipe, place: Path, rows: Sequence[Row], records: Mapping[str, Row], called: Mapping[str, str]) -> list[Path]:
    """Writes one JSON file a model into `every_eval_ever/` of a folder, and returns them.

    Args:
        recipe: The recipe.
        place: The stage's folder.
        rows: Of the table `scores`.
        records: What each model is, by role.
        called: How each is called where others read it, by role.
    """
    section = recipe.benchmarks
    assert section is not None
    (place / FOLDER).mkdir(exist_ok=True)
    files = []
    for role in section.models:
        mine = [row for row in rows if row["model_role"] == role]
        found = {asked: results_in(place / role / folder_name(asked)) for asked in section.all_tasks}
        record = record_of(recipe, role, mine, found, records[role], called[role])
        files.append(place / FOLDER / f"{role}.json")
        write_text(files[-1], json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return files


def record_of(recipe: Recipe, role: str, rows: Iterable[Row], found: Mapping[str, Row], record: Row, name: str) -> Row:
    """One model's results.

    Args:
        recipe: The recipe.
        role: The model's.
        rows: Its numbers.
        found: What lm-eval found, by the recipe's names of tasks.
        record: What the model is.
        name: How it is called.
    """
    section = recipe.benchmarks
    assert section is not None
    measured_at = str(int(max((float(each["date"]) for each in found.values()), default=0)))
    return {
        "schema_version": SCHEMA,
        "evaluation_id": f"{recipe.name}/{role}/{name}/{measured_at}",
        "evaluation_timestamp": measured_at,
        "retrieved_timestamp": str(int(time.time())),
        "source_metadata": {
            "source_name": "distill-kit",
            "source_type": "evaluation_run",
            "source_organization_name": section.organization or "unknown",
            "evaluator_relationship": "first_party" if role == "student" else "third_party",
        },
        "eval_library": {"name": "lm_eval", "version": importlib.metadata.version("lm-eval")},
        "model_info": _model_info(recipe, role, record, name),
        "evaluation_results": list(_results(section, rows, found)),
    }


def _model_info(recipe: Recipe, role: str, record: Row, name: str) -> Row:
    server = record.get("server")
    is_hosted = server is not None and server["kind"] in get_args(HostedKind)
    details = {
        "deployment_type": "externally_managed" if is_hosted else "self_deployed",
        "model_availability": "unknown",
        "role": role,
        "kit": f"distill-kit {distill.__version__}",
        **({"parameters": str(record["parameters"])} if record.get("parameters") else {}),
        **({"revision": str(record["revision"])} if record.get("revision") else {}),
        **({"trained_from": recipe.student.public_name or Path(recipe.student.model).name} if role == "student" else {}),
    }
    engine = {"name": server["kind"]} if server else {"name": "transformers", "version": importlib.metadata.version("transformers")}
    developer = {"developer": name.split("/")[0]} if "/" in name else {}
    return {"name": name, "id": name, **developer, "inference_engine": engine, "additional_details": details}


def _results(section: Benchmarks, rows: Iterable[Row], found: Mapping[str, Row]) -> Iterator[Row]:
    for row in rows:
        if row["higher_is_better"] is None or not math.isfinite(row["value"]):
            continue
        results = found[row["asked"]]
        config = results.get("configs", {}).get(row["task"], {})
        stderr = {} if row["stderr"] is None else {"standard_error": {"value": row["stderr"]}}
        count = {} if row["num_documents"] is None else {"num_samples": row["num_documents"]}
        yield {
            "evaluation_result_id": f"{row['task']}/{row['metric']}/{row['filter']}/{row['scorer']}",
            "evaluation_name": row["task"],
            "source_data": _source_data(row["task"], config, row["num_documents"]),
            "metric_config": _metric_config(row),
            "score_details": {"score": row["value"], "uncertainty": stderr | count},
            "generation_config": _generation_config(section, row, config),
        }


def _metric_config(row: Row) -> Row:
    is_share = row["metric"] in _SHARES
    bounds = {"min_score": 0.0, "max_score": 1.0} if is_share else {"min_score": "-Infinity", "max_score": "Infinity"}
    version = {} if row["task_version"] is None else {"task_version": row["task_version"]}
    details = {"filter": row["filter"], "scorer": row["scorer"], "scorer_version": row["scorer_version"], **version}
    return {
        "metric_id": _CANONICAL.get(row["metric"], f"lm_eval.{row['metric']}"),
        "metric_name": row["metric"],
        "lower_is_better": not row["higher_is_better"],
        "score_type": "continuous",
        **bounds,
        **({"metric_unit": "proportion"} if is_share else {}),
        "additional_details": details,
    }


def _source_data(task: str, config: Row, count: int | None) -> Row:
    path = config.get("dataset_path")
    if not path or path in _LOADERS or Path(path).exists():
        return {"dataset_name": task, "source_type": "other"}
    split = config.get("test_split") or config.get("validation_split") or config.get("training_split")
    return {
        "dataset_name": path.rpartition("/")[2],
        "source_type": "hf_dataset",
        "hf_repo": path,
        **({"hf_split": split} if isinstance(split, str) else {}),
        **({"samples_number": count} if count is not None else {}),
        **({"additional_details": {"config": str(config["dataset_name"])}} if config.get("dataset_name") else {}),
    }


def _generation_config(section: Benchmarks, row: Row, config: Row) -> Row:
    asked = config.get("generation_kwargs") or {}
    longest, temperature = asked.get("max_gen_toks"), asked.get("temperature")
    arguments: Row = {"max_tokens": longest} if isinstance(longest, int) else {}
    arguments |= {"temperature": temperature} if isinstance(temperature, int | float) else {}
    details = {
        "apply_chat_template": str(section.apply_chat_template).lower(),
        "num_fewshot": "unknown" if row["num_fewshot"] is None else str(row["num_fewshot"]),
        **({"limit": str(section.limit)} if section.limit is not None else {}),
    }
    return {"generation_args": arguments, "additional_details": details}
