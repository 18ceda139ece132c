"""Logistic regression: its gradient, what it finds, how it chooses its penalty."""

from __future__ import annotations

import numpy as np
import pytest

from ggufmoe.errors import Cancelled
from ggufmoe.merge import logistic
from ggufmoe.merge.logistic import Curvature, Problem, fit_classes, minimized


def clouds(n_class: int, n: int, *, noise: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """States around a centre for each class, their classes, and a group of each state."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, n_class, n)
    centres = random.standard_normal((n_class, 24)) * 2
    states = centres[labels] + noise * random.standard_normal((n, 24))
    return states.astype(np.float32), labels, np.arange(n)


@pytest.mark.parametrize("n_class", [2, 3])
def test_rows_tell_new_states_apart(n_class: int) -> None:
    states, labels, groups = clouds(n_class, 400)
    rows = fit_classes(states[:200], labels[:200], groups[:200], n_class)
    assert rows.shape == (n_class, 24)
    assert rows.dtype == np.float32
    assert ((states[200:] @ rows.T).argmax(axis=1) == labels[200:]).mean() > 0.97
    np.testing.assert_allclose(rows.sum(axis=0), 0, atol=1e-4)


def test_the_gradient_is_that_of_the_loss() -> None:
    states, labels, _ = clouds(3, 30)
    problem = Problem(states.astype(np.float64), labels, 3)
    rows = np.random.default_rng(1).standard_normal((3, 24))
    gradient = problem.loss(rows, 0.1)[1]
    for place in ((0, 3), (2, 20)):
        step = np.zeros_like(rows)
        step[place] = 1e-6
        slope = (problem.loss(rows + step, 0.1)[0] - problem.loss(rows - step, 0.1)[0]) / 2e-6
        assert gradient[place] == pytest.approx(slope, rel=1e-5)


def test_a_class_with_few_states_counts_as_much_as_one_with_many() -> None:
    """Where classes cannot be told apart, each gets an equal weight and not its share of the states."""
    states = np.ones((100, 4), dtype=np.float32)
    labels = np.array([0] * 90 + [1] * 10)
    rows = fit_classes(states, labels, np.arange(100), 2)
    np.testing.assert_allclose(states[0] @ rows[0], states[0] @ rows[1], atol=1e-6)


def test_noise_asks_for_a_larger_penalty() -> None:
    chosen = []
    for noise in (0.1, 30.0):
        states, labels, groups = clouds(2, 120, noise=noise)
        problem = Problem(states.astype(np.float64), labels, 2)
        chosen.append(logistic._chosen_penalty(problem, Curvature.of(problem), groups)[0])
    assert chosen[0] < chosen[1]


@pytest.mark.parametrize("n", [12, 400])
def test_rows_are_at_the_minimum(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer states than columns and with more, with all directions known and with a few: no gradient is left."""
    states, labels, groups = clouds(3, n, noise=3.0)
    states *= np.geomspace(1, 1e-3, 24, dtype=np.float32)
    labels[:3] = range(3)
    weights = np.linspace(1, 5, n)
    for n_axes in (128, 4):
        monkeypatch.setattr(logistic, "_MAX_AXES", n_axes)
        monkeypatch.setattr(logistic, "PENALTIES", (1e-4,))
        rows = fit_classes(states, labels, groups, 3, weights=weights)
        length = np.sqrt(np.mean(np.sum(states.astype(np.float64) ** 2, axis=1)))
        gradient = Problem(states / length, labels, 3, weights).loss(rows.astype(np.float64) * length, 1e-4)[1]
        assert np.linalg.norm(gradient) < 1e-4 * 2e-4 * np.linalg.norm(rows * length)


def test_states_that_count_twice_are_as_two() -> None:
    states, labels, groups = clouds(2, 40)
    rows, every = np.random.default_rng(1).standard_normal((2, 24)), np.concatenate([np.arange(40), np.arange(10)])
    weighted = Problem(states.astype(np.float64), labels, 2, np.where(groups < 10, 2.0, 1.0))
    copied = Problem(states[every].astype(np.float64), labels[every], 2)
    (value, gradient), (expected, other) = weighted.loss(rows, 0.1), copied.loss(rows, 0.1)
    assert value == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(gradient, other, rtol=1e-10)


def test_a_kind_that_is_hard_to_tell_counts_more() -> None:
    """Class 0 has an easy kind and one that lies amid class 1: with kinds, more of the latter is told apart."""
    random = np.random.default_rng(3)
    centers = np.array([[4.0, 0, 1], [-1.2, 0.4, 1], [-1, 0, 1]])
    kinds = np.repeat(np.arange(3), [200, 40, 200])
    states = (centers[kinds] + random.normal(0, 0.5, (440, 3)) * [1, 1, 0]).astype(np.float32)
    labels, groups = np.where(kinds == 2, 1, 0), np.arange(440)
    without = fit_classes(states, labels, groups, 2)
    within = fit_classes(states, labels, groups, 2, kinds=kinds)
    wrong = [((states @ rows.T).argmax(axis=1) != labels)[kinds == 1].mean() for rows in (without, within)]
    assert wrong[1] < wrong[0] - 0.2
    same = fit_classes(states, labels, groups, 2, kinds=np.zeros_like(kinds))
    np.testing.assert_allclose(without, same, rtol=1e-4, atol=1e-6)


def test_an_easy_kind_keeps_a_share() -> None:
    losses = np.array([2.0, 2.0, 1e-9, 1e-9])
    found = logistic._emphasis(losses, np.ones(4), np.array([0, 0, 2, 2]))
    least = logistic.LEAST_EMPHASIS
    np.testing.assert_allclose(found, [2**0.5, 2**0.5, least, least])


def test_too_few_groups_get_the_largest_penalty(monkeypatch: pytest.MonkeyPatch) -> None:
    states, labels, groups = clouds(2, 40)
    alone = fit_classes(states, labels, np.zeros_like(groups), 2)
    monkeypatch.setattr(logistic, "PENALTIES", logistic.PENALTIES[:1])
    np.testing.assert_array_equal(alone, fit_classes(states, labels, groups, 2))


def test_the_minimum_of_a_known_function_is_found() -> None:
    curvature = np.geomspace(1, 1e4, 12)
    found = minimized(lambda x: (float(curvature @ (x - 3) ** 2) + 1, 2 * curvature * (x - 3)), np.zeros(12))
    np.testing.assert_allclose(found, 3, atol=0.1)


def test_a_fit_can_be_stopped() -> None:
    def stop() -> None:
        raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        fit_classes(*clouds(2, 40), 2, check=stop)
