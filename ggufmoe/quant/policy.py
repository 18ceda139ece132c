"""Chooses the quantization type of every tensor of a model from names and shapes.

Applies the rules of ``mixes`` to tensors in llama.cpp's order, and refuses at plan time what would fail, or abort the
process, during quantization. ``importances`` reads importance matrices, ``kernels`` quantizes.

Source: ``src/llama-quant.cpp`` of llama.cpp at the pinned commit; the tests compare every choice with
``llama_model_quantize``.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from ggufmoe.errors import ArchitectureError, ImatrixError, OptionError, TensorMismatchError
from ggufmoe.gguf.names import OUTPUT, PER_LAYER_TOKEN_EMBEDDING, layer_of, llama_quantize_order, without_layer
from ggufmoe.gguf.types import GGMLType
from ggufmoe.gguf.upstream import LLAMA
from ggufmoe.quant import mixes
from ggufmoe.quant.chosen_mix import ChosenMix
from ggufmoe.quant.filetypes import ABORTS_WITHOUT_IMATRIX, FileType, parse_tensor_type, suggest
from ggufmoe.quant.mixes import Role, Rule

_LOG = logging.getLogger("ggufmoe")
_MANY_TENSORS = 1 << 14  # names whose roles are remembered


@dataclass(frozen=True)
class TensorShape:
    """One tensor: its GGUF name, its shape in numpy's order, and its type in the lossless GGUF.

    ``shape`` is (cols,), (rows, cols) or (experts, rows, cols).
    """

    name: str
    shape: tuple[int, ...]
    source_type: GGMLType

    @property
    def n_cols(self) -> int:
        """Weights in a row; a type fits if this is a multiple of its block size."""
        return self.shape[-1]

    @property
    def is_matrix(self) -> bool:
        """Whether ggml counts at least two dimensions (leading ones of size 1 do not count)."""
        return any(size > 1 for size in self.shape[:-1])

    @property
    def is_expert_stack(self) -> bool:
        """Whether the tensor holds more than one matrix."""
        return len(self.shape) > 2 and self.shape[-3] > 1


@dataclass(frozen=True)
class ModelShape:
    """The hyper-parameters on which the mixes depend; ``n_expert`` is 0 for a dense model."""

    n_layer: int
    n_head: int
    n_head_kv: int
    n_expert: int = 0
    architecture: str = LLAMA

    @property
    def n_gqa(self) -> int:
        """Query heads per key-value head, rounded down."""
        return self.n_head // self.n_head_kv if self.n_head_kv else 0

    @property
    def is_70b(self) -> bool:
        """Whether libllama treats the model as Llama 70B: a llama of 80 layers with grouped-query attention."""
        grouped = self.n_head != self.n_head_kv
        return self.architecture == LLAMA and self.n_layer == 80 and grouped and self.n_expert != 8


@dataclass(frozen=True)
class TypePolicy:
    """The requested file type, and the exceptions to its mix.

    ``tensor_types`` are pairs of a regular expression and a type; the first expression that matches anywhere in a
    tensor's name overrides the mix. As in llama.cpp, they apply only if the file type is a quantized one.
    ``output_tensor_type`` and ``token_embedding_type`` are used without a fallback. ``pure`` gives all tensors the
    default type of the file type. With ``mix`` only the types in it count. Raises OptionError for a type that cannot be
    written.
    """

    file_type: FileType
    tensor_types: tuple[tuple[str, GGMLType], ...] = ()
    output_tensor_type: GGMLType | None = None
    token_embedding_type: GGMLType | None = None
    pure: bool = False
    mix: ChosenMix | None = None

    def __post_init__(self) -> None:
        named = (given for _, given in self.tensor_types)
        for given in (self.output_tensor_type, self.token_embedding_type, *named):
            if given is not None:
                parse_tensor_type(given.name)


def parse_override(text: str) -> tuple[str, GGMLType]:
    """Parse ``PATTERN=TYPE``, the value of ``--tensor-type``, into a pair for ``TypePolicy.tensor_types``.

    Converts the pattern to lower case, as llama-quantize does, except for escapes such as ``\\D``, whose meaning would
    be inverted. Raises OptionError if a half is missing, the type is unknown, or the pattern is not a regular
    expression.
    """
    pattern, _, type_name = text.rpartition("=")
    if not (pattern and type_name):
        raise OptionError(f"--tensor-type {text!r} is not of the form PATTERN=TYPE, for example ffn_down=q6_k")
    pattern = re.sub(r"\\.|[^\\]", lambda part: part[0] if part[0][0] == "\\" else part[0].lower(), pattern)
    _compile(pattern)
    return pattern, parse_tensor_type(type_name)


def choose_types(
    tensors: Sequence[TensorShape],
    model: ModelShape,
    policy: TypePolicy,
    imatrix_names: Collection[str] | None = None,
) -> dict[str, GGMLType]:
    """Map the name of every tensor, in the given order, to its type, equal to the choice of ``llama_model_quantize``.

    ``imatrix_names`` are the tensors that have importances; None means that no importance matrix was given, on which
    some mixes depend.

    Raises OptionError if the options do not fit the model, ImatrixError if a type needs importances that are missing,
    TensorMismatchError if a tensor's layer number is not below ``model.n_layer``, and ArchitectureError for an
    architecture whose rules are not in ``mixes``.
    """
    if model.architecture in mixes.OWN_RULES:
        raise ArchitectureError(f"{model.architecture} has quantization rules of its own; quantize it with llama.cpp")
    overrides = _overrides(tensors, policy, warn=True)
    chooser = _Chooser(tensors, model, policy, overrides, imatrix_names is not None)
    walk = sorted(tensors, key=lambda tensor: llama_quantize_order(tensor.name))
    chosen = {tensor.name: chooser.choose(tensor) for tensor in walk}
    types = {tensor.name: chosen[tensor.name] for tensor in tensors}
    missing = required_imatrix(tensors, types, policy.file_type, imatrix_names or ())
    if missing:
        raise ImatrixError(_missing_imatrix_message(missing, types, policy.file_type, imatrix_names is not None))
    return types


def unfit_types(
    tensors: Sequence[TensorShape],
    model: ModelShape,
    policy: TypePolicy,
    imatrix_names: Collection[str] | None = None,
) -> dict[str, GGMLType]:
    """By name: the type that the mix has for a tensor, where its blocks do not fit the rows and another one was taken.

    The arguments are those of ``choose_types``, which gives the type that was taken.
    """
    chooser = _Chooser(tensors, model, policy, _overrides(tensors, policy, warn=False), imatrix_names is not None)
    for tensor in sorted(tensors, key=lambda tensor: llama_quantize_order(tensor.name)):
        chooser.choose(tensor)
    return chooser.unfit


def asked_types(tensors: Sequence[TensorShape], policy: TypePolicy) -> dict[str, GGMLType]:
    """By name: the types that the options give to single tensors, whatever the mix is. Raises OptionError."""
    overrides = _overrides(tensors, policy, warn=True)
    asked: dict[str, GGMLType] = {}
    for tensor in filter(may_quantize, tensors):
        override = next((override for override in overrides if override.pattern.search(tensor.name)), None)
        role = role_of(tensor.name)
        exact = {Role.OUTPUT: policy.output_tensor_type, Role.TOKEN_EMBEDDING: policy.token_embedding_type}.get(role)
        if exact is not None:
            asked[tensor.name] = _exact(tensor, exact)
        elif override is not None:
            asked[tensor.name] = fitting_type(tensor, override.type)
    return asked


def required_imatrix(
    tensors: Iterable[TensorShape],
    types: dict[str, GGMLType],
    file_type: FileType,
    imatrix_names: Collection[str],
) -> tuple[str, ...]:
    """The tensors that need importances for their type in ``types`` and are not among ``imatrix_names``.

    Includes the token embedding and the output where ggml would abort the process; llama.cpp does not check these.
    """
    return tuple(
        tensor.name
        for tensor in tensors
        if tensor.name not in imatrix_names
        and types[tensor.name] is not tensor.source_type
        and _needs_imatrix(tensor.name, types[tensor.name], file_type)
    )


def _needs_imatrix(name: str, type: GGMLType, file_type: FileType) -> bool:
    if type in ABORTS_WITHOUT_IMATRIX:
        return True
    if name == OUTPUT or name in mixes.TOKEN_EMBEDDINGS:
        return False
    return type in mixes.NEEDS_IMATRIX or (type is GGMLType.Q2_K and file_type is FileType.Q2_K_S)


def _missing_imatrix_message(
    missing: Sequence[str], types: dict[str, GGMLType], file_type: FileType, given: bool
) -> str:
    listed = ", ".join(f"{name} ({types[name].name})" for name in missing[:4])
    more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
    if given:
        return f"{file_type.name}: the importance matrix has no entry for {listed}{more}; compute one for this model"
    return f"{file_type.name} needs an importance matrix for {listed}{more}; give one with --imatrix"


@dataclass(frozen=True)
class _Override:
    pattern: re.Pattern[str]
    type: GGMLType


def _overrides(tensors: Sequence[TensorShape], policy: TypePolicy, *, warn: bool) -> tuple[_Override, ...]:
    overrides = tuple(_Override(_compile(pattern), given) for pattern, given in policy.tensor_types)
    for override in overrides:
        found = [tensor for tensor in tensors if override.pattern.search(tensor.name)]
        if not found:
            raise OptionError(_no_match_message(override, tensors))
        if warn and not any(may_quantize(tensor) for tensor in found):
            _LOG.warning("tensor type %s has no effect: %s is never quantized", override.pattern.pattern, found[0].name)
    if overrides and not policy.file_type.default_type.is_quantized:
        if warn:
            _LOG.warning("tensor types have no effect in a %s file", policy.file_type.name)
        return ()
    return overrides


# C++ regular expressions support these inside brackets, Python's do not
_POSIX_CLASSES = {"[:digit:]": "0-9", "[:lower:]": "a-z", "[:alpha:]": "A-Za-z", "[:alnum:]": "0-9A-Za-z"}


def _compile(pattern: str) -> re.Pattern[str]:
    plain = pattern
    for name, characters in _POSIX_CLASSES.items():
        plain = plain.replace(name, characters)
    try:
        return re.compile(plain, re.ASCII)
    except (re.error, OverflowError, RecursionError) as error:
        raise OptionError(f"tensor type pattern {pattern!r} is not a regular expression: {error}") from error


def _no_match_message(override: _Override, tensors: Sequence[TensorShape]) -> str:
    families = dict.fromkeys(without_layer(tensor.name).removesuffix(".weight") for tensor in tensors)
    plain = re.sub(r"^\W*blk\W*(\d|\W)*|[^a-z_]+weight\W*$", "", override.pattern.pattern)
    asked = f"{override.pattern.pattern}={override.type.name}"
    return f"tensor type {asked} matches no tensor of this model; {suggest(plain, families)}"


def may_quantize(tensor: TensorShape) -> bool:
    """Whether llama.cpp quantizes this tensor at all: a weight matrix that is neither small nor sensitive."""
    return tensor.is_matrix and _is_quantized_by_name(tensor.name)


@lru_cache(_MANY_TENSORS)
def _is_quantized_by_name(name: str) -> bool:
    return (
        name.endswith("weight")
        and name not in mixes.NEVER_QUANTIZED_NAMES
        and not any(part in name for part in mixes.NEVER_QUANTIZED)
    )


@lru_cache(_MANY_TENSORS)
def role_of(name: str) -> Role:
    """The role of the tensor with this GGUF name."""
    if name == OUTPUT:
        return Role.OUTPUT
    if name in mixes.TOKEN_EMBEDDINGS:
        return Role.TOKEN_EMBEDDING
    return next((role for part, role in mixes.ROLE_OF_NAME if part in name), Role.OTHER)


_FFN = (Role.FFN_GATE, Role.FFN_UP, Role.FFN_DOWN)
_FILE_DEFAULT = Rule(None)


@dataclass
class _Chooser:
    """Chooses types for the tensors of one model, in llama.cpp's order.

    Counts the tensors of each role that reach the mix, because most rules use that count as the layer number.
    """

    tensors: Sequence[TensorShape]
    model: ModelShape
    policy: TypePolicy
    overrides: tuple[_Override, ...]
    has_imatrix: bool
    seen: Counter[Role] = field(default_factory=Counter)
    unfit: dict[str, GGMLType] = field(default_factory=dict)
    """By name: the type that a tensor could not get because of the length of its rows."""

    def __post_init__(self) -> None:
        roles = Counter(role_of(tensor.name) for tensor in self.tensors)
        self.n_attention_v = roles[Role.ATTENTION_V]
        self.is_tied = not roles[Role.OUTPUT]

    def choose(self, tensor: TensorShape) -> GGMLType:
        role = role_of(tensor.name)
        if not may_quantize(tensor):
            return tensor.source_type
        if self.policy.mix is not None:
            return self.policy.mix.types.get(tensor.name, tensor.source_type)
        override = next((override for override in self.overrides if override.pattern.search(tensor.name)), None)
        # the per-layer embedding is a large table of its own, for which an explicit --tensor-type counts
        is_named = tensor.name == PER_LAYER_TOKEN_EMBEDDING and override is not None
        if role is Role.TOKEN_EMBEDDING and self.policy.token_embedding_type and not is_named:
            return _exact(tensor, self.policy.token_embedding_type)
        if role is Role.OUTPUT and self.policy.output_tensor_type:
            return _exact(tensor, self.policy.output_tensor_type)
        if not self.policy.file_type.default_type.is_quantized:
            return self.policy.file_type.default_type
        if override is not None:
            wanted = override.type
        else:
            wanted = self.policy.file_type.default_type if self.policy.pure else self._mixed(tensor, role)
        if tensor.n_cols % wanted.block_size:
            self.unfit[tensor.name] = wanted
        return fitting_type(tensor, wanted)

    def _mixed(self, tensor: TensorShape, role: Role) -> GGMLType:
        if role is Role.TOKEN_EMBEDDING and self.is_tied:
            role = Role.OUTPUT
        if role is Role.OUTPUT and self.policy.output_tensor_type:
            return self.policy.output_tensor_type
        file_type = self.policy.file_type
        if file_type is FileType.MXFP4_MOE:
            return GGMLType.MXFP4 if tensor.is_expert_stack and role is not Role.OUTPUT else GGMLType.Q8_0
        layer, n_layer = self._place(tensor, role)
        rules = (rule for rule in mixes.RULES[role] if self._applies(rule, tensor, layer, n_layer))
        rule = next(rules, _FILE_DEFAULT)
        if rule.misfit:
            self.unfit[tensor.name] = file_type.default_type
        chosen = rule.type or file_type.default_type
        if role is Role.ATTENTION_V and self.model.is_70b and file_type not in mixes.LOW_BIT:
            return mixes.MORE_BITS_FOR_70B.get(chosen, chosen)
        return chosen

    def _applies(self, rule: Rule, tensor: TensorShape, layer: int, n_layer: int) -> bool:
        file_type, model = self.policy.file_type, self.model
        return (
            file_type in rule.files
            and rule.min_experts <= model.n_expert
            and (rule.max_experts is None or model.n_expert <= rule.max_experts)
            and rule.min_gqa <= model.n_gqa
            and rule.imatrix in (None, self.has_imatrix)
            and (not rule.misfit or tensor.n_cols % file_type.default_type.block_size != 0)
            and rule.layers.include(layer, n_layer)
        )

    def _place(self, tensor: TensorShape, role: Role) -> tuple[int, int]:
        """The layer number that the rules use for this tensor, and the number of layers; counts the tensor."""
        counted = self.seen[role]
        self.seen[role] += 1
        if role not in _FFN:
            return counted, self.n_attention_v
        if self.model.n_expert < 2 or self.policy.file_type in mixes.LOW_BIT:
            return counted, self.model.n_layer
        layer = layer_of(tensor.name)
        if layer is None or layer >= self.model.n_layer:
            raise TensorMismatchError(
                f"{tensor.name} is in none of the {self.model.n_layer} layers that the model's header declares"
            )
        return layer, self.model.n_layer


def _exact(tensor: TensorShape, type: GGMLType) -> GGMLType:
    if tensor.n_cols % type.block_size:
        raise OptionError(
            f"{tensor.name} cannot be {type.name}: its row size of {tensor.n_cols} weights is not a multiple of the "
            f"block size {type.block_size}; choose a type with a smaller block, such as q8_0 or f16"
        )
    return type


def fitting_type(tensor: TensorShape, wanted: GGMLType) -> GGMLType:
    """``wanted``, or what llama.cpp takes in its place where its blocks do not fit the rows. Raises OptionError."""
    if tensor.n_cols % wanted.block_size == 0:
        return wanted
    smaller = mixes.FALLBACK.get(wanted, wanted)
    if smaller.block_size > 32:
        raise OptionError(
            f"{tensor.name} cannot be {wanted.name}: its row size of {tensor.n_cols} weights is not a multiple of the "
            f"block size {wanted.block_size}, and no fallback type fits; choose another file type, or --tensor-type"
        )
    return GGMLType.F16 if tensor.n_cols % smaller.block_size else smaller
