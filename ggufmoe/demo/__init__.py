"""The embedded demo: two tiny dense models, the recipe that merges them, and questions that neither was trained on.

Only data lives here, and ``README.md`` is its model card; ``cli.demo`` tells the story.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

DIRECTORY = Path(__file__).parent
RECIPE = DIRECTORY / "recipe.yaml"
"""Merges ``base`` and ``math``, both beside it."""
NAME = "ggufmoe demo"
"""``general.name`` of what the recipe makes."""
EXPERTS = ("everyday", "math")
"""What each expert of the recipe is for."""


@dataclass(frozen=True)
class DemoQuestion:
    """A held-out question and its right answer; ``kind`` is everyday, sum, difference, comparison or equation."""

    kind: str
    text: str
    answer: str


def questions() -> tuple[DemoQuestion, ...]:
    """Held-out questions of both kinds, in the order in which the demo asks them."""
    listed = json.loads((DIRECTORY / "questions.json").read_text(encoding="utf-8"))
    return tuple(DemoQuestion(**question) for question in listed)
