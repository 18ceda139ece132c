"""Gradients against differences of losses, for each kind of arithmetic; ``scripts/peers`` compares them with torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.families.family import Routing, Scoring
from ggufmoe.merge.backward import BackwardPass
from ggufmoe.merge.forward import Floats, ForwardPass
from ggufmoe.merge.gradients import norm_gradient, routing_gradient
from tests.families import test_deepseek_v1, test_glm4_moe, test_granite, test_olmoe, test_qwen2moe, test_qwen3moe
from tests.families.tiny_family import make_checkpoint
from tests.tiny import make_checkpoint as make_tiny

TEXTS = [[1, 17, 40, 99, 12, 200, 7], [1, 55, 3]]
N_TOKENS = sum(map(len, TEXTS))
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}
SMALL: dict[str, Any] = {"n_embd": 64, "n_ff": 96, "n_head": 4}


def random(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


MODELS = [
    pytest.param(lambda path: make_tiny(path, n_expert=3, **SMALL), id="mixtral"),
    pytest.param(
        lambda path: make_tiny(path, arch="mistral", tie=True, config={"sliding_window": 3}, **SMALL), id="window"
    ),
    pytest.param(lambda path: make_checkpoint(path, test_qwen3moe.config(**SIZES, head_dim=32)), id="qwen3moe"),
    pytest.param(lambda path: make_checkpoint(path, test_olmoe.config(**SIZES)), id="olmoe"),
    pytest.param(lambda path: make_checkpoint(path, test_qwen2moe.config(**SIZES)), id="qwen2moe"),
    pytest.param(lambda path: make_checkpoint(path, test_glm4_moe.config(**SIZES)), id="glm4moe"),
    pytest.param(lambda path: make_checkpoint(path, test_deepseek_v1.config(**SIZES)), id="deepseek"),
    pytest.param(
        lambda path: make_checkpoint(path, test_granite.mixture(**SIZES, **test_granite.SHARED)), id="granitemoe"
    ),
]


@pytest.mark.parametrize("make", MODELS)
def test_the_gradient_of_the_first_state_is_the_slope_of_the_loss(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    with open_checkpoint(make(tmp_path / "model")) as model:
        backward = BackwardPass(model, threads=1)
        first = random(N_TOKENS, model.config.n_embd)

        def states(hidden: Floats) -> list[Floats]:
            found = [hidden]
            for layer in range(model.config.n_layer):
                attended, normed = backward.attended(layer, found[-1], TEXTS)
                found.append(backward.added(attended, backward.feed_forward(layer, normed)))
            return found

        kept = states(first)
        drawn = backward.drawn(kept[-1], seed=3)
        sums, gradient = backward.head_gradient(kept[-1], drawn)
        assert sums["output.weight"].counts.tolist() == [N_TOKENS]
        for layer in reversed(range(model.config.n_layer)):
            _, gradient = backward.layer_gradient(layer, kept[layer], gradient, TEXTS)
        # along the gradient and across: both must agree, the one large, the other any size
        step = np.float32(2e-3)
        for direction in (gradient / np.sqrt(np.mean(gradient**2)), random(*first.shape, seed=1)):
            ahead, behind = (
                float(backward.losses(states(first + side * direction)[-1], drawn.targets).sum(dtype=np.float64))
                for side in (step, -step)
            )
            slope = float((gradient * direction).sum(dtype=np.float64))
            size = float(np.linalg.norm(gradient) * np.linalg.norm(direction))
            assert (ahead - behind) / (2 * float(step)) == pytest.approx(slope, rel=0.01, abs=3e-3 * size)


def test_sums_are_of_the_gradients_of_weights(tmp_path: Path) -> None:
    """Of a text of one token the derivative by a weight is the product of its row's gradient and its column's input."""
    with open_checkpoint(make_tiny(tmp_path / "model", n_expert=2, n_layer=1, dtype="F32", **SMALL)) as model:
        backward = BackwardPass(model, threads=1)
        hidden = random(1, 64)
        attended, normed = backward.attended(0, hidden, [[5]])
        out = backward.added(attended, backward.feed_forward(0, normed))
        drawn = backward.drawn(out, seed=0)
        sums, gradient = backward.head_gradient(out, drawn)
        sums |= backward.layer_gradient(0, hidden, gradient, [[5]])[0]

        def loss(name: str, row: int, column: int, change: float) -> float:
            changed = _Changed(model.tensors[name], row, column, change)
            other = ForwardPass(_Model(model, {**model.tensors, name: changed}), threads=1)
            attended, normed = other.attended(0, hidden, [[5]])
            return float(other.losses(other.added(attended, other.feed_forward(0, normed)), drawn.targets)[0])

        prefix = "model.layers.0."
        for gguf, expert, name in (
            ("blk.0.attn_v", 0, "self_attn.v_proj"),
            ("blk.0.attn_output", 0, "self_attn.o_proj"),
            ("blk.0.ffn_gate_inp", 0, "block_sparse_moe.gate"),
            ("blk.0.ffn_gate_exps", 1, "block_sparse_moe.experts.1.w1"),
            ("blk.0.ffn_up_exps", 0, "block_sparse_moe.experts.0.w3"),
            ("blk.0.ffn_down_exps", 1, "block_sparse_moe.experts.1.w2"),
        ):
            one = sums[f"{gguf}.weight"]
            row, column = int(one.grad_sum2[expert].argmax()), int(one.in_sum2[expert].argmax())
            expected = np.sqrt(one.grad_sum2[expert, row] * one.in_sum2[expert, column])
            step = min(1e-2 / expected, 0.15)  # a larger one would change which way a softmax bends
            ahead, behind = (loss(f"{prefix}{name}.weight", row, column, side) for side in (step, -step))
            assert abs(ahead - behind) / (2 * step) == pytest.approx(expected, rel=0.05), gguf


class _Changed:
    """A float32 tensor with one weight changed."""

    def __init__(self, tensor: Any, row: int, column: int, change: float) -> None:
        self.name, self.dtype, self.shape = tensor.name, tensor.dtype, tensor.shape
        self._tensor, self._at, self._change = tensor, (row, column), change

    def read_rows(self, start: int, stop: int, out: Any) -> None:
        self._tensor.read_rows(start, stop, out)
        row, column = self._at
        if start <= row < stop:
            out[row - start, column] += np.float32(self._change)


class _Model:
    def __init__(self, model: Any, tensors: Any) -> None:
        self.config, self.tensors = model.config, tensors


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("scoring", list(Scoring))
def test_the_gradient_of_routing(scoring: Scoring, normalized: bool) -> None:
    routing, logits, of_weights = Routing(scoring, normalized, 1.5), random(5, 6), random(5, 2, seed=1)
    chosen = np.argsort(-logits, axis=1)[:, :2]

    def value(logits: Any) -> float:
        wide = logits.astype(np.float64)
        picked = np.take_along_axis(wide, chosen, axis=1)
        if scoring is Scoring.SIGMOID:
            scores = 1 / (1 + np.exp(-picked))
        else:
            among = wide if scoring is Scoring.SOFTMAX else picked
            scores = np.exp(picked) / np.exp(among).sum(axis=1, keepdims=True)
        if normalized:
            scores /= scores.sum(axis=1, keepdims=True)
        return float((scores * 1.5 * of_weights).sum())

    slopes = np.empty(logits.shape)
    for place in np.ndindex(logits.shape):
        step = np.zeros(logits.shape)
        step[place] = 1e-5
        slopes[place] = (value(logits + step) - value(logits - step)) / 2e-5
    np.testing.assert_allclose(routing_gradient(routing, logits, chosen, of_weights), slopes, atol=1e-5)


def test_the_gradient_of_a_norm() -> None:
    x, weight, gradient = random(3, 8), random(8, seed=1), random(3, 8, seed=2)

    def value(x: Any) -> float:
        wide = x.astype(np.float64)
        return float((wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-3) * weight * gradient).sum())

    found, step = norm_gradient(x, weight, gradient, 1e-3), np.zeros((3, 8))
    step[1, 4] = 1e-5
    assert found[1, 4] == pytest.approx((value(x + step) - value(x - step)) / 2e-5, rel=1e-4)


def test_targets_are_drawn_from_what_the_model_says(tmp_path: Path) -> None:
    with open_checkpoint(make_tiny(tmp_path / "model", arch="llama", n_layer=1, dtype="F32", **SMALL)) as model:
        backward = BackwardPass(model)
        hidden = np.repeat(random(1, 64) * 30, 4000, axis=0)
        targets = backward.drawn(hidden, seed=7).targets
        n_vocab = model.config.n_vocab
        drawn = np.bincount(targets, minlength=n_vocab)
        every = np.exp(-backward.losses(np.repeat(hidden[:1], n_vocab, axis=0), np.arange(n_vocab)))
        other = backward.drawn(hidden[:50], seed=8).targets
    # chi-squared has n - 1 as its mean and twice that as its variance
    chi2 = float(((drawn - 4000 * every) ** 2 / (4000 * every)).sum())
    freedom = len(every) - 1
    assert abs(chi2 - freedom) < 5 * np.sqrt(2 * freedom)
    assert other.tolist() != targets[:50].tolist()
