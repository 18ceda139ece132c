"""``ggufmoe merge``: a recipe becomes a merged checkpoint. Owns what is shown; the work is ``ggufmoe.merge``'s."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ggufmoe.cli.convert import Interrupt, peak_memory_bytes
from ggufmoe.cli.params import with_options
from ggufmoe.cli.progress import progress_display
from ggufmoe.cli.router import print_router
from ggufmoe.options import MergeOptions
from ggufmoe.sizes import file_size
from ggufmoe.work import Progress

if TYPE_CHECKING:
    from ggufmoe.convert import MergeResult


@with_options(MergeOptions)
def merge_command(
    recipe: Annotated[Path, typer.Argument(help="A merge recipe, as mergekit-moe reads them.", metavar="RECIPE.yaml")],
    out_dir: Annotated[Path, typer.Argument(help="The directory to write.", metavar="OUT_DIR")],
    *,
    options: MergeOptions,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress and no summary.")] = False,
) -> None:
    """Follow a recipe to a Mixtral checkpoint that transformers reads.

    For a GGUF file no merge is needed: `ggufmoe convert RECIPE.yaml` goes all the way.
    """
    result = _merge(recipe, out_dir, options, quiet)
    if not quiet:
        print_router(result.router_report)
        speed = file_size(result.bytes_written / max(result.seconds, 1e-9))
        size = file_size(result.n_bytes)
        print(f"{result.directory}: {size}, {result.seconds:.1f} s, {speed}/s", file=sys.stderr)
    if as_json:
        print(json.dumps(result.to_dict() | {"peak_memory_bytes": peak_memory_bytes()}))


def _merge(recipe: Path, out_dir: Path, options: MergeOptions, quiet: bool) -> MergeResult:
    from ggufmoe.convert import merge

    interrupt = Interrupt()
    with interrupt.handled(), progress_display("merge", quiet=quiet) as display:

        def show(step: Progress) -> None:
            interrupt.be_gentle()
            display.update(step)

        return merge(recipe, out_dir, options=options, on_progress=show, cancel=interrupt)
