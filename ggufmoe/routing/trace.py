"""The record of one text: for every token and layer the router's probabilities, its choice and the weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ggufmoe.errors import OptionError

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """Which experts each token of a text went to.

    A token's row says how the layers treated it as *input*; the last generated token has one too.
    """

    token_ids: tuple[int, ...]
    texts: tuple[str, ...]
    """Each token as text; special tokens as they are spelt, single bytes of a longer character as ``<0xE2>``."""
    n_prompt: int
    """So many of the tokens were given; those after them were generated."""
    layers: tuple[int, ...]
    """Numbers of the layers that have experts (all of them in a Mixtral)."""
    probabilities: Floats
    """The router's scores of all experts, summing to one: (n_token, n_layer, n_expert)."""
    chosen: Ints
    """The experts that ran, the likeliest first: (n_token, n_layer, n_expert_used)."""
    weights: Floats
    """How much each of ``chosen`` counted, as llama.cpp multiplied it: (n_token, n_layer, n_expert_used)."""
    expert_names: tuple[str, ...] = ()
    """What the experts are called, for example after the models that they were made of; empty: by their number."""

    @property
    def n_token(self) -> int:
        return int(self.probabilities.shape[0])

    @property
    def n_layer(self) -> int:
        return int(self.probabilities.shape[1])

    @property
    def n_expert(self) -> int:
        return int(self.probabilities.shape[2])

    @property
    def n_expert_used(self) -> int:
        return int(self.chosen.shape[2])

    @property
    def every_expert_runs(self) -> bool:
        """Whether all experts run on every token, so that only their weights tell tokens apart."""
        return self.n_expert_used == self.n_expert

    @cached_property
    def expert_weights(self) -> Floats:
        """``weights`` by expert, zero for those that did not run: (n_token, n_layer, n_expert)."""
        dense = np.zeros_like(self.probabilities)
        np.put_along_axis(dense, self.chosen, self.weights, axis=2)
        return dense

    @cached_property
    def expert_shares(self) -> Floats:
        """Share of each expert in the weight of a token and layer: (n_token, n_layer, n_expert), summing to one.

        Some architectures do not rescale the weights of the chosen experts, so that ``weights`` sum to less or more.
        """
        total = self.expert_weights.sum(axis=2, keepdims=True)
        shares: Floats = self.expert_weights / np.where(total == 0, np.float32(1), total)
        return shares

    def mean_weights(self, layer: int | None = None) -> Floats:
        """Share of each expert in each token's weight in one layer, or in the mean of all: (n_token, n_expert)."""
        if layer is None:
            mean: Floats = self.expert_shares.mean(axis=1)
            return mean
        return self.expert_shares[:, self.row_of(layer)]

    def name(self, expert: int) -> str:
        """What an expert is called."""
        return self.expert_names[expert] if self.expert_names else f"expert {expert}"

    def leading_experts(self, n: int) -> tuple[int, ...]:
        """The ``n`` experts with the largest share of all weight, in the order of their numbers."""
        order = np.argsort(-self.mean_weights().mean(axis=0), kind="stable")[:n]
        return tuple(sorted(int(expert) for expert in order))

    def row_of(self, layer: int) -> int:
        """Where the arrays keep layer number ``layer``. Raises OptionError if it has no experts."""
        if layer not in self.layers:
            raise OptionError(
                f"layer {layer} has no experts: there are layers {self.layers[0]} to {self.layers[-1]}"
                + ("" if len(self.layers) == self.layers[-1] - self.layers[0] + 1 else " with gaps")
            )
        return self.layers.index(layer)

    def part(self, start: int, stop: int | None = None) -> RoutingTrace:
        """The trace of tokens ``start`` to ``stop`` alone."""
        span = slice(start, self.n_token if stop is None else stop)
        return replace(
            self,
            token_ids=self.token_ids[span],
            texts=self.texts[span],
            n_prompt=max(0, min(self.n_prompt, span.stop) - start),
            probabilities=self.probabilities[span],
            chosen=self.chosen[span],
            weights=self.weights[span],
        )


def visible(text: str) -> str:
    """A token's text with line ends, tabs and control characters written out, so that it can be shown anywhere."""
    signs = {"\n": "⏎", "\t": "⇥"}
    return "".join(c if c.isprintable() else signs.get(c, f"\\x{ord(c):02x}") for c in text)
