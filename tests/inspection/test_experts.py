"""Cosines between experts, held against numpy on the same weights."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ggufmoe.errors import Cancelled, InputError
from ggufmoe.gguf.types import GGMLType
from ggufmoe.inspection.experts import ExpertSimilarity, compare_experts
from ggufmoe.work import Progress
from tests.gguf_files import text, write_gguf, write_weights

F32 = GGMLType.F32
KEYS = {"general.architecture": text("llama")}
Matrix = NDArray[np.float32]


def stack(n_expert: int, n_rows: int, n_cols: int, seed: int, noise: float = 1.0) -> Matrix:
    """Experts that share a base and differ by noise."""
    random = np.random.default_rng(seed)
    base = random.normal(0, 1, (n_rows, n_cols))
    return (base + noise * random.normal(0, 1, (n_expert, n_rows, n_cols))).astype(np.float32)


def write(path: Path, n_expert: int = 3, n_rows: int = 40, kind: GGMLType = F32) -> dict[str, Matrix]:
    values = {}
    for layer in range(2):
        for i, name in enumerate(("gate", "up", "down")):
            values[f"blk.{layer}.ffn_{name}_exps.weight"] = stack(n_expert, n_rows, 64, 10 * layer + i)
        values[f"blk.{layer}.ffn_gate_inp.weight"] = stack(n_expert, 1, 64, 7 + layer)[:, 0]
    write_weights(path, KEYS, {name: (F32 if "inp" in name else kind, data) for name, data in values.items()})
    return values


def cosines(values: Matrix) -> NDArray[np.float64]:
    flat = values.reshape(len(values), -1).astype(np.float64)
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    product: NDArray[np.float64] = unit @ unit.T
    return product


def of(found: ExpertSimilarity, layer: int, kind: str) -> NDArray[np.float64]:
    return next(one.cosines for one in found.matrices if (one.layer, one.kind) == (layer, kind))


def test_all_rows_give_numpy_s_cosines(tmp_path: Path) -> None:
    values = write(tmp_path / "m.gguf")
    found = compare_experts(tmp_path / "m.gguf", n_rows=40)
    assert (found.n_expert, found.layers, found.kinds) == (3, (0, 1), ("gate", "up", "down", "router"))
    for layer in (0, 1):
        for kind, name in (("gate", "gate_exps"), ("up", "up_exps"), ("down", "down_exps"), ("router", "gate_inp")):
            expected = cosines(values[f"blk.{layer}.ffn_{name}.weight"])
            np.testing.assert_allclose(of(found, layer, kind), expected, atol=1e-6)
    own = [one.cosines for one in found.matrices if one.kind != "router"]
    np.testing.assert_allclose(found.mean, np.mean(own, axis=0))
    assert len(found.matrices[0].pairs) == 3


def test_quantized_experts_are_nearly_those(tmp_path: Path) -> None:
    values = write(tmp_path / "m.gguf", n_expert=2, kind=GGMLType.Q8_0)
    found = compare_experts(tmp_path / "m.gguf", n_rows=40)
    np.testing.assert_allclose(of(found, 1, "up"), cosines(values["blk.1.ffn_up_exps.weight"]), atol=1e-3)


def test_a_sample_is_spread_over_the_matrix(tmp_path: Path) -> None:
    """The second half of one expert is another's: only rows from both halves show it."""
    values = stack(2, 64, 64, 1, noise=0.0)
    values[1, 32:] *= -1
    write_weights(tmp_path / "m.gguf", KEYS, {"blk.0.ffn_up_exps.weight": (F32, values)})
    found = compare_experts(tmp_path / "m.gguf", n_rows=16)
    assert (found.matrices[0].n_rows, found.matrices[0].of_rows) == (16, 64)
    assert abs(of(found, 0, "up")[0, 1]) < 0.2


@pytest.mark.parametrize("n_rows", [1, 8, 9, 16, 63, 64, 100])
def test_any_number_of_rows(tmp_path: Path, n_rows: int) -> None:
    values = stack(2, 64, 64, 1, noise=0.01)
    write_weights(tmp_path / "m.gguf", KEYS, {"blk.0.ffn_up_exps.weight": (F32, values)})
    found = compare_experts(tmp_path / "m.gguf", n_rows=n_rows)
    assert 1 <= found.matrices[0].n_rows <= max(1, min(n_rows, 64))
    assert of(found, 0, "up")[0, 1] > 0.99


def test_equal_experts_and_empty_ones(tmp_path: Path) -> None:
    values = stack(3, 16, 64, 1, noise=0.0)
    values[2] = 0
    write_weights(tmp_path / "m.gguf", KEYS, {"blk.0.ffn_up_exps.weight": (F32, values)})
    found = compare_experts(tmp_path / "m.gguf")
    assert of(found, 0, "up")[0, 1] == pytest.approx(1, abs=1e-12)
    assert np.isnan(of(found, 0, "up")[0, 2])
    report = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert report["matrices"][0]["cosines"][0][2] is None
    assert report["matrices"][0]["rows"] == 16


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf")
    steps: list[Progress] = []
    compare_experts(tmp_path / "m.gguf", n_rows=8, on_progress=steps.append)
    assert steps[-1].done == steps[-1].total == 2 * 3 * (3 * 8 + 1) * 64 * 4


def test_what_has_no_experts_to_compare(tmp_path: Path) -> None:
    dense = write_gguf(tmp_path / "d.gguf", KEYS, [("blk.0.ffn_up.weight", F32, (8, 8))])
    with pytest.raises(InputError, match="a dense model: it has no experts"):
        compare_experts(dense)
    old = write_gguf(tmp_path / "o.gguf", KEYS, [(f"blk.0.ffn_up.{e}.weight", F32, (8, 8)) for e in range(2)])
    with pytest.raises(InputError, match="stack them with `ggufmoe quantize -q COPY`"):
        compare_experts(old)


def test_it_can_be_stopped(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf")
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled, match="comparing experts was stopped"):
        compare_experts(tmp_path / "m.gguf", cancel=cancel)
