"""The plan of a quantization from GGUF to GGUF: the GGUF files that a GGUF model of another type becomes.

Owns what ``llama_model_quantize`` does to metadata keys, and what it refuses. ``COPY`` changes no type: it joins the
files of a split model, and stacks the experts of a legacy one.
"""

from __future__ import annotations

from pathlib import Path

from ggufmoe.errors import OptionError
from ggufmoe.export.gguf_layout import fit_imatrix, plan_gguf, warn_of_missing_importances
from ggufmoe.export.gguf_source import GGUFSource, GGUFTensor
from ggufmoe.export.model_keys import imatrix_metadata, mix_metadata
from ggufmoe.export.unmixed import Mixer, UnmixedModel, with_types
from ggufmoe.gguf.header import GGUFValue
from ggufmoe.gguf.hyper import largest
from ggufmoe.gguf.names import llama_quantize_order
from ggufmoe.gguf.own_keys import MIX
from ggufmoe.gguf.types import GGMLType
from ggufmoe.gguf.upstream import QUANTIZATION_VERSION, Keys
from ggufmoe.gguf.values import u32
from ggufmoe.native import quantizing
from ggufmoe.quant.importances import Imatrix
from ggufmoe.quant.policy import TensorShape, TypePolicy, choose_types, may_quantize, unfit_types
from ggufmoe.writing.plan import PLAIN_DTYPES, Part, PlannedTensor, WritePlan

COPY = "COPY"
"""llama-quantize's name for leaving every tensor as it is."""

_FILE_TYPE = Keys.General.FILE_TYPE


def plan_requantize(
    source: GGUFSource,
    output: Path,
    policy: TypePolicy | None,
    *,
    imatrix: Imatrix | None = None,
    split_max_bytes: int | None = None,
    allow_requantize: bool = False,
    mixer: Mixer | None = None,
) -> WritePlan:
    """Plan the quantized file of a GGUF model, or its shards of at most ``split_max_bytes`` of tensors each.

    ``policy`` None changes no type. With ``mixer`` that chooses the types, and may read weights; none are read
    otherwise. Raises OptionError, ImatrixError, ArchitectureError or TensorMismatchError for all that can be known to
    fail before weights are read; ``llama_model_quantize`` fails for the same reasons.
    """
    tensors = sorted(source.tensors, key=lambda tensor: llama_quantize_order(tensor.name))
    weighted = fit_imatrix(imatrix, {tensor.name: tensor.shape for tensor in tensors})
    shapes = [TensorShape(tensor.name, tensor.shape, tensor.type) for tensor in tensors]
    unmixed = tuple(
        PlannedTensor(
            tensor.name,
            tensor.type,
            tensor.shape,
            tuple(Part(rows, rows.type) for rows in tensor.parts),
            tensor.name in (weighted or ()),
        )
        for tensor in tensors
    )

    def lay_out(policy: TypePolicy | None) -> WritePlan:
        if policy is None:
            types, unfit = {tensor.name: tensor.type for tensor in tensors}, {}
        else:
            types = choose_types(shapes, source.model_shape, policy, weighted)
            unfit = unfit_types(shapes, source.model_shape, policy, weighted)
        for tensor in tensors:
            check_change(tensor, types[tensor.name], allow_requantize)
        mix = policy.mix if policy else None
        return plan_gguf(
            output,
            _metadata(source, policy, imatrix),
            with_types(unmixed, types, unfit),
            input_paths=source.input_paths,
            file_type=mix.name if mix else policy.file_type.name if policy else COPY,
            imatrix=imatrix,
            split_max_bytes=split_max_bytes,
            mix=mix,
        )

    if mixer is None or policy is None:
        plan = lay_out(policy)
    else:
        for tensor, its_shape in zip(tensors, shapes, strict=True):
            if may_quantize(its_shape):
                check_change(tensor, policy.file_type.default_type, allow_requantize)
        inputs, shape = source.input_paths, source.model_shape
        plan = mixer(
            UnmixedModel(
                unmixed,
                shape,
                policy,
                imatrix,
                inputs,
                keeps_quantized=False,
                lay_out=lay_out,
                n_expert_used=largest(source.header.hyper.n_expert_used),
            )
        )
    if policy is not None:
        stored = {tensor.name: tensor.type for tensor in tensors}
        changed = {tensor.name: tensor.type for tensor in plan.tensors if tensor.type is not stored[tensor.name]}
        warn_of_missing_importances(imatrix, changed, weighted)
    return plan


def check_change(tensor: GGUFTensor, target: GGMLType, allow_requantize: bool) -> None:
    """Raise OptionError if ggml cannot make the change of type, or if it quantizes twice and that is not allowed."""
    for stored in {part.type for part in tensor.parts} - {target}:
        if stored in PLAIN_DTYPES:
            continue
        if not quantizing.can_dequantize(stored):
            raise OptionError(
                f"{tensor.name} is {stored.name}, which cannot be made {target.name}; keep it with "
                f"--tensor-type or use {COPY}"
            )
        if not allow_requantize:
            raise OptionError(
                f"{tensor.name} is quantized already ({stored.name}), making it {target.name} loses twice; start "
                "from the unquantized file, or give --allow-requantize"
            )


def _metadata(source: GGUFSource, policy: TypePolicy | None, imatrix: Imatrix | None) -> dict[str, GGUFValue]:
    """The keys of the source in their order and, last, the keys that describe the quantization."""
    metadata = source.metadata
    told = {Keys.General.QUANTIZATION_VERSION: u32(QUANTIZATION_VERSION)}
    if policy is not None:
        told[_FILE_TYPE] = u32(policy.file_type.id)
        metadata.pop(MIX, None)
        told |= mix_metadata(policy.mix)
    elif _FILE_TYPE in metadata:
        told[_FILE_TYPE] = metadata[_FILE_TYPE]
    if imatrix is not None:
        told |= imatrix_metadata(imatrix)
    return {key: value for key, value in metadata.items() if key not in told} | told
