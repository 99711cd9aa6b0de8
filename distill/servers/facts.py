"""What each kind of server takes, gives and ignores: one table, and what of a recipe a kind can't honour.

Read in the servers' sources and public documents (summer and autumn 2026); of them only `transformers serve` was run with this kit.
A row that proves wrong at a server is corrected here, and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distill.recipe.servers import ServerKind

ALL_SAMPLING = frozenset({"temperature", "top_p", "top_k", "min_p"})


@dataclass(frozen=True)
class Facts:
    """What one kind of server can do."""

    kind: ServerKind
    known_from: str
    """Where this row is known from."""
    takes_ids: bool = False
    """Whether a prompt is sent as token ids; else as messages, which the server's own template renders."""
    gives_ids: bool = False
    """Whether the ids that it drew come back."""
    sampling: frozenset[str] = ALL_SAMPLING
    """Sampling fields that it honours."""
    seed_bits: int = 31
    """Bits of a request's seed that it takes; 0: it has none."""
    stops_at_ids: bool = False
    """Whether it can be told which tokens end an answer; else it stops where the checkpoint's own configuration says."""
    many: bool = False
    """Whether `n` samples of a prompt can be asked for at once."""
    logprobs: int = 0
    """Most alternatives beside each written token; 0: none."""
    prompt_logprobs: int = 0
    """Most alternatives beside each token of a prompt, by the server's own limit; 0: none."""
    tokens_as: Literal["ids", "bytes", "text"] = "text"
    """How alternatives are told."""
    streams: bool = True
    """Whether answers come in pieces; else it says nothing until one is whole, so `timeout_s` must be longer than that takes."""
    thinking: dict[str, str] | None = None
    """Keys of `chat_template_kwargs` that can be asked for, and the field of a request that each becomes; null: all, as they are."""
    thinks_without: frozenset[str] = frozenset()
    """What it ignores or refuses while it thinks: sampling fields, `logprobs`."""
    lists_models: bool = True
    """Whether it tells which models it serves; else what it lists says nothing about that."""
    at_once: int | None = None
    """Most requests that it works on at once, where that is known to be few."""
    terms: tuple[str, ...] = ()
    """What a user should know before using it."""

    @property
    def has_seeds(self) -> bool:
        """Whether a request can carry a seed."""
        return self.seed_bits > 0

    def seed(self, seed: int) -> int:
        """A request's 64-bit seed, reduced to what this kind takes: its lower bits, so that equal seeds stay equal."""
        return seed & ((1 << self.seed_bits) - 1)


_EFFORT = {"reasoning_effort": "reasoning_effort"}
_ROWS = (
    Facts(
        "vllm",
        "vLLM: entrypoints/openai (completion protocol, logprobs), sampling_params; OpenAI-compatible server page",
        takes_ids=True,
        gives_ids=True,
        seed_bits=63,
        stops_at_ids=True,
        many=True,
        logprobs=20,
        prompt_logprobs=20,
        tokens_as="ids",
        terms=(
            "takes the checkpoint's sampling defaults unless started with --generation-config vllm; the kit always sends every field",
            "more than 20 log-probabilities need --max-logprobs; at another temperature than 1 they are those before it, unless "
            "--logprobs-mode processed_logprobs",
            "a seed repeats an answer only as far as batches of other sizes round alike",
        ),
    ),
    Facts(
        "sglang",
        "SGLang: sampling parameters page, native API page, managers/io_struct",
        takes_ids=True,
        gives_ids=True,
        stops_at_ids=True,
        many=True,
        logprobs=1000,
        prompt_logprobs=1000,
        tokens_as="ids",
        streams=False,
        terms=(
            "seeds are honoured only by a server started with --enable-deterministic-inference",
            "among the log-probabilities of a prompt the vocabulary's last id is told as 0",
        ),
    ),
    Facts(
        "llama_cpp",
        "llama.cpp: tools/server/README (POST /completion, GET /props)",
        takes_ids=True,
        gives_ids=True,
        logprobs=1000,
        tokens_as="ids",
        terms=(
            "stops at the tokens that its GGUF file names as ends",
            "its own defaults (temperature 0.8, top_k 40, top_p 0.95, min_p 0.05) apply to what is not sent; the kit sends all",
        ),
    ),
    Facts(
        "ollama",
        "Ollama: docs/api (POST /api/chat, options, think, logprobs)",
        logprobs=20,
        tokens_as="bytes",
        streams=False,
        thinking={"enable_thinking": "think", "think": "think", "reasoning_effort": "think"},
        terms=(
            "cuts a prompt silently that is longer than its context; set server.body: {options: {num_ctx: 16384}} to the length needed",
            "renders messages by the template in its Modelfile",
        ),
    ),
    Facts(
        "transformers",
        "transformers 5.23: cli/serving (chat_completion, utils); run with this kit",
        stops_at_ids=True,
        streams=False,
        lists_models=False,
        at_once=1,
        terms=(
            "seeds repeat an answer only while requests are sent one at a time, because they set the process's own generator",
            "its own reader of answers takes apart what Qwen and Gemma think and write: white space around a thought is lost",
        ),
    ),
    Facts(
        "deepseek",
        "DeepSeek API: create chat completion, thinking mode, reasoning model",
        sampling=frozenset({"temperature", "top_p"}),
        seed_bits=0,
        logprobs=20,
        tokens_as="bytes",
        thinking={"enable_thinking": "thinking", "thinking": "thinking"} | _EFFORT,
        thinks_without=frozenset({"temperature", "top_p", "logprobs"}),
        terms=("ignores temperature and top_p while it thinks, and gives no log-probabilities then",),
    ),
    Facts(
        "openrouter",
        "OpenRouter: API parameters, reasoning tokens, provider routing, errors",
        logprobs=20,
        tokens_as="bytes",
        thinking={"enable_thinking": "reasoning", "thinking": "reasoning", "reasoning_effort": "reasoning"},
        terms=(
            "sends a request to any provider, and leaves out what that one does not know; pin one and refuse others: "
            "server.body: {provider: {order: [NAME], allow_fallbacks: false, require_parameters: true}}",
        ),
    ),
    Facts(
        "together",
        "Together: OpenAPI description of chat completions",
        many=True,
        logprobs=20,
        tokens_as="text",
        thinking={"enable_thinking": "reasoning", "thinking": "reasoning"} | _EFFORT,
    ),
    Facts(
        "fireworks",
        "Fireworks: create chat completion",
        many=True,
        logprobs=5,
        tokens_as="bytes",
        thinking={"enable_thinking": "reasoning_effort"} | _EFFORT,
    ),
    Facts(
        "dashscope",
        "Alibaba Cloud Model Studio: Qwen API reference (OpenAI-compatible), deep thinking",
        sampling=frozenset({"temperature", "top_p", "top_k"}),
        logprobs=5,
        tokens_as="bytes",
        thinking={"enable_thinking": "enable_thinking", "thinking_budget": "thinking_budget"},
        terms=("hybrid models differ in whether they think unless told; the kit always sends enable_thinking, true where nothing is set",),
    ),
    Facts(
        "openai",
        "OpenAI: create chat completion",
        sampling=frozenset({"temperature", "top_p"}),
        many=True,
        logprobs=20,
        tokens_as="bytes",
        thinking=_EFFORT,
        terms=("OpenAI's own reasoning models take no temperature, give no log-probabilities and do not show what they think",),
    ),
)
FACTS: dict[str, Facts] = {row.kind: row for row in _ROWS}
"""A row a kind."""
