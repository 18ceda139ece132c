"""Vocabularies of a ``tokenizer.json`` that sentencepiece made: BPE on characters, U+2581 for spaces, byte fallback.

llama.cpp's ``llama`` model joins any two neighbours whose join is a token, the best score first; Hugging Face's BPE
joins only pairs that are merges, the lowest rank first. Scores of minus the rank make the two equal if every way to cut
a token in two is a merge and the merges of one token follow each other, which is so wherever the file was derived from
a sentencepiece model. Where it is not, llama.cpp's merge-driven variant is used (no space prefix possible), or none.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ggufmoe.checkpoint.tokenizer_files import AddedToken, TokenizerFiles, nodes
from ggufmoe.errors import TokenizerError
from ggufmoe.export.vocab.bpe import BPE, read_bpe
from ggufmoe.export.vocab.token_rows import SPACE, TokenRows, TokenType, Vocabulary, require_bytes

_LOG = logging.getLogger("ggufmoe")

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_DECODERS = ("Replace", "ByteFallback", "Fuse", "Strip", "Metaspace")

MERGE_DRIVEN_PRE = "sarvam-moe"
"""llama.cpp's pre-tokenizer for BPE with merges on plain UTF-8 with U+2581 for spaces; it splits at newlines."""


def vocabulary(files: TokenizerFiles, n_vocab: int) -> Vocabulary:
    """The vocabulary of a ``tokenizer.json``, its scores derived from the ranks of its merges.

    Raises TokenizerError for steps of the tokenizer that llama.cpp does not have.
    """
    path = files.json_path
    bpe = read_bpe(files)
    if not bpe.byte_fallback:
        raise TokenizerError(
            f"{path}: BPE that is neither byte-level nor has byte_fallback cannot be converted exactly"
        )
    prefix = space_prefix(files, bpe)
    for step in nodes(files.json.get("decoder"), "decoders"):
        if step.get("type") not in _DECODERS:
            raise _unknown_step(path, "decoder", step)
    added = {token.id: token for token in files.added_in_config() + files.added_in_json()}
    problem = _not_by_score(bpe, {token.content for token in added.values()})
    rows = _rows(bpe, added, n_vocab, path)
    if problem is None:
        is_stated = isinstance(files.config.get("add_prefix_space"), bool)
        return _by_score(rows, prefix if is_stated or not prefix else None)
    joins_newlines = any("\n" in left + right and (left + right).strip("\n") for left, right in bpe.merges)
    if prefix or joins_newlines or bpe.ignore_merges:
        raise TokenizerError(f"{path}: llama.cpp would give other token ids: {problem}")
    return _by_merges(rows, bpe)


def _by_score(rows: TokenRows, add_space_prefix: bool | None) -> Vocabulary:
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=tuple(rows.texts),
        types=tuple(rows.types),
        scores=tuple(rows.scores),
        add_space_prefix=add_space_prefix,
        adds_bos_by_default=True,
    )


def _by_merges(rows: TokenRows, bpe: BPE) -> Vocabulary:
    return Vocabulary(
        model="gpt2",
        pre=MERGE_DRIVEN_PRE,
        tokens=tuple(rows.texts),
        types=tuple(rows.types),
        merges=tuple(f"{left} {right}" for left, right in bpe.merges),
        add_space_prefix=False,
    )


def _rows(bpe: BPE, added: Mapping[int, AddedToken], n_vocab: int, path: Path) -> TokenRows:
    rows = TokenRows(n_vocab, path)
    scores = rank_scores(bpe)
    for token, token_id in bpe.vocab.items():
        kind = TokenType.BYTE if _BYTE.fullmatch(token) else TokenType.NORMAL
        rows.put(token_id, token, kind, scores.get(token, float(-len(bpe.merges) - 1)))
    rows.put_all_added(added.values())
    rows.check_unique()
    require_bytes(rows.texts, path)
    return rows


def rank_scores(bpe: BPE) -> dict[str, float]:
    """Map each token that a merge makes to its score: minus the rank of its first merge, minus one."""
    scores: dict[str, float] = {}
    for rank, (left, right) in enumerate(bpe.merges):
        scores.setdefault(left + right, float(-rank - 1))
    return scores


def _not_by_score(bpe: BPE, added: set[str]) -> str | None:
    """The reason why scores cannot replace the merges, as a clause for a message; None if they can."""
    last: dict[str, int] = {}
    for rank, (left, right) in enumerate(bpe.merges):
        token = left + right
        if token in last and last[token] != rank - 1:
            return f"merges of {token!r} are not next to each other, so no score can order them"
        last[token] = rank
    pairs = set(bpe.merges)
    plain = {token for token in bpe.vocab if token not in added and not _BYTE.fullmatch(token)}
    for token in bpe.vocab:
        if token in added:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in plain and right in plain and (left, right) not in pairs:
                return f"it would join {left!r} and {right!r}, which is not a merge of this tokenizer"
    return None


def space_prefix(files: TokenizerFiles, bpe: BPE) -> bool:
    """Whether the normalizer or the pre-tokenizer adds a space before the text.

    A Metaspace whose ``prepend_scheme`` is ``always`` adds no space before a space, one whose scheme is ``first`` adds
    none after a special token; llama.cpp adds both, whatever the keys. Raises TokenizerError for steps that llama.cpp
    does not support.
    """
    path = files.json_path
    prefix = escapes = False
    for step in nodes(files.json.get("normalizer"), "normalizers"):
        if step.get("type") == "Prepend" and step.get("prepend") == SPACE and not escapes:
            prefix = True
        elif (step.get("type"), step.get("pattern"), step.get("content")) == ("Replace", {"String": " "}, SPACE):
            escapes = True
        else:
            raise _unknown_step(path, "normalizer", step)
    for step in nodes(files.json.get("pre_tokenizer"), "pretokenizers"):
        if step.get("type") != "Metaspace" or step.get("replacement", SPACE) != SPACE:
            raise _unknown_step(path, "pre-tokenizer", step)
        if step.get("split", True) and any(SPACE in (left + right)[1:] for left, right in bpe.merges):
            raise TokenizerError(f"{path}: Metaspace splits words that merges would join; llama.cpp does not")
        if _scheme(step) == "first":
            _LOG.info("%s: after a special token llama.cpp adds a space, and this tokenizer does not", path)
        prefix, escapes = prefix or _scheme(step) != "never", True
    if not escapes:
        raise TokenizerError(f"{path}: nothing turns spaces into {SPACE!r}, as llama.cpp always does for such models")
    return prefix


def _scheme(step: Mapping[str, Any]) -> str:
    if "prepend_scheme" in step:
        return str(step["prepend_scheme"])
    return "always" if step.get("add_prefix_space", True) else "never"


def _unknown_step(path: Path, what: str, step: Mapping[str, Any]) -> TokenizerError:
    return TokenizerError(
        f"{path}: llama.cpp does not support the {what} {str(dict(step))[:200]} for models like sentencepiece's; "
        "if the model has a tokenizer.model, put it beside this file"
    )
