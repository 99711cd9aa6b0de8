"""Messages between the process of an answer's code and that of the tests: JSON, a line each, over one socket."""

from __future__ import annotations

import json
import socket
from typing import Any


class Closed(BaseException):
    """The other side has ended, or has written something that is no message."""


class Channel:
    """One end.

    Args:
        fd: Of the socket.
        most: Bytes of a message; a longer one is no message.
    """

    def __init__(self, fd: int, most: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._lines = self._socket.makefile("rb")
        self._most = most

    def send(self, message: dict[str, Any]) -> None:
        """Writes a message.

        Raises:
            Closed: nobody reads it, or it is too long.
        """
        line = json.dumps(message).encode() + b"\n"
        if len(line) > self._most:
            raise Closed("too long")
        try:
            self._socket.sendall(line)
        except OSError as error:
            raise Closed from error

    def receive(self) -> dict[str, Any]:
        """The next message.

        Raises:
            Closed: there is none.
        """
        try:
            line = self._lines.readline(self._most + 1)
            message = json.loads(line) if line.endswith(b"\n") else None
        except (OSError, ValueError, RecursionError) as error:
            raise Closed from error
        if not isinstance(message, dict):
            raise Closed("ended" if not line else "no message")
        return message
