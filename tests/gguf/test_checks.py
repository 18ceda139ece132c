"""What llama.cpp asserts of a header is refused by name, and what it takes is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ggufmoe.errors import GGUFError
from ggufmoe.gguf.checks import check_loadable, header_faults
from ggufmoe.gguf.header import GGUFValue
from ggufmoe.gguf.model import read_model_header
from ggufmoe.gguf.types import GGMLType, ValueType
from tests.gguf_files import ARRAY, F32, mixtral_metadata, mixtral_tensors, text, u32, write_gguf, write_mixtral


def f32(value: float) -> GGUFValue:
    return GGUFValue(F32, value)


def faults(path: Path, **changes: GGUFValue | None) -> list[str]:
    """The faults of a Mixtral of 2 layers and 4 experts with these keys changed, ``__`` standing for a dot."""
    named = {f"llama.{name.replace('__', '.')}": value for name, value in changes.items()}
    return list(header_faults(read_model_header(write_mixtral(path / "m.gguf", changes=named))))


@pytest.mark.parametrize(("n_expert", "n_used"), [(4, 2), (1, 1), (4, 4), (2, 1)])
def test_a_mixtral_is_taken(tmp_path: Path, n_expert: int, n_used: int) -> None:
    check_loadable(read_model_header(write_mixtral(tmp_path / "m.gguf", n_expert, n_used)))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("block_count", u32(0), "1 to 512 layers"),
        ("block_count", u32(2**32 - 1), "1 to 512 layers"),
        ("block_count", u32(3), "2, the number of layers that have tensors"),
        ("block_count", u32(1), "2, the number of layers that have tensors"),
        ("nextn_predict_layers", u32(3), "at most the 2 layers"),
        ("context_length", u32(0), "1 to 2147483647 tokens"),
        ("context_length", u32(2**31), "1 to 2147483647 tokens"),
        ("expert_count", u32(0), "4, as many as blk.0.ffn_gate_exps.weight has"),
        ("expert_count", u32(1), "4, as many as blk.0.ffn_gate_exps.weight has"),
        ("expert_count", u32(1025), "at most 1024 experts"),
        ("expert_used_count", u32(0), "1 to 4, the number of experts"),
        ("expert_used_count", u32(5), "1 to 4, the number of experts"),
        ("expert_used_count", GGUFValue(ARRAY, [2, 5], ValueType.UINT32), "1 to 4, the number of experts"),
        ("expert_group_count", u32(3), "a part of the 4 experts"),
        ("expert_group_count", u32(4), "a part of the 4 experts"),
        ("attention__layer_norm_rms_epsilon", f32(-0.5), "a small number, such as"),
        ("attention__layer_norm_rms_epsilon", f32(float("nan")), "a small number, such as"),
        ("attention__layer_norm_rms_epsilon", f32(float("inf")), "a small number, such as"),
        ("rope__freq_base", f32(0.0), "1 to 1e+15"),
        ("rope__freq_base", f32(float("nan")), "1 to 1e+15"),
        ("rope__scaling__factor", f32(-1.0), "0 to 1e+06"),
        ("rope__scaling__type", text("dynamic"), "one of none, linear, yarn, longrope"),
        ("rope__dimension_count", u32(63), "an even number up to 64"),
        ("rope__dimension_count", u32(66), "an even number up to 64"),
        ("embedding_length", u32(512), "256, the width of token_embd.weight"),
        ("feed_forward_length", u32(0), "512, the number of rows of blk.0.ffn_up_exps.weight"),
        ("attention__head_count", u32(0), "a number that divides the width of 256"),
        ("attention__head_count_kv", u32(0), "a number that divides the 4 heads"),
        ("attention__head_count_kv", u32(3), "a number that divides the 4 heads"),
        ("attention__key_length", u32(0), "the width of a head"),
    ],
)
def test_a_value_that_llama_cpp_asserts_against_is_named(
    tmp_path: Path, key: str, value: GGUFValue, expected: str
) -> None:
    found = faults(tmp_path, **{key: value})
    stated = max(value.value) if isinstance(value.value, list) else value.value
    named = f"llama.{key.replace('__', '.')} is {stated!r}, expected "
    assert any(fault.startswith(named) and expected in fault for fault in found), found


def test_heads_must_divide_the_width_where_no_key_length_says_theirs(tmp_path: Path) -> None:
    assert faults(tmp_path, attention__head_count=u32(6)) == []
    assert "divides the width" in faults(tmp_path, attention__head_count=u32(6), attention__key_length=None)[0]


def test_groups_of_experts_must_be_used(tmp_path: Path) -> None:
    assert faults(tmp_path, expert_group_count=u32(2), expert_group_used_count=u32(1)) == []
    (fault,) = faults(tmp_path, expert_group_count=u32(2))
    assert fault == "llama.expert_group_used_count is 0, expected 1 to 1 of 2 groups"


def test_the_error_names_file_key_and_way_out(tmp_path: Path) -> None:
    path = write_mixtral(tmp_path / "m.gguf", changes={"llama.block_count": u32(0)})
    with pytest.raises(GGUFError, match=r"m\.gguf: llama\.block_count is 0, expected .*download or make it again"):
        check_loadable(read_model_header(path))


def test_only_what_is_known_of_another_architecture_is_checked(tmp_path: Path) -> None:
    named = {key.replace("llama.", "gemma2."): value for key, value in mixtral_metadata(4, 2).items()}
    named |= {"general.architecture": text("gemma2"), "gemma2.embedding_length": u32(512)}
    named["gemma2.block_count"] = u32(9)
    assert not list(header_faults(read_model_header(write_gguf(tmp_path / "m.gguf", named, mixtral_tensors(4)))))
    named["gemma2.block_count"] = u32(0)
    assert list(header_faults(read_model_header(write_gguf(tmp_path / "m.gguf", named, mixtral_tensors(4)))))


def test_a_dense_model_uses_no_experts(tmp_path: Path) -> None:
    metadata = {key: value for key, value in mixtral_metadata(0, 1).items() if key != "llama.expert_count"}
    tensors = [("blk.1.ffn_up.weight", GGMLType.F32, (512, 256))]
    found = list(header_faults(read_model_header(write_gguf(tmp_path / "m.gguf", metadata, tensors))))
    assert found == ["llama.expert_used_count is 1, expected 0, as there are no experts"]


def test_what_llama_cpp_takes_of_other_architectures_is_taken(tmp_path: Path) -> None:
    def found(architecture: str, n_expert: int, tensors: list[Any], **changed: GGUFValue) -> list[str]:
        plain = mixtral_metadata(n_expert, 2)
        named = {key.replace("llama.", f"{architecture}."): value for key, value in plain.items()}
        named |= {f"{architecture}.{key}": value for key, value in changed.items()}
        named["general.architecture"] = text(architecture)
        return list(header_faults(read_model_header(write_gguf(tmp_path / "m.gguf", named, tensors))))

    dense = [("blk.1.ffn_up.weight", GGMLType.F32, (512, 256))]
    # llama.cpp takes one expert of these for none, whatever is used of it
    assert found("hunyuan-dense", 1, dense, expert_used_count=u32(0)) == []
    assert found("deepseek2", 1, dense, expert_used_count=u32(0)) != []
    # a configuration that does not say for how long a text the model was trained
    assert found("falcon-h1", 0, dense, expert_used_count=u32(0), context_length=u32(0)) == []
