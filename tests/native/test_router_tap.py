"""The native callback by itself: what it asks llama.cpp for, and what it copies."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from ggufmoe.errors import EngineError
from ggufmoe.gguf.types import GGMLType
from ggufmoe.native.graph_tensors import Operation, Tensor
from ggufmoe.native.library import library
from ggufmoe.native.router_tap import RouterTap

CALLBACK = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
ALIGNMENT = 32
"""Of the buffers that ggml takes."""
Rows = tuple[NDArray[np.int32], NDArray[np.float32]]
NODES = ("ffn_moe_topk", "ffn_moe_weights", "ffn_moe_weights_sum", "ffn_moe_weights_norm", "ffn_moe_weighted")


class Node:
    """A node of a graph; ``values`` are in a buffer of ggml, as llama.cpp's are."""

    def __init__(self, name: str, values: NDArray[np.generic] | None = None, op: int = 0) -> None:
        self.tensor = Tensor(op=op, name=name.encode())
        if values is not None:
            memory = np.empty(values.nbytes + ALIGNMENT, np.uint8)
            self.memory = memory[-memory.ctypes.data % ALIGNMENT :][: values.nbytes]
            self.memory[:] = values.view(np.uint8).ravel()
            self.buffer = library().ggml_backend_cpu_buffer_from_ptr(self.memory.ctypes.data, values.nbytes)
            self.tensor.type = (GGMLType.I32 if values.dtype == np.int32 else GGMLType.F32).id
            self.tensor.buffer, self.tensor.data = self.buffer, self.memory.ctypes.data
            rows, columns = values.shape
            self.tensor.ne[:] = (columns, rows, 1, 1)
            self.tensor.nb[:] = (4, values.strides[0], values.nbytes, values.nbytes)


@pytest.fixture
def tap() -> RouterTap:
    pointer = ctypes.c_void_p
    library().ggml_backend_cpu_buffer_from_ptr.restype = pointer
    library().ggml_backend_cpu_buffer_from_ptr.argtypes = (pointer, ctypes.c_size_t)
    return RouterTap(CALLBACK, n_layer=2, n_used=2)


def ask(tap: RouterTap, node: Node, *, computed: bool = False) -> bool:
    return bool(tap.callback(ctypes.addressof(node.tensor), not computed, tap.user_data))


def layer(number: int, n_rows: int, seed: int) -> tuple[list[Node], NDArray[np.int32], NDArray[np.float32]]:
    """The nodes of a router with four experts, two of them chosen as the first columns of their order."""
    random = np.random.default_rng(seed)
    order = np.argsort(random.random((n_rows, 4)), axis=1).astype(np.int32)
    weights = random.random((n_rows, 2)).astype(np.float32)
    topk = Node(f"ffn_moe_topk-{number}", order)
    topk.tensor.ne[0] = 2
    others = [Node(f"{name}-{number}", weights if name.endswith("norm") else None) for name in NODES[1:]]
    return [Node(f"ffn_moe_probs-{number}"), topk, *others], order[:, :2], weights


def compute(tap: RouterTap, number: int, n_rows: int, seed: int = 0) -> Rows:
    """Show a layer as llama.cpp does: ask for every node, and show the first product with chosen experts computed."""
    nodes, chosen, weights = layer(number, n_rows, seed)
    assert not any(ask(tap, node) for node in nodes)
    product = Node(f"ffn_moe_up-{number}", op=Operation.MUL_MAT_ID)
    if ask(tap, product):
        assert ask(tap, product, computed=True)
    assert not ask(tap, Node(f"ffn_moe_down-{number}", op=Operation.MUL_MAT_ID))
    return chosen, weights


def test_without_a_listener_nothing_is_asked_for(tap: RouterTap) -> None:
    tap.begin([3], 8)
    compute(tap, 0, 3)
    product = Node("ffn_moe_up-0", op=Operation.MUL_MAT_ID)
    assert not ask(tap, product)
    assert ask(tap, product, computed=True), "llama.cpp is to go on"


def check(tap: RouterTap, row: int, layers: Sequence[tuple[Rows, int]]) -> None:
    """The routing of the token at ``row`` is, for each layer, that in a row of what was computed."""
    found = tap.routing(row)
    assert found.layers == tuple(range(len(layers)))
    np.testing.assert_array_equal(found.chosen, [chosen[at] for (chosen, _), at in layers])
    np.testing.assert_array_equal(found.weights, [weights[at] for (_, weights), at in layers])


def test_rows_of_every_layer_and_part_of_a_batch(tap: RouterTap) -> None:
    tap.is_wanted = True
    tap.begin([2, 2, 1], 3, np.array([0, 1, 0, 1, 1], np.int8))
    # the last layer has rows of the tokens with logits only, which are those at places 1, 3 and 4
    first = [compute(tap, number, n_rows, seed) for number, n_rows, seed in ((0, 3, 1), (1, 1, 2))]
    second = [compute(tap, number, n_rows, seed) for number, n_rows, seed in ((0, 2, 3), (1, 2, 4))]
    check(tap, 1, [(first[0], 1), (first[1], 0)])
    check(tap, 3, [(second[0], 0), (second[1], 0)])
    check(tap, -1, [(second[0], 1), (second[1], 1)])


def test_a_batch_in_parts_with_as_many_tokens_of_every_text(tap: RouterTap) -> None:
    """As llama.cpp divides it for models with a state: two of both texts, then the rest of the second one."""
    tap.is_wanted = True
    tap.begin([2, 5], 8, np.array([0, 1, 0, 0, 0, 0, 1], np.int8))
    first = [compute(tap, number, n_rows, seed) for number, n_rows, seed in ((0, 4, 1), (1, 1, 2))]
    second = [compute(tap, number, n_rows, seed) for number, n_rows, seed in ((0, 3, 3), (1, 1, 4))]
    check(tap, 1, [(first[0], 1), (first[1], 0)])
    check(tap, 6, [(second[0], 2), (second[1], 0)])


def test_what_is_not_as_expected_is_an_error(tap: RouterTap) -> None:
    tap.is_wanted = True
    tap.begin([4], 8)
    compute(tap, 0, 3)
    with pytest.raises(EngineError, match="does not route every token in every layer"):
        tap.routing(3)
    tap.begin([1], 8)
    with pytest.raises(EngineError, match="does not name its choices"):
        tap.routing(-1)
    for number in range(50):  # more layers than there is room for
        compute(tap, number, 1)
    with pytest.raises(EngineError, match="does not name its choices"):
        tap.routing(-1)
    compute(tap, 0, 0)
