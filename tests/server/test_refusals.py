"""What the server refuses, and how: statuses, and errors in OpenAI's shape."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from ggufmoe import Engine, EngineLostError, InputError, ModelLoadError, OptionError
from ggufmoe.options import ContextOptions, ServerOptions
from ggufmoe.runtime.events import Event, Token
from ggufmoe.server.bodies import MAX_BODY_BYTES
from ggufmoe.server.guard import check_exposure, read_keys
from ggufmoe.server.modelhost import ModelHost
from ggufmoe.server.serving import HttpServer
from ggufmoe.work import OnProgress
from tests.scripted import Scripted
from tests.server.running import HELLO, TALKER, WEATHER, loading, serving
from tests.stories import ONE_THREAD


@pytest.fixture(scope="module")
def talker_path(write_model: Callable[[Scripted], Path]) -> Path:
    return write_model(TALKER)


@pytest.fixture(scope="module")
def talker(talker_path: Path) -> Iterator[httpx.Client]:
    with serving(loading(talker_path), ServerOptions(port=0, queue=4)) as (client, _):
        yield client


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The error in a response, which has OpenAI's shape."""
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    return dict(error)


LONG = [{"role": "user", "content": " hello" * 300}]
NAMED = {"type": "function", "function": {"name": "x"}}
FOREIGN = {"type": "json_object", "schema": {"$ref": "http://x"}}
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]


@pytest.mark.parametrize(
    ("fields", "status", "param", "message"),
    [
        ({"model": "gpt-4o"}, 404, "model", "'gpt-4o' does not exist"),
        ({"messages": None}, 400, "messages", "missing required parameter"),
        ({"messages": []}, 400, "messages", "at least 1"),
        ({"messages": IMAGE}, 400, "messages[0].content", "images"),
        ({"messages": [{"role": "user"}]}, 400, "messages[0]", "role user needs content"),
        ({"messages": [{"role": "assistant"}]}, 400, "messages[0]", "role assistant needs content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0]", "needs tool_call_id"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages[0].role", "'system'"),
        ({"messages": [{"role": "user", "content": "x", "y": 1}]}, 400, "messages[0].y", "does not know"),
        ({"messages": LONG}, 400, "messages", "303 tokens and the context holds 256"),
        ({"temperatur": 1}, 400, "temperatur", "did you mean temperature"),
        ({"temperature": "hot"}, 400, "temperature", "number"),
        ({"temperature": 1000}, 400, "temperature", "between 0 and 100"),
        ({"top_k": 1.5}, 400, "top_k", "whole number"),
        ({"grammar_file": "/etc/passwd"}, 400, "grammar_file", "does not know"),
        ({"grammar": "root ::= ("}, 400, None, "line 1"),
        ({"n": 0}, 400, "n", "greater than or equal to 1"),
        ({"n": 5}, 400, "n", "takes on 4"),
        ({"max_tokens": "many"}, 400, "max_tokens", "integer"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 400, "max_tokens", "differ"),
        ({"stop": ["a", ""]}, 400, "stop[1]", "at least 1 character"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias", "token's id"),
        ({"logit_bias": {"999999": 1}}, 400, None, "999999 is not a token"),
        ({"top_logprobs": 2}, 400, "top_logprobs", "logprobs: true"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options", "stream: true"),
        ({"tools": [WEATHER, WEATHER]}, 400, "tools", "one name"),
        ({"tool_choice": "required"}, 400, "tool_choice", "no tools"),
        ({"tools": [{"type": "web_search"}]}, 400, "tools[0].type", "'function'"),
        ({"response_format": {"type": "json_schema"}}, 400, "response_format", "json_schema.schema"),
        ({"response_format": FOREIGN}, 400, None, "only what is in the schema"),
        ({"tools": [WEATHER], "tool_choice": "any"}, 400, "tool_choice", "'none', 'auto' or 'required'"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function"}}, 400, "tool_choice.function", "missing"),
        ({"tools": [WEATHER], "tool_choice": NAMED}, 400, "tool_choice", "no tool 'x'"),
        ({"chat_template_kwargs": {"nothing": 1}}, 400, "chat_template_kwargs", "no variable 'nothing'"),
        ({"chat_template_kwargs": {"messages": []}}, 400, "chat_template_kwargs", "'messages' cannot be set"),
        ({"reasoning_effort": "high"}, 400, "reasoning_effort", "no effect on this model"),
        ({"store": True}, 400, "store", "False"),
        ({"functions": []}, 400, "functions", "does not know"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("is_stream", [False, True])
def test_requests_that_are_refused(
    talker: httpx.Client, is_stream: bool, fields: dict[str, Any], status: int, param: str | None, message: str
) -> None:
    body = {"messages": HELLO, **fields} | ({"stream": True} if is_stream and "stream_options" not in fields else {})
    answer = talker.post("/v1/chat/completions", json=body)
    error = error_of(answer)
    assert (answer.status_code, error["param"]) == (status, param)
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON"),
        (b'{"prompt": ', "not JSON"),
        (b"[1]", "must be a JSON object"),
        (b'{"prompt": "x", "top_p": NaN}', "NaN is no number"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"metadata": ' + b'{"a":' * 200 + b"1" + b"}" * 201, "deeper than 100"),
        (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "deeper than 100"),
        (b'{"prompt": ""}', None),
        (b'{"prompt": []}', "at least 1"),
        (b'{"prompt": [[]]}', "empty"),
        (b'{"prompt": [[-1]]}', "whole numbers from 0 on"),
        (b'{"prompt": [99999]}', "none with the id 99999"),
        (b'{"prompt": "x", "suffix": "y"}', "suffix"),
        (b'{"prompt": "x", "best_of": 3}', "best_of"),
        (b'{"prompt": "x", "seed": 99999999999999999999}', "seed"),
        (b'{"prompt": "a\\u0000b", "max_tokens": 1}', None),
    ],
)
def test_bodies_that_are_refused(talker: httpx.Client, body: bytes, message: str | None) -> None:
    answer = talker.post("/v1/completions", content=body)
    if message is None:
        assert answer.status_code == 200
    else:
        assert answer.status_code == 400
        assert message in error_of(answer)["message"]


def test_paths_methods_and_sizes(talker: httpx.Client) -> None:
    for answer, status in (
        (talker.get("/v1/files"), 404),
        (talker.get("/v1/../../etc/passwd"), 404),
        (talker.get("/v1/chat/completions"), 405),
        (talker.post("/v1/completions", content=b" " * (MAX_BODY_BYTES + 1)), 413),
        (talker.post("/v1/completions", content=(b" " * 1000_000 for _ in range(9))), 413),
        (talker.get("/health", headers={"X-Long": "x" * 40_000}), 431),
    ):
        assert answer.status_code == status
        error_of(answer)


@pytest.fixture(scope="module")
def endless(talker_path: Path) -> Iterator[httpx.Client]:
    """A server whose answer to " on" never ends, and that takes on two answers."""
    context = ContextOptions(n_threads=1, overflow="shift")
    with serving(loading(talker_path, context), ServerOptions(port=0, queue=2)) as (client, _):
        yield client


ENDLESS = {"prompt": " on", "max_tokens": -1, "temperature": 0}


def n_under_way(client: httpx.Client) -> int:
    found = re.search(r"^ggufmoe_answers_under_way (\d+)$", client.get("/metrics").text, re.MULTILINE)
    assert found is not None
    return int(found[1])


def wait_until_free(client: httpx.Client) -> None:
    end = time.monotonic() + 60
    while n_under_way(client):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_full_queue_and_clients_that_leave(endless: httpx.Client) -> None:
    with endless.stream("POST", "/v1/completions", json={**ENDLESS, "stream": True}) as answer:
        lines = answer.iter_lines()  # the answer is closed with it
        assert next(lines).startswith("data: {")
        assert n_under_way(endless) == 1
        refused = endless.post("/v1/completions", json={**ENDLESS, "n": 2})
        assert next(lines) == ""
        assert (refused.status_code, error_of(refused)["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) > 0
        assert error_of(refused)["type"] == "rate_limit_error"
    wait_until_free(endless)
    with pytest.raises(httpx.ReadTimeout):
        endless.post("/v1/completions", json=ENDLESS, timeout=0.1)
    wait_until_free(endless)
    assert endless.post("/v1/completions", json={**ENDLESS, "n": 2, "max_tokens": 5}).status_code == 200


def test_an_answer_that_takes_too_long(talker_path: Path) -> None:
    load = loading(talker_path, ContextOptions(n_threads=1, overflow="shift"))
    body = {**ENDLESS, "stream": True}
    with (
        serving(load, ServerOptions(port=0, timeout=1)) as (client, _),
        client.stream("POST", "/v1/completions", json=body) as answer,
    ):
        whole = client.post("/v1/completions", json=ENDLESS)
        *_, last = filter(None, answer.iter_lines())
    assert "--timeout" in json.loads(last.removeprefix("data: "))["error"]["message"]
    assert whole.status_code == 504
    assert error_of(whole)["type"] == "server_error"


def test_connections_with_half_a_request_are_closed(talker_path: Path) -> None:
    with serving(loading(talker_path), idle_s=0.1) as (client, _):
        address = (client.base_url.host, client.base_url.port or 0)
        for sent in (b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /he"):
            with socket.create_connection(address, timeout=10) as connection:
                connection.sendall(sent)
                while connection.recv(4096):
                    pass


# ---- who may ask


def test_hosts_and_origins(talker_path: Path) -> None:
    options = ServerOptions(port=0, cors_origin=("https://chat.example",), allowed_host=("proxy.example",))
    with serving(loading(talker_path), options) as (client, _):

        def status(**headers: str) -> int:
            return client.get("/v1/models", headers=headers).status_code

        assert status() == status(host="localhost:8080") == status(host="[::1]") == status(host="proxy.example") == 200
        for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", "[", "a" * 9000):
            assert status(host=host) == 403
        assert status(origin="https://evil.example") == status(origin="null") == 403
        assert status(origin=str(client.base_url).rstrip("/")) == 200
        allowed = client.get("/v1/models", headers={"origin": "https://chat.example"})
        assert allowed.headers["access-control-allow-origin"] == "https://chat.example"
        asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        assert client.options("/v1/models", headers={"origin": "https://chat.example", **asked}).status_code == 200
        assert client.options("/v1/models", headers={"origin": "https://evil.example", **asked}).status_code == 400


def test_keys(talker_path: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("first\n\n  second  \n", encoding="utf-8")
    with serving(loading(talker_path), ServerOptions(port=0, api_key_file=keys)) as (client, _):
        assert client.get("/health").status_code == 200
        for given in (None, "Bearer wrong", "Basic first", "first", "Bearer", "Bearer f\u00efrst"):
            headers = {} if given is None else {b"authorization": given.encode("latin-1")}
            answer = client.get("/v1/models", headers=headers)
            assert (answer.status_code, error_of(answer)["code"]) == (401, "invalid_api_key")
        for key in ("first", "second"):
            assert client.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200


def test_addresses_and_keys_that_are_refused(tmp_path: Path) -> None:
    for address in ("0.0.0.0", "192.168.1.5", "::", "fe80::1%eth0"):
        with pytest.raises(OptionError, match="other machines can reach"):
            check_exposure(ServerOptions(host=address), [address], [])
        check_exposure(ServerOptions(host=address), [address], ["key"])
        check_exposure(ServerOptions(host=address, no_api_key=True), [address], [])
    check_exposure(ServerOptions(), ["127.0.0.1", "::1"], [])
    with pytest.raises(InputError, match="cannot be read"):
        read_keys(ServerOptions(api_key_file=tmp_path / "none"))
    (tmp_path / "empty").touch()
    with pytest.raises(OptionError, match="holds no key"):
        read_keys(ServerOptions(api_key_file=tmp_path / "empty"))
    for wrong in ({"api_key": "a", "api_key_file": tmp_path}, {"api_key": " "}, {"cors_origin": ("*",)}, {"host": ""}):
        with pytest.raises(OptionError):
            ServerOptions(**wrong)


def test_an_address_that_is_taken_or_none(talker: httpx.Client) -> None:
    host = ModelHost(lambda on_progress, cancel: pytest.fail("nothing is loaded"))
    with pytest.raises(OptionError, match="cannot listen there"):
        HttpServer(host, "x", ServerOptions(port=talker.base_url.port or 0))
    with pytest.raises(OptionError, match="not an address"):
        HttpServer(host, "x", ServerOptions(host="no-such-host.invalid"))


# ---- the model's life


def test_a_model_that_is_being_loaded_and_one_that_is_lost(talker_path: Path) -> None:
    may_load, n_loads = threading.Event(), 0

    def load(on_progress: OnProgress, cancel: threading.Event) -> Engine:
        nonlocal n_loads
        n_loads += 1
        assert may_load.wait(10)
        return loading(talker_path)(on_progress, cancel)

    with serving(load, wait=False) as (client, host):

        def health_becomes(status: str) -> dict[str, Any]:
            end = time.monotonic() + 60
            while (body := client.get("/health").json())["status"] != status:
                assert time.monotonic() < end
                time.sleep(0.01)
            return dict(body)

        health_becomes("loading")
        refused = client.post("/v1/completions", json={"prompt": " hello"})
        assert (refused.status_code, error_of(refused)["message"]) == (503, "the model is being loaded")
        assert "retry-after" in refused.headers
        assert client.get("/v1/models").json()["data"][0]["id"] == "talker"
        may_load.set()
        health_becomes("ok")
        may_load.clear()
        host.check(host.served().engine, InputError("not a loss"))
        assert client.get("/health").status_code == 200
        host.check(host.served().engine, EngineLostError("llama.cpp has given up: an assertion"))
        lost = health_becomes("reloading")
        assert "an assertion" in lost["reason"]
        refused = client.post("/v1/completions", json={"prompt": " hello"})
        assert (refused.status_code, "an assertion" in error_of(refused)["message"]) == (503, True)
        may_load.set()
        health_becomes("ok")
        host.served().engine.close()  # as when its process ends
        health_becomes("ok")
        assert client.post("/v1/completions", json={"prompt": " hello"}).status_code == 200
    assert n_loads == 3


@pytest.mark.parametrize("is_stream", [False, True])
def test_an_engine_that_is_lost_within_an_answer(talker_path: Path, is_stream: bool) -> None:
    class Losing(Engine):
        def generate(self, *arguments: Any, **keywords: Any) -> Iterator[Event]:
            if is_stream:
                yield Token(" Hello", 5)
            raise EngineLostError("llama.cpp has given up: an assertion")

    kinds = [Losing, Engine]

    def load(on_progress: OnProgress, cancel: threading.Event) -> Engine:
        return kinds.pop(0)(talker_path, ONE_THREAD, on_progress=on_progress, cancel=cancel)

    with serving(load) as (client, host):
        body = {"messages": HELLO, "stream": is_stream}
        answer = client.post("/v1/chat/completions", json=body)
        lines = answer.text.strip().split("\n\n")
        error = json.loads(lines[-1].removeprefix("data: "))["error"]
        assert answer.status_code == (200 if is_stream else 503)
        assert "an assertion" in error["message"]
        end = time.monotonic() + 60
        while client.get("/health").status_code != 200:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert host.n_reloads == 1
        assert "ggufmoe_reloads_total 1" in client.get("/metrics").text
        assert client.post("/v1/chat/completions", json={"messages": HELLO}).status_code == 200


def test_a_model_that_cannot_be_loaded_ends_the_server(talker_path: Path) -> None:
    def load(on_progress: OnProgress, cancel: threading.Event) -> Engine:
        raise ModelLoadError("no memory")

    host = ModelHost(load)
    with pytest.raises(ModelLoadError, match="no memory"):
        HttpServer(host, "x", ServerOptions(port=0)).run(threading.Event())


def test_the_end_cuts_answers_off_that_do_not_end(talker_path: Path) -> None:
    context = ContextOptions(n_threads=1, overflow="shift")
    began = time.monotonic()
    with serving(loading(talker_path, context)) as (client, _):
        answer = client.send(
            client.build_request("POST", "/v1/completions", json={**ENDLESS, "stream": True}), stream=True
        )
        lines = answer.iter_lines()
        assert next(lines)
    answer.close()
    assert time.monotonic() - began < 60  # and not for ever
