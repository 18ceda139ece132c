"""Compare a fitted router with the same method written in torch.

    .venv/bin/python scripts/peers/fitting.py [RECIPE.yaml] --peers-python PYTHON

The recipe has ``gate_mode: fitted`` and ``router_steps: 0`` over local models that have no noise or scale; without one
it is that of the demo's models and of questions that they were trained on. Rows are compared as fitted and after a few
steps. PYTHON has torch and transformers (``scripts/peers/run`` sets one up). Exits with 1 where a row differs by more
than 1e-4 of its length.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from demo_data import arithmetic, everyday

from ggufmoe import demo
from ggufmoe.families import family_of
from ggufmoe.merge.merged import open_recipe
from ggufmoe.merge.router_steps import RowsPass, draws, lessons, stepped
from ggufmoe.merge.targets import ROUTER, needed_rule
from ggufmoe.weights.dtypes import read_f32

TOLERANCE = 1e-4
N_QUESTIONS, N_TOKENS, N_STEPS = 40, 600, 8
"""Questions of each of the demo's models that are written, tokens of them that are used, and steps after the fit."""


def demo_recipe(place: Path) -> Path:
    """A recipe over the demo's models in ``place``, with conversations for each."""
    experts = []
    for name, asked in (("base", everyday()), ("math", arithmetic())):
        lines = [
            {"messages": [{"role": "user", "content": one.text}, {"role": "assistant", "content": one.answer}]}
            for one in random.Random(0).sample(asked, N_QUESTIONS)
        ]
        (place / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        experts.append({"source_model": str(demo.DIRECTORY / name), "texts": f"{name}.jsonl"})
    recipe = {"base_model": str(demo.DIRECTORY / "base"), "gate_mode": "fitted", "dtype": "float32"}
    numbers = {"router_steps": 0, "text_tokens": N_TOKENS}
    path = place / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | numbers | {"experts": experts}), encoding="utf-8")
    return path


def both(path: Path, peers_python: Path, work: Path) -> tuple[Any, Any]:
    """The rows that ggufmoe and torch find, (2, n_layer, n_expert, n_embd) each: as fitted, and after steps."""
    model = open_recipe(path, allow_outside_files=True)
    recipe, place = model.recipe, path.absolute().parent
    fitted = [i for i, text in enumerate(model.texts) if not text.held_out]
    drawn = draws([model.texts[i] for i in fitted], recipe.seed)
    model.prepare()
    router = needed_rule(family_of(model.config), ROUTER)
    rows = np.stack([read_f32(model.tensors[router.name(layer)]) for layer in range(model.config.n_layer)])
    texts = [
        {
            "tokens": one.tokens,
            "scored": one.scored,
            "expert": one.expert,
            "file": f"{one.expert} {one.file}",
            "held_out": one.held_out,
        }
        for one in model.texts
    ]
    out, job = work / "rows.npy", work / "job.json"
    content = {
        "base": str(place / recipe.base_model),
        "experts": [str(place / expert.source_model) for expert in recipe.experts],
        "texts": texts,
        "steps": [[fitted[i] for i in next(drawn)] for _ in range(N_STEPS)],
        "n_used": recipe.experts_per_token,
        "dtype": recipe.dtype or "bfloat16",
        "out": str(out),
    }
    job.write_text(json.dumps(content), encoding="utf-8")
    script = Path(__file__).with_name("fitting_reference.py")
    subprocess.run([str(peers_python), str(script), str(job)], check=True)
    mixture = RowsPass(model, rows)
    taught = lessons(mixture, [model.texts[i] for i in fitted])
    return np.stack([rows, stepped(mixture, taught, n_steps=N_STEPS, seed=recipe.seed)]), np.load(out)


def main() -> int:
    """Fit on both sides and compare; 0 when the rows are the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, nargs="?")
    parser.add_argument("--peers-python", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        ours, theirs = both(arguments.recipe or demo_recipe(work), arguments.peers_python, work)
    distances = np.linalg.norm(ours - theirs, axis=-1) / np.linalg.norm(theirs, axis=-1)
    for when, found in zip(("as fitted", f"after {N_STEPS} steps"), distances, strict=True):
        for layer, of_layer in enumerate(found):
            told = ", ".join(f"{value:.1e}" for value in of_layer)
            print(f"{when}, layer {layer}: rows differ by {told} of their length")
    return int(distances.max() > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
