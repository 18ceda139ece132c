"""``ggufmoe convert``: a checkpoint or a merge recipe becomes a GGUF file."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from ggufmoe.cli.conversion import default_output, naming, show_plan, show_result
from ggufmoe.cli.jobs import run_job
from ggufmoe.cli.params import DryRun, EndWithJSON, GGUFOutput, LineSpeed, Quiet, with_options
from ggufmoe.cli.progress import progress_display
from ggufmoe.cli.sized import SensitivityText, know_speeds, make_best, measured, sized_text
from ggufmoe.cli.wanted_model import AUTO_QUANT, automatic_type
from ggufmoe.options import ConvertOptions, SizedOptions
from ggufmoe.work import CancelFlag, OnProgress

if TYPE_CHECKING:
    from ggufmoe.convert import ConvertResult


@with_options(ConvertOptions, SizedOptions)
def convert_command(
    source: Annotated[str, typer.Argument(help="A checkpoint directory, a recipe.yaml, or a hub id (org/name).")],
    output: GGUFOutput = None,
    *,
    sensitivity_text: SensitivityText = None,
    options: ConvertOptions,
    sized: SizedOptions,
    dry_run: DryRun = False,
    line_speed: LineSpeed = None,
    as_json: EndWithJSON = False,
    quiet: Quiet = False,
) -> None:
    """Turn a checkpoint or a merge recipe into a quantized GGUF file, in one pass.

    An interrupted run leaves OUT.partial and a journal; --resume continues from there and writes the same bytes.
    """
    if options.quant.lower() == AUTO_QUANT:
        options = replace(options, quant=automatic_type(source, quiet=quiet))
    path = default_output(source, options.quant, sized_text(options, sized)) if output is None else output
    options = measured(options, source, path, sensitivity_text, sized, quiet=quiet)
    know_speeds(options, quiet=quiet)
    if sized.is_given:
        make_best(source, path, options, sized, dry_run=dry_run, as_json=as_json, quiet=quiet)
        return
    display = progress_display(f"convert {options.size_text or options.quant}", quiet=quiet)
    if dry_run:
        from ggufmoe.convert import plan_convert

        plan = run_job(
            lambda show, cancel: plan_convert(source, path, options=options, on_progress=show, cancel=cancel), display
        )
        show_plan(plan, as_json=as_json, line_mbit=line_speed)
        return

    def job(show: OnProgress, cancel: CancelFlag) -> ConvertResult:
        from ggufmoe.convert import convert

        told = show if quiet or output is not None else naming(path, display, show)
        return convert(source, path, options=options, on_progress=told, cancel=cancel)

    result = run_job(job, display)
    show_result(result, as_json=as_json, quiet=quiet)
