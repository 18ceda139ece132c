"""What tests look into: the engine behind ``Engine``, which computes in this process or in a child."""

from __future__ import annotations

from ggufmoe import Engine
from ggufmoe.remote.child import ChildEngine
from ggufmoe.runtime.local import LocalEngine


def local_engine(engine: Engine) -> LocalEngine:
    """The engine of this process."""
    assert isinstance(engine._runner, LocalEngine)
    return engine._runner


def child_engine(engine: Engine) -> ChildEngine:
    """The engine whose child process computes."""
    assert isinstance(engine._runner, ChildEngine)
    return engine._runner
