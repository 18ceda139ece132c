"""Converts the tokenizer of a Hugging Face checkpoint to the ``tokenizer.*`` keys of a GGUF file.

llama.cpp must give the ids that the original tokenizer gives; a tokenizer that llama.cpp cannot reproduce is an error.
There is one module for each kind of tokenizer; ``special`` and ``token_rows`` hold what they share.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from ggufmoe.checkpoint.chat_template import chat_templates
from ggufmoe.checkpoint.tokenizer_files import TokenizerFiles
from ggufmoe.export.vocab import bytelevel, spm_json, spm_model
from ggufmoe.export.vocab.keys import metadata
from ggufmoe.export.vocab.special import special_tokens
from ggufmoe.export.vocab.token_rows import TokenType, Vocabulary
from ggufmoe.families import family_of
from ggufmoe.families.family import TokenizerRules
from ggufmoe.families.model_config import ModelConfig
from ggufmoe.gguf.header import GGUFValue
from ggufmoe.gguf.special_texts import special_literals

__all__ = ["tokenizer_metadata"]

_LOG = logging.getLogger("ggufmoe")


def tokenizer_metadata(
    tokenizer_dir: Path, config: ModelConfig, chat_template: str | None = None
) -> dict[str, GGUFValue]:
    """Make the ``tokenizer.*`` keys of a model, in the order in which llama.cpp's converter writes them.

    ``tokenizer.model`` takes precedence over ``tokenizer.json``, as in that converter. The number of tokens is
    ``config.n_vocab``; rows without a token become ``[PADi]``. ``chat_template`` replaces the templates of the
    directory. Raises TokenizerError if a file is missing or malformed, or if llama.cpp would give other token ids.
    Source: ``conversion/llama.py``, ``conversion/base.py`` and ``gguf-py/gguf/vocab.py`` of the pinned llama.cpp.
    """
    files, rules = TokenizerFiles.read(tokenizer_dir), family_of(config).tokenizer
    vocabulary = _vocabulary(files, config, rules)
    templates = {"default": chat_template} if chat_template is not None else chat_templates(tokenizer_dir)
    _tell_foreign_literals(templates, vocabulary, tokenizer_dir)
    return metadata(vocabulary, special_tokens(files, config, vocabulary, rules), templates, tokenizer_dir)


def _tell_foreign_literals(templates: Mapping[str, str], vocabulary: Vocabulary, directory: Path) -> None:
    """Warn of texts in chat templates that look like special tokens and are no special tokens of the vocabulary."""
    whole = {
        text
        for text, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
    }
    for name, template in templates.items():
        foreign = [literal for literal in special_literals(template) if literal not in whole]
        if foreign:
            _LOG.warning(
                "%s: the chat template%s writes %s, which this vocabulary does not have as tokens: the model reads "
                "them in pieces, and an answer may not end where it should",
                *(directory, "" if name == "default" else f" {name!r}", ", ".join(foreign)),
            )


def _vocabulary(files: TokenizerFiles, config: ModelConfig, rules: TokenizerRules) -> Vocabulary:
    if files.model is not None:
        return spm_model.vocabulary(files, config.n_vocab)
    if files.is_byte_level:
        return bytelevel.vocabulary(files, config.n_vocab, rules)
    return spm_json.vocabulary(files, config.n_vocab)
