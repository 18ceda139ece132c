"""Ranges of one file of the hub, read through huggingface_hub from a hub of our own with the faults of networks."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import COMMIT, HubServer

from ggufmoe.errors import Cancelled, HubError
from ggufmoe.hub import hub_file, hub_http
from ggufmoe.hub.hub_file import HubFile, Line
from tests.own_hub import talk_with_hub

CONTENT = bytes(range(256)) * 2000
SOMETIMES = 0.2
"""Of 64 answers some are wrong, and nowhere eight in a row, whatever is drawn: 6e-7 and 2e-4 are the chances."""
SESSION: Any = importlib.import_module(type(hub_http._session()).__module__.partition(".")[0])
"""The HTTP library of the installed huggingface_hub: requests before its version 1, then httpx."""
NAME = "model.safetensors"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    (tmp_path / NAME).write_bytes(CONTENT)
    with HubServer({"org/tiny": tmp_path}) as running:
        talk_with_hub(running.url, monkeypatch)
        yield running


def opened() -> HubFile:
    return HubFile("org/tiny", NAME, COMMIT, Line(first_pause_s=0))


def read(file: HubFile, begin: int = 0, end: int = len(CONTENT)) -> bytes:
    buffer = bytearray(end - begin)
    file.read_into(begin, memoryview(buffer))
    return bytes(buffer)


def test_any_range_is_read_and_nothing_else_is_sent(hub: HubServer) -> None:
    file = opened()
    assert (file.n_bytes, str(file.path)) == (len(CONTENT), str(Path("org/tiny", NAME)))
    assert read(file, 1000, 5000) == CONTENT[1000:5000]
    assert read(file, len(CONTENT) - 1) == CONTENT[-1:]
    assert hub.sent_bytes == 4001
    with pytest.raises(HubError, match="its header says more"):
        read(file, 1, len(CONTENT) + 1)


def test_the_token_goes_to_the_hub_alone(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.models["org/tiny"].is_gated = True
    assert read(opened()) == CONTENT
    assert hub.authorizations == [(NAME, None)]


def through_proxy(url: str) -> Any:
    """A session of the HTTP library that sends all requests to a proxy."""
    if SESSION.__name__ != "requests":
        return SESSION.Client(proxy=url)
    session = SESSION.Session()
    session.proxies = {"http": url}
    return session


@pytest.fixture(params=["session", "direct"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How ranges are asked for: through the HTTP library, or on its connections directly, as large ranges are."""
    monkeypatch.setattr(hub_http, "_DIRECT_BYTES", 1000 if request.param == "direct" else 1 << 40)
    return str(request.param)


@pytest.mark.parametrize("fault", ["resets", "truncations"])
def test_a_body_that_breaks_off_goes_on_where_it_stopped(hub: HubServer, fault: str, way: str) -> None:
    setattr(hub.faults, fault, 0.7)
    file = opened()
    for _ in range(20):  # one of them breaks off, whatever is drawn
        hub.sent.clear()
        n_before = file._line.n_bytes
        assert read(file) == CONTENT
        sent = [one for one in hub.sent if one.end - one.begin > 1]  # one byte is asked for where a connection begins
        if len(sent) > 1:
            break
    assert len(sent) > 1, "all answers were whole"
    assert sent[0].n_bytes < len(CONTENT)
    begins = [one.begin for one in sent]
    assert begins == sorted(begins)
    assert all(one.end == len(CONTENT) for one in sent)
    n_bytes = file._line.n_bytes - n_before
    assert len(CONTENT) <= n_bytes <= len(CONTENT) + len(hub.sent) - len(sent), "a byte came twice"


def test_connections_are_used_again_and_may_end_meanwhile(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_http, "_DIRECT_BYTES", 1000)
    file = opened()
    ranges = [(begin, begin + 5000) for begin in range(0, 50_000, 5000)]
    assert b"".join(read(file, *one) for one in ranges) == CONTENT[:50_000]
    taken = [] if SESSION.__name__ == "requests" else [(0, 1)]  # one byte where a connection is taken from httpx
    assert [(one.begin, one.end) for one in hub.sent] == [*taken, *ranges], "one connection for all"
    hub.close_connections()
    assert read(file, 1000, 9000) == CONTENT[1000:9000]
    assert [(one.begin, one.end) for one in hub.sent[-len(taken) - 1 :]] == [*taken, (1000, 9000)]
    file.close()
    if taken:  # requests keeps its connections for whoever asks next
        hub.wait_for_no_connections()
    assert read(file, 0, 9000) == CONTENT[:9000], "a closed file opens a connection again"


def test_a_connection_to_a_proxy_is_left_to_the_http_library(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests to a proxy name the whole address, unless it is a tunnel for TLS."""
    monkeypatch.setattr(hub_http, "_DIRECT_BYTES", 1000)
    location = opened()._location.url
    with through_proxy(hub.storage_url) as session:
        monkeypatch.setattr(hub_http, "_session", lambda: session)
        received: list[int] = []
        client = hub_http.RangeClient(received.append)
        url = location.replace(hub.storage_url, "http://storage.invalid")
        with client.asked_for(url, {}, 10, 5010) as answer:
            buffer = bytearray(5000)
            done = 0
            while n_bytes := answer.read_into(memoryview(buffer)[done:]):
                done += n_bytes
    assert (answer.status, bytes(buffer)) == (206, CONTENT[10:5010])
    assert not client._idle


@pytest.mark.parametrize(("fault", "status"), [("busy", 503), ("limited", 429)])
def test_a_busy_hub_is_asked_again(hub: HubServer, fault: str, status: int, way: str) -> None:
    hub.faults.retry_after = 0
    setattr(hub.faults, fault, SOMETIMES)
    file = opened()
    assert b"".join(read(file, begin, begin + 8000) for begin in range(0, len(CONTENT), 8000)) == CONTENT
    assert hub.statuses[status] > 0


def test_an_answer_of_another_range_is_not_taken(hub: HubServer, way: str) -> None:
    hub.faults.wrong_ranges = SOMETIMES
    file = opened()
    assert b"".join(read(file, begin, begin + 8000) for begin in range(0, len(CONTENT), 8000)) == CONTENT
    assert any(one.begin % 8000 for one in hub.sent), "no answer was wrong"


def test_an_address_that_has_ended_is_renewed(hub: HubServer) -> None:
    file = opened()
    assert read(file, 0, 10) == CONTENT[:10]
    hub.end_addresses()
    assert read(file, 10, 20) == CONTENT[10:20]
    assert (hub.statuses[403], hub.statuses[302]) == (1, 2)


def test_a_file_that_changes_is_an_error(hub: HubServer, tmp_path: Path) -> None:
    file = opened()
    assert read(file, 0, 10) == CONTENT[:10]
    os.utime(tmp_path / NAME, ns=(1, 1))  # its ETag becomes another one
    with pytest.raises(
        HubError, match=r"org.tiny.model\.safetensors has changed on the hub .* its content is another one"
    ):
        read(file, 10, 20)
    (tmp_path / NAME).write_bytes(CONTENT + b"more")
    with pytest.raises(HubError, match=rf"it has {len(CONTENT) + 4} bytes now, not {len(CONTENT)}"):
        read(file, 10, 20)
    (tmp_path / NAME).write_bytes(CONTENT[:5])
    with pytest.raises(HubError, match="it is shorter now"):
        read(file, 10, 20)


def test_what_never_comes_is_given_up(hub: HubServer) -> None:
    file = opened()
    hub.faults.busy = 1.0
    with pytest.raises(HubError, match=r"8 times in a row \(the hub answers with status 503\); .* go on with --resume"):
        read(file)
    assert hub.statuses[503] == hub_file.TRIES
    hub.__exit__()
    with pytest.raises(HubError, match="8 times in a row"):
        read(file)


def test_reading_ends_when_the_conversion_stops(hub: HubServer) -> None:
    file = opened()
    file._line.stopped = lambda: True
    with pytest.raises(Cancelled):
        read(file)
    assert hub.sent == []


def test_after_too_many_requests_no_connection_asks_before_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now, pauses = [100.0], []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        now[0] += seconds

    monkeypatch.setattr("ggufmoe.hub.hub_file.time.monotonic", lambda: now[0])
    monkeypatch.setattr("ggufmoe.hub.hub_file.time.sleep", sleep)
    line = Line()
    line.be_quiet(7)
    line.be_quiet(3)
    line.wait_until_allowed()
    assert now[0] == pytest.approx(107)
    assert max(pauses) <= 0.1, "it would not notice that the conversion stops"
