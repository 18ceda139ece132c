"""The native floor: what ctypes is told about ggml must be so."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from ggufmoe.gguf.types import GGMLType
from ggufmoe.native import graph_tensors, quantizing
from ggufmoe.native import library as native
from ggufmoe.native.graph_tensors import Operation
from ggufmoe.options import limits
from ggufmoe.quant.filetypes import WRITABLE_TYPES

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


def test_limits_are_those_of_the_engine() -> None:
    lib = native.library()
    assert lib.llama_max_devices() == limits.MAX_DEVICES
    assert lib.llama_max_parallel_sequences() == limits.MAX_SEQUENCES


def test_the_tensor_of_ggml_is_declared_as_it_is() -> None:
    lib = native.library()
    object_header = 32  # GGML_OBJECT_SIZE, which ggml counts as overhead of a tensor
    assert lib.ggml_tensor_overhead() == object_header + ctypes.sizeof(graph_tensors._Tensor)
    assert {operation: lib.ggml_op_name(operation).decode() for operation in Operation} == {
        Operation.MUL_MAT: "MUL_MAT",
        Operation.MUL_MAT_ID: "MUL_MAT_ID",
    }


def test_a_tensor_is_read_as_ggml_reads_it() -> None:
    values = np.arange(6, dtype=np.float32)
    tensor = graph_tensors._Tensor(type=GGMLType.F32.id, data=values.ctypes.data, op=Operation.MUL_MAT, name=b"blk.0.x")
    tensor.ne[:], tensor.nb[:] = (3, 2, 1, 1), (4, 12, 24, 24)
    source = graph_tensors._Tensor()
    tensor.src[0] = ctypes.addressof(source)
    address = ctypes.addressof(tensor)
    assert native.library().ggml_get_data(address) == values.ctypes.data
    assert native.library().ggml_nbytes(address) == values.nbytes
    assert graph_tensors.tensor_name(address) == b"blk.0.x"
    assert graph_tensors.tensor_shape(address) == (1, 1, 2, 3)
    assert graph_tensors.tensor_operation(address) == Operation.MUL_MAT
    assert graph_tensors.tensor_sources(address) == (ctypes.addressof(source),)
    assert graph_tensors.tensor_type_is(address, GGMLType.F32)
    assert not graph_tensors.tensor_type_is(address, GGMLType.F16)
