"""``ggufmoe imatrix``: make an importance matrix from a text, for ``convert --imatrix``.

Owns what is printed; ``evaluation.imatrix`` measures. The summary goes to stderr, as for ``convert``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from ggufmoe.cli.console import note, terminal_columns
from ggufmoe.cli.jobs import run_job
from ggufmoe.cli.params import EndWithJSON, Quiet, with_options
from ggufmoe.cli.progress import chunk_display
from ggufmoe.evaluation.chunks import check_complete
from ggufmoe.evaluation.imatrix import ImatrixResult, imatrix
from ggufmoe.options import ImatrixOptions, OffloadOptions
from ggufmoe.sizes import counted

_SHOWN_EXPERTS = 16


@with_options(ImatrixOptions, OffloadOptions)
def imatrix_command(
    model: Annotated[Path, typer.Argument(help="GGUF file, best in F32, F16 or BF16.")],
    file: Annotated[Path, typer.Option("-f", "--file", help="The text, in UTF-8.", metavar="FILE")],
    output: Annotated[
        Path, typer.Option("-o", "--output", "--output-file", help="The file to write.", metavar="imatrix.gguf")
    ],
    *,
    options: ImatrixOptions,
    offload: OffloadOptions,
    as_json: EndWithJSON = False,
    quiet: Quiet = False,
) -> None:
    """Make an importance matrix: measure on a text how much each column of each matrix matters, expert by expert.

    It is the file that llama-imatrix writes; `convert --imatrix`, `quantize --imatrix` and llama-quantize read it. The
    text should resemble what the model will be used for. Ctrl-C writes the result over the chunks that are done.
    """
    at_once = options.context.n_seq_max
    result = run_job(
        lambda show, cancel: imatrix(
            model, output, text_file=file, options=options, offload=offload, on_progress=show, cancel=cancel
        ),
        chunk_display("imatrix", lambda found: f"{found.n_entries} matrices", at_once=at_once, quiet=quiet),
        gentle=True,
    )
    if as_json:
        print(json.dumps(result.to_dict()))
    if not quiet:
        for line in _summary(result):
            note(line)
    for warning in result.warnings:
        note(f"warning: {warning}")
    check_complete(result)


def _summary(result: ImatrixResult) -> list[str]:
    lines = [
        f"{result.path}: {result.n_entries} matrices, {counted(result.n_chunks, 'chunk')} of {result.n_ctx} tokens, "
        f"{result.seconds:.1f} s"
    ]
    if result.coverage:
        lines.append("tokens that reached each expert, by layer:")
    room = terminal_columns(sys.stderr) - len("  999:") if sys.stderr.isatty() else 999
    n_shown = min(_SHOWN_EXPERTS, room // len(" 1234567"))
    for row in result.coverage:
        counts = " ".join(f"{n:>7}" for n in row.tokens)
        if len(row.tokens) > n_shown:
            few, many = min(row.tokens), max(row.tokens)
            counts = f"{few} to {many}, half of the {len(row.tokens)} experts got {median(row.tokens):g} or more"
        lines.append(f"  {row.layer:>3}: {counts}")
    return lines
