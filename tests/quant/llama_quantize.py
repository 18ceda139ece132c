"""llama_model_quantize as an oracle: tiny GGUF files, the types it chooses for them, and the bytes it writes."""

from __future__ import annotations

import ctypes
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from llama_cpp import llama_cpp
from numpy.typing import NDArray

from ggufmoe.errors import ImatrixError, OptionError
from ggufmoe.gguf.header import read_header
from ggufmoe.gguf.types import GGMLType
from ggufmoe.native import quantizing
from ggufmoe.quant.filetypes import ABORTS_WITHOUT_IMATRIX
from ggufmoe.quant.policy import ModelShape, TensorShape, TypePolicy, choose_types
from tests.llama_log import llama_log_to

_N_TYPES = 43
"""GGML_TYPE_COUNT, which means "not given" to llama_model_quantize."""
_LOG_LINE = re.compile(r"^\[ *\d+/ *\d+\] (\S+) +- \[.*\], type = *(\w+), size =[^(\n]*(?:\((\w+)\))?$", re.MULTILINE)


@dataclass(frozen=True)
class Specimen:
    """The shape of a tiny model; 0 experts is a dense one."""

    n_expert: int = 2
    n_layer: int = 1
    n_embd: int = 256
    n_ff: int = 256
    n_vocab: int = 40
    n_head: int = 4
    n_head_kv: int = 2
    tied: bool = False
    source: GGMLType = GGMLType.BF16
    architecture: str = "llama"

    @property
    def model(self) -> ModelShape:
        return ModelShape(self.n_layer, self.n_head, self.n_head_kv, self.n_expert, self.architecture)

    def tensors(self) -> tuple[TensorShape, ...]:
        """Its tensors in no helpful order: the last layers first."""
        shapes = {"token_embd.weight": (self.n_vocab, self.n_embd), "output_norm.weight": (self.n_embd,)}
        if not self.tied:
            shapes["output.weight"] = (self.n_vocab, self.n_embd)
        for layer in reversed(range(self.n_layer)):
            shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in self._layer().items()}
        return tuple(TensorShape(name, shape, self._type(name, shape)) for name, shape in shapes.items())

    def _layer(self) -> dict[str, tuple[int, ...]]:
        n_kv = self.n_embd // self.n_head * self.n_head_kv
        embd, stack, suffix = self.n_embd, (self.n_expert,) if self.n_expert else (), "_exps" if self.n_expert else ""
        shapes: dict[str, tuple[int, ...]] = {
            "attn_norm": (embd,),
            "ffn_norm": (embd,),
            "attn_q": (embd, embd),
            "attn_k": (n_kv, embd),
            "attn_v": (n_kv, embd),
            "attn_output": (embd, embd),
            f"ffn_gate{suffix}": (*stack, self.n_ff, embd),
            f"ffn_up{suffix}": (*stack, self.n_ff, embd),
            f"ffn_down{suffix}": (*stack, embd, self.n_ff),
        }
        return shapes | ({"ffn_gate_inp": (self.n_expert, embd)} if self.n_expert else {})

    def _type(self, name: str, shape: tuple[int, ...]) -> GGMLType:
        return GGMLType.F32 if len(shape) == 1 or "ffn_gate_inp" in name else self.source

    def weights(self, seed: int = 0) -> dict[str, NDArray[np.float32]]:
        """Seeded weights, already rounded to the type in which they are stored."""
        rng = np.random.default_rng(seed)
        return {
            tensor.name: _rounded(rng.normal(0, 0.02, tensor.shape).astype(np.float32), tensor.source_type)
            for tensor in self.tensors()
        }

    def matrices(self) -> dict[str, tuple[int, int]]:
        """(experts, cols) of each tensor that llama.cpp may quantize."""
        return {
            tensor.name: (math.prod(tensor.shape[:-2]), tensor.n_cols)
            for tensor in self.tensors()
            if len(tensor.shape) > 1 and "ffn_gate_inp" not in tensor.name
        }

    def importance(self, seed: int = 1) -> dict[str, NDArray[np.float32]]:
        """A made-up importance matrix."""
        rng = np.random.default_rng(seed)
        return {name: rng.gamma(0.7, 2.0, shape).astype(np.float32) for name, shape in self.matrices().items()}


def stored(values: NDArray[np.float32], type: GGMLType) -> NDArray[Any]:
    """The array as a file of this type holds it."""
    if type is GGMLType.F32:
        return values
    out: NDArray[Any]
    if type is GGMLType.F16:
        out = np.empty(values.shape, np.float16)
        quantizing.f32_to_f16(values, out)
    else:
        out = np.empty(values.shape, np.uint16)
        quantizing.f32_to_bf16(values, out)
    return out


def _rounded(values: NDArray[np.float32], type: GGMLType) -> NDArray[np.float32]:
    data = stored(values, type)
    if type is GGMLType.BF16:
        values = np.empty(values.shape, np.float32)
        quantizing.bf16_to_f32(data, values)
        return values
    return data.astype(np.float32)


def write_model(path: Path, specimen: Specimen, weights: Mapping[str, NDArray[np.float32]] | None = None) -> Path:
    """A GGUF of the specimen; without weights a hole of the right size, which is enough for choosing types."""
    writer = GGUFWriter(path, specimen.architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(specimen.n_embd)
    writer.add_block_count(specimen.n_layer)
    writer.add_feed_forward_length(specimen.n_ff)
    writer.add_head_count(specimen.n_head)
    writer.add_head_count_kv(specimen.n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    if specimen.n_expert:
        writer.add_expert_count(specimen.n_expert)
        writer.add_expert_used_count(min(2, specimen.n_expert))
    offsets, end = {}, 0
    for tensor in specimen.tensors():
        n_bytes = math.prod(tensor.shape) * tensor.source_type.block_bytes
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), n_bytes, GGMLQuantizationType(tensor.source_type.id)
        )
        offsets[tensor.name], end = end, end + -(-n_bytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        start = -(-os.fstat(file.fileno()).st_size // 32) * 32
        file.truncate(start + end)
        for tensor in specimen.tensors() if weights else ():
            file.seek(start + offsets[tensor.name])
            file.write(stored(weights[tensor.name], tensor.source_type).tobytes() if weights else b"")
    return path


@dataclass(frozen=True)
class Outcome:
    """What llama_model_quantize did: whether it went well, and its log."""

    ok: bool
    log: str

    @property
    def types(self) -> dict[str, GGMLType]:
        """The type that it chose for each tensor, as logged by a dry run."""
        lines = _LOG_LINE.findall(self.log)
        return {name: GGMLType[(chosen or source).upper()] for name, source, chosen in lines}


@contextmanager
def _captured_log() -> Iterator[list[str]]:
    parts: list[str] = []
    with llama_log_to(parts.append):
        yield parts


def quantize(
    source: Path,
    policy: TypePolicy,
    importance: Mapping[str, NDArray[np.float32]] | None = None,
    output: Path | None = None,
    **flags: bool,
) -> Outcome:
    """Run llama_model_quantize on one thread; without ``output`` a dry run. ``flags`` are those of its parameters."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.nthread = 1
    parameters.ftype = policy.file_type.id
    parameters.pure = policy.pure
    parameters.dry_run = output is None
    for name, value in flags.items():
        setattr(parameters, name, value)
    parameters.output_tensor_type = policy.output_tensor_type.id if policy.output_tensor_type else _N_TYPES
    parameters.token_embedding_type = policy.token_embedding_type.id if policy.token_embedding_type else _N_TYPES
    overrides = [(pattern.encode(), wanted.id) for pattern, wanted in policy.tensor_types]
    if overrides:
        parameters.tt_overrides = _array(llama_cpp.llama_model_tensor_override, [*overrides, (None, _N_TYPES)])
    entries = [
        (name.encode(), values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), values.size)
        for name, values in (importance or {}).items()
    ]
    if importance is not None:
        parameters.imatrix = _array(llama_cpp.llama_model_imatrix_data, [*entries, (None, None, 0)])
    with _captured_log() as parts:
        status = llama_cpp.llama_model_quantize(
            str(source).encode(), str(output or source.with_suffix(".none")).encode(), ctypes.byref(parameters)
        )
    return Outcome(status == 0, "".join(parts))


def _array(structure: Any, rows: list[Any]) -> Any:
    return (structure * len(rows))(*(structure(*row) for row in rows))


def read_tensors(path: Path) -> dict[str, tuple[GGMLType, bytes]]:
    """Type and bytes of each tensor of a GGUF file (PyPI's gguf does not know Q2_0)."""
    header, data = read_header(path), path.read_bytes()
    starts = {tensor.name: header.data_offset + tensor.offset for tensor in header.tensors}
    return {
        tensor.name: (tensor.type, data[starts[tensor.name] : starts[tensor.name] + tensor.n_bytes])
        for tensor in header.tensors
    }


def compare_types(path: Path, specimen: Specimen, policy: TypePolicy, *, imatrix: bool) -> tuple[int, list[str]]:
    """Let both choose types for the file at ``path``: tensors compared, and what differs or is refused by one alone."""
    importance = dict.fromkeys(specimen.matrices(), np.ones(1, np.float32)) if imatrix else None
    try:
        ours = choose_types(specimen.tensors(), specimen.model, policy, importance)
    except ImatrixError as error:
        theirs = quantize(path, policy, importance)
        return 0, [] if "require an imatrix" in theirs.log or _would_abort(theirs.types) else [f"refused: {error}"]
    except OptionError as error:
        if _override_misfits(specimen, policy):
            return 0, []  # ggml would abort this process
        return 0, [f"refused: {error}"] if quantize(path, policy, importance).ok else []
    theirs = quantize(path, policy, importance)
    if not theirs.ok or "require an imatrix" in theirs.log:
        return 0, [f"accepted, though llama.cpp says: {theirs.log[-200:]}"]
    wanted_types = theirs.types
    names = ours.keys() | wanted_types.keys()
    pairs = [(name, ours.get(name), wanted_types.get(name)) for name in sorted(names)]
    return len(names), [f"{name}: {mine} is not {wanted}" for name, mine, wanted in pairs if mine is not wanted]


def _would_abort(types: Mapping[str, GGMLType]) -> bool:
    return any(types.get(name) in ABORTS_WITHOUT_IMATRIX for name in ("token_embd.weight", "output.weight"))


def _override_misfits(specimen: Specimen, policy: TypePolicy) -> bool:
    given = (policy.output_tensor_type, policy.token_embedding_type)
    return any(wanted and specimen.n_embd % wanted.block_size for wanted in given)
