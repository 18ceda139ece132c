"""Measure a recipe's way to a quantized GGUF beside mergekit-moe, un-fusing, llama.cpp's converter and its quantizer.

Two dense models of the shapes of Mistral-7B are made, with two of its 32 layers, and merged by the recipe of two
experts with twelve prompts that this project began with. Both sides work on the same files, one after the other, with
the same number of threads. ggufmoe's seconds are told by phase; peak memory counts a process and its children; bytes
written are what the processes handed to the system (Linux only), beside the size of the output. What 32 layers would
take is computed from that: ggufmoe's router layer by layer, everything else in proportion to the weights.

    python scripts/bench_merge.py SCRATCH [--rounds 1] [--type Q4_K_M] [--llama-cpp DIR --peer-python PYTHON]

SCRATCH is a directory to be made, for some 12 GB, and deleted afterwards. ``--llama-cpp`` is the directory of
llama.cpp's sources, ``--peer-python`` an interpreter with mergekit; without them only ggufmoe is measured.
scripts/peers/run makes both.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml
from bench_convert import QUANTIZE, ROOT, Cost, measure

OURS = """
import json, sys, time
from pathlib import Path
import ggufmoe

recipe, output, kind, threads, report = sys.argv[1:]
layers, writes = [], []
result = ggufmoe.convert(
    recipe, output, kind, threads=int(threads), force=True,
    on_progress=lambda step: (layers if step.phase == "router" else writes).append(time.monotonic()),
)
ended = time.monotonic()
told = {
    "router": writes[0] - (ended - result.seconds),
    "layer": (layers[-1] - layers[0]) / (len(layers) - 1),
    "write": ended - writes[0],
    "bytes_read": result.bytes_read,
}
Path(report).write_text(json.dumps(told))
"""

N_LAYER_FULL = 32
EMBEDDING = 2 * 32000 * 4096
ATTENTION = 4096 * 4096 * 2 + 4096 * 1024 * 2
MLP = 3 * 4096 * 14336
N_EXPERT = 2


@dataclass(frozen=True)
class Ours:
    """What our way cost: ``router`` and ``write`` are seconds of the phases, ``layer`` those of one layer's router."""

    cost: Cost
    router: float
    layer: float
    write: float
    bytes_read: int


def merged_weights(n_layer: int) -> int:
    """Weights of the mixture, routers and norms left out."""
    return EMBEDDING + n_layer * (ATTENTION + N_EXPERT * MLP)


def router_weights(n_layer: int) -> int:
    """Weights that the forward pass reads: it needs neither the head nor the last layer's MLP."""
    return n_layer * ATTENTION + (n_layer - 1) * MLP


def make_models(scratch: Path, n_layer: int) -> Path:
    """The base, another model of its shapes, and the recipe over them; gives the recipe's path."""
    from tests.merge.test_recipe import SEED
    from tests.tiny_tokenizers import tokenizer_files

    tokenizer = scratch / "tokenizer.model"
    tokenizer.write_bytes(tokenizer_files("spm")["tokenizer.model"])
    maker = [sys.executable, str(ROOT / "scripts" / "make_checkpoint.py")]
    for seed, name in enumerate(("base", "instruct")):
        shape = ["--arch", "mistral", "--layers", str(n_layer), "--seed", str(seed)]
        measure([*maker, str(scratch / name), *shape, "--tokenizer", str(tokenizer)])
    recipe = yaml.safe_load(SEED) | {"base_model": str(scratch / "base")}
    for expert, name in zip(recipe["experts"], ("base", "instruct"), strict=True):
        expert["source_model"] = str(scratch / name)
    path = scratch / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def merge_ours(recipe: Path, output: Path, file_type: str, threads: int) -> Ours:
    """The recipe straight to the file."""
    report = output.with_suffix(".json")
    arguments = [str(recipe), str(output), file_type, str(threads), str(report)]
    cost = measure([sys.executable, "-c", OURS, *arguments])
    return Ours(cost, **json.loads(report.read_text(encoding="utf-8")))


def merge_theirs(arguments: argparse.Namespace, recipe: Path, output: Path) -> dict[str, Cost]:
    """The four steps of the other way, each cleaned up when the next has no need of it."""
    from ggufmoe.quant.filetypes import FileType

    fused, classic = (recipe.parent / name for name in ("by-mergekit", "classic"))
    lossless = output.with_suffix(".lossless.gguf")
    python, steps = arguments.peer_python, {}
    steps["mergekit-moe"] = measure([python, "-m", "mergekit.scripts.moe", str(recipe), str(fused), "--device", "cpu"])
    jobs = recipe.parent / "jobs.json"
    jobs.write_text(json.dumps([{"do": "classic", "model": str(fused), "out": str(classic)}]), encoding="utf-8")
    steps["un-fuse"] = measure([python, str(ROOT / "scripts" / "peers" / "reference.py"), str(jobs)])
    shutil.rmtree(fused)
    # llama.cpp pads the small vocabulary of this model only when it comes from a tokenizer.model
    (classic / "tokenizer.json").unlink(missing_ok=True)
    shutil.copy(recipe.parent / "tokenizer.model", classic)
    converter = [python, str(arguments.llama_cpp / "convert_hf_to_gguf.py"), str(classic)]
    steps["converter"] = measure([*converter, "--outtype", "bf16", "--outfile", str(lossless)])
    shutil.rmtree(classic)
    number = str(FileType.from_name(arguments.type).id)
    quantize = [sys.executable, "-c", QUANTIZE, str(lossless), str(output), number, str(arguments.threads)]
    steps["quantizer"] = measure(quantize)
    lossless.unlink()
    return steps


def report_ours(runs: list[Ours], output_bytes: int, n_layer: int) -> float:
    """Print our figures, those of the median run; gives the seconds that 32 layers would take."""
    run = sorted(runs, key=lambda run: run.cost.seconds)[len(runs) // 2]
    start = run.cost.seconds - run.router - run.write
    peak, written = max(run.cost.peak_bytes for run in runs), run.cost.written_bytes
    phases = f"start {start:.1f} s, router {run.router:.1f} s, write {run.write:.1f} s"
    print(f"ggufmoe        {run.cost.seconds:7.1f} s  peak {peak / 1e6:.0f} MB  ({phases})")
    print(
        f"               read {2 * router_weights(n_layer) / 1e9:.2f} GB for the router, {run.bytes_read / 1e9:.2f} GB "
        f"to write; wrote {written / 1e9:.2f} GB, {written / output_bytes:.3f} x the output"
    )
    router = run.router + (N_LAYER_FULL - n_layer) * run.layer
    write = run.write * merged_weights(N_LAYER_FULL) / merged_weights(n_layer)
    more = f"{run.router:.1f} + {N_LAYER_FULL - n_layer} x {run.layer:.2f} = {router:.0f} s"
    print(f"               32 layers: router {more}, write {write:.0f} s, together {start + router + write:.0f} s")
    return start + router + write


def report_theirs(runs: list[dict[str, Cost]], n_layer: int) -> float:
    """Print the figures of the other way; gives the seconds that 32 layers would take."""
    scale = merged_weights(N_LAYER_FULL) / merged_weights(n_layer)
    total = 0.0
    for step in runs[0]:
        seconds = statistics.median(run[step].seconds for run in runs)
        total += seconds
        peak, written = (max(getattr(run[step], key) for run in runs) for key in ("peak_bytes", "written_bytes"))
        print(f"{step:14} {seconds:7.1f} s  peak {peak / 1e6:.0f} MB  wrote {written / 1e9:.2f} GB")
    print(f"together       {total:7.1f} s  32 layers: {total * scale:.0f} s")
    return total * scale


def bench(arguments: argparse.Namespace, recipe: Path) -> None:
    """Both sides in turn."""
    output, theirs_output = (recipe.parent / name for name in ("ours.gguf", "theirs.gguf"))
    ours: list[Ours] = []
    theirs: list[dict[str, Cost]] = []
    for _ in range(arguments.rounds):
        ours.append(merge_ours(recipe, output, arguments.type, arguments.threads))
        if arguments.llama_cpp:
            theirs.append(merge_theirs(arguments, recipe, theirs_output))
    full = report_ours(ours, output.stat().st_size, arguments.layers)
    if theirs:
        full_theirs = report_theirs(theirs, arguments.layers)
        totals = [sum(cost.seconds for cost in run.values()) for run in theirs]
        ratios = [total / run.cost.seconds for total, run in zip(totals, ours, strict=True)]
        spread = f"({min(ratios):.1f} to {max(ratios):.1f})"
        print(
            f"ggufmoe is {statistics.median(ratios):.1f} times as fast {spread}; at 32 layers {full_theirs / full:.1f}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path, help="a directory to make, and to delete afterwards")
    parser.add_argument("--layers", type=int, default=2, help="layers of the models, at least 2")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--type", default="Q4_K_M")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--llama-cpp", type=Path, help="llama.cpp's sources")
    parser.add_argument("--peer-python", help="Python with mergekit and what llama.cpp's converter needs")
    arguments = parser.parse_args()
    if bool(arguments.llama_cpp) != bool(arguments.peer_python):
        parser.error("--llama-cpp and --peer-python belong together")
    arguments.scratch.mkdir(parents=True)
    try:
        recipe = make_models(arguments.scratch.resolve(), arguments.layers)
        print(json.dumps({key: getattr(arguments, key) for key in ("type", "layers", "threads", "rounds")}), flush=True)
        bench(arguments, recipe)
    finally:
        shutil.rmtree(arguments.scratch)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
