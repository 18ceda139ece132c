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
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ggufmoe import native
from ggufmoe.errors import EngineError
from ggufmoe.options import ContextOptions, OffloadOptions
from ggufmoe.runtime.engine import Engine
from ggufmoe.runtime.process import Packed, leave_with_parent, read_messages
from ggufmoe.runtime.rpc import ANSWER_S, guard_connections, register_workers

FACTS = ("placement", "n_ctx", "n_vocab", "n_ctx_train")
"""Attributes of an engine that do not change; they are sent once."""
LOADING = 0
"""The id under which loading is answered."""
_SLOW = 10
"""A prompt is computed, and a model loaded, in steps that may take so many times as long as a token's."""
_TICK_S = 1.0
_WAITING = 0.05
"""The part of a core's time that a thread may take which only waits: it looks around 20 times a second, for a tenth of
that. llama.cpp's own thread takes nothing at all while it waits for a worker."""


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
    """Workers have given no sign of life for so long; the process ends."""

    seconds: float


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
    """An engine that computes in this process although it uses workers."""

    def wait_until_free(self) -> None:
        """Until what was asked before has left llama.cpp, what was stopped too."""
        self._native.call(lambda: None)


class _Host:
    def __init__(self, start: Start, send: Send) -> None:
        self._send = send
        self._watch = _Watch(start.endpoints, send)
        self._timeout_s = float(start.offload.rpc_timeout)
        self._engine: _Here | None = None
        self._flags: dict[int, threading.Event] = {}
        self._streams: dict[int, _Stream] = {}
        self._stopping: dict[int, _Stream] = {}
        _in_thread(self._load, start)

    def _load(self, start: Start) -> None:
        try:
            native.library()  # takes as long as the disk does; the next step waits for workers alone
            with self._watch.over(2 * ANSWER_S):
                register_workers(start.endpoints)
            with self._watch.over(_SLOW * self._timeout_s):
                engine = _Here(start.path, start.context, start.offload, on_progress=self._report)
        except Exception as error:  # for the process that waits
            self._send(Failure(LOADING, _portable(error)))
            return
        self._engine = engine
        facts = {name: getattr(engine, name) for name in FACTS}
        self._send(Reply(LOADING, Packed.of(facts, "what is known of the engine")))

    def _report(self, part: float) -> None:
        self._watch.follow_this_thread()  # llama.cpp reports where it computes
        self._watch.sign()
        self._send(Progress(LOADING, part))

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
            with contextlib.suppress(EngineError), self._watch.over(_SLOW * self._timeout_s):
                self._engine.wait_until_free()

    def _forget(self, id: int) -> None:
        self._flags.pop(id, None)
        self._streams.pop(id, None)

    def _call(self, call: Call, cancelled: threading.Event) -> None:
        # a stream that nobody reads may still be computing a token
        for stream in list(self._stopping.values()):
            stream.ended.wait()
            self._stopping.pop(stream.id, None)
        try:
            value = self._value(call, cancelled)
            is_stream = isinstance(value, Iterator)
            reply = Reply(call.id, Packed.of(None if is_stream else value, f"what {call.name} gives"))
        except Exception as error:  # for the process that waits
            self._forget(call.id)
            self._send(Failure(call.id, _portable(error)))
            return
        if is_stream:
            self._streams[call.id] = _Stream(call.id, value, cancelled, self._step, self._send, self._forget)
        else:
            self._forget(call.id)
        self._send(reply)

    def _value(self, call: Call, cancelled: threading.Event) -> Any:
        arguments, keywords = call.given.unpacked(f"an argument of {call.name}")
        if call.is_cancellable:
            keywords["cancel"] = cancelled
        with self._watch.over(_SLOW * self._timeout_s):
            value = getattr(self._engine, call.name)
            return value(*arguments, **keywords) if callable(value) else value

    def _step(self, iterator: Iterator[Any], n_done: int) -> Any:
        """The next item, or the iterator itself at its end."""
        with self._watch.over(self._timeout_s * (1 if n_done else _SLOW)):
            return next(iterator, iterator)

    def leave(self) -> None:
        """Give everything back; workers that hang are left to the parent, who kills this process."""
        if self._engine is None:
            os._exit(0)  # while it is loading
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
    step: Callable[[Iterator[Any], int], Any]
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
            n_done = 0
            while self._allowed.acquire() and not self._is_stopped:
                item = self.step(self.iterator, n_done)
                if item is self.iterator:
                    self.send(End(self.id))
                    return
                self.send(Item(self.id, Packed.of(item, "an item of a stream")))
                n_done += 1
            close = getattr(self.iterator, "close", None)
            if close is not None:
                close()
        except Exception as error:  # for the process that waits
            self.send(Failure(self.id, _portable(error)))
        finally:
            self.ended.set()
            self.forget(self.id)


class _Watch:
    """Ends this process when workers give no sign of life although something waits for them.

    Signs of life are bytes on the connections to them (Linux), processor time of the threads that compute here, and
    everything that is completed.
    """

    def __init__(self, endpoints: tuple[str, ...], send: Send) -> None:
        self._endpoints = endpoints
        self._send = send
        self._limits: dict[object, float] = {}
        self._clocks: dict[object, _Clock] = {}
        self._n_completed = 0
        _in_thread(self._run)

    @contextlib.contextmanager
    def over(self, limit_s: float) -> Iterator[None]:
        """Watch while the block runs, which may go so long without a sign of life."""
        key = object()
        self._clocks[key] = _Clock.of_this_thread(_WAITING)
        self._limits[key] = limit_s
        try:
            yield
        finally:
            del self._limits[key], self._clocks[key]
            self.sign()

    def follow_this_thread(self) -> None:
        """From now on the least that this thread computes is a sign of life."""
        key = threading.get_ident()
        if key not in self._clocks:
            self._clocks[key] = _Clock.of_this_thread(0.0)

    def sign(self) -> None:
        """Something has been completed."""
        self._n_completed += 1

    def _run(self) -> None:
        silent_s, before = 0.0, self._events()
        while True:
            began = time.monotonic()
            time.sleep(_TICK_S)
            took_s, events = time.monotonic() - began, self._events()
            limits = list(self._limits.values())
            n_computing = sum(clock.has_worked(took_s) for clock in list(self._clocks.values()))
            # a machine that was asleep, or too busy to come here, tells nothing of the workers
            is_alive = n_computing or events != before or not limits
            silent_s = 0.0 if is_alive else silent_s + min(took_s, 2 * _TICK_S)
            before = events
            if limits and silent_s > max(limits):
                self._send(Silence(silent_s))
                os._exit(1)

    def _events(self) -> tuple[int, int]:
        return guard_connections(self._endpoints), self._n_completed


class _Clock:
    """The processor time of one thread, or of the process where the system does not tell that (macOS, Windows)."""

    def __init__(self, seconds: Callable[[], float], waiting: float) -> None:
        self._seconds = seconds
        self._waiting = waiting
        self._before = seconds()

    @classmethod
    def of_this_thread(cls, waiting: float) -> _Clock:
        """``waiting`` is the part of the time that it takes though it does not compute."""
        clock_of = getattr(time, "pthread_getcpuclockid", None)
        if clock_of is None:
            return cls(time.process_time, _WAITING)
        return cls(functools.partial(time.clock_gettime, clock_of(threading.get_ident())), waiting)

    def has_worked(self, took_s: float) -> bool:
        """Whether it has computed since this was last asked, ``took_s`` ago."""
        try:
            before, self._before = self._before, self._seconds()
        except OSError:  # the thread has just ended
            return False
        return self._before - before > self._waiting * took_s


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


def _portable(error: Exception) -> Exception:
    """The error itself if it survives the way to the parent."""
    try:
        if str(pickle.loads(pickle.dumps(error))) == str(error):
            return error
    except Exception:  # whatever its class does when it is made again
        logging.getLogger("ggufmoe").debug("%s cannot be sent as it is", type(error))
    return EngineError(f"{type(error).__name__}: {error}")


def _in_thread(work: Callable[..., None], *arguments: Any) -> None:
    threading.Thread(target=work, args=arguments, name="ggufmoe-host", daemon=True).start()
