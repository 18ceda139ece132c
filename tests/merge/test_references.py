"""Router rows beside those of transformers (float32) and mergekit-moe (bfloat16), computed once and kept in fixtures.

``scripts/peers/run --write-fixtures`` makes the fixtures anew, in the environment that has both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.merge.prompts import prompt_tokenizer
from ggufmoe.merge.recipe import load_recipe
from ggufmoe.merge.router import make_router
from tests.merge.bases import MERGE_CASES, MergeCase, make_model, make_recipe

FIXTURES = Path(__file__).parent / "fixtures"
CASES = {case.name: case for case in MERGE_CASES}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> MergeCase:
    return CASES[request.param]


@pytest.fixture(scope="module")
def folder(case: MergeCase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base of a case; router rows need no expert."""
    parent = tmp_path_factory.mktemp("references")
    make_model(parent / "base", case, 1)
    return parent


def kept(case: MergeCase) -> dict[str, Any]:
    with np.load(FIXTURES / f"{case.name}.npz") as file:
        return dict(file)


def rows_of(folder: Path, case: MergeCase, mode: str, base: Path | None = None) -> Any:
    recipe, _ = load_recipe(make_recipe(folder, case, mode))
    with open_checkpoint(base or folder / "base") as model:
        return make_router(recipe, model).rows


def least_cosine(ours: Any, theirs: Any) -> float:
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    cosines = (a * b).sum(axis=-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert cosines.shape == a.shape[:2]
    return float(cosines.min())


def test_prompts_have_the_token_ids_that_transformers_gave_them(folder: Path, case: MergeCase) -> None:
    """Where this alone fails a library makes other tokenizers or other ids than before: make the fixtures anew."""
    recipe, _ = load_recipe(make_recipe(folder, case, "hidden"))
    tokenize = prompt_tokenizer(folder / "base")
    ids = [tokenize(prompt) for expert in recipe.experts for side in expert.prompts for prompt in side]
    assert ids == json.loads(str(kept(case)["ids"]))


@pytest.mark.parametrize("mode", ["hidden", "hidden_last", "hidden_avg", "cheap_embed"])
def test_rows_are_those_of_transformers_in_float32(folder: Path, case: MergeCase, mode: str) -> None:
    theirs = kept(case)[f"transformers_{mode.removesuffix('_last')}"]
    assert least_cosine(rows_of(folder, case, mode), theirs) > 0.999999


@pytest.mark.parametrize(("mode", "least"), [("hidden", 0.995), ("cheap_embed", 0.9999)])
def test_rows_are_close_to_mergekits(folder: Path, case: MergeCase, mode: str, least: float) -> None:
    assert least_cosine(rows_of(folder, case, mode), kept(case)[f"mergekit_{mode}"]) > least


def test_mergekits_average_counts_padding_and_ours_does_not(folder: Path, case: MergeCase) -> None:
    theirs = kept(case)
    ours = rows_of(folder, case, "hidden_avg")
    assert least_cosine(ours, theirs["mergekit_hidden_avg"]) < 0.9
    # an expert with one prompt alone has no padding, and there the two agree
    if len(case.experts) == 3:
        assert least_cosine(ours[:, 2:], theirs["mergekit_hidden_avg"][:, 2:]) > 0.995


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("sentencepiece", {"rope_theta": 2e4}),
        ("sentencepiece", {"num_key_value_heads": 4, "num_attention_heads": 8, "head_dim": 16}),
        ("sentencepiece", {"rms_norm_eps": 1e-2}),
        ("byte-level", {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}),
    ],
    ids=["rope", "heads", "epsilon", "scaling"],
)
def test_the_comparison_sees_a_wrong_hyper_parameter(tmp_path: Path, name: str, change: dict[str, Any]) -> None:
    case = CASES[name]
    base = make_model(tmp_path / "base", case, 1)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | change))
    assert least_cosine(rows_of(tmp_path, case, "hidden"), kept(case)["transformers_hidden"]) < 0.999
