"""Calls of OpenAI's client that stream, that run side by side, and that are left before their end."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import openai
from openai_asking import GREEDY, QUESTION, Asking, call, checked, content_of, expect, refused, same, text_of
from openai_chat_calls import ASK_JSON, Weather, schema_format

_SOON_S = 20.0


@call("streams", "the text of a stream is that of the answer")
def _(ask: Asking) -> None:
    same(text_of(ask.stream()), ask.said(), "text")


@call("streams", "one id, a role at first, a reason at last")
def _(ask: Asking) -> None:
    chunks = [chunk for chunk in ask.stream(max_tokens=4) if chunk.choices]
    same(len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}), 1, "ids")
    same({chunk.object for chunk in chunks}, {"chat.completion.chunk"}, "object")
    same(chunks[0].choices[0].delta.role, "assistant", "first role")
    same([chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason], ["length"], "reasons")
    same(chunks[-1].choices[0].finish_reason, "length", "last reason")


@call("streams", "include_usage: a last chunk without choices")
def _(ask: Asking) -> None:
    *others, last = ask.stream(stream_options={"include_usage": True}, max_tokens=4)
    same((last.choices, last.usage.completion_tokens), ([], 4), "last chunk")
    expect(all(chunk.usage is None for chunk in others), "a chunk before the last has a usage")


@call("streams", "without include_usage no chunk has one")
def _(ask: Asking) -> None:
    expect(all(chunk.choices and chunk.usage is None for chunk in ask.stream(max_tokens=4)), "a chunk has a usage")


@call("streams", "n=2")
def _(ask: Asking) -> None:
    chunks = ask.stream(n=2, temperature=1, seed=4, max_tokens=4)
    expect(text_of(chunks, 0) and text_of(chunks, 1), "a choice has no text")
    ends = [choice.index for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    same(sorted(ends), [0, 1], "ends")


@call("streams", "a stop text does not show itself")
def _(ask: Asking) -> None:
    said = ask.said()
    stop = said[len(said) // 2 :][:6]
    chunks = ask.stream(stop=stop)
    same(text_of(chunks).strip(), said[: said.index(stop)].strip(), "text")
    same(chunks[-1].choices[0].finish_reason, "stop", "finish_reason")


@call("streams", "logprobs")
def _(ask: Asking) -> None:
    chunks = ask.stream(logprobs=True, top_logprobs=2, max_tokens=4)
    entries = [
        entry for chunk in chunks for choice in chunk.choices if choice.logprobs for entry in choice.logprobs.content
    ]
    same(len(entries), 4, "tokens")
    expect(all(len(entry.top_logprobs) == 2 for entry in entries), "top_logprobs")


@call("streams", "json_schema")
def _(ask: Asking) -> None:
    text = text_of(ask.stream(ASK_JSON, response_format=schema_format(), max_tokens=100))
    expect(json.loads(text)["city"] in ("Oslo", "Bern"), text)


@call("streams", "whole characters in each chunk")
def _(ask: Asking) -> None:
    tokens = [str(token) for token in ask.token_ids("é")]
    chunks = ask.stream(logit_bias=dict.fromkeys(tokens, 30), max_tokens=12)
    same(text_of(chunks), content_of(ask.chat(logit_bias=dict.fromkeys(tokens, 30), max_tokens=12)), "text")


@call("streams", "the client's own helper, with its events")
def _(ask: Asking) -> None:
    said = ask.said()
    stop = said[len(said) // 2 :][:6]  # the helper refuses an answer that a limit ends
    asked: dict[str, Any] = {"messages": QUESTION, "stop": stop, **GREEDY}
    with ask.client.chat.completions.stream(model=ask.model, **asked) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    expect({"chunk", "content.delta", "content.done"} <= set(kinds), str(set(kinds)))
    same((final.choices[0].message.content or "").strip(), said[: said.index(stop)].strip(), "content")


@call("streams", "the helper parses into a class of pydantic")
def _(ask: Asking) -> None:
    asked: dict[str, Any] = {"messages": ASK_JSON, "response_format": Weather, "temperature": 0, "max_tokens": 100}
    with ask.client.chat.completions.stream(model=ask.model, **asked) as stream:
        message = stream.get_final_completion().choices[0].message
    expect(isinstance(message.parsed, Weather), f"parsed: {message.parsed!r}")


@call("streams", "an error before a stream has its status")
def _(ask: Asking) -> None:
    with refused(400):
        ask.stream(temperature="hot")


# ---- leaving, and many at once


@call("many at once", "a stream that is left, then an answer soon")
def _(ask: Asking) -> None:
    with ask.client.chat.completions.create(
        model=ask.model, messages=QUESTION, stream=True, temperature=0, max_tokens=4000
    ) as stream:
        for _ in range(3):
            next(stream)
    began = time.monotonic()
    same(content_of(ask.chat()), ask.said(), "content")
    expect(time.monotonic() - began < _SOON_S, "the answer took more than 20 s")


@call("many at once", "answers that nobody waits for, then one soon")
def _(ask: Asking) -> None:
    hasty = ask.client.with_options(timeout=0.1)
    for _ in range(4):
        try:
            hasty.chat.completions.create(model=ask.model, messages=QUESTION, temperature=0, max_tokens=4000)
        except openai.APITimeoutError:
            continue
    began = time.monotonic()
    same(content_of(ask.chat()), ask.said(), "content")
    expect(time.monotonic() - began < _SOON_S, "the answer took more than 20 s")


@call("many at once", "an asynchronous answer")
def _(ask: Asking) -> None:
    async def use(client: Any) -> Any:
        return await client.chat.completions.create(model=ask.model, messages=QUESTION, **GREEDY)

    same(content_of(checked(ask.run_async(use))), ask.said(), "content")


@call("many at once", "an asynchronous stream")
def _(ask: Asking) -> None:
    async def use(client: Any) -> list[Any]:
        stream = await client.chat.completions.create(model=ask.model, messages=QUESTION, stream=True, **GREEDY)
        return [checked(chunk) async for chunk in stream]

    same(text_of(ask.run_async(use)), ask.said(), "text")


@call("many at once", "eight at once say what one says alone")
def _(ask: Asking) -> None:
    async def use(client: Any) -> list[Any]:
        asked = [client.chat.completions.create(model=ask.model, messages=QUESTION, **GREEDY) for _ in range(8)]
        return await asyncio.gather(*asked)

    same({content_of(answer) for answer in ask.run_async(use)}, {ask.said()}, "contents")


@call("many at once", "a task that is cancelled ends alone")
def _(ask: Asking) -> None:
    async def use(client: Any) -> Any:
        long = {"temperature": 0, "max_tokens": 4000}
        task = asyncio.create_task(client.chat.completions.create(model=ask.model, messages=QUESTION, **long))
        other = asyncio.create_task(client.chat.completions.create(model=ask.model, messages=QUESTION, **GREEDY))
        await asyncio.sleep(0.1)
        task.cancel()
        return await asyncio.wait_for(other, _SOON_S)

    same(content_of(ask.run_async(use)), ask.said(), "content")
