"""What most families share: the tensors of a decoder of RMS norms, grouped attention and SwiGLU, its hyper-parameters.

Each function gives rules that a family puts together; a family that differs in one of them writes its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ggufmoe.families.config_reader import ConfigReader
from ggufmoe.families.family import (
    BIAS,
    Arithmetic,
    FusedTensor,
    HyperParameter,
    Refusal,
    Routing,
    Shape,
    StoredLayout,
    TensorRule,
    everywhere,
    unchanged,
)
from ggufmoe.families.model_config import ModelConfig
from ggufmoe.families.rope_keys import ROPE_SCALING, unexpressed_rope
from ggufmoe.gguf.header import GGUFValue
from ggufmoe.gguf.own_keys import SLIDING_WINDOW
from ggufmoe.gguf.upstream import MODEL_TENSOR, Keys
from ggufmoe.gguf.values import f32, u32
from ggufmoe.weights.source_tensor import SourceTensor
from ggufmoe.weights.views import Changed, rope_ordered

Where = Callable[[ModelConfig, int], bool]
Width = Callable[[ModelConfig], int]

_LAYER = "model.layers.{layer}."
_ATTENTION = f"{_LAYER}self_attn."


def vector(width: Width) -> Callable[[ModelConfig], Shape]:
    """The shape of a norm or a bias of this width."""
    return lambda config: (width(config),)


def matrix(rows: Width, columns: Width) -> Callable[[ModelConfig], Shape]:
    """The shape of a projection from ``columns`` to ``rows`` values."""
    return lambda config: (rows(config), columns(config))


def n_embd(config: ModelConfig) -> int:
    """The width of the residual stream."""
    return config.n_embd


def n_ff(config: ModelConfig) -> int:
    """The width of a feed-forward part (``intermediate_size``)."""
    return config.n_ff


def n_vocab(config: ModelConfig) -> int:
    """The number of tokens."""
    return config.n_vocab


def n_expert(config: ModelConfig) -> int:
    """The number of experts of a layer."""
    return config.n_expert


def head_dim(config: ModelConfig) -> int:
    """The width of one head."""
    return config.head_dim


def query_width(config: ModelConfig) -> int:
    """The width of all heads of queries."""
    return config.n_head * config.head_dim


def key_width(config: ModelConfig) -> int:
    """The width of all heads of keys, and of values."""
    return config.n_head_kv * config.head_dim


def rotated_width(config: ModelConfig) -> int:
    """How many values of each head rope rotates."""
    return int(config.head_dim * config.rotary_fraction)


def size_of(key: str) -> Width:
    """The width under a key of the family (``Family.keys``)."""
    return lambda config: config.size(key)


def number_of(key: str) -> Callable[[ModelConfig], float]:
    """The number under a key of the family (``Family.keys``)."""
    return lambda config: config.number(key)


def in_rope_order(source: SourceTensor, config: ModelConfig) -> SourceTensor:
    """A ``TensorRule.transform``: the rows of queries or keys as llama.cpp's ``llama`` graph rotates them."""
    return rope_ordered(source, config.head_dim)


def one_added(source: SourceTensor, config: ModelConfig) -> SourceTensor:
    """A ``TensorRule.transform``: the weights of a norm that a checkpoint stores around 0, as llama.cpp's graph has
    them."""
    return Changed(source, lambda values: values + np.float32(1))


def norms_around_zero(rules: Iterable[TensorRule], *, but: Any = None) -> tuple[TensorRule, ...]:
    """The rules of a model whose checkpoints store the weights of norms less one, but those of the tensor ``but``."""
    return tuple(
        replace(rule, transform=one_added) if rule.is_norm and rule.tensor is not but else rule for rule in rules
    )


EMBEDDING = TensorRule(MODEL_TENSOR.TOKEN_EMBD, "model.embed_tokens.weight", matrix(n_vocab, n_embd))
FINAL_NORM = TensorRule(MODEL_TENSOR.OUTPUT_NORM, "model.norm.weight", vector(n_embd))
OUTPUT = TensorRule(
    MODEL_TENSOR.OUTPUT,
    "lm_head.weight",
    matrix(n_vocab, n_embd),
    # taken where it is stored even if the config ties it, as in conversion/llama.py
    optional=lambda config: config.tie_embeddings,
)
NORMS = (
    TensorRule(MODEL_TENSOR.ATTN_NORM, f"{_LAYER}input_layernorm.weight", vector(n_embd)),
    TensorRule(MODEL_TENSOR.FFN_NORM, f"{_LAYER}post_attention_layernorm.weight", vector(n_embd)),
)


def decoder(*layer: TensorRule) -> tuple[TensorRule, ...]:
    """All tensors of a model: embedding, those of each layer, final norm and output."""
    return (EMBEDDING, *layer, FINAL_NORM, OUTPUT)


def attention(*, rope_order: bool = False, biases: str = "", qk_norm: Width | None = None) -> tuple[TensorRule, ...]:
    """Projections of queries, keys, values and the output of attention.

    ``rope_order``: whether llama.cpp's graph rotates neighbouring rows, so that rows of queries and keys, and their
    biases, are reordered; ``biases``: which of the letters ``qkvo`` have one; ``qk_norm``: the width of the norms of
    queries and keys, where there are such.
    """
    turned = in_rope_order if rope_order else unchanged
    parts = (
        ("q", MODEL_TENSOR.ATTN_Q, query_width, n_embd, turned),
        ("k", MODEL_TENSOR.ATTN_K, key_width, n_embd, turned),
        ("v", MODEL_TENSOR.ATTN_V, key_width, n_embd, unchanged),
        ("o", MODEL_TENSOR.ATTN_OUT, n_embd, query_width, unchanged),
    )
    rules: list[TensorRule] = []
    for letter, tensor, rows, columns, transform in parts:
        name = f"{_ATTENTION}{letter}_proj"
        rules.append(TensorRule(tensor, f"{name}.weight", matrix(rows, columns), transform=transform))
        if letter in biases:
            rules.append(TensorRule(tensor, f"{name}.bias", vector(rows), suffix=BIAS, transform=transform))
    if qk_norm is not None:
        rules += [
            TensorRule(tensor, f"{_ATTENTION}{letter}_norm.weight", vector(qk_norm))
            for letter, tensor in (("q", MODEL_TENSOR.ATTN_Q_NORM), ("k", MODEL_TENSOR.ATTN_K_NORM))
        ]
    return tuple(rules)


GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")
"""The words for the matrices of a feed-forward part, and of an expert, in nearly all families."""


def feed_forward(
    width: Width = n_ff,
    *,
    where: Where = everywhere,
    module: str = "mlp",
    words: tuple[str, str, str] = GATE_UP_DOWN,
) -> tuple[TensorRule, ...]:
    """Gate, up and down (in ``words``) of a dense SwiGLU part of the layers ``where``."""
    rows, columns = matrix(width, n_embd), matrix(n_embd, width)
    return tuple(
        TensorRule(tensor, f"{_LAYER}{module}.{word}.weight", shape, where=where)
        for word, tensor, shape in zip(
            words,
            (MODEL_TENSOR.FFN_GATE, MODEL_TENSOR.FFN_UP, MODEL_TENSOR.FFN_DOWN),
            (rows, rows, columns),
            strict=True,
        )
    )


def experts(
    width: Width = n_ff,
    *,
    where: Where = everywhere,
    module: str = "mlp",
    words: tuple[str, str, str] = GATE_UP_DOWN,
) -> tuple[TensorRule, ...]:
    """The router, and gate, up and down (in ``words``) of each expert, of the layers ``where``."""
    gate, up, down = words
    rows, columns = matrix(width, n_embd), matrix(n_embd, width)
    expert = f"{_LAYER}{module}.experts.{{expert}}."
    return (
        TensorRule(MODEL_TENSOR.FFN_GATE_INP, f"{_LAYER}{module}.gate.weight", matrix(n_expert, n_embd), where=where),
        TensorRule(MODEL_TENSOR.FFN_GATE_EXP, f"{expert}{gate}.weight", rows, where=where),
        TensorRule(MODEL_TENSOR.FFN_UP_EXP, f"{expert}{up}.weight", rows, where=where),
        TensorRule(MODEL_TENSOR.FFN_DOWN_EXP, f"{expert}{down}.weight", columns, where=where),
    )


def shared_experts(
    width: Width, *, where: Where = everywhere, module: str = "mlp.shared_experts", gate: str | None = None
) -> tuple[TensorRule, ...]:
    """Gate, up and down of the experts that every token goes to, as one matrix each, of the layers ``where``.

    ``gate`` is the module in the layer whose one row weights their output, where there is one.
    """
    rows, columns = matrix(width, n_embd), matrix(n_embd, width)
    rules = [
        TensorRule(tensor, f"{_LAYER}{module}.{word}_proj.weight", shape, where=where)
        for word, tensor, shape in (
            ("gate", MODEL_TENSOR.FFN_GATE_SHEXP, rows),
            ("up", MODEL_TENSOR.FFN_UP_SHEXP, rows),
            ("down", MODEL_TENSOR.FFN_DOWN_SHEXP, columns),
        )
    ]
    if gate is not None:
        rules.append(
            TensorRule(
                MODEL_TENSOR.FFN_GATE_INP_SHEXP,
                f"{_LAYER}{gate}.weight",
                lambda config: (1, config.n_embd),
                where=where,
            )
        )
    return tuple(rules)


def choice_bias(*, where: Where = everywhere, name: str = "mlp.gate.e_score_correction_bias") -> TensorRule:
    """What is added to an expert's score when experts are chosen, and not to its weight."""
    shape = vector(n_expert)
    return TensorRule(MODEL_TENSOR.FFN_EXP_PROBS_B, f"{_LAYER}{name}", shape, suffix=BIAS, where=where)


def layers_from(key: str) -> Where:
    """A ``TensorRule.where``: the layers from the number on that a key of the family states."""
    return lambda config, layer: layer >= config.size(key)


def layers_before(key: str) -> Where:
    """A ``TensorRule.where``: the layers before the number that a key of the family states."""
    return lambda config, layer: layer < config.size(key)


def past_last_layer(config: ModelConfig, name: str) -> bool:
    """Whether a tensor of a checkpoint is one of a layer beyond ``num_hidden_layers``."""
    number = re.match(r"model\.layers\.(\d{1,9})\.", name)
    return number is not None and int(number[1]) >= config.n_layer


WHY_FURTHER_TOKENS_ARE_SKIPPED = (
    "they predict further tokens (multi-token prediction), and llama.cpp's converter leaves them out as well"
)
"""``SkippedTensors.why`` of layers of multi-token prediction that the converter never writes."""


def fused_experts(name: str, module: str, rules: tuple[TensorRule, ...], *, stored: str = "mlp") -> StoredLayout:
    """The layout of transformers 5 in memory and of mergekit, for the rules that ``experts`` gives for ``module``.

    ``experts.gate_up_proj`` (n_expert, 2 n_ff, n_embd) holds the gate rows and then the up rows of each expert,
    ``experts.down_proj`` (n_expert, n_embd, n_ff) the down projections; ``stored`` is the module's stored name.
    """
    router, gate, up, down = (rule.hf for rule in rules)
    prefix = f"{_LAYER}{stored}."
    return StoredLayout(
        name,
        renamed={router: router.replace(f"{_LAYER}{module}.", prefix)},
        fused=(
            FusedTensor(f"{prefix}experts.gate_up_proj", (gate, up)),
            FusedTensor(f"{prefix}experts.down_proj", (down,)),
        ),
    )


def _head_size_stated(config: ModelConfig) -> int | None:
    return None if config.raw.get("head_dim") is None else config.head_dim


def common_parameters(
    *, head_size: Callable[[ModelConfig], int | None] = _head_size_stated
) -> tuple[HyperParameter, ...]:
    """The keys of every family, in the order of the converter's ``TextModel.set_gguf_parameters``.

    ``head_size`` is for key_length and value_length, which the converter writes where transformers' configuration has
    a ``head_dim``; by default that is where config.json states one.
    """
    return (
        HyperParameter(Keys.LLM.BLOCK_COUNT, u32, lambda config: config.n_layer),
        HyperParameter(Keys.LLM.CONTEXT_LENGTH, u32, lambda config: config.n_ctx),
        HyperParameter(Keys.LLM.EMBEDDING_LENGTH, u32, n_embd),
        HyperParameter(Keys.LLM.FEED_FORWARD_LENGTH, u32, n_ff),
        HyperParameter(Keys.Attention.HEAD_COUNT, u32, lambda config: config.n_head),
        HyperParameter(Keys.Attention.HEAD_COUNT_KV, u32, lambda config: config.n_head_kv),
        *ROPE_SCALING,
        HyperParameter(Keys.Rope.FREQ_BASE, f32, lambda config: config.rope_theta),
        HyperParameter(Keys.Attention.LAYERNORM_RMS_EPS, f32, lambda config: config.rms_norm_eps),
        HyperParameter(Keys.LLM.EXPERT_COUNT, u32, lambda config: config.n_expert or None),
        HyperParameter(Keys.LLM.EXPERT_USED_COUNT, u32, lambda config: config.n_expert_used or None),
        HyperParameter(Keys.Attention.KEY_LENGTH, u32, head_size),
        HyperParameter(Keys.Attention.VALUE_LENGTH, u32, head_size),
    )


def only_silu(reason: str = "the only activation that llama.cpp has for this family") -> Refusal:
    """The refusal of another activation than silu."""
    return Refusal("hidden_act", ("silu", "swish"), f"'silu', {reason}")


def no_bias(key: str) -> Refusal:
    """The refusal of biases that a key of the configuration switches on."""
    return Refusal(key, (False, None), "false: biases are not supported")


def own_output(graph: str) -> Refusal:
    """The refusal of an output that is the embedding, for a graph of llama.cpp that does not share them."""
    return Refusal(
        "tie_word_embeddings", (False, None), f"false: llama.cpp's {graph} graph needs an output matrix of its own"
    )


def rescaled_weights(graph: str) -> Refusal:
    """The refusal of experts' weights that are rescaled to one, for a graph of llama.cpp that never does that."""
    return Refusal(
        "norm_topk_prob",
        (False, None),
        f"false: llama.cpp's {graph} graph never rescales the weights of the chosen experts to one, and with true it "
        "would answer as another model, unless every expert is chosen for every token (num_experts_per_tok)",
        unless=every_expert_is_used,
    )


def unrescaled_weights(graph: str) -> Refusal:
    """The refusal of experts' weights that are not rescaled to one, for a graph of llama.cpp that always does that."""
    return Refusal(
        "norm_topk_prob",
        (True,),
        f"true: llama.cpp's {graph} graph always rescales the weights of the chosen experts to one, and with false it "
        "would answer as another model, unless every expert is chosen for every token (num_experts_per_tok)",
        unless=every_expert_is_used,
    )


def dense_layers(graph: str) -> tuple[Refusal, ...]:
    """The refusals of layers without experts in the configurations of Qwen, for a graph that has none."""
    why = f"llama.cpp's {graph} graph has experts in every layer"
    return (
        Refusal("decoder_sparse_step", (1,), f"1: {why}"),
        Refusal("mlp_only_layers", ([], None), f"no layers: {why}"),
    )


def every_expert_is_used(reader: ConfigReader) -> bool:
    """A ``Refusal.unless`` for how experts are weighted: the weights of all of them add up to one in any case."""
    return bool(reader.value("num_experts_per_tok") == reader.value("num_local_experts"))


def not_rescaled(config: ModelConfig) -> Arithmetic:
    """A ``Family.arithmetic``: the weights of the chosen experts are their shares among all experts."""
    return Arithmetic(routing=Routing(normalized=False))


def one_kind_of_layers(reader: ConfigReader, config: ModelConfig) -> None:
    """A ``Family.check``: refuse a model whose layers attend in different ways."""
    kinds = reader.value("layer_types")
    if isinstance(kinds, list) and len(set(map(str, kinds))) > 1:
        raise reader.error("layer_types", "one kind of attention in all layers")


def kinds_of_layers(reader: ConfigReader, config: ModelConfig, *allowed: str) -> None:
    """Refuse a ``layer_types`` that does not give each layer one of the ``allowed`` kinds; it may be absent."""
    kinds = reader.value("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or len(kinds) != config.n_layer):
        raise reader.error("layer_types", f"a list with a kind for each of {config.n_layer} layers")
    if kinds is not None and any(kind not in allowed for kind in kinds):
        raise reader.error("layer_types", f"no other kinds than {' and '.join(allowed)}")


def rotated_pairs(reader: ConfigReader, config: ModelConfig) -> None:
    """A ``Family.check``: refuse a part of each head that is not a number of pairs."""
    if rotated_width(config) % 2 or not rotated_width(config):
        raise reader.error("partial_rotary_factor", f"an even number of rotated values in a head of {config.head_dim}")


def heads_of_whole_width(reader: ConfigReader, config: ModelConfig) -> None:
    """A ``Family.check``: one kind of layers, whose heads are together as wide as the residual stream."""
    one_kind_of_layers(reader, config)
    if config.n_head * config.head_dim != config.n_embd:
        raise reader.error("head_dim", "hidden_size / num_attention_heads, which llama.cpp takes for this family")


def narrow_heads(base: ModelConfig, n_expert: int, n_expert_used: int) -> str:
    """A ``MergeTarget.obstacle``: heads of another width than a graph without a key for it takes."""
    if base.n_head * base.head_dim == base.n_embd:
        return ""
    return f"its heads are {base.head_dim} wide, and llama.cpp takes hidden_size / num_attention_heads for this family"


def stated_window(reader: ConfigReader) -> int | None:
    """A ``Family.sliding_window``: the one that the configuration states."""
    return reader.optional_size("sliding_window")


def unapplied_window(config: ModelConfig) -> int | None:
    """The sliding window where it is shorter than the context; None where it changes nothing."""
    window = config.sliding_window
    return window if window is not None and window < config.n_ctx else None


def window_note(config: ModelConfig) -> Mapping[str, GGUFValue]:
    """A ``Family.own_keys``: the sliding window that llama.cpp's graph does not apply."""
    window = unapplied_window(config)
    return {} if window is None else {SLIDING_WINDOW: u32(window)}


def unexpressed(config: ModelConfig) -> Iterator[str]:
    """A ``Family.unexpressed`` for graphs without sliding window: window, code of the model's own, and rope scaling."""
    if (window := unapplied_window(config)) is not None:
        yield (
            f"each token attends to the last {window} tokens only (sliding_window), and llama.cpp has no such window "
            f"for this architecture: past position {window} the answers are another model's, so keep the context "
            f"at {window} tokens (--ctx-size)"
        )
    yield from unexpressed_code_and_rope(config)


def unexpressed_code_and_rope(config: ModelConfig) -> Iterator[str]:
    """A ``Family.unexpressed`` for graphs that apply the sliding window: code of the model's own, and rope scaling."""
    code: Any = config.raw.get("auto_map")
    if isinstance(code, dict) and "AutoModelForCausalLM" in code:
        yield f"its own modelling code (auto_map) is not run; it is converted as a plain {config.architecture}"
    yield from unexpressed_rope(config)
