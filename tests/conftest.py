"""Fixtures for all tests: tiny checkpoints, made once per distinct specification."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import tiny


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


def pytest_sessionstart() -> None:
    """Ctrl-C means the same in every test run: a shell starts background jobs, and their children, with it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
