"""Opens a checkpoint from a directory or the hub, and checks that its files hold all tensors of its configuration."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from ggufmoe.checkpoint.config import quantization_method, read_config
from ggufmoe.checkpoint.fp8_blocks import scales_among
from ggufmoe.checkpoint.from_hub import HubAccess
from ggufmoe.checkpoint.layouts import arrange
from ggufmoe.checkpoint.provenance import RECORD, read_provenance
from ggufmoe.checkpoint.safetensors import TensorFile
from ggufmoe.checkpoint.shards import Elsewhere, open_tensor_files
from ggufmoe.checkpoint.source import Provenance
from ggufmoe.errors import CheckpointError
from ggufmoe.families.model_config import ModelConfig
from ggufmoe.files import possible_path, what_instead
from ggufmoe.hub.hub_models import is_hub_id, split_id
from ggufmoe.weights.source_tensor import SourceTensor
from ggufmoe.work import CancelFlag, OnProgress

_OUTPUT_ENDS = (".gguf", ".gguf.partial", ".partial.journal", ".partial.router", ".partial.lock", ".gguf.manifest.json")
_ADDRESS = re.compile(r"(https?://)?(www\.)?(huggingface\.co|hf\.co)/(?P<repo>[\w.-]+/[\w.-]+)")
_LOG = logging.getLogger("ggufmoe")


@dataclass(frozen=True)
class Checkpoint:
    """An open Hugging Face checkpoint; a ``ModelSource``.

    ``config.tie_embeddings`` is whether the files lack an ``lm_head.weight``, which may differ from config.json.
    """

    directory: Path
    config: ModelConfig
    tensors: Mapping[str, SourceTensor]
    provenance: Provenance
    input_paths: tuple[Path, ...]
    files: tuple[TensorFile, ...]
    chat_template: str | None = None

    @property
    def tokenizer_dir(self) -> Path:
        """The directory of the checkpoint, which holds its tokenizer files."""
        return self.directory

    @property
    def router_report(self) -> None:
        """None, because the router of a checkpoint is read and not computed."""

    @property
    def model_card(self) -> None:
        """None, because a checkpoint is not written again."""

    def prepare(
        self,
        *,
        threads: int | None = None,
        on_progress: OnProgress | None = None,
        cancel: CancelFlag | None = None,
    ) -> None:
        """Do nothing, because all rows of a checkpoint are read from its files."""

    def close(self) -> None:
        """Close the tensor files; a second call does nothing."""
        for file in self.files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_checkpoint(source: str | Path, *, revision: str | None = None, access: HubAccess | None = None) -> Checkpoint:
    """Open a checkpoint directory, or a model on the Hugging Face Hub by its id ``org/name`` or ``org/name@revision``.

    A path that exists takes precedence over a hub id. Reads and checks the configuration and all headers, no weights.
    ``access`` says how the hub is reached; by default the weights are read by ranges and not stored.

    Raises ArchitectureError, SafetensorsError, TensorMismatchError, HubError, and CheckpointError for anything else.
    """
    if isinstance(source, Path) or os.path.exists(source) or not is_hub_id(source):
        if revision is not None and os.path.exists(source):
            raise CheckpointError(f"{source} is a directory, so it has no revision {revision}")
        if (address := _ADDRESS.match(str(source))) is not None:
            raise CheckpointError(f"{source} is the address of a page; give the model's id, {address['repo']}")
        return open_directory(possible_path(source))
    directory, elsewhere = (access or HubAccess()).open(source, revision)
    return open_directory(directory, repo_id=split_id(source, None)[0], elsewhere=elsewhere)


def open_directory(directory: Path, *, repo_id: str | None = None, elsewhere: Elsewhere | None = None) -> Checkpoint:
    """Open the checkpoint in a local directory; ``repo_id`` is its id if it came from the hub.

    ``elsewhere`` are the tensor files that are not in the directory.

    Raises the errors of ``open_checkpoint``, except HubError.
    """
    _check_directory(directory)
    config = read_config(directory)
    files, stored = open_tensor_files(directory, elsewhere)
    try:
        tensors = arrange(str(directory), config, stored)
        is_copied = any(tensor.dtype.ggml_type.is_quantized for tensor in tensors.values())
        is_quantized = is_copied or scales_among(stored, config.raw)
        if (method := quantization_method(config.raw)) is not None and not is_quantized:
            _LOG.warning(
                "%s has a quantization_config (%s), but its weights are not quantized; it is ignored",
                *(directory / "config.json", method[:40]),
            )
        config = replace(config, tie_embeddings="lm_head.weight" not in tensors)
        provenance = read_provenance(directory, repo_id)
        return Checkpoint(directory, config, tensors, provenance, _inputs(directory), files)
    except BaseException:
        for file in files:
            file.close()
        raise


def _inputs(directory: Path) -> tuple[Path, ...]:
    """The files of a checkpoint, read or not, which no output may replace.

    GGUF files, and folders that have the record of a merge, are outputs of earlier runs.
    """
    everything = sorted(path for path in directory.rglob("*") if path.is_file())
    merged = {path.parent for path in everything if path.name == RECORD} - {directory}
    return tuple(
        path for path in everything if not path.name.endswith(_OUTPUT_ENDS) and merged.isdisjoint(path.parents)
    )


def _check_directory(directory: Path) -> None:
    try:
        if directory.is_dir():
            next(directory.iterdir(), None)
            (directory / "config.json").is_file()  # a directory may be listed and not entered
            return
        is_file = directory.is_file()
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {error.strerror}") from error
    if is_file and directory.suffix == ".gguf":
        raise CheckpointError(
            f"{directory} is a GGUF file, not a checkpoint directory; `ggufmoe run` takes it as it is, "
            "`ggufmoe quantize` makes another type of it"
        )
    if is_file and (directory.parent / "config.json").is_file():
        raise CheckpointError(f"{directory} is a file; give the checkpoint's directory, {directory.parent}")
    if is_file:
        raise CheckpointError(
            f"{directory} is a file; give the checkpoint's directory, or a recipe, whose name ends in .yaml"
        )
    if directory.is_symlink():
        raise CheckpointError(f"{directory} is {what_instead(directory)}")
    raise CheckpointError(f"{directory} does not exist; give a checkpoint directory or a hub id such as org/name")
