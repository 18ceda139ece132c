"""Judge kernels on this machine by the stored hashes: a line for each, and exit status 1 if ggml would be used for one.

probe.py BF16 Q4_K Q6_K        these formats from this source; without formats all of them
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import numpy as np

from ggufmoe.gguf.types import GGMLType
from ggufmoe.quant.filetypes import ABORTS_WITHOUT_IMATRIX
from ggufmoe.quant.kernels import prepare, trust
from ggufmoe.quant.kernels.probe_hashes import HASHES
from ggufmoe.quant.kernels.probe_tile import fingerprint, hash_name, probe, probe_importances


def main() -> int:
    """Judge each format, with importances where it needs them, and make the whole probe without ggml."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stdout)
    source, *names = sys.argv[1:]
    n_wrong = 0
    for type_ in [GGMLType[name] for name in names] or list(filter(trust.has_kernel, GGMLType)):
        weighted, start = type_ in ABORTS_WITHOUT_IMATRIX, time.perf_counter()
        weights = probe(type_, source)
        report = prepare(type_, weights.dtype.name, weighted)
        assert report is not None
        whole = "not made"
        if report.routine == "fast":
            kernel, _ = trust.Kernels().judged(type_, weights.dtype.name, weighted)
            assert kernel is not None
            made = np.zeros((len(weights), type_.row_bytes(weights.shape[1])), np.uint8)
            trust.run(kernel, weights, made, probe_importances() if weighted else None)
            same = fingerprint(made) == HASHES[hash_name(type_, source, weighted)].ggml
            whole = "equal" if same else "other"
        n_wrong += whole != "equal"
        print(
            f"{hash_name(type_, source, weighted):34} {report.routine}: {report.reason}; all bytes {whole}; "
            f"{time.perf_counter() - start:.1f} s",
            flush=True,
        )
    return int(n_wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
