"""Data of the demo: two tiny dense models, the recipe that merges them, and questions that neither was trained on.

``README.md`` is the model card. ``cli.demo`` runs the demo.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

DIRECTORY = Path(__file__).parent
RECIPE = DIRECTORY / "recipe.yaml"
"""The recipe that merges ``base`` and ``math`` of the same folder."""
NAME = "ggufmoe demo"
"""``general.name`` of the merged model."""
EXPERTS = ("everyday", "math")
"""The subject of each expert, in the order of the recipe."""


@dataclass(frozen=True)
class DemoQuestion:
    """A held-out question and its correct answer; ``kind`` is everyday, sum, difference, comparison or equation."""

    kind: str
    text: str
    answer: str


def questions() -> tuple[DemoQuestion, ...]:
    """The held-out questions, everyday and math, in the order in which the demo asks them."""
    listed = json.loads((DIRECTORY / "questions.json").read_text(encoding="utf-8"))
    return tuple(DemoQuestion(**question) for question in listed)
