"""``ggufmoe diff``: how two GGUF files differ, for people or as JSON.

Owns the tables; ``inspection.diff`` compares. Text from the files is shown without control characters.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ggufmoe.cli.console import make_console, printable
from ggufmoe.cli.jobs import run_job
from ggufmoe.cli.params import with_options
from ggufmoe.cli.progress import progress_display
from ggufmoe.inspection.diff import KeyDifference, ModelDifference, PartDifference, TensorDifference, diff_models
from ggufmoe.options import option
from ggufmoe.options.convert_options import worker_threads
from ggufmoe.options.fields import check_values
from ggufmoe.sizes import counted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ggufmoe.gguf.header import GGUFValue, TensorInfo

_SHOWN_TENSORS = 12
_MAX_VALUE = 60
_NARROW_COLUMNS = 76
_KINDS = {
    "values": "in values",
    "type": "in type",
    "shape": "in shape",
    "added": "only in B",
    "removed": "only in A",
}


@dataclass(frozen=True)
class DiffOptions:
    """What is compared, and what is shown of it."""

    headers_only: bool = option(
        False, "--headers-only", help="Compare metadata, types and shapes, and read no weights."
    )
    show_all: bool = option(False, "--all", help="Name every tensor that differs, in the file's order.")
    threads: int | None = worker_threads()
    json: bool = option(False, "--json", help="Print one JSON object instead of text.")
    exit_code: bool = option(False, "--exit-code", help="End with exit code 1 if anything differs.")

    def __post_init__(self) -> None:
        check_values(self)


@with_options(DiffOptions)
def diff_command(
    before: Annotated[Path, typer.Argument(help="A GGUF file, or any shard of a split one.", metavar="A.gguf")],
    after: Annotated[Path, typer.Argument(help="Another one.", metavar="B.gguf")],
    options: DiffOptions,
) -> None:
    """Show how two GGUF files differ: metadata, tensors, types, shapes, and the relative error of each tensor.

    The error is the root mean square of the differences over that of A's values. Shards and the order of tensors do not
    matter. Values are computed only where bytes differ.
    """
    found = run_job(
        lambda show, cancel: diff_models(
            before,
            after,
            headers_only=options.headers_only,
            n_threads=options.threads,
            on_progress=show,
            cancel=cancel,
        ),
        progress_display("compare", phase="compare"),
    )
    if options.json:
        print(json.dumps(found.to_dict()))
    else:
        _show(found, headers_only=options.headers_only, show_all=options.show_all)
    if options.exit_code and not found.is_same:
        raise typer.Exit(1)


def _show(found: ModelDifference, *, headers_only: bool, show_all: bool) -> None:
    console = make_console()
    console.print(_summary(found, headers_only), style="bold")
    console.print(f"A: {_files(found.before)}\nB: {_files(found.after)}", style="dim")
    if found.keys:
        _print_keys(console, found.keys)
    if found.different:
        _print_parts(console, [part for part in found.parts if part.n_different])
        _print_tensors(console, found, show_all)


def _files(names: Sequence[str]) -> str:
    return printable(names[0]) + ("" if len(names) == 1 else f" and {len(names) - 1} more")


def _summary(found: ModelDifference, headers_only: bool) -> str:
    n_tensors = len(found.tensors)
    scope = f"{n_tensors} tensors by their headers, weights unread" if headers_only else f"all {n_tensors} tensors"
    if found.is_same:
        return f"the same: metadata and {scope}"
    n_keys, error = len(found.keys), found.relative_error
    keys = f"{counted(n_keys, 'metadata key')}" if n_keys else "no metadata key"
    tensors = f"{len(found.different)} of {n_tensors} tensors{_kinds(found)}" if found.different else "no tensor"
    return f"differ: {keys}, {tensors}" + ("" if error is None else f", relative error {_error(error)}")


def _kinds(found: ModelDifference) -> str:
    """In words, how the tensors differ; empty if only in their values."""
    counts = Counter(tensor.verdict for tensor in found.different)
    if len(counts) == 1:
        (verdict,) = counts
        return "" if verdict == "values" else f" {_KINDS[verdict]}"
    return " (" + ", ".join(f"{n} {_KINDS[verdict]}" for verdict, n in counts.most_common()) + ")"


# ---- metadata


def _print_keys(console: Console, keys: Sequence[KeyDifference]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    styles = {"+": "green", "-": "red", "~": "yellow"}
    for key in keys:
        sign, text = _key(key)
        table.add_row(Text(sign, styles[sign]), f"{printable(key.key, 80)}: {text}")
    console.print("\nmetadata", style="bold")
    console.print(table)


def _key(found: KeyDifference) -> tuple[str, str]:
    if found.before is None:
        assert found.after is not None, "one of the files has it"
        return "+", _value(found.after)
    if found.after is None:
        return "-", _value(found.before)
    return "~", _change(found, found.before, found.after)


def _change(found: KeyDifference, before: GGUFValue, after: GGUFValue) -> str:
    if found.n_items and found.first_item is not None:
        i, items = found.first_item, before.value
        first = f"[{i}] {_shown(items[i])} -> {_shown(after.value[i])}"
        return f"{found.n_items} of {len(items)} items differ, first {first}"
    kind = f" ({before.type.name} -> {after.type.name})" if before.type is not after.type else ""
    if before.item_type is not after.item_type and not kind and before.item_type and after.item_type:
        kind = f" (items {before.item_type.name} -> {after.item_type.name})"
    if isinstance(before.value, str) and isinstance(after.value, str) and max(len(before.value), len(after.value)) > 40:
        return _text_change(before.value, after.value)
    return f"{_value(before)} -> {_value(after)}{kind}"


def _text_change(before: str, after: str) -> str:
    """Two long texts, from shortly before the first character that differs."""
    n = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after)))
    start = max(0, n - 10)
    lead = "…" if start else ""
    sizes = f"{len(before)} and {len(after)} characters, from character {n + 1} on"
    return f"{sizes}: {lead}{_shown(before[start:], 40)} -> {lead}{_shown(after[start:], 40)}"


def _value(value: GGUFValue) -> str:
    if isinstance(value.value, list):
        few = ", ".join(_shown(item, 20) for item in value.value[:4])
        return f"{counted(len(value.value), 'item')}: {few}{', …' if len(value.value) > 4 else ''}"
    return _shown(value.value)


def _shown(value: Any, limit: int = _MAX_VALUE) -> str:
    return printable(value if isinstance(value, str) else str(value), limit) or "''"


# ---- tensors


def _print_parts(console: Console, parts: Sequence[PartDifference]) -> None:
    if not parts:
        return
    table = _table(("part", "differ", "bits/w A", "bits/w B", "rel. error"))
    for part in parts:
        error = "-" if part.relative_error is None else _error(part.relative_error)
        table.add_row(
            part.name,
            f"{part.n_different} of {part.n_tensors}",
            f"{part.bits_before:.2f}",
            f"{part.bits_after:.2f}",
            error,
        )
    console.print()
    console.print(table)


def _print_tensors(console: Console, found: ModelDifference, show_all: bool) -> None:
    listed = list(found.different) if show_all else sorted(found.different, key=_gravity)[:_SHOWN_TENSORS]
    narrow = console.width < _NARROW_COLUMNS
    table = _table(("tensor", "A", "B", "rel. error") + (() if narrow else ("largest diff.",)))
    for tensor in listed:
        table.add_row(*_row(tensor)[: 4 if narrow else 5])
    console.print()
    console.print(table)
    if len(listed) < len(found.different):
        smaller = ", with smaller errors" if listed and listed[0].relative_error is not None else ""
        console.print(f"and {len(found.different) - len(listed)} more{smaller}; --all names them")


def _gravity(tensor: TensorDifference) -> tuple[bool, float]:
    """Sort key: tensors without a number first (missing, of another shape), then the largest errors."""
    error = tensor.relative_error
    return (error is not None, -error if error is not None and error == error else float("-inf"))


def _table(headings: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold", padding=(0, 1))
    table.add_column(headings[0], overflow="fold")
    for heading in headings[1:]:
        table.add_column(heading, justify="right", no_wrap=heading not in ("A", "B"), overflow="fold")
    return table


def _row(tensor: TensorDifference) -> list[str]:
    shapes = tensor.verdict == "shape"
    sides = [_side(info, with_shape=shapes) for info in (tensor.before, tensor.after)]
    error = "-" if tensor.relative_error is None else _error(tensor.relative_error)
    largest = "-" if tensor.max_difference is None else f"{tensor.max_difference:.3g}"
    return [printable(tensor.name), *sides, error, largest]


def _side(info: TensorInfo | None, *, with_shape: bool) -> str:
    if info is None:
        return "none"
    return f"{info.type.name} {' x '.join(map(str, info.shape))}" if with_shape else info.type.name


def _error(value: float) -> str:
    """A relative error with three digits."""
    return f"{value:.4f}" if value >= 0.01 else f"{value:.2e}" if value else "0"
