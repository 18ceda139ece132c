"""The engine's side of ``child``: a process of its own, in which llama.cpp may end or hang without harm to anyone.

Owns the messages between the two, the threads that answer them, and the watch over silent workers. What it is asked
comes from ``child`` alone.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ggufmoe.errors import EngineError
from ggufmoe.native import library as native
from ggufmoe.options import ContextOptions, OffloadOptions
from ggufmoe.remote.process import Packed, leave_with_parent, read_messages
from ggufmoe.remote.rpc import ANSWER_S, guard_connections, register_workers
from ggufmoe.runtime.engine import Engine
from ggufmoe.runtime.loading import LoadWatcher

FACTS = ("placement", "n_ctx", "n_vocab", "n_ctx_train")
"""Attributes of an engine that do not change; they are sent once."""
LOADING = 0
"""The id under which loading is answered."""
_SLOW = 10
"""A prompt is computed, and a model loaded, in steps that may take so many times as long as a token's."""
_TICK_S = 1.0
_WAITING = 0.02
"""The part of a core's time that a thread may take which only waits: it looks around 20 times a second, for a quarter
of that at most."""
_LEAVE_S = 10.0


@dataclass(frozen=True)
class Start:
    """The first message: load a model with the devices of the workers at ``endpoints``."""

    path: Path
    context: ContextOptions | None
    offload: OffloadOptions
    endpoints: tuple[str, ...]
    log_level: int


@dataclass(frozen=True)
class Call:
    """Get an attribute of the engine, or call a method; a method that gives an iterator makes a stream of it.

    ``given`` are positional arguments and keywords: (tuple, dict). With ``is_cancellable`` the method is given a
    ``cancel`` flag, which ``Cancel`` sets.
    """

    id: int
    name: str
    given: Packed
    is_cancellable: bool
    is_cancelled: bool


@dataclass(frozen=True)
class Credit:
    """So many more items of a stream may be sent; the first ones begin it."""

    id: int
    n_items: int


@dataclass(frozen=True)
class Cancel:
    """Set the cancel flag of a call or a stream, or cancel all that the engine does now."""

    id: int | None


@dataclass(frozen=True)
class Stop:
    """Nobody reads a stream any more."""

    id: int


@dataclass(frozen=True)
class Reply:
    """What a call gave; None for one that made a stream."""

    id: int
    value: Packed


@dataclass(frozen=True)
class Failure:
    """What a call or a stream raised."""

    id: int
    error: Exception


@dataclass(frozen=True)
class Item:
    """The next of a stream."""

    id: int
    value: Packed


@dataclass(frozen=True)
class Progress:
    """The part of the model that is loaded, 0 to 1."""

    id: int
    part: float


@dataclass(frozen=True)
class End:
    """A stream is at its end."""

    id: int


@dataclass(frozen=True)
class Logged:
    """A line for the log."""

    logger: str
    level: int
    text: str


@dataclass(frozen=True)
class Silence:
    """Workers have given no sign of life for so long; the process ends. ``limit`` says in words what that is too long
    for."""

    seconds: float
    limit: str


Send = Callable[[Any], None]


def host_engine(incoming: IO[bytes], outgoing: IO[bytes]) -> None:
    """In the child: load and serve an engine until ``incoming`` is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    leave_with_parent()
    lock = threading.Lock()

    def send(message: Any) -> None:
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        with lock:
            outgoing.write(data)
            outgoing.flush()

    messages = read_messages(incoming)
    start = next(messages, None)
    if not isinstance(start, Start):
        return
    _forward_log(send, start.log_level)
    host = _Host(start, send)
    for message in messages:
        host.take(message)
    host.leave()


class _Here(Engine):
    """An engine that computes in this process although it uses workers, and tells how it gets on.

    ``watch`` follows the thread that computes, and the loading.
    """

    def __init__(self, start: Start, on_progress: Callable[[float], None], watch: _Watch) -> None:
        self._watch = watch
        super().__init__(start.path, start.context, start.offload, on_progress=on_progress)

    def _load(self, watcher: LoadWatcher) -> None:
        with self._watch.waiting():
            self._native.call(self._watch.follow_this_thread)
            super()._load(watcher)

    def wait_until_free(self) -> None:
        """Until what was asked before has left llama.cpp, what was stopped too."""
        self._native.call(lambda: None)

    @property
    def is_busy(self) -> bool:
        """Whether llama.cpp, or what surrounds it, does anything now."""
        return self._native.is_busy

    @property
    def progress(self) -> tuple[int, int]:
        """Tokens that llama.cpp was given last, 0 if there is no context; how often it has come back."""
        with contextlib.suppress(EngineError):
            cache = self._loaded.cache
            return cache.given_tokens, cache.n_returned
        return 0, 0


class _Host:
    def __init__(self, start: Start, send: Send) -> None:
        self._send = send
        self._watch = _Watch(start.endpoints, self._patience_s, self._progress)
        self._timeout_s = float(start.offload.rpc_timeout)
        self._loading_s = 2 * ANSWER_S
        self._n_reports = 0
        self._engine: _Here | None = None
        self._flags: dict[int, threading.Event] = {}
        self._streams: dict[int, _Stream] = {}
        self._stopping: dict[int, _Stream] = {}
        _in_thread(self._give_up)
        _in_thread(self._load, start)

    def _give_up(self) -> None:
        try:
            seconds, limit_s = self._watch.silence()
            self._send(Silence(seconds, self._in_words(limit_s)))
        finally:  # nobody may wait for ever, whatever went wrong
            os._exit(1)

    def _load(self, start: Start) -> None:
        try:
            native.library()  # takes as long as the disk does; the next step waits for workers alone
            with self._watch.waiting():
                register_workers(start.endpoints)
            self._loading_s = _SLOW * self._timeout_s
            engine = _Here(start, self._report, self._watch)
            facts = Packed.of({name: getattr(engine, name) for name in FACTS}, "what is known of the engine")
        except Exception as error:  # for the process that waits
            self._send(Failure(LOADING, _portable(error)))
            return
        self._engine = engine
        self._send(Reply(LOADING, facts))

    def _report(self, part: float) -> None:
        self._n_reports += 1
        self._send(Progress(LOADING, part))

    def _in_words(self, limit_s: float) -> str:
        name = f"--rpc-timeout {self._timeout_s:.0f}"
        return {self._timeout_s: name, _SLOW * self._timeout_s: f"ten times {name}"}.get(limit_s, "while connecting")

    def _patience_s(self) -> float | None:
        """The longest silence that what llama.cpp does now explains; None while it does nothing."""
        if self._engine is None:
            return self._loading_s
        if not self._engine.is_busy:
            return None
        given_tokens, _ = self._engine.progress
        return self._timeout_s * (1 if given_tokens == 1 else _SLOW)

    def _progress(self) -> tuple[int, int]:
        """Grows when something has been done that workers have a part in."""
        return self._n_reports, 0 if self._engine is None else self._engine.progress[1]

    def take(self, message: Any) -> None:
        """Do what a message asks; nothing here waits for the engine."""
        if isinstance(message, Call):
            flag = self._flags[message.id] = threading.Event()
            if message.is_cancelled:
                flag.set()
            _in_thread(self._call, message, flag)
        elif isinstance(message, Cancel):
            self._cancel(message.id)
        elif (stream := self._streams.get(message.id)) is not None:
            if isinstance(message, Credit):
                stream.allow(message.n_items)
            elif isinstance(message, Stop):
                self._stopping[message.id] = stream
                stream.stop()
                _in_thread(self._leave_computation)
                self._forget(message.id)

    def _cancel(self, id: int | None) -> None:
        if id is not None and (flag := self._flags.get(id)) is not None:
            flag.set()
        elif id is None and self._engine is not None:
            self._engine.cancel()
        _in_thread(self._leave_computation)

    def _leave_computation(self) -> None:
        """Who stops something is answered before workers have left it, which takes as long as a prompt does."""
        if self._engine is not None:
            with contextlib.suppress(EngineError), self._watch.waiting():
                self._engine.wait_until_free()

    def _forget(self, id: int) -> None:
        self._flags.pop(id, None)
        self._streams.pop(id, None)

    def _call(self, call: Call, cancelled: threading.Event) -> None:
        # a stream that nobody reads may still be computing a token
        for stream in list(self._stopping.values()):
            with self._watch.waiting():
                stream.ended.wait()
            self._stopping.pop(stream.id, None)
        try:
            value = self._value(call, cancelled)
            is_stream = isinstance(value, Iterator)
            reply = Reply(call.id, Packed.of(None if is_stream else value, f"what {call.name} gives"))
        except BaseException as error:  # for the process that waits
            self._forget(call.id)
            self._send(Failure(call.id, _portable(error)))
            return
        if is_stream:
            self._streams[call.id] = _Stream(call.id, value, cancelled, self._watch.waiting, self._send, self._forget)
        else:
            self._forget(call.id)
        self._send(reply)

    def _value(self, call: Call, cancelled: threading.Event) -> Any:
        arguments, keywords = call.given.unpacked(f"an argument of {call.name}")
        if call.is_cancellable:
            keywords["cancel"] = cancelled
        with self._watch.waiting():
            value = getattr(self._engine, call.name)
            return value(*arguments, **keywords) if callable(value) else value

    def leave(self) -> None:
        """Give everything back, as far as workers that hang let it."""
        if self._engine is None:
            os._exit(0)  # while it is loading
        _in_thread(_leave_in_the_end)
        for stream in list(self._streams.values()):
            stream.stop()
        self._engine.cancel()
        self._engine.close()


@dataclass
class _Stream:
    """An iterator of the engine, read ahead of the parent as far as it allows."""

    id: int
    iterator: Iterator[Any]
    cancelled: threading.Event
    waiting: Callable[[], contextlib.AbstractContextManager[None]]
    send: Send
    forget: Callable[[int], None]
    ended: threading.Event = field(default_factory=threading.Event)
    _allowed: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    _is_stopped: bool = False
    _has_begun: bool = False

    def allow(self, n_items: int) -> None:
        self._allowed.release(n_items)
        if not self._has_begun:
            self._has_begun = True
            _in_thread(self._run)

    def stop(self) -> None:
        self._is_stopped = True
        self.cancelled.set()
        if self._has_begun:
            self._allowed.release()
        else:
            self.ended.set()

    def _run(self) -> None:
        try:
            while self._allowed.acquire() and not self._is_stopped:
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
        except BaseException as error:  # for the process that waits
            self.send(Failure(self.id, _portable(error)))
        finally:
            self.ended.set()
            self.forget(self.id)


def _leave_in_the_end() -> None:
    """The parent kills a child that does not leave, unless it has gone itself."""
    time.sleep(_LEAVE_S)
    os._exit(1)


class _Watch:
    """Tells when workers give no sign of life although something waits for llama.cpp.

    Signs of life are bytes on the connections to them (Linux), processor time of the thread that computes here, and
    whatever makes ``progress`` another. ``patience_s`` tells how long a silence may be, None if nothing is computed.
    """

    def __init__(
        self,
        endpoints: tuple[str, ...],
        patience_s: Callable[[], float | None],
        progress: Callable[[], tuple[int, ...]],
    ) -> None:
        self._endpoints = endpoints
        self._patience_s = patience_s
        self._progress = progress
        self._clock: _Clock | None = None
        self._waiting: set[object] = set()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Somebody waits for llama.cpp while the block runs."""
        key = object()
        self._waiting.add(key)
        try:
            yield
        finally:
            self._waiting.remove(key)

    def follow_this_thread(self) -> None:
        """From now on what this thread computes is a sign of life."""
        self._clock = _Clock()

    def silence(self) -> tuple[float, float]:
        """Wait for a silence that is too long; its seconds, and the limit."""
        silent_s, before = 0.0, self._signs()
        while True:
            began = time.monotonic()
            time.sleep(_TICK_S)
            # before the signs: a batch that ends now must not leave its silence to a short one
            patience_s, n_waiting = self._patience_s(), len(self._waiting)
            took_s, signs = time.monotonic() - began, self._signs()
            is_computing = self._clock is not None and self._clock.has_worked(took_s, n_waiting)
            if is_computing or signs != before or not n_waiting or patience_s is None:
                silent_s = 0.0
            else:
                # a machine that was asleep, or too busy to come here, tells nothing of the workers
                silent_s += min(took_s, 2 * _TICK_S)
                if silent_s > patience_s:
                    return silent_s, patience_s
            before = signs

    def _signs(self) -> tuple[int, ...]:
        return guard_connections(self._endpoints), *self._progress()


class _Clock:
    """The processor time of the thread that makes it, or of all where the system does not tell (macOS, Windows)."""

    def __init__(self) -> None:
        self._seconds: Callable[[], float] = time.process_time
        self._is_of_all = True
        if sys.platform != "win32" and hasattr(time, "pthread_getcpuclockid"):
            with contextlib.suppress(OSError):
                time.clock_gettime(clock := time.pthread_getcpuclockid(threading.get_ident()))
                self._seconds, self._is_of_all = functools.partial(time.clock_gettime, clock), False
        self._before = self._seconds()

    def has_worked(self, took_s: float, n_waiting: int) -> bool:
        """Whether anything has been computed since this was last asked, ``took_s`` ago, while so many threads wait.

        The thread alone uses nothing while it waits for a worker.
        """
        try:
            before, self._before = self._before, self._seconds()
        except OSError:  # the thread has ended
            return False
        return self._before - before > (_WAITING * (1 + n_waiting) * took_s if self._is_of_all else 0)


class _Forwarder(logging.Handler):
    def __init__(self, send: Send) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        self._send(Logged(record.name, record.levelno, record.getMessage()))


def _forward_log(send: Send, level: int) -> None:
    logger = logging.getLogger("ggufmoe")
    logger.setLevel(level)
    logger.addHandler(_Forwarder(send))
    logger.propagate = False


def _portable(error: BaseException) -> Exception:
    """The error itself if it survives the way to the parent, and is none that would end a thread there."""
    try:
        if isinstance(error, Exception) and str(pickle.loads(pickle.dumps(error))) == str(error):
            return error
    except Exception:  # whatever its class does when it is made again
        logging.getLogger("ggufmoe").debug("%s cannot be sent as it is", type(error))
    return EngineError(f"{type(error).__name__}: {error}")


def _in_thread(work: Callable[..., None], *arguments: Any) -> None:
    threading.Thread(target=work, args=arguments, name="ggufmoe-host", daemon=True).start()
