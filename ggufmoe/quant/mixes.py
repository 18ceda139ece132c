"""llama.cpp's quantization mixes as data: for each role of a tensor, rows of (type, files, conditions).

The first row that applies gives the type; where none does, the tensor gets the file's own type. ``policy`` walks these
tables; nothing here is computed from a model.

Source of the facts: ``src/llama-quant.cpp`` of llama.cpp at the pinned commit.
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
    """Roles of tensors, as far as the mixes tell them apart."""

    TOKEN_EMBEDDING = "token embedding"
    OUTPUT = "output"
    ATTENTION_Q = "attention query"
    ATTENTION_K = "attention key"
    ATTENTION_V = "attention value"
    """Also the fused query-key-value and DeepSeek's key-value expansion, which hold values."""
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
"""The role of a tensor whose name holds this; the first that is found counts."""

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
"""Parts of the names of matrices that are small or delicate, and keep their type in every file."""

NEVER_QUANTIZED_NAMES = ("position_embd.weight", "token_types.weight")

OWN_RULES = ("falcon", "glm5-next", "bailingmoe3")
"""Architectures for which llama.cpp has rules that are not in these tables."""


class Layers(Enum):
    """Which layers a row is for, among ``n`` layers (among the attention values of the model, for those)."""

    ALL = "every layer"
    FIRST_2 = "the first two"
    FIRST_4 = "the first four"
    FIRST_SIXTEENTH = "the first n/16"
    FIRST_EIGHTH = "the first n/8"
    MIDDLE = "all but the first and the last eighth"
    MORE_BITS = "the first and the last eighth, and every third layer between"

    def include(self, i: int, n: int) -> bool:
        """Whether layer ``i`` of ``n`` is meant; all divisions round down."""
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
    """A row: in these files, where all conditions hold, the tensor gets ``type`` (None: the file's own type)."""

    type: GGMLType | None
    files: frozenset[FileType] = frozenset(FileType)
    layers: Layers = Layers.ALL
    min_experts: int = 0
    max_experts: int | None = None
    min_gqa: int = 0
    """Query heads for each key-value head."""
    imatrix: bool | None = None
    """Only with (True) or without (False) an importance matrix for the model."""
    misfit: bool = False
    """Only where the block of the file's own type does not divide the row."""


def _in(names: str) -> frozenset[FileType]:
    return frozenset(FileType[name] for name in names.split())


def _eight(type: GGMLType | None, files: frozenset[FileType] = frozenset(FileType)) -> Rule:
    return Rule(type, files, min_experts=8, max_experts=8)


LOW_BIT = _in("IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ2_M")
"""Files of about two bits a weight, in which other rules count: layers by order, and no extra bits for Llama 70B."""

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
"""Llama 70B shares one attn_v among eight query heads: it is small, and gets more than the table says."""

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
"""What a tensor gets whose rows the block of the type does not divide; types of blocks of 32 fall back to F16."""

NEEDS_IMATRIX = frozenset({T.IQ1_S, T.IQ1_M, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ3_XXS})
"""Types that are garbage without an importance matrix; embeddings and output are let through by llama.cpp."""
