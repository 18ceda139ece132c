"""Rows that differ from those of their source, against numpy on the whole tensor, whatever range is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from ggufmoe.weights import views
from ggufmoe.weights.byte_ranges import ByteRange, ByteReader, byte_ranges
from ggufmoe.weights.dtypes import read_f32, row_count
from ggufmoe.weights.source_tensor import Dtype, SourceTensor
from ggufmoe.weights.views import Changed, PickedColumns, PickedRows, Reshaped, SpacedRows, Transposed, rope_ordered


class Stored:
    """A source tensor in memory that counts the rows it has read; it calls itself a file whose bytes are its rows."""

    name, dtype = "stored", Dtype.F32

    def __init__(self, values: NDArray[np.float32]) -> None:
        self.values, self.shape = values, values.shape
        self.n_read = 0
        self.seen: set[int] = set()

    def read_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        assert 0 <= start < stop <= row_count(self.shape), f"rows {start} to {stop} are not in {self.shape}"
        assert out.flags.c_contiguous
        self.n_read += stop - start
        self.seen.update(range(start, stop))
        out[...] = self.values.reshape(-1, self.shape[-1])[start:stop]

    def byte_ranges(self, start: int, stop: int) -> Iterator[ByteRange]:
        yield ByteRange(cast(ByteReader, self), start, stop)


def numbered(*shape: int) -> Stored:
    return Stored(np.arange(np.prod(shape), dtype=np.float32).reshape(shape))


ORDER = np.array([5, 4, 3, 0, 2, 4, 6, 11, 1, 9, 10, 11])
SHUFFLED = np.random.default_rng(0).permutation(12)


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        (lambda x: PickedRows(x, ORDER), lambda x: x.reshape(12, 7)[ORDER]),
        (lambda x: PickedRows(x, SHUFFLED, (3, 4, 7)), lambda x: x.reshape(12, 7)[SHUFFLED].reshape(3, 4, 7)),
        (lambda x: PickedRows(x, np.arange(1, 12, 2)), lambda x: x.reshape(12, 7)[1::2]),
        (lambda x: SpacedRows(x, (5, 7), first=2, step=2), lambda x: x.reshape(12, 7)[2:12:2]),
        (lambda x: SpacedRows(x, (1, 5, 7), first=3, step=1), lambda x: x.reshape(12, 7)[None, 3:8]),
        (lambda x: PickedColumns(x, np.array([6, 0, 3])), lambda x: x[..., [6, 0, 3]]),
        (Transposed, lambda x: x.swapaxes(-1, -2)),
        (lambda x: Transposed(x, (2, 6, 7)), lambda x: x.reshape(2, 6, 7).swapaxes(-1, -2)),
        (
            lambda x: rope_ordered(Reshaped(x, (12, 7)), 6),
            lambda x: x.reshape(2, 2, 3, 7).swapaxes(1, 2).reshape(12, 7),
        ),
        (lambda x: Reshaped(x, (12, 7)), lambda x: x.reshape(12, 7)),
        (lambda x: Changed(x, lambda values: -np.exp(values / 100)), lambda x: -np.exp(x / 100)),
        (lambda x: PickedRows(Transposed(x), np.arange(0, 21, 2)), lambda x: x.swapaxes(-1, -2).reshape(21, 4)[::2]),
    ],
)
@pytest.mark.parametrize("chunk_bytes", [1, 64, 8 << 20])
def test_every_range_of_rows(
    view: Callable[[SourceTensor], SourceTensor],
    expected: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    chunk_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(views, "_CHUNK_BYTES", chunk_bytes)
    source = numbered(3, 4, 7)
    seen, whole = view(source), expected(source.values)
    assert seen.shape == whole.shape
    rows, n_rows = whole.reshape(-1, whole.shape[-1]), row_count(whole.shape)
    for start in range(n_rows):
        for stop in range(start + 1, n_rows + 1):
            out = np.empty((stop - start, whole.shape[-1]), np.float32)
            seen.read_rows(start, stop, out)
            assert np.array_equal(out, rows[start:stop])
            told = {row for one in byte_ranges(seen, start, stop) for row in range(one.begin, one.end)}
            assert told == source.seen, "what is read ahead is not what is read"
            source.seen.clear()


def test_a_column_becomes_a_row() -> None:
    assert read_f32(Reshaped(numbered(4, 1), (4,))).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("head_dim", [2, 6])
def test_a_bias_is_reordered_as_the_rows_of_its_projection(head_dim: int) -> None:
    rows, bias = numbered(12, 1), numbered(12)
    assert (
        read_f32(rope_ordered(rows, head_dim)).reshape(-1).tolist()
        == read_f32(rope_ordered(bias, head_dim))[0].tolist()
    )


def test_far_rows_are_not_read_with_what_lies_between() -> None:
    source = numbered(10_000, 2)
    read_f32(PickedRows(source, np.arange(0, 10_000, 1000)))
    assert source.n_read == 10
    source = numbered(100, 2)
    read_f32(PickedRows(source, np.arange(0, 100, 2)))
    assert source.n_read == 99


def test_values_changed_in_half_precision() -> None:
    """As torch computes them, in which llama.cpp's converter leaves F16."""
    source = numbered(1, 7)
    source.values = np.array([[0.1, 1e-3, 3.0, 0.3, 2.7, 700.1, 1e-7]]).astype(np.float16)
    source.dtype = Dtype.F16
    found = read_f32(Changed(source, lambda values: values + np.float32(1)))
    assert np.array_equal(found, source.values + np.float16(1))
    assert not np.array_equal(found, source.values.astype(np.float32) + np.float32(1))


def test_the_row_of_the_source_is_known() -> None:
    spaced = SpacedRows(numbered(12, 2), (4, 2), first=1, step=3)
    assert [spaced.source_row(row) for row in range(4)] == [1, 4, 7, 10]
    picked = PickedRows(numbered(12, 2), ORDER)
    assert [picked.source_row(row) for row in range(12)] == ORDER.tolist()


def test_a_shape_that_does_not_fit_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="do not fill"):
        PickedRows(numbered(12, 2), ORDER, (3, 2))
    with pytest.raises(AssertionError, match=r"stored is \(12, 2\), not \(3, 2\)"):
        Reshaped(numbered(12, 2), (3, 2))
    with pytest.raises(AssertionError, match=r"not \(5, 5\)"):
        Transposed(numbered(12, 2), (5, 5))
