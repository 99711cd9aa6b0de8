"""The protocol of each kind of server."""

from __future__ import annotations

from distill.recipe.servers import Server
from distill.servers.answers import BrokenAnswerError
from distill.servers.chat import Chat, Ollama, TransformersServe
from distill.servers.facts import Facts
from distill.servers.llama import LlamaServer
from distill.servers.native import VLLM, SGLang
from distill.servers.wire import Prompt, Protocol

__all__ = ["BrokenAnswerError", "Facts", "Prompt", "Protocol", "protocol_of"]

_OF_KIND: dict[str, type[Protocol]] = {
    "vllm": VLLM,
    "sglang": SGLang,
    "llama_cpp": LlamaServer,
    "ollama": Ollama,
    "transformers": TransformersServe,
}


def protocol_of(server: Server, model: str) -> Protocol:
    """How a server is spoken to.

    Args:
        server: Of the recipe.
        model: The name that the server knows the model by.
    """
    return _OF_KIND.get(server.kind, Chat)(server, model)
