"""Reading ahead: what is fetched, how often, and how much of it at once; of a file whose bytes come when it is told."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from ggufmoe.errors import Cancelled, HubError
from ggufmoe.hub.hub_file import HubFile, Line
from ggufmoe.hub.read_ahead import ReadAhead
from ggufmoe.weights.byte_ranges import ByteRange

CONTENT = bytes(range(256)) * 40
KIB = 1 << 10


class Memory(HubFile):
    """A file of the hub without a hub; ``gate`` holds back what is fetched."""

    def __init__(self, name: str = "m") -> None:
        self.path = Path(name)
        self.store = None
        self.fetched: list[tuple[int, int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None

    def fetch_into(self, begin: int, buffer: memoryview) -> None:
        self.fetched.append((begin, begin + len(buffer)))
        assert self.gate.wait(10)
        if self.error is not None:
            raise self.error
        buffer[:] = CONTENT[begin : begin + len(buffer)]


def ahead(**settings: Any) -> ReadAhead:
    return ReadAhead(Line(), **{"max_bytes": 4 * KIB, "chunk_bytes": 2 * KIB, "connections": 2} | settings)


def read(reader: ReadAhead, number: int, ranges: Iterable[ByteRange]) -> None:
    with reader.item(number):
        for one in ranges:
            buffer = bytearray(one.end - one.begin)
            one.file.read_into(one.begin, memoryview(buffer))
            assert bytes(buffer) == CONTENT[one.begin : one.end], f"item {number}"


def in_turn(file: HubFile, n_items: int, size: int) -> dict[int, list[ByteRange]]:
    return {number: [ByteRange(file, number * size, (number + 1) * size)] for number in range(n_items)}


def test_neighbours_are_fetched_together_and_each_byte_once() -> None:
    file, reader = Memory(), ahead()
    items = in_turn(file, 10, KIB)
    with reader.running(items.items(), lambda: False):
        for number, ranges in items.items():
            read(reader, number, ranges)
    assert sorted(file.fetched) == [(begin, begin + 2 * KIB) for begin in range(0, 10 * KIB, 2 * KIB)]
    assert file.store is None, "it would still be asked"


def test_what_several_items_read_is_fetched_once() -> None:
    """As of a transposed matrix, which every tile of its rows reads whole."""
    file, other, reader = Memory(), Memory("other"), ahead()
    whole = [ByteRange(file, 100, 3000)]
    items = {0: [ByteRange(file, 0, 200)], 1: whole, 2: [*whole, ByteRange(other, 0, 50)], 3: whole}
    with reader.running(items.items(), lambda: False):
        for number, ranges in items.items():
            read(reader, number, ranges)
    assert sorted(file.fetched) == [(0, 2 * KIB), (2 * KIB, 3000)]
    assert other.fetched == [(0, 50)]


def test_no_more_is_held_than_the_bound() -> None:
    file, reader = Memory(), ahead(max_bytes=3 * KIB)
    items = in_turn(file, 8, KIB)
    with reader.running(items.items(), lambda: False):
        read(reader, 0, items[0])  # all that fits is asked for before the first item has its bytes
        assert sum(end - begin for begin, end in file.fetched) <= 3 * KIB
        for number in range(1, 8):
            read(reader, number, items[number])
    assert sum(end - begin for begin, end in file.fetched) == 8 * KIB


def test_an_item_larger_than_the_bound_is_read_all_the_same() -> None:
    file, reader = Memory(), ahead(max_bytes=KIB)
    items = {0: [ByteRange(file, 0, 9 * KIB)], 1: [ByteRange(file, 9 * KIB, 10 * KIB)]}
    with reader.running(items.items(), lambda: False):
        for number, ranges in items.items():
            read(reader, number, ranges)
    assert sum(end - begin for begin, end in file.fetched) == 10 * KIB


def test_bytes_outside_of_the_schedule_are_fetched_when_they_are_read() -> None:
    file, reader = Memory(), ahead()
    with reader.running({0: [ByteRange(file, 0, 10)], 1: []}.items(), lambda: False):
        read(reader, 0, [ByteRange(file, 0, 10), ByteRange(file, 5, 20)])
        read(reader, 1, [ByteRange(file, 30, 40)])
    assert sorted(file.fetched) == [(0, 10), (5, 20), (30, 40)]


def test_workers_that_take_items_at_once_all_get_theirs() -> None:
    file, reader = Memory(), ahead(max_bytes=KIB, connections=3)
    items = in_turn(file, 64, 128)
    left, lock, errors = iter(items.items()), threading.Lock(), []

    def work() -> None:
        try:
            while True:
                with lock:
                    number, ranges = next(left, (-1, []))
                if number < 0:
                    return
                read(reader, number, ranges)
        except BaseException as error:
            errors.append(error)

    with reader.running(items.items(), lambda: False):
        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert errors == []
    assert sum(end - begin for begin, end in file.fetched) == 64 * 128


def test_an_error_reaches_who_reads_the_bytes() -> None:
    file, reader = Memory(), ahead()
    file.error = HubError("gone")
    items = in_turn(file, 2, KIB)
    with reader.running(items.items(), lambda: False), pytest.raises(HubError, match="gone"):
        read(reader, 0, items[0])


def test_who_waits_is_released_when_the_work_stops() -> None:
    file, reader, stop = Memory(), ahead(), threading.Event()
    file.gate.clear()
    items = in_turn(file, 2, KIB)
    with reader.running(items.items(), stop.is_set):
        threading.Timer(0.05, stop.set).start()
        with pytest.raises(Cancelled):
            read(reader, 0, items[0])
        file.gate.set()
