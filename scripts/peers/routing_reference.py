"""What transformers says of routing: router logits, choices, weights and the load-balancing loss, in float32.

usage: routing_reference.py JOBS.json

``{"model": DIR, "ids": FILE.npy, "out": FILE.npz}`` runs a checkpoint on token ids; the arrays are tokens x layers x
experts. An error goes into ``OUT.error``.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

import numpy as np
import torch
import transformers


def route(job: dict[str, str]) -> None:
    """Write logits, chosen, weights and loss of one job."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = torch.from_numpy(np.load(job["ids"]).astype(np.int64))[None]
    with torch.inference_mode():
        output = model(ids, output_router_logits=True)
        logits = torch.stack(output.router_logits, dim=1)
        values, chosen = torch.topk(logits.softmax(-1), model.config.num_experts_per_tok, dim=-1)
    weights = values / values.sum(-1, keepdim=True)
    np.savez(
        job["out"],
        logits=logits.numpy(),
        chosen=chosen.numpy(),
        weights=weights.numpy(),
        loss=float(output.aux_loss),
    )


def main() -> int:
    """Do all jobs; one that fails does not stop the others."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        try:
            route(job)
        except Exception:
            Path(f"{job['out']}.error").write_text(traceback.format_exc(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
