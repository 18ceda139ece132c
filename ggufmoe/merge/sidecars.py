"""The files beside the weights of a checkpoint that is written: config, tokenizer, chat template, model card, record.

Owns their content only; the weights are planned by ``checkpoint_plan``, and ``convert.merge`` writes all of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ggufmoe.checkpoint.jsonfile import read_capped, read_optional
from ggufmoe.checkpoint.provenance import RECORD, record_json
from ggufmoe.checkpoint.source import ModelSource
from ggufmoe.checkpoint.tokenizer_files import MAX_TOKENIZER_BYTES

_TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
_TEMPLATE_FOLDER = "additional_chat_templates"
WRITTEN_NAMES = (
    "config.json",
    "generation_config.json",
    "README.md",
    RECORD,
    "model.safetensors",
    "model.safetensors.index.json",
    "model-?????-of-?????.safetensors",
    *_TOKENIZER_FILES,
    *_TEMPLATE_FILES,
    _TEMPLATE_FOLDER,
)
"""What a merge may write into its directory, as patterns of names: all else in there is the user's."""


def sidecar_files(model: ModelSource, index: Mapping[str, Any] | None) -> dict[str, bytes]:
    """Name and content of every file but the weights. ``index`` is that of the shards, None for a single file.

    Raises CheckpointError if a file of the tokenizer's directory cannot be read.
    """
    files = {"config.json": _json(dict(model.config.raw)), **_generation_config(model), **_tokenizer(model)}
    if index is not None:
        files["model.safetensors.index.json"] = _json(index)
    if model.model_card is not None:
        files["README.md"] = model.model_card.encode()
    files[RECORD] = record_json(model.provenance)
    return files


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _generation_config(model: ModelSource) -> dict[str, bytes]:
    """generation_config.json: that of the tokenizer's directory if it has one, else the ids of BOS and of every EOS."""
    path = model.tokenizer_dir / "generation_config.json"
    if read_optional(path, allow_broken=True, warn=False):
        return {path.name: read_capped(path)}
    ends = model.config.raw.get("eos_token_id")
    eos = ends if isinstance(ends, list) else model.config.eos_token_id
    ids = {"bos_token_id": model.config.bos_token_id, "eos_token_id": eos}
    known = {key: value for key, value in ids.items() if value is not None}
    return {path.name: _json(known)} if known else {}


def _tokenizer(model: ModelSource) -> dict[str, bytes]:
    directory = model.tokenizer_dir
    files = _present(directory, _TOKENIZER_FILES)
    if model.chat_template is None:
        extra = tuple(f"{_TEMPLATE_FOLDER}/{path.name}" for path in (directory / _TEMPLATE_FOLDER).glob("*.jinja"))
        return files | _present(directory, _TEMPLATE_FILES + extra)
    if "tokenizer_config.json" not in files:
        return files | {"chat_template.jinja": model.chat_template.encode()}
    settings = read_optional(directory / "tokenizer_config.json") | {"chat_template": model.chat_template}
    return files | {"tokenizer_config.json": _json(settings)}


def _present(directory: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    return {name: read_capped(directory / name, MAX_TOKENIZER_BYTES) for name in names if (directory / name).is_file()}
