"""The interface of a model that can be exported: a configuration, and named tensors that are read by rows.

``Checkpoint`` (checkpoint) and ``MergedModel`` (merge) implement ``ModelSource``. Tensors have Hugging Face's classic
names, whatever the layout on disk: for Mixtral ``model.layers.N.block_sparse_moe.gate.weight`` and
``model.layers.N.block_sparse_moe.experts.E.{w1,w2,w3}.weight``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ggufmoe.gguf.types import GGMLType
from ggufmoe.work import CancelFlag, OnProgress

_NUMPY: Mapping[str, np.dtype[Any]] = {
    "BF16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}


class Dtype(Enum):
    """Storage types of source weights. BF16 rows are arrays of uint16 bits, because numpy has no bfloat16."""

    BF16 = "BF16"
    F16 = "F16"
    F32 = "F32"

    @property
    def numpy(self) -> np.dtype[Any]:
        """The numpy dtype in which rows of this type are stored: uint16, float16 or float32."""
        return _NUMPY[self.value]

    @property
    def ggml_type(self) -> GGMLType:
        """The GGUF tensor type of the same name, which stores weights of this dtype unchanged."""
        return GGMLType[self.value]

    @property
    def n_bytes(self) -> int:
        """Bytes per weight."""
        return int(self.numpy.itemsize)


class SourceTensor(Protocol):
    """One tensor of a model, read by rows. A row is the last dimension; a 1-D tensor is a single row."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> Dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...

    def read_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Fill ``out``, shape (stop - start, n_cols) and dtype ``self.dtype.numpy``, with rows [start, stop).

        Safe to call from several threads at once.
        """


@dataclass(frozen=True)
class RopeScaling:
    """Rope scaling of a config: ``kind`` is none, linear, dynamic, yarn or llama3.

    ``parameters`` has the keys of the config; the flag ``truncate`` is 0 or 1.
    """

    kind: str = "none"
    parameters: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelConfig:
    """The hyper-parameters of a checkpoint, the same for configs of transformers 4 and 5."""

    architecture: str
    """One of ``MixtralForCausalLM``, ``MistralForCausalLM``, ``LlamaForCausalLM``."""
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
    raw: Mapping[str, Any] = field(default_factory=dict)
    """config.json as it was read."""


@dataclass(frozen=True)
class BaseModel:
    """One model that this model was made from, for ``general.base_model.*``."""

    name: str
    organization: str | None = None
    repo_url: str | None = None
    version: str | None = None


@dataclass(frozen=True)
class Provenance:
    """Where a model comes from: the values of the ``general.*`` keys of a GGUF file."""

    name: str
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    tags: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    base_models: tuple[BaseModel, ...] = ()
    extra: Mapping[str, str] = field(default_factory=dict)
    """Further string keys of the GGUF file, full key to value, such as recipe and gate mode of a merge."""


DEGENERATE_CONDITION = 5.0
"""Condition number of a layer's rows above which mergekit calls them degenerate."""


@dataclass(frozen=True)
class PromptPreference:
    """The softmax weights that the router gives to the experts of each layer for one prompt.

    Computed from hidden states of the base model if the gate mode computes them, else from embeddings. The hidden
    states of the merged model deviate from these the more its experts differ.
    """

    expert: int
    positive: bool
    prompt: str
    weights: tuple[tuple[float, ...], ...]
    """n_layer tuples of n_expert weights that sum to one."""

    @property
    def mean_weights(self) -> tuple[float, ...]:
        """Weights averaged over the layers."""
        return tuple(float(weight) for weight in np.mean(np.asarray(self.weights), axis=0))


@dataclass(frozen=True)
class RouterReport:
    """Describes a computed router: how similar the rows of its experts are, and to which experts each prompt goes."""

    gate_mode: str
    cosines: tuple[tuple[tuple[float, ...], ...], ...]
    """Per layer the n_expert x n_expert cosines between rows."""
    condition_numbers: tuple[float, ...]
    """Per layer the ratio of the largest to the smallest singular value of the rows."""
    preferences: tuple[PromptPreference, ...]

    @property
    def degenerate_layers(self) -> tuple[int, ...]:
        """Layers whose rows are nearly linearly dependent, so that the router hardly distinguishes some experts."""
        return tuple(i for i, c in enumerate(self.condition_numbers) if not c <= DEGENERATE_CONDITION)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values for JSON."""
        return {**asdict(self), "degenerate_layers": list(self.degenerate_layers)}


class ModelSource(Protocol):
    """A model that can be exported: what ``Checkpoint`` and ``MergedModel`` give."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """Every tensor by its classic name, complete and of the right shape."""

    @property
    def tokenizer_dir(self) -> Path:
        """The directory with the tokenizer's files: tokenizer.model or tokenizer.json, tokenizer_config.json, ..."""

    @property
    def chat_template(self) -> str | None:
        """A chat template that overrides the tokenizer directory's own; None leaves it to that directory."""

    @property
    def provenance(self) -> Provenance: ...
    @property
    def input_paths(self) -> tuple[Path, ...]:
        """Every file that is read, so that an output is never written over an input."""

    def prepare(
        self,
        *,
        threads: int | None = None,
        on_progress: OnProgress | None = None,
        cancel: CancelFlag | None = None,
    ) -> None:
        """Compute the tensors that no file holds, such as a router; call it after planning, before reading rows.

        ``threads`` is None for one thread per usable core. Raises Cancelled when ``cancel`` is set.
        """

    @property
    def router_report(self) -> RouterReport | None:
        """The report on the router that ``prepare`` computed; None before that, and for a router that is read."""

    @property
    def model_card(self) -> str | None:
        """The README.md that is written beside the weights of a checkpoint; None for no README."""

    def close(self) -> None: ...
