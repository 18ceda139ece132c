"""Ask the embedded demo's mixture with llama.cpp and with transformers in float32; prints a table.

The recipe is merged into a checkpoint, which transformers loads, and into an F32 GGUF file. Both answer the questions
of ``ggufmoe demo`` greedily; what they say must be the same tokens, and right. Exit code 1 when anything differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from compare import Row, show
from merges import Peer

import ggufmoe
from ggufmoe.demo import RECIPE, questions
from ggufmoe.runtime.events import Token
from ggufmoe.runtime.messages import Message


def rows(peer: Peer) -> Iterator[Row]:
    """One row for each question."""
    merged, gguf = peer.work / "merged", peer.work / "merged.gguf"
    ggufmoe.merge(RECIPE, merged)
    ggufmoe.convert(RECIPE, gguf, "F32")
    ids, out = peer.work / "ids.json", peer.work / "answers.json"
    greedy = ggufmoe.SamplingOptions(temperature=0, n_predict=64)
    with ggufmoe.Engine(gguf) as engine:
        chat = ggufmoe.Chat(engine)
        prompts = [chat.prompt((Message("user", question.text),)) for question in questions()]
        ids.write_text(json.dumps(prompts), encoding="utf-8")
        peer.ask("reference.py", [{"do": "answer", "model": str(merged), "ids": str(ids), "out": str(out)}])
        theirs = json.loads(out.read_text(encoding="utf-8"))
        for question, prompt, their in zip(questions(), prompts, theirs, strict=True):
            ours = [event.token_id for event in engine.generate(prompt, greedy) if isinstance(event, Token)]
            text = engine.detokenize(ours).decode().strip()
            faults = [f"theirs: {engine.detokenize(their).decode()!r}"] if ours != their else []
            faults += [f"not right: {question.answer!r}"] if text != question.answer else []
            yield Row(f"demo: {question.text}", "answer", "transformers, float32", text, tuple(faults))


def main() -> int:
    """Compare; 0 when all is the same."""
    parser = argparse.ArgumentParser(prog="scripts/peers/run", description=__doc__.split("\n")[0])
    parser.add_argument("--peers-python", type=Path, required=True, help=argparse.SUPPRESS)
    arguments, _ = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="ggufmoe-demo-") as work:
        n_wrong = 0
        for row in rows(Peer(arguments.peers_python, Path(work))):
            show(row)
            n_wrong += bool(row.faults)
    print(f"{len(questions())} answers of the demo, {n_wrong} differ")
    return int(n_wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
