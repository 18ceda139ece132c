"""The writer: right bytes whatever the threads, and nothing that looks finished when something goes wrong."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.errors import (
    Cancelled,
    NonFiniteError,
    NoSpaceError,
    OutputError,
    OutputExistsError,
    ResumeError,
)
from ggufmoe.export.export_plan import plan_export
from ggufmoe.files import partial_path
from ggufmoe.gguf.header import read_header
from ggufmoe.gguf.types import GGMLType
from ggufmoe.native import quantizing
from ggufmoe.quant.filetypes import FileType
from ggufmoe.quant.policy import TypePolicy
from ggufmoe.weights.dtypes import read_f32
from ggufmoe.weights.source_tensor import SourceTensor
from ggufmoe.work import Progress
from ggufmoe.writing import place, tiling
from ggufmoe.writing.journal import Journal, fingerprint
from ggufmoe.writing.place import PartialFile, journal_path
from ggufmoe.writing.plan import WritePlan
from ggufmoe.writing.writer import WriteOptions, write_plan
from tests import tiny

Make = Callable[..., Path]


@contextmanager
def planned(
    directory: Path, output: Path, file_type: FileType = FileType.Q8_0, split: int | None = None
) -> Iterator[WritePlan]:
    source = open_checkpoint(str(directory))
    try:
        yield plan_export(source, output, TypePolicy(file_type), split_max_bytes=split)
    finally:
        source.close()


def write(directory: Path, output: Path, options: WriteOptions | None = None, **plan: object) -> Path:
    with planned(directory, output, **plan) as made:  # type: ignore[arg-type]
        write_plan(made, options or WriteOptions())
    return output


def leftovers(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("file_type", [FileType.F32, FileType.BF16, FileType.F16, FileType.Q8_0, FileType.Q4_K_M])
def test_every_tensor_is_its_rows_quantized_by_ggml(tiny_checkpoint: Make, tmp_path: Path, file_type: FileType) -> None:
    with planned(tiny_checkpoint(n_expert=3, n_layer=1), tmp_path / "a.gguf", file_type) as plan:
        write_plan(plan, WriteOptions())
        written = (tmp_path / "a.gguf").read_bytes()
        assert len(written) == plan.n_bytes
        for tensor in plan.tensors:
            rows = np.concatenate([read_f32(cast(SourceTensor, part.rows)) for part in tensor.parts])
            wanted = np.empty((len(rows), tensor.type.row_bytes(tensor.n_cols)), np.uint8)
            if tensor.type is GGMLType.F32:
                wanted = rows.view(np.uint8)
            else:
                quantizing.quantize_chunk(tensor.type, rows, wanted)
            assert written[tensor.offset : tensor.offset + tensor.n_bytes] == wanted.tobytes(), tensor.name
        assert read_header(tmp_path / "a.gguf").data_offset == len(plan.files[0].header)
    assert leftovers(tmp_path) == ["a.gguf"]


def test_the_number_of_threads_does_not_change_a_byte(tiny_checkpoint: Make, tmp_path: Path) -> None:
    directory = tiny_checkpoint(n_expert=3, n_embd=288, n_ff=288)
    files = [
        write(directory, tmp_path / f"{n}.gguf", WriteOptions(threads=n), file_type=FileType.Q4_K_M).read_bytes()
        for n in (1, 2, 7)
    ]
    assert files[0] == files[1] == files[2]


def test_a_row_longer_than_a_tile_is_a_tile(
    tiny_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_checkpoint(n_layer=1)
    whole = write(directory, tmp_path / "whole.gguf").read_bytes()
    monkeypatch.setattr(tiling, "TILE_WEIGHTS", 100)
    assert write(directory, tmp_path / "small.gguf").read_bytes() == whole


def test_a_tile_never_crosses_from_one_expert_to_the_next(tiny_checkpoint: Make, tmp_path: Path) -> None:
    with planned(tiny_checkpoint(n_expert=3), tmp_path / "a.gguf") as plan:
        position: dict[str, int] = {}
        for tile in tiling.tiles(plan):
            assert tile.stop <= tile.tensor.parts[tile.part].n_rows
            assert tile.offset == position.get(tile.tensor.name, tile.tensor.offset)
            position[tile.tensor.name] = tile.offset + tile.n_bytes
        assert position == {tensor.name: tensor.offset + tensor.n_bytes for tensor in plan.tensors}


def test_progress_grows_to_all_of_it_and_names_tensors(tiny_checkpoint: Make, tmp_path: Path) -> None:
    steps: list[Progress] = []
    with planned(tiny_checkpoint(), tmp_path / "a.gguf") as plan:
        report = write_plan(plan, WriteOptions(on_progress=steps.append))
        names = {tensor.name for tensor in plan.tensors} | {""}
    assert [step.done for step in steps] == sorted(step.done for step in steps)
    assert steps[-1].done == steps[-1].total
    assert {step.item for step in steps} <= names
    assert report.bytes_written == sum(tensor.n_bytes for tensor in plan.tensors)
    assert report.paths == (tmp_path / "a.gguf",)
    assert report.seconds > 0


class Never:
    """A cancel event that nobody sets, and that counts how often it is asked."""

    def __init__(self, after: int | None = None) -> None:
        self.asked = 0
        self._after = after

    def is_set(self) -> bool:
        self.asked += 1
        return self._after is not None and self.asked > self._after


def interrupt(directory: Path, output: Path, after: int = 12) -> None:
    """Write with one thread until about ``after`` tiles are done."""
    with pytest.raises(Cancelled, match="--resume"):
        write(directory, output, WriteOptions(threads=1, cancel=Never(after)))


@pytest.mark.parametrize("after", [0, 1, 12, 20])
def test_a_cancelled_run_goes_on_to_the_same_file(tiny_checkpoint: Make, tmp_path: Path, after: int) -> None:
    directory, output = tiny_checkpoint(), tmp_path / "a.gguf"
    whole = write(directory, tmp_path / "whole.gguf").read_bytes()
    interrupt(directory, output, after)
    assert leftovers(tmp_path) == ["a.gguf.partial", "a.gguf.partial.journal", "whole.gguf"]
    assert partial_path(output).read_bytes()[:4] == bytes(4), "a partial file must not look like a model"
    with planned(directory, output) as plan:
        report = write_plan(plan, WriteOptions(resume=True))
        assert (report.bytes_written < sum(tensor.n_bytes for tensor in plan.tensors)) == (after > 0)
    assert output.read_bytes() == whole
    assert leftovers(tmp_path) == ["a.gguf", "whole.gguf"]


def test_an_exception_of_the_callback_stops_the_run_and_keeps_what_is_done(
    tiny_checkpoint: Make, tmp_path: Path
) -> None:
    def fail(step: Progress) -> None:
        raise KeyboardInterrupt

    directory, output = tiny_checkpoint(), tmp_path / "a.gguf"
    with pytest.raises(KeyboardInterrupt):
        write(directory, output, WriteOptions(on_progress=fail))
    assert threading.active_count() == 1
    assert leftovers(tmp_path) == ["a.gguf.partial", "a.gguf.partial.journal"]
    write(directory, output, WriteOptions(resume=True))
    assert output.read_bytes() == write(directory, tmp_path / "whole.gguf").read_bytes()


SLOWED = """
import json, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.export.export_plan import plan_export
from ggufmoe.writing.place import PartialFile, journal_path
from ggufmoe.writing.writer import WriteOptions, write_plan
from ggufmoe.quant.policy import TypePolicy
from ggufmoe.quant.filetypes import FileType

output, lines_to_live, tiles_ahead = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])

def done():
    lines = journal_path(output).read_text().splitlines()
    return [json.loads(line)["done"] for line in lines if '"done"' in line and line.endswith("}}")]

def tiles():
    return sum(last - first + 1 for line in done() for first, last in line)

before, written = (tiles(), []) if journal_path(output).exists() else (0, [])

class Slow(PartialFile):
    def write_at(self, offset, data):
        super().write_at(offset, data)
        time.sleep(0.02)
        written.append(offset)
        while len(written) - (tiles() - before) > tiles_ahead:
            time.sleep(0.001)
        if len(done()) > lines_to_live:
            os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))

plan = plan_export(open_checkpoint(sys.argv[1]), output, TypePolicy(FileType.Q8_0))
write_plan(plan, WriteOptions(threads=2, flush_interval_s=0, open_output=Slow, resume=True))
"""


def slowed(directory: Path, output: Path, lines_to_live: int = 10**6, tiles_ahead: int = 10**6) -> list[str]:
    """A command that resumes slowly, and kills itself when its journal has more lines about finished tiles.

    No more than ``tiles_ahead`` tiles wait for the journal, so that one line is not about all of them.
    """
    script = SLOWED.format(root=str(Path(__file__).parents[2]))
    return [sys.executable, "-c", script, str(directory), str(output), str(lines_to_live), str(tiles_ahead)]


def test_a_killed_process_loses_little_and_is_resumed_to_the_same_file(tiny_checkpoint: Make, tmp_path: Path) -> None:
    directory, output = tiny_checkpoint(n_layer=6), tmp_path / "a.gguf"
    whole = write(directory, tmp_path / "whole.gguf").read_bytes()
    with planned(directory, output) as plan:
        journal = Journal(journal_path(output), fingerprint(plan))
        n_tiles = len(list(tiling.tiles(plan)))
    done = 0
    for lines_to_live in (0, 1, 3):
        process = subprocess.run(slowed(directory, output, lines_to_live, 4), check=False, timeout=120)
        assert process.returncode not in (0, 1)
        finished = len(journal.read() or ())
        assert done < finished < n_tiles
        done = finished
        assert not output.exists()
    write(directory, output, WriteOptions(resume=True))
    assert output.read_bytes() == whole


def test_nothing_to_resume_is_a_fresh_start(
    tiny_checkpoint: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "ggufmoe"):
        write(tiny_checkpoint(), tmp_path / "a.gguf", WriteOptions(resume=True))
    assert "nothing to resume" in caplog.text
    assert leftovers(tmp_path) == ["a.gguf"]


def test_a_partial_file_is_written_over_without_resume(
    tiny_checkpoint: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory, output = tiny_checkpoint(), tmp_path / "a.gguf"
    interrupt(directory, output)
    with caplog.at_level(logging.WARNING, "ggufmoe"):
        write(directory, output)
    assert "afresh, over what an interrupted run left; --resume goes on" in caplog.text
    assert output.read_bytes() == write(directory, tmp_path / "whole.gguf").read_bytes()


def test_a_journal_whose_partial_file_is_gone_is_a_fresh_start(
    tiny_checkpoint: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory, output = tiny_checkpoint(), tmp_path / "a.gguf"
    interrupt(directory, output)
    partial_path(output).unlink()
    with caplog.at_level(logging.WARNING, "ggufmoe"):
        write(directory, output, WriteOptions(resume=True))
    assert "is gone, starting afresh" in caplog.text
    assert output.read_bytes() == write(directory, tmp_path / "whole.gguf").read_bytes()


def test_a_journal_of_another_plan_is_refused(tiny_checkpoint: Make, tmp_path: Path) -> None:
    directory, output = tiny_checkpoint(), tmp_path / "a.gguf"
    interrupt(directory, output)
    with pytest.raises(ResumeError, match="leave out --resume"):
        write(directory, output, WriteOptions(resume=True), file_type=FileType.Q4_0)


def test_a_journal_of_an_input_that_has_changed_is_refused(tmp_path: Path) -> None:
    directory, output = tiny.make_checkpoint(tmp_path / "model"), tmp_path / "a.gguf"
    interrupt(directory, output)
    os.utime(directory / "model.safetensors", ns=(1, 1))
    with pytest.raises(ResumeError, match="other inputs or options"):
        write(directory, output, WriteOptions(resume=True))


def test_a_partial_file_of_another_size_is_refused(tiny_checkpoint: Make, tmp_path: Path) -> None:
    directory, output = tiny_checkpoint(), tmp_path / "a.gguf"
    interrupt(directory, output)
    os.truncate(partial_path(output), 10)
    with pytest.raises(ResumeError, match="planned size"):
        write(directory, output, WriteOptions(resume=True))


def test_a_line_of_the_journal_that_was_cut_is_done_again(tiny_checkpoint: Make, tmp_path: Path) -> None:
    directory, output = tiny_checkpoint(), tmp_path / "a.gguf"
    interrupt(directory, output)
    journal = journal_path(output)
    journal.write_bytes(journal.read_bytes()[:-4])
    with pytest.raises(Cancelled):
        write(directory, output, WriteOptions(threads=1, cancel=Never(5), resume=True))
    assert [line[-1:] for line in journal.read_text().splitlines()] == ["}", "1", "}"], "the cut line stands alone"
    with planned(directory, output) as plan:
        assert Journal(journal, fingerprint(plan)).read() == set(range(5))
    write(directory, output, WriteOptions(resume=True))
    assert output.read_bytes() == write(directory, tmp_path / "whole.gguf").read_bytes()


def test_the_journal_is_small_and_says_what_is_done(tiny_checkpoint: Make, tmp_path: Path) -> None:
    directory, output = tiny_checkpoint(), tmp_path / "a.gguf"
    interrupt(directory, output, 12)
    first, *rest = [json.loads(line) for line in journal_path(output).read_text().splitlines()]
    assert set(first) == {"plan", "ggufmoe"}
    assert rest == [{"done": [[0, 11]]}]


def test_an_existing_output_needs_force(tiny_checkpoint: Make, tmp_path: Path) -> None:
    output = tmp_path / "a.gguf"
    output.write_text("precious")
    with pytest.raises(OutputExistsError, match="--force"):
        write(tiny_checkpoint(), output)
    with pytest.raises(OutputExistsError, match="--force"):
        write(tiny_checkpoint(), output, WriteOptions(resume=True))
    assert output.read_text() == "precious"
    write(tiny_checkpoint(), output, WriteOptions(force=True))
    assert read_header(output).tensors


def test_resume_does_not_replace_a_finished_file(tiny_checkpoint: Make, tmp_path: Path) -> None:
    output = write(tiny_checkpoint(seed=1), tmp_path / "a.gguf")
    before = output.read_bytes()
    with pytest.raises(OutputExistsError, match="--force"):
        write(tiny_checkpoint(seed=2), output, WriteOptions(resume=True))
    assert output.read_bytes() == before


@pytest.mark.parametrize("link", ["same", "symlink", "hardlink", "partial"])
def test_an_output_that_is_an_input_is_always_refused(tmp_path: Path, link: str) -> None:
    directory = tiny.make_checkpoint(tmp_path / "model", n_layer=1)
    weights = directory / "model.safetensors"
    before = weights.read_bytes()
    output = weights if link == "same" else tmp_path / "a.gguf"
    if link == "symlink":
        output.symlink_to(weights)
    elif link == "hardlink":
        os.link(weights, output)
    elif link == "partial":
        partial_path(output).symlink_to(weights)
    with pytest.raises(OutputExistsError, match="which is read"):
        write(directory, output, WriteOptions(force=True))
    assert weights.read_bytes() == before


def test_an_output_that_cannot_be_there(tiny_checkpoint: Make, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is not a directory"):
        write(tiny_checkpoint(), tmp_path / "none" / "a.gguf")
    with pytest.raises(OutputError, match="is a directory"):
        write(tiny_checkpoint(), tmp_path, WriteOptions(force=True))
    partial_path(tmp_path / "a.gguf").mkdir()
    with pytest.raises(OutputError, match="cannot be written"):
        write(tiny_checkpoint(), tmp_path / "a.gguf")


def test_a_directory_without_write_permission(
    tiny_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the superuser may write everywhere, so the system's answer is what is given here
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    with pytest.raises(OutputError, match="may not be written to"):
        write(tiny_checkpoint(), tmp_path / "a.gguf")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("file_type", [FileType.BF16, FileType.Q8_0])
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, value: float, dtype: str, file_type: FileType) -> None:
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    directory = damaged(tmp_path / "model", name, 3, value, dtype)
    with pytest.raises(NonFiniteError) as caught:
        write(directory, tmp_path / "a.gguf", file_type=file_type)
    assert f"blk.0.ffn_down_exps.weight: row 3 of {name} is NaN or infinite" in str(caught.value)
    assert not (tmp_path / "a.gguf").exists()


def test_the_row_of_a_reordered_tensor_is_that_of_the_source(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    directory = damaged(tmp_path / "model", name, 77, np.nan, "BF16")
    with pytest.raises(NonFiniteError, match=f"row 77 of {name}"):
        write(directory, tmp_path / "a.gguf")


@pytest.mark.parametrize(("file_type", "value"), [(FileType.F16, 1e5), (FileType.Q8_0, 3e38), (FileType.BF16, 3.4e38)])
def test_a_weight_too_large_for_its_type_is_named(tmp_path: Path, file_type: FileType, value: float) -> None:
    name = "model.layers.0.self_attn.v_proj.weight"
    directory = damaged(tmp_path / "model", name, 5, value, "F32")
    with pytest.raises(NonFiniteError, match="--tensor-type"):
        write(directory, tmp_path / "a.gguf", file_type=file_type)
    assert not (tmp_path / "a.gguf").exists()


def damaged(directory: Path, name: str, row: int, value: float, dtype: str) -> Path:
    """A checkpoint with ``value`` in one row of one tensor."""
    spec = tiny.Tiny(n_layer=1, dtype=dtype)
    tiny.make_checkpoint(directory, n_layer=1, dtype=dtype)
    tensors = tiny.stored_tensors(spec)
    exact = np.array([value], np.float32)
    tensors[name][1][row, 9] = (
        exact.view(np.uint32)[0] >> 16 if dtype == "BF16" else exact.astype(tensors[name][1].dtype)[0]
    )
    tiny.write_safetensors(directory / "model.safetensors", tensors)
    return directory


class FailingFile(PartialFile):
    """A disk that reports an error after some bytes."""

    code = errno.ENOSPC
    left = 600_000

    def write_at(self, offset: int, data: memoryview) -> None:
        self.left -= len(data)
        if self.left < 0:
            raise OSError(self.code, os.strerror(self.code))
        super().write_at(offset, data)


class TooLarge(FailingFile):
    code = errno.EFBIG


class Broken(FailingFile):
    code = errno.EIO


class FullAtFlush(PartialFile):
    def sync(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("file", "error", "message"),
    [
        (FailingFile, NoSpaceError, r"became full.*needed.*free.*--resume"),
        (FullAtFlush, NoSpaceError, r"became full"),
        (TooLarge, OutputError, r"--split-max-size"),
        (Broken, OutputError, r"cannot be written"),
    ],
)
def test_a_disk_that_fails_in_the_middle(
    tiny_checkpoint: Make, tmp_path: Path, file: type[PartialFile], error: type[OutputError], message: str
) -> None:
    directory, output = tiny_checkpoint(), tmp_path / "a.gguf"
    with pytest.raises(error, match=message):
        write(directory, output, WriteOptions(open_output=file))
    assert not output.exists()
    write(directory, output, WriteOptions(resume=True))
    assert output.read_bytes() == write(directory, tmp_path / "whole.gguf").read_bytes()


class Liar(PartialFile):
    """A disk that loses the end of the header."""

    lost = 40

    def write_at(self, offset: int, data: memoryview) -> None:
        if offset == 0:
            data = memoryview(bytes(data[: -self.lost]) + bytes(self.lost))
        super().write_at(offset, data)


class BoldLiar(Liar):
    """A disk that loses the header, its magic included."""

    lost = 1000


@pytest.mark.parametrize("file", [Liar, BoldLiar])
def test_a_file_that_reads_back_differently_is_not_named(
    tiny_checkpoint: Make, tmp_path: Path, file: type[PartialFile]
) -> None:
    directory, output = tiny_checkpoint(), tmp_path / "a.gguf"
    with pytest.raises(OutputError, match="reads back differently"):
        write(directory, output, WriteOptions(open_output=file))
    assert leftovers(tmp_path) == ["a.gguf.partial"]
    write(directory, output, WriteOptions(resume=True))
    assert read_header(output).tensors


def test_a_plan_that_does_not_fit_on_the_disk_is_refused_before_anything_is_written(
    tiny_checkpoint: Make, tmp_path: Path
) -> None:
    with planned(tiny_checkpoint(), tmp_path / "a.gguf") as plan:
        too_much = shutil.disk_usage(tmp_path).free + 10**12
        huge = replace(plan, files=(replace(plan.files[0], n_bytes=too_much),))
        with pytest.raises(NoSpaceError, match=r"needs [\d.]+ TB, .* has [\d.]+ [kMGT]?B free"):
            write_plan(huge, WriteOptions())
    assert leftovers(tmp_path) == []


def test_shards_are_whole_or_not_there(tiny_checkpoint: Make, tmp_path: Path) -> None:
    directory, output = tiny_checkpoint(), tmp_path / "a.gguf"
    with pytest.raises(Cancelled):
        write(directory, output, WriteOptions(threads=1, cancel=Never(12)), split=300_000)
    assert not list(tmp_path.glob("*.gguf"))
    write(directory, output, WriteOptions(resume=True), split=300_000)
    with planned(directory, output, split=300_000) as plan:
        assert leftovers(tmp_path) == [file.path.name for file in plan.files]


def test_a_run_that_died_while_shards_got_their_names_is_resumed(tiny_checkpoint: Make, tmp_path: Path) -> None:
    directory, output = tiny_checkpoint(), tmp_path / "a.gguf"
    write(directory, output, split=300_000)
    shards = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with planned(directory, output, split=300_000) as plan:
        journal = Journal(journal_path(output), fingerprint(plan))
        journal.begin()
        journal.add(tile.number for tile in tiling.tiles(plan))
        journal.close()
        for file in plan.files[2:]:
            file.path.rename(partial_path(file.path))
        report = write_plan(plan, WriteOptions(resume=True))
    assert report.bytes_written == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == shards


@pytest.fixture
def without_pwrite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are written as on Windows."""
    monkeypatch.setattr(place, "sys", SimpleNamespace(platform="win32"))
    monkeypatch.delattr(os, "pwrite", raising=False)


@pytest.mark.usefixtures("without_pwrite")
def test_without_pwrite_the_file_is_the_same(
    tiny_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    output = write(tiny_checkpoint(), tmp_path / "a.gguf")
    monkeypatch.undo()
    assert output.read_bytes() == write(tiny_checkpoint(), tmp_path / "whole.gguf").read_bytes()


@pytest.mark.usefixtures("without_pwrite")
def test_without_pwrite_threads_write_at_once_and_each_at_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_threads, far = 3, 5 * 2**30
    together = threading.Barrier(n_threads, timeout=60)
    write_some = os.write

    used: set[int] = set()

    def in_small_pieces(descriptor: int, data: memoryview) -> int:
        used.add(descriptor)
        together.wait()  # breaks where the writers wait for each other
        return write_some(descriptor, data[:5])

    file = PartialFile(tmp_path / "a", far + 100, keep=False)
    monkeypatch.setattr(os, "write", in_small_pieces)
    offsets = [0, 17, far]
    writers = [threading.Thread(target=file.write_at, args=(at, memoryview(b"%010d" % at))) for at in offsets]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    monkeypatch.undo()
    file.sync()
    file.close()
    file.close()
    assert len(used) == n_threads
    for descriptor in used:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
    with (tmp_path / "a").open("rb") as written:
        for at in offsets:
            written.seek(at)
            assert written.read(10) == b"%010d" % at
        assert os.fstat(written.fileno()).st_size == far + 100


@pytest.mark.parametrize("system", ["linux", "win32"])
def test_an_error_names_the_file_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(place, "sys", SimpleNamespace(platform=system))
    for name in ("write", "pwrite"):
        monkeypatch.setattr(os, name, fail, raising=False)
    file = PartialFile(tmp_path / "a.partial", 10, keep=False)
    with pytest.raises(OSError, match=r"a\.partial") as caught:
        file.write_at(0, memoryview(b"x"))
    file.close()
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(tmp_path / "a.partial"))


def test_a_disk_that_takes_nothing_and_says_nothing_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("write", "pwrite"):
        monkeypatch.setattr(os, name, lambda *_: 0, raising=False)
    file = PartialFile(tmp_path / "a", 10, keep=False)
    with pytest.raises(OSError, match="takes no more bytes"):
        file.write_at(0, memoryview(b"x"))
    file.close()


def test_a_file_that_cannot_get_its_size_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []

    def refuse(descriptor: int, n_bytes: int) -> None:
        opened.append(descriptor)
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    monkeypatch.setattr(place, "set_size", refuse)
    with pytest.raises(OSError, match=r"a\.partial"):
        PartialFile(tmp_path / "a.partial", 10, keep=False)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])


def test_ctrl_c_of_a_caller_without_a_cancel_event_is_resumable(tiny_checkpoint: Make, tmp_path: Path) -> None:
    directory, output = tiny_checkpoint(n_layer=6), tmp_path / "a.gguf"
    process = subprocess.Popen(slowed(directory, output), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    journal = journal_path(output)
    while not (journal.exists() and "done" in journal.read_text()) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=200)[1]
    assert process.returncode not in (0, None)
    write(directory, output, WriteOptions(resume=True))
    assert output.read_bytes() == write(directory, tmp_path / "whole.gguf").read_bytes()
