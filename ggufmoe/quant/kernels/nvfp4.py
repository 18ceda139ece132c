"""NVFP4: 4 blocks of 16 weights as 4-bit floats (E2M1), an 8-bit float scale (UE4M3) for each block; 36 bytes.

Follows ``quantize_row_nvfp4_ref``, ``best_index_mxfp4`` and ``ggml_fp32_to_ue4m3`` of ggml. Importances do not matter.
"""

from __future__ import annotations

from ggufmoe.quant.kernels.lanes import Lanes, Rows, Value
from ggufmoe.quant.kernels.packing import join_bytes
from ggufmoe.quant.kernels.tiles import Tiles

_BLOCK = 16
_N_BLOCKS = 4
_LEVELS = (1, 2, 3, 4, 6, 8, 12)
"""Twice the values of E2M1 above 0; the scale is halved for that."""
_LARGEST_SCALE = 448.0
_LARGEST_BITS = 0x7E


def quantize(k: Tiles, x: Rows, importance: Rows | None) -> None:
    """Write the block of each lane."""
    scales, words = k.int_rows(_N_BLOCKS), k.int_rows(2 * _N_BLOCKS)
    with k.loop(_N_BLOCKS) as j:
        block = x.at(j * _BLOCK)
        top = k.f32(0.0)
        for i in range(_BLOCK):
            top = k.larger(k.magnitude(block[i]), top)
        bits = _scale_bits(k, top / 6.0)
        scales[j] = bits
        levels = _levels(k, block, _half_scale(k, bits))
        packed = [levels[i] | (levels[i + 8] << 4) for i in range(8)]
        for i in range(2):
            words.at(j * 2)[i] = join_bytes(packed[4 * i : 4 * i + 4])
    k.store_words(0, [join_bytes(scales.first(_N_BLOCKS)), *words.first(2 * _N_BLOCKS)])


def _levels(k: Lanes, x: Rows, scale: Value) -> list[Value]:
    """The nearest of the sixteen values to each weight, the first of equals, as ggml numbers them.

    Only values of the weight's own sign can be nearer than 0, which comes first.
    """
    values = [scale * float(level) for level in _LEVELS]
    levels = []
    for i in range(_BLOCK):
        magnitude = k.magnitude(x[i])
        least, found = magnitude, k.i32(0)
        for number, value in enumerate(values, 1):
            error = k.magnitude(value - magnitude)
            nearer = error < least
            least, found = k.where(nearer, error, least), k.where(nearer, k.i32(number), found)
        negative = (x[i] < 0.0) & found.differs(0)
        levels.append(k.where(negative, found | 8, found))
    return levels


def _scale_bits(k: Lanes, scale: Value) -> Value:
    """The bits of the UE4M3 nearest to a scale that is not negative."""
    scale = k.smaller(scale, _LARGEST_SCALE)
    exponent = (scale.bits() >> 23) - (127 - 7)
    subnormal = k.smaller((scale * 512.0 + 0.5).to_int(), 7)
    # a mantissa that is rounded up to 8 is carried into the exponent
    normal = (exponent << 3) + ((scale.bits() >> 20) & 7) + ((scale.bits() >> 19) & 1)
    normal = k.where(normal > (15 << 3) - 1, _LARGEST_BITS, normal)
    return k.where(exponent > 0, normal, subnormal)


def _half_scale(k: Lanes, bits: Value) -> Value:
    """Half the value of UE4M3 bits."""
    exponent, mantissa = bits >> 3, bits & 7
    normal = (((exponent + (127 - 7 - 1)) << 23) | (mantissa << 20)).as_float_bits()
    return k.where(exponent.equals(0), mantissa.to_float() * 2.0**-10, normal)
