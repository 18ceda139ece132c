"""A routing trace in words and as plain data, for JSON."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufmoe.routing.statistics import LabelledShares, Summary, favourites
from ggufmoe.routing.trace import RoutingTrace
from ggufmoe.sizes import counted

_MOST_LISTED, _MOST_NAMED = 24, 12
"""Dead experts beyond the first number are counted; of fewer, so many are named."""


def trace_report(trace: RoutingTrace, summary: Summary) -> dict[str, Any]:
    """Everything that was recorded and counted; arrays as nested lists, tokens x layers x experts."""
    return {
        "n_expert": trace.n_expert,
        "n_expert_used": trace.n_expert_used,
        "expert_names": [trace.name(expert) for expert in range(trace.n_expert)],
        "n_prompt": trace.n_prompt,
        "layers": list(trace.layers),
        "tokens": list(trace.token_ids),
        "texts": list(trace.texts),
        "probabilities": _rounded(trace.probabilities),
        "chosen": trace.chosen.tolist(),
        "weights": _rounded(trace.weights),
        "summary": {
            "share_of": "weight" if trace.every_expert_runs else "choices",
            "share": _rounded(summary.share),
            "mean_share": _rounded(summary.mean_share),
            "token_entropy_bits": round(summary.token_entropy_bits, 6),
            "share_entropy_bits": _rounded(summary.share_entropy_bits),
            "load_balancing_loss": round(summary.load_balancing_loss, 6),
            "capacity_factor": summary.capacity_factor,
            "capacity": summary.capacity,
            "tokens_over_capacity": summary.over_capacity.tolist(),
            "dead_experts": [list(pair) for pair in summary.dead],
            "favourites": [
                [[one.text, round(one.weight, 6), one.count] for one in favourites(trace, expert)]
                for expert in range(trace.n_expert)
            ],
        },
    }


def shares_report(shares: LabelledShares) -> dict[str, Any]:
    """The comparison of labels."""
    return {
        "share_of": "weight" if shares.by_weight else "choices",
        "layers": list(shares.layers),
        "most_telling_layer": shares.most_telling_layer,
        "labels": [
            {"label": label, "n_tokens": n, "share": _rounded(mean), "share_by_layer": _rounded(by_layer)}
            for label, n, mean, by_layer in zip(
                shares.labels, shares.n_tokens, shares.mean, shares.by_layer, strict=True
            )
        ],
    }


def summary_lines(trace: RoutingTrace, summary: Summary) -> list[tuple[str, str]]:
    """The numbers of a summary, each as a name and a sentence."""
    most = np.log2(trace.n_expert)
    over = int(summary.over_capacity.sum())
    return [
        ("token entropy", f"{summary.token_entropy_bits:.3f} of {most:.3f} bits (0: the router is sure of each token)"),
        (
            "share entropy",
            f"{summary.share_entropy_bits.mean():.3f} of {most:.3f} bits (0: all goes to one expert of each layer)",
        ),
        ("load-balancing loss", f"{summary.load_balancing_loss:.4f} (even routing: {trace.n_expert_used})"),
        (
            "over capacity",
            f"{over} of {trace.chosen.size} places, with room for {counted(summary.capacity, 'token')} in each expert "
            f"(capacity factor {summary.capacity_factor:g})",
        ),
        ("dead experts", _dead(trace, summary)),
    ]


def _dead(trace: RoutingTrace, summary: Summary) -> str:
    """The experts that no token went to, or how many there are in each layer where the list would be long."""
    if len(summary.dead) > _MOST_LISTED:
        by_layer = Counter(layer for layer, _ in summary.dead)
        most = sorted(by_layer, key=lambda layer: (-by_layer[layer], layer))[:_MOST_NAMED]
        total = f"{len(summary.dead)} of {trace.n_layer * trace.n_expert}"
        return f"{total}, most in layers " + ", ".join(f"{layer} ({by_layer[layer]})" for layer in most)
    named = ", ".join(f"{expert} in layer {layer}" for layer, expert in summary.dead[:_MOST_NAMED])
    n_more = len(summary.dead) - _MOST_NAMED
    return (named + f" and {n_more} more" * (n_more > 0)) or "none"


def _rounded(array: NDArray[np.floating]) -> Any:
    return np.round(array.astype(np.float64), 6).tolist()
