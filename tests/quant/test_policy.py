"""The choice of types beyond what the comparison with llama.cpp shows: refusals, their words, and the traps."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from ggufmoe.errors import ArchitectureError, ImatrixError, OptionError, TensorMismatchError
from ggufmoe.gguf.types import GGMLType
from ggufmoe.quant.filetypes import FileType
from ggufmoe.quant.mixes import FALLBACK, RULES, Layers, Role
from ggufmoe.quant.policy import (
    ModelShape,
    TensorShape,
    TypePolicy,
    choose_types,
    may_quantize,
    parse_override,
    role_of,
    unfit_types,
)
from tests.quant.llama_quantize import Specimen

MIXTRAL = Specimen(n_expert=2, n_layer=8)


def types_of(specimen: Specimen, policy: TypePolicy, imatrix: bool = False) -> dict[str, GGMLType]:
    return choose_types(specimen.tensors(), specimen.model, policy, specimen.matrices() if imatrix else None)


def test_the_seeds_own_mix() -> None:
    """Q4_K_M of a two-expert Mixtral in full, as llama-quantize writes it."""
    types = types_of(MIXTRAL, TypePolicy(FileType.Q4_K_M))
    assert types["token_embd.weight"] is GGMLType.Q4_K
    assert types["output.weight"] is GGMLType.Q6_K
    assert types["output_norm.weight"] is GGMLType.F32
    assert types["blk.0.ffn_gate_inp.weight"] is GGMLType.F32
    assert types["blk.0.attn_q.weight"] is GGMLType.Q4_K
    six_bits = [layer for layer in range(8) if types[f"blk.{layer}.ffn_down_exps.weight"] is GGMLType.Q6_K]
    assert six_bits == [layer for layer in range(8) if types[f"blk.{layer}.attn_v.weight"] is GGMLType.Q6_K]
    assert six_bits == [0, 3, 6, 7]


def test_types_come_in_the_order_of_the_tensors() -> None:
    assert list(types_of(MIXTRAL, TypePolicy(FileType.Q4_K_M))) == [tensor.name for tensor in MIXTRAL.tensors()]


def test_layers_count_by_number_and_not_by_name() -> None:
    types = types_of(replace(MIXTRAL, n_expert=0, n_layer=24), TypePolicy(FileType.Q4_K_S))
    five_bits = [layer for layer in range(24) if types[f"blk.{layer}.attn_v.weight"] is GGMLType.Q5_K]
    assert five_bits == [0, 1, 2, 3]


def test_an_override_takes_a_dense_layer_out_of_the_count() -> None:
    policy = TypePolicy(FileType.Q4_K_S, ((r"blk\.0\.attn_v", GGMLType.Q8_0),))
    types = types_of(replace(MIXTRAL, n_expert=0), policy)
    assert [types[f"blk.{layer}.attn_v.weight"].name for layer in range(6)] == ["Q8_0", *["Q5_K"] * 4, "Q4_K"]


def test_the_first_pattern_that_is_found_wins() -> None:
    policy = TypePolicy(FileType.Q4_K_M, (("down", GGMLType.Q5_0), (r"blk\.1\.", GGMLType.Q8_0)))
    types = types_of(MIXTRAL, policy)
    assert types["blk.1.ffn_down_exps.weight"] is GGMLType.Q5_0
    assert types["blk.1.attn_q.weight"] is GGMLType.Q8_0


@pytest.mark.parametrize("n_experts", [2, 8])
def test_llama_70b_gets_more_bits_for_its_values_unless_it_has_eight_experts(n_experts: int) -> None:
    model = ModelShape(n_layer=80, n_head=64, n_head_kv=8, n_expert=n_experts)
    assert model.is_70b is (n_experts == 2)
    value = TensorShape("blk.40.attn_v.weight", (1024, 8192), GGMLType.BF16)
    chosen = choose_types([value], model, TypePolicy(FileType.Q4_K_S))
    assert chosen[value.name] is (GGMLType.Q5_K if n_experts == 2 else GGMLType.Q8_0)


def test_heads_without_keys_are_not_grouped() -> None:
    assert ModelShape(n_layer=1, n_head=8, n_head_kv=0).n_gqa == 0


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("blk.0.ffn_up.weight", (256, 256), True),
        ("blk.0.ffn_up.weight", (256,), False),
        ("blk.0.ffn_up.weight", (1, 256), False),
        ("blk.0.ffn_up.bias", (2, 256), False),
        ("blk.0.ffn_gate_inp.weight", (2, 256), False),
        ("blk.0.attn_q_norm.weight", (2, 256), False),
        ("position_embd.weight", (2, 256), False),
        ("blk.0.ssm_conv1d.weight", (2, 256), False),
    ],
)
def test_what_may_be_quantized(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert may_quantize(TensorShape(name, shape, GGMLType.F32)) is expected


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("output.weight", Role.OUTPUT),
        ("token_embd.weight", Role.TOKEN_EMBEDDING),
        ("per_layer_token_embd.weight", Role.TOKEN_EMBEDDING),
        ("blk.3.attn_qkv.weight", Role.ATTENTION_V),
        ("blk.3.attn_output.weight", Role.ATTENTION_OUTPUT),
        ("blk.3.ffn_gate_exps.weight", Role.FFN_GATE),
        ("blk.3.ffn_down_shexp.weight", Role.FFN_DOWN),
        ("blk.3.nextn.eh_proj.weight", Role.OTHER),
    ],
)
def test_roles(name: str, role: Role) -> None:
    assert role_of(name) is role


def test_every_role_has_rules_and_every_fallback_has_small_blocks() -> None:
    assert set(RULES) == set(Role)
    assert {smaller.block_size for smaller in FALLBACK.values()} == {32}


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (Layers.ALL, range(32)),
        (Layers.FIRST_2, range(2)),
        (Layers.FIRST_4, range(4)),
        (Layers.FIRST_SIXTEENTH, range(2)),
        (Layers.FIRST_EIGHTH, range(4)),
        (Layers.MIDDLE, range(4, 28)),
        (Layers.MORE_BITS, [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]),
    ],
)
def test_layers_of_a_model_of_32(layers: Layers, expected: range | list[int]) -> None:
    assert [i for i in range(32) if layers.include(i, 32)] == list(expected)


class TestOverrides:
    def test_parsing(self) -> None:
        assert parse_override("Ffn_Down=q6_k") == ("ffn_down", GGMLType.Q6_K)
        assert parse_override(r"^blk\.\D=F16") == (r"^blk\.\D", GGMLType.F16)
        assert parse_override("attn_(?=q)=q8_0") == ("attn_(?=q)", GGMLType.Q8_0)

    @pytest.mark.parametrize("text", ["attn_q", "=q8_0", "attn_q=", ""])
    def test_half_an_override(self, text: str) -> None:
        with pytest.raises(OptionError, match="PATTERN=TYPE"):
            parse_override(text)

    @pytest.mark.parametrize("pattern", ["attn_(", "[", "*", "a{99999999999999999999}"])
    def test_an_invalid_pattern(self, pattern: str) -> None:
        with pytest.raises(OptionError, match="not a regular expression"):
            parse_override(f"{pattern}=q8_0")
        with pytest.raises(OptionError, match="not a regular expression"):
            types_of(MIXTRAL, TypePolicy(FileType.Q4_K_M, ((pattern, GGMLType.Q8_0),)))

    @pytest.mark.parametrize(
        ("pattern", "near"),
        [("ffn_dwn", "ffn_down_exps"), (r"blk\.0\.atn_q\.weight", "attn_q"), (r"outputs", "output")],
    )
    def test_a_pattern_that_matches_nothing_names_what_is_near(self, pattern: str, near: str) -> None:
        with pytest.raises(OptionError, match=rf"matches no tensor of this model; did you mean .*{near}"):
            types_of(MIXTRAL, TypePolicy(FileType.Q4_K_M, ((pattern, GGMLType.Q8_0),)))

    def test_a_pattern_for_tensors_that_stay_is_warned_about(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING, "ggufmoe"):
            types = types_of(MIXTRAL, TypePolicy(FileType.Q4_K_M, (("ffn_gate_inp", GGMLType.Q8_0),)))
        assert types["blk.0.ffn_gate_inp.weight"] is GGMLType.F32
        assert "ffn_gate_inp has no effect" in caplog.text

    def test_patterns_do_not_count_in_an_unquantized_file(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING, "ggufmoe"):
            types = types_of(MIXTRAL, TypePolicy(FileType.F16, (("ffn_down", GGMLType.Q8_0),)))
        assert types["blk.0.ffn_down_exps.weight"] is GGMLType.F16
        assert "no effect in a F16 file" in caplog.text

    def test_a_type_that_cannot_be_written(self) -> None:
        with pytest.raises(OptionError, match="unwritable tensor type 'Q8_K'"):
            TypePolicy(FileType.Q4_K_M, output_tensor_type=GGMLType.Q8_K)
        with pytest.raises(OptionError, match="unwritable tensor type 'I32'"):
            TypePolicy(FileType.Q4_K_M, (("ffn", GGMLType.I32),))

    def test_output_and_embedding_types_have_no_fallback(self) -> None:
        odd = replace(MIXTRAL, n_embd=288)
        with pytest.raises(OptionError, match=r"output\.weight cannot be Q4_K: its row size of 288"):
            types_of(odd, TypePolicy(FileType.Q4_K_M, output_tensor_type=GGMLType.Q4_K))
        with pytest.raises(OptionError, match=r"token_embd\.weight cannot be Q6_K: its row size of 288"):
            types_of(odd, TypePolicy(FileType.F16, token_embedding_type=GGMLType.Q6_K))

    def test_a_per_layer_embedding_may_be_named(self) -> None:
        table = TensorShape("per_layer_token_embd.weight", (64, 256), GGMLType.BF16)
        policy = TypePolicy(FileType.Q4_K_M, token_embedding_type=GGMLType.F16)
        assert choose_types([table], MIXTRAL.model, policy)[table.name] is GGMLType.F16
        named = replace(policy, tensor_types=(("per_layer", GGMLType.Q5_0),))
        assert choose_types([table], MIXTRAL.model, named)[table.name] is GGMLType.Q5_0


class TestFallbacks:
    @pytest.mark.parametrize(
        ("n_cols", "wanted", "expected"),
        [
            (288, GGMLType.Q4_K, GGMLType.Q5_0),
            (288, GGMLType.IQ2_S, GGMLType.IQ4_NL),
            (288, GGMLType.Q2_0, GGMLType.Q4_0),
            (272, GGMLType.Q6_K, GGMLType.F16),
            (272, GGMLType.Q4_0, GGMLType.F16),
            (272, GGMLType.MXFP4, GGMLType.F16),
        ],
    )
    def test_rows_that_the_block_does_not_divide(self, n_cols: int, wanted: GGMLType, expected: GGMLType) -> None:
        tensor = TensorShape("blk.0.attn_q.weight", (256, n_cols), GGMLType.BF16)
        policy = TypePolicy(FileType.Q8_0, (("attn_q", wanted),))
        assert choose_types([tensor], MIXTRAL.model, policy)[tensor.name] is expected

    def test_types_without_a_fallback_are_refused(self) -> None:
        with pytest.raises(OptionError, match=r"cannot be Q1_0: its row size of 288 .* no fallback type fits"):
            types_of(replace(MIXTRAL, n_embd=288), TypePolicy(FileType.Q1_0))


class TestImatrix:
    @pytest.mark.parametrize(
        "file_type", ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "Q2_K_S"]
    )
    def test_files_that_need_one(self, file_type: str) -> None:
        with pytest.raises(ImatrixError, match=rf"{file_type} needs an importance matrix for blk\..* and \d+ more"):
            types_of(MIXTRAL, TypePolicy(FileType[file_type]))
        assert types_of(MIXTRAL, TypePolicy(FileType[file_type]), imatrix=True)

    def test_an_entry_that_is_missing_is_named(self) -> None:
        names = set(MIXTRAL.matrices()) - {"blk.5.ffn_up_exps.weight"}
        with pytest.raises(
            ImatrixError, match=r"has no entry for blk\.5\.ffn_up_exps\.weight \(IQ2_XXS\); compute one"
        ):
            choose_types(MIXTRAL.tensors(), MIXTRAL.model, TypePolicy(FileType.IQ2_XXS), names)

    @pytest.mark.parametrize("name", ["output.weight", "token_embd.weight"])
    def test_embeddings_and_output_that_would_abort_are_refused(self, name: str) -> None:
        names = set(MIXTRAL.matrices()) - {name}
        with pytest.raises(ImatrixError, match=f"has no entry for {name}"):
            choose_types(MIXTRAL.tensors(), MIXTRAL.model, TypePolicy(FileType.IQ2_XXS, pure=True), names)
        assert choose_types(MIXTRAL.tensors(), MIXTRAL.model, TypePolicy(FileType.IQ2_S, pure=False), names)

    def test_an_embedding_type_that_would_abort_is_refused(self) -> None:
        with pytest.raises(ImatrixError, match=r"token_embd\.weight \(IQ1_S\)"):
            types_of(MIXTRAL, TypePolicy(FileType.F16, token_embedding_type=GGMLType.IQ1_S))

    def test_a_tensor_that_has_the_type_already_needs_none(self) -> None:
        done = TensorShape("blk.0.attn_q.weight", (256, 256), GGMLType.IQ2_XXS)
        policy = TypePolicy(FileType.IQ2_XXS, pure=True)
        assert choose_types([done], MIXTRAL.model, policy) == {done.name: GGMLType.IQ2_XXS}


def test_a_layer_that_the_model_does_not_have() -> None:
    for name in ("blk.8.ffn_down_exps.weight", "ffn_down_exps.weight"):
        stray = TensorShape(name, (2, 256, 256), GGMLType.BF16)
        with pytest.raises(TensorMismatchError, match=f"{name} is in none of the 8 layers"):
            choose_types([stray], MIXTRAL.model, TypePolicy(FileType.Q4_K_M))


def test_families_with_rules_of_their_own() -> None:
    with pytest.raises(ArchitectureError, match="falcon has quantization rules of its own"):
        choose_types(MIXTRAL.tensors(), replace(MIXTRAL.model, architecture="falcon"), TypePolicy(FileType.Q4_K_M))


@pytest.mark.parametrize("file_type", [FileType.Q2_K, FileType.Q4_K_M, FileType.Q5_K_S, FileType.IQ4_XS])
def test_what_does_not_fit_is_told_with_the_type_that_was_meant(file_type: FileType) -> None:
    names = ("token_embd", "output", "blk.0.attn_v", "blk.0.attn_k", "blk.1.attn_v", "blk.1.attn_k")
    narrow = [TensorShape(f"{name}.weight", (64, 96), GGMLType.BF16) for name in names]
    norm = TensorShape("output_norm.weight", (96,), GGMLType.F32)
    model, policy = ModelShape(2, 4, 4), TypePolicy(file_type)
    types = choose_types([*narrow, norm], model, policy)
    meant = unfit_types([*narrow, norm], model, policy)
    assert meant.keys() == {tensor.name for tensor in narrow}
    for name, wanted in meant.items():
        assert wanted is not types[name]
        assert 96 % wanted.block_size
    wide = [replace(tensor, shape=(64, 256)) for tensor in narrow]
    assert unfit_types([*wide, norm], model, policy) == {}
    fitting = choose_types([*wide, norm], model, policy)
    differing = {name for name in meant if meant[name] is not fitting[name]}
    assert differing <= {"output.weight", "token_embd.weight"}, "their rule for rows that do not fit names no type"
