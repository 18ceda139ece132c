"""Base models, experts and recipes whose router rows are compared with those of transformers and mergekit.

Weights of plain random models give nearly uniform attention, under which a wrong rope would hardly show. Here queries,
keys and up projections are made larger, by powers of two, which is exact in every dtype.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from tests import tiny_tokenizers
from tests.families import tiny_family
from tests.tiny import Tiny, make_checkpoint, stored_tensors, write_shards, write_tokenizer

_LOUDER = {"q_proj": 8, "k_proj": 4, "up_proj": 8}
_SHAPE = {"arch": "llama", "n_embd": 128, "n_ff": 256, "n_layer": 3}

PROMPTS: tuple[tuple[list[str], list[str]], ...] = (
    (["Use common sense and logic.", "Warum ist der Himmel blau?", "sheep"], ["nonsense", "solve for x"]),
    (["Calculate the answer to this problem: 7 + 42 = ?", "solve for"], ["a poem about rivers and the sea", "é"]),
    (["for index in range(10):\n    print(index)"], []),
)
"""Positive and negative prompts of each expert: of different lengths, and with characters that need bytes."""


@dataclass(frozen=True)
class MergeCase:
    """A base with its experts, and how they are merged."""

    name: str
    spec: Mapping[str, Any]
    """Fields of ``tests.tiny.Tiny`` beside the shape."""
    experts: tuple[Mapping[str, Any], ...] = ({}, {})
    """Keys of each expert beside its model and prompts."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[str, Any] | None = None
    """Keys of a shared expert beside its model, which is the base; None: there is none."""
    config: Mapping[str, Any] | None = None
    """config.json of a base that ``tests.tiny`` cannot make; ``spec`` is empty then, the tokenizer like Qwen's."""


def qwen(number: int, **keys: Any) -> dict[str, Any]:
    """config.json of a Qwen2 or Qwen3 of the shape of the other bases."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "rope_theta": 1e6}
    tokens = {"vocab_size": tiny_tokenizers.vocabulary_size("qwen"), "bos_token_id": None}
    tokens["eos_token_id"] = tiny_tokenizers.special_ids("qwen")[1]
    return tiny_family.config_json(f"Qwen{number}ForCausalLM", f"qwen{number}", **sizes, **tokens, **keys)


MERGE_CASES = (
    MergeCase("sentencepiece", {"tokenizer": "spm", "dtype": "F32"}, recipe={"dtype": "bfloat16"}),
    MergeCase(
        "byte-level",
        {
            "tokenizer": "bpe",
            "head_dim": 48,
            "config_style": 5,
            "rope_theta": 5e5,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        experts=({}, {"residual_scale": 0.7}, {}),
        recipe={"dtype": "bfloat16", "experts_per_token": 2},
    ),
    MergeCase("sentencepiece-json", {"tokenizer": "json", "tie": True}, recipe={"dtype": "float16"}),
    MergeCase("qwen2", {}, experts=({}, {}, {}), recipe={"dtype": "bfloat16"}, config=qwen(2)),
    MergeCase("qwen3", {}, experts=({}, {"residual_scale": 0.7}, {}), config=qwen(3, head_dim=48)),
)
"""Both kinds of tokenizer files, a byte-level vocabulary, rope scaling, tied embeddings, all changes of dtype; biases,
and norms of queries and keys."""


def make_model(directory: Path, case: MergeCase, seed: int) -> Path:
    """Write one dense model of a case; seed 1 is the base."""
    if case.config is not None:
        return _make_family_model(directory, case.config, seed)
    spec = {**_SHAPE, **case.spec, "seed": seed}
    make_checkpoint(directory, **spec)
    tiny = Tiny(**spec)
    louder = {name: (kind, _louder(name, kind, data)) for name, (kind, data) in stored_tensors(tiny).items()}
    write_shards(directory, louder, None)
    if tiny.tokenizer == "json":
        # transformers 5 makes this tokenizer anew from `legacy`, and not from what tokenizer.json says
        settings = directory / "tokenizer_config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"legacy": True}), encoding="utf-8")
    return directory


def make_recipe(parent: Path, case: MergeCase, mode: str) -> Path:
    """Write a recipe over the models in ``parent``; the first expert is the base itself."""
    names = ["base", *(f"expert-{i}" for i in range(1, len(case.experts)))]
    experts = [
        {"source_model": str(parent / name), "positive_prompts": PROMPTS[i][0], "negative_prompts": PROMPTS[i][1]}
        | dict(case.experts[i])
        for i, name in enumerate(names)
    ]
    content = {"base_model": str(parent / "base"), "gate_mode": mode, "experts": experts, **dict(case.recipe)}
    if case.shared is not None:
        content["shared_experts"] = [{"source_model": str(parent / "base"), **case.shared}]
    path = parent / f"{mode}.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    return path


def make_models(parent: Path, case: MergeCase) -> None:
    """Write the base and the experts of a case into ``parent``."""
    make_model(parent / "base", case, 1)
    for i in range(1, len(case.experts)):
        make_model(parent / f"expert-{i}", case, 1 + i)


def _make_family_model(directory: Path, config: Mapping[str, Any], seed: int) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    weights = tiny_family.weights(config, seed=seed)
    write_shards(directory, {name: ("BF16", _louder(name, "BF16", bits)) for name, bits in weights.items()}, None)
    (directory / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    write_tokenizer(directory, "qwen", None)
    return directory


def _louder(name: str, kind: str, data: NDArray[Any]) -> NDArray[Any]:
    found = re.search("|".join(_LOUDER), name)
    if found is None:
        return data
    factor = np.float32(_LOUDER[found[0]])
    if kind != "BF16":
        scaled: NDArray[Any] = data * data.dtype.type(factor)
        return scaled
    wide: NDArray[np.float32] = (data.astype(np.uint32) << 16).view(np.float32) * factor
    return (wide.view(np.uint32) >> 16).astype(np.uint16)
