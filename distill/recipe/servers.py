"""Where a model runs, if not in this process: behind a server that is there, or that a stage starts and ends."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from distill.recipe.base import OutputPath, PositiveInt, Section, Share
from distill.recipe.secrets import is_secret

LocalKind = Literal["vllm", "sglang", "llama_cpp", "ollama", "transformers"]
HostedKind = Literal["deepseek", "openrouter", "together", "fireworks", "dashscope", "openai"]
ServerKind = Literal[
    "vllm", "sglang", "llama_cpp", "ollama", "transformers", "deepseek", "openrouter", "together", "fireworks", "dashscope", "openai"
]

STARTABLE = frozenset({"vllm", "sglang", "llama_cpp", "transformers"})
"""Kinds that a stage can start itself."""
BATCHES = frozenset({"openai", "together", "dashscope"})
"""Kinds with batch endpoints of OpenAI's form; that of Fireworks is another."""
HOSTED_URLS = {
    "deepseek": "https://api.deepseek.com",
    "openrouter": "https://openrouter.ai/api/v1",
    "together": "https://api.together.xyz/v1",
    "fireworks": "https://api.fireworks.ai/inference/v1",
    "dashscope": "https://dashscope-intl.aliyuncs.com/compatible-mode/v1",
    "openai": "https://api.openai.com/v1",
}
"""Addresses of hosts, where a recipe gives none."""
API_KEYS = {
    "deepseek": "DEEPSEEK_API_KEY",
    "openrouter": "OPENROUTER_API_KEY",
    "together": "TOGETHER_API_KEY",
    "fireworks": "FIREWORKS_API_KEY",
    "dashscope": "DASHSCOPE_API_KEY",
    "openai": "OPENAI_API_KEY",
}
"""Environment variables in which hosts' own tools look for a key."""
_WEIGHTS = re.compile(r"--?[\w-]*(quant|dtype|revision|override|load[-_]format|rope|cache[-_]type|lora)", re.I)
"""Arguments of a server that change what it computes, and not only how fast."""
# Fields of a request that other keys of the recipe decide.
_OF_THE_RECIPE = frozenset(
    {
        *("model", "prompt", "messages", "input_ids", "n", "seed", "stream", "stream_options", "max_tokens", "max_completion_tokens"),
        *("max_new_tokens", "n_predict", "temperature", "top_p", "top_k", "min_p", "logprobs", "top_logprobs", "prompt_logprobs"),
        *("sampling_params", "generation_config", "stop", "stop_token_ids", "return_token_ids"),
    }
)


class Price(Section):
    """What a host asks, in US dollars for a million tokens."""

    input: Annotated[float, Field(ge=0)]
    """Tokens read."""
    output: Annotated[float, Field(ge=0)]
    """Tokens written, reasoning among them."""
    cached_input: Annotated[float, Field(ge=0)] | None = None
    """Tokens read that the host had in its cache; null: as `input`."""


class Server(Section):
    """A server that holds a model: one that is there (`url`), a host, or one that the stage starts and ends."""

    kind: ServerKind
    """What it is: `vllm`, `sglang`, `llama_cpp` (llama-server), `ollama`, `transformers` (`transformers serve`); hosts: `deepseek`,
    `openrouter`, `together`, `fireworks`, `dashscope`; `openai` is OpenAI or any other host that speaks its protocol."""
    url: str | list[str] | None = None
    """Address, or several that share the work, e.g. `http://node7:8000`. Null: a host's own address; of `vllm`, `sglang`, `llama_cpp` and
    `transformers` one that `distill serve` has left in the run, else the stage starts a server and ends it."""
    model: str | None = None
    """Name the server knows the model by; null takes the model's own, or the only one that it has."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key, never the key itself; null: the host's usual one (`DEEPSEEK_API_KEY`)."""
    body: dict[str, Any] = Field(default_factory=dict)
    """Further fields of every request, e.g. `{provider: {order: [DeepSeek]}}`."""
    concurrency: PositiveInt | None = None
    """Requests at once, over all addresses; null finds it: more while throughput rises, fewer where the server is overloaded."""
    timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """How long a server may say nothing before a request is given up and sent again."""
    max_retries: Annotated[int, Field(ge=0)] = 8
    """How often a request is sent again, with growing pauses, after what may pass (429, 5xx, time-outs, cut connections)."""
    max_failed: Share = 0.02
    """Largest share of requests that may fail for good (a refused prompt, a broken answer); more end the stage, and are asked again."""
    price: Price | None = None
    """What tokens cost; null: not counted."""
    max_cost: Annotated[float, Field(gt=0)] | None = None
    """US dollars that a stage may spend; it then ends, and goes on when this is raised. Needs `price`."""
    max_tokens: PositiveInt | None = None
    """Tokens, read and written, that a stage may have of the server; it then ends, and goes on when this is raised."""
    batch: bool = False
    """Use the host's batch endpoint: about half the price, answers within a day. The stage submits, asks again and again, and may be
    stopped meanwhile. A batch is charged as a whole, so `max_cost` and `max_tokens` can't be kept to."""
    python: OutputPath | None = None
    """Of a server that the stage starts: the Python of the environment that has it, e.g. `~/vllm/bin/python`."""
    command: list[str] | None = None
    """Of a server that the stage starts: the command's words in place of `python`, e.g. `[apptainer, exec, vllm.sif, vllm, serve]`."""
    args: list[str] = Field(default_factory=list)
    """Of a server that the stage starts: further arguments, e.g. `[--tensor-parallel-size, "2"]`; they override the kit's own."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """How long a server that the stage starts may take until it answers."""
    memory_share: Annotated[float, Field(gt=0, le=1)] = 0.85
    """Of the device's memory, for a server that the stage starts and that takes such a share (`vllm`, `sglang`)."""

    @property
    def urls(self) -> list[str]:
        """The addresses, without a trailing slash; empty where the stage has to find or start one."""
        given = [self.url] if isinstance(self.url, str) else self.url or ([HOSTED_URLS[self.kind]] if self.kind in HOSTED_URLS else [])
        # Kinds that are not hosts are asked at several paths, of which clients of OpenAI's protocol take one into the address.
        return [url.rstrip("/") if self.is_hosted else url.rstrip("/").removesuffix("/v1") for url in given]

    @property
    def is_hosted(self) -> bool:
        """Whether the model belongs to a host, which is sent messages, and not token ids."""
        return self.kind in get_args(HostedKind)

    @property
    def is_started(self) -> bool:
        """Whether a stage starts the server, if none of `distill serve` is there."""
        return not self.urls

    @property
    def key_variable(self) -> str | None:
        """Name of the environment variable with the key, if there is one."""
        return self.api_key_env or API_KEYS.get(self.kind)

    def identity(self) -> dict[str, Any]:
        """What decides the rows: the kind of server, its name for the model, what is sent besides, arguments that change weights."""
        weights = [word for place, word in enumerate(self.args) if _WEIGHTS.match(word) or (place and _WEIGHTS.match(self.args[place - 1]))]
        return {"kind": self.kind, "model": self.model, "body": self.body} | ({"weights": weights} if weights else {})

    @field_validator("url")
    @classmethod
    def _are_addresses(cls, value: str | list[str] | None) -> str | list[str] | None:
        urls = [value] if isinstance(value, str) else value or []
        if value is not None and not urls:
            raise ValueError("an empty list names no server; leave it out, or give an address")
        for url in urls:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(f"{url!r} is no address. Write it with its scheme: http://127.0.0.1:8000")
            if parts.username or parts.password:
                raise ValueError(
                    "an address with a password in it would be copied into the run; name an environment variable (api_key_env)"
                )
        if len(set(urls)) < len(urls):
            raise ValueError("the same address is there twice")
        return value

    @field_validator("api_key_env")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", value):
            raise ValueError("expected the name of an environment variable, e.g. DEEPSEEK_API_KEY; the key itself has no place in a recipe")
        return value

    @field_validator("args", "command")
    @classmethod
    def _hold_no_key(cls, value: list[str] | None) -> list[str] | None:
        for word in value or []:
            name = word.partition("=")[0]
            if word.startswith("--") and is_secret(name.lstrip("-")):
                raise ValueError(f"{name} would be copied into the run; leave it out, and name an environment variable (api_key_env)")
        return value

    @field_validator("body")
    @classmethod
    def _further_fields(cls, value: dict[str, Any]) -> dict[str, Any]:
        taken = sorted(_OF_THE_RECIPE & set(value))
        if taken:
            raise ValueError(f"{taken[0]} is decided by other keys of the recipe (generate, rollouts, evaluate, server.model)")
        return value

    @model_validator(mode="after")
    def _fits_the_kind(self) -> Server:
        if self.url is None and self.kind == "ollama":
            raise ValueError("kind ollama is a server that is there: give its url, e.g. http://127.0.0.1:11434")
        if not self.is_started:
            fields = type(self).model_fields
            for name in ("python", "command", "args", "start_timeout_s", "memory_share"):
                if getattr(self, name) != fields[name].get_default(call_default_factory=True):
                    raise ValueError(f"{name} is for a server that the stage starts, and kind {self.kind} with this url is there already")
        if self.python is not None and self.command is not None:
            raise ValueError("give python or command, not both")
        if self.max_cost is not None and self.price is None:
            raise ValueError("max_cost needs price: without it nothing is known to cost")
        return self

    @model_validator(mode="after")
    def _batch_fits(self) -> Server:
        if self.batch and self.kind not in BATCHES:
            raise ValueError(f"batch: kind {self.kind} has no batch endpoint that the kit knows ({', '.join(sorted(BATCHES))} have)")
        for name in ("max_cost", "max_tokens", "concurrency"):
            if self.batch and getattr(self, name) is not None:
                raise ValueError(f"{name} can't be kept to with batch: a host answers and charges for a batch as a whole; leave {name} out")
        return self
