"""Gemma 2 and Gemma 3: norms around zero, windows in some layers, two rotary bases, capped logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ggufmoe
from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.gguf.header import Header, read_header
from tests.families.agreement import check_quantized, llama_cpp_logits, stored_and_written
from tests.families.tiny_family import add_tensors, config_json, make_checkpoint

OWN: dict[str, Any] = {
    "hidden_act": ...,
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "sliding_window": 16,
    "rope_theta": ...,
    "tie_word_embeddings": ...,
}


def gemma2(**keys: Any) -> dict[str, Any]:
    return config_json("Gemma2ForCausalLM", "gemma2", **{**OWN, **keys})


def gemma3(**keys: Any) -> dict[str, Any]:
    return config_json("Gemma3ForCausalLM", "gemma3_text", **{**OWN, **keys})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("gemma3") / "model", gemma3())


def converted(config: dict[str, Any], directory: Path) -> Header:
    ggufmoe.convert(make_checkpoint(directory / "model", config), directory / "model.gguf", "F32")
    return read_header(directory / "model.gguf")


def test_one_is_added_to_every_norm(checkpoint: Path) -> None:
    stored, written = stored_and_written(checkpoint)
    names = {
        "output_norm": "model.norm",
        "blk.1.attn_norm": "model.layers.1.input_layernorm",
        "blk.1.post_attention_norm": "model.layers.1.post_attention_layernorm",
        "blk.1.ffn_norm": "model.layers.1.pre_feedforward_layernorm",
        "blk.1.post_ffw_norm": "model.layers.1.post_feedforward_layernorm",
        "blk.1.attn_q_norm": "model.layers.1.self_attn.q_norm",
        "blk.1.attn_k_norm": "model.layers.1.self_attn.k_norm",
    }
    for name, hf in names.items():
        assert np.array_equal(written[f"{name}.weight"], stored[f"{hf}.weight"] + np.float32(1))
    assert sum("norm" in name for name in written) == 1 + 2 * 6
    assert np.array_equal(written["token_embd.weight"], stored["model.embed_tokens.weight"])


@pytest.mark.parametrize("config", [gemma2(), gemma3(tie_word_embeddings=False)])
def test_llama_cpp_reads_the_file(config: dict[str, Any], tmp_path: Path) -> None:
    converted(config, tmp_path)
    logits = llama_cpp_logits(tmp_path / "model.gguf")
    assert np.isfinite(logits).all()
    assert logits.std() > 0


@pytest.mark.parametrize(("config", "file_type"), [(gemma2(), "Q4_K_M"), (gemma3(), "Q4_K_M"), (gemma3(), "IQ4_XS")])
def test_quantized_as_by_llama_cpp(config: dict[str, Any], file_type: str, tmp_path: Path) -> None:
    check_quantized(make_checkpoint(tmp_path / "model", config), tmp_path, file_type)


def test_keys_of_gemma_2(tmp_path: Path) -> None:
    header = converted(gemma2(final_logit_softcapping=20.0), tmp_path)
    keys = ("attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window", "attention.key_length")
    assert [header.get(f"gemma2.{key}") for key in keys] == [50.0, 20.0, 16, 64]
    assert header.get("gemma2.rope.freq_base") is None
    assert header.get("gemma2.attention.sliding_window_pattern") is None
    assert "output.weight" not in {tensor.name for tensor in header.tensors}


OLD_ROPE = {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
NEW_ROPE = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
}


@pytest.mark.parametrize(
    ("keys", "expected"), [({}, (1e6, 1e4, None)), (OLD_ROPE, (5e5, 2e4, 8.0)), (NEW_ROPE, (5e5, 2e4, 8.0))]
)
def test_two_rotary_bases(tmp_path: Path, keys: dict[str, Any], expected: tuple[float, float, float | None]) -> None:
    header = converted(gemma3(**keys), tmp_path)
    names = ("freq_base", "freq_base_swa", "scaling.factor")
    assert tuple(header.get(f"gemma3.rope.{name}") for name in names) == expected


@pytest.mark.parametrize(
    ("keys", "window", "pattern"),
    [
        ({}, 16, None),
        ({"sliding_window_pattern": 2}, 16, [True, False]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, 16, [False, True]),
        ({"sliding_window_pattern": 1, "sliding_window": None}, None, None),
    ],
)
def test_layers_with_a_window(
    tmp_path: Path, keys: dict[str, Any], window: int | None, pattern: list[bool] | None
) -> None:
    """llama.cpp takes all but each sixth layer where the file does not say which."""
    header = converted(gemma3(**keys), tmp_path)
    assert header.get("gemma3.attention.sliding_window") == window
    assert header.get("gemma3.attention.sliding_window_pattern") == pattern


def test_what_reads_images_is_left_out(checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = make_checkpoint(tmp_path / "model", gemma3())
    add_tensors(directory, "vision_tower.vision_model.post_layernorm.bias", "model.multi_modal_projector.norm.weight")
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": gemma3()}
    (directory / "config.json").write_text(json.dumps(outer), encoding="utf-8")
    for source, name in ((directory, "larger"), (checkpoint, "plain")):
        ggufmoe.convert(source, tmp_path / f"{name}.gguf", "BF16")
    assert (tmp_path / "larger.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()
    assert "leaves out 2 tensors: they read images" in caplog.text


def test_an_output_that_is_the_embedding_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = make_checkpoint(tmp_path, gemma2())
    add_tensors(directory, "lm_head.weight")
    with open_checkpoint(directory) as model:
        assert "lm_head.weight" not in model.tensors
    assert "leaves out 1 tensor: llama.cpp takes the embedding for it" in caplog.text


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"hidden_activation": "gelu"}, "hidden_activation is 'gelu', expected 'gelu_pytorch_tanh'"),
        ({"attention_bias": True}, "attention_bias is True, expected false"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True, expected false"),
        ({"query_pre_attn_scalar": 256}, "query_pre_attn_scalar is 256, expected 64, which llama.cpp takes"),
        ({"layer_types": ["sliding_attention"]}, "layer_types is .*, expected a list with a kind for each of 2"),
        ({"layer_types": ["chunked_attention"] * 2}, "layer_types is .*, expected no other kinds"),
        ({"sliding_window": None}, "sliding_window is None, expected the"),
    ],
)
@pytest.mark.parametrize("config", [gemma2, gemma3])
def test_what_neither_graph_computes_is_refused(
    tmp_path: Path, config: Any, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ggufmoe.CheckpointError, match=message):
        make_checkpoint(tmp_path, config(**keys))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (gemma2(attn_logit_softcapping=None), "attn_logit_softcapping is None, expected a number above 0"),
        (gemma2(final_logit_softcapping=0.0), "final_logit_softcapping is 0.0, expected a number above 0"),
        (gemma2(rope_theta=1e6), "rope_theta is 1000000.0, expected a base of 10000"),
        (gemma2(rope_scaling={"rope_type": "linear", "factor": 2.0}), "rope_scaling is .*, expected a base of 10000"),
        (gemma2(tie_word_embeddings=False), "tie_word_embeddings is False, expected true"),
        (gemma2(layer_types=["full_attention"] * 2), "sliding_window is 16, expected the window of some layers"),
        (gemma3(attn_logit_softcapping=50.0), "attn_logit_softcapping is 50.0, expected null"),
        (gemma3(rope_scaling={"rope_type": "dynamic", "factor": 2.0}), "expected linear scaling or none"),
        (
            gemma3(rope_parameters={"sliding_attention": {"rope_type": "linear", "factor": 2.0}}),
            "expected no scaling in",
        ),
        (gemma3(rope_parameters={"sliding_attention": {"type": "linear"}}), "expected no scaling in"),
        (gemma3(rope_parameters={"sliding_attention": {"rope_theta": "x"}}), "rope_parameters is .* a rotary base of"),
        (gemma3(rope_local_base_freq=-1), "rope_local_base_freq is -1, expected a rotary base of sliding_attention"),
        (gemma3(rope_parameters={"full_attention": "none"}), "expected an object for each kind of layers"),
    ],
)
def test_what_one_graph_does_not_compute_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ggufmoe.CheckpointError, match=message):
        make_checkpoint(tmp_path, config)
