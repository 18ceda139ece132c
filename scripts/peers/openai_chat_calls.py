"""Calls of ``/v1/models`` and of ``/v1/chat/completions`` without tools."""

from __future__ import annotations

import base64
import itertools
import json
from typing import Any

import pydantic
from openai_asking import CITY, QUESTION, Asking, Wrong, call, checked, content_of, expect, refused, same

PIXEL = (
    "data:image/png;base64,"
    + base64.b64encode(
        bytes.fromhex(
            "89504e470d0a1a0a0000000d4948445200000001000000010804000000b51c0c020000000b4944415478da6364600000000600023081d02f"
            "0000000049454e44ae426082"
        )
    ).decode()
)


class Weather(pydantic.BaseModel):
    """What a parsed answer holds."""

    model_config = pydantic.ConfigDict(extra="forbid")

    warm: bool
    windy: bool


@call("models", "the list")
def _(ask: Asking) -> None:
    models = ask.client.models.list()
    same(models.object, "list", "object")
    expect(ask.model in [checked(model).id for model in models.data], f"{ask.model} is not in the list")


@call("models", "one by its name")
def _(ask: Asking) -> None:
    same(checked(ask.client.models.retrieve(ask.model)).id, ask.model, "id")


@call("models", "one that is not there: 404")
def _(ask: Asking) -> None:
    with refused(404):
        ask.client.models.retrieve("no-such-model")


# ---- texts


@call("chat", "a question")
def _(ask: Asking) -> None:
    answer = ask.chat()
    choice = answer.choices[0]
    same((answer.object, choice.index, choice.message.role), ("chat.completion", 0, "assistant"), "object, index, role")
    same(answer.model, ask.model, "model")
    expect(choice.finish_reason in ("stop", "length"), f"finish_reason {choice.finish_reason}")
    expect(content_of(answer), "the answer is empty")


@call("chat", "the usage adds up")
def _(ask: Asking) -> None:
    usage = ask.chat(max_tokens=5).usage
    same(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens, "total_tokens")
    expect(usage.prompt_tokens > 0 and 0 < usage.completion_tokens <= 5, f"usage {usage}")


@call("chat", "cached tokens in the usage of a second question")
def _(ask: Asking) -> None:
    words = [{"role": "user", "content": "One word after another, said twice over and over again. " * 4}]
    ask.chat(words, max_tokens=2)
    details = ask.chat(words, max_tokens=2).usage.prompt_tokens_details
    expect(details is not None and details.cached_tokens, "cached_tokens is 0 or missing")


@call("chat", "a system message is read")
def _(ask: Asking) -> None:
    # two of them, because a template may have one of its own
    short, long = (
        ask.chat([{"role": "system", "content": "Answer like a sailor. " * n}, *QUESTION], max_tokens=2) for n in (1, 3)
    )
    expect(long.usage.prompt_tokens > short.usage.prompt_tokens + 3, "the prompt has not become longer")


@call("chat", "a developer message is the same as a system message")
def _(ask: Asking) -> None:
    answers = [
        ask.chat([{"role": role, "content": "Answer like a sailor."}, *QUESTION]) for role in ("system", "developer")
    ]
    same(answers[1].usage.prompt_tokens, answers[0].usage.prompt_tokens, "prompt_tokens")
    same(content_of(answers[1]), content_of(answers[0]), "content")


@call("chat", "a conversation of three turns")
def _(ask: Asking) -> None:
    talk = [*QUESTION, {"role": "assistant", "content": "It is deep."}, {"role": "user", "content": "How deep?"}]
    expect(ask.chat(talk).usage.prompt_tokens > ask.chat().usage.prompt_tokens, "the prompt has not become longer")


@call("chat", "content as parts of text")
def _(ask: Asking) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}]
    same(content_of(ask.chat(parts)), ask.said(), "content")


@call("chat", "two parts of text are both read")
def _(ask: Asking) -> None:
    part = {"type": "text", "text": QUESTION[0]["content"]}
    one, two = (ask.chat([{"role": "user", "content": [part] * n}], max_tokens=1) for n in (1, 2))
    expect(two.usage.prompt_tokens > one.usage.prompt_tokens + 3, "the prompt has not become longer")


@call("chat", "system and assistant content as parts")
def _(ask: Asking) -> None:
    talk = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        *QUESTION,
        {"role": "assistant", "content": [{"type": "text", "text": "It is deep."}]},
        {"role": "user", "content": "How deep?"},
    ]
    content_of(ask.chat(talk))


@call("chat", "letters of all alphabets and emoji")
def _(ask: Asking) -> None:
    content_of(ask.chat([{"role": "user", "content": "Grüße, 你好, שלום, 👩‍👩‍👧 \u0000 \u2028 e\u0301"}]))


@call("chat", "a name on a message")
def _(ask: Asking) -> None:
    content_of(ask.chat([{"role": "user", "name": "ann", "content": "Hello"}]))


@call("chat", "an empty message")
def _(ask: Asking) -> None:
    content_of(ask.chat([{"role": "user", "content": ""}], max_tokens=3))


# ---- limits and ends


@call("chat", "max_tokens ends with length")
def _(ask: Asking) -> None:
    answer = ask.chat(max_tokens=3)
    same((answer.choices[0].finish_reason, answer.usage.completion_tokens), ("length", 3), "end")


@call("chat", "max_completion_tokens does the same")
def _(ask: Asking) -> None:
    answer = ask.chat(max_completion_tokens=3)
    same((answer.choices[0].finish_reason, answer.usage.completion_tokens), ("length", 3), "end")


def _cut(text: str, stop: str) -> str:
    return text[: text.index(stop)]


@call("chat", "a stop text is left out")
def _(ask: Asking) -> None:
    said = ask.said()
    stop = said[len(said) // 2 :][:4]
    answer = ask.chat(stop=stop)
    same(content_of(answer).strip(), _cut(said, stop).strip(), "content")
    same(answer.choices[0].finish_reason, "stop", "finish_reason")


@call("chat", "four stop texts, the first that comes counts")
def _(ask: Asking) -> None:
    said = ask.said()
    early, late = said[len(said) // 3 :][:4], said[2 * len(said) // 3 :][:4]
    answer = ask.chat(stop=["~never~", late, early, "~nor this~"])
    same(content_of(answer).strip(), _cut(said, min((early, late), key=said.index)).strip(), "content")


@call("chat", "a stop text over the border of two tokens")
def _(ask: Asking) -> None:
    tokens = [entry.token for entry in ask.chat(logprobs=True).choices[0].logprobs.content]
    said = ask.said()
    borders = [before[-1:] + after[:1] for before, after in itertools.pairwise(tokens[3:])]
    stop = next(border for border in borders if len(border) == 2 and border in said and "\ufffd" not in border)
    same(content_of(ask.chat(stop=[stop])).strip(), _cut(said, stop).strip(), "content")


# ---- sampling


@call("chat", "n=2 gives two choices")
def _(ask: Asking) -> None:
    answer = ask.chat(n=2, temperature=1, max_tokens=4, seed=1)
    same(sorted(choice.index for choice in answer.choices), [0, 1], "indexes")
    one = ask.chat(max_tokens=4).usage.prompt_tokens
    same(answer.usage.prompt_tokens, one, "prompt_tokens of two choices")
    expect(4 < answer.usage.completion_tokens <= 8, f"completion_tokens {answer.usage.completion_tokens}")


@call("chat", "greedy twice is the same")
def _(ask: Asking) -> None:
    same(content_of(ask.chat()), ask.said(), "content")


@call("chat", "a seed repeats its answer")
def _(ask: Asking) -> None:
    asked: dict[str, Any] = {"temperature": 1, "seed": 11, "max_tokens": 12}
    same(content_of(ask.chat(**asked)), content_of(ask.chat(**asked)), "content")


@call("chat", "other seeds give other answers")
def _(ask: Asking) -> None:
    texts = {content_of(ask.chat(temperature=1.2, seed=seed, max_tokens=12)) for seed in range(6)}
    expect(len(texts) > 1, "six seeds, one answer")


@call("chat", "top_p near 0 is greedy")
def _(ask: Asking) -> None:
    same(content_of(ask.chat(temperature=1, top_p=1e-6, seed=3)), ask.said(), "content")


@call("chat", "both penalties")
def _(ask: Asking) -> None:
    content_of(ask.chat(frequency_penalty=1.5, presence_penalty=1.5))


@call("chat", "logit_bias -100 bans a token")
def _(ask: Asking) -> None:
    first = ask.chat(max_tokens=1, logprobs=True).choices[0].logprobs.content[0].token
    # a token may be spelt in several ways, which depend on what stands before it
    spelt = {token for text in (first, "x" + first, " " + first.strip()) for token in ask.token_ids(text)[-1:]}
    bias = dict.fromkeys(map(str, spelt), -100)
    again = ask.chat(max_tokens=1, logprobs=True, logit_bias=bias).choices[0].logprobs.content[0].token
    expect(again != first, f"{first!r} came again")


@call("chat", "logit_bias 100 chooses a token")
def _(ask: Asking) -> None:
    token = ask.token_ids("A")[-1]
    entries = ask.chat(max_tokens=3, logprobs=True, logit_bias={str(token): 100}).choices[0].logprobs.content
    same([entry.token.strip() for entry in entries], ["A"] * 3, "tokens")


# ---- probabilities


def _check_entries(entries: list[Any], n_best: int) -> None:
    for entry in entries:
        expect(entry.logprob <= 0, f"logprob {entry.logprob}")
        same(bytes(entry.bytes).decode("utf-8", "replace"), entry.token, "bytes")
        expect(len(entry.top_logprobs) <= n_best, f"{len(entry.top_logprobs)} top_logprobs")
        values = [other.logprob for other in entry.top_logprobs]
        same(values, sorted(values, reverse=True), "order of top_logprobs")


@call("chat", "logprobs alone")
def _(ask: Asking) -> None:
    choice = ask.chat(logprobs=True).choices[0]
    _check_entries(choice.logprobs.content, 0)
    text = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content).decode("utf-8", "replace")
    expect(text.strip().startswith(choice.message.content.strip()), f"tokens {text!r}")


@call("chat", "logprobs with three alternatives")
def _(ask: Asking) -> None:
    entries = ask.chat(logprobs=True, top_logprobs=3).choices[0].logprobs.content
    _check_entries(entries, 3)
    for entry in entries:
        same(len(entry.top_logprobs), 3, "top_logprobs")
        same(entry.top_logprobs[0].token, entry.token, "the likeliest, which greedy takes")


@call("chat", "logprobs at temperature 1 are those of the model")
def _(ask: Asking) -> None:
    first, other = (
        ask.chat(logprobs=True, top_logprobs=1, max_tokens=1, temperature=temperature, seed=2).choices[0].logprobs
        for temperature in (0, 1)
    )
    expect(
        abs(first.content[0].top_logprobs[0].logprob - other.content[0].top_logprobs[0].logprob) < 0.05,
        "the likeliest token has another probability",
    )


# ---- schemas

ASK_JSON: list[Any] = [{"role": "user", "content": "Say in JSON which city is warm today: Oslo or Bern."}]


def _object_of(answer: Any) -> Any:
    content = content_of(answer)
    if answer.choices[0].finish_reason == "length":
        raise Wrong(f"the object has no end: {content[:60]!r}")
    return json.loads(content)


def schema_format(schema: dict[str, Any] = CITY, **fields: Any) -> dict[str, Any]:
    """A ``response_format`` that holds an answer to ``schema``."""
    return {"type": "json_schema", "json_schema": {"name": "city", "schema": schema, **fields}}


@call("schemas", "json_object")
def _(ask: Asking) -> None:
    answer = ask.chat(ASK_JSON, response_format={"type": "json_object"}, max_tokens=200)
    content = content_of(answer)
    if answer.choices[0].finish_reason == "stop":
        expect(isinstance(json.loads(content), dict), "no object")
    expect(content.lstrip().startswith("{"), f"{content[:40]!r}")  # one that is cut is partial JSON


@call("schemas", "json_schema")
def _(ask: Asking) -> None:
    found = _object_of(ask.chat(ASK_JSON, response_format=schema_format(), max_tokens=100))
    expect(found.keys() == {"city", "warm"} and found["city"] in ("Oslo", "Bern"), str(found))


@call("schemas", "json_schema with strict, references and a union")
def _(ask: Asking) -> None:
    schema = {
        "type": "object",
        "properties": {"place": {"$ref": "#/$defs/place"}, "wind": {"anyOf": [{"type": "boolean"}, {"type": "null"}]}},
        "required": ["place", "wind"],
        "additionalProperties": False,
        "$defs": {"place": {"enum": ["sea", "land"]}},
    }
    found = _object_of(ask.chat(ASK_JSON, response_format=schema_format(schema, strict=True), max_tokens=100))
    expect(found["place"] in ("sea", "land") and found["wind"] in (True, False, None), str(found))


@call("schemas", "parse() into a class of pydantic")
def _(ask: Asking) -> None:
    answer = ask.client.chat.completions.parse(
        model=ask.model, messages=ASK_JSON, response_format=Weather, max_tokens=100, temperature=0
    )
    expect(isinstance(answer.choices[0].message.parsed, Weather), f"parsed: {answer.choices[0].message.parsed!r}")


@call("schemas", "a schema that is none is refused")
def _(ask: Asking) -> None:
    with refused(400):
        ask.chat(ASK_JSON, response_format=schema_format({"type": "nothing"}))


@call("schemas", "response_format text")
def _(ask: Asking) -> None:
    same(content_of(ask.chat(response_format={"type": "text"})), ask.said(), "content")


# ---- what changes nothing, and what a small server may refuse


@call("fields", "user, metadata, safety_identifier, prompt_cache_key")
def _(ask: Asking) -> None:
    fields: dict[str, Any] = {"user": "ann", "metadata": {"a": "b"}, "safety_identifier": "x", "prompt_cache_key": "y"}
    same(content_of(ask.chat(**fields)), ask.said(), "content")


@call("fields", "store=False")
def _(ask: Asking) -> None:
    same(content_of(ask.chat(store=False)), ask.said(), "content")


@call("fields", "store=True", may_refuse=True)
def _(ask: Asking) -> None:
    stored = ask.chat(store=True)
    same(ask.client.chat.completions.retrieve(stored.id).id, stored.id, "the stored answer")


@call("fields", "service_tier auto, and the tier in the answer")
def _(ask: Asking) -> None:
    answer = ask.chat(service_tier="auto")
    expect(answer.service_tier, "no service_tier in the answer")


@call("fields", "modalities text")
def _(ask: Asking) -> None:
    same(content_of(ask.chat(modalities=["text"])), ask.said(), "content")


@call("fields", "fields that are null are as if they were not there")
def _(ask: Asking) -> None:
    nulls = dict.fromkeys(("stop", "logit_bias", "seed", "n", "top_p", "logprobs", "response_format", "user"))
    body = {"model": ask.model, "messages": QUESTION, **nulls, "temperature": 0, "max_tokens": 16}
    answer = ask.http.post("/v1/chat/completions", json=body)
    same(answer.status_code, 200, "status")
    same(answer.json()["choices"][0]["message"]["content"], ask.said(), "content")


@call("fields", "reasoning_effort low", may_refuse=True)
def _(ask: Asking) -> None:
    content_of(ask.chat(reasoning_effort="low"))


@call("fields", "reasoning_effort none", may_refuse=True)
def _(ask: Asking) -> None:
    content_of(ask.chat(reasoning_effort="none"))


@call("fields", "verbosity", may_refuse=True)
def _(ask: Asking) -> None:
    content_of(ask.chat(verbosity="low"))


@call("fields", "a predicted output", may_refuse=True)
def _(ask: Asking) -> None:
    content_of(ask.chat(prediction={"type": "content", "content": "The sea is deep."}))


@call("fields", "an image for a model of texts is refused")
def _(ask: Asking) -> None:
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": PIXEL}}]
    with refused(400):
        ask.chat([{"role": "user", "content": parts}])


@call("fields", "sound as an answer is refused")
def _(ask: Asking) -> None:
    with refused(400):
        ask.chat(modalities=["text", "audio"], audio={"voice": "alloy", "format": "wav"})
