"""The merged model: base, experts and router as one ``ModelSource``.

Attention, norms, embeddings and head come from the base, each expert's MLP from its source, router rows from
``router``. Every weight is rounded to the recipe's dtype when it is read, as mergekit does, so that converting the
recipe and converting the merged checkpoint give the same bytes. Each source is opened once; no weights stay in memory.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufmoe.checkpoint.chat_template import default_chat_template
from ggufmoe.checkpoint.config import parse_config
from ggufmoe.checkpoint.from_hub import HubAccess
from ggufmoe.checkpoint.jsonfile import read_capped
from ggufmoe.checkpoint.opening import open_checkpoint, open_directory
from ggufmoe.checkpoint.source import BaseModel, ModelSource, Provenance, RouterReport
from ggufmoe.errors import CheckpointError, InputError, RecipeError
from ggufmoe.families import family_of
from ggufmoe.families.family import Family
from ggufmoe.families.model_config import ModelConfig
from ggufmoe.files import decode_text, possible_path, what_instead
from ggufmoe.gguf.floats import convert_floats
from ggufmoe.gguf.own_keys import GATE_MODE, RECIPE, VERSION
from ggufmoe.gguf.upstream import MODEL_TENSOR
from ggufmoe.hub.hub_models import is_hub_id
from ggufmoe.hub.read_ahead import remote_bytes
from ggufmoe.merge.compare import attention_distance, compare_sources
from ggufmoe.merge.forward import Floats, ForwardPass
from ggufmoe.merge.kept_router import KeptRouter
from ggufmoe.merge.model_card import model_card
from ggufmoe.merge.pass_reads import Step
from ggufmoe.merge.recipe import TAKEN, ExpertRecipe, GateMode, Recipe, load_recipe, place_of
from ggufmoe.merge.router import Router, bare_router, check_prompts, fit_router, make_router, warn_of_router
from ggufmoe.merge.router_fit import fitted_steps
from ggufmoe.merge.router_rows import read_router
from ggufmoe.merge.router_steps import default_steps
from ggufmoe.merge.router_texts import RouterText, TextTokens, fitting_warnings, read_texts
from ggufmoe.merge.targets import (
    EXPERT_MATRICES,
    ROUTER,
    SHARED_GATE,
    SHARED_MATRICES,
    kept_names,
    needed_rule,
    target_family,
)
from ggufmoe.merge.tokens import BASE, GatheredRows, KnownTokens, TokenPlan, plan_tokens
from ggufmoe.quant.kernels.conversions import CONVERSIONS
from ggufmoe.version import __version__
from ggufmoe.weights.byte_ranges import ByteRange, byte_ranges
from ggufmoe.weights.source_tensor import Dtype, SourceTensor
from ggufmoe.work import CancelFlag, OnProgress

log = logging.getLogger("ggufmoe")

_MAX_TEMPLATE_BYTES = 1 << 20
_TOKEN_ROWS = (MODEL_TENSOR.TOKEN_EMBD, MODEL_TENSOR.OUTPUT)
"""The tensors that have a row for each token."""


class RoundedTensor:
    """A source tensor with its expert's changes applied, rounded to another dtype row by row."""

    def __init__(self, name: str, source: SourceTensor, dtype: Dtype, changes: Changes | None = None) -> None:
        self.name = name
        self.dtype = dtype
        self.shape = source.shape
        self._source = source
        self._changes = changes

    def read_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Fill ``out`` (stop - start, n_cols) with rows [start, stop) in ``dtype``."""
        if self._changes is None and self._source.dtype is self.dtype:
            self._source.read_rows(start, stop, out)
            return
        raw: NDArray[Any] = np.empty(out.shape, dtype=self._source.dtype.numpy)
        self._source.read_rows(start, stop, raw)
        rows = np.empty(out.shape, dtype=np.float32)
        # not cached: it is not known here whether the user allows that, and compiling takes a moment
        CONVERSIONS.convert(raw, rows, cache=False)
        if self._changes is not None:
            self._changes.apply(rows, start, self._source.dtype)
        CONVERSIONS.convert(rows, out, cache=False)

    def byte_ranges(self, start: int, stop: int) -> Iterator[ByteRange]:
        """What ``read_rows`` reads."""
        return byte_ranges(self._source, start, stop)


class Changes:
    """Noise and scale of one expert tensor; noise depends on the seed, the tensor and the row alone.

    After each of the two steps values are rounded to the source's dtype, as torch does.
    """

    def __init__(self, *, noise_scale: float | None, residual_scale: float | None, key: tuple[int, int]) -> None:
        self._noise_scale = noise_scale
        self._residual_scale = residual_scale
        self._key = key

    def apply(self, rows: Floats, first_row: int, dtype: Dtype) -> None:
        """Change ``rows`` (n, n_cols) float32 in place; ``first_row`` is the first one's place in the tensor."""
        if self._noise_scale is not None:
            for i, row in enumerate(rows):
                row += self._noise(first_row + i, row.size) * np.float32(self._noise_scale)
            _round(rows, dtype)
        if self._residual_scale is not None:
            rows *= np.float32(self._residual_scale)
            _round(rows, dtype)

    def _noise(self, row: int, n_cols: int) -> Floats:
        # Philox counts in 256 bits: each row starts 2**64 draws after the last, so rows can be made in any order.
        bits = np.random.Philox(key=np.array(self._key, dtype=np.uint64), counter=np.array([0, row, 0, 0], np.uint64))
        return np.random.Generator(bits).standard_normal(n_cols, dtype=np.float32)


class RouterTensor:
    """One layer's router rows, (n_expert, n_embd); they can be read once ``fill`` has been called."""

    def __init__(self, name: str, shape: tuple[int, int], dtype: Dtype) -> None:
        self.name = name
        self.dtype = dtype
        self.shape = shape
        self.rows: NDArray[Any] | None = None

    def fill(self, rows: Floats) -> None:
        """Set the rows, (n_expert, n_embd) float32, which are rounded to the dtype."""
        self.rows = np.empty(self.shape, dtype=self.dtype.numpy)
        convert_floats(np.ascontiguousarray(rows), self.rows)

    def read_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Fill ``out`` with rows [start, stop)."""
        assert self.rows is not None, "prepare() computes the router before rows are read"
        out[...] = self.rows[start:stop]


class MergedModel:
    """An opened recipe: a ``ModelSource`` whose router is computed by ``prepare``.

    ``warnings`` are the differences between the sources that may be intended; ``texts`` are what a router of gate mode
    fitted is fitted on.
    """

    def __init__(
        self,
        recipe: Recipe,
        text: str,
        path: Path,
        *,
        allow_outside_files: bool = False,
        access: HubAccess | None = None,
    ) -> None:
        access = access or HubAccess()
        self.recipe = recipe
        self._path = path
        self._allow_outside_files = allow_outside_files
        opened: dict[str, ModelSource] = {}
        try:
            self._base = _open(recipe.base_model, path, text, ("base_model",), opened, access)
            self._experts = [
                _open(expert.source_model, path, text, ("experts", i, "source_model"), opened, access)
                for i, expert in enumerate(recipe.experts)
            ]
            self._shared = [
                _open(expert.source_model, path, text, ("shared_experts", i, "source_model"), opened, access)
                for i, expert in enumerate(recipe.shared_experts or ())
            ]
            self._sources = tuple(opened.values())
            self._line = access.line if access.origins else None
            self._family = _target(self._base.config, recipe, path, text)
            self.warnings = compare_sources(self._base, recipe, [*self._experts, *self._shared])
            # the largest tensor has the dtype of all matrices
            largest = max(self._base.tensors.values(), key=lambda tensor: int(np.prod(tensor.shape)))
            self._dtype = recipe.storage_dtype or largest.dtype
            self._tokens = plan_tokens(recipe.tokenizer_source, self._base, [*self._experts, *self._shared])
            self.config = _config(path, self._base.config, self._family, recipe, self._dtype, self._tokens)
            self.tokenizer_dir = self._tokens.directory
            self.chat_template = self._chosen_template()
            self.provenance = _provenance(recipe, text, path, opened)
            self._routers = self._router_tensors(ROUTER, self.config.n_expert)
            self._shared_gates = self._router_tensors(SHARED_GATE, 1) if self._family.rule(SHARED_GATE) else []
            if self._base.config.sliding_window and not self.config.sliding_window:
                window = f"the base's sliding window of {self._base.config.sliding_window} tokens is not applied"
                self.warnings += (f"{window}: a {self._family.architecture} has none",)
            self.tensors: Mapping[str, SourceTensor] = MappingProxyType(dict(self._named_tensors()))
            check_prompts(recipe, self._base)
            self._stored_rows = None if recipe.router is None else self._read_router(recipe.router)
            self.texts = self._read_texts() if recipe.gate_mode is GateMode.FITTED else ()
        except BaseException:
            for source in opened.values():
                source.close()
            raise
        self.router_report: RouterReport | None = None
        self.kept_router: KeptRouter | None = None
        """Where ``prepare`` keeps the router that it computes, or finds that of an interrupted run."""

    @property
    def model_card(self) -> str:
        """The README.md of the merged checkpoint."""
        return model_card(self.recipe, self.provenance)

    @property
    def input_paths(self) -> tuple[Path, ...]:
        """The recipe and every file of its models."""
        return (self._path, *(path for source in self._sources for path in source.input_paths))

    def router_steps(self) -> Iterator[Step]:
        """The tensors that ``prepare`` reads to compute the router, each once; single rows of others are left out."""
        if self._stored_rows is not None or not self.recipe.gate_mode.needs_forward_pass:
            return iter(())
        base = ForwardPass(self._base)
        if self.recipe.gate_mode is not GateMode.FITTED:
            return base.steps()
        return fitted_steps(self.config, ForwardPass(self), base if self._base_expert is None else None)

    @property
    def n_fitting_steps(self) -> int:
        """How many steps a fitted router takes: what the recipe says; else none where they would take long, or where
        weights come over the network, as steps read them again and again."""
        if self.recipe.gate_mode is not GateMode.FITTED or self._stored_rows is not None:
            return 0
        if self.recipe.router_steps is not None:
            return self.recipe.router_steps
        read = (tensor for step in self.router_steps() for tensor in step)
        return 0 if any(remote_bytes(byte_ranges(tensor, 0, 1)) for tensor in read) else default_steps(self)

    def check_checkpoint(self) -> None:
        """Raise RecipeError, with the reason, if the merge is written as a GGUF file alone."""
        assert self._family.merge is not None, "target_family gives families that are targets"
        if why := self._family.merge.only_gguf:
            made = f"a merge of {self._base.config.architecture} models is not written as a checkpoint"
            raise RecipeError(f"{self._path}: {made}: {why}; `ggufmoe convert {self._path}` writes it as a GGUF file")

    def prepare(
        self,
        *,
        threads: int | None = None,
        on_progress: OnProgress | None = None,
        cancel: CancelFlag | None = None,
    ) -> None:
        """Compute the router rows, the one part that cannot be streamed. A second call does nothing.

        ``threads`` is None for one thread per usable core. Raises Cancelled when ``cancel`` is set.
        """
        if self.router_report is not None:
            return
        router = None if self.kept_router is None else self.kept_router.load()
        if router is None:
            router = self._computed_router(threads, on_progress, cancel)
            if self.kept_router is not None:
                self.kept_router.save(router)
        for tensor, rows in zip(self._routers, router.rows, strict=True):
            tensor.fill(rows)
        for tensor, rows in zip(self._shared_gates, router.shared_rows if self._shared_gates else (), strict=True):
            tensor.fill(rows)
        self.router_report = router.report
        warn_of_router(router.report)

    def _computed_router(
        self, threads: int | None, on_progress: OnProgress | None, cancel: CancelFlag | None
    ) -> Router:
        if self._stored_rows is not None:
            return bare_router(TAKEN, self._stored_rows)
        if self.recipe.gate_mode is GateMode.FITTED:
            return self._fitted_router(threads, on_progress, cancel)
        return make_router(
            self.recipe, self._base, threads=threads, on_progress=on_progress, cancel=cancel, line=self._line
        )

    @property
    def _base_expert(self) -> int | None:
        """The expert whose MLP is the base's own; None if there is none, or each token has a shared expert as well."""
        unchanged = (
            i
            for i, (spec, source) in enumerate(zip(self.recipe.experts, self._experts, strict=True))
            if source is self._base and not spec.noise_scale and spec.residual_scale in (None, 1.0)
        )
        return next(unchanged, None) if self.recipe.shared is None else None

    def close(self) -> None:
        """Close every source."""
        for source in self._sources:
            source.close()
        if self._tokens.scratch is not None:
            self._tokens.scratch.cleanup()

    def _read_router(self, router: str) -> Floats:
        """The rows that ``router:`` names. Errors name the recipe."""
        path = self._path.parent / possible_path(router)
        self._check_inside(path, "router")
        try:
            return read_router(path, (self.config.n_layer, self.config.n_expert, self.config.n_embd))
        except InputError as error:
            raise RecipeError(f"{self._path}: {error}") from error

    def _read_texts(self) -> tuple[RouterText, ...]:
        """The texts of all experts. Raises RecipeError, as for a chat template, for files that lie elsewhere."""
        files = []
        for expert in self.recipe.experts:
            paths = [self._path.parent / possible_path(file) for file in expert.texts]
            for path in paths:
                self._check_inside(path, "texts")
            files.append(paths)
        return read_texts(files, TextTokens.of(self), text_tokens=self.recipe.text_tokens, seed=self.recipe.seed)

    def _fitted_router(self, threads: int | None, on_progress: OnProgress | None, cancel: CancelFlag | None) -> Router:
        """The router of gate mode fitted; what is known to go wrong is a warning."""
        distances = tuple(0.0 if one is self._base else attention_distance(self._base, one) for one in self._experts)
        base_texts = [text for text in self.texts if self._experts[text.expert] is self._base]
        for warning in fitting_warnings(self._base in self._experts, distances, base_texts):
            log.warning("%s", warning)
        router = fit_router(
            self.recipe,
            self,
            self._base,
            self.texts,
            base_expert=self._base_expert,
            rounded=self._rounded,
            n_steps=self.n_fitting_steps,
            threads=threads,
            on_progress=on_progress,
            cancel=cancel,
            line=self._line,
        )
        return replace(router, report=replace(router.report, attention_distances=distances))

    def _rounded(self, rows: Floats) -> Floats:
        """A copy of ``rows`` in the model's dtype, as float32."""
        out: Floats = rows.copy()
        _round(out, self._dtype)
        return out

    def _chosen_template(self) -> str | None:
        """The recipe's choice; else the tokenizer's own (None); else that of the first expert whose template fits.

        A template fits if the result has every token of the expert that it writes.
        """
        choice = self.recipe.chat_template
        if choice is not None and choice.startswith("expert:"):
            return self._template_of(int(choice.removeprefix("expert:")))
        if choice is not None and choice != "base":
            return self._template_in(self._path.parent / possible_path(choice))
        if choice == "base" or default_chat_template(self.tokenizer_dir) is not None:
            return None
        known = self._tokens.ids or KnownTokens(self._base).ids
        lacking: dict[int, list[str]] = {}
        for i, expert in enumerate(self._experts):
            template = default_chat_template(expert.tokenizer_dir)
            if template is not None and not (found := KnownTokens(expert).lacking_in(known)):
                log.warning("the base model has no chat template; using that of expert %d", i)
                return template
            if template is not None:
                lacking[i] = found
        if lacking:
            raise RecipeError(_no_template_fits(self._path, lacking))
        return None

    def _template_in(self, path: Path) -> str:
        """The text of a template file, which must lie below the recipe's folder or a source's."""
        self._check_inside(path, "chat_template")
        try:
            if not path.is_file():
                raise RecipeError(f"{path}: the chat template cannot be read (there is no such file)")
            if (instead := what_instead(path)) is not None:
                raise RecipeError(f"{path}: the chat template cannot be read (it is {instead})")
            return decode_text(read_capped(path, _MAX_TEMPLATE_BYTES))
        except (CheckpointError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path}: the chat template cannot be read ({error})") from error

    def _check_inside(self, path: Path, key: str) -> None:
        """Raise RecipeError for a file outside of the recipe's folder and its models' folders, unless that is allowed.

        A recipe comes from somebody else: it may not put any file of this machine into a model.
        """
        file, home, *folders = (
            Path(os.path.realpath(place))
            for place in (path, self._path.parent, *(source.tokenizer_dir for source in self._sources))
        )
        # the files of a model in the hub's cache are links to blobs beside its snapshots
        cached = [folder.parents[1] for folder in folders if folder.parent.name == "snapshots"]
        inside = any(file.is_relative_to(place) for place in (home, *folders, *cached))
        if not inside and not self._allow_outside_files:
            raise RecipeError(
                f"{self._path}: {key}: {path} lies outside of the recipe's folder and its models' folders; "
                "pass --allow-outside-files if it is meant"
            )

    def _template_of(self, expert: int) -> str:
        template = default_chat_template(self._experts[expert].tokenizer_dir, warn=True)
        if template is None:
            raise RecipeError(f"{self._path}: chat_template: expert {expert} has none; name another or a file")
        return template

    def _named_tensors(self) -> Iterator[tuple[str, SourceTensor]]:
        yield from self._base_tensors()
        for router in (*self._routers, *self._shared_gates):
            yield router.name, router
        n_expert, n_parts = len(self._experts), len(EXPERT_MATRICES)
        for layer in range(self.config.n_layer):
            for index, (spec, source) in enumerate(zip(self.recipe.experts, self._experts, strict=True)):
                first = (layer * n_expert + index) * n_parts
                yield from self._expert_tensors(spec, source, EXPERT_MATRICES, (layer, index), first)
            for spec, source in zip(self.recipe.shared_experts or (), self._shared, strict=True):
                first = (self.config.n_layer * n_expert + layer) * n_parts
                yield from self._expert_tensors(spec, source, SHARED_MATRICES, (layer, 0), first)

    def _base_tensors(self) -> Iterator[tuple[str, SourceTensor]]:
        dense = family_of(self._base.config)
        kept = kept_names(self._base.config, self._family)
        embedding, output = (needed_rule(dense, tensor).hf for tensor in _TOKEN_ROWS)
        stored = dict(self._base.tensors)
        if output not in stored and not self.config.tie_embeddings:
            stored[output] = stored[embedding]
        for name, tensor in stored.items():
            if name in (embedding, output) and self._tokens.runs:
                yield kept[name], self._gathered_rows(kept[name], name)
            elif name in kept:
                yield kept[name], RoundedTensor(kept[name], tensor, self._dtype)

    def _expert_tensors(
        self,
        spec: ExpertRecipe,
        source: ModelSource,
        matrices: Sequence[tuple[Any, Any]],
        place: tuple[int, int],
        first: int,
    ) -> Iterator[tuple[str, SourceTensor]]:
        """The matrices of one expert of one layer; ``first`` is the number of the first one's noise."""
        dense = family_of(self._base.config)
        for number, (tensor, becomes) in enumerate(matrices, first):
            name = needed_rule(self._family, becomes).name(*place)
            stored = source.tensors[needed_rule(dense, tensor).name(place[0])]
            changes = _changes(spec, (self.recipe.seed, number), is_down=tensor is MODEL_TENSOR.FFN_DOWN)
            yield name, RoundedTensor(name, stored, self._dtype, changes)

    def _router_tensors(self, tensor: Any, n_rows: int) -> list[RouterTensor]:
        rule, shape = needed_rule(self._family, tensor), (n_rows, self.config.n_embd)
        return [RouterTensor(rule.name(layer), shape, self._dtype) for layer in range(self.config.n_layer)]

    def _gathered_rows(self, name: str, source_name: str) -> GatheredRows:
        embedding = needed_rule(family_of(self._base.config), MODEL_TENSOR.TOKEN_EMBD).hf
        sources = {BASE: self._base, **dict(enumerate([*self._experts, *self._shared]))}
        used = {source for run in self._tokens.runs for source, _ in run.sources}
        tensors: dict[int, SourceTensor] = {}
        for source in used:
            # a model whose output is its embedding has one tensor for both
            tensor = sources[source].tensors.get(source_name) or sources[source].tensors[embedding]
            tensors[source] = RoundedTensor(name, tensor, self._dtype)
        return GatheredRows(name, self._dtype, self._tokens.runs, tensors, self.config.n_embd)


def open_recipe(
    path: Path,
    *,
    allow_identical_experts: bool = False,
    allow_outside_files: bool = False,
    access: HubAccess | None = None,
) -> MergedModel:
    """Open a recipe and all it names, and check that they fit together; nothing is computed yet.

    With ``allow_outside_files`` its chat template may be any file, not only one of its own or of a model's folder.
    ``access`` says how models of the hub are reached; by default their weights are read by ranges and not stored.

    Raises RecipeError, CheckpointError or TokenizerError: everything that can be known before the first weight is read.
    """
    recipe, text = load_recipe(path, allow_identical_experts=allow_identical_experts)
    model = MergedModel(recipe, text, path, allow_outside_files=allow_outside_files, access=access)
    for warning in model.warnings:
        log.warning("%s", warning)
    return model


def _no_template_fits(path: Path, lacking: Mapping[int, Sequence[str]]) -> str:
    told = "; ".join(f"that of expert {i} writes {', '.join(tokens)}" for i, tokens in lacking.items())
    first = next(iter(lacking))
    return (
        f"{path}: the base has no chat template, and no expert's fits the base's tokens: {told}. Write "
        f"tokenizer_source: union (or expert:{first}) to take these tokens with their embedding rows, "
        "chat_template: base to go without a template, chat_template: FILE or expert:N to take one all the same"
    )


def _open(
    reference: str,
    recipe_path: Path,
    text: str,
    place: tuple[str | int, ...],
    opened: dict[str, ModelSource],
    access: HubAccess,
) -> ModelSource:
    """Open a directory, relative to the recipe's, or a hub id, once each. Errors name the place in the recipe."""
    try:
        directory = recipe_path.parent / possible_path(reference)
    except InputError as error:
        raise RecipeError(f"{place_of(recipe_path, text, place)}: {error}") from error
    from_hub = is_hub_id(reference) and not directory.exists()
    real = Path(os.path.realpath(directory))
    key = reference if from_hub else str(real)
    try:
        if key not in opened:
            opened[key] = open_checkpoint(reference, access=access) if from_hub else open_directory(real)
    except CheckpointError as error:
        neither = f"; {directory} is no directory either" if from_hub else ""
        raise type(error)(f"{place_of(recipe_path, text, place)}: {error}{neither}") from error
    source = opened[key]
    if source.config.n_expert:
        where = place_of(recipe_path, text, place)
        raise RecipeError(f"{where}: {reference} is a mixture of experts already; a recipe takes dense models")
    return source


def _target(base: ModelConfig, recipe: Recipe, path: Path, text: str) -> Family:
    """The family of the result. Errors name the place in the recipe."""
    try:
        return target_family(base, recipe.wanted)
    except RecipeError as error:
        key = "architecture" if recipe.architecture else "shared_experts" if recipe.shared else "base_model"
        raise RecipeError(f"{place_of(path, text, (key,))}: {error}") from error


def _changes(spec: ExpertRecipe, key: tuple[int, int], *, is_down: bool) -> Changes | None:
    """The changes of one projection: noise for each of them, the residual scale for the down projection alone."""
    residual_scale = spec.residual_scale if is_down else None
    if spec.noise_scale is None and residual_scale is None:
        return None
    return Changes(noise_scale=spec.noise_scale, residual_scale=residual_scale, key=key)


def _round(rows: Floats, dtype: Dtype) -> None:
    if dtype is Dtype.F32:
        return
    raw: NDArray[Any] = np.empty(rows.shape, dtype=dtype.numpy)
    convert_floats(rows, raw)
    convert_floats(raw, rows)


_ORIGINAL = "original_max_position_embeddings"
"""The only parameter of rope scaling that transformers expects as a whole number."""

_ABOUT_THE_FILES = ("quantization_config", "_name_or_path", "transformers_version")
_DROPPED = frozenset(("pretraining_tp", "attention_bias", "mlp_bias", "auto_map", *_ABOUT_THE_FILES))
"""Keys of the base's config.json that do not hold for what is made of it."""

_TORCH_DTYPES = {Dtype.BF16: "bfloat16", Dtype.F16: "float16", Dtype.F32: "float32"}


def _config(
    path: Path, base: ModelConfig, family: Family, recipe: Recipe, dtype: Dtype, tokens: TokenPlan
) -> ModelConfig:
    """The base's hyper-parameters as the mixture's; ``raw`` is readable by transformers 4 and 5."""
    assert family.merge is not None, "target_family gives families that are targets"
    spellings = {other: key for key, others in family_of(base).aliases.items() for other in others}
    raw = {spellings.get(key, key): value for key, value in base.raw.items() if key not in _DROPPED}
    own = family.merge.config(base, len(recipe.experts), recipe.experts_per_token)
    raw |= {
        "architectures": [family.architecture],
        "model_type": family.model_types[0],
        **own,
        "num_key_value_heads": base.n_head_kv,
        "head_dim": base.head_dim,
        "rms_norm_eps": base.rms_norm_eps,
        "rope_theta": base.rope_theta,
        "rope_scaling": _rope_scaling(base),
        "tie_word_embeddings": base.tie_embeddings,
        "max_position_embeddings": base.n_ctx,
        "sliding_window": base.sliding_window,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "torch_dtype": _TORCH_DTYPES[dtype],
        "dtype": _TORCH_DTYPES[dtype],
        **tokens.config,
        **own,
    }
    return replace(
        parse_config(path, MappingProxyType(raw)),
        n_vocab=tokens.n_vocab,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
    )


def _rope_scaling(base: ModelConfig) -> dict[str, Any] | None:
    """Rope scaling as transformers 4 spells it; a base of transformers 5 keeps its ``rope_parameters`` as well."""
    scaling = base.rope_scaling
    if scaling.kind == "none":
        return None
    types = {_ORIGINAL: int, "truncate": bool}
    values = {name: types.get(name, float)(value) for name, value in scaling.parameters.items()}
    return {**values, "rope_type": scaling.kind}


def _provenance(recipe: Recipe, text: str, path: Path, opened: Mapping[str, ModelSource]) -> Provenance:
    provenances = [source.provenance for source in opened.values()]
    licenses = {(item.license, item.license_name, item.license_link) for item in provenances}
    shared = licenses.pop() if len(licenses) == 1 else (None, None, None)
    return Provenance(
        name=recipe.name or path.stem,
        license=shared[0],
        license_name=shared[1],
        license_link=shared[2],
        tags=("merge", "moe", "frankenmoe"),
        base_models=tuple(_base_model(key, source) for key, source in opened.items()),
        extra=MappingProxyType(
            {
                VERSION: __version__,
                GATE_MODE: recipe.router_origin,
                RECIPE: text,
            }
        ),
    )


def _base_model(key: str, source: ModelSource) -> BaseModel:
    """The name of a source; of one from the hub also its organization and page."""
    if Path(key).is_absolute():
        return BaseModel(name=source.provenance.name)
    hub_id, _, revision = key.partition("@")
    organization, _, name = hub_id.rpartition("/")
    return BaseModel(
        name=name,
        organization=organization or None,
        repo_url=f"https://huggingface.co/{hub_id}",
        version=revision or None,
    )
