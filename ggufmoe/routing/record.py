"""Recording: the routers' tensors are copied out of the graph while llama.cpp computes it.

In the graph of any model with experts llama.cpp names, for layer N, ``ffn_moe_probs-N`` (the router's scores of all
experts), ``ffn_moe_topk-N`` (the chosen ones) and ``ffn_moe_weights...-N`` (what their outputs are multiplied by, under
the name of the last step that it takes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ggufmoe.engine import Engine
from ggufmoe.errors import Cancelled, EngineError, InputError
from ggufmoe.gguf.expert_names import expert_names
from ggufmoe.gguf.hyper import Hyper
from ggufmoe.native import graph_tensors
from ggufmoe.native.router_tap import TokenRouting
from ggufmoe.native.wording import routing_node
from ggufmoe.options import RoutingKeywords, RoutingOptions, SamplingOptions, options_of
from ggufmoe.routing.trace import Floats, RoutingTrace
from ggufmoe.runtime.events import RoutedToken, Token
from ggufmoe.runtime.observer import Observer
from ggufmoe.work import CancelFlag, OnProgress, Progress, checked_flag

if TYPE_CHECKING:
    from typing_extensions import Unpack

EventT = TypeVar("EventT")

_LAST_STEP_FIRST = ("weights_scaled", "weights_norm", "weights_softmax", "weights")


def trace_routing(
    engine: Engine,
    text: str | Sequence[int],
    *,
    options: RoutingOptions | None = None,
    on_progress: OnProgress | None = None,
    cancel: CancelFlag | None = None,
    **keywords: Unpack[RoutingKeywords],
) -> RoutingTrace:
    """Which experts each token of ``text`` went to, and of up to ``generate`` tokens that continue it.

    ``text`` may be token ids; in a string special tokens are read as such, and BOS is added where the model wants it.
    Give options as one object (``options=RoutingOptions(generate=8)``) or by name (``generate=8``). Tokens are
    generated at full speed, the likeliest ones unless ``sampling`` says otherwise; then the whole text is computed once
    more and watched, which costs nothing that can be measured in batches. The engine's KV cache is lost.

    ``on_progress`` gets a report for each generated token (phase ``generate``), and before and after the text is
    computed (phase ``route``). Raises Cancelled when ``cancel`` is set, InputError for a model without experts and for
    a text of no token, ContextFullError if it does not fit, and the errors of ``Engine.generate``.
    """
    options = options_of(RoutingOptions, options, keywords)
    checked_flag(cancel)
    _check_has_experts(engine)
    if options.generate < 0:
        raise InputError(f"the number of tokens to generate must be 0 or more, not {options.generate}")
    trace: RoutingTrace | None = None
    for step in engine.iterate(_steps, text if isinstance(text, str) else list(text), options, cancel=cancel):
        if isinstance(step, RoutingTrace):
            trace = step
        elif on_progress is not None:
            on_progress(step)
    assert trace is not None, "the last step is the trace"
    return trace


def _steps(
    engine: Engine, text: str | list[int], options: RoutingOptions, *, cancel: CancelFlag | None
) -> Iterator[Progress | RoutingTrace]:
    """Reports of the progress, then the trace. Runs in the process that computes, which alone can observe the graph."""
    prompt = engine.tokenize(text, parse_special=True, must_fit=True, cancel=cancel) if isinstance(text, str) else text
    ids = list(prompt)
    # one place of the context stays free, which computing logits wants
    n = min(options.generate, engine.n_ctx - 1 - len(prompt))
    if n > 0:
        sampling = replace(options.sampling or SamplingOptions(temperature=0.0), n_predict=n)
        for event in engine.generate(prompt, sampling, cancel=cancel):
            if isinstance(event, Token):
                ids.append(event.token_id)
                yield Progress("generate", len(ids) - len(prompt), n, "tokens")
            elif event.reason == "cancelled":
                raise Cancelled("tracing was stopped")
    yield Progress("route", 0, len(ids), "tokens")
    recorder = _Recorder(keep_all=True, stop=engine.cancel)
    with engine.observed(recorder), recorder.checked():
        # with logits on all rows, the last layer computes all rows as well
        engine.prefill(ids, cancel=cancel, every_row=True)
    yield Progress("route", len(ids), len(ids), "tokens")
    yield _assemble(engine, recorder, ids, len(prompt))


def _check_has_experts(engine: Engine) -> None:
    if not Hyper.of(engine.header.metadata).n_expert:
        raise InputError(f"{engine.path}: a dense model: it has no experts to route between")


def _assemble(engine: Engine, recorder: _Recorder, ids: list[int], n_prompt: int) -> RoutingTrace:
    layers = recorder.layers()
    if not layers:
        raise EngineError(f"{engine.path}: llama.cpp's graph of this architecture names no expert choices")
    parts = [recorder.routing(layer) for layer in layers]
    if any(len(rows) != len(ids) for part in parts for rows in part):
        raise EngineError(f"{engine.path}: this architecture does not route every token in every layer")
    probabilities, chosen, weights = (np.stack(rows, axis=1) for rows in zip(*parts, strict=True))
    return RoutingTrace(
        token_ids=tuple(ids),
        texts=tuple(_text(engine, token) for token in ids),
        n_prompt=n_prompt,
        layers=layers,
        probabilities=probabilities,
        chosen=chosen,
        weights=weights,
        expert_names=expert_names(engine.header.metadata),
    )


def _text(engine: Engine, token: int) -> str:
    piece = engine.piece(token, special=True)
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "".join(f"<0x{byte:02X}>" for byte in piece)


class RoutingTracer:
    """Watches the routers of an engine while it generates, for a display that grows with the answer.

    ::

        with RoutingTracer(engine) as tracer:
            for event in tracer.follow(chat.send("What is 2 + 2?")):
                if isinstance(event, RoutedToken):
                    draw(event.text, event.expert_weights)

    Inside the block each token takes about 0.12 ms longer for each layer with experts: twice as long in a model of 15
    million parameters, 3 % in one of 300 million (``scripts/bench_routing.py``). The engine's KV cache is lost at both
    ends, so it is best kept open for a whole conversation. Raises InputError for a model without experts, EngineError
    if the engine is observed already.
    """

    def __init__(self, engine: Engine) -> None:
        _check_has_experts(engine)
        self._n_expert = Hyper.of(engine.header.metadata).n_expert
        self._recorder = _Recorder(keep_all=False, stop=engine.cancel)
        self._attached = ExitStack()
        self._attached.enter_context(engine.observed(self._recorder, on_token=self._routed))

    def follow(self, events: Iterator[EventT]) -> Iterator[EventT]:
        """The same events, each Token as a RoutedToken.

        The weights are looked at when the token is drawn, however far the answer runs ahead of its reader. Raises what
        went wrong while looking.
        """
        for event in events:
            self._recorder.check()
            yield event

    def _routed(self, token: Token) -> Token:
        return RoutedToken.of(token, self._latest(), self._n_expert)

    def latest(self) -> Floats:
        """Weight of each expert in each layer for the row computed last: (n_layer, n_expert), zero if it did not run.

        Raises EngineError before anything has been computed.
        """
        routing = self._latest()
        dense = np.zeros((len(routing.layers), self._n_expert), np.float32)
        np.put_along_axis(dense, routing.chosen, routing.weights, axis=1)
        return dense

    def _latest(self) -> TokenRouting:
        layers = self._recorder.layers()
        if not layers:
            raise EngineError("no token has been computed yet, so there is no routing to show")
        rows = [self._recorder.routing(layer) for layer in layers]
        return TokenRouting(layers, np.stack([row[1][-1] for row in rows]), np.stack([row[2][-1] for row in rows]))

    def close(self) -> None:
        """Let go of the engine, which runs at full speed again."""
        self._attached.close()

    def __enter__(self) -> RoutingTracer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Recorder(Observer):
    """An observer of graphs that keeps the rows of the routers' tensors: all, or only the last of each."""

    def __init__(self, *, keep_all: bool, stop: Callable[[], None]) -> None:
        super().__init__(stop)
        self._keep_all = keep_all
        self._rows: dict[tuple[str, int], list[NDArray[Any]]] = {}

    def wants(self, tensor: int) -> bool:
        return routing_node(graph_tensors.tensor_name(tensor)) is not None

    def take(self, tensor: int) -> None:
        node = routing_node(graph_tensors.tensor_name(tensor))
        assert node is not None, "llama.cpp shows only nodes that were wanted"
        self._take(*node, graph_tensors.tensor_values(tensor))

    def _take(self, kind: str, layer: int, values: NDArray[Any]) -> None:
        if not values.size:
            return
        # weights come as (n_token, n_expert_used, 1) or as (n_token, n_expert_used)
        n_columns = self._rows["topk", layer][0].shape[1] if kind.startswith("weights") else values.shape[-1]
        rows = values.reshape(-1, n_columns)
        if self._keep_all:
            self._rows.setdefault((kind, layer), []).append(rows)
        else:
            self._rows[kind, layer] = [rows[-1:]]

    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers for which the router's scores and the experts' weights were recorded, ascending."""
        return tuple(
            sorted(layer for kind, layer in self._rows if kind == "weights" and ("probs", layer) in self._rows)
        )

    def routing(self, layer: int) -> tuple[Floats, NDArray[np.int32], Floats]:
        """Probabilities (n_token, n_expert), chosen and weights (n_token, n_expert_used) of one layer."""
        rows = {kind: np.concatenate(parts) for (kind, of), parts in self._rows.items() if of == layer}
        weights = next(rows[kind] for kind in _LAST_STEP_FIRST if kind in rows)
        return _probabilities(rows["probs"], are_logits="weights_softmax" in rows), rows["topk"], weights


def _probabilities(scores: Floats, *, are_logits: bool) -> Floats:
    """Scores that sum to one; some architectures apply the softmax only to those that were chosen."""
    if are_logits:
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    out: Floats = scores / scores.sum(axis=-1, keepdims=True)
    return out
