"""Why a model computes NaN: the weight that is none of the finite numbers, if there is one."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ggufmoe.errors import DecodeError, GGUFError
from ggufmoe.gguf.stored_rows import GGUFRows, OpenModel
from ggufmoe.native import quantizing

_MAX_SEARCHED_BYTES = 2 * 2**30
"""So much of a file is read within seconds; norms and routers, the smallest tensors, come first."""
_TILE_WEIGHTS = 2**20


def not_finite_error(path: Path) -> DecodeError:
    """The error of the model at ``path``, whose logits are NaN or infinite, naming the tensor that made them so.

    Reads the file's tensors, the smallest first and at most 2 GiB of them.
    """
    try:
        cause = _cause(path)
    except GGUFError as error:  # the file has gone, or was replaced
        cause = f"its file cannot be searched for the cause ({error})"
    return DecodeError(f"{path}: the model computes NaN or infinite logits for this text: {cause}")


def _cause(path: Path) -> str:
    n_left = _MAX_SEARCHED_BYTES
    with OpenModel(path) as model:
        for tensor in sorted(model.tensors.values(), key=lambda tensor: tensor.n_bytes):
            n_left -= tensor.n_bytes
            if n_left < 0:
                return f"no tensor up to {tensor.n_bytes} bytes holds such a weight; make or download the file again"
            if quantizing.can_widen(tensor.type) and not _is_finite(tensor):
                return f"{tensor.name} holds NaN or infinite weights; make or download the file again"
    return "its weights are all finite, so numbers overflow on the way; convert it to a wider type such as BF16"


def _is_finite(tensor: GGUFRows) -> bool:
    return all(
        np.isfinite(quantizing.widened(tensor.type, tensor.read(start, stop), tensor.n_cols)).all()
        for start, stop in tensor.tiles(_TILE_WEIGHTS)
    )
