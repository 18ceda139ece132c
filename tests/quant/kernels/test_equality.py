"""Every kernel's bytes are ggml's, on ordinary and on nasty rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ggufmoe.gguf.types import GGMLType
from ggufmoe.quant.kernels.trust import has_kernel
from tests.quant.kernels.corpora import IMPORTANCES, KINDS, N_COLS, Floats, differing, importances, rows

FORMATS = [member for member in GGMLType if has_kernel(member)]
few = settings(max_examples=12, deadline=None, derandomize=True)


def test_the_formats_that_have_kernels() -> None:
    k_quants = {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}
    others = {"IQ4_NL", "IQ4_XS", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "NVFP4"}
    assert {member.name for member in FORMATS} == k_quants | others


@pytest.mark.parametrize("type", FORMATS)
def test_fixed_corpora(type: GGMLType) -> None:
    assert {kind: differing(type, rows(0, kind)) for kind in KINDS} == dict.fromkeys(KINDS, 0)


@pytest.mark.parametrize("type", FORMATS)
def test_fixed_corpora_with_importances(type: GGMLType) -> None:
    pairs = [("normal", importance) for importance in IMPORTANCES] + [(kind, "random") for kind in KINDS]
    found = {pair: differing(type, rows(1, pair[0]), importances(2, pair[1])) for pair in pairs}
    assert found == dict.fromkeys(pairs, 0)


@pytest.mark.parametrize("type", FORMATS)
def test_many_ordinary_weights(type: GGMLType) -> None:
    random = np.random.default_rng(5)
    src = (random.normal(0, 0.02, (40, 1024)) * random.gamma(1, 1, (40, 1))).astype(np.float32)
    imatrix = random.gamma(0.3, 1, 1024).astype(np.float32)
    assert differing(type, src, imatrix) == 0
    assert differing(type, src) == 0


@pytest.mark.parametrize("type", FORMATS)
@given(seed=st.integers(0, 2**32 - 1), n_rows=st.integers(1, 9), importance=st.sampled_from(sorted(IMPORTANCES)))
@few
def test_mixtures_of_kinds(type: GGMLType, seed: int, n_rows: int, importance: str) -> None:
    src = rows(seed, "mixed", n_rows)
    assert differing(type, src, importances(seed, importance)) == 0
    assert differing(type, src) == 0


@pytest.mark.parametrize("type", FORMATS)
@given(src=arrays(np.float32, (1, N_COLS), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
@few
def test_arbitrary_floats(type: GGMLType, src: Floats) -> None:
    assert differing(type, src, np.ones(N_COLS, np.float32)) == 0
    assert differing(type, src) == 0


@pytest.mark.parametrize("type", [GGMLType.Q4_K, GGMLType.IQ4_NL])
def test_narrow_sources_are_widened_exactly(type: GGMLType) -> None:
    for kind in ("normal", "heavy-tailed", "tiny", "zero"):
        src = rows(3, kind)
        assert differing(type, src.astype(np.float16)) == 0
        assert differing(type, (src.view(np.uint32) >> 16).astype(np.uint16)) == 0


def test_all_half_floats() -> None:
    bits = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    finite = bits[(bits & 0x7C00) != 0x7C00]
    assert differing(GGMLType.IQ4_NL, np.ascontiguousarray(finite.view(np.float16).reshape(-1, 1024))) == 0


@pytest.mark.parametrize("n_rows", [1, 3, 17])
def test_tiles_that_do_not_fill_the_lanes(n_rows: int) -> None:
    for n_cols in (256, 768):
        src = np.random.default_rng(n_rows).normal(0, 1, (n_rows, n_cols)).astype(np.float32)
        imatrix = np.random.default_rng(n_cols).random(n_cols, np.float32)
        for block_type in (GGMLType.Q4_K, GGMLType.IQ4_NL):
            assert differing(block_type, src) == 0
            assert differing(block_type, src, imatrix) == 0


@pytest.mark.parametrize("type", FORMATS)
def test_nan_and_infinity_do_not_hang_or_crash(type: GGMLType) -> None:
    src = rows(7, "normal")
    src[0, ::5], src[1, ::7], src[2, :] = np.nan, np.inf, -np.inf
    assert differing(type, src[3:]) == 0
    for kind in ("random", "zeros"):
        differing(type, src, importances(0, kind))
