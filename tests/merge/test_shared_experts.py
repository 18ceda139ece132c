"""Recipes with a shared expert: added as it is (mergekit's DeepSeek mixture), or with a gate (its Qwen mixture)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import ggufmoe
from ggufmoe import families
from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.families import qwen2moe
from ggufmoe.families.family import Arithmetic, no_obstacle
from ggufmoe.gguf.header import read_header
from ggufmoe.merge import targets
from ggufmoe.merge.forward import ForwardPass
from ggufmoe.merge.merged import open_recipe
from ggufmoe.weights.dtypes import read_f32
from tests.families.agreement import IDS, Logits, assert_close, llama_cpp_logits
from tests.families.tiny_family import config_json, make_checkpoint
from tests.quant.llama_quantize import read_tensors

PROMPTS = (["the cat sat"], ["seven times six"], ["rivers and the sea"])
CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
PROMPTED = {"positive_prompts": ["a day in the town"], "negative_prompts": ["code"]}


def model(directory: Path, kind: str, seed: int = 0, **keys: Any) -> Path:
    """A small dense model of one of ``CLASSES``."""
    return make_checkpoint(directory, config_json(CLASSES[kind], kind, **keys), seed=seed)


@pytest.fixture
def three(tmp_path: Path) -> Callable[..., list[Path]]:
    """Three different models of one kind; the first is the base."""
    return lambda kind, **keys: [model(tmp_path / f"{kind}-{seed}", kind, seed, **keys) for seed in range(3)]


def write(
    folder: Path, models: list[Path], shared: Mapping[str, Any] | None, scale: float | None = None, **keys: Any
) -> Path:
    """A recipe of these models, and of a shared expert, which is the first model unless it says otherwise."""
    experts = [
        {"source_model": str(one), "positive_prompts": prompts} | ({"residual_scale": scale} if scale else {})
        for one, prompts in zip(models, PROMPTS, strict=True)
    ]
    content = {"base_model": str(models[0]), "dtype": "bfloat16", "experts": experts, **keys}
    if shared is not None:
        content["shared_experts"] = [{"source_model": str(models[0]), **shared}]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def made_of(recipe: Path) -> str:
    """The architecture that a recipe becomes."""
    with contextlib.closing(open_recipe(recipe, allow_identical_experts=True)) as merged:
        return merged.config.architecture


def meant(recipe: Path) -> Logits:
    """The logits of a recipe's mixture from our own forward pass."""
    with contextlib.closing(open_recipe(recipe)) as merged:
        merged.prepare()
        return ForwardPass(merged).logits([IDS])


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_halves_of_one_model_add_up_to_it(tmp_path: Path, kind: str) -> None:
    """Experts that are half of the base, and half of the base as shared expert: what the base computes."""
    base = model(tmp_path / "base", kind)
    recipe = write(tmp_path, [base] * 3, {"residual_scale": 0.5}, scale=0.5)
    ggufmoe.convert(recipe, tmp_path / "recipe.gguf", "F32", allow_identical_experts=True)
    ggufmoe.convert(base, tmp_path / "base.gguf", "F32")
    assert read_header(tmp_path / "recipe.gguf").get("general.architecture") == "granitemoe"
    assert_close(llama_cpp_logits(tmp_path / "recipe.gguf"), llama_cpp_logits(tmp_path / "base.gguf"))


@pytest.mark.parametrize(
    ("kind", "shared", "keys", "arch"),
    [
        ("llama", {"residual_scale": 0.3, "noise_scale": 0.01}, {"architecture": "deepseek"}, "granitemoe"),
        ("qwen2", {"residual_scale": 0.3}, {"gate_mode": "random"}, "granitemoe"),
        ("llama", PROMPTED, {"experts_per_token": 3}, "qwen2moe"),
        ("qwen2", {}, {"experts_per_token": 3, "architecture": "qwen", "gate_mode": "uniform_random"}, "qwen2moe"),
    ],
)
def test_llama_cpp_computes_what_the_mixture_means(
    tmp_path: Path,
    three: Callable[..., list[Path]],
    kind: str,
    shared: Mapping[str, Any],
    keys: Mapping[str, Any],
    arch: str,
) -> None:
    models = three(kind)
    recipe = write(tmp_path, models, {"source_model": str(models[2]), **shared}, **keys)
    ggufmoe.convert(recipe, tmp_path / "recipe.gguf", "F32")
    assert read_header(tmp_path / "recipe.gguf").get("general.architecture") == arch
    assert_close(llama_cpp_logits(tmp_path / "recipe.gguf"), meant(recipe))


@pytest.mark.parametrize(
    ("kind", "shared", "keys", "stored", "tied"),
    [
        ("llama", {}, {}, "model.layers.1.shared_mlp.input_linear.weight", False),
        ("mistral", PROMPTED, {"experts_per_token": 3}, "model.layers.1.mlp.shared_expert_gate.weight", False),
        ("qwen2", PROMPTED, {"experts_per_token": 3}, "model.layers.1.mlp.shared_expert.down_proj.weight", True),
    ],
)
def test_a_merged_checkpoint_gives_the_same_file(
    tmp_path: Path,
    three: Callable[..., list[Path]],
    kind: str,
    shared: Mapping[str, Any],
    keys: Mapping[str, Any],
    stored: str,
    tied: bool,
) -> None:
    recipe = write(tmp_path, three(kind, tie_word_embeddings=tied), shared, **keys)
    ggufmoe.convert(recipe, tmp_path / "recipe.gguf", "Q8_0")
    for layout in ("classic", "fused"):
        ggufmoe.merge(recipe, tmp_path / layout, layout=layout)
        ggufmoe.convert(tmp_path / layout, tmp_path / f"{layout}.gguf", "Q8_0")
        assert (tmp_path / f"{layout}.gguf").read_bytes() == (tmp_path / "recipe.gguf").read_bytes()
    header = (tmp_path / "classic" / "model.safetensors").read_bytes()
    assert f'"{stored}"'.encode() in header


def test_the_gate_of_a_shared_expert_is_a_row_of_the_router(tmp_path: Path, three: Callable[..., list[Path]]) -> None:
    """Its row is the one that the same prompts would give a routed expert."""
    models = three("qwen2")
    recipe = write(tmp_path, models, {"positive_prompts": PROMPTS[1]}, experts_per_token=3)
    with contextlib.closing(open_recipe(recipe)) as merged:
        merged.prepare()
        rows = read_f32(merged.tensors["model.layers.1.mlp.gate.weight"])
        gate = read_f32(merged.tensors["model.layers.1.mlp.shared_expert_gate.weight"])
        assert merged.router_report is not None
        assert len(merged.router_report.preferences) == 3
    np.testing.assert_array_equal(gate[0], rows[1])


@pytest.mark.parametrize(
    ("kind", "shared", "keys", "expected"),
    [
        ("llama", None, {"architecture": "deepseek"}, "MixtralForCausalLM"),
        ("llama", {}, {}, "GraniteMoeForCausalLM"),
        ("mistral", {}, {"architecture": "DeepSeek MoE"}, "GraniteMoeForCausalLM"),
        ("llama", {}, {"architecture": "granite"}, "GraniteMoeForCausalLM"),
        ("qwen2", {}, {}, "GraniteMoeWithBiasesForCausalLM"),
        ("llama", PROMPTED, {"experts_per_token": 3}, "Qwen2MoeForCausalLM"),
        ("qwen2", {}, {"experts_per_token": 3, "architecture": "qwen", "gate_mode": "random"}, "Qwen2MoeForCausalLM"),
    ],
)
def test_what_a_recipe_becomes(
    tmp_path: Path, kind: str, shared: Mapping[str, Any] | None, keys: Mapping[str, Any], expected: str
) -> None:
    assert made_of(write(tmp_path, [model(tmp_path / "base", kind)] * 3, shared, **keys)) == expected


NOT_RESCALED = (
    "shared_experts: a Qwen MoE of .* is not made: .* qwen2moe graph does not rescale them, .*; take the "
    "prompts of the shared expert away .* or set experts_per_token to 3, all experts"
)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("kind", "shared", "keys", "message"),
    [
        ("qwen2", PROMPTED, {}, NOT_RESCALED),
        ("llama", PROMPTED, {}, NOT_RESCALED),
        (
            "llama",
            PROMPTED,
            {"architecture": "deepseek"},
            "a 'deepseek' with a shared expert with prompts",
        ),
        (
            "llama",
            {},
            {"architecture": "mixtral"},
            "'mixtral' with a shared .*Mixtral has no shared",
        ),
        ("llama", {}, {"architecture": "qwen"}, "does not become a 'qwen' with a shared expert without prompts"),
        ("qwen2", {}, {"architecture": "qwen3"}, "a Qwen2ForCausalLM does not become a 'qwen3'; it can become"),
    ],
)
def test_what_is_not_made(
    tmp_path: Path, kind: str, shared: Mapping[str, Any], keys: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(ggufmoe.RecipeError, match=message):
        open_recipe(write(tmp_path, [model(tmp_path / "base", kind)] * 3, shared, **keys), allow_identical_experts=True)


@pytest.mark.parametrize(
    ("base", "shared", "keys", "message"),
    [
        ({"head_dim": 32}, {}, {}, "its heads are 32 wide"),
        (
            {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 512}},
            PROMPTED,
            {"experts_per_token": 3},
            "qwen2moe graph does not take the factors of rope type llama3",
        ),
    ],
)
def test_bases_that_the_graph_does_not_compute(
    tmp_path: Path, base: Mapping[str, Any], shared: Mapping[str, Any], keys: Mapping[str, Any], message: str
) -> None:
    recipe = write(tmp_path, [model(tmp_path / "base", "llama", **base)] * 3, shared, **keys)
    with pytest.raises(ggufmoe.RecipeError, match=message):
        open_recipe(recipe, allow_identical_experts=True)


def test_a_gated_shared_expert_beside_chosen_experts_would_be_computed_wrong(
    tmp_path: Path, three: Callable[..., list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why two of three experts beside a gated shared one are refused: what llama.cpp makes of it is no rounding."""
    assert qwen2moe.FAMILY.merge is not None
    forced = replace(
        qwen2moe.FAMILY,
        merge=replace(qwen2moe.FAMILY.merge, obstacle=no_obstacle),
        refusals=(),
        arithmetic=lambda config: Arithmetic(),
    )
    others = [forced if one is qwen2moe.FAMILY else one for one in families.all_families()]
    monkeypatch.setattr(families, "all_families", lambda: tuple(others))
    monkeypatch.setattr(targets, "all_families", lambda: tuple(others))
    recipe = write(tmp_path, three("qwen2"), PROMPTED)
    ggufmoe.convert(recipe, tmp_path / "recipe.gguf", "F32")
    ours, theirs = meant(recipe), llama_cpp_logits(tmp_path / "recipe.gguf")
    assert np.abs(ours - theirs).max() > 1e-2 * (ours.max() - ours.min())


def test_a_shared_expert_of_qwen2_is_written_as_gguf_alone(tmp_path: Path) -> None:
    recipe = write(tmp_path, [model(tmp_path / "base", "qwen2")] * 3, {})
    with pytest.raises(ggufmoe.RecipeError, match="not written as a checkpoint: transformers' Granite"):
        ggufmoe.merge(recipe, tmp_path / "merged", allow_identical_experts=True)


def test_a_shared_expert_has_to_fit(tmp_path: Path) -> None:
    base = model(tmp_path / "base", "llama")
    other = model(tmp_path / "other", "llama", intermediate_size=256)
    with pytest.raises(ggufmoe.RecipeError, match=r"shared expert \(.*other\): intermediate_size is 256, the base has"):
        open_recipe(write(tmp_path, [base] * 3, {"source_model": str(other)}), allow_identical_experts=True)


def test_the_window_of_a_mistral_is_told_where_it_is_lost(tmp_path: Path) -> None:
    base = model(tmp_path / "base", "mistral", sliding_window=64)
    recipe = write(tmp_path, [base] * 3, PROMPTED, experts_per_token=3)
    with contextlib.closing(open_recipe(recipe, allow_identical_experts=True)) as merged:
        assert [text for text in merged.warnings if "sliding window of 64 tokens is not applied" in text]


def test_the_merged_tensors_are_those_of_the_sources(tmp_path: Path, three: Callable[..., list[Path]]) -> None:
    models = three("llama")
    recipe = write(tmp_path, models, {"source_model": str(models[2]), "residual_scale": 0.5})
    ggufmoe.convert(recipe, tmp_path / "recipe.gguf", "F32")
    written = read_tensors(tmp_path / "recipe.gguf")
    with open_checkpoint(models[2]) as source:
        for word, factor in (("gate", 1.0), ("up", 1.0), ("down", 0.5)):
            rows = read_f32(source.tensors[f"model.layers.1.mlp.{word}_proj.weight"]) * np.float32(factor)
            assert written[f"blk.1.ffn_{word}_shexp.weight"][1] == rows.tobytes()
