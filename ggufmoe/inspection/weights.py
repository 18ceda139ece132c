"""The weights of a model file: a tensor's rows as they are stored, and as float32.

Owns opening the files of a model and reading a few rows at a time, from any number of threads. What is compared or
counted is said by whoever asks; memory is what the caller's rows take, and never a whole tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from ggufmoe.errors import GGUFError
from ggufmoe.files import PositionalFile
from ggufmoe.gguf.header import TensorInfo
from ggufmoe.gguf.model import ModelHeader, read_model_header
from ggufmoe.gguf.types import GGMLType
from ggufmoe.native import library as native

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

_PLAIN = {
    GGMLType.F32: np.float32,
    GGMLType.F64: np.float64,
    GGMLType.I8: np.int8,
    GGMLType.I16: np.int16,
    GGMLType.I32: np.int32,
    GGMLType.I64: np.int64,
}


@dataclass(frozen=True)
class Weights:
    """One tensor in an open file. A row is what is contiguous: of a stack of experts, each expert's rows follow on."""

    info: TensorInfo
    file: PositionalFile
    begin: int
    """Bytes from the beginning of the file."""

    @property
    def n_cols(self) -> int:
        """Weights of a row."""
        return self.info.shape[-1]

    @property
    def n_rows(self) -> int:
        """Rows of all matrices together."""
        return math.prod(self.info.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of a row as it is stored."""
        return self.info.type.row_bytes(self.n_cols)

    @property
    def can_widen(self) -> bool:
        """Whether there are float32 values of this type."""
        kind = self.info.type
        return kind in _PLAIN or kind in (GGMLType.F16, GGMLType.BF16) or native.can_dequantize(kind)

    def stored(self, start: int, stop: int) -> Bytes:
        """Rows [start, stop) as the file has them: uint8, (rows, row_bytes). Raises GGUFError."""
        raw = np.empty((stop - start, self.row_bytes), np.uint8)
        self.file.read_into(self.begin + start * self.row_bytes, raw.data.cast("B"))
        return raw

    def widened(self, raw: Bytes) -> Floats:
        """Stored rows as float32, (rows, n_cols); only where ``can_widen``."""
        kind = self.info.type
        if kind in _PLAIN:
            # numbers beyond float32 become infinite, which is told by what is made of them
            with np.errstate(over="ignore"):
                return raw.view(_PLAIN[kind]).astype(np.float32, copy=False)
        rows = np.empty((len(raw), self.n_cols), np.float32)
        if kind is GGMLType.F16:
            native.f16_to_f32(raw.view(np.float16), rows)
        elif kind is GGMLType.BF16:
            native.bf16_to_f32(raw.view(np.uint16), rows)
        else:
            native.dequantize_rows(kind, raw, rows)
        return rows

    def tiles(self, n_weights: int) -> Iterator[tuple[int, int]]:
        """Ranges of rows of about ``n_weights`` each, from the first to the last."""
        step = max(1, n_weights // self.n_cols)
        for start in range(0, self.n_rows, step):
            yield start, min(start + step, self.n_rows)


class WeightFiles:
    """All tensors of a model, split or not, by name; use it with ``with``. Raises GGUFError as its header does."""

    def __init__(self, path: Path) -> None:
        self.model: ModelHeader = read_model_header(path)
        self._files: list[PositionalFile] = []
        self.tensors: dict[str, Weights] = {}
        try:
            for shard in self.model.shards:
                file = PositionalFile(shard.path, GGUFError)
                self._files.append(file)
                for info in shard.header.tensors:
                    self.tensors[info.name] = Weights(info, file, shard.header.data_offset + info.offset)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the files; a second call does nothing."""
        for file in self._files:
            file.close()

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
