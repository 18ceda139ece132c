"""A forward pass in numpy that holds a few tiles of one weight at a time: hidden states of models larger than memory.

Owns the arithmetic of Mistral, Llama and Mixtral (RMSNorm, rope, grouped-query attention, SwiGLU, top-k experts) in
float32, after their papers and transformers' definitions. Nothing of it depends on llama.cpp, so it also serves as an
independent reference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufmoe.checkpoint.dtypes import read_f32
from ggufmoe.checkpoint.source import ModelConfig, ModelSource
from ggufmoe.errors import CheckpointError
from ggufmoe.work import Work

Floats = NDArray[np.float32]
TILE_BYTES = 8 << 20
"""Bytes of float32 weights in one tile; each thread has one."""


@dataclass(frozen=True)
class LayerState:
    """Activations of one layer: (n_tokens, n_embd) float32 each; rows are the tokens of all prompts in turn."""

    input: Floats
    """The residual stream before the layer."""
    router_input: Floats
    """The normalized residual stream after attention, which is the input of this layer's router or dense MLP."""


class ForwardPass:
    """Runs prompts through a model, reading every weight once, in the order of the layers.

    All prompts go through together, as one (n_tokens, n_embd) float32 matrix; attention keeps them apart. ``work`` is
    checked for cancelling before each tile of weights. While a pass runs, numpy's BLAS has one thread in the whole
    process: tiles are multiplied by ``threads`` of ours (all usable cores by default), each with the tile that it has
    just read. BLAS's own threads wait for each other, which on a busy machine took ten times as long.
    """

    def __init__(self, model: ModelSource, *, threads: int | None = None, work: Work | None = None) -> None:
        self._config = model.config
        self._tensors = model.tensors
        self._threads = threads
        self._work = work or Work("forward pass", 0)
        self._inverse_frequencies = _inverse_frequencies(model.config)

    def embed(self, tokens: Sequence[int]) -> Floats:
        """Embedding rows of ``tokens``: (n_tokens, n_embd) float32."""
        table = self._tensors["model.embed_tokens.weight"]
        out = np.empty((len(tokens), table.shape[1]), dtype=np.float32)
        for i, token in enumerate(tokens):
            out[i] = read_f32(table, token, token + 1)[0]
        return out

    def layers(self, prompts: Sequence[Sequence[int]]) -> Iterator[LayerState]:
        """The ``n_layer`` states of a pass. The MLP of the last layer is not read: no state depends on it."""
        hidden = self.embed([token for prompt in prompts for token in prompt])
        with _one_blas_thread():
            for layer in range(self._config.n_layer):
                attended, normed = self._attended(layer, hidden, prompts)
                yield LayerState(hidden, normed)
                if layer < self._config.n_layer - 1:
                    hidden = attended + self._feed_forward(layer, normed)

    def logits(self, prompts: Sequence[Sequence[int]]) -> Floats:
        """Logits of every token: (n_tokens, n_vocab) float32."""
        hidden = self.embed([token for prompt in prompts for token in prompt])
        head = "model.embed_tokens.weight" if self._config.tie_embeddings else "lm_head.weight"
        with _one_blas_thread():
            for layer in range(self._config.n_layer):
                attended, normed = self._attended(layer, hidden, prompts)
                hidden = attended + self._feed_forward(layer, normed)
            return self._multiply(head, self._norm("model.norm.weight", hidden))

    def _attended(self, layer: int, hidden: Floats, prompts: Sequence[Sequence[int]]) -> tuple[Floats, Floats]:
        """The residual stream after attention, and the same normalized for the MLP or the experts."""
        prefix = f"model.layers.{layer}."
        hidden = hidden + self._attention(prefix, self._norm(prefix + "input_layernorm.weight", hidden), prompts)
        return hidden, self._norm(prefix + "post_attention_layernorm.weight", hidden)

    def _feed_forward(self, layer: int, normed: Floats) -> Floats:
        prefix = f"model.layers.{layer}."
        if self._config.n_expert:
            return self._experts(prefix, normed)
        return self._swiglu(normed, *(f"{prefix}mlp.{part}_proj.weight" for part in ("gate", "up", "down")))

    def _norm(self, name: str, hidden: Floats) -> Floats:
        weight = read_f32(self._tensors[name], 0, 1)[0]
        variance = np.mean(hidden * hidden, axis=-1, keepdims=True, dtype=np.float32)
        out: Floats = hidden * (np.float32(1.0) / np.sqrt(variance + np.float32(self._config.rms_norm_eps))) * weight
        return out

    def _swiglu(self, hidden: Floats, gate: str, up: str, down: str) -> Floats:
        activated = self._multiply(gate, hidden)
        activated /= np.float32(1.0) + np.exp(-activated)
        activated *= self._multiply(up, hidden)
        return self._multiply(down, activated)

    def _experts(self, prefix: str, hidden: Floats) -> Floats:
        """The output of the ``n_expert_used`` best experts of each token, weighted by their rescaled router weights."""
        prefix += "block_sparse_moe."
        scores = _softmax(self._multiply(prefix + "gate.weight", hidden))
        chosen = np.argsort(-scores, axis=-1, kind="stable")[:, : self._config.n_expert_used]
        weights = np.take_along_axis(scores, chosen, axis=-1)
        weights /= weights.sum(axis=-1, keepdims=True)
        out = np.zeros_like(hidden)
        for expert in range(self._config.n_expert):
            rows, slots = np.nonzero(chosen == expert)
            if rows.size:
                names = (f"{prefix}experts.{expert}.{part}.weight" for part in ("w1", "w3", "w2"))
                out[rows] += weights[rows, slots, None] * self._swiglu(hidden[rows], *names)
        return out

    def _attention(self, prefix: str, hidden: Floats, prompts: Sequence[Sequence[int]]) -> Floats:
        config = self._config
        projected = []
        for part, n_head in (("q", config.n_head), ("k", config.n_head_kv), ("v", config.n_head_kv)):
            rows = self._multiply(f"{prefix}self_attn.{part}_proj.weight", hidden)
            projected.append(rows.reshape(len(hidden), n_head, config.head_dim))
        out = np.empty((len(hidden), config.n_head * config.head_dim), dtype=np.float32)
        start = 0
        for prompt in prompts:
            span = slice(start, start + len(prompt))
            out[span] = self._attend(*(rows[span] for rows in projected))
            start = span.stop
        return self._multiply(prefix + "self_attn.o_proj.weight", out)

    def _attend(self, q: Floats, k: Floats, v: Floats) -> Floats:
        """Causal attention of one prompt: q (n, n_head, d), k and v (n, n_head_kv, d) -> (n, n_head * d)."""
        n_tokens, n_head, head_dim = q.shape
        q, k = self._rope(q), self._rope(k)
        group = n_head // k.shape[1]
        keys, values = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
        scores = np.einsum("ihd,jhd->hij", q, keys) * np.float32(1.0 / math.sqrt(head_dim))
        position = np.arange(n_tokens)
        hidden_from = position[:, None] < position[None, :]
        if self._config.sliding_window:
            hidden_from |= position[:, None] - position[None, :] >= self._config.sliding_window
        scores[:, hidden_from] = -np.inf
        out: Floats = np.einsum("hij,jhd->ihd", _softmax(scores), values).reshape(n_tokens, n_head * head_dim)
        return out

    def _rope(self, x: Floats) -> Floats:
        """Rotate pairs (i, i + d/2) of x (n, heads, d), the row order of Hugging Face checkpoints."""
        angles = np.arange(len(x), dtype=np.float32)[:, None] * self._inverse_frequencies
        cos, sin = np.cos(angles)[:, None, :], np.sin(angles)[:, None, :]
        low, high = np.split(x, 2, axis=-1)
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)

    def _multiply(self, name: str, x: Floats) -> Floats:
        """x (n, n_cols) times the transpose of a weight (n_rows, n_cols), tile by tile."""
        tensor = self._tensors[name]
        n_rows, n_cols = tensor.shape
        out = np.empty((len(x), n_rows), dtype=np.float32)
        step = max(1, TILE_BYTES // (4 * n_cols))

        def multiply(start: int) -> None:
            self._work.check()
            stop = min(start + step, n_rows)
            np.matmul(x, read_f32(tensor, start, stop).T, out=out[:, start:stop])

        self._work.map(multiply, range(0, n_rows, step), self._threads)
        return out


def _one_blas_thread() -> AbstractContextManager[Any]:
    from threadpoolctl import threadpool_limits

    return threadpool_limits(limits=1, user_api="blas")  # type: ignore[no-any-return]


def _softmax(x: Floats) -> Floats:
    exponentials = np.exp(x - x.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)  # type: ignore[no-any-return]


def _inverse_frequencies(config: ModelConfig) -> Floats:
    """Rope's angular step of each pair of a head, (head_dim / 2,) float32, with the config's scaling applied."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = (1.0 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    scaling = config.rope_scaling
    if scaling.kind in ("none", "dynamic"):  # dynamic scaling begins past the context, where no prompt ends
        out: Floats = frequencies
        return out
    if scaling.kind == "linear":
        scaled: Floats = (frequencies / np.float32(scaling.parameters["factor"])).astype(np.float32)
        return scaled
    if scaling.kind == "llama3":
        return _llama3_frequencies(frequencies, scaling.parameters)
    raise CheckpointError(
        f"hidden states cannot be computed with {scaling.kind} rope scaling; use gate_mode cheap_embed or random"
    )


def _llama3_frequencies(frequencies: Floats, parameters: Any) -> Floats:
    """Llama 3.1's scaling: long waves are divided by the factor, short ones kept, those between interpolated."""
    factor = float(parameters["factor"])
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    context = float(parameters["original_max_position_embeddings"])
    wavelengths = 2 * math.pi / frequencies
    smooth = np.clip((context / wavelengths - low) / (high - low), 0.0, 1.0)
    out: Floats = ((1 - smooth) * frequencies / factor + smooth * frequencies).astype(np.float32)
    return out
