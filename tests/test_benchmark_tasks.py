"""lm-eval's tasks before a model is loaded, and models behind servers that are asked them."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from answering import Answering
from fabricated import recipe_for

from distill.before.findings import Findings
from distill.before.packages import check_packages
from distill.engines.written import Completion, Failure, Request
from distill.errors import DataError, RecipeError, ServerError
from distill.recipe.experiment import Recipe
from distill.servers.opening import Writer
from distill.stages import benchmark, open_stage

pytest.importorskip("lm_eval", reason="needs the extra benchmarks: pip install 'distill-kit[benchmarks]'")

from lm_eval.api.instance import Instance
from test_benchmarks import DOCUMENTS, write_tasks

from distill.benchmarks.tasks import find_tasks


def asking(place: Path, tasks: list[str], server: dict[str, Any] | None = None, **more: Any) -> Recipe:
    """A recipe that asks the teacher, behind a server or not, for some of the own tasks."""
    teacher = {"model": "embedded:teacher", "dtype": "float32", **({"server": server} if server else {})}
    asked = {"tasks": tasks, "models": ["teacher"], "include_path": str(write_tasks(place / "tasks"))}
    return recipe_for(place / "run", teacher=teacher, benchmarks=asked | more)


def write_more(place: Path, name: str, **changes: str) -> None:
    """One more task that is answered in text, with some lines of its file changed."""
    text = (place / "tasks" / "own_written.yaml").read_text().replace("own_written", name)
    for old, new in changes.values():
        assert old in text
        text = text.replace(old, new)
    (place / "tasks" / f"{name}.yaml").write_text(text)


def test_tasks_are_found_with_their_documents(tmp_path: Path) -> None:
    found = find_tasks(asking(tmp_path, ["own_written", "own_chosen"])).leaves
    assert {name: [leaf.output_type for leaf in leaves] for name, leaves in found.items()} == {
        "own_written": ["generate_until"],
        "own_chosen": ["multiple_choice"],
    }
    assert all(leaf.documents == DOCUMENTS for leaves in found.values() for leaf in leaves)
    write_tasks(tmp_path / "tasks", shift=1)
    other = find_tasks(asking(tmp_path, ["own_written"]))
    assert other.leaves["own_written"][0].documents == DOCUMENTS


def test_data_that_can_not_be_had_is_named_before_anything_is_spent(tmp_path: Path) -> None:
    recipe = asking(tmp_path, ["own_remote"])
    write_more(tmp_path, "own_remote", path=("dataset_path: json", "dataset_path: nobody/of-this-name"))
    with pytest.raises(DataError, match=r"task own_remote.*nobody/of-this-name.*HF_HUB_OFFLINE"):
        find_tasks(recipe)


def test_what_runs_foreign_code_is_refused(tmp_path: Path) -> None:
    recipe = asking(tmp_path, ["own_code"])
    write_more(tmp_path, "own_code", unsafe=("output_type: generate_until", "output_type: generate_until\nunsafe_code: true"))
    with pytest.raises(RecipeError, match=r"own_code: lm-eval would run code.*sandbox"):
        find_tasks(recipe)


@pytest.mark.parametrize(
    ("tasks", "words"),
    [(["own_chosen"], r"own_chosen \(multiple_choice\) can't be run with the teacher behind a server"), (["own_written"], "")],
)
def test_a_model_behind_a_server_takes_only_what_is_answered_in_text(tmp_path: Path, tasks: list[str], words: str) -> None:
    server = {"kind": "vllm", "url": "http://127.0.0.1:9"}
    with pytest.raises(ValueError, match=r"behind a server: set benchmarks\.apply_chat_template"):
        asking(tmp_path, tasks, server)
    recipe = asking(tmp_path, tasks, server, apply_chat_template=True, max_gen_toks=12)
    if words:
        with pytest.raises(RecipeError, match=words):
            find_tasks(recipe)
    else:
        assert list(find_tasks(recipe).leaves) == tasks


def test_without_the_extra_the_check_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, find = asking(tmp_path, ["own_written"]), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "lm_eval" else find(name, *more))
    found = Findings()
    check_packages(recipe, found, importing=False)
    assert found.failed == 1 and "pip install 'distill-kit[benchmarks]'" in capsys.readouterr().out.replace("\n", " ")
    with pytest.raises(RecipeError, match="distill-kit"):
        find_tasks(recipe)


def test_a_server_is_asked_each_question_as_a_conversation_and_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distill.benchmarks.kept import Kept
    from distill.benchmarks.measuring import measure, results_in, samples_in
    from distill.benchmarks.models import open_model
    from distill.run.journal import Journal

    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with Answering(tokens=64) as server:
        recipe = asking(tmp_path, ["own_written"], {"kind": "openai", "url": f"{server.url}/v1"}, apply_chat_template=True, max_gen_toks=64)
        assert recipe.benchmarks is not None
        for attempt in ("first", "again"):
            kept = Kept(Journal(tmp_path / "kept.jsonl"))
            place = tmp_path / attempt
            with open_model(recipe, "teacher", tmp_path, tmp_path, None, kept) as ready:
                measure(ready.lm, "the teacher", "own_written", find_tasks(recipe).manager, recipe.benchmarks, place)
            samples = list(samples_in(place, "own_written"))
            assert len(samples) == DOCUMENTS
            assert all(re.fullmatch(r"\\boxed\{7\} \d+", sample["resps"][0][0]) for sample in samples), "without the thought"
            assert results_in(place)["results"]["own_written"]["exact_match,last"] == 0.0
        assert len(server.asked) == DOCUMENTS
    assert server.asked[0]["messages"][-1]["content"].startswith("What is ") and server.asked[0]["temperature"] == 0
    assert json.loads((tmp_path / "kept.jsonl").read_text().split(" ", 1)[1].splitlines()[0])


class Failing:
    """A model that fails on some of what it is asked."""

    def __init__(self, *fails: str) -> None:
        self.fails, self.asked = fails, 0

    def write(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Completion | Failure]]]:
        """An answer, or a failure, to each."""
        for place, request in enumerate(requests):
            self.asked += 1
            fails = request.messages[0]["content"] in self.fails
            yield [(place, Failure("timed_out", "") if fails else Completion(f"to {request.prompt_id}", None, None, "stop"))]


def test_a_failed_request_is_asked_again_and_no_restart_gets_past_max_failed(tmp_path: Path) -> None:
    from distill.benchmarks.kept import Kept
    from distill.benchmarks.models import Served
    from distill.run.journal import Journal

    section = asking(tmp_path, ["own_written"], apply_chat_template=True).benchmarks
    assert section is not None
    asked = [Instance("generate_until", {}, (json.dumps([{"role": "user", "content": text}]), {"until": []}), 0) for text in "abcd"]

    def answers(engine: Failing, max_failed: float) -> list[str]:
        writer = Writer(engine, {}, "server", None, max_failed)
        return Served(writer, section, Kept(Journal(tmp_path / "kept.jsonl")), 0).generate_until(asked)

    for number in (4, 2, 2):  # what was answered is not asked again, what failed is
        engine = Failing("b", "d")
        with pytest.raises(ServerError, match="2 of 4 requests failed for good"):
            answers(engine, 0.3)
        assert engine.asked == number
    assert [bool(answer) for answer in answers(Failing("b"), 0.3)] == [True, False, True, True]
    assert all(answers(Failing(), 0.0))


def test_what_was_measured_with_another_lm_eval_or_other_documents_is_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = asking(tmp_path, ["own_written"])
    with open_stage(recipe, benchmark.plan(recipe)) as out:
        stage = benchmark._Stage(recipe, out)
        unit = {"model": "teacher", "task": "own_written", "record": {}, "files": {}}
        stage._keep(unit | {"identity": stage._identity("teacher", "own_written")})
        stage._keep(unit | {"task": "of_before", "identity": {}})
        assert set(benchmark._Stage(recipe, out)._units) == {("teacher", "own_written")}
        with monkeypatch.context() as patched:
            patched.setattr("distill.benchmarks.tasks.version", lambda: "0.0.0")
            assert not benchmark._Stage(recipe, out)._units
        write_tasks(tmp_path / "tasks", shift=1)
        assert not benchmark._Stage(recipe, out)._units
