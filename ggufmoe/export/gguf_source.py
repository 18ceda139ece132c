"""A GGUF model as a source: its tensors by rows as they are stored, its metadata, and its hyper-parameters.

A split model is opened by any of its files. Mixtral files from before April 2024, with one tensor for each expert,
appear with their experts stacked, as llama.cpp expects them today. ``requantize`` plans what the tensors become.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ggufmoe.errors import GGUFError, TensorMismatchError
from ggufmoe.gguf.header import GGUFValue, without_leading_ones
from ggufmoe.gguf.hyper import at_layer
from ggufmoe.gguf.model import SPLIT_KEYS, ModelHeader, check_kind
from ggufmoe.gguf.names import legacy_expert
from ggufmoe.gguf.stored_rows import GGUFRows, OpenModel
from ggufmoe.gguf.types import GGMLType
from ggufmoe.gguf.upstream import DEFAULT_ALIGNMENT, Keys
from ggufmoe.quant.policy import ModelShape

_LOG = logging.getLogger("ggufmoe")

_ALIGNMENT_KEY = Keys.General.ALIGNMENT


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor of the model; ``parts`` one after another are its rows, one part for each matrix of a stack.

    ``shape`` is in numpy's order, without leading ones, which ggml does not count.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[GGUFRows, ...]

    @property
    def type(self) -> GGMLType:
        """The type of the first part; parts differ in type only in a legacy file whose experts do."""
        return self.parts[0].type


class GGUFSource:
    """An open GGUF model: one file, or all files of a split model.

    Raises GGUFError if a file cannot be read or the files do not belong together, TensorMismatchError for experts that
    are missing or differ in shape.
    """

    def __init__(self, path: Path) -> None:
        self._model = OpenModel(path)
        self.header: ModelHeader = self._model.header
        try:
            stored = self._model.tensors.values()
            given = (GGUFTensor(rows.name, without_leading_ones(rows.shape), rows.matrices()) for rows in stored)
            self.tensors = tuple(_stacked(given, self.model_shape.n_expert, path))
        except BaseException:
            self.close()
            raise
        if not self.tensors:
            self.close()
            raise GGUFError(f"{path}: holds no tensors (a vocabulary only?); there is nothing to quantize")

    @property
    def input_paths(self) -> tuple[Path, ...]:
        """Every file that is read."""
        return self.header.paths

    @property
    def metadata(self) -> dict[str, GGUFValue]:
        """The keys of the model in their order, without those that number the files of a split model."""
        keys = {key: value for key, value in self.header.metadata.items() if key not in SPLIT_KEYS}
        if _ALIGNMENT_KEY in keys and keys[_ALIGNMENT_KEY].value != DEFAULT_ALIGNMENT:
            del keys[_ALIGNMENT_KEY]  # files that are written have the default alignment
        return keys

    @property
    def model_shape(self) -> ModelShape:
        """The numbers that the quantization mixes depend on, read as libllama's ``load_hparams`` reads them."""
        check_kind(self.header)
        where, hyper = self.header.paths[0], self.header.hyper
        name = hyper.architecture
        if name is None:
            raise GGUFError(f"{where}: does not say its architecture ({Keys.General.ARCHITECTURE}); is this a model?")
        if hyper.malformed:
            key = min(hyper.malformed)
            value = str(self.header.get(key))[:40]
            raise GGUFError(f"{where}: {key} is {value}, expected a count; the file is corrupt")
        if hyper.n_layer is None and name != "clip":
            raise GGUFError(
                f"{where}: {hyper.key(Keys.LLM.BLOCK_COUNT)} is missing, the number of layers; is this a model?"
            )
        n_head = at_layer(hyper.n_head, 0)
        n_head_kv = at_layer(hyper.n_head_kv, 0, n_head)
        return ModelShape(hyper.n_layer or 0, n_head, n_head_kv, hyper.n_expert, name)

    def close(self) -> None:
        """Close the files; a second call does nothing."""
        self._model.close()


def _stacked(tensors: Iterable[GGUFTensor], n_expert: int, path: Path) -> list[GGUFTensor]:
    """All tensors, those with one expert each stacked."""
    whole: list[GGUFTensor] = []
    stacks: dict[str, dict[int, GGUFTensor]] = {}
    for tensor in tensors:
        found = legacy_expert(tensor.name)
        if found:
            stacks.setdefault(found.stack, {})[found.expert] = tensor
        else:
            whole.append(tensor)
    if stacks:
        _LOG.info("%s has one tensor for each expert; they are stacked", path)
        names = {tensor.name for tensor in whole}
        whole += [_stack(name, experts, n_expert, path, names) for name, experts in stacks.items()]
    return whole


def _stack(
    name: str, experts: Mapping[int, GGUFTensor], n_expert: int, path: Path, names: Sequence[str] | set[str]
) -> GGUFTensor:
    if name in names:
        raise TensorMismatchError(f"{path}: holds {name} and its experts one by one; expected only one of the two")
    if sorted(experts) != list(range(n_expert)):
        missing = ", ".join(map(str, sorted(set(range(n_expert)) - set(experts)))) or "none"
        raise TensorMismatchError(f"{path}: {name} needs {n_expert} experts, found {len(experts)}; missing: {missing}")
    shapes = {tensor.shape for tensor in experts.values()}
    if len(shapes) > 1:
        raise TensorMismatchError(f"{path}: the experts of {name} are not of one shape: {sorted(shapes)}")
    parts = tuple(experts[i].parts[0] for i in range(n_expert))
    return GGUFTensor(name, (n_expert, *shapes.pop()), parts)
