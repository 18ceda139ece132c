"""The best file of a given size: candidates for each tensor, their errors, and the mix that the search finds.

``SizeMixer`` is what plans of exports and of quantizations call to choose the types (``export.unmixed.Mixer``).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ggufmoe.errors import ImatrixError, OptionError, OutputError
from ggufmoe.export.unmixed import UnmixedModel
from ggufmoe.folders import cache_directory
from ggufmoe.gguf.header import padded
from ggufmoe.gguf.names import OUTPUT
from ggufmoe.gguf.types import GGMLType
from ggufmoe.gguf.upstream import DEFAULT_ALIGNMENT
from ggufmoe.options import SizeTarget
from ggufmoe.quant.chosen_mix import ChosenMix, StandardMix
from ggufmoe.quant.filetypes import FileType
from ggufmoe.quant.kernels import QuantizerName
from ggufmoe.quant.policy import (
    TypePolicy,
    asked_types,
    choose_types,
    fitting_type,
    may_quantize,
    required_imatrix,
)
from ggufmoe.sizing.error_table import ErrorTable, WantedErrors, load_table, measure_errors, sampled_bytes, save_table
from ggufmoe.sizing.search import Choice, best_choices
from ggufmoe.sizing.sensitivity_file import Sensitivity
from ggufmoe.sizing.weightings import weightings
from ggufmoe.version import __version__
from ggufmoe.work import CancelFlag, OnProgress, Work
from ggufmoe.writing.plan import PlannedTensor, WritePlan

_LOG = logging.getLogger("ggufmoe")

K_TYPES = tuple(GGMLType[name] for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0"))
ALL_TYPES = (
    *(GGMLType[name] for name in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS")),
    *K_TYPES,
)
TYPES: Mapping[str, tuple[GGMLType, ...]] = {"k": K_TYPES, "all": ALL_TYPES}
"""By the word of ``--types``: the types that a tensor may get."""
_SHORT_ROW_TYPES = tuple(GGMLType[name] for name in ("Q4_0", "IQ4_NL", "Q4_1", "Q5_0", "Q5_1"))
"""With ``all``, also those that fit rows which the blocks of 256 weights of the others do not divide."""
_COMPARED = (
    "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0",
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", "IQ4_XS",
)  # fmt: skip
"""The standard mixes that a mix is compared with."""
_TABLE_VERSION = 1
_MOSTLY_USED = 0.995
_ROUNDS = 4


@dataclass(frozen=True)
class SizeMixer:
    """Chooses the mix of the size that is asked for: the least predicted divergence from the unquantized model."""

    target: SizeTarget
    sensitivity: Sensitivity
    sensitivity_path: Path
    types: str = "all"
    threads: int | None = None
    quantizer: QuantizerName = "auto"
    cache: bool = True
    """Whether the error table is kept in the user's cache folder for other sizes, as compiled kernels are."""
    on_progress: OnProgress | None = None
    cancel: CancelFlag | None = None

    def __call__(self, model: UnmixedModel) -> WritePlan:
        """The plan with the chosen types: the largest that fits, planned again where its header left too little.

        Raises OptionError if no mix is as small as that, InputError if the sensitivity is of another model, and what
        ``measure_errors`` raises.
        """
        candidates = _candidates(model, TYPES[self.types], with_short_rows=self.types == "all")
        standards = _standard_types(model, TYPES[self.types])
        table = self._table(model, candidates, standards)
        smallest = {name: types[0] for name, types in candidates.items()}
        plan = model.lay_out(self._policy(model, smallest, table))
        budget = self._budget(plan, candidates)
        for _ in range(_ROUNDS):
            types = self._searched(model, candidates, standards, table, budget)
            if types is None:
                raise OptionError(
                    f"{self.target.text} is too small: the smallest file of these types has {plan.n_bytes:,} bytes, "
                    f"{plan.bits_per_weight:.2f} bits per weight; give a larger size, or --types all"
                )
            standard = _best_standard(_standard_plan(model), standards, table, self._limit(plan))
            plan = model.lay_out(self._policy(model, types, table, standard))
            if self.target.n_bytes is None or plan.n_bytes <= self.target.n_bytes:
                return plan
            budget -= plan.n_bytes - self.target.n_bytes
        raise OptionError(f"{self.target.text} cannot be met; give a larger size")

    def _budget(self, plan: WritePlan, candidates: Mapping[str, Sequence[GGMLType]]) -> int:
        """Bytes for the tensors with candidates; ``plan`` has the other tensors, and the header."""
        free = sum(self._cost(tensor, tensor.type) for tensor in plan.tensors if tensor.name in candidates)
        if self.target.n_bytes is not None:
            return self.target.n_bytes - (plan.n_bytes - free)
        assert self.target.bits is not None, "a target has bits or bytes"
        return int(self.target.bits * plan.n_weights / 8) - (sum(tensor.n_bytes for tensor in plan.tensors) - free)

    def _cost(self, tensor: PlannedTensor, type: GGMLType) -> int:
        """What a tensor of this type takes of the budget: in a file it is padded, among bits it is not."""
        n_bytes = replace(tensor, type=type).n_bytes
        return n_bytes if self.target.n_bytes is None else padded(n_bytes, DEFAULT_ALIGNMENT)

    def _searched(
        self,
        model: UnmixedModel,
        candidates: Mapping[str, Sequence[GGMLType]],
        standards: Mapping[FileType, Mapping[str, GGMLType]],
        table: ErrorTable,
        budget: int,
    ) -> dict[str, GGMLType] | None:
        """The best types within the budget, no worse than a standard mix by prediction; None if there are none."""
        tensors = [tensor for tensor in model.tensors if tensor.name in candidates]
        choices = [
            [Choice(self._cost(tensor, kind), table[tensor.name][kind]) for kind in candidates[tensor.name]]
            for tensor in tensors
        ]
        starts = [
            [candidates[tensor.name].index(types[tensor.name]) for tensor in tensors]
            for types in standards.values()
            if all(types[tensor.name] in candidates[tensor.name] for tensor in tensors)
        ]
        chosen = best_choices(choices, budget, starts)
        if chosen is None:
            return None
        if sum(options[i].n_bytes for options, i in zip(choices, chosen, strict=True)) < _MOSTLY_USED * budget:
            _LOG.warning("%s is more than these types can use: every tensor is as large as it gets", self.target.text)
        return {tensor.name: candidates[tensor.name][i] for tensor, i in zip(tensors, chosen, strict=True)}

    def _policy(
        self,
        model: UnmixedModel,
        types: Mapping[str, GGMLType],
        table: ErrorTable,
        standard: StandardMix | None = None,
    ) -> TypePolicy:
        origin = {
            "target": self.target.text,
            "types": self.types,
            "sensitivity": {
                "source": Path(self.sensitivity.source).name,
                "datasets": list(self.sensitivity.datasets),
                "tokens": self.sensitivity.n_tokens,
            },
            "version": __version__,
        }
        weights = {tensor.name: tensor.n_weights for tensor in model.tensors}
        n_bytes = sum(replace(t, type=types.get(t.name, t.type)).n_bytes for t in model.tensors)
        name = f"{n_bytes * 8 / sum(weights.values()):.2f} bpw"
        mix = ChosenMix(types, name, _predicted(types, table), standard, origin)
        return TypePolicy(mix.file_type(weights), mix=mix)

    def _table(
        self,
        model: UnmixedModel,
        candidates: Mapping[str, Sequence[GGMLType]],
        standards: Mapping[FileType, Mapping[str, GGMLType]],
    ) -> ErrorTable:
        """The errors of all types that are compared; only those are measured that no table of an earlier size has."""
        path = self._table_path(model)
        table = load_table(path) if path is not None else {}
        is_tied = all(tensor.name != OUTPUT for tensor in model.tensors)
        wanted: list[WantedErrors] = []
        for tensor in model.tensors:
            if tensor.name not in candidates:
                continue
            known = table.setdefault(tensor.name, {})
            asked = dict.fromkeys((*candidates[tensor.name], *(types[tensor.name] for types in standards.values())))
            missing = tuple(kind for kind in asked if kind not in known)
            if missing:
                counted = weightings(self.sensitivity, tensor.name, tensor.shape, is_tied=is_tied)
                wanted.append(WantedErrors(tensor, missing, counted))
        if not wanted:
            return table
        work = Work(
            "errors", sampled_bytes(wanted), stopped="stopped while the errors of types were measured",
            on_progress=self.on_progress, cancel=self.cancel,
        )  # fmt: skip
        measured = measure_errors(
            wanted, model.imatrix, work, threads=self.threads, quantizer=self.quantizer, cache=self.cache
        )
        for name, errors in measured.items():
            table[name] |= errors
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                save_table(path, table)
            except (OSError, OutputError) as error:
                _LOG.info("the error table is not kept: %s", error)
        return table

    def _table_path(self, model: UnmixedModel) -> Path | None:
        """Where the table of this model, sensitivity and importances is kept; None if it is not."""
        folder = cache_directory() if self.cache else None
        if folder is None:
            return None
        inputs = [[str(path.resolve()), (seen := path.stat()).st_size, seen.st_mtime_ns] for path in model.input_paths]
        measured = [self.sensitivity_path, *([model.imatrix.path] if model.imatrix else [])]
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in measured]
        about = json.dumps([_TABLE_VERSION, __version__, inputs, digests])
        return folder / "error-tables" / f"{hashlib.sha256(about.encode()).hexdigest()[:32]}.json"

    def _limit(self, plan: WritePlan) -> int:
        """Bytes of the largest file that is compared."""
        if self.target.n_bytes is not None:
            return self.target.n_bytes
        assert self.target.bits is not None, "a target has bits or bytes"
        others = plan.n_bytes - sum(tensor.n_bytes for tensor in plan.tensors)
        return others + int(self.target.bits * plan.n_weights / 8)


def _candidates(
    model: UnmixedModel, allowed: Sequence[GGMLType], *, with_short_rows: bool
) -> dict[str, tuple[GGMLType, ...]]:
    """By name of each tensor that is quantized: the types that it may get, the smallest first."""
    shapes = [tensor for tensor in model.tensor_shapes if may_quantize(tensor)]
    asked = asked_types(model.tensor_shapes, model.policy)
    types = (*allowed, *(_SHORT_ROW_TYPES if with_short_rows else ()))
    names = [tensor.name for tensor in shapes]
    unweighted = {
        kind: frozenset(required_imatrix(shapes, dict.fromkeys(names, kind), FileType.Q4_K_M, model.weighted))
        for kind in types
    }
    found: dict[str, tuple[GGMLType, ...]] = {}
    for tensor in shapes:
        if tensor.name in asked:
            found[tensor.name] = (asked[tensor.name],)
            continue
        if model.keeps_quantized and tensor.source_type.is_quantized:
            continue
        is_short = tensor.n_cols % 256 != 0
        fitting = {
            fitting_type(tensor, kind)
            for kind in types
            if tensor.name not in unweighted[kind] and (is_short or kind not in _SHORT_ROW_TYPES)
        }
        found[tensor.name] = tuple(sorted(fitting, key=lambda kind: (kind.row_bytes(tensor.n_cols), kind.name)))
    return found


def _standard_types(model: UnmixedModel, allowed: Sequence[GGMLType]) -> dict[FileType, dict[str, GGMLType]]:
    """The types of each standard mix that this model can have and that is made of types that are allowed."""
    found: dict[FileType, dict[str, GGMLType]] = {}
    for file_type in (FileType[name] for name in _COMPARED):
        if file_type.default_type not in allowed:
            continue
        try:
            found[file_type] = choose_types(model.tensor_shapes, model.shape, TypePolicy(file_type), model.weighted)
        except (ImatrixError, OptionError):
            continue
    return found


def _standard_plan(model: UnmixedModel) -> WritePlan | None:
    """A plan with the header that files of standard mixes have; None if there are none, as of MXFP4 checkpoints."""
    try:
        return model.lay_out(TypePolicy(FileType.Q4_K_M))
    except (ImatrixError, OptionError):
        return None


def _best_standard(
    plan: WritePlan | None, standards: Mapping[FileType, Mapping[str, GGMLType]], table: ErrorTable, limit: int
) -> StandardMix | None:
    """The standard mix with the least predicted divergence that takes at most ``limit`` bytes."""
    if plan is None:
        return None
    others = plan.n_bytes - sum(padded(tensor.n_bytes, DEFAULT_ALIGNMENT) for tensor in plan.tensors)
    found = []
    for file_type, types in standards.items():
        tensors = (replace(tensor, type=types[tensor.name]) for tensor in plan.tensors)
        n_bytes = others + sum(padded(tensor.n_bytes, DEFAULT_ALIGNMENT) for tensor in tensors)
        if n_bytes <= limit:
            found.append(StandardMix(file_type.name, n_bytes, _predicted(types, table)))
    return min(found, key=lambda mix: (mix.predicted_kl, mix.n_bytes), default=None)


def _predicted(types: Mapping[str, GGMLType], table: ErrorTable) -> float:
    return sum(errors[types[name]] for name, errors in table.items())
