"""Convert from a hub of our own on loopback at simulated line rates, against the same conversion from the directory.

    python scripts/make_checkpoint.py MODEL --layers 2
    python scripts/bench_hub.py MODEL [--rates 50 500 5000] [--latency 0.02] [--quant Q4_K_M] [--kills 7]

Of each rate it prints seconds, against the line's and the local conversion's, the bytes over the network as a share of
the weights', peak memory, and the processor time of the conversion and of the hub, which share this machine's cores.
With --kills, a run under resets, busy answers and addresses that end is killed so many times and resumed, of a recipe
also while its router reads. What came twice has to be within what was in flight: what is read ahead, and what the line
carries between the write of a byte and its line in the journal; of a kill while the router reads, what that run had
read. Every output has to have the bytes of the local one. The exit code is 1 otherwise. MODEL may be a recipe with
models named org/NAME: their directories are looked for beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ggufmoe.convert import NETWORK_FLUSH_INTERVAL_S
from ggufmoe.hub.read_ahead import CHUNK_BYTES, READ_AHEAD_BYTES
from ggufmoe.writing.place import journal_path

SCRIPTS = Path(__file__).resolve().parent
HEADER_BYTES = 1 << 18
"""More than the header of a tensor file of these models, which each resumed run reads."""
FAULTS = ("--resets", "0.02", "--busy", "0.02", "--truncations", "0.02", "--wrong-ranges", "0.02", "--lifetime", "15")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rates", type=float, nargs="*", default=[50, 500, 5000], metavar="MBIT")
    parser.add_argument("--latency", type=float, default=0.02, metavar="SECONDS")
    parser.add_argument("--quant", default="Q4_K_M")
    parser.add_argument("--option", action="append", default=[], metavar="OPTION", help="of convert, for the rates")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--kill-rate", type=float, default=1000, metavar="MBIT")
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=given.model.parent) as name:
        Bench(given, Path(name)).run()


class Bench:
    def __init__(self, given: argparse.Namespace, work: Path) -> None:
        self.given, self.work = given, work
        self.models = _models(given.model)
        self.source = str(given.model) if given.model.suffix == ".yaml" else next(iter(self.models))
        self.weight_bytes = sum(_weight_bytes(path) for path in self.models.values())
        self.n_files = sum(len(list(path.glob("*.safetensors"))) for path in self.models.values())

    def run(self) -> None:
        expected, local_s = self._local()
        for rate in self.given.rates:
            self._at(rate, expected, local_s)
        if self.given.kills:
            self._killed(expected)

    def _local(self) -> tuple[str, float]:
        """The hash and the seconds of the conversion of what lies on this disk."""
        if self.given.model.suffix == ".yaml":  # by ids, so that the file says the same of its origin
            with self._hub("--latency", "0") as hub:
                self._convert(hub, "--keep-source")
                report = self._convert(hub, "--keep-source")
        else:
            self._convert(None)
            report = self._convert(None)
        print(
            f"local: {report['seconds']:.1f} s, processor {report['processor_seconds']:.1f} s, "
            f"peak memory {report['peak_memory_bytes'] / 1e6:.0f} MB",
            flush=True,
        )
        return report["sha256"], report["seconds"]

    def _at(self, rate: float, expected: str, local_s: float) -> None:
        with self._hub("--mbit", str(rate), "--latency", str(self.given.latency)) as hub:
            report = self._convert(hub, *self.given.option)
            counts = hub.counts()
        sent = sum(counts["bytes"].values())
        line_s = sent * 8 / rate / 1e6
        print(
            f"{rate:g} Mbit/s: {report['seconds']:.1f} s, of the slower of line ({line_s:.1f} s) and local "
            f"{report['seconds'] / max(line_s, local_s):.2f}, bytes {sent / self.weight_bytes:.4f} of the weights', "
            f"peak memory {report['peak_memory_bytes'] / 1e6:.0f} MB, processor {report['processor_seconds']:.1f} s "
            f"and the hub's {counts['processor_seconds']:.1f} s, {_same(report['sha256'], expected)}",
            flush=True,
        )

    def _killed(self, expected: str) -> None:
        with self._hub("--latency", "0") as hub:
            self._convert(hub)
            whole = hub.sent_bytes()
        with self._hub("--mbit", str(self.given.kill_rate), *FAULTS) as hub:
            kills: list[Kill] = []
            for number in range(self.given.kills):
                of_router = sum(kill.in_flight for kill in kills if kill.is_of_router)
                wanted = of_router + whole * (number + 1) // (self.given.kills + 1)
                kills.append(self._kill(hub, wanted))
            report = self._convert(hub, "--resume")
            twice, n_broken = hub.sent_bytes() - whole, hub.counts()["broken"]
        headers = self.given.kills * HEADER_BYTES * self.n_files
        bound = sum(kill.in_flight for kill in kills) + n_broken * CHUNK_BYTES + headers
        print(
            f"killed {len(kills)} times under faults, {sum(kill.is_of_router for kill in kills)} of them while the "
            f"router read: {twice / 1e6:.1f} MB came twice, at most {bound / 1e6:.1f} MB were in flight, "
            f"{_same(report['sha256'], expected)}"
        )
        if twice > bound:
            sys.exit("more came twice than was in flight")

    def _kill(self, hub: Hub, wanted: int) -> Kill:
        """Start or resume the conversion, and kill it when the hub has sent ``wanted`` bytes."""
        before, journal = hub.sent_bytes(), journal_path(self.work / "m.gguf")
        lines: list[float] = [time.time()]
        process = self._start(hub, "--resume")
        while process.poll() is None and (hub.sent_bytes() < wanted or time.time() - lines[0] < 1):
            if journal.exists() and journal.stat().st_mtime > lines[-1]:
                lines.append(journal.stat().st_mtime)
            time.sleep(0.02)
        assert process.poll() is None, "it ended before it was killed"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        since_start = hub.sent_bytes() - before
        if not journal.exists():
            return Kill(since_start, is_of_router=self.given.model.suffix == ".yaml")
        flushed_s = max(0.0, lines[-1] - lines[-2] - NETWORK_FLUSH_INTERVAL_S) if len(lines) > 2 else 0.0
        unrecorded_s = time.time() - lines[-1] + flushed_s
        carried = int(unrecorded_s * self.given.kill_rate * 1e6 / 8)
        return Kill(min(since_start, READ_AHEAD_BYTES + carried), is_of_router=False)

    @contextmanager
    def _hub(self, *faults: str) -> Iterator[Hub]:
        models = [f"{name}={path}" for name, path in self.models.items()]
        command = [sys.executable, str(SCRIPTS / "hub_server.py"), *models, *faults]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None, "it is a pipe"
            try:
                yield Hub(process.stdout.readline().strip().partition("=")[2])
            finally:
                process.terminate()

    def _start(self, hub: Hub | None, *options: str) -> subprocess.Popen[str]:
        home = self.work / ("cache" if "--keep-source" in options else "small-files")
        cache = {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        own = {} if hub is None else {**cache, "HF_ENDPOINT": hub.url}
        source = str(self.given.model) if hub is None else self.source
        command = [sys.executable, "-m", "ggufmoe", "convert", source, "-o", str(self.work / "m.gguf")]
        command += ["-q", self.given.quant, "--json", "--quiet", *options]
        return subprocess.Popen(command, env=os.environ | own, stdout=subprocess.PIPE, text=True)

    def _convert(self, hub: Hub | None, *options: str) -> dict[str, Any]:
        """What the conversion reports, with the hash of its output, which is deleted."""
        output = self.work / "m.gguf"
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        process = self._start(hub, *options)
        out, _ = process.communicate()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        processor_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        assert process.returncode == 0, "the conversion has failed"
        digest = hashlib.sha256()
        with output.open("rb") as file:
            while piece := file.read(1 << 20):  # a child's peak memory begins with that of its parent
                digest.update(piece)
        output.unlink()
        report: dict[str, Any] = json.loads(out)
        return report | {"sha256": digest.hexdigest(), "processor_seconds": processor_s}


@dataclass(frozen=True)
class Kill:
    """What may have to come again after a kill, in bytes."""

    in_flight: int
    is_of_router: bool
    """Whether the router of a recipe was reading, of which nothing is kept."""


class Hub:
    """A running hub_server."""

    def __init__(self, url: str) -> None:
        self.url = url

    def counts(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/counts") as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def sent_bytes(self) -> int:
        """Bytes of large files that were sent so far."""
        return sum(self.counts()["bytes"].values())


def _models(model: Path) -> dict[str, Path]:
    """The directories of all models, by their ids."""
    if model.suffix != ".yaml":
        return {f"org/{model.name}": model.resolve()}
    recipe = yaml.safe_load(model.read_text())
    names = {recipe["base_model"], *(expert["source_model"] for expert in recipe["experts"])}
    return {name: (model.parent / name.partition("/")[2]).resolve() for name in sorted(names)}


def _weight_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def _same(found: str, expected: str) -> str:
    assert found == expected, "the output has other bytes than the local one"
    return "same bytes"


if __name__ == "__main__":
    main()
