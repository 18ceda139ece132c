"""Routing of architectures whose graphs choose and weigh experts each in their own way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ggufmoe import ContextOptions, Engine, OffloadOptions, RoutedToken, SamplingOptions, trace_routing
from ggufmoe.gguf.hyper import Hyper, TypedMetadata
from ggufmoe.routing.statistics import summarize
from ggufmoe.routing.trace import RoutingTrace
from tests.architecture_files import fixtures, metadata_of, write_architecture

WITH_EXPERTS = [name for name in fixtures() if Hyper.of(metadata_of(name)).n_expert]
ONE_TOKEN = SamplingOptions(temperature=0, n_predict=1, logit_bias=("2-inf",))
TEXT = [1, *(3 + 7 * i % 300 for i in range(60))]


def traced(folder: Path, name: str, *, told: list[RoutedToken] | None = None) -> RoutingTrace:
    """The trace of ``TEXT``; ``told`` gets the token that follows, with its routing, and ``TEXT`` was one batch."""
    path = write_architecture(folder / "m.gguf", name)
    options = ContextOptions(n_ctx=256, n_threads=1)
    with Engine(path, options, OffloadOptions(load_mode="none", device="none")) as engine:
        trace = trace_routing(engine, TEXT)
        if told is not None:
            events = engine.generate(TEXT, ONE_TOKEN, routing=True)
            told += [event for event in events if isinstance(event, RoutedToken)]
        return trace


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_shares_sum_to_one_whatever_the_weights_sum_to(name: str, tmp_path: Path) -> None:
    told: list[RoutedToken] = []
    trace, hyper = traced(tmp_path, name, told=told), Hyper.of(metadata_of(name))
    assert (trace.n_expert, trace.n_expert_used) == (hyper.n_expert, hyper.n_expert_used)
    np.testing.assert_allclose([told[0].expert_weights], trace.mean_weights()[-1:], atol=1e-4)
    assert [[expert for expert, _ in layer] for layer in told[0].layers] == trace.chosen[-1].tolist()
    np.testing.assert_allclose([[weight for _, weight in layer] for layer in told[0].layers], trace.weights[-1], 1e-3)
    for found in (trace.probabilities, trace.expert_shares, trace.mean_weights()):
        np.testing.assert_allclose(found.sum(axis=-1), 1, atol=1e-5)
    np.testing.assert_allclose(summarize(trace).share.sum(axis=-1), 1, atol=1e-9)
    n_ahead = TypedMetadata(metadata_of(name)).whole(f"{hyper.architecture}.nextn_predict_layers") or 0
    assert trace.layers == tuple(range(hyper.n_leading_dense or 0, (hyper.n_layer or 0) - n_ahead))


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_weights_follow_from_the_scores_as_the_facts_say(name: str, tmp_path: Path) -> None:
    """``expert_facts`` and what llama.cpp's graph multiplies experts' outputs by."""
    trace, hyper = traced(tmp_path, name), Hyper.of(metadata_of(name))
    scores = np.take_along_axis(trace.probabilities, trace.chosen, axis=2)
    total = trace.weights.sum(axis=2)
    scale = hyper.expert_weights_scale or 1
    rescaled = hyper.expert_weights_norm is not False or hyper.expert_gating == "softmax of the chosen"
    if rescaled:
        np.testing.assert_allclose(total, scale, rtol=1e-4)
    else:
        assert hyper.expert_gating == "softmax"
        np.testing.assert_allclose(trace.weights, scale * scores, rtol=1e-3, atol=1e-6)
        assert total.max() < scale
    np.testing.assert_allclose(
        trace.weights / total[..., None], scores / scores.sum(axis=2, keepdims=True), rtol=2e-3, atol=1e-5
    )
