"""One loaded model as the library's users see it: text and tokens, answers, logits, sessions, the end.

Owns the contract: what may be called from where, and what each call raises. Native handles are ``loading``'s, the
order of calls ``nativethread``'s, an answer ``generation``'s. What llama.cpp logs goes to ``logging``
(``ggufmoe.llama``).
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from operator import index
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from ggufmoe.errors import Cancelled, ContextFullError, DecodeError, EngineError, GGUFError, InputError
from ggufmoe.gguf.header import Header
from ggufmoe.gguf.model import ModelHeader, check_kind, read_model_header
from ggufmoe.gguf.names import legacy_experts
from ggufmoe.native import library as native
from ggufmoe.native.log import NativeLog
from ggufmoe.options import ContextOptions, OffloadOptions, SamplingOptions, given_or_default
from ggufmoe.placement.report import Placement
from ggufmoe.runtime.asyncstream import read_async
from ggufmoe.runtime.chunkbatch import ComputedPart, SideBySide, batches
from ggufmoe.runtime.events import Event, Token
from ggufmoe.runtime.generation import Generation, Request
from ggufmoe.runtime.kvcache import SavedState
from ggufmoe.runtime.loading import LoadedModel, LoadRequest, LoadWatcher
from ggufmoe.runtime.nativethread import NativeThread, Turn
from ggufmoe.runtime.overflow import Overflow
from ggufmoe.runtime.sampling import Sampler, resolve
from ggufmoe.runtime.session import SessionFacts, read_session, write_session
from ggufmoe.runtime.textstream import stop_strings
from ggufmoe.work import CancelFlag, checked_flag

_LOGITS_BATCH = 512
_P = ParamSpec("_P")
_Result = TypeVar("_Result")


class Engine:
    """A model ready to generate, from the GGUF file at ``path`` (any one of them, when it is split).

    Every method may be called from any thread. All native code runs in one thread of the engine: callers take turns in
    the order in which they came, and text can be tokenized meanwhile. Use the engine with ``with``, or ``close`` it.

    ``on_progress`` is called with the part that is loaded, 0 to 1, in the engine's thread; what it raises ends the
    loading and is raised here. Loading also ends when ``cancel`` is set.

    Arguments and results of all methods can be pickled, but for ``observed`` and ``on_progress``, which take functions.

    Raises GGUFError for a file that is corrupt or of the old layout with one tensor per expert, ModelLoadError when
    llama.cpp refuses it, Cancelled, EngineMissingError without llama-cpp-python.
    """

    def __new__(cls, _path: object = None, _context: object = None, offload: Any = None, **_: object) -> Engine:
        """A plain Engine, or one in a process of its own where workers of other machines have a part in it."""
        if cls is Engine and given_or_default(offload, OffloadOptions).workers:
            from ggufmoe.remote.child import ChildEngine

            return object.__new__(ChildEngine)
        return object.__new__(cls)

    def __init__(
        self,
        path: str | os.PathLike[str],
        context: ContextOptions | None = None,
        offload: OffloadOptions | None = None,
        *,
        on_progress: Callable[[float], None] | None = None,
        cancel: CancelFlag | None = None,
    ) -> None:
        checked_flag(cancel)
        self._context_options = given_or_default(context, ContextOptions)
        self._offload_options = given_or_default(offload, OffloadOptions)
        self._model = model = checked_model(Path(path))
        self.path = model.paths[0]
        self.header: Header = model.shards[0].header
        self._turns: weakref.WeakSet[Turn] = weakref.WeakSet()
        self._turns_lock = threading.Lock()
        # the functions see the thread through this, so that they do not keep it alive
        stopped = threading.Event()
        watcher = LoadWatcher(on_progress, lambda: stopped.is_set() or (cancel is not None and cancel.is_set()))
        request = LoadRequest(model, self._context_options, self._offload_options)
        self._api = native_api()
        self._loaded = LoadedModel(self._api, native_log(), request)
        self._native = NativeThread(str(self.path), self._loaded.abort_flag, self._loaded.free)
        try:
            self._load(watcher)
        except BaseException:
            stopped.set()
            self.close()
            raise
        self._vocabulary = self._loaded.vocabulary
        self.placement: Placement = self._loaded.placement
        """Where everything went: the plan, and what libllama reported."""
        self.n_ctx: int = self._loaded.cache.n_ctx
        """Tokens that prompt and answer may have together; llama.cpp rounds what was asked for up to 256.

        With ``ContextOptions.n_seq_max`` above 1 it is the share of one text of those side by side.
        """
        self.n_vocab: int = self._vocabulary.n_tokens
        self.n_ctx_train: int = self._loaded.n_ctx_train
        """Tokens of context that the model was trained for."""

    def _load(self, watcher: LoadWatcher) -> None:
        self._native.call(partial(self._loaded.load, watcher))

    # ---- what the model is

    @property
    def bos_token(self) -> int | None:
        """Id of the token that begins a text, if the model has one."""
        return self._vocabulary.bos_token

    @property
    def eos_token(self) -> int | None:
        """Id of the token that ends a text, if the model has one."""
        return self._vocabulary.eos_token

    @property
    def adds_bos(self) -> bool:
        """Whether a prompt of this model begins with its BOS token."""
        return self._vocabulary.adds_bos

    @property
    def overflow(self) -> str:
        """What becomes of a text that is longer than the context: ``error``, ``shift`` or ``truncate-middle``."""
        return self._context_options.overflow_policy

    @property
    def cached_tokens(self) -> tuple[int, ...]:
        """The tokens whose keys and values are in the cache, as far as it is computed at this moment."""
        return tuple(self._loaded.cache.tokens)

    def token_text(self, token: int | None) -> str:
        """A token as the vocabulary spells it (``<s>``); empty for None."""
        return self._vocabulary.token_text(token)

    def metadata(self, key: str) -> Any:
        """A value of the file's metadata, or None."""
        value = self.header.metadata.get(key)
        return None if value is None else value.value

    # ---- text and tokens

    def tokenize(self, text: str, *, add_bos: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of ``text``; with ``add_bos`` the BOS token comes first where the model wants one.

        ``parse_special`` reads special tokens that are written out (``</s>``) as such. No EOS is added.
        """
        return self._vocabulary.tokenize(text, add_bos=add_bos, parse_special=parse_special)

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of one token; those of a control token are empty unless ``special``."""
        return self._vocabulary.piece(token, special=special)

    def ends_text(self, token: int) -> bool:
        """Whether the model ends its text with this token (EOS, or an end of turn)."""
        return self._vocabulary.ends_text(token)

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> bytes:
        """The bytes of several tokens, as they would be streamed."""
        return b"".join(self.piece(token, special=special) for token in tokens)

    # ---- generation

    def generate(
        self,
        prompt: Sequence[int],
        sampling: SamplingOptions | None = None,
        *,
        stop: str | Sequence[str] = (),
        cancel: CancelFlag | None = None,
        n_keep: int | None = None,
    ) -> Iterator[Event]:
        """Continue ``prompt``: an iterator of a ``Token`` for each new token, then one ``Finished``.

        What the cache, or a conversation that was set aside, holds already of the prompt is not computed again.
        Generation ends when the model says so, at ``n_predict`` tokens, at a ``stop`` string (which is not
        given out), when the context is full and ``overflow`` is ``error``, or when ``cancel`` is set or ``cancel()``
        called, while the prompt is computed as well. Closing the iterator ends it too.

        It begins when the iterator is first asked, and then waits for those that were there before. It runs ahead of
        its reader by a few dozen tokens at most; a reader that falls behind holds up nobody: the answer is put aside
        meanwhile. So an answer may be begun, and read to its end, between two tokens of another one, in any thread.
        ``n_keep`` takes the place of the context's own, for overflow.

        Raises ContextFullError if the prompt leaves no room for a single token and may not be cut, InputError if it is
        empty or the grammar cannot be used, EngineError once the engine is closed.
        """
        tokens = self._checked_prompt(prompt)
        overflow = Overflow(self._context_options.overflow_policy, self._n_keep(tokens, n_keep))
        tokens = overflow.fitted(tokens, self.n_ctx)
        settings = resolve(given_or_default(sampling, SamplingOptions), self.metadata)
        # made now, so that what is wrong with a grammar is told before the first token is asked for
        sampler = Sampler(self._api, self._vocabulary, settings, tokens)
        return self._read(Request(tuple(tokens), settings, stop_strings(stop), cancel, overflow), sampler)

    def _read(self, request: Request, sampler: Sampler) -> Iterator[Event]:
        generation = Generation(self._native, self._loaded, request, sampler)
        self._remember(generation.turn)
        yield from generation.read()

    def generate_async(
        self,
        prompt: Sequence[int],
        sampling: SamplingOptions | None = None,
        *,
        stop: str | Sequence[str] = (),
        cancel: CancelFlag | None = None,
        n_keep: int | None = None,
    ) -> AsyncIterator[Event]:
        """The same for ``async for``. A task that is cancelled, or an ``aclose``, ends the computing."""
        return read_async(lambda flag: self.generate(prompt, sampling, stop=stop, cancel=flag, n_keep=n_keep), cancel)

    def _checked_prompt(self, prompt: Sequence[int]) -> list[int]:
        self._vocabulary.check_tokens(prompt)
        tokens = [index(token) for token in prompt]
        if not tokens:
            raise InputError("the prompt is empty: there is nothing to continue")
        return tokens

    def _n_keep(self, tokens: Sequence[int], n_keep: int | None) -> int:
        n = self._context_options.n_keep if n_keep is None else n_keep
        has_bos = tokens[0] == self.bos_token
        return len(tokens) if n < 0 else max(n, int(has_bos))

    def cancel(self) -> None:
        """Stop every answer and computation that has been begun, from another thread; it ends as ``cancelled``."""
        with self._turns_lock:
            turns = list(self._turns)
        for turn in turns:
            self._native.abort(turn)

    def _remember(self, turn: Turn) -> Turn:
        with self._turns_lock:
            self._turns.add(turn)
        return turn

    # ---- the cache

    def forget(self) -> None:
        """Empty the KV cache, and what was set aside of other conversations."""
        self._native.call(lambda: self._loaded.cache.clear())

    def prefill(self, prompt: Sequence[int], *, cancel: CancelFlag | None = None, every_row: bool = False) -> int:
        """Compute ``prompt`` into the cache, for answers that will begin with it; how many tokens were new.

        Nothing else is computed in between. ``every_row`` asks for the logits of every row, as ``observed`` may need
        them. Raises Cancelled, ContextFullError if it leaves no room for a single token. What was stopped may be in
        llama.cpp for a while longer; the next call waits for that.
        """
        tokens = self._checked_prompt(prompt)
        self._check_fits(tokens)
        turn = self._remember(Turn(cancel))
        n = self._native.call_until_stopped(partial(self._prefill, tokens, every_row), turn)
        if n is None:
            raise Cancelled("computing the prompt was stopped")
        return n

    def _prefill(self, tokens: list[int], every_row: bool) -> int | None:
        kv = self._loaded.cache
        if every_row:
            kv.clear()
        n = kv.reuse(tokens)
        if every_row:
            size = min(_LOGITS_BATCH, kv.n_batch)
            done = all(kv.rows(tokens[begin : begin + size]) for begin in range(0, len(tokens), size))
        else:
            done = kv.feed(tokens[n:])
        kv.synchronize()
        return len(tokens) - n if done else None

    def _check_fits(self, tokens: Sequence[int]) -> None:
        if len(tokens) >= self.n_ctx:
            raise ContextFullError(
                f"the prompt has {len(tokens)} tokens and the context holds {self.n_ctx}: "
                "shorten it, or ask for more with --ctx-size"
            )

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits after each token of a text that begins with ``tokens``: float32, (n_tokens, n_vocab).

        The cache is emptied first and holds ``tokens`` afterwards. Raises as ``generate`` does, and DecodeError if
        ``cancel()`` is called.
        """
        parts = self.logits_by_batch(tokens)
        rows = np.empty((len(tokens), self.n_vocab), np.float32)
        done = 0
        for part in parts:
            rows[done : done + len(part)] = part
            done += len(part)
        return rows

    def logits_by_batch(self, tokens: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """The same rows, at most 512 at a time, for texts whose logits would fill the memory."""
        ids = self._checked_prompt(tokens)
        self._check_fits(ids)
        return self._logits_by_batch(ids)

    def _logits_by_batch(self, ids: list[int]) -> Iterator[NDArray[np.float32]]:
        turn = self._remember(Turn())
        size = min(_LOGITS_BATCH, self._context_options.n_batch, self.n_ctx)
        for begin in range(0, len(ids), size):
            rows = self._native.call_until_stopped(partial(self._rows, ids, begin, size), turn)
            if rows is None:
                raise DecodeError("computing logits was cancelled from another thread")
            yield rows

    def _rows(self, ids: list[int], begin: int, size: int) -> NDArray[np.float32] | None:
        kv = self._loaded.cache
        chunk = ids[begin : begin + size]
        if begin == 0:
            kv.clear()
        elif kv.tokens != ids[:begin]:  # another caller has had a turn
            kv.feed(ids[kv.reuse(ids[: begin + 1]) : begin])
        if not kv.rows(chunk):
            return None
        return np.array(kv.logits(len(chunk)))

    def compute_chunks(
        self, chunks: Sequence[Sequence[int]], first: int, *, cancel: CancelFlag | None = None
    ) -> Generator[ComputedPart, None, None]:
        """Compute texts of one length that know nothing of each other, with logits from position ``first`` on.

        ``ContextOptions.n_seq_max`` of them are computed side by side, where the batch has room. The logits of each
        part are there until the next one is asked for. Ends early when ``cancel`` is set. The cache is lost. Raises as
        ``generate`` does, ContextFullError if a chunk does not fit, EngineError if another caller comes in between.
        """
        n_tokens = max(map(len, chunks), default=0)
        if n_tokens > self.n_ctx:
            raise ContextFullError(f"a chunk has {n_tokens} tokens and the context holds {self.n_ctx}")
        for chunk in chunks:
            self._vocabulary.check_tokens(chunk)
        return self._chunk_parts(chunks, n_tokens, first, cancel)

    def _chunk_parts(
        self, chunks: Sequence[Sequence[int]], n_tokens: int, first: int, cancel: CancelFlag | None
    ) -> Generator[ComputedPart, None, None]:
        turn, n_batch = self._remember(Turn(cancel)), self._loaded.cache.n_batch
        n_seq = min(self._context_options.n_seq_max, max(1, n_batch // max(n_tokens, 1)))
        rows = partial(self._chunk_rows, turn)
        try:
            for group, begin, end in batches(len(chunks), n_tokens, n_seq, n_batch):
                pieces = [chunks[i][begin:end] for i in group]
                batch = SideBySide(self._api, pieces, begin, first)
                if not self._native.call_until_stopped(partial(self._loaded.cache.compute_chunks, batch, turn), turn):
                    return
                yield ComputedPart(group, begin, end, first, rows)
        finally:
            # who has stopped does not wait; the cache empties itself for whoever comes next
            if not self._native.closed and not turn.cancelled:
                self.forget()

    def _chunk_rows(self, turn: Turn, at: int, n: int) -> NDArray[np.float32]:
        return self._native.call(lambda: self._copied_rows(turn, at, n))

    def _copied_rows(self, turn: Turn, at: int, n: int) -> NDArray[np.float32]:
        kv = self._loaded.cache
        kv.check_chunks(turn)
        return np.array(kv.logits(at + n)[at:]) if n else np.empty((0, self.n_vocab), np.float32)

    def evaluate(
        self, tokens: Sequence[int], *, one_by_one: bool = False, cancel: CancelFlag | None = None
    ) -> float | None:
        """Compute ``tokens`` after what the cache holds, drawing none, in batches or ``one_by_one`` as answers are.

        Gives the seconds that it took, until the devices had done their work; None if ``cancel`` or ``cancel()``
        stopped it, soon, as with ``prefill``. Raises as ``generate`` does.
        """
        self._vocabulary.check_tokens(tokens)
        ids = [index(token) for token in tokens]
        turn = self._remember(Turn(cancel))
        parts = [[i] for i in ids] if one_by_one else [ids]
        return self._native.call_until_stopped(partial(self._evaluate, parts, turn), turn)

    def _evaluate(self, parts: list[list[int]], turn: Turn) -> float | None:
        kv = self._loaded.cache
        start = time.perf_counter()
        done = all(not turn.cancelled and kv.feed(part) for part in parts)
        kv.synchronize()
        seconds = time.perf_counter() - start
        return seconds if done else None

    def set_context(self, options: ContextOptions) -> None:
        """Go on with another context for the same weights, which stay where they are; the cache is lost.

        Raises ModelLoadError as the constructor does; then there is no context, until one can be set or ``close``.
        """
        self._native.call(lambda: self._loaded.set_context(options))
        self._context_options = options
        self.n_ctx = self._loaded.cache.n_ctx

    @contextmanager
    def observed(
        self, observer: Callable[[int, bool], bool], *, on_token: Callable[[Token], Token] | None = None
    ) -> Iterator[None]:
        """While the block runs, every node of the graphs that llama.cpp computes is shown to ``observer(tensor, ask)``.

        It is called in the engine's thread with the address of a ``ggml_tensor``: before the node is computed with
        ``ask`` true, to say whether it wants to see it; then, if so, once the tensor holds its values. It must not
        raise. ``on_token`` is given each new token in the same thread, right after the step that it was drawn from,
        and what it returns goes to the reader in its place.

        Observing slows down computing, so it takes a context of its own: at both ends the cache is lost, and answers
        that are under way go on from a new one. Raises EngineError inside another such block.
        """
        self._native.call(lambda: self._observe(observer, on_token))
        try:
            yield
        finally:
            if not self._native.closed:
                self._native.call(lambda: self._observe(None, None))

    def _observe(self, observer: Callable[[int, bool], bool] | None, on_token: Callable[[Token], Token] | None) -> None:
        if observer is not None and self._loaded.observer is not None:
            raise EngineError("the graph of this engine is being observed already")
        self._loaded.on_token = None
        self._loaded.observe(observer)
        self._loaded.on_token = on_token

    # ---- sessions

    def save_session(self, path: str | os.PathLike[str], tokens: Sequence[int] | None = None, note: str = "") -> int:
        """Write the KV cache to a file, over an earlier one; how many tokens it holds.

        With ``tokens`` it is made to hold those first, computing what is missing. ``note`` is kept with it. Raises
        EngineError if there is nothing to keep, OutputError.
        """
        ids = None if tokens is None else self._checked_prompt(tokens)
        if ids is not None:
            self._check_fits(ids)
        state = self._native.call(lambda: self._session_state(ids))
        write_session(Path(path), state, self._session_facts(), note)
        return len(state.tokens)

    def _session_state(self, ids: list[int] | None) -> SavedState:
        kv = self._loaded.cache
        if ids is not None and not kv.feed(ids[kv.reuse(ids) :]):
            raise EngineError("saving the session was cancelled from another thread")
        if not kv.tokens:
            raise EngineError(f"{self.path}: nothing has been computed yet that could be kept")
        return kv.state()

    def load_session(self, path: str | os.PathLike[str]) -> tuple[tuple[int, ...], str]:
        """Fill the KV cache from a file of ``save_session``; its tokens and its note.

        A prompt that begins with those tokens is then answered without computing them. Raises InputError for a file
        that is damaged, or of another model, engine or cache type, ContextFullError if the context is too small. Do
        not load what others made: of models that are not ``llama``, llama.cpp itself reads the state unchecked.
        """
        state, note = read_session(Path(path), self._session_facts(), self.n_ctx)
        self._vocabulary.check_tokens(state.tokens)
        self._native.call(lambda: self._restore(state))
        return state.tokens, note

    def _restore(self, state: SavedState) -> None:
        self._loaded.cache.set_aside()
        self._loaded.cache.restore(state)

    def _session_facts(self) -> SessionFacts:
        return SessionFacts.of(self._model, self._context_options, self._offload_options)

    def apply(
        self, function: Callable[Concatenate[Engine, _P], _Result], *arguments: _P.args, **keywords: _P.kwargs
    ) -> _Result:
        """``function(engine, ...)``, called in the process in which llama.cpp computes.

        That is this process unless workers on other machines are used (``OffloadOptions.rpc``); then ``function`` must
        be one of a module, and what it takes and gives must be such as can be pickled.
        """
        return function(self, *arguments, **keywords)

    def iterate(
        self,
        function: Callable[..., Iterator[_Result]],
        *arguments: Any,
        cancel: CancelFlag | None = None,
    ) -> Iterator[_Result]:
        """What ``function(engine, ..., cancel=cancel)`` yields, computed where ``apply`` computes."""
        return function(self, *arguments, cancel=cancel)

    # ---- the end

    @property
    def closed(self) -> bool:
        """Whether nothing can be asked of it any more."""
        return self._native.closed

    def close(self) -> None:
        """Give back all memory; further calls raise EngineError, and so do streams that are open. May be called again.

        It stops what is being computed and waits until that has ended.
        """
        thread = getattr(self, "_native", None)
        if thread is not None:
            thread.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


@cache
def native_log() -> NativeLog:
    """llama.cpp's log, of which there is one in a process."""
    return NativeLog()


@cache
def native_api() -> Any:
    """llama-cpp-python's low-level bindings, with their log captured. Raises EngineMissingError."""
    native.library()
    from llama_cpp import llama_cpp

    native_log().attach(llama_cpp)
    llama_cpp.llama_backend_init()
    return llama_cpp


def checked_model(path: Path) -> ModelHeader:
    """The header of a model that llama.cpp can load. Raises GGUFError."""
    model = read_model_header(path)
    check_kind(model)
    old = legacy_experts(tensor.name for tensor in model.tensors)
    if old:
        raise GGUFError(
            f"{path}: an old Mixtral file with one tensor per expert ({old[0]}), which llama.cpp no longer loads; "
            f"stack its experts with `ggufmoe quantize {path.name} -o NEW.gguf -q COPY`"
        )
    if not model.tensors:
        raise GGUFError(f"{path}: holds no weights, only a vocabulary or metadata; give the file of the whole model")
    return model
