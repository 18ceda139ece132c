"""The search for a mix: within the budget, nearly as good as the best of all mixes, most of the budget used."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from ggufmoe.sizing.search import Choice, best_choices


def instance(seed: int, n_tensors: int, n_types: int) -> list[list[Choice]]:
    """Tensors of several sizes whose loss falls with the bits, and not in the same way for all."""
    draw = random.Random(seed)
    tensors = []
    for _ in range(n_tensors):
        size, weight = draw.randint(10, 200), draw.expovariate(1)
        bits = sorted(draw.uniform(1, 8) for _ in range(n_types))
        choices = [Choice(round(size * b), weight * size * 2 ** (-2 * b) * draw.uniform(0.5, 2)) for b in bits]
        draw.shuffle(choices)
        tensors.append(choices)
    return tensors


def cost(tensors: Sequence[Sequence[Choice]], chosen: Sequence[int]) -> tuple[int, float]:
    picked = [choices[i] for choices, i in zip(tensors, chosen, strict=True)]
    return sum(choice.n_bytes for choice in picked), sum(choice.loss for choice in picked)


def least_possible(tensors: Sequence[Sequence[Choice]], budget: int) -> float:
    """A bound that no mix is below: the best of Lagrange's dual function over many multipliers."""
    multipliers = [2 ** (exponent / 8) for exponent in range(-320, 80)]
    return max(
        sum(min(choice.loss + price * choice.n_bytes for choice in choices) for choices in tensors) - price * budget
        for price in multipliers
    )


@pytest.mark.parametrize("seed", range(5))
def test_no_mix_is_much_better(seed: int) -> None:
    tensors = instance(seed, n_tensors=60, n_types=6)
    smallest, largest = (sum(pick(c.n_bytes for c in choices) for choices in tensors) for pick in (min, max))
    for share in (0.1, 0.3, 0.6):
        budget = round(smallest + share * (largest - smallest))
        chosen = best_choices(tensors, budget)
        assert chosen is not None
        n_bytes, loss = cost(tensors, chosen)
        assert n_bytes <= budget
        assert least_possible(tensors, budget) <= loss <= 1.03 * least_possible(tensors, budget)


def test_an_exchange_makes_room_for_what_does_not_fit() -> None:
    """Along the hulls the first tensor grows, and then the second, which saves more, has no room."""
    tensors = [[Choice(10, 1.0), Choice(15, 0.5)], [Choice(10, 3.0), Choice(40, 0.5)]]
    assert best_choices(tensors, 50) == [0, 1]


def test_small_tensors_make_room_for_a_large_one() -> None:
    """Two moves do not do it: four of the small ones must shrink before the large one can grow."""
    small = [[Choice(10, 0.11), Choice(20, 0.1)] for _ in range(5)]
    large = [Choice(100, 5.0), Choice(140, 1.0)]
    for budget, n_grown, is_large in ((200, 1, 1), (195, 0, 1), (189, 3, 0)):
        chosen = best_choices([*small, large], budget)
        assert chosen is not None
        assert (sum(chosen[:5]), chosen[5]) == (n_grown, is_large)


def test_the_result_is_no_worse_than_a_start_within_the_budget() -> None:
    tensors = [[*choices, Choice(choices[0].n_bytes + 1, 2 * choices[0].loss)] for choices in instance(11, 12, 4)]
    budget = round(1.5 * sum(min(choice.n_bytes for choice in choices) for choices in tensors))
    draw = random.Random(2)
    starts = [[draw.randrange(5) for _ in tensors] for _ in range(50)]
    chosen = best_choices(tensors, budget, starts)
    assert chosen is not None
    assert cost(tensors, chosen)[0] <= budget
    losses = [loss for n_bytes, loss in (cost(tensors, start) for start in starts) if n_bytes <= budget]
    assert cost(tensors, chosen)[1] <= min(losses, default=cost(tensors, chosen)[1])


def test_most_of_the_budget_is_used_and_never_more() -> None:
    tensors = instance(7, n_tensors=200, n_types=8)
    smallest = sum(min(choice.n_bytes for choice in choices) for choices in tensors)
    for share in (1.01, 1.3, 2.0, 3.0):
        budget = int(smallest * share)
        chosen = best_choices(tensors, budget)
        assert chosen is not None
        assert 0.995 * budget <= cost(tensors, chosen)[0] <= budget
        assert chosen == best_choices(tensors, budget)


def test_a_budget_below_the_smallest_mix_has_no_answer() -> None:
    tensors = [[Choice(10, 1.0), Choice(20, 0.5)], [Choice(5, 0.1)]]
    assert best_choices(tensors, 14) is None
    assert best_choices(tensors, 15) == [0, 0]
    assert best_choices(tensors, 25) == [1, 0]
    assert best_choices([], 0) == []


def test_a_larger_choice_that_loses_more_is_never_taken() -> None:
    tensors = [[Choice(10, 1.0), Choice(20, 1.5), Choice(30, 0.9)]]
    assert best_choices(tensors, 25) == [0]
    assert best_choices(tensors, 100) == [2]
