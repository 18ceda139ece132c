"""Answers that were recorded of huggingface.co: ours understand them, and the hub of our own gives the same ones.

``fixtures/README.md`` says where each is from.
"""

from __future__ import annotations

import http.client
import importlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import pytest
from hub_server import Faults, HubServer, Model

from ggufmoe.errors import HubError
from ggufmoe.hub import hub_http
from ggufmoe.hub.hub_errors import explained, hub_failures
from ggufmoe.hub.hub_file import HubFile, Line, seconds_to_wait
from ggufmoe.hub.hub_models import list_repository

GPT2 = "openai-community/gpt2"
COMMIT = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
INFRASTRUCTURE = re.compile(
    r"access-control-.*|x-amz-.*|date|vary|via|x-cache|x-hub-cache|x-powered-by|x-request-id|cross-origin-opener-policy"
    r"|referrer-policy|content-security-policy"
)
"""Headers that say nothing about the model."""
OF_ERROR_BODY = ("etag",)
XET = ("x-xet-hash", "link", "xetHash")
"""The hub of our own does not serve through Xet."""
OF_CONTENT = ("tags", "pipeline_tag", "library_name", "cardData", "config", "transformersInfo", "safetensors", "spaces")
"""What the real hub finds out from a model's files; nobody here reads it."""
FORMS = {
    "commit or blob": r'"?[0-9a-f]{40}"?',
    "SHA-256": r'"?[0-9a-f]{64}"?',
    "number": r"\d+",
    "address": r"https?://.*",
    "path of the hub": r"/api/resolve-cache/models/[^/]+/[^/]+/[0-9a-f]{40}/[^/]+\?.*&etag=%22[0-9a-f]{40}%22",
    "range": r"bytes \d+-\d+/\d+",
    "rate": r'"\w+";r=\d+;t=\d+',
    "policy": r'"fixed window";"\w+";q=\d+;w=\d+',
    "date": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z",
}


def recorded(name: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads((Path(__file__).parent / "fixtures" / f"{name}.json").read_text())
    return answer


def form(value: str) -> str:
    """Which kind of word it is; a word of no kind stands for itself, without the names in it."""
    found = next((kind for kind, pattern in FORMS.items() if re.fullmatch(pattern, value)), None)
    return found or re.sub(r"https?://\S+|\S+/\S+[^.\s]|\S+\.(json|md)\b\S*|webai\S+|nonsense", "NAME", value)


def shape(value: Any, key: str = "") -> Any:
    """The keys and kinds of JSON; of a list the different kinds of its items."""
    if isinstance(value, dict):
        return {name: shape(one, name) for name, one in value.items() if name not in (*XET, *OF_CONTENT)}
    if isinstance(value, list):
        return sorted({json.dumps(shape(one), sort_keys=True) for one in value})
    if isinstance(value, str):
        found = form(value)
        return found if key in ("error", "type") or found in FORMS else "text"
    return type(value).__name__


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    directory = tmp_path_factory.mktemp("gpt2")
    (directory / "onnx").mkdir()
    for name in ("config.json", "README.md", "onnx/config.json"):
        (directory / name).write_text("{}")
    (directory / "model.safetensors").write_bytes(bytes(range(100)))
    models = {GPT2: Model(directory, commit=COMMIT), "org/gated": Model(directory, is_gated=True, tokens=["friend"])}
    with HubServer(models) as running:
        yield running


def asked(hub: HubServer, method: str, address: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """The answer of the hub of our own, or of its storage, to one request."""
    place = urlsplit(address)
    connection = http.client.HTTPConnection(place.netloc or urlsplit(hub.url).netloc)
    connection.request(method, f"{place.path}?{place.query}" if place.query else place.path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, body


SAME = {
    "small_file": ("HEAD", f"/{GPT2}/resolve/main/config.json", {}),
    "small_file_redirected": ("HEAD", f"/api/resolve-cache/models/{GPT2}/{COMMIT}/config.json", {}),
    "small_file_in_full": ("HEAD", f"/{GPT2}/resolve/main/README.md", {}),
    "large_file": ("HEAD", f"/{GPT2}/resolve/main/model.safetensors", {}),
    "model_info": ("GET", f"/api/models/{GPT2}?blobs=true", {}),
    "tree": ("GET", f"/api/models/{GPT2}/tree/main?recursive=true", {}),
    "gated_without_token": ("HEAD", "/org/gated/resolve/main/config.json", {}),
    "gated_not_authorized": ("HEAD", "/org/gated/resolve/main/config.json", {"Authorization": "Bearer stranger"}),
    "repository_with_token": ("GET", "/api/models/org/absent", {}),
    "revision": ("GET", f"/api/models/{GPT2}/revision/nonsense", {}),
    "entry": ("HEAD", f"/{GPT2}/resolve/main/absent.json", {}),
}


def assert_same(name: str, found: tuple[int, dict[str, str], bytes]) -> None:
    expected = recorded(name)
    status, headers, body = found
    left_out = (*XET, *(OF_ERROR_BODY if status >= 400 else ()))
    wanted = {
        key: form(value)
        for key, value in expected["headers"].items()
        if not INFRASTRUCTURE.fullmatch(key) and key not in left_out
    }
    assert status == expected["status"]
    assert {key: form(headers.get(key, "")) for key in wanted} == wanted
    if "body" in expected:
        assert shape(json.loads(body)) == shape(expected["body"])


@pytest.mark.parametrize("name", SAME)
def test_the_hub_of_our_own_answers_as_the_real_one(hub: HubServer, name: str) -> None:
    method, address, headers = SAME[name]
    assert_same(name, asked(hub, method, address, **headers))


def test_the_storage_of_our_own_answers_as_the_real_one(hub: HubServer) -> None:
    _, headers, _ = asked(hub, "HEAD", f"/{GPT2}/resolve/main/model.safetensors")
    found = asked(hub, "GET", headers["location"], Range="bytes=0-9")
    assert_same("range", found)
    assert found[2] == bytes(range(10))
    assert found[1]["etag"] != headers["x-linked-etag"], "the storage has a word of its own"


def test_too_many_requests_are_answered_as_by_the_real_one(tmp_path: Path) -> None:
    with HubServer({GPT2: tmp_path}, Faults(hub_limited=1.0)) as hub:
        assert_same("too_many_requests", asked(hub, "GET", f"/api/models/{GPT2}"))


Replay = Callable[..., list[str]]


@pytest.fixture
def replay(monkeypatch: pytest.MonkeyPatch) -> Iterator[Replay]:
    """Lets the real huggingface_hub get recorded answers, one after the other; returns what it asks for meanwhile."""
    import huggingface_hub

    library: Any = importlib.import_module(type(hub_http._session()).__module__.partition(".")[0])
    if library.__name__ == "requests":
        pytest.skip("recordings are replayed through the transport of httpx, which this huggingface_hub does not use")
    from huggingface_hub.utils import _http

    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://huggingface.co")
    own = cast("Any", _http)._GLOBAL_CLIENT_FACTORY

    def start(*names: str, content: bytes = b"") -> list[str]:
        answers, requests = [recorded(name) for name in names], []

        def answered(request: Any) -> Any:
            if not re.search(f"{GPT2}|org/model|xet-bridge", str(request.url)):
                return library.Response(404)  # what huggingface_hub asks for once about itself
            requests.append(str(request.url))
            answer = answers.pop(0)
            body = json.dumps(answer["body"]).encode() if "body" in answer else content
            headers = dict(answer["headers"])
            if request.method == "GET":
                headers["content-length"] = str(len(body))
            stream = library.ByteStream(body if request.method == "GET" else b"")
            return library.Response(answer["status"], headers=headers, stream=stream)

        set_factory: Any = huggingface_hub.set_client_factory
        set_factory(lambda: library.Client(transport=library.MockTransport(answered)))
        return requests

    yield start
    cast("Any", huggingface_hub).set_client_factory(own)


class PatientLine(Line):
    """A line that writes down how long it was told to be quiet, and is not."""

    def __init__(self) -> None:
        super().__init__(first_pause_s=0)
        self.told: list[float] = []

    def be_quiet(self, seconds: float) -> None:
        self.told.append(seconds)


def test_a_large_file_is_read_from_where_the_hub_says(replay: Replay) -> None:
    requests = replay("large_file", "range", content=bytes(range(100)))
    file = HubFile(GPT2, "model.safetensors", COMMIT, Line(first_pause_s=0))
    assert (file.n_bytes, file.etag) == (548105171, "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707")
    buffer = bytearray(100)
    file.read_into(0, memoryview(buffer))
    assert buffer == bytes(range(100))
    assert [urlsplit(url).netloc for url in requests] == ["huggingface.co", "us.aws.cdn.hf.co"]


def test_a_small_file_is_where_the_hub_redirects_to(replay: Replay) -> None:
    requests = replay("small_file", "small_file_redirected")
    file = HubFile(GPT2, "config.json", COMMIT, Line(first_pause_s=0))
    assert (file.n_bytes, file.etag) == (665, "10c66461e4c109db5a2196bff4bb59be30396ed8")
    assert urlsplit(requests[1]).path.startswith("/api/resolve-cache/")


def test_a_model_is_listed(replay: Replay) -> None:
    replay("model_info")
    found = list_repository(GPT2)
    sha256 = "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"
    assert found.commit == COMMIT
    assert [(one.name, one.n_bytes, one.sha256) for one in found.entries] == [
        ("config.json", 665, None),
        ("model.safetensors", 548105171, sha256),
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gated_without_token", "org/model is gated: accept its licence on https://huggingface.co/org/model and set a"),
        (
            "gated_not_authorized",
            "org/model is gated: accept its licence on https://huggingface.co/org/model and set a",
        ),
        (
            "repository_without_token",
            "org/model is neither a local directory nor a public model on https://huggingface",
        ),
        (
            "repository_with_token",
            "org/model is neither a local directory nor a public model on https://huggingface.co",
        ),
        ("revision", "org/model: there is no such revision; https://huggingface.co/org/model lists branches and tags"),
    ],
)
def test_what_the_hub_refuses_is_one_line(replay: Replay, name: str, message: str) -> None:
    replay(name, name)
    with pytest.raises(HubError) as of_list:
        list_repository("org/model")
    with pytest.raises(hub_failures()) as of_file:
        HubFile("org/model", "config.json", "main", Line())
    for said in (str(of_list.value), str(explained("org/model", "org/model", of_file.value))):
        assert said.startswith(message)
        assert "\n" not in said


def test_a_list_is_not_waited_for(replay: Replay) -> None:
    replay("too_many_requests")
    with pytest.raises(
        HubError, match=r"https://huggingface\.co had too many requests from here \(status 429\); try again"
    ):
        list_repository("org/model")


def test_a_hub_with_too_many_requests_is_asked_again_when_it_says(replay: Replay) -> None:
    replay("too_many_requests", "large_file")
    line = PatientLine()
    assert HubFile(GPT2, "model.safetensors", COMMIT, line).n_bytes == 548105171
    assert line.told == [55.0]


def test_how_long_a_busy_hub_wants_to_be_left_alone() -> None:
    assert seconds_to_wait(recorded("too_many_requests")["headers"]) == 55
    assert seconds_to_wait(recorded("gated_without_token")["headers"]) == 0, "requests are left"
    assert seconds_to_wait({"Retry-After": "7", "RateLimit": '"resolvers";r=0;t=3'}) == 7
    assert seconds_to_wait({"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}) == 0
