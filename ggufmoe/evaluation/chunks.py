"""A text as chunks of equal length, cut as llama.cpp's tools cut it, and the rows of logits that are scored in them.

Every chunk begins with BOS where the model wants one, in the place of its first token. Only the second half is scored,
so that each scored token has half a chunk of text before it. What is left over at the end is not used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ggufmoe.errors import InputError
from ggufmoe.options import EvaluationOptions
from ggufmoe.runtime.chunkbatch import ComputedPart
from ggufmoe.runtime.engine import Engine
from ggufmoe.sizes import counted

Chunks = list[list[int]]
_BLOCK_ROWS = 64
"""Rows of logits worked on at once: what is made of them stays in a processor's cache."""


def read_text(text: str | os.PathLike[str]) -> str:
    """``text`` itself, or what a file holds, without the end of its last line.

    Raises InputError if the file cannot be read or is not UTF-8.
    """
    if isinstance(text, str):
        return text
    path = Path(text).expanduser()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot read the text: {error.strerror or error}") from error
    try:
        return data.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: byte {error.start} is not UTF-8; convert the text first") from error


def cut_chunks(engine: Engine, text: str, options: EvaluationOptions) -> Chunks:
    """The chunks of a text. Raises InputError if it does not fill two of them, as llama.cpp does."""
    size = options.n_ctx
    tokens = engine.tokenize(text)
    if len(tokens) < 2 * size:
        raise InputError(
            f"the text has {counted(len(tokens), 'token')}, and two chunks of {size} need {2 * size}: "
            "take a longer text, or shorter chunks with --ctx-size"
        )
    n_chunks = len(tokens) // size
    if options.chunks > 0:
        n_chunks = min(n_chunks, options.chunks)
    begin = [engine.bos_token] if engine.adds_bos and engine.bos_token is not None else []
    return [begin + tokens[i * size + len(begin) : (i + 1) * size] for i in range(n_chunks)]


def scored_blocks(
    part: ComputedPart, number: int, chunk: Sequence[int]
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """Logits of one chunk, (rows, n_vocab), with the token that really followed each row: a few rows at a time."""
    rows = part.logits(number)
    targets = np.asarray(chunk, np.int64)[part.scored.start + 1 : part.scored.stop + 1]
    for begin in range(0, len(targets), _BLOCK_ROWS):
        block = targets[begin : begin + _BLOCK_ROWS]
        yield rows[begin : begin + len(block)], block
