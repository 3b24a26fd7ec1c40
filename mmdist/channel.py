"""What a program's LLM and rank 0 say to each other: pickled messages over a socket, which ends with either of them."""

from __future__ import annotations

import os
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

VARIABLE = "MMDIST_CHANNEL"  # in rank 0's environment: its end, a file descriptor


class ChannelClosed(Exception):
    """The other side has ended, or this one has closed."""


@dataclass
class Ready:
    """Rank 0's first message: the model is loaded."""

    world_size: int


@dataclass
class Ask:
    """entries: requests as a line of a file has them, with ids. folder: where their relative paths begin. stream: every
    step's outputs are wanted, not the last ones alone."""

    number: int
    entries: list[dict[str, Any]]
    folder: str
    stream: bool


@dataclass
class Stop:
    """Nothing more of this question is wanted."""

    number: int


@dataclass
class News:
    """Of a question: an Output, a UserError that ends it, or None at its end."""

    number: int
    news: Any


class Channel:
    """One end. Any thread may send; one receives."""

    def __init__(self, end: socket.socket):
        self._socket, self._connection = end, Connection(os.dup(end.fileno()))
        self._sending = threading.Lock()

    def send(self, message: Any) -> None:
        with self._sending:
            try:
                self._connection.send(message)
            except OSError as error:
                raise ChannelClosed from error

    def receive(self) -> Any:
        try:
            return self._connection.recv()
        except (EOFError, OSError) as error:
            raise ChannelClosed from error

    def poll(self, timeout_s: float = 0) -> bool:
        """True when something can be received, the end included."""
        try:
            return self._connection.poll(timeout_s)
        except OSError as error:
            raise ChannelClosed from error

    def close(self) -> None:
        """Both sides notice, even where a thread is receiving."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)


def open_pair() -> tuple[socket.socket, socket.socket]:
    """The two ends; no other process that is started inherits them."""
    return socket.socketpair()
