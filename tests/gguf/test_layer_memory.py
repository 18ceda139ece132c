"""What the layers of a model keep of a text: literal numbers of published models and llama.cpp's rules."""

from __future__ import annotations

from typing import Any

import pytest

from ggufmoe.gguf.header import GGUFValue
from ggufmoe.gguf.layer_memory import LayerMemory, ModelMemory
from ggufmoe.gguf.types import ValueType
from tests.gguf_files import ARRAY, mixtral_metadata, text, u32


def memory(architecture: str, **keys: int | list[int] | list[bool]) -> ModelMemory:
    """The memory of a model with these keys, ``__`` standing for a dot."""
    metadata = {"general.architecture": text(architecture)}
    for name, value in keys.items():
        metadata[f"{architecture}.{name.replace('__', '.')}"] = _value(value)
    return ModelMemory.of(metadata)


def _value(value: Any) -> GGUFValue:
    if isinstance(value, list):
        return GGUFValue(ARRAY, value, ValueType.BOOL if isinstance(value[0], bool) else ValueType.INT32)
    return u32(value)


PLAIN = {"block_count": 2, "embedding_length": 256, "attention__head_count": 4, "attention__head_count_kv": 2}
EIGHT = PLAIN | {"block_count": 8}


def test_every_layer_of_a_plain_transformer_keeps_keys_and_values() -> None:
    assert ModelMemory.of(mixtral_metadata(4, 2)).layers == (LayerMemory(128, 128),) * 2
    wide = memory(
        "llama", **PLAIN | {"attention__head_count_kv": [1, 3]}, attention__key_length=96, attention__value_length=32
    )
    assert [(layer.n_keys, layer.n_values) for layer in wide.layers] == [(96, 32), (288, 96)]
    assert wide.widest_values == 96
    without_kv_heads = memory("llama", block_count=1, embedding_length=256, attention__head_count=4)
    assert without_kv_heads.layers == (LayerMemory(256, 256),)


def test_a_header_that_says_nothing_has_no_memory() -> None:
    assert ModelMemory.of({}) == ModelMemory(())
    assert memory("llama", block_count=2**31).layers == ()
    assert len(memory("llama", block_count=1_000_000).layers) == 512


def test_deepseek_keeps_compressed_keys_and_no_values() -> None:
    shape = {"block_count": 27, "embedding_length": 2048, "attention__head_count": 16, "attention__head_count_kv": 1}
    lite = memory(
        "deepseek2",
        **shape,
        attention__key_length=576,
        attention__value_length=512,
        attention__key_length_mla=192,
        attention__value_length_mla=128,
    )
    assert lite.layers == (LayerMemory(576, 0),) * 27
    assert not lite.pads_values
    before_mla = shape | {"attention__head_count_kv": 16}
    old = memory("deepseek2", **before_mla, attention__key_length=192, attention__value_length=128)
    assert old.layers[0] == LayerMemory(16 * 192, 16 * 128)


def test_layers_that_predict_ahead_keep_nothing() -> None:
    found = memory("glm4moe", **PLAIN | {"block_count": 3}, nextn_predict_layers=1)
    assert [layer.n_keys for layer in found.layers] == [128, 128, 0]
    assert found.n_not_loaded == 1
    assert memory("llama", **PLAIN | {"block_count": 3}, nextn_predict_layers=1).n_not_loaded == 0


@pytest.mark.parametrize(
    ("architecture", "windowed"),
    [
        ("gemma3", [1, 1, 1, 1, 1, 0, 1, 1]),
        ("gpt-oss", [1, 0, 1, 0, 1, 0, 1, 0]),
        ("cohere2", [1, 1, 1, 0, 1, 1, 1, 0]),
        ("cohere2moe", [0, 1, 1, 1, 0, 1, 1, 1]),
        ("llama4", [1, 1, 1, 0, 1, 1, 1, 0]),
        ("llama", [0] * 8),
        ("phi3", [0] * 8),
    ],
)
def test_the_architecture_says_which_layers_have_a_window(architecture: str, windowed: list[int]) -> None:
    found = memory(architecture, **EIGHT, attention__sliding_window=512)
    assert [int(layer.is_windowed) for layer in found.layers] == windowed
    expected = {"llama4": 8192, "llama": 0, "phi3": 0}.get(architecture, 512)
    assert (found.window, found.n_windowed) == (expected, sum(windowed))
    assert found.is_chunked == (architecture == "llama4")


def test_the_file_may_say_which_layers_have_a_window() -> None:
    by_array = memory(
        "gpt-oss",
        **PLAIN,
        attention__sliding_window=64,
        attention__sliding_window_pattern=[False, True],
        attention__key_length=64,
        attention__key_length_swa=32,
    )
    assert by_array.layers == (LayerMemory(128, 128), LayerMemory(64, 128, is_windowed=True))
    by_period = memory("gemma3", **EIGHT, attention__sliding_window=64, attention__sliding_window_pattern=3)
    assert [int(layer.is_windowed) for layer in by_period.layers] == [1, 1, 0, 1, 1, 0, 1, 1]


def test_windows_that_are_not_stated() -> None:
    assert memory("gemma2", **PLAIN).window == 4096
    assert memory("gemma3", **PLAIN).window == 0
    assert memory("gemma3", **PLAIN, attention__sliding_window=0).n_windowed == 0
    assert memory("smallthinker", **PLAIN, attention__sliding_window=99).window == 4096
    assert memory("exaone4", **PLAIN, attention__sliding_window=99).window == 0
    assert memory("exaone4", **PLAIN | {"block_count": 64}, attention__sliding_window=99).window == 99


def test_layers_that_share_keys_keep_none_of_their_own() -> None:
    found = memory("gemma4", **EIGHT, attention__sliding_window=64, attention__shared_kv_layers=3)
    assert [bool(layer.n_keys) for layer in found.layers] == [True] * 5 + [False] * 3


LINEAR = {"ssm__conv_kernel": 4, "ssm__inner_size": 4096, "ssm__state_size": 128, "ssm__group_count": 16}


def test_three_of_four_layers_of_qwen3_next_keep_a_state() -> None:
    found = memory("qwen3next", **EIGHT, **LINEAR)
    # a convolution over 3 earlier tokens of 8192 channels, and 32 heads of 128 x 128
    state = 3 * (4096 + 2 * 16 * 128) + 4096 * 128
    assert [layer.n_state for layer in found.layers] == [state, state, state, 0] * 2
    assert [layer.n_keys for layer in found.layers] == [0, 0, 0, 128] * 2
    assert found.n_recurrent == 6
    every_second = memory("qwen35moe", **EIGHT, **LINEAR, full_attention_interval=2)
    assert [bool(layer.n_state) for layer in every_second.layers] == [True, False] * 4
    stated = memory("qwen3next", **PLAIN, **LINEAR, attention__recurrent_layers=[False, True])
    assert [bool(layer.n_state) for layer in stated.layers] == [False, True]


def test_layers_without_kv_heads_are_recurrent_in_hybrids() -> None:
    found = memory("lfm2moe", **PLAIN | {"attention__head_count_kv": [0, 2]}, shortconv__l_cache=3)
    assert found.layers == (LayerMemory(n_state=2 * 256), LayerMemory(128, 128))
    jamba = memory("jamba", **PLAIN | {"attention__head_count_kv": [2, 0]}, ssm__conv_kernel=4, ssm__inner_size=512,
                   ssm__state_size=16)  # fmt: skip
    assert jamba.layers == (LayerMemory(128, 128), LayerMemory(n_state=3 * 512 + 16 * 512))
    linear = memory("kimi-linear", **PLAIN | {"attention__head_count_kv": [0, 1]}, ssm__conv_kernel=4, kda__head_dim=64)
    assert linear.layers[0].n_state == 3 * 3 * 4 * 64 + 64 * 64 * 4


def test_models_without_attention_keep_states_alone() -> None:
    mamba = memory("mamba", **PLAIN, ssm__conv_kernel=4, ssm__inner_size=512, ssm__state_size=16)
    assert mamba.layers == (LayerMemory(n_state=3 * 512 + 16 * 512),) * 2
    assert memory("rwkv7", **PLAIN, wkv__head_size=64).layers == (LayerMemory(n_state=256 * (2 + 64)),) * 2
    both = memory("falcon-h1", **PLAIN, **LINEAR)
    assert all(layer.n_keys and layer.n_state for layer in both.layers)
    nemotron = memory(
        "nemotron_h",
        block_count=3,
        embedding_length=256,
        attention__head_count=4,
        attention__head_count_kv=[0, 2, 0],
        feed_forward_length=[0, 0, 512],
        **LINEAR,
    )
    assert [(bool(layer.n_keys), bool(layer.n_state)) for layer in nemotron.layers] == [
        (False, True),
        (True, False),
        (False, False),
    ]


def test_caches_that_are_not_known_are_told_apart() -> None:
    assert memory("gemma3", **PLAIN).is_exact
    assert not memory("deepseek4", **PLAIN).is_exact
