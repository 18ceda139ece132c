"""``ggufmoe refit``: the mixture in a GGUF file gets a router that is fitted on texts, or taken from another model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ggufmoe.cli.conversion import show_result
from ggufmoe.cli.jobs import run_job
from ggufmoe.cli.params import EndWithJSON, Quiet, with_options
from ggufmoe.cli.progress import progress_display
from ggufmoe.errors import OptionError
from ggufmoe.options import RefitOptions
from ggufmoe.work import CancelFlag, OnProgress

if TYPE_CHECKING:
    from ggufmoe.convert import ConvertResult
    from ggufmoe.refit import ExpertTexts

_NAMED = re.compile(r"([^=/\\]+)=(.+)", re.DOTALL)


@with_options(RefitOptions)
def refit_command(
    model: Annotated[
        Path, typer.Argument(help="A GGUF file of a mixture, or any file of a split one.", metavar="MODEL.gguf")
    ],
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            help="A file of texts for each expert, in the order of the experts; or EXPERT=FILE, in any order, several "
            "for an expert if need be.",
            metavar="TEXTS...",
            show_default=False,
        ),
    ] = None,
    *,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The GGUF file to write.", metavar="OUT.gguf", show_default=False)
    ],
    options: RefitOptions,
    as_json: EndWithJSON = False,
    quiet: Quiet = False,
) -> None:
    """Fit the router of a mixture on texts: only the router tensors of OUT.gguf differ from MODEL.gguf.

    Texts are plain text, or objects with text or messages in a file named .jsonl. A table shows the losses on texts
    that were held out. An interrupted run leaves OUT.partial and a journal; --resume fits again and continues there.
    """
    files = _by_expert(texts or [])

    def job(show: OnProgress, cancel: CancelFlag) -> ConvertResult:
        from ggufmoe.refit import refit

        return refit(model, output, files, options=options, on_progress=show, cancel=cancel)

    result = run_job(job, progress_display("refit", quiet=quiet))
    show_result(result, as_json=as_json, quiet=quiet)


def _by_expert(texts: Sequence[str]) -> ExpertTexts:
    """Files in order, or by expert where all are written EXPERT=FILE. Raises OptionError where only some are."""
    named = [_NAMED.fullmatch(one) for one in texts]
    if not any(named):
        return list(texts)
    files: dict[str, list[str]] = {}
    for found, one in zip(named, texts, strict=True):
        if found is None:
            raise OptionError(f"{one} names no expert, others do: write EXPERT={one}, or ./FILE for a name with an =")
        files.setdefault(found[1], []).append(found[2])
    return files
