"""A family is one file: one that is dropped into the package is converted, merged and run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import ggufmoe
from ggufmoe import families
from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.merge.forward import ForwardPass
from tests.families.tiny_family import config_json, make_checkpoint

MODULE = '''
"""A made-up family with biases and names of its own, which llama.cpp's llama graph runs."""

from dataclasses import replace

from ggufmoe.families.family import FusedTensor, MergeTarget, StoredLayout
from ggufmoe.families.llama import FAMILY as LLAMA, LLAMA_KEYS
from ggufmoe.families.standard import (
    NORMS, attention, common_parameters, decoder, experts, feed_forward, no_bias, only_silu, size_of,
)
from ggufmoe.families.family import ConfigKey, Refusal

_ATTENTION = (*NORMS, *attention(rope_order=True, biases="qkv"))
_EXPERTS = experts(module="mixture", words=("into", "beside", "back"))
%s
'''
DENSE = """
FAMILY = replace(
    LLAMA,
    architectures=("WolpertingerForCausalLM",),
    model_types=("wolpertinger",),
    tensors=decoder(*_ATTENTION, *feed_forward(module="antler")),
    aliases={"num_hidden_layers": ("n_storeys",)},
    keys=(ConfigKey("n_wings"),),
    refusals=(only_silu(), Refusal("flies", (True, None), "true: those that do not fly are rabbits")),
)
"""
MIXTURE = """
FAMILY = replace(
    LLAMA,
    architectures=("WolpertingerHerdForCausalLM",),
    model_types=("wolpertinger_herd",),
    tensors=decoder(*_ATTENTION, *_EXPERTS),
    hyper_parameters=(*common_parameters(), *LLAMA_KEYS),
    layouts=(
        StoredLayout("classic"),
        StoredLayout(
            "fused",
            fused=(
                FusedTensor(
                    "model.layers.{layer}.mixture.both", (_EXPERTS[1].hf, _EXPERTS[2].hf), transposed=True,
                    interleaved=True,
                ),
                FusedTensor("model.layers.{layer}.mixture.back", (_EXPERTS[3].hf,)),
            ),
        ),
    ),
    merge=MergeTarget(
        "Herd",
        ("WolpertingerForCausalLM",),
        lambda base, n_expert, n_used: {"num_local_experts": n_expert, "num_experts_per_tok": n_used},
    ),
)
"""


@pytest.fixture
def dropped_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package of families with one more module for each of the two, gone again after the test."""
    folder = tmp_path / "package"
    folder.mkdir()
    names = {"wolpertinger": DENSE, "wolpertinger_herd": MIXTURE}
    for name, text in names.items():
        (folder / f"{name}.py").write_text(MODULE % text, encoding="utf-8")
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(folder)])
    families.all_families.cache_clear()
    yield
    families.all_families.cache_clear()
    for name in names:
        sys.modules.pop(f"{families.__name__}.{name}", None)


def dense(directory: Path, seed: int = 0) -> Path:
    config = config_json("WolpertingerForCausalLM", "wolpertinger", n_wings=2, num_hidden_layers=..., n_storeys=2)
    return make_checkpoint(directory, config, seed=seed)


def logits_of(gguf: Path, ids: list[int]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    context = ggufmoe.ContextOptions(n_ctx=64, flash_attn="off", cache_type_k="f32", cache_type_v="f32")
    with ggufmoe.Engine(gguf, context, ggufmoe.OffloadOptions(n_gpu_layers=0)) as engine:
        return np.asarray(engine.logits(ids))


def close(ours: np.ndarray[tuple[int, ...], np.dtype[np.float32]], theirs: object) -> bool:
    spread = float(ours.max() - ours.min())
    return bool(np.abs(ours - np.asarray(theirs)).max() < 1e-3 * spread)


IDS = [1, 50, 60, 70, 80, 90]


@pytest.mark.usefixtures("dropped_in")
def test_a_dense_family_is_converted_and_run(tmp_path: Path) -> None:
    source = dense(tmp_path / "model")
    ggufmoe.convert(source, tmp_path / "model.gguf", "F32")
    with open_checkpoint(source) as model:
        assert model.config.size("n_wings") == 2
        assert "model.layers.1.antler.up_proj.weight" in model.tensors
        expected = ForwardPass(model).logits([IDS])
    assert close(logits_of(tmp_path / "model.gguf", IDS), expected)


@pytest.mark.usefixtures("dropped_in")
def test_its_configuration_is_checked(tmp_path: Path) -> None:
    config = config_json("WolpertingerForCausalLM", "wolpertinger", n_wings=2, flies=False)
    with pytest.raises(ggufmoe.CheckpointError, match=r"flies is False, expected true: those that do not fly"):
        ggufmoe.convert(make_checkpoint_of(tmp_path, config), tmp_path / "x.gguf")
    config = config_json("WolpertingerForCausalLM", "wolpertinger")
    with pytest.raises(ggufmoe.CheckpointError, match="has no n_wings"):
        ggufmoe.convert(make_checkpoint_of(tmp_path, config), tmp_path / "x.gguf")


def make_checkpoint_of(directory: Path, config: dict[str, object]) -> Path:
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


@pytest.mark.usefixtures("dropped_in")
def test_a_mixture_gives_one_file_from_both_layouts(tmp_path: Path) -> None:
    config = config_json("WolpertingerHerdForCausalLM", "wolpertinger_herd", num_local_experts=4, num_experts_per_tok=2)
    for layout in ("classic", "fused"):
        make_checkpoint(tmp_path / layout / "model", config, layout=layout)
        ggufmoe.convert(tmp_path / layout / "model", tmp_path / f"{layout}.gguf", "Q8_0")
    assert (tmp_path / "classic.gguf").read_bytes() == (tmp_path / "fused.gguf").read_bytes()


@pytest.mark.usefixtures("dropped_in")
def test_a_recipe_becomes_the_mixture_that_the_file_describes(tmp_path: Path) -> None:
    base = dense(tmp_path / "base")
    (tmp_path / "recipe.yaml").write_text(
        f"base_model: {base}\ngate_mode: hidden\ndtype: bfloat16\nexperts:\n"
        f"  - {{source_model: {base}, positive_prompts: [the cat]}}\n"
        f"  - {{source_model: {base}, positive_prompts: [a number]}}\n",
        encoding="utf-8",
    )
    ggufmoe.convert(tmp_path / "recipe.yaml", tmp_path / "recipe.gguf", "F32", allow_identical_experts=True)
    ggufmoe.merge(tmp_path / "recipe.yaml", tmp_path / "herd", allow_identical_experts=True)
    with open_checkpoint(tmp_path / "herd") as merged:
        assert merged.config.architecture == "WolpertingerHerdForCausalLM"
        assert "model.layers.0.mixture.experts.1.beside.weight" in merged.tensors
    ggufmoe.convert(base, tmp_path / "base.gguf", "F32")
    # experts that are all the base compute what the base computes
    assert close(logits_of(tmp_path / "recipe.gguf", IDS), logits_of(tmp_path / "base.gguf", IDS))


def test_the_family_is_gone_again() -> None:
    assert not [family for family in families.all_families() if "Wolpertinger" in family.architecture]
