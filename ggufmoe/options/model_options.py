"""How a model is got that is not a file on this machine yet."""

from __future__ import annotations

from dataclasses import dataclass

from ggufmoe.options.fields import check_values, option


@dataclass(frozen=True)
class ModelOptions:
    """What is made of a MODEL that has to be converted or downloaded first, and whether to ask before."""

    quant: str | None = option(
        None,
        "-q",
        "--quant",
        help="File type of a model that is converted or downloaded; auto: the one that `plan` marks. [default: Q4_K_M]",
        metavar="TYPE",
    )
    yes: bool = option(False, "-y", "--yes", help="Convert or download large models without asking.")

    def __post_init__(self) -> None:
        check_values(self)
