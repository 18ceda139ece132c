"""What a recipe's router is worth: loss and accuracy on held-out questions, beside its models and other routers.

    python scripts/eval_router.py RECIPE.yaml HELD.jsonl... [--quant Q4_K_M] [--questions 50] [--work DIR]

RECIPE.yaml has ``gate_mode: fitted``, and prompts for each expert where gate mode hidden is to be compared. Each
HELD.jsonl has conversations of one task, a question and its answer a line, that no router was fitted on. Loss is the
mean over the tokens of the answers, computed in numpy; accuracy is the share of questions whose greedy answer through
llama.cpp is right to the letter, and perplexity is llama.cpp's on all questions and answers, both with the weights in
``--quant``.
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
from ggufmoe.merge.forward import ForwardPass, one_blas_thread
from ggufmoe.merge.merged import open_recipe
from ggufmoe.merge.router_texts import RouterText, TextTokens, read_texts
from ggufmoe.runtime.events import Token

N_PERPLEXITY = 256
"""Tokens of a chunk."""


@dataclass(frozen=True)
class Subject:
    """A model that is compared: a dense one, or a recipe."""

    name: str
    path: Path

    def open(self) -> ModelSource:
        """The model, with its router computed."""
        if self.path.is_dir():
            return open_checkpoint(self.path)
        model = open_recipe(self.path, allow_identical_experts=True, allow_outside_files=True)
        model.prepare()
        return model


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


def losses(model: ModelSource, held: Sequence[Path]) -> list[float]:
    """For each file the mean loss of a token of an answer."""
    forward, found = ForwardPass(model), []
    for file in held:
        texts = read_texts([[file]], TextTokens.of(model), text_tokens=1 << 30, seed=0)
        hidden = last_states(forward, model, [text.tokens for text in texts])
        places, targets = _scored(texts)
        found.append(float(forward.losses(hidden[places], targets).mean()))
    return found


def last_states(forward: ForwardPass, model: ModelSource, prompts: Sequence[Sequence[int]]) -> Any:
    """The residual stream after the last layer."""
    hidden = forward.first(prompts)
    with one_blas_thread():
        for layer in range(model.config.n_layer):
            hidden, normed = forward.attended(layer, hidden, prompts)
            hidden = forward.added(hidden, forward.feed_forward(layer, normed))
    return hidden


def _scored(texts: Sequence[RouterText]) -> tuple[list[int], Any]:
    starts = np.cumsum([0, *(len(text.tokens) for text in texts)])
    places = [int(start) + i - 1 for start, text in zip(starts, texts, strict=False) for i in text.scored]
    return places, np.array([text.tokens[i] for text in texts for i in text.scored])


def conversations(file: Path, n: int | None = None) -> list[tuple[str, str]]:
    """Questions and answers of a file, the first ``n`` of them."""
    lines = file.read_text(encoding="utf-8").splitlines()[:n]
    said = [json.loads(line)["messages"] for line in lines]
    return [(messages[0]["content"], messages[1]["content"]) for messages in said]


def accuracy(engine: ggufmoe.Engine, file: Path, n: int) -> float:
    """The share of questions that are answered right."""
    chat = ggufmoe.Chat(engine, sampling=ggufmoe.SamplingOptions(temperature=0, n_predict=40))
    right = 0
    asked = conversations(file, n)
    for question, answer in asked:
        chat.reset()
        said = "".join(event.text for event in chat.send(question) if isinstance(event, Token))
        right += said.strip() == answer
    return right / len(asked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("held", type=Path, nargs="+", help="one file for each task")
    parser.add_argument("--quant", default="F32", help="the file type of what llama.cpp computes")
    parser.add_argument("--questions", type=int, default=50, metavar="N", help="of each task that llama.cpp answers")
    parser.add_argument("--work", type=Path, help="keep the GGUF files here")
    arguments = parser.parse_args()
    held = arguments.held
    print(f"| model | mean loss | mean right | perplexity | {' | '.join(file.stem for file in held)} |")
    print("|---|" + "---:|" * (3 + len(held)))
    text = "\n".join(f"[INST] {asked} [/INST] {said}" for file in held for asked, said in conversations(file))
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        for subject in subjects(arguments.recipe.absolute(), work):
            model = subject.open()
            loss = losses(model, held)
            model.close()
            gguf = work / f"{subject.name.replace(' ', '-')}-{arguments.quant}.gguf"
            loose = not subject.path.is_dir()
            ggufmoe.convert(
                subject.path,
                gguf,
                arguments.quant,
                force=True,
                allow_identical_experts=loose,
                allow_outside_files=loose,
            )
            with ggufmoe.Engine(gguf) as engine:
                right = [accuracy(engine, file, arguments.questions) for file in held]
            perplexity = ggufmoe.perplexity(gguf, text=text, n_ctx=N_PERPLEXITY).value
            cells = [f"{one:.2f}, {share:.0%}" for one, share in zip(loss, right, strict=True)]
            means = f"{np.mean(loss):.3f} | {np.mean(right):.1%} | {perplexity:.2f}"
            print(f"| {subject.name} | {means} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
