"""``ggufmoe convert``: a checkpoint becomes a GGUF file.

Owns what is shown and what Ctrl-C means; the work is ``ggufmoe.convert``'s. The summary goes to stderr, so that stdout
holds only what was asked for: the plan of ``--dry-run``, the object of ``--json``.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ggufmoe.cli.params import with_options
from ggufmoe.cli.progress import progress_display
from ggufmoe.cli.router import print_router
from ggufmoe.options import ConvertOptions
from ggufmoe.sizes import file_size
from ggufmoe.work import Progress

if TYPE_CHECKING:
    from ggufmoe.convert import ConvertResult
    from ggufmoe.writing.plan import WritePlan


@with_options(ConvertOptions)
def convert_command(
    source: Annotated[str, typer.Argument(help="A checkpoint directory, a recipe.yaml, or a hub id (org/name).")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The GGUF file to write.", metavar="OUT.gguf")],
    *,
    options: ConvertOptions,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be written, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress and no summary.")] = False,
) -> None:
    """Turn a checkpoint or a merge recipe into a quantized GGUF file, in one pass.

    An interrupted run leaves OUT.partial and a journal; --resume goes on from there and gives the same file.
    """
    if dry_run:
        _show_plan(source, output, options, as_json)
        return
    result = run_conversion(source, output, options, quiet=quiet)
    if not quiet:
        if result.router_report is not None:
            print_router(result.router_report)
        print(summary(result), file=sys.stderr)
    if as_json:
        print(json.dumps(result.to_dict() | {"peak_memory_bytes": peak_memory_bytes()}))


def run_conversion(source: str, output: Path, options: ConvertOptions, *, quiet: bool) -> ConvertResult:
    """Convert with a progress display and a gentle Ctrl-C."""
    from ggufmoe.convert import convert

    interrupt = Interrupt()
    with interrupt.handled(), progress_display(f"convert {options.quant}", quiet=quiet) as display:

        def show(step: Progress) -> None:
            interrupt.be_gentle()
            display.update(step)

        return convert(source, output, options=options, on_progress=show, cancel=interrupt)


class Interrupt:
    """Ctrl-C and SIGTERM as something to ask: ``is_set`` once the user wants to stop.

    Until ``be_gentle``, and at a second Ctrl-C, they interrupt at once: opening a source has nothing to save.
    """

    def __init__(self) -> None:
        self._gentle = False
        self._event = threading.Event()

    def is_set(self) -> bool:
        """Whether to stop."""
        return self._event.is_set()

    def be_gentle(self) -> None:
        """From now on the work looks at ``is_set`` and stops by itself."""
        self._gentle = True

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Listen to the signals, where this thread may; the earlier handlers are put back."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: object) -> None:
        if self._event.is_set() or not self._gentle:
            raise KeyboardInterrupt
        self._event.set()


def summary(result: ConvertResult) -> str:
    """One line: what was written, and what it cost."""
    speed = file_size(result.bytes_written / max(result.seconds, 1e-9))
    first, count = result.paths[0], len(result.paths)
    where = str(first) if count == 1 else f"{first} and {count - 1} more"
    cost = f"{result.seconds:.1f} s, {speed}/s"
    return f"{where}: {file_size(result.n_bytes)}, {result.plan.bits_per_weight:.2f} bits per weight, {cost}"


def _show_plan(source: str, output: Path, options: ConvertOptions, as_json: bool) -> None:
    from ggufmoe.convert import plan_convert

    plan = plan_convert(source, output, options=options)
    print(json.dumps(plan.to_dict()) if as_json else plan_table(plan))


def plan_table(plan: WritePlan) -> str:
    """A plan for people: every tensor, and what each type amounts to."""
    lines: list[str] = []
    width = max(len(tensor.name) for tensor in plan.tensors)
    for file in plan.files:
        lines.append(f"{file.path}: {file_size(file.n_bytes)}, {len(file.tensors)} tensors")
        for tensor in file.tensors:
            shape = " x ".join(map(str, tensor.shape))
            lines.append(f"  {tensor.name:{width}}  {tensor.type.name:8} {shape:>20}  {file_size(tensor.n_bytes):>10}")
    for name, total in plan.types.items():
        lines.append(
            f"{name:8} {total.n_tensors:5} tensors  {total.n_weights:>14,} weights  {file_size(total.n_bytes):>10}"
        )
    lines.append(
        f"in all {file_size(plan.n_bytes)}, {plan.n_weights:,} weights, {plan.bits_per_weight:.2f} bits per weight"
    )
    return "\n".join(lines)


def peak_memory_bytes() -> int | None:
    """The largest resident memory that this process has had; None on Windows."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
