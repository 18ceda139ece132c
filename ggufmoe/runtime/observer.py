"""The base of observers of llama.cpp's graphs: keeps exceptions away from C.

llama.cpp calls the observer, and nothing can be raised through C, not even KeyboardInterrupt. So an exception is kept,
cancels the computation, and is raised by ``check``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Observer(ABC):
    """An observer for ``Engine.observed``. After an exception it calls ``stop``, usually the engine's ``cancel``."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = stop
        self._failure: BaseException | None = None

    @abstractmethod
    def wants(self, tensor: int) -> bool:
        """Whether ``take`` is to be called for the ``ggml_tensor`` at this address once it is computed."""

    @abstractmethod
    def take(self, tensor: int) -> None:
        """Called with a wanted tensor when it and its sources hold their values."""

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
        """At the end of the block, call ``check``: its exception hides the one of the cancelled computation."""
        try:
            yield
        finally:
            self.check()

    def check(self) -> None:
        """Raise the exception that ``wants`` or ``take`` raised, if there was one."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
