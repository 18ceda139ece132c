"""Print how large the GGUF file of two merged Mistral-7B is in each file type, as README shows it.

    python scripts/file_sizes.py

Planned from names and shapes alone, so it takes no model and no disk. The header with the vocabulary, less than 1 MB,
is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from make_checkpoint import arguments, config_json, stored_tensors
from numpy.typing import NDArray

from ggufmoe.checkpoint.config import parse_config
from ggufmoe.checkpoint.source import Provenance
from ggufmoe.export.model_tensors import model_tensors
from ggufmoe.families import family_of
from ggufmoe.families.model_config import ModelConfig
from ggufmoe.quant.filetypes import FileType
from ggufmoe.quant.policy import ModelShape, TensorShape, TypePolicy, choose_types
from ggufmoe.weights.source_tensor import Dtype, SourceTensor

SHOWN = ("Q2_K", "Q3_K_M", "IQ4_XS", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0", "BF16", "F32")


@dataclass(frozen=True)
class Shape:
    """A tensor that has a shape and no weights."""

    name: str
    shape: tuple[int, ...]
    dtype: Dtype = Dtype.BF16

    def read_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        raise NotImplementedError(f"{self.name} has no weights")


@dataclass(frozen=True)
class ShapesOnly:
    """A model that can be planned and not written."""

    config: ModelConfig
    tensors: Mapping[str, SourceTensor]
    tokenizer_dir: Path = Path()
    chat_template: str | None = None
    provenance: Provenance = field(default_factory=lambda: Provenance("two merged Mistral-7B"))
    input_paths: tuple[Path, ...] = ()
    router_report: None = None
    model_card: None = None

    def prepare(self, **hooks: Any) -> None: ...

    def close(self) -> None: ...


def seed_model() -> ShapesOnly:
    """The shapes of two merged Mistral-7B, which are the defaults of make_checkpoint.py."""
    written = config_json(arguments(["unwritten"]))
    tensors = {name: Shape(name, shape) for name, shape in stored_tensors(written, "classic")}
    return ShapesOnly(parse_config(Path("config.json"), written), tensors)


def size_of(model: ShapesOnly, file_type: str) -> tuple[int, float]:
    """Bytes of all tensors, and bits per weight."""
    config = model.config
    tensors = [TensorShape(tensor.name, tensor.shape, tensor.source_type) for tensor in model_tensors(model)]
    shape = ModelShape(config.n_layer, config.n_head, config.n_head_kv, config.n_expert, family_of(config).gguf_arch)
    types = choose_types(tensors, shape, TypePolicy(FileType.from_name(file_type)), None)
    n_bytes = sum(prod(tensor.shape[:-1]) * types[tensor.name].row_bytes(tensor.shape[-1]) for tensor in tensors)
    return n_bytes, 8 * n_bytes / sum(prod(tensor.shape) for tensor in tensors)


def table() -> str:
    """The table as README shows it, in Markdown."""
    model = seed_model()
    lines = ["| file type | size | bits per weight |", "|---|---|---|"]
    for name in SHOWN:
        n_bytes, bits = size_of(model, name)
        lines.append(f"| {name} | {n_bytes / 1e9:.2f} GB | {bits:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
