"""The child's side of ``ChildEngine``: a process in which llama.cpp may abort or hang without harm to the program.

Owns the threads that answer requests, the streams that are read ahead, and the end of the process when workers are
silent. Only ``link`` talks to it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any

from ggufmoe.errors import EngineError
from ggufmoe.native import library as native
from ggufmoe.native.aborts import abort_watch
from ggufmoe.remote.process import leave_with_parent
from ggufmoe.remote.requests import Request, StreamRequest
from ggufmoe.remote.rpc import ANSWER_S, guard_connections, register_workers
from ggufmoe.remote.watch import TICK_S, Patience, WorkerWatch
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
    encode_message,
    portable_error,
    read_messages,
)
from ggufmoe.runtime.local import LocalEngine
from ggufmoe.work import Progress

_SLOW = 10
"""How many times as long as a token's step one step of a prompt or of loading may take."""
_CONNECTING = Patience(2 * ANSWER_S, "while connecting")
_TICKS = 4
"""Looks at the signs of life within the shortest limit."""
_LEAVE_S = 10.0

Send = Callable[[FromChild], None]


def host_engine(incoming: IO[bytes], outgoing: IO[bytes]) -> None:
    """In the child: load and serve an engine until ``incoming`` is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    leave_with_parent()
    abort_watch().is_disabled = True  # this process ends with its engine, and the parent reads the message
    lock = threading.Lock()

    def send(message: FromChild) -> None:
        data = encode_message(message)
        with lock:
            outgoing.write(data)
            outgoing.flush()

    messages = read_messages(incoming)
    start = next(messages, None)
    if not isinstance(start, Start):
        return
    logger = logging.getLogger("ggufmoe")
    logger.setLevel(start.log_level)
    logger.addHandler(_LogForwarder(send))
    logger.propagate = False
    host = EngineHost(start, send)
    for message in messages:
        host.take(message)
    host.leave()


def step_patience(n_tokens: int, timeout_s: float) -> Patience:
    """The longest silence while a batch of ``n_tokens`` is computed, or something else, for 0.

    A batch that has one token of each of several answers may need as many times the experts that one of them needs.
    """
    times = n_tokens if 0 < n_tokens < _SLOW else _SLOW
    words = {1: "", _SLOW: "ten times "}.get(times, f"{times} times ")
    return Patience(times * timeout_s, f"{words}--rpc-timeout {timeout_s:g}")


class EngineHost:
    """Loads the model that ``start`` names and answers messages about it by ``send``."""

    def __init__(self, start: Start, send: Send) -> None:
        self._send = send
        timeout_s = start.offload.rpc_timeout
        self._timeout_s = timeout_s
        self._load_patience = _CONNECTING
        tick_s = min(TICK_S, timeout_s / _TICKS)
        self._endpoints = start.endpoints
        self._watch = WorkerWatch(self._signs_of_life, self._patience, tick_s=tick_s)
        self._n_reports = 0
        self._engine: LocalEngine | None = None
        self._flags: dict[int, threading.Event] = {}
        self._streams: dict[int, _HostedStream] = {}
        self._stopping: dict[int, _HostedStream] = {}
        _in_thread(self._end_after_silence)
        _in_thread(self._load, start)

    def take(self, message: ToChild) -> None:
        """Begin what ``message`` asks for; this never waits for the engine."""
        if isinstance(message, Ask):
            flag = self._flags[message.id] = threading.Event()
            if message.is_cancelled:
                flag.set()
            _in_thread(self._answer, message, flag)
        elif isinstance(message, Cancel):
            self._cancel(message.id)
        elif isinstance(message, Stop):
            self._stop(message.id)
        elif isinstance(message, Credit) and (stream := self._streams.get(message.id)) is not None:
            stream.allow(message.n_items)

    def leave(self) -> None:
        """Free the engine and leave the process; within ``_LEAVE_S`` even if workers hang."""
        if self._engine is None:  # it is loading
            os._exit(0)
        _in_thread(_exit_later)  # the parent kills a child that does not leave, unless it has ended itself
        for stream in list(self._streams.values()):
            stream.stop()
        self._engine.cancel()
        self._engine.close()

    # ---- loading

    def _load(self, start: Start) -> None:
        try:
            native.library()  # takes as long as the disk does; the next step waits for workers alone
            with self._watch.waiting():
                register_workers(start.endpoints)
            self._load_patience = step_patience(0, self._timeout_s)
            with contextlib.ExitStack() as waiting:

                def follow() -> None:
                    self._watch.follow_this_thread()
                    waiting.enter_context(self._watch.waiting())

                engine = LocalEngine(
                    start.path, start.context, start.offload, on_progress=self._report, before_load=follow
                )
            facts = Packed.of(_facts_of(engine), "the facts about the engine")
        except Exception as error:  # the parent raises it
            self._send(Failure(LOADING, portable_error(error)))
            return
        self._engine = engine
        self._send(Reply(LOADING, facts))

    def _report(self, progress: Progress) -> None:
        self._n_reports += 1
        self._send(LoadProgress(LOADING, progress))

    # ---- the watch

    def _patience(self) -> Patience | None:
        if self._engine is None:
            return self._load_patience
        activity = self._engine.activity
        if not activity.is_busy:
            return None
        return step_patience(activity.given_tokens, self._timeout_s)

    def _signs_of_life(self) -> tuple[int, ...]:
        """Bytes on the connections to workers (Linux), reports while loading, batches that were computed."""
        n_batches = 0 if self._engine is None else self._engine.activity.n_batches
        return guard_connections(self._endpoints), self._n_reports, n_batches

    def _end_after_silence(self) -> None:
        try:
            seconds, patience = self._watch.wait_for_silence()
            self._send(Silence(seconds, patience.name))
        finally:  # the parent must not wait for ever, whatever went wrong here
            os._exit(1)

    def _watch_until_free(self) -> None:
        """Keep the watch going while a cancelled computation, whose caller has left, is still with the workers."""
        if self._engine is not None:
            with contextlib.suppress(EngineError), self._watch.waiting():
                self._engine.wait_until_free()

    # ---- requests

    def _answer(self, ask: Ask, cancelled: threading.Event) -> None:
        # a stream that was stopped may still compute a token
        for stream in list(self._stopping.values()):
            with self._watch.waiting():
                stream.ended.wait()
            self._stopping.pop(stream.id, None)
        try:
            assert self._engine is not None, "the parent asks once the model is loaded"
            request: Request[Any] = ask.request.unpacked(f"an argument of {ask.method}")
            with self._watch.waiting():
                value = request.run(self._engine, cancelled)
            is_stream = isinstance(request, StreamRequest)
            reply = Reply(ask.id, Packed.of(None if is_stream else value, f"what {ask.method} gives"))
        except BaseException as error:  # the parent raises it
            self._forget(ask.id)
            self._send(Failure(ask.id, portable_error(error)))
            return
        if is_stream:
            stream = _HostedStream(ask.id, value, cancelled, self._watch.waiting, self._send, self._forget)
            self._streams[ask.id] = stream
            if ask.id not in self._flags:  # ``_stop`` came before the stream
                stream.stop()
                self._forget(ask.id)
        else:
            self._forget(ask.id)
        self._send(reply)

    def _cancel(self, id: int | None) -> None:
        if id is None:
            if self._engine is not None:
                self._engine.cancel()
        elif (flag := self._flags.get(id)) is not None:
            flag.set()
        _in_thread(self._watch_until_free)

    def _stop(self, id: int) -> None:
        """Stop a stream, or the request that is about to make one."""
        flag = self._flags.pop(id, None)  # first: ``_answer`` adds the stream and then looks for the flag
        if flag is not None:
            flag.set()
        stream = self._streams.pop(id, None)
        if stream is not None:
            self._stopping[id] = stream
            stream.stop()
            _in_thread(self._watch_until_free)

    def _forget(self, id: int) -> None:
        self._flags.pop(id, None)
        self._streams.pop(id, None)


@dataclass
class _HostedStream:
    """An iterator of the engine, read ahead of the parent as far as its credit goes."""

    id: int
    iterator: Iterator[Any]
    cancelled: threading.Event
    waiting: Callable[[], contextlib.AbstractContextManager[None]]
    send: Send
    forget: Callable[[int], None]
    ended: threading.Event = field(default_factory=threading.Event)
    _credit: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    _is_stopped: bool = False
    _has_begun: bool = False

    def allow(self, n_items: int) -> None:
        self._credit.release(n_items)
        if not self._has_begun:
            self._has_begun = True
            _in_thread(self._run)

    def stop(self) -> None:
        self._is_stopped = True
        self.cancelled.set()
        if self._has_begun:
            self._credit.release()
        else:
            self.ended.set()

    def _run(self) -> None:
        try:
            while self._credit.acquire() and not self._is_stopped:
                with self.waiting():
                    item = next(self.iterator, self.iterator)
                if item is self.iterator:
                    self.send(End(self.id))
                    return
                self.send(Item(self.id, Packed.of(item, "an item of a stream")))
            close = getattr(self.iterator, "close", None)
            if close is not None:
                with self.waiting():
                    close()
        except BaseException as error:  # the parent raises it
            self.send(Failure(self.id, portable_error(error)))
        finally:
            self.ended.set()
            self.forget(self.id)


class _LogForwarder(logging.Handler):
    def __init__(self, send: Send) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        self._send(Logged(record.name, record.levelno, record.getMessage()))


def _facts_of(engine: LocalEngine) -> EngineFacts:
    return EngineFacts(
        placement=engine.placement,
        n_ctx=engine.n_ctx,
        n_vocab=engine.n_vocab,
        n_ctx_train=engine.n_ctx_train,
        bos_token=engine.bos_token,
        eos_token=engine.eos_token,
        adds_bos=engine.adds_bos,
    )


def _exit_later() -> None:
    time.sleep(_LEAVE_S)
    os._exit(1)


def _in_thread(work: Callable[..., None], *arguments: Any) -> None:
    threading.Thread(target=work, args=arguments, name="ggufmoe-host", daemon=True).start()
