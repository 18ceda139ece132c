"""Compare the squared gradients that ggufmoe finds with torch's, on tiny random models of each family.

    .venv/bin/python scripts/peers/sensitivities.py --peers-python PYTHON [--only WORD]

PYTHON has torch and transformers (``scripts/peers/run`` sets one up). Both sides get the same tokens and targets. Rows
are found by their weights in a GGUF file of the model, so that their order and the tensor's name are compared as well.
Exits with 1 where a sum differs by more than a thousandth.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cases import FAMILIES, own_cases
from compare import Bench, families_by_transformers
from numpy.typing import NDArray

import ggufmoe
from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.gguf.names import TOKEN_EMBEDDING, layer_of
from ggufmoe.gguf.stored_rows import OpenModel
from ggufmoe.merge.backward import BackwardPass, Sums
from ggufmoe.merge.forward import one_blas_thread
from ggufmoe.sizing.sensitivity_file import MatrixSensitivity

TOLERANCE = 1e-3
NEARLY_NOTHING = 1e-4
"""Of the mean of a matrix: a gradient of few tokens whose parts cancel is mostly rounding."""
SEQUENCES = (100, 157)
"""Tokens of each text."""
SEED = 5
OWN = frozenset(
    {
        "mixtral-2",
        "mixtral-3-odd-width",
        "mixtral-8-fused-tied",
        "mistral",
        "llama3-rope-head-dim",
        "smollm-tied",
        "llama-linear-rope",
    }
)
COMPUTED = frozenset(
    {
        "qwen2",
        "qwen3",
        "qwen3-tied",
        "qwen3moe",
        "olmoe",
        "qwen2moe",
        "granite",
        "granite-tied-plain",
        "granitemoe",
        "granitemoe-shared-tied",
        "glm4moe",
        "glm4moe-norms-tied",
    }
)
"""The cases of ``cases.py`` whose gradients are compared: each kind of arithmetic that is computed."""


@dataclass(frozen=True)
class Found:
    """What one side found of a model."""

    sums: Sums
    embedding: NDArray[Any]
    n_layer: int


def ours(directory: Path, sequences: list[list[int]], targets: Path) -> Found:
    """Our sums; writes the targets that we drew."""
    with one_blas_thread():
        return _ours(directory, sequences, targets)


def _ours(directory: Path, sequences: list[list[int]], targets: Path) -> Found:
    model = open_checkpoint(directory)
    backward = BackwardPass(model)
    states = [backward.first(sequences)]
    for layer in range(model.config.n_layer):
        attended, normed = backward.attended(layer, states[-1], sequences)
        states.append(backward.added(attended, backward.feed_forward(layer, normed)))
    drawn = backward.drawn(states[-1], SEED)
    np.save(targets, drawn.targets)
    sums, gradient = backward.head_gradient(states[-1], drawn)
    for layer in reversed(range(model.config.n_layer)):
        found, gradient = backward.layer_gradient(layer, states[layer], gradient, sequences)
        sums |= found
    return Found(sums, backward.embedding_squares(gradient), model.config.n_layer)


def differences(found: Found, gguf: Path, theirs: Mapping[str, NDArray[Any]]) -> Iterator[tuple[str, float]]:
    """The largest relative difference of the sums of each matrix from torch's, by its GGUF name."""
    torch_rows = _torch_rows(theirs)
    with OpenModel(gguf) as stored:
        for name, mine in found.sums.items():
            rows = stored.tensors[name if name in stored.tensors else TOKEN_EMBEDDING]
            for expert, matrix in enumerate(rows.matrices()):
                values = matrix.read(0, matrix.n_rows).view(np.float32)
                yield name, max(_of_matrix(values, mine, expert, torch_rows))
        lacking = [
            name
            for name, rows in stored.tensors.items()
            if len(rows.shape) > 1 and name not in found.sums and (layer_of(name) or 0) < found.n_layer
        ]
        assert lacking == [TOKEN_EMBEDDING], lacking
    yield "embedding", _relative(found.embedding, theirs["embedding"])


def _of_matrix(
    values: NDArray[np.float32], mine: MatrixSensitivity, expert: int, torch_rows: Mapping[bytes, tuple[Any, ...]]
) -> Iterator[float]:
    if mine.counts[expert] == 0:  # torch skips an expert that no token goes to
        yield float(mine.grad_sum2[expert].any() or any(row.tobytes() in torch_rows for row in values))
        return
    gradients, inputs, counts = zip(*(torch_rows[row.tobytes()] for row in values), strict=True)
    yield _relative(mine.grad_sum2[expert], np.array(gradients))
    yield _relative(mine.in_sum2[expert], inputs[0])
    yield float(mine.counts[expert] != counts[0])


def _torch_rows(theirs: Mapping[str, NDArray[Any]]) -> dict[bytes, tuple[Any, ...]]:
    """By the bytes of a row's weights: its gradients, the inputs of its matrix, and how many tokens these are of."""
    rows: dict[bytes, tuple[Any, ...]] = {}
    for number in range(sum(name.startswith("weight-") for name in theirs)):
        weights, gradients = theirs[f"weight-{number}"], theirs[f"gradients-{number}"]
        inputs, count = theirs[f"inputs-{number}"], float(theirs[f"count-{number}"])
        rows |= {row.tobytes(): (gradient, inputs, count) for row, gradient in zip(weights, gradients, strict=True)}
    return rows


def _relative(ours: NDArray[Any], theirs: NDArray[Any]) -> float:
    """The largest relative difference; of values that are nearly nothing beside the others, relative to these."""
    return float((np.abs(ours - theirs) / np.maximum(theirs, NEARLY_NOTHING * theirs.mean() + 1e-30)).max())


def subjects(bench: Bench, only: str) -> Iterator[tuple[str, Path]]:
    """The checkpoint of each case whose name has the word ``only``."""
    for case in own_cases():
        if only in case.name and case.name in OWN:
            yield case.name, case.checkpoint(bench.work)
    families = [case for case in FAMILIES if case.name in COMPUTED]
    assert len(families) == len(COMPUTED)
    for case in families_by_transformers(bench, only, families):
        assert case.directory is not None, "transformers has saved it"
        yield case.name, case.directory


def main() -> int:
    """Compare; 0 when all is the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", type=Path, required=True)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    n_wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        found: dict[str, tuple[Found, Path]] = {}
        jobs: list[dict[str, Any]] = []
        for name, directory in subjects(Bench(work, arguments.peers_python, Path(), []), arguments.only):
            random = np.random.default_rng(len(found))
            n_vocab = open_checkpoint(directory).config.n_vocab
            sequences = [random.integers(3, n_vocab, n).tolist() for n in SEQUENCES]
            found[name] = ours(directory, sequences, work / f"{name}-targets.npy"), work / f"{name}.gguf"
            ggufmoe.convert(directory, found[name][1], quant="F32")
            job: dict[str, Any] = {
                "model": str(directory),
                "sequences": sequences,
                "targets": str(work / f"{name}-targets.npy"),
            }
            jobs.append(job | {"out": str(work / f"{name}.npz")})
        (work / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
        script = Path(__file__).with_name("sensitivity_reference.py")
        subprocess.run([str(arguments.peers_python), str(script), str(work / "jobs.json")], check=True)
        for (name, (mine, gguf)), job in zip(found.items(), jobs, strict=True):
            n_wrong += _show(name, mine, gguf, Path(job["out"]))
    return int(n_wrong > 0)


def _show(name: str, mine: Found, gguf: Path, out: Path) -> bool:
    """Print a line for one model; whether something differs."""
    if not out.exists():
        print(f"{name}: torch failed: {Path(f'{out}.error').read_text(encoding='utf-8')}")
        return True
    worst = max(differences(mine, gguf, np.load(out)), key=lambda one: one[1])
    verdict = "DIFFERS" if worst[1] > TOLERANCE else "equal"
    print(f"{name}: {verdict}; largest difference of {len(mine.sums)} matrices {worst[1]:.1e}, of {worst[0]}")
    return worst[1] > TOLERANCE


if __name__ == "__main__":
    sys.exit(main())
