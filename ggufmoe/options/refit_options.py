"""Options of ``refit``: how the router of a GGUF file is replaced."""

# ruff: noqa: RUF009 (option() makes a dataclass field)
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from ggufmoe.errors import OptionError
from ggufmoe.options.convert_options import file_bytes, manifest_wanted, router_report_file, split_size, worker_threads
from ggufmoe.options.fields import check_values, option

ROUTER_TOKENS = 2048
"""Tokens of each expert's texts that a router is fitted on and judged by, where nothing else is said."""
MIN_ROUTER_TOKENS, MAX_ROUTER_TOKENS = 64, 1 << 20
MAX_ROUTER_STEPS = 100_000


@dataclass(frozen=True)
class RefitOptions:
    """How a GGUF file gets another router. Raises OptionError for values out of range."""

    router: Path | None = option(
        None,
        "--router",
        help="Take the router of this GGUF file or checkpoint's directory, in the place of texts.",
        metavar="DIR|FILE",
    )
    text_tokens: int = option(
        ROUTER_TOKENS,
        "--text-tokens",
        help="Use at most N tokens of each expert's texts.",
        metavar="N",
        between=(MIN_ROUTER_TOKENS, MAX_ROUTER_TOKENS),
    )
    router_steps: int | None = option(
        None,
        "--router-steps",
        help="Let the fitted router take N steps down the loss of the texts. Default: 60 for small models, else 0.",
        metavar="N",
        between=(0, MAX_ROUTER_STEPS),
    )
    seed: int = option(
        0, "--seed", help="Decides which texts are drawn where there are more.", metavar="N", between=(0, 2**64 - 1)
    )
    threads: int | None = worker_threads()
    split_max_size: str | None = split_size()
    resume: bool = option(False, "--resume", help="Continue the partial file of an interrupted run.")
    force: bool = option(False, "--force", help="Replace an existing output.")
    manifest: bool = manifest_wanted()
    router_report: Path | None = router_report_file()

    def __post_init__(self) -> None:
        check_values(self)
        _ = self.split_max_bytes
        if self.router is not None and self.router_report is not None:
            raise OptionError("--router-report tells what fitting gained; a router that is taken is not fitted")

    @property
    def split_max_bytes(self) -> int | None:
        """Bytes of ``split_max_size``; None where the output is one file."""
        return None if self.split_max_size is None else file_bytes(self.split_max_size)


class RefitKeywords(TypedDict, total=False):
    """The fields of ``RefitOptions`` as keywords."""

    router: Path | None
    text_tokens: int
    router_steps: int | None
    seed: int
    threads: int | None
    split_max_size: str | None
    resume: bool
    force: bool
    manifest: bool
    router_report: Path | None
