"""Which family of mixtures a recipe becomes, and how tensors of dense models are named in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ggufmoe.errors import RecipeError
from ggufmoe.families import all_families, family_of
from ggufmoe.families.family import Family, MergeTarget, SharedExperts, TensorRule
from ggufmoe.families.model_config import ModelConfig
from ggufmoe.gguf.upstream import MODEL_TENSOR

ROUTER = MODEL_TENSOR.FFN_GATE_INP
EXPERT_MATRICES = (
    (MODEL_TENSOR.FFN_GATE, MODEL_TENSOR.FFN_GATE_EXP),
    (MODEL_TENSOR.FFN_DOWN, MODEL_TENSOR.FFN_DOWN_EXP),
    (MODEL_TENSOR.FFN_UP, MODEL_TENSOR.FFN_UP_EXP),
)
"""The matrices of a dense feed-forward part and what they become in a mixture; noise is numbered in this order."""
SHARED_MATRICES = (
    (MODEL_TENSOR.FFN_GATE, MODEL_TENSOR.FFN_GATE_SHEXP),
    (MODEL_TENSOR.FFN_DOWN, MODEL_TENSOR.FFN_DOWN_SHEXP),
    (MODEL_TENSOR.FFN_UP, MODEL_TENSOR.FFN_UP_SHEXP),
)
"""The same of a shared expert."""
SHARED_GATE = MODEL_TENSOR.FFN_GATE_INP_SHEXP


@dataclass(frozen=True)
class Wanted:
    """What a recipe says about the mixture that it becomes."""

    architecture: str | None
    """The beginning of a target's name; None where the recipe does not say."""
    shared: SharedExperts
    """PLAIN or GATED by whether the shared expert has prompts."""
    n_expert: int
    n_expert_used: int
    gates_are_random: bool = False
    """Whether a shared expert can be gated without prompts."""

    def may_become(self, target: MergeTarget) -> bool:
        """Whether the target has the shared expert that the recipe has."""
        drawn = self.architecture is not None and self.gates_are_random and self.shared is SharedExperts.PLAIN
        return target.shared is self.shared or (drawn and target.shared is SharedExperts.GATED)


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


def _is_called(target: MergeTarget, name: str) -> bool:
    return any(one.lower().startswith(name.lower()) for one in (target.name, *target.also_called))


def target_family(base: ModelConfig, wanted: Wanted) -> Family:
    """The family that a recipe over this base becomes: the one that it names in ``architecture:``, or the base's own.

    Raises RecipeError if no mixture, or not this one, is made of models of the base's architecture, or if llama.cpp
    would compute another one.
    """
    made, name = base.architecture, wanted.architecture
    possible = [(target, family) for target, family in all_targets() if made in (*target.sources, *target.on_request)]
    if not possible:
        bases = sorted({name for target, _ in all_targets() for name in (*target.sources, *target.on_request)})
        raise RecipeError(f"no mixture is made of {made}; a recipe takes {', '.join(bases)}")
    named = [pair for pair in possible if (_is_called(pair[0], name) if name else made in pair[0].sources)]
    for target, family in named:
        if wanted.may_become(target):
            if obstacle := target.obstacle(base, wanted.n_expert, wanted.n_expert_used):
                raise RecipeError(f"a {target.name} of {made} models is not made: {obstacle}")
            return family
    kind = f"a {name!r:.40}" if name else "a mixture"
    if not named:
        others = " or ".join(target.name for target, _ in possible)
        raise RecipeError(f"a {made} does not become {kind}; it can become {others}")
    others = "; ".join(f"{target.name} has {target.shared.value}" for target, _ in possible)
    raise RecipeError(f"a {made} does not become {kind} with {wanted.shared.value}: {others}")


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
