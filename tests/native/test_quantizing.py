"""ggml's own quantizers and conversions, as ctypes is told about them."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import quants

from ggufmoe.gguf.block_scales import finite_rows
from ggufmoe.gguf.types import GGMLType
from ggufmoe.native import quantizing
from ggufmoe.native.library import library
from ggufmoe.quant.filetypes import WRITABLE_TYPES

GGUF_NAMES = {kind.name for kind in quants._type_traits}
SLOW = ("IQ1", "IQ2", "IQ3")
"""ggml makes tables of seconds for these before it quantizes a single row."""
KINDS = [kind for kind in GGMLType if kind.is_quantized and kind in WRITABLE_TYPES and not kind.name.startswith(SLOW)]


@pytest.mark.parametrize("kind", KINDS)
def test_dequantized_blocks_are_near_what_was_quantized(kind: GGMLType) -> None:
    rows = np.random.default_rng(0).normal(0, 0.02, (4, 256)).astype(np.float32)
    blocks = np.empty((4, kind.row_bytes(256)), np.uint8)
    quantizing.quantize_chunk(kind, rows, blocks, np.ones(256, np.float32))
    out = np.empty_like(rows)
    quantizing.dequantize_rows(kind, blocks, out)
    assert np.corrcoef(rows.ravel(), out.ravel())[0, 1] > 0.65


def test_what_ggml_cannot_dequantize_is_told() -> None:
    assert quantizing.can_dequantize(GGMLType.Q4_K)
    assert not quantizing.can_dequantize(GGMLType.Q8_1)
    assert not quantizing.can_dequantize(GGMLType.F16)
    with pytest.raises(ValueError, match="cannot dequantize Q8_1"):
        quantizing.dequantize_rows(GGMLType.Q8_1, np.zeros((1, 36), np.uint8), np.empty((1, 32), np.float32))
    with pytest.raises(ValueError, match=r"src has shape \(1, 18\), expected \(2, 18\)"):
        quantizing.dequantize_rows(GGMLType.Q4_0, np.zeros((1, 18), np.uint8), np.empty((2, 32), np.float32))


@pytest.mark.parametrize("kind", [GGMLType.F32, GGMLType.F16, GGMLType.BF16, GGMLType.F64, GGMLType.I32, GGMLType.Q8_0])
def test_stored_rows_are_widened(kind: GGMLType) -> None:
    values = np.arange(-32, 32, dtype=np.float32).reshape(2, 32)
    bits = {GGMLType.F16: np.float16, GGMLType.F64: np.float64, GGMLType.I32: np.int32}
    raw = np.ascontiguousarray(values.astype(bits.get(kind, np.float32))).view(np.uint8)
    if kind is GGMLType.BF16:
        raw = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    elif kind is GGMLType.Q8_0:
        raw = np.empty((2, kind.row_bytes(32)), np.uint8)
        quantizing.quantize_chunk(kind, values, raw)
    assert quantizing.can_widen(kind)
    assert quantizing.widened(kind, raw, 32) == pytest.approx(values, abs=0.13 if kind is GGMLType.Q8_0 else 0)


def test_what_is_too_large_becomes_infinite_and_other_types_are_refused() -> None:
    assert np.isinf(quantizing.widened(GGMLType.F64, np.array([[1e300]]).view(np.uint8), 1))
    assert not quantizing.can_widen(GGMLType.Q8_1)
    with pytest.raises(ValueError, match="cannot dequantize Q8_1"):
        quantizing.widened(GGMLType.Q8_1, np.zeros((1, 36), np.uint8), 32)


@pytest.mark.parametrize("kind", [kind for kind in GGMLType if kind.is_quantized])
def test_what_gguf_dequantizes_without_an_engine_are_ggml_s_floats(
    kind: GGMLType, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not quantizing.can_dequantize(kind):
        assert quantizing._TypeTraits.from_address(library().ggml_get_type_traits(kind.id)).to_float is None
        return
    rng = np.random.default_rng(kind.id)
    blocks = rng.integers(0, 256, (300, 2 * kind.block_bytes), dtype=np.uint8)
    blocks = blocks[finite_rows(kind, blocks)]
    theirs, ours = (np.empty((len(blocks), 2 * kind.block_size), np.float32) for _ in range(2))
    quantizing.dequantize_rows(kind, blocks, theirs)
    monkeypatch.setattr(quantizing, "has_engine", lambda: False)
    if kind in quantizing.READ_BY_GGML_ALONE:
        assert GGUF_NAMES.isdisjoint({kind.name})
        return
    quantizing.dequantize_rows(kind, blocks, ours)
    assert len(blocks) > 200
    assert ours.tobytes() == theirs.tobytes()
