"""Squared gradients by torch: what each matrix of a model gets and gives, by transformers' own modules.

usage: sensitivity_reference.py JOBS.json

A job is ``{"model": DIR, "sequences": [[id...]...], "targets": FILE.npy, "out": FILE.npz}``, a target for each token.
Every product that goes through ``torch.nn.functional.linear`` is watched, whatever module makes it. The file gets for
the n-th matrix ``weight-n`` (rows, columns), ``inputs-n`` (columns,), ``gradients-n`` (rows,) and ``count-n``, sums
over tokens in float64, and ``embedding`` (n_embd,). An error goes into ``OUT.error``.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from reference import loaded

Tensor = torch.Tensor


class Watched:
    """Sums of squares by matrix, which is told apart by where it lies in memory."""

    def __init__(self, linear: Callable[..., Tensor]) -> None:
        self._linear = linear
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []
        self.sums: dict[int, dict[str, Any]] = {}

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = self._linear(x, weight, bias)
        if out.requires_grad:
            out.retain_grad()
            self._seen.append((weight, x.detach().reshape(-1, x.shape[-1]), out))
        return out

    def add(self) -> None:
        """Add what the last text gave."""
        for weight, x, out in self._seen:
            if out.grad is None:
                continue
            mine = self.sums.setdefault(weight.data_ptr(), {"weight": weight.detach(), "in": 0.0, "out": 0.0, "n": 0})
            mine["in"] += (x.double() ** 2).sum(dim=0)
            mine["out"] += (out.grad.reshape(-1, out.shape[-1]).double() ** 2).sum(dim=0)
            mine["n"] += len(x)
        self._seen.clear()


def gradients(job: dict[str, Any]) -> None:
    """Do one job."""
    watched = Watched(torch.nn.functional.linear)
    torch.nn.functional.linear = watched  # type: ignore[assignment]
    try:
        model = loaded(Path(job["model"]))
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")
        targets = torch.from_numpy(np.load(job["targets"]).astype(np.int64))
        embedded: list[Tensor] = []

        def keep(module: object, arguments: object, out: Tensor) -> None:
            out.retain_grad()
            embedded.append(out)

        model.get_input_embeddings().register_forward_hook(keep)  # type: ignore[operator]
        embedding: Any = 0.0
        for sequence in job["sequences"]:
            mine, targets = targets[: len(sequence)], targets[len(sequence) :]
            logits = model.train(False)(torch.tensor([sequence])).logits[0]
            torch.nn.functional.cross_entropy(logits, mine, reduction="sum").backward()  # type: ignore[no-untyped-call]
            found = embedded.pop().grad
            assert found is not None
            embedding += (found[0].double() ** 2).sum(dim=0)
            watched.add()
    finally:
        torch.nn.functional.linear = watched._linear  # type: ignore[assignment]
    arrays = {"embedding": embedding.numpy()}
    for number, one in enumerate(watched.sums.values()):
        arrays[f"weight-{number}"] = one["weight"].numpy()
        arrays[f"inputs-{number}"], arrays[f"gradients-{number}"] = one["in"].numpy(), one["out"].numpy()
        arrays[f"count-{number}"] = np.array(one["n"])
    np.savez(job["out"], **arrays)


def main() -> None:
    """Do all jobs; one that fails does not stop the others."""
    torch.set_num_threads(1)  # threads that wait for each other take minutes on a busy machine
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        try:
            gradients(job)
        except Exception:
            Path(f"{job['out']}.error").write_text(traceback.format_exc(), encoding="utf-8")


if __name__ == "__main__":
    main()
