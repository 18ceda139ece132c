"""The header of a GGUF file: its value and tensor types, and a reader that trusts nothing.

Owns the facts of the format (GGUF version 3 and ggml's tensor types). It reads headers only: tensor bytes belong to
the writer, the runtime and the tools that ask for them by offset.
"""

from __future__ import annotations

from enum import Enum, IntEnum


class ValueType(IntEnum):
    """Types of GGUF metadata values, numbered as in the format."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


class GGMLType(Enum):
    """ggml's tensor types: number in the file, weights per block, bytes per block.

    Source: ``ggml/include/ggml.h`` and the type traits in ``ggml/src/ggml.c`` at the pinned commit; the tests compare
    every row with ``ggml_blck_size`` and ``ggml_type_size``.
    """

    F32 = (0, 1, 4)
    F16 = (1, 1, 2)
    Q4_0 = (2, 32, 18)
    Q4_1 = (3, 32, 20)
    Q5_0 = (6, 32, 22)
    Q5_1 = (7, 32, 24)
    Q8_0 = (8, 32, 34)
    Q8_1 = (9, 32, 36)
    Q2_K = (10, 256, 84)
    Q3_K = (11, 256, 110)
    Q4_K = (12, 256, 144)
    Q5_K = (13, 256, 176)
    Q6_K = (14, 256, 210)
    Q8_K = (15, 256, 292)
    IQ2_XXS = (16, 256, 66)
    IQ2_XS = (17, 256, 74)
    IQ3_XXS = (18, 256, 98)
    IQ1_S = (19, 256, 50)
    IQ4_NL = (20, 32, 18)
    IQ3_S = (21, 256, 110)
    IQ2_S = (22, 256, 82)
    IQ4_XS = (23, 256, 136)
    I8 = (24, 1, 1)
    I16 = (25, 1, 2)
    I32 = (26, 1, 4)
    I64 = (27, 1, 8)
    F64 = (28, 1, 8)
    IQ1_M = (29, 256, 56)
    BF16 = (30, 1, 2)
    TQ1_0 = (34, 256, 54)
    TQ2_0 = (35, 256, 66)
    MXFP4 = (39, 32, 17)
    NVFP4 = (40, 64, 36)
    Q1_0 = (41, 128, 18)
    Q2_0 = (42, 64, 18)

    def __init__(self, id: int, block_size: int, block_bytes: int) -> None:
        self.id = id
        self.block_size = block_size
        self.block_bytes = block_bytes

    @property
    def is_quantized(self) -> bool:
        """Whether several weights share one block (everything but plain numbers)."""
        return self.block_size > 1

    def row_bytes(self, n_cols: int) -> int:
        """Bytes of one row of ``n_cols`` weights; ``n_cols`` must be a multiple of the block size."""
        if n_cols % self.block_size:
            raise ValueError(f"{n_cols} columns are not a multiple of {self.name}'s block of {self.block_size}")
        return n_cols // self.block_size * self.block_bytes

    @classmethod
    def from_id(cls, id: int) -> GGMLType:
        """The type with this number in GGUF files; ValueError if ggml has none (or has removed it)."""
        for member in cls:
            if member.id == id:
                return member
        raise ValueError(f"{id} is not a tensor type of this ggml")
