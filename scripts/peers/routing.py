"""Compare routing traces with transformers' ``output_router_logits``; prints a table.

The same float32 model and tokens on both sides, prompts longer than a batch and generated tokens included: choices must
be identical, weights and probabilities equal to 1e-4, the load-balancing loss to 1e-4. Exit code 1 when anything
differs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import ggufmoe
from ggufmoe import ContextOptions, Engine, RoutingTrace, trace_routing
from ggufmoe.routing.statistics import load_balancing_loss
from tests.tiny import make_checkpoint

HERE = Path(__file__).parent
EXACT = ContextOptions(
    n_ctx=512, n_batch=96, n_ubatch=40, flash_attn="off", cache_type_k="f32", cache_type_v="f32", n_threads=1
)
TEXT = "Once upon a time there was a girl who counted: 12 + 7 = 19, and what is 3 times 4? Nobody knew the answer. " * 3
N_GENERATED = 20
CLOSE = 1e-4


@dataclass(frozen=True)
class Case:
    """One checkpoint, traced."""

    name: str
    directory: Path
    trace: RoutingTrace


def own_checkpoints(work: Path) -> list[Path]:
    """Random Mixtrals with 2, 4 and 8 experts, one or two of them used."""
    return [
        make_checkpoint(work / f"{n_expert}-experts-top-{n_used}", n_expert=n_expert, n_expert_used=n_used, n_layer=4)
        for n_expert in (2, 4, 8)
        for n_used in (1, 2)
    ]


def traced(work: Path, directory: Path) -> Case:
    """Convert a checkpoint to F32 and trace it."""
    path = work / f"{directory.name}.gguf"
    ggufmoe.convert(directory, path, quant="F32")
    with Engine(path, EXACT) as engine:
        return Case(directory.name, directory, trace_routing(engine, TEXT, generate=N_GENERATED))


def job(work: Path, case: Case) -> dict[str, str]:
    """What the other side is asked."""
    ids = work / f"{case.name}-ids.npy"
    np.save(ids, np.asarray(case.trace.token_ids, np.int32))
    return {"model": str(case.directory), "ids": str(ids), "out": str(work / f"{case.name}-theirs.npz")}


def faults(trace: RoutingTrace, theirs: Any) -> tuple[str, list[str]]:
    """How far apart the two are, and what is too far."""
    scores = np.exp(theirs["logits"] - theirs["logits"].max(axis=-1, keepdims=True))
    apart = {
        "probabilities": float(np.abs(trace.probabilities - scores / scores.sum(axis=-1, keepdims=True)).max()),
        "weights": float(np.abs(trace.weights - theirs["weights"]).max()),
        "loss": abs(load_balancing_loss(trace) - float(theirs["loss"])),
    }
    found = [f"{name} differ by {value:.1e}" for name, value in apart.items() if not value < CLOSE]
    other = int((trace.chosen != theirs["chosen"]).any(axis=-1).sum())
    if other:
        found.append(f"{other} of {trace.chosen[..., 0].size} choices differ")
    detail = ", ".join(f"{name} {value:.0e}" for name, value in apart.items())
    return f"{trace.n_token} tokens, {trace.chosen.size} choices the same; largest differences: {detail}", found


def show(case: Case, out: Path) -> bool:
    """Print one line of the table; whether both sides agree."""
    if not out.exists():
        detail, found = "", [Path(f"{out}.error").read_text(encoding="utf-8").strip().splitlines()[-1]]
    else:
        with np.load(out) as theirs:
            detail, found = faults(case.trace, theirs)
    print(f"{case.name:22} {'DIFFERS' if found else 'same':8} {'; '.join(found) or detail}", flush=True)
    return not found


def main() -> int:
    """Compare; 0 when all is the same."""
    parser = argparse.ArgumentParser(prog="scripts/peers/run_routing", description=__doc__.split("\n")[0])
    parser.add_argument("--peers-python", type=Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("checkpoints", type=Path, nargs="*", help="further Mixtral checkpoints")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ggufmoe-routing-") as folder:
        work = Path(folder)
        cases = [traced(work, directory) for directory in [*own_checkpoints(work), *arguments.checkpoints]]
        jobs = [job(work, case) for case in cases]
        listed = work / "jobs.json"
        listed.write_text(json.dumps(jobs), encoding="utf-8")
        subprocess.run([str(arguments.peers_python), str(HERE / "routing_reference.py"), str(listed)], check=True)
        agree = [show(case, Path(asked["out"])) for case, asked in zip(cases, jobs, strict=True)]
    print(f"{len(agree)} models, {agree.count(False)} differ")
    return int(not all(agree))


if __name__ == "__main__":
    sys.exit(main())
