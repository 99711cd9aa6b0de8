"""What a stage used of a server over all its pieces, what that cost, and the limits that a recipe sets."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distill.errors import BudgetError, IntegrityError
from distill.recipe.servers import Server
from distill.run.files import read_json, write_json
from distill.servers import Usage

SPENDING = "server-spending-{role}.json"
"""Name of the file in a stage's folder, a role each, and each of the processes that share the folder; one of those that `run/owned` knows
as a server's."""
_SAME_SERVER = {"student": "base", "base": "student"}
"""Roles of one section of a recipe, whose limits hold for both together."""
_KEEP_EVERY_S = 1.0  # so much is lost of a piece that is killed


class Spending:
    """Usage of a stage's requests, kept in its folder, so that a stage that goes on after a kill counts those of all its pieces.

    Args:
        folder: Of the stage; null keeps nothing.
        role: Whose model it is: `teacher`, `student`, `base`, a judge; each is counted apart.
        server: With `price`, `max_cost` and `max_tokens`.
        part: Of the stage, where several processes share its folder: each counts for itself.

    Raises:
        IntegrityError: the file was altered.
    """

    def __init__(self, folder: Path | None, role: str, server: Server, part: str = "") -> None:
        self._role, self._server = role, server
        self._file = folder / SPENDING.format(role=f"{role}-{part}" if part else role) if folder is not None else None
        self._lock = threading.Lock()
        self._start_s = self._kept_s = time.monotonic()
        self.usage, self._before_s = Usage(), 0.0
        if self._file is not None and self._file.exists():
            self.usage, self._before_s = _read(self._file)
        self._kept = self.usage
        # One after the other, so that what the other has used is known now.
        others = folder.glob(SPENDING.format(role=f"{_SAME_SERVER[role]}*")) if folder is not None and role in _SAME_SERVER else ()
        self._beside = sum((_read(file)[0] for file in others), Usage())

    @property
    def cost(self) -> float | None:
        """US dollars so far; null where no price is given."""
        return self._cost_of(self.usage)

    def _cost_of(self, used: Usage) -> float | None:
        price = self._server.price
        if price is None:
            return None
        cached = price.input if price.cached_input is None else price.cached_input
        read = (used.input_tokens - used.cached_tokens) * price.input + used.cached_tokens * cached
        return (read + used.output_tokens * price.output) / 1e6

    @property
    def is_exhausted(self) -> bool:
        """Whether a limit is reached: nothing new is to be sent."""
        limits, used = self._server, self.usage + self._beside
        tokens = used.input_tokens + used.output_tokens
        return (limits.max_tokens is not None and tokens >= limits.max_tokens) or (
            limits.max_cost is not None and (self._cost_of(used) or 0.0) >= limits.max_cost
        )

    def add(self, usage: Usage) -> None:
        """Counts a request; at most a second later that is on disk."""
        with self._lock:
            self.usage += usage
        if time.monotonic() - self._kept_s >= _KEEP_EVERY_S:
            self.keep()

    def keep(self) -> None:
        """Writes down what was used, if that is more than before: a stage that has finished has removed the file."""
        with self._lock:
            self._kept_s = time.monotonic()
            if self._file is not None and self._file.parent.is_dir() and self.usage != self._kept:
                self._kept = self.usage
                write_json(self._file, {"usage": asdict(self.usage), "seconds": round(self._seconds, 2)})

    def check(self) -> None:
        """Nothing, unless a limit is reached.

        Raises:
            BudgetError: it is; says which key to raise.
        """
        if not self.is_exhausted:
            return
        used, most = self.usage + self._beside, self._server.max_tokens
        tokens = used.input_tokens + used.output_tokens
        of_tokens = most is not None and tokens >= most
        key, limit = ("max_tokens", f"{most:,}") if of_tokens else ("max_cost", f"${self._server.max_cost or 0:,.2f}")
        cost = "" if self.cost is None else f", ${self._cost_of(used):,.2f}"
        section = "student" if self._role == "base" else self._role
        raise BudgetError(
            f"{section}.server.{key}: {limit} is reached: {tokens:,} tokens{cost} in {used.requests:,} requests. All that was "
            f"written is kept; raise {key} and run this again, and it goes on."
        )

    def facts(self) -> dict[str, Any]:
        """For the manifest: requests, retries, tokens, US dollars (null: no price), seconds, and tokens written a second."""
        return self._facts(self.usage, self._seconds)

    def facts_of_all(self) -> dict[str, Any]:
        """The same of all processes that have shared the folder, each of which wrote down what it used."""
        self.keep()
        usage, seconds = self.usage, self._seconds
        pattern = SPENDING.format(role=f"{self._role}*")
        for file in self._file.parent.glob(pattern) if self._file is not None else ():
            if file != self._file:
                more, longer = _read(file)
                usage, seconds = usage + more, seconds + longer
        return self._facts(usage, seconds)

    def _facts(self, usage: Usage, seconds: float) -> dict[str, Any]:
        cost = self._cost_of(usage)
        rate = round(usage.output_tokens / seconds, 1) if seconds else None
        cents = None if cost is None else round(cost, 6)
        return asdict(usage) | {"cost_usd": cents, "seconds": round(seconds, 2), "tokens_per_s": rate}

    @property
    def _seconds(self) -> float:
        return self._before_s + time.monotonic() - self._start_s


def spent_in(folder: Path, role: str, server: Server) -> dict[str, Any] | None:
    """What a stage under way has used so far, as `Spending.facts` tells it; null where nothing was written down. Writes nothing.

    Raises:
        IntegrityError: a file was altered.
    """
    told = [_read(file) for file in folder.glob(SPENDING.format(role=f"{role}*"))]
    if not told:
        return None
    usage = sum((used for used, _ in told), Usage())
    return Spending(None, role, server)._facts(usage, sum(seconds for _, seconds in told))


def shared(server: Server, parts: int) -> Server:
    """A server whose limits are the share of one of so many parts of a stage."""
    if parts == 1:
        return server
    cost, tokens = server.max_cost, server.max_tokens
    return server.model_copy(
        update={
            "max_cost": None if cost is None else cost / parts,
            "max_tokens": None if tokens is None else max(1, tokens // parts),
        }
    )


def _read(file: Path) -> tuple[Usage, float]:
    """Usage and seconds of a file.

    Raises:
        IntegrityError: it was altered.
    """
    told = read_json(file)
    try:
        return Usage(**told["usage"]), float(told["seconds"])
    except (KeyError, TypeError, ValueError):
        raise IntegrityError(f"{file}: is damaged. Delete it, and counting begins anew.") from None
