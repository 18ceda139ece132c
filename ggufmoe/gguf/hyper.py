"""The hyper-parameters of a model as its header states them, with one set of defaults for every reader.

Values of a wrong type count as absent. What layers keep of a text is in ``layer_memory``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ggufmoe.gguf.header import GGUFValue
from ggufmoe.gguf.own_keys import SLIDING_WINDOW
from ggufmoe.gguf.upstream import Keys

Layers = int | tuple[int, ...] | None
"""One number for all layers, one for each layer where they differ, or None where the header states none."""

_COUNT_LIMIT = 2**31
"""No model has so many of anything: llama.cpp counts in 32 bits."""


class TypedMetadata:
    """Metadata by key and expected type. Each method returns None for an absent key and for a value of another type."""

    def __init__(self, metadata: Mapping[str, GGUFValue]) -> None:
        self.metadata = metadata

    def text(self, key: str) -> str | None:
        """The string under ``key``; None if it is absent or of another type."""
        value = self.plain(key)
        return value if isinstance(value, str) else None

    def flag(self, key: str) -> bool | None:
        """The bool under ``key``; None if it is absent or of another type."""
        value = self.plain(key)
        return value if isinstance(value, bool) else None

    def whole(self, key: str) -> int | None:
        """The integer under ``key``; None if it is absent or of another type."""
        value = self.plain(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def number(self, key: str) -> float | None:
        """The number under ``key``, integer or float, as a float; None if it is absent or of another type."""
        value = self.plain(key)
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    def items(self, key: str, kind: type) -> list[Any] | None:
        """The array under ``key`` if all its items have the Python type ``kind``; None if not, or if it is absent."""
        value = self.plain(key)
        fits = isinstance(value, list) and all(type(item) is kind for item in value)
        return value if fits else None

    def per_layer(self, key: str) -> Layers:
        """The value of a key that may be an integer or an array with one for each layer; an integer if all agree."""
        layers = self.items(key, int)
        if layers is None:
            return self.whole(key)
        return layers[0] if layers and len(set(layers)) == 1 else tuple(layers)

    def has_count(self, key: str) -> bool:
        """Whether the value of a key is a count or an array that begins with one; also true for an absent key."""
        value = self.plain(key)
        first = value[0] if isinstance(value, list) and value else value
        return value is None or (type(first) is int and first >= 0)

    def plain(self, key: str) -> Any:
        """The value under ``key``, of any type; None if it is absent."""
        found = self.metadata.get(key)
        return None if found is None else found.value


@dataclass(frozen=True)
class Hyper:
    """The hyper-parameters of a model. None: the header does not state it. A tuple: one number for each layer.

    Numbers are what the header states, even if no model can have them; ``largest`` and ``at_layer`` replace those by a
    default.
    """

    architecture: str | None
    n_layer: int | None
    n_ctx_train: int | None
    n_embd: int | None
    n_vocab: int | None
    n_ff: Layers
    """Width of the feed-forward matrices, of one expert's where there are experts."""
    n_head: Layers
    n_head_kv: Layers
    key_length: int | None
    value_length: int | None
    sliding_window: int | None
    unapplied_window: int | None
    """The sliding window of the original model that llama.cpp does not apply to this one, in tokens."""
    rms_norm_eps: float | None
    rope_theta: float | None
    rope_dimensions: int | None
    rope_scaling: str | None
    rope_scaling_factor: float | None
    n_expert: int
    """0 for a dense model."""
    n_expert_used: int
    n_expert_shared: int | None
    """Experts that run on every token beside the chosen ones."""
    expert_gating: str | None
    """The function that makes probabilities of the router's scores, as llama.cpp names it."""
    expert_weights_norm: bool | None
    """Whether the weights of the chosen experts are rescaled to sum to one."""
    expert_weights_scale: float | None
    n_expert_groups: int | None
    """Groups of equal size that the experts of a layer lie in."""
    n_group_used: int | None
    """So many groups are chosen first; experts are chosen from these only."""
    n_leading_dense: int | None
    """So many of the first layers have no experts."""
    malformed: frozenset[str]
    """Keys that should hold a count, or one for each layer, and hold something else."""

    @classmethod
    def of(cls, metadata: Mapping[str, GGUFValue]) -> Hyper:
        """The hyper-parameters in a model's metadata."""
        typed = TypedMetadata(metadata)
        architecture = typed.text(Keys.General.ARCHITECTURE)

        def key(template: str) -> str:
            return template.format(arch=architecture)

        gating = typed.whole(key(Keys.LLM.EXPERT_GATING_FUNC))
        # qwen2moe and granitemoe state the width of their shared expert alone
        shared_width = typed.whole(key(Keys.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH))
        return cls(
            architecture=architecture,
            n_layer=typed.whole(key(Keys.LLM.BLOCK_COUNT)),
            n_ctx_train=typed.whole(key(Keys.LLM.CONTEXT_LENGTH)),
            n_embd=typed.whole(key(Keys.LLM.EMBEDDING_LENGTH)),
            n_vocab=typed.whole(key(Keys.LLM.VOCAB_SIZE)),
            n_ff=typed.per_layer(key(Keys.LLM.EXPERT_FEED_FORWARD_LENGTH))
            or typed.per_layer(key(Keys.LLM.FEED_FORWARD_LENGTH)),
            n_head=typed.per_layer(key(Keys.Attention.HEAD_COUNT)),
            n_head_kv=typed.per_layer(key(Keys.Attention.HEAD_COUNT_KV)),
            key_length=typed.whole(key(Keys.Attention.KEY_LENGTH)),
            value_length=typed.whole(key(Keys.Attention.VALUE_LENGTH)),
            sliding_window=typed.whole(key(Keys.Attention.SLIDING_WINDOW)),
            unapplied_window=typed.whole(SLIDING_WINDOW),
            rms_norm_eps=typed.number(key(Keys.Attention.LAYERNORM_RMS_EPS)),
            rope_theta=typed.number(key(Keys.Rope.FREQ_BASE)),
            rope_dimensions=typed.whole(key(Keys.Rope.DIMENSION_COUNT)),
            rope_scaling=typed.text(key(Keys.Rope.SCALING_TYPE)),
            rope_scaling_factor=typed.number(key(Keys.Rope.SCALING_FACTOR)),
            n_expert=max(typed.whole(key(Keys.LLM.EXPERT_COUNT)) or 0, 0),
            n_expert_used=max(typed.whole(key(Keys.LLM.EXPERT_USED_COUNT)) or 0, 0),
            n_expert_shared=typed.whole(key(Keys.LLM.EXPERT_SHARED_COUNT)) or (shared_width and 1),
            expert_gating=_gating(architecture, gating),
            expert_weights_norm=_rescales(architecture, typed.flag(key(Keys.LLM.EXPERT_WEIGHTS_NORM))),
            expert_weights_scale=typed.number(key(Keys.LLM.EXPERT_WEIGHTS_SCALE)),
            n_expert_groups=typed.whole(key(Keys.LLM.EXPERT_GROUP_COUNT)),
            n_group_used=typed.whole(key(Keys.LLM.EXPERT_GROUP_USED_COUNT)),
            n_leading_dense=typed.whole(key(Keys.LLM.LEADING_DENSE_BLOCK_COUNT)),
            malformed=frozenset(stated for stated in map(key, _COUNTS) if not typed.has_count(stated)),
        )

    def key(self, template: str) -> str:
        """A key of ``Keys`` for this architecture: ``llama.expert_used_count`` of ``{arch}.expert_used_count``."""
        return template.format(arch=self.architecture)

    def expert_facts(self) -> list[tuple[str, str]]:
        """What the header says beyond the number of experts, as names and texts for people; empty for a Mixtral."""
        scale, dense = self.expert_weights_scale, self.n_leading_dense
        rescaled = {None: "", True: "rescaled to one", False: "not rescaled"}[self.expert_weights_norm]
        weights = [rescaled, f"times {scale:g}" if scale and scale != 1 else ""]
        n_groups = self.n_expert_groups or 0
        facts = [
            ("shared experts", f"{self.n_expert_shared}, on every token" if self.n_expert_shared else ""),
            ("gating", self.expert_gating or ""),
            ("expert weights", ", ".join(filter(None, weights))),
            ("expert groups", f"{n_groups}, experts come from the best {self.n_group_used}" if n_groups > 1 else ""),
            ("dense layers", f"the first {dense}, without experts" if dense else ""),
        ]
        return [(name, text) for name, text in facts if text] if self.n_expert else []


_GATINGS = {0: "none", 1: "softmax", 2: "sigmoid", 3: "softmax of the chosen", 4: "square root of softplus"}
"""``llama_expert_gating_func_type`` of llama.cpp's src/llama-hparams.h."""
_ROUTED_BY_GRAPH: dict[str, tuple[str | None, bool | None]] = {
    "qwen2moe": ("softmax", False),
    "qwen3moe": ("softmax", True),
    "qwen3next": ("softmax", True),
    "qwen35moe": ("softmax", True),
    "olmoe": ("softmax", False),
    "granitemoe": ("softmax", True),
    "gpt-oss": ("softmax of the chosen", None),
    "deepseek": ("softmax", False),
    "ernie4_5-moe": ("softmax", True),
    "lfm2moe": (None, True),
}
"""Gating function, and whether weights are rescaled, where llama.cpp's graph decides it whatever the file states.

Source: the calls of ``build_moe_ffn`` in src/models (commit 0c1e57098)."""
_GATING_UNLESS_STATED = {"afmoe": "sigmoid", "deepseek2": "softmax", "glm4moe": "sigmoid"}
_NOT_RESCALED_UNLESS_STATED = {"afmoe", "bailingmoe", "bailingmoe2", "deepseek2", "dots1", "exaone-moe", "glm4moe"}
"""Architectures whose graph takes the function and the flag from the file: what they are where the key is absent."""
_COUNTS = (
    Keys.LLM.BLOCK_COUNT,
    Keys.Attention.HEAD_COUNT,
    Keys.Attention.HEAD_COUNT_KV,
    Keys.LLM.EXPERT_COUNT,
)


def _gating(architecture: str | None, stated: int | None) -> str | None:
    by_graph, _ = _ROUTED_BY_GRAPH.get(architecture or "", (None, None))
    if by_graph is not None:
        return by_graph
    if not stated and architecture in _GATING_UNLESS_STATED:
        return _GATING_UNLESS_STATED[architecture]
    return None if stated is None else _GATINGS.get(stated, f"function {stated}")


def _rescales(architecture: str | None, stated: bool | None) -> bool | None:
    _, by_graph = _ROUTED_BY_GRAPH.get(architecture or "", (None, None))
    if by_graph is not None:
        return by_graph
    return False if stated is None and architecture in _NOT_RESCALED_UNLESS_STATED else stated


def largest(layers: Layers, default: int = 0) -> int:
    """The count, the largest one where layers differ; ``default`` where the header states none, or an absurd one."""
    counts = layers if isinstance(layers, tuple) else (layers,)
    return max((count for count in counts if count is not None and 0 <= count < _COUNT_LIMIT), default=default)


def at_layer(layers: Layers, layer: int, default: int = 0) -> int:
    """The count of the layer with this number, from 0; ``default`` where the header states none, or an absurd one."""
    if isinstance(layers, tuple):
        layers = layers[layer] if layer < len(layers) else None
    return largest(layers, default)
