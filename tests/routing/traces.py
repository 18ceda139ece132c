"""Routing traces made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ggufmoe.routing import RoutingTrace


def trace_of(
    probabilities: Sequence[object], n_used: int, *, texts: Sequence[str] | None = None, n_prompt: int | None = None
) -> RoutingTrace:
    """A trace with these probabilities (n_token, n_layer, n_expert); weights are rescaled as a Mixtral does it."""
    scores = np.asarray(probabilities, np.float32)
    n_token = len(scores)
    chosen = np.argsort(-scores, axis=-1, kind="stable")[..., :n_used].astype(np.int32)
    weights = np.take_along_axis(scores, chosen, axis=-1)
    names = tuple(texts or (f" t{i}" for i in range(n_token)))
    return RoutingTrace(
        token_ids=tuple(sorted(set(names)).index(name) + 3 for name in names),
        texts=names,
        n_prompt=n_token if n_prompt is None else n_prompt,
        layers=tuple(range(scores.shape[1])),
        probabilities=scores,
        chosen=chosen,
        weights=(weights / weights.sum(axis=-1, keepdims=True)).astype(np.float32),
    )


def random_trace(n_token: int, n_layer: int, n_expert: int, n_used: int, seed: int = 0) -> RoutingTrace:
    scores = np.exp(np.random.default_rng(seed).normal(0, 1.5, (n_token, n_layer, n_expert)))
    return trace_of(list(scores / scores.sum(axis=-1, keepdims=True)), n_used)
