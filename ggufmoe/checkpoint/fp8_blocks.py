"""Weights that are stored as 8-bit floats with a scale for each block of their matrix, and read as float32.

Such are the checkpoints of DeepSeek-V3, and those of Qwen3 in FP8. Beside the tensor NAME, in
F8_E4M3, stands NAME_scale_inv, with a number for every block of rows and columns; config.json states the size of a
block. Source: ``dequant_simple`` in ``dequant_model`` of ``conversion/base.py`` at the pinned llama.cpp, which
multiplies in float32 as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufmoe.checkpoint.safetensors import TensorFile
from ggufmoe.weights.dtypes import read_f32
from ggufmoe.weights.source_tensor import Dtype, SourceTensor

STORED_DTYPE = "F8_E4M3"
_SUFFIX = "_scale_inv"


def _e4m3_values() -> NDArray[np.float32]:
    """What each byte means: a sign, 4 bits of exponent (bias 7) and 3 bits of mantissa; 0x7f and 0xff are NaN."""
    code = np.arange(128)
    exponent, mantissa = code >> 3, code & 7
    fraction = np.where(exponent == 0, mantissa / 8, 1 + mantissa / 8)
    values = np.ldexp(fraction, np.maximum(exponent, 1) - 7).astype(np.float32)
    values[0x7F] = np.nan
    return np.concatenate([values, -values])


E4M3_VALUES = _e4m3_values()


def block_size(raw: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block by the content of config.json; None where it states no such quantization."""
    stated = raw.get("quantization_config")
    if not isinstance(stated, dict) or stated.get("quant_method") != "fp8" or stated.get("fmt", "e4m3") != "e4m3":
        return None
    size = stated.get("weight_block_size")
    if not isinstance(size, list) or len(size) != 2 or not all(type(one) is int and one > 0 for one in size):
        return None
    return size[0], size[1]


def scales_among(names: Iterable[str], raw: Mapping[str, Any]) -> dict[str, str]:
    """Tensors that have scales of blocks, to the names of these; none unless config.json states such a quantization."""
    if block_size(raw) is None:
        return {}
    return {name.removesuffix(_SUFFIX): name for name in names if name.endswith(_SUFFIX)}


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
        n_rows, n_cols = self.shape[-2:]
        block_rows, block_cols = self.block
        stored: NDArray[np.uint8] = np.empty(out.shape, np.uint8)
        if stored.size:
            self.file.read_into(self.begin + start * n_cols, stored.data.cast("B"))
        np.take(E4M3_VALUES, stored, out=out, mode="clip")
        blocks_of_matrix = self.scales.shape[-2]
        row = start
        while row < stop:
            matrix, place = divmod(row, n_rows)
            end = min(stop, matrix * n_rows + min(n_rows, (place // block_rows + 1) * block_rows))
            number = matrix * blocks_of_matrix + place // block_rows
            scales = read_f32(self.scales, number, number + 1)[0]
            out[row - start : end - start] *= np.repeat(scales, block_cols)[:n_cols]
            row = end
