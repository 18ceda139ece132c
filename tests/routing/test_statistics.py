"""Statistics of traces whose answers are known, by hand or from their textbook definition."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from ggufmoe.errors import InputError
from ggufmoe.routing.palette import expert_colour, lead
from ggufmoe.routing.report import shares_report, summary_lines, trace_report
from ggufmoe.routing.statistics import (
    choice_share,
    dead_experts,
    entropy_bits,
    expert_capacity,
    favourites,
    load_balancing_loss,
    share,
    share_by_label,
    summarize,
    token_entropy,
    tokens_over_capacity,
    weight_share,
)
from ggufmoe.routing.trace import RoutingTrace, visible
from tests.routing.traces import random_trace, trace_of

SURE = [0.9, 0.1, 0.0, 0.0]
OTHER = [0.0, 0.2, 0.8, 0.0]
ONE_LAYER = trace_of([[SURE], [SURE], [OTHER], [SURE]], 1)


def test_shares_of_choices_and_weights() -> None:
    np.testing.assert_allclose(choice_share(ONE_LAYER), [[0.75, 0, 0.25, 0]])
    two = trace_of([[[0.75, 0.25]], [[0.25, 0.75]], [[0.25, 0.75]]], 2)
    np.testing.assert_allclose(choice_share(two), [[0.5, 0.5]])
    np.testing.assert_allclose(weight_share(two), [[1.25 / 3, 1.75 / 3]])
    np.testing.assert_allclose(share(two), weight_share(two))
    np.testing.assert_allclose(share(ONE_LAYER), choice_share(ONE_LAYER))


def test_entropy_is_zero_for_certainty_and_log2_for_an_even_spread() -> None:
    np.testing.assert_allclose(entropy_bits(np.array([[1.0, 0, 0, 0], [0.25] * 4, [0.5, 0.5, 0, 0]])), [0, 2, 1])
    sure = -0.9 * math.log2(0.9) - 0.1 * math.log2(0.1)
    np.testing.assert_allclose(token_entropy(ONE_LAYER)[:2, 0], sure, rtol=1e-6)


def one_hot_loss(trace: RoutingTrace) -> float:
    """The definition with a mask of one-hot choices, (pairs, n_expert_used, n_expert)."""
    probabilities = trace.probabilities.reshape(-1, trace.n_expert)
    mask = np.eye(trace.n_expert)[trace.chosen.reshape(-1, trace.n_expert_used)]
    return float((mask.mean(axis=0) * probabilities.mean(axis=0)[None]).sum() * trace.n_expert)


@pytest.mark.parametrize(("n_expert", "n_used"), [(2, 1), (2, 2), (8, 1), (8, 2)])
def test_load_balancing_loss(n_expert: int, n_used: int) -> None:
    trace = random_trace(50, 3, n_expert, n_used)
    assert load_balancing_loss(trace) == pytest.approx(one_hot_loss(trace), rel=1e-6)


def test_the_loss_of_even_routing_is_the_number_of_experts_used() -> None:
    rows = np.full((8, 1, 8), 0.05) + np.eye(8)[:, None] * 0.6
    assert load_balancing_loss(trace_of(list(rows), 1)) == pytest.approx(1)
    all_on_one = trace_of([[[1.0, 0, 0, 0]]] * 5, 1)
    assert load_balancing_loss(all_on_one) == pytest.approx(4)


@pytest.mark.parametrize(
    ("factor", "capacity", "over"), [(1.0, 1, [2, 0, 0, 0]), (2.0, 2, [1, 0, 0, 0]), (0.5, 0, [3, 0, 1, 0])]
)
def test_capacity(factor: float, capacity: int, over: list[int]) -> None:
    assert expert_capacity(ONE_LAYER, factor) == capacity
    np.testing.assert_array_equal(tokens_over_capacity(ONE_LAYER, factor), [over])


def test_capacity_does_not_lose_a_place_to_rounding() -> None:
    assert expert_capacity(random_trace(20, 1, 4, 2), 1.1) == 11


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan])
def test_a_capacity_factor_is_positive(factor: float) -> None:
    with pytest.raises(InputError, match="capacity factor is greater than 0"):
        expert_capacity(ONE_LAYER, factor)


def test_dead_experts_are_named_with_their_layer() -> None:
    two_layers = trace_of([[SURE, OTHER], [OTHER, SURE]], 2)
    assert dead_experts(ONE_LAYER) == ((0, 1), (0, 3))
    assert dead_experts(two_layers) == ((0, 3), (1, 3))


def test_favourites_are_ordered_by_weight_and_equal_tokens_count_as_one() -> None:
    rows = [[[0.9, 0.1]], [[0.7, 0.3]], [[0.2, 0.8]], [[0.6, 0.4]]]
    trace = trace_of(rows, 2, texts=["x", "y", "z", "x"])
    found = favourites(trace, 0)
    assert [(one.text, one.count) for one in found] == [("x", 2), ("y", 1)]
    assert found[0].weight == pytest.approx(0.75)
    assert found[0].more == pytest.approx(0.15)
    assert [one.text for one in favourites(trace, 1, layer=0, n=1)] == ["z"]
    assert favourites(ONE_LAYER, 3) == []


def test_favourites_are_those_above_the_average() -> None:
    """An expert that leads everywhere likes the tokens of which it has more than elsewhere, and not all of them."""
    trace = trace_of([[[0.9, 0.1]], [[0.8, 0.2]], [[0.7, 0.3]]], 2, texts=["x", "y", "z"])
    assert [one.text for one in favourites(trace, 0)] == ["x"]
    assert [one.text for one in favourites(trace, 1)] == ["z"]
    assert favourites(trace.part(0, 1), 0) == []


def test_shares_are_of_the_sum_of_the_weights() -> None:
    """Some models do not rescale the weights of the chosen experts, or multiply them."""
    trace = random_trace(6, 3, 8, 2)
    for scale in (0.4, 2.5):
        other = replace(trace, weights=trace.weights * np.float32(scale))
        np.testing.assert_allclose(other.expert_shares, trace.expert_shares, rtol=1e-6)
        np.testing.assert_allclose(other.mean_weights().sum(axis=-1), 1, rtol=1e-6)
        np.testing.assert_allclose(other.mean_weights(1).sum(axis=-1), 1, rtol=1e-6)
        np.testing.assert_allclose(weight_share(other), weight_share(trace), rtol=1e-6)
    assert not replace(trace, weights=trace.weights * 0).mean_weights().any()


def test_experts_have_names() -> None:
    trace = random_trace(6, 3, 8, 2)
    assert trace.name(3) == "expert 3"
    assert replace(trace, expert_names=tuple("abcdefgh")).name(3) == "d"
    order = np.argsort(-trace.mean_weights().mean(axis=0))
    assert trace.leading_experts(3) == tuple(sorted(order[:3]))


def test_shares_by_label_count_every_token_alike() -> None:
    long, short = trace_of([[SURE]] * 3, 1), trace_of([[OTHER]], 1)
    shares = share_by_label([("a", long), ("a", short), ("b", short)])
    assert (shares.labels, shares.n_tokens) == (("a", "b"), (4, 1))
    np.testing.assert_allclose(shares.mean, [[0.75, 0.0, 0.25, 0.0], [0.0, 0.0, 1.0, 0.0]])
    assert not shares.by_weight


def test_the_most_telling_layer() -> None:
    a, b = trace_of([[[0.6, 0.4], [0.9, 0.1]]], 2), trace_of([[[0.5, 0.5], [0.1, 0.9]]], 2)
    shares = share_by_label([("a", a), ("b", b)])
    np.testing.assert_allclose(shares.spread, [0.1, 0.8], rtol=1e-6)
    assert shares.most_telling_layer == 1
    assert shares_report(shares)["most_telling_layer"] == 1


def test_nothing_cannot_be_compared() -> None:
    for labelled in ([], [("a", ONE_LAYER.part(4))]):
        with pytest.raises(InputError, match="one token or more"):
            share_by_label(labelled)


def test_reports_hold_everything_and_say_it_in_words() -> None:
    trace = random_trace(30, 2, 16, 1)
    summary = summarize(trace, 2)
    report = trace_report(trace, summary)
    np.testing.assert_allclose(report["probabilities"], trace.probabilities, atol=1e-6)
    assert report["chosen"] == trace.chosen.tolist()
    assert report["summary"]["share_of"] == "choices"
    assert report["summary"]["dead_experts"] == [list(pair) for pair in dead_experts(trace)]
    lines = dict(summary_lines(trace, summary))
    assert lines["load-balancing loss"] == f"{load_balancing_loss(trace):.4f} (even routing: 1)"
    assert "room for 3 tokens" in lines["over capacity"]
    many = trace_of([[[1.0] + [0.0] * 15]], 1)
    assert dict(summary_lines(many, summarize(many)))["dead experts"].endswith("12 in layer 0 and 3 more")
    very_many = trace_of([[[1.0] + [0.0] * 15, [1.0] + [0.0] * 15]], 1)
    counted = dict(summary_lines(very_many, summarize(very_many)))["dead experts"]
    assert counted == "30 of 32, most in layers 0 (15), 1 (15)"
    even = trace_of([[[0.6, 0.4]]], 2)
    assert dict(summary_lines(even, summarize(even)))["dead experts"] == "none"


def test_every_expert_has_a_colour_of_its_own() -> None:
    colours = [expert_colour(expert) for expert in range(64)]
    assert len(set(colours)) == 64
    assert all(0 <= channel <= 255 for colour in colours for channel in colour)


def test_an_expert_leads_from_its_even_part_on() -> None:
    assert [lead(weight, 2) for weight in (0.4, 0.5, 0.75, 1)] == [0, 0, 0.5, 1]
    assert lead(1, 1) == 1


def test_control_characters_are_written_out() -> None:
    assert visible("a\n\tb\x1b[31m\u202e é😀") == "a⏎⇥b\\x1b[31m\\x202e é😀"
