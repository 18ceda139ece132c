"""What transformers and mergekit say of a recipe: token ids, router rows, and the merged checkpoint.

usage: router_reference.py JOBS.json

Each job is ``{"recipe": FILE, "out": FILE.npz}`` with directories for models, and optionally ``"merge": DIR``. The npz
gets ``transformers`` (n_layer, n_expert, n_embd) computed in float32, each prompt by itself (nothing is padded),
``mergekit``, computed by mergekit's own function, which runs the base in bfloat16, and ``ids``, the token ids of all
prompts as JSON. Rows are those of the experts, and last that of a shared expert with prompts. ``merge`` gets what
mergekit-moe writes. mergekit is LGPL; it is run here and nothing of it is copied. An error goes into ``OUT.error``.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from mergekit.moe.config import Expert, MoEMergeConfig
from mergekit.moe.router import get_gate_params
from mergekit.options import MergeOptions
from mergekit.scripts.moe import build

Rows = torch.Tensor


class Reference:
    """Hidden states of one base model in float32."""

    def __init__(self, directory: str, mode: str) -> None:
        self._mode = mode
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    def rows(self, experts: list[dict[str, Any]]) -> Rows:
        """(n_layer, n_expert, n_embd), each row of length one."""
        return torch.stack([self._row(expert) for expert in experts], dim=1)

    def ids(self, prompt: str) -> list[int]:
        """BOS and the prompt, no special tokens added."""
        text = (self._tokenizer.bos_token or "") + prompt
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _row(self, expert: dict[str, Any]) -> Rows:
        row = self._side(expert["positive_prompts"])
        if negative := expert.get("negative_prompts"):
            row = row - self._side(negative)
        return torch.nn.functional.normalize(row, dim=-1)

    def _side(self, prompts: list[str]) -> Rows:
        vectors = torch.stack([self._vector(prompt) for prompt in prompts], dim=1)
        if self._mode == "cheap_embed":
            return torch.nn.functional.normalize(vectors.sum(dim=1), dim=-1)
        return vectors.mean(dim=1)

    def _vector(self, prompt: str) -> Rows:
        """One vector per layer."""
        ids = torch.tensor([self.ids(prompt)])
        with torch.inference_mode():
            states = torch.stack(self._model(ids, output_hidden_states=True).hidden_states[:-1])[:, 0]
        if self._mode == "cheap_embed":
            return states[0].sum(dim=0).expand(len(states), -1)
        return states.mean(dim=1) if self._mode == "hidden_avg" else states[:, -1]


def mergekit_rows(recipe: dict[str, Any]) -> Rows:
    """(n_layer, n_expert, n_embd) float32, by mergekit's own function with the tokenizer set up as its script does."""
    config = MoEMergeConfig.model_validate(recipe)
    tokenizer = transformers.AutoTokenizer.from_pretrained(recipe["base_model"])
    tokenizer.padding_side = "left"
    tokenizer.pad_token_id = tokenizer.bos_token_id
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return get_gate_params(config.base_model, tokenizer, gated(config), mode=config.gate_mode, device="cpu").float()


def gated(config: MoEMergeConfig) -> list[Expert]:
    """The experts that get a router row: the routed ones, and a shared one that has prompts."""
    return [*config.experts, *(one for one in config.shared_experts or () if one.positive_prompts)]


def run(job: dict[str, Any]) -> None:
    """Answer one job."""
    recipe = yaml.safe_load(Path(job["recipe"]).read_text(encoding="utf-8"))
    ours = {"seed", "name", "chat_template", "tokenizer_source"}
    recipe = {key: value for key, value in recipe.items() if key not in ours}
    reference = Reference(recipe["base_model"], recipe.get("gate_mode", "hidden"))
    experts = [*recipe["experts"], *(e for e in recipe.get("shared_experts", ()) if e.get("positive_prompts"))]
    prompts = [p for e in experts for side in ("positive", "negative") for p in e.get(f"{side}_prompts", [])]
    ids = json.dumps([reference.ids(prompt) for prompt in prompts])
    rows = reference.rows(experts)
    np.savez(job["out"], transformers=rows.numpy(), mergekit=mergekit_rows(recipe).numpy(), ids=np.array(ids))
    if "merge" in job:
        config = MoEMergeConfig.model_validate(recipe)
        build(config, job["merge"], MergeOptions(device="cpu"), device="cpu", allow_all_same=True)


def main() -> int:
    """Answer all jobs; one that fails does not stop the others."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        try:
            run(job)
        except (Exception, SystemExit):
            Path(f"{job['out']}.error").write_text(traceback.format_exc(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
