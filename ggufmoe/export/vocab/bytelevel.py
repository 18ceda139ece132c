"""Byte-level BPE, as GPT-2, Llama 3 and SmolLM2 have it: tokens, merges and the name of the pre-tokenizer."""

from __future__ import annotations

import logging
from pathlib import Path

from ggufmoe.checkpoint.tokenizer_files import AddedToken, TokenizerFiles, nodes
from ggufmoe.errors import TokenizerError
from ggufmoe.export.vocab.bpe import BPE, apply_merges, read_bpe
from ggufmoe.export.vocab.pretokenizer import recognise
from ggufmoe.export.vocab.token_rows import TokenRows, TokenType, Vocabulary
from ggufmoe.families.family import TokenizerRules

_LOG = logging.getLogger("ggufmoe")

_SPACE_BYTE = "\u0120"
_NEVER_IN_UTF8 = frozenset((0xC0, 0xC1, *range(0xF5, 0x100)))


def vocabulary(files: TokenizerFiles, n_vocab: int, rules: TokenizerRules) -> Vocabulary:
    """Make the vocabulary of a byte-level ``tokenizer.json``, padded to ``n_vocab`` tokens, by the rules of a family.

    Raises TokenizerError if llama.cpp has no such pre-tokenizer or would treat merges or bytes differently.
    """
    path = files.json_path
    bpe = read_bpe(files)
    _check_steps(files, bpe, path)
    pre = recognise(files.json.get("pre_tokenizer"), bpe.ignore_merges, path, rules.pre_tokenizer)
    added = {token.id: token for token in files.added_in_config() + files.added_in_json()}
    contents = {token.content for token in added.values()}
    if pre.ignore_merges != bpe.ignore_merges:
        # looking whole words up first changes nothing if merging makes one token of each token's own text
        ranks = {pair: rank for rank, pair in enumerate(bpe.merges)}
        if not all(token in contents or apply_merges(token, ranks) == [token] for token in bpe.vocab):
            raise TokenizerError(
                f"{path}: ignore_merges is {bpe.ignore_merges}, but {pre.ignore_merges} for llama.cpp's {pre.name}, "
                "and the merges of this vocabulary do not make all of its tokens"
            )
    _check_bytes(bpe, path)
    rows = _rows(bpe, added, n_vocab, path)
    return Vocabulary(
        model="gpt2",
        pre=pre.name,
        tokens=tuple(rows.texts),
        types=tuple(rows.types),
        merges=tuple(f"{_spelt(left)} {_spelt(right)}" for left, right in bpe.merges),
        add_space_prefix=False if rules.as_llama and files.config.get("add_prefix_space") is False else None,
        adds_bos_by_default=pre.adds_bos,
    )


def byte_alphabet() -> dict[int, str]:
    """Map each byte to the printable character that stands for it in GPT-2's vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


def _rows(bpe: BPE, added: dict[int, AddedToken], n_vocab: int, path: Path) -> TokenRows:
    rows = TokenRows(n_vocab, path)
    for token, token_id in bpe.vocab.items():
        rows.put(token_id, token, TokenType.NORMAL)
    rows.put_all_added(added.values())
    rows.check_unique()
    return rows


def _spelt(part: str) -> str:
    """One token of a merge as GGUF writes it: spaces become U+0120, since a space separates the two tokens."""
    return part.replace(" ", _SPACE_BYTE)


def _check_bytes(bpe: BPE, path: Path) -> None:
    missing = [byte for byte, character in byte_alphabet().items() if character not in bpe.vocab]
    if bpe.unk_token is not None and not _NEVER_IN_UTF8.issuperset(missing):
        raise TokenizerError(
            f"{path}: byte {min(missing):#04x} has no token and gives {bpe.unk_token!r}; llama.cpp would drop it"
        )


def _check_steps(files: TokenizerFiles, bpe: BPE, path: Path) -> None:
    for step in nodes(files.json.get("normalizer"), "normalizers"):
        if step.get("type") != "NFC":
            raise TokenizerError(f"{path}: llama.cpp does not support the normalizer {str(dict(step))[:200]}")
        _LOG.warning("%s: llama.cpp does not normalize to NFC; ids of text that is not in NFC will differ", path)
    for step in nodes(files.json.get("decoder"), "decoders"):
        if step.get("type") != "ByteLevel":
            raise TokenizerError(f"{path}: decoder {str(dict(step))[:200]} is not the byte-level one")
    if bpe.byte_fallback:
        raise TokenizerError(f"{path}: llama.cpp does not support a byte-level vocabulary with byte_fallback")
