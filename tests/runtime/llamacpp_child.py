"""Run in a process of its own: loads a model as ``LlamaCpp`` in several placements and prints what came of it, as JSON.

Arguments: the model, and the endpoint of an RPC worker, which becomes the device RPC0.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ggufmoe import Engine, LlamaCpp, OffloadOptions
from ggufmoe.native import rpc_calls
from tests.placement.placed_child import GREEDY, ON_RPC, SMALL, TEXT

ARGUMENTS: dict[str, Any] = {"n_ctx": 300, "n_threads": 1, "n_threads_batch": 1, "verbose": False}


def text_of_engine(model: Path) -> tuple[list[int], str]:
    with Engine(model, SMALL, OffloadOptions(device="none", load_mode="none")) as engine:
        prompt = engine.tokenize(TEXT)
        return prompt, "".join(event.text for event in engine.generate(prompt, GREEDY))


def outcome(model: Path, prompt: list[int], offload: OffloadOptions | None, **arguments: Any) -> dict[str, Any]:
    llama = LlamaCpp(model, offload=offload, **ARGUMENTS, **arguments)
    done = llama.create_completion(prompt, max_tokens=GREEDY.n_predict, temperature=0)
    placed = asdict(llama.placement) if llama.placement else {"placement": None}
    found = {"text": done["choices"][0]["text"], "kv_overrides": llama.kv_overrides, **placed}
    found["n_devices"] = len(llama._devices) - 1
    llama.close()
    return found


def main(model: Path, endpoint: str) -> None:
    rpc_calls.register_rpc_server(endpoint)
    prompt, text = text_of_engine(model)
    elsewhere = rf"blk\.0\.ffn_up_exps=RPC0[{endpoint}],attn_q=CPU"
    cases = {
        "cpu": OffloadOptions(device="none", load_mode="none"),
        "cpu_moe": OffloadOptions(**ON_RPC, cpu_moe=True),
        "n_cpu_moe": OffloadOptions(**ON_RPC, n_cpu_moe=3, kv_offload=False),
        "ot": OffloadOptions(**ON_RPC, n_gpu_layers=2, override_tensor=(elsewhere,)),
    }
    found = {name: outcome(model, prompt, offload) for name, offload in cases.items()}
    found["one_expert"] = outcome(
        model, prompt, OffloadOptions(**ON_RPC, n_expert_used=1), kv_overrides={"llama.rope.freq_base": 10000.0}
    )
    found["as_llama"] = outcome(model, prompt, None, n_gpu_layers=99)
    print(json.dumps({"engine": {"text": text}, **found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
