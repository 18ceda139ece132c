"""The parent's side of an engine in a child process: requests, answers and streams, used by any number of threads.

Owns what is awaited from the child, and what is said of a child that has ended. ``child`` makes an engine of it,
``host`` is the other side.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

from ggufmoe.errors import Cancelled, EngineError, EngineLostError, WorkerLostError
from ggufmoe.native.wording import is_worker_abort
from ggufmoe.options import OffloadOptions
from ggufmoe.remote.process import ChildProcess
from ggufmoe.remote.requests import Request, StreamRequest
from ggufmoe.remote.rpc import lost_workers
from ggufmoe.remote.wire import (
    LOADING,
    Ask,
    Cancel,
    Credit,
    End,
    EngineFacts,
    Failure,
    FromChild,
    Item,
    LoadProgress,
    Logged,
    Packed,
    Reply,
    Silence,
    Start,
    Stop,
    ToChild,
)
from ggufmoe.work import CancelFlag, OnProgress, checked_flag

ResultT = TypeVar("ResultT")
ItemT = TypeVar("ItemT")
_Answer = Reply | Failure | Item | End | LoadProgress
_Inbox = queue.SimpleQueue[_Answer]

_AHEAD = 32
"""Items of a stream that the child may be ahead of its reader, so that no token waits for a round trip."""
_DIAGNOSIS_S = 2.0
"""Time for the child to end after its last message, and for workers to answer, at most; then the cause is named. Less
where the user's ``rpc_timeout`` is shorter."""
_LAST_WORDS_S = 10.0
"""``close`` waits this long for what the child has sent. A process that waits for a disk cannot be killed."""
_WAIT_S = 0.2
"""Length of one wait: Windows notices Ctrl-C only between waits."""
_CANCEL_S = 0.02
"""Length of one wait of a caller with a cancel flag."""


class EngineLink:
    """A child process for the model at ``path`` and the workers of ``offload``."""

    def __init__(self, path: Path, offload: OffloadOptions) -> None:
        self._path = path
        self._workers = offload.workers
        self._diagnosis_s = min(_DIAGNOSIS_S, offload.rpc_timeout)
        self._ids = itertools.count(LOADING + 1)
        self._inboxes: dict[int, _Inbox] = {}
        self._lock = threading.Lock()
        self._end: EngineError | None = None
        self._is_loaded = False
        self._silence: Silence | None = None
        self._process = ChildProcess("engine")
        self._receiver = threading.Thread(target=self._receive, name="ggufmoe-child", daemon=True)
        self._receiver.start()

    @property
    def has_ended(self) -> bool:
        """Whether the child was closed or has ended."""
        return self._end is not None

    def load(self, start: Start, on_progress: OnProgress | None, cancel: CancelFlag | None) -> EngineFacts:
        """Load the model. When this raises, the child is of no use any more: ``close`` it."""
        inbox = self._open_inbox(LOADING)
        self._process.send(start)
        while (message := _next_of(inbox, cancel)) is not None:
            if isinstance(message, Failure):
                raise message.error
            if isinstance(message, Reply):
                self.forget(LOADING)
                self._is_loaded = True
                facts: EngineFacts = message.value.unpacked("the facts about the engine")
                return facts
            if isinstance(message, LoadProgress) and on_progress is not None:
                on_progress(message.progress)
        raise Cancelled(f"{self._path}: loading was stopped")

    def ask(self, request: Request[ResultT], cancel: CancelFlag | None = None) -> ResultT:
        """The result of a request; raises what it raises. When ``cancel`` is set, so is the request's flag.

        An exception in the waiting thread, such as KeyboardInterrupt, also sets the request's flag.
        """
        ask = self._ask_for(request, checked_flag(cancel))
        result: ResultT = self._answer(ask, cancel, at_interrupt=Cancel(ask.id))
        return result

    def stream(self, request: StreamRequest[ItemT], cancel: CancelFlag | None = None) -> RemoteStream[ItemT]:
        """The items of a request's iterator. It is made at once, and starts when the first item is asked for."""
        ask = self._ask_for(request, checked_flag(cancel))
        self._answer(ask, None, at_interrupt=Stop(ask.id))
        return RemoteStream(self, ask.id, self._open_inbox(ask.id), cancel)

    def _ask_for(self, request: Request[Any], cancel: CancelFlag | None) -> Ask:
        packed = Packed.of(request, f"an argument of {request.method}")
        return Ask(next(self._ids), request.method, packed, cancel is not None and cancel.is_set())

    def _answer(self, ask: Ask, cancel: CancelFlag | None, *, at_interrupt: ToChild) -> Any:
        """Send ``ask`` and wait for its answer. An exception while waiting sends ``at_interrupt`` to the child."""
        inbox = self._open_inbox(ask.id)
        try:
            self.send(ask)
            message = _next_of(inbox, cancel)
            if message is None:
                self.send(Cancel(ask.id))
                message = _next_of(inbox, None)
        except BaseException:  # Ctrl-C: nobody will use the answer
            self.send(at_interrupt)
            raise
        finally:
            self.forget(ask.id)
        if isinstance(message, Failure):
            raise message.error
        assert isinstance(message, Reply), "a request has one answer"
        return message.value.unpacked("the result")

    def send(self, message: ToChild) -> None:
        """Send a message to the child without waiting."""
        self._process.send(message)

    def forget(self, id: int) -> None:
        """Drop answers with this id that come from now on."""
        self._inboxes.pop(id, None)

    def check_open(self) -> None:
        """Raise the error that tells why the child has ended, if it has; otherwise as ``check_not_forked``."""
        self.check_not_forked()
        if self._end is not None:
            raise type(self._end)(str(self._end))

    def check_not_forked(self) -> None:
        """Raise EngineError in a process that was forked afterwards, where no answer arrives."""
        if not self._process.is_ours:
            raise EngineError(f"{self._path}: loaded before this process was forked; load it again in here")

    def _open_inbox(self, id: int) -> _Inbox:
        with self._lock:
            self.check_open()
            return self._inboxes.setdefault(id, queue.SimpleQueue())

    def close(self, grace_s: float) -> None:
        """End the child, and kill it after ``grace_s``; threads that wait for it get EngineError."""
        if not self._process.is_ours:
            return
        with self._lock:
            if self._end is None:
                self._end = EngineError(f"the engine of {self._path} has been closed")
        self._process.end(grace_s)
        if threading.current_thread() is not self._receiver:
            self._receiver.join(_LAST_WORDS_S)

    # ---- the thread that receives

    def _receive(self) -> None:
        try:
            for message in self._process.messages():
                self._deliver(message)
        finally:  # waiting threads must be told
            self._finish()

    def _deliver(self, message: FromChild) -> None:
        if isinstance(message, Logged):
            logging.getLogger(message.logger).log(message.level, "%s", message.text)
        elif isinstance(message, Silence):
            self._silence = message
        elif (inbox := self._inboxes.get(message.id)) is not None:
            inbox.put(message)

    def _finish(self) -> None:
        if not self._process.wait(self._diagnosis_s):
            self._process.end()
        end = self._end or self._cause_of_end()
        with self._lock:
            self._end = self._end or end
            waiting = list(self._inboxes.values())
        for inbox in waiting:
            inbox.put(Failure(LOADING, type(self._end)(str(self._end))))
        self._process.end()

    def _cause_of_end(self) -> EngineError:
        self._process.end()
        abort = self._process.abort_message()
        silence = self._silence
        if silence is None and not is_worker_abort(abort):
            how = self._process.how_it_ended()
            if abort:
                return EngineLostError(
                    f"{self._path}: llama.cpp has given up: {how}; this engine is lost, load the model again"
                )
            return EngineError(f"{self._path}: the process that computes has ended: {how}")
        when = "while it was in use" if self._is_loaded else "while the model was being loaded"
        cause = abort if silence is None else f"no sign of life for {silence.seconds:.1f} s ({silence.limit})"
        # a worker that still runs is free again, now that its client has gone
        lost = "; ".join(lost_workers(self._workers, self._diagnosis_s)) or "it answers again"
        return WorkerLostError(f"{self._path}: a worker was lost {when}: {cause}: {lost}")


def _next_of(inbox: _Inbox, cancel: CancelFlag | None) -> _Answer | None:
    """The next message; None once ``cancel`` is set."""
    while cancel is None or not cancel.is_set():
        with contextlib.suppress(queue.Empty):
            return inbox.get(timeout=_WAIT_S if cancel is None else _CANCEL_S)
    return None


class RemoteStream(Iterator[ItemT], Generic[ItemT]):
    """An iterator over the items that the child sends. Closing or dropping it ends the computation there."""

    def __init__(self, link: EngineLink, id: int, inbox: _Inbox, cancel: CancelFlag | None) -> None:
        self._link = link
        self._id = id
        self._inbox = inbox
        self._cancel = cancel
        self._n_read = 0
        self._is_over = False
        self._is_cancelled = False

    def __next__(self) -> ItemT:
        if self._is_over:
            raise StopIteration
        self._link.check_not_forked()
        self._pass_cancel_on()
        if self._n_read % (_AHEAD // 2) == 0:
            self._link.send(Credit(self._id, _AHEAD if self._n_read == 0 else _AHEAD // 2))
        message = self._wait_for_message()
        if isinstance(message, Item):
            self._n_read += 1
            item: ItemT = message.value.unpacked("an item of a stream")
            return item
        self._is_over = True
        self._link.forget(self._id)
        if isinstance(message, Failure):
            raise message.error
        raise StopIteration

    def _wait_for_message(self) -> _Answer:
        while True:
            self._pass_cancel_on()
            with contextlib.suppress(queue.Empty):
                return self._inbox.get(timeout=_WAIT_S if self._cancel is None else _CANCEL_S)

    def _pass_cancel_on(self) -> None:
        if not self._is_cancelled and self._cancel is not None and self._cancel.is_set():
            self._is_cancelled = True
            self._link.send(Cancel(self._id))

    def close(self) -> None:
        """End the stream; no more items come."""
        if not self._is_over:
            self._is_over = True
            self._link.forget(self._id)
            self._link.send(Stop(self._id))

    def __del__(self) -> None:
        if not sys.is_finalizing():  # what sending needs has gone by then, and the child ends anyway
            self.close()
