"""llama.cpp's quantization mixes as tables: for each tensor role, rules of (type, file types, conditions).

The first rule that applies gives the type of the tensor; if none applies, it gets the default type of the file type.
``policy`` applies these tables to a model.

Source: ``src/llama-quant.cpp`` of llama.cpp at the pinned commit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from ggufmoe.gguf.names import PER_LAYER_TOKEN_EMBEDDING, TOKEN_EMBEDDING
from ggufmoe.gguf.types import GGMLType
from ggufmoe.gguf.types import GGMLType as T
from ggufmoe.quant.filetypes import FileType


class Role(Enum):
    """Roles of tensors that the mixes distinguish."""

    TOKEN_EMBEDDING = "token embedding"
    OUTPUT = "output"
    ATTENTION_Q = "attention query"
    ATTENTION_K = "attention key"
    ATTENTION_V = "attention value"
    """Includes the fused query-key-value projection and DeepSeek's key-value expansion, which contain the values."""
    ATTENTION_OUTPUT = "attention output"
    FFN_GATE = "feed-forward gate"
    FFN_UP = "feed-forward up"
    FFN_DOWN = "feed-forward down"
    OTHER = "other"


ROLE_OF_NAME: tuple[tuple[str, Role], ...] = (
    ("attn_qkv.weight", Role.ATTENTION_V),
    ("attn_kv_b.weight", Role.ATTENTION_V),
    ("attn_v.weight", Role.ATTENTION_V),
    ("attn_k.weight", Role.ATTENTION_K),
    ("attn_q.weight", Role.ATTENTION_Q),
    ("attn_output.weight", Role.ATTENTION_OUTPUT),
    ("ffn_up", Role.FFN_UP),
    ("ffn_gate", Role.FFN_GATE),
    ("ffn_down", Role.FFN_DOWN),
)
"""Part of a tensor's name to the role of the tensor; the first part that the name contains decides."""

TOKEN_EMBEDDINGS = (TOKEN_EMBEDDING, PER_LAYER_TOKEN_EMBEDDING)

NEVER_QUANTIZED = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_tid2eid.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "indexer.k_proj.weight",
    "indexer.q_proj.weight",
    "time_mix_first.weight",
    "time_mix_w0.weight",
    "time_mix_w1.weight",
    "time_mix_w2.weight",
    "time_mix_v0.weight",
    "time_mix_v1.weight",
    "time_mix_v2.weight",
    "time_mix_a0.weight",
    "time_mix_a1.weight",
    "time_mix_a2.weight",
    "time_mix_g1.weight",
    "time_mix_g2.weight",
    "time_mix_decay_w1.weight",
    "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight",
    "attn_rel_b.weight",
    ".position_embd",
    "sam.pos_embd",
    "sam.neck.",
    "sam.net_",
    ".rel_pos",
    ".patch_embd",
    ".patch_merger",
    "a.rvq.codebook",
    "mm.a.code_embd",
)
"""Parts of the names of small or sensitive matrices that keep their source type in every file type."""

NEVER_QUANTIZED_NAMES = ("position_embd.weight", "token_types.weight")

OWN_RULES = ("falcon", "glm5-next", "bailingmoe3")
"""Architectures whose rules in llama.cpp are not in these tables."""


class Layers(Enum):
    """The layers to which a rule applies; ``n`` counts layers, or attention value tensors in the rules for those."""

    ALL = "every layer"
    FIRST_2 = "the first two"
    FIRST_4 = "the first four"
    FIRST_SIXTEENTH = "the first n/16"
    FIRST_EIGHTH = "the first n/8"
    MIDDLE = "all but the first and the last eighth"
    MORE_BITS = "the first and the last eighth, and every third layer between"

    def include(self, i: int, n: int) -> bool:
        """Whether layer ``i`` of ``n`` is among these layers; all divisions round down."""
        first, last = n // 8, 7 * n // 8
        if self is Layers.ALL:
            return True
        if self is Layers.MIDDLE:
            return first <= i < last
        if self is Layers.MORE_BITS:
            return i < first or i >= last or (i - first) % 3 == 2
        counts = {Layers.FIRST_2: 2, Layers.FIRST_4: 4, Layers.FIRST_SIXTEENTH: n // 16, Layers.FIRST_EIGHTH: first}
        return i < counts[self]


@dataclass(frozen=True)
class Rule:
    """In these file types, if all conditions hold, the tensor gets ``type`` (None: the file type's default type)."""

    type: GGMLType | None
    files: frozenset[FileType] = frozenset(FileType)
    layers: Layers = Layers.ALL
    min_experts: int = 0
    max_experts: int | None = None
    min_gqa: int = 0
    """Least number of query heads per key-value head."""
    imatrix: bool | None = None
    """True: only with an importance matrix for the model; False: only without one; None: both."""
    misfit: bool = False
    """Whether the rule needs rows that are not a multiple of the block size of the file type's default type."""


def _in(names: str) -> frozenset[FileType]:
    return frozenset(FileType[name] for name in names.split())


def _eight(type: GGMLType | None, files: frozenset[FileType] = frozenset(FileType)) -> Rule:
    return Rule(type, files, min_experts=8, max_experts=8)


LOW_BIT = _in("IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ2_M")
"""File types of about two bits per weight. They number layers by order, and give Llama 70B no extra bits."""

RULES: Mapping[Role, tuple[Rule, ...]] = {
    Role.OUTPUT: (
        Rule(T.Q8_0, _in("Q8_0")),
        Rule(T.Q8_0, misfit=True),
        Rule(T.Q5_K, LOW_BIT | _in("IQ3_XXS")),
        Rule(T.Q6_K),
    ),
    Role.TOKEN_EMBEDDING: (
        Rule(T.Q2_K, _in("IQ1_S IQ1_M IQ2_XXS IQ2_XS")),
        Rule(T.IQ3_S, _in("IQ2_S IQ2_M IQ3_XXS")),
        Rule(T.Q4_K, _in("TQ1_0 TQ2_0 Q2_0")),
    ),
    Role.ATTENTION_Q: (
        Rule(T.IQ3_XXS, _in("IQ3_XS")),
        Rule(T.IQ2_S, _in("IQ3_XXS")),
    ),
    Role.ATTENTION_K: (
        _eight(T.Q4_K, LOW_BIT),
        _eight(T.Q8_0),
        Rule(T.IQ3_XXS, _in("IQ3_XS")),
        Rule(T.IQ2_S, _in("IQ3_XXS")),
    ),
    Role.ATTENTION_V: (
        Rule(T.Q4_K, LOW_BIT, min_gqa=4),
        Rule(T.Q4_K, LOW_BIT, min_experts=4),
        Rule(T.IQ3_S, _in("IQ2_S IQ2_M")),
        Rule(T.Q2_K, LOW_BIT),
        _eight(T.Q8_0),
        Rule(T.Q4_K, _in("Q2_K Q2_K_S IQ3_XXS IQ3_XS IQ3_S"), min_gqa=4),
        Rule(T.Q3_K, _in("Q2_K")),
        Rule(T.IQ3_S, _in("IQ3_XXS"), imatrix=False),
        Rule(T.Q4_K, _in("IQ3_M")),
        Rule(T.Q5_K, _in("Q3_K_M"), Layers.FIRST_2),
        Rule(T.Q4_K, _in("Q3_K_M")),
        Rule(T.Q5_K, _in("Q3_K_L")),
        Rule(T.Q5_K, _in("IQ4_NL IQ4_XS"), min_gqa=4),
        Rule(T.Q6_K, _in("Q4_K_M Q5_K_M"), Layers.MORE_BITS),
        Rule(T.Q5_K, _in("Q4_K_S"), Layers.FIRST_4),
    ),
    Role.ATTENTION_OUTPUT: (
        _eight(
            T.Q5_K,
            LOW_BIT | _in("Q2_K Q3_K_S Q3_K_M Q4_K_S Q4_K_M IQ3_XXS IQ3_XS IQ3_S IQ3_M IQ4_NL IQ4_XS"),
        ),
        _eight(None),
        Rule(T.IQ2_XXS, _in("IQ1_S IQ1_M")),
        Rule(T.IQ3_S, _in("IQ2_S IQ2_M IQ3_XXS")),
        Rule(T.Q3_K, _in("Q2_K")),
        Rule(T.Q4_K, _in("Q3_K_M IQ3_M")),
        Rule(T.Q5_K, _in("Q3_K_L")),
    ),
    Role.FFN_GATE: (Rule(T.IQ3_XXS, _in("IQ3_XS"), Layers.MIDDLE),),
    Role.FFN_UP: (Rule(T.IQ3_XXS, _in("IQ3_XS"), Layers.MIDDLE),),
    Role.FFN_DOWN: (
        Rule(T.IQ3_S, _in("IQ2_S IQ2_M"), Layers.FIRST_EIGHTH),
        Rule(T.Q2_K, LOW_BIT, Layers.FIRST_EIGHTH),
        Rule(T.Q3_K, _in("Q2_K")),
        Rule(T.Q4_K, _in("Q2_K_S"), Layers.FIRST_EIGHTH),
        Rule(T.Q4_K, _in("IQ3_XXS"), Layers.FIRST_EIGHTH, imatrix=False),
        Rule(T.Q3_K, _in("IQ3_XXS"), imatrix=False),
        Rule(T.Q5_K, _in("Q3_K_M"), Layers.FIRST_SIXTEENTH),
        Rule(T.Q4_K, _in("Q3_K_M")),
        Rule(T.Q4_K, _in("IQ3_M"), Layers.FIRST_EIGHTH),
        Rule(T.Q4_K, _in("IQ3_M"), Layers.MORE_BITS, min_experts=8, max_experts=8),
        Rule(T.Q5_K, _in("Q3_K_L")),
        Rule(T.Q6_K, _in("Q4_K_M Q5_K_M"), Layers.MORE_BITS),
        Rule(T.Q5_K, _in("IQ4_NL IQ4_XS"), Layers.FIRST_EIGHTH, imatrix=False),
        Rule(T.Q5_K, _in("Q4_K_S"), Layers.FIRST_EIGHTH),
        Rule(T.Q4_1, _in("Q4_0"), Layers.FIRST_EIGHTH, imatrix=True),
        Rule(T.Q5_1, _in("Q5_0"), Layers.FIRST_EIGHTH, imatrix=True),
    ),
    Role.OTHER: (),
}

MORE_BITS_FOR_70B: Mapping[GGMLType, GGMLType] = {T.Q3_K: T.Q5_K, T.Q4_K: T.Q5_K}
"""Type from the rules to the larger type for attn_v of Llama 70B, which eight query heads share: it is small."""

FALLBACK: Mapping[GGMLType, GGMLType] = {
    T.IQ1_S: T.IQ4_NL,
    T.IQ1_M: T.IQ4_NL,
    T.IQ2_XXS: T.IQ4_NL,
    T.IQ2_XS: T.IQ4_NL,
    T.IQ2_S: T.IQ4_NL,
    T.IQ3_XXS: T.IQ4_NL,
    T.IQ3_S: T.IQ4_NL,
    T.IQ4_XS: T.IQ4_NL,
    T.Q2_0: T.Q4_0,
    T.Q2_K: T.Q4_0,
    T.Q3_K: T.Q4_0,
    T.TQ1_0: T.Q4_0,
    T.TQ2_0: T.Q4_0,
    T.Q4_K: T.Q5_0,
    T.Q5_K: T.Q5_1,
    T.Q6_K: T.Q8_0,
}
"""Type to its replacement for rows that are not a multiple of its block size; types with blocks of 32 become F16."""

NEEDS_IMATRIX = frozenset({T.IQ1_S, T.IQ1_M, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ3_XXS})
"""Types that llama.cpp refuses without an importance matrix, except for the token embedding and the output."""
