#!/usr/bin/env python3
"""How far files of equal sizes are from the unquantized model: standard mixes, and mixes that are chosen in two ways.

For each file type a file of its mix is made, and files of at most the same size: ``chosen`` by the divergence that
ggufmoe predicts, and ``relative`` by the relative squared error of each tensor, weighted by the importance of columns
and by the tensor's rows. All use the same importance matrix. Prints a table in Markdown: the mean KL divergence from
the model on a text, and the difference from the standard mix with its paired error.

usage: bench_sizes.py MODEL-F16.gguf SENSITIVITY.gguf TEXT [--types Q4_K_M,Q3_K_M] [--chunks N] [--folder DIR]
"""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path

import numpy as np

import ggufmoe
from ggufmoe.evaluation.divergence import Comparison
from ggufmoe.export.gguf_source import GGUFSource
from ggufmoe.gguf.header import read_header
from ggufmoe.gguf.names import TOKEN_EMBEDDING
from ggufmoe.gguf.own_keys import MIX
from ggufmoe.gguf.stored_rows import GGUFRows
from ggufmoe.native import quantizing
from ggufmoe.sizing.sensitivity_file import EmbeddingSensitivity, Floats, MatrixSensitivity, Sensitivity
from ggufmoe.work import Progress

_ROWS = 1024
"""Rows that are read at a time."""


def weighted_squares(rows: GGUFRows, columns: Floats) -> float:
    """The sum of the squares of a matrix's weights, each times the importance of its column."""
    n_rows, n_cols = rows.shape[-2:]
    total = 0.0
    for start in range(0, n_rows, _ROWS):
        stored = np.empty((min(_ROWS, n_rows - start), rows.type.row_bytes(n_cols)), np.uint8)
        rows.read_rows(start, start + len(stored), stored)
        total += float((np.square(quantizing.widened(rows.type, stored, n_cols)) @ columns).sum(dtype=np.float64))
    return total


def relative(model: Path, known: Sensitivity) -> Sensitivity:
    """A sensitivity by which the predicted divergence of a tensor is its relative error times its rows."""
    matrices: dict[str, MatrixSensitivity] = {}
    embedding = known.embedding
    with contextlib.closing(GGUFSource(model)) as source:
        for tensor in source.tensors:
            n_rows, n_cols = tensor.shape[-2:] if len(tensor.shape) > 1 else (1, tensor.shape[-1])
            if tensor.name == TOKEN_EMBEDDING:
                even = np.ones(n_cols, np.float32)
                each = n_rows / weighted_squares(tensor.parts[0], even)
                embedding = EmbeddingSensitivity(even, np.full(n_rows, each, np.float32))
            elif tensor.name in known.matrices:
                matrix = known.matrices[tensor.name]
                means = (matrix.in_sum2 / np.maximum(matrix.counts, 1)[:, None]).astype(np.float32)
                sums = [weighted_squares(part, row) for part, row in zip(tensor.parts, means, strict=True)]
                gradients = np.repeat([[n_rows / max(one, 1e-30)] for one in sums], n_rows, axis=1).astype(np.float32)
                ones = np.ones(len(means), np.float32)
                matrices[tensor.name] = MatrixSensitivity(means, ones, gradients)
    tied = {} if "output.weight" in matrices else {"output.weight": _nothing(known.matrices["output.weight"])}
    return Sensitivity(
        known.architecture, known.source, 1, known.seed, known.datasets, known.chunk_size, matrices | tied, embedding
    )


def _nothing(matrix: MatrixSensitivity) -> MatrixSensitivity:
    """A role that counts for nothing: an output that is the embedding."""
    return MatrixSensitivity(matrix.in_sum2 * 0, matrix.counts, matrix.grad_sum2 * 0)


def files(model: Path, sensitivity: Path, by_error: Path, quant: str, folder: Path, types: str) -> list[Path]:
    """The standard file of a type, and the files that are chosen with at most its size; those that exist are kept."""
    paths = [folder / f"{quant}-{how}.gguf" for how in ("standard", "relative", f"chosen-{types}")]
    words = {"imatrix": sensitivity, "force": True}
    if not paths[0].exists():
        ggufmoe.quantize(model, paths[0], quant, **words)  # type: ignore[arg-type]
    size = str(paths[0].stat().st_size)
    for path, measured in zip(paths[1:], (by_error, sensitivity), strict=True):
        if not path.exists():
            ggufmoe.quantize(model, path, size=size, sensitivity=measured, types=types, **words)  # type: ignore[arg-type]
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("sensitivity", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--quants", default="Q2_K,Q3_K_M,Q4_K_M,Q5_K_M,IQ3_XXS")
    parser.add_argument("--types", default="all")
    parser.add_argument("--chunks", type=int, default=50)
    parser.add_argument("--n-ctx", type=int, default=512)
    parser.add_argument("--folder", type=Path, default=Path("build/sizes"))
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    by_error = given.folder / "relative.gguf"
    relative(given.model, Sensitivity.load(given.sensitivity)).save(by_error)
    print(
        "| size of | bytes | standard | relative error | chosen | chosen - standard | change | predicted |", flush=True
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for quant in given.quants.split(","):
        paths = files(given.model, given.sensitivity, by_error, quant, given.folder, given.types)
        found = ggufmoe.kl_divergences(
            paths,
            given.model,
            text_file=given.text,
            logits=given.folder / f"{given.text.stem}-{given.n_ctx}x{given.chunks}.logits",
            n_ctx=given.n_ctx,
            chunks=given.chunks,
            on_progress=quiet,
        )
        print(row(quant, paths, found), flush=True)


def quiet(progress: Progress) -> None:
    """Progress is not shown."""


def row(quant: str, paths: list[Path], found: Comparison) -> str:
    """One line of the table."""
    means = [each.kl.mean.value for each in found.models]
    above = found.kl_differences[1]
    mix = read_header(paths[2]).metadata[MIX].value
    predicted = json.loads(mix)["predicted_kl"]
    cells = [
        quant,
        f"{paths[0].stat().st_size:,}",
        *(f"{mean:.5f}" for mean in means),
        f"{above.value:+.5f} ± {above.uncertainty:.5f}",
        f"{means[2] / means[0] - 1:+.1%}",
        f"{predicted:.5f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
