"""Options of the best file: what its size follows from, and what it is measured on."""

# ruff: noqa: RUF009 (option() makes a dataclass field)
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ggufmoe.errors import OptionError
from ggufmoe.options.fields import check, check_values, option
from ggufmoe.options.limits import MAX_INT32
from ggufmoe.sizes import parse_file_size

AUTO_FIT = "auto"
"""``--fit auto``: the free memory of this machine's GPUs, or else its main memory."""


@dataclass(frozen=True)
class SizedOptions:
    """How the size of a file is found, and how the file is measured. Raises OptionError for values out of range."""

    fit: str | None = option(
        None,
        "--fit",
        help="Make the best file that runs in so much memory, such as 8GiB, with its KV cache and buffers; auto: in "
        "what this machine has.",
        metavar="MEMORY",
    )
    n_ctx: int | None = option(
        None,
        "-c",
        "--ctx-size",
        help="With --fit: tokens of context. Default: what the model was trained for, but at most 4096.",
        metavar="N",
        between=(1, MAX_INT32),
    )
    max_kl: float | None = option(
        None,
        "--max-kl",
        help="Make the smallest file whose measured KL divergence on --verify TEXT is at most this, in nats a token, "
        "such as 0.01.",
        metavar="NATS",
        between=(1e-6, 10.0),
    )
    verify: Path | None = option(
        None,
        "--verify",
        help="Measure the file and the best standard mix of its size on this text, and keep the one that is nearer to "
        "the unquantized model. Takes a file of that model on disk meanwhile.",
        metavar="TEXT",
    )
    verify_chunks: int = option(
        20, "--verify-chunks", help="Measure on at most N chunks of 512 tokens.", metavar="N", between=(1, MAX_INT32)
    )

    def __post_init__(self) -> None:
        check_values(self)
        _ = self.fit_bytes
        check(self.n_ctx is None or self.fit is not None, "--ctx-size is for --fit, whose memory holds the context too")
        check(
            self.fit is None or self.max_kl is None, "--fit and --max-kl each say what size to make; give one of them"
        )
        check(
            self.max_kl is None or self.verify is not None,
            "--max-kl measures the divergence: give --verify TEXT, a text that the sensitivity was not measured on",
        )

    @property
    def fit_bytes(self) -> int | None:
        """Bytes of ``fit``; None for ``auto``, and where it is not given."""
        if self.fit is None or self.fit.strip().lower() == AUTO_FIT:
            return None
        n_bytes = parse_file_size(self.fit)
        if n_bytes is None or n_bytes < 1_000_000:
            raise OptionError(f"--fit {self.fit!r} is no size of memory; give for example 8GiB, or auto")
        return n_bytes

    @property
    def target(self) -> Literal["fit", "max_kl"] | None:
        """What the size follows from; None where it is given, or a file type is."""
        return "fit" if self.fit is not None else "max_kl" if self.max_kl is not None else None

    @property
    def is_given(self) -> bool:
        """Whether anything is asked for."""
        return self.target is not None or self.verify is not None
