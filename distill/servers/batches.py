"""An engine on a host's batch endpoint: requests go as a file, answers come within a day, at about half the price.

What was submitted is noted in a file of the stage before and after each step, so that a stage that was killed asks after the same
batches, and pays once: a batch whose submission was cut off is found again by its file. A row of a batch has a name that follows from
all that is asked, so a batch of other settings is none of it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from distill.engines import Completion, Request
from distill.errors import ServerError, visible
from distill.recipe.base import Sampling
from distill.recipe.servers import Server
from distill.run.files import digest_json, read_json, write_json
from distill.run.log import say
from distill.servers import Call, Failure, Usage
from distill.servers.answers import BrokenAnswerError, spent_in_vain
from distill.servers.faults import fault_of
from distill.servers.hosts import BatchHost
from distill.servers.protocols import Protocol

STATE = "batches.json"
"""Name of the file in a stage's folder that says what was submitted."""
_ROWS, _BYTES = 20_000, 90 * 2**20  # of a file that is sent, at most
_TOGETHER = 64  # completions that are handed over at once
_ROUNDS = 3  # times that a row is asked that came back unanswered
_LONGEST_PAUSE_S = 60.0
_ENDED = frozenset({"completed", "expired", "failed", "cancelled"})

Row = tuple[int, Completion | Failure]


class BatchEngine:
    """Completions of a model behind a host's batch endpoint.

    Args:
        server: Of the recipe.
        protocol: How the host is spoken to.
        sampling: How tokens are drawn.
        state: File that notes what was submitted.
        logprobs: Alternatives wanted beside each token.
        kwargs: The model's `chat_template_kwargs`.
        spent: Told what each answer used.
        pause_s: Before a batch is asked after for the first time; pauses grow to a minute.
    """

    def __init__(
        self,
        server: Server,
        protocol: Protocol,
        sampling: Sampling,
        state: Path,
        *,
        logprobs: int | None = None,
        kwargs: Mapping[str, Any] | None = None,
        spent: Callable[[Usage], None] = lambda _: None,
        pause_s: float = 5.0,
    ) -> None:
        self._host, self._protocol, self._sampling = BatchHost(server), protocol, sampling
        self._notes = _Notes(state)
        self._logprobs, self._kwargs, self._spent, self._pause_s = logprobs, kwargs, spent, pause_s

    def write(self, requests: Sequence[Request]) -> Iterator[list[Row]]:
        """Completions as batches end; what a batch left unanswered is asked again, and fails when that was in vain."""
        calls = {place: self._call(request) for place, request in enumerate(requests)}
        names = {_name(requests[place], call): place for place, call in calls.items()}
        self._notes.keep_those_with(names)
        for left in range(_ROUNDS - 1, -1, -1):
            if not names:
                return
            self._submit(names, calls)
            for note in self._notes.all():
                there = [name for name in note["rows"] if name in names]
                told = self._wait(note)
                answers = self._answers(told, there, names, calls)
                while rows := list(islice(answers, _TOGETHER)):
                    yield [row for _, row in rows]
                    for name, _ in rows:
                        del names[name]
                self._notes.drop(note)  # behind the last yield, whose rows are on disk now
            if names and left:
                say(f"batches: {len(names):,} requests came back unanswered, and are asked again")
        if names:
            yield [(place, Failure("unanswered", f"in {_ROUNDS} batches")) for place in names.values()]

    def _call(self, request: Request) -> Call:
        call = self._protocol.writing(request.messages, self._sampling, request.seed, logprobs=self._logprobs, kwargs=self._kwargs)
        body = {name: value for name, value in (call.body or {}).items() if name not in ("stream", "stream_options")}
        return Call(call.path, body)

    def _submit(self, names: Mapping[str, int], calls: Mapping[int, Call]) -> None:
        """Submits what is in no batch yet, and finishes what a kill has cut off."""
        known = {name for note in self._notes.all() for name in note["rows"]}
        for lines in _files({name: calls[place] for name, place in names.items() if name not in known}):
            note: dict[str, Any] = {"rows": [name for name, _ in lines], "file": None, "batch": None}
            self._notes.add(note)
            note["file"] = self._host.upload(b"".join(line for _, line in lines))
            self._notes.write()
        for note in self._notes.all():
            if note["file"] is None:  # killed while it went up, which costs nothing
                lines = [(name, _line(name, calls[names[name]])) for name in note["rows"] if name in names]
                note |= {"rows": [name for name, _ in lines], "file": self._host.upload(b"".join(line for _, line in lines))}
                self._notes.write()
            if note["batch"] is None:
                note["batch"] = self._host.submit(note["file"])
                self._notes.write()
                say(f"batch     {note['batch']}: {len(note['rows']):,} requests submitted")

    def _wait(self, note: dict[str, Any]) -> dict[str, Any]:
        """Asks after a batch until it has ended."""
        pause_s, shown = self._pause_s, ""
        while True:
            told = self._host.state(note["batch"])
            counts = told.get("request_counts") or {}
            line = f"batch     {note['batch']}: {told['status']}, {counts.get('completed', 0):,} of {len(note['rows']):,} answered"
            if line != shown:
                say(line)
                shown = line
            if told["status"] in _ENDED:
                return self._ended(note, told)
            time.sleep(pause_s)
            pause_s = min(1.5 * pause_s, _LONGEST_PAUSE_S)

    def _ended(self, note: dict[str, Any], told: dict[str, Any]) -> dict[str, Any]:
        if told["status"] in ("completed", "expired") or told.get("output_file_id"):
            return told
        self._notes.drop(note)  # the next run submits anew
        errors = told.get("errors") or {}
        why = [str(entry.get("message")) for entry in (errors.get("data") or [] if isinstance(errors, dict) else [])] or [str(errors or "")]
        raise ServerError(
            f"the host ended batch {note['batch']} ({told['status']}): {visible('; '.join(why), 300) or 'no reason is given'}. "
            "Correct what it names, and run this again."
        )

    def _answers(
        self, told: Mapping[str, Any], there: Iterable[str], names: Mapping[str, int], calls: Mapping[int, Call]
    ) -> Iterator[tuple[str, Row]]:
        """Rows that a batch has answered, or refused for good, once each."""
        open_ = set(there)
        for file_id in (told.get("output_file_id"), told.get("error_file_id")):
            for line in self._host.lines(file_id) if file_id else ():
                name = str(line.get("custom_id"))
                if name not in open_:
                    continue
                place = names[name]
                row = self._row(line, calls[place])
                if row is not None:
                    open_.discard(name)
                    yield name, (place, row)

    def _row(self, line: Mapping[str, Any], call: Call) -> Completion | Failure | None:
        """What a line says; null where it may be answered another time."""
        response = line.get("response") or {}
        status, body = int(response.get("status_code") or 0), response.get("body")
        if status == 200 and not line.get("error"):
            try:
                answer = self._protocol.answer(body, call)
            except BrokenAnswerError as error:
                self._spent(spent_in_vain(body))
                return Failure(error.reason, error.detail) if getattr(error, "final", False) else None
            self._spent(answer.usage)
            return Completion(answer.text, answer.prompt_ids, answer.completion_ids, answer.finish_reason, answer.alternatives)
        if not status:  # the batch has expired, or was cancelled, before its turn
            return None
        fault = fault_of(status, body or line.get("error") or {})
        return None if fault.verdict == "retry" else Failure(fault.reason, fault.detail)


class _Notes:
    """What was submitted: of each batch its rows, its file and its id."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._notes: list[dict[str, Any]] = read_json(path)["batches"] if path.exists() else []

    def all(self) -> list[dict[str, Any]]:
        return list(self._notes)

    def add(self, note: dict[str, Any]) -> None:
        self._notes.append(note)
        self.write()

    def drop(self, note: dict[str, Any]) -> None:
        self._notes.remove(note)
        self.write()

    def keep_those_with(self, names: Mapping[str, int]) -> None:
        """Forgets batches that hold nothing of what is asked now."""
        self._notes = [note for note in self._notes if any(name in names for name in note["rows"])]
        if self._path.exists():
            self.write()

    def write(self) -> None:
        """Puts them on disk; the file goes with the last."""
        if self._notes:
            write_json(self._path, {"batches": self._notes})
        else:
            self._path.unlink(missing_ok=True)


def _name(request: Request, call: Call) -> str:
    """Of a row: what is asked, of whom, as which sample; 40 characters, which all hosts take."""
    return digest_json([request.prompt_id, request.sample_index, call.path, call.body])[:40]


def _line(name: str, call: Call) -> bytes:
    return json.dumps({"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": call.body}).encode() + b"\n"


def _files(calls: Mapping[str, Call]) -> Iterator[list[tuple[str, bytes]]]:
    """Names and lines, as many together as a host takes in one file."""
    lines: list[tuple[str, bytes]] = []
    size = 0
    for name, call in calls.items():
        line = _line(name, call)
        if lines and (len(lines) == _ROWS or size + len(line) > _BYTES):
            yield lines
            lines, size = [], 0
        lines.append((name, line))
        size += len(line)
    if lines:
        yield lines
