"""Write a random Hugging Face checkpoint of any shape, one tensor at a time, to measure with.

The weights are normal(0, 0.02), norms lie around 1, so that quantizers meet realistic values. Without options it has
the shapes of two merged Mistral-7B: 25.8 GB. With --layers 2 it is 2.1 GB.

    python scripts/make_checkpoint.py OUT [--arch mixtral|mistral|llama] [--layout classic|fused] [--layers N] ...
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ggufmoe.checkpoint.config import parse_config
from ggufmoe.checkpoint.layouts import pieces
from ggufmoe.families import family_of
from ggufmoe.gguf.floats import convert_floats
from ggufmoe.weights.source_tensor import Dtype

ARCHITECTURES = {"mixtral": "MixtralForCausalLM", "mistral": "MistralForCausalLM", "llama": "LlamaForCausalLM"}
POOL = 1 << 24
"""Random values that all tensors are cut from, each at places of its own."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "[INST] {{ message['content'] }} [/INST]{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)

Shape = tuple[int, ...]
Tensors = list[tuple[str, Shape]]


@dataclass(frozen=True)
class Pool:
    """Stored random values: ``weights`` around 0 and ``norms`` around 1, in ``dtype.numpy``."""

    dtype: Dtype
    weights: NDArray[Any]
    norms: NDArray[Any]

    @classmethod
    def make(cls, dtype: Dtype, rng: np.random.Generator) -> Pool:
        values = rng.standard_normal(POOL, dtype=np.float32)
        values *= np.float32(0.02)
        stored = [np.empty(POOL, dtype.numpy), np.empty(POOL, dtype.numpy)]
        convert_floats(values, stored[0])
        convert_floats(values + np.float32(1), stored[1])
        return cls(dtype, *stored)

    def write(self, file: BinaryIO, shape: Shape, rng: np.random.Generator) -> None:
        """Write as many values as ``shape`` has, from random places."""
        values = self.norms if len(shape) == 1 else self.weights
        left = prod(shape)
        while left:
            start = int(rng.integers(0, POOL // 2))
            count = min(left, POOL - start)
            file.write(values[start : start + count].data.cast("B"))
            left -= count


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the directory to make")
    parser.add_argument("--arch", choices=sorted(ARCHITECTURES), default="mixtral")
    parser.add_argument("--layout", choices=["classic", "fused"], default="classic", help="how experts are stored")
    parser.add_argument("--dtype", choices=["bf16", "f16", "f32"], default="bf16")
    parser.add_argument("--config-style", type=int, choices=[4, 5], default=4, help="version of transformers")
    sizes = {"layers": 32, "experts": 2, "used": 2, "hidden": 4096, "ff": 14336, "heads": 32, "kv": 8, "vocab": 32000}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"default {default}")
    parser.add_argument("--theta", type=float, default=1e6, help="rope theta, default 1000000")
    parser.add_argument("--tie", action="store_true", help="no lm_head.weight")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="a tokenizer.model or tokenizer.json to put in")
    parser.add_argument("--shard-mb", type=int, default=4500, metavar="MB", help="largest file, default 4500")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def config_json(args: argparse.Namespace) -> dict[str, Any]:
    """config.json in the words of transformers 4 or 5."""
    dtype = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}[args.dtype]
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[args.arch]],
        "model_type": args.arch,
        "hidden_act": "silu",
        "hidden_size": args.hidden,
        "intermediate_size": args.ff,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv,
        "vocab_size": args.vocab,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "tie_word_embeddings": args.tie,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if args.arch == "mixtral":
        config |= {"num_local_experts": args.experts, "num_experts_per_tok": args.used}
    if args.config_style == 5:
        rope = {"rope_theta": args.theta, "rope_type": "default"}
        return config | {"rope_parameters": rope, "dtype": dtype, "transformers_version": "5.12.0"}
    return config | {"rope_theta": args.theta, "torch_dtype": dtype, "transformers_version": "4.38.0"}


def stored_tensors(config: dict[str, Any], layout: str) -> Tensors:
    """Names and shapes as they stand in the files."""
    model = parse_config(Path("config.json"), config)
    layouts = family_of(model).layouts
    wanted = pieces(model, next((one for one in layouts if one.name == layout), layouts[0]))
    return list({piece.stored: piece.stored_shape for piece in wanted}.items())


def grouped(tensors: Tensors, dtype: Dtype, max_bytes: int) -> list[Tensors]:
    """The tensors of each shard, none above ``max_bytes`` unless a single tensor is."""
    shards: list[Tensors] = [[]]
    size = 0
    for name, shape in tensors:
        n_bytes = prod(shape) * dtype.numpy.itemsize
        if shards[-1] and size + n_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += n_bytes
    return shards


def header(tensors: Tensors, dtype: Dtype) -> bytes:
    """The bytes of a safetensors file before its data."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors:
        end = offset + prod(shape) * dtype.numpy.itemsize
        entries[name] = {"dtype": dtype.value, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(entries).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


def shard_names(count: int) -> Iterator[str]:
    if count == 1:
        yield "model.safetensors"
        return
    for i in range(1, count + 1):
        yield f"model-{i:05d}-of-{count:05d}.safetensors"


def write_weights(out: Path, shards: list[Tensors], dtype: Dtype, seed: int) -> None:
    """Write all shards, and an index where there is more than one."""
    rng = np.random.default_rng(seed)
    pool = Pool.make(dtype, rng)
    weight_map: dict[str, str] = {}
    for name, tensors in zip(shard_names(len(shards)), shards, strict=True):
        with open(out / name, "wb") as file:
            file.write(header(tensors, dtype))
            for tensor, shape in tensors:
                pool.write(file, shape, rng)
                weight_map[tensor] = name
    if len(shards) > 1:
        total = sum(prod(shape) * dtype.numpy.itemsize for tensors in shards for _, shape in tensors)
        write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_tokenizer(out: Path, tokenizer: Path) -> None:
    shutil.copyfile(tokenizer, out / f"tokenizer{tokenizer.suffix if tokenizer.suffix == '.json' else '.model'}")
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": True,
        "tokenizer_class": "LlamaTokenizer",
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(out / "tokenizer_config.json", config)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def make(args: argparse.Namespace) -> str:
    """Write the checkpoint; returns a line about it."""
    args.out.mkdir(parents=True, exist_ok=True)
    dtype = Dtype[args.dtype.upper()]
    config = config_json(args)
    tensors = stored_tensors(config, args.layout)
    shards = grouped(tensors, dtype, args.shard_mb * 1_000_000)
    write_weights(args.out, shards, dtype, args.seed)
    write_json(args.out / "config.json", config)
    if args.tokenizer is not None:
        write_tokenizer(args.out, args.tokenizer)
    n_weights = sum(prod(shape) for _, shape in tensors)
    size = f"{n_weights * dtype.numpy.itemsize / 1e9:.2f} GB in {len(shards)} files"
    return f"{args.out}: {n_weights / 1e9:.3f} B weights, {size}"


if __name__ == "__main__":
    print(make(arguments()))
