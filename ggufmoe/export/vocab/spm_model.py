"""Vocabularies of a ``tokenizer.model``: sentencepiece's BPE models, read from the protocol buffer.

The reader checks every length and takes the few fields that it needs by number (``sentencepiece_model.proto``). A model
whose kind, normalization or byte fallback llama.cpp does not support is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ggufmoe.checkpoint.tokenizer_files import AddedToken, TokenizerFiles
from ggufmoe.errors import TokenizerError
from ggufmoe.export.vocab.token_rows import ADDED_SCORE, SPACE, TokenRows, TokenType, Vocabulary, require_bytes

_KINDS = {1: "Unigram", 2: "BPE", 3: "Word", 4: "Char"}


@dataclass(frozen=True)
class SentencePiece:
    """One entry of the model; the numbers of ``type`` are those of GGUF."""

    text: str
    score: float
    type: TokenType


@dataclass(frozen=True)
class SentencePieceModel:
    """The parts of a sentencepiece model that token ids depend on."""

    pieces: tuple[SentencePiece, ...]
    kind: str
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool
    whitespace_as_suffix: bool
    has_character_map: bool
    """Whether the model normalizes characters (for example to NFKC) before it looks for pieces."""


def vocabulary(files: TokenizerFiles, n_vocab: int) -> Vocabulary:
    """Make the vocabulary of ``tokenizer.model`` and the tokens that the JSON files add, padded to ``n_vocab`` tokens.

    Raises TokenizerError if llama.cpp would give other token ids, or if the files contradict each other.
    """
    path = files.directory / "tokenizer.model"
    model = parse(files.model or b"", path)
    _check_expressible(model, path)
    rows = TokenRows(n_vocab, path)
    texts = {piece.text for piece in model.pieces}
    for token_id, piece in enumerate(model.pieces):
        _put_piece(rows, token_id, piece, texts)
    in_config, in_json = files.added_in_config(), files.added_in_json()
    numbered = rows.without_gaps([*in_config, *in_json], files.added_in_file())
    for token in filter(rows.has_row_for, files.added_in_file()):
        rows.put(token.id, token.content, TokenType.USER_DEFINED, ADDED_SCORE)
    for token in numbered[: len(in_config)]:
        rows.put_added(token)
    for token in _left_out(numbered[len(in_config) :], rows, path):
        rows.put_added(token)
    rows.check_unique()
    require_bytes(rows.texts, path)
    stated, roles = files.config.get("add_prefix_space"), {"<s>": "bos", "</s>": "eos"}
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=tuple(rows.texts),
        types=tuple(rows.types),
        scores=tuple(rows.scores),
        add_space_prefix=stated if isinstance(stated, bool) else None if model.add_dummy_prefix else False,
        adds_bos_by_default=True,
        fallback_ids={
            roles[piece.text]: token_id
            for token_id, piece in enumerate(model.pieces)
            if piece.type is TokenType.CONTROL and piece.text in roles
        },
    )


def _put_piece(rows: TokenRows, id: int, piece: SentencePiece, texts: set[str]) -> None:
    if piece.type is not TokenType.USER_DEFINED:
        rows.put(id, piece.text, piece.type, piece.score)
    elif _merges_by_itself(piece.text, texts):
        rows.put(id, piece.text, TokenType.NORMAL, piece.score)
    else:
        rows.put(id, piece.text.replace(SPACE, " "), TokenType.USER_DEFINED, piece.score)


def _merges_by_itself(text: str, texts: set[str]) -> bool:
    """Whether llama.cpp finds a user-defined piece by merging: a single character, or a run of spaces.

    Such a piece is written as a normal one: after a user-defined token llama.cpp puts a space, sentencepiece does not.
    """
    return len(text) == 1 or (not text.strip(SPACE) and all(SPACE * n in texts for n in range(1, len(text))))


def _left_out(added: list[AddedToken], rows: TokenRows, path: Path) -> list[AddedToken]:
    """The tokens of ``added`` that have no row yet; TokenizerError if a row already holds another token."""
    for token in added:
        if rows.has(token.id) and token.content.replace(SPACE, " ") != rows.texts[token.id].replace(SPACE, " "):
            raise TokenizerError(
                f"{path}: token {token.id} is {rows.texts[token.id][:40]!r}, but {token.content[:40]!r} in "
                "tokenizer.json; keep the one that belongs to the model and remove the other file"
            )
    return [token for token in added if not rows.has(token.id)]


def _check_expressible(model: SentencePieceModel, path: Path) -> None:
    unused = any(piece.type is TokenType.UNUSED and len(piece.text) > 1 for piece in model.pieces)
    problems = {
        f"it is a {model.kind} model, and only BPE models are supported": model.kind != "BPE",
        "it normalizes characters before tokenizing (NFKC or the like)": model.has_character_map,
        "it removes extra spaces": model.remove_extra_whitespaces,
        "it does not escape spaces": not model.escape_whitespaces,
        "it puts spaces at the end of words": model.whitespace_as_suffix,
        "it has unused pieces, which sentencepiece splits again": unused,
    }
    for problem, applies in problems.items():
        if applies:
            raise TokenizerError(
                f"{path}: llama.cpp would give other token ids: {problem}; "
                "if the model also has a tokenizer.json, remove tokenizer.model"
            )


def parse(data: bytes, path: Path) -> SentencePieceModel:
    """Parse a serialized ``ModelProto``. Raises TokenizerError if it is malformed."""
    pieces: list[SentencePiece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    try:
        for number, value in _fields(data):
            if number == 1 and isinstance(value, bytes):
                pieces.append(_piece(value))
            elif number == 2 and isinstance(value, bytes):
                trainer = dict(_fields(value))
            elif number == 3 and isinstance(value, bytes):
                normalizer = dict(_fields(value))
        if not pieces or not trainer or not normalizer:
            raise ValueError("it ends before it says how it was trained" if pieces else "it has no pieces")
        kind = _KINDS[int(trainer.get(3, 1))]
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise TokenizerError(
            f"{path}: not a sentencepiece model ({error}); "
            "if the model's tokenizer is in tokenizer.json, remove tokenizer.model"
        ) from error
    return SentencePieceModel(
        pieces=tuple(pieces),
        kind=kind,
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        escape_whitespaces=bool(normalizer.get(5, 1)),
        whitespace_as_suffix=bool(trainer.get(24, 0)),
        has_character_map=bool(normalizer.get(2)),
    )


def _piece(data: bytes) -> SentencePiece:
    fields = dict(_fields(data))
    text, score, kind = fields.get(1, b""), fields.get(2, bytes(4)), fields.get(3, 1)
    if not isinstance(text, bytes) or not isinstance(score, bytes) or not isinstance(kind, int):
        raise ValueError("a piece whose fields are of other types")
    return SentencePiece(text.decode("utf-8"), float(struct.unpack("<f", score)[0]), TokenType(kind))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the fields of a protocol buffer message: number, and an integer or the bytes of any other type."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if length > len(data) - at:
            raise ValueError(f"cut short at byte {at}")
        yield key >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        if at >= len(data):
            raise ValueError("cut short inside a number")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError(f"number too long at byte {at}")
