"""How long a model's tensors take for a token that is generated, in each type, on the machine that was measured."""

from __future__ import annotations

from collections.abc import Callable

from ggufmoe.export.unmixed import UnmixedModel
from ggufmoe.gguf.names import OUTPUT, TOKEN_EMBEDDING, is_expert_stack, is_input
from ggufmoe.gguf.types import GGMLType
from ggufmoe.quant.type_speeds import TypeSpeeds
from ggufmoe.writing.plan import PlannedTensor

Clock = Callable[[PlannedTensor, GGMLType], float]
"""Seconds that a tensor takes for a token in a type."""


def token_clock(speeds: TypeSpeeds, model: UnmixedModel) -> Clock:
    """Seconds by the weights that a token meets: of a stack of experts those that are used, of an embedding none unless
    it is the output as well. How fast a weight is depends on the bytes of all matrices that tokens meet, unused experts
    included: caches hold those of small models."""
    is_tied = all(tensor.name != OUTPUT for tensor in model.tensors)
    used = model.n_expert_used / model.shape.n_expert if model.shape.n_expert and model.n_expert_used else 1.0

    def is_looked_up(tensor: PlannedTensor) -> bool:
        return is_input(tensor.name) and not (is_tied and tensor.name == TOKEN_EMBEDDING)

    n_weights = sum(tensor.n_weights for tensor in model.tensors if not is_looked_up(tensor))

    def seconds(tensor: PlannedTensor, kind: GGMLType) -> float:
        if is_looked_up(tensor):
            return 0.0
        return tensor.n_weights * (used if is_expert_stack(tensor.name) else 1.0) * speeds.of(kind, n_weights)

    return seconds
