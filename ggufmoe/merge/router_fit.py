"""Fits a router on texts: layer by layer, on the states that the mixture with the rows fitted so far really has.

In each layer the rows are those of a logistic regression that tells, from a token's normalized state after attention,
which expert its text belongs to (``logistic``); files that are hard to tell count more. The held-out texts go through
at the same time in several lanes: as the base computes them, as each expert, with equal weights, by a router of gate
mode hidden or by the one that a mixture had before, and by the fitted one; so every weight is read once for both the
fit and its report. Then all rows take steps together (``router_steps``), and are judged again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from ggufmoe.checkpoint.source import TextScore
from ggufmoe.families.model_config import ModelConfig
from ggufmoe.merge.forward import Floats, ForwardPass, one_blas_thread
from ggufmoe.merge.logistic import fit_classes
from ggufmoe.merge.pass_reads import Step
from ggufmoe.merge.router_steps import Lesson, RowsPass, lessons, scored_rows, stepped
from ggufmoe.merge.router_texts import RouterText

_LOG = logging.getLogger("ggufmoe")
BASE, BEFORE, UNIFORM, HIDDEN, FITTED = "base", "before", "uniform", "hidden", "fitted"
ANSWER_WEIGHT = 3.0
"""How much a token whose successor counts in the loss counts in the fit, beside one of a question."""
PROMPTS = "prompts"
"""The lane of a recipe's prompts, from whose states rows of gate mode hidden are made."""


def expert_lane(expert: int) -> str:
    """The name of the lane in which one expert computes every token."""
    return f"expert {expert}"


@dataclass(frozen=True)
class HiddenRouter:
    """Prompts, and how the states of a layer's input make router rows of gate mode hidden."""

    prompts: Sequence[Sequence[int]]
    rows: Callable[[Floats], Floats]
    """From states (n_tokens, n_embd) of all prompts to rows (n_expert, n_embd)."""


@dataclass(frozen=True)
class Steps:
    """Steps of all rows together, once they are fitted."""

    mixture: RowsPass
    """The mixture, with any rows."""
    n: int
    seed: int
    on_step: Callable[[int], None]
    """Gets the number of steps done."""


@dataclass(frozen=True)
class _Lane:
    """Tokens that go through the model in one way."""

    name: str
    prompts: tuple[Sequence[int], ...]
    span: slice
    """Their rows among those of all lanes."""
    expert: int | None
    """The one expert that computes them, where one does."""


@dataclass(frozen=True)
class _Places:
    """Of each token of all texts, (n,) each: its text, its place in it, the text's expert, whether it is held out.

    ``files`` numbers the files of all experts. ``counts`` is how much the token counts in a fit beside others of its
    expert.
    """

    texts: NDArray[np.intp]
    places: NDArray[np.intp]
    experts: NDArray[np.intp]
    files: NDArray[np.intp]
    held_out: NDArray[np.bool_]
    counts: NDArray[np.float64]

    @classmethod
    def of(cls, texts: Sequence[RouterText]) -> _Places:
        sizes = [len(text.tokens) for text in texts]
        numbers = {file: number for number, file in enumerate(_files(texts))}
        return cls(
            np.repeat(np.arange(len(texts)), sizes),
            np.concatenate([np.arange(size) for size in sizes]),
            np.repeat([text.expert for text in texts], sizes),
            np.repeat([numbers[text.expert, text.file] for text in texts], sizes),
            np.repeat([text.held_out for text in texts], sizes),
            np.concatenate([_counts(text) for text in texts]),
        )


def _files(texts: Sequence[RouterText]) -> list[tuple[int, str]]:
    """The files of the texts, each as an expert and a name, in their order."""
    return list(dict.fromkeys((text.expert, text.file) for text in texts))


def _own_shares(logits: Floats, weights: Floats, experts: NDArray[np.intp]) -> NDArray[np.float64]:
    """Of each token the weight of its own expert, and 1 where that comes first: (n, 2)."""
    out: NDArray[np.float64] = np.stack(
        [weights[np.arange(len(experts)), experts], logits.argmax(axis=1) == experts], axis=1
    ).astype(np.float64)
    return out


def _counts(text: RouterText) -> NDArray[np.float64]:
    """How much each token of a text counts: more where the next one is part of an answer."""
    out = np.ones(len(text.tokens))
    out[[place - 1 for place in text.scored]] = ANSWER_WEIGHT
    return out


def fitted_steps(config: ModelConfig, mixture: ForwardPass, base: ForwardPass | None) -> Iterator[Step]:
    """What a fit reads after the embeddings, in its order; ``base`` is None where an expert has the base's MLP."""
    for layer in range(config.n_layer):
        yield from mixture.attention_steps(layer)
        for expert in range(config.n_expert):
            yield from mixture.expert_steps(layer, expert)
        yield from mixture.shared_steps(layer)
        if base is not None:
            yield from base.dense_steps(layer)
    yield from mixture.loss_steps()


@dataclass(frozen=True, eq=False)
class _Judgement:
    """What rows make of the held-out texts."""

    own: NDArray[np.float64]
    """Of each token the sums over layers of its own expert's weight and of whether that comes first: (n_tokens, 2)."""
    losses: Floats
    """Of each token that counts."""
    distance: float
    """From what the texts' own experts say, in the mean over files."""


class RouterFitting:
    """One fit: ``mixture`` computes the mixture, with ``config``; ``base`` the dense model that it is made of.

    ``base_expert`` is the expert whose MLP is the base's own, or None. ``rounded`` gives rows as they will be stored.
    Where ``base`` is None, the router that the mixture has is compared in its place. Without ``steps`` rows stay as
    they are fitted.
    """

    def __init__(
        self,
        config: ModelConfig,
        base: ForwardPass | None,
        mixture: ForwardPass,
        texts: Sequence[RouterText],
        *,
        base_expert: int | None = None,
        hidden: HiddenRouter | None = None,
        rounded: Callable[[Floats], Floats],
        steps: Steps | None = None,
    ) -> None:
        self._config = config
        self._steps = steps
        self._base, self._forward = base, mixture
        self._texts = texts
        self._base_expert = base_expert
        self._hidden = hidden
        self._rounded = rounded
        self._held_out = [text for text in texts if text.held_out]
        self._at = _Places.of(texts)
        self._lanes = self._made_lanes()
        self._fitted = self._lanes[FITTED]
        self._own = np.zeros((len(self._at.texts), 2))

    def run(self, on_layer: Callable[[int], None]) -> tuple[Floats, tuple[TextScore, ...]]:
        """Rows (n_layer, n_expert, n_embd) and the score of each file; ``on_layer`` gets the number of layers done.

        Rows after steps are given only where held-out texts are nearer to their own experts by them.

        Memory: a few (n_tokens, n_ff) float32 for the tokens of all lanes that one expert computes.
        """
        prompts = [prompt for lane in self._lanes.values() for prompt in lane.prompts]
        hidden = self._forward.first(prompts)
        rows = []
        with one_blas_thread():
            for layer in range(self._config.n_layer):
                before = hidden
                hidden, normed = self._forward.attended(layer, before, prompts)
                rows.append(self._rounded(self._fit(normed[self._fitted.span])))
                weights = self._weights(layer, before, normed, rows[-1])
                hidden = self._forward.added(hidden, self._outputs(layer, normed, weights))
                on_layer(layer + 1)
            losses = self._losses(hidden)
        found = np.stack(rows)
        if self._steps is not None:
            found, losses[FITTED] = self._stepped(self._steps, found, losses[FITTED])
        return found, tuple(self._scores(losses))

    def _stepped(self, steps: Steps, rows: Floats, losses: Floats) -> tuple[Floats, Floats]:
        """The better of ``rows`` and those after steps, and the losses of held-out texts by them."""
        mixture = steps.mixture
        taught = lessons(mixture, self._texts)
        fitted, held_out = ([one for one in taught if one.text.held_out is out] for out in (False, True))
        mixture.rows = rows
        moved = self._rounded(stepped(mixture, fitted, n_steps=steps.n, seed=steps.seed, on_step=steps.on_step))
        before, after = (self._judged(mixture, each, held_out) for each in (rows, moved))
        if not after.distance < before.distance:
            _LOG.info("the steps of the router gained nothing on held-out texts; its rows stay as they were fitted")
            return rows, losses
        self._own[self._at.held_out] = after.own
        return moved, after.losses

    def _judged(self, mixture: RowsPass, rows: Floats, held_out: Sequence[Lesson]) -> _Judgement:
        """What rows make of the held-out texts."""
        experts = self._at.experts[self._at.held_out]
        own = np.zeros((len(experts), 2))

        def note(layer: int, normed: Floats) -> None:
            logits = mixture.router_logits(layer, normed)
            own[:] += _own_shares(logits, self._routed(layer, logits), experts)

        mixture.rows = rows
        with one_blas_thread():
            distance, last = mixture.distance(held_out, note)
            losses = mixture.losses(last, scored_rows(self._held_out)[1])
        return _Judgement(own, losses, distance)

    def _judged_tokens(self, key: tuple[int, str]) -> NDArray[np.bool_]:
        """Which of the losses of held-out texts are a file's."""
        return np.array([(text.expert, text.file) == key for text in self._held_out for _ in text.scored])

    def _made_lanes(self) -> dict[str, _Lane]:
        every = tuple(text.tokens for text in self._texts)
        held_out = tuple(text.tokens for text in self._held_out)
        wanted: dict[str, tuple[tuple[Sequence[int], ...], int | None]] = {
            FITTED: (every, None),
            **({BEFORE: (held_out, None)} if self._base is None else {BASE: (held_out, self._base_expert)}),
            UNIFORM: (held_out, None),
            **{expert_lane(expert): (held_out, expert) for expert in range(self._config.n_expert)},
        }
        if self._hidden is not None:
            wanted |= {HIDDEN: (held_out, None), PROMPTS: (tuple(self._hidden.prompts), self._base_expert)}
        lanes, start = {}, 0
        for name, (prompts, expert) in wanted.items():
            stop = start + sum(map(len, prompts))
            lanes[name] = _Lane(name, prompts, slice(start, stop), expert)
            start = stop
        return lanes

    def _fit(self, normed: Floats) -> Floats:
        use = (self._at.places > 0) & ~self._at.held_out
        found = (normed[use], self._at.experts[use], self._at.texts[use])
        counts, files, check = self._at.counts[use], self._at.files[use], self._forward.work.check
        return fit_classes(*found, self._config.n_expert, weights=counts, kinds=files, check=check)

    def _weights(self, layer: int, before: Floats, normed: Floats, rows: Floats) -> Floats:
        """Weights of all experts for the tokens of all lanes, (n_tokens, n_expert); zeros where the base computes."""
        n_expert = self._config.n_expert
        out = np.zeros((len(normed), n_expert), dtype=np.float32)
        for lane in self._lanes.values():
            if lane.expert is not None:
                out[lane.span, lane.expert] = 1
            elif lane.name == BEFORE:
                out[lane.span] = self._routed(layer, self._forward.router_logits(layer, normed[lane.span]))
            elif lane.name == UNIFORM:
                out[lane.span] = np.float32(1 / n_expert)
            elif lane.name == HIDDEN:
                assert self._hidden is not None, "a lane of hidden rows has prompts"
                made = self._hidden.rows(before[self._lanes[PROMPTS].span])
                out[lane.span] = self._routed(layer, normed[lane.span] @ made.T)
            elif lane.name == FITTED:
                logits = normed[lane.span] @ rows.T
                out[lane.span] = self._routed(layer, logits)
                self._note_own(logits, out[lane.span])
        return out

    def _routed(self, layer: int, logits: Floats) -> Floats:
        chosen, weights = self._forward.routes(layer, logits)
        out = np.zeros_like(logits)
        np.put_along_axis(out, chosen, weights, axis=1)
        return out

    def _note_own(self, logits: Floats, weights: Floats) -> None:
        """Add what each token gives its own expert, and whether that comes first, to the sums over the layers."""
        self._own += _own_shares(logits, weights, self._at.experts)

    def _outputs(self, layer: int, normed: Floats, weights: Floats) -> Floats:
        out = np.zeros_like(normed)
        for expert in range(self._config.n_expert):
            tokens = np.nonzero(weights[:, expert])[0]
            if tokens.size:
                output = self._forward.expert_output(layer, expert, normed[tokens])
                out[tokens] += weights[tokens, expert, None] * output
        dense = ~weights.any(axis=1)
        out[~dense] += self._forward.shared_output(layer, normed[~dense])
        if dense.any():
            assert self._base is not None, "without a base all lanes have experts"
            out[dense] = self._base.feed_forward(layer, normed[dense])
        return out

    def _losses(self, hidden: Floats) -> dict[str, Floats]:
        """By lane the loss of each token that counts, those of all held-out texts in turn."""
        names = [name for name in self._lanes if name != PROMPTS]
        _, targets = scored_rows(self._held_out)
        states = np.concatenate([hidden[self._scored_rows(self._lanes[name])] for name in names])
        losses = self._forward.losses(states, np.tile(targets, len(names)))
        return dict(zip(names, np.split(losses, len(names)), strict=True))

    def _scored_rows(self, lane: _Lane) -> list[int]:
        """The rows of a lane before the tokens that count in a loss."""
        texts = self._texts if lane is self._fitted else self._held_out
        starts = accumulate((len(text.tokens) for text in texts), initial=lane.span.start)
        held_out = [(text, start) for text, start in zip(texts, starts, strict=False) if text.held_out]
        return [start + place - 1 for text, start in held_out for place in text.scored]

    def _scores(self, losses: dict[str, Floats]) -> Iterator[TextScore]:
        """The score of each file, in the order of the files."""
        for key in _files(self._texts):
            mine = np.array([(text.expert, text.file) == key for text in self._texts])[self._at.texts]
            judged = self._judged_tokens(key)
            weight, first = self._own[mine & self._at.held_out & (self._at.places > 0)].mean(axis=0)
            yield TextScore(
                *key,
                n_fitted_tokens=int((mine & ~self._at.held_out).sum()),
                n_scored_tokens=int(judged.sum()),
                losses={name: float(one[judged].mean()) for name, one in losses.items()},
                own_weight=float(weight / self._config.n_layer),
                own_first=float(first / self._config.n_layer),
            )
