"""Token ids of router prompts: BOS and the text, exactly as the base model's own tokenizer gives them.

Which tokenizer is used is decided as transformers decides it: ``tokenizer.json`` where there is one, else
``tokenizer.model``. Router rows depend on it: another rule for the leading space gives other rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ggufmoe.checkpoint.jsonfile import read_capped, read_object, read_optional
from ggufmoe.checkpoint.tokenizer_files import MAX_TOKENIZER_BYTES
from ggufmoe.errors import RecipeError, TokenizerError
from ggufmoe.files import decode_text


def prompt_tokenizer(tokenizer_dir: Path) -> Callable[[str], list[int]]:
    """A function from a prompt to its ids, BOS first where the tokenizer has one, no other special token added.

    Raises TokenizerError if the directory has neither tokenizer.json nor tokenizer.model.
    """
    settings = read_optional(tokenizer_dir / "tokenizer_config.json", warn=False)
    bos = special_text(tokenizer_dir, "bos_token")
    if _has_json(tokenizer_dir):
        return _from_json(tokenizer_dir / "tokenizer.json", bos)
    if (tokenizer_dir / "tokenizer.model").is_file():
        return _from_sentencepiece(tokenizer_dir / "tokenizer.model", bos, legacy=settings.get("legacy") is not False)
    raise TokenizerError(
        f"{tokenizer_dir}: the router prompts need a tokenizer.json or tokenizer.model; "
        "add one, or use gate_mode random or uniform_random"
    )


def tokenize_prompts(
    tokenize: Callable[[str], list[int]], prompts: Sequence[str], *, n_vocab: int, n_ctx: int
) -> list[list[int]]:
    """Ids of each prompt; RecipeError for one that is empty, longer than the context or outside the vocabulary."""
    ids = [tokenize(prompt) for prompt in prompts]
    for prompt, tokens in zip(prompts, ids, strict=True):
        shown = prompt if len(prompt) <= 40 else prompt[:39] + "…"
        if not tokens:
            raise RecipeError(f"the prompt {shown!r} gives no tokens; write more")
        if len(tokens) > n_ctx:
            raise RecipeError(f"the prompt {shown!r} has {len(tokens)} tokens, the base model's context is {n_ctx}")
        if max(tokens) >= n_vocab:
            raise RecipeError(
                f"the prompt {shown!r} gives token {max(tokens)}, the base model has only {n_vocab} embedding rows"
            )
    return ids


def read_vocabulary(tokenizer_dir: Path) -> dict[int, str]:
    """Token of each id, added tokens left out; empty where there is no tokenizer to read."""
    if _has_json(tokenizer_dir):
        model = read_object(tokenizer_dir / "tokenizer.json").get("model", {})
        vocabulary = model.get("vocab", {}) if isinstance(model, dict) else {}
        stated = vocabulary.items() if isinstance(vocabulary, dict) else ()
        return {token_id: token for token, token_id in stated if type(token_id) is int}
    if (tokenizer_dir / "tokenizer.model").is_file():
        pieces = _sentencepiece(tokenizer_dir / "tokenizer.model")
        return {i: pieces.id_to_piece(i) for i in range(pieces.vocab_size())}
    return {}


def _has_json(tokenizer_dir: Path) -> bool:
    """Whether there is a tokenizer.json with something in it."""
    path = tokenizer_dir / "tokenizer.json"
    return path.is_file() and path.stat().st_size > 0


def _sentencepiece(path: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise TokenizerError(f"{path}: not a sentencepiece model ({error})") from error


def special_text(tokenizer_dir: Path, key: str) -> str:
    """The text of ``bos_token`` or another special token that a tokenizer's files name; empty if they name none."""
    settings = read_optional(tokenizer_dir / "tokenizer_config.json", warn=False)
    special = read_optional(tokenizer_dir / "special_tokens_map.json", allow_broken=True, warn=False)
    token = settings.get(key) or special.get(key)
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _from_json(path: Path, bos: str) -> Callable[[str], list[int]]:
    from tokenizers import Tokenizer

    read_object(path)  # whose message for what is not JSON names the place
    try:
        tokenizer = Tokenizer.from_str(decode_text(read_capped(path, MAX_TOKENIZER_BYTES)))
    except Exception as error:  # the library raises bare Exception for a file it cannot use
        raise TokenizerError(f"{path}: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def tokenize(prompt: str) -> list[int]:
        ids: list[int] = tokenizer.encode(bos + prompt, add_special_tokens=False).ids
        return ids

    return tokenize


def _from_sentencepiece(path: Path, bos: str, *, legacy: bool) -> Callable[[str], list[int]]:
    """Text between special pieces goes through sentencepiece; only ``legacy`` puts a space before it."""
    model = _sentencepiece(path)
    bos = bos or (model.id_to_piece(model.bos_id()) if model.bos_id() >= 0 else "")
    special = {model.id_to_piece(i): i for i in range(model.vocab_size()) if model.is_control(i) or model.is_unknown(i)}
    splitter = re.compile("(" + "|".join(re.escape(piece) for piece in special) + ")")

    def tokenize(prompt: str) -> list[int]:
        ids: list[int] = []
        for part in filter(None, splitter.split(bos + prompt)):
            if part in special:
                ids.append(special[part])
            else:
                ids += model.encode(part) if legacy else _without_space(model, part)
        return ids

    return tokenize


def _without_space(model: Any, text: str) -> list[int]:
    """Ids of ``text`` without the space that sentencepiece puts before it: something is put there and cut off again."""
    shield = model.id_to_piece(model.unk_id())
    ids: list[int] = model.encode(shield + text)
    return ids[len(model.encode(shield)) :]
