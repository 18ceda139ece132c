"""A colour for every expert, told apart also by people who do not see all colours."""

from __future__ import annotations

import colorsys

Colour = tuple[int, int, int]

# after Okabe and Ito, the two that differ most first
_COLOURS: tuple[Colour, ...] = (
    (86, 180, 233),
    (230, 159, 0),
    (0, 158, 115),
    (204, 121, 167),
    (240, 228, 66),
    (213, 94, 0),
    (60, 120, 220),
    (153, 153, 153),
)
_GOLDEN_ANGLE = 0.381966
_SHADES = ((0.46, 0.75), (0.57, 0.6), (0.68, 0.85))
"""Lightness and saturation of further experts in turn: hue alone does not tell so many apart, least of all to people
who do not see all colours."""


def expert_colour(expert: int) -> Colour:
    """Red, green and blue (0 to 255) of one expert; the first eight are known to be easy to tell apart."""
    if expert < len(_COLOURS):
        return _COLOURS[expert]
    lightness, saturation = _SHADES[expert % len(_SHADES)]
    red, green, blue = colorsys.hls_to_rgb(expert * _GOLDEN_ANGLE % 1, lightness, saturation)
    return round(red * 255), round(green * 255), round(blue * 255)


def hex_colour(expert: int, strength: float = 1.0, paper: Colour = (255, 255, 255)) -> str:
    """An expert's colour as ``#rrggbb``, mixed with ``paper`` where ``strength`` (0 to 1) is below 1."""
    mixed = (round(p + (c - p) * strength) for c, p in zip(expert_colour(expert), paper, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def lead(weight: float, n_expert: int) -> float:
    """How clearly an expert leads with this weight: 0 at its even part, 1 when it has everything."""
    even = 1 / n_expert
    return min(1.0, max(0.0, (weight - even) / (1 - even))) if n_expert > 1 else 1.0
