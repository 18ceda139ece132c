"""A model whose types are still to be chosen, and what chooses them: between the tensors and the plan of a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ggufmoe.gguf.types import GGMLType
from ggufmoe.quant.importances import Imatrix
from ggufmoe.quant.policy import ModelShape, TensorShape, TypePolicy
from ggufmoe.writing.plan import PlannedTensor, WritePlan


@dataclass(frozen=True, eq=False)
class UnmixedModel:
    """All that the choice of types depends on; ``lay_out`` gives the plan of a file with the types of a policy."""

    tensors: tuple[PlannedTensor, ...]
    """Each in the type of its first part."""
    shape: ModelShape
    policy: TypePolicy
    """What was asked for single tensors; its file type is of no meaning."""
    imatrix: Imatrix | None
    input_paths: tuple[Path, ...]
    keeps_quantized: bool
    """Whether tensors that are quantized already have to stay as they are."""
    lay_out: Callable[[TypePolicy], WritePlan]
    n_expert_used: int = 0
    """Experts that each token uses in a layer; 0 for a dense model."""

    @property
    def tensor_shapes(self) -> list[TensorShape]:
        """The tensors as the rules of mixes know them."""
        return [TensorShape(tensor.name, tensor.shape, tensor.type) for tensor in self.tensors]

    @property
    def weighted(self) -> frozenset[str]:
        """The tensors that have importances."""
        return frozenset(tensor.name for tensor in self.tensors if tensor.weighted)


Mixer = Callable[[UnmixedModel], WritePlan]
"""Chooses the types of a model, and returns the plan with them."""


def with_types(
    tensors: tuple[PlannedTensor, ...], types: dict[str, GGMLType], unfit: dict[str, GGMLType]
) -> list[PlannedTensor]:
    """The tensors in the types that were chosen; ``unfit`` are the types that did not fit the rows."""
    return [
        PlannedTensor(
            tensor.name, types[tensor.name], tensor.shape, tensor.parts, tensor.weighted, unfit.get(tensor.name)
        )
        for tensor in tensors
    ]
