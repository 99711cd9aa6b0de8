"""The bytes of a stream as its events, as they come (WHATWG's server-sent events)."""

from __future__ import annotations

from collections.abc import Iterator

_DONE = b"[DONE]"


class Events:
    """Splits what comes; holds no more than the event that is not whole yet."""

    def __init__(self) -> None:
        self._begun: list[bytes] = []  # pieces of a line, joined once, because one may have megabytes
        self._data: list[bytes] = []
        self._done = False

    @property
    def is_done(self) -> bool:
        """Whether `[DONE]` has come, behind which nothing is; some servers end no line there."""
        return self._done or (len(self._begun) == 1 and self._begun[0].rstrip() == b"data: " + _DONE)

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Data of the events that are whole now; comments, which keep a connection open, and `[DONE]` are left out."""
        if b"\n" not in chunk:
            self._begun += [chunk] if chunk else []
            return
        *lines, rest = b"".join([*self._begun, chunk]).split(b"\n")
        self._begun = [rest] if rest else []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line:
                yield from self._event()

    def end(self) -> Iterator[bytes]:
        """Data of an event that the stream's end ended."""
        yield from self.feed(b"\n\n")

    def _event(self) -> Iterator[bytes]:
        data, self._data = b"\n".join(self._data).strip(), []
        if data == _DONE:
            self._done = True
        elif data:
            yield data
