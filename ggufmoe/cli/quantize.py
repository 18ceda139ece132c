"""``ggufmoe quantize``: a GGUF file becomes one of another type.

Owns what is shown; the work is ``ggufmoe.quantize``'s. The streams are those of ``ggufmoe convert``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ggufmoe.cli.convert import Interrupt, peak_memory_bytes, plan_table, summary
from ggufmoe.cli.params import with_options
from ggufmoe.cli.progress import progress_display
from ggufmoe.options import QuantizeOptions
from ggufmoe.work import Progress

if TYPE_CHECKING:
    from ggufmoe.convert import ConvertResult


@with_options(QuantizeOptions)
def quantize_command(
    source: Annotated[Path, typer.Argument(help="A GGUF file, or any file of a split one.", metavar="IN.gguf")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The GGUF file to write.", metavar="OUT.gguf")],
    *,
    options: QuantizeOptions,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be written, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress and no summary.")] = False,
) -> None:
    """Turn a GGUF file into one of another type, with the bytes that llama-quantize writes.

    TYPE may also be COPY, which changes no type: it joins a split model, and mends Mixtral files with one tensor for
    each expert. An interrupted run leaves OUT.partial and a journal; --resume goes on from there.
    """
    if dry_run:
        _show_plan(source, output, options, as_json)
        return
    result = _quantize(source, output, options, quiet)
    if not quiet:
        print(summary(result), file=sys.stderr)
    if as_json:
        print(json.dumps(result.to_dict() | {"peak_memory_bytes": peak_memory_bytes()}))


def _quantize(source: Path, output: Path, options: QuantizeOptions, quiet: bool) -> ConvertResult:
    from ggufmoe.quantize import quantize

    interrupt = Interrupt()
    with interrupt.handled(), progress_display(f"quantize {options.quant}", quiet=quiet) as display:

        def show(step: Progress) -> None:
            interrupt.be_gentle()
            display.update(step)

        return quantize(source, output, options=options, on_progress=show, cancel=interrupt)


def _show_plan(source: Path, output: Path, options: QuantizeOptions, as_json: bool) -> None:
    from ggufmoe.quantize import plan_quantize

    plan = plan_quantize(source, output, options=options)
    print(json.dumps(plan.to_dict()) if as_json else plan_table(plan))
