"""Widening to float32 and rounding back, bit by bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.weights.dtypes import narrow, read_f32, row_count, widen
from ggufmoe.weights.source_tensor import Dtype
from tests import tiny
from tests.tiny import Tiny

EVERY_16_BITS = np.arange(2**16, dtype=np.uint32).astype(np.uint16)


def test_every_bfloat16_is_widened_exactly_and_comes_back() -> None:
    out = np.empty(2**16, np.float32)
    widen(EVERY_16_BITS, Dtype.BF16, out)
    np.testing.assert_array_equal(out.view(np.uint32), EVERY_16_BITS.astype(np.uint32) << 16)
    back = np.empty(2**16, np.uint16)
    narrow(out, Dtype.BF16, back)
    numbers = ~np.isnan(out)
    np.testing.assert_array_equal(back[numbers], EVERY_16_BITS[numbers])


def test_every_float16_is_widened_exactly_and_comes_back() -> None:
    raw = EVERY_16_BITS.view(np.float16)
    numbers = ~np.isnan(raw)
    out = np.empty(2**16, np.float32)
    widen(raw, Dtype.F16, out)
    np.testing.assert_array_equal(out[numbers], raw[numbers].astype(np.float32))
    back = np.empty(2**16, np.float16)
    narrow(out, Dtype.F16, back)
    np.testing.assert_array_equal(back.view(np.uint16)[numbers], EVERY_16_BITS[numbers])


def test_float32_passes_through() -> None:
    raw = np.array([1.5, -0.0, 1e-40], np.float32)
    out = np.empty(3, np.float32)
    widen(raw, Dtype.F32, out)
    assert out.tobytes() == raw.tobytes()
    narrow(out, Dtype.F32, raw)
    assert out.tobytes() == raw.tobytes()


def test_rounding_is_to_nearest_even() -> None:
    values = np.array([0x3F808000, 0x3F818000, 0x3F808001], np.uint32).view(np.float32)
    out = np.empty(3, np.uint16)
    narrow(values, Dtype.BF16, out)
    assert out.tolist() == [0x3F80, 0x3F82, 0x3F81]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_tensors_read_as_float32(dtype: str, tmp_path: Path) -> None:
    raw = tiny.classic_weights(Tiny(dtype=dtype))["model.layers.1.self_attn.k_proj.weight"]
    expected = (raw.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else raw.astype(np.float32)
    with open_checkpoint(tiny.make_checkpoint(tmp_path, dtype=dtype)) as model:
        tensor = model.tensors["model.layers.1.self_attn.k_proj.weight"]
        np.testing.assert_array_equal(read_f32(tensor), expected)
        np.testing.assert_array_equal(read_f32(tensor, 3, 9), expected[3:9])
        assert read_f32(model.tensors["model.norm.weight"]).shape == (1, 256)


def test_rows() -> None:
    assert [row_count(shape) for shape in ((7,), (3, 7), (2, 3, 7))] == [1, 3, 6]
    assert [dtype.n_bytes for dtype in (Dtype.BF16, Dtype.F16, Dtype.F32)] == [2, 2, 4]
