"""How the next token is drawn: the settings that apply, and llama.cpp's chain of samplers made of them.

A setting comes from the caller's options, else from the model's file (llama.cpp's ``general.sampling.*`` keys), else
from the defaults. Each generation has its own chain. The order of samplers, and the values that leave one out, follow
``common_sampler_init`` of llama.cpp's common/sampling.cpp (commit 0c1e57098).
"""

from __future__ import annotations

import ctypes
import logging
import math
import secrets
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ggufmoe.errors import EngineError, InputError
from ggufmoe.gguf.key_tables import SAMPLING_KEYS
from ggufmoe.options import MAX_SEED, SamplingOptions, bounds
from ggufmoe.runtime.grammar import grammar_of
from ggufmoe.runtime.kvcache import KVCache
from ggufmoe.runtime.vocabulary import LoadedVocabulary

_log = logging.getLogger("ggufmoe.sampling")
_BREAKERS = ("\n", ":", '"', "*")
_MIROSTAT_M = 100
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
"""``llama_token_data`` (llama.h)."""


@dataclass(frozen=True)
class Sampling:
    """Settings after all defaults are filled in. With ``temperature`` 0 the likeliest token is always drawn.

    ``options`` has the settings that need no filling.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    repeat_last_n: int
    seed: int
    n_predict: int
    typical_p: float = 1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    mirostat: int = 0
    mirostat_lr: float = 0.1
    mirostat_ent: float = 5.0
    grammar: str | None = None
    """In GBNF, also where the caller gave a JSON schema."""
    options: SamplingOptions = field(default=SamplingOptions(), compare=False)

    @property
    def logprobs(self) -> int | None:
        return self.options.logprobs


_DEFAULTS: dict[str, float] = {
    "temperature": 0.7,
    "top_k": 50,
    "top_p": 0.95,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repeat_penalty": 1.0,
    "repeat_last_n": 64,
    "xtc_probability": 0.0,
    "xtc_threshold": 0.1,
    "mirostat": 0,
    "mirostat_lr": 0.1,
    "mirostat_ent": 5.0,
}
"""Used where neither the caller nor the model's file gives a value. An int as default: every value must be an int."""
_KEYS = {setting.option: setting.key for setting in SAMPLING_KEYS}


def resolve(options: SamplingOptions, metadata: Callable[[str], Any]) -> Sampling:
    """Fill in what ``options`` leaves out; ``metadata(key)`` gives the model's value, or None.

    A value of the model that is out of range is ignored with a warning. Without a seed, one is drawn. Raises InputError
    for a grammar or a schema that cannot be used.
    """
    filled: dict[str, Any] = {}
    for name, default in _DEFAULTS.items():
        given = getattr(options, name)
        filled[name] = type(default)(_recommended(name, default, metadata) if given is None else given)
    seed = secrets.randbelow(MAX_SEED + 1) if options.seed is None or options.seed < 0 else options.seed
    return Sampling(**filled, seed=seed, n_predict=options.n_predict, grammar=grammar_of(options), options=options)


def _recommended(name: str, default: float, metadata: Callable[[str], Any]) -> float:
    """The value of a setting in the model's file; ``default`` if there is none, or it is out of range."""
    key = _KEYS.get(name)
    value = None if key is None else metadata(key)
    if value is None:
        return default
    kind = type(default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    low, high = bounds(SamplingOptions, name)
    if is_number and math.isfinite(value) and low <= value <= high and value == kind(value):
        return float(value)
    _log.warning("the model's %s is %r, which makes no sense; using %s", key, value, default)
    return default


class Sampler:
    """A chain of llama.cpp's samplers, in the order of its own tools; freed by ``close``.

    Penalties also count the end of the prompt, as in llama.cpp's tools. Raises InputError for a bias of a token that
    the model does not have, and for a grammar that llama.cpp refuses.
    """

    def __init__(self, api: Any, vocabulary: LoadedVocabulary, sampling: Sampling, prompt: Sequence[int]) -> None:
        self._api = api
        self._n_vocab = vocabulary.n_tokens
        vocabulary.check_tokens([token for token, _ in sampling.options.biases])
        parameters = api.llama_sampler_chain_default_params()
        parameters.no_perf = True
        with vocabulary.in_use():
            self._grammar = _grammar(api, vocabulary, sampling)
            links = list(_links(api, vocabulary, sampling))
        # llama.cpp's own greedy sampler gives the same token, but copies the whole vocabulary first
        self._is_argmax = self._grammar is None and len(links) == 1 and sampling.temperature <= 0
        self._chain = api.llama_sampler_chain_init(parameters)
        self.close = weakref.finalize(self, _free, api, self._chain, self._grammar)
        """Frees the native memory. May be called again."""
        # when the interpreter ends, the native thread may still draw from it
        self.close.atexit = False
        for link in links:
            api.llama_sampler_chain_add(self._chain, link)
        n_seen = max(sampling.repeat_last_n, sampling.options.dry_penalty_last_n)
        for token in prompt[-n_seen:] if n_seen and not sampling.mirostat else ():
            api.llama_sampler_accept(self._chain, token)

    def sample(self, cache: KVCache) -> int:
        """Draw a token from the logits after the last computed token of ``cache``.

        Raises EngineError where the grammar allows none of the model's tokens, DecodeError for logits that are NaN.
        """
        logits = cache.last_logits()
        if self._is_argmax:
            best = int(logits.argmax())  # a NaN counts as the largest
            cache.check_largest(float(logits[best]))
            return best
        cache.check_finite(logits)
        if self._grammar is None:
            return int(self._api.llama_sampler_sample(self._chain, cache.context, cache.row))
        token = self._drawn(cache, constrained=False)
        if not self._allows(token):
            token = self._drawn(cache, constrained=True)
            if not self._allows(token):
                raise EngineError("the grammar allows none of the model's tokens here: it leads into a dead end")
        for sampler in (self._chain, self._grammar):
            self._api.llama_sampler_accept(sampler, token)
        return token

    def _drawn(self, cache: KVCache, *, constrained: bool) -> int:
        candidates = np.empty(self._n_vocab, _CANDIDATE)
        candidates["id"] = np.arange(self._n_vocab)
        candidates["logit"] = cache.last_logits()
        array = self._array(candidates)
        if constrained:
            self._api.llama_sampler_apply(self._grammar, ctypes.byref(array))
        self._api.llama_sampler_apply(self._chain, ctypes.byref(array))
        return int(array.data[array.selected].id)

    def _allows(self, token: int) -> bool:
        # one token is tried first: a grammar takes long for a whole vocabulary, and most drawn tokens fit it
        array = self._array(candidate := np.array([(token, 1.0, 0.0)], _CANDIDATE))
        self._api.llama_sampler_apply(self._grammar, ctypes.byref(array))
        return bool(np.isfinite(candidate["logit"][0]))

    def _array(self, candidates: np.ndarray[Any, Any]) -> Any:
        data = candidates.ctypes.data_as(ctypes.POINTER(self._api.llama_token_data))
        return self._api.llama_token_data_array(data, len(candidates), -1, False)


def _free(api: Any, *samplers: Any) -> None:
    for sampler in samplers:
        if sampler is not None:
            api.llama_sampler_free(sampler)


def _grammar(api: Any, vocabulary: LoadedVocabulary, sampling: Sampling) -> Any:
    if sampling.grammar is None:
        return None
    found = api.llama_sampler_init_grammar(vocabulary.handle, sampling.grammar.encode(), b"root")
    if not found:
        raise InputError("llama.cpp does not take the grammar: a rule may begin with itself, which it cannot follow")
    return found


def _links(api: Any, vocabulary: LoadedVocabulary, sampling: Sampling) -> Iterator[Any]:
    yield from _biases(api, vocabulary, sampling)
    if sampling.mirostat:
        yield from _mirostat(api, vocabulary, sampling)
        return
    yield from _penalties(api, vocabulary, sampling)
    yield from _filters(api, sampling)
    if sampling.temperature <= 0:
        yield api.llama_sampler_init_greedy()
        return
    yield api.llama_sampler_init_temp(sampling.temperature)
    yield api.llama_sampler_init_dist(sampling.seed)


def _biases(api: Any, vocabulary: LoadedVocabulary, sampling: Sampling) -> Iterator[Any]:
    biases = sampling.options.biases
    if not biases:
        return
    array = (api.llama_logit_bias * len(biases))(*(api.llama_logit_bias(*bias) for bias in biases))
    yield api.llama_sampler_init_logit_bias(vocabulary.n_tokens, len(biases), array)


def _mirostat(api: Any, vocabulary: LoadedVocabulary, sampling: Sampling) -> Iterator[Any]:
    seed, tau, eta = sampling.seed, sampling.mirostat_ent, sampling.mirostat_lr
    yield api.llama_sampler_init_temp(sampling.temperature)
    if sampling.mirostat == 1:
        yield api.llama_sampler_init_mirostat(vocabulary.n_tokens, seed, tau, eta, _MIROSTAT_M)
    else:
        yield api.llama_sampler_init_mirostat_v2(seed, tau, eta)


def _penalties(api: Any, vocabulary: LoadedVocabulary, sampling: Sampling) -> Iterator[Any]:
    options, last_n = sampling.options, sampling.repeat_last_n
    penalties = (sampling.repeat_penalty, options.frequency_penalty, options.presence_penalty)
    if last_n and penalties != (1.0, 0.0, 0.0):
        yield api.llama_sampler_init_penalties(vocabulary.n_tokens, last_n, *penalties)
    if options.dry_multiplier and options.dry_penalty_last_n:
        words = options.dry_sequence_breakers or _BREAKERS
        breakers = [] if words == ("none",) else [word.encode("utf-8", "replace") for word in words]
        array = (ctypes.c_char_p * len(breakers))(*breakers)
        shape = (options.dry_multiplier, options.dry_base, options.dry_allowed_length, options.dry_penalty_last_n)
        yield api.llama_sampler_init_dry(vocabulary.handle, *shape, array, len(breakers))


def _filters(api: Any, sampling: Sampling) -> Iterator[Any]:
    # filters that always keep the likeliest token change nothing where that one is drawn
    greedy = sampling.temperature <= 0 and sampling.typical_p >= 1.0 and sampling.xtc_probability <= 0.0
    if sampling.top_k > 0 and not greedy:
        yield api.llama_sampler_init_top_k(sampling.top_k)
    if sampling.typical_p < 1.0:
        yield api.llama_sampler_init_typical(sampling.typical_p, 1)
    if sampling.top_p < 1.0 and not greedy:
        yield api.llama_sampler_init_top_p(sampling.top_p, 1)
    if sampling.min_p > 0.0 and not greedy:
        yield api.llama_sampler_init_min_p(sampling.min_p, 1)
    if sampling.xtc_probability > 0.0:
        yield api.llama_sampler_init_xtc(sampling.xtc_probability, sampling.xtc_threshold, 1, sampling.seed)
