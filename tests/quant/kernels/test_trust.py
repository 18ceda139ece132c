"""Which routine is used when, what is reported, and that a wrong or missing kernel is never trusted."""

from __future__ import annotations

import hashlib
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ggufmoe.errors import OptionError
from ggufmoe.gguf.types import GGMLType
from ggufmoe.native import quantizing
from ggufmoe.quant import kernels
from ggufmoe.quant.filetypes import ABORTS_ON_HUGE_WEIGHTS
from ggufmoe.quant.kernels import kernel_report, prepare, q4_0, quantize_rows, trust
from ggufmoe.quant.kernels.lanes import Rows
from ggufmoe.quant.kernels.machine import Host, assembly, compile_kernel, host, link
from ggufmoe.quant.kernels.probe_hashes import GGML_ALONE, HASHES
from ggufmoe.quant.kernels.probe_tile import probe, probe_importances
from ggufmoe.quant.kernels.tiles import Geometry, Source, Tiles
from ggufmoe.quant.kernels.trust import Kernels, compile_format, has_kernel, run
from tests.quant.kernels.corpora import rows

NO_LLVMLITE = """
import sys
sys.modules["llvmlite"] = None
import logging, numpy as np
logging.basicConfig(level=logging.WARNING, stream=sys.stdout)
from ggufmoe.native import quantizing
from ggufmoe.errors import OptionError
from ggufmoe.gguf.types import GGMLType
from ggufmoe.quant.kernels import kernel_report, prepare, quantize_rows
src = np.random.default_rng(0).normal(0, 1, (4, 512)).astype(np.float32)
ours, theirs = (np.zeros((4, GGMLType.Q6_K.row_bytes(512)), np.uint8) for _ in range(2))
print(prepare(GGMLType.Q6_K).routine, prepare(GGMLType.Q6_K).reason)
quantize_rows(GGMLType.Q6_K, src, ours)
quantizing.quantize_chunk(GGMLType.Q6_K, src, theirs)
print((ours == theirs).all(), len(kernel_report()))
try:
    quantize_rows(GGMLType.Q6_K, src, ours, quantizer="fast")
except OptionError as error:
    print(error)
"""


NO_ENGINE = """
import sys
sys.modules["llama_cpp"] = None
import hashlib, numpy as np
from ggufmoe.errors import EngineMissingError
from ggufmoe.gguf.types import GGMLType
from ggufmoe.quant.kernels import quantize_rows
from ggufmoe.quant.kernels.probe_tile import probe
src = probe(GGMLType.Q6_K, "BF16")[:2]
for quantizer in ("fast", "auto"):
    dst = np.zeros((2, GGMLType.Q6_K.row_bytes(1024)), np.uint8)
    quantize_rows(GGMLType.Q6_K, src, dst, quantizer=quantizer)
    print(hashlib.sha256(dst.tobytes()).hexdigest())
try:
    quantize_rows(GGMLType.Q6_K, src, dst, quantizer="ggml")
except EngineMissingError:
    print("no engine")
"""


def row_of(type: GGMLType, quantizer: kernels.QuantizerName) -> bytes:
    src = rows(0, "normal")
    dst = np.zeros((len(src), type.row_bytes(src.shape[1])), np.uint8)
    quantize_rows(type, src, dst, quantizer=quantizer)
    return dst.tobytes()


def test_without_llvmlite_ggml_does_it_all() -> None:
    done = subprocess.run([sys.executable, "-c", NO_LLVMLITE], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("WARNING:ggufmoe:Q6_K from F32: ggml's own routine is used (no kernel could be compiled")
    assert lines[1].startswith("ggml no kernel could be compiled")
    assert lines[2] == "True 1"
    assert lines[3].startswith("Q6_K: the fast quantizer cannot be used: no kernel could be compiled")
    assert len(lines) == 4, "the fallback is logged once"


def test_kernels_are_judged_and_work_without_ggml() -> None:
    done = subprocess.run([sys.executable, "-c", NO_ENGINE], capture_output=True, text=True, check=True)
    src = probe(GGMLType.Q6_K, "BF16")[:2]
    expected = np.zeros((2, GGMLType.Q6_K.row_bytes(1024)), np.uint8)
    quantizing.quantize_chunk(GGMLType.Q6_K, trust.widened(src), expected)
    ours = hashlib.sha256(expected.tobytes()).hexdigest()
    assert done.stdout.splitlines() == [ours, ours, "no engine"]
    assert done.stderr == ""


def test_where_ggml_has_other_bytes_it_is_used_only_if_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """So it is on most ARM machines, whose compilers fuse ggml's multiplications and additions."""
    key = GGMLType.Q8_0, "float32", False
    name = "Q8_0 from F32"
    monkeypatch.setitem(HASHES, name, HASHES[name]._replace(ggml="other"))
    judges = Kernels()
    done: list[Any] = []
    with judges._lock:  # another thread compiles
        waiting = threading.Thread(target=lambda: done.append(judges.worthwhile(*key, cache=False)))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
    waiting.join()
    assert done[0] is not None
    monkeypatch.setitem(HASHES, name, HASHES[name]._replace(kernel="other"))
    judges = Kernels()
    assert judges.worthwhile(*key, cache=False) is None
    assert [report.routine for report in judges.report()] == ["ggml"]


def test_other_bytes_of_ggml_are_told_once_where_there_is_no_kernel(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels, "_KERNELS", Kernels())
    with caplog.at_level(logging.WARNING, "ggufmoe"):
        row_of(GGMLType.TQ2_0, "auto")
    assert caplog.text == ""
    monkeypatch.setattr(kernels, "_KERNELS", Kernels())
    monkeypatch.setitem(GGML_ALONE, "TQ2_0", "other")
    with caplog.at_level(logging.WARNING, "ggufmoe"):
        row_of(GGMLType.TQ2_0, "ggml")
        assert caplog.text == ""
        for _ in range(2):
            row_of(GGMLType.TQ2_0, "auto")
    assert [record.getMessage() for record in caplog.records] == [
        "TQ2_0: this machine's llama.cpp makes other bytes than on x86-64; there is no kernel"
    ]


def test_nothing_is_loaded_before_the_first_kernel() -> None:
    code = "import sys, ggufmoe.quant.kernels; print('llvmlite' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_kernel_with_wrong_bytes_is_not_trusted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Q4_0's kernel in the place of IQ4_NL's: blocks of the same size, other bytes
    monkeypatch.setitem(trust._MODULES, GGMLType.IQ4_NL, "q4_0")
    judges = Kernels()
    with caplog.at_level(logging.WARNING, "ggufmoe"):
        kernel, report = judges.judged(GGMLType.IQ4_NL, "float32", weighted=False)
        judges.judged(GGMLType.IQ4_NL, "float32", weighted=False)
    assert kernel is None
    assert report.routine == "ggml"
    assert "a test tile's bytes are not those of ggml on x86-64" in report.reason
    assert len(caplog.records) == 1


def test_reports_say_what_was_used() -> None:
    report = prepare(GGMLType.Q4_K, "uint16", weighted=True, quantizer="fast")
    assert report is not None
    assert (report.type, report.source, report.weighted, report.routine) == (GGMLType.Q4_K, "BF16", True, "fast")
    assert report.compile_s > 0
    assert report in kernel_report()
    assert prepare(GGMLType.Q4_K, quantizer="ggml") is None
    assert prepare(GGMLType.TQ1_0) is None


def test_choices_of_the_quantizer_give_the_same_bytes() -> None:
    for type_ in (GGMLType.Q5_K, GGMLType.TQ2_0):
        assert row_of(type_, "auto") == row_of(type_, "fast") == row_of(type_, "ggml")


def test_a_kernel_is_compiled_when_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    judges = Kernels()
    key = GGMLType.Q8_0, "float32", False
    assert judges.worthwhile(*key, cache=False) is None
    judges.spent(*key, trust.PATIENCE_S / 2)
    assert judges.worthwhile(*key, cache=False) is None
    judges.spent(*key, trust.PATIENCE_S)
    assert judges.worthwhile(*key, cache=False) is not None
    assert [report.routine for report in judges.report()] == ["fast"]
    monkeypatch.setattr(kernels, "_KERNELS", judges)
    assert row_of(GGMLType.Q8_0, "auto") == row_of(GGMLType.Q8_0, "ggml")


def test_threads_do_not_compile_twice_nor_wait() -> None:
    judges = Kernels()
    key = GGMLType.Q4_1, "float32", False
    assert judges.worthwhile(*key, cache=False) is None
    judges.spent(*key, trust.PATIENCE_S)
    with judges._lock:
        assert judges.worthwhile(*key) is None
    threads = [threading.Thread(target=judges.judged, args=key) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(judges.report()) == 1


def test_importances_are_nothing_to_q8_0() -> None:
    src = rows(0, "normal")
    dst, plain = (np.zeros((len(src), GGMLType.Q8_0.row_bytes(src.shape[1])), np.uint8) for _ in range(2))
    quantize_rows(GGMLType.Q8_0, src, dst, np.ones(src.shape[1], np.float32), "fast")
    quantize_rows(GGMLType.Q8_0, src, plain, None, "ggml")
    assert dst.tobytes() == plain.tobytes()


def test_plain_types_from_every_source() -> None:
    exact = np.array([[0.5, -2.0, 1.5, 0.0]], np.float32)
    sources: list[NDArray[Any]] = [exact, exact.astype(np.float16), (exact.view(np.uint32) >> 16).astype(np.uint16)]
    for type_, dtype in ((GGMLType.F32, np.float32), (GGMLType.F16, np.float16), (GGMLType.BF16, np.uint16)):
        expected = next(source for source in sources if source.dtype == dtype)
        for source in sources:
            dst = np.zeros((1, type_.row_bytes(4)), np.uint8)
            quantize_rows(type_, source, dst)
            assert dst.tobytes() == expected.tobytes()


@pytest.mark.parametrize("quantizer", ["fast", "ggml"])
def test_no_rows_write_nothing(quantizer: kernels.QuantizerName) -> None:
    memory = np.full((1, GGMLType.Q4_K.row_bytes(256)), 7, np.uint8)
    quantize_rows(GGMLType.Q4_K, np.zeros((0, 256), np.float32), memory[:0], quantizer=quantizer)
    assert (memory == 7).all()


def test_wrong_layouts_are_refused() -> None:
    src, dst = np.zeros((2, 256), np.float32), np.zeros((2, GGMLType.Q4_K.row_bytes(256)), np.uint8)
    wrong: dict[str, Callable[[], None]] = {
        "dst is": lambda: quantize_rows(GGMLType.Q4_K, src, dst[:1]),
        "imatrix is": lambda: quantize_rows(GGMLType.Q4_K, src, dst, np.zeros(4, np.float32)),
        "C-contiguous": lambda: quantize_rows(GGMLType.Q4_K, np.zeros((256, 2), np.float32).T, dst),
        "src is": lambda: quantize_rows(GGMLType.Q4_K, src.astype(np.float64), dst),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    "name",
    ["Q2_K", "Q3_K", "Q4_K", "IQ4_NL", "IQ4_XS", "Q5_1", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XXS", "IQ1_S", "IQ1_M"],
)
def test_eight_lanes_without_permutation_give_the_same_bytes(name: str) -> None:
    """The code of machines without AVX-512."""
    type_ = GGMLType[name]
    weights = probe(type_, "F32")
    importances = probe_importances()
    ours, theirs = (np.zeros((len(weights), type_.row_bytes(weights.shape[1])), np.uint8) for _ in range(2))
    quantizing.quantize_chunk(type_, weights, theirs, importances)
    for looks_up in (False, True) if type_ in ABORTS_ON_HUGE_WEIGHTS and host().looks_up else (False,):
        target = Host(host().cpu, host().features, 8, permutes=False, looks_up=looks_up)
        ours[:] = 0
        run(compile_format(type_, "F32", True, target), weights, ours, importances)
        assert np.array_equal(ours, theirs)


def test_a_kernel_can_be_listed() -> None:
    def doubled(k: Tiles, x: Rows, importance: Rows | None) -> None:
        k.store_words(0, [(x[i] + x[i]).bits() for i in range(32)])

    geometry = Geometry(32, 128, Source.F32, False)
    assert "quantize" in assembly(geometry, doubled)
    compiled = link(compile_kernel(geometry, doubled))
    src, dst = np.arange(96, dtype=np.float32), np.zeros(96, np.float32)
    addresses = src.ctypes.data, dst.ctypes.data
    scratch = np.empty(compiled.scratch_bytes + 64, np.uint8)
    aligned = -(-scratch.ctypes.data // 64) * 64
    assert compiled.call(*addresses, 3, 3, None, None, None, aligned) == 0
    assert np.array_equal(dst, 2 * src)


def test_nothing_is_fused_and_nothing_called() -> None:
    """A fused multiply-add rounds once where ggml rounds twice; a missing library function would end the process."""
    listing = assembly(Geometry(32, 18, Source.F16, True), q4_0.quantize)
    assert re.findall(r"^\s+(?:v?fn?m(?:add|sub|la|ls)\S*|call\S*|bl)\s.*", listing, re.MULTILINE) == []
    assert "div" in listing


def test_half_bits_of_nan_are_those_of_x86_64_whatever_its_sign() -> None:
    """What 0/0 gives differs between processors in the sign, and IQ4_NL stores such a scale."""

    def halves(k: Tiles, x: Rows, importance: Rows | None) -> None:
        k.store_words(0, [k.half_bits(x[i]) for i in range(32)])

    compiled = link(compile_kernel(Geometry(32, 128, Source.F32, False), halves))
    src = np.resize(np.array([np.nan, -np.nan, np.inf, -np.inf, 1.0, -0.0, 65504.0, 65520.0], np.float32), 32)
    made, scratch = np.zeros(32, np.uint32), np.empty(compiled.scratch_bytes + 64, np.uint8)
    aligned = -(-scratch.ctypes.data // 64) * 64
    compiled.call(src.ctypes.data, made.ctypes.data, 1, 1, None, None, None, aligned)
    assert made[:8].tolist() == [0xFE00, 0xFE00, 0x7C00, 0xFC00, 0x3C00, 0x8000, 0x7BFF, 0x7C00]


def test_formats_without_a_kernel_are_known() -> None:
    assert not has_kernel(GGMLType.TQ1_0)
    with pytest.raises(OptionError, match="quantizer is slow, expected auto, fast or ggml"):
        quantize_rows(GGMLType.Q4_K, rows(0, "zero"), np.zeros((4, 288), np.uint8), quantizer="slow")  # type: ignore[arg-type]
