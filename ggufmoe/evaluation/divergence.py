"""KL divergence of a model's predictions from those of a reference: the loss of quality by quantization.

Both models compute the same chunks in turn in one process, so only four numbers are stored for each scored token.
Source of the definitions: ``tools/perplexity/perplexity.cpp`` (``--kl-divergence``) of llama.cpp at the pinned commit,
which rounds the reference's log-probabilities to 16 bits in a file; here that is an option.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ggufmoe.engine import Engine
from ggufmoe.errors import InputError, OptionError
from ggufmoe.evaluation.chunks import Chunks, cut_chunks, last_result, read_text, scored_blocks
from ggufmoe.evaluation.perplexity import (
    Doubles,
    Estimate,
    Floats,
    Normalized,
)
from ggufmoe.files import StrPath, user_path
from ggufmoe.gguf.header import Header
from ggufmoe.gguf.model import read_model_header
from ggufmoe.gguf.upstream import Keys
from ggufmoe.options import EvaluationKeywords, EvaluationOptions, OffloadOptions, options_of
from ggufmoe.runtime.chunkbatch import ComputedPart
from ggufmoe.work import CancelFlag, OnProgress

if TYPE_CHECKING:
    from typing_extensions import Unpack

SHARES = (0.0, 0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)
"""The shares of the quantiles in a Distribution; 0 is the minimum, 0.5 the median, 1 the maximum."""
_MAX_RANGE = np.float32(16)
"""llama.cpp's 16 bits clamp logits to this far below the largest; probabilities up to exp(-16) count as 0."""
_STEPS = np.float32(65535)


@dataclass(frozen=True)
class Distribution:
    """The distribution of a number over all scored tokens: its mean, and its quantiles by share (``SHARES``)."""

    mean: Estimate
    quantiles: Mapping[float, float]

    @property
    def median(self) -> float:
        return self.quantiles[0.5]

    @property
    def maximum(self) -> float:
        return self.quantiles[1.0]


@dataclass(frozen=True)
class Divergence:
    """The comparison of a model with its reference, over the chunks completed so far."""

    model: Path
    reference: Path
    n_ctx: int
    n_chunks: int
    """Number of completed chunks."""
    total_chunks: int
    n_scored: int
    """Number of scored tokens."""
    perplexity: Estimate
    reference_perplexity: Estimate
    correlation: float
    """Correlation of the two models' log-likelihoods of tokens; NaN if one of them is constant."""
    log_ratio: Estimate
    """Logarithm of ``ratio``."""
    ratio: Estimate
    """Perplexity divided by that of the reference; its error allows for the correlation of the two."""
    difference: Estimate
    """Perplexity minus that of the reference."""
    kl: Distribution
    """Kullback-Leibler divergence of the model's next-token distribution from the reference's, in nats."""
    delta_p: Distribution
    """Probability of the actual next token for the model minus that for the reference, between -1 and 1."""
    rms_delta_p: Estimate
    same_top: Estimate
    """Share of scored tokens for which both models have the same most likely token."""
    seconds: float

    @property
    def is_complete(self) -> bool:
        """Whether all chunks are done; a cancelled run returns the result over the completed ones."""
        return self.n_chunks == self.total_chunks

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values for JSON."""
        out: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Estimate):
                out[name] = vars(value)
            elif isinstance(value, Distribution):
                quantiles = {f"{share:g}": quantile for share, quantile in value.quantiles.items()}
                out[name] = {"mean": vars(value.mean), "quantiles": quantiles}
            else:
                out[name] = str(value) if isinstance(value, Path) else value
        return out | {"correlation": None if math.isnan(self.correlation) else self.correlation}


def kl_divergence(
    model: StrPath,
    reference: StrPath,
    text: str | None = None,
    *,
    text_file: StrPath | None = None,
    offload: OffloadOptions | None = None,
    round_reference: bool = False,
    options: EvaluationOptions | None = None,
    on_progress: OnProgress | None = None,
    cancel: CancelFlag | None = None,
    **keywords: Unpack[EvaluationKeywords],
) -> Divergence:
    """Compare the predictions of ``model`` with those of ``reference``, usually the same model before quantization.

    Text, options, ``on_progress`` (with a Divergence as ``Progress.result``) and ``cancel`` are those of
    ``perplexity``; ``offload`` applies to both models, which are loaded at the same time. ``round_reference`` rounds
    the reference's log-probabilities to 16 bits, to get llama.cpp's numbers. Memory: both models, the logits of one
    batch of each, and 32 bytes for each scored token.

    Raises the errors of ``perplexity``, InputError, before loading, if the vocabularies differ, and OptionError for
    workers, which serve one model at a time.
    """
    options = options_of(EvaluationOptions, options, keywords)
    if offload is not None and offload.workers:
        raise OptionError("a comparison needs two models at once, and a worker serves one: leave out --rpc")
    content = read_text(text, text_file)
    _check_vocabularies(user_path(model), user_path(reference))
    with (
        Engine(reference, options.context, offload, on_progress=on_progress, cancel=cancel) as base,
        Engine(model, options.context, offload, on_progress=on_progress, cancel=cancel) as engine,
    ):
        chunks = cut_chunks(engine, content, options, cancel)
        return last_result(_compared(base, engine, chunks, options.n_ctx, round_reference, cancel), on_progress)


def _compared(
    base: Engine, engine: Engine, chunks: Chunks, n_ctx: int, round_reference: bool, cancel: CancelFlag | None
) -> Iterator[Divergence]:
    """Yield the divergence over the completed chunks after each chunk. Ends early when ``cancel`` is set."""
    first, started = n_ctx // 2, time.monotonic()
    scores = _Scores(len(chunks) * (n_ctx - 1 - first))
    parts = (each.compute_chunks(chunks, first, cancel=cancel) for each in (base, engine))
    for theirs, ours in zip(*parts, strict=False):  # each of them may end early when cancelled
        for number in ours.group:
            scores.add(theirs, ours, number, chunks[number], round_reference)
            if ours.end == n_ctx:
                yield Divergence(
                    model=engine.path,
                    reference=base.path,
                    n_ctx=n_ctx,
                    n_chunks=number + 1,
                    total_chunks=len(chunks),
                    seconds=time.monotonic() - started,
                    **scores.statistics(),
                )


def _check_vocabularies(model: Path, reference: Path) -> None:
    ours, theirs = (read_model_header(path).shards[0].header for path in (model, reference))
    for key in (Keys.Tokenizer.MODEL, Keys.Tokenizer.LIST, Keys.Tokenizer.BOS_ID, Keys.Tokenizer.ADD_BOS):
        a, b = (header.get(key) for header in (ours, theirs))
        if a != b:
            raise InputError(
                f"{model} and {reference} have different vocabularies ({_in_words(key, ours, theirs)}): "
                "only models with the same vocabulary can be compared"
            )


def _in_words(key: str, ours: Header, theirs: Header) -> str:
    a, b = (header.get(key) for header in (ours, theirs))
    if not (isinstance(a, list) and isinstance(b, list)):
        return f"{key} is {str(a)[:40]} and {str(b)[:40]}"
    if len(a) != len(b):
        return f"{len(a)} and {len(b)} tokens"
    i = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
    return f"token {i} is {a[i]!r:.40} and {b[i]!r:.40}"


class _Scores:
    """Four numbers for each scored token, and how often both models have the same most likely token."""

    def __init__(self, n_tokens: int) -> None:
        self._nll, self._nll_base, self._kl, self._delta_p = (np.empty(n_tokens, np.float64) for _ in range(4))
        self._n = self._n_same_top = 0

    def add(self, theirs: ComputedPart, ours: ComputedPart, number: int, chunk: list[int], rounded: bool) -> None:
        """Score the computed part of one chunk."""
        blocks = zip(scored_blocks(theirs, number, chunk), scored_blocks(ours, number, chunk), strict=True)
        for (their_rows, targets), (our_rows, _) in blocks:
            base = _rounded(their_rows) if rounded else Normalized.of(their_rows)
            model = Normalized.of(our_rows)
            span = slice(self._n, self._n + len(targets))
            self._nll[span], self._nll_base[span] = model.nll(targets), base.nll(targets)
            self._delta_p[span] = np.exp(-self._nll[span]) - np.exp(-self._nll_base[span])
            self._kl[span] = _kl(base, model)
            self._n_same_top += int((base.logits.argmax(axis=1) == model.logits.argmax(axis=1)).sum())
            self._n = span.stop

    def statistics(self) -> dict[str, Any]:
        """The fields of a Divergence that are computed from the scores."""
        nll, base, kl, delta_p = (x[: self._n] for x in (self._nll, self._nll_base, self._kl, self._delta_p))
        log_ppl, log_base = _mean(nll), _mean(base)
        covariance = float((nll * base).mean() - nll.mean() * base.mean()) / (self._n - 1)
        spread = log_ppl.uncertainty * log_base.uncertainty
        log_ratio = Estimate(log_ppl.value - log_base.value, _of_difference(log_ppl, log_base, covariance))
        ppl, ppl_base = log_ppl.exp, log_base.exp
        of_difference = _of_difference(ppl, ppl_base, ppl.value * ppl_base.value * covariance)
        square = _mean(delta_p * delta_p)
        rms, same = math.sqrt(square.value), self._n_same_top / self._n
        return {
            "n_scored": self._n,
            "perplexity": ppl,
            "reference_perplexity": ppl_base,
            "correlation": covariance / spread if spread else math.nan,
            "log_ratio": log_ratio,
            "ratio": log_ratio.exp,
            "difference": Estimate(ppl.value - ppl_base.value, of_difference),
            "kl": _distribution(kl),
            "delta_p": _distribution(delta_p),
            "rms_delta_p": Estimate(rms, 0.5 / rms * square.uncertainty if rms else 0.0),
            "same_top": Estimate(same, math.sqrt(same * (1 - same) / (self._n - 1))),
        }


def _kl(base: Normalized, model: Normalized) -> Doubles:
    """Sum of p (log p - log q) per row; subtracts logits first, which is exact if the models are close."""
    apart = base.probabilities * (base.logits - model.logits)
    share = base.probabilities.sum(axis=1, dtype=np.float64)
    kl: Doubles = apart.sum(axis=1, dtype=np.float64) - (base.log_sum - model.log_sum) * share
    return kl


def _rounded(logits: Floats) -> Normalized:
    """The reference's log-probabilities as llama.cpp's file stores them, in 65536 levels over the range of each row."""
    highest = logits.max(axis=1, keepdims=True)
    lowest = np.maximum(logits.min(axis=1, keepdims=True), highest - _MAX_RANGE)
    total = np.exp(logits - highest).sum(axis=1, keepdims=True, dtype=np.float64)
    low_log_p = lowest - highest - np.log(total).astype(np.float32)
    step = (highest - lowest) / _STEPS
    scale = np.divide(1, step, out=np.zeros_like(step), where=step > 0)
    log_p = np.rint(np.maximum(logits - lowest, 0) * scale) * step + low_log_p
    probabilities = np.where(log_p > -_MAX_RANGE, np.exp(log_p), np.float32(0))
    return Normalized(log_p, np.zeros(len(logits)), probabilities)


def _mean(values: Doubles) -> Estimate:
    return Estimate(float(values.mean()), float(values.std() / math.sqrt(len(values) - 1)))


def _of_difference(a: Estimate, b: Estimate, covariance: float) -> float:
    return math.sqrt(max(a.uncertainty**2 + b.uncertainty**2 - 2 * covariance, 0.0))


def _distribution(values: Doubles) -> Distribution:
    quantiles = np.quantile(values, SHARES).tolist()
    return Distribution(_mean(values), dict(zip(SHARES, quantiles, strict=True)))
