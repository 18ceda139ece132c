"""``ggufmoe sensitivity``: measure on a text how much each weight of a model matters, for files of any size.

Owns what is printed; ``ggufmoe.sensitivity`` measures. The summary goes to stderr, as for ``imatrix``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ggufmoe.cli.console import note
from ggufmoe.cli.jobs import run_job
from ggufmoe.cli.params import EndWithJSON, Quiet, with_options
from ggufmoe.cli.progress import progress_display
from ggufmoe.options import SensitivityOptions
from ggufmoe.sizes import counted
from ggufmoe.work import CancelFlag, OnProgress

if TYPE_CHECKING:
    from ggufmoe.sensitivity import SensitivityResult


@with_options(SensitivityOptions)
def sensitivity_command(
    source: Annotated[
        str, typer.Argument(help="A checkpoint's directory or hub id, a recipe, or a GGUF file.", metavar="SOURCE")
    ],
    file: Annotated[
        Path,
        typer.Option(
            "-f", "--file", help="The text, in UTF-8; or .jsonl with text or messages on each line.", metavar="FILE"
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write.", metavar="OUT.gguf")],
    *,
    options: SensitivityOptions,
    as_json: EndWithJSON = False,
    quiet: Quiet = False,
) -> None:
    """Measure how much a model's answers depend on each of its weights: which of them must be stored more exactly.

    For each matrix OUT.gguf says the mean square of each input, which is an importance matrix (`--imatrix OUT.gguf`),
    and of the gradient of each output. The text should resemble what the model will be used for. Each weight is read
    twice, a layer at a time. An interrupted run leaves OUT.gguf.partial; --resume continues there.
    """

    def job(show: OnProgress, cancel: CancelFlag) -> SensitivityResult:
        from ggufmoe.sensitivity import sensitivity

        return sensitivity(source, output, text_file=file, options=options, on_progress=show, cancel=cancel)

    result = run_job(job, progress_display("sensitivity", phase="sensitivity", quiet=quiet))
    if as_json:
        print(json.dumps(result.to_dict()))
    if not quiet:
        note(
            f"{result.path}: {result.n_matrices} matrices, {result.n_tokens} tokens in "
            f"{counted(result.n_sequences, 'sequence')}, {result.seconds:.1f} s"
        )
    for warning in result.warnings:
        note(f"warning: {warning}")
