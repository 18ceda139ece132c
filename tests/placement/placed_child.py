"""Run in a process of its own: loads a model in several placements and prints what libllama reported, as JSON.

Arguments: the model, then the endpoints of RPC workers, which become the devices RPC0, RPC1, ... llama.cpp ends the
process that loses a worker, which is why no test does this itself.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ggufmoe import ContextOptions, Engine, OffloadOptions, SamplingOptions
from ggufmoe.native import rpc_calls
from ggufmoe.placement.devices import find_devices
from ggufmoe.runtime.events import Token

TEXT = "the model reads a number and writes"
GREEDY = SamplingOptions(temperature=0, n_predict=12)
SMALL = ContextOptions(n_ctx=300, n_threads=1)
ON_RPC: dict[str, Any] = {"device": "RPC0", "load_mode": "none", "fit": "off"}
MIB = 2**20


def outcome(model: Path, context: ContextOptions, offload: OffloadOptions) -> dict[str, Any]:
    with Engine(model, context, offload) as engine:
        prompt = engine.tokenize(TEXT)
        tokens = [event.token_id for event in engine.generate(prompt, GREEDY) if isinstance(event, Token)]
        return {"tokens": tokens, "logits": engine.logits(prompt)[-1].tolist(), **asdict(engine.placement)}


def limited(model: Path) -> OffloadOptions:
    """Leaves room on RPC0 for the dense parts and the experts of two layers."""
    with Engine(model, SMALL, OffloadOptions(**ON_RPC, cpu_moe=True)) as engine:
        share = engine.placement.plan.shares[0]
        experts = sum(tensor.n_bytes for tensor in engine.header.tensors if "_exps" in tensor.name) / 4
    free = find_devices("RPC0").places[0].free_bytes
    target = (free - share.n_bytes - int(2.3 * experts)) // MIB
    return OffloadOptions(**{**ON_RPC, "fit": "on"}, fit_target=target)


def main(model: Path, endpoints: list[str]) -> None:
    for endpoint in endpoints:
        rpc_calls.register_rpc_server(endpoint)
    cases = {
        "cpu": OffloadOptions(device="none", load_mode="none"),
        "default": OffloadOptions(load_mode="none"),
        "rpc": OffloadOptions(**ON_RPC),
        "cpu_moe": OffloadOptions(**ON_RPC, cpu_moe=True),
        "n_cpu_moe": OffloadOptions(**ON_RPC, n_cpu_moe=3, kv_offload=False),
        "mapped": OffloadOptions(**{**ON_RPC, "load_mode": "mmap"}, n_cpu_moe=1, n_gpu_layers=4),
        "ot": OffloadOptions(
            **ON_RPC, n_gpu_layers=2, override_tensor=(rf"blk\.[01]\.ffn_.*=RPC0[{endpoints[0]}],attn_q=CPU",)
        ),
        "split": OffloadOptions(**{**ON_RPC, "device": "RPC0,RPC1"}, tensor_split="3,2"),
        "fit": limited(model),
        "one_expert": OffloadOptions(**ON_RPC, n_expert_used=1),
    }
    print(json.dumps({name: outcome(model, SMALL, offload) for name, offload in cases.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
