"""The loaded engine: its limits are those that the options check."""

from __future__ import annotations

from ggufmoe.native import library as native
from ggufmoe.options import limits


def test_limits_are_those_of_the_engine() -> None:
    lib = native.library()
    assert lib.llama_max_devices() == limits.MAX_DEVICES
    assert lib.llama_max_parallel_sequences() == limits.MAX_SEQUENCES
