"""Shared by Q4_K and Q5_K: ``x ~ d*sc*level - dmin*m`` in 8 blocks of 32, with ``sc`` and ``m`` of 6 bits.

Follows ``quantize_row_q4_K_ref``, ``quantize_row_q4_K_impl`` and their Q5_K twins in ``ggml/src/ggml-quants.c``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ggufmoe.quant.kernels.lanes import Index, Lanes, Rows, Value
from ggufmoe.quant.kernels.packing import join_bytes
from ggufmoe.quant.kernels.searches import Affine, positive_fits
from ggufmoe.quant.kernels.superblocks import (
    WEIGHTS,
    Fits,
    Importance,
    affine_levels,
    fit_blocks,
    largest,
    sum_of_squares,
)

BLOCK = 32
N_BLOCKS = 8
HEADER_WORDS = 4


@dataclass(frozen=True)
class Superblock:
    """The quantized scales, widened again: a step and an offset for each block."""

    k: Lanes
    x: Rows
    fits: Fits
    step: Rows
    offset: Rows

    def pair(self, turn: Index, levels: Rows) -> None:
        """Levels (integers) of the 64 weights of blocks ``2*turn`` and ``2*turn + 1``."""
        for half in (0, 1):
            block = turn * 2 + half
            x = self.x.at(block * BLOCK)
            affine_levels(self.k, x, self.step[block], self.offset[block], self.fits, block, levels.at(half * BLOCK))


def quantize_superblock(k: Lanes, x: Rows, importance: Rows | None, plain: Affine, words: Rows) -> Superblock:
    """Search the blocks and quantize their scales; ``words`` 0 to 3 get d, dmin and the packed scales."""
    if importance is None:
        fits = fit_blocks(k, x, plain, _plain_weights)
        (d, scales), (d_min, minima) = (_plain_scales(k, rows) for rows in (fits.scale, fits.minimum))
    else:
        energy = sum_of_squares(k, x, WEIGHTS) * 2.0 / WEIGHTS
        fits = fit_blocks(k, x, Affine(BLOCK, plain.n_max, -0.9, 0.05, 36), Importance(importance, energy))
        (d, scales), (d_min, minima) = positive_fits(k, (fits.scale, fits.minimum), fits.weight, N_BLOCKS, 63)
        if plain.n_max == 31:  # only Q5_K clamps here; it matters for a level that wrapped around
            scales, minima = ([k.smaller(level, 63) for level in levels] for levels in (scales, minima))
    d_bits, min_bits = k.half_bits(d), k.half_bits(d_min)
    packed = _pack_scales(scales, minima)
    words[0] = d_bits | (min_bits << 16)
    for i in range(3):
        words[1 + i] = join_bytes(packed[4 * i : 4 * i + 4])
    step, offset = k.float_rows(N_BLOCKS), k.float_rows(N_BLOCKS)
    d, d_min = k.from_half_bits(d_bits), k.from_half_bits(min_bits)
    for j in range(N_BLOCKS):
        scale, minimum = _unpack_scale(packed, j)
        step[j], offset[j] = d * scale.to_float(), d_min * minimum.to_float()
    return Superblock(k, x, fits, step, offset)


def _plain_weights(k: Lanes, x: Rows, weights: Rows, n: int) -> None:
    average = k.square_root(sum_of_squares(k, x, n) / n)
    for i in range(n):
        weights[i] = average + k.magnitude(x[i])


def _plain_scales(k: Lanes, rows: Rows) -> tuple[Value, list[Value]]:
    top = largest(k, rows, N_BLOCKS)
    inverse = k.where(top > 0.0, 63.0 / top, 0.0)
    # the cast to uint8 comes before MIN(63, ...), as in ggml
    return top / 63.0, [k.smaller(k.nearest_int(inverse * rows[j]) & 0xFF, 63) for j in range(N_BLOCKS)]


def _pack_scales(scales: Sequence[Value], minima: Sequence[Value]) -> list[Value]:
    packed = [*scales[:4], *minima[:4]]
    for j in range(4, N_BLOCKS):
        packed.append((scales[j] & 0xF) | ((minima[j] & 0xF) << 4))
        packed[j - 4] = packed[j - 4] | ((scales[j] >> 4) << 6)
        packed[j] = packed[j] | ((minima[j] >> 4) << 6)
    return [byte & 0xFF for byte in packed]


def _unpack_scale(packed: Sequence[Value], j: int) -> tuple[Value, Value]:
    if j < 4:
        return packed[j] & 63, packed[j + 4] & 63
    scale = (packed[j + 4] & 0xF) | ((packed[j - 4] >> 6) << 4)
    return scale, (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4)
