"""``ggufmoe worker``: lend this machine's memory and processors to other machines."""

from __future__ import annotations

import contextlib
import sys

from ggufmoe.cli.console import note
from ggufmoe.cli.params import with_options
from ggufmoe.cli.progress import ProgressLine
from ggufmoe.cli.terminal import rpc_cache_directory
from ggufmoe.errors import OutputError
from ggufmoe.options import WorkerOptions
from ggufmoe.remote.worker import ServedDevice, Worker, is_local_only
from ggufmoe.sizes import counted, memory_size


@with_options(WorkerOptions)
def worker_command(worker: WorkerOptions) -> None:
    """Serve this machine's devices to 'ggufmoe run --rpc HOST:PORT' on other machines, until Ctrl-C.

    One client at a time is served. There is no authentication and no encryption: everyone who can reach the port can
    use it.
    """
    cache_dir = rpc_cache_directory() if worker.cache else None
    if cache_dir is not None:
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{cache_dir}: the folder of --cache cannot be made: {error.strerror}") from error
    with ProgressLine("worker", phase="worker"):
        served = Worker(worker, cache_dir=cache_dir)
    with contextlib.suppress(KeyboardInterrupt), served:
        if not is_local_only(worker.host):
            note(
                f"warning: {worker.host} can be reached from other machines. llama.cpp's RPC is experimental and not "
                "secure: it asks for no password and trusts what it is sent. Never expose it to an open network."
            )
        for device in served.devices:
            note(f"serving {_line(device)}")
        kept = f", tensors kept in {cache_dir}" if cache_dir else ""
        note(f"at {served.endpoint}, {counted(served.n_threads, 'thread')}{kept}")
        note(f"use it with --rpc {_typed(served.endpoint)}; Ctrl-C ends it")
        served.wait()
    if sys.stderr.isatty():
        note("")  # ends the line in which the terminal shows ^C


def _line(device: ServedDevice) -> str:
    memory = f"{memory_size(device.total_bytes)}, {memory_size(device.free_bytes)} free"
    return f"{device.name}: {device.description or 'no description'} ({memory})"


def _typed(endpoint: str) -> str:
    host, _, port = endpoint.rpartition(":")
    return f"ADDRESS-OF-THIS-MACHINE:{port}" if host == "0.0.0.0" else endpoint
