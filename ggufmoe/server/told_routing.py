"""What clients are told of a model's experts: which there are, and which of them each token went to."""

from __future__ import annotations

import codecs
from typing import Any, Literal

from ggufmoe.gguf.expert_names import recipe_names
from ggufmoe.gguf.hyper import Hyper, TypedMetadata
from ggufmoe.gguf.upstream import Keys
from ggufmoe.runtime.enginelike import EngineLike
from ggufmoe.runtime.events import RoutedToken
from ggufmoe.server.answers import AnswerEvent, Spelling
from ggufmoe.server.apierror import invalid

RoutingKind = Literal["mean", "layers"]
"""What is told of a token: the share of each expert in the mean over all layers, or also the experts of each layer."""
_DIGITS = 4


def routing_facts(engine: EngineLike) -> dict[str, Any] | None:
    """What ``/v1/models`` tells of the experts; None for a dense model. ``names`` is None without a recipe."""
    hyper = Hyper.of(engine.header.metadata)
    if not hyper.n_expert:
        return None
    # layers that predict further tokens are not computed
    n_ahead = TypedMetadata(engine.header.metadata).whole(hyper.key(Keys.LLM.NEXTN_PREDICT_LAYERS)) or 0
    layers = {layer for share in engine.placement.plan.shares for layer in share.expert_layers}
    return {
        "layers": sorted(layer for layer in layers if layer < (hyper.n_layer or 0) - n_ahead),
        "n_expert": hyper.n_expert,
        "n_expert_used": engine.n_expert_used,
        "names": list(recipe_names(engine.header.metadata)) or None,
    }


def check_routing(engine: EngineLike, kind: RoutingKind | None) -> None:
    """Raise ApiError if routing is asked of a model without experts."""
    if kind is not None and not Hyper.of(engine.header.metadata).n_expert:
        raise invalid("this is a dense model: it has no experts, and so no routing", "routing")


class ToldRouting:
    """The entries of one answer, one for each token."""

    def __init__(self, kind: RoutingKind, spelling: Spelling) -> None:
        self.entries: list[dict[str, Any]] = []
        self._kind = kind
        self._spelling = spelling
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._n_sent = 0

    def push(self, event: AnswerEvent) -> None:
        """Add the entry of a token; other events have none."""
        if not isinstance(event, RoutedToken):
            return
        # of a character in several tokens, the last has the text
        text = self._decoder.decode(self._spelling.bytes_of(event.token_id))
        weights = [round(share, _DIGITS) for share in event.expert_weights]
        entry = {"token_id": event.token_id, "text": text, "weights": weights}
        if self._kind == "layers":
            entry["layers"] = [_shares(layer) for layer in event.layers]
        self.entries.append(entry)

    def unsent(self) -> list[dict[str, Any]]:
        """The entries since the last call."""
        begin, self._n_sent = self._n_sent, len(self.entries)
        return self.entries[begin:]


def told_routing(kind: RoutingKind | None, spelling: Spelling) -> ToldRouting | None:
    """What collects the entries of an answer; None if none are asked for."""
    return None if kind is None else ToldRouting(kind, spelling)


def _shares(layer: tuple[tuple[int, float], ...]) -> list[list[float]]:
    total = sum(weight for _, weight in layer) or 1.0
    return [[expert, round(weight / total, _DIGITS)] for expert, weight in layer]
