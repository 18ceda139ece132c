"""Compare perplexity, KL divergence and importance matrices with llama.cpp's own tools; prints a table.

usage: scripts/peers/run_evaluations [MODEL.gguf [--reference REFERENCE.gguf]] [--text FILE] [--chunks N]

Without a model it makes a tiny Mixtral and a text. Both tools are compiled from the sources of the pinned llama.cpp and
run on the libraries of the installed engine, so both sides compute with the same code. Exit code 1 when anything
differs.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import setup_environment
from setup_environment import Pin, SetupError, llama_cpp_sources, say

import ggufmoe
from ggufmoe.gguf.header import read_header
from ggufmoe.quant.importances import Imatrix
from tests import tiny_tokenizers
from tests.tiny import make_checkpoint

CHUNK = 512
CLOSE = 1e-4
"""Four digits."""
CLOSE_SUMS = 1e-4
"""llama-imatrix adds up in single precision: over n rows its error grows to some sqrt(n) x 6e-8 and more."""
MAIN = """
#include "log.h"
int llama_perplexity(int argc, char ** argv);
int main(int argc, char ** argv) {
    const int status = llama_perplexity(argc, argv);
    common_log_pause(common_log_main());
    return status;
}
"""
"""Instead of llama-perplexity's own, which may end before its last lines are printed."""
LIBRARY_PATHS = {"darwin": "DYLD_LIBRARY_PATH", "win32": "PATH"}


@dataclass(frozen=True)
class Tools:
    """The two programs of llama.cpp, and the libraries that they run on."""

    perplexity: Path
    imatrix: Path
    libraries: Path

    def run(self, tool: Path, *arguments: str | Path) -> str:
        """What a tool prints. Raises SetupError if it fails."""
        name = LIBRARY_PATHS.get(sys.platform, "LD_LIBRARY_PATH")
        env = os.environ | {name: os.pathsep.join(filter(None, (str(self.libraries), os.environ.get(name))))}
        command = [str(tool), *map(str, arguments)]
        done = subprocess.run(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if done.returncode:
            raise SetupError(f"{tool.name} failed:\n{done.stdout[-3000:]}")
        return done.stdout


def build_tools(pin: Pin) -> Tools:
    """The tools of the pinned llama.cpp, compiled when the cache has none for this engine."""
    libraries = Path(sysconfig.get_path("purelib")) / "lib"
    target = setup_environment.cache_directory() / "tools" / setup_environment.engine_cache(pin).name
    sources = llama_cpp_sources(pin)
    missing = [name for name in ("perplexity", "imatrix") if not (target / f"llama-{name}").is_file()]
    for name in missing:
        say(f"compiling llama-{name} (a minute, once on this machine)")
        files = [sources / "tools" / name / f"{name}.cpp"]
        with tempfile.TemporaryDirectory() as scratch:
            if name == "perplexity":
                files.append(Path(scratch) / "main.cpp")
                files[-1].write_text(MAIN, encoding="utf-8")
            _compile(sources, libraries, files, target / f"llama-{name}")
    return Tools(target / "llama-perplexity", target / "llama-imatrix", libraries)


def _compile(sources: Path, libraries: Path, files: list[Path], program: Path) -> None:
    includes = [f"-I{sources / part}" for part in ("include", "ggml/include", "common", "vendor")]
    link = [f"-L{libraries}", "-lllama-common", "-lllama", "-lggml", "-lggml-base", "-pthread"]
    if sys.platform == "linux":
        link.append(f"-Wl,-rpath-link,{libraries}")
    program.parent.mkdir(parents=True, exist_ok=True)
    partial = program.with_name(program.name + ".partial")
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    command = [*compiler, "-O2", "-std=c++17", *includes, *map(str, files), "-o", str(partial), *link]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise SetupError(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}")
    partial.replace(program)


@dataclass(frozen=True)
class Case:
    """What is computed by both sides."""

    model: Path
    reference: Path
    text: Path
    chunks: int
    batch: int

    @property
    def flags(self) -> list[str]:
        """For either tool of llama.cpp."""
        return ["-c", str(CHUNK), "-b", str(self.batch), "--chunks", str(self.chunks)]

    @property
    def options(self) -> dict[str, Any]:
        """The same for us."""
        return {"n_ctx": CHUNK, "n_batch": self.batch, "chunks": self.chunks}


def compare_perplexity(tools: Tools, case: Case) -> Iterator[tuple[str, float, float]]:
    """Rows of (what, ours, theirs)."""
    printed = tools.run(tools.perplexity, "-m", case.model, "-f", case.text, *case.flags)
    value, uncertainty = _numbers(r"Final estimate: PPL = (\S+) \+/- (\S+)", printed)
    ours = ggufmoe.perplexity(case.model, text_file=case.text, **case.options).estimate
    yield "perplexity", ours.value, value
    yield "its uncertainty", ours.uncertainty, uncertainty


def compare_divergence(tools: Tools, case: Case, work: Path) -> Iterator[tuple[str, float, float]]:
    """Rows of (what, ours, theirs), with the reference rounded to 16 bits on both sides."""
    base = work / "base.kld"
    tools.run(tools.perplexity, "-m", case.reference, "-f", case.text, *case.flags, "--kl-divergence-base", base)
    printed = tools.run(
        tools.perplexity, "-m", case.model, *case.flags, "--kl-divergence-base", base, "--kl-divergence"
    )
    ours = ggufmoe.kl_divergence(case.model, case.reference, text_file=case.text, round_reference=True, **case.options)
    spread = r"\s*:?\s*(\S+) ±\s*(\S+)"
    pairs = {
        "Mean PPL(Q) ": ours.perplexity,
        "Mean PPL(base) ": ours.reference_perplexity,
        "Mean ln(PPL(Q)/PPL(base)) ": ours.log_ratio,
        "Mean PPL(Q)/PPL(base) ": ours.ratio,
        "Mean PPL(Q)-PPL(base) ": ours.difference,
        "Mean    KLD": ours.kl.mean,
    }
    for name, estimate in pairs.items():
        value, uncertainty = _numbers(re.escape(name) + spread, printed)
        yield name.strip(), estimate.value, value
        yield f"{name.strip()}, uncertainty", estimate.uncertainty, uncertainty
    for name, estimate in {
        "Mean    Δp": ours.delta_p.mean,
        "RMS Δp": ours.rms_delta_p,
        "Same top p": ours.same_top,
    }.items():
        value, uncertainty = _numbers(re.escape(name) + spread, printed)
        yield f"{name} %", 100 * estimate.value, value
        yield f"{name} %, uncertainty", 100 * estimate.uncertainty, uncertainty
    names = {0.0: "Minimum", 0.5: "Median", 1.0: "Maximum"}
    for share, quantile in ours.kl.quantiles.items():
        name = names.get(share, f"{100 * share:.1f}%")
        found = re.search(rf"^ *{name} +KLD: +(\S+)", printed, re.MULTILINE)
        if found:
            yield f"{name} KLD", quantile, float(found[1])


def compare_logits_files(tools: Tools, case: Case, work: Path) -> Iterator[tuple[str, float, float]]:
    """Rows of (what, ours, theirs): each side computes the divergence from the other's file of the reference's logits.

    ``compare_divergence`` has left llama-perplexity's file in ``work``.
    """
    own, flags = work / "own.kld", (*case.flags, "--kl-divergence")
    for read, file in (("there", own), ("here", work / "base.kld")):
        found = ggufmoe.kl_divergences([case.model], case.reference, text_file=case.text, logits=file, **case.options)
        printed = tools.run(tools.perplexity, "-m", case.model, *flags, "--kl-divergence-base", file)
        value, uncertainty = _numbers(r"Mean    KLD\s*:?\s*(\S+) ±\s*(\S+)", printed)
        ours = found.models[0].kl.mean
        yield f"Mean KLD, logits read {read}", ours.value, value
        yield f"Mean KLD, logits read {read}, uncertainty", ours.uncertainty, uncertainty


def _numbers(pattern: str, printed: str) -> tuple[float, float]:
    found = re.search(pattern, printed)
    if found is None:
        raise SetupError(f"llama-perplexity did not print {pattern!r}:\n{printed[-2000:]}")
    return float(found[1]), float(found[2])


def compare_imatrix(tools: Tools, case: Case, work: Path) -> Iterator[str]:
    """Faults in words; the last line is what was compared."""
    theirs, ours = work / "theirs.gguf", work / "ours.gguf"
    tools.run(tools.imatrix, "-m", case.reference, "-f", case.text, *case.flags, "--no-ppl", "-o", theirs)
    ggufmoe.imatrix(case.reference, ours, text_file=case.text, **case.options)
    a, b = read_header(ours), read_header(theirs)
    for key in {*a.metadata, *b.metadata}:
        if a.metadata.get(key) != b.metadata.get(key):
            yield f"DIFFERS {key}: {a.metadata.get(key)}, theirs {b.metadata.get(key)}"
    shapes = [{tensor.name: tensor.shape for tensor in header.tensors} for header in (a, b)]
    if shapes[0] != shapes[1]:
        yield f"DIFFERS tensors: {shapes[0].items() ^ shapes[1].items()}"
        return
    worst = 0.0
    x, y = Imatrix.load(ours), Imatrix.load(theirs)
    for name, entry in x.entries.items():
        if not np.array_equal(entry.counts, y.entries[name].counts):
            yield f"DIFFERS counts of {name}"
            continue
        n_matrices = len(entry.counts)
        left, right = (m.weights(name, n_matrices, entry.n_values // n_matrices) for m in (x, y))
        assert left is not None
        assert right is not None
        worst = max(worst, float((np.abs(left - right) / np.maximum(np.abs(right), 1e-30)).max()))
    if not worst < CLOSE_SUMS:
        yield f"DIFFERS sums by {worst:.1e} of themselves"
    yield f"{len(x.entries)} matrices, counts equal, sums apart by at most {worst:.1e} of themselves"


def show(what: str, ours: float, theirs: float) -> bool:
    """Print one row; whether both agree to four digits, or to the last digit that is printed there."""
    apart = abs(ours - theirs)
    agree = apart <= max(CLOSE * abs(theirs), 1e-3 if "%" in what else 2e-6)
    print(f"{what:42} {ours:16.6f} {theirs:16.6f} {'same' if agree else 'DIFFERS'}", flush=True)
    return agree


def own_case(work: Path) -> tuple[Path, Path, Path]:
    """A tiny Mixtral as F32 and Q4_0, and a text of some thousand tokens."""
    checkpoint = make_checkpoint(work / "tiny", n_expert=4, n_expert_used=2)
    text = work / "text.txt"
    text.write_text("\n".join(tiny_tokenizers.CORPUS) * 40, encoding="utf-8")
    for kind in ("F32", "Q4_0"):
        ggufmoe.convert(checkpoint, work / f"{kind}.gguf", kind)
    return work / "Q4_0.gguf", work / "F32.gguf", text


def compare(tools: Tools, case: Case, work: Path) -> bool:
    """All comparisons of one case; whether both sides agree."""
    print(f"{case.model.name} and {case.reference.name}, {case.chunks} chunks of {CHUNK}, batches of {case.batch}")
    rows = [
        *compare_perplexity(tools, case),
        *compare_divergence(tools, case, work),
        *compare_logits_files(tools, case, work),
    ]
    agree = [show(*row) for row in rows]
    for line in compare_imatrix(tools, case, work):
        print(f"imatrix: {line}", flush=True)
        agree.append(not line.startswith("DIFFERS"))
    print(f"{len(agree)} comparisons, {agree.count(False)} differ")
    return all(agree)


def main() -> int:
    """Compare; 0 when all is the same."""
    parser = argparse.ArgumentParser(prog="scripts/peers/run_evaluations", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path, nargs="?", help="GGUF file; a tiny one by default")
    parser.add_argument("--reference", type=Path, help="what it is compared with; itself by default")
    parser.add_argument("--text", type=Path, help="needed with a model")
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=2048)
    arguments = parser.parse_args()
    if arguments.model is not None and arguments.text is None:
        parser.error("a model needs --text")
    work = Path(tempfile.mkdtemp(prefix="ggufmoe-evaluations-"))
    try:
        tools = build_tools(setup_environment.read_pin(setup_environment.PIN_FILE, os.environ.get("GGUFMOE_ENGINE")))
        given = (arguments.model, arguments.reference or arguments.model, arguments.text)
        model, reference, text = own_case(work) if arguments.model is None else given
        return int(not compare(tools, Case(model, reference, text, arguments.chunks, arguments.batch_size), work))
    except SetupError as error:
        say(str(error))
        return 1
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
