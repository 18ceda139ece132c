"""Hyper-parameters as a header states them, right and wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from ggufmoe.gguf.header import GGUFValue
from ggufmoe.gguf.hyper import Hyper, Layers, at_layer, largest
from ggufmoe.gguf.model import read_model_header
from ggufmoe.gguf.types import ValueType
from tests.gguf_files import ARRAY, mixtral_metadata, text, u32, write_mixtral


def layers(*counts: int) -> GGUFValue:
    return GGUFValue(ARRAY, list(counts), ValueType.INT32)


def hyper(**changes: GGUFValue | None) -> Hyper:
    """The hyper-parameters of a Mixtral with these keys changed, ``__`` standing for a dot; None removes one."""
    metadata: dict[str, GGUFValue | None] = {**mixtral_metadata(4, 2)}
    metadata |= {f"llama.{name.replace('__', '.')}": value for name, value in changes.items()}
    return Hyper.of({key: value for key, value in metadata.items() if value is not None})


def test_a_mixtral_is_read_as_it_is(tmp_path: Path) -> None:
    found = read_model_header(write_mixtral(tmp_path / "m.gguf")).hyper
    assert found == hyper()
    assert (found.architecture, found.n_layer, found.n_ctx_train, found.n_embd) == ("llama", 2, 32768, 256)
    assert (found.n_ff, found.n_head, found.n_head_kv, found.n_expert, found.n_expert_used) == (512, 4, 2, 4, 2)
    assert (found.key_length, found.value_length, found.n_vocab, found.sliding_window) == (64, None, None, None)
    assert (found.rope_theta, found.rope_dimensions, found.rope_scaling, found.rope_scaling_factor) == (
        1e6,
        64,
        "yarn",
        4.0,
    )
    assert (found.malformed, found.rms_norm_eps) == (frozenset(), None)
    assert found.key("{arch}.expert_used_count") == "llama.expert_used_count"


def test_nothing_is_read_from_an_empty_header() -> None:
    found = Hyper.of({})
    assert (found.architecture, found.n_layer, found.n_head, found.n_expert, found.n_expert_used) == (
        None,
        None,
        None,
        0,
        0,
    )


@pytest.mark.parametrize(
    "value", [text("two"), GGUFValue(ValueType.BOOL, True), GGUFValue(ValueType.FLOAT32, 2.0), layers(2, 2)]
)
def test_what_has_another_type_is_not_stated(value: GGUFValue) -> None:
    found = hyper(block_count=value, expert_count=value)
    assert (found.n_layer, found.n_expert) == (None, 0)


def test_layers_that_are_alike_have_one_number() -> None:
    assert hyper(attention__head_count_kv=layers(2, 4)).n_head_kv == (2, 4)
    assert hyper(attention__head_count_kv=layers(4, 4)).n_head_kv == 4
    assert hyper(attention__head_count_kv=layers()).n_head_kv == ()


def test_an_experts_width_comes_before_that_of_dense_layers() -> None:
    assert hyper(expert_feed_forward_length=u32(96)).n_ff == 96


@pytest.mark.parametrize(
    ("stated", "most", "second"), [(3, 3, 3), ((3, 8), 8, 8), ((9, -1), 9, 7), ((), 7, 7), (None, 7, 7), (2**31, 7, 7)]
)
def test_counts_are_made_of_what_is_stated(stated: Layers, most: int, second: int) -> None:
    assert (largest(stated, 7), at_layer(stated, 1, 7)) == (most, second)


@pytest.mark.parametrize("value", [text("8"), GGUFValue(ValueType.INT32, -1), layers(), layers(-2, 4)])
def test_counts_that_are_none_are_named(value: GGUFValue) -> None:
    found = hyper(attention__head_count=value, attention__key_length=text("wide"))
    assert found.malformed == {"llama.attention.head_count"}


@pytest.mark.parametrize(
    ("architecture", "keys", "facts"),
    [
        ("llama", {}, {}),
        (
            "qwen2moe",
            {"expert_shared_feed_forward_length": u32(512)},
            {"shared experts": "1, on every token", "gating": "softmax", "expert weights": "not rescaled"},
        ),
        ("qwen3moe", {}, {"gating": "softmax", "expert weights": "rescaled to one"}),
        ("gpt-oss", {}, {"gating": "softmax of the chosen"}),
        ("deepseek2", {}, {"gating": "softmax", "expert weights": "not rescaled"}),
        ("glm4moe", {}, {"gating": "sigmoid", "expert weights": "not rescaled"}),
        ("lfm2moe", {"expert_gating_func": u32(2)}, {"gating": "sigmoid", "expert weights": "rescaled to one"}),
        (
            "deepseek2",
            {
                "expert_shared_count": u32(1),
                "expert_gating_func": u32(2),
                "expert_weights_norm": GGUFValue(ValueType.BOOL, True),
                "expert_weights_scale": GGUFValue(ValueType.FLOAT32, 2.5),
                "expert_group_count": u32(8),
                "expert_group_used_count": u32(4),
                "leading_dense_block_count": u32(3),
            },
            {
                "shared experts": "1, on every token",
                "gating": "sigmoid",
                "expert weights": "rescaled to one, times 2.5",
                "expert groups": "8, experts come from the best 4",
                "dense layers": "the first 3, without experts",
            },
        ),
    ],
)
def test_how_experts_are_chosen_is_told(architecture: str, keys: dict[str, GGUFValue], facts: dict[str, str]) -> None:
    metadata = {"general.architecture": text(architecture), f"{architecture}.expert_count": u32(8)}
    metadata |= {f"{architecture}.{name}": value for name, value in keys.items()}
    assert dict(Hyper.of(metadata).expert_facts()) == facts


def test_the_graph_decides_where_the_file_says_otherwise() -> None:
    metadata = {"general.architecture": text("qwen3moe"), "qwen3moe.expert_count": u32(8)}
    metadata["qwen3moe.expert_weights_norm"] = GGUFValue(ValueType.BOOL, False)
    assert Hyper.of(metadata).expert_weights_norm is True
