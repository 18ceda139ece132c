"""What an engine in a child process is asked: one frozen object for each method, which runs itself on the engine there.

``ChildEngine`` makes them, ``EngineHost`` runs them. A request whose result is an iterator is a ``StreamRequest``: the
child reads that iterator ahead of the parent. ``Engine`` describes the fields.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from ggufmoe.options import ContextOptions, SamplingOptions
from ggufmoe.runtime.events import Event
from ggufmoe.runtime.local import LocalEngine
from ggufmoe.work import CancelFlag

ResultT = TypeVar("ResultT")
ItemT = TypeVar("ItemT")


class Request(ABC, Generic[ResultT]):
    """A call of one method of the engine; ``method`` is its name, for errors."""

    method: ClassVar[str]

    def __init_subclass__(cls, method: str = "") -> None:
        super().__init_subclass__()
        cls.method = method

    @abstractmethod
    def run(self, engine: LocalEngine, cancel: CancelFlag) -> ResultT:
        """Execute this request on ``engine`` (in the child) and return the result.

        ``cancel`` is the child's copy of the caller's flag.
        """


class StreamRequest(Request[Iterator[ItemT]]):
    """A call of a method whose result is an iterator."""


# ---- text and tokens


@dataclass(frozen=True)
class Tokenize(Request[list[int]], method="tokenize"):
    text: str
    add_bos: bool
    parse_special: bool
    must_fit: bool

    def run(self, engine: LocalEngine, cancel: CancelFlag) -> list[int]:
        return engine.tokenize(
            self.text,
            add_bos=self.add_bos,
            parse_special=self.parse_special,
            must_fit=self.must_fit,
            cancel=cancel,
        )


@dataclass(frozen=True)
class TokenText(Request[str], method="token_text"):
    token: int | None

    def run(self, engine: LocalEngine, cancel: CancelFlag) -> str:
        return engine.token_text(self.token)


@dataclass(frozen=True)
class TokenPiece(Request[bytes], method="piece"):
    token: int
    special: bool

    def run(self, engine: LocalEngine, cancel: CancelFlag) -> bytes:
        return engine.piece(self.token, special=self.special)


@dataclass(frozen=True)
class EndsText(Request[bool], method="ends_text"):
    token: int

    def run(self, engine: LocalEngine, cancel: CancelFlag) -> bool:
        return engine.ends_text(self.token)


@dataclass(frozen=True)
class Detokenize(Request[bytes], method="detokenize"):
    tokens: Sequence[int]
    special: bool

    def run(self, engine: LocalEngine, cancel: CancelFlag) -> bytes:
        return engine.detokenize(self.tokens, special=self.special)


# ---- computing


@dataclass(frozen=True)
class Generate(StreamRequest[Event], method="generate"):
    prompt: Sequence[int]
    sampling: SamplingOptions | None
    stop: str | Sequence[str]
    n_keep: int | None
    shown: Collection[int] = ()
    routing: bool = False

    def run(self, engine: LocalEngine, cancel: CancelFlag) -> Iterator[Event]:
        return engine.generate(
            self.prompt,
            self.sampling,
            stop=self.stop,
            cancel=cancel,
            n_keep=self.n_keep,
            shown=self.shown,
            routing=self.routing,
        )


@dataclass(frozen=True)
class Prefill(Request[int], method="prefill"):
    prompt: Sequence[int]
    every_row: bool

    def run(self, engine: LocalEngine, cancel: CancelFlag) -> int:
        return engine.prefill(self.prompt, cancel=cancel, every_row=self.every_row)


@dataclass(frozen=True)
class Evaluate(Request[float | None], method="evaluate"):
    tokens: Sequence[int]
    one_by_one: bool

    def run(self, engine: LocalEngine, cancel: CancelFlag) -> float | None:
        return engine.evaluate(self.tokens, one_by_one=self.one_by_one, cancel=cancel)


@dataclass(frozen=True)
class Logits(Request[NDArray[np.float32]], method="logits"):
    tokens: Sequence[int]

    def run(self, engine: LocalEngine, cancel: CancelFlag) -> NDArray[np.float32]:
        return engine.logits(self.tokens, cancel=cancel)


@dataclass(frozen=True)
class LogitsByBatch(StreamRequest[NDArray[np.float32]], method="logits_by_batch"):
    tokens: Sequence[int]

    def run(self, engine: LocalEngine, cancel: CancelFlag) -> Iterator[NDArray[np.float32]]:
        return engine.logits_by_batch(self.tokens, cancel=cancel)


@dataclass(frozen=True)
class Embed(Request[NDArray[np.float32]], method="embed"):
    texts: Sequence[str | Sequence[int]]

    def run(self, engine: LocalEngine, cancel: CancelFlag) -> NDArray[np.float32]:
        return engine.embed(self.texts, cancel=cancel)


# ---- the cache, the context and sessions


@dataclass(frozen=True)
class CachedTokens(Request[tuple[int, ...]], method="cached_tokens"):
    def run(self, engine: LocalEngine, cancel: CancelFlag) -> tuple[int, ...]:
        return engine.cached_tokens


@dataclass(frozen=True)
class Forget(Request[None], method="forget"):
    def run(self, engine: LocalEngine, cancel: CancelFlag) -> None:
        engine.forget()


@dataclass(frozen=True)
class SetContext(Request[int], method="set_context"):
    """The result is the new ``n_ctx``."""

    options: ContextOptions

    def run(self, engine: LocalEngine, cancel: CancelFlag) -> int:
        engine.set_context(self.options)
        return engine.n_ctx


@dataclass(frozen=True)
class SaveSession(Request[int], method="save_session"):
    path: Path
    tokens: Sequence[int] | None
    note: str

    def run(self, engine: LocalEngine, cancel: CancelFlag) -> int:
        return engine.save_session(self.path, self.tokens, self.note)


@dataclass(frozen=True)
class LoadSession(Request[tuple[tuple[int, ...], str]], method="load_session"):
    path: Path

    def run(self, engine: LocalEngine, cancel: CancelFlag) -> tuple[tuple[int, ...], str]:
        return engine.load_session(self.path)


# ---- functions of the caller, which must be importable in the child


@dataclass(frozen=True)
class Apply(Request[ResultT], method="apply"):
    function: Callable[..., ResultT]
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]

    def run(self, engine: LocalEngine, cancel: CancelFlag) -> ResultT:
        return engine.apply(self.function, *self.arguments, **self.keywords)


@dataclass(frozen=True)
class Iterate(StreamRequest[ItemT], method="iterate"):
    function: Callable[..., Iterator[ItemT]]
    arguments: tuple[Any, ...]

    def run(self, engine: LocalEngine, cancel: CancelFlag) -> Iterator[ItemT]:
        return engine.iterate(self.function, *self.arguments, cancel=cancel)
