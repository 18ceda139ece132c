"""Accuracy of the demo's models on held-out questions: the dense ones, and the mixture in several types.

    python scripts/eval_demo.py DIR [--questions 200] [--work DIR]
    python scripts/eval_demo.py --apart [--questions 200] [--work DIR]

Answers are greedy and must be right to the letter. Questions are seeded samples of those never trained on
(``demo_data.py``). Prints the table of the model card, and the expert weights by layer; with ``--apart`` the table of
the second act, whose models are those in the package, with the guessed and with the fitted router.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from demo_data import Question, arithmetic, everyday, plonk, products

import ggufmoe
from ggufmoe.demo import APART_EXPERTS, write_apart
from ggufmoe.runtime.events import Token

KINDS = ("everyday", "sum", "difference", "comparison", "equation")
TYPES = ("F32", "Q8_0", "Q4_K_M")


def held_out(n: int, seed: int = 0) -> dict[str, list[Question]]:
    """``n`` questions of each kind that were never trained on."""
    questions = [question for question in everyday() + arithmetic() if question.held_out]
    return _samples({kind: [question for question in questions if question.kind == kind] for kind in KINDS}, n, seed)


def held_out_apart(n: int, seed: int = 0) -> dict[str, list[Question]]:
    """``n`` questions of each kind of the second act, or all there are, that were never trained on."""
    kinds = {"everyday": everyday(), "product": products(), "plonk": plonk()}
    return _samples({kind: [one for one in asked if one.held_out] for kind, asked in kinds.items()}, n, seed)


def _samples(by_kind: Mapping[str, list[Question]], n: int, seed: int) -> dict[str, list[Question]]:
    return {kind: random.Random(seed).sample(asked, min(n, len(asked))) for kind, asked in by_kind.items()}


def models(directory: Path, work: Path) -> Iterator[tuple[str, Path]]:
    """Every model that is compared, converted into ``work``."""
    for name in ("base", "math"):
        ggufmoe.convert(directory / name, work / f"{name}.gguf", "F32")
        yield f"{name}, dense, F32", work / f"{name}.gguf"
    for quant in TYPES:
        ggufmoe.convert(directory / "recipe.yaml", work / f"mixture-{quant}.gguf", quant)
        yield f"mixture, {quant}", work / f"mixture-{quant}.gguf"


def models_apart(work: Path) -> Iterator[tuple[str, Path]]:
    """The models of the second act, and their mixture with both routers, made in ``work``."""
    recipe = write_apart(work / "apart")
    for name in APART_EXPERTS:
        ggufmoe.convert(recipe.parent / name, work / f"{name}.gguf", "F32")
        yield f"{name}, dense, F32", work / f"{name}.gguf"
    texts = {name: recipe.parent / f"{name}.jsonl" for name in APART_EXPERTS}
    for quant in ("F32", "Q4_K_M"):
        guessed, fitted = work / f"guessed-{quant}.gguf", work / f"fitted-{quant}.gguf"
        ggufmoe.convert(recipe, guessed, quant)
        ggufmoe.refit(guessed, fitted, texts, router_steps=0)  # as the demo does
        yield f"mixture, {quant}, router guessed", guessed
        yield f"mixture, {quant}, router fitted", fitted


def accuracy(path: Path, questions: Mapping[str, list[Question]]) -> dict[str, float]:
    """Share of right answers by kind."""
    with ggufmoe.Engine(path) as engine:
        chat = ggufmoe.Chat(engine, sampling=ggufmoe.SamplingOptions(temperature=0, n_predict=40))
        return {
            kind: float(np.mean([_right(chat, question) for question in asked])) for kind, asked in questions.items()
        }


def _right(chat: ggufmoe.Chat, question: Question) -> bool:
    chat.reset()
    answer = "".join(event.text for event in chat.send(question.text) if isinstance(event, Token))
    return answer.strip() == question.answer


def expert_weights(path: Path, questions: Mapping[str, list[Question]]) -> dict[str, list[float]]:
    """By kind, the math expert's mean weight in each layer while answering."""
    weights: dict[str, list[float]] = {}
    with ggufmoe.Engine(path) as engine:
        for kind, asked in questions.items():
            traces = [
                ggufmoe.trace_routing(engine, f"[INST] {question.text} [/INST] {question.answer}")
                for question in asked[:40]
            ]
            rows = np.concatenate([trace.probabilities for trace in traces])
            weights[kind] = [float(share) for share in rows[:, :, 1].mean(axis=0)]
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="?", help="holds base, math (train_demo.py) and recipe.yaml")
    parser.add_argument("--apart", action="store_true", help="the second act")
    parser.add_argument("--questions", type=int, default=200, metavar="N", help="of each kind")
    parser.add_argument("--work", type=Path, help="keep the GGUF files here")
    arguments = parser.parse_args()
    if arguments.apart == (arguments.models is not None):
        parser.error("give a directory, or --apart")
    questions = held_out_apart(arguments.questions) if arguments.apart else held_out(arguments.questions)
    counts = ", ".join(f"{len(asked)} {kind}" for kind, asked in questions.items())
    print(f"held-out questions: {counts}\n")
    print("| model | " + " | ".join(questions) + " |")
    print("|---|" + "---:|" * len(questions))
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        for name, path in models_apart(work) if arguments.apart else models(arguments.models, work):
            shares = accuracy(path, questions)
            print(f"| {name} | " + " | ".join(f"{100 * share:.1f} %" for share in shares.values()) + " |", flush=True)
        if arguments.apart:
            return
        print("\nmean weight of the math expert by layer (F32):\n")
        print("| questions | " + " | ".join(f"layer {i}" for i in range(4)) + " |")
        print("|---|" + "---:|" * 4)
        for kind, layers in expert_weights(work / "mixture-F32.gguf", questions).items():
            print(f"| {kind} | " + " | ".join(f"{weight:.2f}" for weight in layers) + " |")


if __name__ == "__main__":
    main()
