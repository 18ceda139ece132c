"""Hold plans against llama.cpp's own report of a load, for tiny random models of many architectures; prints a table.

transformers makes the models and llama.cpp's converter the files. Each file is loaded with several contexts and
placements: weights, KV caches and recurrent states must be those that libllama logs, to the last digit that it logs.
Then a text longer than every window is continued greedily, with what is in the cache reused and without: the answers
must be the same. Exit code 1 when anything differs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from architecture_cases import ARCHITECTURES, Architecture

import ggufmoe
from ggufmoe import ContextOptions, Engine, OffloadOptions, SamplingOptions
from ggufmoe.gguf.header import GGUFValue, read_header
from ggufmoe.gguf.types import ValueType
from ggufmoe.native.wording import SIZE_STEP_BYTES
from ggufmoe.runtime.events import Token

HERE = Path(__file__).parent
FIXTURES = HERE.parent.parent / "tests" / "architectures.json"
PLAIN = ContextOptions(n_ctx=1024, n_threads=1, n_ubatch=64)
CONTEXTS = {
    "plain": PLAIN,
    "swa-full": replace(PLAIN, swa_full=True),
    "no-fa": replace(PLAIN, flash_attn="off"),
    "3-texts": replace(PLAIN, n_seq_max=3, n_ctx=1000),
    "q8-kv": replace(PLAIN, cache_type_k="q8_0", cache_type_v="q8_0", flash_attn="on"),
}
PLACEMENTS = {"none": OffloadOptions(load_mode="none", device="none"), "mmap": OffloadOptions(device="none")}
N_NEW = 4
"""Tokens of an answer: a wrong cache shows at the first. Later ones may part with a right one too: where rounding gives
a near tie between two experts to the other one, a random model's logits change by far more than ``TIE``."""
TIE = 0.02
"""Logits that are so close may change places by rounding."""


def make_files(work: Path, wanted: list[Architecture], python: Path, llama_cpp: Path) -> Iterator[tuple[str, Path]]:
    """The files that llama.cpp's converter makes of each model; what failed is said."""
    _ask(python, "random_model_reference.py", work, [one.job(str(work / one.name)) for one in wanted])
    converted = []
    for one in wanted:
        directory = work / one.name
        if not (directory / "config.json").exists():
            print(f"{one.name}: not made: {Path(f'{directory}.error').read_text(encoding='utf-8')[-300:]}")
            continue
        for name, content in one.tokenizer_files().items():
            (directory / name).write_bytes(content)
        job: dict[str, Any] = {
            "model": str(directory),
            "outtype": "f32",
            "pre": "llama-bpe" if one.tokenizer == "bpe" else None,
        }
        job |= {"outfile": f"{directory}.gguf", "log": f"{directory}.log", "flags": one.flags}
        converted.append(job)
    _ask(python, "upstream_convert.py", work, converted, str(llama_cpp))
    for job in converted:
        if Path(job["outfile"]).exists():
            yield Path(job["model"]).name, Path(job["outfile"])
        else:
            print(f"{job['model']}: not converted: {Path(job['log']).read_text(encoding='utf-8')[-300:]}")


def _ask(python: Path, script: str, work: Path, jobs: list[dict[str, Any]], *arguments: str) -> None:
    listed = work / f"{script}.json"
    listed.write_text(json.dumps(jobs), encoding="utf-8")
    subprocess.run([str(python), str(HERE / script), *arguments, str(listed)], check=True)


def placement_faults(path: Path) -> Iterator[str]:
    """What of the plans differs from libllama's report."""
    for context_name, context in CONTEXTS.items():
        for mode, offload in PLACEMENTS.items():
            with Engine(path, context, offload) as engine:
                placement = engine.placement
            where = f"{context_name}, {mode}"
            yield from (f"{where}: {line}" for line in placement.differences)
            planned, reported = placement.plan.host.kv_bytes, sum(placement.report.kv_bytes.values())
            if abs(planned - reported) > 3 * SIZE_STEP_BYTES:
                yield f"{where}: KV planned {planned}, reported {reported}"
            if not placement.plan.is_kv_exact:
                yield f"{where}: the KV cache is only an estimate"


def reuse_faults(path: Path) -> Iterator[str]:
    """Where an answer differs from that of an empty cache."""
    first = [3 + 7 * i % 300 for i in range(400)]
    texts = {
        "first": first,
        "again": first,
        "one token earlier": first[:-1],
        "changed in the middle": [*first[:200], *first[210:]],
        "back to the first": first,
        "another text": first[::-1],
        "the first once more": first,
        "a short part": first[:90],
    }
    for swa_full in (False, True):
        with Engine(path, replace(PLAIN, swa_full=swa_full), PLACEMENTS["none"]) as engine:
            found = {name: answer(engine, prompt) for name, prompt in texts.items()}
            for name, prompt in texts.items():
                engine.forget()
                if are_different(answer(engine, prompt), found[name]):
                    yield f"{name}: another answer with the cache{' (--swa-full)' * swa_full}"


def answer(engine: Engine, prompt: list[int]) -> list[tuple[int, float]]:
    """The likeliest tokens after ``prompt``, each with its lead over the next likely one in logits."""
    settings = SamplingOptions(temperature=0.0, n_predict=N_NEW, logprobs=2)
    tokens = (event for event in engine.generate(prompt, settings) if isinstance(event, Token))
    return [(token.token_id, token.alternatives[0][1] - token.alternatives[1][1]) for token in tokens]


def are_different(one: list[tuple[int, float]], other: list[tuple[int, float]]) -> bool:
    """Whether answers part where a token led clearly: batches of other sizes round in another way."""
    parting = next((pair for pair in zip(one, other, strict=False) if pair[0][0] != pair[1][0]), None)
    return parting is not None and max(parting[0][1], parting[1][1]) > TIE


def write_fixtures(files: dict[str, Path]) -> None:
    """Write keys, names and shapes for the tests."""
    FIXTURES.write_text(
        "{\n" + ",\n".join(f'"{name}": {_fixture(path)}' for name, path in files.items()) + "\n}\n", encoding="utf-8"
    )


def _fixture(path: Path) -> str:
    header = read_header(path)
    keys = {
        key: _stated(value)
        for key, value in header.metadata.items()
        if not key.startswith(("tokenizer.", "general.")) or key == "general.architecture"
    }
    tensors: dict[str, tuple[tuple[int, ...], list[int]]] = {}
    layers: dict[tuple[str, tuple[int, ...]], list[int]] = defaultdict(list)
    for tensor in header.tensors:
        prefix, _, rest = tensor.name.partition(".")
        number, _, name = rest.partition(".")
        is_layer = prefix == "blk"
        layers[f"blk.{{n}}.{name}" if is_layer else tensor.name, tensor.shape].append(int(number) if is_layer else 0)
    for (name, shape), numbers in layers.items():
        assert name not in tensors, f"{path}: {name} has different shapes"
        tensors[name] = (shape, numbers)
    parts = (f' "{part}": {{\n{_lines(rows)}\n }}' for part, rows in (("metadata", keys), ("tensors", tensors)))
    return "{\n" + ",\n".join(parts) + "\n}"


def _lines(rows: dict[str, Any]) -> str:
    return ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in rows.items())


def _stated(value: GGUFValue) -> list[Any]:
    is_array = value.type is ValueType.ARRAY and value.item_type is not None
    return [f"{value.item_type.name}[]" if is_array and value.item_type else value.type.name, value.value]


def main() -> int:
    """Compare; the table goes to stdout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers-python", type=Path, required=True)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--keep", type=Path, help="keep the files in this directory")
    parser.add_argument("--write-fixtures", action="store_true")
    args = parser.parse_args()
    wanted = [one for one in ARCHITECTURES if args.only in one.name]
    with tempfile.TemporaryDirectory() as scratch:
        work = args.keep or Path(scratch)
        work.mkdir(exist_ok=True, parents=True)
        files = dict(make_files(work, wanted, args.peers_python, args.llama_cpp))
        if args.write_fixtures:
            write_fixtures(files)
        n_faults = len(wanted) - len(files)
        for name, path in files.items():
            ggufmoe.quantize(path, work / f"{name}-q4_0.gguf", quant="Q4_0", force=True)
            for what, faults in (
                ("F32 placed", list(placement_faults(path))),
                ("Q4_0 placed", list(placement_faults(work / f"{name}-q4_0.gguf"))),
                ("reuse", list(reuse_faults(path))),
            ):
                print(f"{name:16} {what:12} {'; '.join(faults) or 'equal'}", flush=True)
                n_faults += len(faults)
    return 1 if n_faults else 0


if __name__ == "__main__":
    sys.exit(main())
