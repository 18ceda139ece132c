"""The tensors of a GGUF file, from those of a model source by the rules of the model's family."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ggufmoe.checkpoint.source import ModelSource
from ggufmoe.families import family_of
from ggufmoe.families.family import WEIGHT, TensorRule
from ggufmoe.families.standard import EMBEDDING
from ggufmoe.gguf.types import GGMLType
from ggufmoe.gguf.upstream import MODEL_TENSOR, TENSOR_NAMES
from ggufmoe.weights.source_tensor import SourceTensor
from ggufmoe.weights.views import Computed, ReorderedRows
from ggufmoe.writing.plan import Part


@dataclass(frozen=True)
class ModelTensor:
    """A tensor of the GGUF file and where its rows come from: ``parts`` one after another are its rows.

    ``shape`` is in numpy's order; a stack of experts has one part for each of them. ``delicate`` tensors stay float32
    in every file.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[SourceTensor, ...]
    delicate: bool = False

    @property
    def source_type(self) -> GGMLType:
        """The type in the lossless GGUF of the same source."""
        dtypes = {part.dtype for part in self.parts}
        if self.delicate or len(self.shape) == 1 or len(dtypes) > 1:
            return GGMLType.F32
        return dtypes.pop().ggml_type


def model_tensors(source: ModelSource) -> Iterator[ModelTensor]:
    """Every tensor of the GGUF file of a model: those of the checkpoint by the family's rules, then computed ones."""
    family, config = family_of(source.config), source.config
    for rule in family.tensors:
        for layer in range(family.n_blocks(config) if rule.is_per_layer else 1):
            may_lack = rule.optional(config) or family.may_lack(config, layer)
            if rule.where(config, layer) and (rule.name(layer) in source.tensors or not may_lack):
                yield _tensor(rule, layer, source)
            elif rule.tensor is MODEL_TENSOR.OUTPUT and family.own_output:
                yield _tensor(replace(rule, hf=EMBEDDING.hf), layer, source)
    for tensor, values in family.computed(config):
        name = f"{TENSOR_NAMES[tensor]}{WEIGHT}"
        yield ModelTensor(name, (len(values),), (Computed(name, values),))


def _tensor(rule: TensorRule, layer: int, source: ModelSource) -> ModelTensor:
    n_parts = source.config.n_expert if rule.is_per_expert else 1
    stored = (source.tensors[rule.name(layer, expert)] for expert in range(n_parts))
    parts = tuple(rule.transform(part, source.config) for part in stored)
    shape = (n_parts, *parts[0].shape) if rule.is_per_expert else parts[0].shape
    return ModelTensor(rule.gguf_name(layer), shape, parts, rule.is_f32)


def source_part(tensor: SourceTensor) -> Part:
    """A tensor of a model source as a part of a planned tensor."""
    source_row = tensor.source_row if isinstance(tensor, ReorderedRows) else int
    return Part(tensor, tensor.dtype.ggml_type, source_row)
