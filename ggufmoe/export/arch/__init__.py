"""Model families: which GGUF tensors and hyper-parameters a model of each architecture has.

A family is one module of this package. It names the architectures it serves in ``ARCHITECTURES``, gives GGUF's name of
the family in ``NAME``, and has the functions of ``Family``; the export needs nothing else. To read such checkpoints,
their configuration has to be known to ``checkpoint.config`` and their tensors to ``checkpoint.layouts``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Protocol, cast

from ggufmoe.checkpoint.source import ModelConfig, ModelSource, SourceTensor
from ggufmoe.errors import ArchitectureError
from ggufmoe.gguf.header import GGUFValue
from ggufmoe.gguf.types import GGMLType


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


class Family(Protocol):
    """What a module of this package offers."""

    NAME: str
    ARCHITECTURES: tuple[str, ...]

    def tensors(self, source: ModelSource) -> Iterator[ModelTensor]:
        """Every tensor of the GGUF file, in any order."""

    def hyper_parameters(self, config: ModelConfig) -> dict[str, GGUFValue]:
        """The keys that begin with the family's name, in the order of llama.cpp's converter; last, keys of ours."""

    def unexpressed(self, config: ModelConfig) -> Iterator[str]:
        """What of the model's configuration llama.cpp leaves out for this family, a clause each."""


def family_of(config: ModelConfig) -> Family:
    """The family of a model; ArchitectureError, listing what is supported, if there is none."""
    families = _families()
    if config.architecture not in families:
        raise ArchitectureError(
            f"{config.architecture} cannot be exported; supported are {', '.join(sorted(families))}"
        )
    return families[config.architecture]


@cache
def _families() -> dict[str, Family]:
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    families = [cast(Family, module) for module in modules]
    return {name: family for family in families for name in family.ARCHITECTURES}
