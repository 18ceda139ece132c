"""Every kernel's bytes are ggml's, on ordinary and on nasty rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ggufmoe.gguf.types import GGMLType
from ggufmoe.quant.filetypes import ABORTS_ON_HUGE_WEIGHTS, ABORTS_WITHOUT_IMATRIX
from ggufmoe.quant.kernels.trust import has_kernel
from tests.quant.kernels.corpora import (
    HUGE_KINDS,
    IMPORTANCES,
    N_COLS,
    Floats,
    compiled,
    differing,
    importances,
    kinds,
    rows,
)

FORMATS = [member for member in GGMLType if has_kernel(member)]
WITHOUT_IMPORTANCES = [member for member in FORMATS if member not in ABORTS_WITHOUT_IMATRIX]
GRID_FORMATS = [member for member in FORMATS if member in ABORTS_ON_HUGE_WEIGHTS]
few = settings(max_examples=12, deadline=None, derandomize=True)


def test_the_formats_that_have_kernels() -> None:
    k_quants = {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}
    others = {"IQ4_NL", "IQ4_XS", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "NVFP4"}
    grids = {"IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S", "IQ1_M"}
    assert {member.name for member in FORMATS} == k_quants | others | grids


@pytest.mark.parametrize("type", WITHOUT_IMPORTANCES)
def test_fixed_corpora(type: GGMLType) -> None:
    assert {kind: differing(type, rows(0, kind)) for kind in kinds(type)} == dict.fromkeys(kinds(type), 0)


@pytest.mark.parametrize("type", FORMATS)
def test_fixed_corpora_with_importances(type: GGMLType) -> None:
    pairs = [("normal", importance) for importance in IMPORTANCES] + [(kind, "random") for kind in kinds(type)]
    found = {pair: differing(type, rows(1, pair[0]), importances(2, pair[1])) for pair in pairs}
    assert found == dict.fromkeys(pairs, 0)


@pytest.mark.parametrize("type", FORMATS)
def test_many_ordinary_weights(type: GGMLType) -> None:
    random = np.random.default_rng(5)
    src = (random.normal(0, 0.02, (40, 1024)) * random.gamma(1, 1, (40, 1))).astype(np.float32)
    imatrix = random.gamma(0.3, 1, 1024).astype(np.float32)
    assert differing(type, src, imatrix) == 0
    if type in WITHOUT_IMPORTANCES:
        assert differing(type, src) == 0


@pytest.mark.parametrize("type", FORMATS)
@given(seed=st.integers(0, 2**32 - 1), n_rows=st.integers(1, 9), importance=st.sampled_from(sorted(IMPORTANCES)))
@few
def test_mixtures_of_kinds(type: GGMLType, seed: int, n_rows: int, importance: str) -> None:
    src = rows(seed, "mixed", n_rows, kinds(type))
    if type not in GRID_FORMATS or importance != "huge":  # their product overflows, and ggml aborts the process
        assert differing(type, src, importances(seed, importance)) == 0
    if type in WITHOUT_IMPORTANCES:
        assert differing(type, src) == 0


@pytest.mark.parametrize("type", FORMATS)
@given(src=arrays(np.float32, (1, N_COLS), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
@few
def test_arbitrary_floats(type: GGMLType, src: Floats) -> None:
    if type in GRID_FORMATS:
        src = np.clip(src, -1e9, 1e9)
    assert differing(type, src, np.ones(N_COLS, np.float32)) == 0
    if type in WITHOUT_IMPORTANCES:
        assert differing(type, src) == 0


@pytest.mark.parametrize(
    ("type", "weighted"),
    [(GGMLType.Q4_K, False), (GGMLType.IQ4_NL, False), (GGMLType.Q4_0, True), (GGMLType.IQ1_M, True)],
)
def test_narrow_sources_are_widened_exactly(type: GGMLType, weighted: bool) -> None:
    """Widening comes before all that formats do by themselves: long and short blocks, with and without row energies."""
    imatrix = importances(4, "random") if weighted else None
    for kind in ("normal", "heavy-tailed", "tiny", "zero"):
        src = rows(3, kind)
        assert differing(type, src.astype(np.float16), imatrix) == 0
        assert differing(type, (src.view(np.uint32) >> 16).astype(np.uint16), imatrix) == 0


def test_all_half_floats() -> None:
    bits = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    finite = bits[(bits & 0x7C00) != 0x7C00]
    assert differing(GGMLType.IQ4_NL, np.ascontiguousarray(finite.view(np.float16).reshape(-1, 1024))) == 0


@pytest.mark.parametrize("n_rows", [1, 3, 17])
def test_tiles_that_do_not_fill_the_lanes(n_rows: int) -> None:
    assert differing(GGMLType.IQ2_XXS, rows(n_rows, "normal", n_rows), importances(n_rows, "random")) == 0
    for n_cols in (256, 768):
        src = np.random.default_rng(n_rows).normal(0, 1, (n_rows, n_cols)).astype(np.float32)
        imatrix = np.random.default_rng(n_cols).random(n_cols, np.float32)
        for block_type in (GGMLType.Q4_K, GGMLType.IQ4_NL, GGMLType.IQ3_S):
            assert differing(block_type, src) == 0
            assert differing(block_type, src, imatrix) == 0


@pytest.mark.parametrize("type", GRID_FORMATS)
def test_a_kernel_leaves_to_ggml_where_it_aborts(type: GGMLType) -> None:
    """It neither hangs nor crashes there itself, and marks each block that ggml's arithmetic cannot serve."""
    kernel = compiled(type, weighted=True)
    made = np.zeros((4, type.row_bytes(N_COLS)), np.uint8)
    for value in (np.nan, np.inf, -np.inf, 1e30):
        src = rows(7, "normal")
        src[1, 300], src[2], src[3] = value, value, rows(8, "normal")[3]
        for importance in ("random", "skewed"):
            odd = kernel.call(src, made, importances(0, importance))
            assert odd is not None
            assert odd.tolist() == [[0, 0], [0, 1], [1, 1], [0, 0]]
    for kind in HUGE_KINDS:
        assert kernel.call(rows(0, kind), made, importances(0, "random")) is not None


@pytest.mark.parametrize("type", GRID_FORMATS)
def test_blocks_of_zeros_between_others(type: GGMLType) -> None:
    """In IQ3_S ggml writes what follows a block of zeros in its place; the kernel does so itself."""
    src = rows(9, "normal", 64)
    src.reshape(-1, 32)[np.random.default_rng(2).random(src.size // 32) < 0.4] = 0
    for imatrix in (importances(0, "random"), None) if type in WITHOUT_IMPORTANCES else (importances(0, "random"),):
        assert differing(type, src, imatrix) == 0
        kernel = compiled(type, weighted=imatrix is not None)
        assert kernel.call(src, np.zeros((64, type.row_bytes(N_COLS)), np.uint8), imatrix) is None


@pytest.mark.parametrize("type", [GGMLType.IQ3_S, GGMLType.IQ3_XXS, GGMLType.IQ2_S, GGMLType.IQ2_XS, GGMLType.IQ2_XXS])
def test_values_between_two_levels(type: GGMLType) -> None:
    """Where rounding hangs on the last bit, the lists of neighbours must not be abridged."""
    random = np.random.default_rng(6)
    top = 15 if type.name.startswith("IQ3") else 5
    steps = random.integers(0, top + 2, (64, N_COLS)) * random.choice([-1, 1], (64, N_COLS))
    src = steps.astype(np.float32)
    src[:, ::16] = top
    src *= random.choice([1, 3, 0.7, 1e-3], (64, 1)).astype(np.float32)
    nudged = np.nextafter(src, random.choice([-1, 1], src.shape).astype(np.float32) * 99)
    for values in (src, nudged):
        for imatrix in (np.ones(N_COLS, np.float32), importances(0, "random")):
            assert differing(type, values, imatrix) == 0


@pytest.mark.parametrize("type", [member for member in FORMATS if member not in GRID_FORMATS])
def test_nan_and_infinity_do_not_hang_or_crash(type: GGMLType) -> None:
    src = rows(7, "normal")
    src[0, ::5], src[1, ::7], src[2, :] = np.nan, np.inf, -np.inf
    assert differing(type, src[3:]) == 0
    for kind in ("random", "zeros"):
        differing(type, src, importances(0, kind))
