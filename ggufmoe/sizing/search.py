"""The search for the mix of a given size: one choice for each tensor, so that the sum of losses is least.

Knows bytes and losses alone. The problem is the knapsack problem with classes: its solution over the convex hulls of
all tensors is found exactly (what a Lagrange multiplier selects), and exchanges fill what that leaves of the budget.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_MAX_EXCHANGES = 10_000


@dataclass(frozen=True)
class Choice:
    """One way to store a tensor: what it takes of the budget, and what it costs in quality."""

    n_bytes: int
    loss: float


def best_choices(tensors: Sequence[Sequence[Choice]], budget: int) -> list[int] | None:
    """The index of the choice for each tensor: the sum of bytes is at most ``budget``, the sum of losses small.

    None if even the smallest choices take more. The same input gives the same result on every machine.
    """
    useful = [_useful(choices) for choices in tensors]
    picked = [0] * len(tensors)
    left = budget - sum(choices[indices[0]].n_bytes for choices, indices in zip(tensors, useful, strict=True))
    if left < 0:
        return None
    left = _climb([[tensors[i][j] for j in indices] for i, indices in enumerate(useful)], picked, left)
    chosen = [indices[place] for indices, place in zip(useful, picked, strict=True)]
    _exchange(tensors, useful, chosen, left)
    return chosen


def _useful(choices: Sequence[Choice]) -> list[int]:
    """The choices that no other one beats in both bytes and loss, the smallest first."""
    kept: list[int] = []
    for index in sorted(range(len(choices)), key=lambda i: (choices[i].n_bytes, choices[i].loss, i)):
        if not kept or choices[index].loss < choices[kept[-1]].loss:
            kept.append(index)
    return kept


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


@dataclass(frozen=True)
class _Moves:
    """All changes of the choice of one tensor: which tensor, to which choice, more bytes, more loss."""

    tensor: NDArray[np.int64]
    target: NDArray[np.int64]
    n_bytes: NDArray[np.int64]
    loss: NDArray[np.float64]


def _moves(tensors: Sequence[Sequence[Choice]], useful: Sequence[Sequence[int]], chosen: Sequence[int]) -> _Moves:
    rows = [
        (i, j, choices[j].n_bytes - choices[chosen[i]].n_bytes, choices[j].loss - choices[chosen[i]].loss)
        for i, choices in enumerate(tensors)
        for j in useful[i]
        if j != chosen[i]
    ]
    tensor, target, n_bytes = (np.array([row[column] for row in rows], np.int64) for column in range(3))
    return _Moves(tensor, target, n_bytes, np.array([row[3] for row in rows], np.float64))


def _exchange(
    tensors: Sequence[Sequence[Choice]], useful: Sequence[Sequence[int]], chosen: list[int], left: int
) -> None:
    """Improve ``chosen``: one tensor gets a better choice, and another a worse one where the bytes do not suffice."""
    for _ in range(_MAX_EXCHANGES):
        moves = _moves(tensors, useful, chosen)
        best = _best_exchange(moves, left)
        if best is None:
            return
        for move in best:
            chosen[moves.tensor[move]] = int(moves.target[move])
            left -= int(moves.n_bytes[move])


def _best_exchange(moves: _Moves, left: int) -> tuple[int, ...] | None:
    """The one or two moves that together fit into ``left`` bytes and save most; None if none saves anything."""
    best: tuple[int, ...] | None = None
    saved = 0.0
    order = np.argsort(moves.n_bytes, kind="stable")  # those that free most bytes come first
    freed, losses = moves.n_bytes[order], moves.loss[order]
    cheapest = np.empty(len(order), np.int64)  # the least lossy among this move and those that free more
    for place in range(len(order)):
        is_cheaper = place == 0 or losses[place] < losses[cheapest[place - 1]]
        cheapest[place] = place if is_cheaper else cheapest[place - 1]
    for move in np.flatnonzero(moves.loss < 0).tolist():
        loss, n_bytes = float(moves.loss[move]), int(moves.n_bytes[move])
        if n_bytes <= left and loss < saved:
            best, saved = (move,), loss
        place = int(np.searchsorted(freed, left - n_bytes, side="right")) - 1
        if place < 0:
            continue
        other = int(order[cheapest[place]])
        together = loss + float(moves.loss[other])
        if moves.tensor[other] != moves.tensor[move] and together < saved:
            best, saved = (move, other), together
    return best
