"""Reads the JSON files of a checkpoint up to a maximum size; errors are CheckpointErrors of one line."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from ggufmoe.errors import CheckpointError, one_line
from ggufmoe.files import decode_text, what_instead

_LOG = logging.getLogger("ggufmoe")

_BLANKS = b" \t\r\n\0"
MAX_BYTES = 64 * 1024 * 1024
"""Above any real config.json or shard index: the index of a model with 100,000 tensors is about 10 MB."""


def read_capped(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes of a file; CheckpointError if it cannot be read or is larger than ``max_bytes``."""
    try:
        with open(path, "rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > max_bytes:
        raise CheckpointError(f"{path} is larger than {max_bytes} bytes, which no real checkpoint needs")
    return content


def read_optional(path: Path, *, allow_broken: bool = False, warn: bool = True) -> dict[str, Any]:
    """Read the JSON object in an optional file; an empty object if the file is missing or empty.

    Raises CheckpointError for a file that cannot be read as a JSON object, unless ``allow_broken``, which treats it as
    empty. ``warn``: whether a file that is ignored is named in a warning.
    """
    if not path.is_file():
        return {}
    try:
        if read_capped(path).strip(_BLANKS):
            return read_object(path)
        reason = "it is empty"
    except CheckpointError as error:
        if not allow_broken:
            raise
        reason = f"it {str(error).removeprefix(f'{path} ')}"
    if warn:
        _LOG.warning("%s is ignored: %s", path, reason)
    return {}


def read_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file. Raises CheckpointError if the file cannot be read or holds anything else."""
    content = read_capped(path)
    if not content.strip(_BLANKS):
        raise CheckpointError(f"{path} is empty; fetch it again")
    try:
        value = json.loads(decode_text(content))
    except (ValueError, RecursionError) as error:
        instead = what_instead(path)
        raise CheckpointError(f"{path} is {instead or f'not JSON: {one_line(error)}'}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value
