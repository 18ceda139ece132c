"""Rows of a tensor, whatever its dtype, as float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.weights.dtypes import read_f32, read_single_rows, row_count
from ggufmoe.weights.source_tensor import Dtype
from tests import tiny
from tests.tiny import Tiny


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_tensors_read_as_float32(dtype: str, tmp_path: Path) -> None:
    raw = tiny.classic_weights(Tiny(dtype=dtype))["model.layers.1.self_attn.k_proj.weight"]
    expected = (raw.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else raw.astype(np.float32)
    with open_checkpoint(tiny.make_checkpoint(tmp_path, dtype=dtype)) as model:
        tensor = model.tensors["model.layers.1.self_attn.k_proj.weight"]
        np.testing.assert_array_equal(read_f32(tensor), expected)
        np.testing.assert_array_equal(read_f32(tensor, 3, 9), expected[3:9])
        assert read_f32(model.tensors["model.norm.weight"]).shape == (1, 256)


def test_single_rows_in_any_order_and_more_than_once(tmp_path: Path) -> None:
    with open_checkpoint(tiny.make_checkpoint(tmp_path)) as model:
        tensor = model.tensors["model.embed_tokens.weight"]
        rows = [7, 0, 7, 31, 2]
        np.testing.assert_array_equal(read_single_rows(tensor, rows), read_f32(tensor)[rows])
        assert read_single_rows(tensor, []).shape == (0, 256)


def test_rows() -> None:
    assert [row_count(shape) for shape in ((7,), (3, 7), (2, 3, 7))] == [1, 3, 6]
    assert [dtype.row_bytes(1) for dtype in (Dtype.BF16, Dtype.F16, Dtype.F32)] == [2, 2, 4]
