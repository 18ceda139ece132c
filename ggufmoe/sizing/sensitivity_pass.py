"""One pass through a model for its sensitivity: forward and backward layer by layer, in a folder that can be resumed.

Owns which states are kept on disk and in which order the layers are done. The input of each layer is kept on the way
forward and deleted on the way back; what a layer gave is kept until the end. The arithmetic is in ``backward``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ggufmoe.checkpoint.source import ModelWeights
from ggufmoe.errors import NonFiniteError, NoSpaceError, OutputError, OutputExistsError, ResumeError
from ggufmoe.files import delete, move
from ggufmoe.merge.backward import BackwardPass, Sums
from ggufmoe.merge.forward import Floats, one_blas_thread
from ggufmoe.sizes import file_size
from ggufmoe.sizing.sensitivity_file import EmbeddingSensitivity, MatrixSensitivity
from ggufmoe.work import CancelFlag, OnProgress, Work

_BACKWARD_PARTS = 2
"""A layer takes about twice as long backward as forward: it is computed again, and differentiated."""


def measure(
    model: ModelWeights,
    sequences: Sequence[Sequence[int]],
    folder: Path,
    *,
    seed: int,
    origin: str = "",
    resume: bool = False,
    threads: int | None = None,
    on_progress: OnProgress | None = None,
    cancel: CancelFlag | None = None,
) -> tuple[Sums, EmbeddingSensitivity]:
    """What a sensitivity says of ``model``, whose sequences are lists of token ids; the same for the same ``seed``.

    States are kept in ``folder``, which is made; delete it when the result is written. With ``resume`` the pass goes on
    where an interrupted one of the same model ``origin`` (any text that tells models apart), sequences and seed
    stopped. The loss is that of a token drawn from the model's own distribution after each token of each sequence.

    Memory: about (n_tokens, n_ff + 8 n_embd) float32, the weights of attention of one layer, and tiles of the others.

    Raises CheckpointError for a family that is not computed, NoSpaceError, NonFiniteError, OutputExistsError where
    there is a folder and ``resume`` is not set, ResumeError where it is of something else, and Cancelled.
    """
    n_layer = model.config.n_layer
    total = n_layer * (1 + _BACKWARD_PARTS) + 1
    stopped = "stopped while measuring; --resume continues with the layer that was begun"
    work = Work("sensitivity", total, "parts", stopped=stopped, on_progress=on_progress, cancel=cancel)
    backward = BackwardPass(model, threads=threads, work=work)
    states = _States(folder, n_layer)
    state_bytes = 4 * sum(map(len, sequences)) * model.config.n_embd
    told = {"origin": origin, "seed": seed, "sequences": [list(map(int, sequence)) for sequence in sequences]}
    states.begin(json.dumps(told), resume=resume, n_bytes=(n_layer + 3) * state_bytes)
    with one_blas_thread():
        if not states.gradients():
            _forward(backward, sequences, states, work)
            hidden = states.read("hidden", n_layer)
            drawn = backward.drawn(hidden, seed)
            states.keep_sums(n_layer, *backward.head_gradient(hidden, drawn))
            work.advance(1, "output")
        else:
            done = n_layer + 1 + _BACKWARD_PARTS * (n_layer - min(states.gradients()))
            work.advance(done, "what was done before")
        for layer in reversed(range(min(states.gradients()))):
            found = backward.layer_gradient(
                layer, states.read("hidden", layer), states.read("gradient", layer + 1), sequences
            )
            states.keep_sums(layer, *found)
            work.advance(_BACKWARD_PARTS, f"layer {layer + 1} of {n_layer}, backward")
    counts = np.bincount([token for sequence in sequences for token in sequence], minlength=model.config.n_vocab)
    embedding = EmbeddingSensitivity(backward.embedding_squares(states.read("gradient", 0)), counts.astype(np.float32))
    return states.sums(), embedding


def _forward(backward: BackwardPass, sequences: Sequence[Sequence[int]], states: _States, work: Work) -> None:
    """Compute the input of each layer that is not on disk yet, and the output of the last one."""
    there = states.numbers("hidden")
    if not there:
        states.write("hidden", 0, backward.first(sequences))
    first = max(there, default=0)
    work.advance(first, "what was done before" if first else "embedding")
    hidden = states.read("hidden", first)
    for layer in range(first, states.n_layer):
        attended, normed = backward.attended(layer, hidden, sequences)
        hidden = backward.added(attended, backward.feed_forward(layer, normed))
        if not np.isfinite(hidden).all():
            raise NonFiniteError(f"layer {layer} gives values that are NaN or infinite; are its weights sound?")
        states.write("hidden", layer + 1, hidden)
        work.advance(1, f"layer {layer + 1} of {states.n_layer}, forward")


class _States:
    """The files of a pass: ``hidden-N.npy`` before layer N, ``gradient-N.npy`` of it, ``sums-N.npz`` of the layer."""

    def __init__(self, folder: Path, n_layer: int) -> None:
        self.folder, self.n_layer = folder, n_layer

    def begin(self, told: str, *, resume: bool, n_bytes: int) -> None:
        """Make the folder, or check that the one that is there is of the pass that ``told`` describes."""
        note = self.folder / "pass.json"
        if self.folder.exists():
            if not resume:
                raise OutputExistsError(
                    f"{self.folder} is there from an interrupted run; --resume continues it, --force begins again"
                )
            if not note.is_file() or note.read_text(encoding="utf-8") != told:
                raise ResumeError(
                    f"{self.folder} is of another model, text or seed; --force begins again, or delete it"
                )
            return
        free = shutil.disk_usage(self.folder.parent).free
        if free < n_bytes:
            raise NoSpaceError(
                f"{self.folder.parent}: the states of all layers take {file_size(n_bytes)}, {file_size(free)} are "
                "free; take fewer tokens (--tokens), or an output on another disk"
            )
        self.folder.mkdir()
        note.write_text(told, encoding="utf-8")

    def numbers(self, kind: str) -> list[int]:
        """The layers of which there is a state."""
        return [int(path.stem.rpartition("-")[2]) for path in self.folder.glob(f"{kind}-*.npy")]

    def gradients(self) -> list[int]:
        """The layers before which the gradient is known; ``n_layer`` is after the last."""
        return self.numbers("gradient")

    def read(self, kind: str, number: int) -> Floats:
        """A state. Raises ResumeError for a file that is not whole, as after a power cut."""
        path = self._path(kind, number)
        try:
            state: Floats = np.load(path)
        except (OSError, ValueError, EOFError) as error:
            raise ResumeError(f"{path} cannot be read; begin again with --force ({error})") from error
        return state

    def write(self, kind: str, number: int, state: Floats) -> None:
        """Keep a state; the file gets its name when it is whole."""
        self._replace(self._path(kind, number), lambda file: np.save(file, state))

    def keep_sums(self, number: int, sums: Sums, gradient: Floats) -> None:
        """Keep what layer ``number`` gave, and delete what is not needed any more."""
        arrays = {f"{name}/{field}": array for name, one in sums.items() for field, array in vars(one).items()}
        self._replace(self._path("sums", number, ".npz"), lambda file: np.savez(file, **arrays))
        self.write("gradient", number, gradient)
        delete(self._path("hidden", number))
        delete(self._path("gradient", number + 1))

    def _replace(self, path: Path, write: Callable[[BinaryIO], None]) -> None:
        """Write a file that survives this process; flushing each to its disk would take longer than a small layer."""
        beside = path.with_suffix(".new")
        try:
            with beside.open("wb") as file:
                write(file)
            move(beside, path)
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error

    def sums(self) -> Sums:
        """What all layers gave."""
        out: Sums = {}
        for number in range(self.n_layer + 1):
            with np.load(self._path("sums", number, ".npz")) as arrays:
                for name in sorted({key.rpartition("/")[0] for key in arrays.files}):
                    fields = ("in_sum2", "counts", "grad_sum2")
                    out[name] = MatrixSensitivity(*(arrays[f"{name}/{field}"] for field in fields))
        return out

    def _path(self, kind: str, number: int, suffix: str = ".npy") -> Path:
        return self.folder / f"{kind}-{number}{suffix}"
