"""Steps of a fitted router that bring the mixture nearer to what each text's own expert says, through all layers.

Rows of a layer are fitted to tell texts apart, whatever the next layers make of it. Here all rows move together, by a
gradient (Adam, Kingma and Ba 2015) of how far the mixture's next tokens are from those of the text's own expert, both
softened: what the experts know by heart then still tells where the mixture disturbs them. Each step reads every weight
three times, for a few of the texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from ggufmoe.checkpoint.source import ModelWeights
from ggufmoe.merge.backward import BackwardPass
from ggufmoe.merge.forward import Floats, one_blas_thread
from ggufmoe.merge.router_texts import RouterText
from ggufmoe.work import Work

STEP_TOKENS = 1024
"""Tokens of a step, about: an equal part for each file, and of each at least one text."""
_STEP_LENGTH = 2.0
"""How far a step moves each number of a row, times n_embd and the length that the states' numbers have."""
_WARMUP = 5
_LAST = 0.1
"""What is left of the length of steps at the end."""
_MOMENTUM, _SQUARES, _LEAST = 0.9, 0.98, 1e-8
TEMPERATURE = 2.0
"""What logits are divided by."""
READS = 3
"""How often a step reads each weight of a layer: on the way forward, and on the way back to compute the layer again and
to differentiate it."""
DEFAULT_STEPS = 60
_MANY_WEIGHTS = 500_000_000
"""Weights of a model of which ``DEFAULT_STEPS`` take half an hour on two cores."""


def default_steps(model: ModelWeights) -> int:
    """How many steps are taken where nobody says it: none where they would take long."""
    n_weights = sum(int(np.prod(tensor.shape)) for tensor in model.tensors.values())
    return DEFAULT_STEPS if n_weights <= _MANY_WEIGHTS else 0


@dataclass(frozen=True, eq=False)
class Lesson:
    """A text, and what its own expert makes of it."""

    text: RouterText
    own: Floats
    """The states of that expert alone after the last layer, before each token that counts: (n, n_embd)."""


class RowsPass(BackwardPass):
    """The mixture with ``rows`` (n_layer, n_expert, n_embd) in the place of its routers; ``gradient`` is theirs."""

    def __init__(
        self, model: ModelWeights, rows: Floats, *, threads: int | None = None, work: Work | None = None
    ) -> None:
        super().__init__(model, threads=threads, work=work)
        self.rows = rows
        self.gradient = np.zeros_like(rows)

    def router_logits(self, layer: int, normed: Floats) -> Floats:
        """What the rows give for ``normed`` (n, n_embd): (n, n_expert)."""
        out: Floats = normed @ self.rows[layer].T
        return out

    def router_rows(self, layer: int) -> Floats:
        """The rows of a layer."""
        rows: Floats = self.rows[layer]
        return rows

    def on_router(self, layer: int, normed: Floats, of_logits: Floats) -> None:
        """Keep the gradient of a layer's rows."""
        self.gradient[layer] = of_logits.T @ normed

    def states(
        self, prompts: Sequence[Sequence[int]], on_input: Callable[[int, Floats], None] = lambda layer, normed: None
    ) -> Iterator[Floats]:
        """The residual stream before each layer, and after the last: (n_tokens, n_embd) each.

        ``on_input`` gets the number of each layer, and the input of its router.
        """
        hidden = self.first(prompts)
        for layer in range(self._config.n_layer):
            yield hidden
            attended, normed = self.attended(layer, hidden, prompts)
            on_input(layer, normed)
            hidden = self.added(attended, self.feed_forward(layer, normed))
        yield hidden

    def distance(
        self, taught: Sequence[Lesson], on_input: Callable[[int, Floats], None] = lambda layer, normed: None
    ) -> tuple[float, Floats]:
        """How far the mixture is from the own experts of texts, in the mean over files of the mean over tokens that
        count; and the states before these after the last layer, (n, n_embd)."""
        texts = [lesson.text for lesson in taught]
        *_, last = self.states([text.tokens for text in texts], on_input)
        last = last[scored_rows(texts)[0]]
        distances, _ = self.softened(last, _own(taught), TEMPERATURE)
        return float(_shares(texts).astype(np.float64) @ distances), last

    def differentiate(self, taught: Sequence[Lesson]) -> NDArray[np.float64]:
        """Let ``gradient`` be that of ``distance``; returns the root of the mean square of the numbers of each layer's
        router inputs, (n_layer,)."""
        texts = [lesson.text for lesson in taught]
        prompts = [text.tokens for text in texts]
        lengths = np.empty(len(self.rows))

        def note(layer: int, normed: Floats) -> None:
            lengths[layer] = max(float(np.sqrt(np.mean(np.square(normed, dtype=np.float64)))), 1e-30)

        kept = list(self.states(prompts, note))
        last, (rows, _) = kept.pop(), scored_rows(texts)
        gradient = np.zeros_like(last)
        gradient[rows] = self.softened(last[rows], _own(taught), TEMPERATURE)[1] * _shares(texts)[:, None]
        for layer in reversed(range(len(kept))):
            _, gradient = self.layer_gradient(layer, kept.pop(), gradient, prompts)
        return lengths

    def own_states(self, prompts: Sequence[Sequence[int]], experts: NDArray[np.intp]) -> Floats:
        """The residual stream after the last layer, (n_tokens, n_embd), where one expert computes each token.

        ``experts`` (n_tokens,) says which.
        """
        hidden = self.first(prompts)
        for layer in range(self._config.n_layer):
            hidden, normed = self.attended(layer, hidden, prompts)
            out = self.shared_output(layer, normed)
            for expert in np.unique(experts):
                mine = experts == expert
                out[mine] += self.expert_output(layer, int(expert), normed[mine])
            hidden = self.added(hidden, out)
        return hidden


def lessons(mixture: RowsPass, texts: Sequence[RouterText]) -> list[Lesson]:
    """What each text's own expert makes of it: one pass through the model with all texts.

    Memory: a few (n_tokens, n_ff) float32.
    """
    experts = np.repeat([text.expert for text in texts], [len(text.tokens) for text in texts])
    with one_blas_thread():
        last = mixture.own_states([text.tokens for text in texts], experts)
    rows, _ = scored_rows(texts)
    ends = np.cumsum([len(text.scored) for text in texts])[:-1]
    return [Lesson(text, own) for text, own in zip(texts, np.split(last[rows], ends), strict=True)]


def stepped(
    mixture: RowsPass,
    taught: Sequence[Lesson],
    *,
    n_steps: int,
    seed: int,
    on_step: Callable[[int], None] = lambda done: None,
) -> Floats:
    """The rows of ``mixture`` after ``n_steps`` on the texts of ``taught``; the same for a ``seed``.

    A step is down the mean of the files' distances of a token that counts. ``on_step`` gets the number of steps done.

    Memory: (n_layer + 1) states (n_tokens, n_embd) float32 of about ``STEP_TOKENS`` tokens, or of a text of each file
    where these are more; and what a layer's gradient takes.
    """
    adam = _Adam(mixture.rows)
    drawn = draws([lesson.text for lesson in taught], seed)
    with one_blas_thread():
        for step in range(n_steps):
            lengths = mixture.differentiate([taught[i] for i in next(drawn)])
            left = 1 - (1 - _LAST) * step / n_steps
            rate = _STEP_LENGTH * min(1.0, (step + 1) / _WARMUP) * left / mixture.rows.shape[2]
            mixture.rows = adam.moved(mixture.rows, mixture.gradient, rate / lengths[:, None, None])
            on_step(step + 1)
    return mixture.rows


class _Adam:
    """The means of gradients and of their squares, (n_layer, n_expert, n_embd) float64."""

    def __init__(self, rows: Floats) -> None:
        self._mean, self._square, self._n = np.zeros(rows.shape), np.zeros(rows.shape), 0

    def moved(self, rows: Floats, gradient: Floats, rates: NDArray[np.float64]) -> Floats:
        """``rows`` after a step down ``gradient``."""
        self._n += 1
        self._mean += (1 - _MOMENTUM) * (gradient - self._mean)
        self._square += (1 - _SQUARES) * (gradient.astype(np.float64) ** 2 - self._square)
        mean, square = self._mean / (1 - _MOMENTUM**self._n), self._square / (1 - _SQUARES**self._n)
        return (rows - rates * mean / (np.sqrt(square) + _LEAST)).astype(np.float32)


def draws(texts: Sequence[RouterText], seed: int) -> Iterator[list[int]]:
    """Endless steps, each the numbers of its texts: as many tokens of each file, whose texts come in turn, in a new
    order each time."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    names = [(text.expert, text.file) for text in texts]
    files = [[i for i, name in enumerate(names) if name == one] for one in dict.fromkeys(names)]
    waiting: list[list[int]] = [[] for _ in files]
    while True:
        taken: list[int] = []
        for file, queue in zip(files, waiting, strict=True):
            if len(queue) < len(file):
                queue += [file[i] for i in generator.permutation(len(file))]
            n_taken = _that_fit([len(texts[i].tokens) for i in queue[: len(file)]], STEP_TOKENS // len(files))
            taken += queue[:n_taken]
            del queue[:n_taken]
        yield taken


def _that_fit(sizes: Sequence[int], n_tokens: int) -> int:
    """How many of the first texts, which have ``sizes`` tokens, have ``n_tokens`` together; one at least."""
    return max(1, sum(end <= n_tokens for end in accumulate(sizes)))


def scored_rows(texts: Sequence[RouterText]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Of each token that counts in a loss: the row before it among those of all texts, and its id; (n,) each."""
    starts = accumulate((len(text.tokens) for text in texts), initial=0)
    pairs = [
        (start + place - 1, text.tokens[place])
        for text, start in zip(texts, starts, strict=False)
        for place in text.scored
    ]
    rows, targets = np.array(pairs, dtype=np.intp).T
    return rows, targets


def _own(taught: Sequence[Lesson]) -> Floats:
    """The states that the mixture is to come near to, those of all texts in turn: (n, n_embd)."""
    return np.concatenate([lesson.own for lesson in taught])


def _shares(texts: Sequence[RouterText]) -> Floats:
    """How much each token that counts does: every file the same, and all together one; (n,)."""
    names = [(text.expert, text.file) for text in texts for _ in text.scored]
    files = {name: number for number, name in enumerate(dict.fromkeys(names))}
    numbers = np.array([files[name] for name in names])
    out: Floats = (1 / (len(files) * np.bincount(numbers)[numbers])).astype(np.float32)
    return out
