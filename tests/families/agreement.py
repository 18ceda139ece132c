"""What must hold for every family: our files, our forward pass and llama.cpp agree on a tiny random model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import ggufmoe
from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.export.model_tensors import model_tensors
from ggufmoe.families.family import Family
from ggufmoe.gguf.header import read_header
from ggufmoe.merge import forward
from ggufmoe.merge.forward import ForwardPass
from ggufmoe.quant.filetypes import FileType
from ggufmoe.quant.policy import TypePolicy
from ggufmoe.weights.dtypes import read_f32
from tests.families.tiny_family import make_checkpoint
from tests.quant.llama_quantize import quantize, read_tensors

Logits = NDArray[np.float32]
IDS = [1, 50, 60, 70, 80, 90, 100, 110]


def llama_cpp_logits(gguf: Path, ids: list[int] = IDS) -> Logits:
    """Logits of every position from llama.cpp on the CPU, with a cache in float32."""
    context = ggufmoe.ContextOptions(n_ctx=64, flash_attn="off", cache_type_k="f32", cache_type_v="f32")
    with ggufmoe.Engine(gguf, context, ggufmoe.OffloadOptions(n_gpu_layers=0)) as engine:
        return np.asarray(engine.logits(ids))


def forward_logits(checkpoint: Path, ids: list[int] = IDS) -> Logits:
    """The same from our own forward pass over the checkpoint, which shares no code with llama.cpp."""
    with open_checkpoint(checkpoint) as model:
        return ForwardPass(model).logits([ids])


def assert_close(ours: Logits, theirs: Logits) -> None:
    """Largest difference below a thousandth of the range, and the same likeliest tokens."""
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 1e-3 * (theirs.max() - theirs.min())
    assert (ours.argmax(-1) == theirs.argmax(-1)).all()


def stored_and_written(checkpoint: Path) -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[np.float32]]]:
    """Every tensor in float32: as it is stored, by its name there, and as it is written, by its name in GGUF."""
    with open_checkpoint(checkpoint) as model:
        stored = {name: read_f32(tensor).reshape(tensor.shape) for name, tensor in model.tensors.items()}
        written = {
            tensor.name: np.concatenate([read_f32(part) for part in tensor.parts]).reshape(tensor.shape)
            for tensor in model_tensors(model)
        }
    return stored, written


def check_computes(checkpoint: Path, scratch: Path) -> None:
    """llama.cpp computes with our F32 file what the forward pass computes with the checkpoint."""
    ggufmoe.convert(checkpoint, scratch / "f32.gguf", "F32", force=True)
    assert_close(llama_cpp_logits(scratch / "f32.gguf"), forward_logits(checkpoint))


def check_quantized(checkpoint: Path, scratch: Path, file_type: str, *, lossless: str = "BF16") -> None:
    """Every tensor and key of a quantized file is what llama.cpp makes of the lossless file, which has this type."""
    ours, theirs, source = (scratch / f"{name}.gguf" for name in ("ours", "theirs", "lossless"))
    ggufmoe.convert(checkpoint, source, lossless, force=True)
    ggufmoe.convert(checkpoint, ours, file_type, force=True)
    outcome = quantize(source, TypePolicy(FileType.from_name(file_type)), output=theirs)
    assert outcome.ok, outcome.log[-300:]
    a, b = read_tensors(ours), read_tensors(theirs)
    assert list(a) == list(b)
    assert [name for name in a if a[name] != b[name]] == []
    assert dict(read_header(ours).metadata) == dict(read_header(theirs).metadata)


def check_other_routing_is_wrong(
    family: Family, checkpoint: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp computes the routing of ``family``; the model with the weights of the chosen experts rescaled where the
    family does not, or not where it does, gives other logits: why the other ``norm_topk_prob`` is refused."""
    check_computes(checkpoint, scratch)
    assert family.arithmetic is not None
    with open_checkpoint(checkpoint) as model:
        arithmetic = family.arithmetic(model.config)
    routing = replace(arithmetic.routing, normalized=not arithmetic.routing.normalized)
    other = replace(family, arithmetic=lambda _: replace(arithmetic, routing=routing))
    monkeypatch.setattr(forward, "family_of", lambda _: other)
    ours, theirs = llama_cpp_logits(scratch / "f32.gguf"), forward_logits(checkpoint)
    assert np.abs(ours - theirs).max() > 1e-2 * (theirs.max() - theirs.min())


def check_layouts(config: Mapping[str, Any], layouts: tuple[str, ...], scratch: Path) -> None:
    """A model gives one file, whichever layout stores it."""
    files = []
    for layout in layouts:
        checkpoint = make_checkpoint(scratch / layout / "model", config, layout=layout)
        ggufmoe.convert(checkpoint, scratch / f"{layout}.gguf", "Q4_K_M", force=True)
        files.append((scratch / f"{layout}.gguf").read_bytes())
    assert len(set(files)) == 1


def write_recipe(path: Path, *models: Path, **recipe: Any) -> Path:
    """A recipe of these models, the first of which is the base too; ``recipe`` has further keys. Returns ``path``."""
    keys = {"base_model": models[0], "gate_mode": "hidden", "dtype": "bfloat16", **recipe}
    text = "".join(f"{key}: {value}\n" for key, value in keys.items()) + "experts:\n"
    for model, prompt in zip(models, ("the cat sat", "seven times six", "rivers and the sea"), strict=False):
        text += f"  - {{source_model: {model}, positive_prompts: [{prompt}]}}\n"
    path.write_text(text, encoding="utf-8")
    return path


def check_recipe_computes_its_model(base: Path, scratch: Path, **recipe: Any) -> Path:
    """A recipe of one model with itself computes what the model computes; its path is returned."""
    path = write_recipe(scratch / "recipe.yaml", base, base, **recipe)
    ggufmoe.convert(path, scratch / "recipe.gguf", "F32", allow_identical_experts=True)
    ggufmoe.convert(base, scratch / "base.gguf", "F32")
    assert_close(llama_cpp_logits(scratch / "recipe.gguf"), llama_cpp_logits(scratch / "base.gguf"))
    return path


def check_identical_experts(base: Path, scratch: Path, expected: str, **recipe: Any) -> Path:
    """A recipe of one model with itself becomes ``expected`` and computes what the model computes.

    Its merged checkpoint, whose directory is returned, gives the same tensors.
    """
    path = check_recipe_computes_its_model(base, scratch, **recipe)
    merged = ggufmoe.merge(path, scratch / "merged", allow_identical_experts=True).directory
    with open_checkpoint(merged) as model:
        assert model.config.architecture == expected
    ggufmoe.convert(merged, scratch / "merged.gguf", "F32")
    assert read_tensors(scratch / "merged.gguf") == read_tensors(scratch / "recipe.gguf")
    return merged
