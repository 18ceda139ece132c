"""Compare what ggufmoe makes with what others make of the same checkpoints; prints a table.

Four things: files against llama.cpp's converter, logits against transformers in float32, token ids against
sentencepiece and Hugging Face's tokenizers, and checkpoints that transformers 5 itself has written, of each family in
each layout. Exit code 1 when anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import token_ids
from cases import FAMILIES, Case, FamilyCase, found_cases, own_cases
from engine_logits import logits_of
from files import differences
from reference_process import ReferenceProcess

import ggufmoe
from ggufmoe.gguf.header import read_header
from tests import tiny_tokenizers
from tests.tiny import write_tokenizer

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
N_TOKENS = 64


@dataclass(frozen=True)
class Row:
    """One line of the table; ``faults`` is empty when both sides say the same."""

    case: str
    what: str
    against: str
    detail: str
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bench:
    """Where things lie during one comparison, and how to run the other side."""

    work: Path
    python: Path
    """Of the environment with torch."""
    llama_cpp: Path
    texts: list[str]

    @cached_property
    def _reference(self) -> ReferenceProcess:
        return ReferenceProcess(self.python)

    def ask(self, script: str, jobs: list[dict[str, Any]], *arguments: str) -> None:
        """Run one of the scripts beside this one in the other environment, on a list of jobs."""
        listed = self.work / f"{Path(script).stem}.json"
        listed.write_text(json.dumps(jobs), encoding="utf-8")
        if script == "reference.py":
            self._reference.do(listed)
            return
        subprocess.run([str(self.python), str(HERE / script), *arguments, str(listed)], check=True)


@dataclass(frozen=True)
class Subject:
    """A case with its checkpoint made: ``directory`` for us, ``classic`` for llama.cpp's converter."""

    case: Case
    directory: Path
    classic: Path

    @property
    def json_scores(self) -> bool:
        """Whether token scores come from merge ranks, which llama.cpp's converter does not derive."""
        return not (self.directory / "tokenizer.model").exists()


def saved_by_transformers(bench: Bench, only: str) -> list[Case]:
    """A Mixtral as transformers 5 saves it, and one as it lies in memory, which is what mergekit writes.

    ``only`` is a word that the name of the case has.
    """
    config = {
        "model_type": "mixtral", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4,
        "vocab_size": tiny_tokenizers.vocabulary_size("spm"), "max_position_embeddings": 2048, "sliding_window": None,
        "architectures": ["MixtralForCausalLM"],
    }  # fmt: skip
    found = []
    for form in ("saved", "state"):
        name = f"transformers-5-{form}"
        if only not in name:
            continue
        directory = bench.work / name
        bench.ask("reference.py", [{"do": "save", "out": str(directory), "form": form, "config": config}])
        for file, content in tiny_tokenizers.tokenizer_files("spm").items():
            (directory / file).write_bytes(content)
        written = json.dumps(tiny_tokenizers.tokenizer_config("spm"))
        (directory / "tokenizer_config.json").write_text(written, encoding="utf-8")
        found.append(Case(name, directory=directory))
    return found


def families_by_transformers(bench: Bench, only: str, families: Sequence[FamilyCase] = FAMILIES) -> list[Case]:
    """The models of ``families`` as transformers saves them and, of mixtures, in another form that is in use.

    ``only`` is a word that the name of the case has.
    """
    found, jobs = [], []
    for family in families:
        names = {form: family.name if form == "saved" else f"{family.name}-{form}" for form in family.forms}
        wanted = [form for form in family.forms if only in names[form]]
        # llama.cpp's converter reads only what transformers saves, and MXFP4
        made = [form for form in family.forms if form in wanted or (form == "saved" and "state" in wanted)]
        for form in made:
            directory = bench.work / names[form]
            if not (directory / "config.json").exists():
                job = {"do": "save", "out": str(directory), "form": form, "config": {**family.config}}
                jobs.append(job | {"fp8": family.fp8_scales, "fp8_rows": family.fp8_rows, "further": family.further})
                directory.mkdir(exist_ok=True)
                write_tokenizer(directory, family.tokenizer, None)
        for form in wanted:
            directory, classic = (bench.work / names[one] for one in (form, "saved" if form == "state" else form))
            case = Case(names[form], types=family.types, pre=family.pre, flags=family.flags, not_equal=family.not_equal)
            judged = directory.with_name(f"{directory.name}-computed") if family.fp8_scales else None
            case = replace(case, directory=directory, classic=classic, judged=judged, text_step=family.text_step)
            found.append(case)
    bench.ask("reference.py", jobs)
    return found


def make_subjects(bench: Bench, cases: list[Case]) -> list[Subject]:
    """Every case's checkpoint, and a classic copy of the fused ones."""
    subjects, jobs = [], []
    for case in cases:
        directory = classic = case.checkpoint(bench.work)
        if case.classic is not None:
            classic = case.classic
        elif _is_fused(directory):
            # of the same name, because general.name comes from it
            classic = bench.work / "classic" / directory.name
            jobs.append({"do": "classic", "model": str(directory), "out": str(classic)})
        subjects.append(Subject(case, directory, classic))
    if jobs:
        bench.ask("reference.py", jobs)
    return subjects


def _is_fused(directory: Path) -> bool:
    for shard in directory.glob("*.safetensors"):
        with open(shard, "rb") as file:
            if b".mlp.experts.gate_up_proj" in file.read(int.from_bytes(file.read(8), "little")):
                return True
    return False


def file_rows(bench: Bench, subjects: list[Subject]) -> Iterator[Row]:
    """Our files beside those of llama.cpp's converter."""
    wanted = [(subject, kind) for subject in subjects for kind in subject.case.types]
    jobs = [
        {
            "model": str(subject.classic),
            "outtype": kind.lower(),
            "outfile": str(_file(bench, subject, kind, "theirs")),
            "log": str(_file(bench, subject, kind, "log")),
            "pre": subject.case.pre,
            "flags": subject.case.flags,
        }
        for subject, kind in wanted
    ]
    bench.ask("upstream_convert.py", jobs, str(bench.llama_cpp))
    for subject, kind in wanted:
        detail, faults = _compare_files(bench, subject, kind)
        yield Row(subject.case.name, f"{kind} file", "llama.cpp's converter", detail, tuple(faults))


def _file(bench: Bench, subject: Subject, kind: str, side: str) -> Path:
    return bench.work / f"{subject.case.name}-{kind}.{side}.gguf"


def _compare_files(bench: Bench, subject: Subject, kind: str) -> tuple[str, list[str]]:
    ours, theirs = (_file(bench, subject, kind, side) for side in ("ours", "theirs"))
    try:
        ggufmoe.convert(subject.directory, ours, quant=kind)
    except ggufmoe.GgufmoeError as error:
        return "", [f"ours refused: {error}"]
    if not theirs.exists():
        log = _file(bench, subject, kind, "log").read_text(encoding="utf-8").strip().splitlines()
        return "", [f"llama.cpp's converter failed: {log[-1] if log else 'no log'}"]
    scores = ("tokenizer.ggml.scores",) if subject.json_scores else ()
    return f"{ours.stat().st_size} bytes", differences(ours, theirs, subject.case.not_equal + scores)


def logit_rows(bench: Bench, subjects: list[Subject]) -> Iterator[Row]:
    """Our F32 files in llama.cpp beside the checkpoints in transformers."""
    jobs = [_logit_job(bench, subject) for subject in subjects]
    bench.ask("reference.py", jobs)
    for subject, job in zip(subjects, jobs, strict=True):
        out = Path(job["out"])
        detail, faults = "", [f"transformers failed: {_last_line(Path(f'{out}.error'))}"]
        ours = _file(bench, subject, "F32", "ours")
        if not subject.case.types:
            ggufmoe.convert(subject.directory, ours, quant="F32")
        if not ours.exists():
            faults = ["there is no F32 file of ours"]
        elif out.exists():
            detail, faults = compare_logits(logits_of(_unquantized(ours), np.load(job["ids"])), np.load(out))
        yield Row(subject.case.name, "logits", "transformers, float32", detail, tuple(faults))


def _unquantized(ours: Path) -> Path:
    """The file with nothing quantized: llama.cpp would round what such weights are multiplied with, too."""
    if not any(tensor.type.is_quantized for tensor in read_header(ours).tensors):
        return ours
    plain = ours.with_suffix(".plain.gguf")
    ggufmoe.quantize(ours, plain, "F32", allow_requantize=True, force=True)
    return plain


def _logit_job(bench: Bench, subject: Subject) -> dict[str, Any]:
    seed = zlib.crc32(subject.case.name.encode())
    ids = np.random.default_rng(seed).integers(3, _vocabulary_size(subject), N_TOKENS, dtype=np.int32)
    path = bench.work / f"{subject.case.name}-ids.npy"
    np.save(path, ids)
    model = subject.case.judged or subject.directory
    return {"do": "logits", "model": str(model), "ids": str(path), "out": f"{path}-logits.npy"}


def _last_line(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip().splitlines()[-1] if path.exists() else "without a word"


def compare_logits(ours: Any, theirs: Any) -> tuple[str, list[str]]:
    if ours.shape != theirs.shape:
        return "", [f"shape {ours.shape}, theirs {theirs.shape}"]
    spread = float(theirs.max() - theirs.min())
    worst = float(np.abs(ours - theirs).max()) / spread
    faults = [] if worst < 1e-3 else [f"largest difference is {worst:.2e} of the range, more than 1e-3"]
    other = int((ours.argmax(-1) != theirs.argmax(-1)).sum())
    if other:
        faults.append(f"{other} of {len(ours)} positions have another likeliest token")
    return f"largest difference {worst:.1e} of the range", faults


def token_rows(bench: Bench, subjects: list[Subject]) -> Iterator[Row]:
    """Ids that llama.cpp gives with our file beside those of the tokenizer itself, once for each vocabulary."""
    for subject in {_vocabulary(subject): subject for subject in reversed(subjects)}.values():
        ours = _file(bench, subject, "F32", "ours")
        if not ours.exists():
            yield Row(subject.case.name, "token ids", "its tokenizer", "", ("there is no F32 file of ours",))
            continue
        forgiven = token_ids.extra_space(subject.directory)
        n_nasty = len(token_ids.NASTY)
        texts = [*bench.texts[:n_nasty], *bench.texts[n_nasty :: subject.case.text_step]]
        differ, n_ids, judge = token_ids.differing(subject.directory, ours, texts)
        wrong = tuple(f"differs: {text[:60]!r}" for text in differ if not forgiven(text))
        detail = f"{n_ids} ids of {len(texts)} texts"
        if len(differ) > len(wrong):
            detail += f"; known: {len(differ) - len(wrong)} where llama.cpp adds a space"
        yield Row(subject.case.name, "token ids", judge, detail, wrong)


def _vocabulary(subject: Subject) -> tuple[Any, ...]:
    files = [path.read_bytes() for path in sorted(subject.directory.glob("tokenizer*"))]
    return (_vocabulary_size(subject), *files)


def _vocabulary_size(subject: Subject) -> int:
    config = json.loads((subject.directory / "config.json").read_text(encoding="utf-8"))
    return int(config.get("text_config", config)["vocab_size"])


def own_text() -> str:
    """A text that every checkout has: documents, sources and the sentences that the tests' tokenizers come from."""
    paths = [ROOT / "README.md", *sorted((ROOT / "ggufmoe").rglob("*.py"))]
    return "\n".join([*tiny_tokenizers.CORPUS, *(path.read_text(encoding="utf-8") for path in paths)])


def show(row: Row) -> None:
    result = "DIFFERS" if row.faults else "same"
    print(f"{row.case:26} {row.what:10} {row.against:22} {result:8} {row.detail}", flush=True)
    for fault in row.faults[:12]:
        print(f"    {fault}")
    if len(row.faults) > 12:
        print(f"    and {len(row.faults) - 12} more")


def compare(bench: Bench, cases: list[Case]) -> int:
    """Run all comparisons; gives the number of rows that differ."""
    subjects = make_subjects(bench, cases)
    rows = []
    for part in (file_rows, logit_rows, token_rows):
        for row in part(bench, subjects):
            show(row)
            rows.append(row)
    n_wrong = sum(bool(row.faults) for row in rows)
    print(f"{len(rows)} comparisons, {n_wrong} differ")
    return n_wrong


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/peers/run", description=__doc__.split("\n")[0])
    parser.add_argument("--peers-python", type=Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--llama-cpp", type=Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help="directory with further checkpoints, one in each sub-directory")
    parser.add_argument("--text", type=Path, help="text whose token ids are compared; the project's own by default")
    parser.add_argument("--only", default="", help="compare the cases whose name contains this word")
    parser.add_argument("--keep", type=Path, help="directory for everything that is made; a temporary one by default")
    return parser.parse_args()


def main() -> int:
    """Compare; 0 when all is the same."""
    arguments = parse_arguments()
    work = arguments.keep or Path(tempfile.mkdtemp(prefix="ggufmoe-peers-"))
    work.mkdir(parents=True, exist_ok=True)
    text = arguments.text or work / "text.txt"
    if not arguments.text:
        text.write_text(own_text(), encoding="utf-8")
    texts = [*token_ids.NASTY, *token_ids.texts_of(text)]
    bench = Bench(work, arguments.peers_python, arguments.llama_cpp, texts)
    data = arguments.data or os.environ.get("GGUFMOE_PEER_DATA")
    try:
        own = [*own_cases(), *(found_cases(Path(data)) if data else [])]
        cases = [case for case in own if arguments.only in case.name]
        for made in (saved_by_transformers, families_by_transformers):
            cases += made(bench, arguments.only)
        return int(compare(bench, cases) > 0)
    finally:
        if not arguments.keep:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
