"""Long texts are tokenized in pieces: the tokens of the whole, in time that grows with the length."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ggufmoe import ContextOptions, Engine
from ggufmoe.errors import InputError
from ggufmoe.runtime.vocabulary import PIECE_CHARS, LoadedVocabulary, SafeBorders
from tests.engines import local_engine
from tests.scripted import Scripted

NORMAL = 1
SCRIPTED = Scripted({"a": "b", "b": "a", "<|x|>": "a"}, pieces=["\u2581", "\u2581a", "ab", "\u2581ab"])


@pytest.fixture(params=[True, False], ids=["space before", "no space before"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """SentencePiece with byte tokens, in which most pieces are normal tokens and one is a special one."""
    types = [2, 3, 3, *[6] * 256]
    types += [4 if piece == "<|x|>" else NORMAL for piece in SCRIPTED.vocab[len(types) :]]
    metadata = {"tokenizer.ggml.add_space_prefix": request.param, "tokenizer.ggml.token_type": types}
    path = Scripted(SCRIPTED.follows, SCRIPTED.pieces, metadata=metadata).write(tmp_path / "m.gguf")
    with Engine(path, ContextOptions(n_ctx=256, n_threads=1)) as engine:
        yield engine


def vocabulary(engine: Engine) -> LoadedVocabulary:
    return local_engine(engine)._vocabulary


def texts() -> Iterator[str]:
    rng = random.Random(14)
    for alphabet in ("\0", "\n", "\0\n ab", "ab \0", "<|x|>\0", "<s>\n\0 </s>", "\u2581 \0a", "\u65e5\u672c ab\n"):
        yield "".join(rng.choice(alphabet) for _ in range(3 * PIECE_CHARS))
        yield "".join(rng.choice([*alphabet, "<|x|>", "<s>", "ab ab"]) for _ in range(3 * PIECE_CHARS))
    yield "".join(chr(rng.choice([0, 32, rng.randrange(128), rng.randrange(0x3000)])) for _ in range(3 * PIECE_CHARS))


@pytest.mark.parametrize("parse_special", [True, False])
def test_the_tokens_of_the_pieces_are_those_of_the_whole(engine: Engine, parse_special: bool) -> None:
    known = vocabulary(engine)
    n_cut = 0
    for text in texts():
        whole = known._tokens_of(text, parse_special)
        assert engine.tokenize(text, add_bos=False, parse_special=parse_special) == whole
        n_cut += len(known._borders.pieces(text)) > 1
    assert n_cut > 10


def test_long_runs_of_unknown_characters_take_a_second(engine: Engine) -> None:
    started = time.process_time()
    assert len(engine.tokenize("\0" * 400_000, add_bos=False)) >= 400_000  # 21 s where it is one piece
    assert time.process_time() - started < 5


def test_a_character_without_a_token_is_refused_by_name(tmp_path: Path) -> None:
    vocab = [text.replace("<0x", "no byte ") for text in SCRIPTED.vocab]
    types = [2, 3, 3, *[NORMAL] * (len(vocab) - 3)]
    metadata = {"tokenizer.ggml.tokens": vocab, "tokenizer.ggml.token_type": types}
    path = Scripted(SCRIPTED.follows, SCRIPTED.pieces, metadata=metadata).write(tmp_path / "m.gguf")
    with Engine(path, ContextOptions(n_ctx=256, n_threads=1)) as engine:
        assert engine.tokenize("ab a", add_bos=False)
        with pytest.raises(InputError, match="no token for '\u00e9', nor for its bytes"):
            engine.tokenize("ab \u00e9")


def test_a_text_is_cut_before_characters_that_join_no_other() -> None:
    borders = SafeBorders(["ab", "ba", "c"], {})
    run = "ab" * PIECE_CHARS
    assert borders.pieces(run + "c" + run) == [run, "c" + run]
    assert borders.pieces(run) == [run]
    assert borders.pieces(run + " " + run) == [run + " " + run]


def test_a_text_is_not_cut_behind_a_special_token_or_beside_white_space_that_it_takes() -> None:
    run = "ab" * PIECE_CHARS
    assert SafeBorders(["ab", "ba", "c"], {"b": False}).pieces(run + "c") == [run + "c"]
    assert SafeBorders(["ab", "ba", "c"], {"x": True}).pieces(run + "\n") == [run, "\n"]
    assert SafeBorders(["ab", "ba", "c"], {"x": True}).pieces("x" + run + "\n") == ["x" + run + "\n"]


def test_without_a_known_vocabulary_nothing_is_cut() -> None:
    text = "\0" * 3 * PIECE_CHARS
    assert SafeBorders((), {}).pieces(text) == [text]
