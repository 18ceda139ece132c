"""What a file of a given size needs, measured on the way to it: a sensitivity, and the speed of types on this machine.

The sensitivity of ``--sensitivity-text`` is kept beside the output, where the next size of the same model finds it; the
speeds of ``--types fast`` are kept in the user's cache folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from ggufmoe.cli.console import note, printable
from ggufmoe.cli.conversion import show_plan, show_result
from ggufmoe.cli.jobs import run_job
from ggufmoe.cli.progress import progress_display
from ggufmoe.errors import OptionError
from ggufmoe.options import ExportOptions, SensitivityOptions, SizedOptions
from ggufmoe.work import CancelFlag, OnProgress

if TYPE_CHECKING:
    from ggufmoe.best.best_file import BestFile
    from ggufmoe.sensitivity import SensitivityResult

NO_SIZE = SizedOptions()
OptionsT = TypeVar("OptionsT", bound=ExportOptions)
SensitivityText = Annotated[
    Path | None,
    typer.Option(
        "--sensitivity-text",
        help="For a size without --sensitivity: measure the sensitivity on this text first, and keep it beside the "
        "output as NAME-sensitivity.gguf.",
        metavar="FILE",
    ),
]


def know_speeds(options: ExportOptions, *, quiet: bool) -> None:
    """Measure the speed of types on this machine if ``--types fast`` needs it and it is not known yet."""
    if options.types != "fast":
        return
    from ggufmoe.evaluation.speed_of_types import type_speeds
    from ggufmoe.quant.type_sets import FAST_TYPES
    from ggufmoe.quant.type_speeds import TypeSpeeds, load_speeds, table_path

    if not load_speeds().missing(FAST_TYPES):
        return

    def job(show: OnProgress, cancel: CancelFlag) -> TypeSpeeds:
        return type_speeds(on_progress=show, cancel=cancel)

    found = run_job(job, progress_display("speed of types", phase="speed", quiet=quiet))
    if not quiet:
        note(f"measured on this machine, in ms for a token and a billion weights, kept in {table_path()}:")
        for told, key in (("read from memory", "ms_per_billion"), ("held by caches", "ms_per_billion_in_caches")):
            each = sorted(found.to_dict()[key].items(), key=lambda pair: pair[1])
            note(f"  {told}: " + ", ".join(f"{name} {ms:.0f}" for name, ms in each))


def sized_text(options: ExportOptions, sized: SizedOptions) -> str | None:
    """What a file is called after by default: the size, the memory or the divergence that was asked for; None for a
    file type."""
    if sized.fit is not None:
        return f"fit-{sized.fit}"
    return options.size_text if sized.max_kl is None else f"kl-{sized.max_kl:g}"


def make_best(
    source: str,
    output: Path,
    options: ExportOptions,
    sized: SizedOptions,
    *,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Make the file of ``--fit``, ``--max-kl`` and ``--verify``, or show its plan, and say what was measured."""
    from ggufmoe.best.best_file import best_file, plan_best_file, text_warning

    display = progress_display("write", quiet=quiet)
    if dry_run:
        plan, memory = run_job(
            lambda show, cancel: plan_best_file(
                source, output, options=options, sized=sized, on_progress=show, cancel=cancel
            ),
            display,
        )
        show_plan(plan, as_json=as_json)
        if memory is not None and not as_json:
            print(memory.told())
        if sized.max_kl is not None and not as_json:
            print("this is the first file that would be measured; others follow from what it measures")
        return
    if not quiet:
        if warning := text_warning(options, sized):
            note(f"warning: {warning}")
        if sized.verify is not None:
            note(
                f"measures beside {printable(str(output))}, in a folder that is deleted at the end"
                + ("" if source.lower().endswith(".gguf") else ", with a file of 16 bits a weight")
            )

    def job(show: OnProgress, cancel: CancelFlag) -> BestFile:
        return best_file(source, output, options=options, sized=sized, on_progress=show, cancel=cancel)

    found = run_job(job, display)
    if not quiet:
        if found.memory is not None:
            note(found.memory.told())
        show_result(found.result, as_json=False, quiet=False)
        for line in _measured_lines(found, sized):
            note(line)
    if as_json:
        print(json.dumps(found.to_dict()))


def _measured_lines(found: BestFile, sized: SizedOptions) -> Iterator[str]:
    """What was measured, and which file was kept for it."""
    for one in found.measured:
        yield f"measured KL divergence {one.told()}"
    if found.standard is not None:
        yield f"measured KL divergence {found.standard.told()}, the standard mix"
        sign = "nearer to" if found.difference <= 0 else "farther from"
        yield (
            f"the chosen file is {abs(found.difference):.4g} ± {found.difference_uncertainty:.1g} {sign} the "
            "unquantized model than the standard mix"
        )
    if found.kept_standard and found.standard is not None:
        name = found.standard.name
        yield f"kept the standard mix: the bytes that -q {name} writes with the same importances (--imatrix)"
    elif sized.max_kl is not None:
        yield f"kept the smallest that measures at most {sized.max_kl:g}: {found.result.plan.file_type}"


def measured(
    options: OptionsT, source: str, output: Path, text: Path | None, sized: SizedOptions = NO_SIZE, *, quiet: bool
) -> OptionsT:
    """The options with a sensitivity that is measured on ``text``, or was by an earlier command; as given without it.

    Raises OptionError where no sensitivity is needed, or that beside the output is of another model or text, and the
    errors of ``ggufmoe.sensitivity``.
    """
    if text is None:
        return options
    has_size = options.size_target is not None or sized.target is not None
    if not has_size or options.sensitivity is not None:
        raise OptionError("--sensitivity-text is for a size (-q 4.5bpw, --size 6GiB) without --sensitivity")
    from ggufmoe.export.naming import model_name
    from ggufmoe.sensitivity import sensitivity
    from ggufmoe.sizing.sensitivity_file import Sensitivity

    path = output.with_name(f"{model_name(source, '', 'sensitivity')}.gguf")
    if path.exists():
        found = Sensitivity.load(path)
        if found.source != Path(source).name or found.datasets != (str(text),):
            raise OptionError(
                f"{printable(str(path))} was measured on {printable(', '.join(found.datasets))} of "
                f"{printable(found.source)}, and not on this text of this model; give it by --sensitivity, or delete it"
            )
    else:
        how = SensitivityOptions(
            threads=options.threads,
            allow_identical_experts=getattr(options, "allow_identical_experts", False),
            allow_outside_files=getattr(options, "allow_outside_files", False),
        )

        def job(show: OnProgress, cancel: CancelFlag) -> SensitivityResult:
            return sensitivity(source, path, text_file=text, options=how, on_progress=show, cancel=cancel)

        result = run_job(job, progress_display("sensitivity", phase="sensitivity", quiet=quiet))
        if not quiet:
            note(f"{printable(str(path))}: {result.n_tokens} tokens, {result.seconds:.1f} s; it serves other sizes too")
        for warning in result.warnings:
            note(f"warning: {warning}")
    return replace(options, sensitivity=path)
