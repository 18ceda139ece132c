"""What a model is made of, as far as memory goes: its tensors by layer, its KV cache and its compute buffers.

Read from the header and the options alone; ``offload`` decides where all of it goes. Tensor sizes and the KV cache of
plain transformers are exact, compute buffers are estimates.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from ggufmoe.errors import GGUFError, OptionError
from ggufmoe.gguf.header import TensorInfo, padded
from ggufmoe.gguf.model import ModelHeader, check_kind
from ggufmoe.gguf.types import GGMLType
from ggufmoe.options import ContextOptions, OffloadOptions

DEFAULT_MAX_CTX = 4096
"""Tokens of context when the caller names none and the model was trained for more."""
EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"
"""The tensors of a layer's experts, as llama.cpp's ``--cpu-moe`` names them."""

_CTX_STEP = 256
_MAX_LAYERS = 512
"""LLAMA_MAX_LAYERS of llama-hparams.h."""
_INPUT = re.compile(r"(token_embd|token_types|position_embd|per_layer_token_embd)\b")
_LAYER = re.compile(r"blk\.(\d+)\.")
_ROPE = re.compile(r"rope_(freqs|factors_long|factors_short)\b")


@dataclass(frozen=True)
class WeightTensor:
    """One tensor of the file, or a second use of it (an embedding that is the output too); ``offset`` in its shard.

    ``layer``: -1 for the input, the number of layers for the output, None where every layer's device has a copy.
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
    """What header and options say about the model.

    Raises GGUFError for a file that is none, OptionError for experts that it does not have.
    """

    def __init__(self, model: ModelHeader, context: ContextOptions, offload: OffloadOptions) -> None:
        check_kind(model)
        self.model = model
        self.context = context
        self.arch = model.get("general.architecture")
        self.n_layer = self._n_layer()
        self.n_expert = self.number("expert_count")
        self.n_expert_used = self._experts_used(offload)
        n_ctx = self._n_ctx()
        self.n_ctx = padded(n_ctx, _CTX_STEP)
        self._n_ubatch = min(context.n_ubatch, context.n_batch, n_ctx)
        self.tensors = tuple(self._tensors())
        self.names = tuple(tensor.name for tensor in self.tensors)

    def number(self, key: str, default: int = 0) -> int:
        """A count below the architecture's name; the largest where layers differ, ``default`` where it is none."""
        value = self.model.get(f"{self.arch}.{key}", default)
        if isinstance(value, list):
            value = max((item for item in value if type(item) is int), default=default)
        return value if type(value) is int and 0 <= value < 2**31 else default

    def of_layer(self, key: str, layer: int, default: int = 0) -> int:
        """The same for one layer."""
        value = self.model.get(f"{self.arch}.{key}", default)
        if isinstance(value, list):
            value = value[layer] if layer < len(value) else default
        return value if type(value) is int and 0 <= value < 2**31 else default

    def _n_layer(self) -> int:
        n_layer = self.number("block_count")
        if n_layer > _MAX_LAYERS:
            raise GGUFError(
                f"{self.model.paths[0]}: says that it has {n_layer} layers, and llama.cpp takes at most {_MAX_LAYERS}; "
                "the file is corrupt"
            )
        return n_layer

    def _experts_used(self, offload: OffloadOptions) -> int:
        stored, wanted = self.number("expert_used_count"), offload.n_expert_used
        if wanted is None:
            return stored
        if not self.n_expert:
            raise OptionError(f"{self.model.paths[0]}: --n-expert-used {wanted}: the model has no experts")
        if wanted > self.n_expert:
            raise OptionError(
                f"{self.model.paths[0]}: --n-expert-used {wanted}: the model has {self.n_expert} experts in a layer"
            )
        return wanted

    def _n_ctx(self) -> int:
        trained, asked = self.number("context_length"), self.context.n_ctx
        return min(trained, DEFAULT_MAX_CTX) if asked is None else asked or trained

    def _tensors(self) -> Iterator[WeightTensor]:
        infos = [
            (number, shard.header.data_offset, info)
            for number, shard in enumerate(self.model.shards)
            for info in shard.header.tensors
        ]
        for number, start, info in infos:
            yield self._tensor(info, number, start, _layer_of(info.name, self.n_layer))
            if info.name == "token_embd.weight" and not any(other.name == "output.weight" for *_, other in infos):
                yield self._tensor(info, number, start, self.n_layer)

    def _tensor(self, info: TensorInfo, shard: int, start: int, layer: int | None) -> WeightTensor:
        is_product = layer != -1 and len(info.shape) > 1 and info.name.endswith(".weight")
        is_expert = re.search(EXPERTS, info.name) is not None
        offset = start + info.offset
        return WeightTensor(info.name, info.type, info.shape, info.n_bytes, shard, offset, layer, is_expert, is_product)

    @cached_property
    def kv_layers(self) -> tuple[int, ...]:
        """Bytes of keys and values of each layer."""
        attention = {
            int(match[1]) for name in self.names if ".attn_" in name and (match := _LAYER.match(name)) is not None
        }
        return tuple(self._kv_bytes(layer) if layer in attention else 0 for layer in range(self.n_layer))

    def _kv_bytes(self, layer: int) -> int:
        n_head = self.of_layer("attention.head_count", layer)
        n_head_kv = self.of_layer("attention.head_count_kv", layer, n_head)
        width = self.number("embedding_length") // max(n_head, 1)
        total = 0.0
        for key, name in (("key", self.context.cache_type_k), ("value", self.context.cache_type_v)):
            kind = GGMLType[name.upper()]
            cells = n_head_kv * self.number(f"attention.{key}_length", width) * self.n_ctx
            total += cells / kind.block_size * kind.block_bytes
        return int(total)

    @property
    def kv_is_plain(self) -> bool:
        """Whether every layer keeps all keys and values, so that their size is exact."""
        odd = ("attention.sliding_window", "attention.kv_lora_rank", "ssm.state_size", "attention.shared_kv_layers")
        return self.arch == "llama" or not any(self.model.get(f"{self.arch}.{key}") for key in odd)

    @property
    def compute_bytes(self) -> int:
        """Estimate of the buffer for the graph's largest step, where a layer is computed."""
        n_tokens = self._n_ubatch
        n_embd, n_ff = self.number("embedding_length"), self.number("feed_forward_length")
        n_used = self.n_expert_used or 1
        n_ff = (self.number("expert_feed_forward_length") or n_ff) if self.n_expert else n_ff
        experts = n_used * (3 * n_ff + n_embd) + 3 * n_embd
        output = self.number("vocab_size") + 2 * n_embd
        scores = 2 * self.number("attention.head_count") * self.n_ctx if self.context.flash_attn == "off" else 0
        mask = 2 * n_tokens * self.n_ctx
        return 4 * n_tokens * max(experts, output, scores) + mask

    @property
    def host_compute_bytes(self) -> int:
        """Estimate of the CPU's buffer when all layers are computed elsewhere: embeddings and the mask."""
        n_tokens = self._n_ubatch
        return n_tokens * (8 * self.number("embedding_length") + 2 * self.n_ctx)


def _layer_of(name: str, n_layer: int) -> int | None:
    match = _LAYER.match(name)
    if match:
        return min(int(match[1]), n_layer)
    if _INPUT.match(name):
        return -1
    return None if _ROPE.match(name) else n_layer
