"""The best file of a given size: candidates for each tensor, their errors, and the mix that the search finds.

``SizeMixer`` is what plans of exports and of quantizations call to choose the types (``export.unmixed.Mixer``).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
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
from ggufmoe.hub.read_ahead import ReadAhead
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
from ggufmoe.quant.type_sets import K_TYPES, SHORT_ROW_TYPES, TYPE_SETS
from ggufmoe.quant.type_speeds import TypeSpeeds
from ggufmoe.sizing.error_table import ErrorTable, WantedErrors, load_table, measure_errors, sampled_bytes, save_table
from ggufmoe.sizing.search import Choice, least_bytes
from ggufmoe.sizing.sensitivity_file import Sensitivity
from ggufmoe.sizing.timed_search import TimedChoice, best_timed_choices
from ggufmoe.sizing.timing import Clock, token_clock
from ggufmoe.sizing.weightings import weightings
from ggufmoe.version import __version__
from ggufmoe.work import CancelFlag, OnProgress, Work
from ggufmoe.writing.plan import PlannedTensor, WritePlan

_LOG = logging.getLogger("ggufmoe")

SLOWER_AT_MOST = 1.05
"""With ``fast``: the time for a token beside that of the standard mix of the size."""
_COMPARED = (
    "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0",
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", "IQ4_XS",
)  # fmt: skip
"""The standard mixes that a mix is compared with."""
_HEADERS_DIFFER = 4096
"""Bytes by which headers of one model's files differ, as by the path of an importance matrix."""
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
    speeds: TypeSpeeds | None = None
    """How fast each type is on this machine; with them no mix is chosen that is slower than SLOWER_AT_MOST allows."""
    threads: int | None = None
    quantizer: QuantizerName = "auto"
    cache: bool = True
    """Whether the error table is kept in the user's cache folder for other sizes, as compiled kernels are."""
    on_progress: OnProgress | None = None
    cancel: CancelFlag | None = None
    origins: tuple[str, ...] = ()
    """What the bytes of models that are read over the network depend on."""
    read_ahead: ReadAhead | None = None
    """Reads the weights of such models, once."""

    def __call__(self, model: UnmixedModel) -> WritePlan:
        """The plan with the chosen types: the largest that fits, planned again where its header left too little.

        Raises OptionError if no mix is as small as that, InputError if the sensitivity is of another model, and what
        ``measure_errors`` raises.
        """
        candidates = _candidates(model, TYPE_SETS[self.types], self.types)
        standards = _standard_types(model, TYPE_SETS[self.types])
        table = self._table(model, candidates, standards)
        smallest = {name: types[0] for name, types in candidates.items()}
        plan = model.lay_out(self._policy(model, smallest, table))
        budget = self._budget(plan, candidates, table)
        best = self._best_standard(model, standards, table, self._limit(plan, candidates, budget))
        problem = self._problem(model, candidates, standards, table, best)
        for _ in range(_ROUNDS):
            chosen = best_timed_choices(problem.choices, budget, problem.limit_s, problem.starts)
            if chosen is None:
                others = "" if self.types == "all" else ", or --types all"
                raise OptionError(
                    f"{_named(self.target)} is too small: the smallest file of these types has {plan.n_bytes:,} bytes, "
                    f"{plan.bits_per_weight:.2f} bits per weight; give a larger size{others}"
                )
            plan = model.lay_out(self._policy(model, problem.types(chosen), table, best))
            if self.target.n_bytes is None or plan.n_bytes <= self.target.n_bytes:
                told = "" if self.target.predicted_kl is not None else problem.unused(chosen, budget)
                if told:
                    _LOG.warning("%s: %s", _named(self.target), told)
                return plan
            budget -= plan.n_bytes - self.target.n_bytes
        raise OptionError(f"{_named(self.target)} cannot be met; give a larger size")

    def _budget(self, plan: WritePlan, candidates: Mapping[str, Sequence[GGMLType]], table: ErrorTable) -> int:
        """Bytes for the tensors with candidates; ``plan`` has the other tensors, and the header."""
        free = sum(self._cost(tensor, tensor.type) for tensor in plan.tensors if tensor.name in candidates)
        if self.target.predicted_kl is not None:
            choices = [
                [Choice(self._cost(tensor, kind), table[tensor.name][kind]) for kind in candidates[tensor.name]]
                for tensor in plan.tensors
                if tensor.name in candidates
            ]
            return least_bytes(choices, self.target.predicted_kl)
        if self.target.n_bytes is not None:
            return self.target.n_bytes - (plan.n_bytes - free)
        assert self.target.bits is not None, "a target has bits or bytes"
        return int(self.target.bits * plan.n_weights / 8) - (sum(tensor.n_bytes for tensor in plan.tensors) - free)

    def _cost(self, tensor: PlannedTensor, type: GGMLType) -> int:
        """What a tensor of this type takes of the budget: in a file it is padded, among bits it is not."""
        n_bytes = replace(tensor, type=type).n_bytes
        return n_bytes if self.target.bits is not None else padded(n_bytes, DEFAULT_ALIGNMENT)

    def _problem(
        self,
        model: UnmixedModel,
        candidates: Mapping[str, Sequence[GGMLType]],
        standards: Mapping[FileType, Mapping[str, GGMLType]],
        table: ErrorTable,
        best: StandardMix | None,
    ) -> _MixProblem:
        """What the search chooses from; the standard mixes are starts, which the result is no worse than."""
        tensors = [tensor for tensor in model.tensors if tensor.name in candidates]
        clock = self._clock(model)
        choices = [
            [
                TimedChoice(self._cost(tensor, kind), table[tensor.name][kind], clock(tensor, kind))
                for kind in candidates[tensor.name]
            ]
            for tensor in tensors
        ]
        starts = [
            [candidates[tensor.name].index(types[tensor.name]) for tensor in tensors]
            for types in standards.values()
            if all(types[tensor.name] in candidates[tensor.name] for tensor in tensors)
        ]
        limit_s = math.inf if best is None or best.seconds is None else SLOWER_AT_MOST * best.seconds
        return _MixProblem([(tensor.name, candidates[tensor.name]) for tensor in tensors], choices, starts, limit_s)

    def _clock(self, model: UnmixedModel) -> Clock:
        if self.speeds is None:
            return lambda tensor, kind: 0.0
        return token_clock(self.speeds, model)

    def _best_standard(
        self, model: UnmixedModel, standards: Mapping[FileType, Mapping[str, GGMLType]], table: ErrorTable, limit: int
    ) -> StandardMix | None:
        """The standard mix with the least predicted divergence that takes at most ``limit`` bytes.

        With speeds the largest one, which a user would have taken, and one of K types if any fits: those are fast on
        every CPU. Then a header that is a little larger does not count.
        """
        plan = _standard_plan(model)
        if plan is None:
            return None
        others = plan.n_bytes - sum(padded(tensor.n_bytes, DEFAULT_ALIGNMENT) for tensor in plan.tensors)
        limit += 0 if self.speeds is None else _HEADERS_DIFFER
        found: list[tuple[bool, float, StandardMix]] = []
        for file_type, types in standards.items():
            tensors = (replace(tensor, type=types[tensor.name]) for tensor in plan.tensors)
            n_bytes = others + sum(padded(tensor.n_bytes, DEFAULT_ALIGNMENT) for tensor in tensors)
            if n_bytes <= limit:
                seconds = self._seconds(model, {name: types[name] for name in table})
                is_slow = self.speeds is not None and file_type.default_type not in K_TYPES
                mix = StandardMix(file_type.name, n_bytes, _predicted(types, table), seconds)
                found.append((is_slow, mix.predicted_kl if seconds is None else -n_bytes, mix))
        best = min(found, key=lambda one: (*one[:2], one[2].seconds or one[2].n_bytes), default=None)
        return None if best is None else best[2]

    def _seconds(self, model: UnmixedModel, types: Mapping[str, GGMLType]) -> float | None:
        """What the matrices that are quantized take for a token; None without speeds."""
        if self.speeds is None:
            return None
        clock = self._clock(model)
        return sum(clock(tensor, types[tensor.name]) for tensor in model.tensors if tensor.name in types)

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
        mix = ChosenMix(types, name, _predicted(types, table), standard, origin, self._seconds(model, types))
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
            wanted,
            model.imatrix,
            work,
            threads=self.threads,
            quantizer=self.quantizer,
            cache=self.cache,
            read_ahead=self.read_ahead,
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
        about = json.dumps([_TABLE_VERSION, __version__, inputs, digests, self.origins])
        return folder / "error-tables" / f"{hashlib.sha256(about.encode()).hexdigest()[:32]}.json"

    def _limit(self, plan: WritePlan, candidates: Mapping[str, Sequence[GGMLType]], budget: int) -> int:
        """Bytes of the largest file that is compared; ``plan`` has what is not chosen."""
        if self.target.n_bytes is not None:
            return self.target.n_bytes
        if self.target.predicted_kl is not None:
            free = sum(self._cost(tensor, tensor.type) for tensor in plan.tensors if tensor.name in candidates)
            return plan.n_bytes - free + budget
        assert self.target.bits is not None, "a target has bits or bytes"
        others = plan.n_bytes - sum(tensor.n_bytes for tensor in plan.tensors)
        return others + int(self.target.bits * plan.n_weights / 8)


@dataclass(frozen=True)
class _MixProblem:
    """The choices of all tensors with candidates, and how many seconds a token may take."""

    candidates: Sequence[tuple[str, Sequence[GGMLType]]]
    """The name of each tensor, and the types that it may get."""
    choices: Sequence[Sequence[TimedChoice]]
    starts: Sequence[Sequence[int]]
    limit_s: float

    def types(self, chosen: Sequence[int]) -> dict[str, GGMLType]:
        """The type of each tensor."""
        return {name: types[i] for (name, types), i in zip(self.candidates, chosen, strict=True)}

    def unused(self, chosen: Sequence[int], budget: int) -> str:
        """Why the budget is not used, in words; empty where it is."""
        held = [choices[i] for choices, i in zip(self.choices, chosen, strict=True)]
        n_bytes = sum(one.n_bytes for one in held)
        if n_bytes >= _MOSTLY_USED * budget:
            return ""
        share = f"{n_bytes / budget:.1%} of it is used"
        steps = [
            (larger.n_bytes - now.n_bytes, name, types[j].name)
            for now, choices, (name, types) in zip(held, self.choices, self.candidates, strict=True)
            for j, larger in enumerate(choices)
            if larger.n_bytes > now.n_bytes and larger.loss < now.loss
        ]
        if not steps:
            return f"{share}, because every tensor is as good as these types make it"
        more, name, kind = min(steps)
        left = budget - n_bytes
        if more <= left:
            return f"{share}, because a larger file would generate more slowly"
        return f"{share}: the next step, {name} in {kind}, takes {more:,} bytes more, and {left:,} are left"


def _named(target: SizeTarget) -> str:
    """What was asked for, as messages call it; a bare number, such as what ``--fit`` leaves for weights, is bytes."""
    return f"{int(target.text):,} bytes" if target.text.isdecimal() else target.text


def _candidates(model: UnmixedModel, allowed: Sequence[GGMLType], word: str) -> dict[str, tuple[GGMLType, ...]]:
    """By name of each tensor that is quantized: the types that it may get, the smallest first."""
    shapes = [tensor for tensor in model.tensor_shapes if may_quantize(tensor)]
    asked = asked_types(model.tensor_shapes, model.policy)
    types = (*allowed, *(SHORT_ROW_TYPES if word == "all" else ()))
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
            if tensor.name not in unweighted[kind] and (is_short or kind in allowed)
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


def _predicted(types: Mapping[str, GGMLType], table: ErrorTable) -> float:
    return sum(errors[types[name]] for name, errors in table.items())
