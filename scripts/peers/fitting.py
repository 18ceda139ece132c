"""Compare a fitted router with the same method written in torch.

    .venv/bin/python scripts/peers/fitting.py RECIPE.yaml --peers-python PYTHON

The recipe has ``gate_mode: fitted`` over local models that have no noise or scale. PYTHON has torch and transformers
(``scripts/peers/run`` sets one up). Exits with 1 where a row differs by more than 1e-4 of its length.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from ggufmoe.families import family_of
from ggufmoe.merge.merged import open_recipe
from ggufmoe.merge.targets import ROUTER, needed_rule
from ggufmoe.weights.dtypes import read_f32

TOLERANCE = 1e-4


def main() -> int:
    """Fit on both sides and compare; 0 when the rows are the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--peers-python", type=Path, required=True)
    arguments = parser.parse_args()
    model = open_recipe(arguments.recipe, allow_outside_files=True)
    recipe, place = model.recipe, arguments.recipe.absolute().parent
    model.prepare()
    router = needed_rule(family_of(model.config), ROUTER)
    ours = np.stack([read_f32(model.tensors[router.name(layer)]) for layer in range(model.config.n_layer)])
    texts = [{"tokens": one.tokens, "scored": one.scored, "expert": one.expert, "held_out": one.held_out} for one in model.texts]
    with tempfile.TemporaryDirectory() as scratch:
        out, job = Path(scratch) / "rows.npy", Path(scratch) / "job.json"
        content = {
            "base": str(place / recipe.base_model),
            "experts": [str(place / expert.source_model) for expert in recipe.experts],
            "texts": texts,
            "n_used": recipe.experts_per_token,
            "dtype": recipe.dtype or "bfloat16",
            "out": str(out),
        }
        job.write_text(json.dumps(content), encoding="utf-8")
        script = Path(__file__).with_name("fitting_reference.py")
        subprocess.run([str(arguments.peers_python), str(script), str(job)], check=True)
        theirs = np.load(out)
    distances = np.linalg.norm(ours - theirs, axis=-1) / np.linalg.norm(theirs, axis=-1)
    for layer, of_layer in enumerate(distances):
        print(f"layer {layer}: rows differ by {', '.join(f'{value:.1e}' for value in of_layer)} of their length")
    return int(distances.max() > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
