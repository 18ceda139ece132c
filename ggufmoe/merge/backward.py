"""Gradients of a model's loss in numpy, layer by layer, and the sums of squares that a sensitivity is made of.

Owns the way back through what ``merge.forward`` computes: each layer is computed again from its input, and then
differentiated. Of a layer the weights of attention are in memory, of all other matrices a tile at a time; each matrix
is read once. Sums are added in an order that does not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ggufmoe.families.family import WEIGHT
from ggufmoe.gguf.upstream import MODEL_TENSOR
from ggufmoe.merge.forward import HEAD_NORMS, TILE_BYTES, Floats, ForwardPass
from ggufmoe.merge.gradients import attention_gradients, attention_weights, norm_gradient, routing_gradient
from ggufmoe.weights.dtypes import read_f32
from ggufmoe.weights.views import ReorderedRows

ResultT = TypeVar("ResultT")
_BLOCK_TOKENS = 256
"""Tokens that a thread computes at once."""
_ATTENTION = (MODEL_TENSOR.ATTN_Q, MODEL_TENSOR.ATTN_K, MODEL_TENSOR.ATTN_V, MODEL_TENSOR.ATTN_OUT)
_DENSE = (MODEL_TENSOR.FFN_GATE, MODEL_TENSOR.FFN_UP, MODEL_TENSOR.FFN_DOWN)
_ROUTED = (MODEL_TENSOR.FFN_GATE_EXP, MODEL_TENSOR.FFN_UP_EXP, MODEL_TENSOR.FFN_DOWN_EXP)
_SHARED = (MODEL_TENSOR.FFN_GATE_SHEXP, MODEL_TENSOR.FFN_UP_SHEXP, MODEL_TENSOR.FFN_DOWN_SHEXP)


@dataclass(frozen=True, eq=False)
class MatrixSums:
    """What was measured of one matrix, or of each matrix of a stack of experts; ``n`` is 1 or the number of experts."""

    in_sum2: Floats
    """(n, columns) float32: the sum over tokens of the square of each input."""
    counts: Floats
    """(n,) float32: tokens that reached the matrix."""
    grad_sum2: Floats
    """(n, rows) float32: the sum over the same tokens of the square of the gradient of the loss (of one token's, in
    nats, not divided by the number of tokens) with regard to each output."""


Sums = dict[str, MatrixSums]
"""What was measured of matrices, by their GGUF names."""


@dataclass(frozen=True)
class _Attended:
    """What attention of one layer computed: (n_tokens, ...) each; ``weights`` are the four projections."""

    weights: Mapping[Any, Floats]
    normed: Floats
    rows: Mapping[Any, Floats]
    """Queries, keys and values before norms and rope."""
    mixed: Floats
    """The input of the output projection."""
    output: Floats
    """The residual stream after attention."""


@dataclass(frozen=True)
class Drawn:
    """What the loss of each token is made of, (n_tokens,) each."""

    targets: NDArray[np.intp]
    log_sums: Floats
    """The logarithm of the sum of the exponentials of the logits."""


class BackwardPass(ForwardPass):
    """Computes a model forward and then backward, for the loss that targets drawn from its own distribution have.

    Gradients are those of the sum over all tokens of ``-log p(target)``, in nats, or of another loss in its place.
    """

    def router_rows(self, layer: int) -> Floats:
        """The rows of a layer's router, (n_expert, n_embd)."""
        return read_f32(self._tensors[self._name(MODEL_TENSOR.FFN_GATE_INP, layer)])

    def on_router(self, layer: int, normed: Floats, of_logits: Floats) -> None:
        """Called on the way back with a router's input (n, n_embd) and the gradient of its logits (n, n_expert)."""

    def drawn(self, hidden: Floats, seed: int) -> Drawn:
        """A target for each token, drawn from what the model says; ``hidden`` is the residual stream after the last
        layer. The same for the same ``seed``.

        The largest of logits plus Gumbel noise is a draw from their softmax (Gumbel 1954), found tile by tile.
        """
        normed = self._norm(self._name(MODEL_TENSOR.OUTPUT_NORM), hidden)

        def part(start: int, rows: Floats) -> tuple[Floats, Floats, Floats, NDArray[np.intp]]:
            logits = normed @ rows.T
            logits *= self._logit_factor
            largest = logits.max(axis=1)
            total = np.exp(logits - largest[:, None]).sum(axis=1)
            random = np.random.Generator(np.random.Philox(key=[seed, start]))
            noise = random.standard_exponential(logits.shape, dtype=np.float32)
            logits -= np.log(np.maximum(noise, np.finfo(np.float32).tiny))
            best = logits.argmax(axis=1)
            return largest, total, np.take_along_axis(logits, best[:, None], axis=1)[:, 0], best + start

        parts = zip(*self._map_tiles(self._head(), part), strict=True)
        largest, totals, noisy, tokens = (np.stack(values) for values in parts)
        highest = largest.max(axis=0)
        log_sums = highest + np.log((totals * np.exp(largest - highest)).sum(axis=0))
        return Drawn(np.take_along_axis(tokens, noisy.argmax(axis=0)[None], axis=0)[0], log_sums)

    @property
    def _logit_factor(self) -> np.float32:
        factor: np.float32 = np.float32(1 / self._arithmetic.logit_scale)
        return factor

    def head_gradient(self, hidden: Floats, drawn: Drawn) -> tuple[Sums, Floats]:
        """The sums of the output matrix, and the gradient of ``hidden``, the residual stream after the last layer."""
        norm, scale = self._name(MODEL_TENSOR.OUTPUT_NORM), self._logit_factor
        targets, log_sums = drawn.targets, drawn.log_sums
        normed = self._norm(norm, hidden)
        gradient = np.zeros_like(normed)
        squares = []
        for start, rows in self._tiles(self._head()):

            def part(tokens: slice, start: int = start, rows: Floats = rows) -> NDArray[np.float64]:
                of_logits = normed[tokens] @ rows.T
                of_logits *= scale
                of_logits -= log_sums[tokens, None]
                np.exp(of_logits, out=of_logits)
                columns = targets[tokens] - start
                here = np.nonzero((columns >= 0) & (columns < len(rows)))[0]
                of_logits[here, columns[here]] -= np.float32(1)
                of_logits *= scale
                gradient[tokens] += of_logits @ rows
                return _squares(of_logits)

            squares.append(np.sum(self._by_tokens(part, len(normed)), axis=0))
        output = self._family.rule(MODEL_TENSOR.OUTPUT)
        assert output is not None, "every family has an output"
        sums = _sums(_squares(normed), np.concatenate(squares), len(normed))
        return {output.gguf_name(): sums}, self._through_norm(norm, hidden, gradient)

    def softened(self, hidden: Floats, other: Floats, temperature: float) -> tuple[Floats, Floats]:
        """How far what the states ``hidden`` say of the next token is from what ``other`` say, and its gradient.

        Both are (n, n_embd), after the last layer. The first result, (n,), is the divergence (Kullback and Leibler) of
        the distributions with all logits divided by ``temperature``, times its square (Hinton et al. 2015); the
        second, (n, n_embd), the gradient of ``hidden``.
        """
        norm, scale = self._name(MODEL_TENSOR.OUTPUT_NORM), self._logit_factor / np.float32(temperature)
        mine, theirs = self._norm(norm, hidden) * scale, self._norm(norm, other) * scale
        log_sums = [self._log_sums(normed) for normed in (mine, theirs)]
        gradient, distances = np.zeros_like(mine), np.zeros(len(mine), np.float32)
        for _, rows in self._tiles(self._head()):

            def part(tokens: slice, rows: Floats = rows) -> None:
                ours, wanted = (
                    normed[tokens] @ rows.T - sums[tokens, None]
                    for normed, sums in zip((mine, theirs), log_sums, strict=True)
                )
                likely = np.exp(wanted)
                distances[tokens] += (likely * (wanted - ours)).sum(axis=1)
                gradient[tokens] += (np.exp(ours) - likely) @ rows

            self._by_tokens(part, len(mine))
        square = np.float32(temperature**2)
        return distances * square, self._through_norm(norm, hidden, gradient * (scale * square))

    def _log_sums(self, normed: Floats) -> Floats:
        """The logarithm of the sum of the exponentials of the products of each state with the output matrix, (n,)."""

        def part(start: int, rows: Floats) -> tuple[Floats, Floats]:
            products = normed @ rows.T
            largest = products.max(axis=1)
            return largest, np.exp(products - largest[:, None]).sum(axis=1)

        largest, sums = (np.stack(values) for values in zip(*self._map_tiles(self._head(), part), strict=True))
        highest = largest.max(axis=0)
        out: Floats = highest + np.log((sums * np.exp(largest - highest)).sum(axis=0))
        return out

    def layer_gradient(
        self, layer: int, hidden: Floats, gradient: Floats, prompts: Sequence[Sequence[int]]
    ) -> tuple[Sums, Floats]:
        """The sums of a layer's matrices, and the gradient of ``hidden``, the residual stream before it.

        ``gradient`` is that of the residual stream after the layer; all are (n_tokens, n_embd).
        """
        attended = self._attended(layer, hidden, prompts)
        norm = self._feed_forward_norm(layer)
        scale = np.float32(self._arithmetic.residual_scale)
        sums, of_normed = self._feed_forward_gradient(layer, self._norm(norm, attended.output), gradient * scale)
        gradient = gradient + self._through_norm(norm, attended.output, of_normed)
        of_attention, of_normed = self._attention_gradient(layer, attended, gradient * scale, prompts)
        name = self._name(MODEL_TENSOR.ATTN_NORM, layer)
        return sums | of_attention, gradient + self._through_norm(name, hidden, of_normed)

    def embedding_squares(self, gradient: Floats) -> Floats:
        """Sums over tokens of the squared gradient of the stored rows, (n_embd,), from that of the first layer."""
        scale = np.float32(self._arithmetic.embedding_scale)
        squares: Floats = _squares(gradient * scale).astype(np.float32)
        return squares

    # ---- attention

    def _attend(self, q: Floats, k: Floats, v: Floats) -> Floats:
        out = np.empty_like(q)

        def mix(heads: tuple[slice, int]) -> None:
            mine, head = heads
            queries = turned_q[:, mine].swapaxes(0, 1)
            weights = attention_weights(queries, turned_k[:, head], self._scale, self._hidden_from(len(q)))
            out[:, mine] = (weights @ v[:, head]).swapaxes(0, 1)

        turned_q, turned_k = self._rope(q), self._rope(k)
        self.work.map(mix, self._groups(), self._threads)
        return out.reshape(len(q), -1)

    def _groups(self) -> list[tuple[slice, int]]:
        """The heads of queries that each head of keys and values has."""
        group = self._config.n_head // self._config.n_head_kv
        return [(slice(head * group, (head + 1) * group), head) for head in range(self._config.n_head_kv)]

    @property
    def _scale(self) -> float:
        return float(self._arithmetic.attention_scale or self._config.head_dim**-0.5)

    def _hidden_from(self, n_tokens: int) -> NDArray[np.bool_]:
        position = np.arange(n_tokens)
        before = position[:, None] - position[None, :]
        hidden_from: NDArray[np.bool_] = before < 0
        if self._config.sliding_window:
            hidden_from |= before >= self._config.sliding_window
        return hidden_from

    def _attended(self, layer: int, hidden: Floats, prompts: Sequence[Sequence[int]]) -> _Attended:
        weights = {tensor: read_f32(self._tensors[self._name(tensor, layer)]) for tensor in _ATTENTION}
        normed = self._norm(self._name(MODEL_TENSOR.ATTN_NORM, layer), hidden)
        rows = {
            tensor: self._biased(tensor, layer, self._times(normed, weights[tensor].T)) for tensor in _ATTENTION[:3]
        }
        q, k, v = (self._heads(tensor, layer, rows[tensor]) for tensor in _ATTENTION[:3])
        mixed = np.concatenate([self._attend(q[span], k[span], v[span]) for span in _spans(prompts)])
        out = self._biased(MODEL_TENSOR.ATTN_OUT, layer, self._times(mixed, weights[MODEL_TENSOR.ATTN_OUT].T))
        return _Attended(weights, normed, rows, mixed, self.added(hidden, out))

    def _attention_gradient(
        self, layer: int, attended: _Attended, gradient: Floats, prompts: Sequence[Sequence[int]]
    ) -> tuple[Sums, Floats]:
        """The sums of the projections of attention, and the gradient of its input, from that of its output."""
        of_mixed = self._times(gradient, attended.weights[MODEL_TENSOR.ATTN_OUT])
        heads = {tensor: self._heads(tensor, layer, attended.rows[tensor]) for tensor in _ATTENTION[:3]}
        of_heads = {tensor: np.empty_like(one) for tensor, one in heads.items()}
        for span in _spans(prompts):
            self._attend_gradient(span, heads, of_mixed, of_heads)
        squares = _squares(attended.normed)
        sums: Sums = {}
        of_normed = np.zeros_like(attended.normed)
        for tensor in _ATTENTION[:3]:
            of_rows = self._through_head_norm(tensor, layer, attended.rows[tensor], of_heads[tensor])
            of_normed += self._times(of_rows, attended.weights[tensor])
            sums |= self._named((tensor,), layer, [[_sums(squares, _squares(of_rows), len(of_rows))]])
        output = _sums(_squares(attended.mixed), _squares(gradient), len(gradient))
        return sums | self._named((MODEL_TENSOR.ATTN_OUT,), layer, [[output]]), of_normed

    def _attend_gradient(
        self, span: slice, heads: Mapping[Any, Floats], of_mixed: Floats, of_heads: Mapping[Any, Floats]
    ) -> None:
        """Fill ``of_heads`` with the gradients of queries, keys and values (before rope) of one text."""
        q, k, v = (heads[tensor][span] for tensor in _ATTENTION[:3])
        turned_q, turned_k = self._rope(q), self._rope(k)
        of_out = of_mixed[span].reshape(q.shape)
        of_q, of_k, of_v = np.empty_like(q), np.empty_like(k), np.empty_like(v)
        hidden_from = self._hidden_from(len(q))

        def differentiate(group: tuple[slice, int]) -> None:
            mine, head = group
            queries, keys, values = turned_q[:, mine].swapaxes(0, 1), turned_k[:, head], v[:, head]
            weights = attention_weights(queries, keys, self._scale, hidden_from)
            found = attention_gradients(queries, keys, values, weights, of_out[:, mine].swapaxes(0, 1), self._scale)
            of_q[:, mine], of_k[:, head], of_v[:, head] = found[0].swapaxes(0, 1), found[1], found[2]

        self.work.map(differentiate, self._groups(), self._threads)
        for tensor, found in zip(_ATTENTION, (self._rope(of_q, -1), self._rope(of_k, -1), of_v), strict=False):
            of_heads[tensor][span] = found

    def _through_head_norm(self, tensor: Any, layer: int, rows: Floats, of_heads: Floats) -> Floats:
        """The gradient of what a projection gives, from that of its heads."""
        norm = HEAD_NORMS.get(tensor)
        weight = None if norm is None else self._vector(norm, layer, WEIGHT)
        if weight is None:
            return of_heads.reshape(rows.shape)
        shape = rows.shape if weight.size == rows.shape[1] else of_heads.shape
        return self._norm_gradient(rows.reshape(shape), weight, of_heads.reshape(shape)).reshape(rows.shape)

    # ---- feed-forward parts

    def _feed_forward_gradient(self, layer: int, normed: Floats, gradient: Floats) -> tuple[Sums, Floats]:
        """The sums of a layer's MLP or experts, and the gradient of its input, from that of its output."""
        if not self._has(MODEL_TENSOR.FFN_GATE_INP, layer):
            names = [self._name(tensor, layer) for tensor in _DENSE]
            found = self._swiglu_gradient(names, normed, gradient, None)
            return self._named(_DENSE, layer, [found.sums]), found.of_input
        sums, of_normed = self._experts_gradient(layer, normed, gradient)
        if self._has(_SHARED[0], layer):
            of_shared, of_input = self._shared_gradient(layer, normed, gradient)
            sums, of_normed = sums | of_shared, of_normed + of_input
        return sums, of_normed

    def _experts_gradient(self, layer: int, normed: Floats, gradient: Floats) -> tuple[Sums, Floats]:
        logits = self.router_logits(layer, normed)
        chosen, weights = self.routes(layer, logits)
        of_weights, of_normed = np.zeros_like(weights), np.zeros_like(normed)
        found: list[Sequence[MatrixSums]] = []
        for expert in range(self._config.n_expert):
            rows, slots = np.nonzero(chosen == expert)
            names = [self._name(tensor, layer, expert) for tensor in _ROUTED]
            one = self._swiglu_gradient(names, normed[rows], gradient[rows], weights[rows, slots])
            of_weights[rows, slots] = one.of_weights
            of_normed[rows] += one.of_input
            found.append(one.sums)
        of_logits = routing_gradient(self._arithmetic.routing, logits, chosen, of_weights)
        self.on_router(layer, normed, of_logits)
        of_normed += of_logits @ self.router_rows(layer)
        router = _sums(_squares(normed), _squares(of_logits), len(normed))
        return self._named(_ROUTED, layer, found) | self._named(
            (MODEL_TENSOR.FFN_GATE_INP,), layer, [[router]]
        ), of_normed

    def _shared_gradient(self, layer: int, normed: Floats, gradient: Floats) -> tuple[Sums, Floats]:
        gate = self._vector(MODEL_TENSOR.FFN_GATE_INP_SHEXP, layer, WEIGHT)
        weights = None if gate is None else np.float32(1) / (np.float32(1) + np.exp(-(normed @ gate)))
        names = [self._name(tensor, layer) for tensor in _SHARED]
        found = self._swiglu_gradient(names, normed, gradient, weights)
        sums = self._named(_SHARED, layer, [found.sums])
        if gate is None or weights is None:
            return sums, found.of_input
        of_logit = (found.of_weights * weights * (1 - weights))[:, None]
        measured = _sums(_squares(normed), _squares(of_logit), len(normed))
        sums |= self._named((MODEL_TENSOR.FFN_GATE_INP_SHEXP,), layer, [[measured]])
        return sums, found.of_input + of_logit * gate

    def _swiglu_gradient(
        self, names: Sequence[str], x: Floats, gradient: Floats, weights: Floats | None
    ) -> _SwigluGradient:
        """Of one MLP with the matrices ``names`` (gate, up, down), whose output is multiplied with ``weights`` (n,).

        ``gradient`` is that of the weighted output. Gate and up are read side by side, a tile of each.
        """
        gate, up, down = names
        n_ff, n_embd = self._tensors[gate].shape
        of_input = np.zeros_like(x)
        if not len(x):
            nothing = np.zeros(n_embd), np.zeros(n_ff)
            sums = (_sums(*nothing, 0), _sums(*nothing, 0), _sums(*nothing[::-1], 0))
            return _SwigluGradient(sums, of_input, np.zeros(0, np.float32))
        factors = np.float32(1) if weights is None else weights[:, None]
        of_activated = self._transposed_product(down, gradient)
        of_weights = np.zeros(len(x), np.float32)
        squares = np.zeros((3, n_ff))
        up_rows = self._tensors[up]
        for start, gate_tile in self._tiles(gate):
            stop = start + len(gate_tile)
            up_tile = read_f32(up_rows, start, stop)

            def part(
                tokens: slice, start: int = start, gate_tile: Floats = gate_tile, up_tile: Floats = up_tile
            ) -> NDArray[np.float64]:
                inputs = x[tokens]
                gated, upped = inputs @ gate_tile.T, inputs @ up_tile.T
                share = np.float32(1) / (np.float32(1) + np.exp(-gated))
                silu = gated * share
                activated = silu * upped
                of_part = of_activated[tokens, start : start + len(gate_tile)]
                of_weights[tokens] += np.einsum("ij,ij->i", of_part, activated)
                of_part = of_part * (factors if weights is None else factors[tokens])
                of_up = of_part * silu
                of_gate = of_part * upped * share * (1 + gated * (1 - share))
                of_input[tokens] += of_gate @ gate_tile
                of_input[tokens] += of_up @ up_tile
                return np.stack([_squares(one) for one in (of_gate, of_up, activated)])

            squares[:, start:stop] = np.sum(self._by_tokens(part, len(x)), axis=0)
        inputs = _squares(x)
        sums = (
            _sums(inputs, squares[0], len(x)),
            _sums(inputs, squares[1], len(x)),
            _sums(squares[2], _squares(gradient * factors), len(x)),
        )
        return _SwigluGradient(sums, of_input, of_weights)

    # ---- what all parts use

    def _named(self, tensors: Sequence[Any], layer: int, found: Sequence[Sequence[MatrixSums]]) -> Sums:
        """The sums of matrices by their GGUF names; ``found`` has those of each expert, or of one MLP.

        Rows are put in the order that they have in a GGUF file.
        """
        out: Sums = {}
        for tensor, parts in zip(tensors, zip(*found, strict=True), strict=True):
            rule = self._family.rule(tensor)
            assert rule is not None, "it was measured"
            stack = MatrixSums(
                *(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(MatrixSums))
            )
            source = self._tensors[rule.name(layer)]
            turned = rule.transform(source, self._config)
            if isinstance(turned, ReorderedRows):
                order = [turned.source_row(row) for row in range(turned.shape[0])]
                stack = replace(stack, grad_sum2=stack.grad_sum2[:, order])
            else:
                assert turned is source, "no family that is computed here changes a matrix otherwise"
            out[rule.gguf_name(layer)] = stack
        return out

    def _tiles(self, name: str) -> Iterator[tuple[int, Floats]]:
        """The first row and the float32 rows of each tile of a weight."""
        tensor = self._tensors[name]
        n_rows, n_cols = tensor.shape
        step = max(1, TILE_BYTES // (4 * n_cols))
        for start in range(0, n_rows, step):
            self.work.check()
            yield start, read_f32(tensor, start, min(start + step, n_rows))

    def _by_tokens(self, function: Callable[[slice], ResultT], n_tokens: int) -> list[ResultT]:
        """Call ``function`` in several threads with blocks of tokens that do not depend on the number of threads."""
        blocks = [slice(start, start + _BLOCK_TOKENS) for start in range(0, n_tokens, _BLOCK_TOKENS)]
        return self.work.map(function, blocks, self._threads)

    def _times(self, x: Floats, weights: Floats) -> Floats:
        """x (n, a) times weights (a, b) that are in memory."""
        out = np.empty((len(x), weights.shape[1]), np.float32)
        self._by_tokens(lambda tokens: np.matmul(x[tokens], weights, out=out[tokens]), len(x))
        return out

    def _transposed_product(self, name: str, gradient: Floats) -> Floats:
        """gradient (n, n_rows) times a weight (n_rows, n_cols), tile by tile."""
        out = np.zeros((len(gradient), self._tensors[name].shape[1]), np.float32)
        for start, rows in self._tiles(name):

            def part(tokens: slice, start: int = start, rows: Floats = rows) -> None:
                out[tokens] += gradient[tokens, start : start + len(rows)] @ rows

            self._by_tokens(part, len(gradient))
        return out

    def _through_norm(self, name: str, x: Floats, gradient: Floats) -> Floats:
        return self._norm_gradient(x, read_f32(self._tensors[name])[0], gradient)

    def _norm_gradient(self, x: Floats, weight: Floats, gradient: Floats) -> Floats:
        weight = weight + np.float32(self._arithmetic.norm_offset)
        return norm_gradient(x, weight, gradient, self._config.rms_norm_eps)


@dataclass(frozen=True)
class _SwigluGradient:
    """The way back through one MLP."""

    sums: Sequence[MatrixSums]
    """Of gate, up and down."""
    of_input: Floats
    of_weights: Floats
    """(n,): of what each token's output is multiplied with."""


def _spans(prompts: Sequence[Sequence[int]]) -> Iterator[slice]:
    """The rows of each text among those of all."""
    start = 0
    for prompt in prompts:
        yield slice(start, start + len(prompt))
        start += len(prompt)


def _sums(inputs: NDArray[Any], gradients: NDArray[Any], n_tokens: int) -> MatrixSums:
    counts = np.array([n_tokens], np.float32)
    return MatrixSums(inputs[None].astype(np.float32), counts, gradients[None].astype(np.float32))


def _squares(x: Floats) -> NDArray[np.float64]:
    """The sums of squares of each column, (n_cols,) float64."""
    out = np.zeros(x.shape[1])
    for start in range(0, len(x), _BLOCK_TOKENS):
        block = x[start : start + _BLOCK_TOKENS]
        out += np.einsum("ij,ij->j", block, block)
    return out
