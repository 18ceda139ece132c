"""Names, shapes and row order of every family, against what llama.cpp's converter does."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.checkpoint.source import ModelSource
from ggufmoe.errors import ArchitectureError
from ggufmoe.export.model_tensors import ModelTensor, model_tensors
from ggufmoe.families import family_of
from ggufmoe.families.model_config import ModelConfig, RopeScaling
from ggufmoe.families.rope_keys import llama3_rope_factors
from ggufmoe.gguf.types import GGMLType, ValueType
from ggufmoe.weights.dtypes import read_f32
from ggufmoe.weights.source_tensor import Dtype, SourceTensor
from ggufmoe.weights.views import Computed, RopeOrdered

Make = Callable[..., Path]


@contextmanager
def opened(directory: Path) -> Iterator[ModelSource]:
    source = open_checkpoint(str(directory))
    try:
        yield source
    finally:
        source.close()


def exported(source: ModelSource) -> dict[str, ModelTensor]:
    return {tensor.name: tensor for tensor in model_tensors(source)}


def test_a_mixtral_has_stacked_experts_and_a_router(tiny_checkpoint: Make) -> None:
    with opened(tiny_checkpoint(n_expert=3, n_layer=1)) as source:
        tensors = exported(source)
        assert {name: tensor.shape for name, tensor in tensors.items()} == {
            "token_embd.weight": (400, 256),
            "output_norm.weight": (256,),
            "output.weight": (400, 256),
            "blk.0.attn_norm.weight": (256,),
            "blk.0.ffn_norm.weight": (256,),
            "blk.0.attn_q.weight": (256, 256),
            "blk.0.attn_k.weight": (128, 256),
            "blk.0.attn_v.weight": (128, 256),
            "blk.0.attn_output.weight": (256, 256),
            "blk.0.ffn_gate_inp.weight": (3, 256),
            "blk.0.ffn_gate_exps.weight": (3, 512, 256),
            "blk.0.ffn_up_exps.weight": (3, 512, 256),
            "blk.0.ffn_down_exps.weight": (3, 256, 512),
        }
        stem = "model.layers.0.block_sparse_moe.experts"
        for name, part in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
            parts = [part.name for part in tensors[f"blk.0.ffn_{name}_exps.weight"].parts]
            assert parts == [f"{stem}.{expert}.{part}.weight" for expert in range(3)]


@pytest.mark.parametrize("arch", ["llama", "mistral"])
def test_a_dense_model_has_one_feed_forward_part(tiny_checkpoint: Make, arch: str) -> None:
    with opened(tiny_checkpoint(arch=arch, n_layer=1, tie=True)) as source:
        tensors = exported(source)
        assert "output.weight" not in tensors
        assert tensors["blk.0.ffn_gate.weight"].shape == tensors["blk.0.ffn_up.weight"].shape == (512, 256)
        assert tensors["blk.0.ffn_down.weight"].shape == (256, 512)
        assert "blk.0.ffn_gate_inp.weight" not in tensors


def test_the_lossless_type_is_the_dtype_but_for_vectors_and_the_router(tiny_checkpoint: Make) -> None:
    for dtype in ("BF16", "F16", "F32"):
        with opened(tiny_checkpoint(dtype=dtype, n_layer=1)) as source:
            types = {name: tensor.source_type for name, tensor in exported(source).items()}
            assert types["blk.0.ffn_up_exps.weight"] is types["token_embd.weight"] is GGMLType[dtype]
            assert types["blk.0.ffn_gate_inp.weight"] is types["output_norm.weight"] is GGMLType.F32


def test_a_stack_of_experts_of_different_dtypes_is_lossless_only_in_f32() -> None:
    parts = tuple(
        cast(SourceTensor, SimpleNamespace(name=dtype.value, dtype=dtype, shape=(2, 4)))
        for dtype in (Dtype.BF16, Dtype.F16)
    )
    assert ModelTensor("blk.0.ffn_up_exps.weight", (2, 2, 4), parts).source_type is GGMLType.F32


class Counted:
    """A source tensor whose every weight is the number of its row."""

    def __init__(self, n_rows: int) -> None:
        self.name, self.dtype, self.shape = "counted", Dtype.F32, (n_rows, 4)

    def read_rows(self, start: int, stop: int, out: Any) -> None:
        out[...] = np.arange(start, stop, dtype=np.float32)[:, None]


@pytest.mark.parametrize(("n_head", "head_dim"), [(3, 8), (2, 2), (4, 6)])
def test_rope_order_is_that_of_llama_cpp_whatever_rows_are_asked_for(n_head: int, head_dim: int) -> None:
    n_rows = n_head * head_dim
    rows = RopeOrdered(Counted(n_rows), head_dim)
    # conversion/llama.py: reshape(n_head, 2, rows / n_head / 2, cols).swapaxes(1, 2)
    expected = np.arange(n_rows).reshape(n_head, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)
    assert [rows.source_row(row) for row in range(n_rows)] == expected.tolist()
    for start in range(n_rows):
        for stop in range(start + 1, n_rows + 1):
            out = np.empty((stop - start, 4), np.float32)
            rows.read_rows(start, stop, out)
            assert out[:, 0].astype(int).tolist() == expected[start:stop].tolist()
            assert (out == out[:, :1]).all()


def test_query_and_key_rows_are_reordered_by_head_and_nothing_else_is(tiny_checkpoint: Make) -> None:
    with opened(tiny_checkpoint(n_layer=1)) as source:
        tensors = exported(source)
        for letter, n_head in (("q", 4), ("k", 2)):
            plain = read_f32(source.tensors[f"model.layers.0.self_attn.{letter}_proj.weight"])
            wanted = plain.reshape(n_head, 2, 32, 256).swapaxes(1, 2).reshape(plain.shape)
            assert np.array_equal(read_f32(tensors[f"blk.0.attn_{letter}.weight"].parts[0]), wanted)
        value = source.tensors["model.layers.0.self_attn.v_proj.weight"]
        assert tensors["blk.0.attn_v.weight"].parts == (value,)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


def test_llama3_rope_factors_are_those_of_the_converter(tiny_checkpoint: Make) -> None:
    directory = tiny_checkpoint(arch="llama", n_layer=1, n_embd=512, rope_theta=500000.0, rope_scaling=LLAMA3)
    with opened(directory) as source:
        factors = llama3_rope_factors(source.config)
        tensor = exported(source)["rope_freqs.weight"]
    # what torch 2.13 gives in conversion/llama.py for head_dim 128
    golden = np.array([1.9732791, 3.5685337, 7.698663], np.float32)
    assert np.array_equal(np.array(factors, np.float32)[[14, 16, 18]], golden)
    assert factors[:11] == [1.0] * 11
    assert factors[19:] == [8.0] * 45
    assert tensor.shape == (64,)
    assert np.array_equal(read_f32(tensor.parts[0])[0], np.array(factors, np.float32))


def test_computed_rows_are_float32() -> None:
    assert read_f32(Computed("x", [1, 2.5])).tolist() == [[1, 2.5]]


def test_an_unknown_architecture_is_named_with_what_is_supported(tiny_checkpoint: Make) -> None:
    with opened(tiny_checkpoint()) as source:
        config = replace(source.config, architecture="FalconForCausalLM")
    with pytest.raises(ArchitectureError, match="FalconForCausalLM cannot be exported; supported are ") as caught:
        family_of(config)
    for known in ("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM"):
        assert known in str(caught.value)


def parameters(config: ModelConfig) -> dict[str, Any]:
    return {key: value.value for key, value in family_of(config).metadata(config).items()}


def test_hyper_parameters_of_a_mixtral(tiny_checkpoint: Make) -> None:
    with opened(tiny_checkpoint(n_expert=3, rope_theta=1e6)) as source:
        keys = family_of(source.config).metadata(source.config)
    assert {key: value.value for key, value in keys.items()} == {
        "llama.block_count": 2,
        "llama.context_length": 2048,
        "llama.embedding_length": 256,
        "llama.feed_forward_length": 512,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.freq_base": 1e6,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.expert_count": 3,
        "llama.expert_used_count": 2,
        "llama.vocab_size": 400,
        "llama.rope.dimension_count": 64,
    }
    assert {value.type for value in keys.values()} == {ValueType.UINT32, ValueType.FLOAT32}


def test_the_head_size_is_written_where_the_config_has_one_and_always_for_dense_models(tiny_checkpoint: Make) -> None:
    sizes = {"llama.attention.key_length": 32, "llama.attention.value_length": 32, "llama.rope.dimension_count": 32}
    with opened(tiny_checkpoint(head_dim=32)) as source:
        assert sizes.items() <= parameters(source.config).items()
    with opened(tiny_checkpoint(arch="llama", n_head=8)) as source:
        dense = parameters(source.config)
    assert sizes.items() <= dense.items()
    assert "llama.expert_count" not in dense


def test_rope_scaling_becomes_keys(tiny_checkpoint: Make) -> None:
    with opened(tiny_checkpoint()) as source:
        config = source.config
    linear = parameters(replace(config, rope_scaling=RopeScaling("linear", {"factor": 2.0})))
    assert linear["llama.rope.scaling.type"] == "linear"
    assert linear["llama.rope.scaling.factor"] == 2.0
    given = {"factor": 4.0, "original_max_position_embeddings": 512.0, "beta_fast": 32.0, "attention_factor": 0.5}
    yarn = parameters(replace(config, rope_scaling=RopeScaling("yarn", given)))
    assert {key.removeprefix("llama.rope.scaling."): value for key, value in yarn.items() if ".scaling." in key} == {
        "type": "yarn",
        "factor": 4.0,
        "original_context_length": 512,
        "yarn_attn_factor": 0.5,
        "yarn_beta_fast": 32.0,
        "attn_factor": pytest.approx(0.5 / (1 + 0.1 * math.log(4))),
    }
    assert not any(".scaling." in key for key in parameters(config))


@pytest.mark.parametrize(
    ("given", "factor"),
    [
        ({}, None),
        ({"attention_factor": 1 + 0.1 * math.log(4)}, None),
        ({"mscale": 1.0}, None),
        ({"mscale": 1.0, "mscale_all_dim": 0.0}, None),
        ({"attn_factor": 3.0}, None),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1 / (1 + 0.1 * math.log(4))),
        (
            {"mscale": 0.5, "mscale_all_dim": 2.0},
            (1 + 0.05 * math.log(4)) / (1 + 0.2 * math.log(4)) / (1 + 0.1 * math.log(4)),
        ),
        ({"mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": 2.0}, 2 / (1 + 0.1 * math.log(4))),
    ],
)
def test_the_attention_scale_of_yarn_is_told_where_it_is_not_llama_cpps(
    tiny_checkpoint: Make, given: dict[str, float], factor: float | None
) -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, **given}
    with opened(tiny_checkpoint(arch="llama", n_layer=1, rope_scaling=yarn)) as source:
        found = parameters(source.config).get("llama.rope.scaling.attn_factor")
    assert found == (None if factor is None else pytest.approx(factor))


@pytest.mark.parametrize(
    ("arch", "fields", "clauses"),
    [
        ("mistral", {}, []),
        ("mistral", {"config": {"sliding_window": 4096}}, []),
        ("mistral", {"config": {"sliding_window": 2048}}, []),
        ("mistral", {"config": {"sliding_window": 1024}}, ["past position 1024 the answers are another model's"]),
        ("mixtral", {"config": {"sliding_window": 7}}, ["attends to the last 7 tokens only"]),
        ("llama", {"config": {"sliding_window": 7}}, []),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["begins past position 2048"]),
        ("mistral", {"config": {"auto_map": {"AutoConfig": "c.C"}}}, []),
        (
            "mistral",
            {"config": {"auto_map": {"AutoModelForCausalLM": "m.M"}}},
            [r"code \(auto_map\) is not run; it is converted as a plain MistralForCausalLM"],
        ),
        (
            "llama",
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 16, "beta_slow": 1.0, "truncate": False}},
            [
                "beta_fast of its YaRN rope scaling is 16, and llama.cpp computes as if it were 32",
                "truncate .* is False",
            ],
        ),
    ],
)
def test_what_llama_cpp_leaves_out_is_told(
    tiny_checkpoint: Make, arch: str, fields: dict[str, Any], clauses: list[str]
) -> None:
    with opened(tiny_checkpoint(arch=arch, n_layer=1, **fields)) as source:
        told = list(family_of(source.config).unexpressed(source.config))
        window = parameters(source.config).get("ggufmoe.sliding_window")
    assert len(told) == len(clauses)
    assert all(re.search(clause, sentence) for clause, sentence in zip(clauses, told, strict=True))
    assert window == next((int(found[1]) for text in told if (found := re.search(r"last (\d+) tokens", text))), None)
