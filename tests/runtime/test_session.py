"""KV caches on disk: a round trip, and every file that must be refused."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ggufmoe import ContextFullError, ContextOptions, Engine, EngineError, InputError, OutputError
from tests.runtime.test_engine import last_of, text_of
from tests.scripted import Scripted
from tests.stories import GREEDY, ONE_THREAD, STORY

SHORT = replace(GREEDY, n_predict=6)


@pytest.fixture
def engine(mixing_path: Path) -> Iterator[Engine]:
    with Engine(mixing_path, ONE_THREAD) as engine:
        yield engine


@pytest.fixture
def saved(engine: Engine, tmp_path: Path) -> Path:
    path = tmp_path / "talk.session"
    assert engine.save_session(path, engine.tokenize(" w1 w2 w3 w4"), note="a note") == 5
    return path


def test_a_session_is_gone_on_with(saved: Path, engine: Engine, mixing_path: Path) -> None:
    longer = engine.tokenize(" w1 w2 w3 w4 w5")
    expected = text_of(engine.generate(longer, SHORT))
    with Engine(mixing_path, ContextOptions(n_ctx=256, n_threads=1)) as other:
        assert other.load_session(saved) == (tuple(longer[:-1]), "a note")
        assert other.cached_tokens == tuple(longer[:-1])
        events = list(other.generate(longer, SHORT))
    assert "".join(event.text for event in events) == expected
    assert last_of(iter(events)).timing.cached_tokens == 5
    assert list(saved.parent.iterdir()) == [saved]


def test_nothing_to_keep(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="nothing has been computed"):
        engine.save_session(tmp_path / "x")
    with pytest.raises(OutputError, match="the session cannot be written"):
        engine.save_session(tmp_path / "no" / "x", engine.tokenize(" w1"))


def test_another_model_or_cache(saved: Path, mixing_path: Path, write_model: Callable[[Scripted], Path]) -> None:
    with Engine(write_model(STORY), ONE_THREAD) as other, pytest.raises(InputError, match=r"of another model$"):
        other.load_session(saved)
    options = ContextOptions(n_threads=1, cache_type_k="f32")
    with Engine(mixing_path, options) as other, pytest.raises(InputError, match=r"another --cache-type-k \('f16'"):
        other.load_session(saved)


def test_a_context_that_is_too_small(engine: Engine, mixing_path: Path, tmp_path: Path) -> None:
    engine.save_session(tmp_path / "long", engine.tokenize(" w1" * 300))
    small = ContextOptions(n_ctx=256, n_threads=1)
    with Engine(mixing_path, small) as other, pytest.raises(ContextFullError, match="301 tokens and the context"):
        other.load_session(tmp_path / "long")


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    n = struct.unpack_from("<I", data, 12)[0]
    return json.loads(data[16 : 16 + n]), data[16 + n :]


def forge(path: Path, header: dict[str, Any], body: bytes) -> None:
    """A file whose checksum is right."""
    encoded = json.dumps({**header, "sha256": hashlib.sha256(body).hexdigest()}).encode()
    path.write_bytes(struct.pack("<8sII", b"GGMOESES", 1, len(encoded)) + encoded + body)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda data: b"", "does not begin like one"),
        (lambda data: b"GGUF" + data[4:], "does not begin like one"),
        (lambda data: data[:8] + b"\2" + data[9:], "has version 2"),
        (lambda data: data[:12] + b"\xff\xff\xff\xff" + data[16:], "header is too long"),
        (lambda data: data[:20] + b"\xff" + data[21:], "header is damaged"),
        (lambda data: data[:-1], "longer or shorter"),
        (lambda data: data + b"x", "longer or shorter"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "checksum is wrong"),
    ],
)
def test_damaged_files(saved: Path, engine: Engine, change: Callable[[bytes], bytes], why: str) -> None:
    saved.write_bytes(change(saved.read_bytes()))
    with pytest.raises(InputError, match=why):
        engine.load_session(saved)


@pytest.mark.parametrize(("word", "value"), [(0, 9), (1, 1), (2, 7), (3, 99999), (4, -5), (5, 3)])
def test_a_forged_state_with_a_right_checksum(saved: Path, engine: Engine, word: int, value: int) -> None:
    header, body = parts(saved)
    words = np.frombuffer(body, "<i4").copy()
    words[header["n_tokens"] + word] = value
    forge(saved, header, words.tobytes())
    with pytest.raises((InputError, EngineError)):
        engine.load_session(saved)
    assert last_of(engine.generate(engine.tokenize(" w1"), SHORT)).timing.generated_tokens == 6


def test_forged_tokens_and_sizes(saved: Path, engine: Engine) -> None:
    header, body = parts(saved)
    forge(saved, header, struct.pack("<i", 10**6) + body[4:])
    with pytest.raises(InputError, match="is not a token"):
        engine.load_session(saved)
    for name, value in (("n_tokens", 0), ("n_tokens", "5"), ("state_bytes", -1), ("state_bytes", 2**60)):
        forge(saved, {**header, name: value}, body)
        with pytest.raises(InputError, match=r"header is damaged|longer or shorter"):
            engine.load_session(saved)


def test_rows_of_another_size(saved: Path, engine: Engine) -> None:
    header, body = parts(saved)
    n = header["state_bytes"]
    forge(saved, {**header, "state_bytes": n - 64}, body[:-64])
    with pytest.raises(EngineError, match="does not take the state"):
        engine.load_session(saved)
    assert engine.cached_tokens == ()
