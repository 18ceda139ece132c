"""Save random models of any class of transformers, with norms and biases that are not trivial.

usage: random_model_reference.py JOBS.json

A job is ``{"model": CLASS, "config_class": CLASS, "config": {...}, "out": DIR}``. Weights are bfloat16. An error goes
into ``DIR.error``.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers

SPREAD = 0.12
"""Standard deviation of the weights: more than transformers takes, so that answers of random models vary."""


def save(job: dict[str, Any]) -> None:
    """Write one model into its directory."""
    torch.manual_seed(0)
    config = getattr(transformers, job["config_class"])(**job["config"])
    model = getattr(transformers, job["model"])(config).to(torch.bfloat16)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=random).to(parameter.dtype)
            parameter.copy_(parameter + 0.05 * noise if parameter.ndim == 1 else SPREAD * noise)
        for name, buffer in model.named_buffers():
            if "e_score" in name:
                buffer.copy_(0.05 * torch.randn(buffer.shape, generator=random))
    model.save_pretrained(job["out"])


def main() -> int:
    """Do all jobs; one that fails does not stop the others."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        try:
            save(job)
        except Exception:
            Path(f"{job['out']}.error").write_text(traceback.format_exc(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
