"""Recipes over Qwen2 become a Mixtral with biases, as GGUF files of the ``llama`` architecture."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ggufmoe
from ggufmoe import families
from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.export import model_tensors
from ggufmoe.families.family import BIAS, TensorRule, unchanged
from ggufmoe.families.mixtral_biased import FAMILY
from ggufmoe.gguf.header import read_header
from ggufmoe.gguf.types import GGMLType
from ggufmoe.merge.forward import ForwardPass
from ggufmoe.merge.merged import open_recipe
from ggufmoe.merge.recipe import load_recipe
from ggufmoe.merge.router import make_router
from ggufmoe.weights.dtypes import read_f32
from tests import tiny, tiny_tokenizers
from tests.families.agreement import (
    IDS,
    Logits,
    assert_close,
    check_quantized,
    check_recipe_computes_its_model,
    llama_cpp_logits,
    write_recipe,
)
from tests.families.tiny_family import config_json, make_checkpoint
from tests.quant.llama_quantize import read_tensors

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def model(directory: Path, seed: int = 0, **keys: Any) -> Path:
    """A Qwen2 with a tokenizer of Qwen2's kind and a chat template."""
    tokens = {
        "vocab_size": tiny_tokenizers.vocabulary_size("qwen"),
        "bos_token_id": None,
        "eos_token_id": tiny_tokenizers.special_ids("qwen")[1],
    }
    config = config_json("Qwen2ForCausalLM", "qwen2", **{**tokens, **keys})
    make_checkpoint(directory, config, seed=seed)
    (directory / "tokenizer.model").unlink(missing_ok=True)
    tiny.write_tokenizer(directory, "qwen", TEMPLATE)
    return directory


def three(directory: Path, **recipe: Any) -> Path:
    """A recipe of three different models, two of which answer a token."""
    models = [model(directory / f"model-{seed}", seed) for seed in range(3)]
    return write_recipe(directory / "recipe.yaml", *models, **recipe)


def two(directory: Path, base: Path, **recipe: Any) -> Path:
    """A recipe of a base and another model."""
    return write_recipe(directory / "recipe.yaml", base, model(directory / "other", 1), **recipe)


def merged_logits(recipe: Path) -> Logits:
    """The logits of a recipe's mixture from our own forward pass."""
    with contextlib.closing(open_recipe(recipe)) as merged:
        merged.prepare()
        return ForwardPass(merged).logits([IDS])


@pytest.mark.parametrize("keys", [{}, {"tie_word_embeddings": True}])
def test_identical_experts_compute_what_the_model_computes(tmp_path: Path, keys: dict[str, Any]) -> None:
    check_recipe_computes_its_model(model(tmp_path / "base", **keys), tmp_path)


@pytest.mark.parametrize("mode", ["hidden", "cheap_embed", "random"])
def test_different_experts_compute_what_the_mixture_means(tmp_path: Path, mode: str) -> None:
    recipe = three(tmp_path, gate_mode=mode)
    ggufmoe.convert(recipe, tmp_path / "merged.gguf", "F32")
    assert_close(llama_cpp_logits(tmp_path / "merged.gguf"), merged_logits(recipe))


def without_biases(rule: TensorRule) -> TensorRule | None:
    return None if rule.suffix == BIAS else rule


def in_the_order_of_the_checkpoint(rule: TensorRule) -> TensorRule | None:
    return replace(rule, transform=unchanged) if rule.suffix == BIAS else rule


@pytest.mark.parametrize("wrong", [without_biases, in_the_order_of_the_checkpoint])
def test_the_logits_tell_wrong_biases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: Callable[[TensorRule], TensorRule | None]
) -> None:
    recipe = three(tmp_path, gate_mode="random")
    changed = replace(FAMILY, tensors=tuple(rule for rule in map(wrong, FAMILY.tensors) if rule is not None))
    with monkeypatch.context() as patched:
        patched.setattr(model_tensors, "family_of", lambda _: changed)
        ggufmoe.convert(recipe, tmp_path / "wrong.gguf", "F32")
    with pytest.raises(AssertionError):
        assert_close(llama_cpp_logits(tmp_path / "wrong.gguf"), merged_logits(recipe))


def test_queries_and_keys_and_their_biases_are_in_rope_order(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    ggufmoe.convert(two(tmp_path, base), tmp_path / "merged.gguf", "F32")
    written = read_tensors(tmp_path / "merged.gguf")
    with open_checkpoint(base) as source:
        for letter in "qkv":
            for kind, n_cols in (("weight", 256), ("bias", 1)):
                stored = read_f32(source.tensors[f"model.layers.1.self_attn.{letter}_proj.{kind}"])
                halves = stored.reshape(-1, 2, 32, n_cols)
                expected = halves if letter == "v" else halves.swapaxes(1, 2)
                assert written[f"blk.1.attn_{letter}.{kind}"] == (GGMLType.F32, expected.tobytes())


def test_names_and_keys(tmp_path: Path) -> None:
    base = model(tmp_path / "base", rms_norm_eps=1e-6, rope_theta=1e6)
    ggufmoe.convert(two(tmp_path, base), tmp_path / "merged.gguf", "F32")
    ggufmoe.convert(base, tmp_path / "base.gguf", "F32")
    merged, dense = read_header(tmp_path / "merged.gguf"), read_header(tmp_path / "base.gguf")
    assert merged.get("general.architecture") == "llama"
    values = [merged.get(f"llama.{key}") for key in ("expert_count", "expert_used_count", "rope.freq_base")]
    assert values == [2, 2, 1e6]
    assert {t.name for t in merged.tensors if t.name.startswith("blk.0.")} == {
        *(f"blk.0.{name}.weight" for name in ("attn_norm", "attn_output", "ffn_norm", "ffn_gate_inp")),
        *(f"blk.0.ffn_{name}_exps.weight" for name in ("gate", "up", "down")),
        *(f"blk.0.attn_{letter}.{kind}" for letter in "qkv" for kind in ("weight", "bias")),
    }
    words = {key: value for key, value in dense.metadata.items() if key.startswith("tokenizer.")}
    assert {key: value for key, value in merged.metadata.items() if key.startswith("tokenizer.")} == words
    assert words["tokenizer.chat_template"].value == TEMPLATE


@pytest.mark.parametrize("file_type", ["Q4_K_M", "IQ4_XS"])
def test_quantized_as_by_llama_cpp(tmp_path: Path, file_type: str) -> None:
    check_quantized(three(tmp_path), tmp_path, file_type)


def test_rows_of_the_router_depend_on_the_biases(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    recipe = load_recipe(two(tmp_path, base))[0]
    with open_checkpoint(base) as source:
        with_biases = make_router(recipe, source).rows
        tensors = {name: one for name, one in source.tensors.items() if not name.endswith(BIAS)}
        without = make_router(recipe, replace(source, tensors=tensors)).rows
    np.testing.assert_array_equal(with_biases[0], without[0])
    assert np.abs(with_biases[1] - without[1]).max() > 1e-3


def test_no_checkpoint_is_made_of_it(tmp_path: Path) -> None:
    recipe = two(tmp_path, model(tmp_path / "base"))
    message = r"recipe\.yaml: a merge of Qwen2ForCausalLM models is not written as a checkpoint: transformers' Mixtral"
    with pytest.raises(ggufmoe.RecipeError, match=message) as error:
        ggufmoe.merge(recipe, tmp_path / "merged")
    assert f"`ggufmoe convert {recipe}` writes it as a GGUF file" in str(error.value)
    assert not list(tmp_path.glob("merged*"))


@pytest.mark.parametrize("name", ["mixtral", "Mixtral with biases"])
def test_a_recipe_may_name_it(tmp_path: Path, name: str) -> None:
    recipe = two(tmp_path, model(tmp_path / "base"), architecture=name)
    with contextlib.closing(open_recipe(recipe)) as merged:
        assert merged.config.architecture == FAMILY.architecture


def test_a_recipe_over_qwen2_does_not_become_a_qwen_moe(tmp_path: Path) -> None:
    recipe = two(tmp_path, model(tmp_path / "base"), architecture="qwen")
    message = r"a Qwen2ForCausalLM does not become a 'qwen' with no shared expert: .* Mixtral with biases has no shared"
    with pytest.raises(ggufmoe.RecipeError, match=message):
        open_recipe(recipe)


def test_a_window_that_is_not_switched_on_is_not_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for switched in (False, True):
        base = model(tmp_path / f"base-{switched}", sliding_window=64, use_sliding_window=switched)
        caplog.clear()
        ggufmoe.convert(two(tmp_path, base), tmp_path / f"{switched}.gguf", "F32")
        assert ("the last 64 tokens only" in caplog.text) is switched


def test_it_is_not_named_as_supported() -> None:
    assert FAMILY.architecture not in families.supported()
