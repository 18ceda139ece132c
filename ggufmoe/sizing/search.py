"""The search for the mix of a given size: one choice for each tensor, so that the sum of losses is least.

Knows bytes and losses alone. The problem is the knapsack problem with classes: its solution over the convex hulls of
all tensors is found exactly (what a Lagrange multiplier selects), and exchanges fill what that leaves of the budget.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_MAX_EXCHANGES = 10_000
_FORCED_ROUNDS, _MAX_FORCED, _LARGE = 4, 48, 0.002
"""How often, with how many choices, and from which share of the budget on a large tensor's choice is changed."""
_TINY = 1e-12
"""Savings below this share of the largest change are rounding."""


@dataclass(frozen=True)
class Choice:
    """One way to store a tensor: what it takes of the budget, and what it costs in quality."""

    n_bytes: int
    loss: float


def best_choices(
    tensors: Sequence[Sequence[Choice]], budget: int, starts: Sequence[Sequence[int]] = ()
) -> list[int] | None:
    """The index of the choice for each tensor: the sum of bytes is at most ``budget``, the sum of losses small.

    The result is no worse than any of ``starts``, which are given in the same way, that is within the budget. None if
    even the smallest choices take more. The same input gives the same result on every machine.
    """
    best = _solved(tensors, budget)
    if best is None:
        return None
    useful = [_useful(choices) for choices in tensors]
    for start in starts:
        improved = [_no_worse(choices, kept, i) for choices, kept, i in zip(tensors, useful, start, strict=True)]
        left = budget - sum(choices[i].n_bytes for choices, i in zip(tensors, improved, strict=True))
        if left >= 0 and tensors:
            _exchange(tensors, useful, improved, left)
            best = min(best, improved, key=lambda chosen: _loss(tensors, chosen))
    for _ in range(_FORCED_ROUNDS):
        found = min(_forced(tensors, best, budget), key=lambda chosen: _loss(tensors, chosen), default=best)
        if not _loss(tensors, found) < _loss(tensors, best):
            break
        best = found
    return best


def least_bytes(tensors: Sequence[Sequence[Choice]], loss: float) -> int:
    """The bytes with which the sum of losses is at most ``loss`` along the hulls; ``best_choices`` is no worse.

    Those of the best choices where no mix is as good.
    """
    useful = [_useful(choices) for choices in tensors]
    hulls = [[tensors[i][j] for j in indices] for i, indices in enumerate(useful)]
    hulls = [[choices[place] for place in _hull(choices)] for choices in hulls]
    steps = sorted(
        (-_gain(choices, place - 1, place), i, place)
        for i, choices in enumerate(hulls)
        for place in range(1, len(choices))
    )
    n_bytes, left = sum(choices[0].n_bytes for choices in hulls), sum(choices[0].loss for choices in hulls)
    for _, i, place in steps:
        if left <= loss:
            break
        n_bytes += hulls[i][place].n_bytes - hulls[i][place - 1].n_bytes
        left += hulls[i][place].loss - hulls[i][place - 1].loss
    return n_bytes


def _loss(tensors: Sequence[Sequence[Choice]], chosen: Sequence[int]) -> float:
    return sum(choices[i].loss for choices, i in zip(tensors, chosen, strict=True))


def _forced(tensors: Sequence[Sequence[Choice]], best: Sequence[int], budget: int) -> Iterator[list[int]]:
    """The best mixes with another choice for one large tensor: many small ones make room, or take what is left.

    Exchanges of two tensors do not find these, for example where the embedding is half of a small model.
    """
    changes = [
        (-abs(choices[j].n_bytes - choices[best[i]].n_bytes), i, j)
        for i, choices in enumerate(tensors)
        for j in _useful(choices)
        if j != best[i]
    ]
    for change, i, j in sorted(changes)[:_MAX_FORCED]:
        if -change < _LARGE * budget:
            return
        solved = _solved([*tensors[:i], [tensors[i][j]], *tensors[i + 1 :]], budget)
        if solved is not None:
            solved[i] = j
            yield solved


def _solved(tensors: Sequence[Sequence[Choice]], budget: int) -> list[int] | None:
    """The steps along the hulls, and exchanges."""
    useful = [_useful(choices) for choices in tensors]
    picked = [0] * len(tensors)
    left = budget - sum(choices[indices[0]].n_bytes for choices, indices in zip(tensors, useful, strict=True))
    if left < 0:
        return None
    left = _climb([[tensors[i][j] for j in indices] for i, indices in enumerate(useful)], picked, left)
    chosen = [indices[place] for indices, place in zip(useful, picked, strict=True)]
    if tensors:
        _exchange(tensors, useful, chosen, left)
    return chosen


def _useful(choices: Sequence[Choice]) -> list[int]:
    """The choices that no other one beats in both bytes and loss, the smallest first."""
    kept: list[int] = []
    for index in sorted(range(len(choices)), key=lambda i: (choices[i].n_bytes, choices[i].loss, i)):
        if not kept or choices[index].loss < choices[kept[-1]].loss:
            kept.append(index)
    return kept


def _no_worse(choices: Sequence[Choice], useful: Sequence[int], index: int) -> int:
    """The choice itself, or the useful one that beats it."""
    given = choices[index]
    return next(i for i in reversed(useful) if choices[i].n_bytes <= given.n_bytes and choices[i].loss <= given.loss)


def _hull(choices: Sequence[Choice]) -> list[int]:
    """The lower convex hull of choices sorted by bytes: each step saves less for a byte than the one before."""
    hull: list[int] = []
    for index in range(len(choices)):
        while len(hull) > 1 and _gain(choices, hull[-2], hull[-1]) <= _gain(choices, hull[-1], index):
            hull.pop()
        hull.append(index)
    return hull


def _gain(choices: Sequence[Choice], start: int, end: int) -> float:
    """The loss that is saved by a byte, from one choice to a larger one."""
    return (choices[start].loss - choices[end].loss) / (choices[end].n_bytes - choices[start].n_bytes)


def _climb(tensors: Sequence[Sequence[Choice]], picked: list[int], left: int) -> int:
    """Take the steps along all hulls that save most for a byte, as far as ``left`` bytes go; returns what remains.

    A tensor whose next step does not fit stays where it is, and the others go on.
    """
    hulls = [_hull(choices) for choices in tensors]
    steps = [(-_gain(tensors[i], hull[0], hull[1]), i, 1) for i, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, i, place = heapq.heappop(steps)
        choices, hull = tensors[i], hulls[i]
        cost = choices[hull[place]].n_bytes - choices[hull[place - 1]].n_bytes
        if cost > left:
            continue
        left -= cost
        picked[i] = hull[place]
        if place + 1 < len(hull):
            heapq.heappush(steps, (-_gain(choices, hull[place], hull[place + 1]), i, place + 1))
    return left


def _exchange(
    tensors: Sequence[Sequence[Choice]], useful: Sequence[Sequence[int]], chosen: list[int], left: int
) -> None:
    """Improve ``chosen``: one tensor gets a better choice, and another a worse one where the bytes do not suffice."""
    places = [(i, j) for i, indices in enumerate(useful) for j in indices]
    tensor = np.array([i for i, _ in places], np.int64)
    n_bytes = np.array([tensors[i][j].n_bytes for i, j in places], np.int64)
    loss = np.array([tensors[i][j].loss for i, j in places], np.float64)
    index = {place: number for number, place in enumerate(places)}
    now = np.array([index[i, j] for i, j in enumerate(chosen)], np.int64)
    for _ in range(_MAX_EXCHANGES):
        held = now[tensor]
        more, worse = n_bytes - n_bytes[held], loss - loss[held]
        moves = _best_exchange(tensor, more, worse, left)
        for move in moves:
            now[tensor[move]] = move
            left -= int(more[move])
        if not moves:
            break
    chosen[:] = (places[place][1] for place in now)


def _best_exchange(
    tensor: NDArray[np.int64], more: NDArray[np.int64], worse: NDArray[np.float64], left: int
) -> tuple[int, ...]:
    """The one or two moves that together fit into ``left`` bytes and save most; none if none saves anything.

    For each move: its tensor, how many more bytes it takes, and how much more is lost.
    """
    gains = np.flatnonzero(worse < 0)
    if not len(gains):
        return ()
    alone = np.where(more[gains] <= left, worse[gains], np.inf)
    order = np.argsort(more, kind="stable")  # those that free most bytes come first
    least = np.minimum.accumulate(worse[order])
    is_new = worse[order] < np.concatenate([[np.inf], least[:-1]])
    cheapest = order[np.maximum.accumulate(np.where(is_new, np.arange(len(order)), 0))]
    found = np.searchsorted(more[order], left - more[gains], side="right") - 1
    others = cheapest[found]
    is_pair = (found >= 0) & (tensor[others] != tensor[gains])
    together = np.where(is_pair, worse[gains] + worse[others], np.inf)
    best, best_pair = int(np.argmin(alone)), int(np.argmin(together))
    if min(alone[best], together[best_pair]) >= -_TINY * float(np.abs(worse).max()):
        return ()
    if alone[best] <= together[best_pair]:
        return (int(gains[best]),)
    return int(gains[best_pair]), int(others[best_pair])
