"""The tensors of which a model consists, and where a checkpoint stores each of them.

Tensors have their classic names (transformers 4). The experts of a Mixtral may be stored one by one or fused; in the
fused layout of transformers 5 and mergekit, ``experts.gate_up_proj`` (n_expert, 2 n_ff, n_embd) holds the gate rows
(w1) and then the up rows (w3) of each expert, so every classic tensor is a range of rows of a stored tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from ggufmoe.checkpoint.config import quantization_method
from ggufmoe.checkpoint.dtypes import row_count
from ggufmoe.checkpoint.foreign_weights import way_out_of, what_made
from ggufmoe.checkpoint.safetensors import TensorEntry, TensorFile
from ggufmoe.checkpoint.source import Dtype, ModelConfig
from ggufmoe.errors import CheckpointError, TensorMismatchError

Shape = tuple[int, ...]

_EXPERT_WORDS = {"w1": ("w1", "gate_proj"), "w3": ("w3", "up_proj"), "w2": ("w2", "down_proj")}
_EXPERT_NAME = re.compile(r"model\.layers\.\d+\.(block_sparse_moe|mlp)\.experts\.(?:(\d+)\.(\w+)\.weight|(\w+))")
_HARMLESS = re.compile(r".*\.(rotary_emb\.(inv_freq|cos_cached|sin_cached)|attention\.masked_bias|attention\.bias)")
"""Names of buffers of old checkpoints, which are computed and not read."""
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Parts that torch.compile, FSDP and activation checkpointing insert into names, at any depth."""
_EMBEDDING = "embed_tokens.weight"
_INNER = re.compile(r"(embed_tokens|layers|norm)\.")
_NAMES_SHOWN = 8


@dataclass(frozen=True, slots=True)
class TensorPiece:
    """A classic tensor and where it is stored: from row ``first_row`` of the tensor ``stored``."""

    name: str
    shape: Shape
    stored: str
    stored_shape: Shape
    first_row: int = 0


@dataclass(frozen=True)
class ExpertLayout:
    """How a Mixtral stores its experts: the name of the module, and fused or one by one."""

    prefix: str = "block_sparse_moe"
    fused: bool = False
    words: int = 0
    """Which names the matrices of an expert have: 0 for w1, w2, w3; 1 for gate_proj, down_proj, up_proj."""


@dataclass(frozen=True, slots=True)
class StoredRows:
    """A SourceTensor whose rows are a range of rows of a tensor in a safetensors file, from byte ``begin`` on."""

    name: str
    dtype: Dtype
    shape: Shape
    file: TensorFile
    begin: int

    def read_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Fill ``out``, shape (stop - start, n_cols) and dtype ``self.dtype.numpy``, with rows [start, stop).

        Raises SafetensorsError if the file has become shorter or cannot be read any more.
        """
        n_cols = self.shape[-1]
        if not 0 <= start <= stop <= row_count(self.shape):
            raise ValueError(f"{self.name}: rows {start} to {stop} are not in a tensor of shape {self.shape}")
        if out.shape != (stop - start, n_cols) or out.dtype != self.dtype.numpy or not out.flags.c_contiguous:
            raise ValueError(f"{self.name}: out must be contiguous {(stop - start, n_cols)} {self.dtype.numpy}")
        if out.size:
            begin = self.begin + start * n_cols * self.dtype.n_bytes
            self.file.read_into(begin, out.data.cast("B"))


def pieces(config: ModelConfig, layout: ExpertLayout, *, with_output: bool) -> Iterator[TensorPiece]:
    """Yield every tensor of a model of this configuration: embedding, layers in order, final norm, output.

    ``with_output``: whether the model has an ``lm_head.weight``.
    """
    embedding = (config.n_vocab, config.n_embd)
    yield _whole("model.embed_tokens.weight", embedding)
    for layer in range(config.n_layer):
        yield from _attention(config, f"model.layers.{layer}")
        yield from _feed_forward(config, layout, f"model.layers.{layer}")
    yield _whole("model.norm.weight", (config.n_embd,))
    if with_output:
        yield _whole("lm_head.weight", embedding)


def _whole(name: str, shape: Shape, stored: str | None = None) -> TensorPiece:
    return TensorPiece(name, shape, stored or name, shape)


def _attention(config: ModelConfig, layer: str) -> Iterator[TensorPiece]:
    n_embd, q_rows = config.n_embd, config.n_head * config.head_dim
    kv_rows = config.n_head_kv * config.head_dim
    yield _whole(f"{layer}.input_layernorm.weight", (n_embd,))
    yield _whole(f"{layer}.post_attention_layernorm.weight", (n_embd,))
    yield _whole(f"{layer}.self_attn.q_proj.weight", (q_rows, n_embd))
    yield _whole(f"{layer}.self_attn.k_proj.weight", (kv_rows, n_embd))
    yield _whole(f"{layer}.self_attn.v_proj.weight", (kv_rows, n_embd))
    yield _whole(f"{layer}.self_attn.o_proj.weight", (n_embd, q_rows))


def _feed_forward(config: ModelConfig, layout: ExpertLayout, layer: str) -> Iterator[TensorPiece]:
    rows, columns = (config.n_ff, config.n_embd), (config.n_embd, config.n_ff)
    if not config.n_expert:
        yield _whole(f"{layer}.mlp.gate_proj.weight", rows)
        yield _whole(f"{layer}.mlp.up_proj.weight", rows)
        yield _whole(f"{layer}.mlp.down_proj.weight", columns)
        return
    router = f"{layer}.block_sparse_moe.gate.weight"
    yield _whole(router, (config.n_expert, config.n_embd), f"{layer}.{layout.prefix}.gate.weight")
    for expert in range(config.n_expert):
        classic = f"{layer}.block_sparse_moe.experts.{expert}"
        if layout.fused:
            yield from _fused_expert(config, f"{layer}.{layout.prefix}.experts", classic, expert)
            continue
        stored = f"{layer}.{layout.prefix}.experts.{expert}"
        for word, shape in (("w1", rows), ("w3", rows), ("w2", columns)):
            yield _whole(f"{classic}.{word}.weight", shape, f"{stored}.{_EXPERT_WORDS[word][layout.words]}.weight")


def _fused_expert(config: ModelConfig, stored: str, classic: str, expert: int) -> Iterator[TensorPiece]:
    n_ff, n_embd = config.n_ff, config.n_embd
    gate_up, down = (config.n_expert, 2 * n_ff, n_embd), (config.n_expert, n_embd, n_ff)
    first = expert * 2 * n_ff
    yield TensorPiece(f"{classic}.w1.weight", (n_ff, n_embd), f"{stored}.gate_up_proj", gate_up, first)
    yield TensorPiece(f"{classic}.w3.weight", (n_ff, n_embd), f"{stored}.gate_up_proj", gate_up, first + n_ff)
    yield TensorPiece(f"{classic}.w2.weight", (n_embd, n_ff), f"{stored}.down_proj", down, expert * n_embd)


def find_expert_layout(where: str, names: Iterable[str]) -> ExpertLayout:
    """Find the layout of the experts from the stored tensor names; the classic one if no name is that of an expert.

    Raises TensorMismatchError, with one tensor of each layout, if there is more than one. ``where`` names the
    checkpoint in the message.
    """
    found: dict[ExpertLayout, str] = {}
    for name in names:
        if (match := _EXPERT_NAME.fullmatch(name)) and (layout := _layout_of(match)) is not None:
            found.setdefault(layout, name)
    if len(found) > 1:
        one_of_each = " and ".join(map(_shown, list(found.values())[:2]))
        raise TensorMismatchError(f"{where} stores its experts in more than one layout ({one_of_each}); save it again")
    return next(iter(found), ExpertLayout())


def _layout_of(match: re.Match[str]) -> ExpertLayout | None:
    prefix, expert, word, fused = match.groups()
    if expert is None:
        return ExpertLayout(prefix, fused=True) if fused in ("gate_up_proj", "down_proj") else None
    spellings = [i for i in range(2) if word in {words[i] for words in _EXPERT_WORDS.values()}]
    return ExpertLayout(prefix, words=spellings[0]) if spellings else None


def is_harmless(name: str) -> bool:
    """Whether a tensor of this name is a buffer that models compute anyway, so that it may be present or absent."""
    return _HARMLESS.fullmatch(name) is not None


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Stored names to the names of transformers, without the parts that wrappers add.

    The prefix is found from the name of the embedding: ``module.`` (DDP), ``base_model.model.`` (PEFT), ``model.``
    twice, or none if the model was saved without its head. Prefixes are kept if there is not exactly one embedding.
    """
    without = {name: _WRAPPERS.sub("", name) for name in names}
    embeddings = [name for name in without.values() if name == _EMBEDDING or name.endswith("." + _EMBEDDING)]
    if len(embeddings) != 1 or embeddings[0] == f"model.{_EMBEDDING}":
        return without
    inner = embeddings[0].removesuffix(_EMBEDDING)
    outer = inner.removesuffix("model.") if inner == "model." or inner.endswith(".model.") else inner
    return {name: _plain_name(plain, inner, outer) for name, plain in without.items()}


def _plain_name(name: str, inner: str, outer: str) -> str:
    rest = name.removeprefix(inner)
    if name.startswith(inner) and _INNER.match(rest):
        return f"model.{rest}"
    return name.removeprefix(outer)


def arrange(
    where: str, config: ModelConfig, stored: Mapping[str, tuple[TensorFile, TensorEntry]]
) -> dict[str, StoredRows]:
    """Map the classic name of every tensor of the model to its rows in the files.

    ``stored`` maps the names in the files, which may have prefixes of wrappers, to file and entry. An
    ``lm_head.weight`` is kept even if the config ties the embeddings, as in llama.cpp's converter
    (``conversion/llama.py``). Raises TensorMismatchError if tensors are missing, left over or wrongly shaped (it names
    up to eight of each kind), and CheckpointError for weights that are quantized or not BF16, F16 or F32.
    """
    if (made := what_made(stored)) is not None:
        raise CheckpointError(f"{where} {made}")
    try:
        return _arrange(where, config, _by_plain_name(where, stored))
    except CheckpointError as error:
        if (method := quantization_method(config.raw)) is None:
            raise
        raise CheckpointError(
            f"{where}: config.json says that this checkpoint is quantized already ({method!r:.40}); "
            f"use the original one ({error})"
        ) from error


def _arrange(
    where: str, config: ModelConfig, stored: Mapping[str, tuple[TensorFile, TensorEntry]]
) -> dict[str, StoredRows]:
    layout = find_expert_layout(where, stored) if config.n_expert else ExpertLayout()
    # refuses a config of absurd size before a million names are made from it
    n_least = config.n_layer * (8 if layout.fused else 8 + 3 * config.n_expert)
    if n_least > 1000 + 10 * len(stored):
        raise TensorMismatchError(
            f"{where} holds {len(stored)} tensors, but a model of its config.json has at least {n_least}"
        )
    with_output = not config.tie_embeddings or "lm_head.weight" in stored
    wanted = list(pieces(config, layout, with_output=with_output))
    _check_shapes(where, {piece.stored: piece.stored_shape for piece in wanted}, stored)
    dtypes = _dtypes(where, {piece.stored for piece in wanted}, stored)
    return {piece.name: _rows(piece, *stored[piece.stored], dtypes[piece.stored]) for piece in wanted}


def _by_plain_name(
    where: str, stored: Mapping[str, tuple[TensorFile, TensorEntry]]
) -> Mapping[str, tuple[TensorFile, TensorEntry]]:
    plain: dict[str, tuple[TensorFile, TensorEntry]] = {}
    for name, new in plain_names(stored).items():
        if new in plain:
            first = _shown(plain[new][1].name)
            raise TensorMismatchError(f"{where} holds {_shown(new)} twice: as {first} and as {_shown(name)}")
        plain[new] = stored[name]
    return plain


def _rows(piece: TensorPiece, file: TensorFile, entry: TensorEntry, dtype: Dtype) -> StoredRows:
    begin = entry.begin + piece.first_row * piece.shape[-1] * dtype.n_bytes
    return StoredRows(piece.name, dtype, piece.shape, file, begin)


def _check_shapes(
    where: str, wanted: Mapping[str, Shape], stored: Mapping[str, tuple[TensorFile, TensorEntry]]
) -> None:
    missing = [name for name in wanted if name not in stored]
    extra = [name for name in stored if name not in wanted and not is_harmless(name)]
    misshaped = [
        f"{name} is {list(stored[name][1].shape)}, by config.json it should be {list(shape)}"
        for name, shape in wanted.items()
        if name in stored and stored[name][1].shape != shape
    ]
    found = {"missing": missing, "left over": extra, "wrongly shaped": misshaped}
    faults = [f"{kind}: {_listed(names)}" for kind, names in found.items() if names]
    if faults:
        raise TensorMismatchError(f"{where} does not hold the tensors of its config.json; {'; '.join(faults)}")


def _dtypes(where: str, names: set[str], stored: Mapping[str, tuple[TensorFile, TensorEntry]]) -> dict[str, Dtype]:
    known = {dtype.value for dtype in Dtype}
    odd = [f"{name} ({stored[name][1].dtype})" for name in sorted(names) if stored[name][1].dtype not in known]
    if odd:
        raise CheckpointError(
            f"{where} has weights that are not BF16, F16 or F32: {_listed(odd)}; "
            f"{way_out_of(stored[name][1].dtype for name in names if stored[name][1].dtype not in known)}"
        )
    return {name: Dtype(stored[name][1].dtype) for name in names}


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(map(_shown, names[:_NAMES_SHOWN])) + more


def _shown(name: str) -> str:
    return name[:200] if name.isprintable() else f"{name!r:.200}"
