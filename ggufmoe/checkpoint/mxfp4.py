"""MXFP4 weights of a checkpoint, with codes and scales in two tensors, read as ggml's blocks of the same values.

A block is 32 weights of 4 bits with one scale, a power of two. Source: ``repack_mxfp4`` of ``conversion/gpt_oss.py`` at
the pinned llama.cpp, and ``block_mxfp4`` of ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ggufmoe.checkpoint.safetensors import TensorFile
from ggufmoe.weights.byte_ranges import ByteRange
from ggufmoe.weights.source_tensor import Dtype

BLOCK_WEIGHTS = 32
CODE_BYTES = 16
"""Bytes of the codes of a block; its scale is one more."""


@dataclass(frozen=True, slots=True)
class MXFP4Rows:
    """A SourceTensor of ggml's MXFP4 blocks: a scale, then 16 bytes, of which byte j has codes of weights j and j + 16.

    In the checkpoint byte j has those of weights 2 j and 2 j + 1. ``codes`` and ``scales`` are file and first byte.
    """

    name: str
    shape: tuple[int, ...]
    codes: tuple[TensorFile, int]
    scales: tuple[TensorFile, int]
    dtype: ClassVar[Dtype] = Dtype.MXFP4

    def read_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Fill ``out``, uint8 (stop - start, bytes of a row), with rows [start, stop); safe from several threads.

        Raises SafetensorsError if a file has become shorter or cannot be read any more.
        """
        n_blocks = self.shape[-1] // BLOCK_WEIGHTS
        codes = np.empty((stop - start, n_blocks, CODE_BYTES), np.uint8)
        scales = np.empty((stop - start, n_blocks), np.uint8)
        for (file, begin), data in ((self.codes, codes), (self.scales, scales)):
            file.read_into(begin + start * data.strides[0], data.data.cast("B"))
        blocks = out.reshape(stop - start, n_blocks, 1 + CODE_BYTES)
        first, second = codes[..., : CODE_BYTES // 2], codes[..., CODE_BYTES // 2 :]
        blocks[..., 0] = scales
        blocks[..., 1::2] = first & 0x0F | second << 4
        blocks[..., 2::2] = first >> 4 | second & 0xF0

    def byte_ranges(self, start: int, stop: int) -> Iterator[ByteRange]:
        """What ``read_rows`` reads."""
        n_blocks = self.shape[-1] // BLOCK_WEIGHTS
        for (file, begin), row_bytes in ((self.codes, n_blocks * CODE_BYTES), (self.scales, n_blocks)):
            yield ByteRange(file.bytes, begin + start * row_bytes, begin + stop * row_bytes)
