"""The messages between a program and its child process, and how values are packed into them.

Messages are pickled, over pipes that nobody else can reach. What a request computes is said in ``requests``.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ggufmoe.errors import EngineError
from ggufmoe.options import ContextOptions, OffloadOptions
from ggufmoe.placement.load_report import Placement
from ggufmoe.work import Progress

LOADING = 0
"""The id of the answer to ``Start``."""


@dataclass(frozen=True)
class Packed:
    """A pickled value inside a message.

    It is pickled by itself, so that a value that cannot be unpickled in the other process spoils only its own message.
    """

    data: bytes

    @classmethod
    def of(cls, value: object, what: str) -> Packed:
        """Pickle ``value``. Raises EngineError, which calls it ``what``, if it cannot be pickled."""
        try:
            return cls(pickle.dumps(value, pickle.HIGHEST_PROTOCOL))
        except Exception as error:  # classes may raise anything here
            raise EngineError(f"{what} cannot be sent to another process: {error}") from error

    def unpacked(self, what: str) -> Any:
        """The value. Raises EngineError, which calls it ``what``, if it cannot be made here.

        An example is a function of ``__main__``, which another process does not have.
        """
        try:
            return pickle.loads(self.data)
        except Exception as error:  # as above
            raise EngineError(f"{what} cannot be made in another process: {error}") from error


# ---- to the child


@dataclass(frozen=True)
class Start:
    """The first message: load the model at ``path`` with the devices of the workers at ``endpoints`` (IPv4:PORT)."""

    path: Path
    context: ContextOptions
    offload: OffloadOptions
    endpoints: tuple[str, ...]
    log_level: int


@dataclass(frozen=True)
class Ask:
    """Run a ``requests.Request``, packed in ``request``; errors call it ``method``.

    ``is_cancelled``: the caller's cancel flag was already set.
    """

    id: int
    method: str
    request: Packed
    is_cancelled: bool


@dataclass(frozen=True)
class Credit:
    """``n_items`` more items of a stream may be sent. The first credit starts the stream."""

    id: int
    n_items: int


@dataclass(frozen=True)
class Cancel:
    """Set the cancel flag of one request; with None, cancel everything that the engine computes."""

    id: int | None


@dataclass(frozen=True)
class Stop:
    """End a stream, or the request that is about to make it: nobody reads it any more."""

    id: int


# ---- from the child


@dataclass(frozen=True)
class EngineFacts:
    """What does not change while a model is loaded, but for ``n_ctx``; the answer to ``Start``."""

    placement: Placement
    n_ctx: int
    n_vocab: int
    n_ctx_train: int
    bos_token: int | None
    eos_token: int | None
    adds_bos: bool


@dataclass(frozen=True)
class Reply:
    """The result of a request; None for one that made a stream."""

    id: int
    value: Packed


@dataclass(frozen=True)
class Failure:
    """The exception of a request or a stream."""

    id: int
    error: Exception


@dataclass(frozen=True)
class Item:
    """The next item of a stream."""

    id: int
    value: Packed


@dataclass(frozen=True)
class End:
    """A stream has no more items."""

    id: int


@dataclass(frozen=True)
class LoadProgress:
    """How far the model is loaded."""

    id: int
    progress: Progress


@dataclass(frozen=True)
class Logged:
    """A record for the logger of this name."""

    logger: str
    level: int
    text: str


@dataclass(frozen=True)
class Silence:
    """The child ends because workers have given no sign of life for ``seconds``; ``limit`` names the limit."""

    seconds: float
    limit: str


ToChild = Start | Ask | Credit | Cancel | Stop
FromChild = Reply | Failure | Item | End | LoadProgress | Logged | Silence


def encode_message(message: object) -> bytes:
    """The bytes of one message."""
    return pickle.dumps(message, pickle.HIGHEST_PROTOCOL)


def read_messages(stream: IO[bytes]) -> Iterator[Any]:
    """Messages from the other end of a pipe, until it is closed or broken off."""
    while True:
        try:
            message = pickle.load(stream)
        except (EOFError, OSError, pickle.UnpicklingError):
            return
        yield message


def portable_error(error: BaseException) -> Exception:
    """``error`` itself if it can be pickled and would not end a thread of the parent; otherwise an EngineError."""
    try:
        if isinstance(error, Exception) and str(pickle.loads(pickle.dumps(error))) == str(error):
            return error
    except Exception:  # classes may raise anything when they are pickled or made again
        logging.getLogger("ggufmoe").debug("%s cannot be pickled", type(error))
    return EngineError(f"{type(error).__name__}: {error}")
