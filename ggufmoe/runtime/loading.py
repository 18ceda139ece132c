"""A model and its context as llama.cpp holds them: loaded as planned, watched over while it loads, freed at the end.

Owns the native handles. All of it runs in the engine's native thread. Where weights go is planned in ``offload``, what
is computed is said in ``kvcache`` and ``generation``.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ggufmoe.errors import Cancelled, EngineError, ModelLoadError
from ggufmoe.gguf.header import Header
from ggufmoe.gguf.model import ModelHeader
from ggufmoe.gguf.own_keys import EOS_TOKEN_IDS
from ggufmoe.gguf.types import GGMLType
from ggufmoe.gguf.upstream import Keys
from ggufmoe.native.log import NativeLog, no_wait_callback
from ggufmoe.options import ContextOptions, OffloadOptions
from ggufmoe.placement.cpu import default_threads, memory_bytes
from ggufmoe.placement.devices import Machine, find_machine
from ggufmoe.placement.footprint import context_tokens, kv_cache_bytes
from ggufmoe.placement.offload import OffloadPlan, plan_offload
from ggufmoe.placement.report import REPORT_LINES, Placement, placement_of, set_parameters
from ggufmoe.runtime.events import Token
from ggufmoe.runtime.kvcache import ComputedBy, KVCache, SavedStates
from ggufmoe.runtime.vocabulary import Vocabulary
from ggufmoe.sizes import memory_size

_FLASH_ATTN = {"auto": -1, "off": 0, "on": 1}

loading_lock = threading.Lock()
"""Held while a model is loaded: llama.cpp's log, which is read for a report, is one for the whole process."""
_logger = logging.getLogger("ggufmoe")


@dataclass(frozen=True)
class LoadRequest:
    """What to load, and how."""

    model: ModelHeader
    context: ContextOptions
    offload: OffloadOptions

    @property
    def path(self) -> Path:
        return self.model.paths[0]


class LoadedModel:
    """The handles of a model: ``load`` it once, ``free`` it once."""

    def __init__(self, api: Any, log: NativeLog, request: LoadRequest) -> None:
        self.api = api
        self.log = log
        self.path = request.path
        self.on_token: Callable[[Token], Token] | None = None
        """What a new token passes through before its reader gets it, in the native thread."""
        self.vocabulary: Vocabulary
        self.placement: Placement
        self.n_ctx_train: int
        self.abort_callback, self.abort_flag = no_wait_callback(api)
        self.observer: Any = None
        self._header: Header = request.model.shards[0].header
        self._request = request
        self._saved = SavedStates(request.context.cache_ram * 2**20)
        self._model: Any = None
        self._context: Any = None
        self._lost = ""
        """Why there is no context any more, if there is none."""
        self._cache: KVCache

    @property
    def cache(self) -> KVCache:
        """What the context keeps. Raises EngineError once freed, and where a new one could not be made."""
        if not self._model:
            raise EngineError(f"the engine of {self.path} has been closed")
        if not self._context:
            raise EngineError(
                f"{self.path}: there is no context since another one could not be made ({self._lost}); "
                "make one with set_context, or load again"
            )
        return self._cache

    @property
    def handle(self) -> Any:
        """The ``llama_model *``, until ``free``."""
        return self._model

    def load(self, watcher: LoadWatcher) -> None:
        """Raises ModelLoadError, Cancelled, and what ``watcher`` does; ``free`` gives back what was loaded."""
        request = self._request
        machine = find_machine(request.offload.device, remote=bool(request.offload.workers))
        plan = plan_offload(request.model, request.context, request.offload, machine.places, machine.host)
        for warning in plan.warnings:
            _logger.warning("%s: %s", self.path, warning)
        with loading_lock, self.log.collecting(REPORT_LINES) as lines:
            self._check_wanted(watcher)
            self._model = self._load_model(machine, plan, watcher)
            self._check_wanted(watcher)
            self.n_ctx_train = int(self.api.llama_model_n_ctx_train(self._model))
            self._context = self._make_context(request.context, plan)
        self.placement = placement_of(plan, lines, machine)
        for difference in self.placement.differences:
            _logger.warning("%s: not placed as planned: %s", self.path, difference)
        self._check_wanted(watcher)
        if not self.api.llama_get_memory(self._context) or self.api.llama_model_has_encoder(self._model):
            raise ModelLoadError(
                f"{self.path}: not a model that continues text: it has an encoder, or keeps no context"
            )
        self.vocabulary = Vocabulary(self.api, self._model, self.path, self._header.get(EOS_TOKEN_IDS, ()))
        self._cache = self._new_cache()

    def _check_wanted(self, watcher: LoadWatcher) -> None:
        if watcher.cancelled():
            raise Cancelled(f"{self.path}: loading was stopped")

    def _new_cache(self) -> KVCache:
        n_vocab = self.vocabulary.n_tokens
        flag, computed_by = self.abort_flag, self._computed_by()
        return KVCache(self.api, self._context, n_vocab, self.log, self.path, self._saved, flag, computed_by)

    def _computed_by(self) -> ComputedBy:
        if not any(share.layers or share.buffers for share in self.placement.plan.shares[:-1]):
            return "cpu"
        return "worker" if self._request.offload.workers else "gpu"

    # ---- the model

    def _load_model(self, machine: Machine, plan: OffloadPlan, watcher: LoadWatcher) -> Any:
        mark = self.log.mark()
        parameters = self.api.llama_model_default_params()
        key = self._request.model.hyper.key(Keys.LLM.EXPERT_USED_COUNT)
        _alive = set_parameters(self.api, parameters, machine, plan, self._request.offload, key)
        parameters.progress_callback = self.api.llama_progress_callback(watcher)
        model = self.api.llama_model_load_from_file(os.fsencode(self.path), parameters)
        if not model and not watcher.stopped:
            cause = self.log.cause_since(mark)
            if "_Host buffer" in cause and not parameters.no_host:
                _logger.warning("%s: %s; trying again as with --no-host", self.path, cause)
                parameters.no_host = True
                model = self.api.llama_model_load_from_file(os.fsencode(self.path), parameters)
        if not model:
            watcher.check()
            self._check_wanted(watcher)
            raise ModelLoadError(f"{self.path}: llama.cpp cannot load it: {self.log.cause_since(mark)}")
        return model

    # ---- the context

    def _make_context(self, options: ContextOptions, plan: OffloadPlan) -> Any:
        mark = self.log.mark()
        parameters = self._context_parameters(options)
        self._check_cache_size(options, parameters.n_ctx, plan)
        context = self.api.llama_init_from_model(self._model, parameters)
        if not context:
            raise ModelLoadError(
                f"{self.path}: no such context can be made: {self.log.cause_since(mark)} "
                "(a smaller --ctx-size takes less memory)"
            )
        return context

    def _check_cache_size(self, options: ContextOptions, n_ctx: int, plan: OffloadPlan) -> None:
        # systems that promise more memory than they have end the process once llama.cpp fills its cache
        hyper, there = self._request.model.hyper, memory_bytes()
        if hyper.architecture != "llama" or not there:
            return
        needed = sum(kv_cache_bytes(hyper, layer, n_ctx, options) for layer in range(plan.n_layer))
        planned = sum(share.kv_bytes for share in plan.shares)
        if planned and needed * plan.host.kv_bytes / planned > there:
            raise ModelLoadError(
                f"{self.path}: a context of {n_ctx} tokens takes {memory_size(needed)}, and this machine has "
                f"{memory_size(there)}; ask for less with --ctx-size"
            )

    def _context_parameters(self, options: ContextOptions) -> Any:
        parameters = self.api.llama_context_default_params()
        n_threads = options.n_threads or default_threads()
        values = {
            "n_ctx": context_tokens(options, self.n_ctx_train),
            "n_batch": options.n_batch,
            "n_seq_max": options.n_seq_max,
            "n_ubatch": min(options.n_ubatch, options.n_batch),
            "n_threads": n_threads,
            "n_threads_batch": n_threads,
            "flash_attn_type": _FLASH_ATTN[options.flash_attn],
            "type_k": GGMLType[options.cache_type_k.upper()].id,
            "type_v": GGMLType[options.cache_type_v.upper()].id,
            "abort_callback": self.abort_callback,
            "abort_callback_data": ctypes.addressof(self.abort_flag),
            "no_perf": True,
            "offload_kqv": self._request.offload.kv_offload,
        }
        if self.observer is not None:
            values["cb_eval"] = self.observer
        for name, value in values.items():
            setattr(parameters, name, value)
        return parameters

    def observe(self, observer: Callable[[int, bool], bool] | None) -> None:
        """A new context, whose graphs ``observer`` sees; what was in the cache is lost."""
        callback = self.api.ggml_backend_sched_eval_callback
        made = None if observer is None else callback(lambda tensor, ask, _: observer(tensor, ask))
        self._renew_context(self._request.context, made)

    def set_context(self, options: ContextOptions) -> None:
        """A new context with other options; what was in the cache is lost."""
        self._renew_context(options, self.observer)

    def _renew_context(self, options: ContextOptions, observer: Any) -> None:
        # the old one may call its observer until it is gone
        context, self._context = self._context, None
        if context:
            self.api.llama_free(context)
        self.observer = observer
        try:
            self._context = self._make_context(options, self.placement.plan)
        except BaseException as error:
            self.observer = self.on_token = None
            self._lost = str(error)
            raise
        self._request = replace(self._request, context=options)
        self._saved = SavedStates(options.cache_ram * 2**20)
        self._cache = self._new_cache()

    # ---- the end

    def free(self) -> None:
        """Give back all memory."""
        if hasattr(self, "vocabulary"):
            self.vocabulary.close()
        self._saved.clear()
        context, self._context = self._context, None
        model, self._model = self._model, None
        if context:
            self.api.llama_free(context)
        if model:
            self.api.llama_model_free(model)


class LoadWatcher:
    """Whom llama.cpp asks while it loads whether to go on: tells ``on_progress`` the part that is done, 0 to 1.

    Nothing can be raised through C, so what ``on_progress`` raises is kept for ``check``.
    """

    def __init__(self, on_progress: Callable[[float], None] | None, cancelled: Callable[[], bool]) -> None:
        self.cancelled = cancelled
        self._on_progress = on_progress
        self._failure: BaseException | None = None
        self.stopped = False

    def __call__(self, part: float, _: Any) -> bool:
        try:
            if self._on_progress is not None:
                self._on_progress(part)
            self.stopped = self.cancelled()
        except BaseException as failure:
            self._failure, self.stopped = failure, True
        return not self.stopped

    def check(self) -> None:
        """Raise what ``on_progress`` has raised."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
