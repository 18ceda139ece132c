"""Calls of OpenAI's client that a server is judged by: how they are listed, what they ask with, what may come.

A call raises Wrong where an answer is not what OpenAI's API reference documents. The client's own types say what shape
an answer has; ``checked`` holds an answer against them, because the client itself does not look.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar

import httpx
import openai
import pydantic

Verdict = Literal["ok", "refused", "wrong", "error"]
T = TypeVar("T")
ModelT = TypeVar("ModelT", bound=pydantic.BaseModel)

QUESTION: list[Any] = [{"role": "user", "content": "Tell me something about the sea."}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 16}
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Oslo", "Bern"]}, "warm": {"type": "boolean"}},
    "required": ["city", "warm"],
    "additionalProperties": False,
}


class Wrong(Exception):
    """An answer that is not what the API reference documents."""


@dataclass(frozen=True)
class Call:
    """A call and what it is for. With ``may_refuse``, an error that says so in OpenAI's shape is as good as an answer:
    the reference documents the field, but not every model or server has to honour it."""

    group: str
    name: str
    run: Callable[[Asking], None]
    may_refuse: bool


@dataclass(frozen=True)
class Outcome:
    """What came of a call."""

    verdict: Verdict
    what: str = ""

    @property
    def is_good(self) -> bool:
        """Whether the call did what the reference documents, or said that it cannot."""
        return self.verdict in ("ok", "refused")


CALLS: list[Call] = []


def call(group: str, name: str, *, may_refuse: bool = False) -> Callable[[Callable[[Asking], None]], None]:
    """Put the decorated function on the list of calls."""

    def listed(run: Callable[[Asking], None]) -> None:
        CALLS.append(Call(group, name, run, may_refuse))

    return listed


@dataclass
class Asking:
    """What calls ask with: the clients of one server, and what several of them need."""

    base_url: str
    model: str
    api_key: str = "none"
    timeout_s: float = 60
    _texts: dict[str, str] = field(default_factory=dict)

    @cached_property
    def client(self) -> openai.OpenAI:
        """OpenAI's client, which does not try again."""
        return openai.OpenAI(base_url=self.base_url, api_key=self.api_key, max_retries=0, timeout=self.timeout_s)

    @cached_property
    def http(self) -> httpx.Client:
        """Plain HTTP for what OpenAI's client cannot send, relative to the server's root."""
        headers = {"Authorization": f"Bearer {self.api_key}"}
        root = self.base_url.rstrip("/").removesuffix("/v1")
        return httpx.Client(base_url=root, headers=headers, timeout=self.timeout_s, trust_env=False)

    def close(self) -> None:
        """Close both clients."""
        self.client.close()
        self.http.close()

    def chat(self, messages: list[Any] | None = None, **fields: Any) -> Any:
        """A greedy chat completion of at most 16 tokens, held against its type."""
        asked = {**GREEDY, **fields}
        if "max_completion_tokens" in fields:
            del asked["max_tokens"]
        return checked(self.client.chat.completions.create(model=self.model, messages=messages or QUESTION, **asked))

    def stream(self, messages: list[Any] | None = None, **fields: Any) -> list[Any]:
        """The chunks of the same as a stream, each held against its type."""
        asked = {**GREEDY, **fields}
        stream = self.client.chat.completions.create(
            model=self.model, messages=messages or QUESTION, stream=True, **asked
        )
        return [checked(chunk) for chunk in stream]

    def complete(self, prompt: Any = "The sea is", **fields: Any) -> Any:
        """A greedy text completion of at most 16 tokens, held against its type."""
        return checked(
            self.client.completions.create(model=self.model, prompt=prompt, **{**GREEDY, **fields}),
            but_for_logprobs=bool(fields.get("echo")),
        )

    def said(self) -> str:
        """The greedy answer to QUESTION; asked for once."""
        if "said" not in self._texts:
            self._texts["said"] = content_of(self.chat())
        return self._texts["said"]

    def token_ids(self, text: str) -> list[int]:
        """The tokens of ``text``; ``/tokenize`` is not OpenAI's, but both servers have it."""
        found = self.http.post("/tokenize", json={"content": text})
        found.raise_for_status()
        return [int(token) for token in found.json()["tokens"]]

    def run_async(self, use: Callable[[Any], Awaitable[T]]) -> T:
        """What ``use`` gives with an asynchronous client."""

        async def run() -> T:
            async with openai.AsyncOpenAI(
                base_url=self.base_url, api_key=self.api_key, max_retries=0, timeout=self.timeout_s
            ) as client:
                return await use(client)

        return asyncio.run(run())


def checked(answer: ModelT, *, but_for_logprobs: bool = False) -> ModelT:
    """``answer``, whose fields have the types that the client's class declares. Raises Wrong."""
    data = answer.model_dump(by_alias=True, exclude_unset=True, warnings=False)
    if but_for_logprobs:  # the first token of a prompt has none, which the types do not know
        for choice in data["choices"]:
            choice["logprobs"] = None
    declared: Any = next(kind for kind in type(answer).__mro__ if "[" not in kind.__name__)
    try:
        declared.model_validate(data, strict=True)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise Wrong(f"{declared.__name__}.{place}: {first['msg']}, not {str(first['input'])[:60]!r}") from error
    return answer


def expect(is_so: object, message: str) -> None:
    """Raise Wrong with ``message`` unless ``is_so``."""
    if not is_so:
        raise Wrong(message)


def same(found: object, wanted: object, what: str) -> None:
    """Raise Wrong unless ``found`` equals ``wanted``."""
    expect(found == wanted, f"{what}: {str(found)[:80]!r}, not {str(wanted)[:80]!r}")


def content_of(answer: Any) -> str:
    """The text of the only choice."""
    same(len(answer.choices), 1, "choices")
    content = answer.choices[0].message.content
    expect(isinstance(content, str), "message.content is no text")
    return str(content)


def text_of(chunks: list[Any], index: int = 0) -> str:
    """The text of choice ``index`` in the chunks of a chat."""
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


@contextmanager
def refused(*statuses: int) -> Iterator[Callable[[], Mapping[str, Any]]]:
    """What stands in the block must be refused with one of ``statuses``; gives a function for the error's body."""
    found: dict[str, Any] = {}
    try:
        yield lambda: found
    except openai.APIStatusError as error:
        expect(error.status_code in statuses, f"status {error.status_code}, not {statuses}: {str(error)[:120]}")
        found |= _error_of(error.response)
    else:
        raise Wrong(f"was answered; {' or '.join(map(str, statuses))} is documented")


def _error_of(response: Any) -> dict[str, Any]:
    try:
        error = response.json()["error"]
        message = error["message"]
    except (ValueError, KeyError, TypeError) as problem:
        raise Wrong(f"status {response.status_code} without an error object: {response.text[:80]!r}") from problem
    expect(isinstance(message, str) and message, "the error has no message")
    return dict(error)


def judge(one: Call, asking: Asking) -> Outcome:
    """Make a call and say what came of it."""
    try:
        one.run(asking)
    except Wrong as error:
        return Outcome("wrong", str(error))
    except openai.APIStatusError as error:
        what = f"{error.status_code}: {_message(error)}"
        is_refusal = one.may_refuse and error.status_code in (400, 404, 422, 501)
        return Outcome("refused" if is_refusal else "error", what)
    except (openai.OpenAIError, httpx.HTTPError, pydantic.ValidationError, RuntimeError) as error:
        return Outcome("error", f"{type(error).__name__}: {error}"[:200])
    except (AttributeError, IndexError, KeyError, StopIteration, TypeError, ValueError) as error:
        return Outcome("wrong", f"{type(error).__name__}: {error}"[:200])
    return Outcome("ok")


def _message(error: openai.APIStatusError) -> str:
    body = error.body
    message = body.get("message") if isinstance(body, dict) else None
    return str(message or error)[:160]
