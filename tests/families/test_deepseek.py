"""DeepSeek-V2 and V3: latent attention, leading dense layers, shared experts, and groups of experts.

The forward pass of merges does not compute them; a small one of numpy's alone stands here for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import ggufmoe
from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.families import deepseek_v2
from ggufmoe.gguf.header import read_header
from ggufmoe.merge.forward import ForwardPass
from ggufmoe.weights.dtypes import read_f32
from tests import tiny
from tests.families.agreement import IDS, Logits, assert_close, check_layouts, check_quantized, llama_cpp_logits
from tests.families.tiny_family import add_tensors, config_json, make_checkpoint, weights

Floats = NDArray[np.float32]
SIZES = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 256,
    "q_lora_rank": 256,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 64,
    "first_k_dense_replace": 1,
    "intermediate_size": 256,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 256,
    "routed_scaling_factor": 1.5,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "mscale": 0.7, "mscale_all_dim": 0.7}


def v2(**keys: Any) -> dict[str, Any]:
    return config_json("DeepseekV2ForCausalLM", "deepseek_v2", **{**SIZES, **keys})


def v3(**keys: Any) -> dict[str, Any]:
    return config_json("DeepseekV3ForCausalLM", "deepseek_v3", **{**SIZES, "n_group": 2, "topk_group": 1, **keys})


class Reference:
    """DeepSeek's arithmetic, token by token as its papers have it: keys and values of every head, without caching."""

    def __init__(self, checkpoint: Path, *, best_of_group: int = 2) -> None:
        with open_checkpoint(checkpoint) as model:
            self.config = model.config
            self.tensors = {name: read_f32(tensor).reshape(tensor.shape) for name, tensor in model.tensors.items()}
        self.best_of_group = best_of_group
        self.is_v3 = self.config.architecture == "DeepseekV3ForCausalLM"

    def logits(self) -> Floats:
        x = self.tensors["model.embed_tokens.weight"][IDS]
        for layer in range(self.config.n_layer):
            prefix = f"model.layers.{layer}."
            x = x + self.attention(f"{prefix}self_attn.", self.norm(f"{prefix}input_layernorm", x))
            normed = self.norm(f"{prefix}post_attention_layernorm", x)
            dense = layer < self.config.size("first_k_dense_replace")
            x = x + (self.swiglu(f"{prefix}mlp.", normed) if dense else self.experts(f"{prefix}mlp.", normed))
        out: Floats = self.norm("model.norm", x) @ self.tensors["lm_head.weight"].T
        return out

    def norm(self, name: str, x: Floats) -> Floats:
        scale = np.sqrt(np.mean(x * x, -1, keepdims=True) + self.config.rms_norm_eps)
        out: Floats = x / scale * self.tensors[f"{name}.weight"]
        return out

    def swiglu(self, prefix: str, x: Floats) -> Floats:
        gate, up, down = (self.tensors[f"{prefix}{word}_proj.weight"] for word in ("gate", "up", "down"))
        activated = x @ gate.T
        out: Floats = (activated / (1 + np.exp(-activated)) * (x @ up.T)) @ down.T
        return out

    def attention(self, prefix: str, x: Floats) -> Floats:
        n_key, n_rope, rank = map(self.config.size, ("qk_nope_head_dim", "qk_rope_head_dim", "kv_lora_rank"))
        n_head = self.config.n_head
        query = self.norm(f"{prefix}q_a_layernorm", x @ self.tensors[f"{prefix}q_a_proj.weight"].T)
        q = (query @ self.tensors[f"{prefix}q_b_proj.weight"].T).reshape(len(x), n_head, n_key + n_rope)
        latent = x @ self.tensors[f"{prefix}kv_a_proj_with_mqa.weight"].T
        expanded = self.norm(f"{prefix}kv_a_layernorm", latent[:, :rank]) @ self.tensors[f"{prefix}kv_b_proj.weight"].T
        key, value = np.split(expanded.reshape(len(x), n_head, -1), [n_key], axis=-1)
        shared = np.repeat(self.rotated(latent[:, None, rank:]), n_head, axis=1)
        k = np.concatenate([key, shared], axis=-1)
        q = np.concatenate([q[..., :n_key], self.rotated(q[..., n_key:])], axis=-1)
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(n_key + n_rope)
        scores[:, ~np.tri(len(x), dtype=bool)] = -np.inf
        share = np.exp(scores - scores.max(-1, keepdims=True))
        out = np.einsum("hij,jhd->ihd", share / share.sum(-1, keepdims=True), value).reshape(len(x), -1)
        projected: Floats = out @ self.tensors[f"{prefix}o_proj.weight"].T
        return projected

    def rotated(self, x: Floats) -> Floats:
        """Neighbouring values rotated as complex numbers."""
        n = x.shape[-1]
        angles = np.arange(len(x))[:, None] / self.config.rope_theta ** (np.arange(0, n, 2) / n)
        turned = x.astype(np.float32, order="C").view(np.complex64) * np.exp(1j * angles)[:, None].astype(np.complex64)
        out: Floats = turned.view(np.float32)
        return out

    def experts(self, prefix: str, x: Floats) -> Floats:
        logits = x @ self.tensors[f"{prefix}gate.weight"].T
        shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        scores, ranked = (1 / (1 + np.exp(-logits)),) * 2 if self.is_v3 else (shares, shares)
        if self.is_v3:
            ranked = ranked + self.tensors[f"{prefix}gate.e_score_correction_bias"]
        if n_group := self.config.values["n_group"]:
            groups = np.sort(ranked.reshape(len(x), n_group, -1), -1)[..., -self.best_of_group :].sum(-1)
            left = np.argsort(-groups, -1)[:, self.config.size("topk_group") :]
            ranked = ranked.reshape(len(x), n_group, -1).copy()
            ranked[np.arange(len(x))[:, None], left] = -np.inf
            ranked = ranked.reshape(len(x), -1)
        out = self.swiglu(f"{prefix}shared_experts.", x)
        for token, chosen in enumerate(np.argsort(-ranked, -1)[:, : self.config.n_expert_used]):
            routes = scores[token, chosen]
            if self.config.flag("norm_topk_prob"):
                routes = routes / routes.sum()
            for route, expert in zip(routes * self.config.number("routed_scaling_factor"), chosen, strict=True):
                out[token] += route * self.swiglu(f"{prefix}experts.{expert}.", x[token : token + 1])[0]
        return out


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeek-V3 with groups of experts, and its F32 file beside it."""
    directory = make_checkpoint(tmp_path_factory.mktemp("v3") / "model", v3())
    ggufmoe.convert(directory, directory.with_suffix(".gguf"), "F32")
    return directory


@pytest.fixture(scope="module")
def computed(grouped: Path) -> Logits:
    """llama.cpp's logits of it."""
    return llama_cpp_logits(grouped.with_suffix(".gguf"))


def test_v3_is_computed_as_its_formulas_say(grouped: Path, computed: Logits) -> None:
    assert_close(computed, Reference(grouped).logits())


def test_groups_by_their_best_expert_would_be_computed_wrong(grouped: Path, computed: Logits) -> None:
    """Why DeepSeek-V2's groups are refused: llama.cpp chooses groups by their two best."""
    with pytest.raises(AssertionError):
        assert_close(computed, Reference(grouped, best_of_group=1).logits())


def test_v2_is_computed_as_its_formulas_say(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "model", v2())
    ggufmoe.convert(directory, tmp_path / "model.gguf", "F32")
    assert_close(llama_cpp_logits(tmp_path / "model.gguf"), Reference(directory).logits())


@pytest.mark.parametrize("file_type", ["Q4_K_M", "IQ4_XS"])
def test_quantized_as_by_llama_cpp(grouped: Path, tmp_path: Path, file_type: str) -> None:
    check_quantized(grouped, tmp_path, file_type)


def test_both_layouts_give_one_file(tmp_path: Path) -> None:
    check_layouts(v3(num_hidden_layers=1, first_k_dense_replace=0), ("classic", "fused"), tmp_path)


def test_keys_and_values_are_split_by_head(tmp_path: Path) -> None:
    """``modify_tensors`` of the converter: of each head's rows the keys', transposed, and the values'."""
    config = v2(num_hidden_layers=1)
    ggufmoe.convert(make_checkpoint(tmp_path / "model", config), tmp_path / "model.gguf", "BF16")
    stored = weights(config)["model.layers.0.self_attn.kv_b_proj.weight"].reshape(4, 32 + 64, 256)
    header = read_header(tmp_path / "model.gguf")
    data = (tmp_path / "model.gguf").read_bytes()
    written = {
        tensor.name: (tensor.shape, data[header.data_offset + tensor.offset :][: tensor.n_bytes])
        for tensor in header.tensors
    }
    keys = stored[:, :32].swapaxes(1, 2)
    assert written["blk.0.attn_k_b.weight"] == (keys.shape, keys.tobytes())
    assert written["blk.0.attn_v_b.weight"] == ((4, 64, 256), stored[:, 32:].tobytes())
    assert "blk.0.attn_kv_b.weight" not in written


def header_of(directory: Path, config: dict[str, Any]) -> Any:
    ggufmoe.convert(make_checkpoint(directory / "model", config), directory / "model.gguf", "F32")
    return read_header(directory / "model.gguf")


def test_a_short_model_without_query_rank_is_loaded(tmp_path: Path) -> None:
    """llama.cpp's own converter writes no key, and llama.cpp then expects one in any model of 2 layers."""
    header = header_of(tmp_path, v2(q_lora_rank=None))
    assert header.get("deepseek2.attention.q_lora_rank") == 0
    assert np.isfinite(llama_cpp_logits(tmp_path / "model.gguf")).all()


def test_keys_of_yarn(tmp_path: Path) -> None:
    header = header_of(tmp_path, v2(rope_scaling=YARN))
    multiplier = header.get("deepseek2.rope.scaling.yarn_log_multiplier")
    assert multiplier == pytest.approx(0.07)
    assert header.get("deepseek2.rope.scaling.attn_factor") is None
    assert header.get("deepseek2.attention.head_count_kv") == 1
    assert header.get("deepseek2.expert_gating_func") is None
    assert header.get("deepseek2.expert_weights_norm") is None


def test_v3_says_its_gating_function(grouped: Path) -> None:
    """Without the key llama.cpp would take softmax for DeepSeek-V3."""
    header = read_header(grouped.with_suffix(".gguf"))
    assert header.get("deepseek2.expert_gating_func") == 2
    assert header.get("deepseek2.expert_weights_norm") is True


def test_layers_of_further_tokens_are_left_out_and_said(
    grouped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = make_checkpoint(tmp_path / "model", v3())
    further = {f"model.layers.{layer}.enorm.weight": np.zeros(256, np.uint16) for layer in (2, 10)}
    stored = {name: ("BF16", data) for name, data in (weights(v3()) | further).items()}
    tiny.write_shards(directory, stored, None)
    ggufmoe.convert(directory, tmp_path / "model.gguf", "F32")
    assert "leaves out 2 tensors: they predict further tokens" in caplog.text
    assert (tmp_path / "model.gguf").read_bytes() == grouped.with_suffix(".gguf").read_bytes()


def test_a_number_of_no_layer_is_left_over(tmp_path: Path) -> None:
    """Python converts no number of so many digits."""
    add_tensors(make_checkpoint(tmp_path, v3()), f"model.layers.{'9' * 5000}.enorm.weight")
    with pytest.raises(ggufmoe.CheckpointError, match=r"left over: model\.layers\.9999"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (v2(n_group=2, topk_group=1), "n_group is 2, expected 1: llama.cpp's deepseek2 graph chooses groups"),
        (v2(norm_topk_prob=True), "norm_topk_prob is True, expected false: transformers rescales no weights"),
        (v2(topk_method="noaux_tc"), "topk_method is 'noaux_tc', expected 'greedy'"),
        (v2(scoring_func="sigmoid"), "scoring_func is 'sigmoid', expected 'softmax'"),
        (v3(scoring_func="softmax"), "scoring_func is 'softmax', expected 'sigmoid'"),
        (v3(topk_method="greedy"), "topk_method is 'greedy', expected 'noaux_tc'"),
        (v3(topk_group=2), "topk_group is 2, expected less than n_group 2"),
        (v3(n_group=3), "n_group is 3, expected a divisor of the 4 experts"),
        (v3(n_group=4), "n_group is 4, expected a divisor of the 4 experts, with 2 or more"),
        (v3(rope_interleave=False), "rope_interleave is False, expected true"),
        (v2(num_hidden_layers=27), "q_lora_rank is 256, expected null: llama.cpp takes a model of 26 or 27 layers"),
        (v2(n_shared_experts=0), "n_shared_experts is 0, expected 1 or more"),
        (v2(num_key_value_heads=2), "num_key_value_heads is 2, expected num_attention_heads"),
        (v2(moe_layer_freq=2), "moe_layer_freq is 2, expected 1"),
        (v2(routed_scaling_factor=0.0), "routed_scaling_factor is 0.0, expected another number than 0"),
        (v2(attention_bias=True), "biases are not supported"),
        (v2(rope_scaling={**YARN, "mscale": 1.0}), "expected mscale and mscale_all_dim to be equal"),
        (v2(rope_scaling={**YARN, "mscale": 0, "mscale_all_dim": 0}), "expected mscale and mscale_all_dim to be equal"),
        (v2(rope_scaling={"type": "linear", "factor": 2.0}), "expected no scaling or yarn"),
        (v2(hidden_act="gelu"), "hidden_act is 'gelu', expected 'silu'"),
    ],
)
def test_what_the_graph_cannot_compute_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ggufmoe.CheckpointError, match=message):
        make_checkpoint(tmp_path, config)


def test_hidden_states_are_not_computed(grouped: Path) -> None:
    assert deepseek_v2.FAMILY.arithmetic is None
    with (
        open_checkpoint(grouped) as model,
        pytest.raises(ggufmoe.CheckpointError, match="hidden states of DeepseekV3ForCausalLM cannot be computed"),
    ):
        ForwardPass(model)
