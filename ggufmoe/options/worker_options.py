"""Options of a worker, which serves this machine's devices to other machines."""

from __future__ import annotations

from dataclasses import dataclass

from ggufmoe.options.fields import check, check_values, option
from ggufmoe.options.limits import MAX_PORT, MAX_THREADS


@dataclass(frozen=True)
class WorkerOptions:
    """What a worker serves to other machines, and where; the flags are those of llama.cpp's server.

    Raises OptionError for impossible numbers.
    """

    host: str = option(
        "127.0.0.1",
        "-H",
        "--host",
        help="Address to listen at; the default one cannot be reached from other machines.",
        metavar="HOST",
    )
    port: int = option(50052, "-p", "--port", help="Port to listen at.", metavar="PORT", between=(1, MAX_PORT))
    n_threads: int | None = option(
        None,
        "-t",
        "--threads",
        help="Number of CPU threads; default: one for each physical core.",
        metavar="N",
        between=(1, MAX_THREADS),
    )
    device: str | None = option(
        None,
        "-d",
        "--device",
        help="Devices to serve, by name; default: all GPUs, or the CPU where there is none.",
        metavar="DEV1,DEV2,...",
    )
    cache: bool = option(False, "-c", "--cache", help="Keep large tensors on disk, so that loading again is faster.")

    def __post_init__(self) -> None:
        check_values(self)
        check(bool(self.host), "the address to listen at is empty")
