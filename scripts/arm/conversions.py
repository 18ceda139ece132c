"""Conversions of ordinary and extreme weights, and the SHA-256 of their files; runs on x86-64 and under emulation.

    conversions.py FOLDER --quantizer auto --threads 1 2 7        one JSON object: name of a file to its SHA-256

``make_inputs`` needs the tests' packages; the rest only what converting needs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import ggufmoe  # noqa: E402
from ggufmoe.convert import plan_convert  # noqa: E402

CHECKPOINTS = {"BF16": 4, "F16": 5, "F32": 6}
"""Source dtypes, and the seeds of their checkpoints."""
JOBS = (
    ("BF16", "Q4_K_M", False),
    ("BF16", "IQ2_M", True),
    ("BF16", "IQ4_XS", False),
    ("BF16", "Q8_0", False),
    ("BF16", "F16", False),
    ("F32", "BF16", False),
    ("F16", "F32", False),
)
"""Source dtype, file type, and whether with importances."""
RECIPES: dict[str, dict[str, Any]] = {
    "hidden.yaml": {"gate_mode": "hidden"},
    "hidden_float32.yaml": {"gate_mode": "hidden", "dtype": "float32"},
    "embed.yaml": {"gate_mode": "cheap_embed"},
    "random.yaml": {"gate_mode": "random"},
}
"""Recipes, with their gate modes; router rows in float32 show the last bits in which processors differ."""
FF = 576
"""Not a multiple of 256: rows of this length become other types than the rest."""


def make_inputs(folder: Path) -> None:
    """Write checkpoints with ordinary and extreme weights, importances and recipes."""
    from tests import tiny
    from tests.merge.test_merged import write_recipe

    for dtype, seed in CHECKPOINTS.items():
        spec = tiny.Tiny(n_ff=FF, dtype=dtype, seed=seed)
        tiny.make_checkpoint(folder / dtype, n_ff=FF, dtype=dtype, seed=seed)
        stored = {name: (dtype, extreme(name, data)) for name, (_, data) in tiny.stored_tensors(spec).items()}
        tiny.write_shards(folder / dtype, stored, None)
    _save_importances(folder)
    for seed, name in enumerate(("base", "math")):
        tiny.make_checkpoint(folder / name, arch="mistral", seed=seed)
    for name, fields in RECIPES.items():
        write_recipe(folder, "base", "math", seed=7, **fields).rename(folder / name)


def extreme(name: str, data: NDArray[Any]) -> NDArray[Any]:
    """The first rows of an expert's matrix with weights of all magnitudes that the type has, zeros, and constants."""
    if ".experts." not in name:
        return data
    values: NDArray[Any] = data.copy()
    if values.dtype == np.uint16:  # bfloat16: the exponent's bits are those of float32
        exponents = np.array([1, 5, 20, 60, 90, 127, 140], np.uint16)
        for row, exponent in enumerate(exponents):
            values[row] = (values[row] & 0x807F) | (exponent << 7)
        values[7] &= 0x807F  # denormals
    else:
        smallest = 1e-7 if values.dtype == np.float16 else 1e-42
        for row, scale in enumerate((smallest, smallest * 100, 1e-5, 1e-3, 1.0, 10.0)):
            values[row] *= values.dtype.type(scale)
    values[8, 32:64] = 0
    values[9] = values[9, 0]
    values[10, ::2] = 0
    return values


def _save_importances(folder: Path) -> None:
    from ggufmoe.quant import importances

    random, entries = np.random.default_rng(5), {}
    for tensor in plan_convert(folder / "BF16", folder / "x.gguf", "F32").tensors:
        if len(tensor.shape) > 1 and "ffn_gate_inp" not in tensor.name:
            n_expert = tensor.n_rows // tensor.shape[-2]
            sums = random.gamma(0.7, 2.0, (n_expert, tensor.n_cols)).astype(np.float32)
            entries[tensor.name] = sums, np.full(n_expert, 3, np.float32)
    importances.save(folder / "importances.gguf", entries, ["text.txt"], chunk_count=4)


def convert_all(folder: Path, quantizer: Any, threads: list[int], keep: Path | None) -> dict[str, str]:
    """Convert every input with every number of threads; gives the hashes. ``keep``: where the recipes' files stay."""
    hashes = {}
    with tempfile.TemporaryDirectory(dir=folder) as made:
        for n_threads in threads:
            for dtype, file_type, weighted in JOBS:
                imatrix = folder / "importances.gguf" if weighted else None
                options = {"imatrix": imatrix, "threads": n_threads, "quantizer": quantizer}
                path = Path(made) / f"{dtype}-{file_type}.gguf"
                ggufmoe.convert(folder / dtype, path, file_type, force=True, **options)
                hashes[f"{dtype} to {file_type}, {n_threads} threads"] = sha256(path)
        for name in RECIPES:
            path = (keep or Path(made)) / f"{name}.gguf"
            ggufmoe.convert(folder / name, path, "Q4_K_M", force=True, threads=2, quantizer=quantizer)
            hashes[f"{name} to Q4_K_M"] = sha256(path)
    return hashes


def sha256(path: Path) -> str:
    """The hash of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> int:
    """Convert everything and print the hashes."""
    parser = argparse.ArgumentParser(description="Convert the inputs of the check, and print the files' SHA-256.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quantizer", default="auto")
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument("--keep", type=Path, help="folder for the files of recipes")
    options = parser.parse_args()
    print(json.dumps(convert_all(options.folder, options.quantizer, options.threads, options.keep)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
