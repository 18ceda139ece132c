"""``ggufmoe doctor``: whether everything that ggufmoe depends on works on this machine.

Owns the table and the exit code; ``ggufmoe.doctor`` examines and advises.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import chain, groupby
from typing import TYPE_CHECKING, Annotated

import typer

from ggufmoe.cli.console import make_console
from ggufmoe.cli.progress import ProgressLine
from ggufmoe.doctor import Finding, check_workers, examine
from ggufmoe.errors import GgufmoeError, OptionError
from ggufmoe.folders import state_directory
from ggufmoe.options import OffloadOptions

if TYPE_CHECKING:
    from rich.console import Console

_STYLES = {"ok": "green", "note": "yellow", "wrong": "bold red"}
_NARROW_COLUMNS = 64


def doctor_command(
    *,
    rpc: Annotated[
        str | None, typer.Option("--rpc", help="Check these workers as well.", metavar="HOST:PORT,...")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Check the engine, its devices, the quantization kernels and the software around them.

    Generates a few tokens with a tiny model that is made on the spot; needs no network. Ends with exit code 1 if
    something is wrong, and says what to do.
    """
    try:
        workers = OffloadOptions(rpc=rpc).workers
    except OptionError as error:
        raise typer.BadParameter(str(error)) from error
    chats = state_directory()
    found = chain(examine({} if chats is None else {"chats": chats}), check_workers(workers))
    with ProgressLine("doctor", phase="check", waiting="checking") as line:
        findings = list(found) if as_json else list(_shown(found, line))
    wrong = [finding for finding in findings if finding.status == "wrong"]
    if as_json:
        print(json.dumps({"ok": not wrong, "checks": [finding.to_dict() for finding in findings]}))
    if wrong:
        first = wrong[0]
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise GgufmoeError(f"{first.topic}, {first.name}: {first.text}; {first.way_out}{more}")


def _shown(findings: Iterable[Finding], line: ProgressLine) -> Iterable[Finding]:
    """The same findings, each topic printed when it is complete."""
    console = make_console()
    for topic, group in groupby(findings, lambda finding: finding.topic):
        members = list(group)
        with line.hidden():
            _print_topic(console, topic, members)
        yield from members


def _print_topic(console: Console, topic: str, findings: list[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2 if console.width >= _NARROW_COLUMNS else 1))
    table.add_column(no_wrap=True, min_width=5)
    table.add_column(style="dim", no_wrap=True, min_width=10)
    table.add_column(overflow="fold")
    for finding, following in zip(findings, [*findings[1:], None], strict=True):
        status = Text(finding.status, _STYLES[finding.status])
        table.add_row(status, finding.name, finding.text)
        if finding.way_out and (following is None or following.way_out != finding.way_out):
            table.add_row("", "", Text(f"-> {finding.way_out}", _STYLES[finding.status]))
    console.print(topic, style="bold")
    console.print(table)
    console.print()
