"""What llama.cpp keeps of the tokens behind it, layer by layer: keys and values, a window of them, or a state.

Elements are counted here; types, the number of tokens and where it all goes are the business of ``placement``. Source:
``load_hparams`` and ``create_memory`` of llama-model.cpp, llama-hparams.cpp and models/*.cpp at commit 0c1e57098.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ggufmoe.gguf.header import GGUFValue
from ggufmoe.gguf.hyper import Hyper, TypedMetadata, at_layer, largest
from ggufmoe.gguf.upstream import Keys
from ggufmoe.options.limits import MAX_LAYERS

RECURRENT_LAYERS = "{arch}.attention.recurrent_layers"
"""LLM_KV_ATTENTION_RECURRENT_LAYERS, which the ``gguf`` package does not name."""


@dataclass(frozen=True)
class LayerMemory:
    """What one layer keeps, in elements."""

    n_keys: int = 0
    """Elements of keys for each token."""
    n_values: int = 0
    """Elements of values for each token."""
    is_windowed: bool = False
    """Whether the layer attends to the last ``ModelMemory.window`` tokens only."""
    n_state: int = 0
    """Float32 elements of a recurrent state for each sequence, whatever its length."""


@dataclass(frozen=True)
class ModelMemory:
    """What the layers of a model keep.

    ``pads_values``: without flash attention, every layer's values take the room of the widest layer's. ``is_exact`` is
    False for architectures with a cache of their own that is not described here; the numbers are then those of a plain
    transformer.
    """

    layers: tuple[LayerMemory, ...]
    window: int = 0
    """Tokens that a windowed layer attends to; 0 where no layer is windowed."""
    is_chunked: bool = False
    """Whether a window begins at a multiple of its length and grows from there, instead of moving with each token."""
    pads_values: bool = True
    is_exact: bool = True
    n_not_loaded: int = 0
    """Number of layers at the end whose weights llama.cpp does not load: they predict tokens ahead."""

    @classmethod
    def of(cls, metadata: Mapping[str, GGUFValue]) -> ModelMemory:
        """The memory of the model that ``metadata`` describes."""
        return _Reader(metadata).memory()

    @property
    def widest_values(self) -> int:
        """The largest number of elements of values that any layer keeps of a token."""
        return max((layer.n_values for layer in self.layers), default=0)

    @property
    def n_windowed(self) -> int:
        """Number of layers with keys and values that attend to a window only."""
        return sum(layer.is_windowed and bool(layer.n_keys) for layer in self.layers)

    @property
    def n_recurrent(self) -> int:
        """Number of layers that keep a state instead of keys and values, or beside them."""
        return sum(bool(layer.n_state) for layer in self.layers)


@dataclass(frozen=True)
class _Window:
    """How an architecture states which layers are windowed.

    Where the file has no array for it, all layers but each ``period``-th are, the last of the period or with
    ``full_first`` the first of it; all layers are for 0. ``default``: the window where the file states none, in tokens.
    ``fixed``: the window whatever the file states, unless that is 0. ``is_chunked``: LLAMA_SWA_TYPE_CHUNKED.
    """

    period: int
    full_first: bool = False
    default: int = 0
    fixed: int = 0
    is_chunked: bool = False


_WINDOWS = {
    "afmoe": _Window(4),
    "cohere2": _Window(4),
    "cohere2moe": _Window(4, full_first=True),
    "exaone-moe": _Window(4),
    "gemma2": _Window(2, default=4096),
    "gemma3": _Window(6),
    "gemma3n": _Window(5),
    "gemma4": _Window(0),
    "gpt-oss": _Window(2),
    "granite_swa": _Window(0),
    "laguna": _Window(4, full_first=True),
    "lfm2": _Window(0),
    "llama4": _Window(4, default=8192, fixed=8192, is_chunked=True),
    "maple": _Window(0),
    "mellum": _Window(4),
    "mimo2": _Window(0),
    "muse-glimmer": _Window(4),
    "olmo2": _Window(4),
    "plamo3": _Window(8),
    "smallthinker": _Window(4, full_first=True, fixed=4096),
    "spark2_5": _Window(0),
    "step35": _Window(0),
}
_EXAONE4 = _Window(4, default=4096)
"""Of ``exaone4`` only the model with 64 layers has windows."""

_RECURRENT = {"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"}
_HYBRID_BY_HEADS = {"jamba", "plamo2", "granitehybrid", "lfm2", "lfm2moe", "kimi-linear"}
"""A layer without KV heads is recurrent."""
_HYBRID_BY_INTERVAL = {"qwen3next": 4, "qwen35": 4, "qwen35moe": 4}
"""All layers but each so many-th are recurrent, unless the file has an array for it."""
_NEMOTRON = {"nemotron_h", "nemotron_h_moe"}
_SHARES_KV = {"gemma3n": 20}
"""Only so many of the first layers have keys and values of their own."""
_LOADS_NO_PREDICTION = {
    *("bailingmoe3", "cohere2moe", "deepseek2", "deepseek32", "deepseek4", "glm-dsa", "glm4moe", "glm5-next", "hy_v3"),
    *("mimo2", "nemotron_h", "nemotron_h_moe", "qwen35", "qwen35moe", "qwen3next", "step35"),
}
"""Architectures whose layers that predict tokens ahead are skipped unless ``load_mtp`` is set, which it is not here."""
_OTHER_CACHES = {
    "minimax-m3",
    "glm-dsa",
    "deepseek32",
    "deepseek4",
    "glm5-next",
    "hy_v4",
    "dots3note",
    "dflash",
    "qwen4exp",
    "kimi-k3",
    "bailingmoe3",
    "minimax-01",
    "nanbeige",
}


class _Reader:
    """One model's metadata, read for what its layers keep."""

    def __init__(self, metadata: Mapping[str, GGUFValue]) -> None:
        self._hyper = Hyper.of(metadata)
        self._typed = TypedMetadata(metadata)
        self._architecture = self._hyper.architecture or ""
        self._n_layer = min(largest(self._hyper.n_layer), MAX_LAYERS)
        self._n_trunk = max(self._n_layer - self._count(Keys.LLM.NEXTN_PREDICT_LAYERS), 0)
        """Layers before those that predict tokens ahead, which the graph does not run."""

    def memory(self) -> ModelMemory:
        window = self._window()
        has_values = not (self._count(Keys.Attention.KEY_LENGTH_MLA) and self._count(Keys.Attention.VALUE_LENGTH_MLA))
        layers = [self._layer(layer, window) for layer in range(self._n_layer)]
        if not has_values:  # the values are part of the compressed keys
            layers = [replace(layer, n_values=0) for layer in layers]
        tokens = 0 if window is None else self._window_tokens(window)
        return ModelMemory(
            tuple(layers),
            window=tokens,
            is_chunked=window is not None and window.is_chunked,
            pads_values=has_values,
            is_exact=self._architecture not in _OTHER_CACHES,
            n_not_loaded=self._n_layer - self._n_trunk if self._architecture in _LOADS_NO_PREDICTION else 0,
        )

    def _count(self, template: str, default: int = 0) -> int:
        return largest(self._typed.whole(self._hyper.key(template)), default)

    def _layer(self, layer: int, window: _Window | None) -> LayerMemory:
        if layer >= self._n_trunk:
            return LayerMemory()
        is_recurrent = self._is_recurrent(layer)
        n_state = self._state_elements() if is_recurrent else 0
        if not self._has_keys(layer, is_recurrent=is_recurrent):
            return LayerMemory(n_state=n_state)
        is_windowed = window is not None and self._is_windowed(layer, window)
        n_keys, n_values = self._cached(layer, is_windowed=is_windowed)
        return LayerMemory(n_keys, n_values, is_windowed, n_state)

    def _cached(self, layer: int, *, is_windowed: bool) -> tuple[int, int]:
        """Elements of keys and of values that one token adds to a layer."""
        hyper = self._hyper
        n_head_kv = self._n_head_kv(layer)
        width = largest(hyper.n_embd) // max(at_layer(hyper.n_head, 0), 1)
        lengths = [largest(hyper.key_length, width), largest(hyper.value_length, width)]
        if is_windowed:
            keys = (Keys.Attention.KEY_LENGTH_SWA, Keys.Attention.VALUE_LENGTH_SWA)
            lengths = [self._count(key, length) for key, length in zip(keys, lengths, strict=True)]
        return n_head_kv * lengths[0], n_head_kv * lengths[1]

    # ---- recurrent layers

    def _is_recurrent(self, layer: int) -> bool:
        architecture = self._architecture
        if architecture in _RECURRENT or architecture == "falcon-h1":
            return True
        if architecture in _HYBRID_BY_HEADS:
            return not self._n_head_kv(layer)
        if architecture in _NEMOTRON:
            return not self._n_head_kv(layer) and not self._n_ff(layer)
        if architecture in _HYBRID_BY_INTERVAL:
            stated = self._flags(RECURRENT_LAYERS)
            interval = self._count(Keys.LLM.FULL_ATTENTION_INTERVAL, _HYBRID_BY_INTERVAL[architecture])
            return stated[layer] if layer < len(stated) else (layer + 1) % max(interval, 1) != 0
        return False

    def _has_keys(self, layer: int, *, is_recurrent: bool) -> bool:
        architecture = self._architecture
        if architecture in _NEMOTRON:
            return not is_recurrent and not self._n_ff(layer)
        if architecture in _SHARES_KV:
            return layer < _SHARES_KV[architecture]
        if architecture == "gemma4":
            return layer < self._n_layer - self._count(Keys.Attention.SHARED_KV_LAYERS)
        return architecture == "falcon-h1" or not is_recurrent

    def _n_head_kv(self, layer: int) -> int:
        return at_layer(self._hyper.n_head_kv, layer, at_layer(self._hyper.n_head, layer))

    def _n_ff(self, layer: int) -> int:
        return at_layer(self._typed.per_layer(self._hyper.key(Keys.LLM.FEED_FORWARD_LENGTH)), layer)

    def _state_elements(self) -> int:
        """Elements of both recurrent tensors of a layer: ``n_embd_r`` and ``n_embd_s`` of llama-hparams.cpp."""
        n_embd, kernel = largest(self._hyper.n_embd), self._count(Keys.SSM.CONV_KERNEL)
        if head := self._count(Keys.WKV.HEAD_SIZE):
            shifts = self._count(Keys.LLM.TOKEN_SHIFT_COUNT, 2)
            return n_embd * (shifts + head)
        if head := self._count(Keys.KDA.HEAD_DIM):
            n_head = at_layer(self._hyper.n_head, 0)
            return 3 * ((kernel or 4) - 1) * n_head * head + head * head * n_head
        inner, state = self._count(Keys.SSM.INNER_SIZE), self._count(Keys.SSM.STATE_SIZE)
        if n_cached := self._count(Keys.ShortConv.L_CACHE):
            return n_embd * (n_cached - 1) + state * inner
        n_groups = self._count(Keys.SSM.GROUP_COUNT)
        return max(kernel - 1, 0) * (inner + 2 * n_groups * state) + state * inner

    # ---- sliding windows

    def _window(self) -> _Window | None:
        """The windows of the architecture; None where the model does without."""
        if self._architecture == "exaone4":
            return _EXAONE4 if self._n_trunk == 64 else None
        window = _WINDOWS.get(self._architecture)
        return window if window is not None and self._window_tokens(window) else None

    def _window_tokens(self, window: _Window) -> int:
        stated = self._hyper.sliding_window
        n_tokens = largest(stated, window.default)
        return window.fixed if n_tokens and window.fixed else n_tokens

    def _is_windowed(self, layer: int, window: _Window) -> bool:
        stated = self._flags(Keys.Attention.SLIDING_WINDOW_PATTERN)
        if stated:
            return layer < len(stated) and stated[layer]
        period = self._count(Keys.Attention.SLIDING_WINDOW_PATTERN, window.period)
        if not period:
            return True
        return layer % period != 0 if window.full_first else layer % period < period - 1

    def _flags(self, template: str) -> list[bool]:
        """An array with a flag or a number for each layer; empty where the file has none."""
        key = self._hyper.key(template)
        return [bool(item) for item in self._typed.items(key, bool) or self._typed.items(key, int) or ()]
