"""One server over several nodes: the command of each. Written after the documentation of vLLM and SGLang; not run here yet.

How many GPUs hold a copy of the model, and how, stays with the recipe: `server.args: [--tensor-parallel-size, "8",
--pipeline-parallel-size, "2"]` for two nodes of eight.
"""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

from distill.errors import ServerError
from distill.recipe.servers import Server
from distill.servers.commands import Command, program, value_of
from distill.servers.nodes import Nodes

_BACKEND = "--distributed-executor-backend"


def spread(command: Command, server: Server, role: str, nodes: Nodes) -> Command:
    """A command as this node is to run it.

    Args:
        command: Of a server on one node.
        server: Of the recipe.
        role: For messages.
        nodes: All, and which this is.

    Raises:
        ServerError: this kind of server can't be spread.
    """
    if nodes.size == 1:
        return command
    if server.kind == "sglang":
        return _with(command, ["--nnodes", str(nodes.size), "--node-rank", str(nodes.rank), "--dist-init-addr", _meeting(nodes)])
    if server.kind != "vllm":
        raise ServerError(f"{role}.server.kind {server.kind}: can't be spread over {nodes.size} nodes. Take vllm or sglang, or one node.")
    if value_of(command.words, _BACKEND) == "ray":
        return _by_ray(command, server, role, nodes)
    there = ["--nnodes", str(nodes.size), "--node-rank", str(nodes.rank), "--master-addr", nodes.head, "--master-port", str(nodes.port)]
    return _with(command, [*there, _BACKEND, "mp", *(["--headless"] if nodes.rank else [])])


def _with(command: Command, words: list[str]) -> Command:
    return replace(command, words=[*command.words, *words])


def _meeting(nodes: Nodes) -> str:
    return f"{nodes.head}:{nodes.port}"


def _by_ray(command: Command, server: Server, role: str, nodes: Nodes) -> Command:
    """The first node begins a Ray cluster and serves; the others join it, and wait for work."""
    if server.command is not None:
        raise ServerError(f"{role}.server.command: Ray can't be started beside it. Set server.python, or leave {_BACKEND} ray out.")
    ray = Path(program(server, role)[0]).with_name("ray")
    if nodes.rank:
        return replace(command, words=[str(ray), "start", "--block", f"--address={_meeting(nodes)}"])
    begin = shlex.join([str(ray), "start", "--head", f"--port={nodes.port}", f"--node-ip-address={nodes.head}"])
    return replace(command, words=["bash", "-c", f'{begin} && exec "$@"', "serve", *command.words])
