"""GGUF keys of a vocabulary, its special tokens and chat templates, in the order of llama.cpp's converter."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ggufmoe.errors import TokenizerError
from ggufmoe.export.vocab.special import SpecialTokens
from ggufmoe.export.vocab.token_rows import Vocabulary
from ggufmoe.gguf.header import GGUFValue
from ggufmoe.gguf.key_tables import TOKEN_ID_KEYS, template_name
from ggufmoe.gguf.own_keys import EOS_TOKEN_IDS
from ggufmoe.gguf.types import ValueType
from ggufmoe.gguf.upstream import Keys

_LOG = logging.getLogger("ggufmoe")
_ADDED_KEYS = {"bos": Keys.Tokenizer.ADD_BOS, "eos": Keys.Tokenizer.ADD_EOS, "sep": Keys.Tokenizer.ADD_SEP}


def metadata(
    vocabulary: Vocabulary, special: SpecialTokens, templates: Mapping[str, str], directory: Path
) -> dict[str, GGUFValue]:
    """All ``tokenizer.*`` keys, and ``EOS_TOKEN_IDS`` where more tokens end a text than those keys can name.

    Raises TokenizerError if a chat template is not text that UTF-8 can hold.
    """
    keys: dict[str, GGUFValue] = {}
    if vocabulary.add_space_prefix is not None:
        keys[Keys.Tokenizer.ADD_PREFIX] = GGUFValue(ValueType.BOOL, vocabulary.add_space_prefix)
    keys |= _vocabulary_keys(vocabulary)
    for role, token_id in special.ids.items():
        if role in TOKEN_ID_KEYS:
            keys[TOKEN_ID_KEYS[role]] = GGUFValue(ValueType.UINT32, token_id)
    for role, added in special.added.items():
        if role in _ADDED_KEYS:
            keys[_ADDED_KEYS[role]] = GGUFValue(ValueType.BOOL, added)
    if special.further_ends:
        keys[EOS_TOKEN_IDS] = _array(ValueType.UINT32, list(special.further_ends))
    return keys | _template_keys(templates, directory)


def _vocabulary_keys(vocabulary: Vocabulary) -> dict[str, GGUFValue]:
    keys = {
        Keys.Tokenizer.MODEL: GGUFValue(ValueType.STRING, vocabulary.model),
        Keys.Tokenizer.PRE: GGUFValue(ValueType.STRING, vocabulary.pre),
        Keys.Tokenizer.LIST: _array(ValueType.STRING, list(vocabulary.tokens)),
    }
    if vocabulary.scores is not None:
        keys[Keys.Tokenizer.SCORES] = _array(ValueType.FLOAT32, list(vocabulary.scores))
    keys[Keys.Tokenizer.TOKEN_TYPE] = _array(ValueType.INT32, [int(kind) for kind in vocabulary.types])
    if vocabulary.merges:
        keys[Keys.Tokenizer.MERGES] = _array(ValueType.STRING, list(vocabulary.merges))
    return keys


def _template_keys(templates: Mapping[str, str], directory: Path) -> dict[str, GGUFValue]:
    others = [name for name in templates if name != "default"]
    kept = {template_name(name): name for name in others if name}
    for name in others:
        if kept.get(template_name(name)) != name:
            _LOG.warning("%s: the chat template %r is left out: a file has no key of its own for it", directory, name)
    named = {key: templates[name] for key, name in kept.items()}
    for name, text in templates.items():
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise TokenizerError(f"{directory}: chat template {name!r} holds half a surrogate pair; correct it")
    keys = {
        Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name): GGUFValue(ValueType.STRING, text)
        for name, text in named.items()
    }
    if named:
        keys[Keys.Tokenizer.CHAT_TEMPLATES] = _array(ValueType.STRING, sorted(named))
    if "default" in templates:
        keys[Keys.Tokenizer.CHAT_TEMPLATE] = GGUFValue(ValueType.STRING, templates["default"])
    return keys


def _array(type: ValueType, values: list[Any]) -> GGUFValue:
    return GGUFValue(ValueType.ARRAY, values, type)
