"""Calls of ``/v1/completions``, ``/v1/embeddings`` and what is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import httpx
from openai_asking import QUESTION, Asking, call, checked, expect, refused, same

PROMPT = "The sea is"


@call("completions", "a text")
def _(ask: Asking) -> None:
    answer = ask.complete()
    choice = answer.choices[0]
    same((answer.object, choice.index, choice.logprobs), ("text_completion", 0, None), "object, index, logprobs")
    expect(choice.text and choice.finish_reason in ("stop", "length"), "no text or reason")
    usage = answer.usage
    same(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens, "total_tokens")


@call("completions", "16 tokens by default")
def _(ask: Asking) -> None:
    answer = checked(ask.client.completions.create(model=ask.model, prompt=PROMPT, temperature=0))
    expect(answer.usage is not None and answer.usage.completion_tokens <= 16, f"{answer.usage}")


@call("completions", "two prompts, two choices")
def _(ask: Asking) -> None:
    answer = ask.complete([PROMPT, "A ship"])
    same([choice.index for choice in answer.choices], [0, 1], "indexes")
    same(answer.choices[0].text, ask.complete().choices[0].text, "text")


@call("completions", "a prompt of tokens")
def _(ask: Asking) -> None:
    expect(ask.complete(ask.token_ids(PROMPT)).choices[0].text, "no text")


@call("completions", "two prompts of tokens")
def _(ask: Asking) -> None:
    same(len(ask.complete([ask.token_ids(PROMPT), ask.token_ids("A ship")]).choices), 2, "choices")


@call("completions", "n=2")
def _(ask: Asking) -> None:
    answer = ask.complete(n=2, temperature=1, seed=1, max_tokens=4)
    same(sorted(choice.index for choice in answer.choices), [0, 1], "indexes")


@call("completions", "echo gives the prompt too")
def _(ask: Asking) -> None:
    same(ask.complete(echo=True).choices[0].text, PROMPT + ask.complete().choices[0].text, "text")


@call("completions", "logprobs=3")
def _(ask: Asking) -> None:
    choice = ask.complete(logprobs=3, max_tokens=4).choices[0]
    found = choice.logprobs
    expect(found is not None and found.tokens, "no logprobs.tokens")
    same({len(found.tokens), len(found.token_logprobs), len(found.top_logprobs), len(found.text_offset)}, {4}, "sizes")
    expect(all(3 <= len(best) <= 4 for best in found.top_logprobs), "numbers of alternatives")
    same("".join(found.tokens), choice.text, "tokens")


@call("completions", "echo with logprobs of the prompt")
def _(ask: Asking) -> None:
    choice = ask.complete(echo=True, logprobs=1, max_tokens=1).choices[0]
    found = choice.logprobs
    expect(found is not None and found.tokens, "no logprobs.tokens")
    same(found.token_logprobs[0], None, "the first token's probability")
    expect(all(value <= 0 for value in found.token_logprobs[1:]), "probabilities")
    expect(choice.text.strip() in "".join(found.tokens), f"tokens {found.tokens}")


@call("completions", "echo with max_tokens=0: the prompt's probabilities alone")
def _(ask: Asking) -> None:
    choice = ask.complete(echo=True, logprobs=1, max_tokens=0).choices[0]
    same(choice.text, PROMPT, "text")
    expect(len(choice.logprobs.tokens) >= 3, f"tokens {choice.logprobs.tokens}")


@call("completions", "a stop text")
def _(ask: Asking) -> None:
    said = ask.complete().choices[0].text
    stop = said[len(said) // 2 :][:4]
    same(ask.complete(stop=stop).choices[0].text.strip(), said[: said.index(stop)].strip(), "text")


@call("completions", "a stream with usage")
def _(ask: Asking) -> None:
    asked: dict[str, Any] = {"stream_options": {"include_usage": True}, "temperature": 0, "max_tokens": 16}
    stream = ask.client.completions.create(model=ask.model, prompt=PROMPT, stream=True, **asked)
    chunks = [_checked_chunk(chunk) for chunk in stream]
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    same(text, ask.complete().choices[0].text, "text")
    same(chunks[-1].choices, [], "choices of the last chunk")
    same([chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] in ("stop", "length"), True, "end")


def _checked_chunk(chunk: Any) -> Any:
    """A chunk held against its type, whose ``finish_reason`` is null until the end, unlike the class says."""
    if chunk.choices and chunk.choices[0].finish_reason is None:
        whole = chunk.model_copy(deep=True)
        whole.choices[0].finish_reason = "stop"
        checked(whole)
        return chunk
    return checked(chunk)


@call("completions", "best_of=2", may_refuse=True)
def _(ask: Asking) -> None:
    same(len(ask.complete(best_of=2, temperature=1, max_tokens=4).choices), 1, "choices")


@call("completions", "a suffix", may_refuse=True)
def _(ask: Asking) -> None:
    n_with, n_without = (
        ask.complete(max_tokens=4, **more).usage.prompt_tokens for more in ({"suffix": " and that was all."}, {})
    )
    expect(n_with > n_without, "the suffix is not in the prompt")


# ---- embeddings


def _embedded(ask: Asking, given: Any, **fields: Any) -> list[list[float]]:
    answer = checked(ask.client.embeddings.create(model=ask.model, input=given, **fields))
    same([one.index for one in answer.data], list(range(len(answer.data))), "indexes")
    expect(answer.usage.prompt_tokens > 0, "usage")
    return [one.embedding for one in answer.data]


@call("embeddings", "a text, as the client asks by default (base64)")
def _(ask: Asking) -> None:
    (found,) = _embedded(ask, PROMPT)
    expect(abs(math.hypot(*found) - 1) < 1e-3, f"length {math.hypot(*found):.4f}, not 1")


@call("embeddings", "floats and base64 are the same numbers")
def _(ask: Asking) -> None:
    (coded,) = _embedded(ask, PROMPT)
    (plain,) = _embedded(ask, PROMPT, encoding_format="float")
    same(len(plain), len(coded), "numbers")
    expect(max(abs(a - b) for a, b in zip(plain, coded, strict=True)) < 1e-4, "the numbers differ")


@call("embeddings", "three texts in their order")
def _(ask: Asking) -> None:
    one, two, again = _embedded(ask, [PROMPT, "A ship", PROMPT], encoding_format="float")
    near, far = (sum(a * b for a, b in zip(one, other, strict=True)) for other in (again, two))
    expect(near > 0.999 and near > far, f"likeness to itself {near:.4f}, to the other {far:.4f}")


@call("embeddings", "tokens")
def _(ask: Asking) -> None:
    same(len(_embedded(ask, ask.token_ids(PROMPT))), 1, "embeddings")


@call("embeddings", "lists of tokens")
def _(ask: Asking) -> None:
    same(len(_embedded(ask, [ask.token_ids(PROMPT), ask.token_ids("A ship")])), 2, "embeddings")


@call("embeddings", "fewer dimensions", may_refuse=True)
def _(ask: Asking) -> None:
    same(len(_embedded(ask, PROMPT, dimensions=8)[0]), 8, "dimensions")


@call("embeddings", "an empty text is refused")
def _(ask: Asking) -> None:
    with refused(400):
        _embedded(ask, "")


# ---- errors


@call("errors", "the body of an error: message, type, param, code")
def _(ask: Asking) -> None:
    with refused(400) as found:
        ask.chat(temperature="hot")
    same(found().keys() >= {"message", "type", "param", "code"}, True, "keys of the error")
    expect(isinstance(found()["type"], str), "type is no text")
    expect(found()["code"] is None or isinstance(found()["code"], str), f"code {found()['code']!r} is no text")
    same(found()["param"], "temperature", "param")


@call("errors", "a prompt that is too long: 400, context_length_exceeded")
def _(ask: Asking) -> None:
    with refused(400) as found:
        ask.chat([{"role": "user", "content": "very long " * 6000}])
    same(found().get("code"), "context_length_exceeded", "code")


@call("errors", "a text completion that is too long")
def _(ask: Asking) -> None:
    with refused(400) as found:
        ask.complete("very long " * 6000)
    same(found().get("code"), "context_length_exceeded", "code")


@call("errors", "an unknown model: 404, model_not_found")
def _(ask: Asking) -> None:
    with refused(404) as found:
        ask.client.chat.completions.create(model="no-such-model", messages=QUESTION, max_tokens=1)
    same(found().get("code"), "model_not_found", "code")


@call("errors", "an unknown field is named")
def _(ask: Asking) -> None:
    with refused(400) as found:
        ask.chat(extra_body={"temprature": 1})
    expect("temprature" in found()["message"], found()["message"])


@call("errors", "no messages")
def _(ask: Asking) -> None:
    with refused(400):
        ask.client.chat.completions.create(model=ask.model, messages=[], max_tokens=1)


@call("errors", "a role that is none")
def _(ask: Asking) -> None:
    with refused(400):
        ask.chat([{"role": "captain", "content": "Hello"}])


@call("errors", "a user's message without content")
def _(ask: Asking) -> None:
    with refused(400):
        ask.chat([{"role": "user"}])


@call("errors", "content that is a number")
def _(ask: Asking) -> None:
    with refused(400):
        ask.chat([{"role": "user", "content": 7}])


@call("errors", "a part of an unknown type")
def _(ask: Asking) -> None:
    with refused(400):
        ask.chat([{"role": "user", "content": [{"type": "smell", "smell": "salt"}]}])


@call("errors", "n=0")
def _(ask: Asking) -> None:
    with refused(400):
        ask.chat(n=0)


@call("errors", "max_tokens is a text")
def _(ask: Asking) -> None:
    with refused(400):
        ask.chat(max_tokens="many")


@call("errors", "top_logprobs=21")
def _(ask: Asking) -> None:
    with refused(400):
        ask.chat(logprobs=True, top_logprobs=21)


@call("errors", "top_logprobs without logprobs")
def _(ask: Asking) -> None:
    with refused(400):
        ask.chat(top_logprobs=2)


@call("errors", "logit_bias=101")
def _(ask: Asking) -> None:
    with refused(400):
        ask.chat(logit_bias={"5": 101})


@call("errors", "stream_options without a stream")
def _(ask: Asking) -> None:
    with refused(400):
        ask.chat(extra_body={"stream_options": {"include_usage": True}})


@call("errors", "a call without its name in the history")
def _(ask: Asking) -> None:
    broken = {"role": "assistant", "tool_calls": [{"id": "c1", "type": "function", "function": {"arguments": "{}"}}]}
    with refused(400):
        ask.chat([*QUESTION, broken])


def _status_of(response: httpx.Response) -> int:
    expect(json.loads(response.text)["error"]["message"], "no message")
    return response.status_code


@call("errors", "a body that is no JSON")
def _(ask: Asking) -> None:
    same(_status_of(ask.http.post("/v1/chat/completions", content=b'{"messages": [')), 400, "status")


@call("errors", "a body that is a list")
def _(ask: Asking) -> None:
    same(_status_of(ask.http.post("/v1/chat/completions", json=[1])), 400, "status")


@call("errors", "a path that is none: 404")
def _(ask: Asking) -> None:
    with refused(404):
        ask.client.moderations.create(input="hello")


@call("errors", "a method that is none: 405")
def _(ask: Asking) -> None:
    same(ask.http.put("/v1/chat/completions", json={}).status_code, 405, "status")


@call("errors", "after all of them the server answers as before")
def _(ask: Asking) -> None:
    same(ask.chat().choices[0].message.content, ask.said(), "content")
