"""The forward pass computes what a family's tensors and ``Arithmetic`` say, against loops over tokens and experts.

A made-up family has at once what real ones have one by one: biases, norms of queries and keys, scales, a part of each
head that is not rotated, dense layers before those with experts, shared experts with a gate, and every kind of routing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ggufmoe import families
from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.errors import CheckpointError
from ggufmoe.families import llama
from ggufmoe.families.family import Arithmetic, ConfigKey, Family, Kind, Routing, Scoring
from ggufmoe.families.model_config import ModelConfig
from ggufmoe.families.standard import (
    NORMS,
    attention,
    choice_bias,
    decoder,
    experts,
    feed_forward,
    head_dim,
    layers_before,
    layers_from,
    query_width,
    shared_experts,
    size_of,
)
from ggufmoe.merge.forward import ForwardPass
from ggufmoe.weights.dtypes import read_f32
from tests.families.tiny_family import config_json, make_checkpoint

Values = NDArray[np.float64]
IDS = [3, 77, 200, 12, 5, 301]


def family(arithmetic: Arithmetic, *, norm_of_all_heads: bool) -> Family:
    sparse, dense = layers_from("first_sparse"), layers_before("first_sparse")
    norm = query_width if norm_of_all_heads else head_dim
    return replace(
        llama.FAMILY,
        architectures=("PlatypusForCausalLM",),
        model_types=("platypus",),
        tensors=decoder(
            *NORMS,
            *attention(biases="qkvo", qk_norm=norm),
            *feed_forward(where=dense),
            *experts(size_of("narrow"), where=sparse),
            choice_bias(where=sparse),
            *shared_experts(size_of("narrow"), where=sparse, gate="mlp.shared_gate"),
        ),
        keys=(ConfigKey("narrow"), ConfigKey("first_sparse", Kind.COUNT)),
        rotary_fraction=1.0,
        arithmetic=lambda config: arithmetic,
    )


class Reference:
    """One token after the other, in float64."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Any], arithmetic: Arithmetic) -> None:
        self.config, self.arithmetic = config, arithmetic
        self.weights = {name: read_f32(tensor).astype(np.float64) for name, tensor in tensors.items()}

    def norm(self, x: Values, name: str) -> Values:
        weight = self.weights[name].reshape(-1) + self.arithmetic.norm_offset
        parts = x.reshape(-1, weight.size)
        scaled = parts / np.sqrt((parts**2).mean(axis=1, keepdims=True) + self.config.rms_norm_eps)
        out: Values = (scaled * weight).reshape(-1)
        return out

    def project(self, x: Values, name: str) -> Values:
        out: Values = self.weights[f"{name}.weight"] @ x
        return out + self.weights[f"{name}.bias"].reshape(-1) if f"{name}.bias" in self.weights else out

    def swiglu(self, x: Values, name: str) -> Values:
        gate, up = (self.project(x, f"{name}.{word}_proj") for word in ("gate", "up"))
        return self.project(gate / (1 + np.exp(-gate)) * up, f"{name}.down_proj")

    def rotate(self, head: Values, position: int) -> Values:
        n_rotated = int(self.config.head_dim * self.config.rotary_fraction)
        out: Values = head.copy()
        for i in range(n_rotated // 2):
            angle = position / self.config.rope_theta ** (2 * i / n_rotated)
            a, b = head[i], head[i + n_rotated // 2]
            out[i], out[i + n_rotated // 2] = (
                a * np.cos(angle) - b * np.sin(angle),
                b * np.cos(angle) + a * np.sin(angle),
            )
        return out

    def heads(self, x: Values, letter: str, layer: int, position: int) -> Values:
        name = f"model.layers.{layer}.self_attn.{letter}"
        rows = self.project(x, f"{name}_proj")
        if letter == "v":
            return rows.reshape(-1, self.config.head_dim)
        rows = self.norm(rows, f"{name}_norm.weight")
        return np.stack([self.rotate(head, position) for head in rows.reshape(-1, self.config.head_dim)])

    def mixture(self, x: Values, layer: int) -> Values:
        routing, module = self.arithmetic.routing, f"model.layers.{layer}.mlp"
        logits = self.weights[f"{module}.gate.weight"] @ x
        scores = {
            Scoring.SOFTMAX: np.exp(logits) / np.exp(logits).sum(),
            Scoring.SIGMOID: 1 / (1 + np.exp(-logits)),
            Scoring.SOFTMAX_OF_CHOSEN: logits,
        }[routing.scoring]
        preferred = scores + self.weights[f"{module}.gate.e_score_correction_bias"].reshape(-1)
        chosen = sorted(range(len(scores)), key=lambda expert: -preferred[expert])[: self.config.n_expert_used]
        weights = scores[chosen]
        if routing.scoring is Scoring.SOFTMAX_OF_CHOSEN:
            weights = np.exp(weights) / np.exp(weights).sum()
        if routing.normalized:
            weights = weights / weights.sum()
        out: Values = np.zeros_like(x)
        for expert, weight in zip(chosen, weights * routing.scale, strict=True):
            out += weight * self.swiglu(x, f"{module}.experts.{expert}")
        gate = float(1 / (1 + np.exp(-self.weights[f"{module}.shared_gate.weight"][0] @ x)))
        return out + gate * self.swiglu(x, f"{module}.shared_experts")

    def logits(self, ids: list[int]) -> Values:
        config, arithmetic = self.config, self.arithmetic
        stream = [self.weights["model.embed_tokens.weight"][token] * arithmetic.embedding_scale for token in ids]
        scale = arithmetic.attention_scale or config.head_dim**-0.5
        for layer in range(config.n_layer):
            stem, group = f"model.layers.{layer}", config.n_head // config.n_head_kv
            normed = [self.norm(x, f"{stem}.input_layernorm.weight") for x in stream]
            q, k, v = ([self.heads(x, letter, layer, i) for i, x in enumerate(normed)] for letter in "qkv")
            for i in range(len(ids)):
                attended = []
                for head in range(config.n_head):
                    products = np.exp([q[i][head] @ k[j][head // group] * scale for j in range(i + 1)])
                    attended.append(sum(p * v[j][head // group] for j, p in enumerate(products)) / products.sum())
                output = self.project(np.concatenate(attended), f"{stem}.self_attn.o_proj")
                stream[i] = stream[i] + output * arithmetic.residual_scale
            for i, x in enumerate(stream):
                y = self.norm(x, f"{stem}.post_attention_layernorm.weight")
                dense = layer < config.size("first_sparse")
                output = self.swiglu(y, f"{stem}.mlp") if dense else self.mixture(y, layer)
                stream[i] = x + output * arithmetic.residual_scale
        final = np.stack([self.norm(x, "model.norm.weight") for x in stream])
        out: Values = final @ self.weights["lm_head.weight"].T / arithmetic.logit_scale
        return out


PLAIN = Arithmetic()
SCALED = Arithmetic(embedding_scale=12.0, attention_scale=0.3, residual_scale=0.22, logit_scale=6.0, norm_offset=1.0)


@pytest.mark.parametrize(
    ("arithmetic", "norm_of_all_heads", "rotary_fraction"),
    [
        (PLAIN, False, 1.0),
        (SCALED, False, 1.0),
        (PLAIN, True, 0.5),
        (replace(PLAIN, routing=Routing(normalized=False)), False, 1.0),
        (replace(PLAIN, routing=Routing(Scoring.SIGMOID, scale=2.5)), False, 0.25),
        (replace(PLAIN, routing=Routing(Scoring.SIGMOID, normalized=False)), False, 1.0),
        (replace(SCALED, routing=Routing(Scoring.SOFTMAX_OF_CHOSEN, normalized=False)), True, 1.0),
    ],
)
def test_the_forward_pass_computes_what_the_family_says(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arithmetic: Arithmetic,
    norm_of_all_heads: bool,
    rotary_fraction: float,
) -> None:
    made_up = family(arithmetic, norm_of_all_heads=norm_of_all_heads)
    monkeypatch.setattr(families, "all_families", lambda: (made_up,))
    config = config_json(
        "PlatypusForCausalLM", "platypus", hidden_size=64, intermediate_size=96, num_attention_heads=4,
        num_key_value_heads=4 if norm_of_all_heads else 2, num_local_experts=5, num_experts_per_tok=2, narrow=32,
        first_sparse=1, num_hidden_layers=3, partial_rotary_factor=rotary_fraction,
    )  # fmt: skip
    with open_checkpoint(make_checkpoint(tmp_path, config)) as model:
        ours = ForwardPass(model).logits([IDS, IDS[:3]])
        theirs = Reference(model.config, model.tensors, arithmetic).logits(IDS)
    spread = theirs.max() - theirs.min()
    assert np.abs(ours[: len(IDS)] - theirs).max() < 1e-5 * spread
    assert np.abs(ours[len(IDS) :] - theirs[:3]).max() < 1e-5 * spread


def test_a_family_that_is_not_computed_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = replace(llama.FAMILY, architectures=("PlatypusForCausalLM",), arithmetic=None)
    monkeypatch.setattr(families, "all_families", lambda: (unknown,))
    config = config_json("PlatypusForCausalLM", "platypus", num_hidden_layers=1)
    with (
        open_checkpoint(make_checkpoint(tmp_path, config)) as model,
        pytest.raises(CheckpointError, match=r"hidden states of PlatypusForCausalLM cannot be computed$"),
    ):
        ForwardPass(model)
