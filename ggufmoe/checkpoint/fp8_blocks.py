"""Weights that are stored as 8-bit floats with a scale for each block of their matrix, and read as float32.

config.json states the size of a block. ``quant_method: fp8`` of transformers (DeepSeek-V3, Qwen3 in FP8) has blocks of
so many rows and columns, and beside the tensor NAME, in F8_E4M3, its scales as NAME_scale_inv; ``compressed-tensors``
with the format float-quantized mostly has one scale for each row, as NAME_scale. Source: ``dequant_simple`` in
``dequant_model`` of ``conversion/base.py`` at the pinned llama.cpp, which multiplies in float32 as well.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufmoe.checkpoint.safetensors import TensorFile
from ggufmoe.weights.byte_ranges import ByteRange, byte_ranges
from ggufmoe.weights.dtypes import read_f32
from ggufmoe.weights.source_tensor import Dtype, SourceTensor

STORED_DTYPE = "F8_E4M3"


def _e4m3_values() -> NDArray[np.float32]:
    """What each byte means: a sign, 4 bits of exponent (bias 7) and 3 bits of mantissa; 0x7f and 0xff are NaN."""
    code = np.arange(128)
    exponent, mantissa = code >> 3, code & 7
    fraction = np.where(exponent == 0, mantissa / 8, 1 + mantissa / 8)
    values = np.ldexp(fraction, np.maximum(exponent, 1) - 7).astype(np.float32)
    values[0x7F] = np.nan
    return np.concatenate([values, -values])


E4M3_VALUES = _e4m3_values()


@dataclass(frozen=True)
class Blocks:
    """What config.json states: the size of a block, and how scales are named."""

    n_rows: int
    n_cols: int | None
    """None: a block is as wide as its matrix."""
    names: re.Pattern[str]
    """Of scales; its group is the name of the weights."""

    def size(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of a block of a matrix of this shape."""
        return self.n_rows, self.n_cols or shape[-1]


def stated_blocks(raw: Mapping[str, Any]) -> Blocks | None:
    """The blocks by the content of config.json; None where it states no quantization that is read here."""
    stated = raw.get("quantization_config")
    if not isinstance(stated, dict):
        return None
    if stated.get("quant_method") == "fp8" and stated.get("fmt", "e4m3") == "e4m3":
        return _sized(stated.get("weight_block_size"), re.compile(r"(.+)_scale_inv"))
    if stated.get("quant_method") != "compressed-tensors" or stated.get("format") != "float-quantized":
        return None
    groups = stated.get("config_groups")
    group = next(iter(groups.values())) if isinstance(groups, dict) and len(groups) == 1 else None
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict) or (weights.get("type"), weights.get("num_bits")) != ("float", 8):
        return None
    names = re.compile(r"(.+\.weight)_scale")
    if weights.get("strategy") == "channel":
        return Blocks(1, None, names)
    return _sized(weights.get("block_structure"), names) if weights.get("strategy") == "block" else None


def _sized(size: object, names: re.Pattern[str]) -> Blocks | None:
    if not isinstance(size, list) or len(size) != 2 or not all(type(one) is int and one > 0 for one in size):
        return None
    return Blocks(size[0], size[1], names)


def scales_among(names: Iterable[str], raw: Mapping[str, Any]) -> dict[str, str]:
    """Tensors that have scales of blocks, to the names of these; none unless config.json states such a quantization."""
    blocks = stated_blocks(raw)
    if blocks is None:
        return {}
    return {found[1]: name for name in names if (found := blocks.names.fullmatch(name)) is not None}


def scales_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """The shape of the scales of a matrix, or of a stack of matrices: a block at its edges may be smaller."""
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


@dataclass(frozen=True, slots=True)
class BlockScaledRows:
    """A SourceTensor of a matrix, or of a stack of matrices, of bytes from ``begin`` on: each byte's number times the
    scale of its block."""

    name: str
    shape: tuple[int, ...]
    file: TensorFile
    begin: int
    scales: SourceTensor
    """Of the shape ``scales_shape``."""
    block: tuple[int, int]

    @property
    def dtype(self) -> Dtype:
        """float32, which holds the products as the converter computes them; BF16 would round them."""
        return Dtype.F32

    def read_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Fill ``out`` (stop - start, n_cols) with rows [start, stop); safe from several threads at once.

        Raises SafetensorsError if the file has become shorter or cannot be read any more.
        """
        n_cols = self.shape[-1]
        stored: NDArray[np.uint8] = np.empty(out.shape, np.uint8)
        if stored.size:
            self.file.read_into(self.begin + start * n_cols, stored.data.cast("B"))
        np.take(E4M3_VALUES, stored, out=out, mode="clip")
        if not stored.size:
            return
        n_rows, (block_rows, block_cols) = self.shape[-2], self.block
        matrix, place = np.divmod(np.arange(start, stop), n_rows)
        numbers = matrix * self.scales.shape[-2] + place // block_rows
        scales = read_f32(self.scales, int(numbers[0]), int(numbers[-1]) + 1)
        numbers -= numbers[0]
        if scales.shape[1] == 1:
            out *= scales[numbers]
            return
        ends = np.searchsorted(numbers, np.arange(len(scales)), side="right")
        for number, (first, end) in enumerate(itertools.pairwise((0, *ends))):
            out[first:end] *= np.repeat(scales[number], block_cols)[:n_cols]

    def byte_ranges(self, start: int, stop: int) -> Iterator[ByteRange]:
        """What ``read_rows`` reads."""
        if start < stop:
            n_cols = self.shape[-1]
            yield ByteRange(self.file.bytes, self.begin + start * n_cols, self.begin + stop * n_cols)
            first, last = (self._scale_row(row) for row in (start, stop - 1))
            yield from byte_ranges(self.scales, first, last + 1)

    def _scale_row(self, row: int) -> int:
        """The row of the scales, seen as one matrix, that belongs to a row of weights."""
        matrix, place = divmod(row, self.shape[-2])
        return matrix * self.scales.shape[-2] + place // self.block[0]
