"""Whether the models of a recipe fit together.

A difference that would make the merge wrong is an error, one that may be intended is a warning.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from ggufmoe.checkpoint.chat_template import default_chat_template
from ggufmoe.checkpoint.jsonfile import read_optional
from ggufmoe.checkpoint.source import ModelSource
from ggufmoe.errors import RecipeError
from ggufmoe.families import family_of
from ggufmoe.families.model_config import RopeScaling
from ggufmoe.gguf.upstream import MODEL_TENSOR
from ggufmoe.merge.prompts import read_vocabulary
from ggufmoe.merge.recipe import Recipe
from ggufmoe.weights.dtypes import read_single_rows

_MUST_AGREE = {
    "architecture": "architecture",
    "n_layer": "num_hidden_layers",
    "n_embd": "hidden_size",
    "n_ff": "intermediate_size",
    "n_head": "num_attention_heads",
    "n_head_kv": "num_key_value_heads",
    "head_dim": "head_dim",
}
"""Fields of ModelConfig that the result depends on, with the names that users know from config.json."""

_BASES_ALONE = {"rope_theta": "rope_theta", "rope_scaling": "rope scaling", "rms_norm_eps": "rms_norm_eps"}
"""Fields that only the base's attention and norms need: Mistral v0.1 and v0.2 differ in the first, and mix well."""

_ATTENTION = (MODEL_TENSOR.ATTN_Q, MODEL_TENSOR.ATTN_K, MODEL_TENSOR.ATTN_V, MODEL_TENSOR.ATTN_OUT)
_SAMPLED_ROWS = 8
"""Rows of a matrix of attention that are compared."""


def compare_sources(base: ModelSource, recipe: Recipe, experts: Sequence[ModelSource]) -> tuple[str, ...]:
    """Warnings, one for each difference that may be intended. ``experts`` are those of the recipe, then its shared one.

    Raises RecipeError, naming all of them, for differences that would make the merge wrong.
    """
    errors: list[str] = []
    warnings: list[str] = []
    names = [f"expert {index} ({spec.source_model})" for index, spec in enumerate(recipe.experts)]
    names += [f"shared expert ({spec.source_model})" for spec in recipe.shared_experts or ()]
    for name, expert in zip(names, experts, strict=True):
        if expert is base:
            continue
        for field, called in _MUST_AGREE.items():
            ours, theirs = getattr(base.config, field), getattr(expert.config, field)
            if ours != theirs:
                errors.append(f"{name}: {called} is {theirs}, the base has {ours}")
        for called, ours in base.config.values.items():
            if (theirs := expert.config.values.get(called)) != ours:
                errors.append(f"{name}: {called} is {theirs}, the base has {ours}")
        errors += [f"{name}: {difference}" for difference in _vocabulary_errors(base, expert)]
        warnings += [f"{name}: {difference}" for difference in _warnings(base, expert)]
        if recipe.tokenizer_source in (None, "base"):
            warnings += [f"{name}: {difference}" for difference in _token_warnings(base, expert)]
    if errors:
        raise RecipeError(f"the models do not fit together: {'; '.join(dict.fromkeys(errors))}")
    return tuple(dict.fromkeys(warnings))


def attention_distance(base: ModelSource, expert: ModelSource) -> float:
    """How far an expert's attention weights are from the base's, relative to their length; 0 for the same weights.

    Estimated from a few rows of each matrix. Both models have the same shapes.
    """
    family = family_of(base.config)
    squares = np.zeros(2)
    for tensor, layer in itertools.product(_ATTENTION, range(base.config.n_layer)):
        rule = family.rule(tensor)
        if rule is None or not rule.where(base.config, layer):
            continue
        ours, theirs = base.tensors[rule.name(layer)], expert.tensors[rule.name(layer)]
        sampled = range(0, ours.shape[0], max(1, ours.shape[0] // _SAMPLED_ROWS))
        for row, other in zip(read_single_rows(ours, sampled), read_single_rows(theirs, sampled), strict=True):
            squares += (np.sum((other - row) ** 2, dtype=np.float64), np.sum(row**2, dtype=np.float64))
    return float(np.sqrt(squares[0] / squares[1])) if squares[1] else 0.0


def _vocabulary_errors(base: ModelSource, expert: ModelSource) -> Iterator[str]:
    """Tokens with another id: the MLPs of such an expert were trained on other inputs than the base's."""
    ours, theirs = read_vocabulary(base.tokenizer_dir), read_vocabulary(expert.tokenizer_dir)
    different = [i for i in ours.keys() & theirs.keys() if ours[i] != theirs[i]]
    if different:
        first = min(different)
        yield (
            f"its vocabulary differs from the base's in {len(different)} tokens "
            f"(token {first} is {theirs[first]!r}, the base's {ours[first]!r})"
        )


def _warnings(base: ModelSource, expert: ModelSource) -> Iterator[str]:
    for field, name in _BASES_ALONE.items():
        here, there = getattr(base.config, field), getattr(expert.config, field)
        if here != there:
            kept = "the base's is kept, with its attention and norms"
            yield f"its {name} is {_shown(there)}, the base's is {_shown(here)}; {kept}"
    if expert.config.n_ctx != base.config.n_ctx:
        yield f"was made for a context of {expert.config.n_ctx}, the base for {base.config.n_ctx}; the base's is kept"
    ours, theirs = default_chat_template(base.tokenizer_dir), default_chat_template(expert.tokenizer_dir)
    if ours is not None and theirs is not None and ours != theirs:
        yield "its chat template differs from the base's; the base's is kept (chat_template: expert:N takes another)"


def _shown(value: float | RopeScaling) -> str:
    if not isinstance(value, RopeScaling):
        return f"{value:g}"
    parameters = ", ".join(f"{name} {number:g}" for name, number in sorted(value.parameters.items()))
    return f"{value.kind} ({parameters})" if parameters else value.kind


def _token_warnings(base: ModelSource, expert: ModelSource) -> Iterator[str]:
    """Differences between the tokens of an expert and those of the base, where the base's are kept."""
    if expert.config.n_vocab != base.config.n_vocab:
        yield f"has {expert.config.n_vocab} vocabulary rows, the base {base.config.n_vocab}; the base's are kept"
    for field, name in (("bos_token_id", "BOS"), ("eos_token_id", "EOS")):
        ours, theirs = getattr(base.config, field), getattr(expert.config, field)
        if ours != theirs:
            yield f"its {name} token is {theirs}, the base's is {ours}; the base's is kept"
    extra = sorted(_added_tokens(expert) - _added_tokens(base))
    if extra:
        shown = ", ".join(extra[:5]) + (", …" if len(extra) > 5 else "")
        yield (
            f"knows tokens that the base does not ({shown}); the base's tokenizer is kept "
            "(tokenizer_source: union takes them)"
        )


def _added_tokens(source: ModelSource) -> set[str]:
    # the exporter reports a broken tokenizer; here it only has nothing to compare
    settings = read_optional(source.tokenizer_dir / "tokenizer_config.json", allow_broken=True, warn=False)
    added = settings.get("added_tokens_decoder")
    entries = added.values() if isinstance(added, dict) else ()
    return {str(entry.get("content")) for entry in entries if isinstance(entry, dict)}
