"""Kernels for blocks of any magnitude: their bytes are ggml's where the usual kernels give up, and they are checked."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from ggufmoe.errors import NonFiniteError
from ggufmoe.gguf.types import GGMLType
from ggufmoe.native import quantizing
from ggufmoe.quant.filetypes import ABORTS_WITHOUT_IMATRIX, IGNORES_IMATRIX
from ggufmoe.quant.kernels.probe_hashes import HASHES
from ggufmoe.quant.kernels.probe_tile import probe
from ggufmoe.quant.kernels.trust import Kernel, Unbounded, has_kernel, run
from tests.quant.kernels.corpora import N_COLS, Floats, compiled, importances, kinds, rows

FORMATS = [kind for kind in GGMLType if has_kernel(kind)]
CASES = [
    (kind, weighted)
    for kind in FORMATS
    for weighted in (False, True)
    if kind not in (IGNORES_IMATRIX if weighted else ABORTS_WITHOUT_IMATRIX)
]
DOES_ALL = {(kind, weighted) for kind in ("Q3_K", "Q6_K", "IQ4_NL", "IQ4_XS", "NVFP4") for weighted in (False, True)}
DOES_ALL |= {
    ("Q4_0", True),
    ("Q5_0", True),
    ("IQ3_XXS", False),
    ("IQ2_S", False),
    ("IQ2_S", True),
    ("IQ1_S", True),
    ("IQ1_M", True),
}
"""Formats, and whether with importances, whose usual kernels leave out none of these blocks."""

TOO_LARGE = """
import sys
sys.modules["llama_cpp"] = None
import numpy as np
from ggufmoe.errors import NonFiniteError
from ggufmoe.gguf.types import GGMLType
from ggufmoe.quant.kernels import quantize_rows
src = np.full((3, 256), 0.5, np.float32)
src[1] = 1e25
dst = np.zeros((3, GGMLType.IQ1_M.row_bytes(256)), np.uint8)
for quantizer in ("fast", "auto"):
    try:
        quantize_rows(GGMLType.IQ1_M, src, dst, quantizer=quantizer)
    except NonFiniteError as error:
        print(error)
"""


@cache
def usual(kind: GGMLType, weighted: bool) -> Kernel:
    return compiled(kind, weighted)


def extremes(kind: GGMLType, imatrix: Floats | None) -> Floats:
    """Rows of every kind, and mixtures of them in one block; with weights that are large where they do not matter."""
    names = kinds(kind)
    mixed = [rows(seed, "mixed", 8, names) for seed in range(3)]
    made = np.concatenate([rows(7, name) for name in names] + mixed)
    if imatrix is None:  # where IQ1's cubes might overflow, and do not
        return np.concatenate([made, rows(6, "normal") * np.float32(1.5e10)])
    return np.concatenate([made, rows(5, "normal") * np.where(imatrix == 0, np.float32(1e7), np.float32(1))])


@pytest.mark.parametrize(("kind", "weighted"), CASES)
def test_bytes_are_those_of_ggml(kind: GGMLType, weighted: bool) -> None:
    imatrix = importances(4, "random") if weighted else None
    if imatrix is not None:
        imatrix[7::32] = 0
    src = extremes(kind, imatrix)
    expected, alone, together = (np.zeros((len(src), kind.row_bytes(N_COLS)), np.uint8) for _ in range(3))
    quantizing.quantize_chunk(kind, src, expected, imatrix)
    first = usual(kind, weighted)
    assert first.unbounded is not None
    kernel = first.unbounded.kernel(first, "F32")
    assert kernel is not None
    assert kernel.call(src, alone, imatrix) is None, "it leaves nothing out"
    assert int(np.count_nonzero(alone != expected)) == 0
    odd = first.call(src, together, imatrix)
    assert (odd is None) == ((kind.name, weighted) in DOES_ALL), "the usual kernel leaves out some"
    run(first, src, together, imatrix)
    assert int(np.count_nonzero(together != expected)) == 0


def test_a_kernel_with_wrong_bytes_is_not_trusted(caplog: pytest.LogCaptureFixture) -> None:
    first, other = usual(GGMLType.Q4_0, False), usual(GGMLType.IQ4_NL, False)  # with blocks of the same size
    with caplog.at_level(logging.WARNING, "ggufmoe"):
        assert Unbounded(lambda: other).kernel(first, "F32") is None
    assert "Q4_0 from F32: the kernel for extreme weights has other bytes than ggml" in caplog.text


def test_a_kernel_that_cannot_be_compiled_leaves_the_rows_to_ggml(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> Kernel:
        raise RuntimeError("no memory")

    first = replace(usual(GGMLType.Q4_0, False), unbounded=Unbounded(fail))
    src = np.ascontiguousarray(probe(GGMLType.Q4_0, "F32"))
    made, expected = (np.zeros((len(src), GGMLType.Q4_0.row_bytes(1024)), np.uint8) for _ in range(2))
    with caplog.at_level(logging.WARNING, "ggufmoe"):
        run(first, src, made)
    quantizing.quantize_chunk(GGMLType.Q4_0, src, expected)
    assert made.tobytes() == expected.tobytes()
    assert "no kernel for extreme weights could be compiled: no memory" in caplog.text


def test_where_ggml_has_other_bytes_it_is_used_with_a_word_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = replace(usual(GGMLType.Q4_0, False), unbounded=None)
    src = probe(GGMLType.Q4_0, "F32")
    made = np.zeros((len(src), GGMLType.Q4_0.row_bytes(1024)), np.uint8)
    monkeypatch.setitem(HASHES, "Q4_0 from F32", HASHES["Q4_0 from F32"]._replace(ggml="other"))
    with pytest.raises(NonFiniteError, match=r"Q4_0: \d+ of 16 rows have weights so large"):
        run(first, src, made, ggml=False)
    with caplog.at_level(logging.WARNING, "ggufmoe"):
        run(first, src, made)
    assert "this machine's llama.cpp is used, whose bytes differ" in caplog.text


def test_weights_at_which_ggml_overflows_are_an_error_without_it() -> None:
    done = subprocess.run([sys.executable, "-c", TOO_LARGE], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("IQ1_M: 1 of 3 rows have weights so large that only llama.cpp") for line in lines)
