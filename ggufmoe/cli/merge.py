"""``ggufmoe merge``: a recipe becomes a merged checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ggufmoe.cli.conversion import show_result
from ggufmoe.cli.jobs import run_job
from ggufmoe.cli.params import EndWithJSON, Quiet, with_options
from ggufmoe.cli.progress import progress_display
from ggufmoe.options import MergeOptions
from ggufmoe.work import CancelFlag, OnProgress

if TYPE_CHECKING:
    from ggufmoe.convert import MergeResult


@with_options(MergeOptions)
def merge_command(
    recipe: Annotated[Path, typer.Argument(help="A merge recipe, as mergekit-moe reads them.", metavar="RECIPE.yaml")],
    out_dir: Annotated[Path, typer.Argument(help="The directory to write.", metavar="OUT_DIR")],
    *,
    options: MergeOptions,
    as_json: EndWithJSON = False,
    quiet: Quiet = False,
) -> None:
    """Merge the models of a recipe into a mixture's checkpoint that transformers reads.

    A GGUF file needs no merge before it: `ggufmoe convert RECIPE.yaml` writes it directly.
    """

    def job(show: OnProgress, cancel: CancelFlag) -> MergeResult:
        from ggufmoe.convert import merge

        return merge(recipe, out_dir, options=options, on_progress=show, cancel=cancel)

    result = run_job(job, progress_display("merge", quiet=quiet))
    show_result(result, as_json=as_json, quiet=quiet)
