"""Recognises weights that cannot be converted by the names and dtypes of their tensors: quantized ones and adapters.

This is checked before missing tensors are reported, so that the message names the cause.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_UNQUANTIZED = "use the model's unquantized checkpoint"
_UNMERGED = (
    "load it with peft and save what merge_and_unload() gives, or, for an adapter alone, merge it into its base model"
)


@dataclass(frozen=True)
class _Sign:
    """A pattern of tensor names that only one kind of tool writes, and what to say of them."""

    pattern: str
    what: str
    way_out: str = _UNQUANTIZED


_SIGNS = (
    _Sign(r"\.(lora_(embedding_)?[AB]|lora_magnitude_vector|base_layer)\b", "holds an adapter", _UNMERGED),
    _Sign(r"\.(modules_to_save|ia3_l|vera_lambda_[bd]|hada_w[12]_[ab]|boft_[RS])\b", "holds an adapter", _UNMERGED),
    _Sign(r"\.g_idx$", "is quantized with GPTQ"),
    _Sign(r"\.weight_scales$", "is quantized by EETQ to 8 bits"),
    _Sign(r"\.q(weight|zeros)$", "is quantized with GPTQ or AWQ"),
    _Sign(r"\.weight\.(absmax|quant_map|nested_absmax|quant_state\.)", "is quantized by bitsandbytes to 4 bits"),
    _Sign(r"\.(SCB|weight_format)$", "is quantized by bitsandbytes to 8 bits"),
    _Sign(r"\.weight_(packed|zero_point)$", "is quantized by llm-compressor (compressed-tensors)"),
    _Sign(r"\.weight_scale_2$", "is quantized to NVFP4"),
    _Sign(
        r"\.weight_scale_inv$",
        "is quantized to FP8 or 8 bits, with scales beside the weights",
        "a config.json whose quantization_config states quant_method fp8, fmt e4m3 and weight_block_size tells how to "
        f"read it; or {_UNQUANTIZED}",
    ),
    _Sign(r"\.(weight_scale|input_scale)$", "is quantized to FP8 or 8 bits, with scales beside the weights"),
    _Sign(r"(gate_up|down)_proj_(blocks|scales)$", "is quantized to MXFP4"),
    _Sign(r"\.W_q$", "is quantized with HQQ"),
    _Sign(r"\.weight\._(data|scale)$", "is quantized by quanto"),
    _Sign(r"\.q_(weight|groups|invperm)$", "is quantized with EXL2"),
    _Sign(r"\.(trellis|suh|svh)$", "is quantized with EXL3"),
    _Sign(r"\.codebooks$", "is quantized with AQLM"),
    _Sign(r"\.Qidxs(_\d+)?$", "is quantized with QuIP#"),
    _Sign(r"\.centroids(\.weight)?$", "is quantized with VPTQ"),
    _Sign(r"\.dense_weights$", "is quantized with SpQR"),
    _Sign(r"\.dequant_scale$", "is quantized by SmoothQuant"),
    _Sign(r"_proj\.(scales|biases)$", "is quantized by MLX"),
)


def what_made(names: Iterable[str]) -> str | None:
    """A clause such as "is quantized with GPTQ (NAME); what to do" for tensor names; None for plain ones."""
    listed = sorted(names)
    for sign in _SIGNS:
        pattern = re.compile(sign.pattern)
        first = next((name for name in listed if pattern.search(name)), None)
        if first is not None:
            shown = first[:200] if first.isprintable() else f"{first!r:.200}"
            return f"{sign.what} ({shown}); {sign.way_out}"
    return None


_PLAIN_DTYPES = frozenset(("BF16", "F16", "F32", "F64", "BOOL"))


def packed_among(dtypes: Mapping[str, str]) -> str | None:
    """A clause on the first of ``dtypes`` (tensor name to dtype) that only quantizing tools store; None if none is."""
    first = next((name for name in sorted(dtypes) if dtypes[name] not in _PLAIN_DTYPES), None)
    if first is None:
        return None
    shown = first[:200] if first.isprintable() else f"{first!r:.200}"
    return f"is quantized, by a tool that is not known here ({shown} has the dtype {dtypes[first]}); {_UNQUANTIZED}"


def way_out_of(dtypes: Iterable[str]) -> str:
    """What the user can do about weights of these dtypes, none of which is BF16, F16 or F32, for an error message."""
    if set(dtypes) == {"F64"}:
        return "save it again with transformers in float32 or bfloat16 (model.float().save_pretrained(DIRECTORY))"
    return _UNQUANTIZED
