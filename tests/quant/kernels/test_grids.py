"""The grids of the IQ formats and the neighbours of what is off them."""

from __future__ import annotations

import numpy as np
import pytest

from ggufmoe.quant.kernels.grids import grid, neighbours, undominated

SIZES = {"IQ1": 2048, "IQ2_XXS": 256, "IQ2_XS": 512, "IQ2_S": 1024, "IQ3_XXS": 256, "IQ3_S": 512}
SHELLS = {"IQ1": 3, "IQ2_XXS": 2, "IQ2_XS": 2, "IQ2_S": 1, "IQ3_XXS": 2, "IQ3_S": 3}


@pytest.mark.parametrize("name", SIZES)
def test_points(name: str) -> None:
    points = grid(name)
    assert points.levels.shape == (SIZES[name], 4 if name.startswith("IQ3") else 8)
    assert points.levels.min() == 0
    assert points.levels.max() == points.n_levels - 1 == (7 if name.startswith("IQ3") else 2)
    assert not points.levels[0].any(), "where nothing is found ggml stores point 0"
    assert (np.diff(points.codes) > 0).all()
    assert np.array_equal(points.all_groups()[points.codes], points.levels)


def test_points_as_ggml_writes_them() -> None:
    """The last entries of ``kgrid_*``, which hold a level in each two or three bits."""
    last = {"IQ1": 43690, "IQ2_XXS": 43268, "IQ2_XS": 43690, "IQ2_S": 43690, "IQ3_XXS": 3992, "IQ3_S": 4032}
    for name, number in last.items():
        bits = 3 if name.startswith("IQ3") else 2
        levels = grid(name).levels[-1]
        assert sum(int(level) << bits * i for i, level in enumerate(levels)) == number, name


@pytest.mark.parametrize("name", SIZES)
def test_neighbours_are_sorted_by_distance_and_number(name: str) -> None:
    points, lists = grid(name), neighbours(name, SHELLS[name])
    on_grid = set(points.codes.tolist())
    for code in np.random.default_rng(0).choice(points.n_codes, 60, replace=False).tolist():
        found = lists.points[lists.starts[code] : lists.starts[code + 1]].tolist()
        distances = ((2 * (points.levels - points.all_groups()[code])) ** 2).sum(axis=1)
        farthest = 0 if code in on_grid else np.unique(distances)[SHELLS[name] - 1]
        expected = sorted((int(d), i) for i, d in enumerate(distances) if d <= farthest)
        assert found == [i for _, i in expected]


@pytest.mark.parametrize("name", SIZES)
def test_what_is_left_out_is_never_the_nearest(name: str) -> None:
    """In float32, with the operations of ``iq2_find_best_neighbour``."""
    points, whole, abridged = grid(name), neighbours(name, SHELLS[name]), undominated(name, SHELLS[name])
    random, left_out = np.random.default_rng(1), 0
    for code in random.choice(points.n_codes, 300, replace=False).tolist():
        lists = [lists.points[lists.starts[code] : lists.starts[code + 1]] for lists in (whole, abridged)]
        left_out += len(lists[0]) - len(lists[1])
        scale = (random.random((20, 1)) + 0.1).astype(np.float32)  # 20 groups of weights at once
        offset = random.uniform(-0.99996, 0.99996, (20, points.group))
        x = scale * (2 * points.all_groups()[code] + 1 + offset).astype(np.float32)
        weights = (random.random(x.shape) ** 5).astype(np.float32)
        nearest = []
        for found in lists:
            errors = np.zeros((20, len(found)), np.float32)
            for i in range(points.group):
                difference = scale * (2 * points.levels[found, i] + 1).astype(np.float32) - x[:, i : i + 1]
                errors += weights[:, i : i + 1] * difference * difference
            nearest.append(found[errors.argmin(axis=1)].tolist())
        assert nearest[0] == nearest[1]
    assert left_out > 0 or name == "IQ2_S", "whose neighbours are all at one distance"
