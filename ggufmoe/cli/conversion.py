"""What ``convert``, ``quantize`` and ``merge`` print, and how an output is called that was given no name.

They print the plan of ``--dry-run``, a summary, and the object of ``--json``.

The summary goes to stderr, so that stdout holds only what was asked for.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ggufmoe.cli.console import note, printable, terminal_columns, without_controls, wrapped
from ggufmoe.cli.progress import ProgressLine, duration
from ggufmoe.cli.router import print_router
from ggufmoe.sizes import file_size
from ggufmoe.work import OnProgress, Progress

if TYPE_CHECKING:
    from ggufmoe.convert import ConvertResult, MergeResult
    from ggufmoe.writing.plan import NetworkReads, PlannedTensor, WritePlan


_EXAMPLE_RATES_MBIT = (50, 500)


def default_output(source: str, quant: str, size: str | None = None) -> Path:
    """``NAME-TYPE.gguf`` in the current folder, by ``model_name``. Raises OptionError for an unknown file type."""
    from ggufmoe.export.naming import model_name

    return Path(f"{model_name(source, quant, size)}.gguf")


def naming(output: Path, display: ProgressLine, show: OnProgress) -> OnProgress:
    """``show`` for a job whose output the user did not name: before the first report a line says how it is called.

    Not before, because a job that is refused writes nothing.
    """
    has_told = False

    def tell_and_show(progress: Progress) -> None:
        nonlocal has_told
        if not has_told:
            has_told = True
            with display.hidden():
                note(f"writes {printable(str(output))}; -o gives another name")
        show(progress)

    return tell_and_show


def show_plan(plan: WritePlan, *, as_json: bool, line_mbit: float | None = None) -> None:
    """Print a plan: one JSON object, or every tensor, what each type amounts to, and what comes over the network.

    ``line_mbit`` is the rate of the user's line in Mbit/s; None for two examples.
    """
    if as_json:
        print(json.dumps(plan.to_dict()))
        return
    columns = terminal_columns(sys.stdout) if sys.stdout.isatty() else None
    for line in _plan_lines(plan, columns, line_mbit):
        print(without_controls(line if columns is None else wrapped(line, columns)))


def show_result(result: ConvertResult | MergeResult, *, as_json: bool, quiet: bool) -> None:
    """Print what the recipe's router does and a line about what was written; with ``as_json`` one JSON object too."""
    from ggufmoe.convert import MergeResult

    if not quiet:
        if result.router_report is not None:
            print_router(result.router_report)
        note(_summary(result))
        if not isinstance(result, MergeResult):
            for line in _prediction_lines(result.plan):
                note(line)
            if result.plan.fallbacks:
                note(_fallback_line(result.plan))
    if as_json:
        print(json.dumps(result.to_dict() | {"peak_memory_bytes": _peak_memory_bytes()}))


def _summary(result: ConvertResult | MergeResult) -> str:
    from ggufmoe.convert import MergeResult

    parts = [file_size(result.n_bytes)]
    if isinstance(result, MergeResult):
        where = str(result.directory)
    else:
        where = str(result.paths[0]) + (f" and {len(result.paths) - 1} more" if len(result.paths) > 1 else "")
        parts.append(f"{result.plan.bits_per_weight:.2f} bits per weight")
    if result.network_bytes:
        parts.append(f"{file_size(result.network_bytes)} over the network")
    speed = file_size(result.bytes_written / max(result.seconds, 1e-9))
    return f"{where}: {', '.join([*parts, f'{result.seconds:.1f} s', f'{speed}/s'])}"


def _fallback_line(plan: WritePlan) -> str:
    """How many tensors have another type than the file type means, and why."""
    fallen = plan.fallbacks
    wanted = sorted({tensor.unfit_type.name for tensor in fallen if tensor.unfit_type})
    block = max(tensor.unfit_type.block_size for tensor in fallen if tensor.unfit_type)
    share = sum(tensor.n_weights for tensor in fallen) / plan.n_weights
    rows = ", ".join(str(n) for n in sorted({tensor.n_cols for tensor in fallen}))
    taken = ", ".join(sorted({tensor.type.name for tensor in fallen}))
    return (
        f"{len(fallen)} of {len(plan.tensors)} tensors, {share:.0%} of the weights, are {taken} and not "
        f"{' or '.join(wanted)}: their rows of {rows} are not a multiple of {block}"
    )


def _plan_lines(plan: WritePlan, columns: int | None, line_mbit: float | None) -> list[str]:
    """Files, tensors, types and the sum; without the shapes of tensors where they do not fit into ``columns``."""
    lines: list[str] = []
    cells = [_cells(tensor) for file in plan.files for tensor in file.tensors]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    has_shapes = columns is None or sum(widths) + 2 * len(widths) <= columns
    for file in plan.files:
        lines.append(f"{file.path}: {file_size(file.n_bytes)}, {len(file.tensors)} tensors")
        for name, kind, shape, size in map(_cells, file.tensors):
            middle = f"  {shape:>{widths[2]}}" if has_shapes else ""
            lines.append(f"  {name:{widths[0]}}  {kind:{widths[1]}}{middle}  {size:>{widths[3]}}")
    for name, total in plan.types.items():
        lines.append(
            f"{name:8} {total.n_tensors:5} tensors  {total.n_weights:>14,} weights  {file_size(total.n_bytes):>10}"
        )
    if plan.fallbacks:
        lines.append(_fallback_line(plan))
    lines += _mix_lines(plan)
    lines += _network_lines(plan, line_mbit)
    lines.append(
        f"in all {file_size(plan.n_bytes)}, {plan.n_weights:,} weights, {plan.bits_per_weight:.2f} bits per weight"
    )
    return lines


def _mix_lines(plan: WritePlan) -> list[str]:
    """The types of each part of the model by layers, and the prediction beside that of the best standard mix."""
    from ggufmoe.gguf.names import layer_of, without_layer

    if plan.mix is None:
        return []
    parts: dict[str, list[tuple[int | None, str]]] = {}
    for tensor in plan.tensors:
        if tensor.name in plan.mix.types:
            name = without_layer(tensor.name).removesuffix(".weight")
            parts.setdefault(name, []).append((layer_of(tensor.name), tensor.type.name))
    width = max(map(len, parts))
    lines = [f"  {name:{width}}  {_layer_runs(types)}" for name, types in parts.items()]
    return ["the mix by part and layer:", *lines, *_prediction_lines(plan)]


def _layer_runs(types: Sequence[tuple[int | None, str]]) -> str:
    """``Q6_K 0-3, Q4_K 4-31``; a type alone outside of the layers."""
    if types[0][0] is None:
        return types[0][1]
    runs: list[list[Any]] = []
    for layer, kind in types:
        if runs and runs[-1][0] == kind:
            runs[-1][2] = layer
        else:
            runs.append([kind, layer, layer])
    return ", ".join(f"{kind} {first}" + ("" if first == last else f"-{last}") for kind, first, last in runs)


def _prediction_lines(plan: WritePlan) -> list[str]:
    """The predicted divergence of the mix, and of the standard mix that it is compared with."""
    mix = plan.mix
    if mix is None:
        return []
    lines = [
        f"predicted KL divergence {mix.predicted_kl:.4f}: {mix.name}, {file_size(plan.n_bytes)}{_pace(mix.seconds)}"
    ]
    if mix.standard is not None:
        standard = mix.standard
        rank = "best" if mix.seconds is None else "largest"
        lines.append(
            f"predicted KL divergence {standard.predicted_kl:.4f}: {standard.name}, {file_size(standard.n_bytes)}"
            f"{_pace(standard.seconds)}, the {rank} standard mix that is no larger"
        )
    return lines


def _pace(seconds: float | None) -> str:
    """What the matrices take for a token on this machine, where it is known."""
    return "" if seconds is None else f", {seconds * 1e3:.3g} ms a token"


def _network_lines(plan: WritePlan, line_mbit: float | None) -> list[str]:
    """What comes over the network, how long that takes, and how much disk each way takes."""
    reads = plan.network
    if reads is None:
        return []
    lines = []
    if reads.cached_bytes:
        lines.append(f"read from the hub's cache: {file_size(reads.cached_bytes)}")
    if not reads.file_bytes:
        return [*lines, f"over the network nothing; on disk {file_size(plan.n_bytes)}"]
    models = ", ".join(f"{name.partition('@')[0]}@{commit[:12]}" for name, commit in plan.commits.items())
    before = f", {file_size(reads.router_bytes)} of it before, for the router" if reads.router_bytes else ""
    lines += [
        f"read from the hub by ranges: {models}",
        f"over the network {file_size(reads.n_bytes)}{before}: {network_times(reads.n_bytes, line_mbit)}",
        f"on disk {file_size(plan.n_bytes + reads.kept_bytes)}; with --keep-source {file_size(reads.file_bytes)} more, "
        f"in the hub's cache, and {file_size(reads.file_bytes)} over the network",
    ]
    return [*lines, *_twice_lines(reads)]


def _twice_lines(reads: NetworkReads) -> list[str]:
    """What comes over the network more than once, with and without --source-cache."""
    if not reads.twice_bytes:
        return []
    twice, kept = reads.twice_bytes, reads.kept_bytes
    if not kept:
        return [
            f"{file_size(twice)} of the base come twice; --source-cache {math.ceil(twice / 1e9)}G keeps them on the "
            "output's disk meanwhile, so that they come once"
        ]
    left = f"; {file_size(twice - kept)} come twice" if kept < twice else ""
    return [f"{file_size(kept)} of the base come once: --source-cache keeps them on the output's disk meanwhile{left}"]


def network_times(n_bytes: int, line_mbit: float | None = None) -> str:
    """How long so many bytes take at the rate of the user's line, or at two rates."""
    rates = _EXAMPLE_RATES_MBIT if line_mbit is None else (line_mbit,)
    return ", ".join(f"{duration(n_bytes / (mbit * 125_000))} at {mbit:g} Mbit/s" for mbit in rates)


def _cells(tensor: PlannedTensor) -> tuple[str, str, str, str]:
    shape = " x ".join(map(str, tensor.shape))
    return tensor.name, tensor.type.name, shape, file_size(tensor.n_bytes)


def _peak_memory_bytes() -> int:
    """The largest resident memory that this process has had."""
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
