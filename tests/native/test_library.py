"""The loaded engine: its limits are those that the options check."""

from __future__ import annotations

import threading
import time

import pytest

from ggufmoe.native import library as native
from ggufmoe.native.lookup import Lookup
from ggufmoe.options import limits


def test_limits_are_those_of_the_engine() -> None:
    lib = native.library()
    assert lib.llama_max_devices() == limits.MAX_DEVICES
    assert lib.llama_max_parallel_sequences() == limits.MAX_SEQUENCES


def test_threads_that_ask_at_once_load_one_library(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Lookup] = []

    def find(_: object) -> Lookup:
        time.sleep(0.05)
        made.append(Lookup(None))
        return made[-1]

    native._looked_up.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(native, "find_library", find)
        threads = [threading.Thread(target=native.engine_lookup) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    native._looked_up.cache_clear()
    assert len(made) == 1
