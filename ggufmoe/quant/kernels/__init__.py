"""From float rows to quantized bytes: the one door to every kernel.

``quantize_rows`` gives ggml's bytes for every type, from whichever kernel does it fastest on this machine. One file per
format; ``ggml`` is the reference that all others must equal.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufmoe import native
from ggufmoe.ggufheader import GGMLType


def quantize_rows(
    type: GGMLType, src: NDArray[np.float32], dst: NDArray[np.uint8], imatrix: NDArray[np.float32] | None = None
) -> None:
    """Quantize ``src`` (rows, n_cols) float32 into ``dst`` (rows, ``type.row_bytes(n_cols)``) uint8.

    ``imatrix`` holds one importance per column, shape (n_cols,). F32, F16 and BF16 are types like any other here.
    """
    if type is GGMLType.F32:
        dst.view(np.float32)[...] = src
    elif type is GGMLType.F16:
        native.f32_to_f16(src, dst.view(np.float16))
    elif type is GGMLType.BF16:
        native.f32_to_bf16(src, dst.view(np.uint16))
    else:
        native.quantize_chunk(type, src, dst, imatrix)


__all__: list[Any] = ["quantize_rows"]
