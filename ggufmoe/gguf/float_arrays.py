"""GGUF files of float32 arrays with names, which hold measurements and no model: importance matrices, sensitivities."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufmoe.errors import GGUFError
from ggufmoe.files import PositionalFile, replacing
from ggufmoe.gguf.encoding import encode_header
from ggufmoe.gguf.header import GGUFValue, Header, TensorInfo, padded
from ggufmoe.gguf.types import GGMLType
from ggufmoe.gguf.upstream import DEFAULT_ALIGNMENT

_F32 = np.dtype("<f4")


def write_arrays(
    path: Path, what: str, metadata: Mapping[str, GGUFValue], arrays: Mapping[str, NDArray[np.float32]]
) -> None:
    """Write a GGUF file of ``arrays``, in their order; it gets its name only when it is complete.

    Raises OutputError, which names ``what``, if it cannot be written.
    """
    infos: list[TensorInfo] = []
    offset = 0
    for name, array in arrays.items():
        infos.append(TensorInfo(name, GGMLType.F32, array.shape, offset, array.size * _F32.itemsize))
        offset += padded(infos[-1].n_bytes, DEFAULT_ALIGNMENT)
    with replacing(path, what) as file:
        file.write(encode_header(metadata, tuple(infos)))
        for array in arrays.values():
            data = array.astype(_F32).tobytes()
            file.write(data.ljust(padded(len(data), DEFAULT_ALIGNMENT), b"\0"))


def read_arrays(path: Path, header: Header) -> dict[str, NDArray[np.float32]]:
    """All arrays of a file by their names, in the shapes that the file states. ``header`` is that of the file.

    Raises GGUFError for a tensor that is not float32, or has a value that is negative, NaN or infinite.
    """
    file = PositionalFile(path, GGUFError)
    arrays = {}
    for info in header.tensors:
        if info.type is not GGMLType.F32:
            raise GGUFError(f"{path}: {info.name} is {info.type.name}, expected F32")
        array: NDArray[Any] = np.empty(info.shape, _F32)
        file.read_into(header.data_offset + info.offset, array.data.cast("B"))
        if not np.all(np.isfinite(array) & (array >= 0)):
            raise GGUFError(f"{path}: {info.name} has a value that is negative, NaN or infinite")
        arrays[info.name] = array
    return arrays
