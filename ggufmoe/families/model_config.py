"""The hyper-parameters of a model as its config.json states them, in names that are the same for every family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RopeScaling:
    """Rope scaling of a config: ``kind`` is none, linear, dynamic, yarn or llama3.

    ``parameters`` has the keys of the config; the flag ``truncate`` is 0 or 1.
    """

    kind: str = "none"
    parameters: Mapping[str, float] = field(default_factory=dict)
    factors: tuple[float, ...] = ()
    """What each frequency is divided by, of a llama3 scaling that is read from a GGUF file: it has no parameters."""


@dataclass(frozen=True)
class ModelConfig:
    """The hyper-parameters of a checkpoint, the same for configs of transformers 4 and 5."""

    architecture: str
    """The class of transformers, for example ``MixtralForCausalLM``; ``families`` knows which family it belongs to."""
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_vocab: int
    """Rows of the embedding (``vocab_size`` of the config)."""
    n_ctx: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling
    tie_embeddings: bool
    n_expert: int = 0
    """0 for a dense model."""
    n_expert_used: int = 0
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    sliding_window: int | None = None
    """Number of last tokens that a token attends to, itself included; None for all."""
    rotary_fraction: float = 1.0
    """The part of each head that rope rotates (``partial_rotary_factor`` of the config)."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """The checked values of the keys that only this family has (``Family.keys``), by the key's name; None: absent."""
    raw: Mapping[str, Any] = field(default_factory=dict)
    """config.json as it was read."""

    @property
    def stated_rope(self) -> Mapping[str, Any]:
        """The parameters of rope as config.json states them: of transformers 5, else of 4; empty where it does not."""
        stated = self.raw.get("rope_parameters")
        return (self.raw.get("rope_scaling") if stated is None else stated) or {}

    def size(self, key: str) -> int:
        """The whole number under a key of the family."""
        value = self.values[key]
        assert isinstance(value, int), f"{key} is declared as a size"
        return value

    def number(self, key: str) -> float:
        """The number under a key of the family."""
        return float(self.values[key])

    def flag(self, key: str) -> bool:
        """The truth value under a key of the family; false for an absent one."""
        return bool(self.values[key])
