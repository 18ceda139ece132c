"""``--sensitivity-text``: a sensitivity that is measured on the way to a file of a given size.

It is kept beside the output, where the next size of the same model finds it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from ggufmoe.cli.console import note, printable
from ggufmoe.cli.jobs import run_job
from ggufmoe.cli.progress import progress_display
from ggufmoe.errors import OptionError
from ggufmoe.options import ExportOptions, SensitivityOptions
from ggufmoe.work import CancelFlag, OnProgress

if TYPE_CHECKING:
    from ggufmoe.sensitivity import SensitivityResult

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


def measured(options: OptionsT, source: str, output: Path, text: Path | None, *, quiet: bool) -> OptionsT:
    """The options with a sensitivity that is measured on ``text``, or was by an earlier command; as given without it.

    Raises OptionError where no sensitivity is needed, or that beside the output is of another model or text, and the
    errors of ``ggufmoe.sensitivity``.
    """
    if text is None:
        return options
    if options.size_target is None or options.sensitivity is not None:
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
