"""Perplexity: how surprised a model is by a text, by llama.cpp's definition and with its chunks.

The exponential of the mean negative log-likelihood over the second half of each chunk. Source:
``tools/perplexity/perplexity.cpp`` of llama.cpp at the pinned commit.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ggufmoe.errors import Cancelled, OptionError
from ggufmoe.evaluation.chunks import cut_chunks, read_text, scored_blocks
from ggufmoe.options import EvaluationOptions, OffloadOptions
from ggufmoe.runtime.engine import Engine
from ggufmoe.work import CancelFlag

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
StepT = TypeVar("StepT")


@dataclass(frozen=True)
class Estimate:
    """A mean and the standard error of it, as if the tokens did not depend on each other."""

    value: float
    uncertainty: float

    @property
    def exp(self) -> Estimate:
        """The exponential, whose error is taken to first order."""
        value = math.exp(self.value)
        return Estimate(value, value * self.uncertainty)


@dataclass(frozen=True)
class Perplexity:
    """What a text costs a model, over the chunks that are done."""

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
        """The result as what JSON can hold."""
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
    model: str | os.PathLike[str],
    text: str | os.PathLike[str],
    *,
    on_progress: Callable[[Perplexity], None] | None = None,
    cancel: CancelFlag | None = None,
    offload: OffloadOptions | None = None,
    **options: Any,
) -> Perplexity:
    """The perplexity of a GGUF model on a text: the number that ``llama-perplexity`` prints.

    ``text`` is the text itself, or a ``Path`` to it. ``options`` are the fields of ``EvaluationOptions``;
    ``on_progress`` gets the result so far after each chunk. Memory: the logits of one batch, which llama.cpp holds.
    When ``cancel`` is set, the result over the chunks that are done, which its ``is_complete`` tells.

    Raises InputError for a text that is too short or no text, OptionError, what ``Engine`` raises, and Cancelled if not
    a single chunk was done.
    """
    steps = perplexity_steps(model, text, evaluation_options("perplexity", options), offload, cancel)
    return last_step(steps, on_progress)


def evaluation_options(name: str, given: dict[str, Any]) -> EvaluationOptions:
    """Options by name. Raises OptionError for one that there is not."""
    try:
        return EvaluationOptions(**given)
    except TypeError as error:
        raise OptionError(f"{name} has no such option: {str(error).rpartition(' ')[2]}") from error


def last_step(steps: Iterator[StepT], on_progress: Callable[[StepT], None] | None) -> StepT:
    """The last of ``steps``, each of which is shown to ``on_progress``. Raises Cancelled if there is none."""
    last = None
    for last in steps:
        if on_progress is not None:
            on_progress(last)
    if last is None:
        raise Cancelled("stopped before the first chunk was done")
    return last


def perplexity_steps(
    model: str | os.PathLike[str],
    text: str | os.PathLike[str],
    options: EvaluationOptions,
    offload: OffloadOptions | None = None,
    cancel: CancelFlag | None = None,
) -> Iterator[Perplexity]:
    """``perplexity`` as it grows: the result so far after each chunk. Ends early when ``cancel`` is set."""
    content = read_text(text)
    with Engine(model, options.context, offload, cancel=cancel) as engine:
        yield from engine.iterate(_scored, content, options, cancel=cancel)


def _scored(
    engine: Engine, content: str, options: EvaluationOptions, *, cancel: CancelFlag | None
) -> Iterator[Perplexity]:
    """Where the model is computed, so that logits do not cross to another process."""
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
