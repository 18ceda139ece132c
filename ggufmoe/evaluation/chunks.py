"""Shared by all evaluations of a text: reading it, splitting it into chunks, selecting scored logits, and progress.

As in llama.cpp's tools, BOS replaces the first token of every chunk if the model wants BOS. Only the second half of a
chunk is scored, so that each scored token follows at least half a chunk. Tokens left over at the end are not used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ggufmoe.engine import Engine
from ggufmoe.errors import Cancelled, InputError, OptionError
from ggufmoe.files import StrPath, decode_text, user_path
from ggufmoe.options import EvaluationOptions
from ggufmoe.runtime.chunkbatch import ComputedPart
from ggufmoe.sizes import counted
from ggufmoe.work import CancelFlag, OnProgress, Progress

Chunks = list[list[int]]
_BLOCK_ROWS = 64
"""Rows of logits that are scored at once, few enough for their arrays to stay in the processor's cache."""


class ChunkResult(Protocol):
    """The result of an evaluation over the chunks completed so far."""

    @property
    def n_chunks(self) -> int: ...
    @property
    def total_chunks(self) -> int: ...
    @property
    def is_complete(self) -> bool: ...


ResultT = TypeVar("ResultT", bound=ChunkResult)


def report_chunks(on_progress: OnProgress | None, result: ChunkResult) -> None:
    """Call ``on_progress`` with the number of completed chunks and the result over them."""
    if on_progress is not None:
        on_progress(Progress("chunks", result.n_chunks, result.total_chunks, "chunks", result=result))


def last_result(results: Iterator[ResultT], on_progress: OnProgress | None) -> ResultT:
    """Report each of ``results`` and return the last one. Raises Cancelled if there is none."""
    last = None
    for last in results:
        report_chunks(on_progress, last)
    if last is None:
        raise Cancelled("stopped before the first chunk was done")
    return last


def check_complete(result: ChunkResult) -> None:
    """Raise Cancelled if the evaluation was stopped before its last chunk."""
    if not result.is_complete:
        raise Cancelled(f"stopped after {result.n_chunks} of {result.total_chunks} chunks; the result covers these")


_MAX_TEXT_BYTES = 512 * 2**20
"""Texts that perplexity is measured on have some megabytes."""


def read_text(text: str | None, text_file: StrPath | None) -> str:
    """Return ``text``, or the content of ``text_file`` without its last newline.

    Raises OptionError unless exactly one is given, TypeError if ``text`` is not a str, InputError if the file cannot be
    read or is not UTF-8.
    """
    if (text is None) is (text_file is None):
        raise OptionError("give either text, the text itself, or text_file, the path of a file")
    if text_file is None:
        if not isinstance(text, str):
            raise TypeError(f"text must be a text (str), not {text!r}: give the path of a file as text_file")
        return text
    path = user_path(text_file)
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_TEXT_BYTES + 1)  # a device may be without end
    except OSError as error:
        raise InputError(f"{path}: cannot read the text: {error.strerror or error}") from error
    if len(data) > _MAX_TEXT_BYTES:
        raise InputError(f"{path}: more than {_MAX_TEXT_BYTES >> 20} MiB of text; take a part of it")
    try:
        return decode_text(data).removesuffix("\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: byte {error.start} is not UTF-8; convert the text first") from error


def cut_chunks(engine: Engine, text: str, options: EvaluationOptions, cancel: CancelFlag | None = None) -> Chunks:
    """Split a text into chunks of ``options.n_ctx`` tokens.

    Raises InputError if the text does not fill two chunks, as llama.cpp's tools do, and Cancelled.
    """
    size = options.n_ctx
    tokens = engine.tokenize(text, cancel=cancel)
    if len(tokens) < 2 * size:
        raise InputError(
            f"the text has {counted(len(tokens), 'token')}, and two chunks of {size} need {2 * size}: "
            "take a longer text, or shorter chunks (--ctx-size, n_ctx)"
        )
    n_chunks = len(tokens) // size
    if options.chunks > 0:
        n_chunks = min(n_chunks, options.chunks)
    begin = [engine.bos_token] if engine.adds_bos and engine.bos_token is not None else []
    return [begin + tokens[i * size + len(begin) : (i + 1) * size] for i in range(n_chunks)]


def scored_blocks(
    part: ComputedPart, number: int, chunk: Sequence[int]
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """Pairs of logits (n, n_vocab) and next-token ids (n,) for the scored positions of one chunk in ``part``.

    ``number`` is the chunk's number in the text and ``chunk`` its tokens; n is at most _BLOCK_ROWS. The logits are
    views, valid until the next part is computed.
    """
    rows = part.logits(number)
    targets = np.asarray(chunk, np.int64)[part.scored.start + 1 : part.scored.stop + 1]
    for begin in range(0, len(targets), _BLOCK_ROWS):
        block = targets[begin : begin + _BLOCK_ROWS]
        yield rows[begin : begin + len(block)], block
