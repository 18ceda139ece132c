"""Keeps a computed router in a file until the output is complete, so that a resumed run does not compute it again.

The file is a .npz of the rows, and of the report as JSON; it says for which plan the router was computed.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from ggufmoe.checkpoint.source import PromptPreference, RouterReport, TextScore
from ggufmoe.errors import OutputError
from ggufmoe.files import replacing
from ggufmoe.merge.router import Router

_LOG = logging.getLogger("ggufmoe")


@dataclass(frozen=True)
class KeptRouter:
    """The file of a router; ``key`` identifies all that the router depends on."""

    path: Path
    key: str
    read: bool
    """Whether a router that an interrupted run has left is taken."""

    def save(self, router: Router) -> None:
        """Write the router. A disk that refuses it is a warning: the router is then computed again after a crash."""
        about = json.dumps({"key": self.key, "report": asdict(router.report)}).encode()
        try:
            with replacing(self.path, "the router") as file:
                np.savez(file, rows=router.rows, shared=router.shared_rows, about=np.frombuffer(about, np.uint8))
        except OutputError as error:
            _LOG.warning("%s", error)

    def load(self) -> Router | None:
        """The router of an interrupted run of the same plan; None if there is none that can be read."""
        if not self.read or not self.path.is_file():
            return None
        try:
            with self.path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                about = json.loads(stored["about"].tobytes())
                if about["key"] != self.key:
                    return None
                return Router(stored["rows"], _report(about["report"]), stored["shared"])
        except (OSError, ValueError, KeyError, TypeError, BadZipFile) as error:
            _LOG.warning("%s cannot be read (%s); the router is computed again", self.path, error)
            return None


def _report(value: dict[str, Any]) -> RouterReport:
    preferences = [PromptPreference(**{**one, "weights": _nested(one["weights"])}) for one in value["preferences"]]
    return RouterReport(
        value["gate_mode"],
        _nested(value["cosines"]),
        tuple(value["condition_numbers"]),
        tuple(preferences),
        tuple(TextScore(**one) for one in value["scores"]),
        tuple(value["attention_distances"]),
    )


def _nested(value: Any) -> Any:
    """Lists in lists as tuples in tuples."""
    return tuple(map(_nested, value)) if isinstance(value, list) else value
