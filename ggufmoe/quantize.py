"""GGUF to GGUF, wired: a model file is opened, its quantization planned, the plan written as a conversion's is.

Nothing is printed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ggufmoe.convert import (
    ConvertResult,
    convert_result,
    output_path,
    type_policy,
    write_plan_manifest,
)
from ggufmoe.errors import OptionError
from ggufmoe.export.gguf_source import GGUFSource
from ggufmoe.export.plan import ExportPlan, parse_size
from ggufmoe.export.requantize import COPY, plan_requantize
from ggufmoe.options import QuantizeOptions
from ggufmoe.quant.importances import Imatrix
from ggufmoe.quant.policy import TypePolicy
from ggufmoe.writing.writer import CancelEvent, Progress, WriteOptions, check_place, write_plan


def quantize(
    source: str | Path,
    output: str | Path,
    quant: str = "Q4_K_M",
    *,
    on_progress: Callable[[Progress], None] | None = None,
    cancel: CancelEvent | None = None,
    **options: Any,
) -> ConvertResult:
    """Turn a GGUF model into one of another type: the very file that ``llama_model_quantize`` writes.

    ``source`` is a file, or any file of a split model; ``quant`` may also be ``COPY``, which changes no type. Mixtral
    files with one tensor for each expert get their experts stacked. ``options`` are the fields of ``QuantizeOptions``;
    ``on_progress`` and ``cancel`` are those of ``convert``. One pass; memory does not grow with the model.

    Raises a class of ``ggufmoe.errors``: GGUFError, OptionError (also for what is quantized already, unless
    ``allow_requantize``), ArchitectureError, ImatrixError and OutputError before anything is written, NonFiniteError
    and NoSpaceError on the way, Cancelled when asked to stop.
    """
    return quantize_with(source, output, _options(quant, options), on_progress=on_progress, cancel=cancel)


def quantize_with(
    source: str | Path,
    output: str | Path,
    options: QuantizeOptions,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    cancel: CancelEvent | None = None,
) -> ConvertResult:
    """``quantize`` with its options as an object."""
    path = output_path(output)
    check_place(path, replace=options.force or options.resume or options.split_max_size is not None)
    with contextlib.closing(GGUFSource(Path(source).expanduser())) as model:
        plan = _plan(model, path, options)
        write = WriteOptions(
            threads=options.threads,
            quantizer=options.quantizer,
            resume=options.resume,
            force=options.force,
            on_progress=on_progress,
            cancel=cancel,
        )
        report = write_plan(plan, write)
    return convert_result(plan, report, options, write_plan_manifest(plan, options, on_progress, cancel))


def plan_quantize(source: str | Path, output: str | Path, quant: str = "Q4_K_M", **options: Any) -> ExportPlan:
    """What ``quantize`` with the same arguments would write, to the byte. Reads headers only.

    The plan can be printed; its source is closed again, so it cannot be written.
    """
    return plan_quantize_with(source, output, _options(quant, options))


def plan_quantize_with(source: str | Path, output: str | Path, options: QuantizeOptions) -> ExportPlan:
    """``plan_quantize`` with its options as an object."""
    with contextlib.closing(GGUFSource(Path(source).expanduser())) as model:
        return _plan(model, output_path(output), options)


def _options(quant: str, given: dict[str, Any]) -> QuantizeOptions:
    try:
        return QuantizeOptions(quant=quant, **given)
    except TypeError as error:
        raise OptionError(f"quantize has no such option: {str(error).rpartition(' ')[2]}") from error


def _plan(model: GGUFSource, output: Path, options: QuantizeOptions) -> ExportPlan:
    policy = _policy(options)
    imatrix = None if options.imatrix is None else Imatrix.load(options.imatrix)
    split = None if options.split_max_size is None else parse_size(options.split_max_size)
    return plan_requantize(
        model,
        output,
        policy,
        imatrix=imatrix,
        split_max_bytes=split,
        allow_requantize=options.allow_requantize,
    )


def _policy(options: QuantizeOptions) -> TypePolicy | None:
    """What types to choose by; None for a copy, with which no other word about types goes."""
    if options.quant.strip().upper() != COPY:
        return type_policy(options)
    told = {
        "--imatrix": options.imatrix,
        "--tensor-type": options.tensor_types,
        "--output-tensor-type": options.output_tensor_type,
        "--token-embedding-type": options.token_embedding_type,
        "--pure": options.pure,
    }
    given = [flag for flag, value in told.items() if value]
    if given:
        raise OptionError(f"{COPY} changes no type; leave out {', '.join(given)}, or name a file type")
    return None
