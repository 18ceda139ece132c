"""Chat templates in a checkpoint directory, from each of the places where transformers has put them.

Owns where templates are found and which wins; rendering them belongs to the runtime.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ggufmoe.checkpoint.jsonfile import read_capped, read_object
from ggufmoe.errors import CheckpointError


def chat_templates(directory: Path) -> dict[str, str]:
    """Every template by name, ``default`` first where there is one; empty if the directory has none.

    ``tokenizer_config.json`` wins over ``chat_template.jinja`` and that over ``chat_template.json``, as in llama.cpp's
    converter. Raises CheckpointError for files that cannot be read.
    """
    own = _named(_json(directory / "tokenizer_config.json").get("chat_template"))
    if own:
        return own
    jinja = directory / "chat_template.jinja"
    if jinja.is_file():
        extra = sorted((directory / "additional_chat_templates").glob("*.jinja"))
        return {"default": _text(jinja), **{path.stem: _text(path) for path in extra}}
    return _named(_json(directory / "chat_template.json").get("chat_template"))


def default_chat_template(directory: Path) -> str | None:
    """The template used for plain conversations, or None."""
    return chat_templates(directory).get("default")


def _named(value: Any) -> dict[str, str]:
    if isinstance(value, str):
        return {"default": value}
    if not isinstance(value, list):
        return {}
    pairs = [(item.get("name"), item.get("template")) for item in value if isinstance(item, dict)]
    named = {name: template for name, template in pairs if isinstance(name, str) and isinstance(template, str)}
    return {name: named[name] for name in sorted(named, key=lambda name: name != "default")}


def _json(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _text(path: Path) -> str:
    try:
        return read_capped(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 text (byte {error.start})") from error
