"""The error table: equal to the sum over all weights, whatever the threads; a sample comes near, and is the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ggufmoe.errors import InputError, NonFiniteError
from ggufmoe.gguf.types import GGMLType
from ggufmoe.native import quantizing
from ggufmoe.quant.kernels import quantize_rows
from ggufmoe.sizing import error_table
from ggufmoe.sizing.error_table import ErrorTable, WantedErrors, load_table, measure_errors, sample, save_table
from ggufmoe.sizing.weightings import weightings
from ggufmoe.work import Work
from ggufmoe.writing.plan import Part, PlannedTensor
from tests.sizing.drawn import N_TOKENS, sensitivity

EMBEDDING, EXPERTS, PLAIN = "token_embd.weight", "blk.0.ffn_down_exps.weight", "blk.0.attn_q.weight"
SHAPES = {EMBEDDING: (40, 256), EXPERTS: (3, 48, 256), PLAIN: (96, 256)}
TYPES = (GGMLType.Q2_K, GGMLType.Q4_K, GGMLType.Q8_0)


class Rows:
    """A matrix in memory, as a source of rows."""

    def __init__(self, name: str, values: NDArray[np.float32]) -> None:
        self.name, self.shape, self._values = name, values.shape, values

    def read_rows(self, start: int, stop: int, out: NDArray[np.float32]) -> None:
        out[...] = self._values[start:stop]


def values(name: str) -> NDArray[np.float32]:
    draw = np.random.default_rng(len(name))
    return draw.standard_t(4, SHAPES[name]).astype(np.float32)


def wanted(name: str, stored: NDArray[np.float32] | None = None, *, is_tied: bool = False) -> WantedErrors:
    matrices = (values(name) if stored is None else stored).reshape(-1, *SHAPES[name][-2:])
    parts = tuple(Part(Rows(f"{name}.{i}", matrix), GGMLType.F32) for i, matrix in enumerate(matrices))
    tensor = PlannedTensor(name, GGMLType.F32, SHAPES[name], parts)
    return WantedErrors(tensor, TYPES, weightings(sensitivity(SHAPES), name, SHAPES[name], is_tied=is_tied))


def measured(*tensors: WantedErrors, threads: int = 1) -> ErrorTable:
    return measure_errors(tensors, None, Work("errors", 1), threads=threads, cache=False)


def squared_errors(name: str, kind: GGMLType) -> NDArray[np.float64]:
    rows = values(name).reshape(-1, 256)
    made = np.empty((len(rows), kind.row_bytes(256)), np.uint8)
    quantize_rows(kind, rows, made, quantizer="ggml")
    error = quantizing.widened(kind, made, 256).astype(np.float64) - rows
    return np.square(error).reshape(SHAPES[name])


def test_each_weight_counts_by_its_row_and_its_column() -> None:
    table, known = measured(wanted(PLAIN), wanted(EXPERTS), wanted(EMBEDDING)), sensitivity(SHAPES)
    for name in (PLAIN, EXPERTS):
        matrix = known.matrices[name]
        g, h = matrix.grad_sum2 / matrix.counts[:, None], matrix.in_sum2 / matrix.counts[:, None]
        share = matrix.counts / N_TOKENS
        for kind in TYPES:
            errors = squared_errors(name, kind).reshape(len(share), *SHAPES[name][-2:])
            expected = 0.5 * np.einsum("e,ei,ej,eij->", share, g, h, errors)
            assert table[name][kind] == pytest.approx(expected, rel=1e-5)
    lookup = known.embedding
    for kind in TYPES:
        per_weight = np.outer(lookup.row_counts, lookup.grad_sum2) / N_TOKENS**2
        assert table[EMBEDDING][kind] == pytest.approx(
            0.5 * (per_weight * squared_errors(EMBEDDING, kind)).sum(), rel=1e-5
        )


def test_an_embedding_that_is_the_output_counts_in_both_roles() -> None:
    alone, both = measured(wanted(EMBEDDING)), measured(wanted(EMBEDDING, is_tied=True))
    output = sensitivity(SHAPES).matrices["output.weight"]
    for kind in TYPES:
        added = 0.5 * np.einsum("i,j,ij->", *(output.grad_sum2[0], output.in_sum2[0]), squared_errors(EMBEDDING, kind))
        expected = alone[EMBEDDING][kind] + added / N_TOKENS**2
        assert both[EMBEDDING][kind] == pytest.approx(expected, rel=1e-5)


def test_threads_and_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = (wanted(PLAIN), wanted(EXPERTS), wanted(EMBEDDING))
    alone = measured(*tensors)
    assert measured(*tensors, threads=4) == alone
    monkeypatch.setattr(error_table, "_JOB_WEIGHTS", 7 * 256)
    for name, errors in measured(*tensors, threads=3).items():
        assert list(errors.values()) == pytest.approx(list(alone[name].values()), rel=1e-6)


def test_an_expert_that_no_token_reached_counts_a_little() -> None:
    known = sensitivity(SHAPES)
    matrix = known.matrices[EXPERTS]
    matrix.counts[2] = matrix.grad_sum2[2] = matrix.in_sum2[2] = 0
    reached, _, unreached = (each[0] for each in weightings(known, EXPERTS, SHAPES[EXPERTS], is_tied=False))
    assert 0 < unreached.rows.sum() < reached.rows.sum() / 100


def test_a_sample_comes_near_the_sum_and_is_the_same_again() -> None:
    draw = np.random.default_rng(1)
    weights, errors = draw.lognormal(0, 2, 4096), draw.gamma(4, 1, 4096)
    runs = sample(weights, 512)
    assert runs == sample(weights, 512)
    assert sum(run.stop - run.start for run in runs) <= 512
    estimate = sum(run.times * (weights * errors)[run.start : run.stop].sum() for run in runs)
    assert estimate == pytest.approx((weights * errors).sum(), rel=0.05)
    assert sum(run.times * weights[run.start : run.stop].sum() for run in runs) == pytest.approx(weights.sum())


def test_embedding_and_output_are_never_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measured(wanted(EMBEDDING), wanted(PLAIN))
    monkeypatch.setattr(error_table, "SAMPLE_WEIGHTS", 32 * 256)
    sampled = measured(wanted(EMBEDDING), wanted(PLAIN))
    assert sampled[EMBEDDING] == whole[EMBEDDING]
    assert sampled[PLAIN] != whole[PLAIN]
    assert list(sampled[PLAIN].values()) == pytest.approx(list(whole[PLAIN].values()), rel=0.5)


def test_damaged_weights_are_refused() -> None:
    stored = values(PLAIN)
    stored[5, 7] = np.nan
    with pytest.raises(NonFiniteError, match=r"blk.0.attn_q.weight.0 .* NaN or infinite"):
        measured(wanted(PLAIN, stored))


def test_a_sensitivity_of_another_model_is_refused() -> None:
    known = sensitivity(SHAPES)
    with pytest.raises(InputError, match=r"has nothing for blk.9.attn_q.weight; make it from this very model"):
        weightings(known, "blk.9.attn_q.weight", (96, 256), is_tied=False)
    with pytest.raises(InputError, match=r"attn_q.weight as 1 x 96 x 256, expected 1 x 96 x 512"):
        weightings(known, PLAIN, (96, 512), is_tied=False)
    with pytest.raises(InputError, match=r"token_embd.weight as 40 x 256, expected 41 x 256"):
        weightings(known, EMBEDDING, (41, 256), is_tied=False)


def test_a_table_is_kept_in_a_file(tmp_path: Path) -> None:
    table = {PLAIN: {GGMLType.Q4_K: 1.25e-3, GGMLType.Q8_0: 2e-6}}
    save_table(tmp_path / "t.json", table)
    assert load_table(tmp_path / "t.json") == table
    assert load_table(tmp_path / "none.json") == {}
    (tmp_path / "t.json").write_text('{"errors": {"x": {"Q99": 1}}}')
    assert load_table(tmp_path / "t.json") == {}
