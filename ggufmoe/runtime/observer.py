"""Watching llama.cpp compute: what any observer of an engine's graphs has to mind.

Nothing can be raised through C, not even Ctrl-C: what goes wrong while looking is kept, stops the computation, and is
raised by ``check``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Observer(ABC):
    """Give it to ``Engine.observed``; ``stop`` (the engine's ``cancel``) ends the computation when looking fails."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = stop
        self._failure: BaseException | None = None

    @abstractmethod
    def wants(self, tensor: int) -> bool:
        """Whether the ``ggml_tensor`` at this address is to be seen once it is computed."""

    @abstractmethod
    def take(self, tensor: int) -> None:
        """Look at a tensor that was wanted; its sources hold their values too."""

    def __call__(self, tensor: int, ask: bool) -> bool:
        if self._failure is not None:
            return not ask
        try:
            if ask:
                return self.wants(tensor)
            self.take(tensor)
        except BaseException as failure:
            self._failure = failure
            self._stop()
        return True

    @contextmanager
    def checked(self) -> Iterator[None]:
        """At the end of the block, raise what went wrong here before what followed from it."""
        try:
            yield
        finally:
            self.check()

    def check(self) -> None:
        """Raise what went wrong while llama.cpp was computing."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
