"""Reads where a checkpoint comes from: its name, licence and base models.

Source is ``ggufmoe.json``, which ``merge`` writes, or else the front matter of the model card and the name of the
directory or hub repository. Malformed fields of a model card are ignored.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ggufmoe.checkpoint.jsonfile import read_capped, read_object
from ggufmoe.checkpoint.source import BaseModel, Provenance
from ggufmoe.errors import CheckpointError, one_line

RECORD = "ggufmoe.json"
MODEL_CARD = "README.md"

_LOG = logging.getLogger("ggufmoe")
_YAML_FAILURES = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What PyYAML's constructors raise for values that do not fit their tag."""
_MAX_CARD_BYTES = 16 * 1024 * 1024
_MAX_FRONT_MATTER_BYTES = 256 * 1024
_MAX_TEXT = 500
_MAX_DEPTH = 20
_MAX_ITEMS = 100
_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_CACHE_FOLDER = re.compile(r"models--(.+?)--(.+)")


def read_provenance(directory: Path, repo_id: str | None = None) -> Provenance:
    """Read the provenance of the checkpoint in ``directory``; ``repo_id`` is its id if it came from the hub.

    Raises CheckpointError only for a malformed ``ggufmoe.json``.
    """
    if (directory / RECORD).is_file():
        return read_record(directory)
    repo_id = repo_id or _cached_repo(directory)
    name = repo_id.split("/")[-1] if repo_id else directory.resolve().name
    card = _front_matter(directory / MODEL_CARD)
    return Provenance(
        name=name or "model",
        license=next(iter(_texts(card.get("license"))), None),
        license_name=_text(card.get("license_name")),
        license_link=_text(card.get("license_link")),
        tags=_texts(card.get("tags")),
        languages=_texts(card.get("language")),
        base_models=tuple(base_model(text) for text in _texts(card.get("base_model"))),
    )


def base_model(id: str) -> BaseModel:
    """Make a BaseModel of the id or path in a card or recipe; organization and address are set for hub ids only."""
    if not _HUB_ID.fullmatch(id):
        return BaseModel(name=re.split(r"[/\\]", id.rstrip("/\\"))[-1] or id)
    organization, name = id.split("/")
    return BaseModel(name=name, organization=organization, repo_url=f"https://huggingface.co/{id}")


def record_json(provenance: Provenance) -> bytes:
    """The content of ``ggufmoe.json`` for a provenance; ``read_record`` gives an equal object back."""
    value = asdict(replace(provenance, extra=dict(provenance.extra)))
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def read_record(directory: Path) -> Provenance:
    """Read the provenance in ``ggufmoe.json``. Raises CheckpointError for content that ``record_json`` cannot write."""
    path = directory / RECORD
    value = read_object(path)
    try:
        base_models = tuple(BaseModel(**_strings(base)) for base in value.pop("base_models", []))
        extra = _strings(value.pop("extra", {}))
        tags, languages = (_string_list(value.pop(key, [])) for key in ("tags", "languages"))
        known = Provenance(tags=tags, languages=languages, base_models=base_models, extra=extra, **_strings(value))
    except TypeError as error:
        raise CheckpointError(f"{path} is not a record of ggufmoe ({error}); delete it to do without") from error
    if not known.name:
        raise CheckpointError(f"{path} is not a record of ggufmoe (no name); delete it to do without")
    return known


def _strings(value: object) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(item is None or isinstance(item, str) for item in value.values()):
        raise TypeError("expected an object of strings")
    return value


def _string_list(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TypeError("expected a list of strings")
    return tuple(value)


def _cached_repo(directory: Path) -> str | None:
    """The hub id of a directory in a Hugging Face cache, models--ORG--NAME/snapshots/COMMIT; None for any other."""
    home = directory.resolve()
    match = _CACHE_FOLDER.fullmatch(home.parent.parent.name) if home.parent.name == "snapshots" else None
    return f"{match[1]}/{match[2]}" if match else None


def _front_matter(path: Path) -> Mapping[str, Any]:
    """Read the YAML between the first two ``---`` lines of a model card; empty if there is none that can be read."""
    import yaml

    if not path.is_file():
        return {}
    try:
        text = read_capped(path, _MAX_CARD_BYTES).decode("utf-8", errors="replace")
        match = _FRONT_MATTER.match(text)
        if match is None or len(match[1]) > _MAX_FRONT_MATTER_BYTES:
            return {}
        card = yaml.load(match[1], Loader=_plain_loader())
    except (CheckpointError, yaml.YAMLError, *_YAML_FAILURES) as error:
        _LOG.warning("the model card %s is ignored: %s", path, one_line(error))
        return {}
    return card if isinstance(card, dict) else {}


def _plain_loader() -> Any:
    """A subclass of PyYAML's SafeLoader that refuses aliases, which can expand to gigabytes, and deep nesting."""
    import yaml

    class PlainLoader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
            if self.check_event(yaml.AliasEvent) or self.depth == _MAX_DEPTH:
                raise yaml.YAMLError(f"YAML aliases and more than {_MAX_DEPTH} levels are not read")
            self.depth += 1
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    return PlainLoader


def _text(value: object) -> str | None:
    return value.strip() or None if isinstance(value, str) and len(value) <= _MAX_TEXT else None


def _texts(value: object) -> tuple[str, ...]:
    items = value if isinstance(value, list) else [value]
    return tuple(text for item in items[:_MAX_ITEMS] if (text := _text(item)) is not None)
