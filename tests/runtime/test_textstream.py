"""Text comes out in whole characters and without stop strings."""

from __future__ import annotations

import codecs
import random

import pytest

from ggufmoe.runtime.textstream import TextStream


def shown(pieces: list[bytes], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    stream = TextStream(stop)
    texts = [stream.push(piece) for piece in pieces]
    return [*texts, stream.flush()], stream.stopped


def test_without_stop_strings_everything_is_shown_at_once() -> None:
    assert shown([b"one", b" two"]) == (["one", " two", ""], False)


def test_a_character_over_three_pieces() -> None:
    assert shown(["é日".encode()[:1], "é日".encode()[1:4], "é日".encode()[4:]]) == (["", "é", "日", ""], False)


def test_bytes_that_are_no_character() -> None:
    assert shown([b"a\xffb", b"\xe2\x82"]) == (["a\ufffdb", "", "\ufffd"], False)


@pytest.mark.parametrize("seed", range(50))
def test_any_bytes_are_decoded_as_codecs_decodes_them(seed: int) -> None:
    rng = random.Random(seed)
    data = bytes(rng.choices(b"a\xff" + "é日😀".encode(), k=60))
    pieces = [data[begin : begin + 3] for begin in range(0, len(data), 3)]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    expected = [decoder.decode(piece) for piece in pieces]
    assert shown(pieces) == ([*expected, decoder.decode(b"", final=True)], False)


def test_a_stop_string_within_a_piece_and_over_pieces() -> None:
    assert shown([b"go on STOP more", b"x"], ("STOP",)) == (["go on ", "", ""], True)
    assert shown([b"go ST", b"O", b"P now"], ("STOP",)) == (["go ", "", "", ""], True)


def test_what_only_looked_like_a_stop_string_is_shown_later() -> None:
    assert shown([b"S", b"T", b"ART"], ("STOP",)) == (["", "", "START", ""], False)
    assert shown([b"end ST"], ("STOP",)) == (["end ", "ST"], False)


def test_the_earliest_of_several_stop_strings_wins() -> None:
    assert shown([b"a user: b </s>"], ("</s>", "user:", "")) == (["a ", ""], True)


def test_a_stop_string_that_overlaps_itself() -> None:
    assert shown([b"aab", b"aabb"], ("aabb",)) == (["", "aab", ""], True)


@pytest.mark.parametrize("stop", [(), ("zzz",)])
def test_nothing_in_nothing_out(stop: tuple[str, ...]) -> None:
    assert shown([], stop) == ([""], False)
