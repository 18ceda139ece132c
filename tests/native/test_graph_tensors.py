"""Tensors of graphs: the structures that ctypes is told about must be ggml's."""

from __future__ import annotations

import ctypes

import numpy as np

from ggufmoe.gguf.types import GGMLType
from ggufmoe.native import graph_tensors
from ggufmoe.native import library as native
from ggufmoe.native.graph_tensors import Operation


def test_the_tensor_of_ggml_is_declared_as_it_is() -> None:
    lib = native.library()
    object_header = 32  # GGML_OBJECT_SIZE, which ggml counts as overhead of a tensor
    assert lib.ggml_tensor_overhead() == object_header + ctypes.sizeof(graph_tensors.Tensor)
    assert {operation: lib.ggml_op_name(operation).decode() for operation in Operation} == {
        Operation.MUL_MAT: "MUL_MAT",
        Operation.MUL_MAT_ID: "MUL_MAT_ID",
    }


def test_a_tensor_is_read_as_ggml_reads_it() -> None:
    values = np.arange(6, dtype=np.float32)
    tensor = graph_tensors.Tensor(type=GGMLType.F32.id, data=values.ctypes.data, op=Operation.MUL_MAT, name=b"blk.0.x")
    tensor.ne[:], tensor.nb[:] = (3, 2, 1, 1), (4, 12, 24, 24)
    source = graph_tensors.Tensor()
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
