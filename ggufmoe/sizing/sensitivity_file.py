"""Sensitivity files: for each matrix of a model its mean squared inputs, and the squared gradients of its outputs.

A file is GGUF, and an importance matrix of llama.cpp as well: ``NAME.in_sum2`` and ``NAME.counts`` are those of
llama-imatrix, ``NAME.grad_sum2`` is ours. NAME is a tensor's name in GGUF files of the model. Owns the file's content
and its checks; what is measured is in ``sizing.sensitivity_pass``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufmoe.errors import GGUFError, InputError
from ggufmoe.files import StrPath, possible_path
from ggufmoe.gguf.float_arrays import read_arrays, write_arrays
from ggufmoe.gguf.header import Header, read_header
from ggufmoe.gguf.names import TOKEN_EMBEDDING
from ggufmoe.gguf.upstream import Keys
from ggufmoe.gguf.values import text, texts, u32, u64
from ggufmoe.merge.backward import MatrixSums

Floats = NDArray[np.float32]
KIND = "sensitivity"
"""``general.type`` of a file."""
TOKENS, SEED, SOURCE = "sensitivity.tokens", "sensitivity.seed", "sensitivity.source"
_INPUTS, _COUNTS, _GRADIENTS, _ROW_COUNTS = ".in_sum2", ".counts", ".grad_sum2", ".row_counts"


MatrixSensitivity = MatrixSums
"""What was measured of one matrix, or of each matrix of a stack of experts."""


@dataclass(frozen=True, eq=False)
class EmbeddingSensitivity:
    """What was measured of the token embedding, which is looked up and not multiplied."""

    grad_sum2: Floats
    """(columns,) float32: the sum over all tokens of the square of the loss's gradient with regard to each column of
    the stored row that was looked up."""
    row_counts: Floats
    """(rows,) float32: how often each row was looked up."""


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """How much a model's loss on a text depends on each weight, as sums over tokens.

    If a matrix is quantized with the error E, (rows, columns), the divergence of the model's distribution grows by
    about ``0.5 * sum(G[i] * X[j] * E[i, j] ** 2) * counts / n_tokens`` nats a token, where G is ``grad_sum2 / counts``
    and X ``in_sum2 / counts``. For the embedding it is
    ``0.5 * sum(row_counts[i] / n_tokens * grad_sum2[j] / n_tokens * E[i, j] ** 2)``.
    """

    architecture: str
    """``general.architecture`` of the model's GGUF files."""
    source: str
    """The name of what was measured: a directory, recipe, file or hub id."""
    n_tokens: int
    seed: int
    """What the targets were drawn by."""
    datasets: tuple[str, ...]
    """Names of the texts."""
    chunk_size: int
    """Tokens in a sequence."""
    matrices: Mapping[str, MatrixSensitivity]
    """By GGUF name. An output that is the embedding has its entry as ``output.weight``."""
    embedding: EmbeddingSensitivity

    @classmethod
    def load(cls, path: StrPath) -> Sensitivity:
        """Read a file and check all its values.

        Raises InputError for a file that is no sensitivity or misses some part of one, GGUFError for one that is
        corrupt, or has a value that is negative or not finite.
        """
        path = possible_path(path)
        header = read_header(path)
        if header.get(Keys.General.TYPE) != KIND:
            raise InputError(f"{path}: is a GGUF file, but no sensitivity; `ggufmoe sensitivity` makes one")
        numbers = {key: _whole(path, header, key) for key in (TOKENS, SEED, Keys.IMatrix.CHUNK_SIZE)}
        arrays = read_arrays(path, header)
        names = sorted(
            name.removesuffix(_GRADIENTS)
            for name in arrays
            if name.endswith(_GRADIENTS) and name != TOKEN_EMBEDDING + _GRADIENTS
        )
        datasets = header.get(Keys.IMatrix.DATASETS)
        return cls(
            architecture=str(header.get(Keys.General.ARCHITECTURE, "")),
            source=str(header.get(SOURCE, "")),
            n_tokens=numbers[TOKENS],
            seed=numbers[SEED],
            datasets=tuple(map(str, datasets)) if isinstance(datasets, list) else (),
            chunk_size=numbers[Keys.IMatrix.CHUNK_SIZE],
            matrices={name: _matrix(path, arrays, name) for name in names},
            embedding=EmbeddingSensitivity(
                _array(path, arrays, TOKEN_EMBEDDING + _GRADIENTS).reshape(-1),
                _array(path, arrays, TOKEN_EMBEDDING + _ROW_COUNTS).reshape(-1),
            ),
        )

    def save(self, path: Path) -> None:
        """Write the file; it gets its name only when it is complete. Raises OutputError if it cannot be written."""
        arrays: dict[str, Floats] = {}
        for name, matrix in sorted(self.matrices.items()):
            arrays[name + _INPUTS] = _stacked(matrix.in_sum2)
            arrays[name + _COUNTS] = _stacked(matrix.counts.reshape(-1, 1))
            arrays[name + _GRADIENTS] = _stacked(matrix.grad_sum2)
        arrays[TOKEN_EMBEDDING + _GRADIENTS] = self.embedding.grad_sum2
        arrays[TOKEN_EMBEDDING + _ROW_COUNTS] = self.embedding.row_counts
        metadata = {
            Keys.General.TYPE: text(KIND),
            Keys.General.ARCHITECTURE: text(self.architecture),
            SOURCE: text(self.source),
            TOKENS: u64(self.n_tokens),
            SEED: u64(self.seed),
            Keys.IMatrix.DATASETS: texts(self.datasets),
            Keys.IMatrix.CHUNK_COUNT: u32(self.n_tokens // self.chunk_size),
            Keys.IMatrix.CHUNK_SIZE: u32(self.chunk_size),
        }
        write_arrays(path, "the sensitivity", metadata, arrays)


def _stacked(array: Floats) -> Floats:
    """An array (n, width) as ggml stores it: the outer dimension is left out where it is 1."""
    return array if len(array) > 1 else array.reshape(-1)


def _whole(path: Path, header: Header, key: str) -> int:
    value: Any = header.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"{path}: {key} is {'missing' if value is None else 'no whole number'}")
    return value


def _array(path: Path, arrays: Mapping[str, Floats], name: str) -> Floats:
    if name not in arrays:
        raise InputError(f"{path}: {name} is missing")
    return arrays[name]


def _matrix(path: Path, arrays: Mapping[str, Floats], name: str) -> MatrixSensitivity:
    inputs, counts, gradients = (_array(path, arrays, name + suffix) for suffix in (_INPUTS, _COUNTS, _GRADIENTS))
    n = counts.size
    if inputs.size % n or gradients.size % n:
        raise GGUFError(
            f"{path}: {name} has {inputs.size} inputs and {gradients.size} gradients, not equally many for each of "
            f"{n} matrices"
        )
    return MatrixSensitivity(inputs.reshape(n, -1), counts.reshape(-1), gradients.reshape(n, -1))
