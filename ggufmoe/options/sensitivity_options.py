"""Options of ``sensitivity``: how much of a text is used, and how."""

# ruff: noqa: RUF009 (option() makes a dataclass field)
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from ggufmoe.options.convert_options import identical_experts, outside_files, worker_threads
from ggufmoe.options.fields import check_values, option

MIN_SENSITIVITY_TOKENS = 512
"""With fewer tokens a mean of squares is off by 6 % and more (the square root of 2 / tokens)."""


@dataclass(frozen=True)
class SensitivityOptions:
    """How the sensitivity of a model is measured. Raises OptionError for values out of range."""

    n_tokens: int = option(
        2048,
        "--tokens",
        help="Use N tokens of the text.",
        metavar="N",
        between=(MIN_SENSITIVITY_TOKENS, 1 << 20),
    )
    n_ctx: int = option(
        512,
        "-c",
        "--ctx-size",
        help="Tokens in each sequence; no sequence sees another.",
        metavar="N",
        between=(16, 1 << 16),
    )
    seed: int = option(
        0,
        "--seed",
        help="Decides which tokens are drawn from what the model says, and which texts of a .jsonl file are used.",
        metavar="N",
        between=(0, 2**64 - 1),
    )
    imatrix_out: Path | None = option(
        None, "--imatrix-out", help="Write the importance matrix by itself as well.", metavar="FILE"
    )
    threads: int | None = worker_threads()
    resume: bool = option(False, "--resume", help="Continue an interrupted run with the layer that it had begun.")
    force: bool = option(False, "--force", help="Replace an existing output, and begin an interrupted run again.")
    allow_identical_experts: bool = identical_experts()
    allow_outside_files: bool = outside_files()

    def __post_init__(self) -> None:
        check_values(self)


class SensitivityKeywords(TypedDict, total=False):
    """The fields of ``SensitivityOptions`` as keywords."""

    n_tokens: int
    n_ctx: int
    seed: int
    imatrix_out: Path | None
    threads: int | None
    resume: bool
    force: bool
    allow_identical_experts: bool
    allow_outside_files: bool
