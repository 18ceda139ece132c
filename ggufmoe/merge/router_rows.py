"""Router rows that exist already: those of a mixture's checkpoint, or of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ggufmoe.checkpoint.opening import open_directory
from ggufmoe.errors import RecipeError
from ggufmoe.families import family_of
from ggufmoe.gguf.stored_rows import GGUFRows, OpenModel
from ggufmoe.gguf.types import GGMLType
from ggufmoe.gguf.upstream import MODEL_TENSOR
from ggufmoe.merge.forward import Floats
from ggufmoe.weights.dtypes import read_f32


def read_router(path: Path, wanted: tuple[int, int, int], whose: str = "the recipe makes") -> Floats:
    """The rows of a router, of the shape ``wanted``: (n_layer, n_expert, n_embd).

    ``path`` is a directory with a checkpoint of a mixture, or a GGUF file. Raises RecipeError for a model without
    experts, or with other numbers of layers, experts or columns, where ``whose`` begins the sentence of what is wanted;
    CheckpointError or GGUFError where it cannot be read.
    """
    rows = _of_directory(path) if path.is_dir() else _of_gguf(path)
    if len(rows) != wanted[0] or any(one.shape != wanted[1:] for one in rows):
        found = f"{len(rows)} layers of {rows[0].shape[0]} experts and {rows[0].shape[1]} columns"
        raise RecipeError(
            f"router: {path} has a router for {found}; {whose} {wanted[0]} layers of {wanted[1]} experts "
            f"and {wanted[2]} columns"
        )
    return np.stack(rows)


def _of_directory(path: Path) -> list[Floats]:
    model = open_directory(path)
    try:
        rule = family_of(model.config).rule(MODEL_TENSOR.FFN_GATE_INP)
        if rule is None:
            raise RecipeError(f"router: {path} is no mixture of experts, so it has no router")
        layers = [layer for layer in range(model.config.n_layer) if rule.where(model.config, layer)]
        return [read_f32(model.tensors[rule.name(layer)]) for layer in layers]
    finally:
        model.close()


_ROUTER = "blk.{}.ffn_gate_inp.weight"


def _of_gguf(path: Path) -> list[Floats]:
    with OpenModel(path) as model:
        rows = [_read(path, tensor) for tensor in _routers(model.tensors)]
    if not rows:
        raise RecipeError(f"router: {path} is no mixture of experts, so it has no router")
    return rows


def _routers(tensors: Mapping[str, GGUFRows]) -> list[GGUFRows]:
    """The routers of the layers from the first on that have one."""
    named = (tensors.get(_ROUTER.format(layer)) for layer in range(len(tensors)))
    return [tensor for tensor in named if tensor is not None]


def _read(path: Path, tensor: GGUFRows) -> Floats:
    if tensor.type is not GGMLType.F32:
        raise RecipeError(
            f"router: {path}: {tensor.name} is {tensor.type.name}; a router is F32 in all files known here"
        )
    out = np.empty((tensor.n_rows, tensor.n_cols), dtype=np.float32)
    tensor.read_rows(0, tensor.n_rows, out)
    return out
