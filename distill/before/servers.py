"""Models behind servers: what can be said of them without asking, and what one that can be reached shows in a few short answers.

A server that is there is asked for about two dozen answers of at most 64 tokens, and for four that take up to a minute (`probing`).
One that the stage starts is not asked, unless `distill serve` has started it already; of it the command is looked for.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from distill.before.expected import jobs_of
from distill.before.findings import Findings
from distill.before.probing import Probed
from distill.errors import DistillError, RecipeError, ServerError
from distill.recipe.experiment import Recipe
from distill.recipe.models import ModelSpec
from distill.recipe.servers import Server
from distill.servers.honouring import Unhonoured, unhonoured
from distill.stages import run_dir
from distill.targets.spec import TargetSpec, TopK

if TYPE_CHECKING:
    from distill.models.chat import ChatFormat
    from distill.stages.prompts import Survey

_CONNECT_S = 5.0  # that an address may take until somebody listens
_MODULES = {"vllm": "vllm", "sglang": "sglang", "transformers": "fastapi"}
"""What a Python must have to start a server of a kind."""


def served(recipe: Recipe) -> dict[str, tuple[ModelSpec, Server]]:
    """The models of a recipe that stand behind a server, by role."""
    specs = {"teacher": recipe.teacher, "student": recipe.student}
    return {role: (spec, spec.server) for role, spec in specs.items() if spec is not None and spec.server is not None}


def is_loaded(recipe: Recipe, role: str) -> bool:
    """Whether a role's weights come into this process: not a teacher's that stands behind a server for all that is asked of it."""
    spec = recipe.student if role == "student" else recipe.teacher
    if spec is None or spec.server is None or role == "student":
        return spec is not None
    live = recipe.train.is_live and not (recipe.train.on_policy and recipe.train.on_policy.teacher_server)
    return live or (recipe.score is not None and recipe.score.source == "process")


def check_without_asking(recipe: Recipe, found: Findings) -> None:
    """What can be said of servers in a second: keys that a kind can't honour, and the command of one that a stage starts."""
    for role, (spec, server) in served(recipe).items():
        claim = f"{role}'s server"
        if not found.prove(claim, lambda r=role, s=server: plainly(r, s)):  # type: ignore[misc]
            continue
        seen = [*_of_weights(recipe, role, spec, server), *_of_stages(recipe, role, spec, server)]
        for error in dict.fromkeys(error for one in seen for error in one.errors):
            found.bad(claim, error)
        for warning in dict.fromkeys(warning for one in seen for warning in one.warnings):
            found.warn(claim, warning)


def _of_weights(recipe: Recipe, role: str, spec: ModelSpec, server: Server) -> Iterator[Unhonoured]:
    """Keys that say how weights are loaded, of a model whose weights somebody else has loaded."""
    if server.is_started or is_loaded(recipe, role):
        return
    if spec.dtype != "auto":
        yield Unhonoured([], [f"{role}.dtype: {role}.server is there already, and does not tell whether it computes in {spec.dtype}"])
    for key in ("quantization", "attn_implementation"):
        if getattr(spec, key) != ModelSpec.model_fields[key].default:
            yield Unhonoured(
                [f"{role}.{key}: {role}.server is there already, and has loaded its weights as it has. Leave the key out."], []
            )


def _of_stages(recipe: Recipe, role: str, spec: ModelSpec, server: Server) -> Iterator[Unhonoured]:
    """Keys of the stages that ask a server."""
    shared = {"role": role, "model": server.model or spec.model, "kwargs": spec.chat_template_kwargs}
    for job in jobs_of(recipe, role, 0, 0, dict.fromkeys(list(recipe.asked_sets())[1:], 0)):
        logprobs = recipe.generate.logprobs if job.stage == "generate" and recipe.generate is not None else None
        yield unhonoured(server, job.sampling, section=job.stage, logprobs=logprobs, **shared)  # type: ignore[arg-type]
    if recipe.score is not None and _reads(recipe, role):
        target = recipe.score.target
        if target.kind == "sampled":
            words = "sampled draws from whole distributions, which no server tells. Use top_k or chosen_token, or score.source: process."
            yield Unhonoured([f"score.target: {words}"], [])
        else:
            yield unhonoured(server, prompt_logprobs=target.k if target.kind == "top_k" else 1, **shared)  # type: ignore[arg-type]


def warn_of_keys(recipe: Recipe, found: Findings) -> None:
    """Whether the environment has the keys of servers that are there, which stages will look for."""
    for role, (_, server) in served(recipe).items():
        if server.urls and server.key_variable and not os.environ.get(server.key_variable):
            found.warn(f"{role}'s key", f"{server.key_variable} is not set here. Export it where the stages will run.")


def plainly(role: str, server: Server) -> str:
    """Where a server is, or how it is started.

    Raises:
        RecipeError: it can't be.
    """
    if not server.is_started:
        key = f", its key in {server.key_variable}" if server.key_variable else ""
        return f"{server.kind} at {', '.join(server.urls)}{key}"
    words = server.command or ([server.python] if server.python else None)
    default = {"llama_cpp": "llama-server", "vllm": "vllm"}.get(server.kind)
    if words is None and default is None:
        return f"{server.kind}, started by the stage from this environment"
    program = words[0] if words else str(default)
    path = shutil.which(program)
    if path is None:
        there = "is no program that can be run" if Path(program).exists() else "is not there"
        key = "command" if server.command else "python"
        raise RecipeError(f"{role}.server.{key}: {program} {there}. Correct it, or give the url of a server that is there.")
    if server.python is not None and server.command is None:
        _has_module(role, server, path)
    return f"{server.kind}, started by the stage with {program}"


def _has_module(role: str, server: Server, python: str) -> None:
    module = _MODULES.get(server.kind)
    if module is None:
        return
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        there = subprocess.run([python, "-c", code], env=environment, capture_output=True, timeout=60, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RecipeError(f"{role}.server.python: {python} can't be run ({type(error).__name__}). Correct it.") from None
    if not there:
        raise RecipeError(f"{role}.server.python: {python} has no package {module}, which kind {server.kind} needs. Install it there.")


def check_servers(
    recipe: Recipe,
    chats: Mapping[str, ChatFormat],
    survey: Survey | None,
    found: Findings,
    *,
    here: bool,
    further: Mapping[str, int] | None = None,
) -> None:
    """Asks every server that can be reached; a claim for each thing that matters.

    Args:
        recipe: The recipe.
        chats: Tokenizers and templates that could be loaded, by role.
        survey: The prompts, some of which are asked.
        found: Where it is said.
        here: Whether this machine is the one that the recipe is to be run on.
        further: Prompts of each further held-out set, by its name.
    """
    for role, (spec, server) in served(recipe).items():
        jobs = [] if survey is None else jobs_of(recipe, role, survey.train, survey.heldout, further)
        claim = f"{role}'s server answers"
        if server.is_started and (left := _left(recipe, role, spec, found)) is not None:
            spec, server = left, left.server or server
        if server.is_started:
            found.unknown(claim, "the stage starts it")
        elif server.key_variable and server.is_hosted and not os.environ.get(server.key_variable):
            reason = f"there is no key in {server.key_variable}"
            found.bad(claim, f"{reason}. Export it.") if here else found.unknown(claim, reason)
        elif survey is None or not (jobs or _reads(recipe, role)):
            found.unknown(claim, "there is nothing to ask it")
        elif all_are_silent(server, claim, found):
            continue
        else:
            asked = recipe.generate.logprobs if role == "teacher" and recipe.generate is not None else None
            target: TargetSpec | None = recipe.score.target if recipe.score is not None and _reads(recipe, role) else None
            if target is None and role == "teacher" and recipe.likeness is not None and recipe.teacher_tells == "server":
                target = TopK(k=recipe.likeness.top_k)
            prompts = [row["messages"] for row in survey.sample]
            try:
                Probed(role, spec, chats.get(role), prompts, jobs, asked, target, found).check()
            except DistillError as error:
                found.bad(claim, str(error))


def _left(recipe: Recipe, role: str, spec: ModelSpec, found: Findings) -> ModelSpec | None:
    """A model whose server `distill serve` has started in the run, with its addresses; null where there is none that answers."""
    from distill.servers.left import Watch
    from distill.servers.needs import needs_of

    name = "teacher" if role == "teacher" else "base"  # a trained student is not there before a run
    watch = Watch(spec, name, run_dir(recipe), None, needs_of(recipe, name))
    urls, claim = watch.urls(), f"{role}'s server, by distill serve"
    if not urls:
        try:
            watch.refuse_unfit()
        except ServerError as error:
            found.bad(claim, str(error))
        return None
    found.good(claim, f"at {', '.join(urls)}")
    assert spec.server is not None
    return spec.model_copy(update={"server": spec.server.model_copy(update={"url": urls, "model": watch.model})})


def all_are_silent(server: Server, claim: str, found: Findings) -> bool:
    """Whether nothing listens at any address of a server of one's own; one of several that is silent is named."""
    silent = [] if server.is_hosted else [url for url in server.urls if not _listens(url)]
    if not silent:
        return False
    if len(silent) == len(server.urls):
        found.bad(claim, f"nothing listens at {', '.join(silent)}. Start it, or correct server.url.")
        return True
    found.warn(claim, f"nothing listens at {', '.join(silent)}: the other addresses do all the work")
    return False


def _listens(url: str) -> bool:
    parts = urlsplit(url)
    try:
        with socket.create_connection((str(parts.hostname), parts.port or {"http": 80, "https": 443}[parts.scheme]), timeout=_CONNECT_S):
            return True
    except OSError:
        return False


def _reads(recipe: Recipe, role: str) -> bool:
    """Whether a role's server scores traces."""
    score = recipe.score
    if role != "teacher" or score is None or recipe.teacher is None or recipe.teacher.server is None:
        return False
    return score.source == "server" or (score.source == "auto" and recipe.teacher.server.kind in ("vllm", "sglang"))
