"""Formats sizes and counts for people: files and disks in powers of 1000, memory in powers of 1024."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Literal


def file_size(n_bytes: float) -> str:
    """Bytes of a file or disk with three significant digits: ``7.78 GB``."""
    return _scaled(n_bytes, 1000, ("B", "kB", "MB", "GB", "TB"))


def memory_size(n_bytes: float) -> str:
    """Bytes of memory with three significant digits: ``7.25 GiB``."""
    return _scaled(n_bytes, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def short_count(number: float) -> str:
    """A count with three significant digits: ``12.9 B`` (billions)."""
    return _scaled(number, 1000, ("", "K", "M", "B", "T"))


def counted(number: int, noun: str) -> str:
    """The number and the noun, with an s unless the number is 1: ``1 token``, ``2 tokens``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def all_experts_run(number: int) -> str:
    """The clause that all ``number`` experts run: ``both experts run``, ``all 8 experts run``."""
    return {1: "the one expert runs", 2: "both experts run"}.get(number, f"all {number} experts run")


def parse_size(text: str, base: Literal[1000, 1024]) -> int | None:
    """Parse a size such as ``4G`` or ``500M`` into bytes, its units powers of ``base``; None if it is not a size.

    With base 1000 the number must be whole, as for gguf-split. With base 1024 it may have decimals, and the unit may be
    written ``GiB``.
    """
    number, unit = (r"\d{1,15}", "([KMGT]?)B?") if base == 1000 else (r"\d{1,9}(?:\.\d{1,3})?", "([KMGT]?)(?:i?B)?")
    found = re.fullmatch(rf"\s*({number})\s*{unit}\s*", text, re.IGNORECASE)
    return None if found is None else int(Decimal(found[1]) * base ** " KMGT".index(found[2].upper() or " "))


def parse_file_size(text: str) -> int | None:
    """Parse the size of a file into bytes; None if it is not a size.

    ``6GiB`` counts in powers of 1024, ``6GB`` and ``6G`` in powers of 1000. The number may have decimals.
    """
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if found is None or (found[3] and not found[2]):
        return None
    return int(Decimal(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " "))


def _scaled(number: float, base: int, units: Sequence[str]) -> str:
    scaled, step = float(number), 0
    while scaled >= 999.5 and step < len(units) - 1:
        scaled, step = scaled / base, step + 1
    digits = 0 if step == 0 or scaled >= 99.95 else 1 if scaled >= 9.995 else 2
    return f"{scaled:.{digits}f} {units[step]}".rstrip()


_SPEED = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([MG])(?:bit)?(?:/s)?)?\s*", re.IGNORECASE)


def parse_line_speed(text: str) -> float | None:
    """Mbit/s of ``100``, ``100Mbit`` or ``2.5Gbit/s``; None for what is no speed."""
    match = _SPEED.fullmatch(text)
    if match is None:
        return None
    return float(match[1]) * (1000 if (match[2] or "").upper() == "G" else 1) or None
