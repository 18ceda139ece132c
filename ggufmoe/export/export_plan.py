"""The plan of an export: the GGUF files that a model of any source becomes.

Planning reads headers and the tokenizer, no weights. Tensors stand in the order in which llama-quantize writes them:
those outside the layers first, then layer by layer, by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ggufmoe.checkpoint.source import ModelSource
from ggufmoe.errors import OptionError
from ggufmoe.export.gguf_layout import fit_imatrix, plan_gguf, warn_of_missing_importances
from ggufmoe.export.model_keys import imatrix_metadata, mix_metadata, model_metadata
from ggufmoe.export.model_tensors import ModelTensor, model_tensors, source_part
from ggufmoe.export.unmixed import Mixer, UnmixedModel, with_types
from ggufmoe.export.vocab import tokenizer_metadata
from ggufmoe.families import family_of
from ggufmoe.families.model_config import ModelConfig
from ggufmoe.gguf.names import llama_quantize_order
from ggufmoe.gguf.types import GGMLType
from ggufmoe.gguf.upstream import Keys
from ggufmoe.gguf.values import u32
from ggufmoe.quant.filetypes import FileType
from ggufmoe.quant.importances import Imatrix
from ggufmoe.quant.policy import ModelShape, TensorShape, TypePolicy, choose_types, unfit_types
from ggufmoe.writing.plan import PlannedTensor, WritePlan


def plan_export(
    source: ModelSource,
    output: Path,
    policy: TypePolicy,
    *,
    imatrix: Imatrix | None = None,
    split_max_bytes: int | None = None,
    mixer: Mixer | None = None,
) -> WritePlan:
    """Plan the GGUF file of a model, or its shards of at most ``split_max_bytes`` of tensors each.

    With ``mixer`` that chooses the types, and may read weights. Reads the tokenizer's files and no weights otherwise.
    Raises ArchitectureError, TokenizerError, OptionError or ImatrixError for all that can be known to fail before
    weights are read.
    """
    tensors = sorted(model_tensors(source), key=lambda tensor: llama_quantize_order(tensor.name))
    weighted = fit_imatrix(imatrix, {tensor.name: tensor.shape for tensor in tensors})
    model_shape = _model_shape(source.config)
    tensor_shapes = [TensorShape(tensor.name, tensor.shape, tensor.source_type) for tensor in tensors]
    tokenizer = tokenizer_metadata(source.tokenizer_dir, source.config, source.chat_template)
    metadata = model_metadata(source, tensors, policy.file_type, tokenizer)
    if imatrix:
        metadata |= imatrix_metadata(imatrix)
    unmixed = tuple(
        PlannedTensor(t.name, t.source_type, t.shape, tuple(map(source_part, t.parts)), t.name in (weighted or ()))
        for t in tensors
    )

    def lay_out(policy: TypePolicy) -> WritePlan:
        types = choose_types(tensor_shapes, model_shape, policy, weighted)
        kept = _kept_types(tensors, types, policy)
        types |= kept
        file_type = FileType.MXFP4_MOE if kept else policy.file_type
        return plan_gguf(
            output,
            metadata | {Keys.General.FILE_TYPE: u32(file_type.id)} | mix_metadata(policy.mix),
            with_types(unmixed, types, unfit_types(tensor_shapes, model_shape, policy, weighted)),
            input_paths=source.input_paths,
            file_type=policy.mix.name if policy.mix else file_type.name,
            imatrix=imatrix,
            split_max_bytes=split_max_bytes,
            mix=policy.mix,
        )

    if mixer is None:
        plan = lay_out(policy)
    else:
        inputs = source.input_paths
        plan = mixer(
            UnmixedModel(
                unmixed,
                model_shape,
                policy,
                imatrix,
                inputs,
                keeps_quantized=True,
                lay_out=lay_out,
                n_expert_used=source.config.n_expert_used,
            )
        )
    warn_of_missing_importances(imatrix, {tensor.name: tensor.type for tensor in plan.tensors}, weighted)
    return plan


def _model_shape(config: ModelConfig) -> ModelShape:
    """What the mixes depend on, as the file's own keys state it: with latent attention there is one key-value head,
    where layers differ in their number the first layer's counts, and layers of multi-token prediction are layers."""
    family = family_of(config)
    written = family.metadata(config)
    n_layer, stated = (
        written[key.format(arch=family.gguf_arch)].value for key in (Keys.LLM.BLOCK_COUNT, Keys.Attention.HEAD_COUNT_KV)
    )
    n_head_kv = stated[0] if isinstance(stated, list) else stated
    return ModelShape(n_layer, config.n_head, n_head_kv, config.n_expert, family.gguf_arch)


def _kept_types(
    tensors: Sequence[ModelTensor], types: Mapping[str, GGMLType], policy: TypePolicy
) -> dict[str, GGMLType]:
    """The types of tensors that a checkpoint has quantized and a file of plain numbers keeps, as the converter does.

    Such a file says that it is MXFP4_MOE. Raises OptionError if a quantized file would quantize them once more, which
    ``llama_model_quantize`` refuses too.
    """
    quantized = {tensor.name: tensor.source_type for tensor in tensors if tensor.source_type.is_quantized}
    if not policy.file_type.default_type.is_quantized:
        return quantized
    for name, stored in quantized.items():
        if types[name] is not stored:
            raise OptionError(
                f"{name} is quantized already ({stored.name}), making it {types[name].name} loses twice; keep it with "
                f"-q {stored.name}_MOE or with --tensor-type _exps={stored.name.lower()}, or convert with -q BF16 and "
                "then use quantize --allow-requantize"
            )
    return {}
