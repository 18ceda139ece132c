"""Compare converted files with llama_model_quantize: every file type, for Mixtrals of many shapes and source types.

For each checkpoint the lossless GGUF is made, quantized by llama.cpp, and compared with a conversion straight from the
checkpoint: metadata, order, types and every byte. Classic and fused layouts are compared as whole files. Prints a line
for each checkpoint and ends with the number of tensors compared; exits 1 if anything differs. Takes about half an hour;
the tests run a part of it.

    python scripts/check_bytes.py [--quick] [--types Q4_K_M,IQ2_XS] [--quantizer fast]
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ggufmoe.convert import convert, plan_convert
from ggufmoe.errors import GgufmoeError, ImatrixError, OptionError
from ggufmoe.gguf.header import read_header
from ggufmoe.options import Quantizer
from ggufmoe.quant import importances as imatrix
from ggufmoe.quant.filetypes import FileType
from ggufmoe.quant.policy import TypePolicy
from tests.quant.llama_quantize import quantize, read_tensors
from tests.tiny import make_checkpoint

EXPERTS = (2, 3, 4, 8)
HIDDEN = (256, 512, 288)
SOURCES = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Shape:
    """One checkpoint; ``weighted`` gives an importance matrix to all types and not only to those that need one."""

    n_expert: int
    n_embd: int
    tie: bool
    dtype: str
    weighted: bool = False

    def make(self, directory: Path, layout: str = "classic") -> Path:
        sizes = {"n_expert": self.n_expert, "n_embd": self.n_embd, "n_ff": self.n_embd, "n_layer": 1}
        return make_checkpoint(directory, layout=layout, tie=self.tie, dtype=self.dtype, **sizes)


def shapes(quick: bool) -> Iterator[Shape]:
    """Every number of experts, width and tie from bfloat16; the other sources and importance for some of them."""
    for n_expert, n_embd, tie in itertools.product(EXPERTS, HIDDEN, (False, True)):
        if not quick or (n_expert, n_embd) in ((2, 256), (3, 288)):
            yield Shape(n_expert, n_embd, tie, "BF16")
    for dtype, n_embd in itertools.product(SOURCES[1:], (256,) if quick else (256, 288)):
        yield Shape(2, n_embd, False, dtype)
    for n_expert in (3,) if quick else (2, 3, 8):
        yield Shape(n_expert, 256, False, "BF16", weighted=True)


Importance = Mapping[str, NDArray[np.float32]]


def importance(source: Path, path: Path) -> Importance:
    """Write a made-up importance matrix for every matrix of the checkpoint; returns what llama.cpp shall be given."""
    rng = np.random.default_rng(5)
    entries: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
    for tensor in plan_convert(source, "x.gguf", "F32").tensors:
        if len(tensor.shape) > 1 and "ffn_gate_inp" not in tensor.name:
            n_expert = math.prod(tensor.shape[:-2])
            sums = rng.gamma(0.7, 2.0, (n_expert, tensor.n_cols)).astype(np.float32)
            entries[tensor.name] = (sums, np.full(n_expert, 3, np.float32))
    imatrix.save(path, entries, ["text"], chunk_count=4)
    loaded = imatrix.Imatrix.load(path)
    weights = {name: loaded.weights(name, *sums.shape) for name, (sums, _) in entries.items()}
    return {name: values for name, values in weights.items() if values is not None}


def differences(
    source: Path, file_type: FileType, lossless: Path, matrix: Path | None, weights: Importance, quantizer: Quantizer
) -> list[str]:
    """What differs between the two roads to one file type."""
    ours, theirs = lossless.with_name("ours.gguf"), lossless.with_name("theirs.gguf")
    refused = ""
    try:
        convert(source, ours, file_type.name, imatrix=matrix, force=True, quantizer=quantizer)
    except OptionError as error:
        refused = str(error)
    outcome = quantize(lossless, TypePolicy(file_type), weights if matrix else None, theirs)
    if refused:
        return [f"refused: {refused}"] if outcome.ok else []
    if not outcome.ok:
        return [f"llama.cpp refuses: {outcome.log.strip()[-200:]}"]
    mine, wanted = read_tensors(ours), read_tensors(theirs)
    found = [f"order: {list(mine)} is not {list(wanted)}"] if list(mine) != list(wanted) else []
    found += [f"{name}: {mine[name][0].name}" for name in wanted if mine.get(name) != wanted[name]]
    keys, wanted_keys = read_header(ours).metadata, read_header(theirs).metadata
    return found + [key for key in wanted_keys if keys.get(key) != wanted_keys[key]]


def check_shape(
    shape: Shape, file_types: Sequence[FileType], directory: Path, quantizer: Quantizer
) -> tuple[int, list[str]]:
    """Tensors compared, and what differs, for one checkpoint and all file types."""
    source = shape.make(directory / "tiny-model")
    lossless, matrix = directory / "lossless.gguf", directory / "imatrix.gguf"
    convert(source, lossless, shape.dtype)
    weights = importance(source, matrix)
    n_tensors, found = 0, []
    for file_type in file_types:
        given = matrix if shape.weighted or needs_importance(source, file_type) else None
        differing = differences(source, file_type, lossless, given, weights, quantizer)
        found += [f"{file_type.name}: {text}" for text in differing]
        n_tensors += len(read_header(lossless).tensors)
    return n_tensors, found + compare_layouts(shape, directory)


def needs_importance(source: Path, file_type: FileType) -> bool:
    """Whether a conversion is refused without an importance matrix."""
    try:
        plan_convert(source, "x.gguf", file_type.name)
    except GgufmoeError as error:
        return isinstance(error, ImatrixError)
    return False


def compare_layouts(shape: Shape, directory: Path) -> list[str]:
    """Whether the fused layout of the same weights gives the same file."""
    fused = shape.make(directory / "fused" / "tiny-model", "fused")
    for source, name in ((directory / "tiny-model", "classic.gguf"), (fused, "fused.gguf")):
        convert(source, directory / name, "Q4_K_M")
    same = (directory / "classic.gguf").read_bytes() == (directory / "fused.gguf").read_bytes()
    return [] if same else ["classic and fused differ"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few shapes only")
    parser.add_argument("--types", help="file types, separated by commas; all by default")
    parser.add_argument("--quantizer", default="auto", help="auto, fast (kernels from the first tile on) or ggml")
    arguments = parser.parse_args()
    named = arguments.types.split(",") if arguments.types else FileType.__members__
    file_types = [FileType.from_name(name) for name in named]
    total, failed = 0, 0
    for shape in shapes(arguments.quick):
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as directory:
            n_tensors, found = check_shape(shape, file_types, Path(directory), arguments.quantizer)
        total, failed = total + n_tensors, failed + len(found)
        print(f"{shape}: {n_tensors} tensors, {len(found)} differ, {time.monotonic() - started:.0f} s", flush=True)
        for text in found:
            print(f"  {text}", flush=True)
    print(f"{total} tensors of {len(file_types)} file types compared, {failed} differences")
    return 1 if failed or not total else 0


if __name__ == "__main__":
    sys.exit(main())
