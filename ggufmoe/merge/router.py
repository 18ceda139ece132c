"""Router rows: the vectors that decide which expert computes a token, made from a recipe's prompts or texts.

Owns the gate modes, with mergekit-moe's semantics but for ``fitted``, and makes the report that shows what a router
will do. How rows are fitted is in ``router_fit``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufmoe.checkpoint.source import ModelSource, ModelWeights, PromptPreference, RouterReport
from ggufmoe.errors import CheckpointError
from ggufmoe.families import family_of
from ggufmoe.families.model_config import ModelConfig
from ggufmoe.gguf.upstream import MODEL_TENSOR
from ggufmoe.hub.hub_file import Line
from ggufmoe.merge.forward import Floats, ForwardPass, embedding_rows, reading_ahead
from ggufmoe.merge.gguf_weights import GGUFWeights
from ggufmoe.merge.prompts import prompt_tokenizer, tokenize_prompts
from ggufmoe.merge.recipe import TAKEN, GateMode, Recipe
from ggufmoe.merge.router_fit import HiddenRouter, RouterFitting, Steps, fitted_steps
from ggufmoe.merge.router_steps import READS, RowsPass, default_steps
from ggufmoe.merge.router_texts import RouterText
from ggufmoe.weights.dtypes import row_count
from ggufmoe.work import CancelFlag, OnProgress, Work

log = logging.getLogger("ggufmoe")


@dataclass(frozen=True)
class Router:
    """Router rows and their report."""

    rows: Floats
    """(n_layer, n_expert, n_embd) float32; of length one where they were made of prompts, but not where fitted."""
    report: RouterReport
    shared_rows: Floats
    """The rows of a shared expert's gate, (n_layer, 1, n_embd); of a recipe without one (n_layer, 0, n_embd)."""


@dataclass(frozen=True)
class _Prompt:
    expert: int
    positive: bool
    text: str
    tokens: tuple[int, ...]


def make_router(
    recipe: Recipe,
    base: ModelSource,
    *,
    threads: int | None = None,
    on_progress: OnProgress | None = None,
    cancel: CancelFlag | None = None,
    line: Line | None = None,
) -> Router:
    """Router rows for ``recipe``, computed on ``base`` by ``threads`` threads (None: one per usable core).

    ``line`` is that over which the base's weights come, if they are on the hub: they are read ahead.

    hidden and hidden_last take each prompt's last token, hidden_avg the mean over its own tokens (mergekit counts
    padding in), both at the input of each layer; cheap_embed sums token embeddings. Positive minus negative, then
    normalized. random and uniform_random draw from the recipe's seed.

    Progress is reported after each layer, as an equal share of the base's bytes. Raises Cancelled when ``cancel`` is
    set.
    """
    n_rows = len(recipe.gated)
    assert recipe.router is None, "its rows exist"
    assert recipe.gate_mode is not GateMode.FITTED, "fit_router makes these"
    if not recipe.needs_prompts:
        return _router(recipe, _random_rows(recipe, base.config, n_rows), (), None)
    prompts = _tokenized(recipe, base)
    work, on_layer = _work(base.config.n_layer, _layer_bytes(base), on_progress, cancel)
    if recipe.gate_mode is GateMode.CHEAP_EMBED:
        rule = family_of(base.config).rule(MODEL_TENSOR.TOKEN_EMBD)
        assert rule is not None, "every model has an embedding"
        table = base.tensors[rule.name()]
        sums = np.stack([embedding_rows(table, prompt.tokens).sum(axis=0) for prompt in prompts])[None]
        n_layer = base.config.n_layer
        work.advance(_layer_bytes(base) * n_layer, f"layer {n_layer} of {n_layer}")
        rows = np.repeat(_combine_sums(sums, prompts, n_rows), n_layer, axis=0)
        return _router(recipe, rows, prompts, np.repeat(sums, n_layer, axis=0))

    _warn_of_one_ending(recipe, prompts)
    forward = ForwardPass(base, threads=threads, work=work)
    with reading_ahead([forward], forward.steps(), line):
        inputs, router_inputs = _hidden_vectors(forward, prompts, recipe.gate_mode, on_layer)
    return _router(recipe, _combine_means(inputs, prompts, n_rows), prompts, router_inputs)


def fit_router(
    recipe: Recipe,
    mixture: ModelSource,
    base: ModelSource,
    texts: Sequence[RouterText],
    *,
    base_expert: int | None = None,
    rounded: Callable[[Floats], Floats],
    n_steps: int,
    threads: int | None = None,
    on_progress: OnProgress | None = None,
    cancel: CancelFlag | None = None,
    line: Line | None = None,
) -> Router:
    """The router of gate mode fitted for ``mixture``, whose own router is not read, and its score on held-out texts.

    ``base_expert`` is the expert whose MLP is that of ``base``, if there is one; ``rounded`` rounds rows as they are
    stored; ``n_steps`` is how many steps they take once they are fitted. The rest is as in ``make_router``; gate mode
    hidden is compared where the recipe has prompts.
    """
    n_layer, layer_bytes = mixture.config.n_layer, _layer_bytes(mixture)
    work, on_layer = _work(n_layer, layer_bytes, on_progress, cancel, n_steps)
    prompts = _tokenized(recipe, base) if recipe.has_prompts else ()
    hidden = None
    if prompts:

        def rows_of(states: Floats) -> Floats:
            rows: Floats = _combine_means(_picked(states, prompts, GateMode.HIDDEN)[None], prompts, len(recipe.experts))
            return rows.reshape(len(recipe.experts), -1)

        hidden = HiddenRouter([prompt.tokens for prompt in prompts], rows_of)
    dense, mixed = (ForwardPass(model, threads=threads, work=work) for model in (base, mixture))
    steps = _steps(mixture, n_steps, recipe.seed, layer_bytes, work, threads)
    fitting = RouterFitting(
        mixture.config, dense, mixed, texts, base_expert=base_expert, hidden=hidden, rounded=rounded, steps=steps
    )
    reads = fitted_steps(mixture.config, mixed, None if base_expert is not None else dense)
    with reading_ahead([dense, mixed], reads, line):
        rows, scores = fitting.run(on_layer)
    router = _router(recipe, rows, (), None)
    return replace(router, report=replace(router.report, scores=scores))


def refit_router(
    mixture: GGUFWeights,
    texts: Sequence[RouterText],
    *,
    n_steps: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    on_progress: OnProgress | None = None,
    cancel: CancelFlag | None = None,
) -> Router:
    """A router for a mixture that has one already, fitted as in ``fit_router`` and compared with that; float32 rows.

    ``n_steps`` is a recipe's ``router_steps``, and ``seed`` decides which texts each step takes.
    """
    n_steps = default_steps(mixture) if n_steps is None else n_steps
    n_layer = mixture.config.n_layer
    layer_bytes = mixture.n_bytes // n_layer
    work, on_layer = _work(n_layer, layer_bytes, on_progress, cancel, n_steps)
    forward = ForwardPass(mixture, threads=threads, work=work)
    steps = _steps(mixture, n_steps, seed, layer_bytes, work, threads)
    fitting = RouterFitting(mixture.config, None, forward, texts, rounded=np.copy, steps=steps)
    rows, scores = fitting.run(on_layer)
    router = bare_router(GateMode.FITTED.value, rows)
    return replace(router, report=replace(router.report, scores=scores))


def bare_router(origin: str, rows: Floats) -> Router:
    """The router of ``rows`` (n_layer, n_expert, n_embd) that were made of no prompts; no row for a shared expert.

    ``origin`` is their gate mode, or ``TAKEN`` for rows of another model.
    """
    return Router(rows, router_report(origin, rows), rows[:, :0])


def warn_of_router(report: RouterReport) -> None:
    """Log where a fitted router is worse than equal weights or the one before, and layers of rows nearly alike."""
    for score in report.scores:
        for other, called in (("uniform", "equal weights"), ("before", "the router that the file had")):
            if score.is_worse_than(other):
                log.warning(
                    "on held-out texts of %s the fitted router (loss %.3f) is worse than %s (%.3f)",
                    *(score.file, score.losses["fitted"], called, score.losses[other]),
                )
    if layers := report.degenerate_layers:
        numbers = ", ".join(map(str, layers))
        is_all = len(layers) == len(report.condition_numbers)
        where = "all layers" if is_all else f"layer{'s' * (len(layers) > 1)} {numbers}"
        what = "texts" if report.scores else "prompts"
        log.warning("the router hardly tells the experts apart in %s; use %s that differ more", where, what)


def check_prompts(recipe: Recipe, base: ModelSource) -> int:
    """The number of tokens of all prompts.

    Raises RecipeError, TokenizerError, and CheckpointError for a base whose hidden states cannot be computed, as
    ``make_router`` would.
    """
    if recipe.router is not None:
        return 0
    if recipe.gate_mode.needs_forward_pass:
        try:
            ForwardPass(base)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; use gate_mode cheap_embed or random") from error
    is_compared = recipe.gate_mode is GateMode.FITTED and recipe.has_prompts
    if not (recipe.gate_mode.needs_prompts or is_compared):
        return 0
    return sum(len(prompt.tokens) for prompt in _tokenized(recipe, base))


def _work(
    n_layer: int, layer_bytes: int, on_progress: OnProgress | None, cancel: CancelFlag | None, n_steps: int = 0
) -> tuple[Work, Callable[[int], None]]:
    """The work of a pass through a model's layers, and of steps after it; and what reports a layer."""
    stopped = "stopped while computing the router"
    total = layer_bytes * n_layer * (1 + READS * n_steps)
    work = Work("router", total, stopped=stopped, on_progress=on_progress, cancel=cancel)
    return work, lambda done: work.advance(layer_bytes, f"layer {done} of {n_layer}")


def _steps(
    mixture: ModelWeights, n_steps: int, seed: int, layer_bytes: int, work: Work, threads: int | None
) -> Steps | None:
    """Steps of a router; None where there are none."""
    if not n_steps:
        return None
    config = mixture.config
    rows = np.zeros((config.n_layer, config.n_expert, config.n_embd), np.float32)
    n_bytes = READS * config.n_layer * layer_bytes

    def on_step(done: int) -> None:
        work.advance(n_bytes, f"step {done} of {n_steps}")

    return Steps(RowsPass(mixture, rows, threads=threads, work=work), n_steps, seed, on_step)


def _layer_bytes(model: ModelSource) -> int:
    weights = model.tensors.values()
    return sum(row_count(one.shape) * one.dtype.row_bytes(one.shape[-1]) for one in weights) // model.config.n_layer


def _warn_of_one_ending(recipe: Recipe, prompts: Sequence[_Prompt]) -> None:
    """Warn where all positive prompts end in one token, as those of a chat template do."""
    ends = {prompt.tokens[-1] for prompt in prompts if prompt.positive}
    if recipe.gate_mode in (GateMode.HIDDEN, GateMode.HIDDEN_LAST) and len(recipe.experts) > 1 and len(ends) == 1:
        log.warning(
            "all positive prompts end in the same token, so gate mode %s cannot tell the experts apart at layer 0; "
            "let prompts end in the words that differ, or fit the router (gate_mode: fitted)",
            recipe.gate_mode.value,
        )


def _tokenized(recipe: Recipe, base: ModelSource) -> tuple[_Prompt, ...]:
    tokenize = prompt_tokenizer(base.tokenizer_dir)
    prompts = []
    for expert, spec in enumerate(recipe.gated):
        for positive, texts in zip((True, False), spec.prompts, strict=True):
            ids = tokenize_prompts(tokenize, texts, n_vocab=base.config.n_vocab, n_ctx=base.config.n_ctx)
            prompts += [_Prompt(expert, positive, *pair) for pair in zip(texts, map(tuple, ids), strict=True)]
    return tuple(prompts)


def _random_rows(recipe: Recipe, config: ModelConfig, n_expert: int) -> Floats:
    generator = np.random.Generator(np.random.Philox(key=recipe.seed))
    shape = (config.n_layer, n_expert, config.n_embd)
    if recipe.gate_mode is GateMode.RANDOM:
        return generator.standard_normal(shape, dtype=np.float32)
    bound = np.float32(1.0 / np.sqrt(config.n_embd))
    out: Floats = (generator.random(shape, dtype=np.float32) * 2 - 1) * bound
    return out


def _hidden_vectors(
    forward: ForwardPass, prompts: Sequence[_Prompt], mode: GateMode, on_layer: Callable[[int], None]
) -> tuple[Floats, Floats]:
    """One vector per layer and prompt, (n_layer, n_prompt, n_embd) float32: of layer inputs and of router inputs."""
    inputs, router_inputs = [], []
    for done, state in enumerate(forward.layers([prompt.tokens for prompt in prompts]), start=1):
        inputs.append(_picked(state.input, prompts, mode))
        router_inputs.append(_picked(state.router_input, prompts, mode))
        on_layer(done)
    return np.stack(inputs), np.stack(router_inputs)


def _picked(hidden: Floats, prompts: Sequence[_Prompt], mode: GateMode) -> Floats:
    """One vector of each prompt, (n_prompt, n_embd), from the states of all tokens."""
    ends = np.cumsum([len(prompt.tokens) for prompt in prompts])
    if mode is GateMode.HIDDEN_AVG:
        return np.stack([part.mean(axis=0) for part in np.split(hidden, ends[:-1])])
    out: Floats = hidden[ends - 1]
    return out


def _combine_means(vectors: Floats, prompts: Sequence[_Prompt], n_expert: int) -> Floats:
    def mean(expert: int, positive: bool) -> Floats | None:
        chosen = _select(prompts, expert, positive)
        return vectors[:, chosen].mean(axis=1) if chosen else None

    return _difference(mean, n_expert)


def _combine_sums(vectors: Floats, prompts: Sequence[_Prompt], n_expert: int) -> Floats:
    """Rows from sums of embeddings; both sides are normalized before they are subtracted, as in mergekit."""

    def direction(expert: int, positive: bool) -> Floats | None:
        chosen = _select(prompts, expert, positive)
        return _normalized(vectors[:, chosen].sum(axis=1)) if chosen else None

    return _difference(direction, n_expert)


def _select(prompts: Sequence[_Prompt], expert: int, positive: bool) -> list[int]:
    return [i for i, prompt in enumerate(prompts) if (prompt.expert, prompt.positive) == (expert, positive)]


def _difference(vector: Callable[[int, bool], Floats | None], n_expert: int) -> Floats:
    rows = []
    for expert in range(n_expert):
        positive, negative = vector(expert, True), vector(expert, False)
        if positive is None:
            raise ValueError(f"expert {expert} has no positive prompt")
        rows.append(_normalized(positive if negative is None else positive - negative))
    return np.stack(rows, axis=1)


def _normalized(vectors: Floats) -> Floats:
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    out: Floats = (vectors / np.maximum(lengths, 1e-8)).astype(np.float32)
    return out


def _router(recipe: Recipe, rows: Floats, prompts: Sequence[_Prompt], vectors: NDArray[Any] | None) -> Router:
    """The router of the rows of ``Recipe.gated``; its report is about the routed experts alone."""
    n_expert = len(recipe.experts)
    routed, shared = rows[:, :n_expert], rows[:, n_expert:]
    mine = [i for i, prompt in enumerate(prompts) if prompt.expert < n_expert]
    report = router_report(recipe.router_origin, routed)
    if vectors is not None:
        told = _preferences(routed, [prompts[i] for i in mine], vectors[:, mine])
        report = replace(report, preferences=told)
    return Router(routed, report, shared)


def _preferences(rows: Floats, prompts: Sequence[_Prompt], vectors: NDArray[Any]) -> tuple[PromptPreference, ...]:
    scores = np.einsum("lpd,led->lpe", vectors, rows)
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = scores / scores.sum(axis=-1, keepdims=True)
    return tuple(
        PromptPreference(prompt.expert, prompt.positive, prompt.text, _tuples(weights[:, i]))
        for i, prompt in enumerate(prompts)
    )


def router_report(origin: str, rows: Floats) -> RouterReport:
    """What rows (n_layer, n_expert, n_embd) alone tell; ``origin`` is their gate mode, or ``router``."""
    unit = _normalized(rows)
    singular = np.linalg.svd(rows.astype(np.float64), compute_uv=False)
    # fitted rows add up to zero: what counts in a softmax is how they differ
    is_guessed = origin not in (TAKEN, GateMode.FITTED.value)
    adds_up = np.abs(rows.sum(axis=1)).max() < 0.1 * np.abs(rows).max()
    smallest = -2 if adds_up and not is_guessed else -1
    with np.errstate(divide="ignore", invalid="ignore"):
        conditions = singular[:, 0] / singular[:, smallest]
    return RouterReport(
        gate_mode=origin,
        cosines=_tuples(np.einsum("lid,ljd->lij", unit, unit)),
        condition_numbers=tuple(float(value) for value in conditions),
        preferences=(),
    )


def _tuples(values: NDArray[Any]) -> Any:
    return tuple(_tuples(row) for row in values) if values.ndim else float(values)
