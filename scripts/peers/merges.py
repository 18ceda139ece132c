"""Compare what ggufmoe makes of merge recipes with transformers in float32 and with mergekit-moe; prints a table.

Token ids of the prompts, router rows of each gate mode, every merged tensor bit for bit, and logits: of the merged
checkpoint in both layouts, of the one that mergekit wrote, and of a mixture whose experts are all the base, which must
answer like the base. Exit code 1 when anything differs.

With ``--write-fixtures`` it compares nothing and writes what the ordinary tests compare with,
``tests/merge/fixtures``.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import yaml
from compare import Row, compare_logits, show
from engine_logits import logits_of
from files import tensor_differences
from numpy.typing import NDArray
from reference_process import ReferenceProcess

import ggufmoe
from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.families import family_of
from ggufmoe.merge.merged import open_recipe
from ggufmoe.merge.prompts import prompt_tokenizer
from ggufmoe.merge.recipe import Recipe, load_recipe
from ggufmoe.merge.router import make_router
from tests.merge.bases import MERGE_CASES, PROMPTS, MergeCase, make_models, make_recipe, qwen
from tests.merge.test_recipe import SEED

ROOT = Path(__file__).resolve().parent.parent.parent
FIXTURES = ROOT / "tests" / "merge" / "fixtures"
MODES = ("hidden", "hidden_last", "hidden_avg", "cheap_embed")
LEAST_COSINES: dict[str, dict[str, float | None]] = {
    "transformers": dict.fromkeys(MODES, 0.9999),
    "mergekit": {"hidden": 0.995, "hidden_last": 0.995, "hidden_avg": None, "cheap_embed": 0.9999},
}
"""mergekit runs the base in bfloat16; its hidden_avg counts padding in, and is shown without being judged."""
N_TOKENS = 48
_PROMPTED = dict(zip(("positive_prompts", "negative_prompts"), PROMPTS[1], strict=True))
_ALL_OF_TWO = {"experts_per_token": 2}
MORE_CASES = (
    MergeCase("deepseek", {"tokenizer": "spm"}, ({}, {}, {}), {"architecture": "deepseek"}),
    MergeCase(
        "deepseek-shared",
        {"tokenizer": "bpe", "arch": "mistral", "tie": True},
        ({}, {"residual_scale": 0.7}, {}),
        shared={"residual_scale": 0.3},
    ),
    MergeCase("deepseek-shared-all", {"tokenizer": "spm"}, recipe={"architecture": "deepseek"}, shared={}),
    MergeCase("llama-gated", {"tokenizer": "bpe"}, recipe={**_ALL_OF_TWO, "architecture": "qwen"}, shared=_PROMPTED),
    MergeCase("qwen2-gated", {}, recipe=_ALL_OF_TWO, shared=_PROMPTED, config=qwen(2, tie_word_embeddings=True)),
    MergeCase("qwen2-shared", {}, ({}, {}, {}), shared={"residual_scale": 0.3}, config=qwen(2)),
)
"""Beside those of the tests: mergekit's DeepSeek mixtures without a shared expert and with one, its Qwen mixtures, and
what it does not make, a Qwen2 with a shared expert as it is."""
_GRANITE = {"architectures": ["GraniteForCausalLM"], "model_type": "granite"}
_SCALES = {"embedding_multiplier": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.22, "logits_scaling": 6.0}
ROUTER_CASES = (MergeCase("granite", {}, config={**qwen(2), **_SCALES, **_GRANITE}),)
"""Bases of which no mixture is made, for the scales in the forward pass: router rows alone."""

Numbers = NDArray[Any]


@dataclass(frozen=True)
class Peer:
    """How to run the other side: the Python of the environment with torch, and a directory for its jobs."""

    python: Path
    work: Path

    @cached_property
    def _reference(self) -> ReferenceProcess:
        return ReferenceProcess(self.python)

    def ask(self, script: str, jobs: list[dict[str, Any]]) -> None:
        """Run one of the scripts beside this one on a list of jobs; what it prints is shown only if it fails."""
        listed = self.work / f"{Path(script).stem}.json"
        listed.write_text(json.dumps(jobs), encoding="utf-8")
        if script == "reference.py":
            self._reference.do(listed)
            return
        command = [str(self.python), str(Path(__file__).parent / script), str(listed)]
        subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@dataclass(frozen=True)
class Subject:
    """A recipe of each gate mode over one set of models, and what the other side said of them."""

    name: str
    folder: Path
    recipes: dict[str, Path]
    is_made: bool = True
    """Whether the recipe becomes a mixture; else its router is compared alone."""

    @property
    def base(self) -> Path:
        recipe, _ = load_recipe(self.recipes["hidden"], allow_identical_experts=True)
        return Path(recipe.base_model)

    @property
    def merged(self) -> tuple[Literal["classic", "fused"], ...]:
        """The layouts in which `merge` writes the recipe: none where it becomes a GGUF file alone, or nothing."""
        if not self.is_made:
            return ()
        with contextlib.closing(open_recipe(self.recipes["hidden"], allow_identical_experts=True)) as model:
            target = family_of(model.config).merge
        assert target is not None, "a recipe becomes a family of mixtures"
        return () if target.only_gguf else ("classic", "fused")

    @property
    def by_mergekit(self) -> Path:
        return self.folder / "by-mergekit"

    def answer(self, mode: str) -> Path:
        return self.folder / f"{mode}.npz"


def own_subjects(work: Path) -> list[Subject]:
    """Small random bases: of each kind of tokenizer and family, and with shared experts."""
    subjects = []
    for case in (*MERGE_CASES, *MORE_CASES, *ROUTER_CASES):
        folder = work / case.name
        folder.mkdir(parents=True, exist_ok=True)
        make_models(folder, case)
        recipes = {mode: make_recipe(folder, case, mode) for mode in MODES}
        subjects.append(Subject(case.name, folder, recipes, case not in ROUTER_CASES))
    return subjects


def found_subjects(directory: Path, work: Path) -> list[Subject]:
    """The seed's recipe over every dense checkpoint in ``directory``, which stands for the base and both experts."""
    subjects = []
    for config in sorted(directory.glob("*/config.json")):
        with open_checkpoint(config.parent) as model:
            if model.config.n_expert:
                continue
        folder = work / f"seed-{config.parent.name}"
        folder.mkdir(parents=True, exist_ok=True)
        recipes = {}
        for mode in MODES:
            content = yaml.safe_load(SEED) | {"base_model": str(config.parent.resolve()), "gate_mode": mode}
            for expert in content["experts"]:
                expert["source_model"] = content["base_model"]
            recipes[mode] = folder / f"{mode}.yaml"
            recipes[mode].write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
        subjects.append(Subject(config.parent.name, folder, recipes))
    return subjects


def ask(peer: Peer, subjects: list[Subject]) -> None:
    """Have transformers and mergekit answer every recipe; mergekit merges the ones of mode ``hidden``."""
    jobs: list[dict[str, Any]] = []
    for subject in subjects:
        for mode, recipe in subject.recipes.items():
            merge = {"merge": str(subject.by_mergekit)} if mode == "hidden" and subject.merged else {}
            jobs.append({"recipe": str(recipe), "out": str(subject.answer(mode)), **merge})
    peer.ask("router_reference.py", jobs)


def router_rows(subject: Subject) -> Iterator[Row]:
    """Token ids once, then the rows of each gate mode beside both."""
    for mode, path in subject.recipes.items():
        case = f"{subject.name}, {mode}"
        if not subject.answer(mode).exists():
            yield Row(case, "router", "transformers", "", (f"failed: {_last_line(subject.answer(mode))}",))
            continue
        answer = np.load(subject.answer(mode))
        recipe, _ = load_recipe(path, allow_identical_experts=True)
        if mode == "hidden":
            yield _token_row(subject, recipe, json.loads(str(answer["ids"])))
        with open_checkpoint(subject.base) as model:
            router = make_router(recipe, model)
        ours = np.concatenate([router.rows, router.shared_rows], axis=1)
        for against, least in LEAST_COSINES.items():
            yield _cosine_row(case, against, ours, answer[against], least[mode])


def _token_row(subject: Subject, recipe: Recipe, theirs: list[list[int]]) -> Row:
    tokenize = prompt_tokenizer(subject.base)
    prompts = [prompt for expert in recipe.gated for side in expert.prompts for prompt in side]
    faults = [f"differs: {p[:60]!r}" for p, ids in zip(prompts, theirs, strict=True) if tokenize(p) != ids]
    return Row(subject.name, "prompt ids", "transformers", f"{len(prompts)} prompts", tuple(faults))


def _cosine_row(case: str, against: str, ours: Numbers, theirs: Numbers, least: float | None) -> Row:
    against += {"transformers": ", float32", "mergekit": ", bfloat16"}[against]
    if ours.shape != theirs.shape:
        return Row(case, "router", against, "", (f"shape {ours.shape}, theirs {theirs.shape}",))
    cosine = float(cosines(ours, theirs).min())
    detail = f"least cosine {cosine:.7f}"
    if least is None:
        return Row(case, "router", against, f"{detail} (it counts padding in; not judged)")
    return Row(case, "router", against, detail, () if cosine > least else (f"not above {least}",))


def cosines(ours: Numbers, theirs: Numbers) -> Numbers:
    """Cosine of each layer and expert, (n_layer, n_expert) float64."""
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    out: Numbers = (a * b).sum(axis=-1) / lengths
    return out


def tensor_row(subject: Subject) -> Row:
    """The merged checkpoint in mergekit's layout beside mergekit's own, all but the router bit for bit.

    Of a DeepSeek mixture, which we write as another class, the tensors of both GGUF files.
    """
    if not subject.by_mergekit.exists():
        failed = f"failed: {_last_line(subject.answer('hidden'))}"
        return Row(subject.name, "tensors", "mergekit", "", (failed,))
    theirs = json.loads((subject.by_mergekit / "config.json").read_text(encoding="utf-8"))
    if theirs["model_type"] == "deepseek":
        ggufmoe.convert(subject.by_mergekit, subject.folder / "by-mergekit.gguf", "F32", force=True)
        n_tensors, faults = tensor_differences(subject.folder / "merged.gguf", subject.folder / "by-mergekit.gguf")
        judged = [fault for fault in faults if ".ffn_gate_inp." not in fault]
        return Row(subject.name, "tensors", "mergekit, as GGUF", f"{n_tensors} tensors", tuple(judged))
    b = _weights(subject.by_mergekit)
    ours = (_weights(subject.folder / layout) for layout in subject.merged)
    a = min(ours, key=lambda one: len(one.keys() ^ b.keys()))
    known = _alike_by_other_means(a, b, tied=bool(theirs.get("tie_word_embeddings")))
    faults = [f"{name}: only in {'ours' if name in a else 'theirs'}" for name in sorted((a.keys() ^ b.keys()) - known)]
    names = [name for name in sorted(a.keys() & b.keys()) if not name.endswith(("gate.weight", "expert_gate.weight"))]
    faults += [f"{name}: {_difference(a[name], b[name])}" for name in names if _difference(a[name], b[name])]
    detail = f"{len(names)} tensors" + (f"; {len(known)} expressed in another way" if known else "")
    return Row(subject.name, "tensors", "mergekit, to the bit", detail, tuple(faults))


_Weights = dict[str, tuple[str, tuple[int, ...], str]]


def _alike_by_other_means(ours: _Weights, theirs: _Weights, *, tied: bool) -> set[str]:
    """Tensors that only one side has without a difference: biases of zeros, and an output that is the embedding."""
    known = set()
    for name in theirs.keys() - ours.keys():
        dtype, shape, found = theirs[name]
        zeros = bytes(int(np.prod(shape)) * {"F32": 4}.get(dtype, 2))
        if name.endswith(".bias") and found == hashlib.sha256(zeros).hexdigest():
            known.add(name)
    output = "lm_head.weight"
    if tied and output in ours.keys() - theirs.keys() and ours[output] == ours["model.embed_tokens.weight"]:
        known.add(output)
    return known


def _weights(directory: Path) -> _Weights:
    """Name to dtype, shape and hash, by safetensors' own reader: numpy has no bfloat16 to load them as."""
    return {
        name: (tensor["dtype"], tuple(tensor["shape"]), hashlib.sha256(tensor["data"]).hexdigest())
        for shard in sorted(directory.glob("*.safetensors"))
        for name, tensor in safetensors.deserialize(shard.read_bytes())  # type: ignore[no-untyped-call]
    }


def _difference(ours: tuple[str, tuple[int, ...], str], theirs: tuple[str, tuple[int, ...], str]) -> str:
    if ours[:2] != theirs[:2]:
        return f"{ours[0]} {ours[1]}, theirs {theirs[0]} {theirs[1]}"
    return "the bytes differ" if ours != theirs else ""


def merge_all(subject: Subject) -> None:
    """Our merged checkpoints in both layouts, and the recipe straight to GGUF in F32."""
    recipe = subject.recipes["hidden"]
    for layout in subject.merged:
        ggufmoe.merge(recipe, subject.folder / layout, layout=layout, allow_identical_experts=True, force=True)
    ggufmoe.convert(recipe, subject.folder / "merged.gguf", "F32", allow_identical_experts=True, force=True)


def logit_rows(peer: Peer, subject: Subject) -> Iterator[Row]:
    """What transformers makes of merged checkpoints, beside our GGUF files in llama.cpp: of the recipe, and of what
    mergekit wrote. mergekit's DeepSeek mixtures, which transformers has no class for, are computed by its Llama with
    the experts that DeepSeek's own code has.
    """
    ids = _save_ids(subject)
    cases: list[tuple[str, Path, Path]] = [
        (layout, subject.folder / layout, subject.folder / "merged.gguf") for layout in subject.merged
    ]
    if subject.by_mergekit.exists():
        theirs = subject.folder / "by-mergekit.gguf"
        ggufmoe.convert(subject.by_mergekit, theirs, "F32", force=True)
        cases.append(("by mergekit", subject.by_mergekit, theirs))
    outs = [subject.folder / f"{directory.name}-logits.npy" for _, directory, _ in cases]
    jobs = [
        {"do": "logits", "model": str(directory), "ids": str(ids), "out": str(out)}
        for (_, directory, _), out in zip(cases, outs, strict=True)
    ]
    if jobs:
        peer.ask("reference.py", jobs)
    for (what, _, gguf), out in zip(cases, outs, strict=True):
        detail, faults = "", [f"transformers failed: {_last_line(out)}"]
        if out.exists():
            detail, faults = compare_logits(logits_of(gguf, np.load(ids)), np.load(out))
        yield Row(f"{subject.name}, {what}", "logits", "transformers, float32", detail, tuple(faults))


def base_rows(peer: Peer, subject: Subject) -> Iterator[Row]:
    """A mixture whose experts are all the base, beside the base by llama.cpp and by transformers.

    Where there is a shared expert, it and the others are each half of the base; one with a gate is left out.
    """
    dense, mixture = subject.folder / "dense.gguf", subject.folder / "all-base.gguf"
    content = yaml.safe_load(subject.recipes["hidden"].read_text(encoding="utf-8"))
    shared = content.get("shared_experts", [])
    if any(expert.get("positive_prompts") for expert in shared):
        return
    for expert in (*content["experts"], *shared):
        expert.pop("residual_scale", None)
        expert["source_model"] = content["base_model"]
        if shared:
            expert["residual_scale"] = 0.5
    # the base's own dtype, lest rounding be taken for a difference
    content.pop("dtype", None)
    recipe = subject.folder / "all-base.yaml"
    recipe.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    ggufmoe.convert(subject.base, dense, "F32", force=True)
    ggufmoe.convert(recipe, mixture, "F32", allow_identical_experts=True, force=True)
    path, out = _save_ids(subject), subject.folder / "base-logits.npy"
    peer.ask("reference.py", [{"do": "logits", "model": str(subject.base), "ids": str(path), "out": str(out)}])
    ids = np.load(path)
    ours = logits_of(mixture, ids)
    detail, faults = compare_logits(ours, logits_of(dense, ids))
    yield Row(f"{subject.name}, all base", "logits", "the base, llama.cpp", detail, tuple(faults))
    detail, faults = "", [f"transformers failed: {_last_line(out)}"]
    if out.exists():
        detail, faults = compare_logits(ours, np.load(out))
    yield Row(f"{subject.name}, all base", "logits", "the base, transformers", detail, tuple(faults))


def _save_ids(subject: Subject) -> Path:
    path = subject.folder / "ids.npy"
    with open_checkpoint(subject.base) as model:
        n_vocab = model.config.n_vocab
    np.save(path, np.random.default_rng(0).integers(3, n_vocab, N_TOKENS, dtype=np.int32))
    return path


def _last_line(out: Path) -> str:
    path = Path(f"{out}.error")
    return path.read_text(encoding="utf-8").strip().splitlines()[-1] if path.exists() else "without a word"


def compare(peer: Peer, subjects: list[Subject]) -> int:
    """All comparisons; gives the number of rows that differ."""
    ask(peer, subjects)
    rows: list[Row] = []
    for subject in subjects:
        for row in _rows(peer, subject):
            show(row)
            rows.append(row)
    n_wrong = sum(bool(row.faults) for row in rows)
    print(f"{len(rows)} comparisons of merges, {n_wrong} differ")
    return n_wrong


def _rows(peer: Peer, subject: Subject) -> Iterator[Row]:
    yield from router_rows(subject)
    if not subject.is_made:
        return
    merge_all(subject)
    if subject.merged:
        yield tensor_row(subject)
    yield from logit_rows(peer, subject)
    yield from base_rows(peer, subject)


def write_fixtures(subjects: list[Subject]) -> None:
    """One file for each base: prompts' token ids, and both sides' rows of the modes that differ."""
    FIXTURES.mkdir(exist_ok=True)
    for subject in subjects:
        kept: dict[str, Any] = {}
        for mode in MODES:
            answer = np.load(subject.answer(mode))
            kept["ids"] = answer["ids"]
            if mode != "hidden_last":
                kept[f"transformers_{mode}"] = answer["transformers"]
                # half precision holds all that bfloat16 arithmetic gave
                kept[f"mergekit_{mode}"] = answer["mergekit"].astype(np.float16)
        path = FIXTURES / f"{subject.name}.npz"
        np.savez_compressed(path, **kept)
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size} bytes")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/peers/run", description=__doc__.split("\n")[0])
    parser.add_argument("--peers-python", type=Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--llama-cpp", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help="directory with further checkpoints; the dense ones serve as bases")
    parser.add_argument("--text", help=argparse.SUPPRESS)
    parser.add_argument("--only", default="", help="compare the bases whose name contains this word")
    parser.add_argument("--keep", type=Path, help="directory for everything that is made; a temporary one by default")
    parser.add_argument("--write-fixtures", action="store_true", help="write tests/merge/fixtures, compare nothing")
    return parser.parse_args()


def main() -> int:
    """Compare, or write fixtures; 0 when all is the same."""
    arguments = parse_arguments()
    work = Path(tempfile.mkdtemp(prefix="ggufmoe-merges-")) if arguments.keep is None else arguments.keep / "merges"
    work.mkdir(parents=True, exist_ok=True)
    peer = Peer(arguments.peers_python, work)
    data = arguments.data or os.environ.get("GGUFMOE_PEER_DATA")
    try:
        subjects = [subject for subject in own_subjects(work) if arguments.only in subject.name]
        if arguments.write_fixtures:
            kept = {case.name for case in MERGE_CASES}
            subjects = [subject for subject in subjects if subject.name in kept]
            ask(peer, subjects)
            write_fixtures(subjects)
            return 0
        found = found_subjects(Path(data), work) if data else []
        return int(compare(peer, [*subjects, *(one for one in found if arguments.only in one.name)]) > 0)
    except subprocess.CalledProcessError as error:
        print(f"the other side failed: {error}\n{error.stdout}", file=sys.stderr)
        return 1
    finally:
        if arguments.keep is None:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
