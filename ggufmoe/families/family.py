"""What a model family is, as data: how it is stored, named, computed and merged.

A family is one module of this package that binds ``FAMILY`` to a ``Family``; the other rooms ask that object and know
no family by name. Tensors have two names: in a model source the first spelling of Hugging Face (``TensorRule.hf``, with
one tensor for each expert and matrix), in a GGUF file the name that the ``gguf`` package has for ``TensorRule.tensor``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any

from ggufmoe.families.config_reader import ConfigReader
from ggufmoe.families.model_config import ModelConfig
from ggufmoe.gguf.header import GGUFValue
from ggufmoe.gguf.upstream import MODEL_ARCH_NAMES, MODEL_TENSOR, TENSOR_NAMES
from ggufmoe.weights.source_tensor import SourceTensor

Shape = tuple[int, ...]
LAYER, EXPERT = "{layer}", "{expert}"
"""What stands in a pattern of names for the number of a layer and of an expert."""

WEIGHT, BIAS = ".weight", ".bias"


def everywhere(config: ModelConfig, layer: int) -> bool:
    """A ``TensorRule.where``: every layer has the tensor."""
    return True


def never(config: ModelConfig) -> bool:
    """A ``TensorRule.optional``: the tensor has to be stored."""
    return False


def always(config: ModelConfig) -> bool:
    """A ``TensorRule.optional``: the tensor may be missing."""
    return True


def always_matters(reader: ConfigReader) -> bool:
    """A ``Refusal.unless``: the value always matters."""
    return False


def unchanged(source: SourceTensor, config: ModelConfig) -> SourceTensor:
    """A ``TensorRule.transform``: the GGUF tensor has the rows of the source."""
    return source


_F32_TENSORS = frozenset(
    {
        MODEL_TENSOR.FFN_GATE_INP,
        MODEL_TENSOR.FFN_GATE_INP_SHEXP,
        MODEL_TENSOR.SSM_CONV1D,
        MODEL_TENSOR.SHORTCONV_CONV,
    }
)
"""Tensors of the families here that ``prepare_tensors`` of llama.cpp's ``conversion/base.py`` keeps in float32."""


@dataclass(frozen=True)
class TensorRule:
    """One tensor of a model, of each layer, or of each expert of each layer: names, shape and transform."""

    tensor: Any
    """The ``MODEL_TENSOR`` of the gguf package that it becomes."""
    hf: str
    """Hugging Face's name; ``{layer}`` and ``{expert}`` stand for numbers, and say whether there is one for each."""
    shape: Callable[[ModelConfig], Shape]
    """The shape in the checkpoint, in numpy's order: of one layer's tensor, of one expert's matrix."""
    suffix: str = WEIGHT
    """What follows in the GGUF name; ``.weight``, ``.bias`` or nothing."""
    where: Callable[[ModelConfig, int], bool] = everywhere
    """Whether the layer with this number has the tensor; a tensor outside of the layers is asked with layer 0."""
    optional: Callable[[ModelConfig], bool] = never
    """Whether the tensor may be missing in a checkpoint; it is taken where it is stored."""
    transform: Callable[[SourceTensor, ModelConfig], SourceTensor] = unchanged
    """From the rows in the checkpoint to those of the GGUF file (``weights.views``); its shape is the GGUF shape. Two
    rules with one ``hf`` and different transforms split a tensor."""
    spellings: tuple[str, ...] = ()
    """Other names under which checkpoints store it, as patterns like ``hf``."""

    @property
    def is_per_layer(self) -> bool:
        """Whether each layer has this tensor."""
        return LAYER in self.hf

    @property
    def is_per_expert(self) -> bool:
        """Whether each expert of each layer has this tensor; the GGUF tensor is their stack."""
        return EXPERT in self.hf

    @property
    def is_norm(self) -> bool:
        """Whether the tensor holds the weights of a norm."""
        name: str = TENSOR_NAMES[self.tensor]
        return name.endswith("_norm")

    @property
    def is_f32(self) -> bool:
        """Whether the tensor is float32 in every GGUF file. Source: ``prepare_tensors`` of ``conversion/base.py``."""
        return self.is_norm or self.suffix != WEIGHT or self.tensor in _F32_TENSORS

    def name(self, layer: int = 0, expert: int = 0) -> str:
        """The name in the model source."""
        return numbered(self.hf, layer, expert)

    def gguf_name(self, layer: int = 0) -> str:
        """The name in the GGUF file."""
        return f"{TENSOR_NAMES[self.tensor].format(bid=layer)}{self.suffix}"


def numbered(pattern: str, layer: int, expert: int = 0) -> str:
    """A pattern of names with the numbers of a layer and an expert put in."""
    return pattern.replace(LAYER, str(layer)).replace(EXPERT, str(expert))


@dataclass(frozen=True)
class FusedTensor:
    """A stored tensor that holds several tensors of the model, such as gate and up of every expert.

    ``parts`` are patterns of ``TensorRule.hf``. Where they have an ``{expert}``, the stored tensor is a stack
    (n_expert, rows, columns) with the rows of all parts in each matrix; else it is one matrix with those rows.
    """

    stored: str
    parts: tuple[str, ...]
    transposed: bool = False
    """Whether each matrix is stored as (columns, rows)."""
    interleaved: bool = False
    """Whether rows of the parts alternate in place of following one another."""
    scales: str | None = None
    """Where the weights are quantized to MXFP4, the stored tensor of their scales: ``stored`` then has for each row
    (columns / 32, 16) bytes of codes, ``scales`` columns / 32 bytes. They become ggml's blocks of the same values."""


@dataclass(frozen=True)
class StoredLayout:
    """One way in which checkpoints store a family's tensors, where it differs from one tensor for each ``hf`` name.

    The layout of a checkpoint is found by the names that only one layout of its family has.
    """

    name: str
    """What ``merge --layout`` calls it, where a merge can write it; else any word."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Patterns of ``TensorRule.hf`` to the patterns of the names under which they are stored."""
    fused: tuple[FusedTensor, ...] = ()
    quant_method: str | None = None
    """``quant_method`` of config.json where checkpoints of this layout are quantized, and read all the same."""


@dataclass(frozen=True)
class SkippedTensors:
    """Tensors of a checkpoint that are left out, such as the layers of multi-token prediction, and why."""

    matches: Callable[[ModelConfig, str], bool]
    why: str
    """For a warning: ``NAME: leaves out n tensors: WHY``."""


class Kind(Enum):
    """What a key of config.json holds."""

    SIZE = "a whole number from 1"
    COUNT = "a whole number from 0"
    NUMBER = "a number"
    FLAG = "true or false"
    TEXT = "a text"


REQUIRED = object()
"""The default of a key that has to be there."""


@dataclass(frozen=True)
class ConfigKey:
    """A key of config.json that only this family has; its value is found in ``ModelConfig.values``.

    An absent key and null give ``default``; with ``REQUIRED`` they are an error. Other spellings stand in
    ``Family.aliases``.
    """

    name: str
    kind: Kind = Kind.SIZE
    default: Any = REQUIRED


@dataclass(frozen=True)
class Refusal:
    """A key of config.json with the values that llama.cpp's graph of this family computes; any other is an error."""

    key: str
    allowed: tuple[Any, ...]
    """Null is allowed where None is one of them. A key that neither the file nor ``Family.defaults`` has is allowed."""
    expected: str
    """For the message: ``KEY is VALUE, expected EXPECTED``; name the value and the reason."""
    unless: Callable[[ConfigReader], bool] = always_matters
    """Whether llama.cpp computes this configuration whatever the value is."""


@dataclass(frozen=True)
class HyperParameter:
    """One key of a GGUF file: ``key`` is a template of the gguf package's ``Keys``, ``kind`` makes a value of it.

    ``value`` gives None where the key is not written.
    """

    key: str
    kind: Callable[[Any], GGUFValue]
    value: Callable[[ModelConfig], Any]


class Scoring(Enum):
    """How a router's logits become the weights of the chosen experts."""

    SOFTMAX = "softmax over all experts"
    SOFTMAX_OF_CHOSEN = "softmax over the chosen experts"
    SIGMOID = "sigmoid"


@dataclass(frozen=True)
class Routing:
    """How a layer chooses experts and weights their outputs."""

    scoring: Scoring = Scoring.SOFTMAX
    normalized: bool = True
    """Whether the weights of the chosen experts are divided by their sum."""
    scale: float = 1.0
    """What the weights are multiplied with after that."""


@dataclass(frozen=True)
class Arithmetic:
    """What a forward pass computes beyond the tensors that there are.

    Biases, norms of queries and keys, shared experts and the bias of expert choice are computed where the family has a
    tensor for them; a norm of queries as wide as a head is applied to each head, another one to the whole projection.
    """

    embedding_scale: float = 1.0
    attention_scale: float | None = None
    """What the products of queries and keys are multiplied with; None: one over the root of the head size."""
    residual_scale: float = 1.0
    """What the outputs of attention and feed-forward part are multiplied with before they are added."""
    logit_scale: float = 1.0
    """What the logits are divided by."""
    norm_offset: float = 0.0
    """What is added to the weights of every norm (Gemma stores them around 0)."""
    routing: Routing = Routing()


def plain_arithmetic(config: ModelConfig) -> Arithmetic:
    """A ``Family.arithmetic``: that of Llama, and of Mixtral where there are experts."""
    return Arithmetic()


class SharedExperts(Enum):
    """The shared expert of a mixture: one that every token goes to."""

    NONE = "no shared expert"
    PLAIN = "a shared expert without prompts, whose output is added as it is"
    GATED = "a shared expert with prompts, whose output is weighted by the sigmoid of a router row of its own"


def no_obstacle(base: ModelConfig, n_expert: int, n_expert_used: int) -> str:
    """A ``MergeTarget.obstacle``: llama.cpp computes every such mixture."""
    return ""


@dataclass(frozen=True)
class MergeTarget:
    """What a recipe over dense models becomes: a mixture of this family.

    Tensors are matched by what they become in GGUF: all but the feed-forward matrices of the base are taken as they
    are, and FFN_GATE, FFN_UP and FFN_DOWN of each expert become FFN_GATE_EXP, FFN_UP_EXP and FFN_DOWN_EXP, those of a
    shared expert FFN_GATE_SHEXP, FFN_UP_SHEXP and FFN_DOWN_SHEXP.
    """

    name: str
    """What ``architecture:`` of a recipe calls it, as mergekit does; its beginning in any case is enough."""
    sources: tuple[str, ...]
    """Architectures of dense models that become this one where a recipe does not say."""
    config: Callable[[ModelConfig, int, int], dict[str, Any]]
    """Keys of config.json that differ from the base's, from the base's configuration, the number of experts, and the
    number of those used for a token. ``merge.merged`` adds what holds for every family."""
    on_request: tuple[str, ...] = ()
    """Architectures of dense models that become this one where a recipe names it."""
    only_gguf: str = ""
    """Why such a merge is written as a GGUF file alone and not as a checkpoint of transformers; else empty."""
    also_called: tuple[str, ...] = ()
    """Other names of mixtures that compute the same: a recipe that says one of them becomes this one."""
    shared: SharedExperts = SharedExperts.NONE
    """The shared expert that the mixture has; a recipe with another kind does not become this one."""
    obstacle: Callable[[ModelConfig, int, int], str] = no_obstacle
    """Why llama.cpp does not compute the mixture of a base with this number of experts and of those that a token uses;
    else empty."""


@dataclass(frozen=True)
class TokenizerRules:
    """What is particular to a family in the vocabulary of its GGUF file."""

    as_llama: bool = False
    """Whether llama.cpp's converter writes it by ``LlamaModel.set_vocab``, which adds the space prefix of
    tokenizer_config.json and special tokens of CodeLlama and StarCoder."""
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """Role (bos, eos, eot, eom, unk, ...) to the text of the token that has it, whatever the files say; a text that the
    vocabulary lacks is left out."""
    pre_tokenizer: str | None = None
    """llama.cpp's name of the pre-tokenizer where several have the same patterns; None for the first of them."""


@dataclass(frozen=True)
class Variant:
    """Configurations of a class of transformers that are another family: with other tensors or another graph."""

    holds: Callable[[ConfigReader], bool]
    family: Family
    """Its ``architectures`` is a name of ours, which no configuration has."""


def no_hyper_parameters(config: ModelConfig) -> Mapping[str, GGUFValue]:
    """A ``Family.own_keys``: there are no keys of ours."""
    return {}


def no_tensors(config: ModelConfig) -> Iterator[tuple[Any, Sequence[float]]]:
    """A ``Family.computed``: no tensor is computed."""
    return iter(())


def nothing_unexpressed(config: ModelConfig) -> Iterator[str]:
    """A ``Family.unexpressed``: llama.cpp computes all that the configuration says."""
    return iter(())


def as_many_as_layers(config: ModelConfig) -> int:
    """A ``Family.n_blocks``: one block for each layer."""
    return config.n_layer


def whole_rope(stated: Mapping[str, Any]) -> Mapping[str, Any]:
    """A ``Family.common_rope``: all of them."""
    return stated


def no_window(reader: ConfigReader) -> int | None:
    """A ``Family.sliding_window``: every token attends to all before it."""
    return None


@dataclass(frozen=True)
class Family:
    """Everything that distinguishes one model family from another. Frozen, and made once, by its module."""

    architectures: tuple[str, ...]
    """Classes of transformers (``architectures`` of config.json); the first is the name in ``ModelConfig``."""
    model_types: tuple[str, ...]
    """``model_type`` of config.json, which decides where no architecture is named."""
    arch: Any
    """The ``MODEL_ARCH`` of the gguf package."""
    tensors: tuple[TensorRule, ...]
    """Every tensor, in the order of the model: outside of the layers, of a layer, outside of the layers."""
    hyper_parameters: tuple[HyperParameter, ...]
    """The keys of the GGUF file, in the order of llama.cpp's converter."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values of keys of config.json that transformers takes where they are absent."""
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Keys of config.json to other spellings, taken where the key is absent."""
    nested_config: str | None = None
    """The key of config.json under which the language model's own keys stand, such as ``text_config``."""
    keys: tuple[ConfigKey, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    check: Callable[[ConfigReader, ModelConfig], None] | None = None
    """Further checks of the configuration; raises the error of ``ConfigReader.error``."""
    sliding_window: Callable[[ConfigReader], int | None] = no_window
    rotary_fraction: float | None = None
    """The default of ``partial_rotary_factor``; None where llama.cpp's graph rotates whole heads only."""
    common_rope: Callable[[Mapping[str, Any]], Mapping[str, Any]] = whole_rope
    """Those parameters of rope (``ModelConfig.stated_rope``) that are read for ``rope_theta``, ``rope_scaling`` and
    ``rotary_fraction``; the family reads others itself, and checks them."""
    rope_notes: frozenset[str] = frozenset()
    """Parameters of rope that are no scaling; a family that needs one reads it from ``ModelConfig.raw``."""
    layouts: tuple[StoredLayout, ...] = (StoredLayout("classic"),)
    """The first is meant where no tensor tells which it is."""
    n_blocks: Callable[[ModelConfig], int] = as_many_as_layers
    """How many numbers of layers tensors have: more than ``n_layer`` where layers of multi-token prediction follow."""
    may_lack_blocks: bool = False
    """Whether a checkpoint may lack each of the layers that follow."""
    skipped: tuple[SkippedTensors, ...] = ()
    own_output: bool = False
    """Whether llama.cpp's graph needs an output of its own: where the checkpoint's is its embedding, that is written as
    both."""
    computed: Callable[[ModelConfig], Iterator[tuple[Any, Sequence[float]]]] = no_tensors
    """``MODEL_TENSOR`` and values, float32, of tensors that no checkpoint holds."""
    own_keys: Callable[[ModelConfig], Mapping[str, GGUFValue]] = no_hyper_parameters
    """Keys of a GGUF file that are ours (``gguf.own_keys``), written after the converter's."""
    unexpressed: Callable[[ModelConfig], Iterator[str]] = nothing_unexpressed
    """What of a configuration llama.cpp leaves out for this family, a clause each, for warnings."""
    arithmetic: Callable[[ModelConfig], Arithmetic] | None = plain_arithmetic
    """None where ``merge.forward`` cannot compute the family."""
    stored_values: Mapping[str, str] | None = None
    """The names of ``keys`` to the templates of GGUF's keys that state their values, for families whose GGUF files
    a forward pass can read (``merge.gguf_weights``); None where it cannot."""
    merge: MergeTarget | None = None
    """For families of mixtures: which recipes become one."""
    variants: tuple[Variant, ...] = ()
    """Configurations of the same classes that are families of their own; the first that holds is taken."""
    tokenizer: TokenizerRules = TokenizerRules()

    @property
    def architecture(self) -> str:
        """The class of transformers by which the family is known."""
        return self.architectures[0]

    @property
    def gguf_arch(self) -> str:
        """GGUF's name of the architecture."""
        name: str = MODEL_ARCH_NAMES[self.arch]
        return name

    @property
    def quant_methods(self) -> frozenset[str]:
        """The methods of quantization (``quant_method`` of config.json) whose weights are read."""
        return frozenset(layout.quant_method for layout in self.layouts if layout.quant_method is not None)

    @property
    def has_experts(self) -> bool:
        """Whether models of the family are mixtures of experts."""
        return any(rule.is_per_expert for rule in self.tensors)

    def may_lack(self, config: ModelConfig, layer: int) -> bool:
        """Whether a checkpoint may lack the layer with this number as a whole."""
        return self.may_lack_blocks and layer >= config.n_layer

    def rule(self, tensor: Any, suffix: str = WEIGHT) -> TensorRule | None:
        """The rule of the tensor that becomes this ``MODEL_TENSOR``; None if the family has none."""
        return self._rules.get((tensor, suffix))

    @cached_property
    def _rules(self) -> Mapping[tuple[Any, str], TensorRule]:
        return {(rule.tensor, rule.suffix): rule for rule in self.tensors}

    def instances(self, config: ModelConfig) -> Iterator[tuple[TensorRule, int, int]]:
        """Every tensor of a checkpoint of this configuration as (rule, layer, expert), in the order of the model.

        Numbers that a rule does not have are 0. Matrices of experts that stand one after another in ``tensors`` come
        expert by expert. Of rules that split one tensor, the first one comes alone.
        """
        once = {rule.hf: rule for rule in reversed(self.tensors)}
        stored = [rule for rule in self.tensors if once[rule.hf] is rule]
        for per_layer, run in itertools.groupby(stored, lambda rule: rule.is_per_layer):
            rules = tuple(run)
            for layer in range(self.n_blocks(config) if per_layer else 1):
                yield from self._instances_of(rules, config, layer)

    @staticmethod
    def _instances_of(
        rules: Sequence[TensorRule], config: ModelConfig, layer: int
    ) -> Iterator[tuple[TensorRule, int, int]]:
        present = [rule for rule in rules if rule.where(config, layer)]
        for per_expert, run in itertools.groupby(present, lambda rule: rule.is_per_expert):
            group = tuple(run)
            for expert in range(config.n_expert if per_expert else 1):
                for rule in group:
                    yield rule, layer, expert

    def metadata(self, config: ModelConfig) -> dict[str, GGUFValue]:
        """The hyper-parameters of a model as keys of a GGUF file, in the converter's order, and last keys of ours."""
        stated = ((one, one.value(config)) for one in self.hyper_parameters)
        written = {one.key.format(arch=self.gguf_arch): one.kind(value) for one, value in stated if value is not None}
        return {**written, **self.own_keys(config)}
