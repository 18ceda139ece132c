"""What a file says about itself: name, origin, size, sampling, file type."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.checkpoint.source import BaseModel, ModelSource, Provenance
from ggufmoe.export.model_keys import imatrix_metadata, model_metadata, sampling_metadata, size_label
from ggufmoe.export.model_tensors import ModelTensor, model_tensors
from ggufmoe.gguf.types import ValueType
from ggufmoe.gguf.values import text
from ggufmoe.quant.filetypes import FileType
from ggufmoe.quant.importances import Imatrix

Make = Callable[..., Path]


@pytest.mark.parametrize(
    ("weights", "label"),
    [
        (7_241_732_096, "7.2B"),  # Mistral-7B
        (134_515_008, "135M"),
        (15_191_712, "15M"),
        (999, "1.0K"),
        (1_500_000, "1.5M"),
        (2_000_000_000_000, "2.0T"),
    ],
)
def test_size_label_of_a_dense_model(weights: int, label: str) -> None:
    assert size_label([ModelTensor("token_embd.weight", (1, weights), ())]) == label


def test_size_label_counts_what_is_shared_and_one_expert() -> None:
    tensors = [
        ModelTensor("token_embd.weight", (1, 1_000_000_000), ()),
        ModelTensor("blk.0.ffn_up_exps.weight", (8, 1000, 3_000_000), ()),
        ModelTensor("blk.0.ffn_down_exps.weight", (8, 3_000_000, 1000), ()),
    ]
    assert size_label(tensors) == "8x7.0B"


@dataclass
class Described:
    """A model source with another provenance."""

    source: ModelSource
    provenance: Provenance

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)


def described(directory: Path, provenance: Provenance) -> dict[str, Any]:
    source = open_checkpoint(str(directory))
    try:
        tensors = list(model_tensors(source))
        model = cast(ModelSource, Described(source, provenance))
        keys = model_metadata(model, tensors, FileType.Q4_K_M, {"tokenizer.ggml.model": text("llama")})
    finally:
        source.close()
    return {key: value.value for key, value in keys.items()}


def test_all_that_is_known_of_the_origin_is_written(tiny_checkpoint: Make) -> None:
    provenance = Provenance(
        name="Two stories",
        license="mit",
        license_name="MIT",
        license_link="https://example.org/mit",
        tags=("merge", "moe"),
        languages=("en",),
        base_models=(BaseModel("A", "Org", "https://example.org/a", "v1"), BaseModel("B")),
        extra={"ggufmoe.gate_mode": "hidden"},
    )
    keys = described(tiny_checkpoint(n_layer=1), provenance)
    wanted = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "Two stories",
        "general.size_label": "2x796K",
        "general.license": "mit",
        "general.license.name": "MIT",
        "general.license.link": "https://example.org/mit",
        "general.base_model.count": 2,
        "general.base_model.0.name": "A",
        "general.base_model.0.version": "v1",
        "general.base_model.0.organization": "Org",
        "general.base_model.0.repo_url": "https://example.org/a",
        "general.base_model.1.name": "B",
        "general.tags": ["merge", "moe"],
        "general.languages": ["en"],
        "general.file_type": 15,
        "general.quantization_version": 2,
        "ggufmoe.gate_mode": "hidden",
    }
    found = {key: value for key, value in keys.items() if not key.startswith(("llama.", "tokenizer."))}
    assert found == wanted
    assert next(iter(keys)) == "general.architecture"
    assert list(keys)[-1] == "tokenizer.ggml.model"


def test_what_is_not_known_has_no_key(tiny_checkpoint: Make) -> None:
    keys = described(tiny_checkpoint(n_layer=1), Provenance(name="x"))
    general = [key for key in keys if key.startswith("general.")]
    assert general == [
        "general.architecture",
        "general.type",
        "general.name",
        "general.size_label",
        "general.file_type",
        "general.quantization_version",
    ]


def test_recommended_sampling_is_carried_over(tmp_path: Path) -> None:
    content = {"temperature": 0.5, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1, "do_sample": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    keys = sampling_metadata(tmp_path)
    assert {key.removeprefix("general.sampling."): (value.type, value.value) for key, value in keys.items()} == {
        "top_k": (ValueType.INT32, 20),
        "top_p": (ValueType.FLOAT32, 0.9),
        "temp": (ValueType.FLOAT32, 0.5),
        "penalty_repeat": (ValueType.FLOAT32, 1.1),
    }


@pytest.mark.parametrize(
    "content",
    [
        '{"top_k": 1.5, "top_p": true, "temperature": NaN, "min_p": "0.1", "mirostat": 9e99}',
        '{"repetition_penalty": 1e39, "temperature": 1' + "0" * 400 + "}",
        "[1]",
        "{}",
    ],
)
def test_sampling_that_makes_no_sense_is_left_out(tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    assert sampling_metadata(tmp_path) == {}


def test_a_generation_config_that_cannot_be_read_is_ignored_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert sampling_metadata(tmp_path) == {}
    (tmp_path / "generation_config.json").write_text("{")
    with caplog.at_level(logging.WARNING, "ggufmoe"):
        assert sampling_metadata(tmp_path) == {}
    assert "generation_config.json is ignored" in caplog.text


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"num_beams": 1, "typical_p": 1.0, "no_repeat_ngram_size": 0, "suppress_tokens": None, "temperature": 1}, ""),
        ({"suppress_tokens": [1], "stop_strings": ["x"]}, "suppress_tokens, stop_strings"),
        ({"num_beams": 4, "forced_bos_token_id": 2}, "forced_bos_token_id, num_beams"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size"),
    ],
)
def test_what_a_generation_config_asks_for_and_gguf_cannot_say_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, given: dict[str, Any], named: str
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(given))
    sampling_metadata(tmp_path)
    assert (f"sets {named}, which a GGUF file cannot recommend" in caplog.text) is bool(named)
    assert bool(caplog.text) is bool(named)


def test_the_importance_matrix_is_named_as_llama_quantize_does() -> None:
    full = Imatrix(Path("x" * 200), {}, ("wiki.txt", "other"), 7, 512, is_legacy=False)
    assert {key: value.value for key, value in imatrix_metadata(full).items()} == {
        "quantize.imatrix.file": "x" * 127,
        "quantize.imatrix.dataset": "wiki.txt",
        "quantize.imatrix.entries_count": 0,
        "quantize.imatrix.chunks_count": 7,
    }
    bare = imatrix_metadata(Imatrix(Path("m.dat"), {}, (), 0, 0, is_legacy=True))
    assert list(bare) == ["quantize.imatrix.file", "quantize.imatrix.entries_count"]
