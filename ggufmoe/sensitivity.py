"""The sensitivity of a model: opens it, tokenizes a text, has the pass done, and writes the file. Nothing is printed.

Checkpoints and recipes are tokenized by their own tokenizer's files, a GGUF file by llama.cpp, which is given the
vocabulary alone. Weights are read as in the rest of the convert half.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.checkpoint.source import ModelSource, ModelWeights
from ggufmoe.errors import OptionError
from ggufmoe.evaluation.chunks import read_text
from ggufmoe.evaluation.imatrix import LayerCoverage, coverage_of, coverage_warnings
from ggufmoe.export.gguf_source import GGUFSource
from ggufmoe.families import family_of
from ggufmoe.files import StrPath, check_output_file, delete_directory, followed, partial_path, possible_path
from ggufmoe.gguf.checks import check_loadable
from ggufmoe.gguf.names import OUTPUT
from ggufmoe.merge.backward import BackwardPass
from ggufmoe.merge.gguf_weights import GGUFWeights
from ggufmoe.merge.merged import open_recipe
from ggufmoe.merge.router_texts import TextTokens
from ggufmoe.options import SensitivityKeywords, SensitivityOptions, options_of
from ggufmoe.quant.importances import save
from ggufmoe.runtime.stored_vocabulary import StoredVocabulary
from ggufmoe.sizing.calibration import file_sequences, text_sequences
from ggufmoe.sizing.sensitivity_file import Sensitivity
from ggufmoe.sizing.sensitivity_pass import measure
from ggufmoe.templates.jinja_template import stored_templates
from ggufmoe.work import CancelFlag, OnProgress

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class SensitivityResult:
    """Describes a sensitivity that was written."""

    path: Path
    n_tokens: int
    n_sequences: int
    n_matrices: int
    coverage: tuple[LayerCoverage, ...]
    """One entry per layer with experts."""
    seconds: float

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings about experts that the text reached never or hardly."""
        return coverage_warnings(self.coverage)

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values for JSON."""
        return {
            "path": str(self.path),
            "tokens": self.n_tokens,
            "sequences": self.n_sequences,
            "matrices": self.n_matrices,
            "coverage": [{"layer": row.layer, "tokens": list(row.tokens)} for row in self.coverage],
            "warnings": list(self.warnings),
            "seconds": round(self.seconds, 3),
        }


def sensitivity(
    source: StrPath,
    output: StrPath,
    text: str | None = None,
    *,
    text_file: StrPath | None = None,
    options: SensitivityOptions | None = None,
    on_progress: OnProgress | None = None,
    cancel: CancelFlag | None = None,
    **keywords: Unpack[SensitivityKeywords],
) -> SensitivityResult:
    """Measure how much a model's answers depend on each of its weights, and write that to ``output``.

    ``source`` is a Hugging Face directory, a recipe (``.yaml``), a GGUF file or, as a str, a hub id. Give either the
    text itself (``text``) or a file (``text_file``): plain text, or ``.jsonl`` with ``text`` or ``messages`` on each
    line. The file says for each matrix the mean square of each input, which is an importance matrix, and of the
    gradient of each output, for a loss whose targets are drawn from the model's own distribution; what a type costs
    follows from these. Options are given as one object (``options=SensitivityOptions(seed=1)``) or by name.

    Each weight is read twice, layer by layer. The state before each layer is kept in ``OUTPUT.partial`` meanwhile,
    where ``resume`` goes on after an interruption; it takes n_layer x n_tokens x n_embd x 4 bytes.

    Raises a class of ``ggufmoe.errors``: ArchitectureError or CheckpointError for a model whose gradients are not
    computed, InputError for a text that is too short or cannot be read, OutputError, NonFiniteError, EngineMissingError
    for a GGUF file without llama-cpp-python, and Cancelled.
    """
    options = options_of(SensitivityOptions, options, keywords)
    started = time.monotonic()
    if (text is None) is (text_file is None):
        raise OptionError("give either text, the text itself, or text_file, the path of a file")
    path, read = followed(possible_path(output)), () if text_file is None else (possible_path(text_file),)
    folder = partial_path(path)
    with _opened(source, options) as opened:
        model, inputs = opened.model, opened.input_paths
        for wanted in (path, options.imatrix_out):
            if wanted is not None:
                check_output_file(wanted, [*inputs, *read], replace=options.force)
        BackwardPass(model)
        sequences = _sequences(text, text_file, opened.tokens, options)
        if options.force and not options.resume and folder.is_dir():
            delete_directory(folder)
        opened.prepare(on_progress, cancel)
        sums, embedding = measure(
            model,
            sequences,
            folder,
            seed=options.seed,
            origin=json.dumps([_identity(one) for one in inputs]),
            resume=options.resume,
            threads=options.threads,
            on_progress=on_progress,
            cancel=cancel,
        )
        found = Sensitivity(
            architecture=family_of(model.config).gguf_arch,
            source=os.path.basename(os.fspath(source).rstrip("/\\")) or os.fspath(source),
            n_tokens=sum(map(len, sequences)),
            seed=options.seed,
            datasets=() if text_file is None else (os.fspath(text_file),),
            chunk_size=max(map(len, sequences)),
            matrices=sums,
            embedding=embedding,
        )
    found.save(path)
    if options.imatrix_out is not None:
        _save_imatrix(found, options.imatrix_out)
    delete_directory(folder)
    coverage = coverage_of({name: matrix.counts for name, matrix in sums.items()})
    seconds = time.monotonic() - started
    return SensitivityResult(path, found.n_tokens, len(sequences), len(sums), coverage, seconds)


@dataclass(frozen=True)
class _Opened:
    """A model whose sensitivity is measured."""

    model: ModelWeights
    tokens: TextTokens
    input_paths: tuple[Path, ...]
    prepare: Callable[[OnProgress | None, CancelFlag | None], None]
    """Computes what no file holds."""


@contextlib.contextmanager
def _opened(source: StrPath, options: SensitivityOptions) -> Iterator[_Opened]:
    """The model that ``source`` names: a GGUF file, a recipe, a directory or a hub id. It is closed at the end."""
    kind = Path(source).suffix.lower()
    if kind == ".gguf":
        with contextlib.closing(GGUFSource(possible_path(source))) as file:
            check_loadable(file.header)
            stored = GGUFWeights(file.header, {tensor.name: tensor.parts for tensor in file.tensors})
            with StoredVocabulary(file.header.paths[0]) as vocabulary:
                template = stored_templates(file.header.shards[0].header).get("default")
                sizes = stored.config.n_vocab, stored.config.n_ctx
                tokens = TextTokens(vocabulary.tokenize, vocabulary.bos, vocabulary.eos, template, *sizes)
                yield _Opened(stored, tokens, file.input_paths, lambda on_progress, cancel: None)
        return
    if kind in (".yaml", ".yml"):
        model: ModelSource = open_recipe(
            possible_path(source),
            allow_identical_experts=options.allow_identical_experts,
            allow_outside_files=options.allow_outside_files,
        )
    elif options.allow_identical_experts or options.allow_outside_files:
        raise OptionError(
            f"{source} is no recipe; --allow-identical-experts and --allow-outside-files belong to recipes"
        )
    else:
        model = open_checkpoint(
            source if isinstance(source, str) and not source.startswith("~") else possible_path(source)
        )
    with contextlib.closing(model):
        yield _Opened(
            model,
            TextTokens.of(model),
            model.input_paths,
            lambda on_progress, cancel: model.prepare(threads=options.threads, on_progress=on_progress, cancel=cancel),
        )


def _sequences(
    text: str | None, text_file: StrPath | None, tokens: TextTokens, options: SensitivityOptions
) -> list[Sequence[int]]:
    if text_file is not None and str(text_file).lower().endswith(".jsonl"):
        return file_sequences(possible_path(text_file), tokens, n_tokens=options.n_tokens, seed=options.seed)
    content = read_text(text, text_file)
    return text_sequences(content, tokens, n_tokens=options.n_tokens, n_ctx=options.n_ctx)


def _identity(path: Path) -> list[Any]:
    """What tells a file from another one, and from the same at another time."""
    with contextlib.suppress(OSError):
        status = path.stat()
        return [str(path), status.st_size, status.st_mtime_ns]
    return [str(path)]


def _save_imatrix(found: Sensitivity, path: Path) -> None:
    """Write what llama-imatrix would: it measures no output unless it is asked to."""
    entries = {name: (one.in_sum2, one.counts) for name, one in found.matrices.items() if name != OUTPUT}
    save(path, entries, found.datasets, found.n_tokens // found.chunk_size, found.chunk_size)
