"""The search with a limit of seconds beside that of bytes: both are kept, and little is lost against a bound."""

from __future__ import annotations

import random

import pytest

from ggufmoe.sizing.search import Choice, best_choices
from ggufmoe.sizing.timed_search import TimedChoice, best_timed_choices


def instance(seed: int, n_tensors: int = 30) -> list[list[TimedChoice]]:
    """Tensors whose choices of few bytes are slow in half of the cases, as codebook types are."""
    draw = random.Random(seed)
    tensors = []
    for _ in range(n_tensors):
        size, weight = draw.randint(10, 200), draw.expovariate(1)
        tensors.append(
            [
                TimedChoice(
                    round(size * bits), weight * size * 2 ** (-2 * bits) * draw.uniform(0.2, 2), size * slow * bits
                )
                for bits in (2.1, 3.1, 4.2, 5.5, 8.5)
                for slow in (1, 3)
            ]
        )
    return tensors


def total(tensors: list[list[TimedChoice]], chosen: list[int], field: str) -> float:
    return float(sum(getattr(choices[i], field) for choices, i in zip(tensors, chosen, strict=True)))


def least_possible(tensors: list[list[TimedChoice]], budget: int, limit_s: float) -> float:
    """A bound that no mix is below: the best of Lagrange's dual function over many pairs of multipliers."""
    prices = [0.0, *(2.0**exponent for exponent in range(-24, 4))]
    return max(
        sum(min(c.loss + a * c.n_bytes + b * c.seconds for c in choices) for choices in tensors)
        - a * budget
        - b * limit_s
        for a in prices
        for b in prices
    )


@pytest.mark.parametrize("seed", range(2))
def test_both_limits_are_kept_and_no_mix_is_much_better(seed: int) -> None:
    tensors = instance(seed)
    budget = round(4.5 * sum(choices[0].n_bytes for choices in tensors) / 2.1)
    free = best_timed_choices(tensors, budget, 1e9)
    assert free is not None
    slow = total(tensors, free, "seconds")
    least = sum(min(choice.seconds for choice in choices) for choices in tensors)
    limit_s = least + 0.4 * (slow - least)
    chosen = best_timed_choices(tensors, budget, limit_s)
    assert chosen is not None
    assert total(tensors, chosen, "n_bytes") <= budget
    assert total(tensors, chosen, "seconds") <= limit_s * (1 + 1e-8) < slow
    bound = least_possible(tensors, budget, limit_s)
    assert bound <= total(tensors, chosen, "loss") <= 1.25 * bound


def test_without_a_limit_it_is_the_search_for_a_size() -> None:
    tensors = instance(7)
    plain = [[Choice(choice.n_bytes, choice.loss) for choice in choices] for choices in tensors]
    budget = 2 * sum(choices[0].n_bytes for choices in tensors)
    chosen = best_timed_choices(tensors, budget, 1e9)
    expected = best_choices(plain, budget)
    assert chosen is not None
    assert expected is not None
    assert total(tensors, chosen, "loss") == pytest.approx(total(tensors, expected, "loss"), rel=1e-9)


def test_a_start_that_keeps_to_both_is_the_last_resort() -> None:
    """The only fast choices are those of the start; without it there is none within a limit that is too low."""
    tensors = [[TimedChoice(10, 2.0, 1.0), TimedChoice(10, 1.0, 3.0)]] * 4
    chosen = best_timed_choices(tensors, 40, 4.0, [[0, 0, 0, 0]])
    assert chosen == [0, 0, 0, 0]
    assert best_timed_choices(tensors, 40, 3.5) is None
    assert best_timed_choices(tensors, 39, 9.0) is None
