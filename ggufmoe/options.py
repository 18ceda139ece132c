"""Option objects: one frozen definition gives the API's argument, the command line's flag and the server's field.

Each field carries its flags and help in its metadata; ``cli`` builds its parameters from them. Nothing here is read
from the environment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def option(default: Any, *flags: str, help: str, metavar: str | None = None) -> Any:
    """A dataclass field that is also a command-line option; without flags it exists only in the API."""
    metadata: Mapping[str, Any] = {"flags": flags, "help": help, "metavar": metavar}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ConvertOptions:
    """How a checkpoint becomes a GGUF file."""

    quant: str = option("Q4_K_M", "-q", "--quant", help="File type, as llama-quantize names it.", metavar="TYPE")
    imatrix: Path | None = option(
        None, "--imatrix", help="Importance matrix (GGUF, or the older .dat).", metavar="FILE"
    )
    tensor_types: tuple[str, ...] = option(
        (), "--tensor-type", help="Type of the tensors whose name matches a regular expression.", metavar="PATTERN=TYPE"
    )
    output_tensor_type: str | None = option(
        None, "--output-tensor-type", help="Type of output.weight.", metavar="TYPE"
    )
    token_embedding_type: str | None = option(
        None, "--token-embedding-type", help="Type of token_embd.weight.", metavar="TYPE"
    )
    pure: bool = option(False, "--pure", help="One type for all tensors, without the mix.")
    threads: int | None = option(None, "-t", "--threads", help="Worker threads; all cores by default.", metavar="N")
    split_max_size: str | None = option(
        None, "--split-max-size", help="Write shards of at most this size, for example 4G.", metavar="SIZE"
    )
    resume: bool = option(False, "--resume", help="Go on with the partial file of an interrupted run.")
    force: bool = option(False, "--force", help="Replace an existing output.")
    manifest: bool = option(False, "--manifest", help="Write OUT.manifest.json beside it, with a hash of each tensor.")
