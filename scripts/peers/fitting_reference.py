"""A router fitted in torch, on transformers' own layers: the method of docs/routing.md written a second time.

usage: fitting_reference.py JOB.json

The job is ``{"base": DIR, "experts": [DIR...], "texts": [{"tokens": [...], "scored": [...], "expert": N,
"file": NAME, "held_out": bool}...], "steps": [[NUMBER of a text...]...], "n_used": N, "dtype": "bfloat16", "out":
FILE.npy}``; the file gets rows (2, n_layer, n_expert, n_embd) in float32, as fitted and after the steps. Weights are
rounded to ``dtype`` and computed in float32, each text by itself.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
import transformers

PENALTIES = (1e-3, 1e-4, 1e-5, 1e-6)
N_FOLDS, ANSWER_WEIGHT, LEAST_EMPHASIS, TEMPERATURE = 3, 3.0, 0.1, 2.0
Tensor = torch.Tensor


@dataclass(frozen=True)
class Problem:
    """States (n, n_embd) in float64, their experts, and how much each counts."""

    states: Tensor
    labels: Tensor
    counts: Tensor
    n_expert: int
    emphasis: Tensor
    """How much more each state counts."""

    def part(self, chosen: Tensor) -> Problem:
        parts = (self.states[chosen], self.labels[chosen], self.counts[chosen])
        return Problem(*parts, self.n_expert, self.emphasis[chosen])

    def shares(self) -> Tensor:
        """How much each state counts: the same for each expert but for the emphasis, and one in all."""
        sums = torch.zeros(self.n_expert, dtype=torch.float64).scatter_add(0, self.labels, self.counts)
        out = self.counts / sums[self.labels] * self.emphasis
        return out / out.sum()

    def losses(self, rows: Tensor) -> Tensor:
        """Cross-entropy of each state."""
        return F.cross_entropy(self.states @ rows.T, self.labels, reduction="none")

    def loss(self, rows: Tensor, penalty: float) -> Tensor:
        """Cross-entropy and the penalty."""
        return (self.losses(rows) * self.shares()).sum() + penalty * (rows**2).sum()

    def solve(self, rows: Tensor, penalty: float) -> Tensor:
        """The rows with the least loss, from ``rows`` on: Newton's method, with the whole matrix of curvatures."""
        for _ in range(50):
            free = rows.detach().requires_grad_()
            value = self.loss(free, penalty)
            (gradient,) = torch.autograd.grad(value, free)
            step = torch.linalg.solve(self._curvatures(rows, penalty), gradient.reshape(-1)).reshape(rows.shape)
            gain, size = float((gradient * step).sum()), 1.0
            least = float(value.detach())
            while float(self.loss(rows - size * step, penalty)) > least - 0.1 * size * gain and size > 1e-6:
                size /= 2
            rows = rows - size * step
            if gain < 1e-13 * least:
                break
        return rows

    def _curvatures(self, rows: Tensor, penalty: float) -> Tensor:
        """Second derivatives by each pair of numbers in ``rows``."""
        shares = self.shares()
        p = (self.states @ rows.T).softmax(dim=1)
        out = 2 * penalty * torch.eye(rows.numel(), dtype=torch.float64)
        blocks = out.view(self.n_expert, rows.shape[1], self.n_expert, rows.shape[1])
        for a in range(self.n_expert):
            for b in range(self.n_expert):
                factor = shares * p[:, a] * (float(a == b) - p[:, b])
                blocks[a, :, b, :] += (self.states * factor[:, None]).T @ self.states
        return out


def fit(states: Tensor, labels: Tensor, counts: Tensor, texts: Tensor, files: Tensor, n_expert: int) -> Tensor:
    """The rows of one layer.

    The penalty is that with the least loss on held-out folds of the texts; each file counts by the square root of its
    loss there, beside the mean of all files.
    """
    states = states.double()
    length = (states**2).sum(dim=1).mean().sqrt()
    problem = Problem(states / length, labels, counts, n_expert, torch.ones_like(counts))
    zero = torch.zeros((n_expert, states.shape[1]), dtype=torch.float64)
    losses = torch.zeros(len(PENALTIES))
    held_out = torch.zeros((len(PENALTIES), len(labels)), dtype=torch.float64)
    for fold in range(N_FOLDS):
        out, rows = texts % N_FOLDS == fold, zero
        for i, penalty in enumerate(PENALTIES):
            rows = problem.part(~out).solve(rows, penalty)
            losses[i] += float(problem.part(out).loss(rows, 0.0))
            held_out[i, out] = problem.part(out).losses(rows)
    best = int(losses.argmin())
    means = torch.stack(
        [(counts * held_out[best])[files == one].sum() / counts[files == one].sum() for one in files.unique()]
    )
    emphasis = (means / means.mean()).sqrt().clamp(min=LEAST_EMPHASIS)[torch.searchsorted(files.unique(), files)]
    problem = Problem(problem.states, labels, counts, n_expert, emphasis)
    return (problem.solve(zero, PENALTIES[best]) / length).float()


class Mixture:
    """Base and experts as transformers loads them, in float32."""

    def __init__(self, job: dict[str, Any]) -> None:
        dtype = getattr(torch, job["dtype"])
        base, *experts = (
            transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
            .float()
            .requires_grad_(False)
            for path in (job["base"], *job["experts"])
        )
        self.base, self.head, self.experts = base.model, base.lm_head, [expert.model for expert in experts]
        self.dtype, self.n_used = dtype, job["n_used"]

    def attended(self, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream of one text after attention, and the same normalized."""
        block = self.base.layers[layer]
        position = self.base.rotary_emb(hidden[None], torch.arange(len(hidden))[None])
        out = block.self_attn(block.input_layernorm(hidden[None]), position_embeddings=position, attention_mask=None)[0]
        hidden = hidden + out[0]
        return hidden, block.post_attention_layernorm(hidden)

    def output(self, layer: int, normed: Tensor, rows: Tensor) -> Tensor:
        """What the experts add, weighted by the softmax of the best logits."""
        values, chosen = (normed @ rows.T).topk(self.n_used, dim=-1)
        weights = torch.zeros((len(normed), len(self.experts))).scatter(1, chosen, values.softmax(dim=-1))
        return sum(  # type: ignore[return-value]
            weights[:, i, None] * expert.layers[layer].mlp(normed) for i, expert in enumerate(self.experts)
        )


def fitted_rows(job: dict[str, Any], mixture: Mixture) -> Tensor:
    """Rows of all layers, each on the states of the mixture with the rows before it."""
    texts = job["texts"]
    hidden = [mixture.base.embed_tokens(torch.tensor(text["tokens"])) for text in texts]
    used = [i for i, text in enumerate(texts) if not text["held_out"]]
    sizes = torch.tensor([len(texts[i]["tokens"]) - 1 for i in used])
    labels = torch.tensor([texts[i]["expert"] for i in used]).repeat_interleave(sizes)
    numbers = torch.tensor(used).repeat_interleave(sizes)
    names = sorted({text["file"] for text in texts})
    files = torch.tensor([names.index(texts[i]["file"]) for i in used]).repeat_interleave(sizes)
    counts = torch.cat([_counts(texts[i]) for i in used])
    found = []
    for layer in range(len(mixture.base.layers)):
        with torch.no_grad():
            pairs = [mixture.attended(layer, one) for one in hidden]
        states = torch.cat([pairs[i][1][1:] for i in used])
        found.append(fit(states, labels, counts, numbers, files, len(mixture.experts)).to(mixture.dtype).float())
        with torch.no_grad():
            hidden = [one + mixture.output(layer, normed, found[-1]) for one, normed in pairs]
    return torch.stack(found)


def run(mixture: Mixture, text: dict[str, Any], rows: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """The logits before each token of a text that counts, and the states of each layer.

    Without ``rows`` they are those of the text's own expert alone.
    """
    hidden, states = mixture.base.embed_tokens(torch.tensor(text["tokens"])), []
    for layer in range(len(mixture.base.layers)):
        hidden, normed = mixture.attended(layer, hidden)
        states.append(normed.detach())
        own = mixture.experts[text["expert"]].layers[layer].mlp
        hidden = hidden + (own(normed) if rows is None else mixture.output(layer, normed, rows[layer]))
    return mixture.head(mixture.base.norm(hidden[torch.tensor(text["scored"]) - 1])), states


def distances(mixture: Mixture, text: dict[str, Any], rows: Tensor) -> tuple[Tensor, list[Tensor]]:
    """How far the mixture is from the text's own expert before each token that counts, and the states of each layer."""
    with torch.no_grad():
        wanted = run(mixture, text, None)[0] / TEMPERATURE
    logits, states = run(mixture, text, rows)
    apart = F.kl_div((logits / TEMPERATURE).log_softmax(-1), wanted.log_softmax(-1), reduction="none", log_target=True)
    return apart.sum(dim=-1) * TEMPERATURE**2, states


def mean_of_files(found: list[tuple[str, Tensor]]) -> Tensor:
    """The mean over files of the mean of their texts' values."""
    parts = [[values for file, values in found if file == one] for one in sorted({file for file, _ in found})]
    return torch.stack([torch.cat(values).mean() for values in parts]).mean()


def stepped_rows(job: dict[str, Any], mixture: Mixture, rows: Tensor) -> Tensor:
    """Rows after steps of Adam down the mean of the files' distances, each on the texts that the job names."""
    layers = [one.clone().requires_grad_() for one in rows]
    adam = torch.optim.Adam([{"params": [one]} for one in layers], betas=(0.9, 0.98))
    for number, names in enumerate(job["steps"]):
        texts = [job["texts"][name] for name in names]
        found = [distances(mixture, text, torch.stack(layers)) for text in texts]
        adam.zero_grad()
        mean_of_files([(text["file"], one) for text, (one, _) in zip(texts, found, strict=True)]).backward()
        rate = 2 * min(1, (number + 1) / 5) * (1 - 0.9 * number / len(job["steps"])) / rows.shape[-1]
        for layer, group in enumerate(adam.param_groups):
            group["lr"] = rate / float((torch.cat([states[layer] for _, states in found]) ** 2).mean().sqrt())
        adam.step()
    return torch.stack([one.detach() for one in layers])


def _counts(text: dict[str, Any]) -> Tensor:
    """How much each token but the first counts: more before one of an answer."""
    out = torch.ones(len(text["tokens"]), dtype=torch.float64)
    out[torch.tensor(text["scored"]) - 1] = ANSWER_WEIGHT
    return out[1:]


def main() -> None:
    torch.set_num_threads(1)  # threads that wait for each other take minutes on a busy machine
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    mixture = Mixture(job)
    rows = fitted_rows(job, mixture)
    np.save(job["out"], torch.stack([rows, stepped_rows(job, mixture, rows)]).numpy())


if __name__ == "__main__":
    main()
