"""Quantization from GGUF to GGUF: opens the model, plans the files, and has the plan written. Nothing is printed."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from ggufmoe.convert import (
    ConvertResult,
    checked_output,
    importances,
    output_path,
    size_mixer,
    type_policy,
    with_quant,
    write_gguf,
)
from ggufmoe.errors import OptionError
from ggufmoe.export.gguf_source import GGUFSource
from ggufmoe.export.requantize import COPY, plan_requantize
from ggufmoe.files import StrPath, possible_path
from ggufmoe.gguf.checks import check_loadable
from ggufmoe.options import QuantizeKeywords, QuantizeOptions, options_of
from ggufmoe.quant.policy import TypePolicy
from ggufmoe.work import CancelFlag, OnProgress
from ggufmoe.writing.plan import WritePlan

if TYPE_CHECKING:
    from typing_extensions import Unpack


def quantize(
    source: StrPath,
    output: StrPath,
    quant: str | None = None,
    *,
    options: QuantizeOptions | None = None,
    on_progress: OnProgress | None = None,
    cancel: CancelFlag | None = None,
    **keywords: Unpack[QuantizeKeywords],
) -> ConvertResult:
    """Turn a GGUF model into one of another type: the same bytes that ``llama_model_quantize`` writes.

    ``source`` is a file, or any file of a split model; ``quant`` may also be ``COPY``, which changes no type. Mixtral
    files with one tensor for each expert get their experts stacked. The options are given as one object
    (``options=QuantizeOptions(threads=4)``) or by name (``threads=4``), where ``quant`` may be the third argument; its
    default is Q4_K_M. ``on_progress`` and ``cancel`` are those of ``convert``. The source is read once; memory does not
    grow with the model.

    Raises a class of ``ggufmoe.errors``: GGUFError (also for a header that llama.cpp cannot take, because nothing could
    load the output), OptionError (also for what is quantized already, unless ``allow_requantize``), ArchitectureError,
    ImatrixError and OutputError before anything is written, NonFiniteError and NoSpaceError on the way, Cancelled when
    asked to stop.
    """
    options = options_of(QuantizeOptions, options, with_quant(quant, keywords))
    path = checked_output(output, options)
    with contextlib.closing(GGUFSource(possible_path(source))) as model:
        return write_gguf(_plan(model, path, options, on_progress, cancel), options, on_progress, cancel)


def plan_quantize(
    source: StrPath,
    output: StrPath,
    quant: str | None = None,
    *,
    options: QuantizeOptions | None = None,
    on_progress: OnProgress | None = None,
    cancel: CancelFlag | None = None,
    **keywords: Unpack[QuantizeKeywords],
) -> WritePlan:
    """What ``quantize`` with the same arguments would write: every file, tensor, type and offset.

    Reads headers only, but for a size also the weights, to choose the types by. The plan can be printed; its source is
    closed again, so it cannot be written.
    """
    options = options_of(QuantizeOptions, options, with_quant(quant, keywords))
    with contextlib.closing(GGUFSource(possible_path(source))) as model:
        return _plan(model, output_path(output), options, on_progress, cancel)


def _plan(
    model: GGUFSource,
    output: Path,
    options: QuantizeOptions,
    on_progress: OnProgress | None,
    cancel: CancelFlag | None,
) -> WritePlan:
    check_loadable(model.header)
    return plan_requantize(
        model,
        output,
        _policy(options),
        imatrix=importances(options),
        mixer=size_mixer(options, on_progress, cancel),
        split_max_bytes=options.split_max_bytes,
        allow_requantize=options.allow_requantize,
    )


def _policy(options: QuantizeOptions) -> TypePolicy | None:
    """The policy that chooses the types; None for a copy. Raises OptionError for a copy with options about types."""
    if options.quant.strip().upper() != COPY:
        return type_policy(options)
    told = {
        "--imatrix": options.imatrix,
        "--tensor-type": options.tensor_types,
        "--tensor-type-file": options.tensor_type_file,
        "--output-tensor-type": options.output_tensor_type,
        "--token-embedding-type": options.token_embedding_type,
        "--pure": options.pure,
    }
    given = [flag for flag, value in told.items() if value]
    if given:
        raise OptionError(f"{COPY} changes no type; leave out {', '.join(given)}, or name a file type")
    return None
