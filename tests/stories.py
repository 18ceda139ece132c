"""Scripted models that many tests share, and the options they are run with."""

from __future__ import annotations

from ggufmoe import ContextOptions, SamplingOptions
from tests.scripted import Scripted

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
