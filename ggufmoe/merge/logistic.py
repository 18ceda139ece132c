"""Multinomial logistic regression: one row for each class, so that a softmax of products tells the classes apart.

Every class counts the same in the loss, however many states it has. The penalty on the rows is chosen on held-out
groups of states. All arithmetic is in float64 and in a fixed order: the same states give the same rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
PENALTIES = (1e-3, 1e-4, 1e-5, 1e-6)
"""Factors on the squared length of the rows, for states of mean squared length one; tried from the largest on."""
_N_FOLDS = 3
_MAX_STEPS = 100
_MEMORY = 10
"""Pairs of steps and gradients that L-BFGS keeps."""
_TOLERANCE = 1e-6
"""Relative decrease of the loss at which it stops."""


def fit_classes(
    states: NDArray[np.float32],
    labels: NDArray[np.intp],
    groups: NDArray[np.intp],
    n_class: int,
    *,
    check: Callable[[], None] = lambda: None,
) -> NDArray[np.float32]:
    """Rows (n_class, n_embd) for ``states`` (n, n_embd) with classes ``labels`` (n,).

    States of one of the ``groups`` (n,), numbered from 0, are held out together. Every class needs a state. ``check``
    is called now and then, and may raise Cancelled.
    """
    length = float(np.sqrt(np.mean(np.einsum("nd,nd->n", states, states, dtype=np.float64))))
    scaled = states.astype(np.float64) / max(length, 1e-30)
    problem = _Problem(scaled, labels, n_class)
    penalty = _chosen_penalty(scaled, labels, groups, n_class, check)
    rows = problem.solve(penalty, np.zeros((n_class, states.shape[1])))
    return (rows / max(length, 1e-30)).astype(np.float32)


def _chosen_penalty(
    scaled: NDArray[Any],
    labels: NDArray[np.intp],
    groups: NDArray[np.intp],
    n_class: int,
    check: Callable[[], None] = lambda: None,
) -> float:
    """The penalty with the least loss on held-out groups; the first one where the groups are too few to tell."""
    losses = np.zeros(len(PENALTIES))
    for fold in range(_N_FOLDS):
        out = groups % _N_FOLDS == fold
        if len({*labels[out]}) < n_class or len({*labels[~out]}) < n_class:
            return PENALTIES[0]
        fitted, judged = _Problem(scaled[~out], labels[~out], n_class), _Problem(scaled[out], labels[out], n_class)
        rows = np.zeros((n_class, scaled.shape[1]))
        for i, penalty in enumerate(PENALTIES):
            check()
            rows = fitted.solve(penalty, rows)
            losses[i] += judged.loss(rows, 0.0)[0]
    return PENALTIES[int(losses.argmin())]


class _Problem:
    """States of mean squared length one, (n, n_embd), and their classes."""

    def __init__(self, states: Doubles, labels: NDArray[np.intp], n_class: int) -> None:
        self._states = states
        self._wanted = np.eye(n_class)[labels]
        self._shares = (1.0 / (n_class * np.bincount(labels, minlength=n_class)))[labels]

    def loss(self, rows: Doubles, penalty: float) -> tuple[float, Doubles]:
        """The loss and its gradient (n_class, n_embd)."""
        logits = self._states @ rows.T
        logits -= logits.max(axis=1, keepdims=True)
        exponentials = np.exp(logits)
        sums = exponentials.sum(axis=1, keepdims=True)
        likelihoods = ((logits - np.log(sums)) * self._wanted).sum(axis=1)
        excess = (exponentials / sums - self._wanted) * self._shares[:, None]
        loss = -float(self._shares @ likelihoods) + penalty * float(np.vdot(rows, rows))
        return loss, excess.T @ self._states + 2 * penalty * rows

    def solve(self, penalty: float, start: Doubles) -> Doubles:
        """The rows with the least loss, from ``start`` on."""
        return minimized(lambda rows: self.loss(rows, penalty), start)


def minimized(function: Callable[[Doubles], tuple[float, Doubles]], start: Doubles) -> Doubles:
    """Where ``function``, which gives a value and its gradient, is least: L-BFGS (Nocedal 1980) with backtracking."""
    pairs: list[tuple[Doubles, Doubles]] = []
    x = start
    value, gradient = function(x)
    for _ in range(_MAX_STEPS):
        direction = _direction(gradient, pairs)
        slope = float(np.vdot(gradient, direction))
        step = 1.0
        while True:
            new = x + step * direction
            new_value, new_gradient = function(new)
            if new_value <= value + 1e-4 * step * slope or step < 1e-8:
                break
            step /= 2
        moved, change = new - x, new_gradient - gradient
        if float(np.vdot(moved, change)) > 1e-14:
            pairs = [*pairs, (moved, change)][-_MEMORY:]
        decrease = value - new_value
        x, value, gradient = new, new_value, new_gradient
        if decrease < _TOLERANCE * value:
            break
    return x


def _direction(gradient: Doubles, pairs: list[tuple[Doubles, Doubles]]) -> Doubles:
    """The direction of descent after the last steps and changes of the gradient: the two-loop recursion."""
    out = -gradient
    factors: list[float] = []
    for moved, change in reversed(pairs):
        factors.append(float(np.vdot(moved, out) / np.vdot(moved, change)))
        out = out - factors[-1] * change
    if pairs:
        moved, change = pairs[-1]
        out = out * float(np.vdot(moved, change) / np.vdot(change, change))
    else:
        out = out / max(float(np.linalg.norm(gradient)), 1e-12)
    for (moved, change), factor in zip(pairs, reversed(factors), strict=True):
        out = out + (factor - float(np.vdot(change, out) / np.vdot(moved, change))) * moved
    return out
