"""The rules by which libllama places tensors, for one model, one set of options and the devices that they leave.

Source: ``load_tensors`` in llama-model.cpp, llama-kv-cache.cpp and arg.cpp at commit 0c1e57098.
"""

from __future__ import annotations

import difflib
import re
import struct
from collections.abc import Sequence
from itertools import accumulate

from ggufmoe.errors import OptionError
from ggufmoe.gguf.names import EXPERTS_PATTERN, experts_pattern
from ggufmoe.native.wording import repack_buffer
from ggufmoe.options import OffloadOptions
from ggufmoe.placement.footprint import Footprint, WeightTensor
from ggufmoe.placement.offload_plan import HostMemory, Place

_ROWS_ON_GPU = {"F32", "F16", "BF16", "I32", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"}
"""Types of which GPU backends can take single rows, as embeddings need; other types stay in plain memory."""


class PlacementRules:
    """Where libllama puts tensors that do not go with their layer; independent of how layers are distributed.

    Raises OptionError for overrides that name no buffer or match no tensor.
    """

    def __init__(
        self, footprint: Footprint, offload: OffloadOptions, devices: tuple[Place, ...], host: HostMemory
    ) -> None:
        self.footprint = footprint
        self.offload = offload
        self.devices = devices
        self.host = host
        self.uses_mmap = offload.load_mode in ("mmap", "mmap+mlock") or (
            offload.load_mode == "auto" and all(device.supports_mmap for device in devices)
        )
        self.host_buffers = tuple(dict.fromkeys(device.host_buffer for device in devices if device.host_buffer))
        """Names of main memory that a device can read by itself."""
        self._pinned = self.host_buffers[0] if self.host_buffers and not (offload.no_host or self.uses_mmap) else None
        self._can_repack = offload.repack and (offload.no_host or not self.host_buffers)
        self.patterns = self._patterns()
        """Regular expressions of explicit overrides, and the buffer of each; the first that matches counts."""

    def _patterns(self) -> tuple[tuple[re.Pattern[str], str], ...]:
        given = [(pattern, buffer, f"-ot {pattern}={buffer}") for pattern, buffer in self.offload.overrides]
        if self.offload.cpu_moe:
            given.append((EXPERTS_PATTERN, self.host.name, "--cpu-moe"))
        if self.offload.n_cpu_moe:
            pattern = experts_pattern(range(min(self.offload.n_cpu_moe, self.footprint.n_layer)))
            given.append((pattern, self.host.name, f"--n-cpu-moe {self.offload.n_cpu_moe}"))
        buffer_of_device = {device.name: device.buffer for device in self.devices}
        named = [(pattern, buffer_of_device.get(buffer, buffer), flag) for pattern, buffer, flag in given]
        return tuple((self._compiled(pattern, buffer, flag), buffer) for pattern, buffer, flag in named)

    def _compiled(self, pattern: str, buffer: str, flag: str) -> re.Pattern[str]:
        where = f"{self.footprint.model.paths[0]}: {flag}"
        buffers = dict.fromkeys((self.host.name, *(device.buffer for device in self.devices), *self.host_buffers))
        if buffer not in buffers:
            raise OptionError(f"{where}: there is no buffer {buffer}; there is {', '.join(buffers)}")
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise OptionError(f"{where}: not a regular expression: {error}") from error
        if any(compiled.search(name) for name in self.footprint.names):
            return compiled
        if pattern not in dict(self.offload.overrides):
            raise OptionError(f"{where}: the model has no experts to keep in the CPU's memory")
        near = difflib.get_close_matches(pattern.replace("\\", ""), set(self.footprint.names), n=3, cutoff=0.3)
        raise OptionError(f"{where}: matches no tensor; near names: {', '.join(near) or 'none'}")

    def explicit_buffer(self, tensor: WeightTensor) -> str | None:
        """The buffer that ``--override-tensor``, ``--cpu-moe`` or ``--n-cpu-moe`` gives this tensor, else None.

        The first matching pattern wins.
        """
        return next((buffer for pattern, buffer in self.patterns if pattern.search(tensor.name)), None)

    def host_buffer(self, tensor: WeightTensor) -> str:
        """The buffer in main memory that libllama chooses for a tensor."""
        if self._pinned and (tensor.layer != -1 or tensor.type.name in _ROWS_ON_GPU):
            return self._pinned
        n_rows = self.host.repacked.get(tensor.type, 0)
        if tensor.is_product and n_rows and tensor.shape[-2] % n_rows == 0 and self._can_repack:
            return repack_buffer(self.host.name)
        return self.host.name


def chosen_devices(offload: OffloadOptions, devices: Sequence[Place]) -> tuple[Place, ...]:
    """The devices that ``--device``, ``--split-mode none`` and ``--main-gpu`` leave. Raises OptionError."""
    chosen = tuple(devices)
    if offload.device is not None:
        there = {device.name: device for device in devices}
        names = [] if offload.device == "none" else offload.device.split(",")
        for name in names:
            if name not in there:
                raise OptionError(f"--device {name}: there is no such device; there is {', '.join(there) or 'none'}")
        chosen = tuple(there[name] for name in names)
    if offload.split_mode == "none" and chosen:
        if offload.main_gpu >= len(chosen):
            raise OptionError(f"--main-gpu {offload.main_gpu}: there are {len(chosen)} devices, counted from 0")
        chosen = (chosen[offload.main_gpu],)
    if offload.split_mode == "tensor" and not chosen:
        raise OptionError("--split-mode tensor needs a GPU, and there is none")
    shares = offload.split_shares
    if shares is not None and chosen and (len(shares) > len(chosen) or not any(shares)):
        raise OptionError(f"--tensor-split {offload.tensor_split}: {len(shares)} shares for {len(chosen)} devices")
    return chosen


def device_of_layer(position: int, n_gpu_layers: int, split: Sequence[float]) -> int:
    """The device of the ``position``-th offloaded layer; computed in float32 as libllama does, so that edges agree."""
    sums = list(accumulate(map(_float32, split), lambda a, b: _float32(a + b)))
    place = _float32(position / n_gpu_layers)
    ends = (_float32(total / sums[-1]) for total in sums)
    return next((device for device, end in enumerate(ends) if end > place), len(sums) - 1)


def _float32(number: float) -> float:
    return float(struct.unpack("f", struct.pack("f", number))[0])
