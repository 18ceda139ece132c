"""Options of the convert half: making GGUF files from checkpoints, recipes and other GGUF files, and merging."""

# ruff: noqa: RUF009 (option() makes a dataclass field)
from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from ggufmoe.errors import OptionError
from ggufmoe.options.fields import check_values, option
from ggufmoe.options.limits import MAX_THREADS
from ggufmoe.sizes import parse_file_size, parse_size

Quantizer = Literal["auto", "fast", "ggml"]
TypeSet = Literal["k", "all", "fast"]
_DEFAULT_QUANT = "Q4_K_M"


def identical_experts() -> Any:
    """The option field for recipes whose experts are all the same."""
    return option(
        False,
        "--allow-identical-experts",
        help="Accept a recipe whose experts or prompts are all the same, as a start for training.",
    )


def outside_files() -> Any:
    """The option field for recipes that name files anywhere."""
    return option(
        False,
        "--allow-outside-files",
        help="Accept a recipe with a chat template, texts or a router outside of its folder and its models' folders.",
    )


def _keep_source() -> Any:
    return option(
        False,
        "--keep-source",
        help="Download weights from the hub into its cache and keep them; otherwise only the output is stored.",
    )


def _source_cache() -> Any:
    return option(
        None,
        "--source-cache",
        help="For a recipe from the hub: keep up to SIZE of what the router has read on the output's disk until it is "
        "written, so that it is not fetched twice.",
        metavar="SIZE",
    )


def source_cache_bytes(size: str | None, *, keep_source: bool) -> int | None:
    """Bytes of ``--source-cache``; None where it is not given. Raises OptionError."""
    if size is not None and keep_source:
        raise OptionError("--keep-source keeps all that is fetched, and --source-cache a part of it; give one of them")
    return None if size is None else file_bytes(size)


def worker_threads() -> Any:
    """The option field for the number of threads that read, compute and write tensors."""
    return option(
        None,
        "-t",
        "--threads",
        help="Number of threads; default: one for each usable core.",
        metavar="N",
        between=(1, MAX_THREADS),
    )


def router_report_file() -> Any:
    """The option field for the file that the router's report is written to."""
    return option(
        None,
        "--router-report",
        help="Write a JSON report of what the router does, layer by layer.",
        metavar="FILE",
    )


def split_size() -> Any:
    """The option field for the size of the files that a model is split into."""
    return option(None, "--split-max-size", help="Write shards of at most this size, for example 4G.", metavar="SIZE")


def manifest_wanted() -> Any:
    """The option field for a manifest beside the output."""
    return option(False, "--manifest", help="Write OUT.manifest.json beside the output, with a hash of each tensor.")


def file_bytes(size: str) -> int:
    """Bytes of a size such as 4G. Raises OptionError for what is none, or is a few bytes."""
    n_bytes = parse_size(size, 1000)
    if n_bytes is None or n_bytes < 1000:  # a few bytes: the letter was forgotten
        raise OptionError(f"{size!r} is not a size; give a number with K, M, G or T, for example 4G")
    return n_bytes


_BITS = re.compile(r"\s*(\d{1,2}(?:\.\d{1,4})?)\s*bpw\s*", re.IGNORECASE)
_LEAST_BITS, _MOST_BITS = 1.0, 16.0


@dataclass(frozen=True)
class SizeTarget:
    """The size that a file shall have at most: bits per weight, or bytes of all of it; or the divergence that it shall
    have at most by prediction, for the smallest file. One of the three is given."""

    text: str
    """As it was asked for."""
    bits: float | None = None
    n_bytes: int | None = None
    predicted_kl: float | None = None


def size_target(
    quant: str, size: str | None, bits: float | None, predicted_kl: float | None = None
) -> SizeTarget | None:
    """The target of ``-q 4.5bpw``, ``--size 6GiB`` and ``--target-bpw 4.5``; None where ``quant`` is a file type.

    Raises OptionError for more than one target, and for a size that is none.
    """
    found = _BITS.fullmatch(quant)
    if predicted_kl is not None:
        if found or size is not None or bits is not None or quant != _DEFAULT_QUANT:
            raise OptionError("predicted_kl says what size to make: give no file type and no other size")
        return SizeTarget(f"a predicted divergence of {predicted_kl:.3g}", predicted_kl=predicted_kl)
    given = [text for text in (quant if found else None, size, None if bits is None else f"{bits:g}bpw") if text]
    if len(given) > 1 or (given and not found and quant != _DEFAULT_QUANT):
        raise OptionError(f"-q {quant}, --size and --target-bpw each say what size to make; give one of them")
    if size is not None:
        n_bytes = parse_file_size(size)
        if n_bytes is None or n_bytes < 1000:  # a few bytes: the letter was forgotten
            raise OptionError(f"{size!r} is not a size; give a number with M, G, MiB or GiB, for example 6GiB")
        return SizeTarget(size.strip(), n_bytes=n_bytes)
    if found:
        bits = float(found[1])
    if bits is None:
        return None
    if not _LEAST_BITS <= bits <= _MOST_BITS:
        raise OptionError(f"expected {_LEAST_BITS:g} to {_MOST_BITS:g} bits per weight, not {bits:g}; try 4.5bpw")
    return SizeTarget(f"{bits:g}bpw", bits=bits)


@dataclass(frozen=True)
class ExportOptions:
    """How a GGUF file is made, whatever it is made from. Raises OptionError for values out of range."""

    quant: str = option(
        _DEFAULT_QUANT,
        "-q",
        "--quant",
        help="File type, as llama-quantize names it; or bits per weight, such as 4.5bpw, for the best file of them.",
        metavar="TYPE",
    )
    size: str | None = option(
        None, "--size", "--target-size", help="Make the best file of at most this size, such as 6GiB.", metavar="SIZE"
    )
    target_bpw: float | None = option(
        None,
        "--target-bpw",
        help="Make the best file of at most so many bits per weight, as -q 4.5bpw.",
        metavar="BITS",
    )
    predicted_kl: float | None = option(
        None, help="Make the smallest file whose predicted divergence is at most this.", between=(0.0, 100.0)
    )
    sensitivity: Path | None = option(
        None, "--sensitivity", help="For a size: what `ggufmoe sensitivity` measured of this model.", metavar="FILE"
    )
    types: TypeSet = option(
        "all",
        "--types",
        help="For a size: k takes Q2_K to Q6_K and Q8_0; all also IQ types, which are slower on CPUs; fast all that "
        "generate at most 5 % slower here than the standard mix of this size.",
    )
    imatrix: Path | None = option(
        None, "--imatrix", help="Importance matrix (GGUF, or the older .dat).", metavar="FILE"
    )
    tensor_types: tuple[str, ...] = option(
        (), "--tensor-type", help="Type of the tensors whose name matches a regular expression.", metavar="PATTERN=TYPE"
    )
    tensor_type_file: Path | None = option(
        None, "--tensor-type-file", help="File of PATTERN=TYPE, separated by spaces or lines.", metavar="FILE"
    )
    output_tensor_type: str | None = option(None, "--output-tensor-type", help="Type of output.weight.", metavar="TYPE")
    token_embedding_type: str | None = option(
        None, "--token-embedding-type", help="Type of token_embd.weight.", metavar="TYPE"
    )
    pure: bool = option(False, "--pure", help="Use one type for all tensors, without the mix of the file type.")
    threads: int | None = worker_threads()
    split_max_size: str | None = split_size()
    resume: bool = option(False, "--resume", help="Continue the partial file of an interrupted run.")
    force: bool = option(False, "--force", help="Replace an existing output.")
    manifest: bool = manifest_wanted()
    quantizer: Quantizer = option(
        "auto",
        "--quantizer",
        help="auto: our kernels where there are some; fast: only those; ggml: only llama.cpp's routines. Same bytes.",
    )
    cache: bool = option(
        True, "--cache/--no-cache", help="Keep compiled quantizers in the user's cache folder for later runs."
    )

    def __post_init__(self) -> None:
        check_values(self)
        _ = self.split_max_bytes
        target = self.size_target
        if target is not None and self.pure:
            raise OptionError(f"--pure means one type for all tensors, and {target.text} a mix; leave one of them out")

    @property
    def size_text(self) -> str | None:
        """The size that is asked for, as it was typed; None where a file type is."""
        target = self.size_target
        return None if target is None else target.text

    @property
    def size_target(self) -> SizeTarget | None:
        """The size that is asked for; None where a file type is."""
        return size_target(self.quant, self.size, self.target_bpw, self.predicted_kl)

    @property
    def split_max_bytes(self) -> int | None:
        """Bytes of ``split_max_size``; None where the output is one file."""
        return None if self.split_max_size is None else file_bytes(self.split_max_size)


class ExportKeywords(TypedDict, total=False):
    """The fields of ``ExportOptions`` as keywords; ``quant`` is a parameter of each function that takes them."""

    size: str | None
    target_bpw: float | None
    predicted_kl: float | None
    sensitivity: Path | None
    types: TypeSet
    imatrix: Path | None
    tensor_types: tuple[str, ...]
    tensor_type_file: Path | None
    output_tensor_type: str | None
    token_embedding_type: str | None
    pure: bool
    threads: int | None
    split_max_size: str | None
    resume: bool
    force: bool
    manifest: bool
    quantizer: Quantizer
    cache: bool


@dataclass(frozen=True)
class ConvertOptions(ExportOptions):
    """How a checkpoint becomes a GGUF file."""

    allow_identical_experts: bool = identical_experts()
    allow_outside_files: bool = outside_files()
    keep_source: bool = _keep_source()
    source_cache: str | None = _source_cache()
    router_report: Path | None = router_report_file()

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.source_cache_bytes

    @property
    def source_cache_bytes(self) -> int | None:
        """Bytes of ``source_cache``; None where nothing is kept."""
        return source_cache_bytes(self.source_cache, keep_source=self.keep_source)


class ConvertKeywords(ExportKeywords, total=False):
    """The fields of ``ConvertOptions`` but ``quant`` as keywords."""

    allow_identical_experts: bool
    allow_outside_files: bool
    keep_source: bool
    source_cache: str | None
    router_report: Path | None


@dataclass(frozen=True)
class QuantizeOptions(ExportOptions):
    """How a GGUF file becomes another one."""

    allow_requantize: bool = option(
        False,
        "--allow-requantize",
        help="Quantize tensors that are quantized already, which loses more than quantizing the original.",
    )


class QuantizeKeywords(ExportKeywords, total=False):
    """The fields of ``QuantizeOptions`` but ``quant`` as keywords."""

    allow_requantize: bool


@dataclass(frozen=True)
class MergeOptions:
    """How a recipe becomes a merged checkpoint."""

    layout: Literal["classic", "fused"] = option(
        "classic", "--layout", help="classic: every tool reads it; fused: transformers 5 reads it."
    )
    max_shard_size: str = option("5G", "--max-shard-size", help="Largest safetensors file.", metavar="SIZE")
    threads: int | None = worker_threads()
    resume: bool = option(False, "--resume", help="Continue the partial directory of an interrupted run.")
    force: bool = option(False, "--force", help="Replace an existing checkpoint.")
    allow_identical_experts: bool = identical_experts()
    allow_outside_files: bool = outside_files()
    keep_source: bool = _keep_source()
    source_cache: str | None = _source_cache()
    router_report: Path | None = router_report_file()

    def __post_init__(self) -> None:
        check_values(self)
        _ = self.max_shard_bytes
        _ = self.source_cache_bytes

    @property
    def source_cache_bytes(self) -> int | None:
        """Bytes of ``source_cache``; None where nothing is kept."""
        return source_cache_bytes(self.source_cache, keep_source=self.keep_source)

    @property
    def max_shard_bytes(self) -> int:
        """Bytes of ``max_shard_size``."""
        return file_bytes(self.max_shard_size)


class MergeKeywords(TypedDict, total=False):
    """The fields of ``MergeOptions`` as keywords."""

    layout: Literal["classic", "fused"]
    max_shard_size: str
    threads: int | None
    resume: bool
    force: bool
    allow_identical_experts: bool
    allow_outside_files: bool
    keep_source: bool
    source_cache: str | None
    router_report: Path | None
