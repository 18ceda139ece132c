"""Chat templates in a checkpoint directory, from each of the places where transformers has put them.

Owns where templates are found and which wins; rendering them belongs to the runtime.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ggufmoe.errors import TokenizerError

_MAX_BYTES = 64 << 20


def chat_templates(directory: Path) -> dict[str, str]:
    """Every template by name, ``default`` first where there is one; empty if the directory has none.

    ``tokenizer_config.json`` wins over ``chat_template.jinja`` and that over ``chat_template.json``, as in llama.cpp's
    converter. Raises TokenizerError for files that cannot be read.
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
    if not path.is_file():
        return {}
    try:
        content = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path}: expected an object, found {type(content).__name__}")
    return content


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise TokenizerError(f"{path}: larger than {_MAX_BYTES >> 20} MiB")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path}: cannot be read ({error})") from error
