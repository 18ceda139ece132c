"""Importance matrices: how much each input column of each weight matrix matters, as llama-imatrix measures it on text.

Reads both formats of llama-imatrix, GGUF and the older ``.dat``, checks every value, and computes the weights that
llama-quantize computes. ``policy`` decides which tensors need an importance matrix.

An expert to which the router sent no token has a count of zero. llama-quantize gives all columns of such an expert the
importance 1, and so does ``weights``; ``coverage`` lists these experts so that a caller can warn.

Source: ``common/imatrix-loader.cpp`` and ``tools/quantize/quantize.cpp`` of llama.cpp at the pinned commit.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from ggufmoe.errors import GGUFError, ImatrixError
from ggufmoe.files import what_instead
from ggufmoe.gguf.float_arrays import write_arrays
from ggufmoe.gguf.header import Header, TensorInfo, read_header
from ggufmoe.gguf.types import GGMLType
from ggufmoe.gguf.upstream import Keys
from ggufmoe.gguf.values import text, texts, u32
from ggufmoe.quant.mixes import TOKEN_EMBEDDINGS

_F32 = np.dtype("<f4")
_SUMS, _COUNTS = ".in_sum2", ".counts"
_DATASETS, _CHUNK_COUNT, _CHUNK_SIZE = Keys.IMatrix.DATASETS, Keys.IMatrix.CHUNK_COUNT, Keys.IMatrix.CHUNK_SIZE
_CHECK_FLOATS = 1 << 20
_MAX_NAME_BYTES = 4096


@dataclass(frozen=True)
class Entry:
    """Where the file stores the sums of squares of one tensor, and how many tokens each of its experts processed."""

    offset: int
    """Bytes from the start of the file to the sums."""
    n_values: int
    counts: NDArray[np.float32]
    """Tokens, float32: one count per expert, or a single count for all; in a ``.dat`` a single count of chunks."""


@dataclass(frozen=True)
class Imatrix:
    """An importance matrix file. ``load`` checks every value; ``weights`` then reads one tensor at a time."""

    path: Path
    entries: Mapping[str, Entry]
    datasets: tuple[str, ...]
    chunk_count: int
    chunk_size: int
    """Tokens in a chunk; 0 for a ``.dat``, which does not store it."""
    is_legacy: bool

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Imatrix:
        """Open an importance matrix, a GGUF or a ``.dat`` file, and check all its values.

        Raises ImatrixError for a file that cannot be read, is truncated or inconsistent, or holds a value that is
        negative or not finite.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                is_gguf = file.read(4) == b"GGUF"
                if not is_gguf and (instead := what_instead(path)) is not None:
                    raise ImatrixError(f"{path}: is {instead}")
                imatrix = _load_gguf(path) if is_gguf else _load_legacy(path, file)
                for name, entry in imatrix.entries.items():
                    if not all(np.all(np.isfinite(chunk) & (chunk >= 0)) for chunk in _chunks(file, entry)):
                        raise ImatrixError(
                            f"{path}: {name}: an importance is negative, NaN or infinite; "
                            "compute the importance matrix again"
                        )
        except OSError as error:
            raise ImatrixError(f"{path}: cannot read the importance matrix: {error.strerror or error}") from error
        return imatrix

    @property
    def names(self) -> frozenset[str]:
        """The tensors for which the file has an entry."""
        return frozenset(self.entries)

    @property
    def coverage(self) -> dict[str, tuple[int, ...]]:
        """Tensor name to the indices of its experts that processed no token; tensors without such experts are left out.

        ``weights`` gives these experts the importance 1 in every column.
        """
        unreached = {name: np.flatnonzero(entry.counts == 0).tolist() for name, entry in self.entries.items()}
        return {name: tuple(experts) for name, experts in unreached.items() if experts and not self.is_legacy}

    def fit(self, shapes: Mapping[str, Sequence[int]]) -> frozenset[str]:
        """The names of a model's tensors for which ``weights`` will return importances.

        ``shapes`` maps the name of each tensor of the model to its numpy shape. Reads no values. Raises ImatrixError if
        an entry and its tensor differ in size, or if the file has no entry for any tensor of the model. A token
        embedding whose size differs is left out instead, as in llama.cpp.
        """
        known = {name: shape for name, shape in shapes.items() if name in self.entries}
        if not known:
            raise ImatrixError(f"{self.path}: has no entry for any tensor of this model; make one from this model")
        return frozenset(
            name for name, shape in known.items() if self._fits(name, math.prod(shape[:-2]), int(shape[-1]))
        )

    def weights(self, tensor_name: str, n_expert: int, n_cols: int) -> NDArray[np.float32] | None:
        """The importance of each column, (n_expert, n_cols) float32; ``n_expert`` is 1 for a plain matrix.

        None if the file has no entry for the tensor, or if it is a token embedding whose size differs. Raises
        ImatrixError if the size of any other tensor differs from its entry, or if the file cannot be read. Computed in
        single precision, as in llama-quantize.
        """
        if tensor_name not in self.entries or not self._fits(tensor_name, n_expert, n_cols):
            return None
        entry = self.entries[tensor_name]
        try:
            with self.path.open("rb") as file:
                sums = _read_floats(file, entry.offset, entry.n_values)
        except OSError as error:
            raise ImatrixError(f"{self.path}: {tensor_name}: cannot read the sums: {error}") from error
        values = sums.astype(np.float32).reshape(len(entry.counts), -1)
        reached = entry.counts > 0
        values[reached] /= entry.counts[reached, None]
        if not self.is_legacy:
            values[~reached] = 1
        return values.reshape(n_expert, n_cols)

    def _fits(self, name: str, n_expert: int, n_cols: int) -> bool:
        n_values = self.entries[name].n_values
        if n_values == n_expert * n_cols:
            return True
        if name in TOKEN_EMBEDDINGS:
            return False
        raise ImatrixError(
            f"{self.path}: {name} has {n_values} importances, expected {n_expert} x {n_cols} for this model; "
            "make the importance matrix from a GGUF of this very model"
        )


def save(
    path: str | os.PathLike[str],
    entries: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]],
    datasets: Sequence[str] = (),
    chunk_count: int = 0,
    chunk_size: int = 512,
) -> None:
    """Write an importance matrix as a GGUF file with the layout of llama-imatrix.

    ``entries`` maps each tensor to the sums of squares of its inputs, (experts, cols), and to the tokens that each of
    its experts processed, (experts,), both float32. ``chunk_size`` is in tokens. The file gets its name only when it
    is complete. Raises OutputError if it cannot be written.
    """
    arrays: dict[str, NDArray[np.float32]] = {}
    for name, (sums, counts) in sorted(entries.items()):
        # ggml leaves out the outer dimension where it is 1
        arrays[name + _SUMS] = sums.reshape(counts.size, -1) if counts.size > 1 else sums.reshape(-1)
        arrays[name + _COUNTS] = counts.reshape(-1, 1) if counts.size > 1 else counts.reshape(1)
    metadata = {
        Keys.General.TYPE: text("imatrix"),
        _DATASETS: texts(datasets),
        _CHUNK_COUNT: u32(chunk_count),
        _CHUNK_SIZE: u32(chunk_size),
    }
    write_arrays(Path(path), "the importance matrix", metadata, arrays)


def _load_gguf(path: Path) -> Imatrix:
    try:
        header = read_header(path)
    except GGUFError as error:
        raise ImatrixError(f"{error} (read as an importance matrix)") from error
    absent = [key for key in (_DATASETS, _CHUNK_COUNT, _CHUNK_SIZE) if key not in header.metadata]
    if absent:
        raise ImatrixError(f"{path}: is a GGUF file but not an importance matrix: it lacks {', '.join(absent)}")
    tensors = {tensor.name: tensor for tensor in header.tensors}
    names = {name.removesuffix(_SUMS).removesuffix(_COUNTS) for name in tensors if name.endswith((_SUMS, _COUNTS))}
    if not names:
        raise ImatrixError(f"{path}: is an importance matrix without entries")
    with path.open("rb") as file:
        entries = {name: _gguf_entry(file, header.data_offset, tensors, name, path) for name in sorted(names)}
    datasets = header.metadata[_DATASETS].value
    return Imatrix(
        path,
        entries,
        tuple(str(dataset) for dataset in datasets) if isinstance(datasets, list) else (),
        _count_of(header, _CHUNK_COUNT, path),
        _count_of(header, _CHUNK_SIZE, path),
        is_legacy=False,
    )


def _count_of(header: Header, key: str, path: Path) -> int:
    value = header.metadata[key].value
    if not isinstance(value, int):
        raise ImatrixError(f"{path}: {key} is not a number")
    return int(value)


def _gguf_entry(file: BinaryIO, data_offset: int, tensors: Mapping[str, TensorInfo], name: str, path: Path) -> Entry:
    sums, counts = tensors.get(name + _SUMS), tensors.get(name + _COUNTS)
    if sums is None or counts is None:
        raise ImatrixError(f"{path}: {name} has {'counts but no sums' if sums is None else 'sums but no counts'}")
    if sums.type is not GGMLType.F32 or counts.type is not GGMLType.F32:
        raise ImatrixError(f"{path}: {name}: expected F32 sums and counts, found {sums.type.name}, {counts.type.name}")
    n_values, n_counts = math.prod(sums.shape), math.prod(counts.shape)
    if n_values % n_counts:
        raise ImatrixError(f"{path}: {name}: {n_values} sums cannot be shared among {n_counts} counts")
    raw = _read_floats(file, data_offset + counts.offset, n_counts).astype(np.float64)
    if not np.all(np.isfinite(raw) & (raw >= 0)):
        raise ImatrixError(f"{path}: {name}: a count is negative or not finite")
    # rounds halves up, as lround does for values that are not negative
    return Entry(data_offset + sums.offset, n_values, np.floor(raw + 0.5).astype(np.float32))


def _load_legacy(path: Path, file: BinaryIO) -> Imatrix:
    reader = _LegacyReader(path, file)
    n_entries = reader.int32("the number of entries")
    if n_entries < 1:
        raise ImatrixError(f"{path}: is not an importance matrix: neither a GGUF file nor a .dat with entries")
    entries: dict[str, Entry] = {}
    for index in range(n_entries):
        name, entry = reader.entry(index)
        if name in entries:
            raise ImatrixError(f"{path}: has two entries for {name}")
        entries[name] = entry
    chunk_count, datasets = reader.trailer()
    return Imatrix(path, entries, datasets, chunk_count, chunk_size=0, is_legacy=True)


class _LegacyReader:
    """Reads a ``.dat`` file in order (int32 lengths, names, floats) and checks each length against the bytes left."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._end = os.fstat(file.fileno()).st_size
        file.seek(0)

    def entry(self, index: int) -> tuple[str, Entry]:
        where = f"entry {index + 1}"
        name = self._text(self.int32(f"the name of {where}"), f"the name of {where}")
        calls = self.int32(f"the calls of {name}")
        n_values = self.int32(f"the size of {name}")
        if n_values < 1 or n_values * _F32.itemsize > self._left:
            raise ImatrixError(f"{self._path}: {name} claims {n_values} values, {self._left} bytes are left")
        entry = Entry(self._file.tell(), n_values, np.array([max(calls, 0)], np.float32))
        self._file.seek(n_values * _F32.itemsize, os.SEEK_CUR)
        return name, entry

    def trailer(self) -> tuple[int, tuple[str, ...]]:
        """The optional end of the file: the number of chunks, and the name of the text that was used."""
        if self._left < 4:
            return 0, ()
        chunk_count = self.int32("the number of chunks")
        if self._left < 4:
            return chunk_count, ()
        length = self.int32("the name of the text")
        return chunk_count, (self._text(length, "the name of the text"),) if length else ()

    def int32(self, what: str) -> int:
        data = self._file.read(4)
        if len(data) < 4:
            raise ImatrixError(f"{self._path}: not an importance matrix, or a truncated one: it ends before {what}")
        return int(struct.unpack("<i", data)[0])

    @property
    def _left(self) -> int:
        return self._end - self._file.tell()

    def _text(self, length: int, what: str) -> str:
        if not 0 < length <= min(self._left, _MAX_NAME_BYTES):
            raise ImatrixError(
                f"{self._path}: not an importance matrix, or a truncated one: {what} claims {length} bytes, "
                f"{self._left} are left in the file"
            )
        try:
            return self._file.read(length).decode("utf-8").split("\0")[0]
        except UnicodeDecodeError as error:
            raise ImatrixError(f"{self._path}: {what} is not text; is this an importance matrix?") from error


def _chunks(file: BinaryIO, entry: Entry) -> Iterator[NDArray[np.float32]]:
    for start in range(0, entry.n_values, _CHECK_FLOATS):
        count = min(_CHECK_FLOATS, entry.n_values - start)
        yield _read_floats(file, entry.offset + start * _F32.itemsize, count)


def _read_floats(file: BinaryIO, offset: int, count: int) -> NDArray[np.float32]:
    file.seek(offset)
    data = file.read(count * _F32.itemsize)
    if len(data) < count * _F32.itemsize:
        raise OSError(f"the file has shrunk below {offset + count * _F32.itemsize} bytes")
    return np.frombuffer(data, _F32)
