"""Amounts as people read them."""

from __future__ import annotations

import pytest

from ggufmoe.sizes import all_experts_run, counted, file_size, memory_size, short_count

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
