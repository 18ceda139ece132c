"""The sets of types that mixes for a size are made of, by the word of ``--types``."""

from __future__ import annotations

from collections.abc import Mapping

from ggufmoe.gguf.types import GGMLType

K_TYPES = tuple(GGMLType[name] for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0"))
ALL_TYPES = (
    *(GGMLType[name] for name in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS")),
    *K_TYPES,
)
SHORT_ROW_TYPES = tuple(GGMLType[name] for name in ("Q4_0", "IQ4_NL", "Q4_1", "Q5_0", "Q5_1"))
"""With ``all``, also those that fit rows which the blocks of 256 weights of the others do not divide."""
FAST_TYPES = (*ALL_TYPES, *SHORT_ROW_TYPES)
"""``fast`` takes the simple types for all rows: on some CPUs they are faster than others of their size."""
TYPE_SETS: Mapping[str, tuple[GGMLType, ...]] = {"k": K_TYPES, "all": ALL_TYPES, "fast": FAST_TYPES}
