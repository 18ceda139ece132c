"""``LlamaCpp``: llama-cpp-python's ``Llama`` with our offload options, for programs that take a ``Llama``.

Owns putting a plan into the parameters that ``Llama`` passes to libllama, cancelling a call, turns of calls from
several threads, and the thread in which the calls run that llama.cpp may give up in. Everything else is
llama-cpp-python's own code; new programs should use ``Engine``. The class is made on first access, because importing
its base loads the native library.
"""

from __future__ import annotations

import ctypes
import difflib
import inspect
import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache, partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ggufmoe.errors import Cancelled, EngineError, EngineLostError, ModelLoadError, OptionError
from ggufmoe.files import StrPath, user_path
from ggufmoe.gguf.model import read_model_header
from ggufmoe.gguf.types import GGMLType
from ggufmoe.gguf.upstream import Keys
from ggufmoe.native import library as native
from ggufmoe.native.log import no_wait_callback
from ggufmoe.native.wording import PLACEMENT_LINES, is_refusal, lacks_pinned_memory
from ggufmoe.options import ContextOptions, OffloadOptions, options_of
from ggufmoe.placement.devices import find_devices
from ggufmoe.placement.load_report import Placement, placement_of
from ggufmoe.placement.model_params import device_list, set_parameters
from ggufmoe.placement.offload import plan_offload
from ggufmoe.placement.offload_plan import OffloadPlan
from ggufmoe.runtime.bindings import native_api, native_log
from ggufmoe.runtime.loading import checked_model, loading_lock
from ggufmoe.runtime.nativethread import TEXT_STACK_BYTES, NativeThread, T

if TYPE_CHECKING:
    from llama_cpp import Llama
else:
    Llama = object

_REPLACED = ("n_gpu_layers", "split_mode", "main_gpu", "tensor_split", "use_mmap", "use_mlock", "offload_kqv")
"""Arguments of ``Llama`` that ``offload`` replaces."""
_FORMER = frozenset({"f16_kv", "low_vram", "memory_f16", "mul_mat_q", "n_gqa", "n_parts", "rms_norm_eps"})
"""Arguments that ``Llama`` had in versions 0.1 and 0.2, and swallows today. Frameworks still pass them."""
_GUARDED = ("tokenize", "detokenize", "sample", "save_state", "load_state", "_init_sampler")
"""Methods of ``Llama`` that run in the native thread, besides those that are overridden here."""

_logger = logging.getLogger("ggufmoe")


class _Stream:
    """The parts of a completion, which has its turn until they end, or until it is closed or deleted."""

    def __init__(self, parts: Iterator[Any], end_turn: Callable[[], None]) -> None:
        self._parts = parts
        self._end_turn: Callable[[], None] | None = end_turn
        self._has_given_way = False
        self.reader = threading.get_ident()
        """The thread that read last."""

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        """The next part. Raises EngineError if the model was used for another call meanwhile."""
        if self._has_given_way:
            raise EngineError("the thread that read this stream has made another call: close a stream before")
        self.reader = threading.get_ident()
        try:
            return next(self._parts)
        except BaseException:
            self.close()
            raise

    def give_way(self) -> None:
        """End the turn; the stream cannot go on."""
        self._has_given_way = self._end_turn is not None
        self.close()

    def close(self) -> None:
        """End the turn. May be called again."""
        end_turn, self._end_turn = self._end_turn, None
        if end_turn is not None:
            try:
                self._parts.close()  # type: ignore[attr-defined]  # it is a generator
            finally:
                end_turn()

    __del__ = close


class _PlacedLlama(Llama):  # type: ignore[misc]  # llama_cpp is not looked into
    """``llama_cpp.Llama`` whose weights are placed as ``offload`` says, and whose calls can be cancelled.

    It takes the arguments of ``Llama`` with its defaults; an argument that ``Llama`` does not know is an OptionError,
    but those that earlier versions had are left out, and logged. Completions and embeddings that several threads ask
    for are computed one after another. A stream has its turn until it is read to its end, closed or deleted; if the
    thread that reads it makes another call, the stream ends with an EngineError.

    With ``offload``, the arguments that it replaces (n_gpu_layers, split_mode, main_gpu, tensor_split, use_mmap,
    use_mlock, offload_kqv) are OptionErrors as well; without it they work as in ``Llama``.

    Raises GGUFError for a file that is corrupt or of an old layout, OptionError for options that do not fit the model
    or the machine, ModelLoadError when llama.cpp refuses it, EngineMissingError without llama-cpp-python, and
    EngineLostError when llama.cpp gives up: then the object is lost with its memory, and ``close`` frees nothing.
    """

    placement: Placement | None = None
    """Where weights, KV cache and buffers are: the plan and libllama's report; None without ``offload``."""
    _stack: Any = None
    _native: NativeThread | None = None

    def __init__(self, model_path: StrPath, *, offload: OffloadOptions | None = None, **arguments: Any) -> None:
        if former := sorted(_FORMER & arguments.keys()):
            _logger.info("%s: left out %s, which llama.cpp no longer has", model_path, ", ".join(former))
            arguments = {name: value for name, value in arguments.items() if name not in _FORMER}
        _check_arguments(arguments, offload)
        self._offload = offload
        self._turn = threading.Lock()
        self._stream: weakref.ref[_Stream] | None = None
        self._api = native_api()
        self._abort_callback, self._abort_flag = no_wait_callback(self._api)
        self._model_params: Any = None
        self._context_params: Any = None
        self._plan: OffloadPlan | None = None
        path = user_path(model_path)
        self._header = read_model_header(path) if arguments.get("vocab_only") else checked_model(path)
        flag = ctypes.create_string_buffer(1)
        self._native = NativeThread(str(path), flag, lambda: None, stack_bytes=TEXT_STACK_BYTES)
        try:
            self._machine = self._call(partial(find_devices, offload.device if offload else None))
            self._load(path, arguments)
        except BaseException:
            self.close()
            raise

    def _load(self, path: Path, arguments: Mapping[str, Any]) -> None:
        mark = native_log().mark()
        load = partial(super().__init__, os.fspath(path), **{**arguments, **self._replacing(arguments)})
        with loading_lock, native_log().collecting(PLACEMENT_LINES) as lines, _outputs_restored_at_loss():
            try:
                self._call(load)
            except ValueError as error:
                if not is_refusal(str(error)):
                    raise
                cause = native_log().cause_since(mark)
                hint = "; OffloadOptions(no_host=True) does without pinned memory" if lacks_pinned_memory(cause) else ""
                raise ModelLoadError(f"{path}: llama.cpp cannot load it: {cause}{hint}") from error
        self.kv_overrides = arguments.get("kv_overrides")
        if self._plan is not None:
            self.placement = placement_of(self._plan, lines, self._machine)
            for difference in self.placement.differences:
                _logger.warning("%s: not placed as planned: %s", path, difference)

    def _replacing(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of ``Llama`` that express a part of ``offload``; the rest is put into its parameters."""
        if self._offload is None:
            return {}
        replacing: dict[str, Any] = {"offload_kqv": self._offload.kv_offload}
        if self._offload.n_expert_used is not None:
            key = self._header.hyper.key(Keys.LLM.EXPERT_USED_COUNT)
            given = arguments.get("kv_overrides") or {}
            if key in given:
                raise OptionError(f"kv_overrides: {key} is what offload.n_expert_used says: leave one of the two out")
            replacing["kv_overrides"] = {**given, key: self._offload.n_expert_used}
        return replacing

    # ---- the parameters that Llama.__init__ makes and passes to libllama

    @property
    def model_params(self) -> Any:
        """``llama_model_params``. ``Llama`` makes both parameters and then reads this one to load the model."""
        if self._context_params is not None and self._plan is None:
            self._place()
        return self._model_params

    @model_params.setter
    def model_params(self, parameters: Any) -> None:
        self._devices = device_list(self._machine.device_handles.values())
        parameters.devices = ctypes.addressof(self._devices)
        self._model_params = parameters

    @property
    def context_params(self) -> Any:
        """``llama_context_params``, with our abort flag in it."""
        return self._context_params

    @context_params.setter
    def context_params(self, parameters: Any) -> None:
        parameters.abort_callback = self._abort_callback
        parameters.abort_callback_data = ctypes.addressof(self._abort_flag)
        self._context_params = parameters

    def _place(self) -> None:
        if self._offload is None:
            return
        context = _context_options(self._context_params)
        self._plan = plan_offload(self._header, context, self._offload, self._machine.places, self._machine.host)
        for warning in self._plan.warnings:
            _logger.warning("%s: %s", self._header.paths[0], warning)
        # the number of experts is among the kv_overrides of Llama, whose array this would replace
        offload = replace(self._offload, n_expert_used=None)
        self._alive = set_parameters(self._api, self._model_params, self._machine, self._plan, offload, "")

    # ---- the native thread

    def _call(self, function: Callable[[], T]) -> T:
        """Run ``function`` in the native thread. Raises EngineLostError once llama.cpp gives up.

        Ctrl-C stops a computation of tokens; loading and tokenizing are waited for. A second Ctrl-C leaves at once, and
        the next call waits.
        """
        native = self._native
        if native is None or native.is_current:
            return function()
        try:
            return native.call(function)
        except KeyboardInterrupt:
            self.cancel()
            try:
                native.call(lambda: None)  # the function has ended
            finally:
                self._abort_flag[0] = b"\x00"
            raise

    # ---- turns

    def create_completion(self, *arguments: Any, **named: Any) -> Any:
        """As in ``Llama``; waits for its turn."""
        self._begin_turn()
        try:
            made = super().create_completion(*arguments, **named)
        except BaseException:
            self._turn.release()
            raise
        if not isinstance(made, Iterator):
            self._turn.release()
            return made
        stream = _Stream(made, self._turn.release)
        self._stream = weakref.ref(stream)
        return stream

    def embed(self, *arguments: Any, **named: Any) -> Any:
        """As in ``Llama``; waits for its turn, and raises Cancelled after ``cancel``."""
        self._begin_turn()
        try:
            self._abort_flag[0] = b"\x00"
            return self._call(partial(self._stoppable, partial(super().embed, *arguments, **named)))
        finally:
            self._turn.release()

    def _begin_turn(self) -> None:
        stream = self._stream() if self._stream is not None else None
        if stream is not None and stream.reader == threading.get_ident():
            stream.give_way()
        del stream  # whoever reads it may delete it while this call waits
        self._turn.acquire()

    # ---- stopping

    def cancel(self) -> None:
        """Cancel the call that computes now: it raises Cancelled. Meant for another thread; the model stays usable.

        On the CPU and Metal the call ends within a fraction of a second, elsewhere after the batch being computed.
        """
        self._abort_flag[0] = b"\x01"

    def eval(self, tokens: Sequence[int]) -> None:
        """As in ``Llama``; raises Cancelled after ``cancel``."""
        for begin in range(0, max(len(tokens), 1), self.n_batch):
            self._call(partial(self._stoppable, partial(super().eval, tokens[begin : begin + self.n_batch])))

    def generate(self, *arguments: Any, **named: Any) -> Iterator[int]:
        """As in ``Llama``; raises Cancelled after ``cancel``."""
        self._abort_flag[0] = b"\x00"
        tokens: Iterator[int] = super().generate(*arguments, **named)
        return tokens

    def _stoppable(self, function: Callable[[], T]) -> T:
        """The result of ``function``. Raises Cancelled if ``cancel`` is called meanwhile, or was before."""
        if self._abort_flag[0] == b"\x00":
            try:
                return function()
            except RuntimeError:
                if self._abort_flag[0] == b"\x00":
                    raise
        self._abort_flag[0] = b"\x00"
        # the logits of this call were not computed, so the next one has to evaluate its tokens
        self._requires_eval = True
        raise Cancelled("the call was cancelled from another thread")

    # ---- the end

    def close(self) -> None:
        """Give back all memory. May be called again."""
        native = self._native
        if native is not None:
            native.close()
        if self._stack is not None and not (native is not None and native.is_lost):
            super().close()

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        if self._offload is None:
            return state
        return {name: value for name, value in state.items() if name not in _REPLACED} | {"offload": self._offload}


if TYPE_CHECKING:
    LlamaCpp = _PlacedLlama
else:

    def __getattr__(name: str) -> Any:
        if name != "LlamaCpp":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return _llama_class()


@cache
def _llama_class() -> type:
    base = _base()
    guarded = {name: _guarded(getattr(base, name)) for name in _GUARDED}
    return type("LlamaCpp", (_PlacedLlama, base), {"__doc__": _PlacedLlama.__doc__, "__module__": __name__, **guarded})


def _guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    """``method`` of ``Llama``, run in the native thread."""

    @wraps(method)
    def guarded(self: _PlacedLlama, *arguments: Any, **named: Any) -> Any:
        return self._call(partial(method, self, *arguments, **named))

    return guarded


@contextmanager
def _outputs_restored_at_loss() -> Iterator[None]:
    """Give stdout and stderr back if llama.cpp gives up within the block, where ``Llama`` may have redirected them."""
    streams, kept = (sys.stdout, sys.stderr), {}
    for number in (1, 2):
        with suppress(OSError):  # a program without a console has none
            kept[number] = os.dup(number)
    try:
        yield
    except EngineLostError:
        for number, copy in kept.items():
            os.dup2(copy, number)
        sys.stdout, sys.stderr = streams
        raise
    finally:
        for copy in kept.values():
            os.close(copy)


@cache
def _base() -> Any:
    """``llama_cpp.Llama``, even if LlamaCpp takes its place there later. Raises EngineMissingError."""
    native.require_bindings("LlamaCpp")
    from llama_cpp import Llama as Base

    return Base


def _check_arguments(arguments: Mapping[str, Any], offload: OffloadOptions | None) -> None:
    """Raise OptionError for arguments that ``Llama`` would ignore and for those that ``offload`` replaces.

    Raises TypeError if ``offload`` is not an OffloadOptions.
    """
    options_of(OffloadOptions, offload)
    known = set(inspect.signature(_base()).parameters)
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise OptionError(f"Llama has no argument {name}{hint}")
    if offload is None:
        return
    if double := [name for name in _REPLACED if name in arguments]:
        raise OptionError(f"{', '.join(double)}: offload says where the model goes; leave out one of the two")
    if arguments.get("vocab_only"):
        raise OptionError("vocab_only loads no weights: leave out offload")
    if offload.rpc:
        raise OptionError("a worker that is lost ends the process of a Llama: with offload.rpc, use ggufmoe.Engine")


def _context_options(parameters: Any) -> ContextOptions:
    """``llama_context_params`` as options for the planner."""
    types: dict[int, Any] = {kind.id: kind.name.lower() for kind in GGMLType}
    # with n_ctx=0 Llama knows its batch only once the model is loaded
    n_batch = parameters.n_batch or ContextOptions.n_batch
    return ContextOptions(
        n_ctx=parameters.n_ctx,
        n_batch=n_batch,
        n_ubatch=parameters.n_ubatch or min(n_batch, ContextOptions.n_ubatch),
        flash_attn="on" if parameters.flash_attn_type == 1 else "off",
        cache_type_k=types[parameters.type_k],
        cache_type_v=types[parameters.type_v],
        swa_full=bool(parameters.swa_full),
    )
