"""Reads the tokenizer files of a directory, up to a maximum size.

The files are untrusted: values are read through typed getters, whose errors name the file.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggufmoe.checkpoint.jsonfile import read_optional
from ggufmoe.errors import CheckpointError, TokenizerError
from ggufmoe.files import decode_text, what_instead

_LOG = logging.getLogger("ggufmoe")

MAX_TOKENIZER_BYTES = 256 << 20
"""Above any real tokenizer file; those of 256,000 tokens have 35 MB."""
_LOOKED_FOR = "tokenizer.model, tokenizer.json"


@dataclass(frozen=True)
class AddedToken:
    """An added token, which the tokenizer finds in a text before it splits the rest."""

    id: int
    content: str
    special: bool
    normalized: bool = False
    strips: bool = False
    """Whether it strips the spaces around it or matches whole words only; llama.cpp supports neither."""


@dataclass(frozen=True)
class TokenizerFiles:
    """The contents of the tokenizer files of a directory; a JSON file that is missing is an empty object."""

    directory: Path
    model: bytes | None
    """``tokenizer.model``, a protocol buffer of sentencepiece; None if it is missing."""
    json: Mapping[str, Any]
    """``tokenizer.json``."""
    config: Mapping[str, Any]
    """``tokenizer_config.json``."""
    added: Mapping[str, Any]
    """``added_tokens.json``: content to id."""
    special_map: Mapping[str, Any]
    """``special_tokens_map.json``."""
    generation: Mapping[str, Any]
    """``generation_config.json``."""

    @classmethod
    def read(cls, directory: Path, *, warn: bool = True) -> TokenizerFiles:
        """Read the files of a directory; with ``warn`` those that are ignored are named in warnings.

        Raises TokenizerError if the directory has no tokenizer or a file cannot be read.
        """
        files = cls(
            directory=directory,
            model=_bytes(directory / "tokenizer.model"),
            json=_object(directory / "tokenizer.json", warn=warn),
            config=_optional(directory / "tokenizer_config.json", warn=warn),
            added=_optional(directory / "added_tokens.json", warn=warn),
            special_map=_optional(directory / "special_tokens_map.json", allow_broken=True, warn=warn),
            generation=read_optional(directory / "generation_config.json", allow_broken=True, warn=False),
        )
        if files.model is None and not files.json:
            raise TokenizerError(_missing(directory))
        return files

    @property
    def json_path(self) -> Path:
        """The path of ``tokenizer.json``, for messages."""
        return self.directory / "tokenizer.json"

    @property
    def is_byte_level(self) -> bool:
        """Whether ``tokenizer.json`` is byte-level BPE (as in GPT-2), not BPE on characters with byte fallback."""
        steps = [*nodes(self.json.get("pre_tokenizer"), "pretokenizers"), *nodes(self.json.get("decoder"), "decoders")]
        return any(step.get("type") == "ByteLevel" for step in steps)

    def added_in_json(self) -> list[AddedToken]:
        """The tokens in ``added_tokens`` of ``tokenizer.json``. Raises TokenizerError if malformed."""
        entries = expect(self.json.get("added_tokens") or [], list, self.json_path, "added_tokens")
        return [_added(entry, None, self.json_path) for entry in entries]

    def added_in_config(self) -> list[AddedToken]:
        """The tokens in ``added_tokens_decoder`` of ``tokenizer_config.json``. Raises TokenizerError if malformed."""
        path = self.directory / "tokenizer_config.json"
        entries = expect(self.config.get("added_tokens_decoder") or {}, dict, path, "added_tokens_decoder")
        return [_added(entry, key, path) for key, entry in entries.items()]

    def added_in_file(self) -> list[AddedToken]:
        """The tokens of ``added_tokens.json``, none of them special. Raises TokenizerError if malformed."""
        path = self.directory / "added_tokens.json"
        added = self.added.items()
        return [AddedToken(expect(value, int, path, content), content, special=False) for content, value in added]


def nodes(value: Any, children: str) -> Iterator[Mapping[str, Any]]:
    """Yield a processing step of tokenizer.json or, if it is a sequence, the steps inside it; nothing for null."""
    if isinstance(value, Mapping):
        if value.get("type") == "Sequence":
            inner = value.get(children)
            for child in inner if isinstance(inner, list) else []:
                yield from nodes(child, children)
        else:
            yield value


def expect(value: Any, kind: type, path: Path, what: str) -> Any:
    """Return ``value`` if it is an instance of ``kind`` (a bool is not an int). Raises TokenizerError otherwise."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TokenizerError(f"{path}: {what} should be a {kind.__name__}, found {type(value).__name__}")
    return value


def _added(entry: Any, key: str | None, path: Path) -> AddedToken:
    entry = expect(entry, dict, path, "an added token")
    token_id = entry.get("id") if key is None else (int(key) if key.isdecimal() and len(key) < 10 else None)
    return AddedToken(
        id=expect(token_id, int, path, "the id of an added token"),
        content=expect(entry.get("content"), str, path, "the content of an added token"),
        special=bool(entry.get("special")),
        normalized=bool(entry.get("normalized")),
        strips=any(entry.get(flag) for flag in ("lstrip", "rstrip", "single_word")),
    )


def _missing(directory: Path) -> str:
    found = [name for name in ("tekken.json", "vocab.json", "merges.txt") if (directory / name).is_file()]
    if "tekken.json" in found:
        hint = (
            "it has tekken.json, Mistral's own format: take tokenizer.json from the Hugging Face version of the model"
        )
    elif found:
        hint = f"it has {', '.join(found)} only: open it with transformers' AutoTokenizer and save_pretrained it"
    else:
        hint = "copy the tokenizer's files from the model that this one was made of"
    return f"{directory}: no tokenizer found (looked for {_LOOKED_FOR}); {hint}"


def _bytes(path: Path) -> bytes | None:
    if not path.is_file():
        return None
    try:
        size = path.stat().st_size
        if size > MAX_TOKENIZER_BYTES:
            raise TokenizerError(
                f"{path}: {size} bytes, more than the {MAX_TOKENIZER_BYTES} that a tokenizer file may have"
            )
        content = path.read_bytes()
        if len(content) < 4096 and (instead := what_instead(path)) is not None:
            raise TokenizerError(f"{path} is {instead}")
        return content
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from error


def _optional(path: Path, *, allow_broken: bool = False, warn: bool = True) -> Mapping[str, Any]:
    try:
        return read_optional(path, allow_broken=allow_broken, warn=warn)
    except CheckpointError as error:
        raise TokenizerError(str(error)) from error


def _object(path: Path, *, warn: bool) -> Mapping[str, Any]:
    content = _bytes(path)
    if content is None:
        return {}
    if not content.strip(b" \t\r\n\0"):
        if warn:
            _LOG.warning("%s is ignored: it is empty", path)
        return {}
    try:
        parsed = json.loads(decode_text(content))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not valid JSON ({error}); download it again") from error
    return dict(expect(parsed, dict, path, "the file"))
