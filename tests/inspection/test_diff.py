"""What diff_models finds, held against numpy and against gguf-py's own arithmetic."""

from __future__ import annotations

import json
import math
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from ggufmoe.errors import Cancelled, GGUFError
from ggufmoe.gguf.header import GGUFValue, read_header
from ggufmoe.gguf.types import GGMLType, ValueType
from ggufmoe.inspection.diff import ModelDifference, TensorDifference, diff_models
from ggufmoe.work import Progress
from tests.gguf_files import Arrays, stored, text, u32, write_gguf, write_shards, write_weights

F32, F16, Q8_0, Q4_K = GGMLType.F32, GGMLType.F16, GGMLType.Q8_0, GGMLType.Q4_K
KEYS = {"general.architecture": text("llama"), "llama.block_count": u32(1)}


def random(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


def tensors(kind: GGMLType = F32) -> dict[str, tuple[GGMLType, NDArray[np.float32]]]:
    return {
        "token_embd.weight": (kind, random(9, 256)),
        "blk.0.ffn_up_exps.weight": (kind, random(2, 5, 256, seed=1)),
        "output_norm.weight": (F32, random(256, seed=2)),
    }


def compare(folder: Path, before: Arrays, after: Arrays, **options: Any) -> ModelDifference:
    return diff_models(
        write_weights(folder / "a.gguf", KEYS, before), write_weights(folder / "b.gguf", KEYS, after), **options
    )


def of(found: ModelDifference, name: str) -> TensorDifference:
    return next(tensor for tensor in found.tensors if tensor.name == name)


def test_a_file_is_the_same_as_itself(tmp_path: Path) -> None:
    found = compare(tmp_path, tensors(Q4_K), tensors(Q4_K))
    assert found.is_same
    assert {tensor.verdict for tensor in found.tensors} == {"same"}
    assert (found.different, found.keys, found.relative_error) == ((), (), None)


def test_order_and_shards_do_not_matter(tmp_path: Path) -> None:
    all_of_it = tensors(Q8_0)
    names = list(all_of_it)[::-1]
    shards = [{name: all_of_it[name] for name in part} for part in (names[:1], names[1:])]
    whole = write_weights(tmp_path / "whole.gguf", KEYS, all_of_it)
    split = write_shards(tmp_path, KEYS, shards)
    found = diff_models(whole, split[1])
    assert found.is_same
    assert found.after == tuple(path.name for path in split)


@pytest.mark.parametrize("kind", [F16, GGMLType.BF16, Q8_0, Q4_K, GGMLType.Q6_K, GGMLType.IQ4_XS])
def test_the_error_of_a_type_is_that_of_gguf_py(tmp_path: Path, kind: GGMLType) -> None:
    found = compare(tmp_path, tensors(), tensors(kind))
    assert found.relative_error is not None
    for name in ("token_embd.weight", "blk.0.ffn_up_exps.weight"):
        exact = tensors()[name][1].astype(np.float64)
        raw = np.frombuffer(stored(kind, tensors()[name][1]), np.uint8).reshape(-1, kind.row_bytes(256))
        rounded = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(kind.id)).reshape(exact.shape)
        expected = math.sqrt(np.square(rounded - exact).mean() / np.square(exact).mean())
        tensor = of(found, name)
        assert tensor.verdict == "type"
        assert tensor.relative_error == pytest.approx(expected, rel=1e-5)
        assert tensor.max_difference == pytest.approx(np.abs(rounded - exact).max(), rel=1e-5)
    assert of(found, "output_norm.weight").verdict == "same"
    errors = [tensor.relative_error for tensor in found.different]
    assert min(e for e in errors if e) <= found.relative_error <= max(e for e in errors if e)


def test_one_changed_weight_is_found(tmp_path: Path) -> None:
    changed = tensors()
    values = changed["blk.0.ffn_up_exps.weight"][1].copy()
    values[1, 4, 255] += 0.5
    changed["blk.0.ffn_up_exps.weight"] = (F32, values)
    found = compare(tmp_path, tensors(), changed)
    assert [tensor.name for tensor in found.different] == ["blk.0.ffn_up_exps.weight"]
    tensor = found.different[0]
    assert tensor.verdict == "values"
    assert tensor.max_difference == pytest.approx(0.5)
    assert tensor.relative_error == pytest.approx(0.5 / np.linalg.norm(tensors()[tensor.name][1]), rel=1e-5)
    part = next(part for part in found.parts if part.name == "experts")
    assert (part.n_different, part.n_tensors, part.bits_before, part.bits_after) == (1, 1, 32, 32)


def test_a_change_behind_the_first_tile_is_found(tmp_path: Path) -> None:
    large = random(3000, 256)
    changed = large.copy()
    changed[-1, -1] += 1
    steps: list[Progress] = []
    found = compare(tmp_path, {"x.weight": (F32, large)}, {"x.weight": (F32, changed)}, on_progress=steps.append)
    assert found.tensors[0].max_difference == pytest.approx(1, rel=1e-5)
    assert steps[-1] == Progress("compare", 2 * large.nbytes, 2 * large.nbytes, "bytes", "x.weight")


def test_missing_tensors_and_shapes(tmp_path: Path) -> None:
    after = tensors() | {"output.weight": (F32, random(4, 256)), "token_embd.weight": (F32, random(8, 256))}
    del after["output_norm.weight"]
    found = compare(tmp_path, tensors(), after)
    assert {tensor.name: tensor.verdict for tensor in found.tensors} == {
        "token_embd.weight": "shape",
        "blk.0.ffn_up_exps.weight": "same",
        "output_norm.weight": "removed",
        "output.weight": "added",
    }
    assert [tensor.n_weights for tensor in found.different] == [9 * 256, 256, 4 * 256]
    assert found.relative_error is None


def test_leading_ones_are_no_difference(tmp_path: Path) -> None:
    values = random(3, 64)
    assert compare(tmp_path, {"x": (F32, values)}, {"x": (F32, values[None])}).is_same


def test_headers_alone(tmp_path: Path) -> None:
    found = compare(tmp_path, tensors(), tensors(Q8_0), headers_only=True)
    assert [tensor.verdict for tensor in found.tensors] == ["type", "type", "unread"]
    assert not found.is_same
    values = {name: (kind, data + 1) for name, (kind, data) in tensors().items()}
    assert compare(tmp_path, tensors(), values, headers_only=True).is_same


def test_metadata(tmp_path: Path) -> None:
    def array(*items: str) -> GGUFValue:
        return GGUFValue(ValueType.ARRAY, list(items), ValueType.STRING)

    nan = GGUFValue(ValueType.FLOAT32, math.nan)
    before = KEYS | {"a": text("x"), "b": u32(1), "c": array("p", "q", "r"), "d": array("p"), "n": nan, "t": u32(7)}
    after = KEYS | {"b": u32(2), "c": array("p", "Q", "R"), "d": array("p", "q"), "n": nan, "e": text("new")}
    after |= {"t": GGUFValue(ValueType.INT32, 7)}
    found = diff_models(write_gguf(tmp_path / "a", before), write_gguf(tmp_path / "b", after))
    by_key = {key.key: key for key in found.keys}
    assert list(by_key) == ["a", "b", "c", "d", "t", "e"]
    assert (by_key["a"].after, by_key["e"].before) == (None, None)
    assert (by_key["c"].n_items, by_key["c"].first_item) == (2, 1)
    assert by_key["d"].n_items is None
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["metadata"][1] == {
        "key": "b",
        "before": {"type": "UINT32", "value": 1},
        "after": {"type": "UINT32", "value": 2},
    }


@pytest.mark.parametrize(
    ("before", "after", "error", "largest"),
    [
        (np.zeros((2, 32), np.float32), np.ones((2, 32), np.float32), math.inf, 1),
        (np.ones((2, 32), np.float32), np.full((2, 32), np.nan, np.float32), math.nan, math.nan),
        (np.ones((2, 32), np.float32), np.full((2, 32), np.inf, np.float32), math.inf, math.inf),
        (np.zeros((2, 32), np.float32), np.full((2, 32), -0.0, np.float32), 0, 0),
    ],
)
def test_numbers_at_the_edge(
    tmp_path: Path, before: NDArray[np.float32], after: NDArray[np.float32], error: float, largest: float
) -> None:
    found = compare(tmp_path, {"x.weight": (F32, before)}, {"x.weight": (F32, after)})
    assert found.tensors[0].relative_error == pytest.approx(error, nan_ok=True)
    assert found.tensors[0].max_difference == pytest.approx(largest, nan_ok=True)
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_type_without_values_is_compared_by_bytes(tmp_path: Path) -> None:
    shape = [("x.weight", GGMLType.Q8_K, (2, 256))]
    same = write_gguf(tmp_path / "a.gguf", KEYS, shape)
    other = write_gguf(tmp_path / "b.gguf", KEYS, shape)
    content = bytearray(other.read_bytes())
    content[read_header(other).data_offset + 300] ^= 1
    other.write_bytes(content)
    found = diff_models(same, other)
    assert (found.tensors[0].verdict, found.tensors[0].relative_error) == ("values", None)
    assert diff_models(same, same).is_same


def test_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    values = random(16384, 256)
    paths = [write_weights(tmp_path / name, KEYS, {"x": (F32, values + i)}) for i, name in enumerate("ab")]
    tracemalloc.start()
    try:
        found = diff_models(*paths, n_threads=1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.tensors[0].max_difference == pytest.approx(1, rel=1e-5)
    assert peak < values.nbytes / 2


def test_it_can_be_stopped(tmp_path: Path) -> None:
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled, match="comparing was stopped"):
        compare(tmp_path, tensors(), tensors(Q8_0), cancel=cancel)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    path = write_weights(tmp_path / "a.gguf", KEYS, tensors())
    (tmp_path / "b.gguf").write_bytes(path.read_bytes()[:-100])
    with pytest.raises(GGUFError, match="truncated"):
        diff_models(path, tmp_path / "b.gguf")
