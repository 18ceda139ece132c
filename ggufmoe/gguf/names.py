"""Names of tensors in GGUF files: which layer and which part of a model a tensor belongs to.

Every pattern of a tensor's name stands here. Names of whole tensors come from the ``gguf`` package; what quantization
mixes make of a name is in ``quant.mixes``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ggufmoe.gguf.upstream import MODEL_TENSOR, TENSOR_NAMES

TOKEN_EMBEDDING = f"{TENSOR_NAMES[MODEL_TENSOR.TOKEN_EMBD]}.weight"
PER_LAYER_TOKEN_EMBEDDING = f"{TENSOR_NAMES[MODEL_TENSOR.PER_LAYER_TOKEN_EMBD]}.weight"
OUTPUT = f"{TENSOR_NAMES[MODEL_TENSOR.OUTPUT]}.weight"

EXPERTS_PATTERN = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"
"""The expert tensors of any layer, as ``--cpu-moe`` finds them (LLM_FFN_EXPS_REGEX of llama.cpp's common.h)."""

_LAYER = re.compile(r"blk\.(\d+)\.")
_EXPERTS = re.compile(EXPERTS_PATTERN)
_EXPERT_MATRIX = re.compile(r"blk\.(\d+)\.ffn_(?:(gate|up|down|gate_up)_exps|gate_inp)\.weight")
_LEGACY_EXPERT = re.compile(r"(blk\.\d+\.ffn_(?:gate|up|down))\.(\d+)\.weight")
_INPUT = re.compile(r"(token_embd|token_types|position_embd|per_layer_token_embd)\b")
_ROPE_TABLE = re.compile(r"rope_(freqs|factors_long|factors_short)\b")
_PARTS = (
    ("norms", re.compile(r"norm")),
    ("router", re.compile(r"ffn_gate_(tid2eid|inp\b)|exp_probs_b")),
    ("experts", re.compile(r"_exps\b|ffn_(gate|up|down)\.\d+\.")),
    ("shared experts", re.compile(r"_shexp\b|_chexps\b|ffn_gate_inp_shexp")),
    ("attention", re.compile(r"\battn_|\bindexer")),
    ("feed-forward", re.compile(r"\bffn_")),
    ("embedding", re.compile(f"^{_INPUT.pattern}")),
    ("output", re.compile(r"^output\b")),
)


@dataclass(frozen=True)
class ExpertMatrix:
    """Layer and kind of a stack of experts or of a router; ``kind`` is gate, up, down, gate_up or router."""

    layer: int
    kind: str


@dataclass(frozen=True)
class LegacyExpert:
    """The number of an expert that has tensors of its own, and the name of the stack that this tensor belongs to."""

    stack: str
    expert: int


def layer_of(name: str) -> int | None:
    """The layer of a tensor (``blk.7.attn_q.weight``: 7); None for tensors outside of the layers."""
    found = _LAYER.match(name)
    return int(found[1]) if found else None


def without_layer(name: str) -> str:
    """The tensor's name without its layer: ``attn_q.weight`` of ``blk.7.attn_q.weight``."""
    return _LAYER.sub("", name, count=1) if _LAYER.match(name) else name


def llama_quantize_order(name: str) -> tuple[int, str]:
    """Key for sorting tensors as llama-quantize writes them: those outside of layers first, then layer by layer."""
    layer = layer_of(name)
    return (-1 if layer is None else layer, name)


def is_input(name: str) -> bool:
    """Whether a tensor is looked up by token or position before the first layer, as embeddings are."""
    return _INPUT.match(name) is not None


def is_rope_table(name: str) -> bool:
    """Whether a tensor holds factors of rotary embeddings, which every layer uses."""
    return _ROPE_TABLE.match(name) is not None


def is_offloadable_expert(name: str) -> bool:
    """Whether ``--cpu-moe`` keeps this tensor in the CPU's memory."""
    return _EXPERTS.search(name) is not None


def is_expert_stack(name: str) -> bool:
    """Whether a tensor is the stack of one kind of matrix of all experts of a layer."""
    return "_exps." in name


def expert_matrix(name: str) -> ExpertMatrix | None:
    """Layer and kind of a stack of experts or of a router; None for other tensors."""
    found = _EXPERT_MATRIX.fullmatch(name)
    return ExpertMatrix(int(found[1]), found[2] or "router") if found else None


def legacy_expert(name: str) -> LegacyExpert | None:
    """Stack and number of an expert's own tensor, which Mixtral files had before April 2024; None for other tensors."""
    found = _LEGACY_EXPERT.fullmatch(name)
    return LegacyExpert(f"{found[1]}_exps.weight", int(found[2])) if found else None


def legacy_experts(names: Iterable[str]) -> tuple[str, ...]:
    """The names among ``names`` that ``legacy_expert`` knows; the pinned llama.cpp does not load files with such."""
    return tuple(name for name in names if _LEGACY_EXPERT.fullmatch(name))


def experts_pattern(layers: Iterable[int]) -> str:
    """Regular expression of the expert tensors of some layers, for ``--override-tensor``."""
    return rf"blk\.({'|'.join(map(str, layers))}){EXPERTS_PATTERN}"


def part_of(name: str) -> str:
    """The part of a model that a tensor belongs to: experts, attention, router, norms, embedding, output or other."""
    return next((part for part, pattern in _PARTS if pattern.search(name)), "other")
