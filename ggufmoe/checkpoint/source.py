"""The interface of a model that can be exported: a configuration, and named tensors that are read by rows.

``Checkpoint`` (checkpoint) and ``MergedModel`` (merge) implement ``ModelSource``. Tensors have the names that their
family gives them (``families.family.TensorRule.hf``), whatever the layout on disk: for Mixtral
``model.layers.N.block_sparse_moe.gate.weight`` and ``model.layers.N.block_sparse_moe.experts.E.{w1,w2,w3}.weight``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ggufmoe.families.model_config import ModelConfig
from ggufmoe.weights.source_tensor import SourceTensor
from ggufmoe.work import CancelFlag, OnProgress


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
class TextScore:
    """What a fitted router does to the held-out texts of one file of an expert."""

    expert: int
    file: str
    n_fitted_tokens: int
    """Tokens that the router was fitted on."""
    n_scored_tokens: int
    """Tokens of held-out texts whose loss counts."""
    losses: Mapping[str, float]
    """Mean loss of a token, in nats, by what computed it: "base", "expert 0" and so on each alone, "uniform" (all
    experts, equally weighted), "hidden" (gate mode hidden, where the recipe has prompts), "fitted". Of a mixture that
    gets a new router, "before" (with the router that it had) takes the place of "base"."""
    own_weight: float
    """Weight that a token gives its own expert; mean over tokens and layers."""
    own_first: float
    """Share of tokens and layers that give their own expert the most weight."""

    @property
    def is_worse_than_uniform(self) -> bool:
        """Whether equal weights do better on these texts than the fitted router."""
        return self.is_worse_than("uniform")

    def is_worse_than(self, other: str) -> bool:
        """Whether ``other``, a name in ``losses``, does better than the fitted router: by a thousandth, as is shown."""
        return self.losses["fitted"] - self.losses.get(other, np.inf) >= 0.001


@dataclass(frozen=True)
class RouterReport:
    """Describes a computed router: how similar the rows of its experts are, and to which experts each prompt goes."""

    gate_mode: str
    cosines: tuple[tuple[tuple[float, ...], ...], ...]
    """Per layer the n_expert x n_expert cosines between rows."""
    condition_numbers: tuple[float, ...]
    """Per layer the ratio of the largest to the smallest singular value of the rows."""
    """Of fitted rows, which add up to zero, to the smallest but one."""
    preferences: tuple[PromptPreference, ...]
    scores: tuple[TextScore, ...] = ()
    """Of a fitted router, one for each file of texts."""
    attention_distances: tuple[float, ...] = ()
    """Of a fitted router, how far each expert's attention weights are from the base's, relative to their length."""

    @property
    def degenerate_layers(self) -> tuple[int, ...]:
        """Layers whose rows are nearly linearly dependent, so that the router hardly distinguishes some experts."""
        return tuple(i for i, c in enumerate(self.condition_numbers) if not c <= DEGENERATE_CONDITION)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values for JSON."""
        return {**asdict(self), "degenerate_layers": list(self.degenerate_layers)}


class ModelWeights(Protocol):
    """What a forward pass needs of a model: what ``Checkpoint``, ``MergedModel`` and ``GGUFWeights`` give."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """Every tensor by the name that its family gives it, complete and of the right shape."""


class ModelSource(ModelWeights, Protocol):
    """A model that can be exported: what ``Checkpoint`` and ``MergedModel`` give."""

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
