"""What a recipe's router is worth: loss and accuracy on held-out questions, beside its models and other routers.

    python scripts/eval_router.py RECIPE.yaml HELD.jsonl... [--quant F32 Q4_K_M] [--questions 75]

RECIPE.yaml has ``gate_mode: fitted``, and prompts for each expert where gate mode hidden is to be compared. Each
HELD.jsonl has conversations of one task, a question and its answer a line, that no router was fitted on. llama.cpp
computes all, with the weights in each ``--quant``: the mean loss of a token of the answers, the share of questions
whose greedy answer is right to the letter, the mean loss of a token of the questions, and the perplexity of all
conversations as one text.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import ggufmoe
from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.checkpoint.source import ModelSource
from ggufmoe.merge.router_texts import RouterText, TextTokens, read_texts

N_PERPLEXITY = 256
"""Tokens of a chunk."""
ONE_THREAD = ggufmoe.ContextOptions(n_threads=1)
"""Models as small as these compute as fast."""


@dataclass(frozen=True)
class Subject:
    """A model that is compared: a dense one, or a recipe."""

    name: str
    path: Path

    def files(self, work: Path, types: Sequence[str]) -> Iterator[tuple[str, Path]]:
        """A GGUF file of it in ``work`` for each type, all with the same router."""
        whole, loose = work / f"{self.name.replace(' ', '-')}-F32.gguf", not self.path.is_dir()
        ggufmoe.convert(self.path, whole, "F32", force=True, allow_identical_experts=loose, allow_outside_files=loose)
        for quant in types:
            file = whole.with_name(whole.name.replace("F32", quant))
            if file != whole:
                ggufmoe.quantize(whole, file, quant, force=True)
            yield quant, file


def subjects(recipe: Path, work: Path) -> Iterator[Subject]:
    """Base and experts, each alone; equal weights; gate mode hidden by the prompts; the recipe itself."""
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    models = {str((recipe.parent / content["base_model"]).resolve()): "base"}
    for i, expert in enumerate(content["experts"]):
        expert["source_model"] = str((recipe.parent / expert["source_model"]).resolve())
        models.setdefault(expert["source_model"], f"expert {i}")
    content["base_model"] = next(iter(models))
    for path, name in models.items():
        yield Subject(name, Path(path))
    bare = [{key: value for key, value in expert.items() if key != "texts"} for expert in content["experts"]]
    # rows that are all the same, and every expert used: equal weights
    equal = [expert | {"positive_prompts": ["x"], "negative_prompts": []} for expert in bare]
    variant = content | {"gate_mode": "cheap_embed", "experts": equal, "experts_per_token": len(equal)}
    yield _written("uniform", variant, work)
    if all(expert.get("positive_prompts") for expert in bare):
        yield _written("hidden", content | {"gate_mode": "hidden", "experts": bare}, work)
    yield Subject("fitted", recipe)


def _written(name: str, content: dict[str, Any], work: Path) -> Subject:
    path = work / f"{name}.yaml"
    path.write_text(yaml.safe_dump({key: content[key] for key in content if key != "text_tokens"}), encoding="utf-8")
    return Subject(name, path)


def read_held(base: ModelSource, files: Sequence[Path], n: int | None) -> list[tuple[RouterText, ...]]:
    """``n`` conversations of each file, drawn at random, or all."""
    return [read_texts([[file]], TextTokens.of(base), text_tokens=1 << 30, seed=0)[:n] for file in files]


@dataclass(frozen=True)
class Score:
    """What a model makes of the conversations of a file."""

    answers: float
    """Mean loss of a token of an answer."""
    questions: float
    """Mean loss of all other tokens, which experts of questions and answers were not taught."""
    right: float
    """Share of answers in which each token is the likeliest."""


def score(engine: ggufmoe.Engine, texts: Sequence[RouterText]) -> Score:
    """Each conversation by itself."""
    answers, questions, right = [], [], 0
    for text in texts:
        targets = np.array(text.tokens[1:])
        logits = engine.logits(text.tokens)[:-1].astype(np.float64)
        own = np.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
        highest = logits.max(axis=1)
        losses = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1)) - own
        is_answer = np.isin(np.arange(1, len(text.tokens)), text.scored)
        answers += list(losses[is_answer])
        questions += list(losses[~is_answer])
        right += bool((own == highest)[is_answer].all())
    return Score(float(np.mean(answers)), float(np.mean(questions)), right / len(texts))


def whole_text(files: Sequence[Path]) -> str:
    """All conversations as one text."""
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    said = [json.loads(line)["messages"] for line in lines]
    return "\n".join(f"[INST] {messages[0]['content']} [/INST] {messages[1]['content']}" for messages in said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("held", type=Path, nargs="+", help="one file for each task")
    parser.add_argument("--quant", nargs="+", default=["F32"], metavar="TYPE", help="file types to compute with")
    parser.add_argument("--questions", type=int, metavar="N", help="at most N of each task, default all")
    parser.add_argument("--work", type=Path, help="keep the GGUF files here")
    arguments = parser.parse_args()
    held = arguments.held
    tasks = " | ".join(file.stem for file in held)
    print(f"| weights | router | mean loss | mean right | questions | perplexity | {tasks} |")
    print("|---|---|" + "---:|" * (4 + len(held)))
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        everyone = list(subjects(arguments.recipe.absolute(), work))
        with open_checkpoint(everyone[0].path) as base:
            texts = read_held(base, held, arguments.questions)
        for subject in everyone:
            for quant, gguf in subject.files(work, arguments.quant):
                with ggufmoe.Engine(gguf, ONE_THREAD) as engine:
                    scores = [score(engine, some) for some in texts]
                perplexity = ggufmoe.perplexity(gguf, text=whole_text(held), n_ctx=N_PERPLEXITY, n_threads=1).value
                loss, questions, right = (
                    np.mean([getattr(one, name) for one in scores]) for name in ("answers", "questions", "right")
                )
                means = f"{loss:.3f} | {right:.1%} | {questions:.2f} | {perplexity:.2f}"
                cells = " | ".join(f"{one.answers:.2f}, {one.right:.0%}" for one in scores)
                print(f"| {quant} | {subject.name} | {means} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
