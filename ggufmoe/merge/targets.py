"""Which family of mixtures a recipe becomes, and how tensors of dense models are named in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ggufmoe.errors import RecipeError
from ggufmoe.families import all_families, family_of
from ggufmoe.families.family import Family, MergeTarget, TensorRule
from ggufmoe.families.model_config import ModelConfig
from ggufmoe.gguf.upstream import MODEL_TENSOR

ROUTER = MODEL_TENSOR.FFN_GATE_INP
EXPERT_MATRICES = (
    (MODEL_TENSOR.FFN_GATE, MODEL_TENSOR.FFN_GATE_EXP),
    (MODEL_TENSOR.FFN_DOWN, MODEL_TENSOR.FFN_DOWN_EXP),
    (MODEL_TENSOR.FFN_UP, MODEL_TENSOR.FFN_UP_EXP),
)
"""The matrices of a dense feed-forward part and what they become in a mixture; noise is numbered in this order."""


_COMPUTED_DIFFERENTLY = ("Qwen MoE", "Qwen2 MoE", "DeepSeek MoE")
"""Mixtures of mergekit's whose graphs in llama.cpp (``src/models/qwen2moe.cpp``, ``deepseek.cpp``) do not rescale the
weights of the chosen experts, which the configurations that mergekit writes ask for (``norm_topk_prob``)."""


def all_targets() -> Iterator[tuple[MergeTarget, Family]]:
    """Every family that a merge can make, with its description as a target."""
    for family in all_families():
        if family.merge is not None:
            yield family.merge, family


def is_known(name: str) -> bool:
    """Whether ``architecture:`` of a recipe may be ``name``: as in mergekit, the beginning of a target's name."""
    return any(_is_called(target, name) for target, _ in all_targets())


def known_names() -> str:
    """The names of all targets, for messages."""
    return ", ".join(target.name for target, _ in all_targets())


def why_not_made(name: str) -> str:
    """For messages: why ``architecture: name``, which mergekit knows, is not made here; empty for any other name."""
    if not any(_begins(other, name) for other in _COMPUTED_DIFFERENTLY):
        return ""
    return "llama.cpp does not rescale the weights of its chosen experts to one, so it would answer as another model"


def _is_called(target: MergeTarget, name: str) -> bool:
    return _begins(target.name, name)


def _begins(full: str, name: str) -> bool:
    return full.lower().startswith(name.lower())


def target_family(base: ModelConfig, wanted: str | None) -> Family:
    """The family that a recipe over this base becomes: the one that it names in ``architecture:``, or the base's own.

    Raises RecipeError if no mixture, or not this one, is made of models of the base's architecture.
    """
    made = base.architecture
    possible = [(target, family) for target, family in all_targets() if made in (*target.sources, *target.on_request)]
    for target, family in possible:
        if _is_called(target, wanted) if wanted else made in target.sources:
            return family
    if wanted:
        others = f"; it can become {' or '.join(target.name for target, _ in possible)}" if possible else ""
        reason = f": {why}" if (why := why_not_made(wanted)) else ""
        raise RecipeError(f"a {made} does not become a {wanted!r:.40}{reason}{others}")
    bases = sorted({name for target, _ in all_targets() for name in (*target.sources, *target.on_request)})
    raise RecipeError(f"no mixture is made of {made}; a recipe takes {', '.join(bases)}")


def kept_names(base: ModelConfig, target: Family) -> dict[str, str]:
    """Names of the base's tensors to their names in the mixture: all but those of the feed-forward part.

    Raises RecipeError for a tensor of the base that the mixture has no place for.
    """
    source = family_of(base)
    names: dict[str, str] = {}
    for rule, layer, _ in source.instances(base):
        if any(rule.tensor is dense for dense, _ in EXPERT_MATRICES):
            continue
        other = target.rule(rule.tensor, rule.suffix)
        if other is None:
            raise RecipeError(f"a {target.architecture} has no place for {rule.name(layer)} of a {base.architecture}")
        names[rule.name(layer)] = other.name(layer)
    return names


def needed_rule(family: Family, tensor: Any) -> TensorRule:
    """The rule of a tensor without which there is no mixture, or no dense feed-forward part."""
    rule = family.rule(tensor)
    assert rule is not None, f"{family.architecture} is a target or a source of merges, and has no {tensor.name}"
    return rule
