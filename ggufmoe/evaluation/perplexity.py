"""Perplexity: how well a model predicts a text, by llama.cpp's definition and with its chunks.

The exponential of the mean negative log-likelihood over the second half of each chunk. Source:
``tools/perplexity/perplexity.cpp`` of llama.cpp at the pinned commit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ggufmoe.engine import Engine
from ggufmoe.evaluation.chunks import cut_chunks, last_result, read_text, scored_blocks
from ggufmoe.files import StrPath
from ggufmoe.options import EvaluationKeywords, EvaluationOptions, OffloadOptions, options_of
from ggufmoe.work import CancelFlag, OnProgress

if TYPE_CHECKING:
    from typing_extensions import Unpack

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error, computed as if tokens were independent of each other."""

    value: float
    uncertainty: float

    @property
    def exp(self) -> Estimate:
        """The exponential of the value; its error is propagated to first order."""
        value = math.exp(self.value)
        return Estimate(value, value * self.uncertainty)


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of a model on a text, over the chunks that are done."""

    model: Path
    n_ctx: int
    n_chunks: int
    """Chunks that are done."""
    total_chunks: int
    n_scored: int
    """Tokens that were scored."""
    mean_nll: Estimate
    """Negative log-likelihood of a token, in nats."""
    seconds: float

    @property
    def estimate(self) -> Estimate:
        """The perplexity and its uncertainty."""
        return self.mean_nll.exp

    @property
    def value(self) -> float:
        """The perplexity."""
        return self.estimate.value

    @property
    def is_complete(self) -> bool:
        """Whether all chunks are done: a run that was stopped gives what it has."""
        return self.n_chunks == self.total_chunks

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values for JSON."""
        return {
            "model": str(self.model),
            "n_ctx": self.n_ctx,
            "chunks": self.n_chunks,
            "total_chunks": self.total_chunks,
            "tokens": self.n_scored,
            "perplexity": vars(self.estimate),
            "nll": vars(self.mean_nll),
            "seconds": round(self.seconds, 3),
        }


def perplexity(
    model: StrPath,
    text: str | None = None,
    *,
    text_file: StrPath | None = None,
    offload: OffloadOptions | None = None,
    options: EvaluationOptions | None = None,
    on_progress: OnProgress | None = None,
    cancel: CancelFlag | None = None,
    **keywords: Unpack[EvaluationKeywords],
) -> Perplexity:
    """The perplexity of a GGUF model on a text: the number that ``llama-perplexity`` prints.

    The text is given itself (``text``) or as a file in UTF-8 (``text_file``), whose last newline is left out. The
    options are given as one object (``options=EvaluationOptions(n_ctx=256)``) or by name (``n_ctx=256``).
    ``on_progress`` is called while the model is loaded (phase ``load``, in a thread of the engine) and after each chunk
    (phase ``chunks``), when the ``result`` of its Progress is the Perplexity over the chunks done. When ``cancel`` is
    set, the result over the chunks done is returned, and its ``is_complete`` is False. Memory: the model, and the
    logits of one batch.

    Raises InputError for a text that is too short or not readable, OptionError, what ``Engine`` raises, and Cancelled
    if no chunk was done.
    """
    options = options_of(EvaluationOptions, options, keywords)
    content = read_text(text, text_file)
    with Engine(model, options.context, offload, on_progress=on_progress, cancel=cancel) as engine:
        return last_result(engine.iterate(_scored, content, options, cancel=cancel), on_progress)


def _scored(
    engine: Engine, content: str, options: EvaluationOptions, *, cancel: CancelFlag | None
) -> Iterator[Perplexity]:
    """Score the chunks. Runs in the process that computes, so that logits are not sent to another one."""
    started, sums = time.monotonic(), Sums()
    chunks = cut_chunks(engine, content, options)
    for part in engine.compute_chunks(chunks, options.n_ctx // 2, cancel=cancel):
        for number in part.group:
            for rows, targets in scored_blocks(part, number, chunks[number]):
                sums.add(Normalized.of(rows).nll(targets))
            if part.end == options.n_ctx:
                seconds = time.monotonic() - started
                yield Perplexity(engine.path, options.n_ctx, number + 1, len(chunks), sums.count, sums.mean(), seconds)


@dataclass(frozen=True)
class Normalized:
    """Rows of logits with the logarithm of what their exponentials sum to, so that the difference is log p."""

    logits: Floats
    """(rows, n_vocab)"""
    log_sum: Doubles
    """(rows,)"""
    probabilities: Floats
    """(rows, n_vocab)"""

    @classmethod
    def of(cls, logits: Floats) -> Normalized:
        """Exponentials in single precision, their sum in double, as llama.cpp does."""
        highest = logits.max(axis=1)
        probabilities = np.exp(logits - highest[:, None])
        total = probabilities.sum(axis=1, dtype=np.float64)
        probabilities /= total[:, None].astype(np.float32)
        return cls(logits, highest + np.log(total), probabilities)

    def nll(self, targets: NDArray[np.int64]) -> Doubles:
        """Negative log-likelihood of one token of each row."""
        nll: Doubles = self.log_sum - np.take_along_axis(self.logits, targets[:, None], axis=1)[:, 0]
        return nll


@dataclass
class Sums:
    """Running sums of a value and of its square."""

    count: int = 0
    total: float = 0.0
    total_squares: float = 0.0

    def add(self, values: Doubles) -> None:
        """Count more values."""
        self.count += len(values)
        self.total += float(values.sum())
        self.total_squares += float((values * values).sum())

    def mean(self) -> Estimate:
        """Mean and standard error."""
        mean = self.total / self.count
        variance = self.total_squares / self.count - mean * mean
        return Estimate(mean, math.sqrt(variance / (self.count - 1)) if variance > 0 and self.count > 1 else 0.0)
