"""What ``ggufmoe bench`` prints: a Markdown table as llama-bench's, CSV, JSON or JSON lines, row by row.

A row is printed as soon as it is measured, and the end always, so that an interrupted run leaves a complete document.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Collection, Sequence
from types import TracebackType
from typing import Any, Protocol, TextIO

from ggufmoe.cli.console import printable, terminal_columns, wrapped
from ggufmoe.cli.inspect import active_parameters
from ggufmoe.evaluation.bench import Case, MeasuredMachine, Result, as_record, model_type
from ggufmoe.sizes import counted, file_size, memory_size, short_count

_SPEED_WIDTH, _LEAST_SPEED_WIDTH = 20, 16


class Printer(Protocol):
    """Prints rows between ``__enter__`` and ``__exit__``."""

    def __enter__(self) -> Printer: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
    def add(self, result: Result) -> None: ...


def make_printer(
    kind: str, stream: TextIO, machine: MeasuredMachine, cases: Sequence[Case], given: Collection[str]
) -> Printer:
    """The printer for the output format ``kind``: ``md``, ``csv``, ``json`` or ``jsonl``.

    ``given`` are the names of the options set on the command line; the Markdown table has a column for those that it
    knows.
    """
    if kind == "md":
        return MarkdownPrinter(stream, machine, cases, given)
    if kind == "csv":
        return CsvPrinter(stream, machine)
    return JsonPrinter(stream, machine, lines=kind == "jsonl")


class CsvPrinter:
    """llama-bench's columns, and ours among them; samples are joined with semicolons."""

    def __init__(self, stream: TextIO, machine: MeasuredMachine) -> None:
        self._stream = stream
        self._machine = machine
        self._writer: csv.DictWriter[str] | None = None

    def __enter__(self) -> CsvPrinter:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is left to print."""

    def add(self, result: Result) -> None:
        """Print a row, below the names of the columns if it is the first."""
        record = {name: _csv_value(value) for name, value in as_record(result, self._machine).items()}
        if self._writer is None:
            self._writer = csv.DictWriter(self._stream, list(record), lineterminator="\n")
            self._writer.writeheader()
        self._writer.writerow(record)
        self._stream.flush()


def _csv_value(value: Any) -> Any:
    if isinstance(value, list):
        return ";".join(map(str, value))
    return int(value) if isinstance(value, bool) else value


class JsonPrinter:
    """Prints results as JSON: one array of objects, or with ``lines`` one object per line (JSON Lines)."""

    def __init__(self, stream: TextIO, machine: MeasuredMachine, *, lines: bool) -> None:
        self._stream = stream
        self._machine = machine
        self._lines = lines
        self._n_rows = 0

    def __enter__(self) -> JsonPrinter:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the array."""
        if not self._lines:
            self._write("\n]\n" if self._n_rows else "[]\n")

    def add(self, result: Result) -> None:
        """Print an object."""
        text = json.dumps(as_record(result, self._machine), ensure_ascii=False)
        before, after = ("", "\n") if self._lines else (",\n" if self._n_rows else "[\n", "")
        self._n_rows += 1
        self._write(before + text + after)

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


_COLUMNS = {
    "n_cpu_moe": "n_cpu_moe",
    "n_expert_used": "experts",
    "n_batch": "n_batch",
    "n_ubatch": "n_ubatch",
    "cache_type_k": "type_k",
    "cache_type_v": "type_v",
    "main_gpu": "mg",
    "split_mode": "sm",
    "kv_offload": "nkvo",
    "flash_attn": "fa",
    "device": "dev",
    "tensor_split": "ts",
    "override_tensor": "ot",
    "load_mode": "lm",
    "no_host": "noh",
    "repack": "rpk",
}
"""Options that have a column when they are given, and its heading; llama-bench's, where it has one."""
_FIELDS = {
    "cache_type_k": "type_k",
    "cache_type_v": "type_v",
    "kv_offload": "no_kv_offload",
    "device": "devices",
    "override_tensor": "tensor_buft_overrides",
}
"""Names in the record, where they are not the option's."""
_TEXTS = {"model", "backend", "dev", "ts", "ot", "sm", "lm", "fa", "type_k", "type_v"}
"""Headings of columns whose text stands on the left."""


class MarkdownPrinter:
    """A table as llama-bench prints it, then lines that describe the models and the machine."""

    def __init__(self, stream: TextIO, machine: MeasuredMachine, cases: Sequence[Case], given: Collection[str]) -> None:
        self._stream = stream
        self._machine = machine
        self._cases = cases
        has_gpu = machine.backends != ("CPU",)
        shown = [option for option in _COLUMNS if option in given]
        self._options = [*(["n_gpu_layers"] if has_gpu or "n_gpu_layers" in given else []), *shown]
        options = [*map(_heading, self._options), "threads", "test", "t/s"]
        self._headings = ["model", "size", "params", "backend", *options]
        self._speed_width, self._is_stacked = _SPEED_WIDTH, False
        self._constant: dict[str, str | None] = {}
        """Headings that are left out because all rows have the same value, and that value once it is known."""
        self._short: list[str] = []
        if stream.isatty():
            self._fit(terminal_columns(stream), options)

    def _fit(self, columns: int, options: list[str]) -> None:
        """Leave out columns until a line fits, those first whose values are printed below the table as well."""
        if self._line_width > columns:
            self._headings = ["model", *options] if len({case.model for case in self._cases}) > 1 else options
        if self._line_width > columns:
            self._speed_width = _LEAST_SPEED_WIDTH
        if self._line_width > columns:
            same = (name for name in ("n_threads", *self._options) if len(set(map(_value(name), self._cases))) == 1)
            self._constant = dict.fromkeys(map(_heading, same))
            self._headings = [heading for heading in self._headings if heading not in self._constant]
        self._is_stacked = self._line_width > columns

    @property
    def _widths(self) -> list[int]:
        return [self._width(heading) for heading in self._headings]

    @property
    def _line_width(self) -> int:
        return sum(width + 3 for width in self._widths) + 1

    def _width(self, heading: str) -> int:
        longest = {
            "model": max(len(model_type(case.report)) for case in self._cases),
            "size": 10,
            "params": 9,
            "backend": len(",".join(self._machine.backends)),
            "test": max(len(case.workload.name) for case in self._cases),
            "t/s": self._speed_width,
        }
        return max(len(heading), longest.get(heading, 0))

    def __enter__(self) -> MarkdownPrinter:
        if self._is_stacked:
            return self
        self._line(self._headings)
        rules = ("-" * (width - 1) for width in self._widths)
        ends = ("-" if heading in _TEXTS else ":" for heading in self._headings)
        self._line([rule + end for rule, end in zip(rules, ends, strict=True)])
        return self

    def __exit__(self, *_: object) -> None:
        """Print the lines that describe the models and the machine."""
        self._print("")
        for note in self._short:
            self._print_note(note)
        same = ", ".join(f"{heading} {value}" for heading, value in self._constant.items() if value is not None)
        if same:
            self._print_note(f"all rows: {same}")
        for case in {case.model: case for case in self._cases}.values():
            report, name = case.report, printable(case.model.name)
            size = f"{file_size(report.n_bytes)}, {report.bits_per_weight:.2f} bits per weight"
            self._print_note(f"{name}: {active_parameters(report)}, {size}")
        machine = self._machine
        memory = f", {memory_size(machine.memory_bytes)}" if machine.memory_bytes else ""
        devices = ", ".join((machine.cpu, *machine.gpus))
        self._print_note(f"machine: {devices}, {counted(machine.n_cores, 'core')}{memory}")
        commit = machine.llama_cpp_commit.split("-")[0]
        self._print_note(f"build: llama.cpp {commit} (llama-cpp-python {machine.package})")

    def add(self, result: Result) -> None:
        """Print a row; one that was interrupted is marked, and explained below the table."""
        record = as_record(result, self._machine)
        n_samples = len(result.samples_s)
        mark = "" if n_samples == result.repetitions else "*"
        if mark:
            self._short.append(f"*: {n_samples} of {result.repetitions} repetitions, then it ended early")
        cells = {
            "model": record["model_type"],
            "size": memory_size(record["model_size"]),
            "params": short_count(record["model_n_params"]),
            "backend": record["backends"],
            "threads": str(record["n_threads"]),
            "test": result.case.workload.name,
            "t/s": self._speed(result, mark),
        }
        cells |= {_heading(option): _cell(record[_FIELDS.get(option, option)]) for option in self._options}
        self._constant = {heading: cells[heading] for heading in self._constant}
        if self._is_stacked:
            self._print_note(", ".join(f"{heading} {cells[heading]}" for heading in self._headings))
        else:
            self._line([cells[heading] for heading in self._headings])

    def _speed(self, result: Result, mark: str) -> str:
        """Mean and spread as llama-bench prints them, with fewer digits where a terminal is too narrow for them."""
        for digits in (2, 1, 0):
            text = f"{result.tokens_per_s:.{digits}f} ± {result.spread_tokens_per_s:.{digits}f}{mark}"
            if len(text) <= self._speed_width or not self._stream.isatty():
                break
        return text

    def _line(self, cells: Sequence[str]) -> None:
        parts = (
            cell.ljust(width) if heading in _TEXTS else cell.rjust(width)
            for cell, heading, width in zip(cells, self._headings, self._widths, strict=True)
        )
        self._print("| " + " | ".join(part.replace("|", "\\|") for part in parts) + " |")

    def _print_note(self, line: str) -> None:
        self._print(wrapped(line, terminal_columns(self._stream)) if self._stream.isatty() else line)

    def _print(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


def _heading(option: str) -> str:
    return {"n_gpu_layers": "ngl", "n_threads": "threads"}.get(option) or _COLUMNS[option]


def _value(option: str) -> Callable[[Case], Any]:
    return lambda case: getattr(case.context, option, getattr(case.offload, option, None))


def _cell(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else printable(str(value))
