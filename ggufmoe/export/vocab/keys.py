"""Vocabulary, special tokens and templates as GGUF keys, named, typed and ordered as llama.cpp's converter has them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ggufmoe.errors import TokenizerError
from ggufmoe.export.vocab.special import SpecialTokens
from ggufmoe.export.vocab.token_rows import Vocabulary
from ggufmoe.gguf.header import Value
from ggufmoe.gguf.own_keys import EOS_TOKEN_IDS
from ggufmoe.gguf.types import ValueType

_ID_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "eot": "eot_token_id",
    "eom": "eom_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",
    "pad": "padding_token_id",
    "mask": "mask_token_id",
}


def metadata(
    vocabulary: Vocabulary, special: SpecialTokens, templates: Mapping[str, str], directory: Path
) -> dict[str, Value]:
    """All ``tokenizer.*`` keys, and ``EOS_TOKEN_IDS`` where a text has many ends.

    Raises TokenizerError if a chat template is not text that UTF-8 can hold.
    """
    keys: dict[str, Value] = {}
    if vocabulary.add_space_prefix is not None:
        keys["tokenizer.ggml.add_space_prefix"] = Value(ValueType.BOOL, vocabulary.add_space_prefix)
    keys |= _vocabulary_keys(vocabulary)
    for role, token_id in special.ids.items():
        if role in _ID_KEYS:
            keys[f"tokenizer.ggml.{_ID_KEYS[role]}"] = Value(ValueType.UINT32, token_id)
    for role, added in special.added.items():
        if role in ("bos", "eos", "sep"):
            keys[f"tokenizer.ggml.add_{role}_token"] = Value(ValueType.BOOL, added)
    if special.further_ends:
        keys[EOS_TOKEN_IDS] = _array(ValueType.UINT32, list(special.further_ends))
    return keys | _template_keys(templates, directory)


def _vocabulary_keys(vocabulary: Vocabulary) -> dict[str, Value]:
    keys = {
        "tokenizer.ggml.model": Value(ValueType.STRING, vocabulary.model),
        "tokenizer.ggml.pre": Value(ValueType.STRING, vocabulary.pre),
        "tokenizer.ggml.tokens": _array(ValueType.STRING, list(vocabulary.tokens)),
    }
    if vocabulary.scores is not None:
        keys["tokenizer.ggml.scores"] = _array(ValueType.FLOAT32, list(vocabulary.scores))
    keys["tokenizer.ggml.token_type"] = _array(ValueType.INT32, [int(kind) for kind in vocabulary.types])
    if vocabulary.merges:
        keys["tokenizer.ggml.merges"] = _array(ValueType.STRING, list(vocabulary.merges))
    return keys


def _template_keys(templates: Mapping[str, str], directory: Path) -> dict[str, Value]:
    named = {_plain(name): text for name, text in templates.items() if _plain(name) and name != "default"}
    for name, text in templates.items():
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise TokenizerError(f"{directory}: chat template {name!r} holds half a surrogate pair; correct it")
    keys = {f"tokenizer.chat_template.{name}": Value(ValueType.STRING, text) for name, text in named.items()}
    if named:
        keys["tokenizer.chat_templates"] = _array(ValueType.STRING, sorted(named))
    if "default" in templates:
        keys["tokenizer.chat_template"] = Value(ValueType.STRING, templates["default"])
    return keys


def _plain(name: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else "_" for c in name)


def _array(type: ValueType, values: list[Any]) -> Value:
    return Value(ValueType.ARRAY, values, type)
