"""``ChildEngine``: a loaded model in a process of its own, for models of which workers compute a part.

llama.cpp ends its process when a worker is lost, and waits without end for one that hangs. Here that process is a child
(``host``), and its end is an exception. Each method sends one of ``requests``; ``ggufmoe.Engine`` describes them.
Paths are sent as absolute ones: the working directory of the child is the one in which it was started.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Concatenate

import numpy as np
from numpy.typing import NDArray

from ggufmoe.errors import EngineError
from ggufmoe.files import StrPath, possible_path, user_path
from ggufmoe.gguf.header import Header
from ggufmoe.gguf.hyper import Hyper
from ggufmoe.gguf.model import read_model_header
from ggufmoe.options import ContextOptions, OffloadOptions, OverflowPolicy, SamplingOptions
from ggufmoe.placement.load_report import Placement
from ggufmoe.remote.link import EngineLink
from ggufmoe.remote.requests import (
    Apply,
    CachedTokens,
    Detokenize,
    Embed,
    EndsText,
    Evaluate,
    Forget,
    Generate,
    Iterate,
    LoadSession,
    Logits,
    LogitsByBatch,
    Prefill,
    SaveSession,
    SetContext,
    Tokenize,
    TokenPiece,
    TokenText,
)
from ggufmoe.remote.rpc import answer_seconds, find_workers
from ggufmoe.remote.wire import Cancel, Start
from ggufmoe.runtime.chunkbatch import ComputedPart
from ggufmoe.runtime.enginelike import P, ResultT, TensorObserver, TokenFilter, described
from ggufmoe.runtime.events import Event
from ggufmoe.runtime.local import LocalEngine
from ggufmoe.work import CancelFlag, OnProgress

_CLOSE_S = 5.0
"""Time for the child to free its memory before it is killed. Workers free theirs when it has ended."""


@described
class ChildEngine:
    """The model in the GGUF file at ``path``, loaded in a child process with the workers of ``offload.rpc``.

    Raises WorkerError when a worker cannot be used, WorkerLostError when one is lost while loading or later; from then
    on every call raises the same. Graphs cannot be ``observed``, and chunks not be compared, from this process.
    """

    def __init__(
        self,
        path: StrPath,
        context: ContextOptions,
        offload: OffloadOptions,
        *,
        on_progress: OnProgress | None = None,
        cancel: CancelFlag | None = None,
    ) -> None:
        model = read_model_header(possible_path(path))
        self.path: Path = model.paths[0]
        self.header: Header = model.shards[0].header
        self._context_options = context
        self._offload_options = offload
        devices = find_workers(offload.workers, answer_seconds(offload))
        endpoints = dict.fromkeys(device.endpoint for device in devices)
        level = logging.getLogger("ggufmoe").getEffectiveLevel()
        self._link = EngineLink(self.path, offload)
        try:
            start = Start(user_path(path), context, offload, tuple(endpoints), level)
            self._facts = facts = self._link.load(start, on_progress, cancel)
        except BaseException:
            self._link.close(0.0)
            raise
        self.placement: Placement = facts.placement
        self.n_ctx: int = facts.n_ctx
        self.n_vocab: int = facts.n_vocab
        self.n_ctx_train: int = facts.n_ctx_train

    # ---- the model

    @property
    def n_expert_used(self) -> int:
        return self._offload_options.n_expert_used or Hyper.of(self.header.metadata).n_expert_used

    @property
    def bos_token(self) -> int | None:
        self._link.check_open()
        return self._facts.bos_token

    @property
    def eos_token(self) -> int | None:
        self._link.check_open()
        return self._facts.eos_token

    @property
    def adds_bos(self) -> bool:
        self._link.check_open()
        return self._facts.adds_bos

    @property
    def overflow(self) -> OverflowPolicy:
        return self._context_options.overflow_policy

    @property
    def cached_tokens(self) -> tuple[int, ...]:
        return self._link.ask(CachedTokens())

    def token_text(self, token: int | None) -> str:
        return self._link.ask(TokenText(token))

    # ---- text and tokens

    def tokenize(
        self,
        text: str,
        *,
        add_bos: bool = True,
        parse_special: bool = False,
        must_fit: bool = False,
        cancel: CancelFlag | None = None,
    ) -> list[int]:
        return self._link.ask(Tokenize(text, add_bos, parse_special, must_fit), cancel)

    def piece(self, token: int, *, special: bool = False) -> bytes:
        return self._link.ask(TokenPiece(token, special))

    def ends_text(self, token: int) -> bool:
        return self._link.ask(EndsText(token))

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> bytes:
        return self._link.ask(Detokenize(tokens, special))

    # ---- computing

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
        if sampling is not None:
            sampling = replace(
                sampling,
                grammar_file=sampling.grammar_file and sampling.grammar_file.absolute(),
                json_schema_file=sampling.json_schema_file and sampling.json_schema_file.absolute(),
            )
        return self._link.stream(Generate(prompt, sampling, stop, n_keep, shown, routing), cancel)

    def cancel(self) -> None:
        self._link.send(Cancel(None))

    def forget(self) -> None:
        self._link.ask(Forget())

    def prefill(self, prompt: Sequence[int], *, cancel: CancelFlag | None = None, every_row: bool = False) -> int:
        return self._link.ask(Prefill(prompt, every_row), cancel)

    def evaluate(
        self, tokens: Sequence[int], *, one_by_one: bool = False, cancel: CancelFlag | None = None
    ) -> float | None:
        return self._link.ask(Evaluate(tokens, one_by_one), cancel)

    def logits(self, tokens: Sequence[int], *, cancel: CancelFlag | None = None) -> NDArray[np.float32]:
        return self._link.ask(Logits(tokens), cancel)

    def logits_by_batch(
        self, tokens: Sequence[int], *, cancel: CancelFlag | None = None
    ) -> Iterator[NDArray[np.float32]]:
        return self._link.stream(LogitsByBatch(tokens), cancel)

    def embed(self, texts: Sequence[str | Sequence[int]], *, cancel: CancelFlag | None = None) -> NDArray[np.float32]:
        return self._link.ask(Embed(texts), cancel)

    def compute_chunks(
        self, chunks: Sequence[Sequence[int]], first: int, *, cancel: CancelFlag | None = None
    ) -> Generator[ComputedPart, None, None]:
        """Raises EngineError: the logits of every row would have to cross to this process."""
        raise EngineError(f"{self.path}: logits of a whole text are not compared with workers; leave out --rpc")

    def set_context(self, options: ContextOptions) -> None:
        self.n_ctx = self._link.ask(SetContext(options))
        self._context_options = options

    def observed(
        self, observer: TensorObserver, *, on_token: TokenFilter | None = None
    ) -> AbstractContextManager[None]:
        """Raises EngineError: the observer would have to be in the process that computes."""
        raise EngineError(
            f"{self.path}: with workers (--rpc) the graph is computed in another process and cannot be watched from "
            "here; trace_routing works, RoutingTracer needs an engine without --rpc"
        )

    # ---- sessions and functions of the caller

    def save_session(self, path: StrPath, tokens: Sequence[int] | None = None, note: str = "") -> int:
        return self._link.ask(SaveSession(user_path(path).absolute(), tokens, note))

    def load_session(self, path: StrPath) -> tuple[tuple[int, ...], str]:
        return self._link.ask(LoadSession(user_path(path).absolute()))

    def apply(
        self, function: Callable[Concatenate[LocalEngine, P], ResultT], *arguments: P.args, **keywords: P.kwargs
    ) -> ResultT:
        return self._link.ask(Apply(function, arguments, keywords))

    def iterate(
        self, function: Callable[..., Iterator[ResultT]], *arguments: Any, cancel: CancelFlag | None = None
    ) -> Iterator[ResultT]:
        return self._link.stream(Iterate(function, arguments), cancel)

    # ---- the end

    @property
    def closed(self) -> bool:
        """Whether it was closed, or its process has ended."""
        return self._link.has_ended

    def close(self) -> None:
        """End the process; takes up to 5 s if a worker hangs."""
        link = getattr(self, "_link", None)
        if link is not None:
            link.close(_CLOSE_S)

    def __del__(self) -> None:
        self.close()
