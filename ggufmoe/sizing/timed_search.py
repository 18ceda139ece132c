"""The search for a mix that is held back by time as well: the sum of bytes and the sum of seconds both have a limit.

Seconds get a price, which is a second Lagrange multiplier: the search for the least sum of losses and prices is the one
for a size. The price is raised until the mix is fast enough, and halved to the least that is; exchanges fill the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ggufmoe.sizing.search import Choice, best_choices

_DOUBLINGS, _BISECTIONS, _MAX_EXCHANGES = 40, 12, 300
_ROUNDING = 1e-9
"""Share of the limit by which sums of seconds may differ."""


@dataclass(frozen=True)
class TimedChoice:
    """A way to store a tensor, and the seconds that its weights take for a token."""

    n_bytes: int
    loss: float
    seconds: float


def best_timed_choices(
    tensors: Sequence[Sequence[TimedChoice]], budget: int, limit_s: float, starts: Sequence[Sequence[int]] = ()
) -> list[int] | None:
    """The index of the choice for each tensor: at most ``budget`` bytes and ``limit_s`` seconds, the loss small.

    The result is no worse than any of ``starts`` that keeps to both. None if no mix was found that does.
    """
    limit_s *= 1 + _ROUNDING
    found = min(
        (chosen for chosen in _tried(tensors, budget, limit_s, starts) if _seconds(tensors, chosen) <= limit_s),
        key=lambda chosen: _loss(tensors, chosen),
        default=None,
    )
    return None if found is None else _exchanged(tensors, found, budget, limit_s)


def _tried(
    tensors: Sequence[Sequence[TimedChoice]], budget: int, limit_s: float, starts: Sequence[Sequence[int]]
) -> Iterator[list[int]]:
    """Mixes of ``budget`` bytes at ever closer prices of a second, and the starts that fit."""
    free = _solved(tensors, budget, 0.0, starts)
    if free is None:
        return
    yield free
    if _seconds(tensors, free) <= limit_s:
        return
    yield from (list(start) for start in starts if _bytes(tensors, start) <= budget)
    low, high = 0.0, max(_loss(tensors, free), 1e-12) / max(limit_s, 1e-12)
    for _ in range(_DOUBLINGS):
        priced = _solved(tensors, budget, high, starts)
        assert priced is not None, "the budget is enough for the smallest choices"
        yield priced
        if _seconds(tensors, priced) <= limit_s:
            break
        low, high = high, 4 * high
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        priced = _solved(tensors, budget, middle, starts)
        assert priced is not None, "the budget is enough for the smallest choices"
        yield priced
        low, high = (low, middle) if _seconds(tensors, priced) <= limit_s else (middle, high)


def _solved(
    tensors: Sequence[Sequence[TimedChoice]], budget: int, price: float, starts: Sequence[Sequence[int]]
) -> list[int] | None:
    priced = [[Choice(one.n_bytes, one.loss + price * one.seconds) for one in choices] for choices in tensors]
    return best_choices(priced, budget, starts)


def _exchanged(
    tensors: Sequence[Sequence[TimedChoice]], chosen: Sequence[int], budget: int, limit_s: float
) -> list[int]:
    """Change one or two tensors at a time as long as that saves losses within both limits."""
    places = [(i, j) for i, choices in enumerate(tensors) for j in range(len(choices))]
    tensor = np.array([i for i, _ in places], np.int64)
    values = np.array([[c.n_bytes, c.seconds, c.loss] for choices in tensors for c in choices], np.float64).T
    index = {place: number for number, place in enumerate(places)}
    now = np.array([index[i, j] for i, j in enumerate(chosen)], np.int64)
    limits = np.array([budget, limit_s])
    for _ in range(_MAX_EXCHANGES if len(tensors) else 0):
        change = values - values[:, now[tensor]]
        left = limits - values[:2, now].sum(axis=1)
        moves = _best_moves(tensor, change, left)
        for move in moves:
            now[tensor[move]] = move
        if not moves:
            break
    return [places[place][1] for place in now]


def _best_moves(tensor: NDArray[np.int64], change: NDArray[np.float64], left: NDArray[np.float64]) -> tuple[int, ...]:
    """The one or two moves that fit into what is ``left`` of bytes and seconds and save most; none if none saves."""
    more, slower, worse = change
    gains = np.flatnonzero(worse < 0)
    if not len(gains):
        return ()
    alone = np.where((more[gains] <= left[0]) & (slower[gains] <= left[1]), worse[gains], np.inf)
    best: tuple[float, tuple[int, ...]] = (float(alone.min()), (int(gains[alone.argmin()]),))
    others = np.flatnonzero((worse >= 0) & ((more < 0) | (slower < 0)))
    for gain in gains:
        fits = (more[others] <= left[0] - more[gain]) & (slower[others] <= left[1] - slower[gain])
        fits &= tensor[others] != tensor[gain]
        together = np.where(fits, worse[others], np.inf)
        if len(others) and worse[gain] + together.min() < best[0]:
            best = (float(worse[gain] + together.min()), (int(gain), int(others[together.argmin()])))
    return best[1] if best[0] < -1e-12 * float(np.abs(worse).max()) else ()


def _bytes(tensors: Sequence[Sequence[TimedChoice]], chosen: Sequence[int]) -> int:
    return sum(choices[i].n_bytes for choices, i in zip(tensors, chosen, strict=True))


def _seconds(tensors: Sequence[Sequence[TimedChoice]], chosen: Sequence[int]) -> float:
    return sum(choices[i].seconds for choices, i in zip(tensors, chosen, strict=True))


def _loss(tensors: Sequence[Sequence[TimedChoice]], chosen: Sequence[int]) -> float:
    return sum(choices[i].loss for choices, i in zip(tensors, chosen, strict=True))
