"""A forward pass in numpy that holds a few tiles of one weight at a time: hidden states of models larger than memory.

Owns the arithmetic of decoders (RMSNorm, rope, grouped-query attention, SwiGLU, top-k experts) in float32, after their
papers and transformers' definitions; what differs between families comes from their tensors and their ``Arithmetic``.
Nothing of it depends on llama.cpp, so it also serves as an independent reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ggufmoe.checkpoint.source import ModelWeights
from ggufmoe.errors import CheckpointError
from ggufmoe.families import family_of
from ggufmoe.families.family import BIAS, WEIGHT, Scoring
from ggufmoe.families.model_config import ModelConfig
from ggufmoe.gguf.upstream import MODEL_TENSOR
from ggufmoe.hub.hub_file import Line
from ggufmoe.merge.pass_reads import PassReads, Step
from ggufmoe.weights.dtypes import read_f32, read_single_rows
from ggufmoe.weights.source_tensor import SourceTensor
from ggufmoe.work import Work

Floats = NDArray[np.float32]
ResultT = TypeVar("ResultT")
HEAD_NORMS = {MODEL_TENSOR.ATTN_Q: MODEL_TENSOR.ATTN_Q_NORM, MODEL_TENSOR.ATTN_K: MODEL_TENSOR.ATTN_K_NORM}
"""The norms of queries and keys, by their projections."""
_DENSE = (MODEL_TENSOR.FFN_GATE, MODEL_TENSOR.FFN_UP, MODEL_TENSOR.FFN_DOWN)
_ROUTED = (MODEL_TENSOR.FFN_GATE_EXP, MODEL_TENSOR.FFN_UP_EXP, MODEL_TENSOR.FFN_DOWN_EXP)
_SHARED = (MODEL_TENSOR.FFN_GATE_SHEXP, MODEL_TENSOR.FFN_UP_SHEXP, MODEL_TENSOR.FFN_DOWN_SHEXP)
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

    def __init__(self, model: ModelWeights, *, threads: int | None = None, work: Work | None = None) -> None:
        """Raises CheckpointError for a family, or a rope scaling, that is not computed here."""
        self._config = model.config
        self._family = family_of(model.config)
        if self._family.arithmetic is None:
            raise CheckpointError(f"hidden states of {self._family.architecture} cannot be computed")
        self._arithmetic = self._family.arithmetic(model.config)
        self._tensors = model.tensors
        self._threads = threads
        self.work = work or Work("forward pass", 0)
        self.reads: PassReads | None = None
        """What reads weights ahead that come over the network."""
        self._inverse_frequencies = _inverse_frequencies(model.config)

    def embed(self, tokens: Sequence[int]) -> Floats:
        """Embedding rows of ``tokens`` as they are stored: (n_tokens, n_embd) float32."""
        return embedding_rows(self._tensors[self._name(MODEL_TENSOR.TOKEN_EMBD)], tokens)

    def layers(self, prompts: Sequence[Sequence[int]]) -> Iterator[LayerState]:
        """The ``n_layer`` states of a pass. The MLP of the last layer is not read: no state depends on it."""
        hidden = self.first(prompts)
        with one_blas_thread():
            for layer in range(self._config.n_layer):
                attended, normed = self.attended(layer, hidden, prompts)
                yield LayerState(hidden, normed)
                if layer < self._config.n_layer - 1:
                    hidden = self.added(attended, self.feed_forward(layer, normed))

    def steps(self) -> Iterator[Step]:
        """What ``layers`` reads of a dense model after the embeddings, in its order."""
        for layer in range(self._config.n_layer):
            yield from self.attention_steps(layer)
            if layer < self._config.n_layer - 1:
                yield from self.dense_steps(layer)

    def attention_steps(self, layer: int) -> Iterator[Step]:
        """What ``attended`` reads."""
        yield from self._steps_of((self._name(MODEL_TENSOR.ATTN_NORM, layer),))
        for tensor in (MODEL_TENSOR.ATTN_Q, MODEL_TENSOR.ATTN_K, MODEL_TENSOR.ATTN_V, MODEL_TENSOR.ATTN_OUT):
            yield from self._steps_of((self._name(tensor, layer),))
            yield from self._vector_steps((tensor, BIAS), (HEAD_NORMS.get(tensor), WEIGHT), layer=layer)
        yield from self._steps_of((self._feed_forward_norm(layer),))

    def dense_steps(self, layer: int) -> Iterator[Step]:
        """What ``feed_forward`` reads in a layer without experts."""
        return self._swiglu_steps(*(self._name(tensor, layer) for tensor in _DENSE))

    def expert_steps(self, layer: int, expert: int) -> Iterator[Step]:
        """What ``expert_output`` reads."""
        return self._swiglu_steps(*(self._name(tensor, layer, expert) for tensor in _ROUTED))

    def shared_steps(self, layer: int) -> Iterator[Step]:
        """What ``shared_output`` reads."""
        if self._has(_SHARED[0], layer):
            yield from self._swiglu_steps(*(self._name(tensor, layer) for tensor in _SHARED))
            yield from self._vector_steps((MODEL_TENSOR.FFN_GATE_INP_SHEXP, WEIGHT), layer=layer)

    def loss_steps(self) -> Iterator[Step]:
        """What ``losses`` reads."""
        return self._steps_of((self._name(MODEL_TENSOR.OUTPUT_NORM),), (self._head(),))

    def _swiglu_steps(self, gate: str, up: str, down: str) -> Iterator[Step]:
        return self._steps_of((gate, up), (down,))

    def _vector_steps(self, *wanted: tuple[Any, str], layer: int) -> Iterator[Step]:
        rules = [self._family.rule(tensor, suffix) for tensor, suffix in wanted if tensor is not None]
        names = [rule.name(layer) for rule in rules if rule is not None]
        return self._steps_of(*((name,) for name in names if name in self._tensors))

    def _steps_of(self, *steps: tuple[str, ...]) -> Iterator[Step]:
        for names in steps:
            yield [self._tensors[name] for name in names]

    def logits(self, prompts: Sequence[Sequence[int]]) -> Floats:
        """Logits of every token: (n_tokens, n_vocab) float32."""
        hidden = self.first(prompts)
        with one_blas_thread():
            for layer in range(self._config.n_layer):
                attended, normed = self.attended(layer, hidden, prompts)
                hidden = self.added(attended, self.feed_forward(layer, normed))
            logits = self._multiply(self._head(), self._norm(self._name(MODEL_TENSOR.OUTPUT_NORM), hidden))
        logits /= np.float32(self._arithmetic.logit_scale)
        return logits

    def losses(self, hidden: Floats, targets: NDArray[np.intp]) -> Floats:
        """The negative log-likelihood, in nats, of the token ``targets[i]`` after the state ``hidden[i]``.

        ``hidden`` (n, n_embd) is the residual stream after the last layer. Logits are made of a tile of the vocabulary
        at a time, so that memory does not grow with it.
        """
        normed = self._norm(self._name(MODEL_TENSOR.OUTPUT_NORM), hidden)
        scale = np.float32(1.0 / self._arithmetic.logit_scale)

        def part(start: int, weights: Floats) -> tuple[Floats, Floats, Floats]:
            logits = (normed @ weights.T) * scale
            largest = logits.max(axis=1)
            column = targets - start
            rows = np.nonzero((column >= 0) & (column < len(weights)))[0]
            wanted = np.zeros(len(logits), dtype=np.float32)
            wanted[rows] = logits[rows, column[rows]]
            return largest, np.exp(logits - largest[:, None]).sum(axis=1), wanted

        parts = self._map_tiles(self._head(), part)
        largest, sums, wanted = (np.stack(values) for values in zip(*parts, strict=True))
        highest = largest.max(axis=0)
        out: Floats = highest + np.log((sums * np.exp(largest - highest)).sum(axis=0)) - wanted.sum(axis=0)
        return out

    def first(self, prompts: Sequence[Sequence[int]]) -> Floats:
        """The residual stream before the first layer, (n_tokens, n_embd)."""
        rows = self.embed([token for prompt in prompts for token in prompt])
        rows *= np.float32(self._arithmetic.embedding_scale)
        return rows

    def added(self, hidden: Floats, output: Floats) -> Floats:
        """The residual stream ``hidden`` after the output of attention or of a feed-forward part is added."""
        out: Floats = hidden + output * np.float32(self._arithmetic.residual_scale)
        return out

    def _head(self) -> str:
        return self._name(MODEL_TENSOR.TOKEN_EMBD if self._config.tie_embeddings else MODEL_TENSOR.OUTPUT)

    def _name(self, tensor: Any, layer: int = 0, expert: int = 0) -> str:
        rule = self._family.rule(tensor)
        assert rule is not None, f"{self._family.architecture} is computed here, and has no {tensor.name}"
        return rule.name(layer, expert)

    def _has(self, tensor: Any, layer: int) -> bool:
        """Whether the family has a weight for ``tensor`` in this layer."""
        rule = self._family.rule(tensor)
        return rule is not None and rule.where(self._config, layer)

    def _vector(self, tensor: Any, layer: int, suffix: str) -> Floats | None:
        """A bias or norm of a layer, (n,) float32; None if the model has none."""
        rule = self._family.rule(tensor, suffix)
        stored = None if rule is None else self._tensors.get(rule.name(layer))
        return None if stored is None else self._read_vector(stored)

    def _read_vector(self, tensor: SourceTensor) -> Floats:
        """The only row of a tensor, (n,) float32."""
        if self.reads is not None:
            self.reads.begin(tensor)
        with self._tile(tensor, 0):
            row: Floats = read_f32(tensor, 0, 1)[0]
        return row

    def _tile(self, tensor: SourceTensor, start: int) -> AbstractContextManager[None]:
        """The block reads a tile of a step, which may have been read ahead."""
        return nullcontext() if self.reads is None else self.reads.tile(tensor, start)

    def _project(self, tensor: Any, layer: int, x: Floats) -> Floats:
        """x (n, n_cols) times a projection of a layer, with its bias added where the model has one: (n, n_rows)."""
        return self._biased(tensor, layer, self._multiply(self._name(tensor, layer), x))

    def _biased(self, tensor: Any, layer: int, rows: Floats) -> Floats:
        """What a projection of a layer gives, (n, n_rows), with its bias added where the model has one."""
        bias = self._vector(tensor, layer, BIAS)
        return rows if bias is None else rows + bias

    def attended(self, layer: int, hidden: Floats, prompts: Sequence[Sequence[int]]) -> tuple[Floats, Floats]:
        """The residual stream after attention, and the same normalized for the MLP or the experts."""
        normed = self._norm(self._name(MODEL_TENSOR.ATTN_NORM, layer), hidden)
        hidden = self.added(hidden, self._attention(layer, normed, prompts))
        return hidden, self._norm(self._feed_forward_norm(layer), hidden)

    def _feed_forward_norm(self, layer: int) -> str:
        """The norm before the feed-forward part, which some graphs of llama.cpp call one after attention."""
        named = self._family.rule(MODEL_TENSOR.FFN_NORM)
        return self._name(MODEL_TENSOR.ATTN_POST_NORM if named is None else MODEL_TENSOR.FFN_NORM, layer)

    def feed_forward(self, layer: int, normed: Floats) -> Floats:
        """The output of a layer's MLP, or of its chosen experts and its shared ones, for ``normed`` (n, n_embd)."""
        if not self._has(MODEL_TENSOR.FFN_GATE_INP, layer):
            return self._swiglu(normed, *(self._name(tensor, layer) for tensor in _DENSE))
        return self._experts(layer, normed) + self.shared_output(layer, normed)

    def expert_output(self, layer: int, expert: int, normed: Floats) -> Floats:
        """The output of one routed expert, not weighted, for ``normed`` (n, n_embd)."""
        return self._swiglu(normed, *(self._name(tensor, layer, expert) for tensor in _ROUTED))

    def _norm(self, name: str, hidden: Floats) -> Floats:
        return self._normalized(hidden, self._read_vector(self._tensors[name]))

    def _normalized(self, hidden: Floats, weight: Floats) -> Floats:
        """RMSNorm over the last dimension, which ``weight`` has."""
        if self._arithmetic.norm_offset:
            weight = weight + np.float32(self._arithmetic.norm_offset)
        variance = np.mean(hidden * hidden, axis=-1, keepdims=True, dtype=np.float32)
        out: Floats = hidden * (np.float32(1.0) / np.sqrt(variance + np.float32(self._config.rms_norm_eps))) * weight
        return out

    def _swiglu(self, hidden: Floats, gate: str, up: str, down: str) -> Floats:
        activated = np.empty((len(hidden), self._tensors[gate].shape[0]), dtype=np.float32)

        def activate(start: int, gate_rows: Floats) -> None:
            stop = start + len(gate_rows)
            part = np.matmul(hidden, gate_rows.T)
            part /= np.float32(1.0) + np.exp(-part)
            np.multiply(
                part, np.matmul(hidden, read_f32(self._tensors[up], start, stop).T), out=activated[:, start:stop]
            )

        self._map_tiles(gate, activate)
        return self._multiply(down, activated)

    def _experts(self, layer: int, hidden: Floats) -> Floats:
        """The output of the ``n_expert_used`` best experts of each token, weighted by the router."""
        chosen, weights = self.routes(layer, self.router_logits(layer, hidden))
        out = np.zeros_like(hidden)
        for expert in range(self._config.n_expert):
            rows, slots = np.nonzero(chosen == expert)
            if rows.size:
                out[rows] += weights[rows, slots, None] * self.expert_output(layer, expert, hidden[rows])
        return out

    def router_logits(self, layer: int, normed: Floats) -> Floats:
        """What the model's own router gives for ``normed`` (n, n_embd), its input: (n, n_expert)."""
        return self._project(MODEL_TENSOR.FFN_GATE_INP, layer, normed)

    def routes(self, layer: int, logits: Floats) -> tuple[NDArray[np.intp], Floats]:
        """The experts that a router's logits choose for each token, best first, and their weights.

        ``logits`` is (n_tokens, n_expert); both results are (n_tokens, n_expert_used).
        """
        routing, n_used = self._arithmetic.routing, self._config.n_expert_used
        scores = logits
        if routing.scoring is Scoring.SOFTMAX:
            scores = _softmax(logits)
        elif routing.scoring is Scoring.SIGMOID:
            scores = np.float32(1.0) / (np.float32(1.0) + np.exp(-logits))
        preference = self._vector(MODEL_TENSOR.FFN_EXP_PROBS_B, layer, BIAS)
        ranked = scores if preference is None else scores + preference.reshape(-1)
        chosen = np.argsort(-ranked, axis=-1, kind="stable")[:, :n_used]
        weights: Floats = np.take_along_axis(scores, chosen, axis=-1)
        if routing.scoring is Scoring.SOFTMAX_OF_CHOSEN:
            weights = _softmax(weights)
        if routing.normalized:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        return chosen, weights * np.float32(routing.scale)

    def shared_output(self, layer: int, hidden: Floats) -> Floats:
        """The output of the experts that every token goes to, weighted by their gate where there is one; else zeros."""
        if not self._has(_SHARED[0], layer):
            return np.zeros_like(hidden)
        out = self._swiglu(hidden, *(self._name(tensor, layer) for tensor in _SHARED))
        gate = self._vector(MODEL_TENSOR.FFN_GATE_INP_SHEXP, layer, WEIGHT)
        return out if gate is None else out / (np.float32(1.0) + np.exp(-(hidden @ gate)))[:, None]

    def _attention(self, layer: int, hidden: Floats, prompts: Sequence[Sequence[int]]) -> Floats:
        config = self._config
        q, k, v = (
            self._heads(tensor, layer, self._project(tensor, layer, hidden))
            for tensor in (MODEL_TENSOR.ATTN_Q, MODEL_TENSOR.ATTN_K, MODEL_TENSOR.ATTN_V)
        )
        out = np.empty((len(hidden), config.n_head * config.head_dim), dtype=np.float32)
        start = 0
        for prompt in prompts:
            span = slice(start, start + len(prompt))
            out[span] = self._attend(q[span], k[span], v[span])
            start = span.stop
        return self._project(MODEL_TENSOR.ATTN_OUT, layer, out)

    def _heads(self, tensor: Any, layer: int, rows: Floats) -> Floats:
        """Queries, keys or values, (n, n_head, d), of what their projection gives, (n, n_head * d): normalized where
        the model has a norm for them."""
        norm = HEAD_NORMS.get(tensor)
        weight = None if norm is None else self._vector(norm, layer, WEIGHT)
        if weight is not None and weight.size == rows.shape[1]:
            rows, weight = self._normalized(rows, weight), None
        heads = rows.reshape(len(rows), -1, self._config.head_dim)
        return heads if weight is None else self._normalized(heads, weight)

    def _attend(self, q: Floats, k: Floats, v: Floats) -> Floats:
        """Causal attention of one prompt: q (n, n_head, d), k and v (n, n_head_kv, d) -> (n, n_head * d)."""
        n_tokens, n_head, head_dim = q.shape
        q, k = self._rope(q), self._rope(k)
        group = n_head // k.shape[1]
        keys, values = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
        scale = self._arithmetic.attention_scale or 1.0 / math.sqrt(head_dim)
        scores = np.einsum("ihd,jhd->hij", q, keys) * np.float32(scale)
        position = np.arange(n_tokens)
        hidden_from = position[:, None] < position[None, :]
        if self._config.sliding_window:
            hidden_from |= position[:, None] - position[None, :] >= self._config.sliding_window
        scores[:, hidden_from] = -np.inf
        out: Floats = np.einsum("hij,jhd->ihd", _softmax(scores), values).reshape(n_tokens, n_head * head_dim)
        return out

    def _rope(self, x: Floats, direction: int = 1) -> Floats:
        """Rotate pairs (i, i + r/2) of the first r values of each head of x (n, heads, d), in the row order of
        Hugging Face checkpoints; r is d but where a family rotates a part of each head. Direction -1 rotates back."""
        angles = np.arange(len(x), dtype=np.float32)[:, None] * (self._inverse_frequencies * np.float32(direction))
        cos, sin = np.cos(angles)[:, None, :], np.sin(angles)[:, None, :]
        half = self._inverse_frequencies.size
        low, high, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return np.concatenate([low * cos - high * sin, high * cos + low * sin, rest], axis=-1)

    def _multiply(self, name: str, x: Floats) -> Floats:
        """x (n, n_cols) times the transpose of a weight (n_rows, n_cols), tile by tile."""
        out = np.empty((len(x), self._tensors[name].shape[0]), dtype=np.float32)

        def multiply(start: int, rows: Floats) -> None:
            np.matmul(x, rows.T, out=out[:, start : start + len(rows)])

        self._map_tiles(name, multiply)
        return out

    def _map_tiles(self, name: str, function: Callable[[int, Floats], ResultT]) -> list[ResultT]:
        """Call ``function`` with the first row and the float32 rows of each tile of a weight, in several threads."""
        tensor = self._tensors[name]
        n_rows, step = tensor.shape[0], tile_rows(tensor)
        if self.reads is not None:
            self.reads.begin(tensor)

        def call(start: int) -> ResultT:
            self.work.check()
            with self._tile(tensor, start):
                return function(start, read_f32(tensor, start, min(start + step, n_rows)))

        return self.work.map(call, range(0, n_rows, step), self._threads)


def tile_rows(tensor: SourceTensor) -> int:
    """Rows of each tile of a weight but the last."""
    return max(1, TILE_BYTES // (4 * tensor.shape[-1]))


@contextmanager
def reading_ahead(passes: Sequence[ForwardPass], steps: Iterable[Step], line: Line | None) -> Iterator[None]:
    """Read what ``passes`` read in ``steps`` ahead of them while the block runs; nothing where ``line`` is None."""
    if line is None:
        yield
        return
    reads = PassReads(line, steps, tile_rows)
    for one in passes:
        one.reads = reads
    with reads.running():
        yield


def embedding_rows(table: SourceTensor, tokens: Sequence[int]) -> Floats:
    """The rows of an embedding for ``tokens``, as they are stored: (n_tokens, n_embd) float32."""
    return read_single_rows(table, tokens)


def one_blas_thread() -> AbstractContextManager[Any]:
    """A block in which numpy's BLAS has one thread, in the whole process."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(limits=1, user_api="blas")  # type: ignore[no-any-return]


def _softmax(x: Floats) -> Floats:
    exponentials = np.exp(x - x.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)  # type: ignore[no-any-return]


def _inverse_frequencies(config: ModelConfig) -> Floats:
    """Rope's angular step of each pair of a head that is rotated, float32, with the config's scaling applied."""
    n_rotated = int(config.head_dim * config.rotary_fraction)
    exponents = np.arange(0, n_rotated, 2, dtype=np.float32) / np.float32(n_rotated)
    frequencies = (1.0 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    scaling = config.rope_scaling
    if scaling.kind in ("none", "dynamic"):  # dynamic scaling begins past the context, where no prompt ends
        out: Floats = frequencies
        return out
    if scaling.kind == "linear":
        scaled: Floats = (frequencies / np.float32(scaling.parameters["factor"])).astype(np.float32)
        return scaled
    if scaling.factors:
        divided: Floats = frequencies / np.array(scaling.factors, dtype=np.float32)
        return divided
    if scaling.kind == "llama3":
        return _llama3_frequencies(frequencies, scaling.parameters)
    raise CheckpointError(f"hidden states cannot be computed with {scaling.kind} rope scaling")


def _llama3_frequencies(frequencies: Floats, parameters: Any) -> Floats:
    """Llama 3.1's scaling: long waves are divided by the factor, short ones kept, those between interpolated."""
    factor = float(parameters["factor"])
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    context = float(parameters["original_max_position_embeddings"])
    wavelengths = 2 * math.pi / frequencies
    smooth = np.clip((context / wavelengths - low) / (high - low), 0.0, 1.0)
    out: Floats = ((1 - smooth) * frequencies / factor + smooth * frequencies).astype(np.float32)
    return out
