"""Which blocks are finite, against ``ggml_validate_row_data``."""

from __future__ import annotations

import numpy as np
import pytest

from ggufmoe.gguf.block_scales import finite_rows
from ggufmoe.gguf.types import GGMLType
from ggufmoe.native import quantizing


@pytest.mark.parametrize("kind", GGMLType)
def test_each_row_is_judged_as_ggml_judges_it(kind: GGMLType, capfd: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(kind.id)
    n_bytes = 2 * max(kind.block_bytes, 8 // kind.block_size)
    rows = rng.integers(0, 256, (600, n_bytes), dtype=np.uint8)
    rows[100:] &= 0x3B  # no exponent has all bits
    for row, at in zip(rows[200:], np.resize(np.arange(n_bytes), 400), strict=True):  # each byte in turn, and its next
        row[at] |= 0xFC
        row[(at + 1) % n_bytes] |= rng.integers(0, 256, dtype=np.uint8)
        row[at - 1] |= 0xF0
    expected = [quantizing.validate_rows(kind, row) for row in rows]
    capfd.readouterr()  # ggml writes about each of them
    assert finite_rows(kind, rows).tolist() == expected
    assert any(expected) or kind is GGMLType.Q8_1
    always_finite = (kind.name.startswith("I") and kind.name[1:].isdigit()) or kind is GGMLType.NVFP4
    assert not all(expected) or always_finite
