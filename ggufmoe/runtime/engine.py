"""One loaded model: load, tokenize, decode, sample, reuse of the KV cache, cancelling, closing.

Owns every native handle. It knows nothing of chat templates, of where weights should go, or of a terminal. What
llama.cpp logs goes to ``logging`` (``ggufmoe.llama``).
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufmoe import native
from ggufmoe.errors import ContextFullError, DecodeError, EngineError, GGUFError, InputError, ModelLoadError
from ggufmoe.ggufheader import GGMLType, Header, ModelHeader, legacy_expert_tensors, read_model_header
from ggufmoe.options import ContextOptions, OffloadOptions, SamplingOptions
from ggufmoe.runtime.chunkbatch import ComputedPart, SideBySide, batches
from ggufmoe.runtime.cpu import default_threads, memory_bytes
from ggufmoe.runtime.devices import Machine, find_machine
from ggufmoe.runtime.events import CancelFlag, Event, Finished, FinishReason, Timing, Token
from ggufmoe.runtime.footprint import DEFAULT_MAX_CTX
from ggufmoe.runtime.nativelog import NativeLog, no_wait_callback
from ggufmoe.runtime.offload import plan_offload
from ggufmoe.runtime.placement import REPORT_LINES, Placement, placement_of, set_parameters
from ggufmoe.runtime.sampling import Sampler, Sampling, resolve
from ggufmoe.runtime.textstream import TextStream

_FLASH_ATTN = {"auto": -1, "off": 0, "on": 1}
_NO_VOCABULARY = 0
_SEQUENCE = 0
_ABORTED = 2
_NO_ROOM = 1

_loading = threading.Lock()
_logger = logging.getLogger("ggufmoe")


class Engine:
    """A model ready to generate, from the GGUF file at ``path`` (any one of them, when it is split).

    One generation runs at a time; methods may be called from any thread. Use it with ``with``, or ``close`` it.

    Raises GGUFError for a file that is corrupt or of the old layout with one tensor per expert, ModelLoadError when
    llama.cpp refuses it, EngineMissingError without llama-cpp-python.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        context: ContextOptions | None = None,
        offload: OffloadOptions | None = None,
    ) -> None:
        self._model: Any = None
        self._context: Any = None
        self._lock = threading.RLock()
        # apart from the other, so that text can be tokenized while a long prompt is computed
        self._vocab_lock = threading.RLock()
        self._cached: list[int] = []
        self._generation = 0
        self._context_options = context or ContextOptions()
        self._observer: Any = None
        model = _checked_model(Path(path))
        self.path = model.paths[0]
        self.header: Header = model.shards[0].header
        self._api = _llama()
        self._abort_callback, self._abort_flag = no_wait_callback(self._api)
        try:
            self._load(model, offload or OffloadOptions())
        except BaseException:
            self.close()
            raise

    def _load(self, model: ModelHeader, offload: OffloadOptions) -> None:
        machine = find_machine(offload.device)
        self._kv_offload = offload.kv_offload
        self._plan = plan_offload(model, self._context_options, offload, machine.places, machine.host)
        for warning in self._plan.warnings:
            _logger.warning("%s: %s", self.path, warning)
        with _loading, _log().collecting(REPORT_LINES) as lines:
            self._model = self._load_model(machine, offload)
            self._context = self._make_context()
        self.placement: Placement = placement_of(self._plan, lines, machine)
        """Where everything went: the plan, and what libllama reported."""
        for difference in self.placement.differences:
            _logger.warning("%s: not placed as planned: %s", self.path, difference)
        self._vocab = self._api.llama_model_get_vocab(self._model)
        self._memory = self._api.llama_get_memory(self._context)
        if not self._memory or self._api.llama_model_has_encoder(self._model):
            raise ModelLoadError(
                f"{self.path}: not a model that continues text: it has an encoder, or keeps no context"
            )
        self.n_ctx: int = self._api.llama_n_ctx(self._context)
        """Tokens that prompt and answer may have together; llama.cpp rounds what was asked for up to 256."""
        self.n_vocab: int = self._api.llama_vocab_n_tokens(self._vocab)
        self._n_batch: int = self._api.llama_n_batch(self._context)

    def _load_model(self, machine: Machine, offload: OffloadOptions) -> Any:
        mark = _log().mark()
        parameters = self._api.llama_model_default_params()
        key = f"{self.header.get('general.architecture')}.expert_used_count"
        _alive = set_parameters(self._api, parameters, machine, self._plan, offload, key)
        model = self._api.llama_model_load_from_file(os.fsencode(self.path), parameters)
        if not model:
            cause = _log().cause_since(mark)
            if "_Host buffer" in cause and not parameters.no_host:
                _logger.warning("%s: %s; trying again as with --no-host", self.path, cause)
                parameters.no_host = True
                model = self._api.llama_model_load_from_file(os.fsencode(self.path), parameters)
        if not model:
            raise ModelLoadError(f"{self.path}: llama.cpp cannot load it: {_log().cause_since(mark)}")
        return model

    def _make_context(self) -> Any:
        mark = _log().mark()
        parameters = self._context_parameters(self._context_options)
        self._check_cache_size(parameters.n_ctx)
        context = self._api.llama_init_from_model(self._model, parameters)
        if not context:
            raise ModelLoadError(
                f"{self.path}: no such context can be made: {_log().cause_since(mark)} "
                "(a smaller --ctx-size takes less memory)"
            )
        return context

    def _check_cache_size(self, n_ctx: int) -> None:
        # systems that promise more memory than they have end the process once llama.cpp fills its cache
        needed, there = n_ctx * _cache_bytes_per_token(self.header, self._context_options), memory_bytes()
        if there and min(needed, self._plan.host.kv_bytes) > there:
            raise ModelLoadError(
                f"{self.path}: a context of {n_ctx} tokens takes {needed / 1e9:.1f} GB, and this machine has "
                f"{there / 1e9:.1f} GB of memory; ask for less with --ctx-size"
            )

    def _context_parameters(self, options: ContextOptions) -> Any:
        parameters = self._api.llama_context_default_params()
        n_ctx = min(self.n_ctx_train, DEFAULT_MAX_CTX) if options.n_ctx is None else options.n_ctx or self.n_ctx_train
        n_threads = options.n_threads or default_threads()
        values = {
            "n_ctx": n_ctx,
            "n_batch": options.n_batch,
            "n_seq_max": options.n_seq_max,
            "n_ubatch": min(options.n_ubatch, options.n_batch),
            "n_threads": n_threads,
            "n_threads_batch": n_threads,
            "flash_attn_type": _FLASH_ATTN[options.flash_attn],
            "type_k": GGMLType[options.cache_type_k.upper()].id,
            "type_v": GGMLType[options.cache_type_v.upper()].id,
            "abort_callback": self._abort_callback,
            "abort_callback_data": ctypes.addressof(self._abort_flag),
            "no_perf": True,
            "offload_kqv": self._kv_offload,
        }
        if self._observer is not None:
            values["cb_eval"] = self._observer
        for name, value in values.items():
            setattr(parameters, name, value)
        return parameters

    # ---- what the model is

    @property
    def n_ctx_train(self) -> int:
        """Tokens of context that the model was trained for."""
        with self._vocab_lock:
            if not self._model:
                self._check_open()
            return int(self._api.llama_model_n_ctx_train(self._model))

    @property
    def bos_token(self) -> int | None:
        """Id of the token that begins a text, if the model has one."""
        return self._special(self._api.llama_vocab_bos)

    @property
    def eos_token(self) -> int | None:
        """Id of the token that ends a text, if the model has one."""
        return self._special(self._api.llama_vocab_eos)

    @property
    def adds_bos(self) -> bool:
        """Whether a prompt of this model begins with its BOS token."""
        with self._vocab_lock:
            return self.bos_token is not None and bool(self._api.llama_vocab_get_add_bos(self._vocab))

    @property
    def cached_tokens(self) -> tuple[int, ...]:
        """The tokens whose keys and values are in the cache."""
        return tuple(self._cached)

    def _special(self, function: Any) -> int | None:
        with self._vocab_lock:
            self._check_open()
            token = int(function(self._vocab))
        return None if token < 0 else token

    def token_text(self, token: int | None) -> str:
        """A token as the vocabulary spells it (``<s>``); empty for None."""
        if token is None:
            return ""
        with self._vocab_lock:
            self._check_tokens([token])
            return bytes(self._api.llama_vocab_get_text(self._vocab, token)).decode("utf-8", "replace")

    def metadata(self, key: str) -> Any:
        """A value of the file's metadata, or None."""
        value = self.header.metadata.get(key)
        return None if value is None else value.value

    # ---- text and tokens

    def tokenize(self, text: str, *, add_bos: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of ``text``; with ``add_bos`` the BOS token comes first where the model wants one.

        ``parse_special`` reads special tokens that are written out (``</s>``) as such. No EOS is added.
        """
        # llama.cpp ends the process on text that is not UTF-8
        data = text.encode("utf-8", "replace")
        room = len(data) + 8
        with self._vocab_lock:
            self._check_vocabulary()
            while True:
                buffer = (ctypes.c_int32 * room)()
                n = self._api.llama_tokenize(self._vocab, data, len(data), buffer, room, False, parse_special)
                if n >= 0:
                    break
                room = -n
            begin = self.bos_token if add_bos and self.adds_bos else None
        return ([] if begin is None else [begin]) + list(buffer[:n])

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of one token; those of a control token are empty unless ``special``."""
        room = 64
        with self._vocab_lock:
            self._check_vocabulary()
            self._check_tokens([token])
            while True:
                buffer = ctypes.create_string_buffer(room)
                n = self._api.llama_token_to_piece(self._vocab, token, buffer, room, 0, special)
                if n >= 0:
                    return buffer.raw[:n]
                room = -n

    def ends_text(self, token: int) -> bool:
        """Whether the model ends its text with this token (EOS, or an end of turn)."""
        with self._vocab_lock:
            self._check_tokens([token])
            return bool(self._api.llama_vocab_is_eog(self._vocab, token))

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> bytes:
        """The bytes of several tokens, as they would be streamed."""
        return b"".join(self.piece(token, special=special) for token in tokens)

    def _check_vocabulary(self) -> None:
        # llama.cpp ends the process when it is asked without one
        self._check_open()
        if self._api.llama_vocab_type(self._vocab) == _NO_VOCABULARY:
            raise EngineError(f"{self.path}: the file has no tokenizer; convert it again with one")

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        self._check_open()
        for token in tokens:
            if not 0 <= token < self.n_vocab:
                raise InputError(f"{token} is not a token: this model has ids from 0 to {self.n_vocab - 1}")

    # ---- generation

    def generate(
        self,
        prompt: Sequence[int],
        sampling: SamplingOptions | None = None,
        *,
        stop: Sequence[str] = (),
        cancel: CancelFlag | None = None,
    ) -> Iterator[Event]:
        """Continue ``prompt``: an iterator of a ``Token`` for each new token, then one ``Finished``.

        What the cache holds already of the prompt is not computed again. Generation ends when the model says so, at
        ``n_predict`` tokens, at one of the ``stop`` strings (which is not given out), when the context is full, or when
        ``cancel`` is set or ``cancel()`` called, while the prompt is computed as well. Closing the iterator ends it
        too. Beginning another generation makes an unfinished one raise EngineError.

        Raises ContextFullError if the prompt leaves no room for a single token, InputError if it is empty.
        """
        tokens = list(prompt)
        self._check_prompt(tokens)
        settings = resolve(sampling or SamplingOptions(), self.metadata)
        return self._stream(tokens, settings, TextStream(stop), cancel)

    def _check_prompt(self, tokens: Sequence[int]) -> None:
        self._check_tokens(tokens)
        if not tokens:
            raise InputError("the prompt is empty: there is nothing to continue")
        if len(tokens) >= self.n_ctx:
            raise ContextFullError(
                f"the prompt has {len(tokens)} tokens and the context holds {self.n_ctx}: "
                "shorten it, or ask for more with --ctx-size"
            )

    def _stream(
        self, prompt: list[int], settings: Sampling, text: TextStream, cancel: CancelFlag | None
    ) -> Iterator[Event]:
        turn = self._begin()
        clock = _Clock(prompt_tokens=len(prompt))
        with Sampler(self._api, self.n_vocab, settings, prompt) as sampler:
            reason: FinishReason | None = None
            with clock.prompt(), self._watching(cancel):
                clock.cached_tokens = self._reuse(prompt, turn)
                if not self._feed(prompt[clock.cached_tokens :], turn):
                    reason = "cancelled"
            while reason is None:
                reason = self._limit(settings, clock, cancel)
                if reason is None:
                    with clock.generation():
                        token = self._next(sampler, clock, turn)
                    if token is None:
                        reason = "cancelled"
                    elif self.ends_text(token):
                        reason = "stop"
                    else:
                        clock.generated_tokens += 1
                        clock.pending = token
                        yield Token(text.push(self.piece(token)), token)
                        reason = "stop" if text.stopped else None
        yield Finished(text.flush(), reason, clock.timing(), settings.seed)

    def _limit(self, settings: Sampling, clock: _Clock, cancel: CancelFlag | None) -> FinishReason | None:
        if clock.generated_tokens == settings.n_predict:
            return "length"
        if cancel is not None and cancel.is_set():
            return "cancelled"
        if clock.pending is not None and len(self._cached) >= self.n_ctx:
            return "context"
        return None

    def _next(self, sampler: Sampler, clock: _Clock, turn: int) -> int | None:
        """Decode the token that is pending, if any, and draw the next one; None when cancelled."""
        if clock.pending is not None:
            if not self._feed([clock.pending], turn):
                return None
            clock.evaluated_tokens += 1
        with self._lock:
            self._check_turn(turn)
            return sampler.sample(self._context)

    def cancel(self) -> None:
        """Stop the generation that runs now, from another thread; it ends with the reason ``cancelled``."""
        self._abort_flag[0] = b"\x01"

    @contextmanager
    def _watching(self, cancel: CancelFlag | None) -> Iterator[None]:
        """While the block runs in native code, pass on that ``cancel`` has been set."""
        if cancel is None:
            yield
            return
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.02):
                if cancel.is_set():
                    self.cancel()

        if cancel.is_set():
            self.cancel()
        watcher = threading.Thread(target=watch, name="ggufmoe-cancel", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()

    # ---- the cache

    def forget(self) -> None:
        """Empty the KV cache; an unfinished generation ends with EngineError."""
        with self._lock:
            self._check_open()
            self._begin()
            self._api.llama_memory_clear(self._memory, False)
            self._cached = []

    def _begin(self) -> int:
        with self._lock:
            self._check_open()
            self._generation += 1
            self._abort_flag[0] = b"\x00"
            return self._generation

    def _reuse(self, prompt: list[int], turn: int) -> int:
        """Cut the cache down to what it shares with ``prompt``; how many tokens that is.

        The last token of the prompt is always computed again: its logits are not kept.
        """
        with self._lock:
            self._check_turn(turn)
            n = _common_prefix(self._cached, prompt[:-1])
            if n < len(self._cached) and not self._api.llama_memory_seq_rm(self._memory, _SEQUENCE, n, -1):
                # recurrent models cannot go back by part of a text
                self._api.llama_memory_clear(self._memory, False)
                n = 0
            self._cached = prompt[:n]
            return n

    def _feed(self, tokens: list[int], turn: int) -> bool:
        """Decode ``tokens`` after what the cache holds; False if that was cancelled."""
        for begin in range(0, len(tokens), self._n_batch):
            with self._lock:
                self._check_turn(turn)
                if not self._decode(tokens[begin : begin + self._n_batch]):
                    return False
        return True

    def _decode(self, tokens: list[int], *, all_logits: bool = False) -> bool:
        mark = _log().mark()
        ids = (ctypes.c_int32 * len(tokens))(*tokens)
        batch = self._api.llama_batch_get_one(ids, len(tokens))
        if all_logits:
            wanted = (ctypes.c_int8 * len(tokens))(*[1] * len(tokens))
            batch.logits = ctypes.cast(wanted, ctypes.POINTER(ctypes.c_int8))
        status = self._api.llama_decode(self._context, batch)
        if status == 0:
            self._cached += tokens
            return True
        n_kept = self._api.llama_memory_seq_pos_max(self._memory, _SEQUENCE) + 1
        self._cached = (self._cached + tokens)[:n_kept]
        if status == _ABORTED:
            return False
        if status == _NO_ROOM:
            raise ContextFullError(f"the context of {self.n_ctx} tokens is full; ask for more with --ctx-size")
        raise DecodeError(f"{self.path}: llama.cpp failed to compute ({status}): {_log().cause_since(mark)}")

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits after each token of a text that begins with ``tokens``: float32, (n_tokens, n_vocab).

        The cache is emptied first and holds ``tokens`` afterwards. Raises as ``generate`` does; Cancelled never.
        """
        parts = self.logits_by_batch(tokens)
        rows = np.empty((len(tokens), self.n_vocab), np.float32)
        done = 0
        for part in parts:
            rows[done : done + len(part)] = part
            done += len(part)
        return rows

    def logits_by_batch(self, tokens: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """The same rows, at most 512 at a time, for texts whose logits would fill the memory.

        Another generation that begins in between makes this one raise EngineError.
        """
        ids = list(tokens)
        self._check_prompt(ids)
        return self._logits_by_batch(ids, min(512, self._n_batch))

    def _logits_by_batch(self, ids: list[int], size: int) -> Iterator[NDArray[np.float32]]:
        with self._lock:
            self.forget()
            turn = self._generation
        for begin in range(0, len(ids), size):
            chunk = ids[begin : begin + size]
            with self._lock:
                self._check_turn(turn)
                if not self._decode(chunk, all_logits=True):
                    raise DecodeError("computing logits was cancelled from another thread")
                pointer = self._api.llama_get_logits(self._context)
                rows = np.array(np.ctypeslib.as_array(pointer, (len(chunk), self.n_vocab)))
            yield rows

    def compute_chunks(
        self, chunks: Sequence[Sequence[int]], first: int, *, cancel: CancelFlag | None = None
    ) -> Generator[ComputedPart, None, None]:
        """Compute texts of one length that know nothing of each other, with logits from position ``first`` on.

        ``ContextOptions.n_seq_max`` of them are computed side by side, where the batch has room. Each part holds the
        logits of what was computed last until the next one is asked for. Ends early when ``cancel`` is set. The cache
        is lost. Raises as ``generate`` does, and ContextFullError if a chunk does not fit.
        """
        self._check_open()
        n_tokens = max(map(len, chunks), default=0)
        room = int(self._api.llama_n_ctx_seq(self._context))
        if n_tokens > room:
            raise ContextFullError(f"a chunk has {n_tokens} tokens and the context holds {room}")
        for chunk in chunks:
            self._check_tokens(chunk)
        with self._lock:
            self.forget()
            turn = self._generation
        n_seq = min(self._context_options.n_seq_max, max(1, self._n_batch // max(n_tokens, 1)))
        try:
            for group, begin, end in batches(len(chunks), n_tokens, n_seq, self._n_batch):
                with self._lock, self._watching(cancel):
                    self._check_turn(turn)
                    if begin == 0:
                        self._api.llama_memory_clear(self._memory, False)
                    pieces = [chunks[i][begin:end] for i in group]
                    if not self._decoded(SideBySide(self._api, pieces, begin, first)):
                        return
                yield ComputedPart(self._api, self._context, self.n_vocab, group, begin, end, first)
        finally:
            with self._lock:
                if self._context and turn == self._generation:
                    self.forget()

    def _decoded(self, batch: SideBySide) -> bool:
        mark = _log().mark()
        status = batch.decode(self._context)
        if status not in (0, _ABORTED):
            raise DecodeError(f"{self.path}: llama.cpp failed to compute ({status}): {_log().cause_since(mark)}")
        return status == 0

    @contextmanager
    def observed(self, observer: Callable[[int, bool], bool]) -> Iterator[None]:
        """While the block runs, every node of the graphs that llama.cpp computes is shown to ``observer(tensor, ask)``.

        It is called with the address of a ``ggml_tensor``: before the node is computed with ``ask`` true, to say
        whether it wants to see it; then, if so, once the tensor holds its values. It must not raise. This slows down
        computing, so it takes a context of its own: at both ends the cache is lost, and an unfinished generation ends
        with EngineError. Raises EngineError inside another such block.
        """
        if self._observer is not None:
            raise EngineError("the graph of this engine is being observed already")
        self._renew_context(self._api.ggml_backend_sched_eval_callback(lambda tensor, ask, _: observer(tensor, ask)))
        try:
            yield
        finally:
            with self._lock:
                if self._context:
                    self._renew_context(None)

    def _renew_context(self, observer: Any) -> None:
        with self._lock:
            self._begin()
            self._api.llama_free(self._context)
            self._context, self._cached, self._observer = None, [], observer
            self._context = self._make_context()
            self._memory = self._api.llama_get_memory(self._context)

    # ---- the end

    def close(self) -> None:
        """Give back all memory; further calls raise EngineError. May be called again."""
        if getattr(self, "_vocab_lock", None) is None:
            return
        with self._lock, self._vocab_lock:
            context, self._context = self._context, None
            model, self._model = self._model, None
            if context:
                self._api.llama_free(context)
            if model:
                self._api.llama_model_free(model)

    def _check_open(self) -> None:
        if not self._context:
            raise EngineError(f"the engine of {self.path} has been closed")

    def _check_turn(self, turn: int) -> None:
        self._check_open()
        if turn != self._generation:
            raise EngineError("another generation has begun on this engine; this one cannot go on")

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


@dataclass
class _Clock:
    """Counts and times one generation, without the time that its caller takes."""

    prompt_tokens: int
    cached_tokens: int = 0
    prompt_s: float = 0.0
    generated_tokens: int = 0
    evaluated_tokens: int = 0
    generation_s: float = 0.0
    pending: int | None = None
    """The newest token, not decoded yet."""

    @contextmanager
    def prompt(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.prompt_s += time.perf_counter() - start

    @contextmanager
    def generation(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.generation_s += time.perf_counter() - start

    def timing(self) -> Timing:
        return Timing(
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            prompt_s=self.prompt_s,
            generated_tokens=self.generated_tokens,
            evaluated_tokens=self.evaluated_tokens,
            generation_s=self.generation_s,
        )


@cache
def _log() -> NativeLog:
    return NativeLog()


@cache
def _llama() -> Any:
    """llama-cpp-python's low-level bindings, with their log captured. Raises EngineMissingError."""
    native.library()
    from llama_cpp import llama_cpp

    _log().attach(llama_cpp)
    llama_cpp.llama_backend_init()
    return llama_cpp


def _checked_model(path: Path) -> ModelHeader:
    model = read_model_header(path)
    old = legacy_expert_tensors(model.tensors)
    if old:
        raise GGUFError(
            f"{path}: an old Mixtral file with one tensor per expert ({old[0]}), which llama.cpp no longer loads; "
            f"stack its experts with `ggufmoe quantize {path.name} -o NEW.gguf -q COPY`"
        )
    if not model.tensors:
        raise GGUFError(f"{path}: holds no weights, only a vocabulary or metadata; give the file of the whole model")
    return model


def _cache_bytes_per_token(header: Header, options: ContextOptions) -> float:
    """What a token takes in the KV cache of a plain transformer; 0 where the header tells of another kind."""
    arch = header.get("general.architecture")
    keys = ("block_count", "embedding_length", "attention.head_count")
    n_layer, n_embd, n_head = (header.get(f"{arch}.{key}") for key in keys)
    n_head_kv = header.get(f"{arch}.attention.head_count_kv", n_head)
    widths = [header.get(f"{arch}.attention.{key}_length") for key in ("key", "value")]
    numbers = (n_layer, n_embd, n_head, n_head_kv, *(width for width in widths if width is not None))
    if arch != "llama" or not all(type(number) is int and number > 0 for number in numbers):
        return 0.0
    types = [GGMLType[name.upper()] for name in (options.cache_type_k, options.cache_type_v)]
    widths = [width or n_embd // n_head for width in widths]
    per_head = sum(width * kind.block_bytes / kind.block_size for width, kind in zip(widths, types, strict=True))
    return float(n_layer * n_head_kv * per_head)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
