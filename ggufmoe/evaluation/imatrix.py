"""Computes importance matrices: runs a model on a text and writes the sums of squared inputs of its matrices to a file.

``activations`` collects the sums, ``quant.importances`` writes the file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ggufmoe.engine import Engine
from ggufmoe.errors import Cancelled, OutputExistsError
from ggufmoe.evaluation.activations import ActivationSums, collect
from ggufmoe.evaluation.chunks import cut_chunks, read_text, report_chunks
from ggufmoe.files import StrPath, check_output_file, possible_path
from ggufmoe.gguf.model import read_model_header
from ggufmoe.gguf.names import expert_matrix
from ggufmoe.options import ImatrixKeywords, ImatrixOptions, OffloadOptions, options_of
from ggufmoe.quant.importances import save
from ggufmoe.work import CancelFlag, OnProgress

if TYPE_CHECKING:
    from typing_extensions import Unpack

_MOST_NAMED = 8
"""Experts of a layer that a warning names; more are counted."""
LOW_COVERAGE_TOKENS = 512
"""With fewer tokens the standard error of an importance exceeds about 6 %, the square root of 2 / tokens."""


@dataclass(frozen=True)
class LayerCoverage:
    """How many tokens the router sent to each expert of one layer."""

    layer: int
    tokens: tuple[int, ...]

    @property
    def unreached(self) -> tuple[int, ...]:
        """Experts that processed no token; quantization gives all their columns the same importance."""
        return tuple(expert for expert, n in enumerate(self.tokens) if n == 0)

    @property
    def low(self) -> tuple[int, ...]:
        """Experts that processed some tokens, but fewer than LOW_COVERAGE_TOKENS."""
        return tuple(expert for expert, n in enumerate(self.tokens) if 0 < n < LOW_COVERAGE_TOKENS)


@dataclass(frozen=True)
class ImatrixResult:
    """Describes an importance matrix over the chunks completed so far."""

    path: Path
    n_ctx: int
    n_chunks: int
    total_chunks: int
    n_entries: int
    coverage: tuple[LayerCoverage, ...]
    """One entry per layer with experts."""
    seconds: float

    @property
    def is_complete(self) -> bool:
        """Whether all chunks are done; a cancelled run writes the sums over the completed chunks."""
        return self.n_chunks == self.total_chunks

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings about experts that processed no or too few tokens."""
        return coverage_warnings(self.coverage)

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


def coverage_warnings(coverage: Sequence[LayerCoverage]) -> tuple[str, ...]:
    """Warnings about experts that processed no or too few tokens."""
    unreached = [(row.layer, row.unreached) for row in coverage if row.unreached]
    low = [(row.layer, row.low) for row in coverage if row.low]
    found = []
    if unreached:
        found.append(f"no token reached {_named(unreached)}: they are quantized as if without an importance matrix")
    if low:
        found.append(f"fewer than {LOW_COVERAGE_TOKENS} tokens reached {_named(low)}")
    return tuple(f"{text}; more text, or other text, would help" for text in found)


def coverage_of(counts: Mapping[str, Any]) -> tuple[LayerCoverage, ...]:
    """The coverage of each layer with experts, from how many tokens reached each matrix, by its GGUF name."""
    layers = (
        LayerCoverage(matrix.layer, tuple(found.astype(int).tolist()))
        for name, found in counts.items()
        if (matrix := expert_matrix(name)) is not None and matrix.kind == "down"
    )
    return tuple(sorted(layers, key=lambda row: row.layer))


def _named(layers: list[tuple[int, tuple[int, ...]]]) -> str:
    parts = [f"layer {layer}: {_listed(experts)}" for layer, experts in layers]
    more = f"; and in {len(parts) - 4} more layers" if len(parts) > 4 else ""
    return f"experts ({'; '.join(parts[:4])}{more})"


def _listed(experts: tuple[int, ...]) -> str:
    more = f" and {len(experts) - _MOST_NAMED} more" if len(experts) > _MOST_NAMED else ""
    return ", ".join(map(str, experts[:_MOST_NAMED])) + more


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
    """Compute the importance matrix of a GGUF model on a text and write it to ``output``, as ``llama-imatrix`` does.

    Give either the text itself (``text``) or a UTF-8 file (``text_file``), whose name is then written into ``output``.
    Give options as one object (``options=ImatrixOptions(n_ctx=256)``) or by name (``n_ctx=256``). ``on_progress`` is
    called while the model is loaded (phase ``load``, in a thread of the engine) and after each chunk (phase ``chunks``)
    with the ImatrixResult over the completed chunks as ``Progress.result``. When ``cancel`` is set, the sums over the
    completed chunks are written, and ``is_complete`` is False. Memory: that of ``perplexity``, and two sums for each
    column of each expert.

    Raises InputError if the text is too short or cannot be read, OutputError if the file cannot be written, the errors
    of ``Engine``, and Cancelled if no chunk was completed.
    """
    options = options_of(ImatrixOptions, options, keywords)
    path, model = possible_path(output), possible_path(model)
    read = [*read_model_header(model).paths, *([] if text_file is None else [possible_path(text_file)])]
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
    # what another process wrote meanwhile is not replaced, and hours of computing are not lost
    is_taken = path.exists() and not options.force
    place = path.with_name(f"{path.stem}-{os.getpid()}{path.suffix}") if is_taken else path
    _write(place, entries, () if text_file is None else (os.fspath(text_file),), options.n_ctx)
    if is_taken:
        raise OutputExistsError(f"{path} was made by another process meanwhile; the result of this one is in {place}")
    return result


@dataclass(frozen=True)
class _Gathered:
    """The state after some chunks; ``entries``, the sums, is set only in the last one."""

    n_chunks: int
    total_chunks: int
    n_entries: int
    coverage: tuple[LayerCoverage, ...]
    entries: Mapping[str, tuple[Any, Any]] | None = None


def _counts(entries: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    return {name: counts for name, (_, counts) in entries.items()}


def _gathered(
    engine: Engine, content: str, options: ImatrixOptions, *, cancel: CancelFlag | None
) -> Iterator[_Gathered]:
    """Collect the sums chunk by chunk. Runs in the process that computes, the only one that can observe the graph."""
    chunks = cut_chunks(engine, content, options, cancel)
    sums = ActivationSums(engine.cancel, process_output=options.process_output)
    step = None
    for done in collect(engine, chunks, sums, cancel):
        step = _Gathered(
            done,
            len(chunks),
            len(sums.entries),
            coverage_of(_counts(sums.entries)),
        )
        yield step
    if step is not None:
        yield replace(step, entries=dict(sums.entries))


def _write(path: Path, entries: Mapping[str, tuple[Any, Any]], datasets: tuple[str, ...], chunk_size: int) -> None:
    stored = {name: (sums.astype(np.float32), counts.astype(np.float32)) for name, (sums, counts) in entries.items()}
    chunk_count = max((int(counts.max()) // chunk_size for _, counts in stored.values()), default=0)
    save(path, stored, datasets, chunk_count, chunk_size)
