"""Fixtures of the runtime: scripted models, written and loaded once for the session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from ggufmoe import ContextOptions, Engine, SamplingOptions
from tests.runtime.scripted import Scripted

GREEDY = SamplingOptions(temperature=0)
ONE_THREAD = ContextOptions(n_threads=1)

STORY = Scripted(
    {
        " once": " upon",
        " upon": " a",
        " a": " time",
        " smile": "<0xF0>",
        "<0xF0>": "<0x9F>",
        "<0x9F>": "<0x98>",
        "<0x98>": "<0x80>",
        " cut": "<0xE2>",
        " on": " on",
        " dice": {" one": 20.0, " two": 20.0, " three": 20.0},
    },
)
"""Says " once upon a time", a smile (a character in four tokens), half a character, " on" for ever, or throws dice."""


@pytest.fixture(scope="session")
def write_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Scripted], Path]:
    """Writes a scripted model into a folder of its own."""
    return lambda spec: spec.write(tmp_path_factory.mktemp("model") / "scripted.gguf")


@pytest.fixture(scope="session")
def story_path(write_model: Callable[[Scripted], Path]) -> Path:
    return write_model(STORY)


@pytest.fixture(scope="module")
def story(story_path: Path) -> Iterator[Engine]:
    """An engine with ``STORY``, shared by the tests of a module."""
    with Engine(story_path, ONE_THREAD) as engine:
        yield engine


@pytest.fixture(scope="session")
def mixing_path(write_model: Callable[[Scripted], Path]) -> Path:
    """A model with random layers: what it says depends on all of the text before."""
    words = [f" w{i}" for i in range(30)]
    random = np.random.default_rng(5)
    everything = Scripted(pieces=words).vocab
    follows = {piece: dict(zip(words, random.normal(0, 9, len(words)).tolist(), strict=True)) for piece in everything}
    return write_model(Scripted(follows, random_layers=True))
