"""What a model is made of, as far as memory goes: its tensors by layer, its KV cache and its compute buffers.

Read from the header and the options alone; ``offload`` decides where all of it goes. Tensor sizes and what layers keep
of a text (``gguf.layer_memory``) are exact, compute buffers are estimates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from ggufmoe.errors import OptionError
from ggufmoe.gguf.checks import check_loadable
from ggufmoe.gguf.header import TensorInfo, padded
from ggufmoe.gguf.hyper import largest
from ggufmoe.gguf.layer_memory import LayerMemory, ModelMemory
from ggufmoe.gguf.model import ModelHeader, check_kind
from ggufmoe.gguf.names import OUTPUT, TOKEN_EMBEDDING, is_input, is_offloadable_expert, is_rope_table, layer_of
from ggufmoe.gguf.types import GGMLType
from ggufmoe.options import AUTO_PARALLEL, ContextOptions, OffloadOptions
from ggufmoe.options.limits import CONTEXT_STEP_TOKENS, rounded_context

DEFAULT_MAX_CTX = 4096
"""Tokens of context when the caller names none and the model was trained for more."""
_FLOAT_BYTES = 4
"""llama.cpp keeps recurrent states in float32."""


@dataclass(frozen=True)
class WeightTensor:
    """A tensor of the file, or its second use: an embedding that is the output, too. ``offset`` counts in its shard.

    ``layer`` is -1 for the input, the number of layers for the output, None where every layer's device has a copy.
    ``is_product``: a matrix, or a stack of experts' matrices, that activations are multiplied by. The CPU's backend
    rearranges no other weights (``supports_op`` of ggml-cpu/repack.cpp), such as the stack of DeepSeek's ``attn_k_b``.
    """

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    n_bytes: int
    shard: int
    offset: int
    layer: int | None
    is_expert: bool
    is_product: bool


class Footprint:
    """The memory that a model takes, by its header and the options.

    Raises GGUFError for a file that is no model or that llama.cpp cannot load, OptionError for more experts than the
    model has.
    """

    def __init__(self, model: ModelHeader, context: ContextOptions, offload: OffloadOptions) -> None:
        check_kind(model)
        check_loadable(model)
        self.model = model
        self.context = context
        self.hyper = model.hyper
        self.n_layer = largest(self.hyper.n_layer)
        self.n_expert = largest(self.hyper.n_expert)
        self.n_expert_used = self._experts_used(offload)
        self.n_ctx_train = largest(self.hyper.n_ctx_train)
        n_ctx = context_tokens(context, self.n_ctx_train)
        self.n_ctx = rounded_context(n_ctx, context.n_seq_max)
        self._n_sequences = max(context.n_seq_max, answers_at_once(context, model.memory))
        self._n_ubatch = min(context.n_ubatch, context.n_batch, n_ctx)
        self.tensors = tuple(self._tensors())
        self.names = tuple(tensor.name for tensor in self.tensors)

    def _experts_used(self, offload: OffloadOptions) -> int:
        wanted = offload.n_expert_used
        if wanted is None:
            return largest(self.hyper.n_expert_used)
        if not self.n_expert:
            raise OptionError(f"{self.model.paths[0]}: --n-expert-used {wanted}: the model has no experts")
        if wanted > self.n_expert:
            raise OptionError(
                f"{self.model.paths[0]}: --n-expert-used {wanted}: the model has {self.n_expert} experts in a layer"
            )
        return wanted

    def _tensors(self) -> Iterator[WeightTensor]:
        is_tied = not any(info.name == OUTPUT for info in self.model.tensors)
        not_loaded = range(self.n_layer - self.model.memory.n_not_loaded, self.n_layer)
        for number, shard in enumerate(self.model.shards):
            for info in shard.header.tensors:
                if layer_of(info.name) in not_loaded:
                    continue
                offset = shard.header.data_offset + info.offset
                yield _weight_tensor(info, number, offset, self._layer_of(info.name))
                if info.name == TOKEN_EMBEDDING and is_tied:
                    yield _weight_tensor(info, number, offset, self.n_layer)

    def _layer_of(self, name: str) -> int | None:
        layer = layer_of(name)
        if layer is not None:
            return min(layer, self.n_layer)
        if is_input(name):
            return -1
        return None if is_rope_table(name) else self.n_layer

    @cached_property
    def kv_layers(self) -> tuple[int, ...]:
        """Bytes that each layer keeps of a text: keys and values, a window of them, or a recurrent state."""
        return tuple(self._kept_bytes(layer, self.context) for layer in self.model.memory.layers)

    @property
    def state_bytes(self) -> int:
        """Bytes of the recurrent states in ``kv_layers``."""
        return sum(_FLOAT_BYTES * layer.n_state * self._n_sequences for layer in self.model.memory.layers)

    @property
    def saved_by_windows(self) -> int:
        """Bytes that ``kv_layers`` would grow by with ``swa_full``."""
        full = replace(self.context, swa_full=True)
        return sum(self._kept_bytes(layer, full) for layer in self.model.memory.layers) - sum(self.kv_layers)

    def _kept_bytes(self, layer: LayerMemory, context: ContextOptions) -> int:
        memory, n_ctx = self.model.memory, self.n_ctx
        if layer.is_windowed and not context.swa_full:
            # each of several texts has a cache of its own, while answers have one for all of their windows
            n_texts, n_answers = context.n_seq_max, self._n_sequences // context.n_seq_max
            n_ctx = n_texts * window_tokens(memory.window * n_answers, n_ctx // n_texts, self._n_ubatch)
        if layer.n_values and memory.pads_values and context.flash_attn == "off":
            layer = replace(layer, n_values=memory.widest_values)
        return kv_cache_bytes(layer, n_ctx, context) + _FLOAT_BYTES * layer.n_state * self._n_sequences

    @property
    def compute_bytes(self) -> int:
        """Estimate of the buffer for the graph's largest step, on a device that computes layers."""
        n_tokens, n_embd = self._n_ubatch, largest(self.hyper.n_embd)
        experts = (self.n_expert_used or 1) * (3 * largest(self.hyper.n_ff) + n_embd) + 3 * n_embd
        output = self._n_output_rows + 2 * n_embd
        scores = 2 * largest(self.hyper.n_head) * self.n_ctx if self.context.flash_attn == "off" else 0
        mask = 2 * n_tokens * self.n_ctx
        return 4 * n_tokens * max(experts, output, scores) + mask

    @property
    def _n_output_rows(self) -> int:
        """Number of tokens that the model computes logits for; most files state it only by the shape of tensors."""
        shapes = (tensor.shape for tensor in self.tensors if tensor.name in (OUTPUT, TOKEN_EMBEDDING))
        return max((shape[0] for shape in shapes if shape), default=largest(self.hyper.n_vocab))

    @property
    def host_compute_bytes(self) -> int:
        """Estimate of the CPU's buffer when all layers are computed elsewhere: embeddings and the mask."""
        return self._n_ubatch * (8 * largest(self.hyper.n_embd) + 2 * self.n_ctx)


def context_tokens(context: ContextOptions, n_ctx_train: int) -> int:
    """Number of tokens of context to make; ``n_ctx`` 0 means all that the model was trained for.

    Without ``n_ctx`` it is DEFAULT_MAX_CTX, or fewer if the model was trained for fewer.
    """
    if context.n_ctx is None:
        return min(n_ctx_train, DEFAULT_MAX_CTX)
    return context.n_ctx or n_ctx_train


def one_by_one_reason(memory: ModelMemory) -> str:
    """Why the answers of a model are computed one after another; empty if they can be computed in one batch."""
    return "" if memory.is_exact else "llama.cpp has a cache of its own for this architecture"


def answers_at_once(context: ContextOptions, memory: ModelMemory) -> int:
    """Answers that are computed in one batch: as many as asked for, or as the model and the batch allow."""
    if context.n_parallel:
        return context.n_parallel
    return 1 if one_by_one_reason(memory) else min(AUTO_PARALLEL, context.n_batch)


def window_tokens(window: int, n_ctx: int, n_ubatch: int) -> int:
    """Tokens that a layer has room for whose sliding windows have ``window`` in all (llama-kv-cache-iswa.cpp)."""
    return padded(min(n_ctx, window + n_ubatch), CONTEXT_STEP_TOKENS)


def kv_cache_bytes(layer: LayerMemory, n_tokens: int, context: ContextOptions) -> int:
    """Bytes of the keys and values of ``n_tokens`` in a layer, in the types of ``context``."""
    total = 0.0
    for n_values, name in ((layer.n_keys, context.cache_type_k), (layer.n_values, context.cache_type_v)):
        kind = GGMLType[name.upper()]
        total += n_values * n_tokens / kind.block_size * kind.block_bytes
    return int(total)


def _weight_tensor(info: TensorInfo, shard: int, offset: int, layer: int | None) -> WeightTensor:
    is_expert = is_offloadable_expert(info.name)
    # ggml does not count leading dimensions of one
    n_dims = next((len(info.shape) - index for index, size in enumerate(info.shape) if size > 1), 1)
    return WeightTensor(
        name=info.name,
        type=info.type,
        shape=info.shape,
        n_bytes=info.n_bytes,
        shard=shard,
        offset=offset,
        layer=layer,
        is_expert=is_expert,
        is_product=layer != -1 and n_dims == (3 if is_expert else 2) and info.name.endswith(".weight"),
    )
