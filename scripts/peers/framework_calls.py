"""Ask a server through programming frameworks: a chat, a stream, a structured answer, a call of a tool and its result.

usage: framework_calls.py BASE_URL MODEL      (run by frameworks.py, in an environment that has the frameworks)

Prints a line of JSON for each: the framework with its version, what was asked for, and what went wrong. The model is
``frameworks.py``'s: with tools it calls ``weather`` for Oslo, and else it says SAYS.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

BASE_URL, MODEL = sys.argv[1:3]
KEY = "none"
QUESTION = "How is the weather in Oslo?"
SAYS = "It is warm."
N_BATCH = 24

Asked = Callable[[], Any]
CALLS: list[tuple[str, str, Asked]] = []


class Report(BaseModel):
    """What a structured answer holds."""

    warm: bool
    windy: bool


def weather(city: str) -> str:
    """The weather of a city."""
    return f"warm in {city}"


def asks(package: str, what: str) -> Callable[[Asked], None]:
    """Put the decorated function on the list."""

    def listed(function: Asked) -> None:
        CALLS.append((package, what, function))

    return listed


def same(found: object, wanted: object) -> None:
    """Raise ValueError unless both are equal."""
    if found != wanted:
        raise ValueError(f"{found!r}, not {wanted!r}")


def is_report(found: object) -> None:
    """Raise ValueError unless ``found`` is a Report."""
    if not isinstance(found, Report):
        raise ValueError(f"{found!r} is no Report")


# ---- openai


def _openai() -> Any:
    import openai

    return openai.OpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0)


def _user(text: str = QUESTION) -> list[Any]:
    return [{"role": "user", "content": text}]


@asks("openai", "chat")
def _() -> None:
    answer = _openai().chat.completions.create(model=MODEL, messages=_user(), temperature=0)
    same(answer.choices[0].message.content, SAYS)


@asks("openai", "stream")
def _() -> None:
    chunks = _openai().chat.completions.create(model=MODEL, messages=_user(), temperature=0, stream=True)
    same("".join(chunk.choices[0].delta.content or "" for chunk in chunks), SAYS)


@asks("openai", "structured")
def _() -> None:
    answer = _openai().chat.completions.parse(model=MODEL, messages=_user(), response_format=Report, temperature=0)
    is_report(answer.choices[0].message.parsed)


@asks("openai", "tool")
def _() -> None:
    tool = {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
    }
    asked: dict[str, Any] = {"model": MODEL, "tools": [tool], "temperature": 0}
    message = _openai().chat.completions.create(messages=_user(), **asked).choices[0].message
    (call,) = message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": weather(**json.loads(call.function.arguments))}
    answer = _openai().chat.completions.create(messages=[*_user(), message, result], **asked)
    same(answer.choices[0].message.content, SAYS)


# ---- langchain


def _langchain(**more: Any) -> Any:
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(model=MODEL, base_url=BASE_URL, api_key=KEY, temperature=0, max_retries=0, **more)


@asks("langchain-openai", "chat")
def _() -> None:
    same(_langchain().invoke(QUESTION).content, SAYS)


@asks("langchain-openai", "stream")
def _() -> None:
    same("".join(chunk.content for chunk in _langchain().stream(QUESTION)), SAYS)


@asks("langchain-openai", "structured")
def _() -> None:
    for method in ("json_schema", "function_calling"):
        model = _langchain(max_tokens=200).with_structured_output(Report, method=method)
        is_report(model.invoke(QUESTION))


@asks("langchain-openai", "tool")
def _() -> None:
    from langchain_core.messages import HumanMessage
    from langchain_core.tools import tool

    tools = tool(weather)
    model = _langchain().bind_tools([tools])
    said = model.invoke([HumanMessage(QUESTION)])
    result = tools.invoke(said.tool_calls[0])
    same(result.content, "warm in Oslo")
    same(model.invoke([HumanMessage(QUESTION), said, result]).content, SAYS)


@asks("langchain-openai", f"batch of {N_BATCH}")
def _() -> None:
    questions = [f"Question {n}" for n in range(N_BATCH)]
    model = _langchain()
    same([answer.content for answer in model.batch(questions)], [model.invoke(one).content for one in questions])


@asks("langchain-openai", "async, and /v1/responses")
def _() -> None:
    same(asyncio.run(_langchain().ainvoke(QUESTION)).content, SAYS)
    content = _langchain(use_responses_api=True).invoke(QUESTION).content
    same("".join(part["text"] for part in content), SAYS)


@asks("langchain-openai", "embeddings")
def _() -> None:
    from langchain_openai import OpenAIEmbeddings

    # by default it sends tokens of OpenAI's own vocabulary
    embedder = OpenAIEmbeddings(model=MODEL, base_url=BASE_URL, api_key=KEY, check_embedding_ctx_length=False)
    same([len(one) > 1 for one in embedder.embed_documents(["a", "b"])], [True, True])


# ---- llama-index


def _llama_index() -> Any:
    from llama_index.llms.openai_like import OpenAILike

    return OpenAILike(
        model=MODEL,
        api_base=BASE_URL,
        api_key=KEY,
        temperature=0,
        max_retries=0,
        max_tokens=200,
        is_chat_model=True,
        is_function_calling_model=True,
        should_use_structured_outputs=True,
    )


@asks("llama-index-llms-openai-like", "chat")
def _() -> None:
    from llama_index.core.llms import ChatMessage

    same(_llama_index().chat([ChatMessage(QUESTION)]).message.content, SAYS)


@asks("llama-index-llms-openai-like", "stream")
def _() -> None:
    same("".join(part.delta or "" for part in _llama_index().stream_complete(QUESTION)), SAYS)


@asks("llama-index-llms-openai-like", "structured")
def _() -> None:
    from llama_index.core.prompts import PromptTemplate

    is_report(_llama_index().structured_predict(Report, PromptTemplate(QUESTION)))


@asks("llama-index-llms-openai-like", "tool")
def _() -> None:
    from llama_index.core.llms import ChatMessage
    from llama_index.core.tools import FunctionTool

    model, tool = _llama_index(), FunctionTool.from_defaults(weather)
    asked = ChatMessage(QUESTION)
    said = model.chat_with_tools([tool], chat_history=[asked])
    (call,) = model.get_tool_calls_from_response(said)
    result = ChatMessage(
        tool(**call.tool_kwargs).content, role="tool", additional_kwargs={"tool_call_id": call.tool_id}
    )
    same(model.chat_with_tools([tool], chat_history=[asked, said.message, result]).message.content, SAYS)


# ---- llm


def _llm() -> Any:
    import llm

    return llm.get_model("served")


@asks("llm", "chat")
def _() -> None:
    same(_llm().prompt(QUESTION, stream=False, temperature=0).text(), SAYS)


@asks("llm", "stream")
def _() -> None:
    same("".join(_llm().prompt(QUESTION, temperature=0)), SAYS)


@asks("llm", "structured")
def _() -> None:
    found = _llm().prompt(QUESTION, schema=Report, stream=False, temperature=0, max_tokens=200)
    is_report(Report.model_validate_json(found.text()))


@asks("llm", "tool")
def _() -> None:
    chain = _llm().chain(QUESTION, tools=[weather], stream=False, options={"temperature": 0})
    same([response.text() for response in chain.responses()], ["", SAYS])


def _write_llm_models() -> None:
    folder = tempfile.mkdtemp()
    os.environ["LLM_USER_PATH"] = folder
    fields: dict[str, Any] = {"model_id": "served", "model_name": MODEL, "api_base": BASE_URL}
    fields |= dict.fromkeys(("can_stream", "supports_schema", "supports_tools"), True)
    Path(folder, "extra-openai-models.yaml").write_text(json.dumps([fields]), encoding="utf-8")  # JSON is YAML
    os.environ["OPENAI_API_KEY"] = KEY


# ---- instructor


def _instructor(mode: str) -> Any:
    import instructor

    return instructor.from_openai(_openai(), mode=getattr(instructor.Mode, mode))


def _extracted(mode: str, **more: Any) -> Any:
    return _instructor(mode).chat.completions.create(
        model=MODEL, messages=_user(), response_model=Report, temperature=0, max_tokens=200, max_retries=0, **more
    )


@asks("instructor", "chat")
def _() -> None:
    answer = _instructor("TOOLS").chat.completions.create(
        model=MODEL, messages=_user(), response_model=None, temperature=0
    )
    same(answer.choices[0].message.content, SAYS)


@asks("instructor", "structured")
def _() -> None:
    for mode in ("TOOLS", "TOOLS_STRICT", "JSON_SCHEMA"):
        is_report(_extracted(mode))


@asks("instructor", "stream")
def _() -> None:
    parts = _instructor("TOOLS").chat.completions.create_partial(
        model=MODEL, messages=_user(), response_model=Report, temperature=0, max_tokens=200
    )
    *_, last = parts
    is_report(Report.model_validate(last.model_dump()))


# ---- pydantic-ai


def _agent(**more: Any) -> Any:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=BASE_URL, api_key=KEY))
    return Agent(model, model_settings={"temperature": 0, "max_tokens": 200}, **more)


@asks("pydantic-ai-slim", "chat")
def _() -> None:
    same(_agent(system_prompt="Be brief.").run_sync(QUESTION).output, SAYS)


@asks("pydantic-ai-slim", "stream")
def _() -> None:
    async def run() -> str:
        async with _agent().run_stream(QUESTION) as result:
            return "".join([part async for part in result.stream_text(delta=True)])

    same(asyncio.run(run()), SAYS)


@asks("pydantic-ai-slim", "structured")
def _() -> None:
    from pydantic_ai import NativeOutput, ToolOutput

    for kind in (ToolOutput, NativeOutput):
        is_report(_agent(output_type=kind(Report)).run_sync(QUESTION).output)


@asks("pydantic-ai-slim", "tool")
def _() -> None:
    called = []

    def noted(city: str) -> str:
        """The weather of a city."""
        called.append(city)
        return weather(city)

    from pydantic_ai import Tool

    same(_agent(tools=[Tool(noted, name="weather")]).run_sync(QUESTION).output, SAYS)
    same(called, ["Oslo"])


def main() -> int:
    """Ask everything; prints what came of it."""
    _write_llm_models()
    for package, what, function in CALLS:
        began, wrong = time.monotonic(), ""
        try:
            function()
        except Exception as error:  # whatever a framework raises is its answer
            wrong = f"{type(error).__name__}: {error}"[:400]
        name = f"{package} {importlib.metadata.version(package)}"
        line = {"of": name, "what": what, "wrong": wrong, "s": round(time.monotonic() - began, 2)}
        print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
