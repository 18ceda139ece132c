"""An engine in a process of its own, for models of which other machines compute a part.

llama.cpp ends its process when a worker is lost, and waits without end for one that hangs. Here that process is a child
(``hosted``), and its end is an exception. Owns what happens on this side: forwarding, streams, and what to say of a
process that has ended.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ggufmoe.errors import Cancelled, EngineError, WorkerLostError
from ggufmoe.gguf.model import read_model_header
from ggufmoe.options import ContextOptions, OffloadOptions
from ggufmoe.remote.host import (
    LOADING,
    Call,
    Cancel,
    Credit,
    End,
    Failure,
    Item,
    Logged,
    Progress,
    Reply,
    Silence,
    Start,
    Stop,
)
from ggufmoe.remote.process import ChildProcess, Packed
from ggufmoe.remote.rpc import find_workers, lost_workers
from ggufmoe.runtime.engine import Engine
from ggufmoe.work import CancelFlag, checked_flag

_CALLS = (
    "tokenize",
    "token_text",
    "piece",
    "ends_text",
    "detokenize",
    "logits",
    "forget",
    "apply",
    "prefill",
    "evaluate",
    "save_session",
    "load_session",
)
"""Methods of Engine that the child answers."""
_STREAMS = ("generate", "logits_by_batch", "iterate")
"""Those that give an iterator, which the child reads ahead."""
_VALUES = ("bos_token", "eos_token", "adds_bos", "overflow", "cached_tokens")
"""Properties that the child is asked for each time."""

_AHEAD = 32
"""Items of a stream that the child may be ahead of its reader, so that no token waits for a round trip."""
_CLOSE_S = 5.0
"""So long the child has to give memory back before it is killed; workers give theirs back when it is gone."""
_DIAGNOSIS_S = 2.0
_LAST_WORDS_S = 10.0
"""What a process that cannot be killed, as it waits for a disk, has sent is not waited for any longer."""
_WAIT_S = 0.2
"""Windows notices Ctrl-C only between waits."""
_CANCEL_S = 0.02
_RPC_ABORTS = ("RPC", "Failed to connect")
_logger = logging.getLogger("ggufmoe")


class ChildEngine(Engine):
    """What ``Engine(...)`` gives when ``offload.rpc`` names workers: the same methods, computed in a child process.

    Raises WorkerError when a worker cannot be used, WorkerLostError when one is lost while loading or later; the engine
    is then at its end, and every further call raises the same. The graph cannot be ``observed`` from here.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        context: ContextOptions | None = None,
        offload: OffloadOptions | None = None,
        *,
        on_progress: Callable[[float], None] | None = None,
        cancel: CancelFlag | None = None,
    ) -> None:
        assert offload is not None, "an engine without workers needs no child"
        model = read_model_header(Path(path))
        self.path = model.paths[0]
        self.header = model.shards[0].header
        endpoints = dict.fromkeys(device.endpoint for device in find_workers(offload.workers))
        self._link = _Link(self.path, offload.workers)
        start = Start(Path(path), context, offload, tuple(endpoints), _logger.getEffectiveLevel())
        try:
            facts = self._link.load(start, on_progress, cancel)
        except BaseException:
            self._link.close(0.0)
            raise
        vars(self).update(facts)

    def cancel(self) -> None:
        """Stop the generation that runs now, from another thread; it ends with the reason ``cancelled``."""
        self._link.send(Cancel(None))

    def set_context(self, options: ContextOptions) -> None:
        """Go on with another context for the same weights; see Engine."""
        self._link.call("set_context", (options,), {})
        self.n_ctx = self._link.call("n_ctx", (), {})

    def observed(self, *_: Any, **__: Any) -> Any:
        """Not here: raises EngineError, because the observer would have to be in the process that computes."""
        raise EngineError(
            f"{self.path}: with workers (--rpc) the graph is computed in another process and cannot be watched from "
            "here; trace_routing works, RoutingTracer needs an engine without --rpc"
        )

    def compute_chunks(self, *_: Any, **__: Any) -> Any:
        """Not here: raises EngineError, because logits of every row would have to cross to this process."""
        raise EngineError(f"{self.path}: logits of a whole text are not compared with workers; leave out --rpc")

    @property
    def closed(self) -> bool:
        """Whether it has been closed, or its process has ended."""
        return self._link.has_ended

    def close(self) -> None:
        """End the process; further calls raise EngineError. May be called again, and takes 5 s if a worker hangs."""
        link = getattr(self, "_link", None)
        if link is not None:
            link.close(_CLOSE_S)


def _forward_call(name: str) -> Callable[..., Any]:
    @functools.wraps(getattr(Engine, name))
    def forward(self: ChildEngine, *arguments: Any, **keywords: Any) -> Any:
        return self._link.call(name, arguments, keywords)

    return forward


def _forward_stream(name: str) -> Callable[..., Any]:
    @functools.wraps(getattr(Engine, name))
    def forward(self: ChildEngine, *arguments: Any, **keywords: Any) -> Any:
        return self._link.stream(name, arguments, keywords)

    return forward


def _forward_value(name: str) -> property:
    def forward(self: ChildEngine) -> Any:
        return self._link.call(name, (), {})

    return property(forward, doc=getattr(Engine, name).__doc__)


for _name in _CALLS:
    setattr(ChildEngine, _name, _forward_call(_name))
for _name in _STREAMS:
    setattr(ChildEngine, _name, _forward_stream(_name))
for _name in _VALUES:
    setattr(ChildEngine, _name, _forward_value(_name))


class _Link:
    """The child and what is awaited from it; used by any number of threads."""

    def __init__(self, path: Path, workers: tuple[tuple[str, int], ...]) -> None:
        self._path = path
        self._workers = workers
        self._ids = itertools.count(LOADING + 1)
        self._inboxes: dict[int, queue.SimpleQueue[Any]] = {}
        self._lock = threading.Lock()
        self._end: EngineError | None = None
        self._is_loaded = False
        self._silence: Silence | None = None
        self._process = ChildProcess("engine")
        self._receiver = threading.Thread(target=self._receive, name="ggufmoe-child", daemon=True)
        self._receiver.start()

    def load(
        self, start: Start, on_progress: Callable[[float], None] | None, cancel: CancelFlag | None
    ) -> dict[str, Any]:
        """Load the model; gives FACTS. Whatever this raises, the child is of no use then."""
        inbox = self._awaiting(LOADING)
        self._process.send(start)
        while True:
            message = self._next(inbox, cancel)
            if message is None:
                raise Cancelled(f"{self._path}: loading was stopped")
            if isinstance(message, Failure):
                raise message.error
            if isinstance(message, Reply):
                self.forget(LOADING)
                self._is_loaded = True
                return dict(message.value.unpacked("what is known of the engine"))
            if isinstance(message, Progress) and on_progress is not None:
                on_progress(message.part)

    @property
    def has_ended(self) -> bool:
        """Whether nothing can be asked any more."""
        return self._end is not None

    def send(self, message: Any) -> None:
        self._process.send(message)

    def call(self, name: str, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
        """The value of an attribute, or what a method gives; raises what it raises."""
        cancel, call = self._call(name, arguments, keywords)
        return self._ask(call, cancel)

    def stream(self, name: str, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Iterator[Any]:
        """The items that a method gives; it begins with the first one that is asked for."""
        cancel, call = self._call(name, arguments, keywords)
        self._ask(call, None)
        return _Stream(self, call.id, self._awaiting(call.id), cancel)

    def _call(
        self, name: str, arguments: tuple[Any, ...], keywords: Mapping[str, Any]
    ) -> tuple[CancelFlag | None, Call]:
        """A flag cannot be sent: it is watched here, and has a twin in the child."""
        cancel = checked_flag(keywords.get("cancel"))
        others = {key: value for key, value in keywords.items() if key != "cancel"}
        is_set = cancel is not None and cancel.is_set()
        given = Packed.of((arguments, others), f"an argument of {name}")
        return cancel, Call(next(self._ids), name, given, "cancel" in keywords, is_set)

    def _ask(self, call: Call, cancel: CancelFlag | None) -> Any:
        inbox = self._awaiting(call.id)
        self._process.send(call)
        return self._answer(call.id, inbox, cancel)

    def _awaiting(self, id: int) -> queue.SimpleQueue[Any]:
        self.check_ours()
        with self._lock:
            if self._end is not None:
                raise type(self._end)(str(self._end))
            return self._inboxes.setdefault(id, queue.SimpleQueue())

    def check_ours(self) -> None:
        """Raise EngineError in a process that was forked afterwards, where no answer arrives."""
        if not self._process.is_ours:
            raise EngineError(f"{self._path}: loaded before this process was forked; load it again in here")

    def _answer(self, id: int, inbox: queue.SimpleQueue[Any], cancel: CancelFlag | None) -> Any:
        try:
            message = self._next(inbox, cancel)
            if message is None:
                self.send(Cancel(id))
                message = self._next(inbox, None)
            if isinstance(message, Failure):
                raise message.error
            return message.value.unpacked("the result")
        finally:
            self.forget(id)

    def _next(self, inbox: queue.SimpleQueue[Any], cancel: CancelFlag | None) -> Any:
        """The next message; None once ``cancel`` is set."""
        while cancel is None or not cancel.is_set():
            with contextlib.suppress(queue.Empty):
                return inbox.get(timeout=_WAIT_S if cancel is None else _CANCEL_S)
        return None

    def forget(self, id: int) -> None:
        """Nothing more is awaited under this id."""
        self._inboxes.pop(id, None)

    def close(self, grace_s: float) -> None:
        """End the child; whoever waits for it gets EngineError."""
        if not self._process.is_ours:
            return
        with self._lock:
            if self._end is None:
                self._end = EngineError(f"the engine of {self._path} has been closed")
        self._process.end(grace_s)
        if threading.current_thread() is not self._receiver:
            self._receiver.join(_LAST_WORDS_S)

    # ---- what comes back

    def _receive(self) -> None:
        try:
            for message in self._process.messages():
                self._sort(message)
        finally:  # whoever waits must hear of it
            self._finish()

    def _sort(self, message: Any) -> None:
        if isinstance(message, Logged):
            logging.getLogger(message.logger).log(message.level, "%s", message.text)
        elif isinstance(message, Silence):
            self._silence = message
        elif (inbox := self._inboxes.get(message.id)) is not None:
            inbox.put(message)

    def _finish(self) -> None:
        if not self._process.wait(_DIAGNOSIS_S):
            self._process.end()
        end = self._end or self._diagnosis()
        with self._lock:
            self._end = self._end or end
            waiting = list(self._inboxes.values())
        for inbox in waiting:
            inbox.put(Failure(LOADING, type(self._end)(str(self._end))))
        self._process.end()

    def _diagnosis(self) -> EngineError:
        self._process.end()
        abort = self._process.abort_message()
        silence = self._silence
        if silence is None and not any(sign in abort for sign in _RPC_ABORTS):
            return EngineError(f"{self._path}: the process that computes has ended: {self._process.how_it_ended()}")
        when = "while it was in use" if self._is_loaded else "while the model was being loaded"
        cause = abort if silence is None else f"no sign of life for {silence.seconds:.0f} s ({silence.limit})"
        # a worker that is there is free again now that its client has gone
        lost = "; ".join(lost_workers(self._workers, _DIAGNOSIS_S)) or "it is there again"
        return WorkerLostError(f"{self._path}: a worker was lost {when}: {cause}: {lost}")


class _Stream(Iterator[Any]):
    """Reads what the child sends; closing it, or forgetting it, ends the generation."""

    def __init__(self, link: _Link, id: int, inbox: queue.SimpleQueue[Any], cancel: CancelFlag | None) -> None:
        self._link = link
        self._id = id
        self._inbox = inbox
        self._cancel = cancel
        self._n_read = 0
        self._is_over = False
        self._is_cancelled = False

    def __next__(self) -> Any:
        if self._is_over:
            raise StopIteration
        self._link.check_ours()
        self._pass_cancel_on()
        if self._n_read % (_AHEAD // 2) == 0:
            self._link.send(Credit(self._id, _AHEAD if self._n_read == 0 else _AHEAD // 2))
        message = self._take()
        if isinstance(message, Item):
            self._n_read += 1
            return message.value.unpacked("an item of a stream")
        self._is_over = True
        self._link.forget(self._id)
        if isinstance(message, Failure):
            raise message.error
        raise StopIteration

    def _take(self) -> Item | Failure | End:
        while True:
            self._pass_cancel_on()
            try:
                message: Item | Failure | End = self._inbox.get(timeout=_WAIT_S if self._cancel is None else _CANCEL_S)
            except queue.Empty:
                continue
            return message

    def _pass_cancel_on(self) -> None:
        if not self._is_cancelled and self._cancel is not None and self._cancel.is_set():
            self._is_cancelled = True
            self._link.send(Cancel(self._id))

    def close(self) -> None:
        """End it; nothing more comes."""
        if not self._is_over:
            self._is_over = True
            self._link.forget(self._id)
            self._link.send(Stop(self._id))

    def __del__(self) -> None:
        if not sys.is_finalizing():  # what sending needs has gone by then, and the child goes anyway
            self.close()
