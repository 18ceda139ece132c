"""Numbers about a routing trace: shares, entropy, balance, capacity, favourites. Pure functions of arrays."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ggufmoe.errors import InputError
from ggufmoe.routing.trace import RoutingTrace

Numbers = NDArray[np.float64]


def choice_share(trace: RoutingTrace) -> Numbers:
    """Part of each layer's choices that fell on each expert: (n_layer, n_expert), rows sum to one."""
    return _load(trace) / (trace.n_token * trace.n_expert_used)


def weight_share(trace: RoutingTrace) -> Numbers:
    """Part of each layer's weight that each expert had: (n_layer, n_expert), rows sum to one."""
    share: Numbers = trace.expert_shares.mean(axis=0, dtype=np.float64)
    return share


def share(trace: RoutingTrace) -> Numbers:
    """What tells experts apart: their share of choices, or of weight where every expert runs on every token."""
    return weight_share(trace) if trace.every_expert_runs else choice_share(trace)


def _load(trace: RoutingTrace) -> NDArray[np.int64]:
    """Number of tokens that each expert of each layer was chosen for: (n_layer, n_expert)."""
    load = np.zeros((trace.n_layer, trace.n_expert), np.int64)
    for row in range(trace.n_layer):
        load[row] = np.bincount(trace.chosen[:, row].ravel(), minlength=trace.n_expert)
    return load


def entropy_bits(distribution: NDArray[np.floating]) -> Numbers:
    """Shannon's entropy along the last axis, in bits; log2(n_expert) is an even spread, 0 a single expert."""
    p = distribution.astype(np.float64)
    terms: Numbers = np.where(p > 0, -p * np.log2(np.where(p > 0, p, 1)), 0)
    out: Numbers = terms.sum(axis=-1)
    return out


def token_entropy(trace: RoutingTrace) -> Numbers:
    """How undecided the router was, in bits: (n_token, n_layer)."""
    return entropy_bits(trace.probabilities)


def load_balancing_loss(trace: RoutingTrace) -> float:
    """The auxiliary loss of Mixtral in transformers' definition (``load_balancing_loss_func``), all layers together.

    With f[k, e] the part of all (token, layer) pairs whose k-th choice is expert e, and P[e] the mean probability of
    e: n_expert * sum over k and e of f[k, e] * P[e]. Even routing gives n_expert_used; more is less even. After
    equations 4 to 6 of the Switch Transformer (arXiv:2101.03961).
    """
    pairs = trace.n_token * trace.n_layer
    chosen = np.bincount(trace.chosen.ravel(), minlength=trace.n_expert) / pairs
    mean = trace.probabilities.reshape(pairs, trace.n_expert).mean(axis=0, dtype=np.float64)
    return float(trace.n_expert * (chosen * mean).sum())


def expert_capacity(trace: RoutingTrace, factor: float = 1.0) -> int:
    """Tokens that an expert has room for: n_token * n_expert_used / n_expert * factor, rounded down.

    The Switch Transformer's definition (section 2.2, with one expert a token), extended to several as GShard does.
    """
    if not factor > 0:
        raise InputError(f"a capacity factor is greater than 0, not {factor}")
    # a tiny bit more, so that 1.1 * 10 has room for 11
    return int(trace.n_token * trace.n_expert_used / trace.n_expert * factor + 1e-9)


def tokens_over_capacity(trace: RoutingTrace, factor: float = 1.0) -> NDArray[np.int64]:
    """Tokens beyond each expert's capacity, which a Switch Transformer would drop: (n_layer, n_expert)."""
    return np.maximum(_load(trace) - expert_capacity(trace, factor), 0)


def dead_experts(trace: RoutingTrace) -> tuple[tuple[int, int], ...]:
    """(layer number, expert) of all experts that no token of this text went to."""
    return tuple((trace.layers[row], int(expert)) for row, expert in np.argwhere(_load(trace) == 0))


@dataclass(frozen=True)
class Favourite:
    """A token that an expert gets more of than of others.

    ``weight`` is the expert's mean share in its weight, ``more`` by how much that exceeds the expert's mean share of
    all tokens, ``count`` how often the token occurs.
    """

    text: str
    weight: float
    more: float
    count: int


def favourites(trace: RoutingTrace, expert: int, *, layer: int | None = None, n: int = 8) -> list[Favourite]:
    """The ``n`` tokens for which ``expert`` had most above its average, in one layer or in the mean of all.

    Equal tokens count as one; tokens of which it had no more than its average are left out.
    """
    weights = trace.mean_weights(layer)[:, expert]
    mean = float(weights.mean(dtype=np.float64))
    found = []
    for token in dict.fromkeys(trace.token_ids):
        at = [i for i, other in enumerate(trace.token_ids) if other == token]
        weight = float(weights[at].mean(dtype=np.float64))
        found.append(Favourite(trace.texts[at[0]], weight, weight - mean, len(at)))
    found.sort(key=lambda one: (-one.weight, -one.count))
    return [one for one in found if one.more > 1e-6][:n]


@dataclass(frozen=True, eq=False)
class LabelledShares:
    """Share of every expert by label, all tokens of a label together."""

    labels: tuple[str, ...]
    n_tokens: tuple[int, ...]
    layers: tuple[int, ...]
    by_weight: bool
    """Whether these are shares of weight; else of choices."""
    by_layer: Numbers
    """(n_label, n_layer, n_expert), the last axis sums to one."""

    @property
    def mean(self) -> Numbers:
        """Mean over the layers: (n_label, n_expert)."""
        out: Numbers = self.by_layer.mean(axis=1)
        return out

    @property
    def spread(self) -> Numbers:
        """How far labels are apart in each layer: the largest difference of a share between labels, (n_layer,)."""
        out: Numbers = np.ptp(self.by_layer, axis=0).max(axis=-1)
        return out

    @property
    def most_telling_layer(self) -> int:
        """Number of the layer where the labels are furthest apart."""
        return self.layers[int(self.spread.argmax())]


def share_by_label(labelled: Iterable[tuple[str, RoutingTrace]]) -> LabelledShares:
    """Which experts the texts of each label went to. Raises InputError without a text, or for an empty one."""
    groups: dict[str, list[RoutingTrace]] = {}
    for label, trace in labelled:
        groups.setdefault(label, []).append(trace)
    if not groups or any(trace.n_token == 0 for traces in groups.values() for trace in traces):
        raise InputError("to compare routing, each label needs a text of one token or more")
    one = next(iter(groups.values()))[0]
    n_tokens = {label: sum(trace.n_token for trace in traces) for label, traces in groups.items()}
    rows = [
        sum((share(trace) * (trace.n_token / n_tokens[label]) for trace in traces), np.zeros(()))
        for label, traces in groups.items()
    ]
    return LabelledShares(tuple(groups), tuple(n_tokens.values()), one.layers, one.every_expert_runs, np.stack(rows))


@dataclass(frozen=True, eq=False)
class Summary:
    """The numbers that stand below the pictures."""

    share: Numbers
    """(n_layer, n_expert)."""
    mean_share: Numbers
    """(n_expert,)."""
    token_entropy_bits: float
    """Mean over tokens and layers."""
    share_entropy_bits: Numbers
    """Of each layer's shares: (n_layer,)."""
    load_balancing_loss: float
    capacity_factor: float
    capacity: int
    over_capacity: NDArray[np.int64]
    """(n_layer, n_expert) tokens."""
    dead: tuple[tuple[int, int], ...]


def summarize(trace: RoutingTrace, capacity_factor: float = 1.0) -> Summary:
    """All numbers of one trace. Raises InputError for a capacity factor that is none."""
    shares = share(trace)
    return Summary(
        share=shares,
        mean_share=shares.mean(axis=0),
        token_entropy_bits=float(token_entropy(trace).mean()),
        share_entropy_bits=entropy_bits(shares),
        load_balancing_loss=load_balancing_loss(trace),
        capacity_factor=capacity_factor,
        capacity=expert_capacity(trace, capacity_factor),
        over_capacity=tokens_over_capacity(trace, capacity_factor),
        dead=dead_experts(trace),
    )
