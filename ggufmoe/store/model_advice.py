"""Gets the headers that ``type_advice`` works on: of what a source is converted to, or of GGUF files of the hub."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ggufmoe.errors import InputError
from ggufmoe.gguf.header import Header
from ggufmoe.gguf.model import ModelHeader, Shard
from ggufmoe.hub.hub_gguf import read_hub_header
from ggufmoe.hub.hub_models import HubGGUF, HubListing, list_repository
from ggufmoe.options import ContextOptions, OffloadOptions
from ggufmoe.store.type_advice import Machine, TypeAdvice, advise_models, advise_types, take_type, this_machine
from ggufmoe.store.wanted import hub_name

ADVISED_TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "MXFP4_MOE", "IQ4_XS", "Q3_K_M", "Q2_K")
"""From the best to the smallest; those that need an importance matrix are left out."""


@dataclass(frozen=True)
class ModelAdvice:
    """What can be made of a model, or downloaded, from the best to the smallest."""

    types: tuple[TypeAdvice, ...]
    read_file: str = ""
    """Of GGUF files on the hub: the one whose header was read; the numbers of the others but their size follow it."""


def model_advice(
    model: str, machine: Machine, context: ContextOptions | None = None, offload: OffloadOptions | None = None
) -> ModelAdvice:
    """Advice on a directory, a recipe, or a repository of the hub: its checkpoint, else its GGUF files.

    Raises HubError, InputError where nothing can be advised on, and the errors of ``plan_convert``.
    """
    name = hub_name(model)
    if name is not None:
        listing = list_repository(name.repo_id, name.revision)
        if listing.gguf_models and not listing.has_checkpoint:
            return gguf_advice(listing, machine, context, offload)
    return ModelAdvice(source_advice(model, machine, context, offload))


def source_advice(
    source: str, machine: Machine, context: ContextOptions | None = None, offload: OffloadOptions | None = None
) -> tuple[TypeAdvice, ...]:
    """``advise_types`` for a directory, a recipe, or a checkpoint on the hub. Raises the errors of ``plan_convert``."""
    from ggufmoe.convert import plan_conversions

    plans = plan_conversions(source, Path("model.gguf"), ADVISED_TYPES)
    if len(plans) > 1:  # otherwise the experts are in MXFP4 already, and stay so
        plans.pop("MXFP4_MOE", None)
    if not plans:
        raise InputError(f"{source} can be converted to none of {', '.join(ADVISED_TYPES)}; see `ggufmoe convert`")
    return advise_types(plans, machine, context, offload)


def gguf_advice(
    listing: HubListing, machine: Machine, context: ContextOptions | None = None, offload: OffloadOptions | None = None
) -> ModelAdvice:
    """Advice on the GGUF files of a repository, by their quants, or by their names where two have the same quant.

    One header is read, that of the model of medium size: several megabytes of vocabulary are in each. The tensors of
    the others are taken to be as much larger or smaller as the files are.
    """
    models = sorted((one for one in listing.gguf_models if one.is_whole), key=lambda one: -one.n_bytes)
    if not models:
        raise InputError(f"{listing.repo_id}: parts of its GGUF files are missing; the hub's copy is broken")
    quants = [one.quant for one in models]
    are_distinct = all(quants) and len(set(quants)) == len(quants)
    medium = models[len(models) // 2]
    header = read_hub_header(medium)
    headers = {
        one.quant if are_distinct else one.entries[0].name: header if one is medium else _scaled(header, one)
        for one in models
    }
    return ModelAdvice(advise_models(headers, machine, context, offload), medium.entries[0].name)


def _scaled(model: ModelHeader, other: HubGGUF) -> ModelHeader:
    """The header of ``model`` with tensors so large that its files have together the size of ``other``."""
    n_before = sum(shard.header.data_offset for shard in model.shards)
    factor = max(other.n_bytes - n_before, 0) / max(model.file_bytes - n_before, 1)

    def scaled(header: Header) -> Header:
        tensors = tuple(
            replace(one, n_bytes=int(one.n_bytes * factor), offset=int(one.offset * factor)) for one in header.tensors
        )
        n_bytes = header.data_offset + int((header.file_bytes - header.data_offset) * factor)
        return replace(header, tensors=tensors, file_bytes=n_bytes)

    return ModelHeader(tuple(Shard(shard.path, scaled(shard.header)) for shard in model.shards))


def choose_type(model: str) -> str:
    """The file type of a MODEL that suits this machine; of GGUF files on the hub the quant or the name of one.

    Raises InputError if none fits.
    """
    return take_type(model_advice(model, this_machine()).types, model)
