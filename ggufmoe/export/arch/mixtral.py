"""Mixtral: a Llama whose feed-forward part is a router and a stack of experts.

Source: ``conversion/llama.py`` and ``gguf-py/gguf/tensor_mapping.py`` at the pinned llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator

from ggufmoe.checkpoint.source import ModelConfig, ModelSource
from ggufmoe.export.arch import ModelTensor
from ggufmoe.export.arch.dense import attention_tensors, llama_parameters, outer_tensors, unexpressed
from ggufmoe.gguf.header import GGUFValue
from ggufmoe.gguf.upstream import LLAMA

__all__ = ["ARCHITECTURES", "NAME", "hyper_parameters", "tensors", "unexpressed"]

NAME = LLAMA
ARCHITECTURES = ("MixtralForCausalLM",)

_STACKS = {"gate": "w1", "down": "w2", "up": "w3"}


def tensors(source: ModelSource) -> Iterator[ModelTensor]:
    """Every tensor of a Mixtral; each expert is one part of a stack (n_expert, rows, cols)."""
    yield from outer_tensors(source)
    for layer in range(source.config.n_layer):
        yield from attention_tensors(source, layer)
        yield from _expert_tensors(source, layer)


def _expert_tensors(source: ModelSource, layer: int) -> Iterator[ModelTensor]:
    block, stem = f"blk.{layer}", f"model.layers.{layer}.block_sparse_moe"
    router = source.tensors[f"{stem}.gate.weight"]
    yield ModelTensor(f"{block}.ffn_gate_inp.weight", router.shape, (router,), delicate=True)
    experts = range(source.config.n_expert)
    for name, part in _STACKS.items():
        parts = tuple(source.tensors[f"{stem}.experts.{expert}.{part}.weight"] for expert in experts)
        yield ModelTensor(f"{block}.ffn_{name}_exps.weight", (len(parts), *parts[0].shape), parts)


def hyper_parameters(config: ModelConfig) -> dict[str, GGUFValue]:
    """The ``llama.*`` keys of a Mixtral; its head size is written only where the config gives one, as upstream does."""
    return llama_parameters(config, with_head_size=config.raw.get("head_dim") is not None)
