"""Conversions between float32, float16 and bfloat16, bit by bit and beside ggml."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ggufmoe.gguf.floats import convert_floats
from ggufmoe.native import quantizing
from ggufmoe.quant.kernels.conversions import edges

EVERY_16_BITS = np.arange(2**16, dtype=np.uint32).astype(np.uint16)


def test_every_bfloat16_is_widened_exactly_and_comes_back() -> None:
    out = np.empty(2**16, np.float32)
    convert_floats(EVERY_16_BITS, out)
    np.testing.assert_array_equal(out.view(np.uint32), EVERY_16_BITS.astype(np.uint32) << 16)
    back = np.empty(2**16, np.uint16)
    convert_floats(out, back)
    numbers = ~np.isnan(out)
    np.testing.assert_array_equal(back[numbers], EVERY_16_BITS[numbers])


def test_every_float16_is_widened_exactly_and_comes_back() -> None:
    raw = EVERY_16_BITS.view(np.float16)
    numbers = ~np.isnan(raw)
    out = np.empty(2**16, np.float32)
    convert_floats(raw, out)
    np.testing.assert_array_equal(out[numbers], raw[numbers].astype(np.float32))
    back = np.empty(2**16, np.float16)
    convert_floats(out, back)
    np.testing.assert_array_equal(back.view(np.uint16)[numbers], EVERY_16_BITS[numbers])


def test_float32_passes_through() -> None:
    raw = np.array([1.5, -0.0, 1e-40], np.float32)
    out = np.empty(3, np.float32)
    convert_floats(raw, out)
    assert out.tobytes() == raw.tobytes()
    convert_floats(out, raw)
    assert out.tobytes() == raw.tobytes()


def test_rounding_is_to_nearest_even() -> None:
    values = np.array([0x3F808000, 0x3F818000, 0x3F808001], np.uint32).view(np.float32)
    out = np.empty(3, np.uint16)
    convert_floats(values, out)
    assert out.tolist() == [0x3F80, 0x3F82, 0x3F81]


def test_both_ways_between_the_types_of_16_bits() -> None:
    half, bits, back = np.array([1.5, 65504.0], np.float16), np.empty(2, np.uint16), np.empty(2, np.float16)
    convert_floats(half, bits)
    assert bits.tolist() == [0x3FC0, 0x4780]  # 65536, the nearest
    convert_floats(bits, back)
    assert back.tolist() == [1.5, np.inf]


GGML: dict[str, tuple[Callable[[Any, Any], None], str, Any]] = {
    "F16 to F32": (quantizing.f16_to_f32, "F16", np.float32),
    "BF16 to F32": (quantizing.bf16_to_f32, "BF16", np.float32),
    "F32 to F16": (quantizing.f32_to_f16, "F32", np.float16),
    "F32 to BF16": (quantizing.f32_to_bf16, "F32", np.uint16),
}


@pytest.mark.parametrize("conversion", GGML)
def test_the_results_are_those_of_ggml(conversion: str) -> None:
    """Also for NaN, whose payload ggml drops in float16, infinity, denormals, and ties."""
    by_ggml, source, dtype = GGML[conversion]
    src = edges(source)
    ours, theirs = np.empty(src.size, dtype), np.empty(src.size, dtype)
    by_ggml(src, theirs)
    convert_floats(src, ours)
    assert ours.tobytes() == theirs.tobytes()


DTYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
HASHES = {
    ("F32", "F16"): "aa8b9656e20f1f7f",
    ("F32", "BF16"): "6cffbf509d4f591f",
    ("F16", "F32"): "b636c5716ff84d97",
    ("F16", "BF16"): "53d288d4d44d4051",
    ("BF16", "F32"): "9207d7eb28680a09",
    ("BF16", "F16"): "dae5a613a981e5c8",
}
"""Of the results for all edges, made on x86-64."""


@pytest.mark.parametrize(("source", "target"), HASHES)
def test_the_results_are_the_same_on_every_machine(source: str, target: str) -> None:
    src = edges(source)
    made = np.empty(src.size, DTYPES[target])
    convert_floats(src, made)
    assert hashlib.sha256(made.tobytes()).hexdigest()[:16] == HASHES[source, target]


def test_wrong_arrays_are_refused() -> None:
    wrong: list[tuple[NDArray[Any], NDArray[Any], str]] = [
        (np.zeros(2, np.float64), np.zeros(2, np.float32), "src is float64"),
        (np.zeros(4, np.float32)[::2], np.zeros(2, np.float16), "src is float32 with strides"),
        (np.zeros(2, np.float32), np.zeros(2, np.int16), "dst is int16"),
        (np.zeros(2, np.float32), np.zeros(3, np.uint16), "dst has 3 numbers, expected 2"),
    ]
    for src, dst, message in wrong:
        with pytest.raises(ValueError, match=message):
            convert_floats(src, dst)
