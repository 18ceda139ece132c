"""How the next token is drawn: which settings hold, and llama.cpp's chain of samplers that follows them.

The caller's options come first, then what the model's file says (llama.cpp's ``general.sampling.*`` keys), then the
defaults. The chain belongs to one generation.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ggufmoe.options import MAX_SEED, SamplingOptions

_log = logging.getLogger("ggufmoe.sampling")


@dataclass(frozen=True)
class Sampling:
    """Settings without gaps; ``temperature`` 0 draws always the likeliest token."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    repeat_last_n: int
    seed: int
    n_predict: int


@dataclass(frozen=True)
class _Source:
    """Where one setting comes from when the caller leaves it out."""

    key: str
    default: float
    low: float
    high: float


_MAX_LAST_N = 2**20
"""llama.cpp takes memory for so many tokens at once; where there is not enough it ends the process."""

_SOURCES: dict[str, _Source] = {
    "temperature": _Source("general.sampling.temp", 0.7, 0.0, 100.0),
    "top_k": _Source("general.sampling.top_k", 50, 0, 2**31 - 1),
    "top_p": _Source("general.sampling.top_p", 0.95, 0.0, 1.0),
    "min_p": _Source("general.sampling.min_p", 0.0, 0.0, 1.0),
    "repeat_penalty": _Source("general.sampling.penalty_repeat", 1.0, 0.01, 100.0),
    "repeat_last_n": _Source("general.sampling.penalty_last_n", 64, 0, _MAX_LAST_N),
}


def resolve(options: SamplingOptions, metadata: Callable[[str], Any]) -> Sampling:
    """Fill what ``options`` leaves out; ``metadata(key)`` gives the model's value, or None.

    A value of the model that makes no sense is left aside with a warning. Without a seed one is drawn.
    """
    filled: dict[str, Any] = {}
    for name, source in _SOURCES.items():
        given = getattr(options, name, None)
        filled[name] = type(source.default)(_fill(source, metadata) if given is None else given)
    seed = secrets.randbelow(MAX_SEED + 1) if options.seed is None or options.seed < 0 else options.seed
    return Sampling(**filled, seed=seed, n_predict=options.n_predict)


def _fill(source: _Source, metadata: Callable[[str], Any]) -> float:
    value = metadata(source.key)
    if value is None:
        return source.default
    kind = type(source.default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and math.isfinite(value) and source.low <= value <= source.high and value == kind(value):
        return float(value)
    _log.warning("the model's %s is %r, which makes no sense; using %s", source.key, value, source.default)
    return source.default


class Sampler:
    """A chain of llama.cpp's samplers, in the order of its own tools; freed by ``close``.

    Penalties see the end of the prompt as well, as in llama.cpp's tools.
    """

    def __init__(self, api: Any, n_vocab: int, sampling: Sampling, prompt: Sequence[int]) -> None:
        self._api = api
        parameters = api.llama_sampler_chain_default_params()
        parameters.no_perf = True
        self._chain = api.llama_sampler_chain_init(parameters)
        for link in _links(api, n_vocab, sampling):
            api.llama_sampler_chain_add(self._chain, link)
        if sampling.repeat_penalty != 1.0:
            for token in prompt[-sampling.repeat_last_n :] if sampling.repeat_last_n else ():
                api.llama_sampler_accept(self._chain, token)

    def sample(self, context: Any) -> int:
        """Draw from the logits of the last token that ``context`` decoded."""
        return int(self._api.llama_sampler_sample(self._chain, context, -1))

    def close(self) -> None:
        chain, self._chain = self._chain, None
        if chain is not None:
            self._api.llama_sampler_free(chain)

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _links(api: Any, n_vocab: int, sampling: Sampling) -> list[Any]:
    links = []
    if sampling.repeat_penalty != 1.0 and sampling.repeat_last_n:
        links.append(
            api.llama_sampler_init_penalties(n_vocab, sampling.repeat_last_n, sampling.repeat_penalty, 0.0, 0.0)
        )
    if sampling.temperature <= 0:
        return [*links, api.llama_sampler_init_greedy()]
    if sampling.top_k > 0:
        links.append(api.llama_sampler_init_top_k(sampling.top_k))
    if sampling.top_p < 1.0:
        links.append(api.llama_sampler_init_top_p(sampling.top_p, 1))
    if sampling.min_p > 0.0:
        links.append(api.llama_sampler_init_min_p(sampling.min_p, 1))
    links.append(api.llama_sampler_init_temp(sampling.temperature))
    return [*links, api.llama_sampler_init_dist(sampling.seed)]
