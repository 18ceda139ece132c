"""A callback for llama.cpp's graphs that copies what routers chose, in native code and on demand.

llama.cpp asks a context's callback for every node of a graph, and a Python function that is asked takes longer than the
nodes of a small model. This one is compiled by LLVM: without a listener it reads one number and returns. With one, it
remembers the choice (``ffn_moe_topk-N``) and the weights (``ffn_moe_weights...-N``) of each layer as they are asked
for, has llama.cpp stop once in the layer, behind the first product with the chosen experts, and copies both.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufmoe.errors import EngineError
from ggufmoe.native import graph_tensors
from ggufmoe.native import library as native
from ggufmoe.native.graph_tensors import Operation
from ggufmoe.native.wording import ROUTING_PREFIX, routing_node

_NAME_BYTES = 64
_HEAD_BYTES = 16 + _NAME_BYTES
"""Of each record: experts chosen for a token, tokens, and the name of the node with the choice."""


class _State(ctypes.Structure):
    """What the native code reads and writes."""

    _fields_ = (
        ("is_on", ctypes.c_int32),
        ("n_lost", ctypes.c_int32),
        ("used", ctypes.c_int64),
        ("capacity", ctypes.c_int64),
        ("records", ctypes.c_void_p),
        ("topk", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("get", ctypes.c_void_p),
        ("get_2d", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class TokenRouting:
    """Which experts one token was sent to: ``layers`` (n_layer,), ``chosen`` and ``weights`` (n_layer, n_expert_used).

    ``weights`` are what the outputs of the experts were multiplied by.
    """

    layers: tuple[int, ...]
    chosen: NDArray[np.int32]
    weights: NDArray[np.float32]


_Rows = tuple[NDArray[np.int32], NDArray[np.float32]]
_Places = list[NDArray[np.intp]]
"""The tokens of a batch in each part that llama.cpp computes at once, by their places in the batch."""


class RouterTap:
    """The callback of one context, and what it has copied of the last batch.

    Give llama.cpp ``callback`` (of the type ``callback_type``) and ``user_data``, and keep this as long as the context.
    ``n_layer`` is the number of layers of the model, ``n_used`` that of the experts chosen for a token. Raises
    ImportError without llvmlite.
    """

    def __init__(self, callback_type: Any, *, n_layer: int, n_used: int) -> None:
        self.callback = callback_type(_compiled()[0])
        self.is_wanted = False
        """Whether the next batches are to be copied."""
        library = native.library()
        self._state = _State(
            get=native.function_address(library.ggml_backend_tensor_get),
            get_2d=native.function_address(library.ggml_backend_tensor_get_2d),
        )
        self.user_data = ctypes.addressof(self._state)
        self._n_layer = n_layer
        self._n_used = n_used
        self._buffer = np.empty(0, np.uint8)
        self._sizes: Sequence[int] = ()
        self._n_ubatch = 1
        self._wanted: NDArray[np.int8] = np.empty(0, np.int8)
        self._found: dict[int, tuple[NDArray[np.intp], _Rows]] | None = None

    def begin(self, sizes: Sequence[int], n_ubatch: int, wanted: NDArray[np.int8] | None = None) -> None:
        """Call before each batch, with the tokens of each text in it; ``wanted`` tells which of all are to have logits.

        By default that is the last one. llama.cpp computes at most ``n_ubatch`` tokens at once. The copies take 8 bytes
        for each token, layer and chosen expert, and 80 for each layer and part that is computed at once.
        """
        state = self._state
        state.is_on = self.is_wanted
        if not self.is_wanted:
            return
        n_tokens = sum(sizes)
        n_parts = self._n_layer * (-(-n_tokens // n_ubatch) + len(sizes))
        n_bytes = n_parts * _HEAD_BYTES + 8 * self._n_layer * n_tokens * self._n_used
        if n_bytes > len(self._buffer):
            self._buffer = np.empty(n_bytes, np.uint8)
        state.records, state.capacity = self._buffer.ctypes.data, len(self._buffer)
        state.used = state.n_lost = 0
        state.topk = state.weights = None
        self._sizes, self._n_ubatch, self._found = sizes, n_ubatch, None
        self._wanted = np.eye(1, n_tokens, n_tokens - 1, np.int8)[0] if wanted is None else wanted

    def routing(self, row: int) -> TokenRouting:
        """The routing of the token at place ``row`` of the last batch, which has logits; -1: its last token.

        Raises EngineError if the graph does not choose experts for every token in the way that is known here.
        """
        if self._found is None:
            self._found = self._placed(self._read())
        row = row % len(self._wanted)
        found = [(layer, np.flatnonzero(places == row)[0], rows) for layer, (places, rows) in self._found.items()]
        chosen, weights = (np.stack([rows[kind][at] for _, at, rows in found]) for kind in (0, 1))
        return TokenRouting(tuple(layer for layer, _, _ in found), chosen, weights)

    def _placed(self, parts: dict[int, list[_Rows]]) -> dict[int, tuple[NDArray[np.intp], _Rows]]:
        """All rows of each layer, and the places of their tokens in the batch.

        How llama.cpp has divided the batch is told by the number of rows in each part; the last layer of most graphs
        has rows of the tokens with logits only.
        """
        for division in (_in_order(self._sizes, self._n_ubatch), _in_equal_parts(self._sizes, self._n_ubatch)):
            with_logits = [places[self._wanted[places] != 0] for places in division]
            found = {}
            for layer, rows in sorted(parts.items()):
                counts = [len(chosen) for chosen, _ in rows]
                for places in (division, with_logits):
                    if counts == [len(part) for part in places if len(part)]:
                        whole = np.concatenate([c for c, _ in rows]), np.concatenate([w for _, w in rows])
                        found[layer] = np.concatenate(places), whole
            if len(found) == len(parts):
                return found
        raise EngineError("this architecture does not route every token in every layer")

    def _read(self) -> dict[int, list[_Rows]]:
        """The rows that were copied, by layer and part of the batch."""
        parts: dict[int, list[_Rows]] = {}
        at = 0
        while at < self._state.used:
            n_used, n_rows = (int(number) for number in self._buffer[at : at + 16].view(np.int64))
            node = routing_node(self._buffer[at + 16 : at + _HEAD_BYTES].tobytes().split(b"\0")[0])
            assert node is not None, "only the node with the choice is recorded"
            at += _HEAD_BYTES
            values = self._buffer[at : at + 8 * n_rows * n_used].reshape(2, n_rows, 4 * n_used)
            parts.setdefault(node[1], []).append((values[0].view(np.int32), values[1].view(np.float32)))
            at += values.nbytes
        if self._state.n_lost or not parts:
            raise EngineError("llama.cpp's graph of this architecture does not name its choices of experts as expected")
        return parts


def _in_order(sizes: Sequence[int], n_ubatch: int) -> _Places:
    """A batch divided as ``split_simple`` of llama.cpp's llama-batch.cpp does it."""
    n_tokens = sum(sizes)
    return [np.arange(begin, min(begin + n_ubatch, n_tokens)) for begin in range(0, n_tokens, n_ubatch)]


def _in_equal_parts(sizes: Sequence[int], n_ubatch: int) -> _Places:
    """A batch divided as ``split_equal`` of llama.cpp's llama-batch.cpp does it for models with a recurrent state.

    Each part has equally many tokens of every text that has tokens left.
    """
    ends = np.cumsum(sizes)
    begins = ends - sizes
    found: _Places = []
    while (left := np.flatnonzero(begins < ends)).size:
        n_each = min(int((ends - begins)[left].min()), max(1, n_ubatch // left.size))
        found.append(np.concatenate([np.arange(begins[text], begins[text] + n_each) for text in left]))
        begins[left] += n_each
    return found


@cache
def _compiled() -> tuple[int, Any]:
    """The address of the callback, and the owner of its code."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_triple(binding.get_process_triple()).create_target_machine(opt=2, jit=True)
    # a context of its own: kernels may be compiled in another thread at this moment
    module = binding.parse_assembly(_assembly(), context=binding.create_context())
    module.verify()
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    return engine.get_function_address("tap"), engine


def _assembly() -> str:
    """``bool tap(ggml_tensor * t, bool ask, _State * s)`` in LLVM's language; offsets come from the structures."""
    tensor, state = graph_tensors.Tensor, _State

    def number(text: bytes) -> int:
        return int.from_bytes(text, "little")

    return f"""
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)

define zeroext i1 @tap(ptr %t, i1 zeroext %ask, ptr %s) {{
entry:
  %on = load i32, ptr %s
  %off = icmp eq i32 %on, 0
  %topk_at = getelementptr i8, ptr %s, i64 {state.topk.offset}
  %weights_at = getelementptr i8, ptr %s, i64 {state.weights.offset}
  %others = xor i1 %ask, true
  br i1 %off, label %pass, label %listen
pass:
  ret i1 %others

listen:
  %topk = load ptr, ptr %topk_at
  %weights = load ptr, ptr %weights_at
  br i1 %ask, label %asked, label %computed

asked:  ; stop behind the first product with chosen experts
  %op_at = getelementptr i8, ptr %t, i64 {tensor.op.offset}
  %op = load i32, ptr %op_at
  %is_product = icmp eq i32 %op, {Operation.MUL_MAT_ID.value}
  %has_topk = icmp ne ptr %topk, null
  %has_weights = icmp ne ptr %weights, null
  %has_both = and i1 %has_topk, %has_weights
  %stops = and i1 %is_product, %has_both
  br i1 %stops, label %stop, label %look
stop:
  ret i1 true
look:
  %name = getelementptr i8, ptr %t, i64 {tensor.name.offset}
  %prefix = load i64, ptr %name, align 1
  %is_router = icmp eq i64 %prefix, {number(ROUTING_PREFIX)}
  br i1 %is_router, label %router, label %no
no:
  ret i1 false
router:
  %step_at = getelementptr i8, ptr %name, i64 8
  %step = load i64, ptr %step_at, align 1
  %five = and i64 %step, {2**40 - 1}
  %is_topk = icmp eq i64 %five, {number(b"topk-")}
  br i1 %is_topk, label %keep_topk, label %not_topk
keep_topk:
  store ptr %t, ptr %topk_at
  store ptr null, ptr %weights_at
  ret i1 false
not_topk:
  %seven = and i64 %step, {2**56 - 1}
  %is_weights = icmp eq i64 %seven, {number(b"weights")}
  %rest_at = getelementptr i8, ptr %name, i64 15
  %rest = load i32, ptr %rest_at, align 1
  %no_sum = icmp ne i32 %rest, {number(b"_sum")}
  %is_kept = and i1 %is_weights, %no_sum
  br i1 %is_kept, label %keep_weights, label %no
keep_weights:
  store ptr %t, ptr %weights_at
  ret i1 false

computed:
  store ptr null, ptr %topk_at
  store ptr null, ptr %weights_at
  %n_used_at = getelementptr i8, ptr %topk, i64 {tensor.ne.offset}
  %n_used = load i64, ptr %n_used_at
  %n_rows_at = getelementptr i8, ptr %topk, i64 {tensor.ne.offset + 8}
  %n_rows = load i64, ptr %n_rows_at
  %stride_at = getelementptr i8, ptr %topk, i64 {tensor.nb.offset + 8}
  %stride = load i64, ptr %stride_at
  %row = mul i64 %n_used, 4
  %bytes = mul i64 %row, %n_rows
  %is_empty = icmp eq i64 %bytes, 0
  br i1 %is_empty, label %done, label %measure
done:
  ret i1 true
measure:
  %used_at = getelementptr i8, ptr %s, i64 {state.used.offset}
  %used = load i64, ptr %used_at
  %capacity_at = getelementptr i8, ptr %s, i64 {state.capacity.offset}
  %capacity = load i64, ptr %capacity_at
  %body = add i64 %used, {_HEAD_BYTES}
  %middle = add i64 %body, %bytes
  %end = add i64 %middle, %bytes
  %fits = icmp sle i64 %end, %capacity
  br i1 %fits, label %copy, label %lose
lose:
  %n_lost_at = getelementptr i8, ptr %s, i64 {state.n_lost.offset}
  %n_lost = load i32, ptr %n_lost_at
  %more = add i32 %n_lost, 1
  store i32 %more, ptr %n_lost_at
  ret i1 true
copy:
  %records_at = getelementptr i8, ptr %s, i64 {state.records.offset}
  %records = load ptr, ptr %records_at
  %head = getelementptr i8, ptr %records, i64 %used
  store i64 %n_used, ptr %head, align 1
  %second = getelementptr i8, ptr %head, i64 8
  store i64 %n_rows, ptr %second, align 1
  %third = getelementptr i8, ptr %head, i64 16
  %topk_name = getelementptr i8, ptr %topk, i64 {tensor.name.offset}
  call void @llvm.memcpy.p0.p0.i64(ptr %third, ptr %topk_name, i64 {_NAME_BYTES}, i1 false)
  %choices = getelementptr i8, ptr %records, i64 %body
  %get_2d_at = getelementptr i8, ptr %s, i64 {state.get_2d.offset}
  %get_2d = load ptr, ptr %get_2d_at
  call void %get_2d(ptr %topk, ptr %choices, i64 0, i64 %row, i64 %n_rows, i64 %stride, i64 %row)
  %factors = getelementptr i8, ptr %records, i64 %middle
  %get_at = getelementptr i8, ptr %s, i64 {state.get.offset}
  %get = load ptr, ptr %get_at
  call void %get(ptr %weights, ptr %factors, i64 0, i64 %bytes)
  store i64 %end, ptr %used_at
  ret i1 true
}}
"""
