"""KL divergence of a model's predictions from those of a reference: the loss of quality by quantization.

All models compute the same chunks in turn in one process, so only four numbers are stored for each scored token and
model. Source of the definitions: ``tools/perplexity/perplexity.cpp`` (``--kl-divergence``) of llama.cpp at the pinned
commit, which rounds the reference's log-probabilities to 16 bits in a file; here that is an option, ``logits_file``.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ggufmoe.engine import Engine
from ggufmoe.errors import Cancelled, InputError, OptionError
from ggufmoe.evaluation.chunks import Chunks, cut_chunks, last_result, read_text, scored_blocks
from ggufmoe.evaluation.logits_file import LogitsFile, RoundedRows, write_head
from ggufmoe.evaluation.perplexity import Doubles, Estimate, Normalized
from ggufmoe.files import StrPath, replacing, user_path
from ggufmoe.gguf.header import Header
from ggufmoe.gguf.model import read_model_header
from ggufmoe.gguf.upstream import Keys
from ggufmoe.options import EvaluationKeywords, EvaluationOptions, OffloadOptions, options_of
from ggufmoe.runtime.chunkbatch import ComputedPart
from ggufmoe.work import CancelFlag, OnProgress, Progress

if TYPE_CHECKING:
    from typing_extensions import Unpack

SHARES = (0.0, 0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)
"""The shares of the quantiles in a Distribution; 0 is the minimum, 0.5 the median, 1 the maximum."""


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


@dataclass(frozen=True)
class Comparison:
    """Several models beside one reference, on the same tokens."""

    models: tuple[Divergence, ...]
    kl_differences: tuple[Estimate, ...]
    """Of each model but the first: its mean divergence minus that of the first, with the error of the difference, which
    is smaller than the errors of both where they diverge at the same tokens."""

    @property
    def n_chunks(self) -> int:
        """Number of completed chunks."""
        return self.models[0].n_chunks

    @property
    def total_chunks(self) -> int:
        return self.models[0].total_chunks

    @property
    def is_complete(self) -> bool:
        """Whether all chunks are done."""
        return self.models[0].is_complete

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values for JSON."""
        return {
            "models": [model.to_dict() for model in self.models],
            "kl_differences": [vars(difference) for difference in self.kl_differences],
        }


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
    found = kl_divergences(
        [model],
        reference,
        text,
        text_file=text_file,
        offload=offload,
        round_reference=round_reference,
        options=options,
        on_progress=on_progress and (lambda progress: on_progress(_of_first(progress))),
        cancel=cancel,
    )
    return found.models[0]


def _of_first(progress: Progress) -> Progress:
    """The report of a comparison of one model, with the Divergence of that one."""
    result = progress.result
    return replace(progress, result=result.models[0]) if isinstance(result, Comparison) else progress


def kl_divergences(
    models: Sequence[StrPath],
    reference: StrPath,
    text: str | None = None,
    *,
    text_file: StrPath | None = None,
    logits: StrPath | None = None,
    offload: OffloadOptions | None = None,
    round_reference: bool = False,
    options: EvaluationOptions | None = None,
    on_progress: OnProgress | None = None,
    cancel: CancelFlag | None = None,
    **keywords: Unpack[EvaluationKeywords],
) -> Comparison:
    """Compare the predictions of several models with those of ``reference``, token by token, and with each other.

    All models are loaded at the same time. ``logits`` is a file of the reference's log-probabilities in the format of
    llama-perplexity, rounded to 16 bits: if it exists, the reference is not loaded, and otherwise it is computed first,
    alone, and kept there (2 bytes for each token of the vocabulary and scored token). Other arguments are those of
    ``kl_divergence``; ``Progress.result`` is a Comparison.

    Raises the errors of ``kl_divergence``, and InputError for a file of log-probabilities of another text.
    """
    options = options_of(EvaluationOptions, options, keywords)
    if not models:
        raise OptionError("give at least one model to compare with the reference")
    if offload is not None and offload.workers:
        raise OptionError("a comparison needs two models at once, and a worker serves one: leave out --rpc")
    content = read_text(text, text_file)
    for model in models:
        _check_vocabularies(user_path(model), user_path(reference))

    def opened(path: StrPath) -> Engine:
        return Engine(path, options.context, offload, on_progress=on_progress, cancel=cancel)

    kept = None if logits is None else user_path(logits)
    if kept is not None and not kept.exists():
        with opened(reference) as alone:
            _keep_logits(alone, content, options, kept, on_progress, cancel)
    with contextlib.ExitStack() as stack:
        base_engine = stack.enter_context(opened(reference)) if kept is None else None
        engines = [stack.enter_context(opened(model)) for model in models]
        chunks = cut_chunks(engines[0], content, options, cancel)
        stored = None if kept is None else LogitsFile(kept)
        if stored is not None:
            stored.check(chunks, begins=int(engines[0].adds_bos))
        base = _Reference(user_path(reference), base_engine, stored, rounded=round_reference)
        return last_result(_compared(base, engines, chunks, options.n_ctx, cancel), on_progress)


def _keep_logits(
    base: Engine,
    content: str,
    options: EvaluationOptions,
    path: Path,
    on_progress: OnProgress | None,
    cancel: CancelFlag | None,
) -> None:
    """Compute the reference's log-probabilities and keep them in a file, which appears when all are there."""
    chunks = cut_chunks(base, content, options, cancel)
    with replacing(path, "the reference's log-probabilities") as file:
        write_head(file, chunks, base.n_vocab)
        waiting: dict[int, list[bytes]] = {}
        n_done = 0
        for part in base.compute_chunks(chunks, options.n_ctx // 2, cancel=cancel):
            for number in part.group:
                for rows, _ in scored_blocks(part, number, chunks[number]):
                    waiting.setdefault(number, []).append(RoundedRows.of(rows).words().tobytes())
                if part.end == options.n_ctx:
                    file.write(b"".join(waiting.pop(number)))
                    n_done = number + 1
                    if on_progress is not None:
                        on_progress(Progress("reference", n_done, len(chunks), "chunks"))
        if n_done < len(chunks):
            raise Cancelled("stopped while the reference was computed; nothing is kept")


@dataclass(frozen=True, eq=False)
class _Reference:
    """What is compared with: a model that computes beside the others, or its log-probabilities in a file."""

    path: Path
    engine: Engine | None
    stored: LogitsFile | None
    rounded: bool

    def parts(self, chunks: Chunks, first: int, cancel: CancelFlag | None) -> Iterator[ComputedPart | None]:
        """The parts that are computed beside those of the models; None for each of them where nothing is computed."""
        if self.engine is None:
            return itertools.repeat(None)
        return self.engine.compute_chunks(chunks, first, cancel=cancel)

    def blocks(
        self, theirs: ComputedPart | None, ours: ComputedPart, number: int, chunk: list[int]
    ) -> Iterator[Normalized]:
        """The predictions at the scored positions of ``ours``, in the blocks of ``scored_blocks``."""
        if theirs is not None:
            for rows, _ in scored_blocks(theirs, number, chunk):
                yield _rounded(RoundedRows.of(rows)) if self.rounded else Normalized.of(rows)
            return
        assert self.stored is not None, "without an engine there is a file"
        position = ours.scored.start - ours.first
        for rows, _ in scored_blocks(ours, number, chunk):
            yield _rounded(self.stored.rows(number, position, position + len(rows)))
            position += len(rows)


def _compared(
    reference: _Reference, engines: Sequence[Engine], chunks: Chunks, n_ctx: int, cancel: CancelFlag | None
) -> Iterator[Comparison]:
    """Yield the comparison over the completed chunks after each chunk. Ends early when ``cancel`` is set."""
    first, started = n_ctx // 2, time.monotonic()
    scores = [_Scores(len(chunks) * (n_ctx - 1 - first)) for _ in engines]
    computed = (engine.compute_chunks(chunks, first, cancel=cancel) for engine in engines)
    parts = zip(reference.parts(chunks, first, cancel), *computed, strict=False)  # any may end early when cancelled
    for theirs, *ours in parts:
        for number in ours[0].group:
            base = list(reference.blocks(theirs, ours[0], number, chunks[number]))
            for scored, part in zip(scores, ours, strict=True):
                scored.add(base, part, number, chunks[number])
            if ours[0].end == n_ctx:
                found = tuple(
                    Divergence(
                        model=engine.path,
                        reference=reference.path,
                        n_ctx=n_ctx,
                        n_chunks=number + 1,
                        total_chunks=len(chunks),
                        seconds=time.monotonic() - started,
                        **scored.statistics(),
                    )
                    for engine, scored in zip(engines, scores, strict=True)
                )
                yield Comparison(found, tuple(scored.kl_above(scores[0]) for scored in scores[1:]))


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

    def add(self, theirs: Sequence[Normalized], ours: ComputedPart, number: int, chunk: list[int]) -> None:
        """Score the computed part of one chunk; ``theirs`` are the reference's predictions for its blocks."""
        for base, (our_rows, targets) in zip(theirs, scored_blocks(ours, number, chunk), strict=True):
            model = Normalized.of(our_rows)
            span = slice(self._n, self._n + len(targets))
            self._nll[span], self._nll_base[span] = model.nll(targets), base.nll(targets)
            self._delta_p[span] = np.exp(-self._nll[span]) - np.exp(-self._nll_base[span])
            self._kl[span] = _kl(base, model)
            self._n_same_top += int((base.logits.argmax(axis=1) == model.logits.argmax(axis=1)).sum())
            self._n = span.stop

    def kl_above(self, other: _Scores) -> Estimate:
        """The mean divergence minus that of another model on the same tokens."""
        return _mean(self._kl[: self._n] - other._kl[: self._n])

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


def _rounded(rows: RoundedRows) -> Normalized:
    """The reference's log-probabilities as llama.cpp's file stores them, in 65536 levels over the range of each row."""
    return Normalized(rows.log_p, np.zeros(len(rows.levels)), rows.probabilities)


def _mean(values: Doubles) -> Estimate:
    return Estimate(float(values.mean()), float(values.std() / math.sqrt(len(values) - 1)))


def _of_difference(a: Estimate, b: Estimate, covariance: float) -> float:
    return math.sqrt(max(a.uncertainty**2 + b.uncertainty**2 - 2 * covariance, 0.0))


def _distribution(values: Doubles) -> Distribution:
    quantiles = np.quantile(values, SHARES).tolist()
    return Distribution(_mean(values), dict(zip(SHARES, quantiles, strict=True)))
