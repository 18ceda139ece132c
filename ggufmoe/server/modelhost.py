"""The model that the server serves: loaded in the background, and loaded again when its engine is lost."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ggufmoe.engine import Engine
from ggufmoe.errors import (
    Cancelled,
    EngineError,
    EngineLostError,
    GgufmoeError,
    TemplateError,
    WorkerLostError,
    one_line,
)
from ggufmoe.runtime.chatformat import ChatFormat
from ggufmoe.server.apierror import ApiError, unavailable
from ggufmoe.server.told_routing import routing_facts
from ggufmoe.work import OnProgress, Progress

_logger = logging.getLogger("ggufmoe")
_FIRST_RETRY_S = 2.0
_LONGEST_RETRY_S = 60.0

Load = Callable[[OnProgress, threading.Event], Engine]
"""Loads the model; reports progress, and ends when the flag is set."""
HostState = Literal["loading", "ok", "reloading", "closed"]


@dataclass(frozen=True)
class ServedModel:
    """A loaded model, and how it is spoken to."""

    engine: Engine
    chat_format: ChatFormat | TemplateError
    """An error where the model has no chat template that can be used."""
    routing: dict[str, Any] | None
    """What clients are told of the model's experts; None for a dense model."""

    def chat(self) -> ChatFormat:
        """How the model is spoken to. Raises TemplateError."""
        if isinstance(self.chat_format, TemplateError):
            raise self.chat_format
        return self.chat_format


class ModelHost:
    """Holds the model that ``load`` loads, in a thread of its own; ``template`` is a name or file, as for ChatFormat.

    An engine that is lost is replaced: ``load`` is called again until it succeeds, at growing intervals.
    """

    def __init__(self, load: Load, template: str | None = None) -> None:
        self._load = load
        self._template = template
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._served: ServedModel | None = None
        self._thread: threading.Thread | None = None
        self._state: HostState = "loading"
        self._reason = "the model is being loaded"
        self._progress = 0.0
        self.n_reloads = 0
        """How often an engine was lost."""

    def load(self) -> None:
        """Load the model for the first time. Raises what ``load`` and ChatFormat raise, but for TemplateError."""
        self._set(self._loaded())

    def served(self) -> ServedModel:
        """The model. Raises ApiError with status 503 and the reason while there is none."""
        served = self._served
        if served is not None and served.engine.closed and not self._stop.is_set():
            self.lose(served.engine, "the process that computes has ended")
        with self._lock:
            if self._served is None:
                raise unavailable(self._reason)
            return self._served

    def check(self, engine: Engine, error: Exception) -> None:
        """Load the model again if ``error`` says that ``engine`` is lost."""
        is_lost = isinstance(error, EngineLostError | WorkerLostError)
        if is_lost or (isinstance(error, EngineError) and engine.closed):
            self.lose(engine, one_line(error))

    def lose(self, engine: Engine, reason: str) -> None:
        """Give ``engine`` up, if it is the present one, and load the model again in the background."""
        with self._lock:
            if self._served is None or self._served.engine is not engine or self._stop.is_set():
                return
            self._served = None
            self._state, self._reason = "reloading", f"the model is being loaded again: {reason}"
            self._progress = 0.0
            self.n_reloads += 1
            self._thread = threading.Thread(target=self._replace, args=(engine,), name="ggufmoe-reload", daemon=True)
            self._thread.start()
        _logger.warning("the model is loaded again: %s", reason)

    def health(self) -> tuple[int, dict[str, Any]]:
        """Status and body of ``/health``."""
        with contextlib.suppress(ApiError):
            self.served()
        with self._lock:
            if self._served is not None:
                return 200, {"status": "ok"}
            return 503, {"status": self._state, "reason": self._reason, "progress": round(self._progress, 3)}

    def stop_loading(self) -> None:
        """End a loading that is under way, with Cancelled, and begin no other."""
        self._stop.set()

    def close(self) -> None:
        """End loading and give the model's memory back."""
        self._stop.set()
        thread = self._thread
        if thread is not None:
            thread.join()
        with self._lock:
            served, self._served = self._served, None
            self._state, self._reason = "closed", "the server is being stopped"
        if served is not None:
            served.engine.close()

    def _loaded(self) -> ServedModel:
        engine = self._load(self._show, self._stop)
        try:
            return ServedModel(engine, ChatFormat(engine, self._template), routing_facts(engine))
        except TemplateError as error:
            if self._template is not None:
                engine.close()
                raise
            return ServedModel(engine, error, routing_facts(engine))
        except BaseException:
            engine.close()
            raise

    def _show(self, progress: Progress) -> None:
        self._progress = progress.done / progress.total if progress.total else 0.0

    def _set(self, served: ServedModel) -> None:
        with self._lock:
            self._served, self._state = served, "ok"

    def _replace(self, lost: Engine) -> None:
        wait_s = _FIRST_RETRY_S
        with contextlib.suppress(GgufmoeError):
            lost.close()
        while not self._stop.is_set():
            try:
                self._set(self._loaded())
                return
            except Cancelled:
                return
            except GgufmoeError as error:
                _logger.warning("the model cannot be loaded again, next try in %.0f s: %s", wait_s, error)
                with self._lock:
                    self._reason = f"the model cannot be loaded again: {one_line(error)}"
            self._stop.wait(wait_s)
            wait_s = min(2 * wait_s, _LONGEST_RETRY_S)
