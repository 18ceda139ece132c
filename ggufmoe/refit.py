"""Another router for the mixture in a GGUF file: opens it, plans the files, has the plan written. Nothing is printed.

Weights are read as in the rest of the convert half. The tokens of texts come from llama.cpp, which is given the file's
vocabulary alone: there are many kinds of vocabularies in GGUF files, and texts must be cut as they are when the model
runs. A router that is taken from elsewhere needs no tokens, and no engine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ggufmoe.checkpoint.source import RouterReport
from ggufmoe.convert import ConvertResult, check_router_report, checked_output, write_gguf, write_router_report
from ggufmoe.errors import ArchitectureError, OptionError
from ggufmoe.export.gguf_source import GGUFSource
from ggufmoe.export.replaced import plan_replaced
from ggufmoe.export.requantize import COPY
from ggufmoe.files import StrPath, possible_path
from ggufmoe.gguf.checks import check_loadable
from ggufmoe.gguf.expert_names import base_experts, expert_names
from ggufmoe.gguf.names import expert_matrix, llama_quantize_order, part_of
from ggufmoe.gguf.own_keys import GATE_MODE, REFIT
from ggufmoe.gguf.values import text
from ggufmoe.merge.gguf_weights import GGUFWeights
from ggufmoe.merge.merged import RouterTensor
from ggufmoe.merge.recipe import TAKEN, GateMode
from ggufmoe.merge.router import Router, bare_router, refit_router, warn_of_router
from ggufmoe.merge.router_rows import read_router
from ggufmoe.merge.router_texts import TextTokens, fitting_warnings, read_texts
from ggufmoe.options import QuantizeOptions, RefitKeywords, RefitOptions, options_of
from ggufmoe.runtime.stored_vocabulary import StoredVocabulary
from ggufmoe.sizes import counted
from ggufmoe.templates.jinja_template import stored_templates
from ggufmoe.version import __version__
from ggufmoe.weights.source_tensor import Dtype
from ggufmoe.work import CancelFlag, OnProgress

if TYPE_CHECKING:
    from typing_extensions import Unpack

log = logging.getLogger("ggufmoe")

_Files = StrPath | Sequence[StrPath]
ExpertTexts = Sequence[_Files] | Mapping[str, _Files] | Mapping[int, _Files]
"""Files of texts for each expert: in the order of the experts, or by their names or numbers."""


def refit(
    source: StrPath,
    output: StrPath,
    texts: ExpertTexts = (),
    *,
    options: RefitOptions | None = None,
    on_progress: OnProgress | None = None,
    cancel: CancelFlag | None = None,
    **keywords: Unpack[RefitKeywords],
) -> ConvertResult:
    """Give the mixture in a GGUF file a router that is fitted on texts, as ``gate_mode: fitted`` of a recipe fits one.

    ``texts`` names one file, or several, for each expert: ``["everyday.txt", "sums.jsonl"]`` in the order of the
    experts, or ``{"base": "everyday.txt", "math": ["sums.jsonl", "products.jsonl"]}`` by the names that the file's
    recipe gives them (``ggufmoe inspect`` shows them), or by their numbers. Files are those of a recipe's ``texts:``;
    messages are rendered by the file's own chat template. With ``router=`` the rows of another model are taken, and
    there are no texts. Options are given as one object (``options=RefitOptions(seed=1)``) or by name (``seed=1``).

    ``source`` is a file, or any file of a split model, and stays as it is. Only the routers of the output differ, which
    are float32, and the keys ``ggufmoe.gate_mode`` and ``ggufmoe.refit``. Weights are dequantized and read once, layer
    by layer. ``router_report`` of the result says what was gained on texts that are held out. ``on_progress`` and
    ``cancel`` are those of ``convert``.

    Raises a class of ``ggufmoe.errors``: GGUFError, ArchitectureError for families whose states cannot be computed,
    RecipeError for files that hold no texts and routers of another shape, OptionError for texts that do not fit the
    experts, EngineMissingError without llama-cpp-python unless a router is taken, and what ``quantize`` raises.
    """
    options = options_of(RefitOptions, options, keywords)
    writing = _writing(options)
    path = checked_output(output, writing)
    check_router_report(options.router_report)
    with contextlib.closing(GGUFSource(possible_path(source))) as model:
        check_loadable(model.header)
        tensors = {name: RouterTensor(name, shape, Dtype.F32) for name, shape in _routers(model).items()}
        made = _new_router(model, texts, options)
        record = text(json.dumps({"version": __version__, **made.record}))
        told = {GATE_MODE: text(made.origin), REFIT: record}
        plan = plan_replaced(model, path, tensors, told, split_max_bytes=options.split_max_bytes)
        plan = replace(plan, input_paths=(*plan.input_paths, *made.input_paths))
        reports: list[RouterReport] = []

        def prepare() -> None:
            router = made.make(on_progress, cancel)
            reports.append(router.report)
            warn_of_router(router.report)
            write_router_report(router.report, options.router_report)
            for tensor, rows in zip(tensors.values(), router.rows, strict=True):
                tensor.fill(rows)

        result = write_gguf(plan, writing, on_progress, cancel, prepare)
        return replace(result, router_report=reports[0])


def _writing(options: RefitOptions) -> QuantizeOptions:
    return QuantizeOptions(
        COPY,
        threads=options.threads,
        split_max_size=options.split_max_size,
        resume=options.resume,
        force=options.force,
        manifest=options.manifest,
    )


@dataclass(frozen=True)
class _NewRouter:
    """A router that is to be made."""

    origin: str
    """For ``GATE_MODE``."""
    record: Mapping[str, object]
    """For ``REFIT``."""
    input_paths: tuple[Path, ...]
    make: Callable[[OnProgress | None, CancelFlag | None], Router]


def _new_router(model: GGUFSource, texts: ExpertTexts, options: RefitOptions) -> _NewRouter:
    if options.router is not None:
        if texts:
            raise OptionError("a router that is taken is not fitted: leave out the texts, or --router")
        return _taken(model, options.router)
    if not texts:
        raise OptionError("give texts of each expert, or a router to take (--router)")
    return _fitted(model, texts, options)


def _routers(model: GGUFSource) -> dict[str, tuple[int, int]]:
    """The names of the routers, from that of the first layer that has one on, and (n_expert, n_embd) of each.

    Raises ArchitectureError where there is none, or where something beside its rows routes tokens.
    """
    path, found = model.header.paths[0], {}
    for tensor in sorted(model.tensors, key=lambda one: llama_quantize_order(one.name)):
        if part_of(tensor.name) != "router":
            continue
        if expert_matrix(tensor.name) is None:
            raise ArchitectureError(
                f"{path}: {tensor.name} routes tokens as well, but only a router's rows are replaced"
            )
        if len(tensor.shape) == 2:  # that of a single expert is a vector
            found[tensor.name] = (tensor.shape[0], tensor.shape[1])
    if not found:
        raise ArchitectureError(f"{path} is no mixture of experts, so it has no router")
    return found


def _taken(model: GGUFSource, path: Path) -> _NewRouter:
    shapes = list(_routers(model).values())
    rows = read_router(path, (len(shapes), *shapes[0]), "the model has")
    record = {"router": path.name, "sha256": hashlib.sha256(rows.tobytes()).hexdigest()}
    inputs = () if path.is_dir() else (path,)
    return _NewRouter(TAKEN, record, inputs, lambda on_progress, cancel: bare_router(TAKEN, rows))


def _fitted(model: GGUFSource, texts: ExpertTexts, options: RefitOptions) -> _NewRouter:
    path, metadata = model.header.paths[0], model.header.metadata
    files = _files(texts, expert_names(metadata))
    mixture = GGUFWeights(model.header, {tensor.name: tensor.parts for tensor in model.tensors})
    with StoredVocabulary(path) as vocabulary:
        template = stored_templates(model.header.shards[0].header).get("default")
        sizes = mixture.config.n_vocab, mixture.config.n_ctx
        tokens = TextTokens(vocabulary.tokenize, vocabulary.bos, vocabulary.eos, template, *sizes)
        read = read_texts(files, tokens, text_tokens=options.text_tokens, seed=options.seed)
    base = base_experts(metadata)
    base_texts = [one for one in read if base and one.expert in base]
    for warning in fitting_warnings(base != (), (), base_texts):
        log.warning("%s", warning)
    record = {
        "texts": [[file.name for file in mine] for mine in files],
        "text_tokens": options.text_tokens,
        "seed": options.seed,
        "sha256": hashlib.sha256(repr(read).encode()).hexdigest(),
    }

    def make(on_progress: OnProgress | None, cancel: CancelFlag | None) -> Router:
        return refit_router(
            mixture,
            read,
            n_steps=options.router_steps,
            seed=options.seed,
            threads=options.threads,
            on_progress=on_progress,
            cancel=cancel,
        )

    return _NewRouter(GateMode.FITTED.value, record, tuple(file for mine in files for file in mine), make)


def _files(texts: ExpertTexts, names: Sequence[str]) -> list[list[Path]]:
    """The files of each expert. Raises OptionError for a name that no expert has, and for experts without a file."""
    told = ", ".join(f"{number} {name}" if name != f"expert {number}" else name for number, name in enumerate(names))
    if isinstance(texts, (str, os.PathLike)):
        raise TypeError(f"expected a list of files, or a dict of expert and files, not {texts!r}")
    if not isinstance(texts, Mapping):
        if len(texts) != len(names):
            raise OptionError(
                f"{counted(len(texts), 'file')} of texts for {counted(len(names), 'expert')} ({told}): give one for "
                "each, in this order, or name the expert of each (NAME=FILE)"
            )
        return [_paths(mine) for mine in texts]
    files: list[list[Path]] = [[] for _ in names]
    for key, mine in texts.items():
        name = str(key)
        number = names.index(name) if name in names else int(name) if name.isdecimal() else len(names)
        if number >= len(names):
            raise OptionError(f"no expert is called {key!r}; there are {told}")
        files[number] += _paths(mine)
    if lacking := [names[number] for number, mine in enumerate(files) if not mine]:
        raise OptionError(f"no texts for {', '.join(lacking)}: a router is fitted on texts of every expert")
    return files


def _paths(files: _Files) -> list[Path]:
    return [possible_path(one) for one in ((files,) if isinstance(files, (str, os.PathLike)) else files)]
