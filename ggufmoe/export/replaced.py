"""The plan of a GGUF file with some tensors replaced: all others keep their types and their bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ggufmoe.export.gguf_layout import plan_gguf
from ggufmoe.export.gguf_source import GGUFSource
from ggufmoe.export.requantize import COPY, check_change
from ggufmoe.gguf.header import GGUFValue
from ggufmoe.gguf.names import llama_quantize_order
from ggufmoe.weights.source_tensor import SourceTensor
from ggufmoe.writing.plan import Part, PlannedTensor, WritePlan


def plan_replaced(
    source: GGUFSource,
    output: Path,
    replaced: Mapping[str, SourceTensor],
    told: Mapping[str, GGUFValue],
    *,
    split_max_bytes: int | None = None,
) -> WritePlan:
    """Plan the copy of a GGUF model in which the tensors in ``replaced`` have other rows, stored in their dtype.

    ``told`` are metadata keys that are added, or that replace those of the source. Raises OptionError for an old file
    whose experts, which are stacked, differ in type.
    """
    planned = []
    for tensor in sorted(source.tensors, key=lambda one: llama_quantize_order(one.name)):
        if (rows := replaced.get(tensor.name)) is not None:
            kind = rows.dtype.ggml_type
            planned.append(PlannedTensor(tensor.name, kind, tensor.shape, (Part(rows, kind),)))
            continue
        check_change(tensor, tensor.type, allow_requantize=False)
        planned.append(
            PlannedTensor(tensor.name, tensor.type, tensor.shape, tuple(Part(rows, rows.type) for rows in tensor.parts))
        )
    metadata = {**source.metadata, **told}
    return plan_gguf(
        output,
        metadata,
        planned,
        input_paths=source.input_paths,
        file_type=COPY,
        imatrix=None,
        split_max_bytes=split_max_bytes,
    )
