"""Packs levels into bytes and words in the orders of ggml's blocks."""

from __future__ import annotations

from collections.abc import Sequence

from ggufmoe.quant.kernels.lanes import Rows, Value


def join_bytes(values: Sequence[Value]) -> Value:
    """Four values below 256 as one little-endian word."""
    first, second, third, fourth = values
    return first | (second << 8) | (third << 16) | (fourth << 24)


def pack_pairs_of_bits(levels: Rows, words: Rows) -> None:
    """128 levels of 2 bits into 8 words: byte l holds the levels l, l + 32, l + 64 and l + 96."""
    for word in range(8):
        packed = []
        for i in range(4 * word, 4 * word + 4):
            first, second, third, fourth = (levels[i + 32 * quarter] for quarter in range(4))
            packed.append(first | (second << 2) | (third << 4) | (fourth << 6))
        words[word] = join_bytes(packed)


def pack_nibbles(levels: Sequence[Value]) -> list[Value]:
    """32 levels below 16 into 4 words: byte j holds levels j and j + 16."""
    packed = [levels[j] | (levels[j + 16] << 4) for j in range(16)]
    return [join_bytes(packed[i : i + 4]) for i in range(0, 16, 4)]


def pack_fifth_bits(levels: Sequence[Value]) -> Value:
    """Bit j of the word is the fifth bit of level j."""
    word = levels[0] >> 4
    for j, level in enumerate(levels[1:], 1):
        word = word | ((level >> 4) << j)
    return word


def pack_scale_nibbles(levels: Sequence[Value]) -> list[Value]:
    """Levels below 16 into words, two neighbours a byte, the first in its low half."""
    packed = [levels[j] | (levels[j + 1] << 4) for j in range(0, len(levels), 2)]
    return [join_bytes(packed[i : i + 4]) for i in range(0, len(packed), 4)]
