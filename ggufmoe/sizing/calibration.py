"""The sequences of tokens that a sensitivity is measured on, taken from a text or from a file of conversations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ggufmoe.errors import InputError
from ggufmoe.merge.router_texts import MAX_TEXT_TOKENS, TextTokens, read_texts
from ggufmoe.sizes import counted


def text_sequences(text: str, tokens: TextTokens, *, n_tokens: int, n_ctx: int) -> list[Sequence[int]]:
    """Sequences of ``n_ctx`` tokens, ``n_tokens`` together or a few more, from places spread evenly over a text.

    BOS takes the place of the first token of each, where the model's texts begin with it. Raises InputError for a text
    that has fewer tokens, and for tokens that the model does not have.
    """
    size = min(n_ctx, n_tokens, tokens.n_ctx)
    ids = list(tokens.tokenize(text))
    begin = list(tokens.tokenize(""))[:1]
    n_wanted, n_there = -(-n_tokens // size), len(ids) // size
    if n_there < n_wanted:
        raise InputError(
            f"the text has {counted(len(ids), 'token')}, and {counted(n_wanted, 'sequence')} of {size} need "
            f"{n_wanted * size}: take a longer text, or use fewer tokens of it (--tokens, n_tokens)"
        )
    starts = [i * n_there // n_wanted * size for i in range(n_wanted)]
    return _known([begin + ids[start + len(begin) : start + size] for start in starts], tokens)


def file_sequences(path: Path, tokens: TextTokens, *, n_tokens: int, seed: int) -> list[Sequence[int]]:
    """Texts and conversations of a ``.jsonl`` file, drawn by ``seed``, of about ``n_tokens`` together.

    Each is a sequence; of a longer one ``MAX_TEXT_TOKENS`` are used. Conversations are rendered by the model's chat
    template. Raises InputError for a file with fewer tokens, RecipeError for one that is not what its name says.
    """
    found = [text.tokens for text in read_texts([[path]], tokens, text_tokens=n_tokens, seed=seed)]
    there = sum(map(len, found))
    if there + MAX_TEXT_TOKENS < n_tokens:
        raise InputError(
            f"{path}: its texts have {counted(there, 'token')} together, {n_tokens} are needed: write more, or use "
            "fewer tokens (--tokens, n_tokens)"
        )
    return _known(found, tokens)


def _known(sequences: Sequence[Sequence[int]], tokens: TextTokens) -> list[Sequence[int]]:
    largest = max(map(max, sequences))
    if largest >= tokens.n_vocab:
        raise InputError(f"the text gives token {largest}, the model has only {tokens.n_vocab} embedding rows")
    return list(sequences)
