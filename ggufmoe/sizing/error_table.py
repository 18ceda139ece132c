"""The error table of a model: what each tensor in each type adds to the divergence from the unquantized model.

Reads each weight once: its rows are quantized to every type by the kernels that write files, with the same importances.
A table can be kept in a file, so that another size reads no weights.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufmoe.errors import NonFiniteError
from ggufmoe.files import replacing
from ggufmoe.gguf.names import OUTPUT
from ggufmoe.gguf.types import GGMLType
from ggufmoe.hub.read_ahead import ReadAhead
from ggufmoe.native import quantizing
from ggufmoe.quant.importances import Imatrix
from ggufmoe.quant.kernels import QuantizerName, quantize_rows
from ggufmoe.quant.mixes import TOKEN_EMBEDDINGS
from ggufmoe.sizing.weightings import Weighting
from ggufmoe.weights.byte_ranges import ByteRange, byte_ranges
from ggufmoe.work import Work
from ggufmoe.writing.plan import PLAIN_DTYPES, Part, PlannedTensor
from ggufmoe.writing.tiling import tile_rows

SAMPLE_WEIGHTS = 1 << 20
"""Weights of a matrix that are quantized to estimate its error, if it has more."""
_RUN_ROWS = 8
"""Rows that stand one after another in a sample."""
_JOB_WEIGHTS = 1 << 22
"""Weights of one matrix that a thread takes at a time."""

ErrorTable = dict[str, dict[GGMLType, float]]
"""By tensor name and type: the predicted divergence, in nats a token."""


@dataclass(frozen=True, eq=False)
class WantedErrors:
    """A tensor whose errors are wanted, in which types, and how they count."""

    tensor: PlannedTensor
    types: tuple[GGMLType, ...]
    weightings: tuple[tuple[Weighting, ...], ...]
    """Of each part of the tensor: all of them count."""


@dataclass(frozen=True)
class CountedRows:
    """Rows [start, stop) of a matrix, and how many times their error counts."""

    start: int
    stop: int
    times: float = 1.0


@dataclass(frozen=True, eq=False)
class _MeasuredRows:
    """Runs of rows of one part of a tensor, few enough for one thread to hold a tile at a time."""

    wanted: WantedErrors
    part: int
    runs: tuple[CountedRows, ...]

    @property
    def source(self) -> Part:
        return self.wanted.tensor.parts[self.part]

    @property
    def n_rows(self) -> int:
        return sum(run.stop - run.start for run in self.runs)

    def byte_ranges(self) -> list[ByteRange]:
        """What is read of files that can be read by ranges."""
        return [one for run in self.runs for one in byte_ranges(self.source.rows, run.start, run.stop)]


def measure_errors(
    wanted: Sequence[WantedErrors],
    imatrix: Imatrix | None,
    work: Work,
    *,
    threads: int | None = None,
    quantizer: QuantizerName = "auto",
    cache: bool = True,
    read_ahead: ReadAhead | None = None,
) -> ErrorTable:
    """Quantize the tensors to their types and return the predicted divergence of each.

    All rows of the embedding and of the output count: the gradients of few rows make most of the sum. Of other
    matrices with more than SAMPLE_WEIGHTS weights a sample is taken. ``work`` counts bytes that are read. The result
    does not depend on the number of threads. ``read_ahead`` fetches what is on the hub. Raises NonFiniteError for
    damaged weights and Cancelled.
    """
    jobs = [job for each in wanted for job in _jobs(each)]
    jobs.sort(key=lambda job: -job.n_rows * job.wanted.tensor.n_cols * len(job.wanted.types))

    def measure(numbered: tuple[int, _MeasuredRows]) -> NDArray[np.float64]:
        number, job = numbered
        with contextlib.nullcontext() if read_ahead is None else read_ahead.item(number):
            return _measured(job, imatrix, work, quantizer, cache=cache)

    schedule = ((number, job.byte_ranges()) for number, job in enumerate(jobs))
    with contextlib.nullcontext() if read_ahead is None else read_ahead.running(schedule, work.is_stopping):
        sums = work.map(measure, list(enumerate(jobs)), threads)
    table: ErrorTable = {each.tensor.name: dict.fromkeys(each.types, 0.0) for each in wanted}
    by_place = sorted(zip(jobs, sums, strict=True), key=lambda pair: (pair[0].part, pair[0].runs[0].start))
    for job, errors in by_place:
        for kind, error in zip(job.wanted.types, errors.tolist(), strict=True):
            table[job.wanted.tensor.name][kind] += error
    return table


def sampled_bytes(wanted: Sequence[WantedErrors]) -> int:
    """Bytes of weights that ``measure_errors`` reads."""
    return sum(
        job.n_rows * job.source.type.row_bytes(job.wanted.tensor.n_cols) for each in wanted for job in _jobs(each)
    )


def _jobs(wanted: WantedErrors) -> Iterator[_MeasuredRows]:
    tensor = wanted.tensor
    is_whole = tensor.name == OUTPUT or tensor.name in TOKEN_EMBEDDINGS
    for number, part in enumerate(tensor.parts):
        if is_whole or part.n_rows * tensor.n_cols <= SAMPLE_WEIGHTS:
            runs: Sequence[CountedRows] = [CountedRows(0, part.n_rows)]
        else:
            rows = sum(weighting.rows * weighting.columns.mean() for weighting in wanted.weightings[number])
            runs = sample(np.asarray(rows), max(1, SAMPLE_WEIGHTS // tensor.n_cols))
        yield from (
            _MeasuredRows(wanted, number, group) for group in _grouped(runs, max(1, _JOB_WEIGHTS // tensor.n_cols))
        )


def sample(rows: NDArray[np.float64], n_rows: int) -> list[CountedRows]:
    """About ``n_rows`` rows in runs, evenly over the sum of ``rows``: those that count more are taken more often.

    The expectation of the sum of (error of a run x its ``times``) is the sum over all rows. Deterministic.
    """
    starts = np.arange(0, len(rows), _RUN_ROWS)
    totals = np.add.reduceat(rows, starts)
    if not totals.sum() > 0:
        totals = np.ones(len(starts))
    n_runs = max(1, n_rows // _RUN_ROWS)
    ends = np.cumsum(totals)
    places = (np.arange(n_runs) + 0.5) * (ends[-1] / n_runs)
    picked, hits = np.unique(np.minimum(np.searchsorted(ends, places), len(starts) - 1), return_counts=True)
    times = hits * ends[-1] / (n_runs * totals[picked])
    stops = np.minimum(starts[picked] + _RUN_ROWS, len(rows))
    return [CountedRows(*each) for each in zip(starts[picked].tolist(), stops.tolist(), times.tolist(), strict=True)]


def _grouped(runs: Sequence[CountedRows], n_rows: int) -> Iterator[tuple[CountedRows, ...]]:
    """The runs in groups of about ``n_rows`` rows; a longer run is cut."""
    group: list[CountedRows] = []
    size = 0
    for run in runs:
        for start in range(run.start, run.stop, n_rows):
            piece = CountedRows(start, min(start + n_rows, run.stop), run.times)
            if group and size + piece.stop - piece.start > n_rows:
                yield tuple(group)
                group, size = [], 0
            group.append(piece)
            size += piece.stop - piece.start
    if group:
        yield tuple(group)


def _measured(
    job: _MeasuredRows, imatrix: Imatrix | None, work: Work, quantizer: QuantizerName, *, cache: bool
) -> NDArray[np.float64]:
    """The predicted divergence of the job's rows in each of its types, (types,) float64."""
    tensor = job.wanted.tensor
    importance = None
    if imatrix is not None and tensor.weighted:
        weights = imatrix.weights(tensor.name, math.prod(tensor.shape[:-2]), tensor.n_cols)
        assert weights is not None, "the plan marks only tensors that have weights"
        importance = weights[job.part]
    errors = np.zeros(len(job.wanted.types))
    for runs in _grouped(job.runs, tile_rows(tensor)):
        work.check()
        stored = _read(job, runs)
        plain = _widened(job, stored)
        for number, kind in enumerate(job.wanted.types):
            source = stored if job.source.type in PLAIN_DTYPES else plain
            made: NDArray[np.uint8] = np.empty((len(plain), kind.row_bytes(tensor.n_cols)), np.uint8)
            quantize_rows(kind, source, made, importance, quantizer, cache=cache)
            errors[number] += _divergence(job, runs, quantizing.widened(kind, made, tensor.n_cols) - plain)
        work.advance(stored.nbytes, tensor.name)
    return errors


def _read(job: _MeasuredRows, runs: Sequence[CountedRows]) -> NDArray[Any]:
    """The rows of the runs as they are stored, one after another."""
    kind, n_cols = job.source.type, job.wanted.tensor.n_cols
    dtype = PLAIN_DTYPES.get(kind, np.dtype(np.uint8))
    width = kind.row_bytes(n_cols) // dtype.itemsize
    rows: NDArray[Any] = np.empty((sum(run.stop - run.start for run in runs), width), dtype)
    begin = 0
    for run in runs:
        end = begin + run.stop - run.start
        job.source.rows.read_rows(run.start, run.stop, rows[begin:end])
        begin = end
    return rows


def _widened(job: _MeasuredRows, stored: NDArray[Any]) -> NDArray[np.float32]:
    plain = quantizing.widened(job.source.type, stored.view(np.uint8), job.wanted.tensor.n_cols)
    if not np.isfinite(plain).all():
        raise NonFiniteError(f"{job.source.name} has a weight that is NaN or infinite; the source is damaged")
    return plain


def _divergence(job: _MeasuredRows, runs: Sequence[CountedRows], error: NDArray[np.float32]) -> float:
    """The predicted divergence of an error of the rows of the runs."""
    squared = np.square(error, out=error)
    total = 0.0
    for weighting in job.wanted.weightings[job.part]:
        by_row = squared @ weighting.columns
        counted = np.concatenate([weighting.rows[run.start : run.stop] * run.times for run in runs])
        total += float(counted @ by_row.astype(np.float64))
    return total


def load_table(path: Path) -> ErrorTable:
    """The table in a file that ``save_table`` has written; empty if there is none, or it cannot be read."""
    try:
        found = json.loads(path.read_bytes())
        return {
            str(name): {GGMLType[kind]: float(error) for kind, error in errors.items()}
            for name, errors in found["errors"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def save_table(path: Path, table: Mapping[str, Mapping[GGMLType, float]]) -> None:
    """Keep a table in a file. Raises OutputError if it cannot be written."""
    errors = {name: {kind.name: error for kind, error in by_type.items()} for name, by_type in table.items()}
    with replacing(path, "the error table") as file:
        file.write(json.dumps({"errors": errors}, indent=1).encode() + b"\n")
