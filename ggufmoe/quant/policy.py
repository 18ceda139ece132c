"""Which tensor gets which type: the choice for a whole model, from names and shapes alone.

Walks the tables of ``mixes`` in llama.cpp's order, and refuses at plan time what would fail, or abort the process,
hours later. It leaves reading an importance matrix to ``imatrix`` and making bytes to ``kernels``.

Source of the facts: ``src/llama-quant.cpp`` of llama.cpp at the pinned commit; the tests compare every choice with
``llama_model_quantize``.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from ggufmoe.errors import ArchitectureError, ImatrixError, OptionError, TensorMismatchError
from ggufmoe.gguf.names import OUTPUT, PER_LAYER_TOKEN_EMBEDDING, layer_of, llama_quantize_order, without_layer
from ggufmoe.gguf.types import GGMLType
from ggufmoe.gguf.upstream import LLAMA
from ggufmoe.quant import mixes
from ggufmoe.quant.filetypes import ABORTS_WITHOUT_IMATRIX, FileType, parse_tensor_type, suggest
from ggufmoe.quant.mixes import Role, Rule

_LOG = logging.getLogger("ggufmoe")


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
        """Weights in a row, which the block of a type has to divide."""
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
    """What the mixes look at besides names; ``n_expert`` is 0 for a dense model."""

    n_layer: int
    n_head: int
    n_head_kv: int
    n_expert: int = 0
    architecture: str = LLAMA

    @property
    def n_gqa(self) -> int:
        """Query heads for each key-value head, rounded down."""
        return self.n_head // self.n_head_kv if self.n_head_kv else 0

    @property
    def is_70b(self) -> bool:
        """Whether libllama takes the model for Llama 70B (it asks only for the layers and for grouped heads)."""
        grouped = self.n_head != self.n_head_kv
        return self.architecture == LLAMA and self.n_layer == 80 and grouped and self.n_expert != 8


@dataclass(frozen=True)
class TypePolicy:
    """What was asked for: a file type, and what departs from its mix.

    ``tensor_types`` are pairs of a regular expression and a type; the first that is found anywhere in a tensor's name
    wins over the mix. As in llama.cpp they count only where the file type is a quantized one. The types of the output
    and of the token embedding are taken as they are, without a fallback. ``pure`` gives one type to all. Raises
    OptionError for a type that cannot be written.
    """

    file_type: FileType
    tensor_types: tuple[tuple[str, GGMLType], ...] = ()
    output_tensor_type: GGMLType | None = None
    token_embedding_type: GGMLType | None = None
    pure: bool = False

    def __post_init__(self) -> None:
        named = (given for _, given in self.tensor_types)
        for given in (self.output_tensor_type, self.token_embedding_type, *named):
            if given is not None:
                parse_tensor_type(given.name)


def parse_override(text: str) -> tuple[str, GGMLType]:
    """``PATTERN=TYPE`` of ``--tensor-type`` as a pair for ``TypePolicy.tensor_types``.

    The pattern is put into lower case, as llama-quantize does, but for escapes such as ``\\D``, which would mean their
    opposite. Raises OptionError if either half is missing or unknown, or if the pattern is not a regular expression.
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
    """The type of every tensor, by name, in the order given.

    ``imatrix_names`` are the tensors for which there is an importance matrix, None when none was given at all: some
    mixes ask which. Pure: the same arguments give the same types, equal to those of ``llama_model_quantize``.

    Raises OptionError where the options do not fit the model, ImatrixError where a type cannot do without an
    importance matrix, TensorMismatchError where a layer is not the model's, ArchitectureError for the few families
    whose mixes are others.
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


def required_imatrix(
    tensors: Iterable[TensorShape],
    types: dict[str, GGMLType],
    file_type: FileType,
    imatrix_names: Collection[str],
) -> tuple[str, ...]:
    """The tensors whose chosen type needs an importance matrix that is not among ``imatrix_names``.

    llama.cpp lets embeddings and output pass, and ggml then aborts the process for some types; here they are named.
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
        return f"{file_type.name}: the importance matrix has no entry for {listed}{more}; make one for this model"
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


# C++'s regular expressions know these inside brackets, Python's do not
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
    kinds = dict.fromkeys(without_layer(tensor.name).removesuffix(".weight") for tensor in tensors)
    plain = re.sub(r"^\W*blk\W*(\d|\W)*|[^a-z_]+weight\W*$", "", override.pattern.pattern)
    asked = f"{override.pattern.pattern}={override.type.name}"
    return f"tensor type {asked} matches no tensor of this model; {suggest(plain, kinds)}"


def may_quantize(tensor: TensorShape) -> bool:
    """Whether llama.cpp ever changes this tensor's type: a matrix of weights that is neither small nor delicate."""
    return (
        tensor.is_matrix
        and tensor.name.endswith("weight")
        and tensor.name not in mixes.NEVER_QUANTIZED_NAMES
        and not any(part in tensor.name for part in mixes.NEVER_QUANTIZED)
    )


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
    """One walk over a model. It counts the tensors that the mix decides: their place in the count is their layer."""

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
        if role is Role.TOKEN_EMBEDDING and self.policy.token_embedding_type and not self._is_named(tensor):
            return _exact(tensor, self.policy.token_embedding_type)
        if role is Role.OUTPUT and self.policy.output_tensor_type:
            return _exact(tensor, self.policy.output_tensor_type)
        if not self.policy.file_type.default_type.is_quantized:
            return self.policy.file_type.default_type
        wanted = self._wanted(tensor, role)
        if tensor.n_cols % wanted.block_size:
            self.unfit[tensor.name] = wanted
        return _fallback(tensor, wanted)

    def _is_named(self, tensor: TensorShape) -> bool:
        # a large table of its own, which an explicit --tensor-type may name
        per_layer = tensor.name == PER_LAYER_TOKEN_EMBEDDING
        return per_layer and any(override.pattern.search(tensor.name) for override in self.overrides)

    def _wanted(self, tensor: TensorShape, role: Role) -> GGMLType:
        for override in self.overrides:
            if override.pattern.search(tensor.name):
                return override.type
        return self.policy.file_type.default_type if self.policy.pure else self._mixed(tensor, role)

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
        """The layer that the rules see, and how many there are."""
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
            f"{tensor.name} cannot be {type.name}: its rows of {tensor.n_cols} are not a multiple of "
            f"{type.block_size}; ask for a type with a smaller block, such as q8_0 or f16"
        )
    return type


def _fallback(tensor: TensorShape, wanted: GGMLType) -> GGMLType:
    if tensor.n_cols % wanted.block_size == 0:
        return wanted
    smaller = mixes.FALLBACK.get(wanted, wanted)
    if smaller.block_size > 32:
        raise OptionError(
            f"{tensor.name} cannot be {wanted.name}: its rows of {tensor.n_cols} are not a multiple of "
            f"{wanted.block_size}, and there is nothing to fall back to; choose another file type, or --tensor-type"
        )
    return GGMLType.F16 if tensor.n_cols % smaller.block_size else smaller
