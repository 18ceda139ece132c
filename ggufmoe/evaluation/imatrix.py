"""Making importance matrices: a model computes a text, and sums of the inputs of its matrices are written to a file.

Connects ``activations``, which gathers the sums, to ``quant.importances``, which knows the file. Nothing is printed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ggufmoe.engine import Engine
from ggufmoe.errors import Cancelled
from ggufmoe.evaluation.activations import ActivationSums, collect
from ggufmoe.evaluation.chunks import cut_chunks, read_text, report_chunks
from ggufmoe.files import StrPath, check_output_file, user_path
from ggufmoe.gguf.model import read_model_header
from ggufmoe.gguf.names import expert_matrix
from ggufmoe.options import ImatrixKeywords, ImatrixOptions, OffloadOptions, options_of
from ggufmoe.quant.importances import save
from ggufmoe.work import CancelFlag, OnProgress

if TYPE_CHECKING:
    from typing_extensions import Unpack

LOW_COVERAGE_TOKENS = 512
"""The mean of fewer squares is off by more than some 6 % (the square root of 2 by the number of tokens)."""


@dataclass(frozen=True)
class LayerCoverage:
    """How many tokens reached each expert of one layer."""

    layer: int
    tokens: tuple[int, ...]

    @property
    def unreached(self) -> tuple[int, ...]:
        """Experts that no token reached: all their columns count the same when quantized."""
        return tuple(expert for expert, n in enumerate(self.tokens) if n == 0)

    @property
    def low(self) -> tuple[int, ...]:
        """Experts that some tokens reached, but fewer than LOW_COVERAGE_TOKENS."""
        return tuple(expert for expert, n in enumerate(self.tokens) if 0 < n < LOW_COVERAGE_TOKENS)


@dataclass(frozen=True)
class ImatrixResult:
    """What an importance matrix holds, over the chunks that are done."""

    path: Path
    n_ctx: int
    n_chunks: int
    total_chunks: int
    n_entries: int
    coverage: tuple[LayerCoverage, ...]
    """Of the layers with experts."""
    seconds: float

    @property
    def is_complete(self) -> bool:
        """Whether all chunks are done: a run that was stopped writes what it has."""
        return self.n_chunks == self.total_chunks

    @property
    def warnings(self) -> tuple[str, ...]:
        """One sentence for each way in which the text covered the experts too thinly."""
        unreached = [(row.layer, row.unreached) for row in self.coverage if row.unreached]
        low = [(row.layer, row.low) for row in self.coverage if row.low]
        found = []
        if unreached:
            found.append(f"no token reached {_named(unreached)}: they are quantized as if without an importance matrix")
        if low:
            found.append(f"fewer than {LOW_COVERAGE_TOKENS} tokens reached {_named(low)}")
        return tuple(f"{text}; more text, or other text, would help" for text in found)

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values for JSON."""
        return {
            "path": str(self.path),
            "n_ctx": self.n_ctx,
            "chunks": self.n_chunks,
            "total_chunks": self.total_chunks,
            "entries": self.n_entries,
            "coverage": [{"layer": row.layer, "tokens": list(row.tokens)} for row in self.coverage],
            "warnings": list(self.warnings),
            "seconds": round(self.seconds, 3),
        }


def _named(layers: list[tuple[int, tuple[int, ...]]]) -> str:
    parts = [f"layer {layer}: {', '.join(map(str, experts))}" for layer, experts in layers]
    more = f"; and in {len(parts) - 4} more layers" if len(parts) > 4 else ""
    return f"experts ({'; '.join(parts[:4])}{more})"


def imatrix(
    model: StrPath,
    output: StrPath,
    text: str | None = None,
    *,
    text_file: StrPath | None = None,
    offload: OffloadOptions | None = None,
    options: ImatrixOptions | None = None,
    on_progress: OnProgress | None = None,
    cancel: CancelFlag | None = None,
    **keywords: Unpack[ImatrixKeywords],
) -> ImatrixResult:
    """Measure on a text how much each column of each matrix of a GGUF model matters: the file of ``llama-imatrix``.

    The text is given itself (``text``) or as a file in UTF-8 (``text_file``), whose name is then written into
    ``output``. The options are given as one object (``options=ImatrixOptions(n_ctx=256)``) or by name (``n_ctx=256``).
    ``on_progress`` is called while the model is loaded (phase ``load``, in a thread of the engine) and after each chunk
    (phase ``chunks``), when the ``result`` of its Progress is the ImatrixResult over the chunks done. When ``cancel``
    is set, the sums over the complete chunks are written, and ``is_complete`` is False. Memory: as for ``perplexity``,
    and two sums for each column of each expert.

    Raises InputError for a text that is too short or not readable, OutputError, what ``Engine`` raises, and Cancelled
    if no chunk was done.
    """
    options = options_of(ImatrixOptions, options, keywords)
    path, model = user_path(output), user_path(model)
    read = [*read_model_header(model).paths, *([] if text_file is None else [user_path(text_file)])]
    check_output_file(path, read, replace=options.force)
    content = read_text(text, text_file)
    started, result, entries = time.monotonic(), None, None
    with Engine(model, options.context, offload, on_progress=on_progress, cancel=cancel) as engine:
        for step in engine.iterate(_gathered, content, options, cancel=cancel):
            seconds = time.monotonic() - started
            result = ImatrixResult(
                path, options.n_ctx, step.n_chunks, step.total_chunks, step.n_entries, step.coverage, seconds
            )
            entries = step.entries
            if entries is None:
                report_chunks(on_progress, result)
    if result is None or entries is None:
        raise Cancelled("stopped before the first chunk was done")
    _write(path, entries, () if text_file is None else (os.fspath(text_file),), options.n_ctx)
    return result


@dataclass(frozen=True)
class _Gathered:
    """What was gathered over some chunks; the sums themselves come once, after the last one."""

    n_chunks: int
    total_chunks: int
    n_entries: int
    coverage: tuple[LayerCoverage, ...]
    entries: Mapping[str, tuple[Any, Any]] | None = None


def _gathered(
    engine: Engine, content: str, options: ImatrixOptions, *, cancel: CancelFlag | None
) -> Iterator[_Gathered]:
    """Gather sums chunk by chunk. Runs in the process that computes: only there can llama.cpp's graph be watched."""
    chunks = cut_chunks(engine, content, options)
    sums = ActivationSums(engine.cancel, process_output=options.process_output)
    step = None
    for done in collect(engine, chunks, sums, cancel):
        step = _Gathered(done, len(chunks), len(sums.entries), _coverage(sums.entries))
        yield step
    if step is not None:
        yield replace(step, entries=dict(sums.entries))


def _coverage(entries: Mapping[str, tuple[Any, Any]]) -> tuple[LayerCoverage, ...]:
    layers = (
        LayerCoverage(matrix.layer, tuple(counts.astype(int).tolist()))
        for name, (_, counts) in entries.items()
        if (matrix := expert_matrix(name)) is not None and matrix.kind == "down"
    )
    return tuple(sorted(layers, key=lambda row: row.layer))


def _write(path: Path, entries: Mapping[str, tuple[Any, Any]], datasets: tuple[str, ...], chunk_size: int) -> None:
    stored = {name: (sums.astype(np.float32), counts.astype(np.float32)) for name, (sums, counts) in entries.items()}
    chunk_count = max((int(counts.max()) // chunk_size for _, counts in stored.values()), default=0)
    save(path, stored, datasets, chunk_count, chunk_size)
