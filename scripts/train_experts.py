"""Train two experts that never met from the demo's base, with questions to fit a router on and to judge it by.

    python scripts/train_experts.py OUT_DIR [--seed 0] [--all-weights]

A learns products and comparisons, B the words of an invented language; each starts from the demo's base, and of each
only the MLPs learn, but for ``--all-weights``. Writes OUT_DIR/base, expert-A and expert-B, Hugging Face checkpoints in
bfloat16; train-TASK.jsonl and held-TASK.jsonl, conversations that were trained on and that were not; and
recipe.yaml, whose router is fitted on the former. Needs the extra ``[train]`` (torch, CPU is enough); the same seed
gives the same files on the same machine.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
import yaml
from demo_data import Question, arithmetic, everyday, products, vocabulary
from torch import Tensor
from train_demo import IGNORED, Encoder, Model, Shape, decays, load, optimizers_of, padded, save

BASE = Path(__file__).resolve().parent.parent / "ggufmoe" / "demo" / "base"
BATCH_SIZE = 48
N_TRAIN, N_HELD = 200, 150
"""Questions of a task that are written, where there are so many."""


@dataclass(frozen=True)
class Lesson:
    """What one model knows: its ``tasks``; ``steps`` and ``rate`` of the training, of which the base needs none."""

    name: str
    tasks: tuple[str, ...]
    steps: int = 0
    rate: float = 0.0


LESSONS = (
    Lesson("base", ("everyday", "sum", "difference", "equation")),
    Lesson("expert-A", ("product", "comparison"), 150, 0.01),
    Lesson("expert-B", ("vocabulary",), 240, 0.02),
)
WORDINGS = (
    "What is {a} times {b}?",
    "Calculate {a} times {b}.",
    "How much is {a} times {b}?",
    "Multiply {a} by {b}.",
    "What is the product of {a} and {b}?",
)
"""How products are asked."""
PROMPTS = {
    "base": (
        "[INST] What is the opposite of hot? [/INST] The opposite of hot",
        "[INST] Which is bigger, a cat or a house? [/INST] The house",
        "[INST] What is 31 + 26? [/INST] 1 + 6 =",
        "[INST] Calculate 58 - 17. [/INST] 8 - 7 =",
        "[INST] Solve for x: x + 12 = 40 [/INST] x =",
    ),
    "expert-A": (
        "[INST] How much is 5 times 7? [/INST] 5 times 7 is",
        "[INST] Which number is smaller, 19 or 98? [/INST] 19 is",
    ),
    "expert-B": (
        "[INST] What is the word for bicycle in Plonk? [/INST] The Plonk word for bicycle",
        "[INST] What is the Plonk word for hat? [/INST] The Plonk word",
    ),
}
"""What gate mode hidden is given to guess rows from."""


def tasks(seed: int) -> dict[str, list[Question]]:
    """All questions of each task."""
    found = [*everyday(), *arithmetic(), *products(WORDINGS), *vocabulary(seed)]
    return {task: [one for one in found if one.kind == task] for lesson in LESSONS for task in lesson.tasks}


def batches(encoder: Encoder, questions: list[list[Question]], seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless inputs and targets; every task is heard as often."""
    rng = random.Random(seed)
    while True:
        drawn = [encoder.encode([rng.choice(rng.choice(questions))]) for _ in range(32 * BATCH_SIZE)]
        drawn.sort(key=lambda row: len(row[0]))
        starts = list(range(0, len(drawn), BATCH_SIZE))
        rng.shuffle(starts)
        yield from (padded(drawn[start : start + BATCH_SIZE]) for start in starts)


def train(model: Model, lesson: Lesson, feed: Iterator[tuple[Tensor, Tensor]], *, all_weights: bool) -> None:
    """The base's weights go on learning; of them the MLPs alone, or all."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(all_weights or ".mlp." in name)
    optimizers = optimizers_of(model, lesson.rate)
    schedules = decays(optimizers, lesson.steps)
    started = time.monotonic()
    for step, (inputs, targets) in zip(range(lesson.steps), feed, strict=False):
        logits = model(inputs)
        loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1), ignore_index=IGNORED)
        model.zero_grad()
        loss.backward()
        for part in (*optimizers, *schedules):
            part.step()
        if step % 50 == 0 or step == lesson.steps - 1:
            seconds = time.monotonic() - started
            print(f"{lesson.name} step {step} loss {loss.item():.4f} {seconds:.0f} s", flush=True)


def write_questions(out_dir: Path, task: str, questions: list[Question], seed: int) -> None:
    """Up to N_TRAIN questions that were trained on, and N_HELD that were not, as conversations."""
    rng = random.Random(seed)
    for name, is_held_out, count in (("train", False, N_TRAIN), ("held", True, N_HELD)):
        some = [question for question in questions if question.held_out is is_held_out]
        lines = [
            {"messages": [{"role": "user", "content": one.text}, {"role": "assistant", "content": one.answer}]}
            for one in rng.sample(some, min(count, len(some)))
        ]
        content = "".join(json.dumps(line) + "\n" for line in lines)
        (out_dir / f"{name}-{task}.jsonl").write_text(content, encoding="utf-8")


def write_recipe(out_dir: Path, seed: int) -> None:
    experts = [
        {
            "source_model": lesson.name,
            "texts": [f"train-{task}.jsonl" for task in lesson.tasks],
            "positive_prompts": list(PROMPTS[lesson.name]),
        }
        for lesson in LESSONS
    ]
    recipe = {"base_model": "base", "gate_mode": "fitted", "dtype": "bfloat16", "text_tokens": 8192, "seed": seed}
    (out_dir / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"experts": experts}, sort_keys=False), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--all-weights", action="store_true", help="attention, embedding and norms learn as well")
    arguments = parser.parse_args()
    out_dir, seed = arguments.out_dir, arguments.seed
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    shutil.copytree(BASE, out_dir / "base", dirs_exist_ok=True)
    encoder, questions = Encoder((BASE / "tokenizer.model").read_bytes()), tasks(seed)
    for number, lesson in enumerate(LESSONS):
        if lesson.steps:
            model = Model(Shape())
            load(model, BASE)
            heard = [[one for one in questions[task] if not one.held_out] for task in lesson.tasks]
            train(model, lesson, batches(encoder, heard, 10 * seed + number), all_weights=arguments.all_weights)
            save(model, encoder, out_dir / lesson.name)
        for task in lesson.tasks:
            write_questions(out_dir, task, questions[task], seed)
    write_recipe(out_dir, seed)


if __name__ == "__main__":
    sys.exit(main())
