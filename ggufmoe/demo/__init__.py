"""Data of the demo: tiny dense models, recipes that merge them, and questions that none of them was trained on.

``apart`` is the second act: two experts that were trained apart from each other, and texts for a router of theirs.
``README.md`` is the model card. ``cli.demo`` runs the demo.
"""

from __future__ import annotations

import json
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

DIRECTORY = Path(__file__).parent
RECIPE = DIRECTORY / "recipe.yaml"
"""The recipe that merges ``base`` and ``math`` of the same folder."""
NAME = "ggufmoe demo"
"""``general.name`` of the merged model."""
EXPERTS = ("everyday", "math")
"""The subject of each expert, in the order of the recipe."""
APART = DIRECTORY / "apart"
APART_NAME = "ggufmoe demo, apart"
"""``general.name`` of the second act's model."""
APART_EXPERTS = ("base", "product", "plonk")
"""The experts of the second act, in the order of its recipe; its questions are of these kinds."""


@dataclass(frozen=True)
class DemoQuestion:
    """A held-out question and its correct answer.

    ``kind`` is everyday, sum, difference, comparison or equation; in the second act the name of an expert.
    """

    kind: str
    text: str
    answer: str


def questions(directory: Path = DIRECTORY) -> tuple[DemoQuestion, ...]:
    """The held-out questions in the order in which the demo asks them; those of the second act are in ``APART``."""
    listed = json.loads((directory / "questions.json").read_text(encoding="utf-8"))
    return tuple(DemoQuestion(**question) for question in listed)


def write_apart(directory: Path) -> Path:
    """Write what the second act merges into ``directory``, which is made if need be; return the recipe's path.

    These are the checkpoints ``base``, ``product`` and ``plonk``, a file of texts of each kind, and a recipe. An
    expert's checkpoint is that of the base with the weights in its place that the expert has otherwise.
    """
    base = DIRECTORY / "base"
    weights = (base / "model.safetensors").read_bytes()
    directory.mkdir(parents=True, exist_ok=True)
    for file in (APART / "recipe.yaml", *sorted(APART.glob("*.jsonl"))):
        shutil.copyfile(file, directory / file.name)
    for name in APART_EXPERTS:
        (directory / name).mkdir(exist_ok=True)
        for file in base.iterdir():
            if file.suffix != ".safetensors":
                shutil.copyfile(file, directory / name / file.name)
        own = APART / f"{name}.safetensors"
        content = _replaced(weights, own.read_bytes()) if own.exists() else weights
        (directory / name / "model.safetensors").write_bytes(content)
    return directory / "recipe.yaml"


def _replaced(base: bytes, changes: bytes) -> bytes:
    """A safetensors file with the tensors of another one, of the same shapes, in the place of its own."""
    out = bytearray(base)
    places, begin = _places(base)
    changed, changes_begin = _places(changes)
    for name, (start, stop) in changed.items():
        there, end = places[name]
        assert end - there == stop - start, f"{name} has the base's shape and type"
        out[begin + there : begin + end] = changes[changes_begin + start : changes_begin + stop]
    return bytes(out)


def _places(content: bytes) -> tuple[dict[str, tuple[int, int]], int]:
    """Where each tensor of a safetensors file begins and ends, from the end of the header on, and where that is."""
    (n_bytes,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + n_bytes])
    entries = {name: tuple(entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__"}
    return entries, 8 + n_bytes
