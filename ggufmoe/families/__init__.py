"""The model families: every module here that binds ``FAMILY`` adds one, and nothing else has to name it.

``family`` says what a family consists of, ``standard`` has what most families share; ``docs/ARCHITECTURE.md`` tells how
one is added.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

from ggufmoe.errors import ArchitectureError

if TYPE_CHECKING:
    from ggufmoe.families.family import Family
    from ggufmoe.families.model_config import ModelConfig


@cache
def all_families() -> tuple[Family, ...]:
    """Every family, by the name of its module, each before its variants."""
    names = sorted(found.name for found in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    families = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    return tuple(one for family in families for one in (family, *(variant.family for variant in family.variants)))


def family_named(architecture: object, model_type: object = None) -> Family | None:
    """The family of a class of transformers; of a model type where ``architecture`` is None. None if there is none.

    The class of a model that was saved without its head is known as well (``LlamaModel`` for ``LlamaForCausalLM``).
    """
    for family in all_families():
        if architecture is None and model_type in family.model_types:
            return family
        if architecture in family.architectures or architecture == headless(family.architecture):
            return family
    return None


def headless(architecture: str) -> str:
    """The class of transformers that lacks the output of this one."""
    return architecture.replace("ForCausalLM", "Model")


def family_of(config: ModelConfig) -> Family:
    """The family of a model. Raises ArchitectureError, with what is supported, if there is none."""
    family = family_named(config.architecture)
    if family is None:
        raise ArchitectureError(f"{config.architecture} cannot be exported; {supported(config.architecture)}")
    return family


def supported(architecture: object = None) -> str:
    """For messages: ``supported are ...``, and which of them have names like ``architecture``."""
    variants = {variant.family.architecture for family in all_families() for variant in family.variants}
    ours = {family.architecture for family in all_families() if family.merge is not None and family.merge.only_gguf}
    names = sorted({family.architecture for family in all_families()} - variants - ours)
    nearest = _nearest(str(architecture), names)
    return f"supported are {', '.join(names)}" + (f"; did you mean {' or '.join(nearest)}?" if nearest else "")


def _nearest(architecture: str, names: Iterable[str]) -> list[str]:
    """The names that are like this one in what comes before ``ForCausalLM`` and the like."""
    stems = {name.partition("For")[0].lower(): name for name in names}
    matches = difflib.get_close_matches(architecture.partition("For")[0].lower(), stems, n=2, cutoff=0.6)
    return [stems[match] for match in matches]
