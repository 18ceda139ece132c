"""Typed access to the keys of a config.json; its errors name the file, the key and the expected value."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ggufmoe.errors import CheckpointError

_LOG = logging.getLogger("ggufmoe")

_MAX_SIZE = 2**31 - 1
_MAX_FLOAT32 = float.fromhex("0x1.fffffep+127")
POSITIVE = "a number above 0 that fits in 32 bits"
"""What is expected of most numbers that are not whole."""


class ConfigReader:
    """The keys of one config.json, ``raw``, with the defaults and the other spellings of a family.

    Every method raises CheckpointError for a value that is not what it gives.
    """

    def __init__(
        self,
        path: Path,
        raw: Mapping[str, Any],
        defaults: Mapping[str, Any],
        aliases: Mapping[str, tuple[str, ...]],
    ) -> None:
        self.path = path
        self.raw = raw
        self._defaults = defaults
        self._aliases = aliases

    def error(self, key: str, expected: str) -> CheckpointError:
        """The error that says which value ``key`` has, and what was expected."""
        spelt = self.spelling(key)
        return CheckpointError(f"{self.path}: {spelt} is {self.raw.get(spelt)!r:.100}, expected {expected}")

    def spelling(self, key: str) -> str:
        """How this file spells ``key``: the first of its spellings that is there, else ``key``."""
        return next((name for name in (key, *self._aliases.get(key, ())) if name in self.raw), key)

    @property
    def rope_key(self) -> str:
        """Under which key the parameters of rope stand: that of transformers 5, else that of 4."""
        return "rope_parameters" if self.raw.get("rope_parameters") is not None else "rope_scaling"

    def value(self, key: str) -> Any:
        """The value of a key, whatever it is; the family's default, or None, where it is absent."""
        spelt = self.spelling(key)
        return self.raw[spelt] if spelt in self.raw else self._defaults.get(key)

    def size(self, key: str, *, default: int | None = None, minimum: int = 1, maximum: int = _MAX_SIZE) -> int:
        """A whole number; ``default`` where it is absent or null."""
        value = self.value(key)
        if value is None:
            value = default
        if value is None:
            raise self.missing(key)
        if type(value) is not int or not minimum <= value <= maximum:
            raise self.error(key, f"a whole number from {minimum} to {maximum}")
        return value

    def missing(self, key: str) -> CheckpointError:
        """The error of a key that has to be there."""
        return CheckpointError(f"{self.path} has no {key}")

    def optional_size(self, key: str) -> int | None:
        """A whole number from 1; None where it is absent or null."""
        return None if self.value(key) is None else self.size(key)

    def number(self, key: str) -> float:
        """A number that 32 bits hold."""
        value = self.value(key)
        if not is_float32(value):
            raise self.error(key, "a number that fits in 32 bits")
        return float(value)

    def positive(self, key: str) -> float:
        """A number above 0 that 32 bits hold."""
        value = self.value(key)
        if not is_float32(value) or value <= 0:
            raise self.error(key, POSITIVE)
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false; false where it is absent or null."""
        value = self.value(key)
        if value not in (None, True, False):
            raise self.error(key, "true or false")
        return bool(value)

    def text(self, key: str) -> str:
        """A text."""
        value = self.value(key)
        if not isinstance(value, str):
            raise self.error(key, "a text")
        return value

    def token(self, key: str, n_vocab: int) -> int | None:
        """A token id, the first of a list; None if there is none or, with a warning, it is not in the vocabulary."""
        value = self.value(key)
        if isinstance(value, list):
            value = value[0] if value else None
        if value is None:
            return None
        if type(value) is not int:
            raise self.error(key, "a token id")
        if not 0 <= value < n_vocab:
            _LOG.warning(
                "%s: %s %d is not in the vocabulary of %d tokens and is ignored", self.path, key, value, n_vocab
            )
            return None
        return value


def is_float32(value: object) -> bool:
    """Whether a value of JSON is a number that a 32-bit float can hold; NaN and infinities are none."""
    return type(value) in (int, float) and abs(value) <= _MAX_FLOAT32  # type: ignore[arg-type]
