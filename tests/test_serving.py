"""Servers that are started for a model: their command lines, their life and death, `distill serve`, and `transformers serve` for real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from distill import embedded
from distill.errors import EARLY, ModelError, ServerError
from distill.recipe.models import LoraAdapter, ModelSpec
from distill.recipe.reading import load_recipe
from distill.recipe.servers import Server
from distill.run.files import read_json, write_json, write_record
from distill.run.folder import delete_stage
from distill.run.owned import strangers
from distill.servers import commands
from distill.servers.commands import command_for, merged, value_of, without_secrets
from distill.servers.needs import ServerNeeds, needs_of, within_model
from distill.servers.process import end_leftover
from distill.servers.serving import serving
from distill.servers.weights import Weights, weights_for, why_merged

ROOT = Path(__file__).resolve().parent.parent
NEEDS = ServerNeeds(context=3072, logprobs=64)

# A server in a few lines: healthy once asked for the first time, with a child of its own that ignores SIGTERM, and a grandchild.
TINY = """
import http.server, os, signal, subprocess, sys, json
args = sys.argv[1:]
port = int(args[args.index("--port") + 1])
if "--die" in args:
    print("loading\\nRuntimeError: no such weights")
    sys.exit(3)
if os.fork() == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "--away" in args:
        os.setsid()
    subprocess.run(["sleep", "600"])
    os._exit(0)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"data": [{"id": args[args.index("--served-model-name") + 1]}]}).encode()
        self.send_response(200 if self.path != "/health" or "--sick" not in args else 503)
        self.end_headers()
        self.wfile.write(body)
    def do_POST(self):
        os._exit(7)
    def log_message(self, *_): pass
print("listening", flush=True)
http.server.HTTPServer((args[args.index("--host") + 1], port), Handler).serve_forever()
"""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny-server") / "server.py"
    path.write_text(TINY)
    return path


@pytest.fixture(autouse=True)
def little_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.servers.process.GRACE_S", 0.3)


def of_tiny(tiny: Path, *args: str, **more: Any) -> ModelSpec:
    server = Server(kind="vllm", command=[sys.executable, str(tiny)], args=list(args), **more)
    return ModelSpec(model="embedded:teacher", server=server)


def family(pid: int) -> list[psutil.Process]:
    """A process with all that descends from it, once there are three of them."""
    found: list[psutil.Process] = until(
        lambda: all_ if len(all_ := [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]) > 2 else []
    )
    return found


def until(found: Callable[[], Any], timeout_s: float = 30) -> Any:
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        result = found()
        if result:
            return result
        time.sleep(0.02)
    raise AssertionError("it never came")


def gone(processes: list[psutil.Process]) -> bool:
    return not [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


# Command lines


def words_of(kind: str, *, args: list[str] | None = None, weights: Weights | None = None, **spec: Any) -> list[str]:
    server = Server(kind=kind, command=["serve"], args=args or [])  # type: ignore[arg-type]
    return command_for(ModelSpec(model="org/model", server=server, **spec), "teacher", weights or Weights("org/model"), NEEDS, 4321).words


def test_vllm_is_started_with_what_the_recipe_needs() -> None:
    weights = Weights("org/model", "v2", Path("/run/student/adapter"), 64)
    words = words_of("vllm", weights=weights, dtype="bfloat16", tokenizer="org/tokenizer", revision="v2", quantization="nf4")
    assert words[:2] == ["serve", "org/model"]
    expected = {
        "--host": "127.0.0.1", "--port": "4321", "--max-model-len": "3072", "--gpu-memory-utilization": "0.85", "--max-logprobs": "64",
        "--generation-config": "vllm", "--served-model-name": "org/model", "--revision": "v2", "--dtype": "bfloat16",
        "--tokenizer": "org/tokenizer", "--quantization": "bitsandbytes", "--max-lora-rank": "64",
        "--lora-modules": "student=/run/student/adapter",
    }  # fmt: skip
    assert {name: value_of(words, name) for name in expected} == expected
    assert {"--enable-prefix-caching", "--enable-lora"} <= set(words)


def test_other_kinds_are_started_with_what_the_recipe_needs(tmp_path: Path) -> None:
    words = words_of("sglang", trust_remote_code=True)
    assert words[:3] == ["serve", "--model-path", "org/model"] and "--trust-remote-code" in words
    assert value_of(words, "--context-length") == "3072" and value_of(words, "--mem-fraction-static") == "0.85"
    gguf = tmp_path / "model.gguf"
    gguf.touch()
    words = words_of("llama_cpp", weights=Weights(str(gguf)))
    assert (
        value_of(words, "--model") == str(gguf) and value_of(words, "--ctx-size") == str(4 * 3072) and value_of(words, "--parallel") == "4"
    )
    words = words_of("transformers", weights=Weights("org/model", "v2"), dtype="float32", chat_template_kwargs={"enable_thinking": True})
    assert words[1] == "org/model@v2" and value_of(words, "--dtype") == "float32"
    assert value_of(words, "--chat-template-kwargs") == '{"enable_thinking": true}'


def test_the_users_arguments_replace_the_kits() -> None:
    args = [
        "--max_model_len=100",
        "--gpu-memory-utilization",
        "0.5",
        "--no-enable-prefix-caching",
        "-tp",
        "2",
        "--port",
        "99",
        "--host=0.0.0.0",
    ]
    words = words_of("vllm", args=args)
    assert words[-len(args) :] == args
    assert not {"--max-model-len", "--enable-prefix-caching"} & set(words) and words.count("--gpu-memory-utilization") == 1
    command = command_for(ModelSpec(model="m", server=Server(kind="vllm", command=["v"], args=args)), "teacher", Weights("m"), NEEDS, 1)
    assert command.url == "http://127.0.0.1:99" and command.host == "0.0.0.0"
    assert merged({"--ctx-size": "1", "--alias": "a"}, ["-c", "2"]) == ["--alias", "a", "-c", "2"]
    assert value_of(["--temp", "-1", "--x=1", "--x=2"], "--x") == "2"


def test_the_context_is_that_of_the_recipe_but_no_longer_than_the_model_takes(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    changes = ["--generate.max_new_tokens", "900", "--generate.logprobs", "5"]
    needs = needs_of(load_recipe(tmp_path / "recipe.yaml", changes), "teacher")
    assert needs == ServerNeeds(900 + 1024, 5)
    assert needs_of(load_recipe(tmp_path / "recipe.yaml", ["--train.max_length", "5000"]), "base") == ServerNeeds(5000, 0)
    assert within_model(needs, ModelSpec(model="embedded:teacher")) == ServerNeeds(512, 5)
    assert within_model(needs, ModelSpec(model="/no/such/model")) == needs


def test_no_secret_is_shown() -> None:
    words = ["serve", "--api-key", "sesame", "--hf-token=sesame", "--tokenizer", "kept", "--max-tokens", "5"]
    assert "sesame" not in " ".join(without_secrets(words)) and "kept" in without_secrets(words)


@pytest.mark.parametrize(
    ("kind", "spec", "server", "message"),
    [
        (
            "vllm",
            {"attn_implementation": "sdpa"},
            {},
            r"teacher.attn_implementation: a server of kind vllm can't honour it .*attention-backend",
        ),
        ("llama_cpp", {"dtype": "float32"}, {}, "teacher.dtype: a server of kind llama_cpp can't honour it"),
        ("transformers", {"tokenizer": "org/other"}, {}, "teacher.tokenizer: a server of kind transformers can't honour it"),
        ("transformers", {}, {"memory_share": 0.5}, "teacher.server.memory_share: kind transformers takes no such share"),
        ("sglang", {}, {"api_key_env": "A_KEY"}, "teacher.server.api_key_env: a server of kind sglang"),
        ("vllm", {}, {"api_key_env": "A_KEY_THAT_IS_NOT_THERE"}, "the environment has no A_KEY_THAT_IS_NOT_THERE"),
        ("llama_cpp", {}, {}, "loads a GGUF file, and 'org/model' is none"),
        ("vllm", {}, {"args": ["--port", "x"]}, "--port got 'x'"),
    ],
)
def test_what_a_kind_cannot_honour_is_refused(kind: Any, spec: dict[str, Any], server: dict[str, Any], message: str) -> None:
    model = ModelSpec(model="org/model", server=Server(kind=kind, command=["serve"], **server), **spec)
    with pytest.raises(ServerError, match=message):
        command_for(model, "teacher", Weights("org/model"), NEEDS, 1)


def test_a_server_that_is_not_installed_is_named_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for kind, advice in (("vllm", "pip install vllm"), ("sglang", "pip install sglang"), ("llama_cpp", "Install llama.cpp")):
        with pytest.raises(ServerError, match=f"teacher.server: kind {kind} needs .* not on PATH. .*{advice}"):
            commands.program(Server(kind=kind), "teacher")  # type: ignore[arg-type]
    with pytest.raises(ServerError, match="there is no nowhere/python"):
        commands.program(Server(kind="vllm", python="nowhere/python"), "teacher")
    (tmp_path / "python").touch()
    beside = Server(kind="vllm", python=str(tmp_path / "python"))
    assert commands.program(beside, "teacher") == [str(tmp_path / "python"), "-m", "vllm.entrypoints.cli.main", "serve"]
    (tmp_path / "vllm").touch()
    assert commands.program(beside, "teacher") == [str(tmp_path / "vllm"), "serve"]
    with pytest.raises(ServerError, match="pip install"):
        commands.program(Server(kind="transformers", python=str(tmp_path / "python")), "teacher")


# Weights


def test_adapters_that_vllm_takes_are_given_to_it_and_others_merged(tmp_path: Path) -> None:
    plain = {"r": 48, "target_modules": ["q_proj"], "use_rslora": True}

    def saved(**more: Any) -> Path:
        (tmp_path / "adapter").mkdir(exist_ok=True)
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(plain | more))
        return tmp_path / "adapter"

    assert why_merged(saved()) is None
    spec = ModelSpec(model="embedded:student", server=Server(kind="vllm"))
    with weights_for(spec, "student", tmp_path, tmp_path, LoraAdapter(), takes_adapters=True) as weights:
        assert weights == Weights(embedded.resolve("embedded:student"), None, tmp_path / "adapter", 64)
    assert "DoRA" in str(why_merged(saved(use_dora=True)))
    assert why_merged(saved(modules_to_save=["norm"])) and why_merged(saved(target_parameters=["experts"])) and why_merged(saved(r=1000))
    quantised = spec.model_copy(update={"quantization": "nf4"})
    with (
        pytest.raises(ModelError, match="quantization nf4 allows no merging"),
        weights_for(quantised, "student", tmp_path, tmp_path, LoraAdapter(), takes_adapters=False),
    ):
        pass


@pytest.mark.slow
def test_an_adapter_that_is_merged_gives_the_same_logits_and_leaves_nothing(tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from distill.models.loading import load_model, load_trained

    spec = ModelSpec(model="embedded:student", dtype="float32", chat_template="chatml", server=Server(kind="transformers"))
    adapter, device = LoraAdapter(r=4, use_dora=True), torch.device("cpu")
    model = get_peft_model(load_model(spec, device), LoraConfig(r=4, use_dora=True, init_lora_weights=False, target_modules="all-linear"))
    model.save_pretrained(str(tmp_path / "adapter"))
    ids = torch.arange(20)[None]
    with (
        torch.inference_mode(),
        weights_for(spec, "student", tmp_path, tmp_path, adapter, takes_adapters=True) as weights,
    ):
        expected = load_trained(spec, adapter, tmp_path, device)(ids).logits
        assert weights.adapter is None and weights.merged == "it is DoRA"
        assert not [name for name in strangers(tmp_path, ()) if not name.startswith("adapter/")]
        assert torch.allclose(AutoModelForCausalLM.from_pretrained(weights.model)(ids).logits, expected, atol=1e-5)
        assert "im_start" in AutoTokenizer.from_pretrained(weights.model).chat_template
    assert not (tmp_path / "served").exists()


def test_verify_calls_nothing_extra_that_servers_leave(tmp_path: Path) -> None:
    from distill.pipeline import verify_run
    from distill.run.folder import StageFolder

    with StageFolder(tmp_path / "traces", "generate", {}) as out:
        (tmp_path / "traces" / "server-teacher.log").write_text("listening")
        out.finish()
    (tmp_path / "servers").mkdir()
    for name in ("teacher.json", "server-teacher.log", ".lock-teacher"):
        (tmp_path / "servers" / name).touch()
    write_record(tmp_path / "recipe.yaml", "name: served\n")
    assert verify_run(tmp_path)
    with StageFolder(tmp_path / "traces", "generate", {}) as out:
        assert out.complete
    delete_stage(tmp_path / "traces")
    assert not (tmp_path / "traces" / "server-teacher.log").exists()


# Life and death


def test_a_server_is_started_and_ended_with_all_its_children(tiny: Path, tmp_path: Path) -> None:
    for away in ((), ("--away",)):
        with serving(of_tiny(tiny, *away), "teacher", tmp_path, tmp_path) as served:
            assert served.how == "started" and served.model == "embedded:teacher"
            assert json.load(urllib.request.urlopen(served.urls[0] + "/v1/models"))["data"][0]["id"] == served.model
            living = family(read_json(tmp_path / "server-teacher.json")["pid"])
            assert strangers(tmp_path, ()) == []  # a stage's folder may hold its log and its record
        assert gone(living) and not (tmp_path / "server-teacher.json").exists()
    assert "listening" in (tmp_path / "server-teacher.log").read_text()


def test_it_is_ended_when_its_user_fails(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), serving(of_tiny(tiny), "teacher", tmp_path, tmp_path):
        living = family(read_json(tmp_path / "server-teacher.json")["pid"])
        raise KeyboardInterrupt
    assert gone(living)


def test_the_last_lines_of_one_that_dies_are_the_error(tiny: Path, tmp_path: Path) -> None:
    dying = of_tiny(tiny, "--die"), r"(?s)teacher.server \(vllm\): ended with exit code 3.*RuntimeError: no such weights"
    sick = of_tiny(tiny, "--sick", start_timeout_s=1.0), r"(?s)has not answered after .*start_timeout_s.*listening"
    for spec, message in (dying, sick):
        with pytest.raises(ServerError, match=message), serving(spec, "teacher", tmp_path, tmp_path):
            pass
    with pytest.raises(ServerError, match="exit code 7"), serving(of_tiny(tiny), "teacher", tmp_path, tmp_path) as served:
        urllib.request.urlopen(served.urls[0], data=b"{}")  # which it does not survive
    missing = ModelSpec(model="m", server=Server(kind="vllm", command=["/no/such/program"]))
    with pytest.raises(ServerError, match="can't be run: No such file"), serving(missing, "teacher", tmp_path, tmp_path):
        pass
    assert not list(tmp_path.glob("*.json"))


STARTER = """
import sys, time
from pathlib import Path
from distill.recipe.models import ModelSpec
from distill.recipe.servers import Server
from distill.run import early
from distill.run.failures import one_message
from distill.servers import process
from distill.servers.serving import serving
process.GRACE_S, early.UNIT_S = 0.3, 0.1
spec = ModelSpec(model="embedded:teacher", server=Server(kind="vllm", command=[sys.executable, sys.argv[1]], args=sys.argv[3:]))
with one_message(), serving(spec, "teacher", Path(sys.argv[2]), Path(sys.argv[2])):
    print("up", flush=True)
    time.sleep(600)
"""


@contextmanager
def another(tiny: Path, place: Path, *args: str) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """A process that has started a server."""
    words = [sys.executable, "-c", STARTER, str(tiny), str(place), *args]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}) as process:
        try:
            assert process.stdout is not None
            assert any("up" in line for line in process.stdout)
            yield process, family(read_json(place / "server-teacher.json")["pid"])
        finally:
            process.kill()


@pytest.mark.parametrize("args", [(), ("--away",)], ids=["in its session", "in one of its own"])
def test_one_that_a_killed_run_left_behind_is_ended_by_the_next(tiny: Path, tmp_path: Path, args: tuple[str, ...]) -> None:
    with another(tiny, tmp_path, *args) as (starter, living):
        starter.send_signal(signal.SIGKILL)
        starter.wait()
        assert not gone(living)
        living[0].kill()  # the first of them has gone, too
        with serving(of_tiny(tiny), "teacher", tmp_path, tmp_path):
            assert gone(living)


def test_sigterm_ends_the_server_first(tiny: Path, tmp_path: Path) -> None:
    with another(tiny, tmp_path) as (starter, living):
        starter.terminate()
        assert starter.wait(30) == EARLY
        assert gone(living)


def test_a_process_that_got_the_number_of_a_server_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as stranger:
        record = tmp_path / "server-teacher.json"
        created_s = psutil.Process(stranger.pid).create_time() - 100
        content = {"host": os.uname().nodename, "mark": "m", "pid": stranger.pid, "created_s": created_s}
        write_json(record, content | {"starter": {"pid": 1, "created_s": 0.0}})
        end_leftover(record)
        assert stranger.poll() is None and not record.exists()
        stranger.kill()


# By hand


RECIPE = """
name: served
teacher:
  model: embedded:teacher
  dtype: float32
student:
  model: embedded:student
  dtype: float32
prompts: {source: embedded:arithmetic, max_prompts: 24, heldout_size: 8}
generate: {max_new_tokens: 64, temperature: 1.0, top_p: 1.0}
train: {max_length: 128}
evaluate: {max_new_tokens: 64}
"""


@contextmanager
def by_hand(tmp_path: Path, *words: str, until: str = "Ctrl-C ends it") -> Iterator[tuple[subprocess.Popen[str], Path, list[str]]]:
    """`distill serve`, once its server answers: the process, its run, and what it has said so far."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    command = [sys.executable, "-m", "distill", "serve", "recipe.yaml", "--run_dir", "run", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path, env=environment) as process:
        try:
            assert process.stdout is not None
            said: list[str] = []
            for line in process.stdout:
                said.append(line)
                if until in line:
                    break
            else:
                raise AssertionError("".join(said))
            yield process, tmp_path / "run", said
        finally:
            process.kill()


def test_one_that_was_started_by_hand_is_found_and_ends_with_ctrl_c(tiny: Path, tmp_path: Path) -> None:
    server = {"kind": "vllm", "command": [sys.executable, str(tiny)]}
    spec = ModelSpec(model="embedded:teacher", dtype="float32", server=Server(**server))  # type: ignore[arg-type]
    needs = ServerNeeds(context=1000)
    with by_hand(tmp_path, "--teacher.server", json.dumps(server)) as (process, run, said):
        place = run / "traces"
        place.mkdir()
        with serving(spec, "teacher", place, run, needs=needs) as served:
            assert served.how == "found" and served.urls[0] in "".join(said) and served.model == "embedded:teacher"
        assert not list(place.iterdir())
        other, longer = spec.model_copy(update={"model": "embedded:student"}), ServerNeeds(context=100_000)
        for asked, need, message in ((other, needs, "holds another model"), (spec, longer, "context of 1,088, and 100,000 is needed")):
            with pytest.raises(ServerError, match=message), serving(asked, "teacher", place, run, needs=need):
                pass
        living = family(read_json(run / "servers" / "server-teacher.json")["pid"])
        process.send_signal(signal.SIGINT)
        last = process.stdout.read() if process.stdout else ""
        assert process.wait(30) == 0 and last == "the server of teacher is ended\n"
    assert gone(living) and not list((run / "servers").glob("*.json"))


@pytest.mark.slow
def test_one_by_hand_whose_starter_was_killed_is_ended_and_not_used(tiny: Path, tmp_path: Path) -> None:
    server = {"kind": "vllm", "command": [sys.executable, str(tiny)]}
    spec = ModelSpec(model="embedded:teacher", dtype="float32", server=Server(**server))  # type: ignore[arg-type]
    with by_hand(tmp_path, "--teacher.server", json.dumps(server)) as (process, run, _):
        living = family(read_json(run / "servers" / "server-teacher.json")["pid"])
        process.kill()
        process.wait()
        with serving(spec, "teacher", tmp_path, run) as served:
            assert served.how == "started" and gone(living)


# `transformers serve`


@pytest.mark.slow
def test_transformers_serve_is_started_and_answers_as_the_engine_in_this_process(tmp_path: Path) -> None:
    import torch

    from distill.engines import requests_for
    from distill.engines.hf import HFEngine
    from distill.models.loading import load_chat_format, load_model
    from distill.recipe.base import Sampling
    from distill.servers.client import Client
    from distill.servers.protocols import protocol_of
    from distill.servers.writing import ServerEngine

    spec = ModelSpec(model="embedded:teacher", dtype="float32", server=Server(kind="transformers"))
    assert spec.server is not None
    chat, model = load_chat_format(spec), load_model(spec, torch.device("cpu"))
    problems = [json.loads(line)["question"] for line in Path(embedded.resolve("embedded:arithmetic")).read_text().splitlines()[:24]]
    prompts = [
        {"prompt_id": str(number), "messages": [{"role": "user", "content": problem}], "reference": None}
        for number, problem in enumerate(problems)
    ]
    requests = requests_for(prompts, 1, 0)
    with serving(spec, "teacher", tmp_path, tmp_path, needs=ServerNeeds(512)) as served:
        living = [psutil.Process(read_json(tmp_path / "server-teacher.json")["pid"])]
        for longest in (192, 20):  # the second cuts thoughts short, and its reader of answers takes white space off their ends
            sampling = Sampling(temperature=0.0, max_new_tokens=longest)
            expected = HFEngine(model, chat, sampling).complete(requests)
            with Client(spec.server, served.urls) as client:
                engine = ServerEngine(client, protocol_of(spec.server, served.model), chat, sampling)
                found = dict(pair for ended in engine.write(requests) for pair in ended)
            told = [
                (getattr(found[place], "text", found[place]), getattr(found[place], "finish_reason", "")) for place in range(len(requests))
            ]
            made = [(row.text if row.finish_reason == "stop" else row.text.rstrip(), row.finish_reason) for row in expected]
            assert told == made
    assert gone(living)


@pytest.mark.slow
def test_what_transformers_serve_says_when_it_cannot_load_is_the_error(tmp_path: Path) -> None:
    spec = ModelSpec(model=str(tmp_path), server=Server(kind="transformers"))
    message = r"(?s)ended with exit code 1\. Its last lines .*(OSError|ValueError): "
    with pytest.raises(ServerError, match=message), serving(spec, "teacher", tmp_path, tmp_path):
        pass
