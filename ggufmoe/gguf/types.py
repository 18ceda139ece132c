"""The types of GGUF: of metadata values, of tensors, and llama.cpp's file types.

Numbers and sizes are the ``gguf`` package's, but for those few that it lacks; the names are spelt out here, so that
type checkers know them. Which types can be written is said in ``quant.filetypes``.
"""

from __future__ import annotations

from enum import Enum, IntEnum

from ggufmoe.gguf.upstream import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, LlamaFileType

_OUR_TENSOR_TYPES = {"Q8_1": (9, 32, 36), "Q2_0": (42, 64, 18)}
"""What gguf 0.19.0 lacks (Q2_0) or has from an older ggml (Q8_1): number, weights per block, bytes per block."""
_OUR_FILE_TYPES = {41: "Q2_0"}
"""File types of the pinned llama.cpp that gguf 0.19.0 lacks."""


class ValueType(IntEnum):
    """Types of GGUF metadata values, numbered as in the format."""

    UINT8 = GGUFValueType.UINT8
    INT8 = GGUFValueType.INT8
    UINT16 = GGUFValueType.UINT16
    INT16 = GGUFValueType.INT16
    UINT32 = GGUFValueType.UINT32
    INT32 = GGUFValueType.INT32
    FLOAT32 = GGUFValueType.FLOAT32
    BOOL = GGUFValueType.BOOL
    STRING = GGUFValueType.STRING
    ARRAY = GGUFValueType.ARRAY
    UINT64 = GGUFValueType.UINT64
    INT64 = GGUFValueType.INT64
    FLOAT64 = GGUFValueType.FLOAT64


STRUCT_CODES = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "B",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}
"""How ``struct`` spells the value types that have a fixed size."""


def _numbers(name: str) -> tuple[int, int, int]:
    """Number, weights per block and bytes per block of the tensor type ``name``."""
    if name in _OUR_TENSOR_TYPES:
        return _OUR_TENSOR_TYPES[name]
    number = GGMLQuantizationType[name]
    block_size, block_bytes = GGML_QUANT_SIZES[number]
    return int(number), block_size, block_bytes


class GGMLType(Enum):
    """ggml's tensor types: number in the file, weights per block, bytes per block."""

    F32 = _numbers("F32")
    F16 = _numbers("F16")
    Q4_0 = _numbers("Q4_0")
    Q4_1 = _numbers("Q4_1")
    Q5_0 = _numbers("Q5_0")
    Q5_1 = _numbers("Q5_1")
    Q8_0 = _numbers("Q8_0")
    Q8_1 = _numbers("Q8_1")
    Q2_K = _numbers("Q2_K")
    Q3_K = _numbers("Q3_K")
    Q4_K = _numbers("Q4_K")
    Q5_K = _numbers("Q5_K")
    Q6_K = _numbers("Q6_K")
    Q8_K = _numbers("Q8_K")
    IQ2_XXS = _numbers("IQ2_XXS")
    IQ2_XS = _numbers("IQ2_XS")
    IQ3_XXS = _numbers("IQ3_XXS")
    IQ1_S = _numbers("IQ1_S")
    IQ4_NL = _numbers("IQ4_NL")
    IQ3_S = _numbers("IQ3_S")
    IQ2_S = _numbers("IQ2_S")
    IQ4_XS = _numbers("IQ4_XS")
    I8 = _numbers("I8")
    I16 = _numbers("I16")
    I32 = _numbers("I32")
    I64 = _numbers("I64")
    F64 = _numbers("F64")
    IQ1_M = _numbers("IQ1_M")
    BF16 = _numbers("BF16")
    TQ1_0 = _numbers("TQ1_0")
    TQ2_0 = _numbers("TQ2_0")
    MXFP4 = _numbers("MXFP4")
    NVFP4 = _numbers("NVFP4")
    Q1_0 = _numbers("Q1_0")
    Q2_0 = _numbers("Q2_0")

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
        member = _TYPES_BY_ID.get(id)
        if member is None:
            raise ValueError(f"{id} is not a tensor type of this ggml")
        return member


_TYPES_BY_ID = {member.id: member for member in GGMLType}
REMOVED_TYPES = {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8"} | {
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}
"""Tensor types that ggml has removed, which the package does not list."""

FILE_TYPES: dict[int, str] = _OUR_FILE_TYPES | {
    int(member): member.name.partition("_")[2] for member in LlamaFileType if member is not LlamaFileType.GUESSED
}
"""``general.file_type`` (``enum llama_ftype``) by number: ``{15: "Q4_K_M"}``."""
