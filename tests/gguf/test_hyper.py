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
    assert (found.has_plain_cache, found.malformed, found.rms_norm_eps) == (True, frozenset(), None)
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
    assert found.cached_values(0) == (0, 0)


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


def test_a_token_caches_the_keys_and_values_of_every_kv_head() -> None:
    assert hyper().cached_values(0) == (2 * 64, 2 * 64)
    wide = hyper(attention__key_length=u32(96), attention__value_length=u32(32), attention__head_count_kv=layers(1, 3))
    assert [wide.cached_values(layer) for layer in (0, 1)] == [(96, 32), (288, 96)]
    assert hyper(attention__head_count_kv=None, attention__key_length=None).cached_values(1) == (256, 256)


def test_caches_that_keep_less_are_told_apart() -> None:
    llama = mixtral_metadata(4, 2)
    window = {"general.architecture": text("gemma3"), "gemma3.attention.sliding_window": u32(512)}
    assert Hyper.of(llama | {"llama.attention.sliding_window": u32(512)}).has_plain_cache
    assert Hyper.of({"general.architecture": text("gemma3")}).has_plain_cache
    assert Hyper.of(window | {"gemma3.attention.sliding_window": u32(0)}).has_plain_cache
    assert not Hyper.of(window).has_plain_cache


@pytest.mark.parametrize("value", [text("8"), GGUFValue(ValueType.INT32, -1), layers(), layers(-2, 4)])
def test_counts_that_are_none_are_named(value: GGUFValue) -> None:
    found = hyper(attention__head_count=value, attention__key_length=text("wide"))
    assert found.malformed == {"llama.attention.head_count"}
