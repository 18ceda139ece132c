"""What every engine can be asked, wherever it computes: the type of engines for code that does not choose one.

``ggufmoe.Engine`` describes each member. It satisfies this protocol itself, and so do the two engines behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ggufmoe.files import StrPath
from ggufmoe.gguf.header import Header
from ggufmoe.options import ContextOptions, OverflowPolicy, SamplingOptions
from ggufmoe.placement.load_report import Placement
from ggufmoe.runtime.chunkbatch import ComputedPart
from ggufmoe.runtime.events import Event, Token
from ggufmoe.work import CancelFlag

P = ParamSpec("P")
ResultT = TypeVar("ResultT")

TensorObserver = Callable[[int, bool], bool]
"""``observer(tensor, ask)``: the address of a ``ggml_tensor``, and whether this asks if the tensor is wanted."""
TokenFilter = Callable[[Token], Token]
"""Takes each new token and returns the one that the reader gets."""


class EngineLike(Protocol):
    """A loaded model: text and tokens, answers, logits, sessions and the end."""

    @property
    def path(self) -> Path: ...

    @property
    def header(self) -> Header: ...

    @property
    def placement(self) -> Placement: ...

    @property
    def n_ctx(self) -> int: ...

    @property
    def n_vocab(self) -> int: ...

    @property
    def n_ctx_train(self) -> int: ...

    @property
    def bos_token(self) -> int | None: ...

    @property
    def eos_token(self) -> int | None: ...

    @property
    def adds_bos(self) -> bool: ...

    @property
    def overflow(self) -> OverflowPolicy: ...

    @property
    def cached_tokens(self) -> tuple[int, ...]: ...

    @property
    def closed(self) -> bool: ...

    def token_text(self, token: int | None) -> str: ...

    def tokenize(self, text: str, *, add_bos: bool = True, parse_special: bool = False) -> list[int]: ...

    def piece(self, token: int, *, special: bool = False) -> bytes: ...

    def ends_text(self, token: int) -> bool: ...

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> bytes: ...

    def generate(
        self,
        prompt: Sequence[int],
        sampling: SamplingOptions | None = None,
        *,
        stop: str | Sequence[str] = (),
        cancel: CancelFlag | None = None,
        n_keep: int | None = None,
    ) -> Iterator[Event]: ...

    def cancel(self) -> None: ...

    def forget(self) -> None: ...

    def prefill(self, prompt: Sequence[int], *, cancel: CancelFlag | None = None, every_row: bool = False) -> int: ...

    def evaluate(
        self, tokens: Sequence[int], *, one_by_one: bool = False, cancel: CancelFlag | None = None
    ) -> float | None: ...

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]: ...

    def logits_by_batch(self, tokens: Sequence[int]) -> Iterator[NDArray[np.float32]]: ...

    def compute_chunks(
        self, chunks: Sequence[Sequence[int]], first: int, *, cancel: CancelFlag | None = None
    ) -> Generator[ComputedPart, None, None]: ...

    def set_context(self, options: ContextOptions) -> None: ...

    def observed(
        self, observer: TensorObserver, *, on_token: TokenFilter | None = None
    ) -> AbstractContextManager[None]: ...

    def save_session(self, path: StrPath, tokens: Sequence[int] | None = None, note: str = "") -> int: ...

    def load_session(self, path: StrPath) -> tuple[tuple[int, ...], str]: ...

    def apply(
        self, function: Callable[Concatenate[EngineLike, P], ResultT], *arguments: P.args, **keywords: P.kwargs
    ) -> ResultT: ...

    def iterate(
        self, function: Callable[..., Iterator[ResultT]], *arguments: Any, cancel: CancelFlag | None = None
    ) -> Iterator[ResultT]: ...

    def close(self) -> None: ...
