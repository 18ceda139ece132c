"""The seed's way of naming models: hub ids, fetched from a hub of our own on 127.0.0.1."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml
from hub_server import serving

from ggufmoe.gguf.header import read_header
from tests.tiny import make_checkpoint


def test_models_named_by_hub_ids_are_fetched_and_credited(tmp_path: Path) -> None:
    served = make_checkpoint(tmp_path / "served", arch="mistral")
    make_checkpoint(tmp_path / "math", arch="mistral", seed=2)
    experts = [
        {"source_model": "org/tiny", "positive_prompts": ["common sense"]},
        {"source_model": "math", "positive_prompts": ["solve for x"]},
    ]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"base_model": "org/tiny", "experts": experts}))
    with serving(served) as hub:
        known = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE"))}
        own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-m", "ggufmoe", "convert", str(recipe), "-o", str(tmp_path / "m.gguf"), "-q", "F32"]
        done = subprocess.run(
            [*command, "--quiet"], env=known | own, capture_output=True, text=True, timeout=120, check=False
        )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    header = read_header(tmp_path / "m.gguf")
    assert header.get("general.base_model.count") == 2
    assert header.get("general.base_model.0.name") == "tiny"
    assert header.get("general.base_model.0.organization") == "org"
    assert header.get("general.base_model.0.repo_url") == "https://huggingface.co/org/tiny"
    assert header.get("general.base_model.1.name") == "math"
    assert header.get("general.base_model.1.repo_url") is None
