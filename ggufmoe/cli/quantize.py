"""``ggufmoe quantize``: a GGUF file becomes one of another type."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ggufmoe.cli.conversion import default_output, naming, show_plan, show_result
from ggufmoe.cli.jobs import run_job
from ggufmoe.cli.params import DryRun, EndWithJSON, GGUFOutput, Quiet, with_options
from ggufmoe.cli.progress import progress_display
from ggufmoe.cli.sized import SensitivityText, know_speeds, make_best, measured, sized_text
from ggufmoe.options import QuantizeOptions, SizedOptions
from ggufmoe.work import CancelFlag, OnProgress

if TYPE_CHECKING:
    from ggufmoe.convert import ConvertResult


@with_options(QuantizeOptions, SizedOptions)
def quantize_command(
    source: Annotated[Path, typer.Argument(help="A GGUF file, or any file of a split one.", metavar="IN.gguf")],
    output: GGUFOutput = None,
    *,
    sensitivity_text: SensitivityText = None,
    options: QuantizeOptions,
    sized: SizedOptions,
    dry_run: DryRun = False,
    as_json: EndWithJSON = False,
    quiet: Quiet = False,
) -> None:
    """Turn a GGUF file into one of another type, with the bytes that llama-quantize writes.

    TYPE may also be COPY, which changes no type: it joins a split model and stacks the experts of old Mixtral files. An
    interrupted run leaves OUT.partial and a journal; --resume continues from there.
    """
    path = default_output(str(source), options.quant, sized_text(options, sized)) if output is None else output
    options = measured(options, str(source), path, sensitivity_text, sized, quiet=quiet)
    know_speeds(options, quiet=quiet)
    if sized.is_given:
        make_best(str(source), path, options, sized, dry_run=dry_run, as_json=as_json, quiet=quiet)
        return
    display = progress_display(f"quantize {options.size_text or options.quant}", quiet=quiet)
    if dry_run:
        from ggufmoe.quantize import plan_quantize

        plan = run_job(
            lambda show, cancel: plan_quantize(source, path, options=options, on_progress=show, cancel=cancel), display
        )
        show_plan(plan, as_json=as_json)
        return

    def job(show: OnProgress, cancel: CancelFlag) -> ConvertResult:
        from ggufmoe.quantize import quantize

        told = show if quiet or output is not None else naming(path, display, show)
        return quantize(source, path, options=options, on_progress=told, cancel=cancel)

    result = run_job(job, display)
    show_result(result, as_json=as_json, quiet=quiet)
