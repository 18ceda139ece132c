"""Long texts are tokenized in pieces: the tokens of the whole, in time that grows with the length."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ggufmoe import ContextOptions, Engine
from ggufmoe.errors import Cancelled, ContextFullError, InputError
from ggufmoe.runtime.textpieces import PIECE_CHARS, SafeBorders, SpecialToken, pieces, special_ends
from ggufmoe.runtime.vocabulary import LoadedVocabulary
from tests.engines import local_engine
from tests.interrupts import interrupting
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
        yield "".join(rng.choice(alphabet) for _ in range(2 * PIECE_CHARS))
        yield "".join(rng.choice([*alphabet, "<|x|>", "<s>", "ab ab"]) for _ in range(2 * PIECE_CHARS))
    yield "".join(chr(rng.choice([0, 32, rng.randrange(128), rng.randrange(0x3000)])) for _ in range(2 * PIECE_CHARS))


def n_cut(engine: Engine, texts: Iterator[str], parse_special: bool) -> int:
    """How many of the texts are cut; all have the tokens that llama.cpp gives to the whole."""
    known, n = vocabulary(engine), 0
    for text in texts:
        whole = known._tokens_of(text, parse_special)
        assert engine.tokenize(text, add_bos=False, parse_special=parse_special) == whole
        n += len(list(known._cut(text, parse_special, lambda: None))) > 1
    return n


@pytest.mark.parametrize("parse_special", [True, False])
def test_the_tokens_of_the_pieces_are_those_of_the_whole(engine: Engine, parse_special: bool) -> None:
    assert n_cut(engine, texts(), parse_special) > 10


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


def cut(text: str, vocabulary: list[str], *specials: SpecialToken) -> list[str]:
    """The pieces of a text that is cut between ordinary characters alone."""
    return [piece.text for piece in pieces(text, SafeBorders(vocabulary).pattern(text, specials), ())]


def test_a_text_is_cut_before_characters_that_join_no_other() -> None:
    run = "ab" * PIECE_CHARS
    assert cut(run + "c" + run, ["ab", "ba", "c"]) == [run, "c" + run]
    assert cut(run, ["ab", "ba", "c"]) == [run]
    assert cut(run + " " + run, ["ab", "ba", "c"]) == [run + " " + run]


def test_a_text_is_not_cut_behind_a_special_token_or_beside_white_space_that_it_takes() -> None:
    run, stripping = "ab" * PIECE_CHARS, SpecialToken("x", True, False)
    assert cut(run + "c", ["ab", "ba", "c"], SpecialToken("b")) == [run + "c"]
    assert cut(run + "\n", ["ab", "ba", "c"]) == [run, "\n"]
    assert cut("x" + run + "\n", ["ab", "ba", "c"], stripping) == ["x" + run + "\n"]


def test_without_a_known_vocabulary_nothing_is_cut() -> None:
    text = "\0" * 3 * PIECE_CHARS
    assert cut(text, []) == [text]


# ---- special tokens that the text spells out


def ends(text: str, *specials: SpecialToken) -> list[int]:
    return special_ends(text, specials, lambda: None)


def test_special_tokens_are_found_as_llama_cpp_finds_them() -> None:
    s, bcd, ab = SpecialToken("<s>"), SpecialToken("bcd"), SpecialToken("ab")
    assert ends("a<s><s> b<s>", s) == [4, 7, 12]
    assert ends("abcd ab", ab, bcd) == [4, 7]  # the longest first, which leaves an "a"
    assert ends("ababa", SpecialToken("aba")) == [3]
    assert ends("\u00e9\u00e9<s>x", SpecialToken("\u00e9\u00e9"), s) == [2, 5]  # four bytes are longer than three


def test_white_space_that_a_special_token_takes_belongs_to_it() -> None:
    assert ends("a <s> \nb", SpecialToken("<s>", strips_right=True)) == [7]
    assert ends("<m> <m>", SpecialToken("<m>", True, True)) == [4, 7]
    left = SpecialToken("<l>", strips_left=True)
    assert ends("a  <l> b", left, SpecialToken("  ")) == [6]  # the blanks are gone when their turn comes


def test_where_the_order_of_two_tokens_is_not_known_none_is_found() -> None:
    assert ends("aba", SpecialToken("ab"), SpecialToken("ba")) == []
    assert ends("ab ba", SpecialToken("ab"), SpecialToken("cd")) == [2]


def test_a_text_is_cut_behind_its_special_tokens() -> None:
    found = list(pieces("<s>" * PIECE_CHARS, None, range(3, 3 * PIECE_CHARS + 1, 3)))
    assert [len(piece.text) for piece in found] == [4098, 4098, 4092]
    assert not any(piece.is_inside for piece in found)


SPECIALS = {"<|x|>": 4, "<|xx|>": 3, "ab": 4, "bab": 3, "\n\n": 4, "\n\n\n": 4, "  ": 4, "<|": 4}
BYTE_LETTERS = [chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 324))]


def byte_pairs(path: Path, pre: str = "llama-bpe") -> Path:
    """A byte-pair vocabulary with special tokens that overlap, whose texts are split into words as for ``pre``."""
    vocab = ["<unk>", "<s>", "</s>", *BYTE_LETTERS, "th", "the", "\u0120the", *SPECIALS]
    types = [2, 3, 3, *[NORMAL] * (len(vocab) - 3 - len(SPECIALS)), *SPECIALS.values()]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": vocab,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": ["t h", "th e", "\u0120 the"],
    }
    fillers = [f"filler {i}" for i in range(len(vocab) - len(Scripted().vocab))]
    return Scripted(pieces=fillers, metadata=metadata).write(path)


def sentence_pieces(path: Path) -> Path:
    """A SentencePiece vocabulary with the same special tokens."""
    spec = Scripted({"a": "b", "b": "a"}, pieces=["\u2581", *SPECIALS])
    types = [2, 3, 3, *[6] * 256, *(SPECIALS.get(piece, NORMAL) for piece in spec.vocab[259:])]
    metadata = {"tokenizer.ggml.add_space_prefix": True, "tokenizer.ggml.token_type": types}
    return Scripted(spec.follows, spec.pieces, metadata=metadata).write(path)


@pytest.fixture(params=[byte_pairs, sentence_pieces])
def special_engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    with Engine(request.param(tmp_path / "m.gguf"), ContextOptions(n_ctx=256, n_threads=1)) as engine:
        yield engine


def special_texts() -> Iterator[str]:
    rng = random.Random(15)
    alphabet = [*SPECIALS, "<s>", "</s>", "<unk>", " ", "a", "b", "x", "the", "\n", "|>", "\u00e9"]
    for used in (alphabet, ["<s>"], ["<s>", " "], ["a", "b"], ["\n"], ["\n", " "], ["<|", "xx", "|>"]):
        yield "".join(rng.choice(used) for _ in range(2 * PIECE_CHARS))
    yield "<s>" * PIECE_CHARS + "the " * PIECE_CHARS + "</s>" * PIECE_CHARS


@pytest.mark.parametrize("parse_special", [True, False])
def test_texts_of_special_tokens_have_the_tokens_of_the_whole(special_engine: Engine, parse_special: bool) -> None:
    assert n_cut(special_engine, special_texts(), parse_special) >= 6


def test_long_runs_of_special_tokens_take_a_second(special_engine: Engine) -> None:
    started = time.process_time()
    for literal in ("<s>", "</s>", "<unk>"):  # minutes where they are one piece
        assert len(special_engine.tokenize(literal * 100_000, add_bos=False, parse_special=True)) == 100_000
    assert time.process_time() - started < 15


# ---- texts that cannot fit, and stopping


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized(special_engine: Engine) -> None:
    started = time.process_time()
    for text in ("the " * 500_000, "<s>" * 500_000):
        with pytest.raises(ContextFullError, match=r"the text has at least \d+ tokens and the context holds 256"):
            special_engine.tokenize(text, parse_special=True, must_fit=True)
    assert time.process_time() - started < 2
    assert special_engine.tokenize("ab the", must_fit=True) == special_engine.tokenize("ab the")
    # what comes close is tokenized
    assert len(special_engine.tokenize("<s>" * 300, add_bos=False, parse_special=True, must_fit=True)) == 300


def test_the_lower_bound_is_one(special_engine: Engine) -> None:
    known = vocabulary(special_engine)
    bounds = [
        (known._least_tokens(text), len(special_engine.tokenize(text, add_bos=False, parse_special=special)))
        for text in special_texts()
        for special in (True, False)
    ]
    assert all(least <= there for least, there in bounds)
    assert sum(least > 0 for least, _ in bounds) >= 12  # with byte pairs, blanks do not count


def test_a_token_that_takes_white_space_lowers_the_bound(tmp_path: Path) -> None:
    text = "<mask>" + " \n" * 10_000
    with Engine(sentence_pieces(tmp_path / "m.gguf"), ContextOptions(n_ctx=256, n_threads=1)) as engine:
        known = vocabulary(engine)
        assert known._least_tokens(text) > 1000
        known._specials.append(SpecialToken("<mask>", strips_right=True))
        assert known._least_tokens(text) == 1


@pytest.mark.parametrize("pre", ["tekken", "gpt-4o", "default", "deepseek-llm"])
def test_a_word_of_many_letters_does_not_exhaust_the_stack(tmp_path: Path, pre: str) -> None:
    path = byte_pairs(tmp_path / "m.gguf", pre)
    code = """
import sys
from ggufmoe import ContextOptions, Engine, LlamaCpp

with Engine(sys.argv[1], ContextOptions(n_ctx=256, n_threads=1)) as engine:
    for char in "a!\\n ":
        print(len(engine.tokenize(char * 150_000, add_bos=False)) > 30_000)
llama = LlamaCpp(sys.argv[1], n_ctx=256, n_threads=1, verbose=False)
print(len(llama.tokenize(b"a" * 150_000)) > 30_000)
"""
    ended = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout.split(), ended.stderr) == (0, ["True"] * 5, "")  # a signal before


def test_a_line_that_would_exhaust_the_stack_is_refused(special_engine: Engine) -> None:
    has_byte_pairs = special_engine.header.get("tokenizer.ggml.model") == "gpt2"
    texts = local_engine(special_engine)._texts
    assert texts.stack_bytes == 2**30
    texts.stack_bytes = 2**20
    for line in ("x" * 3000, "\n " * 1500, "x y " * 700):
        text = "short\n" + line + "\nshort"
        if has_byte_pairs:
            with pytest.raises(InputError, match=r"a line of \d+ characters is more than .*, which are 2048: break"):
                special_engine.tokenize(text)
        else:
            assert special_engine.tokenize(text)
    assert special_engine.tokenize("x y\n" * 3000)


class _SetLater:
    """A flag that is set when it has been looked at several times."""

    n_looks = 0

    def is_set(self) -> bool:
        self.n_looks += 1
        return self.n_looks > 20


def test_tokenizing_is_cancelled_between_pieces(special_engine: Engine) -> None:
    with pytest.raises(Cancelled, match="tokenizing was stopped"):
        special_engine.tokenize("<s>" * 200_000, parse_special=True, cancel=_SetLater())
    assert special_engine.tokenize("ab", add_bos=False)


def test_tokenizing_unknown_characters_is_cancelled_between_pieces(engine: Engine) -> None:
    with pytest.raises(Cancelled, match="tokenizing was stopped"):
        engine.tokenize("\0" * 400_000, cancel=_SetLater())


def test_an_interrupted_caller_leaves_at_once(special_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, tokenized = local_engine(special_engine)._texts, []
    tokens_of = interrupting(LoadedVocabulary._tokens_of)

    def count(vocabulary: LoadedVocabulary, text: str, parse_special: bool) -> list[int]:
        tokenized.append(text)
        return tokens_of(vocabulary, text, parse_special)

    monkeypatch.setattr(LoadedVocabulary, "_tokens_of", count)
    with pytest.raises(KeyboardInterrupt):
        special_engine.tokenize("<s>" * 1_000_000, parse_special=True)
    texts.call(lambda: None)  # nobody works on it any more
    assert len("".join(tokenized)) < 1_500_000
