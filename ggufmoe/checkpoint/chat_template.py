"""Finds the chat templates of a checkpoint directory in all files in which versions of transformers store them.

Decides which file takes precedence; the runtime renders templates.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ggufmoe.checkpoint.jsonfile import read_capped, read_optional
from ggufmoe.errors import CheckpointError
from ggufmoe.files import decode_text, what_instead

_LOG = logging.getLogger("ggufmoe")
_MARK = "\ufeff"
"""A byte order mark, which some editors put before a text; it is not part of a template."""


def chat_templates(directory: Path, *, warn: bool = True) -> dict[str, str]:
    """Map the name of each template to its text, ``default`` first; empty if the directory has no template.

    As in transformers, ``chat_template.jinja`` takes precedence over ``tokenizer_config.json``, with a warning (if
    ``warn``) where they differ, and that over ``chat_template.json``. Raises CheckpointError for files that cannot be
    read.
    """
    configured = _named(read_optional(directory / "tokenizer_config.json", warn=False).get("chat_template"))
    jinja = directory / "chat_template.jinja"
    if jinja.is_file():
        extra = sorted((directory / "additional_chat_templates").glob("*.jinja"))
        found = {"default": _text(jinja), **{path.stem: _text(path) for path in extra}}
        if warn and configured and configured.get("default", found["default"]) != found["default"]:
            _LOG.warning("%s is used; tokenizer_config.json has another chat template", jinja)
        return found
    oldest = read_optional(directory / "chat_template.json", allow_broken=True, warn=warn and not configured)
    return configured or _named(oldest.get("chat_template"))


def default_chat_template(directory: Path, *, warn: bool = False) -> str | None:
    """The text of the template named ``default``, or None."""
    return chat_templates(directory, warn=warn).get("default")


def _named(value: Any) -> dict[str, str]:
    """Parse ``chat_template`` of tokenizer_config.json: one text, texts by name, or a list of names and texts."""
    if isinstance(value, str):
        return {"default": value.removeprefix(_MARK)}
    if isinstance(value, dict):
        pairs = list(value.items())
    else:
        items = value if isinstance(value, list) else []
        pairs = [(item.get("name"), item.get("template")) for item in items if isinstance(item, dict)]
    named = {name: text.removeprefix(_MARK) for name, text in pairs if isinstance(name, str) and isinstance(text, str)}
    return {name: named[name] for name in sorted(named, key=lambda name: name != "default")}


def _text(path: Path) -> str:
    if (instead := what_instead(path)) is not None:
        raise CheckpointError(f"{path} is {instead}")
    try:
        return decode_text(read_capped(path)).removeprefix(_MARK)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 text (byte {error.start})") from error
