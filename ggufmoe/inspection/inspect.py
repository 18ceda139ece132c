"""What is in a GGUF file, from its header alone: sizes, parts, hyper-parameters, tokenizer, template, provenance.

Works on any architecture and on files that other tools made. Metadata of a wrong type counts as absent. The memory that
running takes comes from ``placement``. Nothing is printed here, and no tensor byte is read.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ggufmoe.errors import GGUFError
from ggufmoe.gguf.checks import header_faults
from ggufmoe.gguf.header import TensorInfo
from ggufmoe.gguf.hyper import Hyper, TypedMetadata
from ggufmoe.gguf.key_tables import SAMPLING_PREFIX, TOKEN_ID_KEYS
from ggufmoe.gguf.model import NO_MODELS, ModelHeader, read_model_header
from ggufmoe.gguf.names import OUTPUT, TOKEN_EMBEDDING, legacy_experts, part_of
from ggufmoe.gguf.own_keys import GATE_MODE, MIX, RECIPE, VERSION
from ggufmoe.gguf.types import FILE_TYPES
from ggufmoe.gguf.upstream import Keys
from ggufmoe.options import ContextOptions, OffloadOptions
from ggufmoe.placement.offload import plan_offload
from ggufmoe.placement.offload_plan import HostMemory
from ggufmoe.sizes import all_experts_run

_SPECIAL_TOKENS = {key.removeprefix("tokenizer.ggml.").removesuffix("_token_id"): key for key in TOKEN_ID_KEYS.values()}
"""By the names in the keys: bos, eos, eot, eom, unknown, padding, seperator (sic), mask."""

_REPORTED_HYPER = (
    "n_layer",
    "n_ctx_train",
    "n_embd",
    "n_ff",
    "n_head",
    "n_head_kv",
    "key_length",
    "value_length",
    "sliding_window",
    "rope_theta",
    "rope_dimensions",
    "rope_scaling",
    "rope_scaling_factor",
    "n_expert",
    "n_expert_used",
    "n_expert_shared",
    "expert_gating",
    "expert_weights_norm",
    "expert_weights_scale",
    "n_expert_groups",
    "n_group_used",
    "n_leading_dense",
)
"""Hyper-parameters that the JSON of a report has, in this order."""
_TOKEN_ROWS = {TOKEN_EMBEDDING: "embedding", OUTPUT: "output"}
_SMALLEST_CONTEXT, _LARGEST_CONTEXT = 32, 2**24
"""The longest contexts that models are trained for have ten million tokens."""
_OLD_THETA = 10000.0


@dataclass(frozen=True)
class Share:
    """Tensors, weights and bytes of one part of the model, or of one tensor type."""

    name: str
    n_tensors: int
    n_parameters: int
    n_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits of file for each weight."""
        return 8 * self.n_bytes / self.n_parameters if self.n_parameters else 0.0


@dataclass(frozen=True)
class TokenizerReport:
    """The tokenizer: kind, pre-tokenizer, size, special tokens (name to id) and flags; None where not stated."""

    model: str | None
    pre: str | None
    n_vocab: int | None
    special: Mapping[str, int]
    special_text: Mapping[str, str]
    add_bos: bool | None
    add_eos: bool | None
    add_space_prefix: bool | None


@dataclass(frozen=True)
class TemplateReport:
    """The chat template: first line and length in characters (None without one), and the names of other templates."""

    first_line: str | None
    n_chars: int | None
    names: tuple[str, ...]


@dataclass(frozen=True)
class MergeReport:
    """The recipe that the model was merged by, as its author wrote it (YAML), and how its router was made."""

    recipe: str
    gate_mode: str | None
    ggufmoe_version: str | None


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes to run the model on the CPU with a context of ``n_ctx`` tokens.

    ``repacked_bytes`` are weights that the CPU's backend rearranges in a second buffer; ``compute_bytes`` is an
    estimate, the others are exact for plain transformers.
    """

    n_ctx: int
    weight_bytes: int
    repacked_bytes: int
    kv_bytes: int
    compute_bytes: int

    @property
    def n_bytes(self) -> int:
        """Bytes of weights, their copy, KV cache and compute buffers together."""
        return self.weight_bytes + self.repacked_bytes + self.kv_bytes + self.compute_bytes


@dataclass(frozen=True)
class ModelReport:
    """The content of a model's header; ``to_dict`` gives it for JSON.

    ``n_active_parameters`` counts the weights that are used for one token: all but those of experts that are not
    chosen. ``memory`` is for the context that was asked for and, last, for the longest that the model was trained for;
    empty for files that cannot be run.
    """

    files: tuple[str, ...]
    n_bytes: int
    gguf_version: int
    architecture: str | None
    name: str | None
    file_type: str | None
    n_parameters: int
    n_active_parameters: int
    n_tensors: int
    n_windowed_layers: int
    """Layers that attend to a sliding window only."""
    n_recurrent_layers: int
    """Layers that keep a state of fixed size."""
    hyper: Hyper
    parts: tuple[Share, ...]
    types: tuple[Share, ...]
    tokenizer: TokenizerReport
    template: TemplateReport
    sampling: Mapping[str, Any]
    provenance: Mapping[str, Any]
    base_models: tuple[Mapping[str, Any], ...]
    merge: MergeReport | None
    memory: tuple[MemoryNeed, ...]
    other: Mapping[str, Any]
    warnings: tuple[str, ...]

    @property
    def bits_per_weight(self) -> float:
        """Bits of tensor data for each weight."""
        return Share("", 0, self.n_parameters, sum(part.n_bytes for part in self.parts)).bits_per_weight

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dictionaries, lists, strings and finite numbers (NaN and infinity as strings)."""
        fields = asdict(self)
        fields["hyper"] = {name: fields["hyper"][name] for name in _REPORTED_HYPER}
        report: dict[str, Any] = _finite(fields)
        report["bits_per_weight"] = round(self.bits_per_weight, 4)
        for key, shares in (("parts", self.parts), ("types", self.types)):
            for entry, share in zip(report[key], shares, strict=True):
                entry["bits_per_weight"] = round(share.bits_per_weight, 4)
        for entry, need in zip(report["memory"], self.memory, strict=True):
            entry["n_bytes"] = need.n_bytes
        return report


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def inspect_model(path: Path, context: ContextOptions | None = None, host: HostMemory | None = None) -> ModelReport:
    """Describe a GGUF file, or a split model given any of its shards, and the memory to run it with ``context``.

    ``host`` tells which weights this CPU's backend rearranges (``placement.devices.this_host``). Raises GGUFError as
    ``read_model_header`` does.
    """
    return inspect_header(read_model_header(path), context, host)


def inspect_header(
    model: ModelHeader, context: ContextOptions | None = None, host: HostMemory | None = None
) -> ModelReport:
    """``inspect_model`` of a header that was read already, for example from the hub."""
    keys, hyper = TypedMetadata(model.metadata), model.hyper
    parts = _shares(model.tensors, lambda tensor: part_of(tensor.name))
    tokenizer, template, merge = _tokenizer(keys, hyper), _template(keys), _merge(keys)
    return ModelReport(
        files=tuple(file.name for file in model.paths),
        n_bytes=model.file_bytes,
        gguf_version=model.shards[0].header.version,
        architecture=hyper.architecture,
        name=keys.text(Keys.General.NAME),
        file_type=_file_type(keys),
        n_parameters=sum(part.n_parameters for part in parts),
        n_active_parameters=_active_parameters(parts, hyper),
        n_tensors=len(model.tensors),
        n_windowed_layers=model.memory.n_windowed,
        n_recurrent_layers=model.memory.n_recurrent,
        hyper=hyper,
        parts=parts,
        types=_shares(model.tensors, lambda tensor: tensor.type.name),
        tokenizer=tokenizer,
        template=template,
        sampling=_below(model, SAMPLING_PREFIX),
        provenance={key: value for key, value in _below(model, "general.").items() if not _ELSEWHERE.fullmatch(key)},
        base_models=_base_models(keys),
        merge=merge,
        memory=_memory(model, context or ContextOptions(), host or HostMemory()),
        other=_other(model, merge),
        warnings=tuple(_warnings(model, tokenizer, template)),
    )


def _file_type(keys: TypedMetadata) -> str | None:
    """What the file is called: by its bits where its types were chosen for it, or else its file type."""
    mix = keys.text(MIX)
    if mix is not None:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return str(json.loads(mix)["name"])[:_MIX_NAME_CHARS]
    file_type = keys.whole(Keys.General.FILE_TYPE)
    return None if file_type is None else FILE_TYPES.get(file_type, f"file type {file_type}")


def _shares(tensors: Iterable[TensorInfo], key: Callable[[TensorInfo], str]) -> tuple[Share, ...]:
    """Sums by ``key``, the largest first."""
    groups: dict[str, list[TensorInfo]] = {}
    for tensor in tensors:
        groups.setdefault(key(tensor), []).append(tensor)
    shares = (
        Share(name, len(group), sum(t.n_elements for t in group), sum(t.n_bytes for t in group))
        for name, group in groups.items()
    )
    return tuple(sorted(shares, key=lambda share: share.n_bytes, reverse=True))


def _active_parameters(parts: Iterable[Share], hyper: Hyper) -> int:
    total = sum(part.n_parameters for part in parts)
    experts = sum(part.n_parameters for part in parts if part.name == "experts")
    if not 0 < hyper.n_expert_used <= hyper.n_expert:
        return total
    return total - experts + experts * hyper.n_expert_used // hyper.n_expert


def _tokenizer(keys: TypedMetadata, hyper: Hyper) -> TokenizerReport:
    tokens = keys.items(Keys.Tokenizer.LIST, str)
    ids = {name: keys.whole(key) for name, key in _SPECIAL_TOKENS.items()}
    special = {name: number for name, number in ids.items() if number is not None}
    known = {name: number for name, number in special.items() if tokens and 0 <= number < len(tokens)}
    return TokenizerReport(
        model=keys.text(Keys.Tokenizer.MODEL),
        pre=keys.text(Keys.Tokenizer.PRE),
        n_vocab=hyper.n_vocab if tokens is None else len(tokens),
        special=special,
        special_text={name: tokens[number] for name, number in known.items()} if tokens else {},
        add_bos=keys.flag(Keys.Tokenizer.ADD_BOS),
        add_eos=keys.flag(Keys.Tokenizer.ADD_EOS),
        add_space_prefix=keys.flag(Keys.Tokenizer.ADD_PREFIX),
    )


def _template(keys: TypedMetadata) -> TemplateReport:
    prefix = f"{Keys.Tokenizer.CHAT_TEMPLATE}."
    names = tuple(key.removeprefix(prefix) for key in keys.metadata if key.startswith(prefix))
    template = keys.text(Keys.Tokenizer.CHAT_TEMPLATE)
    if template is None:
        return TemplateReport(None, None, names)
    lines = (line.strip() for line in template.splitlines())
    return TemplateReport(next((line for line in lines if line), ""), len(template), names)


_MIX_NAME_CHARS = 20
_ELSEWHERE = re.compile(r"architecture|name|file_type|quantization_version|alignment|type|(sampling|base_model)\..*")
"""``general.*`` keys that are no provenance, or have a field of their own in the report."""


def _below(model: ModelHeader, prefix: str) -> dict[str, Any]:
    """Metadata whose key begins with ``prefix``, by the rest of the key."""
    return {key.removeprefix(prefix): value.value for key, value in model.metadata.items() if key.startswith(prefix)}


def _base_models(keys: TypedMetadata) -> tuple[dict[str, Any], ...]:
    """``general.base_model.N.*``, grouped by N."""
    found: dict[int, dict[str, Any]] = {}
    for key, value in keys.metadata.items():
        match = re.fullmatch(r"general\.base_model\.(\d{1,4})\.(\w+)", key)
        if match:
            found.setdefault(int(match[1]), {})[match[2]] = value.value
    return tuple(found[number] for number in sorted(found))


def _merge(keys: TypedMetadata) -> MergeReport | None:
    recipe = keys.text(RECIPE)
    if recipe is None:
        return None
    return MergeReport(recipe, keys.text(GATE_MODE), keys.text(VERSION))


def _memory(model: ModelHeader, context: ContextOptions, host: HostMemory) -> tuple[MemoryNeed, ...]:
    is_model = model.get(Keys.General.TYPE, "model") == "model" and bool(model.get(Keys.General.ARCHITECTURE))
    if not model.tensors or not is_model:
        return ()
    needs: list[MemoryNeed] = []
    for options in (context, replace(context, n_ctx=0)):
        try:
            plan = plan_offload(model, options, OffloadOptions(device="none"), (), host)
        except GGUFError:  # no model can have the numbers in this header
            return ()
        repacked = plan.host.repacked_bytes
        weights = plan.host.weight_bytes - repacked
        need = MemoryNeed(plan.n_ctx, weights, repacked, plan.host.kv_bytes, plan.host.compute_bytes)
        if need.n_ctx and need not in needs:
            needs.append(need)
    return tuple(needs)


def _other(model: ModelHeader, merge: MergeReport | None) -> dict[str, Any]:
    """Metadata outside of the standard sections, arrays left out: how a merge was made, which imatrix was used."""
    standard = ("general.", "tokenizer.", "split.", f"{model.hyper.architecture}.", *(["ggufmoe."] if merge else []))
    return {
        key: value.value
        for key, value in model.metadata.items()
        if not key.startswith(standard) and value.item_type is None
    }


def _warnings(model: ModelHeader, tokenizer: TokenizerReport, template: TemplateReport) -> Iterable[str]:
    hyper, kind = model.hyper, TypedMetadata(model.metadata).text(Keys.General.TYPE)
    if kind in NO_MODELS:
        yield NO_MODELS[kind]
        return
    if hyper.architecture is None:
        yield "no general.architecture: this is not a model that llama.cpp can run"
    elif not model.tensors:
        yield "no tensors: only a vocabulary or metadata, which cannot be run"
    elif kind not in (None, "model"):
        yield f"general.type is {kind!r}: this is not a model to run by itself"
    elif template.first_line is None:
        named = f" with one of {', '.join(template.names)}" if template.names else ""
        yield f"no chat template: chat needs --chat-template{named}, run needs --raw"
    if hyper.architecture is not None and model.tensors:
        yield from _context_warnings(hyper)
    yield from _expert_warnings(model, hyper)
    for fault in header_faults(model):
        yield f"{fault}: llama.cpp cannot load this file"
    yield from _token_warnings(model, tokenizer)
    trailing = sum(shard.header.trailing_bytes for shard in model.shards)
    if trailing and model.tensors:
        yield f"{trailing} bytes behind the last tensor belong to nothing"


def _context_warnings(hyper: Hyper) -> Iterable[str]:
    n_ctx, window = hyper.n_ctx_train, hyper.unapplied_window
    is_scaled = hyper.rope_scaling not in (None, "none")
    if n_ctx is None:
        yield "says no context length: llama.cpp does not load such a file"
    elif not _SMALLEST_CONTEXT <= n_ctx <= _LARGEST_CONTEXT:
        yield f"a context of {n_ctx} tokens cannot be meant: give the one that it was trained for with --ctx-size"
    elif window is not None and window < n_ctx:
        yield (
            f"each token of the original attends to the last {window} tokens only, and llama.cpp has no such window "
            f"for this model: past position {window} the answers are another model's, so keep --ctx-size at {window}"
        )
    elif n_ctx >= 32768 and hyper.rope_theta == _OLD_THETA and not is_scaled and not hyper.sliding_window:
        yield (
            f"a context of {n_ctx} tokens with rope theta {_OLD_THETA:g} and no sliding window: Mistral 7B v0.1 has "
            "these numbers and a window of 4096; beyond that the answers may fall apart, so keep --ctx-size below"
        )


def _expert_warnings(model: ModelHeader, hyper: Hyper) -> Iterable[str]:
    legacy = legacy_experts(tensor.name for tensor in model.tensors)
    if legacy:
        yield (
            f"legacy layout: {len(legacy)} tensors hold one expert each ({legacy[0]}), which llama.cpp no longer "
            "loads; `ggufmoe quantize OLD.gguf -o NEW.gguf -q COPY` stacks them"
        )
    has_experts = any(part_of(tensor.name) == "experts" for tensor in model.tensors)
    if has_experts and not 0 < hyper.n_expert_used <= hyper.n_expert:
        yield f"the file has experts, but says that {hyper.n_expert_used} of {hyper.n_expert} are used"
    elif has_experts and hyper.n_expert == hyper.n_expert_used:
        yield (
            f"{all_experts_run(hyper.n_expert)} for every token: it computes as much as a dense model of its size; "
            "offloading experts saves memory, not time"
        )


def _token_warnings(model: ModelHeader, tokenizer: TokenizerReport) -> Iterable[str]:
    n_vocab = tokenizer.n_vocab
    if n_vocab is None:
        return
    beyond = [name for name, number in tokenizer.special.items() if not 0 <= number < n_vocab]
    if beyond:
        yield f"the {', '.join(beyond)} token is beyond the vocabulary of {n_vocab}"
    refused = "llama.cpp does not load such a file; convert it again"
    for tensor in model.tensors:
        if tensor.name not in _TOKEN_ROWS or len(tensor.shape) != 2 or tensor.shape[0] == n_vocab:
            continue
        what, n_rows = _TOKEN_ROWS[tensor.name], tensor.shape[0]
        if n_rows < n_vocab:
            yield f"{n_vocab - n_rows} added tokens (from {n_rows} on) have no row in the {what}: {refused}"
        else:
            yield f"the {what} has {n_rows} rows for {n_vocab} tokens: {refused}"
