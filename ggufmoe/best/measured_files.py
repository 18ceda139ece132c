"""Files that are written to be measured: in a folder beside the output that is deleted at the end, whatever happens.

The folder is ``OUT.gguf.verify.partial``: no file in it can be taken for the output, which appears when it was chosen.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ggufmoe.convert import ConvertResult, convert, plan_convert
from ggufmoe.errors import Cancelled, NoSpaceError, OptionError, OutputExistsError
from ggufmoe.evaluation.chunks import check_complete
from ggufmoe.evaluation.divergence import Comparison, kl_divergences
from ggufmoe.files import StrPath, delete_directory, move
from ggufmoe.gguf.model import read_model_header
from ggufmoe.gguf.names import legacy_experts
from ggufmoe.gguf.types import GGMLType
from ggufmoe.options import ConvertOptions, ExportOptions, QuantizeOptions
from ggufmoe.quantize import plan_quantize, quantize
from ggufmoe.sizes import file_size
from ggufmoe.work import CancelFlag, OnProgress
from ggufmoe.writing.place import check_output
from ggufmoe.writing.plan import WritePlan

_CHUNK_TOKENS = 512


@dataclass(frozen=True)
class Measured:
    """The KL divergence of a file from the unquantized model, in nats a token, with its standard error."""

    name: str
    n_bytes: int
    kl: float
    uncertainty: float

    def told(self) -> str:
        """The measurement as a few words."""
        return f"{self.kl:.4g} ± {self.uncertainty:.1g}: {self.name}, {file_size(self.n_bytes)}"

    def to_dict(self) -> dict[str, Any]:
        """The measurement as plain values for JSON."""
        return {"name": self.name, "bytes": self.n_bytes, "kl": self.kl, "uncertainty": self.uncertainty}


@dataclass(frozen=True, eq=False)
class Workshop:
    """Makes files of one source, measures them, and keeps one."""

    source: StrPath
    output: Path
    options: ExportOptions
    text: Path
    n_chunks: int
    folder: Path
    on_progress: OnProgress | None
    cancel: CancelFlag | None

    @property
    def is_gguf(self) -> bool:
        """Whether the source is a GGUF file."""
        return is_gguf(self.source)

    def plan(self, options: ExportOptions) -> WritePlan:
        """What would be written."""
        return planned(self.source, self.output, options, self.on_progress, self.cancel)

    def write(self, name: str, options: ExportOptions) -> ConvertResult:
        """Write a file of the source in the workshop, under the output's name in a folder of its own."""
        place = self.folder / name
        place.mkdir()
        return written(self.source, place / self.output.name, options, self.on_progress, self.cancel)

    def reference(self) -> Path:
        """The unquantized model as a file that llama.cpp loads: the source itself, or one that is written."""
        if self.is_gguf and not legacy_experts(t.name for t in read_model_header(Path(self.source)).tensors):
            return Path(self.source)
        return self.write("reference", self.reference_options()).paths[0]

    def reference_options(self) -> ExportOptions:
        """The options of a file without quantization: of F16 where the source's weights are, else of BF16."""
        plain = replace(
            self.options, size=None, target_bpw=None, predicted_kl=None, sensitivity=None, types="all", imatrix=None,
            tensor_types=(), tensor_type_file=None, output_tensor_type=None, token_embedding_type=None,
            split_max_size=None, manifest=False, force=False, quant="COPY" if self.is_gguf else "BF16",
        )  # fmt: skip
        if self.is_gguf:
            return plain
        stored = [part.type for tensor in self.plan(plain).tensors for part in tensor.parts]
        return replace(plain, quant="F16") if stored.count(GGMLType.F16) > len(stored) / 2 else plain

    def check_names(self, plan: WritePlan) -> None:
        """Raise OutputExistsError if a file of ``plan`` is an input, or is there and ``force`` is not given."""
        check_output(plan, force=self.options.force, resume=False)

    def check_space(self, n_bytes: int) -> None:
        """Raise NoSpaceError unless the disk of the output has room for ``n_bytes``."""
        free = shutil.disk_usage(self.output.parent).free
        if n_bytes > free:
            raise NoSpaceError(
                f"{self.output.parent}: measuring takes {file_size(n_bytes)} meanwhile, {file_size(free)} are free; "
                "make room, choose another place, or leave --verify out"
            )

    def measure(self, results: Sequence[ConvertResult], reference: Path, logits: Path | None = None) -> Comparison:
        """The divergences of files from the reference on the text."""
        trained = read_model_header(reference).hyper.n_ctx_train
        n_ctx = min(_CHUNK_TOKENS, max(trained) if isinstance(trained, tuple) else trained or _CHUNK_TOKENS)
        found = kl_divergences(
            [result.paths[0] for result in results],
            reference,
            text_file=self.text,
            logits=logits,
            n_ctx=n_ctx,
            chunks=self.n_chunks,
            on_progress=self.on_progress,
            cancel=self.cancel,
        )
        check_complete(found)
        return found

    def keep(self, result: ConvertResult) -> ConvertResult:
        """Give the files of a result the names of the output; the result says so. Raises as ``check_names``."""

        def placed(path: Path) -> Path:
            return self.output.parent / path.name

        files = tuple(replace(file, path=placed(file.path)) for file in result.plan.files)
        plan = replace(result.plan, output=self.output, files=files)
        self.check_names(plan)
        for path in sorted(result.paths[0].parent.iterdir()):
            move(path, placed(path))
        return replace(
            result,
            paths=tuple(map(placed, result.paths)),
            plan=plan,
            manifest=None if result.manifest is None else placed(result.manifest),
        )


@contextlib.contextmanager
def opened_folder(output: Path) -> Iterator[Path]:
    """The folder of files that are measured. Raises OutputExistsError if a run that was killed has left one.

    Errors in the block that advise to go on advise to start again: what was written is deleted.
    """
    folder = output.with_name(f"{output.name}.verify.partial")
    if folder.exists():
        raise OutputExistsError(f"{folder} is there from a run that was killed, or from one that goes on; delete it")
    folder.mkdir()
    try:
        yield folder
    except (Cancelled, NoSpaceError) as error:
        raise type(error)(str(error).replace("go on with --resume", "start again")) from error
    finally:
        delete_directory(folder)


def as_measured(result: ConvertResult, found: Comparison, number: int) -> Measured:
    """What was found of a file."""
    mean = found.models[number].kl.mean
    return Measured(result.plan.file_type, result.n_bytes, mean.value, mean.uncertainty)


def is_gguf(source: StrPath) -> bool:
    """Whether a source is a GGUF file, which ``quantize`` takes."""
    return str(source).lower().endswith(".gguf")


def planned(
    source: StrPath, output: Path, options: ExportOptions, on_progress: OnProgress | None, cancel: CancelFlag | None
) -> WritePlan:
    """What ``convert`` or ``quantize`` would write."""
    if isinstance(options, QuantizeOptions):
        return plan_quantize(source, output, options=options, on_progress=on_progress, cancel=cancel)
    assert isinstance(options, ConvertOptions), "the options are those of the source's kind"
    return plan_convert(source, output, options=options, on_progress=on_progress, cancel=cancel)


def written(
    source: StrPath, output: Path, options: ExportOptions, on_progress: OnProgress | None, cancel: CancelFlag | None
) -> ConvertResult:
    """What ``convert`` or ``quantize`` writes. Raises Cancelled also if it was stopped after its last tile."""
    if cancel is not None and cancel.is_set():
        raise Cancelled("stopped before the next file was written; start again")
    if isinstance(options, QuantizeOptions):
        return quantize(source, output, options=options, on_progress=on_progress, cancel=cancel)
    if not isinstance(options, ConvertOptions):
        raise OptionError(f"expected ConvertOptions or QuantizeOptions, not {options!r}")
    return convert(source, output, options=options, on_progress=on_progress, cancel=cancel)
