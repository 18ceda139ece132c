"""The models that are compared: small random ones of every shape that matters, made here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests import tiny_tokenizers
from tests.tiny import make_checkpoint

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
ALL_TYPES = ("F32", "BF16", "F16")
NOT_PADDED = ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type")
"""What llama.cpp's converter does not pad when the vocabulary comes from a tokenizer.json of the sentencepiece kind;
llama.cpp refuses the file that it writes then."""


@dataclass(frozen=True)
class Case:
    """One checkpoint and what it is compared in."""

    name: str
    spec: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ``tests.tiny.Tiny``; of no meaning where ``directory`` is given."""
    types: tuple[str, ...] = ("F32",)
    """File types compared with llama.cpp's converter."""
    pre: str | None = None
    """llama.cpp's name of the pre-tokenizer, where its table of hashes cannot know the vocabulary."""
    flags: tuple[str, ...] = ()
    """Further flags of llama.cpp's converter."""
    not_equal: tuple[str, ...] = ()
    """Metadata in which llama.cpp's converter is known to be wrong."""
    directory: Path | None = None
    """A checkpoint that is there already."""
    classic: Path | None = None
    """The same weights in the layout that llama.cpp's converter reads; None: made of ``directory``."""
    text_step: int = 1
    """Token ids are compared for each so-many-th text; for gpt-4o llama.cpp takes 15 times as long as for others."""
    judged: Path | None = None
    """The same weights in a form that transformers runs; None: ``directory``."""

    def checkpoint(self, parent: Path) -> Path:
        """The checkpoint's directory, made below ``parent`` unless it is there already."""
        return self.directory or make_checkpoint(parent / self.name, **self.spec)


@dataclass(frozen=True)
class FamilyCase:
    """A model that transformers makes, of a family in ``ggufmoe/families``: tiny, random and seeded."""

    name: str
    config: Mapping[str, Any]
    """config.json, with ``architectures`` and ``model_type``; ``SIZES`` come before it."""
    types: tuple[str, ...] = ("F32", "BF16")
    """File types compared with llama.cpp's converter; none where it cannot convert the model."""
    tokenizer: str = "qwen"
    """A kind of ``tests.tiny_tokenizers``."""
    pre: str = "qwen2"
    """llama.cpp's name of that tokenizer's pre-tokenizer."""
    flags: tuple[str, ...] = ()
    """Further flags of llama.cpp's converter."""
    not_equal: tuple[str, ...] = ()
    """Metadata in which llama.cpp's converter is known to be wrong."""
    text_step: int = 1
    """As in ``Case``."""
    other_form: str | None = None
    """The form beside ``saved`` in which the model is stored (``form`` of reference.py), where it is a mixture."""
    fp8_scales: str | None = None
    """torch's name of the dtype of scales, where projections are 8-bit floats with a scale for each block."""
    fp8_rows: bool = False
    """Whether a block is a row, as compressed-tensors has it."""

    further: bool = False
    """Whether the checkpoint has a layer of multi-token prediction."""

    @property
    def forms(self) -> tuple[str, ...]:
        """Every form in which the model is stored: by transformers, and another one that mixtures have."""
        is_mixture = any("expert" in key for key in {**self.config, **self.config.get("text_config", {})})
        return ("saved", self.other_form or "state") if is_mixture else ("saved",)


SIZES: Mapping[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": tiny_tokenizers.vocabulary_size("qwen"),
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": tiny_tokenizers.special_ids("qwen")[1],
    "pad_token_id": None,
}


def _family(
    name: str,
    architecture: str,
    model_type: str,
    flags: tuple[str, ...] = (),
    not_equal: tuple[str, ...] = (),
    types: tuple[str, ...] = ("F32", "BF16"),
    **config: Any,
) -> FamilyCase:
    own = {"architectures": [architecture], "model_type": model_type, **config}
    return FamilyCase(name, {**SIZES, **own}, types, flags=flags, not_equal=not_equal)


def _with_tokenizer(case: FamilyCase, kind: str, pre: str = "default") -> FamilyCase:
    """The same model with another vocabulary of ``tests.tiny_tokenizers``."""
    begin, end = tiny_tokenizers.special_ids(kind)
    ids = {"bos_token_id": begin, "eos_token_id": end, "vocab_size": tiny_tokenizers.vocabulary_size(kind)}
    return replace(case, config={**case.config, **ids}, tokenizer=kind, pre=pre)


def _qwen35(name: str, architecture: str, config: Mapping[str, Any]) -> FamilyCase:
    return FamilyCase(
        name, {"architectures": [architecture], **config}, tokenizer="qwen35", pre="qwen35", flags=_NO_MTP
    )


def _long_rope(n_original: int, n_pairs: int, fraction: float = 1.0) -> dict[str, Any]:
    """The configuration of LongRoPE for texts that were of ``n_original`` tokens before."""
    factors = {"short_factor": [1 + i / 50 for i in range(n_pairs)], "long_factor": [1.5 + i for i in range(n_pairs)]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": fraction, **factors}
    return {"rope_parameters": rope, "original_max_position_embeddings": n_original}


def _glm(name: str, **config: Any) -> FamilyCase:
    made = _family(name, "Glm4MoeForCausalLM", "glm4_moe", **{**_GLM, **config})
    return replace(made, tokenizer="glm", pre="glm4", further=not config)


def _fp8(scales: str, name: str, architecture: str, model_type: str, **config: Any) -> FamilyCase:
    return replace(_family(f"{name}-fp8", architecture, model_type, **config), fp8_scales=scales)


YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e6}
_LATENT_YARN: dict[str, Any] = {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}
_QWEN3_EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "norm_topk_prob": True,
}
_QWEN2_EXPERTS: dict[str, Any] = {
    **_QWEN3_EXPERTS,
    "norm_topk_prob": False,
    "shared_expert_intermediate_size": 768,
}
_GRANITE: dict[str, Any] = {
    "attention_multiplier": 0.05,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "logits_scaling": 6.0,
}
_GRANITE_EXPERTS: dict[str, Any] = {"num_local_experts": 8, "num_experts_per_tok": 2}
_LINEAR_ATTENTION: dict[str, Any] = {
    "num_hidden_layers": 4,
    "head_dim": 64,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_OTHER_LAYERS: dict[str, Any] = {
    "layer_types": ["full_attention", "linear_attention", "linear_attention"],
    "num_hidden_layers": 3,
    "linear_num_key_heads": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
}
_QWEN3_NEXT: dict[str, Any] = {**_QWEN2_EXPERTS, "norm_topk_prob": True, **_LINEAR_ATTENTION}
_GEMMA: dict[str, Any] = {
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "sliding_window": 16,
    "num_hidden_layers": 7,
    "num_key_value_heads": 1,
    "num_attention_heads": 4,
    "tie_word_embeddings": True,
}
_TWO_ROPES: dict[str, Any] = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
}
_SIGLIP: dict[str, Any] = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 32} | {
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_SECTIONS: dict[str, Any] = {
    "rope_type": "default",
    "rope_theta": 1e6,
    "mrope_section": [3, 3, 2],
    "mrope_interleaved": True,
}
_QWEN35: dict[str, Any] = {**_LINEAR_ATTENTION, "rope_parameters": _SECTIONS, "head_dim": 64}
_QWEN35_EXPERTS: dict[str, Any] = {
    **_QWEN35,
    **{key: value for key, value in _QWEN2_EXPERTS.items() if key != "norm_topk_prob"},
}
_QWEN35_VISION: dict[str, Any] = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2} | {
    "out_hidden_size": 256,
    "num_position_embeddings": 16,
}
_NO_MTP = ("--no-mtp",)
"""Without it the converter fails on checkpoints that hold no layers of multi-token prediction, as these do."""
_DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 8,
    "kv_lora_rank": 256,
    "q_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 48,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 256,
    "routed_scaling_factor": 1.5,
}
_DEEPSEEK_V3: dict[str, Any] = {**_DEEPSEEK, "n_shared_experts": 1, "n_group": 4, "topk_group": 2}
_GLM: dict[str, Any] = {
    "vocab_size": tiny_tokenizers.vocabulary_size("glm"),
    "eos_token_id": [tiny_tokenizers.special_ids("glm")[0] + place for place in (1, 3, 4)],
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 256,
    "routed_scaling_factor": 1.5,
}
_LITE: dict[str, Any] = {
    **_DEEPSEEK,
    "q_lora_rank": None,
    "num_hidden_layers": 26,
    "n_routed_experts": 4,
    "kv_lora_rank": 64,
    "moe_intermediate_size": 32,
    "intermediate_size": 64,
    "scoring_func": "softmax",
    "n_group": 1,
    "topk_group": 1,
}


def _gpt_oss(name: str, **config: Any) -> FamilyCase:
    begin, end = tiny_tokenizers.special_ids("harmony")
    sizes: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 64, "sliding_window": 16}
    tokens: dict[str, Any] = {
        "bos_token_id": begin,
        "eos_token_id": end,
        "vocab_size": tiny_tokenizers.vocabulary_size("harmony"),
    }
    plain = _family(name, "GptOssForCausalLM", "gpt_oss", **sizes, **tokens, **config)
    return replace(plain, tokenizer="harmony", pre="gpt-4o", other_form="mxfp4", text_step=20)


_LFM2 = {
    "norm_eps": 1e-5,
    "conv_L_cache": 3,
    "layer_types": ["conv", "full_attention", "conv"],
    "num_dense_layers": 1,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
}


def _lfm2(name: str, types: tuple[str, ...], **config: Any) -> FamilyCase:
    begin, end = tiny_tokenizers.special_ids("bpe")
    tokens = {"bos_token_id": begin, "eos_token_id": end, "vocab_size": tiny_tokenizers.vocabulary_size("bpe")}
    plain = _family(name, "Lfm2MoeForCausalLM", "lfm2_moe", **{**_LFM2, **tokens, **config})
    return replace(plain, tokenizer="bpe", pre="lfm2", types=types)


def _ernie(name: str, not_equal: tuple[str, ...] = (), **config: Any) -> FamilyCase:
    """``intermediate_size`` over key-value heads is the width of the shared experts, as in the published models."""
    begin, end = tiny_tokenizers.special_ids("spm")
    tokens = {"bos_token_id": begin, "eos_token_id": end, "vocab_size": tiny_tokenizers.vocabulary_size("spm")}
    experts = {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 128, "moe_num_shared_experts": 2}
    own = {**experts, **tokens, **config}
    plain = _family(name, "Ernie4_5_MoeForCausalLM", "ernie4_5_moe", not_equal=not_equal, **own)
    return replace(plain, tokenizer="spm", pre="")


FAMILIES = (
    _family("qwen2", "Qwen2ForCausalLM", "qwen2"),
    _family("qwen2-tied-yarn", "Qwen2ForCausalLM", "qwen2", tie_word_embeddings=True, rope_parameters=YARN),
    _family("qwen3", "Qwen3ForCausalLM", "qwen3", head_dim=64),
    _family("qwen3-tied", "Qwen3ForCausalLM", "qwen3", head_dim=64, tie_word_embeddings=True),
    _family("qwen3moe", "Qwen3MoeForCausalLM", "qwen3_moe", **_QWEN3_EXPERTS, head_dim=64),
    _family("qwen3moe-tied", "Qwen3MoeForCausalLM", "qwen3_moe", **_QWEN3_EXPERTS, tie_word_embeddings=True),
    _family("olmoe", "OlmoeForCausalLM", "olmoe", num_experts=8, num_experts_per_tok=2, num_key_value_heads=8),
    _family("qwen2moe", "Qwen2MoeForCausalLM", "qwen2_moe", **_QWEN2_EXPERTS),
    _family("granite", "GraniteForCausalLM", "granite", **_GRANITE),
    _family("granite-tied-plain", "GraniteForCausalLM", "granite", tie_word_embeddings=True),
    _family("granitemoe", "GraniteMoeForCausalLM", "granitemoe", **_GRANITE, **_GRANITE_EXPERTS),
    _family(
        "granitemoe-shared-tied",
        "GraniteMoeSharedForCausalLM",
        "granitemoeshared",
        **_GRANITE,
        **_GRANITE_EXPERTS,
        shared_intermediate_size=768,
        tie_word_embeddings=True,
    ),
    _family("qwen3next", "Qwen3NextForCausalLM", "qwen3_next", _NO_MTP, **_QWEN3_NEXT),
    _family(
        "qwen3next-tied",
        "Qwen3NextForCausalLM",
        "qwen3_next",
        _NO_MTP,
        **_QWEN3_NEXT | _OTHER_LAYERS,
        tie_word_embeddings=True,
    ),
    _qwen35("qwen35moe", "Qwen3_5MoeForCausalLM", {"model_type": "qwen3_5_moe_text", **SIZES, **_QWEN35_EXPERTS}),
    _qwen35(
        "qwen35moe-vision-tied",
        "Qwen3_5MoeForConditionalGeneration",
        {
            "model_type": "qwen3_5_moe",
            "text_config": {key: value for key, value in SIZES.items() if key != "intermediate_size"}
            | _QWEN35_EXPERTS
            | _OTHER_LAYERS
            | {"tie_word_embeddings": True},
            "vision_config": _QWEN35_VISION,
            "tie_word_embeddings": True,
        },
    ),
    _qwen35(
        "qwen35-tied",
        "Qwen3_5ForCausalLM",
        {"model_type": "qwen3_5_text", **SIZES, **_QWEN35, **_OTHER_LAYERS, "tie_word_embeddings": True},
    ),
    _qwen35(
        "qwen35-vision",
        "Qwen3_5ForConditionalGeneration",
        {"model_type": "qwen3_5", "text_config": {**SIZES, **_QWEN35}, "vision_config": _QWEN35_VISION},
    ),
    _with_tokenizer(_family("phi-window", "Phi3ForCausalLM", "phi3", sliding_window=300), "spm"),
    _with_tokenizer(_family("phi-long", "Phi3ForCausalLM", "phi3", **_long_rope(32, 16)), "spm"),
    _with_tokenizer(
        _family("phi-part-tied", "Phi3ForCausalLM", "phi3", tie_word_embeddings=True, **_long_rope(256, 12, 0.75)),
        "smollm",
        "smollm",
    ),
    _with_tokenizer(_family("gemma2", "Gemma2ForCausalLM", "gemma2", **_GEMMA), "gemma"),
    _with_tokenizer(
        _family("gemma3", "Gemma3ForCausalLM", "gemma3_text", **_GEMMA, rope_parameters=_TWO_ROPES), "gemma"
    ),
    _with_tokenizer(
        _family(
            "gemma3-own",
            "Gemma3ForCausalLM",
            "gemma3_text",
            **_GEMMA | {"num_hidden_layers": 3, "tie_word_embeddings": False, "final_logit_softcapping": 20.0},
            layer_types=["full_attention", "sliding_attention", "full_attention"],
            not_equal=("gemma3.attention.sliding_window_pattern",),
        ),
        "gemma",
    ),
    FamilyCase(
        "gemma3-vision",
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "model_type": "gemma3",
            "text_config": {**SIZES, **_GEMMA, "vocab_size": tiny_tokenizers.vocabulary_size("gemma")}
            | dict(zip(("bos_token_id", "eos_token_id"), tiny_tokenizers.special_ids("gemma"), strict=True)),
            "vision_config": _SIGLIP,
        },
        tokenizer="gemma",
        pre="default",
    ),
    _family("deepseek-v2", "DeepseekV2ForCausalLM", "deepseek_v2", **_DEEPSEEK, rope_parameters=_LATENT_YARN),
    _family("deepseek-v2-lite", "DeepseekV2ForCausalLM", "deepseek_v2", types=("F32",), **_LITE),
    _family(
        "deepseek-v2-short-lite",
        "DeepseekV2ForCausalLM",
        "deepseek_v2",
        not_equal=("deepseek2.attention.q_lora_rank",),
        types=("F32",),
        **{**_DEEPSEEK, "q_lora_rank": None, "tie_word_embeddings": True},
    ),
    replace(
        _family(
            "deepseek-v3",
            "DeepseekV3ForCausalLM",
            "deepseek_v3",
            **_DEEPSEEK_V3,
            scoring_func="sigmoid",
            rope_parameters={**_LATENT_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        ),
        further=True,
    ),
    _family(
        "deepseek-v3-unsaid-gating",
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        not_equal=("deepseek2.expert_gating_func",),
        types=("F32",),
        **{**_DEEPSEEK_V3, "norm_topk_prob": False, "first_k_dense_replace": 0},
    ),
    replace(
        _fp8("float32", "deepseek-v3", "DeepseekV3ForCausalLM", "deepseek_v3", **_DEEPSEEK_V3, scoring_func="sigmoid"),
        further=True,
    ),
    _fp8("bfloat16", "qwen3", "Qwen3ForCausalLM", "qwen3", head_dim=64, intermediate_size=416),
    replace(_fp8("bfloat16", "qwen3-rows", "Qwen3ForCausalLM", "qwen3", head_dim=64), fp8_rows=True),
    _glm("glm4moe"),
    _glm("glm4moe-norms-tied", attention_bias=True, use_qk_norm=True, head_dim=64, tie_word_embeddings=True),
    _gpt_oss("gpt-oss", rope_parameters=YARN),
    _lfm2("lfm2moe", ()),
    _ernie("ernie4_5-moe"),
    _ernie("ernie4_5-moe-no-shared-tied", moe_num_shared_experts=0, moe_layer_start_index=0, tie_word_embeddings=True),
    _ernie("ernie4_5-moe-wide", ("ernie4_5-moe.expert_shared_feed_forward_length",), moe_num_shared_experts=1),
    _lfm2("lfm2moe-tied", ("F32", "BF16"), tie_word_embeddings=True, rope_parameters=YARN, conv_L_cache=4),
)


def own_cases() -> list[Case]:
    """Every layout, number of experts, tokenizer and source type, and the dense families."""
    top2 = {"n_expert_used": 2}
    return [
        Case("mixtral-2", {"n_expert": 2, **top2}, ALL_TYPES),
        Case("mixtral-2-f16", {"n_expert": 2, **top2, "dtype": "F16"}, ALL_TYPES),
        Case("mixtral-2-f32", {"n_expert": 2, **top2, "dtype": "F32"}, ALL_TYPES),
        Case("mixtral-2-fused", {"n_expert": 2, **top2, "layout": "fused", "config_style": 5}),
        Case("mixtral-3-odd-width", {"n_expert": 3, "n_embd": 288, "n_head": 6, "n_head_kv": 6, "n_ff": 768}),
        Case("mixtral-4-tied", {"n_expert": 4, **top2, "tie": True, "max_shard_bytes": 1_000_000}),
        Case("mixtral-4-fused", {"n_expert": 4, **top2, "layout": "fused"}),
        Case("mixtral-8", {"n_expert": 8, **top2}, ("F32", "BF16")),
        Case("mixtral-8-fused-tied", {"n_expert": 8, **top2, "layout": "fused", "tie": True, "config_style": 5}),
        Case("mixtral-2-tokenizer-json", {"n_expert": 2, "tokenizer": "json", "config_style": 5}),
        Case("mixtral-2-padded", {"n_expert": 2, "n_vocab": 416}),
        Case("mixtral-2-json-padded", {"n_expert": 2, "n_vocab": 416, "tokenizer": "json"}, not_equal=NOT_PADDED),
        Case("mistral", {"arch": "mistral", "rope_theta": 1e6, "config": {"sliding_window": 1024}}, ALL_TYPES),
        Case("mistral-head-dim", {"arch": "mistral", "head_dim": 32, "tokenizer": "json"}),
        Case(
            "llama3-rope-head-dim",
            {"arch": "llama", "tokenizer": "bpe", "head_dim": 32, "rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE},
            ALL_TYPES,
            pre="llama-bpe",
        ),
        Case(
            "llama3-rope-style-5",
            {"arch": "llama", "tokenizer": "bpe", "rope_scaling": LLAMA3_ROPE, "config_style": 5},
            pre="llama-bpe",
        ),
        Case("smollm-tied", {"arch": "llama", "tokenizer": "smollm", "tie": True}, ("F32", "BF16"), pre="smollm"),
        Case("llama3-padded", {"arch": "llama", "tokenizer": "bpe", "n_vocab": 400}, pre="llama-bpe"),
        Case("llama-linear-rope", {"arch": "llama", "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    ]


def found_cases(directory: Path) -> list[Case]:
    """Every checkpoint that lies directly in ``directory``."""
    return [
        Case(config.parent.name, types=("F32", "BF16"), directory=config.parent)
        for config in sorted(directory.glob("*/config.json"))
    ]
