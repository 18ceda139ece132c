"""DeepSeek-V3, R1 and what has their form: DeepSeek-V2 with sigmoid scores, a bias of expert choice, and groups.

Source: ``conversion/deepseek.py`` and ``src/models/deepseek2.cpp`` at the pinned llama.cpp; defaults from transformers'
configuration_deepseek_v3.py, 5.23, whose scores are always sigmoids: the converter writes the gating function only
where config.json has a ``scoring_func``, and llama.cpp takes softmax where no file says so.
"""

from __future__ import annotations

from dataclasses import replace

from ggufmoe.families.deepseek_v2 import (
    DENSE_LAYERS,
    EXPERT_WIDTH,
    EXPERTS_EVERYWHERE,
    FEED_FORWARD,
    HAS_EXPERTS,
    LATENT_ATTENTION,
    N_SHARED,
)
from ggufmoe.families.deepseek_v2 import FAMILY as DEEPSEEK_V2
from ggufmoe.families.family import Refusal, SkippedTensors
from ggufmoe.families.standard import (
    NORMS,
    WHY_FURTHER_TOKENS_ARE_SKIPPED,
    choice_bias,
    decoder,
    no_bias,
    only_silu,
    past_last_layer,
)

FAMILY = replace(
    DEEPSEEK_V2,
    architectures=("DeepseekV3ForCausalLM",),
    model_types=("deepseek_v3", "kimi_k2"),
    tensors=decoder(*NORMS, *LATENT_ATTENTION, *FEED_FORWARD, choice_bias(where=HAS_EXPERTS)),
    defaults={
        **DEEPSEEK_V2.defaults,
        "max_position_embeddings": 4096,
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 128,
        EXPERT_WIDTH: 2048,
        N_SHARED: 1,
        DENSE_LAYERS: 3,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
    },
    refusals=(
        only_silu(),
        no_bias("attention_bias"),
        EXPERTS_EVERYWHERE,
        Refusal("scoring_func", ("sigmoid", None), "'sigmoid', which DeepSeek-V3 scores experts by"),
        Refusal("topk_method", ("noaux_tc", None), "'noaux_tc', the way in which DeepSeek-V3 chooses experts"),
        Refusal("rope_interleave", (True, None), "true: llama.cpp's deepseek2 graph rotates neighbouring values"),
    ),
    skipped=(
        SkippedTensors(
            past_last_layer,
            WHY_FURTHER_TOKENS_ARE_SKIPPED,
        ),
    ),
)
