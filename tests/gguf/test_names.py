"""Which layer, which expert and which part the name of a tensor tells of."""

from __future__ import annotations

import re

import pytest

from ggufmoe.gguf import names
from ggufmoe.gguf.names import ExpertMatrix, LegacyExpert


def test_whole_names_are_those_of_llama_cpp() -> None:
    assert (names.TOKEN_EMBEDDING, names.OUTPUT) == ("token_embd.weight", "output.weight")
    assert names.PER_LAYER_TOKEN_EMBEDDING == "per_layer_token_embd.weight"


@pytest.mark.parametrize(
    ("name", "layer", "rest"),
    [
        ("blk.0.attn_q.weight", 0, "attn_q.weight"),
        ("blk.31.ffn_down_exps.weight", 31, "ffn_down_exps.weight"),
        ("output.weight", None, "output.weight"),
        ("v.blk.3.ln1.weight", None, "v.blk.3.ln1.weight"),
        ("blk.x.attn_q.weight", None, "blk.x.attn_q.weight"),
    ],
)
def test_a_layer_is_what_blk_says(name: str, layer: int | None, rest: str) -> None:
    assert (names.layer_of(name), names.without_layer(name)) == (layer, rest)


def test_llama_quantize_walks_layer_by_layer() -> None:
    given = ["blk.10.a", "output.weight", "blk.9.b", "blk.9.a", "token_embd.weight"]
    assert sorted(given, key=names.llama_quantize_order) == [
        "output.weight",
        "token_embd.weight",
        "blk.9.a",
        "blk.9.b",
        "blk.10.a",
    ]


@pytest.mark.parametrize(
    ("name", "matrix"),
    [
        ("blk.3.ffn_gate_exps.weight", ExpertMatrix(3, "gate")),
        ("blk.3.ffn_up_exps.weight", ExpertMatrix(3, "up")),
        ("blk.12.ffn_down_exps.weight", ExpertMatrix(12, "down")),
        ("blk.0.ffn_gate_up_exps.weight", ExpertMatrix(0, "gate_up")),
        ("blk.0.ffn_gate_inp.weight", ExpertMatrix(0, "router")),
        ("blk.0.ffn_gate_inp_shexp.weight", None),
        ("blk.0.ffn_gate_exps.bias", None),
        ("blk.0.ffn_gate.weight", None),
        ("blk.0.ffn_up_chexps.weight", None),
    ],
)
def test_stacks_of_experts_and_routers_are_told_apart(name: str, matrix: ExpertMatrix | None) -> None:
    assert names.expert_matrix(name) == matrix
    assert names.is_expert_stack(name) is ("_exps." in name)


def test_an_old_file_has_a_tensor_for_each_expert() -> None:
    assert names.legacy_expert("blk.2.ffn_up.7.weight") == LegacyExpert("blk.2.ffn_up_exps.weight", 7)
    assert names.legacy_expert("blk.2.ffn_up.weight") is None


@pytest.mark.parametrize("kind", ["up", "down", "gate", "gate_up"])
@pytest.mark.parametrize("stack", ["exps", "chexps"])
def test_cpu_moe_keeps_stacks_of_experts(kind: str, stack: str) -> None:
    name = f"blk.1.ffn_{kind}_{stack}.weight"
    assert names.is_offloadable_expert(name)
    assert re.search(names.experts_pattern([0, 1]), name)
    assert not re.search(names.experts_pattern([0, 11]), name)


@pytest.mark.parametrize("name", ["blk.1.ffn_up_shexp.weight", "blk.1.ffn_up.weight", "blk.1.ffn_gate_inp.weight"])
def test_cpu_moe_leaves_the_rest(name: str) -> None:
    assert not names.is_offloadable_expert(name)


@pytest.mark.parametrize("name", ["token_embd.weight", "position_embd.weight", "per_layer_token_embd.weight"])
def test_what_is_looked_up_first_is_input(name: str) -> None:
    assert names.is_input(name)
    assert not names.is_input(f"x.{name}")
    assert not names.is_rope_table(name)


def test_tables_of_rotary_embeddings_belong_to_all_layers() -> None:
    assert names.is_rope_table("rope_freqs.weight")
    assert names.is_rope_table("rope_factors_long.weight")
    assert not names.is_rope_table("rope_other.weight")
