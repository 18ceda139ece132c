"""Reads files of the hub ahead of those who need their bytes, over several connections, within a bound of memory.

The schedule says which ranges are read for each item of work (a tile of the writer), in the order of the items.
Neighbouring ranges are fetched by one request. What was fetched is kept until the last item that reads it has ended, so
that nothing is fetched twice within the bound. Bytes that are in no schedule are fetched when they are read.
"""

from __future__ import annotations

import bisect
import mmap
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from ggufmoe.errors import Cancelled
from ggufmoe.hub.hub_file import HubFile, Line
from ggufmoe.hub.source_cache import joined
from ggufmoe.weights.byte_ranges import ByteRange

READ_AHEAD_BYTES = 64 << 20
"""What all chunks together may hold: about half a second of a line of 1 Gbit/s."""
CHUNK_BYTES = 2 << 20
"""The most that one request asks for."""
CONNECTIONS = 12
_MOST_ITEMS = 4096
"""Items that may be scheduled and not begun; bounds what is kept of items that read nothing over the network."""
_POLL_S = 0.1
_JOIN_S = 1.0


def remote_bytes(ranges: Iterable[ByteRange]) -> int:
    """How many different bytes of files of the hub are in ``ranges``."""
    runs = joined(one for one in ranges if isinstance(one.file, HubFile))
    return sum(end - begin for of_file in runs.values() for begin, end in of_file)


class _Chunk:
    """Bytes [begin, end) of a file: to be fetched, or fetched. ``n_users`` items still read it."""

    def __init__(self, file: HubFile, begin: int, end: int) -> None:
        self.file, self.begin, self.end = file, begin, end
        self.n_users = 0
        self.is_done = self.is_awaited = False
        self.error: BaseException | None = None
        self.data = memoryview(b"")


class ReadAhead:
    """Fetches what a schedule says; ``HubFile.read_into`` takes from it while it runs."""

    def __init__(
        self,
        line: Line,
        *,
        max_bytes: int | None = None,
        chunk_bytes: int | None = None,
        connections: int = CONNECTIONS,
    ) -> None:
        """By default the bounds are ``READ_AHEAD_BYTES`` and ``CHUNK_BYTES``."""
        self._line = line
        self._max_bytes = READ_AHEAD_BYTES if max_bytes is None else max_bytes
        self._chunk_bytes = CHUNK_BYTES if chunk_bytes is None else chunk_bytes
        self._n_connections = connections
        self._lock = threading.Lock()
        self._waiting_fetchers = threading.Condition(self._lock)
        """Notified once for each chunk to fetch: waking all of them costs more than fetching it."""
        self._waiting_readers = threading.Condition(self._lock)
        """Notified when an item is scheduled or a chunk is there that a reader waits for."""
        self._buffers: list[mmap.mmap] = []
        """Memory of chunks that were read, for the next ones: fresh memory is cleared first, which costs as much."""
        self._schedule: Iterator[tuple[int, Iterable[ByteRange]]] = iter(())
        self._next: tuple[int, list[ByteRange]] | None = None
        self._is_exhausted = False
        self._first = 0
        """The first item that may still be read."""
        self._items: dict[int, list[_Chunk]] = {}
        self._queue: deque[_Chunk] = deque()
        self._live: dict[HubFile, list[_Chunk]] = {}
        self._held_bytes = 0
        self._is_closed = False
        self._stopped: Callable[[], bool] = lambda: False
        self._mine = threading.local()

    @contextmanager
    def running(
        self, schedule: Iterable[tuple[int, Iterable[ByteRange]]], stopped: Callable[[], bool]
    ) -> Iterator[None]:
        """Fetch ahead while the block runs, or until ``stopped``. ``schedule`` has each item's number and ranges."""
        self._schedule, self._stopped = iter(schedule), stopped
        stopped_before, self._line.stopped = self._line.stopped, lambda: self._is_closed or stopped()
        threads = [threading.Thread(target=self._fetch, daemon=True) for _ in range(self._n_connections)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            with self._lock:
                self._is_closed = True
                self._buffers.clear()
                self._waiting_fetchers.notify_all()
                self._waiting_readers.notify_all()
            deadline = time.monotonic() + _JOIN_S
            for thread in threads:  # one whose connection is dead ends with the timeout of its read
                thread.join(max(0.0, deadline - time.monotonic()))
            for file in self._live:
                file.store = None
            self._line.stopped = stopped_before

    @contextmanager
    def item(self, number: int) -> Iterator[None]:
        """The block reads the ranges of one item of the schedule; each item has one block, begun in about their order.

        Raises Cancelled when the work is stopped.
        """
        with self._lock:
            while number not in self._items and not self._is_exhausted:
                self._wait()
            chunks = self._items.pop(number, [])
        self._mine.chunks = chunks
        try:
            yield
        finally:
            self._mine.chunks = []
            self._release(chunks)

    def skip_to(self, number: int) -> None:
        """No item before that number is read any more; what was scheduled for it is given up."""
        with self._lock:
            self._first = number
            chunks = [chunk for one in list(self._items) if one < number for chunk in self._items.pop(one)]
        self._release(chunks)

    def take(self, file: HubFile, begin: int, buffer: memoryview) -> bool:
        """Fill ``buffer`` with bytes of ``file`` from ``begin`` on if this thread's item has them; else return False.

        Waits for what is being fetched, and raises the error of what could not be fetched.
        """
        end = begin + len(buffer)
        chunks = sorted(
            (chunk for chunk in getattr(self._mine, "chunks", ()) if chunk.file is file and chunk.end > begin),
            key=lambda chunk: chunk.begin,
        )
        position, used = begin, []
        for chunk in chunks:
            if chunk.begin > position or position >= end:
                break
            used.append(chunk)
            position = chunk.end
        if position < end:
            return False
        for chunk in used:
            self._await(chunk)
            first, last = max(begin, chunk.begin), min(end, chunk.end)
            buffer[first - begin : last - begin] = chunk.data[first - chunk.begin : last - chunk.begin]
        return True

    def _await(self, chunk: _Chunk) -> None:
        with self._lock:
            while not chunk.is_done:
                chunk.is_awaited = True
                self._wait()
        if chunk.error is not None:
            raise chunk.error

    def _wait(self) -> None:
        """Wait for a change, with the lock held. Raises Cancelled when the work is stopped."""
        if self._is_closed or self._stopped():
            raise Cancelled("stopped while reading from the hub")
        self._waiting_readers.wait(_POLL_S)

    def _release(self, chunks: Iterable[_Chunk]) -> None:
        with self._lock:
            for chunk in chunks:
                chunk.n_users -= 1
                if chunk.n_users == 0:
                    self._live[chunk.file].remove(chunk)
                    if chunk in self._queue:  # it was given up
                        self._queue.remove(chunk)
                    self._held_bytes -= chunk.end - chunk.begin
                    self._take_back(chunk)
            self._plan()

    def _take_back(self, chunk: _Chunk) -> None:
        """Keep the memory of a chunk for another one, if it is of the usual size."""
        buffer = chunk.data.obj
        chunk.data = memoryview(b"")
        if (
            isinstance(buffer, mmap.mmap)
            and len(buffer) == self._chunk_bytes
            and len(self._buffers) < self._n_connections
        ):
            self._buffers.append(buffer)

    def _memory(self, n_bytes: int) -> memoryview:
        """Memory of its own for a chunk: allocators would keep some for each thread."""
        with self._lock:
            if n_bytes == self._chunk_bytes and self._buffers:
                return memoryview(self._buffers.pop())
        return memoryview(_anonymous(n_bytes))

    def _fetch(self) -> None:
        """Fetch one chunk after another: the work of one connection."""
        while (chunk := self._begin_chunk()) is not None:
            try:
                data = self._memory(chunk.end - chunk.begin)
                chunk.file.fetch_into(chunk.begin, data)
                chunk.data = data
            except BaseException as error:  # whoever reads the chunk raises it
                chunk.error = error
            with self._lock:
                chunk.is_done = True
                if chunk.is_awaited:
                    self._waiting_readers.notify_all()

    def _begin_chunk(self) -> _Chunk | None:
        """The next chunk to fetch, when there is one; None when all is fetched or the work stops."""
        with self._lock:
            while not self._is_closed and not self._stopped():
                self._plan()
                if self._queue:
                    return self._queue.popleft()
                if self._is_exhausted:
                    return None
                self._waiting_fetchers.wait(_POLL_S)
            return None

    def _plan(self) -> None:
        """Schedule items while memory allows; the first one always. With the lock held."""
        planned, n_queued = False, len(self._queue)
        while not self._is_exhausted and len(self._items) < _MOST_ITEMS:
            if self._next is None:
                try:
                    number, ranges = next(self._schedule)
                except StopIteration:
                    self._is_exhausted = planned = True
                    break
                self._next = number, [one for one in ranges if isinstance(one.file, HubFile) and one.begin < one.end]
            number, wanted = self._next
            if number < self._first:
                self._next = None
                continue
            if self._held_bytes and self._held_bytes + self._lacking(wanted) > self._max_bytes:
                break
            self._items[number] = list(dict.fromkeys(chunk for one in wanted for chunk in self._chunks_of(one)))
            for chunk in self._items[number]:
                chunk.n_users += 1
            self._next, planned = None, True
        if planned:
            self._waiting_readers.notify_all()
        if self._is_exhausted:
            self._waiting_fetchers.notify_all()
        elif len(self._queue) > n_queued:
            self._waiting_fetchers.notify(len(self._queue) - n_queued)

    def _lacking(self, wanted: Iterable[ByteRange]) -> int:
        return sum(end - begin for one in wanted for chunk, begin, end in self._parts(one) if chunk is None)

    def _parts(self, wanted: ByteRange) -> Iterator[tuple[_Chunk | None, int, int]]:
        """The range in parts: each in a live chunk, or None where there is none."""
        assert isinstance(wanted.file, HubFile), "the schedule leaves out the others"
        live = self._live.get(wanted.file, [])
        place = bisect.bisect_right(live, wanted.begin, key=lambda chunk: chunk.begin)
        place -= place > 0 and live[place - 1].end > wanted.begin
        position = wanted.begin
        for chunk in live[place:]:
            if chunk.begin >= wanted.end:
                break
            if chunk.begin > position:
                yield None, position, chunk.begin
            yield chunk, max(position, chunk.begin), min(chunk.end, wanted.end)
            position = chunk.end
        if position < wanted.end:
            yield None, position, wanted.end

    def _chunks_of(self, wanted: ByteRange) -> list[_Chunk]:
        """The chunks that hold a range together, made where there are none."""
        assert isinstance(wanted.file, HubFile), "the schedule leaves out the others"
        chunks: list[_Chunk] = []
        for chunk, begin, end in list(self._parts(wanted)):
            chunks += self._made(wanted.file, begin, end) if chunk is None else [chunk]
        return chunks

    def _made(self, file: HubFile, begin: int, end: int) -> Iterator[_Chunk]:
        """New chunks of [begin, end), or the last one that waits made longer where this goes on."""
        self._held_bytes += end - begin
        live = self._live.setdefault(file, [])
        file.store = self
        last = self._queue[-1] if self._queue else None
        while begin < end:
            if last is not None and last.file is file and last.end == begin and begin - last.begin < self._chunk_bytes:
                last.end = min(end, last.begin + self._chunk_bytes)
            else:
                last = _Chunk(file, begin, min(end, begin + self._chunk_bytes))
                bisect.insort(live, last, key=lambda chunk: chunk.begin)
                self._queue.append(last)
            begin = last.end
            yield last


def _anonymous(n_bytes: int) -> mmap.mmap:
    """Memory that belongs to no file and is not shared, which would be slower to get."""
    if sys.platform == "win32":
        return mmap.mmap(-1, n_bytes)
    return mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
