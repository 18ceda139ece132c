"""Importance matrices, made: a model computes a text, and what went into each of its matrices is written to a file.

Wires the runtime, which gathers the sums, to ``quant.imatrix``, which knows the file. Nothing is printed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ggufmoe.errors import OptionError
from ggufmoe.evaluation.activations import ActivationSums, collect
from ggufmoe.evaluation.chunks import cut_chunks, read_text
from ggufmoe.evaluation.perplexity import last_step
from ggufmoe.files import check_output_file
from ggufmoe.gguf.model import read_model_header
from ggufmoe.gguf.names import expert_matrix
from ggufmoe.options import ImatrixOptions, OffloadOptions
from ggufmoe.quant.importances import save
from ggufmoe.runtime.engine import Engine
from ggufmoe.work import CancelFlag

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
    """What was gathered, over the chunks that are done."""

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
        """What is thin about it, in words."""
        unreached = [(row.layer, row.unreached) for row in self.coverage if row.unreached]
        low = [(row.layer, row.low) for row in self.coverage if row.low]
        found = []
        if unreached:
            found.append(f"no token reached {_named(unreached)}: they are quantized as if without an importance matrix")
        if low:
            found.append(f"fewer than {LOW_COVERAGE_TOKENS} tokens reached {_named(low)}")
        return tuple(f"{text}; more text, or other text, would help" for text in found)

    def to_dict(self) -> dict[str, Any]:
        """The result as what JSON can hold."""
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
    model: str | os.PathLike[str],
    text: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    on_progress: Callable[[ImatrixResult], None] | None = None,
    cancel: CancelFlag | None = None,
    offload: OffloadOptions | None = None,
    **options: Any,
) -> ImatrixResult:
    """Measure on a text what matters in a GGUF model: the file that ``llama-imatrix`` writes, to rounding.

    ``text`` is the text itself, or a ``Path`` to it; ``options`` are the fields of ``ImatrixOptions``. ``on_progress``
    gets what is there so far whenever chunks are done. When ``cancel`` is set, what the completed chunks gave is
    written. Memory: as for ``perplexity``, and two sums for each column of each expert.

    Raises InputError for a text that is too short or no text, OutputError, what ``Engine`` raises, and Cancelled if
    not a single chunk was done.
    """
    try:
        given = ImatrixOptions(**options)
    except TypeError as error:
        raise OptionError(f"imatrix has no such option: {str(error).rpartition(' ')[2]}") from error
    return last_step(imatrix_steps(model, text, output, given, offload, cancel), on_progress)


def imatrix_steps(
    model: str | os.PathLike[str],
    text: str | os.PathLike[str],
    output: str | os.PathLike[str],
    options: ImatrixOptions,
    offload: OffloadOptions | None = None,
    cancel: CancelFlag | None = None,
) -> Iterator[ImatrixResult]:
    """``imatrix`` as it grows: what is there so far, and at the end, when it is written, the same once more."""
    path = Path(output).expanduser()
    inputs = [*read_model_header(Path(model)).paths, *([] if isinstance(text, str) else [Path(text).expanduser()])]
    check_output_file(path, inputs, replace=options.force)
    content = read_text(text)
    started, result, entries = time.monotonic(), None, None
    with Engine(model, options.context, offload, cancel=cancel) as engine:
        for step in engine.iterate(_gathered, content, options, cancel=cancel):
            seconds = time.monotonic() - started
            result = ImatrixResult(
                path, options.n_ctx, step.n_chunks, step.total_chunks, step.n_entries, step.coverage, seconds
            )
            entries = step.entries
            if entries is None:
                yield result
    if result is not None and entries is not None:
        _write(path, entries, () if isinstance(text, str) else (os.fspath(text),), options.n_ctx)
        yield result


@dataclass(frozen=True)
class _Gathered:
    """What is there after some chunks; the sums themselves come once, at the end."""

    n_chunks: int
    total_chunks: int
    n_entries: int
    coverage: tuple[LayerCoverage, ...]
    entries: Mapping[str, tuple[Any, Any]] | None = None


def _gathered(
    engine: Engine, content: str, options: ImatrixOptions, *, cancel: CancelFlag | None
) -> Iterator[_Gathered]:
    """Where the model is computed, since graphs can be watched only there."""
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
