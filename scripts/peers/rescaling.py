"""Show why ``norm_topk_prob`` decides what is converted: what llama.cpp makes of models that its graphs do not compute.

A graph of llama.cpp either rescales the weights of the chosen experts to one or does not. For each family: a model with
the other value is refused; forced into a file all the same (its configuration says the graph's value), llama.cpp's
logits are far from those of transformers; and with every expert chosen the value does not matter, and is accepted.
DeepSeek v1 has no such refusal, because another graph computes it: its rows hold our files and those of llama.cpp's
converter against a reference. Exit code 1 when anything is otherwise.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from cases import FAMILIES
from compare import Bench, Row, compare_logits, show
from engine_logits import logits_of
from files import differences

import ggufmoe
from tests import tiny_tokenizers
from tests.families import tiny_family
from tests.tiny import write_tokenizer

REFUSED = {"qwen2moe": True, "olmoe": True, "qwen3moe": False, "qwen3next": False, "lfm2moe": False}
"""Names of ``cases.FAMILIES`` to the value of ``norm_topk_prob`` that llama.cpp's graph does not compute."""
SCORED_BY_SIGMOID = {"lfm2moe"}
"""Families whose experts' scores do not add up to one, so that the value matters where all experts are chosen too."""
FAR = 1e-2
"""A part of the logits' range, above which a difference is no rounding."""
N_TOKENS = 48

Logits = np.ndarray[Any, np.dtype[np.float32]]


def family_rows(bench: Bench, name: str, refused: bool) -> Iterator[Row]:
    """The refusal, what it prevents, and what is accepted, of one family."""
    family = next(one for one in FAMILIES if one.name == name)
    config = {**family.config, "norm_topk_prob": refused}
    chosen, everything = bench.work / f"{name}-refused", bench.work / f"{name}-all"
    every = {**config, "num_experts_per_tok": config["num_experts"]}
    jobs = [
        {"do": "save", "out": str(out), "form": "saved", "config": stated}
        for out, stated in ((chosen, config), (everything, every))
    ]
    bench.ask("reference.py", jobs)
    for out in (chosen, everything):
        write_tokenizer(out, family.tokenizer, None)
    meant, all_meant = _by_transformers(bench, chosen, everything)
    yield Row(name, "refusal", "norm_topk_prob", f"{refused} is refused", tuple(_accepted(chosen, bench.work)))
    _state(chosen, norm_topk_prob=not refused)
    yield _far_row(name, "forced", _by_llama_cpp(bench, chosen), meant)
    if name in SCORED_BY_SIGMOID:
        yield Row(name, "refusal", "all chosen", f"{refused} is refused", tuple(_accepted(everything, bench.work)))
        return
    detail, faults = compare_logits(_by_llama_cpp(bench, everything), all_meant)
    yield Row(name, "all chosen", "transformers, float32", detail, tuple(faults))


def deepseek_rows(bench: Bench) -> Iterator[Row]:
    """DeepSeek v1, as it is published and as mergekit writes it, beside llama.cpp's converter and a reference."""
    own = {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "vocab_size":
        tiny_tokenizers.vocabulary_size("qwen"), "bos_token_id": None,
        "eos_token_id": tiny_tokenizers.special_ids("qwen")[1],
    }  # fmt: skip
    shapes: dict[str, dict[str, Any]] = {
        "deepseek": {"norm_topk_prob": False, "first_k_dense_replace": 1, "n_shared_experts": 2},
        "deepseek-mergekit": {"norm_topk_prob": True, "first_k_dense_replace": 0, "n_shared_experts": 1},
        "deepseek-mergekit-plain": {"norm_topk_prob": True, "first_k_dense_replace": 0, "n_shared_experts": None},
    }
    for name, keys in shapes.items():
        directory = bench.work / name
        config = tiny_family.config_json("DeepseekForCausalLM", "deepseek", **own, **keys)
        tiny_family.make_checkpoint(directory, config)
        (directory / "tokenizer.model").unlink(missing_ok=True)
        write_tokenizer(directory, "qwen", None)
    bench.ask("upstream_convert.py", [_converter_job(bench.work, name) for name in shapes], str(bench.llama_cpp))
    for name, keys in shapes.items():
        directory = bench.work / name
        (meant,) = _by_transformers(bench, directory)
        detail, faults = compare_logits(_by_llama_cpp(bench, directory), meant)
        yield Row(name, "logits", "a reference in torch", detail, tuple(faults))
        yield from _converter_rows(bench, name, meant, rescaled=keys["norm_topk_prob"])


def _converter_rows(bench: Bench, name: str, meant: Logits, *, rescaled: bool) -> Iterator[Row]:
    """llama.cpp's file of the same checkpoint: equal where nothing is rescaled, far off or not there elsewhere."""
    job = _converter_job(bench.work, name)
    theirs, log = Path(job["outfile"]), Path(job["log"])
    if not rescaled:
        faults = differences(bench.work / f"{name}.gguf", theirs) if theirs.exists() else ["the converter failed"]
        yield Row(name, "F32 file", "llama.cpp's converter", "", tuple(faults))
        return
    try:
        made = logits_of(theirs, _ids(meant.shape[1]))
    except (OSError, ggufmoe.GgufmoeError) as error:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
        yield Row(name, "converter", "llama.cpp's own", f"no file that loads: {(last or [str(error)])[0][:90]}")
        return
    yield _far_row(name, "converter", made, meant)


def _converter_job(work: Path, name: str) -> dict[str, str]:
    names = {"outfile": f"{name}.theirs.gguf", "log": f"{name}.log", "model": name}
    return {"outtype": "f32", "pre": "qwen2"} | {key: str(work / file) for key, file in names.items()}


def _far_row(name: str, what: str, made: Logits, meant: Logits) -> Row:
    """The files that are refused or that we do not write, beside the model: as far off as a refusal needs."""
    worst = float(np.abs(made - meant).max() / (meant.max() - meant.min()))
    same = float((made.argmax(-1) == meant.argmax(-1)).mean())
    detail = f"wrong by {worst:.1e} of the range, top-1 {same:.3f}"
    return Row(name, what, "what the model means", detail, () if worst > FAR else ("as good as right: why refuse it?",))


def _accepted(directory: Path, work: Path) -> Iterator[str]:
    """What is wrong with the refusal of a checkpoint; nothing where it is refused by the key."""
    try:
        ggufmoe.convert(directory, work / "accepted.gguf", "F32", force=True)
    except ggufmoe.CheckpointError as error:
        if "norm_topk_prob" not in str(error):
            yield f"refused for another reason: {error}"
    else:
        yield "it is converted"


def _state(directory: Path, **keys: Any) -> None:
    """Put keys into a checkpoint's config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **keys}), encoding="utf-8")


def _ids(n_vocab: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.random.default_rng(0).integers(3, n_vocab, N_TOKENS, dtype=np.int32)


def _by_llama_cpp(bench: Bench, directory: Path) -> Logits:
    path = bench.work / f"{directory.name}.gguf"
    ggufmoe.convert(directory, path, "F32", force=True)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return logits_of(path, _ids(config["vocab_size"]))


def _by_transformers(bench: Bench, *directories: Path) -> list[Logits]:
    """Logits of each checkpoint as transformers computes it; of DeepSeek v1 by the reference of ours."""
    jobs = []
    for directory in directories:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        ids = bench.work / f"{directory.name}-ids.npy"
        np.save(ids, _ids(config["vocab_size"]))
        jobs.append({"do": "logits", "model": str(directory), "ids": str(ids), "out": f"{ids}-logits.npy"})
    bench.ask("reference.py", jobs)
    for job in jobs:
        if (failed := Path(f"{job['out']}.error")).exists():
            raise RuntimeError(failed.read_text(encoding="utf-8"))
    return [np.load(job["out"]) for job in jobs]


def main() -> int:
    """Compare; 0 when all is as the refusals say."""
    parser = argparse.ArgumentParser(prog="scripts/peers/rescaling.py", description=__doc__.split("\n")[0])
    parser.add_argument("--peers-python", type=Path, required=True)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--only", default="", help="the families whose name contains this word")
    parser.add_argument("--keep", type=Path, help="directory for everything that is made; a temporary one by default")
    arguments = parser.parse_args()
    work = arguments.keep / "rescaling" if arguments.keep else Path(tempfile.mkdtemp(prefix="ggufmoe-rescaling-"))
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(work, arguments.peers_python, arguments.llama_cpp, [])
    n_rows = n_wrong = 0
    parts = [family_rows(bench, name, value) for name, value in REFUSED.items() if arguments.only in name]
    parts += [deepseek_rows(bench)] if arguments.only in "deepseek" else []
    try:
        for row in (row for part in parts for row in part):
            show(row)
            n_rows, n_wrong = n_rows + 1, n_wrong + bool(row.faults)
    finally:
        if arguments.keep is None:
            shutil.rmtree(work, ignore_errors=True)
    print(f"{n_rows} comparisons of rescaled weights, {n_wrong} are otherwise than the refusals say")
    return int(n_wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
