"""What llama.cpp asserts of a header: a file that breaks one of these rules would end the process, or compute nonsense.

Owns the rules; ``Hyper`` reads the numbers. Keys that a file does not have are not missed here, and arrays with one
value for each layer are left to llama.cpp, which refuses those that do not fit. Source: ``load_hparams`` of
llama-model.cpp, models/llama.cpp and models/qwen*.cpp, and the assertions of ggml-cpu/ops.cpp (commit 0c1e57098).
"""

from __future__ import annotations

from collections.abc import Iterator

from ggufmoe.errors import GGUFError
from ggufmoe.gguf.hyper import Hyper, TypedMetadata
from ggufmoe.gguf.model import ModelHeader
from ggufmoe.gguf.names import TOKEN_EMBEDDING, is_expert_stack, layer_of
from ggufmoe.gguf.upstream import Keys
from ggufmoe.options.limits import MAX_EXPERTS, MAX_INT32, MAX_LAYERS

PLAIN_ARCHITECTURES = frozenset({"llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe"})
"""Every layer of these has attention and a feed-forward part, so their numbers follow from their tensors' shapes."""
_ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")
"""LLAMA_ROPE_SCALING_TYPES of llama-model.cpp."""
_SCALE_LINEAR = "{arch}.rope.scale_linear"
"""The old name of the scaling factor, which llama.cpp still reads and the ``gguf`` package no longer knows."""
_MAX_THETA = 1e15
_MAX_SCALING = 1e6


def check_loadable(model: ModelHeader) -> None:
    """Raise GGUFError for the first value of the header that llama.cpp cannot take."""
    for fault in header_faults(model):
        raise GGUFError(f"{model.paths[0]}: {fault}; the file is corrupt, download or make it again")


_ONE_EXPERT_IS_NONE = {"hunyuan-dense", "hunyuan_vl"}
"""Architectures for which llama.cpp takes one expert for none (src/llama-model.cpp at commit 0c1e57098)."""


def header_faults(model: ModelHeader) -> Iterator[str]:
    """All values of the header that llama.cpp cannot take: the key, what it says, and what was expected."""
    hyper, typed = model.hyper, TypedMetadata(model.metadata)
    if hyper.architecture is None or not model.tensors:
        return
    yield from _layer_faults(model)
    yield from _context_faults(hyper)
    yield from _expert_faults(model, typed)
    yield from _float_faults(hyper, typed)
    if hyper.architecture in PLAIN_ARCHITECTURES:
        yield from _width_faults(model, typed)
        yield from _head_faults(hyper)


def _fault(hyper: Hyper, key: str, found: object, expected: str) -> str:
    return f"{hyper.key(key)} is {found}, expected {expected}"


def _layer_faults(model: ModelHeader) -> Iterator[str]:
    hyper, stated = model.hyper, model.hyper.n_layer
    if stated is None:
        return
    if not 0 < stated <= MAX_LAYERS:
        yield _fault(hyper, Keys.LLM.BLOCK_COUNT, stated, f"1 to {MAX_LAYERS} layers, which is what llama.cpp takes")
        return
    predicting = TypedMetadata(model.metadata).whole(hyper.key(Keys.LLM.NEXTN_PREDICT_LAYERS)) or 0
    if not 0 <= predicting <= stated:
        yield _fault(hyper, Keys.LLM.NEXTN_PREDICT_LAYERS, predicting, f"at most the {stated} layers that there are")
    there = {layer for tensor in model.tensors if (layer := layer_of(tensor.name)) is not None}
    if hyper.architecture in PLAIN_ARCHITECTURES and there and stated != max(there) + 1:
        yield _fault(hyper, Keys.LLM.BLOCK_COUNT, stated, f"{max(there) + 1}, the number of layers that have tensors")


def _context_faults(hyper: Hyper) -> Iterator[str]:
    stated = hyper.n_ctx_train
    # converters of some other architectures write 0 where the configuration says nothing
    least = 1 if hyper.architecture in PLAIN_ARCHITECTURES else 0
    if stated is not None and not least <= stated <= MAX_INT32:
        yield _fault(hyper, Keys.LLM.CONTEXT_LENGTH, stated, f"{least} to {MAX_INT32} tokens")


def _expert_faults(model: ModelHeader, typed: TypedMetadata) -> Iterator[str]:
    hyper = model.hyper
    stated = typed.whole(hyper.key(Keys.LLM.EXPERT_COUNT))
    if stated is None and hyper.architecture not in PLAIN_ARCHITECTURES:
        return
    n_expert = stated or 0
    if not 0 <= n_expert <= MAX_EXPERTS:
        yield _fault(hyper, Keys.LLM.EXPERT_COUNT, n_expert, f"at most {MAX_EXPERTS} experts, as llama.cpp takes")
        return
    stack = next((tensor for tensor in model.tensors if is_expert_stack(tensor.name) and len(tensor.shape) == 3), None)
    if hyper.architecture in _ONE_EXPERT_IS_NONE and stack is None and n_expert <= 1:
        return
    if stack is not None and stack.shape[0] != n_expert:
        yield _fault(hyper, Keys.LLM.EXPERT_COUNT, n_expert, f"{stack.shape[0]}, as many as {stack.name} has")
        return
    used = typed.per_layer(hyper.key(Keys.LLM.EXPERT_USED_COUNT)) or 0
    most = max(used) if isinstance(used, tuple) else used
    if not min(n_expert, 1) <= most <= n_expert:
        expected = f"1 to {n_expert}, the number of experts" if n_expert else "0, as there are no experts"
        yield _fault(hyper, Keys.LLM.EXPERT_USED_COUNT, most, expected)
    yield from _group_faults(hyper, typed, n_expert)


def _group_faults(hyper: Hyper, typed: TypedMetadata, n_expert: int) -> Iterator[str]:
    n_groups = typed.whole(hyper.key(Keys.LLM.EXPERT_GROUP_COUNT)) or 0
    n_used = typed.whole(hyper.key(Keys.LLM.EXPERT_GROUP_USED_COUNT)) or 0
    if n_groups and (not 0 < n_groups < n_expert or n_expert % n_groups):
        yield _fault(hyper, Keys.LLM.EXPERT_GROUP_COUNT, n_groups, f"a part of the {n_expert} experts")
    elif n_groups > 1 and not 0 < n_used < n_groups:
        yield _fault(hyper, Keys.LLM.EXPERT_GROUP_USED_COUNT, n_used, f"1 to {n_groups - 1} of {n_groups} groups")


def _float_faults(hyper: Hyper, typed: TypedMetadata) -> Iterator[str]:
    for key in (Keys.Attention.LAYERNORM_RMS_EPS, Keys.Attention.LAYERNORM_EPS):
        epsilon = typed.number(hyper.key(key))
        if epsilon is not None and not 0 <= epsilon < 1:  # NaN is in no range
            yield _fault(hyper, key, epsilon, "a small number, such as 1e-05")
    for key in (Keys.Rope.FREQ_BASE, Keys.Rope.FREQ_BASE_SWA):
        theta = typed.number(hyper.key(key))
        if theta is not None and not 1 <= theta <= _MAX_THETA:
            yield _fault(hyper, key, theta, f"1 to {_MAX_THETA:g}")
    for key in (Keys.Rope.SCALING_FACTOR, _SCALE_LINEAR):
        factor = typed.number(hyper.key(key))
        if factor is not None and not 0 <= factor <= _MAX_SCALING:
            yield _fault(hyper, key, factor, f"0 to {_MAX_SCALING:g}")
    if hyper.rope_scaling not in (None, *_ROPE_SCALINGS):
        found = repr(hyper.rope_scaling)[:40]
        yield _fault(hyper, Keys.Rope.SCALING_TYPE, found, f"one of {', '.join(_ROPE_SCALINGS)}")


def _width_faults(model: ModelHeader, typed: TypedMetadata) -> Iterator[str]:
    hyper = model.hyper
    by_name = {tensor.name: tensor for tensor in model.tensors}
    embedding = by_name.get(TOKEN_EMBEDDING)
    if embedding is not None and hyper.n_embd not in (None, embedding.shape[-1]):
        expected = f"{embedding.shape[-1]}, the width of {TOKEN_EMBEDDING}"
        yield _fault(hyper, Keys.LLM.EMBEDDING_LENGTH, hyper.n_embd, expected)
    # llama has one key for both widths
    is_llama = hyper.architecture == "llama"
    expert_key = Keys.LLM.FEED_FORWARD_LENGTH if is_llama else Keys.LLM.EXPERT_FEED_FORWARD_LENGTH
    for key, name in (
        (Keys.LLM.FEED_FORWARD_LENGTH, "blk.0.ffn_up.weight"),
        (expert_key, "blk.0.ffn_up_exps.weight"),
    ):
        tensor, stated = by_name.get(name), typed.whole(hyper.key(key))
        if tensor is None or len(tensor.shape) < 2 or stated in (None, tensor.shape[-2]):
            continue
        if stated == 0 and key == Keys.LLM.EXPERT_FEED_FORWARD_LENGTH:
            continue  # llama.cpp then divides feed_forward_length by the number of experts used
        yield _fault(hyper, key, stated, f"{tensor.shape[-2]}, the number of rows of {name}")


def _head_faults(hyper: Hyper) -> Iterator[str]:
    n_head, n_embd = hyper.n_head, hyper.n_embd
    if not isinstance(n_head, int) or n_embd is None:
        return
    if n_head < 1 or (hyper.key_length is None and n_embd % n_head):
        yield _fault(hyper, Keys.Attention.HEAD_COUNT, n_head, f"a number that divides the width of {n_embd}")
        return
    n_head_kv = n_head if hyper.n_head_kv is None else hyper.n_head_kv
    if isinstance(n_head_kv, int) and (n_head_kv < 1 or n_head % n_head_kv):
        yield _fault(hyper, Keys.Attention.HEAD_COUNT_KV, n_head_kv, f"a number that divides the {n_head} heads")
    width = n_embd // n_head if hyper.key_length is None else hyper.key_length
    for key, length in ((Keys.Attention.KEY_LENGTH, width), (Keys.Attention.VALUE_LENGTH, hyper.value_length)):
        if length is not None and not 0 < length <= MAX_INT32:
            yield _fault(hyper, key, length, "the width of a head")
    rotated = hyper.rope_dimensions
    if rotated is not None and (not 0 < rotated <= width or rotated % 2):
        yield _fault(hyper, Keys.Rope.DIMENSION_COUNT, rotated, f"an even number up to {width}, the width of a head")
