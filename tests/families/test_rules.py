"""What rules of tensors and of configurations can say, each on a made-up family."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ggufmoe
from ggufmoe import families
from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.errors import TensorMismatchError
from ggufmoe.export.model_tensors import model_tensors
from ggufmoe.families import llama
from ggufmoe.families.family import (
    ConfigKey,
    Family,
    FusedTensor,
    Kind,
    Refusal,
    SkippedTensors,
    StoredLayout,
    TensorRule,
    TokenizerRules,
    always,
)
from ggufmoe.families.standard import NORMS, attention, decoder, feed_forward, key_width, matrix, n_embd, vector
from ggufmoe.gguf.header import read_header
from ggufmoe.gguf.types import GGMLType
from ggufmoe.gguf.upstream import MODEL_TENSOR
from ggufmoe.weights.dtypes import read_f32, row_count
from ggufmoe.weights.views import PickedRows, Transposed
from tests import tiny
from tests.families.tiny_family import config_json, make_checkpoint

Use = Callable[..., Family]
LAYER = "model.layers.{layer}."


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """Makes the only family one that differs from Llama in the fields given."""

    def make(**fields: Any) -> Family:
        family = replace(llama.FAMILY, architectures=("AxolotlForCausalLM",), model_types=("axolotl",), **fields)
        monkeypatch.setattr(families, "all_families", lambda: (family,))
        return family

    return make


def config(**keys: Any) -> dict[str, Any]:
    return config_json("AxolotlForCausalLM", "axolotl", **{"num_hidden_layers": 1, **keys})


def stored(directory: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A checkpoint whose stored tensors were changed after it was made."""
    with open_checkpoint(make_checkpoint(directory, config())) as model:
        tensors: dict[str, Any] = {}
        for name, tensor in model.tensors.items():
            bits = np.empty((row_count(tensor.shape), tensor.shape[-1]), np.uint16)
            tensor.read_rows(0, len(bits), bits)
            tensors[name] = ("BF16", bits.reshape(tensor.shape))
    change(tensors)
    tiny.write_safetensors(directory / "model.safetensors", tensors)
    return directory


def test_two_rules_split_one_tensor(use: Use, tmp_path: Path) -> None:
    def half(first: int) -> Callable[..., Any]:
        return lambda source, config: PickedRows(source, np.arange(first, first + 64))

    kv, both = f"{LAYER}self_attn.kv.weight", matrix(lambda config: 2 * key_width(config), n_embd)
    rules = [rule for rule in attention() if rule.tensor not in (MODEL_TENSOR.ATTN_K, MODEL_TENSOR.ATTN_V)]
    use(
        tensors=decoder(
            *NORMS,
            *rules,
            TensorRule(MODEL_TENSOR.ATTN_K, kv, both, transform=half(0)),
            TensorRule(MODEL_TENSOR.ATTN_V, kv, both, transform=lambda source, _: Transposed(source)),
            *feed_forward(),
        )
    )
    with open_checkpoint(make_checkpoint(tmp_path, config())) as model:
        whole = read_f32(model.tensors["model.layers.0.self_attn.kv.weight"])
        tensors = {tensor.name: tensor for tensor in model_tensors(model)}
        k, v = tensors["blk.0.attn_k.weight"], tensors["blk.0.attn_v.weight"]
        assert np.array_equal(read_f32(k.parts[0]), whole[:64])
        assert np.array_equal(read_f32(v.parts[0]), whole.T)
        assert v.shape == whole.T.shape


def test_a_fused_tensor_outside_of_the_experts(use: Use, tmp_path: Path) -> None:
    rules = attention()
    layout = StoredLayout("fused", fused=(FusedTensor(f"{LAYER}self_attn.qkv.weight", tuple(r.hf for r in rules[:3])),))
    use(tensors=decoder(*NORMS, *rules, *feed_forward()), layouts=(StoredLayout("classic"), layout))
    for name in ("classic", "fused"):
        ggufmoe.convert(
            make_checkpoint(tmp_path / name / "m", config(), layout=name), tmp_path / f"{name}.gguf", "BF16"
        )
    assert (tmp_path / "classic.gguf").read_bytes() == (tmp_path / "fused.gguf").read_bytes()


def test_optional_tensors_and_other_spellings(use: Use, tmp_path: Path) -> None:
    sinks = TensorRule(
        MODEL_TENSOR.ATTN_SINKS, f"{LAYER}self_attn.sinks", vector(lambda config: config.n_head), optional=always,
        spellings=(f"{LAYER}self_attn.drains",),
    )  # fmt: skip
    use(tensors=decoder(*NORMS, *attention(), sinks, *feed_forward()))
    with open_checkpoint(make_checkpoint(tmp_path / "none", config())) as model:
        assert "blk.0.attn_sinks.weight" not in {tensor.name for tensor in model_tensors(model)}
    for spelling in ("sinks", "drains"):
        name = f"model.layers.0.self_attn.{spelling}"
        directory = stored(tmp_path / spelling, lambda t, name=name: t.update({name: ("BF16", np.ones(4, np.uint16))}))  # type: ignore[misc]
        with open_checkpoint(directory) as model:
            (found,) = [tensor for tensor in model_tensors(model) if tensor.name == "blk.0.attn_sinks.weight"]
        assert (found.shape, found.source_type) == ((4,), GGMLType.F32)


def test_what_is_left_out_is_told(use: Use, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    skipped = SkippedTensors(lambda config, name: name.startswith("mtp."), "they predict further tokens")
    use(skipped=(skipped,))
    extra = {f"mtp.{i}.weight": ("BF16", np.zeros((2, 2), np.uint16)) for i in range(3)}
    with open_checkpoint(stored(tmp_path, lambda tensors: tensors.update(extra))) as model:
        assert not any(name.startswith("mtp.") for name in model.tensors)
    assert "leaves out 3 tensors: they predict further tokens" in caplog.text
    use()
    with pytest.raises(TensorMismatchError, match=r"left over: mtp\.0\.weight, mtp\.1\.weight, mtp\.2\.weight"):
        open_checkpoint(tmp_path)


def test_a_layer_beyond_the_last(use: Use, tmp_path: Path) -> None:
    last = TensorRule(
        MODEL_TENSOR.NEXTN_ENORM, f"{LAYER}enorm.weight", vector(n_embd), where=lambda config, layer: layer == 1
    )
    inner = tuple(
        replace(rule, where=lambda config, layer: layer < 1) for rule in (*NORMS, *attention(), *feed_forward())
    )
    use(tensors=decoder(*inner, last), n_blocks=lambda config: config.n_layer + 1)
    with open_checkpoint(make_checkpoint(tmp_path, config())) as model:
        names = {tensor.name for tensor in model_tensors(model)}
    assert {name for name in names if name.startswith("blk.1.")} == {"blk.1.nextn.enorm.weight"}


def test_which_tensors_stay_float32(use: Use, tmp_path: Path) -> None:
    square = matrix(n_embd, n_embd)
    rules = (
        TensorRule(MODEL_TENSOR.SSM_CONV1D, f"{LAYER}conv.weight", square),
        TensorRule(MODEL_TENSOR.FFN_DOWN_EXP, f"{LAYER}down_bias", square, suffix=".bias"),
        TensorRule(MODEL_TENSOR.SSM_OUT, f"{LAYER}out.weight", square),
    )
    use(tensors=decoder(*NORMS, *attention(), *feed_forward(), *rules))
    ggufmoe.convert(make_checkpoint(tmp_path / "m", config()), tmp_path / "m.gguf", "BF16")
    types = {tensor.name: tensor.type.name for tensor in read_header(tmp_path / "m.gguf").tensors}
    assert types["blk.0.ssm_conv1d.weight"] == types["blk.0.ffn_down_exps.bias"] == "F32"
    assert types["blk.0.ssm_out.weight"] == types["blk.0.attn_q.weight"] == "BF16"


def test_special_tokens_that_a_family_fixes(use: Use, tmp_path: Path) -> None:
    use(tokenizer=TokenizerRules(as_llama=True, special_tokens={"eot": "a", "eom": "no such token"}))
    ggufmoe.convert(make_checkpoint(tmp_path / "m", config()), tmp_path / "m.gguf", "F32")
    header = read_header(tmp_path / "m.gguf")
    tokens = header.get("tokenizer.ggml.tokens")
    assert isinstance(tokens, list)
    assert header.get("tokenizer.ggml.eot_token_id") == tokens.index("a")
    assert header.get("tokenizer.ggml.eom_token_id") is None


def test_keys_of_a_configuration(use: Use, tmp_path: Path) -> None:
    keys = (
        ConfigKey("gills"), ConfigKey("legs", Kind.COUNT, 4), ConfigKey("length", Kind.NUMBER, None),
        ConfigKey("pale", Kind.FLAG, False), ConfigKey("lake", Kind.TEXT, "Xochimilco"),
    )  # fmt: skip
    use(keys=keys, aliases={"legs": ("limbs", "feet")})
    with open_checkpoint(make_checkpoint(tmp_path, config(gills=6, feet=0, length=None, pale=True))) as model:
        assert dict(model.config.values) == {"gills": 6, "legs": 0, "length": None, "pale": True, "lake": "Xochimilco"}
    for wrong, message in (
        ({}, "has no gills"),
        ({"gills": 0}, "gills is 0, expected a whole number from 1"),
        ({"gills": 6, "feet": -1}, "feet is -1, expected a whole number from 0"),
        ({"gills": 6, "length": "long"}, "length is 'long', expected a number"),
        ({"gills": 6, "pale": "very"}, "pale is 'very', expected true or false"),
        ({"gills": 6, "lake": 7}, "lake is 7, expected a text"),
    ):
        with pytest.raises(ggufmoe.CheckpointError, match=message):
            make_checkpoint(tmp_path, config(**wrong))


def test_refusals_and_defaults(use: Use, tmp_path: Path) -> None:
    use(
        refusals=(Refusal("regrows", (True, None), "true: this one does"), Refusal("eyes", (2,), "2, as the graph has"))
    )
    make_checkpoint(tmp_path, config())
    make_checkpoint(tmp_path, config(regrows=None, eyes=2))
    for key, wrong, message in (
        ("regrows", 1, "regrows is 1, expected true"),
        ("eyes", None, "eyes is None, expected 2"),
    ):
        with pytest.raises(ggufmoe.CheckpointError, match=message):
            make_checkpoint(tmp_path, config(**{key: wrong}))
    use(refusals=(Refusal("regrows", (True,), "true: this one does"),), defaults={"regrows": False})
    with pytest.raises(ggufmoe.CheckpointError, match="regrows is None, expected true"):
        make_checkpoint(tmp_path, config())


def test_the_keys_of_a_language_model_in_a_larger_one(use: Use, tmp_path: Path) -> None:
    use(nested_config="text_config", rope_notes=frozenset({"sections"}))
    inner = config(rope_parameters={"rope_type": "default", "rope_theta": 5e5, "sections": [1, 2]}, rope_theta=...)
    inner["architectures"] = ["SomethingElse"]
    outer = {"architectures": ["AxolotlForCausalLM"], "model_type": "axolotl_with_eyes", "text_config": inner}
    with open_checkpoint(make_checkpoint(tmp_path, outer)) as model:
        assert (model.config.n_embd, model.config.rope_theta) == (256, 5e5)
        assert model.config.raw["rope_parameters"]["sections"] == [1, 2]


def test_a_part_of_each_head_is_rotated_only_where_the_graph_can(use: Use, tmp_path: Path) -> None:
    use()
    with pytest.raises(ggufmoe.CheckpointError, match="has 'partial_rotary_factor', which is not supported"):
        make_checkpoint(tmp_path, config(partial_rotary_factor=0.5))
    use(rotary_fraction=0.25)
    for stated, expected in ((..., 0.25), (0.5, 0.5), (1, 1.0)):
        with open_checkpoint(make_checkpoint(tmp_path, config(partial_rotary_factor=stated))) as model:
            assert model.config.rotary_fraction == expected


def test_every_family_is_found_by_each_of_its_names() -> None:
    for family in families.all_families():
        for name in (*family.architectures, families.headless(family.architecture)):
            assert families.family_named(name) is family
        for model_type in family.model_types:
            assert families.family_named(None, model_type) is family
    assert families.family_named("NoSuchForCausalLM") is None


def test_no_two_families_share_a_name() -> None:
    found = [name for family in families.all_families() for name in (*family.architectures, *family.model_types)]
    assert len(found) == len(set(found))
    targets = [family.merge.name for family in families.all_families() if family.merge is not None]
    assert len(targets) == len(set(targets))


@pytest.mark.parametrize("family", families.all_families(), ids=lambda family: family.architecture)
def test_every_pattern_of_a_layout_belongs_to_a_rule(family: Family) -> None:
    names = {rule.hf for rule in family.tensors}
    for layout in family.layouts:
        assert set(layout.renamed) <= names
        assert {part for fused in layout.fused for part in fused.parts} <= names
    for rule in family.tensors:
        assert set(re.findall(r"\{(\w+)\}", rule.hf)) in (set(), {"layer"}, {"layer", "expert"})
