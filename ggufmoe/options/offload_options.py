"""Options of placement: which weights go to which device, and how a file is loaded."""

# ruff: noqa: RUF009 (option() makes a dataclass field)
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ggufmoe.errors import OptionError
from ggufmoe.options.fields import check, check_values, option
from ggufmoe.options.limits import MAX_INT32, MAX_PORT, MAX_RPC_WORKERS

LoadMode = Literal["auto", "none", "mmap", "mlock", "mmap+mlock", "dio"]


AUTO_LAYERS = -1
"""As many layers on the GPU as fit (``--fit``), else all of them."""
ALL_LAYERS = -2
"""All layers on the GPU, whether they fit or not."""


def _layers(typed: str) -> int:
    words = {"auto": AUTO_LAYERS, "all": ALL_LAYERS}
    try:
        return words[typed] if typed in words else int(typed)
    except ValueError as error:
        raise OptionError(f"expected a number, auto or all, not {typed!r}") from error


@dataclass(frozen=True)
class OffloadOptions:
    """Which device holds which weights, and how the file is loaded. Raises OptionError for values out of range."""

    n_gpu_layers: int = option(
        AUTO_LAYERS,
        "-ngl",
        "--gpu-layers",
        "--n-gpu-layers",
        help="Number of layers on the GPU, from the last one (the output) backwards; all; auto: as many as fit. "
        "[default: auto]",
        metavar="N",
        parse=_layers,
        between=(ALL_LAYERS, MAX_INT32),
    )
    load_mode: LoadMode = option("auto", "-lm", "--load-mode", help="How the file is read into memory.")
    repack: bool = option(
        True,
        "--repack/--no-repack",
        " /-nr",
        help="Rearrange weights in a second buffer for faster arithmetic on the CPU (costs memory).",
    )
    cpu_moe: bool = option(False, "-cmoe", "--cpu-moe", help="Keep the experts of all layers in main memory.")
    n_cpu_moe: int | None = option(
        None,
        "-ncmoe",
        "--n-cpu-moe",
        help="Keep the experts of the first N layers in main memory.",
        metavar="N",
        between=(0, MAX_INT32),
    )
    override_tensor: tuple[str, ...] = option(
        (),
        "-ot",
        "--override-tensor",
        help="Put the tensors whose name matches a regular expression into a buffer, for example CPU or CUDA0.",
        metavar="PATTERN=BUFFER",
    )
    tensor_split: str | None = option(
        None, "-ts", "--tensor-split", help="Shares of the layers for each GPU, for example 3,1.", metavar="N0,N1,..."
    )
    main_gpu: int = option(
        0,
        "-mg",
        "--main-gpu",
        help="The GPU that is used with --split-mode none.",
        metavar="INDEX",
        between=(0, MAX_INT32),
    )
    split_mode: Literal["none", "layer", "row", "tensor"] = option(
        "layer",
        "-sm",
        "--split-mode",
        help="How several GPUs share a model: by layers, rows or tensors; none: one GPU has all.",
    )
    device: str | None = option(
        None, "-dev", "--device", help="Devices to use, by name; none: only the CPU.", metavar="DEV1,DEV2,..."
    )
    kv_offload: bool = option(
        True,
        "--kv-offload/--no-kv-offload",
        "-kvo/-nkvo",
        help="Keep each layer's KV cache on the device that has the layer.",
    )
    no_host: bool = option(
        False, "--no-host", help="Do not pin the weights in main memory for a GPU; they can then be repacked."
    )
    fit: Literal["on", "off"] = option(
        "on",
        "-fit",
        "--fit",
        help="Choose the options that are not given so that the model fits into the memory of the GPUs.",
    )
    fit_target: int = option(
        1024,
        "-fitt",
        "--fit-target",
        help="Memory that --fit leaves free on each GPU, in MiB.",
        metavar="MiB",
        between=(0, MAX_INT32),
    )
    n_expert_used: int | None = option(
        None,
        "--n-expert-used",
        help="Number of experts for each token; fewer than the model was trained with are faster and less accurate.",
        metavar="N",
        between=(1, MAX_INT32),
    )

    rpc: str | None = option(
        None,
        "--rpc",
        help="Workers on other machines ('ggufmoe worker'), which become the devices RPC0, RPC1, ...",
        metavar="HOST:PORT,...",
    )
    rpc_timeout: float = option(
        30.0,
        "--rpc-timeout",
        help="Seconds without an answer after which a worker counts as lost; ten times that for loading and prompts.",
        metavar="S",
        between=(0.1, MAX_INT32),
    )

    def __post_init__(self) -> None:
        check_values(self)
        if self.cpu_moe and self.n_cpu_moe is not None:
            raise OptionError("--cpu-moe keeps all experts in the CPU's memory: leave out --n-cpu-moe")
        _ = (self.overrides, self.split_shares, self.workers)

    @property
    def overrides(self) -> tuple[tuple[str, str], ...]:
        """Pattern and buffer of each ``override_tensor``; several may stand in one, with commas between them."""
        return tuple(pair for given in self.override_tensor for pair in _override_pairs(given))

    @property
    def split_shares(self) -> tuple[float, ...] | None:
        """``tensor_split`` as numbers, which llama.cpp lets commas or slashes separate."""
        if self.tensor_split is None:
            return None
        message = f"--tensor-split: expected numbers such as 3,1, not {self.tensor_split!r}"
        try:
            shares = tuple(float(share) for share in self.tensor_split.replace("/", ",").split(","))
        except ValueError as error:
            raise OptionError(message) from error
        check(all(0 <= share <= MAX_INT32 for share in shares) and sum(shares) > 0, message)
        return shares

    @property
    def workers(self) -> tuple[tuple[str, int], ...]:
        """Host and port of each worker that ``rpc`` names, in its order."""
        if self.rpc is None:
            return ()
        workers = tuple(_host_and_port(endpoint.strip()) for endpoint in self.rpc.split(","))
        check(len(set(workers)) == len(workers), f"--rpc {self.rpc}: names a worker twice")
        check(len(workers) <= MAX_RPC_WORKERS, f"--rpc: llama.cpp takes {MAX_RPC_WORKERS} workers, not {len(workers)}")
        return workers


def _host_and_port(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.rpartition(":")
    check(
        ":" not in host and not endpoint.startswith("["),
        f"--rpc {endpoint}: llama.cpp's RPC knows only IPv4: give the worker's IPv4 address, or a name that has one",
    )
    is_port = port.isascii() and port.isdecimal() and 1 <= int(port[:6]) <= MAX_PORT
    check(bool(host) and is_port, f"--rpc {endpoint or repr(endpoint)}: expected HOST:PORT, for example 10.0.0.2:50052")
    return host, int(port)


def _override_pairs(given: str) -> list[tuple[str, str]]:
    pairs, pattern = [], ""
    for piece in given.split(","):
        # a piece without = is part of a pattern that holds a comma
        before, equals, buffer = piece.rpartition("=")
        if not equals:
            pattern += piece + ","
            continue
        check(bool(before) and bool(buffer), f"--override-tensor: expected PATTERN=BUFFER, not {given!r}")
        pairs.append((pattern + before, buffer))
        pattern = ""
    check(not pattern, f"--override-tensor: expected PATTERN=BUFFER, not {given!r}")
    return pairs
