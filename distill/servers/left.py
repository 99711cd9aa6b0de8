"""Addresses that `distill serve` leaves in a run: each server its own file, which clients of the run look for, and look at again.

```
<run>/servers/teacher.json            started by hand
<run>/servers/teacher-123_4.json      task 4 of job 123 of a cluster; as many as there are share the work
<run>/servers/teacher-123_4.failed    why that one could not serve, so that nobody waits for it
```

A file is no proof that somebody answers there: a node that dies takes no file with it. So whoever reads one asks first.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from distill.errors import DistillError, IntegrityError, MissingStageError, RecipeError, ServerError, shown
from distill.recipe.models import ModelSpec
from distill.run import early
from distill.run.files import digest_json, read_json, write_json, write_text
from distill.run.log import duration_text, say
from distill.run.manifest import read_manifest
from distill.servers.alive import answers, models_at
from distill.servers.commands import Command
from distill.servers.needs import ServerNeeds
from distill.servers.nodes import own_address, replica
from distill.servers.process import end_leftover, is_orphan, last_words, tail

FOLDER = "servers"
"""In a run's folder, where `distill serve` leaves addresses."""
WAIT = "DISTILL_WAIT_FOR_SERVER_S"
"""Environment variable: seconds that a stage waits for a server of `distill serve`, rather than starting one; set where a job of a cluster
serves the model."""
JOBS, SERVERS = "DISTILL_SERVING_JOBS", "DISTILL_SERVERS"
"""Environment variables: the numbers of the jobs that serve the model, with commas, and how many servers these hold at once."""
_AT_ONCE = 16  # addresses that are asked whether they answer
_EVERY_S, _FIRST_NOTE_S, _NOTE_EVERY_S = 2.0, 5.0, 300.0


class Left(NamedTuple):
    """One address that answers and can be used."""

    url: str
    model: str


def name_of(role: str) -> str:
    """Of a role's server among those of a run: with its job and task, where it is a job."""
    return "-".join(filter(None, (role, replica())))


def identity(spec: ModelSpec, trained: Path | None) -> str:
    """What a server holds, as a digest: the model, its settings, and of a trained student what its stage made."""
    made = None
    if trained is not None:
        with suppress(MissingStageError):
            made = read_manifest(trained).digest
    plain = spec.identity() | {"server": {"kind": spec.server.kind, "model": spec.server.model} if spec.server else None}
    return digest_json([plain, made])


@contextmanager
def announced(spec: ModelSpec, role: str, run: Path, trained: Path | None, needs: ServerNeeds, command: Command) -> Iterator[str]:
    """Leaves a server's address in the run for as long as the context lasts, and yields it."""
    file = run / FOLDER / f"{name_of(role)}.json"
    url = command.url if command.host not in ("0.0.0.0", "::") else f"http://{own_address()}:{command.port}"
    assert spec.server is not None
    content = {"url": url, "model": command.model, "kind": spec.server.kind, "holds": identity(spec, trained), "context": needs.context}
    write_json(file, content | {"logprobs": needs.logprobs})
    try:
        yield url
    finally:
        file.unlink(missing_ok=True)


@contextmanager
def failing_told(run: Path, role: str) -> Iterator[None]:
    """Leaves in the run why a job's server failed, for the clients that wait for it."""
    file = run / FOLDER / f"{name_of(role)}.failed"
    file.unlink(missing_ok=True)
    try:
        yield
    except DistillError as error:
        if replica():
            write_text(file, f"{error}\n")
        raise


def patience_s() -> float:
    """How long a stage waits for a server of `distill serve`; 0: it doesn't.

    Raises:
        RecipeError: the environment says no number of seconds.
    """
    told = os.environ.get(WAIT) or "0"
    try:
        seconds = float(told)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise RecipeError(f"{WAIT}: got {shown(told)}. Give a number of seconds, or leave it out.")
    return seconds


class Watch:
    """Looks for a role's servers in a run, again and again: they come and go.

    Args:
        spec: The model, with `server`.
        role: `teacher`, `student` or `base`.
        run: The run's folder.
        trained: The folder of the train stage, for a student that was trained.
        needs: What will be asked.
    """

    def __init__(self, spec: ModelSpec, role: str, run: Path, trained: Path | None, needs: ServerNeeds) -> None:
        assert spec.server is not None
        self.role, self.wait_s = role, patience_s()
        self._server, self._needs, self._place, self._holds = spec.server, needs, run / FOLDER, identity(spec, trained)
        self.silent: list[Path] = []
        """Files that were left by servers which don't answer."""
        self._lacking: list[str] = []
        self._model: str | None = None

    def urls(self) -> list[str]:
        """Addresses of those that answer, hold the model, and know it by one name."""
        found = self.look()
        if found and self._model not in [one.model for one in found]:
            self._model = found[0].model
        return [one.url for one in found if one.model == self._model]

    @property
    def model(self) -> str:
        """The name that they know it by; of those that were found."""
        assert self._model is not None
        return self._model

    def look(self) -> list[Left]:
        """Those that answer and can be used; of the others it is noted why not."""
        self._lacking, self.silent = [], []
        with ThreadPoolExecutor(_AT_ONCE) as pool:  # an address that is silent takes its while
            found = list(pool.map(self._read, self._files()))
        self._lacking.sort()
        self.silent.sort()
        return [left for left in found if left is not None]

    def refuse_unfit(self) -> None:
        """Nothing, unless servers answer that can't be used.

        Raises:
            ServerError: which, and why.
        """
        if self._lacking:
            raise ServerError(
                f"the server that `distill serve` has started can't be used for {self.role}: {'; '.join(self._lacking)}. End it with "
                "Ctrl-C (a job: scancel)."
            )

    def wait(self) -> list[str]:
        """Addresses, once there are any; says now and then what is waited for.

        Raises:
            ServerError: none came in time, or none can come; with the last lines of the server's log.
        """
        begun_s, note_s = time.monotonic(), _FIRST_NOTE_S
        while not (urls := self.urls()):
            early.check()
            self.refuse_to_wait()
            waited_s = time.monotonic() - begun_s
            if waited_s >= self.wait_s:
                raise ServerError(f"{self.role}: no server of it has answered for {duration_text(waited_s)} ({WAIT}). {self.last_words()}")
            if waited_s >= note_s:
                say(f"waiting for a server of {self.role} ({duration_text(waited_s)}): {self.state()}")
                note_s += min(note_s, _NOTE_EVERY_S)
            time.sleep(min(_EVERY_S, self.wait_s - waited_s))
        return urls

    def refuse_to_wait(self) -> None:
        """Nothing, unless every server that could come has failed for good.

        Raises:
            ServerError: with what the last of them said.
        """
        jobs = [job for job in os.environ.get(JOBS, "").split(",") if job]
        failed = [file for job in jobs for name in (job, f"{job}_*") for file in self._place.glob(f"{self.role}-{name}.failed")]
        tasks = {file.stem.partition("_")[2] for file in failed}
        if failed and len(tasks) >= int(os.environ.get(SERVERS) or 1):
            said = max(failed, key=lambda file: file.stat().st_mtime).read_text(encoding="utf-8").strip()
            raise ServerError(f"{self.role}: the jobs that were to serve it ({', '.join(jobs)}) have failed: {said}")

    def state(self) -> str:
        """Why there is none, in a line: what those that answer lack, or what the last one to begin said last."""
        if self._lacking:
            return "; ".join(self._lacking)
        if self.silent:
            return f"nobody answers as {', '.join(file.name for file in self.silent)} says"
        log = self._log()
        if log is None:
            return f"no job has begun to serve it ({self._place})"
        return f"{log.name}: {next(reversed(tail(log)), 'it has said nothing')}"

    def last_words(self) -> str:
        """For an error: what those that answer lack, or the end of the last log."""
        log = self._log()
        if self._lacking or log is None:
            return f"{self.state()}. Look at its job (squeue --me), or start one: distill serve RECIPE --role {self.role}."
        return last_words(log)

    def _files(self) -> list[Path]:
        return sorted([*self._place.glob(f"{self.role}.json"), *self._place.glob(f"{self.role}-*.json")])

    def _log(self) -> Path | None:
        """The log that was written to last, of the servers themselves."""
        logs = [*self._place.glob(f"server-{self.role}.log"), *self._place.glob(f"server-{self.role}-*.log")]
        return max(logs, key=lambda log: log.stat().st_mtime, default=None)

    def _read(self, file: Path) -> Left | None:
        record = file.with_name(f"server-{file.name}")
        try:
            told: dict[str, Any] = read_json(file)
            url, model = str(told["url"]), str(told["model"])
        except (FileNotFoundError, IntegrityError, KeyError):
            return None
        if is_orphan(record):
            end_leftover(record)
            file.unlink(missing_ok=True)
            return None
        if not self._answers(url, model):
            self.silent.append(file)
            return None
        lacks = [
            *(["it holds another model, or one with other settings"] if told.get("holds") != self._holds else []),
            *_less("a context", told.get("context"), self._needs.context),
            *_less("a number of log-probabilities", told.get("logprobs"), self._needs.logprobs),
        ]
        if lacks:
            self._lacking.append(f"{file}: {'; '.join(lacks)}")
            return None
        return Left(url, model)

    def _answers(self, url: str, model: str) -> bool:
        """Whether the server itself answers there, and not one of somebody else's that has its port by now."""
        if not answers(url):
            return False
        key = os.environ.get(self._server.key_variable or "", "")
        names = [] if self._server.kind == "transformers" else models_at(url, key)  # which lists what a cache has
        return not names or model in names


def _less(what: str, there: int | None, needed: int | None) -> list[str]:
    if there is None or needed is None or there >= needed:
        return []
    return [f"it was started for {what} of {there:,}, and {needed:,} is needed"]
