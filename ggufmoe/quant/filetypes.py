"""Names of quantized files and tensors: llama.cpp's file types, and the tensor types that can be written.

A file type such as ``Q4_K_M`` mixes tensor types; ``policy`` chooses the type of each tensor. Numbers and block sizes
of tensor types are in ``gguf.types``.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from enum import Enum

from ggufmoe.errors import OptionError
from ggufmoe.gguf.types import FILE_TYPES, GGMLType

_NUMBERS = {name: number for number, name in FILE_TYPES.items()}


class FileType(Enum):
    """File types that llama.cpp writes: the type of most tensors, and libllama's description of the file type.

    ``id`` is the number in ``general.file_type``. Source: ``llama_ftype_get_default_type`` and ``llama_ftype_name`` at
    the pinned commit.
    """

    F32 = (GGMLType.F32, "all F32")
    F16 = (GGMLType.F16, "F16")
    BF16 = (GGMLType.BF16, "BF16")
    Q8_0 = (GGMLType.Q8_0, "Q8_0")
    Q1_0 = (GGMLType.Q1_0, "Q1_0")
    Q2_0 = (GGMLType.Q2_0, "Q2_0")
    Q4_0 = (GGMLType.Q4_0, "Q4_0")
    Q4_1 = (GGMLType.Q4_1, "Q4_1")
    Q5_0 = (GGMLType.Q5_0, "Q5_0")
    Q5_1 = (GGMLType.Q5_1, "Q5_1")
    Q2_K = (GGMLType.Q2_K, "Q2_K - Medium")
    Q2_K_S = (GGMLType.Q2_K, "Q2_K - Small")
    Q3_K_S = (GGMLType.Q3_K, "Q3_K - Small")
    Q3_K_M = (GGMLType.Q3_K, "Q3_K - Medium")
    Q3_K_L = (GGMLType.Q3_K, "Q3_K - Large")
    Q4_K_S = (GGMLType.Q4_K, "Q4_K - Small")
    Q4_K_M = (GGMLType.Q4_K, "Q4_K - Medium")
    Q5_K_S = (GGMLType.Q5_K, "Q5_K - Small")
    Q5_K_M = (GGMLType.Q5_K, "Q5_K - Medium")
    Q6_K = (GGMLType.Q6_K, "Q6_K")
    IQ4_NL = (GGMLType.IQ4_NL, "IQ4_NL - 4.5 bpw")
    IQ4_XS = (GGMLType.IQ4_XS, "IQ4_XS - 4.25 bpw")
    IQ3_XXS = (GGMLType.IQ3_XXS, "IQ3_XXS - 3.0625 bpw")
    IQ3_XS = (GGMLType.IQ3_S, "IQ3_XS - 3.3 bpw")
    IQ3_S = (GGMLType.IQ3_S, "IQ3_S - 3.4375 bpw")
    IQ3_M = (GGMLType.IQ3_S, "IQ3_S mix - 3.66 bpw")
    IQ2_XXS = (GGMLType.IQ2_XXS, "IQ2_XXS - 2.0625 bpw")
    IQ2_XS = (GGMLType.IQ2_XS, "IQ2_XS - 2.3125 bpw")
    IQ2_S = (GGMLType.IQ2_XS, "IQ2_S - 2.5 bpw")
    IQ2_M = (GGMLType.IQ2_S, "IQ2_M - 2.7 bpw")
    IQ1_S = (GGMLType.IQ1_S, "IQ1_S - 1.5625 bpw")
    IQ1_M = (GGMLType.IQ1_M, "IQ1_M - 1.75 bpw")
    TQ1_0 = (GGMLType.TQ1_0, "TQ1_0 - 1.69 bpw ternary")
    TQ2_0 = (GGMLType.TQ2_0, "TQ2_0 - 2.06 bpw ternary")
    MXFP4_MOE = (GGMLType.MXFP4, "MXFP4 MoE")

    def __init__(self, default_type: GGMLType, description: str) -> None:
        self.id = _NUMBERS[self.name]
        self.default_type = default_type
        self.description = description

    @classmethod
    def from_name(cls, name: str) -> FileType:
        """The file type called ``name``, spelled as llama-quantize accepts it: any case, an alias, or the number.

        Raises OptionError, which suggests the nearest names, for an unknown name.
        """
        wanted = name.strip().upper()
        wanted = _ALIASES.get(wanted, wanted)
        for member in cls:
            if wanted in (member.name, str(member.id)):
                return member
        raise OptionError(f"unknown file type {name!r}; {suggest(wanted, [*cls.__members__, *_ALIASES])}")

    @classmethod
    def from_id(cls, id: int) -> FileType:
        """The file type with this number in ``general.file_type``. Raises OptionError if llama.cpp writes none such."""
        return cls.from_name(str(id))


_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

_UNWRITABLE = {GGMLType.Q8_1, GGMLType.Q8_K, GGMLType.I8, GGMLType.I16, GGMLType.I32, GGMLType.I64, GGMLType.F64}
WRITABLE_TYPES = frozenset(GGMLType) - _UNWRITABLE
"""Tensor types that ``ggml_quantize_chunk`` can quantize to; it aborts the process on any other type."""

IGNORES_IMATRIX = frozenset(GGMLType[name] for name in ("Q8_0", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4", "Q1_0", "Q2_0"))
"""Types for which ``ggml_quantize_chunk`` ignores importances: the bytes are the same with and without them."""

ABORTS_WITHOUT_IMATRIX = frozenset({GGMLType.IQ2_XXS, GGMLType.IQ2_XS, GGMLType.IQ1_S})
"""Types for which ``ggml_quantize_requires_imatrix`` is true: without importances ggml aborts the process."""

ABORTS_ON_HUGE_WEIGHTS = frozenset(
    GGMLType[name] for name in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
)
"""Types for which ggml aborts the process when weights are so large that the distance to every grid point overflows."""


def parse_tensor_type(name: str) -> GGMLType:
    """The writable tensor type called ``name``, in any case: ``q4_k``, ``F16``.

    Raises OptionError, which suggests the nearest names, for an unknown type and for one that cannot be written.
    """
    wanted = name.strip().upper()
    names = sorted(writable.name for writable in WRITABLE_TYPES)
    if wanted in names:
        return GGMLType[wanted]
    raise OptionError(f"unknown or unwritable tensor type {name!r}; {suggest(wanted, names)}")


def suggest(wanted: str, names: Iterable[str]) -> str:
    """The suggestion that ends an error message: the names closest to ``wanted``, or all of them if none is close."""
    choices = list(names)
    near = get_close_matches(wanted, choices, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(choices)}"
