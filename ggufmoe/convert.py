"""The convert half, wired: a source is opened, its export planned, the plan written.

Rooms to the left know nothing of each other; what passes between them is named here. Nothing is printed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.checkpoint.source import ModelSource
from ggufmoe.errors import OptionError, OutputError
from ggufmoe.export.plan import ExportPlan, parse_size, plan_export
from ggufmoe.export.writer import CancelEvent, Progress, WriteOptions, WriteReport, check_place, write_plan
from ggufmoe.manifest import default_path as manifest_path
from ggufmoe.manifest import write_manifest
from ggufmoe.options import ConvertOptions
from ggufmoe.quant.imatrix import Imatrix
from ggufmoe.quant.policy import TypePolicy, parse_override
from ggufmoe.quant.types import FileType, parse_tensor_type


@dataclass(frozen=True)
class ConvertResult:
    """What a conversion gave: the files, what it cost, and the plan that was followed.

    ``bytes_read`` and ``bytes_written`` are those of this run; a resumed one counts only what was left to do.
    """

    paths: tuple[Path, ...]
    n_bytes: int
    """Size of all files."""
    bytes_read: int
    bytes_written: int
    seconds: float
    plan: ExportPlan
    manifest: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """The result as what JSON can hold."""
        return {
            "files": [{"path": str(file.path), "bytes": file.n_bytes} for file in self.plan.files],
            "file_type": self.plan.file_type,
            "total_bytes": self.n_bytes,
            "weights": self.plan.n_weights,
            "bits_per_weight": round(self.plan.bits_per_weight, 4),
            "types": {name: vars(total) for name, total in self.plan.types.items()},
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "seconds": round(self.seconds, 3),
            "manifest": None if self.manifest is None else str(self.manifest),
        }


def convert(
    source: str | Path,
    output: str | Path,
    quant: str = "Q4_K_M",
    *,
    on_progress: Callable[[Progress], None] | None = None,
    cancel: CancelEvent | None = None,
    **options: Any,
) -> ConvertResult:
    """Turn a checkpoint into a GGUF file.

    ``source`` is a Hugging Face directory or a hub id (``org/name`` or ``org/name@revision``). ``options`` are the
    fields of ``ConvertOptions``. ``on_progress`` is called a few times a second, never by two threads at once, first
    for what is written and then, if a manifest is made, for what is hashed; ``cancel`` is looked at before each tile.
    One pass; memory does not grow with the model.

    Raises a class of ``ggufmoe.errors``: CheckpointError, TokenizerError, OptionError, ImatrixError and OutputError
    before anything is written, NonFiniteError and NoSpaceError on the way, Cancelled when asked to stop.
    """
    return convert_with(source, output, _options(quant, options), on_progress=on_progress, cancel=cancel)


def convert_with(
    source: str | Path,
    output: str | Path,
    options: ConvertOptions,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    cancel: CancelEvent | None = None,
) -> ConvertResult:
    """``convert`` with its options as an object."""
    path = _output_path(output)
    check_place(path, replace=options.force or options.resume or options.split_max_size is not None)
    with _open_source(source) as model:
        plan = _plan(model, path, options)
        write = WriteOptions(
            threads=options.threads,
            resume=options.resume,
            force=options.force,
            on_progress=on_progress,
            cancel=cancel,
        )
        report = write_plan(plan, write)
    manifest = _write_manifest(plan, options, on_progress, cancel)
    return _result(plan, report, manifest)


def plan_convert(source: str | Path, output: str | Path, quant: str = "Q4_K_M", **options: Any) -> ExportPlan:
    """What ``convert`` with the same arguments would write, to the byte. Reads headers only.

    The plan can be printed; its source is closed again, so it cannot be written.
    """
    return plan_with(source, output, _options(quant, options))


def plan_with(source: str | Path, output: str | Path, options: ConvertOptions) -> ExportPlan:
    """``plan_convert`` with its options as an object."""
    with _open_source(source) as model:
        return _plan(model, _output_path(output), options)


def _options(quant: str, given: dict[str, Any]) -> ConvertOptions:
    try:
        return ConvertOptions(quant=quant, **given)
    except TypeError as error:
        raise OptionError(f"convert has no such option: {str(error).rpartition(' ')[2]}") from error


@contextlib.contextmanager
def _open_source(source: str | Path) -> Iterator[ModelSource]:
    """The model that ``source`` names, closed at the end. Every kind of source is told apart here and nowhere else."""
    if str(source).lower().endswith((".yaml", ".yml")):
        raise OptionError(f"{source} is a merge recipe; merge it to a checkpoint first and convert that")
    model: ModelSource = open_checkpoint(str(source))
    try:
        yield model
    finally:
        model.close()


def _output_path(output: str | Path) -> Path:
    path = Path(output).expanduser()
    if not path.name:
        raise OutputError(f"{output} is no file name; give one, for example model.gguf")
    return path


def _plan(model: ModelSource, output: Path, options: ConvertOptions) -> ExportPlan:
    if options.threads is not None and options.threads < 1:
        raise OptionError(f"threads is {options.threads}, expected at least 1")
    imatrix = None if options.imatrix is None else Imatrix.load(options.imatrix)
    split = None if options.split_max_size is None else parse_size(options.split_max_size)
    return plan_export(model, output, _policy(options), imatrix=imatrix, split_max_bytes=split)


def _policy(options: ConvertOptions) -> TypePolicy:
    return TypePolicy(
        FileType.from_name(options.quant),
        tensor_types=tuple(parse_override(text) for text in options.tensor_types),
        output_tensor_type=_tensor_type(options.output_tensor_type),
        token_embedding_type=_tensor_type(options.token_embedding_type),
        pure=options.pure,
    )


def _tensor_type(name: str | None) -> Any:
    return None if name is None else parse_tensor_type(name)


def _write_manifest(
    plan: ExportPlan,
    options: ConvertOptions,
    on_progress: Callable[[Progress], None] | None,
    cancel: CancelEvent | None,
) -> Path | None:
    """The manifest that was asked for; one that is there already is renewed, lest it speak of an older file.

    Tiles are written in any order, so the finished files are read once more, most of it from the system's cache; what
    is hashed is what came back.
    """
    paths = [file.path for file in plan.files]
    if not options.manifest and not manifest_path(plan.output).exists():
        return None

    def show(done: int, total: int, name: str) -> None:
        if on_progress is not None:
            on_progress(Progress(done, total, f"hash of {name}"))

    return write_manifest(paths, manifest_path(plan.output), show, cancel)


def _result(plan: ExportPlan, report: WriteReport, manifest: Path | None) -> ConvertResult:
    return ConvertResult(
        report.paths, plan.n_bytes, report.bytes_read, report.bytes_written, report.seconds, plan, manifest
    )
