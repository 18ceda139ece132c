"""The quantized formats that a plan makes, and whether a kernel of ours or ggml's routine makes each of them here.

Kernels of formats with many weights are compiled before the work begins: ggml's routines, twenty times as slow, would
delay the compiler more than they would get done meanwhile. The other kernels are compiled when ``quant.kernels`` finds
that they have had enough work.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ggufmoe.errors import EngineMissingError, OptionError
from ggufmoe.gguf.types import GGMLType
from ggufmoe.native import library as native
from ggufmoe.native import quantizing
from ggufmoe.quant.filetypes import IGNORES_IMATRIX
from ggufmoe.quant.kernels import KernelReport, QuantizerName, has_kernel, kernel_report, prepare
from ggufmoe.writing.plan import PLAIN_DTYPES, WritePlan

_COMPILE_AT_ONCE_WEIGHTS = 1 << 26
"""Weights of one format from which ggml's routine would take seconds, where compiling takes tenths of a second."""


@dataclass(frozen=True)
class Format:
    """What a kernel is compiled for: the type made, the plain type it is made from, whether importances are given."""

    type: GGMLType
    source: GGMLType
    weighted: bool


def formats(plan: WritePlan) -> dict[Format, int]:
    """The quantized formats that a plan makes, with their numbers of weights, the largest first.

    Tensors that are copied need no format.
    """
    found: Counter[Format] = Counter()
    for tensor in plan.tensors:
        for part in tensor.parts:
            if tensor.type.is_quantized and part.type is not tensor.type:
                source = part.type if part.type in PLAIN_DTYPES else GGMLType.F32
                weighted = tensor.weighted and tensor.type not in IGNORES_IMATRIX
                found[Format(tensor.type, source, weighted)] += tensor.n_weights // len(tensor.parts)
    return dict(found.most_common())


def prepare_kernels(plan: WritePlan, quantizer: QuantizerName, *, cache: bool = True) -> None:
    """Compile the kernels of a plan, or load them: with ``fast`` all of them, with ``auto`` those with much work.

    Without an engine all are compiled, as ggml's routines cannot go first. Raises OptionError with ``fast`` for a
    format that has no kernel, or none that can be used on this machine, and EngineMissingError where ggml's routine is
    needed and there is no engine.
    """
    for made, n_weights in formats(plan).items():
        if quantizer == "fast" and not has_kernel(made.type):
            raise OptionError(f"{made.type.name}: there is no fast quantizer for this type; use --quantizer auto")
        judged = None
        if quantizer == "fast" or n_weights >= _COMPILE_AT_ONCE_WEIGHTS or not native.has_engine():
            judged = prepare(made.type, PLAIN_DTYPES[made.source].name, made.weighted, quantizer, cache=cache)
        if judged is None or judged.routine != "fast":
            reason = judged.reason if judged else "--quantizer ggml" if has_kernel(made.type) else "it has no kernel"
            _check_engine(f"{made.type.name} has to be quantized by llama.cpp here ({reason})")
    stored = {part.type for tensor in plan.tensors for part in tensor.parts if part.type is not tensor.type}
    for kind in stored & quantizing.READ_BY_GGML_ALONE:
        _check_engine(f"{kind.name} can only be read by llama.cpp")


def _check_engine(purpose: str) -> None:
    """Raise EngineMissingError, which begins with ``purpose``, if there is no engine."""
    try:
        native.found_library()
    except EngineMissingError as error:
        raise EngineMissingError(f"{purpose}, and there is none: {error}") from error


def routines(plan: WritePlan, quantizer: QuantizerName) -> tuple[KernelReport, ...]:
    """Which routine has quantized each format of a plan that was written, and why."""
    judged = {Format(row.type, GGMLType[row.source], row.weighted): row for row in kernel_report()}
    return tuple(_routine(made, judged.get(made), quantizer) for made in formats(plan))


def _routine(made: Format, judged: KernelReport | None, quantizer: QuantizerName) -> KernelReport:
    if quantizer != "ggml" and judged is not None:
        return judged
    if quantizer == "ggml":
        reason = "asked for"
    else:
        reason = "too little work to compile a kernel" if has_kernel(made.type) else "there is no kernel for it"
    return KernelReport(made.type, made.source.name, made.weighted, "ggml", reason, 0.0)
