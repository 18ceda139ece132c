"""Fixtures for all tests: tiny checkpoints, made once per distinct specification."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ggufmoe import Engine
from tests import tiny
from tests.scripted import Scripted
from tests.stories import ONE_THREAD, STORY


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Caches and stored models are this session's alone, in its processes too; the user's stay as they are."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # the session's processes have folders of their own in there
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GGUFMOE_CACHE", str(folder / "cache"))
        patch.setenv("GGUFMOE_HOME", str(folder / "home"))
        yield


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each file of tests to one process, and all of ``tests/quant``: ggml's tables for IQ types take it 15 s."""
    from xdist.scheduler import LoadFileScheduling

    if config.getvalue("dist") != "loadfile":
        return None
    scheduling = LoadFileScheduling(config, log)
    file_of = scheduling._split_scope
    scheduling._split_scope = lambda test: "tests/quant" if test.startswith("tests/quant/") else file_of(test)
    return scheduling


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_checkpoint(**fields of tiny.Tiny)`` gives a directory shared by the whole session: do not change it."""
    made: dict[str, Path] = {}

    def make(**fields: Any) -> Path:
        key = repr(sorted(fields.items()))
        if key not in made:
            made[key] = tiny.make_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny-model", **fields)
        return made[key]

    return make


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


def pytest_sessionstart() -> None:
    """Ctrl-C means the same in every test run: a shell starts background jobs, and their children, with it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
