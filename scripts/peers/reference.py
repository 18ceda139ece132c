"""What transformers says: logits in float32, checkpoints as transformers 5 writes them, fused ones taken apart.

usage: reference.py JOBS.json

``{"do": "logits", "model": DIR, "ids": FILE.npy, "out": FILE.npy}`` runs a checkpoint on token ids; ``{"do": "save",
"out": DIR, "form": FORM, "config": {...}}`` makes a seeded random model and stores it: ``saved`` by ``save_pretrained``
(mostly the classic layout), ``state`` as it lies in memory (the fused one, which mergekit writes), ``mxfp4`` with
experts that are random MXFP4, as OpenAI stores gpt-oss; ``{"do": "classic", "model": DIR, "out": DIR}`` copies a fused
checkpoint in the classic layout, the only one that llama.cpp's converter reads;
``{"do": "answer", "model": DIR, "ids": FILE.json, "out": FILE.json}`` continues each list of ids greedily. An
error goes into ``OUT.error``.
"""

from __future__ import annotations

import json
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file


def logits(job: dict[str, Any]) -> None:
    """Write the logits of every position, shape (n_tokens, n_vocab) float32."""
    is_mxfp4 = '"mxfp4"' in (Path(job["model"]) / "config.json").read_text(encoding="utf-8")
    method = {"quantization_config": transformers.Mxfp4Config(dequantize=True)} if is_mxfp4 else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.float32, attn_implementation="eager", **method
    ).float()
    ids = torch.from_numpy(np.load(job["ids"]).astype(np.int64))[None]
    with torch.inference_mode():
        np.save(job["out"], model.eval()(ids).logits[0].float().numpy())


def answer(job: dict[str, Any]) -> None:
    """Write what follows each prompt, up to EOS, as lists of token ids."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.float32, attn_implementation="eager"
    ).eval()
    answers = []
    for ids in json.loads(Path(job["ids"]).read_text(encoding="utf-8")):
        out = model.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False)
        answers.append([int(token) for token in out[0, len(ids) :] if token != model.config.eos_token_id])
    Path(job["out"]).write_text(json.dumps(answers), encoding="utf-8")


def save(job: dict[str, Any]) -> None:
    """Write a random model of the first architecture of the config; norms and biases are not all 1 and 0."""
    torch.manual_seed(0)
    out = Path(job["out"])
    config = transformers.AutoConfig.for_model(**job["config"])
    model = getattr(transformers, config.architectures[0])(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("bias") or (tensor.ndim == 1 and isinstance(tensor, torch.nn.Parameter)):
                tensor.add_(torch.randn(tensor.shape).to(tensor.dtype) * 0.05)
    if job["form"] == "saved":
        model.save_pretrained(out)
        return
    out.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if job["form"] == "mxfp4":
        model.config.quantization_config = {"quant_method": "mxfp4"}
        for name in [name for name in state if name.endswith((".gate_up_proj", ".down_proj"))]:
            n_expert, n_cols, n_rows = state.pop(name).shape
            state[f"{name}_blocks"] = torch.randint(256, (n_expert, n_rows, n_cols // 32, 16), dtype=torch.uint8)
            state[f"{name}_scales"] = torch.randint(118, 122, (n_expert, n_rows, n_cols // 32), dtype=torch.uint8)
    model.config.save_pretrained(out)
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})


def classic(job: dict[str, Any]) -> None:
    """Write the same weights with one tensor for each expert and projection."""
    source, out = Path(job["model"]), Path(job["out"])
    out.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(shard).items():
            tensors |= _apart(name, tensor)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for file in source.iterdir():
        if file.is_file() and not file.name.startswith("model.safetensors") and file.suffix != ".safetensors":
            shutil.copy(file, out / file.name)


def _apart(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The classic tensors that a tensor of the fused layout holds; others pass as they are."""
    layer, _, leaf = name.partition(".mlp.experts.")
    experts = layer + ".block_sparse_moe.experts"
    if leaf == "gate_up_proj":
        halves = [pair.chunk(2) for pair in tensor]
        return {
            f"{experts}.{e}.{weight}.weight": half.contiguous()
            for e, pair in enumerate(halves)
            for weight, half in zip(("w1", "w3"), pair, strict=True)
        }
    if leaf == "down_proj":
        return {f"{experts}.{e}.w2.weight": matrix.contiguous() for e, matrix in enumerate(tensor)}
    return {name.replace(".mlp.gate.", ".block_sparse_moe.gate."): tensor}


def main() -> int:
    """Do all jobs; one that fails does not stop the others."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        try:
            {"logits": logits, "save": save, "classic": classic, "answer": answer}[job["do"]](job)
        except Exception:
            Path(f"{job['out']}.error").write_text(traceback.format_exc(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
