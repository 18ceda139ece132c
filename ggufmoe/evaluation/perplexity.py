"""Perplexity of a model on a text: how well it predicts the text, by llama.cpp's definition, or the answers in it.

The exponential of the mean negative log-likelihood of the tokens in the second half of each chunk. Source:
``tools/perplexity/perplexity.cpp`` of llama.cpp at the pinned commit. Of conversations only the tokens of answers
count, each after all of the conversation that stands before it.
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
from ggufmoe.evaluation.scored_conversations import tokenized_conversations
from ggufmoe.files import StrPath
from ggufmoe.options import EvaluationKeywords, EvaluationOptions, OffloadOptions, options_of
from ggufmoe.work import CancelFlag, OnProgress

if TYPE_CHECKING:
    from typing_extensions import Unpack

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error, computed as if tokens were independent."""

    value: float
    uncertainty: float

    @property
    def exp(self) -> Estimate:
        """The exponential of the estimate; the standard error is propagated to first order."""
        value = math.exp(self.value)
        return Estimate(value, value * self.uncertainty)


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of a model on a text, over the chunks completed so far."""

    model: Path
    n_ctx: int
    n_chunks: int
    """Number of completed chunks."""
    total_chunks: int
    n_scored: int
    """Number of scored tokens."""
    mean_nll: Estimate
    """Mean negative log-likelihood of a token, in nats."""
    seconds: float
    answers: bool = False
    """Whether the answers of conversations were scored; a chunk is then a conversation."""

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
        """Whether all chunks are done; a cancelled run returns the result over the completed ones."""
        return self.n_chunks == self.total_chunks

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values for JSON."""
        return {
            "model": str(self.model),
            "n_ctx": self.n_ctx,
            "answers": self.answers,
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
    answers: bool = False,
    offload: OffloadOptions | None = None,
    options: EvaluationOptions | None = None,
    on_progress: OnProgress | None = None,
    cancel: CancelFlag | None = None,
    **keywords: Unpack[EvaluationKeywords],
) -> Perplexity:
    """Compute the perplexity of a GGUF model on a text: the number that ``llama-perplexity`` prints.

    Give either the text itself (``text``) or a UTF-8 file (``text_file``), whose last newline is left out. With
    ``answers`` each of its lines is a JSON object with ``messages``, which the model's chat template renders; each
    conversation is computed by itself, and its assistant's messages alone are scored. Give options
    as one object (``options=EvaluationOptions(n_ctx=256)``) or by name (``n_ctx=256``). ``on_progress`` is called while
    the model is loaded (phase ``load``, in a thread of the engine) and after each chunk (phase ``chunks``) with the
    Perplexity over the completed chunks as ``Progress.result``. When ``cancel`` is set, the result over the completed
    chunks is returned, and its ``is_complete`` is False. Memory: the model, and the logits of one batch.

    Raises InputError if the text is too short or cannot be read, or holds no conversations with ``answers``,
    TemplateError, OptionError, the errors of ``Engine``, and Cancelled if no chunk was completed.
    """
    options = options_of(EvaluationOptions, options, keywords)
    content = read_text(text, text_file)
    with Engine(model, options.context, offload, on_progress=on_progress, cancel=cancel) as engine:
        scored = _scored_answers if answers else _scored
        return last_result(engine.iterate(scored, content, options, cancel=cancel), on_progress)


def _scored(
    engine: Engine, content: str, options: EvaluationOptions, *, cancel: CancelFlag | None
) -> Iterator[Perplexity]:
    """Score the chunks. Runs in the process that computes, so that logits need not be sent to another process."""
    started, sums = time.monotonic(), Sums()
    chunks = cut_chunks(engine, content, options, cancel)
    for part in engine.compute_chunks(chunks, options.n_ctx // 2, cancel=cancel):
        for number in part.group:
            for rows, targets in scored_blocks(part, number, chunks[number]):
                sums.add(Normalized.of(rows).nll(targets))
            if part.end == options.n_ctx:
                seconds = time.monotonic() - started
                yield Perplexity(engine.path, options.n_ctx, number + 1, len(chunks), sums.count, sums.mean(), seconds)


def _scored_answers(
    engine: Engine, content: str, options: EvaluationOptions, *, cancel: CancelFlag | None
) -> Iterator[Perplexity]:
    """Score conversations one after another, in the process that computes."""
    started, sums = time.monotonic(), Sums()
    conversations = tokenized_conversations(engine, content, options)
    for number, (tokens, places) in enumerate(conversations, start=1):
        begin = 0
        for rows in engine.logits_by_batch(tokens, cancel=cancel):
            inside = np.array([place for place in places if begin < place <= begin + len(rows)])
            if inside.size:
                sums.add(Normalized.of(rows[inside - 1 - begin]).nll(np.asarray(tokens, np.int64)[inside]))
            begin += len(rows)
        seconds = time.monotonic() - started
        counts = (number, len(conversations), sums.count)
        yield Perplexity(engine.path, options.n_ctx, *counts, sums.mean(), seconds, answers=True)


@dataclass(frozen=True)
class Normalized:
    """Rows of logits and the logarithm of the sum of their exponentials; the difference is log p."""

    logits: Floats
    """(rows, n_vocab)"""
    log_sum: Doubles
    """(rows,)"""
    probabilities: Floats
    """(rows, n_vocab)"""

    @classmethod
    def of(cls, logits: Floats) -> Normalized:
        """Normalize rows of logits: exponentials in single precision, sums in double, as in llama.cpp."""
        highest = logits.max(axis=1)
        probabilities = np.exp(logits - highest[:, None])
        total = probabilities.sum(axis=1, dtype=np.float64)
        probabilities /= total[:, None].astype(np.float32)
        return cls(logits, highest + np.log(total), probabilities)

    def nll(self, targets: NDArray[np.int64]) -> Doubles:
        """The negative log-likelihood, in nats, of the token ``targets[i]`` in row i; (rows,) float64."""
        nll: Doubles = self.log_sum - np.take_along_axis(self.logits, targets[:, None], axis=1)[:, 0]
        return nll


@dataclass
class Sums:
    """Running sums of values and of their squares."""

    count: int = 0
    total: float = 0.0
    total_squares: float = 0.0

    def add(self, values: Doubles) -> None:
        """Add values to the sums."""
        self.count += len(values)
        self.total += float(values.sum())
        self.total_squares += float((values * values).sum())

    def mean(self) -> Estimate:
        """The mean of all values and its standard error."""
        mean = self.total / self.count
        variance = self.total_squares / self.count - mean * mean
        return Estimate(mean, math.sqrt(variance / (self.count - 1)) if variance > 0 and self.count > 1 else 0.0)
