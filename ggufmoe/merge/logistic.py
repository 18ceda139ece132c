"""Multinomial logistic regression: one row for each class, so that a softmax of products tells the classes apart.

Every class counts the same in the loss, however many states it has, but for kinds of states that are hard to tell from
other classes: these count more. The penalty on the rows is chosen on held-out groups of states. All arithmetic is in
float64 and in a fixed order: the same states give the same rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
PENALTIES = (1e-3, 1e-4, 1e-5, 1e-6)
"""Factors on the squared length of the rows, for states of mean squared length one; tried from the largest on."""
_N_FOLDS = 3
_MAX_STEPS = 500
_MEMORY = 10
"""Pairs of steps and gradients that L-BFGS keeps."""
_MAX_AXES = 128
LEAST_EMPHASIS = 0.1
"""The least that a kind of states counts, beside the mean of all kinds."""
_ROUGH, _EXACT = 1e-8, 1e-12
"""Relative decrease of the loss at which it stops: enough for losses of held-out states, and to know rows to 1e-5."""


def fit_classes(
    states: NDArray[np.float32],
    labels: NDArray[np.intp],
    groups: NDArray[np.intp],
    n_class: int,
    *,
    weights: NDArray[np.float64] | None = None,
    kinds: NDArray[np.intp] | None = None,
    check: Callable[[], None] = lambda: None,
) -> NDArray[np.float32]:
    """Rows (n_class, n_embd) for ``states`` (n, n_embd) with classes ``labels`` (n,).

    States of one of the ``groups`` (n,), numbered from 0, are held out together. ``weights`` (n,) are how much states
    count beside the others of their class, all the same by default. Where ``kinds`` (n,), numbered from 0, are given,
    the states of a kind count more where their mean loss, held out, is larger: by the square root of it. Every class
    needs a state. ``check`` is called now and then, and may raise Cancelled.
    """
    length = max(float(np.sqrt(np.mean(np.einsum("nd,nd->n", states, states, dtype=np.float64)))), 1e-30)
    problem = Problem(states.astype(np.float64) / length, labels, n_class, weights)
    check()
    curvature = Curvature.of(problem)
    penalty, held_out = _chosen_penalty(problem, curvature, groups, check)
    if kinds is not None and held_out is not None:
        problem = problem.emphasized(_emphasis(held_out, problem.weights, kinds))
    rows = problem.solve(penalty, curvature, np.zeros((n_class, states.shape[1])), _EXACT)
    return (rows / length).astype(np.float32)


def _chosen_penalty(
    problem: Problem, curvature: Curvature, groups: NDArray[np.intp], check: Callable[[], None] = lambda: None
) -> tuple[float, Doubles | None]:
    """The penalty with the least loss on held-out groups, and the loss of each state where it is held out, (n,).

    The first penalty, and None, where the groups are too few to tell.
    """
    losses = np.zeros(len(PENALTIES))
    of_states = np.zeros((len(PENALTIES), len(problem.labels)))
    for fold in range(_N_FOLDS):
        out = groups % _N_FOLDS == fold
        if any(len({*problem.labels[part]}) < problem.n_class for part in (out, ~out)):
            return PENALTIES[0], None
        fitted, judged = problem.part(~out), problem.part(out)
        rows = np.zeros((problem.n_class, problem.states.shape[1]))
        for i, penalty in enumerate(PENALTIES):
            check()
            rows = fitted.solve(penalty, curvature, rows, _ROUGH)
            of_states[i, out] = judged.losses(rows)
            losses[i] += float(judged.shares @ of_states[i, out])
    best = int(losses.argmin())
    return PENALTIES[best], of_states[best]


def _emphasis(losses: Doubles, weights: Doubles, kinds: NDArray[np.intp]) -> Doubles:
    """How much each state counts by its kind, (n,): the square root of the kind's mean loss, beside the mean of all."""
    sums = np.bincount(kinds, weights=weights)
    means = np.bincount(kinds, weights=weights * losses)[sums > 0] / sums[sums > 0]
    of_kinds = np.ones(len(sums))
    of_kinds[sums > 0] = np.sqrt(means / max(float(means.mean()), 1e-30)).clip(min=LEAST_EMPHASIS)
    out: Doubles = of_kinds[kinds]
    return out


class Problem:
    """States of mean squared length one, (n, n_embd), their classes and what each counts, (n,)."""

    def __init__(self, states: Doubles, labels: NDArray[np.intp], n_class: int, weights: Doubles | None = None) -> None:
        self.states, self.labels, self.n_class = states, labels, n_class
        self.weights: Doubles = np.ones(len(labels)) if weights is None else weights
        self._wanted = np.eye(n_class)[labels]
        sums = n_class * np.bincount(labels, weights=self.weights, minlength=n_class)
        self.shares: Doubles = self.weights / sums[labels]
        """How much each state counts: the same for every class together, and one in all."""

    def part(self, chosen: NDArray[np.bool_]) -> Problem:
        """The problem of the chosen states alone."""
        return Problem(self.states[chosen], self.labels[chosen], self.n_class, self.weights[chosen])

    def emphasized(self, factors: Doubles) -> Problem:
        """The problem in which each state counts as much more, (n,); all together count one."""
        out = Problem(self.states, self.labels, self.n_class, self.weights)
        out.shares = self.shares * factors / float(self.shares @ factors)
        return out

    def losses(self, rows: Doubles) -> Doubles:
        """The negative log-likelihood of each state's class, (n,)."""
        logits = self.states @ rows.T
        logits -= logits.max(axis=1, keepdims=True)
        out: Doubles = np.log(np.exp(logits).sum(axis=1)) - (logits * self._wanted).sum(axis=1)
        return out

    def loss(self, rows: Doubles, penalty: float) -> tuple[float, Doubles]:
        """The loss and its gradient (n_class, n_embd)."""
        logits = self.states @ rows.T
        logits -= logits.max(axis=1, keepdims=True)
        exponentials = np.exp(logits)
        sums = exponentials.sum(axis=1, keepdims=True)
        likelihoods = ((logits - np.log(sums)) * self._wanted).sum(axis=1)
        excess = (exponentials / sums - self._wanted) * self.shares[:, None]
        loss = -float(self.shares @ likelihoods) + penalty * float(np.vdot(rows, rows))
        return loss, excess.T @ self.states + 2 * penalty * rows

    def solve(self, penalty: float, curvature: Curvature, start: Doubles, tolerance: float) -> Doubles:
        """The rows with the least loss, from ``start`` on, searched where no direction is much steeper than another."""

        def scaled_loss(rows: Doubles) -> tuple[float, Doubles]:
            value, gradient = self.loss(curvature.scaled(rows, penalty, -0.5), penalty)
            return value, curvature.scaled(gradient, penalty, -0.5)

        found = minimized(scaled_loss, curvature.scaled(start, penalty, 0.5), tolerance)
        return curvature.scaled(found, penalty, -0.5)


@dataclass(frozen=True)
class Curvature:
    """How steep the loss is along different rows: a fourth of the variance of the states there, and the penalty.

    The variance is known along the ``axes`` (n_embd, r), columns of length one, where it is largest; along all others
    it is taken to be ``rest``.
    """

    axes: Doubles
    variances: Doubles
    rest: float

    @classmethod
    def of(cls, problem: Problem) -> Curvature:
        """Find the axes with a few products of random vectors with the states (Halko et al. 2011)."""
        weighted = problem.states * np.sqrt(problem.shares)[:, None]
        n_embd = weighted.shape[1]
        n_axes = min(_MAX_AXES, *weighted.shape)
        axes = np.random.Generator(np.random.Philox(key=0)).standard_normal((n_embd, n_axes))
        for _ in range(3):
            axes = np.linalg.qr(weighted.T @ (weighted @ axes))[0]
        along = weighted @ axes
        variances, turned = np.linalg.eigh(along.T @ along)
        rest = (float(np.vdot(weighted, weighted)) - float(variances.sum())) / max(n_embd - n_axes, 1)
        return cls(axes @ turned, variances.clip(min=0), max(rest, 0.0))

    def scaled(self, rows: Doubles, penalty: float, power: float) -> Doubles:
        """``rows`` (n, n_embd) times a power of the curvature."""
        along = (self.variances / 4 + 2 * penalty) ** power
        others = (self.rest / 4 + 2 * penalty) ** power
        out: Doubles = rows * others + (rows @ self.axes * (along - others)) @ self.axes.T
        return out


def minimized(
    function: Callable[[Doubles], tuple[float, Doubles]], start: Doubles, tolerance: float = _ROUGH
) -> Doubles:
    """Where ``function``, which gives a value and its gradient, is least: L-BFGS (Nocedal 1980) with backtracking.

    Stops where a step gains less than ``tolerance`` of the value.
    """
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
        if decrease < tolerance * value:
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
