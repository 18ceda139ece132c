"""What a child process may be started for: the table of tasks, and the entrance for frozen apps."""

from __future__ import annotations

import sys

from ggufmoe.errors import EngineError
from ggufmoe.remote.process import CHILD_FLAG, FrozenApp, child_pipes


def freeze_support() -> None:
    """Call this first in the main script of a frozen app (PyInstaller and the like) that uses workers.

    A frozen app has no Python beside it, so ggufmoe starts the app itself as the child process: there this function
    does the child's work and exits. In any other process it only notes that it was called.
    """
    FrozenApp.is_prepared = True
    if getattr(sys, "frozen", False) and sys.argv[1:2] == [CHILD_FLAG]:
        run_task(sys.argv[2])
        sys.exit(0)


def run_task(name: str) -> None:
    """In the child: do the work that it was started for; returns when it is done. Raises EngineError for no task."""
    if name == "engine":
        from ggufmoe.remote.host import host_engine

        host_engine(*child_pipes())
    elif name == "worker":
        from ggufmoe.remote.worker import serve_here

        serve_here(*child_pipes())
    else:
        raise EngineError(f"a process of ggufmoe was started for {name!r}, which is no task")
