#!/usr/bin/env python3
"""How far files of equal sizes are from the unquantized model: standard mixes, and mixes chosen in several ways.

``measure`` makes, for each calibration text and file type, the file of the standard mix, and files of at most its size:

- ``relative``: chosen by the relative squared error of each tensor, weighted by the importance of columns and by rows;
- ``all``, ``k`` and ``fast``: chosen by the predicted divergence, from the types that ``--types`` of that name allows.

All use the importance matrix of the same calibration. The mean KL divergence from the model on a text is kept in
DIR/results.json, with the difference from the standard mix and its paired error; what is there is not measured again.
A calibration is a text, a .jsonl file of conversations, or a sensitivity (.gguf) that was measured before. Only the
files of the first calibration are kept, for ``speed``, which times them in turn: best on a machine with nothing else
to do. ``table`` prints what the folders hold, in Markdown, and the median and worst change over all their models.

usage: bench_sizes.py measure MODEL-F16.gguf TEXT --calibration A --calibration B [--mixes all,fast] --folder DIR
       bench_sizes.py speed DIR [--rounds 5]
       bench_sizes.py table DIR...
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

import ggufmoe
from ggufmoe.evaluation.bench import Workload, plan_bench, run_bench
from ggufmoe.evaluation.divergence import Comparison
from ggufmoe.export.gguf_source import GGUFSource
from ggufmoe.gguf.header import read_header
from ggufmoe.gguf.names import TOKEN_EMBEDDING
from ggufmoe.gguf.own_keys import MIX
from ggufmoe.gguf.stored_rows import GGUFRows
from ggufmoe.native import quantizing
from ggufmoe.sizing.sensitivity_file import EmbeddingSensitivity, Floats, MatrixSensitivity, Sensitivity

STANDARD, RELATIVE = "standard", "relative"
QUANTS = "Q2_K,IQ3_XXS,Q3_K_M,Q4_K_M,Q5_K_M"
TESTS = {"tg": Workload(0, 64), "pp": Workload(256, 0)}
"""What is timed: tokens that are generated, and tokens of a prompt."""
_ROWS = 1024
"""Rows that are read at a time."""


@dataclass
class Results:
    """What was measured of one model, and the file that holds it."""

    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    kl: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """By calibration, file type and mix: ``bytes``, ``kl``, ``error``, ``predicted``, and the paired ``difference``."""
    speed: dict[str, dict[str, dict[str, list[float]]]] = field(default_factory=dict)
    """By file type, mix and test: tokens per second in each round."""

    @classmethod
    def load(cls, folder: Path) -> Results:
        path = folder / "results.json"
        return cls(folder, **json.loads(path.read_text())) if path.exists() else cls(folder)

    def save(self) -> None:
        held = {name: value for name, value in asdict(self).items() if name != "folder"}
        (self.folder / "results.json").write_text(json.dumps(held, indent=1))


def weighted_squares(rows: GGUFRows, columns: Floats) -> float:
    """The sum of the squares of a matrix's weights, each times the importance of its column."""
    n_rows, n_cols = rows.shape[-2:]
    total = 0.0
    for start in range(0, n_rows, _ROWS):
        stored = np.empty((min(_ROWS, n_rows - start), rows.type.row_bytes(n_cols)), np.uint8)
        rows.read_rows(start, start + len(stored), stored)
        total += float((np.square(quantizing.widened(rows.type, stored, n_cols)) @ columns).sum(dtype=np.float64))
    return total


def relative(model: Path, known: Sensitivity) -> Sensitivity:
    """A sensitivity by which the predicted divergence of a tensor is its relative error times its rows."""
    matrices: dict[str, MatrixSensitivity] = {}
    embedding = known.embedding
    with contextlib.closing(GGUFSource(model)) as source:
        for tensor in source.tensors:
            n_rows, n_cols = tensor.shape[-2:] if len(tensor.shape) > 1 else (1, tensor.shape[-1])
            if tensor.name == TOKEN_EMBEDDING:
                even = np.ones(n_cols, np.float32)
                each = n_rows / weighted_squares(tensor.parts[0], even)
                embedding = EmbeddingSensitivity(even, np.full(n_rows, each, np.float32))
            elif tensor.name in known.matrices:
                matrix = known.matrices[tensor.name]
                means = (matrix.in_sum2 / np.maximum(matrix.counts, 1)[:, None]).astype(np.float32)
                sums = [weighted_squares(part, row) for part, row in zip(tensor.parts, means, strict=True)]
                gradients = np.repeat([[n_rows / max(one, 1e-30)] for one in sums], n_rows, axis=1).astype(np.float32)
                ones = np.ones(len(means), np.float32)
                matrices[tensor.name] = MatrixSensitivity(means, ones, gradients)
    tied = {} if "output.weight" in matrices else {"output.weight": _nothing(known.matrices["output.weight"])}
    return Sensitivity(
        known.architecture, known.source, 1, known.seed, known.datasets, known.chunk_size, matrices | tied, embedding
    )


def _nothing(matrix: MatrixSensitivity) -> MatrixSensitivity:
    """A role that counts for nothing: an output that is the embedding."""
    return MatrixSensitivity(matrix.in_sum2 * 0, matrix.counts, matrix.grad_sum2 * 0)


@dataclass(frozen=True)
class Calibration:
    """A sample of text, the sensitivity that was measured on it, and the one that stands for relative errors."""

    name: str
    sensitivity: Path
    by_error: Path


def calibrate(model: Path, text: Path, folder: Path, n_tokens: int, n_ctx: int) -> Calibration:
    """Measure the sensitivity on a text, unless that was done."""
    measured = text if text.suffix == ".gguf" else folder / f"{text.stem}-sensitivity.gguf"
    if not measured.exists():
        ggufmoe.sensitivity(model, measured, text_file=text, n_tokens=n_tokens, n_ctx=n_ctx)
    by_error = folder / f"{text.stem}-relative.gguf"
    if not by_error.exists():
        relative(model, Sensitivity.load(measured)).save(by_error)
    return Calibration(text.stem, measured, by_error)


def made(model: Path, known: Calibration, quant: str, mix: str, folder: Path) -> Path:
    """The file of a mix, of at most the size of the standard file of ``quant``; one that exists is kept."""
    path = folder / f"{known.name}-{quant}-{mix}.gguf"
    if path.exists():
        return path
    if mix == STANDARD:
        ggufmoe.quantize(model, path, quant, imatrix=known.sensitivity)
        return path
    by, types = (known.by_error, "all") if mix == RELATIVE else (known.sensitivity, mix)
    size = str(made(model, known, quant, STANDARD, folder).stat().st_size)
    ggufmoe.quantize(model, path, size=size, sensitivity=by, types=types, imatrix=known.sensitivity)  # type: ignore[arg-type]
    return path


def measure(given: argparse.Namespace) -> None:
    """Make the files that results.json lacks, and compare them with the model."""
    given.folder.mkdir(parents=True, exist_ok=True)
    results = Results.load(given.folder)
    results.settings = {
        "model": given.model.name, "text": given.text.name, "n_ctx": given.n_ctx, "chunks": given.chunks,
        "tokens": given.tokens,
    }  # fmt: skip
    for number, text in enumerate(given.calibration):
        known = calibrate(given.model, text, given.folder, given.tokens, given.calibration_ctx)
        for quant in given.quants.split(","):
            rows = results.kl.setdefault(known.name, {}).setdefault(quant, {})
            mixes = [mix for mix in given.mixes.split(",") if mix not in rows]
            if not mixes:
                continue
            paths = [made(given.model, known, quant, mix, given.folder) for mix in (STANDARD, *mixes)]
            found = ggufmoe.kl_divergences(
                paths,
                given.model,
                text_file=given.text,
                logits=given.folder / f"{given.text.stem}-{given.n_ctx}x{given.chunks}.logits",
                n_ctx=given.n_ctx,
                chunks=given.chunks,
                n_threads=given.threads,
            )
            rows |= compared((STANDARD, *mixes), paths, found)
            results.save()
            print(known.name, quant, *(f"{mix} {rows[mix]['kl']:.5f}" for mix in (STANDARD, *mixes)), flush=True)
            if number:
                for path in paths:
                    path.unlink()


def compared(mixes: Sequence[str], paths: Sequence[Path], found: Comparison) -> dict[str, Any]:
    """What is kept of a comparison, by mix; the first is the standard mix."""
    rows: dict[str, Any] = {}
    for number, (mix, path, one) in enumerate(zip(mixes, paths, found.models, strict=True)):
        rows[mix] = {"bytes": path.stat().st_size, "kl": one.kl.mean.value, "error": one.kl.mean.uncertainty}
        if number:
            above = found.kl_differences[number - 1]
            rows[mix]["difference"] = [above.value, above.uncertainty]
            rows[mix]["predicted"] = json.loads(read_header(path).metadata[MIX].value)["predicted_kl"]
    return rows


def speed(given: argparse.Namespace) -> None:
    """Time the files of the first calibration, those of one size in turn, round after round."""
    for folder in given.folders:
        results = Results.load(folder)
        calibration = next(iter(results.kl))
        for quant in given.quants.split(","):
            for _ in range(given.rounds):
                for mix in (mix for mix in results.kl[calibration][quant] if mix != RELATIVE):
                    cases = plan_bench([folder / f"{calibration}-{quant}-{mix}.gguf"], tuple(TESTS.values()))
                    samples = results.speed.setdefault(quant, {}).setdefault(mix, {test: [] for test in TESTS})
                    for test, result in zip(TESTS, run_bench(cases, repetitions=1), strict=True):
                        samples[test].append(result.tokens_per_s)
            results.save()


def table(given: argparse.Namespace) -> None:
    """Print what was measured of each model, and what all have in common."""
    all_results = [Results.load(folder) for folder in given.folders]
    mixes = [mix for mix in ("all", "k", "fast") if any(mix in rows for rows in _measured(all_results))]
    heads = [head for mix in mixes for head in (mix, "change", "paired error")]
    print(f"| model | size of | bytes | standard | relative error | {' | '.join(heads)} |")
    print("|---" * (len(heads) + 5) + "|")
    for results in all_results:
        for quant in QUANTS.split(","):
            print(f"| {results.folder.name} | {' | '.join(_kl_cells(results, quant, mixes))} |")
    print("\n| size of | mix | median change | least and greatest change | worse than standard |")
    print("|---|---|---|---|---|")
    for quant in QUANTS.split(","):
        for mix in (RELATIVE, *mixes):
            found = [each for results in all_results for each in changes(results, quant, mix)]
            if found:
                worse = sum(each > 0 for each in found)
                print(f"| {quant} | {mix} | {median(found) * 100:+.1f} % | {_range(found)} | {worse} of {len(found)} |")
    speeds = [f"{mix}, {what}" for what in ("generating", "prompts") for mix in mixes]
    print(f"\n| model | size of | standard, tokens/s | {' | '.join(speeds)} |")
    print("|---" * (len(speeds) + 3) + "|")
    for results in all_results:
        for quant, by_mix in results.speed.items():
            print(f"| {results.folder.name} | {quant} | {' | '.join(_speed_cells(by_mix, mixes))} |")


def _measured(all_results: Sequence[Results]) -> Iterator[dict[str, Any]]:
    return (rows for results in all_results for by_quant in results.kl.values() for rows in by_quant.values())


def changes(results: Results, quant: str, mix: str) -> list[float]:
    """The relative change of the divergence from the standard mix, by calibration."""
    found = (by_quant.get(quant, {}) for by_quant in results.kl.values())
    return [rows[mix]["kl"] / rows[STANDARD]["kl"] - 1 for rows in found if mix in rows]


def _kl_cells(results: Results, quant: str, mixes: Sequence[str]) -> Iterator[str]:
    """Means over the calibrations; of the changes the least and the greatest, of the paired errors the largest."""
    rows = [by_quant[quant] for by_quant in results.kl.values() if by_quant.get(quant)]
    yield quant
    yield f"{max(row[STANDARD]['bytes'] for row in rows):,}"
    for mix in (STANDARD, RELATIVE, *mixes):
        held = [row[mix] for row in rows if mix in row]
        yield f"{fmean(one['kl'] for one in held):.5f}" if held else ""
        if mix in mixes:
            yield _range(changes(results, quant, mix))
            yield f"{max(one['difference'][1] for one in held):.5f}" if held else ""


def _range(found: Sequence[float]) -> str:
    """The least and the greatest change, or the only one."""
    ends = dict.fromkeys(f"{end * 100:+.1f} %" for end in (max(found, default=0.0), min(found, default=0.0)))
    return " to ".join(ends) if found else ""


def _speed_cells(by_mix: dict[str, dict[str, list[float]]], mixes: Sequence[str]) -> Iterator[str]:
    """Tokens per second of the standard mix in both tests, and the median of the ratios of each round."""
    yield " and ".join(f"{median(by_mix[STANDARD][test]):.0f}" for test in TESTS)
    for test in TESTS:
        yield from (f"{_ratio(by_mix, mix, test):.2f}" if mix in by_mix else "" for mix in mixes)


def _ratio(by_mix: dict[str, dict[str, list[float]]], mix: str, test: str) -> float:
    return median(one / other for one, other in zip(by_mix[mix][test], by_mix[STANDARD][test], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    one = verbs.add_parser("measure")
    one.set_defaults(do=measure)
    one.add_argument("model", type=Path)
    one.add_argument("text", type=Path)
    one.add_argument("--calibration", type=Path, action="append", required=True)
    one.add_argument("--mixes", default="relative,all")
    one.add_argument("--tokens", type=int, default=6144, help="tokens of each calibration")
    one.add_argument("--calibration-ctx", type=int, default=512, help="tokens of its sequences")
    one.add_argument("--chunks", type=int, default=50)
    one.add_argument("--n-ctx", type=int, default=512)
    one.add_argument("--threads", type=int, help="of the comparison; 1 is best beside other programs")
    one.add_argument("--folder", type=Path, default=Path("build/sizes"))
    two = verbs.add_parser("speed")
    two.set_defaults(do=speed)
    two.add_argument("folders", type=Path, nargs="+")
    two.add_argument("--rounds", type=int, default=5)
    three = verbs.add_parser("table")
    three.set_defaults(do=table)
    three.add_argument("folders", type=Path, nargs="+")
    for verb in (one, two):
        verb.add_argument("--quants", default=QUANTS)
    given = parser.parse_args()
    given.do(given)


if __name__ == "__main__":
    main()
