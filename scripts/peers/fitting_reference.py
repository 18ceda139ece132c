"""A router fitted in torch, on transformers' own layers: the method of docs/routing.md written a second time.

usage: fitting_reference.py JOB.json

The job is ``{"base": DIR, "experts": [DIR...], "texts": [{"tokens": [...], "expert": N, "held_out": bool}...],
"n_used": N, "dtype": "bfloat16", "out": FILE.npy}``; the file gets rows (n_layer, n_expert, n_embd) in float32.
Weights are rounded to ``dtype`` and computed in float32, each text by itself.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

PENALTIES = (1e-3, 1e-4, 1e-5, 1e-6)
N_FOLDS, MAX_STEPS, MEMORY, TOLERANCE = 3, 100, 10, 1e-6
Tensor = torch.Tensor


def loss(rows: Tensor, states: Tensor, labels: Tensor, n_expert: int, penalty: float) -> tuple[float, Tensor]:
    """Cross-entropy with equal weight for each expert, and its gradient by autograd."""
    free = rows.detach().requires_grad_()
    counts = torch.bincount(labels, minlength=n_expert).double()
    weights = 1 / (n_expert * counts)
    each = torch.nn.functional.cross_entropy(states @ free.T, labels, reduction="none")
    value = (each * weights[labels]).sum() + penalty * (free**2).sum()
    value.backward()
    assert free.grad is not None
    return float(value.detach()), free.grad


def solve(rows: Tensor, states: Tensor, labels: Tensor, n_expert: int, penalty: float) -> Tensor:
    """L-BFGS with backtracking, from ``rows`` on."""
    pairs: list[tuple[Tensor, Tensor]] = []
    value, gradient = loss(rows, states, labels, n_expert, penalty)
    for _ in range(MAX_STEPS):
        direction, factors = -gradient, []
        for moved, change in reversed(pairs):
            factors.append((moved * direction).sum() / (moved * change).sum())
            direction = direction - factors[-1] * change
        if pairs:
            moved, change = pairs[-1]
            direction = direction * (moved * change).sum() / (change * change).sum()
        else:
            direction = direction / gradient.norm().clamp(min=1e-12)
        for (moved, change), factor in zip(pairs, reversed(factors), strict=True):
            direction = direction + (factor - (change * direction).sum() / (moved * change).sum()) * moved
        slope, step = float((gradient * direction).sum()), 1.0
        while True:
            new_value, new_gradient = loss(rows + step * direction, states, labels, n_expert, penalty)
            if new_value <= value + 1e-4 * step * slope or step < 1e-8:
                break
            step /= 2
        moved, change = step * direction, new_gradient - gradient
        if float((moved * change).sum()) > 1e-14:
            pairs = [*pairs, (moved, change)][-MEMORY:]
        decrease = value - new_value
        rows, value, gradient = rows + moved, new_value, new_gradient
        if decrease < TOLERANCE * value:
            break
    return rows


def fit(states: Tensor, labels: Tensor, texts: Tensor, n_expert: int) -> Tensor:
    """The rows of one layer; the penalty is that with the least loss on held-out folds of the texts."""
    states = states.double()
    length = (states**2).sum(dim=1).mean().sqrt()
    scaled, zero = states / length, torch.zeros((n_expert, states.shape[1]), dtype=torch.float64)
    losses = torch.zeros(len(PENALTIES))
    for fold in range(N_FOLDS):
        out, rows = texts % N_FOLDS == fold, zero
        for i, penalty in enumerate(PENALTIES):
            rows = solve(rows, scaled[~out], labels[~out], n_expert, penalty)
            losses[i] += loss(rows, scaled[out], labels[out], n_expert, 0.0)[0]
    return (solve(zero, scaled, labels, n_expert, PENALTIES[int(losses.argmin())]) / length).float()


class Mixture:
    """Base and experts as transformers loads them, in float32."""

    def __init__(self, job: dict[str, Any]) -> None:
        dtype = getattr(torch, job["dtype"])
        self.base, *self.experts = (
            transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
            .float()
            .model
            for path in (job["base"], *job["experts"])
        )
        self.dtype, self.n_used = dtype, job["n_used"]

    def attended(self, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream of one text after attention, and the same normalized."""
        block = self.base.layers[layer]
        position = self.base.rotary_emb(hidden[None], torch.arange(len(hidden))[None])
        out = block.self_attn(block.input_layernorm(hidden[None]), position_embeddings=position, attention_mask=None)[0]
        hidden = hidden + out[0]
        return hidden, block.post_attention_layernorm(hidden)

    def output(self, layer: int, normed: Tensor, rows: Tensor) -> Tensor:
        """What the experts add, weighted by the softmax of the best logits."""
        values, chosen = (normed @ rows.T).topk(self.n_used, dim=-1)
        weights = torch.zeros((len(normed), len(self.experts))).scatter(1, chosen, values.softmax(dim=-1))
        return sum(  # type: ignore[return-value]
            weights[:, i, None] * expert.layers[layer].mlp(normed) for i, expert in enumerate(self.experts)
        )


def fitted_rows(job: dict[str, Any]) -> Tensor:
    """Rows of all layers, each on the states of the mixture with the rows before it."""
    mixture, texts = Mixture(job), job["texts"]
    hidden = [mixture.base.embed_tokens(torch.tensor(text["tokens"])) for text in texts]
    used = [i for i, text in enumerate(texts) if not text["held_out"]]
    sizes = torch.tensor([len(texts[i]["tokens"]) - 1 for i in used])
    labels = torch.tensor([texts[i]["expert"] for i in used]).repeat_interleave(sizes)
    numbers = torch.tensor(used).repeat_interleave(sizes)
    found = []
    for layer in range(len(mixture.base.layers)):
        with torch.no_grad():
            pairs = [mixture.attended(layer, one) for one in hidden]
        states = torch.cat([pairs[i][1][1:] for i in used])
        found.append(fit(states, labels, numbers, len(mixture.experts)).to(mixture.dtype).float())
        with torch.no_grad():
            hidden = [one + mixture.output(layer, normed, found[-1]) for one, normed in pairs]
    return torch.stack(found)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    np.save(job["out"], fitted_rows(job).numpy())


if __name__ == "__main__":
    main()
