"""Reads and checks the BPE model of a ``tokenizer.json``: vocabulary, merges and options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ggufmoe.checkpoint.tokenizer_files import TokenizerFiles, expect
from ggufmoe.errors import TokenizerError

Pair = tuple[str, str]


@dataclass(frozen=True)
class BPE:
    """The BPE model of a ``tokenizer.json``; the rank of a merge is its index in ``merges``."""

    vocab: Mapping[str, int]
    merges: tuple[Pair, ...]
    byte_fallback: bool
    ignore_merges: bool
    unk_token: str | None


def read_bpe(files: TokenizerFiles) -> BPE:
    """Read the BPE model of ``tokenizer.json``.

    Raises TokenizerError if the model is not BPE, is malformed or contradicts itself, or has options that llama.cpp
    does not support.
    """
    path = files.json_path
    model = expect(files.json.get("model"), dict, path, "model")
    kind = model.get("type", "BPE")
    if kind != "BPE":
        raise TokenizerError(f"{path}: the tokenizer is a {kind} model; only BPE can be converted exactly")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise TokenizerError(f"{path}: llama.cpp does not support BPE with {option} = {model[option]!r}")
    vocab = expect(model.get("vocab"), dict, path, "model.vocab")
    merges = expect(model.get("merges"), list, path, "model.merges")
    bpe = BPE(
        vocab={token: expect(value, int, path, f"the id of {token[:40]!r}") for token, value in vocab.items()},
        merges=tuple(_pair(merge, path) for merge in merges),
        byte_fallback=bool(model.get("byte_fallback")),
        ignore_merges=bool(model.get("ignore_merges")),
        unk_token=model.get("unk_token") if isinstance(model.get("unk_token"), str) else None,
    )
    _check_consistent(bpe, path)
    return bpe


def _pair(merge: Any, path: Path) -> Pair:
    """The two tokens of a merge, which is written ``"a b"`` or, in newer files, ``["a", "b"]``."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if isinstance(parts, list) and len(parts) == 2 and all(isinstance(part, str) and part for part in parts):
        return parts[0], parts[1]
    raise TokenizerError(f"{path}: {str(merge)[:60]!r} is not a merge of two tokens; download the file again")


def _check_consistent(bpe: BPE, path: Path) -> None:
    if not bpe.vocab:
        raise TokenizerError(f"{path}: the vocabulary is empty; download it again")
    ids = set(bpe.vocab.values())
    if len(ids) != len(bpe.vocab):
        raise TokenizerError(f"{path}: {len(bpe.vocab) - len(ids)} ids are given to more than one token")
    for left, right in bpe.merges:
        for token in (left, right, left + right):
            if token not in bpe.vocab:
                raise TokenizerError(f"{path}: the merge of {left!r} and {right!r} needs {token!r}, which has no id")


def apply_merges(word: str, ranks: Mapping[Pair, int]) -> list[str]:
    """Split one word into tokens: the merge of the lowest rank, the leftmost of equal ones, until none applies."""
    parts = list(word)
    while len(parts) > 1:
        found = [(ranks[pair], at) for at, pair in enumerate(pairwise(parts)) if pair in ranks]
        if not found:
            break
        _, at = min(found)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts
