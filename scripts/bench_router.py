"""Measure what a fitted router costs at the shapes of Mistral-7B, beside gate mode hidden.

    python scripts/bench_router.py SCRATCH [--tokens 2048] [--layers 2]

Two dense models of random weights are made with a few of the 32 layers; their recipe's router is made in a process of
its own for each gate mode: hidden from twelve prompts, and fitted on ``--tokens`` tokens of texts, half of them for
each expert. Told are the seconds of a layer, by the clock and of processor time, the peak memory, and the bytes read
(Linux only) beside those of all weights that the mode needs. SCRATCH is a directory to be made, for some 3 GB, and
deleted afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
from pathlib import Path

import yaml
from bench_convert import ROOT, measure
from bench_merge import ATTENTION, MLP, N_EXPERT, make_models

CHILD = """
import json, sys, time
from pathlib import Path
from ggufmoe.merge.merged import open_recipe

def read():
    return int(Path("/proc/self/io").read_text().split()[1])

recipe, threads, report = sys.argv[1:]
model = open_recipe(Path(recipe))
begun, worked, before, layers = time.monotonic(), time.process_time(), read(), []
model.prepare(threads=int(threads), on_progress=lambda step: layers.append(time.monotonic()))
told = {
    "layer": (layers[-1] - begun) / len(layers),
    "cpu": (time.process_time() - worked) / len(layers),
    "read": read() - before,
    "tokens": sum(len(text.tokens) for text in model.texts),
}
Path(report).write_text(json.dumps(told))
"""


def fitted_recipe(hidden: Path, n_tokens: int) -> Path:
    """The recipe with random texts for each expert; its prompts stay, so that the report compares with hidden."""
    from tests.tiny_tokenizers import CORPUS

    content = yaml.safe_load(hidden.read_text(encoding="utf-8"))
    content |= {"gate_mode": "fitted", "text_tokens": n_tokens // N_EXPERT}
    words = sorted({word for line in CORPUS for word in line.split()})
    for number, expert in enumerate(content["experts"]):
        rng, name = random.Random(number), f"texts-{number}.jsonl"
        mine = rng.sample(words, len(words) // 2)
        lines = [json.dumps({"text": " ".join(rng.choices(mine, k=30))}) for _ in range(200)]
        (hidden.parent / name).write_text("\n".join(lines), encoding="utf-8")
        expert["texts"] = name
    path = hidden.with_name("fitted.yaml")
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path, help="a directory to make, and to delete afterwards")
    parser.add_argument("--layers", type=int, default=2, help="layers of the models, at least 2")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of texts of all experts together")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    n_layer = arguments.layers
    arguments.scratch.mkdir(parents=True)
    try:
        hidden = make_models(arguments.scratch.resolve(), n_layer)
        # hidden needs neither the last layer's MLP nor the experts; the base is one of these
        needed = {"hidden": n_layer * ATTENTION + (n_layer - 1) * MLP, "fitted": n_layer * (ATTENTION + N_EXPERT * MLP)}
        for mode, recipe in (("hidden", hidden), ("fitted", fitted_recipe(hidden, arguments.tokens))):
            report = arguments.scratch / f"{mode}.json"
            cost = measure([sys.executable, "-c", CHILD, str(recipe), str(arguments.threads), str(report)])
            told = json.loads(report.read_text(encoding="utf-8"))
            print(
                f"{mode}: {told['layer']:.1f} s a layer ({told['cpu']:.1f} s of processor time), peak "
                f"{cost.peak_bytes / 1e6:.0f} MB, read {told['read'] / 1e9:.2f} GB (weights of {n_layer} layers: "
                f"{2 * needed[mode] / 1e9:.2f} GB), {told['tokens']} tokens of texts",
                flush=True,
            )
    finally:
        shutil.rmtree(arguments.scratch)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
