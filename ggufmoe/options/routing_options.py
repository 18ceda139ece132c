"""Options of tracing which experts the tokens of a text go to."""

# ruff: noqa: RUF009 (option() makes a dataclass field)
from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from ggufmoe.options.fields import check, check_values, option
from ggufmoe.options.sampling_options import SamplingOptions


@dataclass(frozen=True)
class RoutingOptions:
    """What is traced besides the text itself. Raises OptionError for values of another kind."""

    generate: int = option(0, help="Number of tokens to generate after the text, which are traced as well.")
    sampling: SamplingOptions | None = option(None, help="How they are drawn; None: always the most likely one.")

    def __post_init__(self) -> None:
        check_values(self)
        fits = self.sampling is None or isinstance(self.sampling, SamplingOptions)
        check(fits, f"sampling must be SamplingOptions(...), not {self.sampling!r}")


class RoutingKeywords(TypedDict, total=False):
    """The fields of ``RoutingOptions`` as keywords."""

    generate: int
    sampling: SamplingOptions | None
