"""What every engine can be asked, wherever it computes: the type of engines for code that does not choose one.

``ggufmoe.Engine`` satisfies this protocol and describes its members at length. So do the two engines behind it, which
have their docstrings from here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
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
EngineT = TypeVar("EngineT", bound="EngineLike")

TensorObserver = Callable[[int, bool], bool]
"""``observer(tensor, ask)``: the address of a ``ggml_tensor``, and whether this asks if the tensor is wanted."""
TokenFilter = Callable[[Token], Token]
"""Takes each new token and returns the one that the reader gets."""


class EngineLike(Protocol):
    """A loaded model: text and tokens, answers, logits, sessions and the end."""

    @property
    def path(self) -> Path:
        """The model's file; the first one, when it is split."""
        ...

    @property
    def header(self) -> Header:
        """The header of that file."""
        ...

    @property
    def placement(self) -> Placement:
        """Where weights, KV cache and buffers are, as planned and as llama.cpp reported it."""
        ...

    @property
    def n_ctx(self) -> int:
        """Tokens that prompt and answer may have together."""
        ...

    @property
    def n_vocab(self) -> int:
        """Number of tokens in the vocabulary."""
        ...

    @property
    def n_ctx_train(self) -> int:
        """Tokens of context that the model was trained for."""
        ...

    @property
    def n_expert_used(self) -> int:
        """Experts that are chosen for each token; 0 for a dense model."""
        ...

    @property
    def bos_token(self) -> int | None:
        """Id of the token that begins a text; None if the model has none."""
        ...

    @property
    def eos_token(self) -> int | None:
        """Id of the token that ends a text; None if the model has none."""
        ...

    @property
    def adds_bos(self) -> bool:
        """Whether a prompt of this model begins with its BOS token."""
        ...

    @property
    def overflow(self) -> OverflowPolicy:
        """What is done with a text that is longer than the context."""
        ...

    @property
    def cached_tokens(self) -> tuple[int, ...]:
        """The tokens whose keys and values the KV cache holds."""
        ...

    @property
    def closed(self) -> bool:
        """Whether the engine was closed, or the process that computes has ended."""
        ...

    def token_text(self, token: int | None) -> str:
        """A token as the vocabulary spells it (``<s>``); empty for None."""
        ...

    def tokenize(
        self,
        text: str,
        *,
        add_bos: bool = True,
        parse_special: bool = False,
        must_fit: bool = False,
        cancel: CancelFlag | None = None,
    ) -> list[int]:
        """Token ids of ``text``. Raises ContextFullError with ``must_fit``, and Cancelled."""
        ...

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of one token; those of a control token are empty unless ``special``."""
        ...

    def ends_text(self, token: int) -> bool:
        """Whether the model ends its text with this token."""
        ...

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> bytes:
        """The bytes of several tokens, one after another."""
        ...

    def generate(
        self,
        prompt: Sequence[int],
        sampling: SamplingOptions | None = None,
        *,
        stop: str | Sequence[str] = (),
        cancel: CancelFlag | None = None,
        n_keep: int | None = None,
        shown: Collection[int] = (),
        routing: bool = False,
    ) -> Iterator[Event]:
        """Continue ``prompt``: an iterator of a ``Token`` for each new token, then one ``Finished``."""
        ...

    def cancel(self) -> None:
        """Cancel every answer, computation and tokenizing that has begun."""
        ...

    def forget(self) -> None:
        """Empty the KV cache, and drop the copies of other conversations."""
        ...

    def prefill(self, prompt: Sequence[int], *, cancel: CancelFlag | None = None, every_row: bool = False) -> int:
        """Compute ``prompt`` into the KV cache; the number of tokens computed. Raises Cancelled."""
        ...

    def evaluate(
        self, tokens: Sequence[int], *, one_by_one: bool = False, cancel: CancelFlag | None = None
    ) -> float | None:
        """Compute ``tokens`` after those in the KV cache; the seconds that it took, or None if it was cancelled."""
        ...

    def logits(self, tokens: Sequence[int], *, cancel: CancelFlag | None = None) -> NDArray[np.float32]:
        """Logits after each token: float32, (n_tokens, n_vocab). Raises Cancelled."""
        ...

    def logits_by_batch(
        self, tokens: Sequence[int], *, cancel: CancelFlag | None = None
    ) -> Iterator[NDArray[np.float32]]:
        """The rows of ``logits``, at most 512 at a time."""
        ...

    def embed(self, texts: Sequence[str | Sequence[int]], *, cancel: CancelFlag | None = None) -> NDArray[np.float32]:
        """The mean hidden state of each text, of length 1: float32, (n_texts, n_embd). Raises Cancelled."""
        ...

    def compute_chunks(
        self, chunks: Sequence[Sequence[int]], first: int, *, cancel: CancelFlag | None = None
    ) -> Generator[ComputedPart, None, None]:
        """Compute independent texts of one length, with logits from position ``first`` on."""
        ...

    def set_context(self, options: ContextOptions) -> None:
        """Replace the context by one with other options; the KV cache is lost."""
        ...

    def observed(
        self, observer: TensorObserver, *, on_token: TokenFilter | None = None
    ) -> AbstractContextManager[None]:
        """While the block runs, show every node of the graphs that llama.cpp computes to ``observer``."""
        ...

    def save_session(self, path: StrPath, tokens: Sequence[int] | None = None, note: str = "") -> int:
        """Write the KV cache to a file; the number of tokens in it."""
        ...

    def load_session(self, path: StrPath) -> tuple[tuple[int, ...], str]:
        """Fill the KV cache from a file of ``save_session``; the tokens in it, and the note."""
        ...

    def apply(
        self, function: Callable[Concatenate[EngineLike, P], ResultT], *arguments: P.args, **keywords: P.kwargs
    ) -> ResultT:
        """Call ``function(engine, ...)`` in the process in which llama.cpp computes; its result."""
        ...

    def iterate(
        self, function: Callable[..., Iterator[ResultT]], *arguments: Any, cancel: CancelFlag | None = None
    ) -> Iterator[ResultT]:
        """What ``function(engine, *arguments, cancel=cancel)`` yields in the process in which llama.cpp computes."""
        ...

    def close(self) -> None:
        """Give back all memory. May be called again."""
        ...


def described(engine: type[EngineT]) -> type[EngineT]:
    """Decorate a class of engines: members without a docstring get the one of ``EngineLike``."""
    for name, member in vars(engine).items():
        if not name.startswith("_") and not member.__doc__:
            member.__doc__ = getattr(EngineLike, name).__doc__
    return engine
