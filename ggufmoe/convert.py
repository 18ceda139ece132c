"""Conversion to GGUF, and merging: opens the source, plans the files, and has the plan written. Nothing is printed.

Every kind of source is a ``ModelSource``; only ``_open_source`` tells them apart.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.checkpoint.from_hub import HubAccess
from ggufmoe.checkpoint.provenance import RECORD
from ggufmoe.checkpoint.source import ModelSource, RouterReport
from ggufmoe.errors import ImatrixError, OptionError, OutputError
from ggufmoe.export.export_plan import plan_export
from ggufmoe.files import StrPath, check_output_file, delete, followed, partial_path, possible_path, replacing
from ggufmoe.gguf.manifest import default_path as manifest_path
from ggufmoe.gguf.manifest import write_manifest
from ggufmoe.gguf.types import GGMLType
from ggufmoe.hub.read_ahead import ReadAhead, remote_bytes
from ggufmoe.hub.source_cache import SourceCache
from ggufmoe.merge.checkpoint_plan import CHECKPOINT_NAME, checkpoint_index, plan_checkpoint
from ggufmoe.merge.kept_router import KeptRouter
from ggufmoe.merge.merged import MergedModel, open_recipe
from ggufmoe.merge.sidecars import WRITTEN_NAMES, sidecar_files
from ggufmoe.options import ConvertKeywords, ConvertOptions, ExportOptions, MergeKeywords, MergeOptions, options_of
from ggufmoe.quant.filetypes import FileType, parse_tensor_type
from ggufmoe.quant.importances import Imatrix
from ggufmoe.quant.kernels import KernelReport
from ggufmoe.quant.policy import TypePolicy, parse_override
from ggufmoe.quant.type_sets import FAST_TYPES
from ggufmoe.quant.type_speeds import TypeSpeeds, load_speeds
from ggufmoe.sizing.mixing import SizeMixer
from ggufmoe.sizing.sensitivity_file import Sensitivity
from ggufmoe.weights.byte_ranges import byte_ranges
from ggufmoe.weights.dtypes import row_count
from ggufmoe.work import CancelFlag, OnProgress, is_set
from ggufmoe.writing.directory import check_directory, open_partial_directory, place_directory
from ggufmoe.writing.formats import routines
from ggufmoe.writing.journal import fingerprint, journalled_commits
from ggufmoe.writing.place import journal_path, router_path
from ggufmoe.writing.plan import NetworkReads, WritePlan
from ggufmoe.writing.writer import WriteOptions, write_plan

if TYPE_CHECKING:
    from typing_extensions import Unpack

NETWORK_FLUSH_INTERVAL_S = 1.0
"""How often tiles are journalled whose bytes came over the network: doing them again costs more."""


@dataclass(frozen=True)
class ConvertResult:
    """The result of a conversion: the files, their cost, and the plan that was executed.

    ``bytes_read`` and ``bytes_written`` are those of this run; a resumed run counts only what was left to do.
    """

    paths: tuple[Path, ...]
    n_bytes: int
    """Size of all files."""
    bytes_read: int
    bytes_written: int
    seconds: float
    plan: WritePlan
    manifest: Path | None = None
    router_report: RouterReport | None = None
    """Where the recipe's router sends its prompts; None for any other source."""
    quantizers: tuple[KernelReport, ...] = ()
    """What has quantized each format, a kernel of ours or ggml's routine, and why; both give the same bytes."""
    network_bytes: int = 0
    """Bytes of tensor files that came over the network; ``plan.commits`` says of which commits."""

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values for JSON."""
        return {
            "files": [{"path": str(file.path), "bytes": file.n_bytes} for file in self.plan.files],
            "file_type": self.plan.file_type,
            "total_bytes": self.n_bytes,
            "weights": self.plan.n_weights,
            "bits_per_weight": round(self.plan.bits_per_weight, 4),
            "types": {name: vars(total) for name, total in self.plan.types.items()},
            "fallbacks": {t.name: t.unfit_type.name for t in self.plan.tensors if t.unfit_type is not None},
            "mix": None if self.plan.mix is None else self.plan.mix.to_dict(),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "seconds": round(self.seconds, 3),
            "commits": self.plan.commits,
            "network_bytes": self.network_bytes,
            "quantizers": [_quantizer_dict(report) for report in self.quantizers],
            "manifest": None if self.manifest is None else str(self.manifest),
            "router": None if self.router_report is None else self.router_report.to_dict(),
        }


def _quantizer_dict(report: KernelReport) -> dict[str, Any]:
    return {
        "type": report.type.name,
        "source": report.source,
        "importances": report.weighted,
        "quantizer": report.routine,
        "reason": report.reason,
    }


def convert(
    source: StrPath,
    output: StrPath,
    quant: str | None = None,
    *,
    options: ConvertOptions | None = None,
    on_progress: OnProgress | None = None,
    cancel: CancelFlag | None = None,
    **keywords: Unpack[ConvertKeywords],
) -> ConvertResult:
    """Turn a checkpoint or a merge recipe into a GGUF file.

    ``source`` is a Hugging Face directory, a recipe (``.yaml``) or, as a str, a hub id (``org/name`` or
    ``org/name@revision``); converting a recipe writes the same bytes as ``merge`` followed by ``convert``. The options
    are given as one object (``options=ConvertOptions(threads=4)``) or by name (``threads=4``), where ``quant`` may be
    the third argument; its default is Q4_K_M. ``on_progress`` is called a few times a second, never by two threads at
    once: for the router of a recipe, then for the bytes written and, if a manifest is made, for the bytes hashed.
    ``cancel`` is checked before each tile. Weights are read once, those of a recipe's base a second time where the
    router is computed from hidden states; memory does not grow with the model.

    Raises a class of ``ggufmoe.errors``: CheckpointError, RecipeError, TokenizerError, OptionError, ImatrixError and
    OutputError before anything is written, NonFiniteError and NoSpaceError on the way, Cancelled when asked to stop.
    """
    options = options_of(ConvertOptions, options, with_quant(quant, keywords))
    path = checked_output(output, options)
    check_router_report(options.router_report)
    access = _hub_access(options, path, cancel)
    with _open_source(source, options, access) as model:
        plan = _plan(model, path, options, access, on_progress, cancel)
        plan = _from_hub(plan, model, access, options.source_cache_bytes)
        _keep_router(model, plan, resume=options.resume)
        with _source_cache(plan, access):
            result = write_gguf(
                plan,
                options,
                on_progress,
                cancel,
                prepare=lambda: _prepare(model, options, on_progress, cancel),
                access=access,
            )
        return replace(result, router_report=model.router_report, network_bytes=access.line.n_bytes)


def plan_convert(
    source: StrPath,
    output: StrPath,
    quant: str | None = None,
    *,
    options: ConvertOptions | None = None,
    on_progress: OnProgress | None = None,
    cancel: CancelFlag | None = None,
    **keywords: Unpack[ConvertKeywords],
) -> WritePlan:
    """What ``convert`` with the same arguments would write: every file, tensor, type and offset.

    Reads headers only, but for a size also the weights, to choose the types by. The plan can be printed; its source is
    closed again, so it cannot be written.
    """
    options = options_of(ConvertOptions, options, with_quant(quant, keywords))
    access = HubAccess()  # a plan downloads nothing
    with _open_source(source, options, access) as model:
        plan = _plan(model, output_path(output), options, access, on_progress, cancel)
        return _from_hub(plan, model, access, options.source_cache_bytes)


def plan_conversions(source: StrPath, output: Path, quants: Sequence[str]) -> dict[str, WritePlan]:
    """What ``plan_convert`` gives for each of several file types, by the type; the source is opened once.

    A type that the source cannot become (OptionError, ImatrixError) is left out.
    """
    access = HubAccess()
    options = ConvertOptions()
    plans = {}
    with _open_source(source, options, access) as model:
        for quant in quants:
            with contextlib.suppress(OptionError, ImatrixError):
                plans[quant] = _from_hub(_plan(model, output, replace(options, quant=quant), access), model, access)
    return plans


def with_quant(quant: str | None, keywords: Mapping[str, object]) -> dict[str, object]:
    """The keywords and, unless it is None, the file type, which may be given by position."""
    return {**keywords} if quant is None else {**keywords, "quant": quant}


@contextlib.contextmanager
def _open_source(source: StrPath, options: ConvertOptions, access: HubAccess) -> Iterator[ModelSource]:
    """The model that ``source`` names: a recipe, a directory or a hub id. It is closed at the end."""
    if str(source).lower().endswith((".yaml", ".yml")):
        model: ModelSource = open_recipe(
            possible_path(source),
            allow_identical_experts=options.allow_identical_experts,
            allow_outside_files=options.allow_outside_files,
            access=access,
        )
    elif options.router_report is not None or options.allow_identical_experts or options.allow_outside_files:
        raise OptionError(
            f"{source} is no recipe; --router-report, --allow-identical-experts and --allow-outside-files belong to "
            "recipes"
        )
    else:
        model = open_checkpoint(
            source if isinstance(source, str) and not source.startswith("~") else possible_path(source), access=access
        )
    try:
        yield model
    finally:
        model.close()


def output_path(output: StrPath) -> Path:
    """The path of an output as given; a symbolic link is followed. OutputError if it names no file."""
    path = possible_path(output)
    if not path.name:
        raise OutputError(f"{output} is no file name; give one, for example model.gguf")
    return followed(path)


def checked_output(output: StrPath, options: ExportOptions) -> Path:
    """The path of an output that can be written there; checked before the source is opened. Raises OutputError."""
    path = output_path(output)
    check_output_file(path, replace=options.force or options.resume or options.split_max_size is not None)
    return path


def _plan(
    model: ModelSource,
    output: Path,
    options: ConvertOptions,
    access: HubAccess,
    on_progress: OnProgress | None = None,
    cancel: CancelFlag | None = None,
) -> WritePlan:
    return plan_export(
        model,
        output,
        type_policy(options),
        imatrix=importances(options),
        split_max_bytes=options.split_max_bytes,
        mixer=size_mixer(options, on_progress, cancel, access),
    )


def importances(options: ExportOptions) -> Imatrix | None:
    """The importance matrix that is given, or else the sensitivity, which is one too. Raises ImatrixError."""
    path = options.imatrix or options.sensitivity
    return None if path is None else Imatrix.load(path)


def size_mixer(
    options: ExportOptions,
    on_progress: OnProgress | None,
    cancel: CancelFlag | None,
    access: HubAccess | None = None,
) -> SizeMixer | None:
    """What chooses the types for the size that is asked for; None where a file type is. Raises OptionError.

    Of models of the hub, which are reached by ``access``, it reads the weights that it samples over the network.
    """
    if options.size_target is None:
        if options.sensitivity is not None or options.types != "all":
            raise OptionError("--sensitivity and --types are for a size; give one with -q 4.5bpw or --size 6GiB")
        return None
    if options.sensitivity is None:
        raise OptionError(
            f"{options.size_target.text} needs --sensitivity FILE, which `ggufmoe sensitivity` makes, or "
            "--sensitivity-text TEXT"
        )
    return SizeMixer(
        options.size_target,
        Sensitivity.load(options.sensitivity),
        options.sensitivity,
        types=options.types,
        speeds=_speeds() if options.types == "fast" else None,
        threads=options.threads,
        quantizer=options.quantizer,
        cache=options.cache,
        on_progress=on_progress,
        cancel=cancel,
        origins=() if access is None else tuple(part for one in access.origins for part in one.identity),
        read_ahead=ReadAhead(access.line) if access is not None and access.origins else None,
    )


def _speeds() -> TypeSpeeds:
    """How fast each type is on this machine. Raises OptionError if it was not measured."""
    speeds = load_speeds()
    if speeds.missing(FAST_TYPES):
        raise OptionError(
            "--types fast needs the speed of types on this machine, which is not known yet; measure it once with "
            "ggufmoe.type_speeds()"
        )
    return speeds


def type_policy(options: ExportOptions) -> TypePolicy:
    """The options that say which tensor gets which type. Raises OptionError."""
    typed = (*options.tensor_types, *_file_of_types(options.tensor_type_file))
    return TypePolicy(
        FileType.from_name(options.quant) if options.size_target is None else FileType.Q4_K_M,
        tensor_types=tuple(parse_override(text) for text in typed),
        output_tensor_type=_tensor_type(options.output_tensor_type),
        token_embedding_type=_tensor_type(options.token_embedding_type),
        pure=options.pure,
    )


def _file_of_types(path: Path | None) -> list[str]:
    """Each PATTERN=TYPE in a file. Raises OptionError if it cannot be read."""
    if path is None:
        return []
    try:
        return path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{path}: cannot read the types of tensors: {error}") from error


def _tensor_type(name: str | None) -> GGMLType | None:
    return None if name is None else parse_tensor_type(name)


def write_gguf(
    plan: WritePlan,
    options: ExportOptions,
    on_progress: OnProgress | None,
    cancel: CancelFlag | None,
    prepare: Callable[[], None] | None = None,
    *,
    access: HubAccess | None = None,
) -> ConvertResult:
    """Write the files of a plan, and their manifest if one is asked for; ``prepare`` is that of ``WriteOptions``.

    ``access`` is how models of the hub are reached, if the plan has some.

    A manifest that exists is written anew: it would be that of an older output. Tiles are written in any order, so the
    finished files are read once more for it, mostly from the system's page cache.
    """
    write = WriteOptions(
        threads=options.threads,
        quantizer=options.quantizer,
        cache=options.cache,
        resume=options.resume,
        force=options.force,
        on_progress=on_progress,
        cancel=cancel,
        prepare=prepare,
    )
    report = write_plan(plan, _over_network(write, access))
    delete(router_path(plan.output))
    manifest = manifest_path(plan.output)
    has_manifest = options.manifest or manifest.exists()
    if has_manifest:
        write_manifest(report.paths, manifest, threads=options.threads, on_progress=on_progress, cancel=cancel)
    return ConvertResult(
        report.paths,
        plan.n_bytes,
        report.bytes_read,
        report.bytes_written,
        report.seconds,
        plan,
        manifest if has_manifest else None,
        quantizers=routines(plan, options.quantizer),
    )


@dataclass(frozen=True)
class MergeResult:
    """The result of a merge: the files written, the bytes and seconds it took, and the router's report."""

    directory: Path
    paths: tuple[Path, ...]
    n_bytes: int
    """Size of the weight files."""
    bytes_read: int
    bytes_written: int
    seconds: float
    router_report: RouterReport
    commits: Mapping[str, str] = field(default_factory=dict)
    """The commit of each model of the hub that was read by ranges, by its name in the recipe."""
    network_bytes: int = 0
    """Bytes of tensor files that came over the network."""

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values for JSON."""
        return {
            "directory": str(self.directory),
            "files": [str(path) for path in self.paths],
            "total_bytes": self.n_bytes,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "seconds": round(self.seconds, 3),
            "commits": dict(self.commits),
            "network_bytes": self.network_bytes,
            "router": self.router_report.to_dict(),
        }


def merge(
    recipe: StrPath,
    out_dir: StrPath,
    *,
    options: MergeOptions | None = None,
    on_progress: OnProgress | None = None,
    cancel: CancelFlag | None = None,
    **keywords: Unpack[MergeKeywords],
) -> MergeResult:
    """Merge the models of a recipe into a checkpoint of a mixture (Mixtral, Qwen3-MoE, ...), as mergekit-moe does.

    The options are given as one object (``options=MergeOptions(threads=4)``) or by name (``threads=4``). The directory
    appears under its name when it is complete: safetensors, config, tokenizer and model card, readable by transformers
    4 and 5; until then its files are in ``OUT_DIR.partial``. Converting it writes the same bytes as converting the
    recipe. Mixtures of Qwen2 models that transformers has no class for are refused; ``convert`` writes them as GGUF.
    ``on_progress``, ``cancel`` and what is raised are those of ``convert``.
    """
    options = options_of(MergeOptions, options, keywords)
    target = followed(possible_path(out_dir))
    check_directory(target, (), record=RECORD, force=options.force)
    check_router_report(options.router_report)
    access = _hub_access(options, partial_path(target) / CHECKPOINT_NAME, cancel)
    model = open_recipe(
        possible_path(recipe),
        allow_identical_experts=options.allow_identical_experts,
        allow_outside_files=options.allow_outside_files,
        access=access,
    )
    with contextlib.closing(model):
        model.check_checkpoint()
        check_directory(target, model.input_paths, record=RECORD, force=options.force)
        write = WriteOptions(
            threads=options.threads,
            resume=options.resume,
            keep_journal=True,
            on_progress=on_progress,
            cancel=cancel,
            prepare=lambda: _prepare(model, options, on_progress, cancel),
        )
        with open_partial_directory(target, keep=options.resume) as partial:
            plan = plan_checkpoint(model, partial, options.layout, options.max_shard_bytes)
            plan = _from_hub(plan, model, access, options.source_cache_bytes)
            _keep_router(model, plan, resume=options.resume)
            with _source_cache(plan, access):
                report = write_plan(plan, _over_network(write, access))
            place_directory(partial, target, sidecar_files(model, checkpoint_index(plan)), written=WRITTEN_NAMES)
    router = model.router_report
    assert router is not None, "preparing a recipe gives its report"
    paths = tuple(target / file.path.name for file in plan.files)
    return MergeResult(
        target,
        paths,
        plan.n_bytes,
        report.bytes_read,
        report.bytes_written,
        report.seconds,
        router,
        commits=plan.commits,
        network_bytes=access.line.n_bytes,
    )


def _hub_access(options: ConvertOptions | MergeOptions, output: Path, cancel: CancelFlag | None) -> HubAccess:
    """How models of the hub are reached; a run that is resumed reads the commits that the interrupted run has read."""
    pins = journalled_commits(journal_path(output)) if options.resume else {}
    access = HubAccess(keep_source=options.keep_source, pins=pins)
    access.line.stopped = lambda: is_set(cancel)
    return access


def _from_hub(
    plan: WritePlan, model: ModelSource, access: HubAccess, source_cache_bytes: int | None = None
) -> WritePlan:
    """The plan with what it reads over the network, and what of it is kept where it is read twice."""
    if not access.origins and not access.cached_bytes:
        return plan
    written = [list(byte_ranges(p.rows, 0, p.n_rows)) for tensor in plan.tensors for p in tensor.parts]
    steps = model.router_steps() if isinstance(model, MergedModel) else ()
    for_router = [one for step in steps for rows in step for one in byte_ranges(rows, 0, row_count(rows.shape))]
    every = list(itertools.chain.from_iterable(written))
    router_bytes = remote_bytes(for_router)
    reads = NetworkReads(
        write_bytes=access.header_bytes + sum(map(remote_bytes, written)),
        router_bytes=router_bytes,
        twice_bytes=router_bytes + remote_bytes(every) - remote_bytes([*every, *for_router]),
        cache_bytes=source_cache_bytes or 0,
        file_bytes=sum(one.n_bytes for one in access.origins),
        cached_bytes=access.cached_bytes,
    )
    return replace(plan, origins=tuple(access.origins), network=reads)


@contextlib.contextmanager
def _source_cache(plan: WritePlan, access: HubAccess) -> Iterator[None]:
    """While the block runs, keep on the output's disk what the plan says of the bytes that are read twice."""
    if plan.network is None or not plan.network.kept_bytes:
        yield
        return
    parts = (part for tensor in plan.tensors for part in tensor.parts)
    written = (one for part in parts for one in byte_ranges(part.rows, 0, part.n_rows))
    with contextlib.closing(SourceCache(plan.output.parent, plan.network.kept_bytes, written)) as cache:
        access.line.cache = cache
        yield
    access.line.cache = None


def _keep_router(model: ModelSource, plan: WritePlan, *, resume: bool) -> None:
    """Let a router that is computed over the network be kept beside the journal until the output is complete."""
    if isinstance(model, MergedModel) and plan.network is not None and plan.network.router_bytes:
        model.kept_router = KeptRouter(router_path(plan.output), fingerprint(plan), read=resume)


def _over_network(write: WriteOptions, access: HubAccess | None) -> WriteOptions:
    """The options for a plan whose sources are read over the network, if some are."""
    if access is None or not access.origins:
        return write
    return replace(write, read_ahead=ReadAhead(access.line), flush_interval_s=NETWORK_FLUSH_INTERVAL_S)


def _prepare(
    model: ModelSource,
    options: ConvertOptions | MergeOptions,
    on_progress: OnProgress | None,
    cancel: CancelFlag | None,
) -> None:
    """Compute what the model needs before its rows are read, and write its report where one is asked for."""
    model.prepare(threads=options.threads, on_progress=on_progress, cancel=cancel)
    write_router_report(model.router_report, options.router_report)


def write_router_report(report: RouterReport | None, path: Path | None) -> None:
    """Write a router's report as JSON, if there is one and a file is asked for."""
    if report is not None and path is not None:
        text = json.dumps(report.to_dict(), indent=1) + "\n"
        with replacing(path, "the router's report") as file:
            file.write(text.encode())


def check_router_report(path: Path | None) -> None:
    """Raise OutputError if the router's report cannot be written at ``path``."""
    if path is not None:
        check_output_file(path, replace=True)
