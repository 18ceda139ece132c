"""A model and its context as llama.cpp holds them: loaded as planned, with progress and cancelling, freed at the end.

Owns the native handles and what is checked before llama.cpp allocates. All of it runs in the engine's native thread.
Where weights go is planned by ``placement``; what is computed is said in ``kvcache`` and ``generation``.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ggufmoe.errors import Cancelled, EngineError, GGUFError, InputError, ModelLoadError, OptionError
from ggufmoe.gguf.checks import check_loadable
from ggufmoe.gguf.header import Header
from ggufmoe.gguf.model import ModelHeader, check_kind, read_model_header
from ggufmoe.gguf.names import legacy_experts
from ggufmoe.gguf.own_keys import EOS_TOKEN_IDS
from ggufmoe.gguf.types import GGMLType
from ggufmoe.gguf.upstream import Keys
from ggufmoe.native.large_pages import Ranges, ask_for_large_pages, large_mappings
from ggufmoe.native.log import NativeLog, no_wait_callback
from ggufmoe.native.router_tap import RouterTap
from ggufmoe.native.spinning import SpinLimit
from ggufmoe.native.threadpool import ThreadPool, thread_pool
from ggufmoe.native.wording import PLACEMENT_LINES, lacks_pinned_memory
from ggufmoe.options import ContextOptions, OffloadOptions
from ggufmoe.placement.advice import context_warnings
from ggufmoe.placement.cpu import default_threads
from ggufmoe.placement.devices import DeviceTable, find_devices
from ggufmoe.placement.footprint import Footprint, context_tokens, one_by_one_reason
from ggufmoe.placement.load_report import Placement, placement_of
from ggufmoe.placement.model_params import set_parameters
from ggufmoe.placement.offload import plan_offload
from ggufmoe.placement.offload_plan import OffloadPlan
from ggufmoe.runtime.events import Token
from ggufmoe.runtime.kvcache import ContextState, KeptTexts, KVCache, SavedStates
from ggufmoe.runtime.promptcache import open_prompt_cache
from ggufmoe.runtime.slots import Slots
from ggufmoe.runtime.vocabulary import LoadedVocabulary
from ggufmoe.sizes import memory_size
from ggufmoe.work import OnProgress, Progress, memory_bytes

_FLASH_ATTN = {"auto": -1, "off": 0, "on": 1}

loading_lock = threading.Lock()
"""Held while a model is loaded: the report is read from llama.cpp's log, and a process has only one log."""
_logger = logging.getLogger("ggufmoe")


@dataclass(frozen=True)
class LoadRequest:
    """A checked model, and the options to load it with."""

    model: ModelHeader
    context: ContextOptions
    offload: OffloadOptions

    @property
    def path(self) -> Path:
        return self.model.paths[0]


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
    check_loadable(model)
    return model


class LoadedModel:
    """The native handles of a model: ``load`` it once, ``free`` it once."""

    def __init__(self, api: Any, log: NativeLog, request: LoadRequest) -> None:
        self.api = api
        self.log = log
        self.path = request.path
        self.on_token: Callable[[Token], Token] | None = None
        """Called with each new token, in the native thread; its result is what the reader gets."""
        self.vocabulary: LoadedVocabulary
        self.placement: Placement
        self.n_ctx_train: int
        self.abort_callback, self.abort_flag = no_wait_callback(api)
        self.observer: Any = None
        self._tap: RouterTap | None = None
        self._header: Header = request.model.shards[0].header
        self._request = request
        self._spin_limit = SpinLimit()
        self._saved = SavedStates(request.context.cache_ram * 2**20)
        self._kept = KeptTexts()
        self._is_loading = False
        self._model: Any = None
        self._context: Any = None
        self._threads: ThreadPool | None = None
        self._lost = ""
        """Why the last attempt to make a context failed."""
        self._warned: set[str] = set()
        self._slots: Slots

    @property
    def cache(self) -> KVCache:
        """The KV cache of the context; of several, the one that was used last. Raises what ``slots`` raises."""
        return self.slots.latest

    @property
    def slots(self) -> Slots:
        """The KV caches of the context. Raises EngineError once freed, and after a new context could not be made."""
        if not self._model:
            raise EngineError(f"the engine of {self.path} has been closed")
        if not self._context:
            raise EngineError(
                f"{self.path}: there is no context since another one could not be made ({self._lost}); "
                "make one with set_context, or load again"
            )
        return self._slots

    @property
    def n_expert(self) -> int:
        """Experts in each layer; 0 for a dense model."""
        return self._request.model.hyper.n_expert

    @property
    def n_embd(self) -> int:
        """Numbers that the last norm gives for each token."""
        return int(self.api.llama_model_n_embd_out(self._model))

    @property
    def handle(self) -> Any:
        """The ``llama_model *``, until ``free``."""
        return self._model

    def load(self, callback: LoadCallback) -> None:
        """Load weights and make a context. ``free`` also gives back what a load that failed has allocated.

        Raises ModelLoadError, Cancelled, and what ``on_progress`` raised.
        """
        request = self._request
        self._check_parallel(request.context)
        machine = find_devices(request.offload.device, remote=bool(request.offload.workers))
        plan = plan_offload(request.model, request.context, request.offload, machine.places, machine.host)
        self._warn(plan.warnings)
        self._check_memory(request.context, plan)
        with self._loading(), self.log.collecting(PLACEMENT_LINES) as lines:
            self._check_not_cancelled(callback)
            self._model = self._load_model(machine, plan, callback)
            self._check_not_cancelled(callback)
            self.n_ctx_train = int(self.api.llama_model_n_ctx_train(self._model))
            self._context = self._make_context(request.context)
        self.placement = placement_of(plan, lines, machine)
        for difference in self.placement.differences:
            _logger.warning("%s: not placed as planned: %s", self.path, difference)
        self._check_not_cancelled(callback)
        if not self.api.llama_get_memory(self._context) or self.api.llama_model_has_encoder(self._model):
            raise ModelLoadError(
                f"{self.path}: not a model that continues text: it has an encoder, or keeps no context"
            )
        self.vocabulary = LoadedVocabulary(self.api, self._model, self.path, self._header.get(EOS_TOKEN_IDS, ()))
        self._kept = self._open_kept()
        self._slots = self._new_slots()

    def _warn(self, warnings: Iterable[str]) -> None:
        """Log each warning once for this model."""
        for warning in warnings:
            if warning not in self._warned:
                self._warned.add(warning)
                _logger.warning("%s: %s", self.path, warning)

    @contextmanager
    def _loading(self) -> Iterator[None]:
        with loading_lock:
            self._is_loading = True
            try:
                yield
            finally:
                self._is_loading = False

    def release_locks(self) -> None:
        """Give back what the calling thread holds, which will never do so: llama.cpp has given up in it."""
        if self._is_loading:
            loading_lock.release()
        elif hasattr(self, "vocabulary"):
            self.vocabulary.end_uses()

    def _check_not_cancelled(self, callback: LoadCallback) -> None:
        if callback.cancelled():
            raise Cancelled(f"{self.path}: loading was stopped")

    def _open_kept(self) -> KeptTexts:
        request, n_ctx = self._request, self.api.llama_n_ctx_seq(self._context)
        sizes = {"n_ctx": n_ctx, "n_vocab": self.vocabulary.n_tokens}
        return open_prompt_cache(request.model, request.context, request.offload, **sizes)

    def _keep_texts(self) -> None:
        """Have the texts of the context, and the copies of others, written to disk, if they are to be kept."""
        if not self._context or not hasattr(self, "_slots"):
            return
        for state in self._saved:
            self._kept.flush()
            if state.is_exact and self._kept.wants(state.tokens, lambda: state.data.nbytes):  # noqa: B023
                self._kept.keep(state)
        for cache in self._slots.caches:
            self._kept.flush()
            cache.keep_text()
        self._kept.flush()

    def _new_slots(self) -> Slots:
        shared = ContextState()
        shared.tap = None if self.observer is not None else self._tap
        caches = [self._new_cache(sequence, shared) for sequence in range(self._request.context.n_parallel)]
        return Slots(self.api, caches, shared)

    def _new_cache(self, sequence: int, shared: ContextState) -> KVCache:
        elsewhere = any(share.layers or share.buffers for share in self.placement.plan.shares[:-1])
        return KVCache(
            self.api,
            self._context,
            n_vocab=self.vocabulary.n_tokens,
            log=self.log,
            path=self.path,
            saved=self._saved,
            abort_flag=self.abort_flag,
            computed_by=("worker" if self._request.offload.workers else "gpu") if elsewhere else "cpu",
            spin_limit=self._spin_limit,
            window=self.api.llama_model_n_swa(self._model),
            is_chunked=self._request.model.memory.is_chunked,
            swa_full=self._request.context.swa_full,
            is_recurrent=self.api.llama_model_is_recurrent(self._model) or self.api.llama_model_is_hybrid(self._model),
            sequence=sequence,
            shared=shared,
            kept=self._kept,
        )

    # ---- the model

    def _load_model(self, machine: DeviceTable, plan: OffloadPlan, callback: LoadCallback) -> Any:
        mark = self.log.mark()
        parameters = self.api.llama_model_default_params()
        key = self._request.model.hyper.key(Keys.LLM.EXPERT_USED_COUNT)
        _alive = set_parameters(self.api, parameters, machine, plan, self._request.offload, key)
        parameters.progress_callback = self.api.llama_progress_callback(callback)
        callback.mapped = large_mappings()  # with the stacks of this engine's threads, which need no large pages
        model = self.api.llama_model_load_from_file(os.fsencode(self.path), parameters)
        if not model and not callback.stopped:
            cause = self.log.cause_since(mark)
            if lacks_pinned_memory(cause) and not parameters.no_host:
                _logger.warning("%s: %s; trying again as with --no-host", self.path, cause)
                parameters.no_host = True
                model = self.api.llama_model_load_from_file(os.fsencode(self.path), parameters)
        if not model:
            callback.raise_failure()
            self._check_not_cancelled(callback)
            raise ModelLoadError(f"{self.path}: llama.cpp cannot load it: {self.log.cause_since(mark)}")
        return model

    # ---- the context

    def _make_context(self, options: ContextOptions) -> Any:
        mark, mapped = self.log.mark(), large_mappings()
        context = self.api.llama_init_from_model(self._model, self._context_parameters(options))
        if not context:
            raise ModelLoadError(
                f"{self.path}: no such context can be made: {self.log.cause_since(mark)} "
                "(a smaller --ctx-size takes less memory)"
            )
        ask_for_large_pages(mapped, is_used=True)
        self._threads = thread_pool(options.n_threads or default_threads())
        if self._threads is not None:
            self._threads.attach(context)
        return context

    def _free_context(self) -> None:
        context, self._context = self._context, None
        threads, self._threads = self._threads, None
        if context:
            self.api.llama_free(context)
        if threads is not None:
            threads.free()

    def _check_parallel(self, options: ContextOptions) -> None:
        """Raise OptionError for several answers at once of a model whose answers are computed one after another."""
        if options.n_parallel > 1 and (reason := one_by_one_reason(self._request.model.memory)):
            raise OptionError(
                f"{self.path}: --parallel {options.n_parallel}: {reason}, so that its answers are computed one after "
                "another; leave out --parallel"
            )

    def _check_memory(self, options: ContextOptions, plan: OffloadPlan) -> None:
        """Raise ModelLoadError for a context whose KV cache and buffers exceed this machine's memory.

        Systems that promise more memory than they have end the process once llama.cpp fills its buffers. Nothing is
        refused where the KV cache's size is only an upper estimate, or the system does not tell its memory.
        """
        footprint, there = Footprint(self._request.model, options, self._request.offload), memory_bytes()
        if not there or not footprint.model.memory.is_exact:
            return
        in_gpus = self._request.offload.kv_offload
        kv_bytes = sum(
            n_bytes for layer, n_bytes in enumerate(footprint.kv_layers) if layer in plan.host.layers or not in_gpus
        )
        computes_here = plan.host.layers or plan.host.expert_layers
        buffer_bytes = footprint.compute_bytes if computes_here else footprint.host_compute_bytes
        if kv_bytes + buffer_bytes > there:
            raise ModelLoadError(
                f"{self.path}: a context of {options.n_ctx or footprint.n_ctx} tokens takes "
                f"{memory_size(kv_bytes)} for the KV cache and about {memory_size(buffer_bytes)} for buffers, "
                f"and this machine has {memory_size(there)}; ask for a smaller one with --ctx-size"
            )

    def _context_parameters(self, options: ContextOptions) -> Any:
        parameters = self.api.llama_context_default_params()
        n_threads = options.n_threads or default_threads()
        values = {
            "n_ctx": context_tokens(options, self.n_ctx_train),
            "n_batch": options.n_batch,
            "n_seq_max": max(options.n_seq_max, options.n_parallel),
            "kv_unified": options.n_parallel > 1,
            "n_ubatch": min(options.n_ubatch, options.n_batch),
            "n_threads": n_threads,
            "n_threads_batch": n_threads,
            "flash_attn_type": _FLASH_ATTN[options.flash_attn],
            "type_k": GGMLType[options.cache_type_k.upper()].id,
            "type_v": GGMLType[options.cache_type_v.upper()].id,
            "abort_callback": self.abort_callback,
            "abort_callback_data": ctypes.addressof(self.abort_flag),
            "swa_full": options.swa_full,
            "no_perf": True,
            "offload_kqv": self._request.offload.kv_offload,
        }
        if self.observer is not None:
            values["cb_eval"] = self.observer
        elif self._tap is not None:
            values |= {"cb_eval": self._tap.callback, "cb_eval_user_data": self._tap.user_data}
        for name, value in values.items():
            setattr(parameters, name, value)
        return parameters

    def observe(self, observer: Callable[[int, bool], bool] | None) -> None:
        """Make a new context whose graphs are shown to ``observer``; the cache is emptied."""
        callback = self.api.ggml_backend_sched_eval_callback
        made = None if observer is None else callback(lambda tensor, ask, _: observer(tensor, ask))
        self._renew_context(self._request.context, made)

    def set_context(self, options: ContextOptions) -> None:
        """Make a new context with other options; the cache is emptied."""
        self._renew_context(options, self.observer)

    @property
    def tells_routing(self) -> bool:
        """Whether the context tells which experts tokens go to. May be asked from any thread."""
        return self._tap is not None and self.observer is None

    def tell_routing(self) -> bool:
        """Make the context anew, so that it tells which experts tokens go to, and keep its texts; returns True.

        Raises InputError for a model without experts and without llvmlite, EngineError while the graph is observed.
        """
        hyper, n_used = self._request.model.hyper, self._request.offload.n_expert_used
        if not hyper.n_expert:
            raise InputError(f"{self.path}: a dense model: it has no experts to route between")
        if self.observer is not None:
            raise EngineError(f"the graph of {self.path} is being observed, and routing cannot be told meanwhile")
        if self._tap is not None:
            return True
        callback_type = self.api.ggml_backend_sched_eval_callback
        try:
            tap = RouterTap(callback_type, n_layer=hyper.n_layer or 0, n_used=n_used or hyper.n_expert_used)
        except (ImportError, RuntimeError) as error:  # RuntimeError: LLVM does not know the processor
            raise InputError(f"telling the routing needs llvmlite: {error}") from error
        self.slots.set_aside()
        self._tap = tap
        self._renew_context(self._request.context, None, keeps_saved=True)
        return True

    def _renew_context(self, options: ContextOptions, observer: Any, *, keeps_saved: bool = False) -> None:
        self._keep_texts()
        # the old one may call its observer until it is gone
        self._free_context()
        self.observer = observer
        try:
            self._check_parallel(options)
            self._check_memory(options, self.placement.plan)
            self._warn(context_warnings(Footprint(self._request.model, options, self._request.offload)))
            self._context = self._make_context(options)
        except BaseException as error:
            self.observer = self.on_token = None
            self._lost = str(error)
            raise
        is_other, self._request = options != self._request.context, replace(self._request, context=options)
        if not keeps_saved:
            self._saved = SavedStates(options.cache_ram * 2**20)
        if is_other:
            self._kept = self._open_kept()
        self._slots = self._new_slots()

    # ---- the end

    def free(self) -> None:
        """Give back all native memory. Texts that are to be kept on disk are written before."""
        self._keep_texts()
        if hasattr(self, "vocabulary"):
            self.vocabulary.close()
        self._spin_limit.close()
        self._saved.clear()
        self._free_context()
        model, self._model = self._model, None
        if model:
            self.api.llama_model_free(model)


class LoadCallback:
    """The callback of llama.cpp's loading: passes the progress on, and returns whether to continue.

    llama.cpp calls it first when it has allocated the memory for weights and before it writes there: large pages are
    asked for then. Nothing can be raised through C, so an exception of ``on_progress`` is kept for ``raise_failure``.
    """

    def __init__(self, on_progress: OnProgress | None, cancelled: Callable[[], bool], item: str) -> None:
        self.cancelled = cancelled
        self.stopped = False
        """Whether llama.cpp was told to stop."""
        self._on_progress = on_progress
        self._item = item
        self._failure: BaseException | None = None
        self.mapped: Ranges | None = None
        """What was mapped just before the load; None once large pages were asked for."""

    def __call__(self, part: float, _: Any) -> bool:
        try:
            if self.mapped is not None:
                ask_for_large_pages(self.mapped)
                self.mapped = None
            if self._on_progress is not None:
                self._on_progress(Progress("load", part, 1.0, "parts", self._item))
            self.stopped = self.cancelled()
        except BaseException as failure:
            self._failure, self.stopped = failure, True
        return not self.stopped

    def raise_failure(self) -> None:
        """Raise the exception of ``on_progress``, if there was one."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
