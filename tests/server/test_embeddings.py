"""``/v1/embeddings`` through OpenAI's client, and the vectors beside an independent computation."""

from __future__ import annotations

import asyncio
import base64
import ctypes
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from numpy.typing import NDArray

from ggufmoe import Cancelled, ContextFullError, ContextOptions, Engine, InputError, SamplingOptions
from ggufmoe.runtime import local
from ggufmoe.runtime.events import Finished
from tests.runtime.test_batching import ALONE, FOUR, words
from tests.server.running import loading, serving

GREEDY = SamplingOptions(temperature=0, n_predict=30, logit_bias=("2-inf",))
TEXTS = [words(5), words(40, 3), words(200, 7)]
Rows = NDArray[np.float32]


@pytest.fixture(scope="module")
def client(mixing_path: Path) -> Iterator[httpx.Client]:
    with serving(loading(mixing_path, FOUR)) as (client, _):
        yield client


@pytest.fixture(scope="module")
def library(client: httpx.Client) -> Iterator[Any]:
    with openai.OpenAI(api_key="none", base_url=str(client.base_url.join("/v1")), max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def expected(mixing_path: Path) -> Rows:
    """What llama.cpp pools itself, in a context made for embeddings."""
    from llama_cpp import llama_cpp as native

    model = native.llama_model_load_from_file(str(mixing_path).encode(), native.llama_model_default_params())
    parameters = native.llama_context_default_params()
    parameters.n_ctx, parameters.embeddings, parameters.n_threads = 512, True, 1
    parameters.pooling_type = native.LLAMA_POOLING_TYPE_MEAN
    context = native.llama_init_from_model(model, parameters)
    rows = []
    for text in TEXTS:
        native.llama_memory_clear(native.llama_get_memory(context), True)
        ids = (ctypes.c_int32 * len(text))(*text)
        assert native.llama_decode(context, native.llama_batch_get_one(ids, len(text))) == 0
        pointer = native.llama_get_embeddings_seq(context, 0)
        rows.append(np.array(pointer[: native.llama_model_n_embd(model)]))
    native.llama_free(context)
    native.llama_model_free(model)
    found = np.array(rows, np.float32)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return found


@pytest.mark.parametrize("context", [ALONE, FOUR, replace(ALONE, n_batch=64, n_ubatch=16)])
def test_the_mean_over_the_tokens_is_what_llama_cpp_pools(
    mixing_path: Path, context: ContextOptions, expected: Rows
) -> None:
    with Engine(mixing_path, context) as engine:
        rows = engine.embed(TEXTS)
        assert rows.dtype == np.float32
        np.testing.assert_allclose(rows, expected, atol=2e-3)
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
        np.testing.assert_allclose(asyncio.run(engine.embed_async(TEXTS[:1])), rows[:1], atol=1e-4)
        assert engine.embed([]).shape == (0, rows.shape[1])


def test_answers_under_way_go_on(mixing_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_EMBEDDING_TURN_S", 0.0)  # answers have their turn after each text
    prompts = [words(20, step) for step in (1, 2, 3, 5)]
    with Engine(mixing_path, replace(FOUR, n_parallel=2)) as engine:
        alone = [list(engine.generate(prompt, GREEDY)) for prompt in prompts]
        rows = engine.embed(TEXTS)
        with ThreadPoolExecutor(5) as pool:
            embedded = pool.submit(lambda: [engine.embed(TEXTS) for _ in range(4)])
            beside = list(pool.map(lambda prompt: list(engine.generate(prompt, GREEDY)), prompts))
            for again in embedded.result():
                np.testing.assert_allclose(again, rows, atol=1e-3)
        assert [events[:-1] for events in beside] == [events[:-1] for events in alone]
        begun = engine.generate(prompts[0], GREEDY)
        first = next(begun)
        engine.embed(TEXTS)
        assert [first, *begun][:-1] == alone[0][:-1]
        *_, last = engine.generate(prompts[0], GREEDY)
        assert isinstance(last, Finished)
        assert last.timing.cached_tokens == len(prompts[0]) - 1, "its text was kept"


def test_what_cannot_be_embedded(mixing_path: Path) -> None:
    class Set:
        def is_set(self) -> bool:
            return True

    with Engine(mixing_path, ALONE) as engine:
        for wrong, kind in (([[]], InputError), (["x" * 9000], ContextFullError), ("a text", InputError)):
            with pytest.raises(kind):
                engine.embed(wrong)
        with pytest.raises(Cancelled):
            engine.embed(TEXTS, cancel=Set())


def embedded(library: Any, texts: Any, **fields: Any) -> tuple[Rows, Any]:
    answer = library.embeddings.create(model="talker", input=texts, **fields)
    assert [item.index for item in answer.data] == list(range(len(answer.data)))
    return np.array([item.embedding for item in answer.data], np.float32), answer


@pytest.mark.parametrize("encoding", [{}, {"encoding_format": "float"}])
def test_texts_and_tokens(library: Any, expected: Rows, encoding: dict[str, Any]) -> None:
    rows, answer = embedded(library, TEXTS, **encoding)
    np.testing.assert_allclose(rows, expected, atol=2e-3)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (248, 248)
    one, answer = embedded(library, TEXTS[0], **encoding)
    np.testing.assert_allclose(one, rows[:1], atol=1e-4)
    of_texts, answer = embedded(library, [" w1 w2", " w1 w2</s>"], dimensions=rows.shape[1], **encoding)
    of_text, answer = embedded(library, " w1 w2", **encoding)
    assert answer.usage.prompt_tokens == 3
    np.testing.assert_allclose(of_texts[:1], of_text, atol=1e-4)
    assert np.abs(of_texts[0] - of_texts[1]).max() > 0.01


def test_base64_holds_the_numbers_as_float32(client: httpx.Client) -> None:
    def ask(**fields: Any) -> Any:
        return client.post("/v1/embeddings", json={"input": " w1", **fields}).json()["data"][0]["embedding"]

    encoded = np.frombuffer(base64.b64decode(ask(encoding_format="base64")), "<f4")
    np.testing.assert_allclose(encoded, ask(), atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "status", "param", "message"),
    [
        ({"input": ""}, 400, "input", "is empty"),
        ({"input": [" w1", ""]}, 400, "input", "is empty"),
        ({"input": []}, 400, "input", "at least 1 item"),
        ({"input": [[1, -1]]}, 400, "input", "whole numbers"),
        ({"input": [99999]}, 400, "input", "none with the id 99999"),
        ({"input": [[5] * 2000]}, 400, "input", "the context holds 1024"),
        ({"dimensions": 8}, 400, "dimensions", "cannot be shortened"),
        ({"encoding_format": "int8"}, 400, "encoding_format", "base64"),
        ({"normalize": True}, 400, "normalize", "does not know"),
        ({"model": "other"}, 404, "model", "does not exist"),
    ],
)
def test_what_is_refused(client: httpx.Client, fields: dict[str, Any], status: int, param: str, message: str) -> None:
    refused = client.post("/v1/embeddings", json={"input": " w1", **fields})
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (status, param), error
    assert message in error["message"]
