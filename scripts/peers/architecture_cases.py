"""Tiny random models of the architectures that people run, as configurations of transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tests import tiny_tokenizers

_SHARED: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_EIGHT = {"num_experts": 8, "num_experts_per_tok": 2}
_EIGHT_LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
_EIGHT_ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
_MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "first_k_dense_replace": 1,
}
_LINEAR = {
    "head_dim": 32,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}


@dataclass(frozen=True)
class Architecture:
    """One model: its name here, its class in transformers without the ending, and its configuration's keys."""

    name: str
    kind: str
    keys: dict[str, Any]
    config_class: str = ""
    tokenizer: str = "bpe"
    """The kind of ``tests.tiny_tokenizers`` that llama.cpp's converter looks for."""
    added: tuple[str, ...] = ()
    """Special tokens that the converter wants."""
    flags: tuple[str, ...] = ()
    """Of the converter."""

    @property
    def n_vocab(self) -> int:
        return tiny_tokenizers.vocabulary_size(self.tokenizer) + len(self.added)

    def tokenizer_files(self) -> dict[str, bytes]:
        """Name and content of the tokenizer's files."""
        files = dict(tiny_tokenizers.tokenizer_files(self.tokenizer))
        if self.added:
            content = json.loads(files["tokenizer.json"])
            first = tiny_tokenizers.vocabulary_size(self.tokenizer)
            plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            content["added_tokens"] += [
                {"id": first + i, "content": text, "special": True, **plain} for i, text in enumerate(self.added)
            ]
            files["tokenizer.json"] = json.dumps(content).encode()
        settings = tiny_tokenizers.tokenizer_config(self.tokenizer)
        return files | {"tokenizer_config.json": json.dumps(settings).encode()}

    def job(self, out: str) -> dict[str, Any]:
        """What ``random_model_reference.py`` is asked."""
        return {
            "model": f"{self.kind}ForCausalLM",
            "config_class": self.config_class or f"{self.kind}Config",
            "config": {**_SHARED, "vocab_size": self.n_vocab, **self.keys},
            "out": out,
        }


ARCHITECTURES = (
    Architecture("mixtral", "Mixtral", {**_EIGHT_LOCAL}),
    Architecture(
        "qwen3moe", "Qwen3Moe", {**_EIGHT, "moe_intermediate_size": 64, "head_dim": 32, "norm_topk_prob": True}
    ),
    Architecture(
        "qwen2moe", "Qwen2Moe", {**_EIGHT, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 96}
    ),
    Architecture("olmoe", "Olmoe", {**_EIGHT, "num_key_value_heads": 4}),
    Architecture("granitemoe", "GraniteMoe", {**_EIGHT_LOCAL}),
    Architecture("gpt-oss", "GptOss", {**_EIGHT_LOCAL, "head_dim": 32, "sliding_window": 64}),
    Architecture(
        "deepseek2-lite",
        "DeepseekV2",
        {
            **_EIGHT_ROUTED,
            **_MLA,
            "num_hidden_layers": 27,
            "moe_intermediate_size": 32,
            "n_shared_experts": 2,
            "q_lora_rank": None,
            "topk_method": "greedy",
            "routed_scaling_factor": 1.0,
            "norm_topk_prob": False,
        },
    ),
    Architecture(
        "deepseek2-v3",
        "DeepseekV3",
        {
            **_EIGHT_ROUTED,
            **_MLA,
            "moe_intermediate_size": 64,
            "n_shared_experts": 1,
            "q_lora_rank": 64,
            "n_group": 2,
            "topk_group": 1,
            "routed_scaling_factor": 2.5,
            "scoring_func": "sigmoid",
            "norm_topk_prob": True,
        },
    ),
    Architecture(
        "glm4moe",
        "Glm4Moe",
        {
            **_EIGHT_ROUTED,
            "moe_intermediate_size": 64,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "head_dim": 32,
        },
        added=("[gMASK]", "<|endoftext|>", "<|user|>", "<|observation|>"),
    ),
    Architecture(
        "lfm2moe",
        "Lfm2Moe",
        {
            **_EIGHT,
            "moe_intermediate_size": 64,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        },
    ),
    Architecture(
        "ernie4_5-moe",
        "Ernie4_5_Moe",
        {
            "intermediate_size": 128,
            "moe_intermediate_size": 64,
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
        tokenizer="spm",
    ),
    Architecture("qwen3next", "Qwen3Next", {**_EIGHT, **_LINEAR}, flags=("--no-mtp",)),
    Architecture(
        "qwen35moe", "Qwen3_5Moe", {**_EIGHT, **_LINEAR, "vocab_size": 400}, "Qwen3_5MoeTextConfig", flags=("--no-mtp",)
    ),
    Architecture(
        "gemma3",
        "Gemma3",
        {"num_hidden_layers": 6, "head_dim": 32, "sliding_window": 64, "pad_token_id": 0},
        "Gemma3TextConfig",
    ),
    Architecture(
        "qwen3moe-128",
        "Qwen3Moe",
        {
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 32,
            "head_dim": 32,
            "norm_topk_prob": True,
        },
    ),
    Architecture(
        "deepseek2-256",
        "DeepseekV3",
        {
            **_EIGHT_ROUTED,
            **_MLA,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 32,
            "n_shared_experts": 1,
            "q_lora_rank": 64,
            "n_group": 8,
            "topk_group": 4,
            "routed_scaling_factor": 2.5,
            "scoring_func": "sigmoid",
            "norm_topk_prob": True,
        },
    ),
)
