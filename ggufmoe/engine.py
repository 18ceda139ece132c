"""``Engine``: one loaded model as users of the library see it.

Owns the contract: what each call gives, what it raises, and where the model is computed. The work is done by a runner:
``LocalEngine`` in this process, or ``ChildEngine`` in a child process where workers on other machines take part.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate

import numpy as np
from numpy.typing import NDArray

from ggufmoe.files import StrPath
from ggufmoe.gguf.header import Header
from ggufmoe.options import ContextOptions, OffloadOptions, OverflowPolicy, SamplingOptions, options_of
from ggufmoe.placement.load_report import Placement
from ggufmoe.remote.child import ChildEngine
from ggufmoe.runtime.asyncstream import call_async, read_async
from ggufmoe.runtime.chunkbatch import ComputedPart
from ggufmoe.runtime.enginelike import EngineLike, P, ResultT, TensorObserver, TokenFilter
from ggufmoe.runtime.events import Event
from ggufmoe.runtime.local import LocalEngine
from ggufmoe.work import CancelFlag, OnProgress, checked_flag


class Engine:
    """A model ready to generate, from the GGUF file at ``path`` (any one of them, when it is split).

    Use it with ``with``, or ``close`` it. With ``offload.rpc`` workers on other machines compute a part of the model;
    then llama.cpp runs in a child process, and a worker that is lost is an exception.

    Every method may be called from any thread. An engine computes in one thread: callers take turns, first come, first
    served; up to ``ContextOptions.n_parallel`` answers are computed in one batch. A second thread tokenizes meanwhile.
    Arguments and results of all methods can be pickled, but for ``observed`` and ``on_progress``, which take functions.

    ``on_progress`` gets a ``Progress`` of the phase ``load``, whose ``done`` runs from 0 to 1, in a thread of the
    engine; what it raises ends the loading and is raised here. Loading also ends when ``cancel`` is set.

    Raises GGUFError for a file that is corrupt or of the old layout with one tensor per expert, OptionError for options
    that do not fit the model or the machine, ModelLoadError when llama.cpp refuses the model or the memory cannot hold
    the context, Cancelled, EngineMissingError without llama-cpp-python, EngineLostError when llama.cpp gives up (an
    assertion of its own fails): then this engine is lost with its memory, also for every later call, and other engines
    go on. Calls that compute raise DecodeError for a model whose logits are NaN. With workers: WorkerError when one
    cannot be used, WorkerLostError when one is lost, also from every later call.
    """

    _runner: EngineLike

    def __init__(
        self,
        path: StrPath,
        context: ContextOptions | None = None,
        offload: OffloadOptions | None = None,
        *,
        on_progress: OnProgress | None = None,
        cancel: CancelFlag | None = None,
    ) -> None:
        checked_flag(cancel)
        context = options_of(ContextOptions, context)
        offload = options_of(OffloadOptions, offload)
        runner = ChildEngine if offload.workers else LocalEngine
        self._runner = runner(path, context, offload, on_progress=on_progress, cancel=cancel)

    # ---- what the model is

    @property
    def path(self) -> Path:
        """The model's file; the first one, when it is split."""
        return self._runner.path

    @property
    def header(self) -> Header:
        """The header of that file."""
        return self._runner.header

    @property
    def placement(self) -> Placement:
        """Where weights, KV cache and buffers are: the plan, what llama.cpp reported, and how the two differ."""
        return self._runner.placement

    @property
    def n_ctx(self) -> int:
        """Tokens that prompt and answer may have together; llama.cpp rounds the requested number up to 256.

        Answers that are computed at the same time (``ContextOptions.n_parallel``) have so many together; each alone may
        have all of them. With ``ContextOptions.n_seq_max`` above 1 it is the share of each of the texts that are
        computed side by side.
        """
        return self._runner.n_ctx

    @property
    def n_vocab(self) -> int:
        """Number of tokens in the vocabulary."""
        return self._runner.n_vocab

    @property
    def n_ctx_train(self) -> int:
        """Tokens of context that the model was trained for."""
        return self._runner.n_ctx_train

    @property
    def n_expert_used(self) -> int:
        """Experts that are chosen for each token: what ``OffloadOptions`` or the file says; 0 for a dense model."""
        return self._runner.n_expert_used

    @property
    def bos_token(self) -> int | None:
        """Id of the token that begins a text, if the model has one."""
        return self._runner.bos_token

    @property
    def eos_token(self) -> int | None:
        """Id of the token that ends a text, if the model has one."""
        return self._runner.eos_token

    @property
    def adds_bos(self) -> bool:
        """Whether a prompt of this model begins with its BOS token."""
        return self._runner.adds_bos

    @property
    def overflow(self) -> OverflowPolicy:
        """What is done with a text that is longer than the context: ``error``, ``shift`` or ``truncate-middle``."""
        return self._runner.overflow

    @property
    def cached_tokens(self) -> tuple[int, ...]:
        """The tokens whose keys and values the KV cache holds at this moment; of several texts, that used last."""
        return self._runner.cached_tokens

    def token_text(self, token: int | None) -> str:
        """A token as the vocabulary spells it (``<s>``); empty for None."""
        return self._runner.token_text(token)

    def metadata(self, key: str) -> Any:
        """A value of the file's metadata, or None."""
        return self.header.get(key)

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
        """Token ids of ``text``; with ``add_bos`` the BOS token comes first where the model wants one.

        With ``parse_special``, special tokens that are written out (``</s>``) become those tokens. No EOS is added.
        ``must_fit`` raises ContextFullError instead of tokenizing the rest of a text that certainly leaves no room in
        the context; a text that comes close is tokenized. Raises Cancelled when ``cancel`` is set meanwhile
        or ``cancel()`` called.
        """
        return self._runner.tokenize(
            text, add_bos=add_bos, parse_special=parse_special, must_fit=must_fit, cancel=cancel
        )

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of one token; those of a control token are empty unless ``special``."""
        return self._runner.piece(token, special=special)

    def ends_text(self, token: int) -> bool:
        """Whether the model ends its text with this token (EOS, or an end of turn)."""
        return self._runner.ends_text(token)

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> bytes:
        """The bytes of several tokens, one after another, as ``piece`` gives them."""
        return self._runner.detokenize(tokens, special=special)

    # ---- generation

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
        """Continue ``prompt``: an iterator of a ``Token`` for each new token, then one ``Finished``.

        The part of the prompt that is already in the KV cache, or in the copy of an earlier conversation, is not
        computed again. The answer ends when the model ends it, after ``n_predict`` tokens, at a ``stop`` string (which
        is not part of the answer), when the context is full and ``overflow`` is ``error``, and when ``cancel`` is set
        or ``cancel()`` called, also while the prompt is computed. Closing the iterator ends it too.

        Computing begins when the iterator is first asked, after the calls that came earlier. It runs a few dozen tokens
        ahead of its reader at most. If the reader falls behind, the answer is suspended and other callers are served;
        so one answer may be read to its end between two tokens of another, in any thread. ``n_keep`` replaces the
        context's own number of tokens that always stay, for overflow. Control tokens have no text, except those in
        ``shown``, which are written as the vocabulary spells them.

        With ``routing`` each token is a ``RoutedToken``, which tells the experts that were at work in the step whose
        logits it was drawn from. Answers with and without it may be computed at the same time. The first call with it
        replaces the context by one that can tell; texts in the KV cache are kept as far as ``cache_ram`` has room.

        Raises ContextFullError if the prompt leaves no room for a single token and may not be cut, InputError if it is
        empty, the grammar cannot be used or ``routing`` is asked of a model without experts, EngineError once the
        engine is closed.
        """
        return self._runner.generate(
            prompt, sampling, stop=stop, cancel=cancel, n_keep=n_keep, shown=shown, routing=routing
        )

    def generate_async(
        self,
        prompt: Sequence[int],
        sampling: SamplingOptions | None = None,
        *,
        stop: str | Sequence[str] = (),
        cancel: CancelFlag | None = None,
        n_keep: int | None = None,
        shown: Collection[int] = (),
        routing: bool = False,
    ) -> AsyncIterator[Event]:
        """``generate`` for ``async for``. Cancelling the task, or ``aclose``, ends the computing."""

        def start(flag: CancelFlag) -> Iterator[Event]:
            return self.generate(prompt, sampling, stop=stop, cancel=flag, n_keep=n_keep, shown=shown, routing=routing)

        return read_async(start, cancel)

    def cancel(self) -> None:
        """Cancel every answer, computation and tokenizing that has begun. Answers end with the reason ``cancelled``.

        Meant to be called from another thread.
        """
        self._runner.cancel()

    # ---- the cache

    def forget(self) -> None:
        """Empty the KV cache, and drop the copies of other conversations."""
        self._runner.forget()

    def prefill(self, prompt: Sequence[int], *, cancel: CancelFlag | None = None, every_row: bool = False) -> int:
        """Compute ``prompt`` into the KV cache, for answers that will begin with it; the number of tokens computed.

        No other call is computed in between. ``every_row`` computes the logits of every token, and all of the prompt
        anew; an observer may need that. Raises Cancelled, and ContextFullError if the prompt leaves no room for a
        single token. A cancelled computation may stay in llama.cpp for a while, and the next call waits for it.
        """
        return self._runner.prefill(prompt, cancel=cancel, every_row=every_row)

    def evaluate(
        self, tokens: Sequence[int], *, one_by_one: bool = False, cancel: CancelFlag | None = None
    ) -> float | None:
        """Compute ``tokens`` after those in the KV cache, in batches, or ``one_by_one`` as answers are computed.

        The seconds that it took, until the devices had finished; None if it was cancelled. Raises what ``generate``
        raises.
        """
        return self._runner.evaluate(tokens, one_by_one=one_by_one, cancel=cancel)

    def set_context(self, options: ContextOptions) -> None:
        """Replace the context by one with other options. The weights stay where they are; the KV cache is lost.

        Raises ModelLoadError as the constructor does. Then there is no context: most calls raise EngineError until
        ``set_context`` succeeds.
        """
        self._runner.set_context(options)

    # ---- logits

    def logits(self, tokens: Sequence[int], *, cancel: CancelFlag | None = None) -> NDArray[np.float32]:
        """Logits after each token of the text ``tokens``: float32, (n_tokens, n_vocab).

        The KV cache is emptied first and holds ``tokens`` afterwards. Raises what ``generate`` raises, Cancelled when
        ``cancel`` is set, and DecodeError if ``cancel()`` is called.
        """
        return self._runner.logits(tokens, cancel=cancel)

    def logits_by_batch(
        self, tokens: Sequence[int], *, cancel: CancelFlag | None = None
    ) -> Iterator[NDArray[np.float32]]:
        """The rows of ``logits``, at most 512 at a time, for texts whose logits would fill the memory."""
        return self._runner.logits_by_batch(tokens, cancel=cancel)

    def embed(self, texts: Sequence[str | Sequence[int]], *, cancel: CancelFlag | None = None) -> NDArray[np.float32]:
        """An embedding of each of ``texts``, which may be token ids: float32, (n_texts, n_embd), rows of length 1.

        It is the mean of the hidden states behind the last norm over all tokens of the text, BOS included where the
        model wants one; special tokens that are written out are text. A model that was trained to continue texts tells
        topics apart, and is no match for a model made for retrieval. Each text is computed by itself, between steps of
        answers; texts in the KV cache are kept as far as ``cache_ram`` has room.

        Raises ContextFullError if a text does not fit the context, InputError if one is empty, Cancelled when
        ``cancel`` is set or ``cancel()`` called, and what ``generate`` raises.
        """
        return self._runner.embed(texts, cancel=cancel)

    async def embed_async(
        self, texts: Sequence[str | Sequence[int]], *, cancel: CancelFlag | None = None
    ) -> NDArray[np.float32]:
        """``embed`` for ``await``. Cancelling the task ends the computing."""
        return await call_async(lambda flag: self.embed(texts, cancel=flag), cancel)

    def compute_chunks(
        self, chunks: Sequence[Sequence[int]], first: int, *, cancel: CancelFlag | None = None
    ) -> Generator[ComputedPart, None, None]:
        """Compute independent texts of one length, with logits from position ``first`` on.

        ``ContextOptions.n_seq_max`` of them are computed side by side, as far as the batch has room. The logits of each
        part are available until the next part is asked for. Ends early when ``cancel`` is set. The KV cache is lost.

        Raises what ``generate`` raises, ContextFullError if a chunk does not fit, EngineError if another caller
        computes something in between, and EngineError with workers.
        """
        return self._runner.compute_chunks(chunks, first, cancel=cancel)

    def observed(
        self, observer: TensorObserver, *, on_token: TokenFilter | None = None
    ) -> AbstractContextManager[None]:
        """While the block runs, call ``observer(tensor, ask)`` for every node of the graphs that llama.cpp computes.

        It is called in the engine's thread with the address of a ``ggml_tensor``: before the node is computed with
        ``ask`` true, to return whether it wants the node; then, if so, once the tensor holds its values. It must not
        raise. ``on_token`` is called with each new token in the same thread, right after the step that it was drawn
        from, and what it returns goes to the reader instead.

        Observing slows down computing, so the block has a context of its own: at both ends the KV cache is lost, and
        answers that are not finished continue from a new one. Raises EngineError inside another such block, and with
        workers.
        """
        return self._runner.observed(observer, on_token=on_token)

    # ---- sessions

    def save_session(self, path: StrPath, tokens: Sequence[int] | None = None, note: str = "") -> int:
        """Write the KV cache to a file, over an earlier one; the number of tokens in it.

        With ``tokens`` the cache is made to hold those first, computing what is missing. ``note`` is stored with it.
        Raises EngineError if the cache is empty, OutputError.
        """
        return self._runner.save_session(path, tokens, note)

    def load_session(self, path: StrPath) -> tuple[tuple[int, ...], str]:
        """Fill the KV cache from a file of ``save_session``; the tokens in it, and the note.

        A prompt that begins with those tokens is then answered without computing them. Raises InputError for a file
        that is damaged, or of another model, engine or cache type, ContextFullError if the context is too small. Do
        not load files of strangers: for models that are not ``llama``, llama.cpp itself reads the state unchecked.
        """
        return self._runner.load_session(path)

    # ---- functions of the caller

    def apply(
        self, function: Callable[Concatenate[Engine, P], ResultT], *arguments: P.args, **keywords: P.kwargs
    ) -> ResultT:
        """Call ``function(engine, ...)`` in the process in which llama.cpp computes; its result.

        That is this process unless workers are used (``OffloadOptions.rpc``). Then ``function`` must be importable from
        a module, and its arguments and its result must be picklable; it gets an Engine of that process.
        """
        return self._runner.apply(_call_with_engine, function, *arguments, **keywords)

    def iterate(
        self, function: Callable[..., Iterator[ResultT]], *arguments: Any, cancel: CancelFlag | None = None
    ) -> Iterator[ResultT]:
        """What ``function(engine, *arguments, cancel=cancel)`` yields, computed where ``apply`` computes."""
        return self._runner.iterate(_iterate_with_engine, function, *arguments, cancel=cancel)

    # ---- the end

    @property
    def closed(self) -> bool:
        """Whether it was closed, or the child process that computes has ended."""
        return self._runner.closed

    def close(self) -> None:
        """Give back all memory. Further calls, and streams that are open, raise EngineError. May be called again.

        Aborts what is being computed and waits for its end; with workers that hang, for 5 s.
        """
        self._runner.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _engine_of(runner: EngineLike) -> Engine:
    """An Engine over a runner that is loaded already. Runners close themselves when nobody holds them any more."""
    engine = object.__new__(Engine)
    engine._runner = runner
    return engine


def _call_with_engine(
    runner: EngineLike,
    function: Callable[Concatenate[Engine, P], ResultT],
    /,
    *arguments: P.args,
    **keywords: P.kwargs,
) -> ResultT:
    return function(_engine_of(runner), *arguments, **keywords)


def _iterate_with_engine(
    runner: EngineLike,
    function: Callable[..., Iterator[ResultT]],
    /,
    *arguments: Any,
    cancel: CancelFlag | None,
) -> Iterator[ResultT]:
    return function(_engine_of(runner), *arguments, cancel=cancel)
