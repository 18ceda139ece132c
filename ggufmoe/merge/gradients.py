"""Derivatives of the steps of a decoder layer that have no large weights: norms, attention of one text, routing.

Each function takes the gradient of a loss with regard to the step's output and returns that with regard to its input.
All arrays are float32. The steps themselves are those of ``merge.forward``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ggufmoe.families.family import Routing, Scoring
from ggufmoe.merge.forward import Floats


def norm_gradient(x: Floats, weight: Floats, gradient: Floats, epsilon: float) -> Floats:
    """Through RMSNorm over the last dimension of ``x``; ``weight`` is what the norm multiplies with."""
    inverse = np.float32(1) / np.sqrt(np.mean(x * x, axis=-1, keepdims=True, dtype=np.float32) + np.float32(epsilon))
    weighted = gradient * weight
    shared = np.mean(weighted * x, axis=-1, keepdims=True, dtype=np.float32)
    out: Floats = weighted * inverse - x * (inverse**3 * shared)
    return out


def attention_weights(queries: Floats, keys: Floats, scale: float, hidden_from: NDArray[np.bool_]) -> Floats:
    """What each token takes of each: the softmax (heads, n, n) of queries (heads, n, d) times one head of keys (n, d).

    ``hidden_from`` (n, n) says which tokens (columns) a token (row) does not see.
    """
    scores: Floats = queries @ keys.T
    scores *= np.float32(scale)
    scores[:, hidden_from] = -np.inf
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return scores


def attention_gradients(
    queries: Floats, keys: Floats, values: Floats, weights: Floats, gradient: Floats, scale: float
) -> tuple[Floats, Floats, Floats]:
    """Of queries, keys and values from that of the output, ``weights @ values``.

    Queries, ``gradient`` and the first result are (heads, n, d), keys and values of these heads (n, d).
    """
    of_values = np.matmul(weights.swapaxes(1, 2), gradient).sum(axis=0)
    of_scores = gradient @ values.T
    of_scores -= (of_scores * weights).sum(axis=-1, keepdims=True)
    of_scores *= weights
    of_scores *= np.float32(scale)
    of_keys = np.matmul(of_scores.swapaxes(1, 2), queries).sum(axis=0)
    return of_scores @ keys, of_keys, of_values


def routing_gradient(routing: Routing, logits: Floats, chosen: NDArray[np.intp], gradient: Floats) -> Floats:
    """Of a router's logits (n, n_expert) from that of the weights (n, n_expert_used) of the ``chosen`` experts.

    Which experts are chosen has no derivative.
    """
    picked = np.take_along_axis(logits, chosen, axis=1)
    # shares among all experts, divided by the sum of those of the chosen, are shares among the chosen
    is_softmax = routing.scoring is Scoring.SOFTMAX and not routing.normalized
    if is_softmax:
        scores = np.take_along_axis(_softmax(logits), chosen, axis=1)
    elif routing.scoring is Scoring.SIGMOID:
        scores = np.float32(1) / (np.float32(1) + np.exp(-picked))
    else:
        scores = _softmax(picked)
    of_scores = gradient * np.float32(routing.scale)
    if routing.normalized:
        total = scores.sum(axis=1, keepdims=True)
        of_scores = (of_scores - (of_scores * scores).sum(axis=1, keepdims=True) / total) / total
    of_picked = of_scores * scores
    if routing.scoring is Scoring.SIGMOID:
        of_picked *= 1 - scores
    out = np.zeros_like(logits)
    np.put_along_axis(out, chosen, of_picked, axis=1)
    shared = of_picked.sum(axis=1, keepdims=True)
    if is_softmax:
        out -= _softmax(logits) * shared
    elif routing.scoring is not Scoring.SIGMOID:
        np.put_along_axis(out, chosen, of_picked - scores * shared, axis=1)
    return out


def _softmax(x: Floats) -> Floats:
    exponentials = np.exp(x - x.max(axis=-1, keepdims=True))
    out: Floats = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return out
