"""``best_file``: a file whose size follows from memory or from a divergence, and that is measured before it is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ggufmoe.best.measured_files import (
    Measured,
    Workshop,
    as_measured,
    is_gguf,
    opened_folder,
    planned,
    written,
)
from ggufmoe.best.memory_budget import MemorySums, memory_sums
from ggufmoe.convert import ConvertResult, checked_output, output_path
from ggufmoe.errors import OptionError
from ggufmoe.evaluation.chunks import read_text
from ggufmoe.files import StrPath
from ggufmoe.gguf.manifest import default_path as manifest_path
from ggufmoe.gguf.types import GGMLType
from ggufmoe.options import ConvertOptions, ExportOptions, QuantizeOptions, SizedOptions, options_of
from ggufmoe.sizing.sensitivity_file import Sensitivity
from ggufmoe.work import CancelFlag, OnProgress
from ggufmoe.writing.plan import WritePlan

_ROUNDS = 4
_FIRST_FACTOR = 2.0
"""How many times the predicted divergence is measured, before anything was."""
_CLOSE, _MARGIN = 0.9, 0.97
"""A file is kept that uses this share of the divergence; the next one aims at so much of it."""
_LEAST_KL, _MOST_KL = 1e-9, 100.0
"""Divergences count as no less, as those of equal files are 0; no file is asked for with more."""
_MODEST = 0.85
"""What the last file aims at where all before it were too far away."""


@dataclass(frozen=True)
class BestFile:
    """A file that was made, and what was measured on the way."""

    result: ConvertResult
    memory: MemorySums | None = None
    """How the memory of ``fit`` is divided."""
    measured: tuple[Measured, ...] = ()
    """Each file that was measured, in their order."""
    standard: Measured | None = None
    """The standard mix that the last of them was compared with."""
    difference: float = 0.0
    """The divergence of the file minus that of the standard mix, on the same tokens."""
    difference_uncertainty: float = 0.0
    kept_standard: bool = False
    """Whether the standard mix was nearer to the unquantized model, and is what was kept."""

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values for JSON."""
        compared = None
        if self.standard is not None:
            compared = {
                "standard": self.standard.to_dict(),
                "difference": self.difference,
                "uncertainty": self.difference_uncertainty,
                "kept_standard": self.kept_standard,
            }
        return {
            **self.result.to_dict(),
            "memory": None if self.memory is None else self.memory.to_dict(),
            "measured": [one.to_dict() for one in self.measured],
            "compared": compared,
        }


def best_file(
    source: StrPath,
    output: StrPath,
    *,
    options: ExportOptions | None = None,
    sized: SizedOptions | None = None,
    on_progress: OnProgress | None = None,
    cancel: CancelFlag | None = None,
) -> BestFile:
    """Make the best file of a model for a size, for memory (``sized.fit``), or for a divergence (``sized.max_kl``).

    ``source`` is what ``convert`` or, for a GGUF file, ``quantize`` takes, and ``options`` are those of either, with a
    sensitivity. With ``sized.verify`` the file and the best standard mix that is no larger are measured on a text, and
    the one that is nearer to the unquantized model gets the name ``output``; of a checkpoint a file of 16 bits a weight
    is written beside it meanwhile. With ``sized.max_kl`` files are written and measured, at most 4, and the smallest
    that diverges no more than that is kept.

    Raises the errors of ``convert`` or ``quantize`` and of ``kl_divergences``, and OptionError where no file keeps to
    the divergence. Nothing is left beside the output after an error or ``cancel``.
    """
    options = _options(source, options)
    sized = options_of(SizedOptions, sized)
    path = checked_output(output, options)
    options, memory = solved_size(source, path, options, sized)
    if sized.verify is None:
        return BestFile(written(source, path, options, on_progress, cancel), memory)
    if options.resume:
        raise OptionError("--verify begins again after an interruption: leave out --resume")
    read_text(None, sized.verify)
    if manifest_path(path).exists():  # that of an older output, which ``convert`` writes anew as well
        options = replace(options, manifest=True)
    with opened_folder(path) as folder:
        shop = Workshop(source, path, options, sized.verify, sized.verify_chunks, folder, on_progress, cancel)
        return _smallest(shop, sized.max_kl) if sized.max_kl is not None else _verified(shop, memory)


def plan_best_file(
    source: StrPath,
    output: StrPath,
    *,
    options: ExportOptions | None = None,
    sized: SizedOptions | None = None,
    on_progress: OnProgress | None = None,
    cancel: CancelFlag | None = None,
) -> tuple[WritePlan, MemorySums | None]:
    """What ``best_file`` would write by prediction, without measuring, and how the memory of ``fit`` is divided.

    For ``max_kl`` the first file that it would measure.
    """
    options = _options(source, options)
    sized = options_of(SizedOptions, sized)
    path = output_path(output)
    options, memory = solved_size(source, path, options, sized)
    if sized.max_kl is not None:
        options = replace(options, predicted_kl=sized.max_kl / _FIRST_FACTOR)
    return planned(source, path, options, on_progress, cancel), memory


def text_warning(options: ExportOptions, sized: SizedOptions) -> str | None:
    """What to say where the text that is measured on is the one that the sensitivity is from."""
    if options.sensitivity is None or sized.verify is None:
        return None
    names = {Path(name).name for name in Sensitivity.load(options.sensitivity).datasets}
    if sized.verify.name not in names:
        return None
    return f"the sensitivity was measured on {sized.verify.name} as well: what is measured there is too favourable"


def _options(source: StrPath, options: ExportOptions | None) -> ExportOptions:
    if options is None:
        return QuantizeOptions() if is_gguf(source) else ConvertOptions()
    expected = QuantizeOptions if is_gguf(source) else ConvertOptions
    if not isinstance(options, expected):
        raise TypeError(f"{source} takes {expected.__name__}(...), not {options!r}")
    return options


def solved_size(
    source: StrPath, output: Path, options: ExportOptions, sized: SizedOptions
) -> tuple[ExportOptions, MemorySums | None]:
    """The options with the size that ``fit`` leaves for weights, and its sums. Raises OptionError for two sizes,
    and for one without a sensitivity."""
    if sized.target is None:
        if options.size_target is None:
            raise OptionError("--verify is for a file of a size: give one with -q 4.5bpw, --size, --fit or --max-kl")
        return options, None
    flag = "--fit" if sized.target == "fit" else "--max-kl"
    if options.sensitivity is None:
        raise OptionError(
            f"{flag} needs --sensitivity FILE, which `ggufmoe sensitivity` makes, or --sensitivity-text TEXT"
        )
    if options.size_target is not None:
        raise OptionError(f"{options.size_target.text} and {flag} each say what size to make; give one of them")
    if sized.target == "max_kl":
        return options, None
    any_types = replace(options, sensitivity=None, types="all", imatrix=None, split_max_size=None, quant="F16")
    plan = planned(source, output, any_types, None, None)
    sums = memory_sums(plan, sized.fit_bytes, sized.n_ctx)
    of_header = plan.n_bytes - sum(tensor.n_bytes for tensor in plan.tensors)
    return replace(options, size=str(sums.weight_bytes + of_header)), sums


def _verified(shop: Workshop, memory: MemorySums | None) -> BestFile:
    """The file of a size, or the standard mix where that is nearer to the unquantized model."""
    plan = shop.plan(shop.options)
    shop.check_names(plan)
    standard = plan.mix.standard if plan.mix is not None else None
    extra = 0 if shop.is_gguf else int(2.1 * plan.n_weights)
    shop.check_space(plan.n_bytes + extra + (0 if standard is None else standard.n_bytes))
    chosen = shop.write("chosen", shop.options)
    results = [chosen]
    if standard is not None:
        results.insert(0, shop.write("standard", standard_options(shop.options, standard.name)))
    found = shop.measure(results, shop.reference())
    mine = as_measured(chosen, found, len(results) - 1)
    if standard is None:
        return BestFile(shop.keep(chosen), memory, (mine,))
    difference = found.kl_differences[0]
    is_worse = difference.value > 0
    return BestFile(
        shop.keep(results[0] if is_worse else chosen),
        memory,
        (mine,),
        as_measured(results[0], found, 0),
        difference.value,
        difference.uncertainty,
        is_worse,
    )


def standard_options(options: ExportOptions, name: str) -> ExportOptions:
    """The options of ``-q NAME``, with the importances of the chosen file and without types of its own."""
    return replace(
        options, quant=name, size=None, target_bpw=None, predicted_kl=None, sensitivity=None, types="all",
        imatrix=options.imatrix or options.sensitivity, tensor_types=(), tensor_type_file=None,
        output_tensor_type=None, token_embedding_type=None,
    )  # fmt: skip


def _smallest(shop: Workshop, max_kl: float) -> BestFile:
    """The smallest file whose divergence is at most ``max_kl``: solve by prediction, measure, scale, solve again."""
    shop.check_names(shop.plan(replace(shop.options, predicted_kl=max_kl / _FIRST_FACTOR)))
    reference, logits = shop.reference(), shop.folder / "reference.logits"
    tried: list[tuple[Measured, ConvertResult]] = []

    def measure(aim: float) -> tuple[float, bool]:
        """How many times the prediction of a file for ``aim`` was measured, and whether it is another file."""
        options = replace(shop.options, predicted_kl=aim)
        plan = shop.plan(options)
        if any(_types(plan) == _types(result.plan) for _, result in tried):
            return 1.0, False
        shop.check_space(plan.n_bytes)
        result = shop.write(f"round-{len(tried) + 1}", options)
        found = shop.measure([result], reference, logits)
        tried.append((as_measured(result, found, 0), result))
        assert plan.mix is not None, "a size has a mix"
        return max(tried[-1][0].kl, _LEAST_KL) / max(plan.mix.predicted_kl, _LEAST_KL), True

    _solve(measure, lambda: [one.kl for one, _ in tried], max_kl)
    good = [pair for pair in tried if pair[0].kl <= max_kl]
    measured = tuple(one for one, _ in tried)
    if not good:
        nearest = min(measured, key=lambda one: one.kl)
        raise OptionError(
            f"no file keeps to a divergence of {max_kl:g} on {shop.text.name}: the nearest of {len(tried)} that were "
            f"measured has {nearest.kl:.4g} ± {nearest.uncertainty:.1g} with {nearest.name}; give a larger --max-kl, "
            "or keep 16 bits a weight (-q BF16)"
        )
    return BestFile(shop.keep(min(good, key=lambda pair: pair[0].n_bytes)[1]), measured=measured)


def _types(plan: WritePlan) -> list[tuple[str, GGMLType]]:
    return [(tensor.name, tensor.type) for tensor in plan.tensors]


def _solve(measure: Callable[[float], tuple[float, bool]], found: Callable[[], list[float]], max_kl: float) -> None:
    """Measure files until one is just within ``max_kl``, or they do not change any more; at most _ROUNDS."""
    aim = max_kl / _FIRST_FACTOR
    for number in range(1, _ROUNDS + 1):
        factor, is_new = measure(aim)
        if not is_new or _CLOSE * max_kl <= found()[-1] <= max_kl:
            return
        is_last = number == _ROUNDS - 1 and min(found()) > max_kl
        aim = min((_MODEST if is_last else _MARGIN) * max_kl / factor, _MOST_KL)
