"""The memory of a model's context: literal numbers of published models, and llama.cpp's rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ggufmoe.gguf.header import GGUFValue
from ggufmoe.gguf.layer_memory import ModelMemory
from ggufmoe.gguf.types import ValueType
from ggufmoe.options import ContextOptions, OffloadOptions
from ggufmoe.options.limits import rounded_context
from ggufmoe.placement.footprint import Footprint, context_tokens, kv_cache_bytes
from ggufmoe.placement.offload import plan_offload
from ggufmoe.placement.offload_plan import HostMemory, Place
from tests.placement.shapes import model_of

MISTRAL_7B = {
    "block_count": 32,
    "embedding_length": 4096,
    "attention.head_count": 32,
    "attention.head_count_kv": 8,
}
UNEQUAL_WIDTHS = {"attention.key_length": 96, "attention.value_length": 64}


def llama(**numbers: int) -> ModelMemory:
    keys = {f"llama.{key}": GGUFValue(ValueType.UINT32, number) for key, number in numbers.items()}
    return ModelMemory.of({"general.architecture": GGUFValue(ValueType.STRING, "llama"), **keys})


@pytest.mark.parametrize(
    ("numbers", "types", "bytes_per_token"),
    [
        (MISTRAL_7B, ("f16", "f16"), 131_072),
        (MISTRAL_7B, ("f32", "f16"), 196_608),
        (MISTRAL_7B, ("q8_0", "q8_0"), 69_632),
        (MISTRAL_7B, ("q8_0", "q4_0"), 53_248),
        (MISTRAL_7B | UNEQUAL_WIDTHS, ("f16", "f16"), 81_920),
        ({key: n for key, n in MISTRAL_7B.items() if key != "attention.head_count_kv"}, ("f16", "f16"), 524_288),
    ],
)
def test_keys_and_values_of_a_token(numbers: dict[str, int], types: tuple[Any, Any], bytes_per_token: int) -> None:
    context = ContextOptions(cache_type_k=types[0], cache_type_v=types[1])
    layers = llama(**numbers).layers
    assert len(layers) == 32
    assert sum(kv_cache_bytes(layer, 1, context) for layer in layers) == bytes_per_token
    assert sum(kv_cache_bytes(layer, 32768, context) for layer in layers) == 32768 * bytes_per_token


def test_a_plan_counts_the_keys_and_values_of_every_layer(tmp_path: Path) -> None:
    footprint = Footprint(model_of(tmp_path / "m.gguf"), ContextOptions(n_ctx=1000), OffloadOptions())
    # 1000 tokens are rounded up to 1024; 4 heads for keys and as many for values, 64 wide, 2 bytes each
    assert footprint.kv_layers == (1024 * 4 * 64 * 2 * 2,) * 8


WINDOWED = {"general.architecture": GGUFValue(ValueType.STRING, "gpt-oss")} | {
    f"gpt-oss.{key}": GGUFValue(ValueType.UINT32, number)
    for key, number in {
        "block_count": 8,
        "context_length": 8192,
        "embedding_length": 512,
        "attention.head_count": 8,
        "attention.head_count_kv": 4,
        "attention.sliding_window": 128,
        "expert_count": 2,
        "expert_used_count": 2,
    }.items()
}


@pytest.mark.parametrize(
    ("options", "windowed_tokens"),
    [
        ({"n_ctx": 4096}, 768),  # the window and a batch of 512, rounded up
        ({"n_ctx": 4096, "n_ubatch": 32}, 256),
        ({"n_ctx": 4096, "n_batch": 32}, 256),
        ({"n_ctx": 512}, 512),
        ({"n_ctx": 4096, "swa_full": True}, 4096),
        ({"n_ctx": 8192, "n_seq_max": 4}, 4 * 768),
        ({"n_ctx": 8192, "n_parallel": 4}, 1024),  # four windows and one batch
        ({"n_ctx": 512, "n_parallel": 4}, 512),
    ],
)
def test_windowed_layers_keep_the_window_and_a_batch(
    options: dict[str, Any], windowed_tokens: int, tmp_path: Path
) -> None:
    model = model_of(tmp_path / "m.gguf", changes=WINDOWED)
    footprint = Footprint(model, ContextOptions(**options), OffloadOptions())
    token_bytes = 2 * 4 * 64 * 2
    assert footprint.kv_layers == (windowed_tokens * token_bytes, options["n_ctx"] * token_bytes) * 4
    assert footprint.saved_by_windows == 4 * (options["n_ctx"] - windowed_tokens) * token_bytes


def test_more_layers_fit_where_windows_take_less(tmp_path: Path) -> None:
    model = model_of(tmp_path / "m.gguf", changes=WINDOWED)
    # weights and buffers take 40 MiB, keys and values 67 MiB, or 128 MiB with --swa-full
    gpu = Place("GPU0", "GPU0", 150 * 2**20, 150 * 2**20)
    few, many = (
        plan_offload(
            model, ContextOptions(n_ctx=2**14, swa_full=full), OffloadOptions(fit_target=0), [gpu], HostMemory()
        ).shares[0]
        for full in (False, True)
    )
    assert (len(few.layers), len(few.expert_layers), few.kv_bytes) == (9, 8, 4 * (2**14 + 768) * 1024)
    assert 0 < len(many.layers) < 9


def test_the_width_of_the_logits_is_that_of_the_output(tmp_path: Path) -> None:
    footprint = Footprint(model_of(tmp_path / "m.gguf", changes=WINDOWED), ContextOptions(n_ctx=1024), OffloadOptions())
    assert footprint.hyper.n_vocab is None
    # logits of 2048 tokens and two rows of 512, for 512 tokens; the attention mask
    assert footprint.compute_bytes == 4 * 512 * (2048 + 2 * 512) + 2 * 512 * 1024


@pytest.mark.parametrize(
    ("n_ctx", "n_seq_max", "rounded"),
    [(0, 1, 0), (1, 1, 256), (256, 1, 256), (257, 1, 512), (1000, 3, 1536), (768, 3, 768), (512, 256, 65536)],
)
def test_a_context_is_rounded_as_llama_cpp_rounds_it(n_ctx: int, n_seq_max: int, rounded: int) -> None:
    assert rounded_context(n_ctx, n_seq_max) == rounded


@pytest.mark.parametrize(
    ("asked", "trained", "given"),
    [(None, 32768, 4096), (None, 2048, 2048), (0, 32768, 32768), (100_000, 32768, 100_000)],
)
def test_a_context_that_is_not_named_is_bounded(asked: int | None, trained: int, given: int) -> None:
    assert context_tokens(ContextOptions(n_ctx=asked), trained) == given
