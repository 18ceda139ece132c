"""Compiled conversions between float types give the results of ``gguf.floats``, and are not trusted otherwise."""

from __future__ import annotations

import logging
import sys
from typing import Any

import numpy as np
import pytest

from ggufmoe.gguf.floats import convert_floats
from ggufmoe.gguf.types import GGMLType
from ggufmoe.quant.kernels import QUANTIZERS, conversions, quantize_rows
from ggufmoe.quant.kernels.conversions import FEW, STEP, Conversions, compile_conversion, edges, run

DTYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
PAIRS = [(source, target) for source in DTYPES for target in DTYPES if source != target]


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_compiled_conversions_are_those_of_numpy(source: str, target: str) -> None:
    random = np.random.default_rng(3)
    bits = random.integers(0, 2**32, 20_011, np.uint32)
    patterns = bits.view(np.float32) if source == "F32" else bits.astype(np.uint16).view(DTYPES[source])
    native = compile_conversion(source, target)
    for src in (edges(source), patterns, patterns[:STEP], patterns[: STEP - 1], patterns[:0]):
        ours, expected = (np.full(src.size + 1, 7, DTYPES[target]) for _ in range(2))
        run(native, src, ours[:-1])
        convert_floats(src, expected[:-1])
        assert ours.tobytes() == expected.tobytes()


def test_only_many_numbers_are_worth_compiling() -> None:
    known = Conversions()
    for size, n_compiled in ((FEW - 1, 0), (FEW, 1), (FEW + 5, 1)):
        src = np.linspace(-2, 2, size, dtype=np.float32)
        made = np.empty(size, np.float16)
        known.convert(src, made, cache=False)
        assert np.array_equal(made, src.astype(np.float16))
        assert len(known._known) == n_compiled


def test_wrong_code_is_not_trusted(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    other = compile_conversion("F32", "BF16")
    monkeypatch.setattr(conversions, "compile_conversion", lambda *_: other)
    with caplog.at_level(logging.WARNING, "ggufmoe"):
        assert Conversions().native("float32", "float16", cache=False) is None
    assert "F32 to F16: numpy converts, because compiled code rounds otherwise" in caplog.text


def test_without_a_compiler_numpy_converts(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "ggufmoe.quant.kernels.machine", None)
    src, made = np.linspace(-2, 2, FEW, dtype=np.float32), np.empty(FEW, np.float16)
    with caplog.at_level(logging.INFO, "ggufmoe"):
        Conversions().convert(src, made)
    assert np.array_equal(made, src.astype(np.float16))
    assert "F32 to F16: numpy converts (" in caplog.text


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_every_quantizer_gives_the_same_numbers(source: str, target: str) -> None:
    src, made = edges(source).reshape(1, -1), {}
    for quantizer in QUANTIZERS:
        dst = np.zeros((1, GGMLType[target].row_bytes(src.size)), np.uint8)
        quantize_rows(GGMLType[target], src, dst, quantizer=quantizer)
        made[quantizer] = dst.tobytes()
    assert made["auto"] == made["fast"] == made["ggml"]
