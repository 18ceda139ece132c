"""A mix of types that was chosen for one model, tensor by tensor, in place of the mix of a file type."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ggufmoe.gguf.types import GGMLType
from ggufmoe.quant.filetypes import FileType

_MEDIUM = ("Q3_K", "Q4_K", "Q5_K")
"""Types that libllama takes for the medium mix where a file does not say its file type."""


@dataclass(frozen=True)
class StandardMix:
    """The mix of a file type, for comparison: its name, the size of the file, and what it costs by prediction."""

    name: str
    n_bytes: int
    predicted_kl: float
    seconds: float | None = None
    """What its matrices take for a token by prediction; None where types were not chosen by their speed."""

    def to_dict(self) -> dict[str, Any]:
        """The mix as plain values for JSON."""
        told = {"name": self.name, "bytes": self.n_bytes, "predicted_kl": round(self.predicted_kl, 6)}
        return told | _timed(self.seconds)


@dataclass(frozen=True)
class ChosenMix:
    """The types of a model's tensors, what such a file is called, and how its types were chosen."""

    types: Mapping[str, GGMLType]
    """By tensor name; a tensor that is not named keeps the type that it has."""
    name: str
    """What the file is called, by its bits: ``4.50 bpw``."""
    predicted_kl: float
    """The divergence from the unquantized model by prediction, in nats a token."""
    standard: StandardMix | None
    """The best standard mix that is no larger, by prediction (with ``seconds`` the largest); None if there is none."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """How the types were chosen, for the file's metadata: plain values for JSON."""
    seconds: float | None = None
    """What its matrices take for a token by prediction, on the machine that chose them; None without speeds."""

    def to_dict(self) -> dict[str, Any]:
        """The mix without its types, which the file has, as plain values for JSON."""
        standard = self.standard and self.standard.to_dict()
        told = {"name": self.name, "predicted_kl": round(self.predicted_kl, 6), **_timed(self.seconds)}
        return {**told, "standard": standard, **self.origin}

    def file_type(self, weights: Mapping[str, int]) -> FileType:
        """The file type of the type with the most weights, as libllama guesses it; ``weights`` are those of tensors."""
        totals: Counter[FileType] = Counter()
        for name, given in self.types.items():
            totals[_file_type_of(given)] += weights[name]
        return max(totals, key=lambda kind: (totals[kind], kind.name))


def _file_type_of(type: GGMLType) -> FileType:
    names = (
        (f"{type.name}_M", type.name, f"{type.name}_MOE") if type.name in _MEDIUM else (type.name, f"{type.name}_MOE")
    )
    return next((FileType[name] for name in names if name in FileType.__members__), FileType.F16)


def _timed(seconds: float | None) -> dict[str, float]:
    return {} if seconds is None else {"ms_per_token": round(seconds * 1e3, 4)}
