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
"""Name of the file in a stage's folder, a role each; one of those that `run/owned` knows as a server's."""
_KEEP_EVERY_S = 1.0  # so much is lost of a piece that is killed


class Spending:
    """Usage of a stage's requests, kept in its folder, so that a stage that goes on after a kill counts those of all its pieces.

    Args:
        folder: Of the stage; null keeps nothing.
        role: Whose model it is: `teacher`, `student`, `base`; each is counted apart.
        server: With `price`, `max_cost` and `max_tokens`.

    Raises:
        IntegrityError: the file was altered.
    """

    def __init__(self, folder: Path | None, role: str, server: Server) -> None:
        self._role, self._server = role, server
        self._file = folder / SPENDING.format(role=role) if folder is not None else None
        self._lock = threading.Lock()
        self._start_s = self._kept_s = time.monotonic()
        self.usage, self._before_s = Usage(), 0.0
        if self._file is not None and self._file.exists():
            told = read_json(self._file)
            try:
                self.usage, self._before_s = Usage(**told["usage"]), float(told["seconds"])
            except (KeyError, TypeError, ValueError):
                raise IntegrityError(f"{self._file}: is damaged. Delete it, and counting begins anew.") from None

    @property
    def cost(self) -> float | None:
        """US dollars so far; null where no price is given."""
        price = self._server.price
        if price is None:
            return None
        cached = price.input if price.cached_input is None else price.cached_input
        used = self.usage
        read = (used.input_tokens - used.cached_tokens) * price.input + used.cached_tokens * cached
        return (read + used.output_tokens * price.output) / 1e6

    @property
    def is_exhausted(self) -> bool:
        """Whether a limit is reached: nothing new is to be sent."""
        limits = self._server
        tokens = self.usage.input_tokens + self.usage.output_tokens
        return (limits.max_tokens is not None and tokens >= limits.max_tokens) or (
            limits.max_cost is not None and (self.cost or 0.0) >= limits.max_cost
        )

    def add(self, usage: Usage) -> None:
        """Counts a request; at most a second later that is on disk."""
        with self._lock:
            self.usage += usage
        if time.monotonic() - self._kept_s >= _KEEP_EVERY_S:
            self.keep()

    def keep(self) -> None:
        """Writes down what was used."""
        with self._lock:
            self._kept_s = time.monotonic()
            if self._file is not None and self._file.parent.is_dir():
                write_json(self._file, {"usage": asdict(self.usage), "seconds": round(self._seconds, 2)})

    def check(self) -> None:
        """Nothing, unless a limit is reached.

        Raises:
            BudgetError: it is; says which key to raise.
        """
        if not self.is_exhausted:
            return
        tokens, most = self.usage.input_tokens + self.usage.output_tokens, self._server.max_tokens
        of_tokens = most is not None and tokens >= most
        key, limit = ("max_tokens", f"{most:,}") if of_tokens else ("max_cost", f"${self._server.max_cost or 0:,.2f}")
        cost = "" if self.cost is None else f", ${self.cost:,.2f}"
        raise BudgetError(
            f"{self._role}.server.{key}: {limit} is reached: {tokens:,} tokens{cost} in {self.usage.requests:,} requests. All that was "
            f"written is kept; raise {key} and run this again, and it goes on."
        )

    def facts(self) -> dict[str, Any]:
        """For the manifest: requests, retries, tokens, US dollars (null: no price), seconds, and tokens written a second."""
        seconds = self._seconds
        used = asdict(self.usage)
        rate = round(self.usage.output_tokens / seconds, 1) if seconds else None
        return used | {"cost_usd": None if self.cost is None else round(self.cost, 6), "seconds": round(seconds, 2), "tokens_per_s": rate}

    @property
    def _seconds(self) -> float:
        return self._before_s + time.monotonic() - self._start_s
