"""The command line that starts a server of each kind: what is found where, the kit's own arguments, and the user's in their place."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distill.errors import ServerError, shown
from distill.recipe.models import ModelSpec
from distill.recipe.servers import Server
from distill.servers.needs import ServerNeeds
from distill.servers.weights import Weights

ADAPTER_NAME = "student"
"""Name under which a server knows a student's adapter."""
_KEY_VARIABLES = {"vllm": "VLLM_API_KEY", "llama_cpp": "LLAMA_API_KEY"}
"""Environment variable in which a server looks for the key that it is to ask for."""
_SAME = {
    "-c": "--ctx-size",
    "-m": "--model",
    "-np": "--parallel",
    "-tp": "--tensor-parallel-size",
    "--mem-fraction": "--mem-fraction-static",
}
_OF_ITS_OWN = (
    "Install it into an environment of its own (python -m venv ~/{kind} && ~/{kind}/bin/pip install {kind}) and set {role}.server.python: "
    "~/{kind}/bin/python"
)
_INSTALL = {
    "vllm": _OF_ITS_OWN,
    "sglang": _OF_ITS_OWN,
    "llama_cpp": "Install llama.cpp, or set {role}.server.command: [/path/to/llama-server]",
    "transformers": "Install it beside the kit (pip install 'distill-kit[serve]'), or set {role}.server.python to where it is",
}
_SHARES = (("--tensor-parallel-size", "--tp-size", "--tp"), ("--pipeline-parallel-size", "--pp-size", "--pp"), ("--data-parallel-size",))
"""Arguments of vLLM and SGLang by which a server takes more GPUs than one."""
_PROGRAMS = {"vllm": "vllm", "sglang": "sglang", "llama_cpp": "llama-server", "transformers": "transformers"}

Options = dict[str, str | None]
"""Arguments by name; null is a switch. In the order in which they are given."""


@dataclass(frozen=True)
class Command:
    """How a server is started."""

    words: list[str]
    host: str
    """That it listens on."""
    port: int
    model: str
    """Name that it knows the model by."""
    environment: dict[str, str]

    @property
    def url(self) -> str:
        """Its address for this machine."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::", "localhost") else self.host
        return f"http://{host}:{self.port}"


def takes_adapters(server: Server) -> bool:
    """Whether this kind of server is given a student's adapter as it is; SGLang's `/generate` would need a field of its own for it."""
    return server.kind == "vllm"


def command_for(spec: ModelSpec, role: str, weights: Weights, needs: ServerNeeds, port: int, host: str = "127.0.0.1") -> Command:
    """The command that starts a model's server.

    Args:
        spec: The model, with `server`.
        role: For messages.
        weights: What it loads.
        needs: What it will be asked.
        port: That it listens on, unless the recipe's arguments name another.
        host: Likewise; `0.0.0.0` listens on all of the machine's addresses.

    Raises:
        ServerError: it isn't there, or can't honour a key that was set.
    """
    server = spec.server
    assert server is not None
    refuse_what_it_cannot(spec, role)
    model, options = _OPTIONS[server.kind](spec, server, weights, needs)
    words = [*program(server, role), *model, *merged({"--host": host, "--port": str(port), **options}, server.args)]
    given = value_of(words, "--port") or str(port)
    if not given.isdigit():
        raise ServerError(f"{role}.server.args: --port got {shown(given)}. Give a number, or leave it out.")
    name = ADAPTER_NAME if weights.adapter else value_of(words, "--served-model-name") or value_of(words, "--alias") or model[-1]
    return Command(words, value_of(words, "--host") or host, int(given), name, _environment(server, role))


def program(server: Server, role: str) -> list[str]:
    """The command's first words: `command`, or what belongs to `python`, to this environment, or is found on PATH.

    Raises:
        ServerError: it isn't there; says what to install.
    """
    if server.command is not None:
        return server.command
    name, python = _PROGRAMS[server.kind], server.python
    if python is None and server.kind == "transformers":
        python = sys.executable
    if python is None:
        found = shutil.which(name)
        if found is None:
            raise ServerError(f"{role}.server: kind {server.kind} needs {name}, which is not on PATH. {_advice(server, role)}.")
        return [found] if server.kind == "llama_cpp" else [found, "serve"]
    if server.kind == "llama_cpp":
        raise ServerError(f"{role}.server.python: kind llama_cpp is no Python program. {_advice(server, role)}.")
    if not Path(python).is_file():
        raise ServerError(f"{role}.server.python: there is no {python}. Give the path of an environment's python.")
    if server.kind == "sglang":
        return [python, "-m", "sglang.launch_server"]
    script = Path(python).with_name(name)
    if script.is_file():
        return [str(script), "serve"]
    if server.kind == "vllm":
        return [python, "-m", "vllm.entrypoints.cli.main", "serve"]
    raise ServerError(f"{role}.server: there is no {script}. {_advice(server, role)}.")


def _advice(server: Server, role: str) -> str:
    return _INSTALL[server.kind].format(role=role, kind=server.kind)


def refuse_what_it_cannot(spec: ModelSpec, role: str) -> None:
    """Refuses keys of a model that its kind of server can't honour.

    Raises:
        ServerError: naming both.
    """
    assert spec.server is not None
    kind = spec.server.kind
    set_ = {
        name for name in ("attn_implementation", "dtype", "quantization", "tokenizer", "chat_template", "revision") if name in _set(spec)
    }
    cannot = {
        "vllm": {"attn_implementation": "set VLLM_ATTENTION_BACKEND, or --attention-backend in server.args"},
        "sglang": {"attn_implementation": "give --attention-backend in server.args"},
        "llama_cpp": {
            "attn_implementation": "give --flash-attn in server.args",
            "dtype": "the GGUF file decides it",
            "quantization": "the GGUF file decides it",
            "revision": "it loads a file",
        },
        "transformers": {
            "tokenizer": "it takes the one beside the model",
            "chat_template": "it takes the one beside the model",
        },
    }[kind]
    for name in sorted(set_ & set(cannot)):
        raise ServerError(f"{role}.{name}: a server of kind {kind} can't honour it ({cannot[name]}). Leave it out, or choose another kind.")
    if kind not in ("vllm", "sglang") and spec.server.memory_share != Server.model_fields["memory_share"].default:
        raise ServerError(f"{role}.server.memory_share: kind {kind} takes no such share. Leave it out.")
    if spec.server.api_key_env and kind not in _KEY_VARIABLES:
        raise ServerError(f"{role}.server.api_key_env: a server of kind {kind} that the stage starts asks for no key. Leave it out.")


def merged(options: Options, args: Sequence[str]) -> list[str]:
    """The kit's options but those that the user gives, too, or turns off (`--no-...`), and then the user's."""
    theirs = {_plain(word) for word in args if _is_option(word)}
    theirs |= {"--" + name.removeprefix("--no-") for name in theirs if name.startswith("--no-")}
    ours = [[name] if value is None else [name, value] for name, value in options.items() if _plain(name) not in theirs]
    return [word for words in ours for word in words] + list(args)


def value_of(words: Sequence[str], name: str) -> str | None:
    """The value of an option, of which the last one counts; null where it isn't there."""
    found = None
    for place, word in enumerate(words):
        if _is_option(word) and _plain(word) == name:
            found = word.partition("=")[2] if "=" in word else next(iter(words[place + 1 : place + 2]), None)
    return found


def gpus_of(args: Sequence[str]) -> int:
    """GPUs that a server's arguments deal a model out to; 1 where they say nothing of it."""
    sizes = [next((found for name in names if (found := value_of(args, name))), "1") for names in _SHARES]
    return math.prod(int(size) for size in sizes if size.isdecimal())


def without_secrets(words: Sequence[str]) -> list[str]:
    """A command's words as they may be shown."""
    hidden = {place + 1 for place, word in enumerate(words) if _is_option(word) and _names_secret(word) and "=" not in word}
    return [
        "..." if place in hidden else f"{word.partition('=')[0]}=..." if _is_option(word) and "=" in word and _names_secret(word) else word
        for place, word in enumerate(words)
    ]


def _names_secret(word: str) -> bool:
    return any(part in word.partition("=")[0].lower() for part in ("key", "token", "secret", "password")) and "tokenizer" not in word


def _is_option(word: str) -> bool:
    return word.startswith("-") and not word[1:2].isdigit()


def _plain(word: str) -> str:
    name = word.partition("=")[0]
    name = "--" + name[2:].replace("_", "-") if name.startswith("--") else name
    return _SAME.get(name, name)


def _set(spec: ModelSpec) -> set[str]:
    return {name for name, field in type(spec).model_fields.items() if getattr(spec, name) != field.get_default(call_default_factory=True)}


def _environment(server: Server, role: str) -> dict[str, str]:
    """Variables as the server's own environment would have them once activated; the key where the server looks for it."""
    environment = dict(os.environ)
    if server.python is not None:
        for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):  # of the kit's environment, not of that one
            environment.pop(name, None)
        environment["PATH"] = os.pathsep.join([str(Path(server.python).parent.absolute()), environment.get("PATH", os.defpath)])
    if server.api_key_env:
        if not os.environ.get(server.api_key_env):
            raise ServerError(f"{role}.server.api_key_env: the environment has no {server.api_key_env}. Set it, or leave the key out.")
        environment[_KEY_VARIABLES[server.kind]] = os.environ[server.api_key_env]
    return environment


def _vllm(spec: ModelSpec, server: Server, weights: Weights, needs: ServerNeeds) -> tuple[list[str], Options]:
    options: Options = {
        "--served-model-name": server.model or spec.model,
        **({"--max-model-len": str(needs.context)} if needs.context else {}),
        "--gpu-memory-utilization": f"{server.memory_share:g}",
        "--generation-config": "vllm",  # the recipe alone decides how tokens are drawn
        "--max-logprobs": str(max(20, needs.logprobs)),
        "--enable-prefix-caching": None,
        "--uvicorn-log-level": "warning",  # no line a request
        **_common(spec, weights, "--tokenizer"),
        **({"--quantization": "bitsandbytes"} if spec.quantization == "nf4" else {}),
    }
    if weights.adapter:
        options |= {
            "--enable-lora": None,
            "--max-lora-rank": str(weights.rank),
            "--lora-modules": f"{ADAPTER_NAME}={weights.adapter}",
        }
    return [weights.model], options


def _sglang(spec: ModelSpec, server: Server, weights: Weights, needs: ServerNeeds) -> tuple[list[str], Options]:
    return ["--model-path", weights.model], {
        "--served-model-name": server.model or spec.model,
        **({"--context-length": str(needs.context)} if needs.context else {}),
        "--mem-fraction-static": f"{server.memory_share:g}",
        "--sampling-defaults": "openai",  # not the checkpoint's
        "--log-level-http": "warning",
        **_common(spec, weights, "--tokenizer-path"),
        **({"--quantization": "bitsandbytes", "--load-format": "bitsandbytes"} if spec.quantization == "nf4" else {}),
    }


def _llama_cpp(spec: ModelSpec, server: Server, weights: Weights, needs: ServerNeeds) -> tuple[list[str], Options]:
    if not weights.model.endswith(".gguf") or not Path(weights.model).is_file():
        raise ServerError(
            f"server.kind llama_cpp loads a GGUF file, and {shown(weights.model)} is none. Give the path of one as model, and as "
            "tokenizer the id of the model that it was made from."
        )
    slots = server.concurrency or 4
    context = {"--ctx-size": str(needs.context * slots)} if needs.context else {}  # which the slots share
    return ["--model", weights.model], {"--alias": server.model or Path(spec.model).stem, "--parallel": str(slots), **context}


def _transformers(spec: ModelSpec, server: Server, weights: Weights, needs: ServerNeeds) -> tuple[list[str], Options]:
    name = weights.model if weights.revision is None else f"{weights.model}@{weights.revision}"
    if "@" in weights.model:
        raise ServerError(
            f"server.kind transformers takes what stands behind @ for a revision, so it can't load {shown(weights.model)}. Rename it."
        )
    kwargs = spec.chat_template_kwargs
    return [name], {
        **({"--dtype": spec.dtype} if spec.dtype != "auto" else {}),
        **({"--quantization": "bnb-4bit"} if spec.quantization == "nf4" else {}),
        **({"--attn-implementation": spec.attn_implementation} if spec.attn_implementation != "auto" else {}),
        **({"--chat-template-kwargs": json.dumps(kwargs)} if kwargs else {}),
        **({"--trust-remote-code": None} if spec.trust_remote_code else {}),
        **({"--device": "cpu"} if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes") else {}),
    }


def _common(spec: ModelSpec, weights: Weights, tokenizer: str) -> Options:
    from distill import embedded

    return {
        **({"--revision": weights.revision} if weights.revision else {}),
        **({tokenizer: embedded.resolve(spec.tokenizer)} if spec.tokenizer else {}),
        **({"--dtype": spec.dtype} if spec.dtype != "auto" else {}),
        **({"--trust-remote-code": None} if spec.trust_remote_code else {}),
    }


_OPTIONS = {"vllm": _vllm, "sglang": _sglang, "llama_cpp": _llama_cpp, "transformers": _transformers}
