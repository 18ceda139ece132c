"""Amounts as people read them."""

from __future__ import annotations

from typing import Literal

import pytest

from ggufmoe.sizes import all_experts_run, counted, file_size, memory_size, parse_size, short_count

SIZES = {0: "0 B", 999: "999 B", 999_600: "1.00 MB", 12_345_678: "12.3 MB", 99_960_000: "100 MB"}
SIZES |= {7_780_000_000: "7.78 GB", 5 * 10**15: "5000 TB"}


@pytest.mark.parametrize(("number", "expected"), SIZES.items())
def test_sizes_of_files_have_three_digits(number: int, expected: str) -> None:
    assert file_size(number) == expected


def test_memory_is_in_powers_of_1024() -> None:
    assert [memory_size(2**n) for n in (0, 10, 29, 30)] == ["1 B", "1.00 KiB", "512 MiB", "1.00 GiB"]


def test_counts() -> None:
    assert [short_count(n) for n in (7, 3_400_000, 12_879_138_816)] == ["7", "3.40 M", "12.9 B"]
    assert [counted(n, "token") for n in (0, 1, 2)] == ["0 tokens", "1 token", "2 tokens"]
    assert [all_experts_run(n) for n in (1, 2, 8)] == ["the one expert runs", "both experts run", "all 8 experts run"]


@pytest.mark.parametrize(
    ("text", "base", "n_bytes"),
    [
        ("4G", 1000, 4 * 10**9),
        (" 2 gb ", 1000, 2 * 10**9),
        ("999999999999999T", 1000, 999_999_999_999_999 * 10**12),
        ("4GiB", 1000, None),
        ("1.5G", 1000, None),
        ("7.5G", 1024, 15 * 2**29),
        ("512MiB", 1024, 2**29),
        ("0.001", 1024, 0),
        ("-1G", 1024, None),
        ("", 1024, None),
    ],
)
def test_sizes_are_read_in_the_powers_that_they_are_written_in(
    text: str, base: Literal[1000, 1024], n_bytes: int | None
) -> None:
    assert parse_size(text, base) == n_bytes
