"""What transformers says: logits in float32, checkpoints as transformers 5 writes them, fused ones taken apart.

Reads names of files of jobs from stdin, one a line, and prints each name when its jobs are done. The jobs of a file:

``{"do": "logits", "model": DIR, "ids": FILE.npy, "out": FILE.npy}`` runs a checkpoint on token ids; ``{"do": "save",
"out": DIR, "form": FORM, "config": {...}}`` makes a seeded random model and stores it, ``saved`` by ``save_pretrained``
(mostly the classic layout), ``state`` as it lies in memory (the fused one, which mergekit writes), ``mxfp4`` with
experts of random MXFP4, as OpenAI stores gpt-oss. With ``"fp8": DTYPE`` projections become 8-bit floats with scales of
that dtype for their blocks, and OUT-computed holds what torch computes of them, in float32; with ``"further": true`` a
layer of multi-token prediction is added. ``{"do": "classic", "model": DIR, "out": DIR}`` copies a fused checkpoint in
the classic layout, the only one that llama.cpp's converter reads; ``{"do": "answer", "model": DIR, "ids": FILE.json,
"out": FILE.json}`` continues each list of ids greedily. An error goes into ``OUT.error``.
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
    model = loaded(Path(job["model"]))
    ids = torch.from_numpy(np.load(job["ids"]).astype(np.int64))[None]
    with torch.inference_mode():
        np.save(job["out"], model.eval()(ids).logits[0].float().numpy())


def loaded(directory: Path) -> torch.nn.Module:
    """The model of a checkpoint in float32; of a DeepSeek v1, which transformers has not, one of our own."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] == "deepseek":
        return deepseek_v1(directory, config)
    is_mxfp4 = '"mxfp4"' in json.dumps(config)
    method = {"quantization_config": transformers.Mxfp4Config(dequantize=True)} if is_mxfp4 else {}
    model: torch.nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", **method
    )
    return model.float()


class DeepseekExperts(torch.nn.Module):
    """A feed-forward part with experts, as in modeling_deepseek.py of deepseek-ai/deepseek-moe-16b-base."""

    def __init__(self, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.config, self.weights = config, weights

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """The weighted outputs of the chosen experts, and that of the shared ones, of (1, n_tokens, n_embd)."""
        tokens = states.reshape(-1, states.shape[-1])
        scores = torch.nn.functional.linear(tokens, self.weights["gate.weight"]).softmax(dim=-1)
        chosen = torch.topk(scores, self.config["num_experts_per_tok"], dim=-1)
        shares = chosen.values
        if self.config["norm_topk_prob"]:
            shares = shares / (shares.sum(dim=-1, keepdim=True) + 1e-20)
        rows = [
            sum(share * self.swiglu(token, f"experts.{int(expert)}") for share, expert in zip(*pair, strict=True))
            for token, *pair in zip(tokens, shares, chosen.indices, strict=True)
        ]
        out = torch.stack(rows)
        if self.config["n_shared_experts"]:
            out = out + self.swiglu(tokens, "shared_experts")
        return out.reshape(states.shape)

    def swiglu(self, x: torch.Tensor, module: str) -> torch.Tensor:
        """Gate, up and down of one expert."""
        gate, up, down = (self.weights[f"{module}.{word}_proj.weight"] for word in ("gate", "up", "down"))
        linear = torch.nn.functional.linear
        return linear(torch.nn.functional.silu(linear(x, gate)) * linear(x, up), down)


def deepseek_v1(directory: Path, config: dict[str, Any]) -> torch.nn.Module:
    """transformers' Llama with the weights of a DeepSeek v1, and ``DeepseekExperts`` where a layer has experts."""
    weights = {
        name: tensor.float() for shard in directory.glob("*.safetensors") for name, tensor in load_file(shard).items()
    }
    plain = {key: value for key, value in config.items() if key not in ("auto_map", "architectures", "model_type")}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**plain, attn_implementation="eager")).float()
    for number, layer in enumerate(model.model.layers):
        stem = f"model.layers.{number}.mlp."
        if f"{stem}gate.weight" in weights:
            own = {name.removeprefix(stem): weights.pop(name) for name in list(weights) if name.startswith(stem)}
            layer.mlp = DeepseekExperts(config, own)
    lacking = model.load_state_dict(weights, strict=False)
    assert not lacking.unexpected_keys, lacking
    assert set(lacking.missing_keys) <= {"lm_head.weight"}, lacking
    model.tie_weights()
    return model


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
    else:
        _save_state(model, out, job["form"])
    if job.get("further"):
        _add_prediction(out, model.config)
    if job.get("fp8"):
        _quantize(out, getattr(torch, job["fp8"]), by_rows=job["fp8_rows"])


def _save_state(model: Any, out: Path, form: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if form == "mxfp4":
        model.config.quantization_config = {"quant_method": "mxfp4"}
        for name in [name for name in state if name.endswith((".gate_up_proj", ".down_proj"))]:
            n_expert, n_cols, n_rows = state.pop(name).shape
            state[f"{name}_blocks"] = torch.randint(256, (n_expert, n_rows, n_cols // 32, 16), dtype=torch.uint8)
            state[f"{name}_scales"] = torch.randint(118, 122, (n_expert, n_rows, n_cols // 32), dtype=torch.uint8)
    model.config.save_pretrained(out)
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})


def _add_prediction(out: Path, config: Any) -> None:
    """Add a layer of multi-token prediction, which transformers does not save: the last layer, and what joins it."""
    (shard,) = out.glob("*.safetensors")
    tensors = load_file(shard)
    last, further = (f"model.layers.{config.num_hidden_layers - before}." for before in (1, 0))
    tensors |= {name.replace(last, further): tensor.clone() for name, tensor in tensors.items() if last in name}
    width, n_vocab = config.hidden_size, config.vocab_size
    shapes = {"eh_proj": (width, 2 * width), "embed_tokens": (n_vocab, width), "shared_head.head": (n_vocab, width)}
    for name, shape in {**shapes, **dict.fromkeys(("enorm", "hnorm", "shared_head.norm"), (width,))}.items():
        tensors[f"{further}{name}.weight"] = torch.randn(shape).to(torch.bfloat16)
    save_file(tensors, shard, metadata={"format": "pt"})


FP8_BLOCK = 128


def _quantize(out: Path, dtype: torch.dtype, *, by_rows: bool) -> None:
    """Quantize a checkpoint as DeepSeek-V3 is published, or ``by_rows`` as by llm-compressor, and write beside it what
    torch computes of it."""
    stored: dict[str, torch.Tensor] = {}
    computed: dict[str, torch.Tensor] = {}
    for shard in sorted(out.glob("*.safetensors")):
        for name, tensor in load_file(shard).items():
            stored[name] = computed[name] = tensor
            if "_proj" in name and tensor.ndim > 1:
                block = (1, tensor.shape[-1]) if by_rows else (FP8_BLOCK, FP8_BLOCK)
                stored[name], scales = _blockwise(tensor.float(), dtype, block)
                stored[f"{name}_scale" if by_rows else f"{name}_scale_inv"] = scales
                computed[name] = stored[name].float() * _spread(scales.float(), tensor.shape, block)
        shard.unlink()
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    method: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [FP8_BLOCK, FP8_BLOCK]}
    if by_rows:
        weights = {"type": "float", "num_bits": 8, "strategy": "channel"}
        method = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}
        method["format"] = "float-quantized"
    own = {"quantization_config": method}
    for place, tensors, keys in ((out, stored, own), (out.with_name(f"{out.name}-computed"), computed, {})):
        place.mkdir(parents=True, exist_ok=True)
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        (place / "config.json").write_text(json.dumps(config | keys), encoding="utf-8")


def _blockwise(tensor: torch.Tensor, dtype: torch.dtype, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The bytes of a matrix, or of a stack of matrices, and the scale of each block."""
    rows, columns = (-(-size // step) for size, step in zip(tensor.shape[-2:], block, strict=True))
    padded = torch.zeros(*tensor.shape[:-2], rows * block[0], columns * block[1])
    padded[..., : tensor.shape[-2], : tensor.shape[-1]] = tensor
    blocks = padded.reshape(*tensor.shape[:-2], rows, block[0], columns, block[1])
    scales = (blocks.abs().amax((-3, -1)) / 448).to(dtype)
    return (tensor / _spread(scales.float(), tensor.shape, block)).to(torch.float8_e4m3fn), scales


def _spread(scales: torch.Tensor, shape: torch.Size, block: tuple[int, int]) -> torch.Tensor:
    spread = scales.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return spread[..., : shape[-2], : shape[-1]]


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
    """Do all jobs until stdin ends; one that fails does not stop the others."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in (line.rstrip("\n") for line in sys.stdin):
        for job in json.loads(Path(name).read_text(encoding="utf-8")):
            try:
                {"logits": logits, "save": save, "classic": classic, "answer": answer}[job["do"]](job)
            except Exception:
                Path(f"{job['out']}.error").write_text(traceback.format_exc(), encoding="utf-8")
        print(name, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
