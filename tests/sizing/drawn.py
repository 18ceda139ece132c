"""Sensitivities of no text, for models whose tensors are known: every number is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ggufmoe.gguf.names import OUTPUT, TOKEN_EMBEDDING
from ggufmoe.gguf.types import GGMLType
from ggufmoe.quant.policy import TensorShape, may_quantize
from ggufmoe.sizing.sensitivity_file import EmbeddingSensitivity, Floats, MatrixSensitivity, Sensitivity

N_TOKENS = 512


def sensitivity(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> Sensitivity:
    """Of each matrix in ``shapes`` (numpy's order): few columns and rows matter much, as in real models."""
    draw = np.random.default_rng(seed)

    def heavy(*size: int) -> Floats:
        return (N_TOKENS * draw.lognormal(-2, 1.5, size)).astype(np.float32)

    shapes = {OUTPUT: shapes[TOKEN_EMBEDDING], **shapes}
    matrices = {}
    for name, shape in shapes.items():
        if name != TOKEN_EMBEDDING and may_quantize(TensorShape(name, shape, GGMLType.F32)):
            n = int(np.prod(shape[:-2]))
            counts = np.full(n, N_TOKENS // max(1, n // 2), np.float32)
            matrices[name] = MatrixSensitivity(heavy(n, shape[-1]), counts, heavy(n, shape[-2]))
    rows, columns = shapes[TOKEN_EMBEDDING]
    counts = draw.multinomial(N_TOKENS, draw.dirichlet(np.full(rows, 0.1))).astype(np.float32)
    return Sensitivity(
        architecture="llama",
        source="drawn",
        n_tokens=N_TOKENS,
        seed=seed,
        datasets=("no text",),
        chunk_size=64,
        matrices=matrices,
        embedding=EmbeddingSensitivity(heavy(columns), counts),
    )


def saved(path: Path, shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> Path:
    """The file of ``sensitivity(shapes, seed)``."""
    sensitivity(shapes, seed).save(path)
    return path
