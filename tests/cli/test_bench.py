"""``ggufmoe bench`` at the door of the command line: lists and ranges, the formats, and Ctrl-C."""

from __future__ import annotations

import csv
import io
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import ggufmoe
from ggufmoe.cli.app import exit_code
from ggufmoe.cli.bench import BenchOptions
from ggufmoe.cli.bench_view import make_printer
from ggufmoe.errors import OptionError
from ggufmoe.evaluation.bench import Workload, describe_machine, plan_bench, run_bench
from ggufmoe.options import ALL_LAYERS, ContextOptions, OffloadOptions

Capture = pytest.CaptureFixture[str]
QUICK = ("-p", "8", "-n", "4", "-r", "2", "-t", "1")


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "m.gguf"
    ggufmoe.convert(tiny_checkpoint(n_embd=64, n_ff=64, n_expert=4, n_expert_used=2), path, quant="F16")
    return path


def run(capsys: Capture, *arguments: object) -> tuple[int, str, str]:
    code = exit_code(["bench", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def table(out: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")]


def test_a_table_as_llama_bench_prints_it(model: Path, capsys: Capture) -> None:
    code, out, err = run(capsys, model, *QUICK)
    assert (code, err) == (0, "")
    heading, rule, *rows = table(out)
    assert heading == ["model", "size", "params", "backend", "threads", "test", "t/s"]
    assert all(set(cell) <= set("-:") for cell in rule)
    assert [row[-2] for row in rows] == ["pp8", "tg4"]
    assert all(float(part) >= 0 for row in rows for part in row[-1].split(" ± "))
    assert len(out.splitlines()[0]) == len(out.splitlines()[1])
    tail = out.split("\n\n")[1].splitlines()
    assert tail[0].startswith("m.gguf: ")
    assert " parameters, " in tail[0]
    assert " of them for each token, " in tail[0]
    assert [line.split(":")[0] for line in tail[1:]] == ["machine", "build"]


def test_lists_make_a_grid_with_columns(model: Path, capsys: Capture) -> None:
    code, out, _ = run(capsys, model, "-p", 8, "-n", 0, "-r", 1, "-t", "1,2", "--n-expert-used", "1,2", "-fa", "off")
    heading, _, *rows = table(out)
    assert code == 0
    experts, threads = heading.index("experts"), heading.index("threads")
    assert "fa" in heading
    assert [(row[experts], row[threads]) for row in rows] == [("1", "1"), ("1", "2"), ("2", "1"), ("2", "2")]


def test_json_json_lines_and_csv(model: Path, capsys: Capture) -> None:
    _, out, _ = run(capsys, model, *QUICK, "-o", "json")
    records = json.loads(out)
    assert [(one["n_prompt"], one["n_gen"]) for one in records] == [(8, 0), (0, 4)]
    _, out, _ = run(capsys, model, *QUICK, "-o", "jsonl")
    assert [json.loads(line)["n_gen"] for line in out.splitlines()] == [0, 4]
    _, out, _ = run(capsys, model, *QUICK, "-o", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["n_prompt"] for row in rows] == ["8", "0"]
    assert list(rows[0]) == list(records[0])
    assert len(rows[0]["samples_ns"].split(";")) == 2


def test_a_prompt_and_its_answer_together_at_a_depth(model: Path, capsys: Capture) -> None:
    _, out, _ = run(capsys, model, "-pg", "8,2", "-d", "4", "-r", 1, "-t", 1, "--no-warmup")
    assert [row[-2] for row in table(out)[2:]] == ["pp8+tg2 @ d4"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("columns", "n_models"), [(120, 1), (60, 1), (60, 2)])
def test_a_narrow_terminal_gets_fewer_columns(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: int, n_models: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    models = [model, Path(shutil.copy(model, tmp_path / "other.gguf"))][:n_models]
    cases = plan_bench(models, [Workload(8, 0)], [ContextOptions(n_threads=1)])
    stream = Terminal()
    with make_printer("md", stream, describe_machine(), cases, ()) as printer:
        printer.add(next(run_bench(cases, repetitions=1)))
    heading, _, row = table(stream.getvalue())
    assert max(len(line) for line in stream.getvalue().splitlines() if line.startswith("|")) <= columns
    assert len(row) == len(heading)
    assert ("size" in heading) == (columns == 120)
    assert ("model" in heading) == (columns == 120 or n_models == 2)


@pytest.mark.parametrize(
    ("seconds", "shown"), [(1e-12, "8000000000000 ± 0"), (5e-11, "160000000000.0 ± 0.0"), (1, "8.00 ± 0.00")]
)
def test_large_speeds_lose_digits_rather_than_break_the_table(
    model: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, shown: str
) -> None:
    cases = plan_bench([model], [Workload(8, 0)], [ContextOptions(n_threads=1)])
    result = replace(next(run_bench(cases, repetitions=1)), samples_s=(seconds, seconds), repetitions=2)
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setenv("COLUMNS", "60")
        with make_printer("md", stream, describe_machine(), cases, ()) as printer:
            printer.add(result)
        lines = [line for line in stream.getvalue().splitlines() if line.startswith("|")]
        if stream.isatty():
            assert table(stream.getvalue())[-1][-1] == shown
            assert len({len(line) for line in lines}) == 1
        else:
            assert table(stream.getvalue())[-1][-1].endswith(" ± 0.00")


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
def test_a_grid_of_options_is_whole_on_every_terminal(
    model: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    contexts = [ContextOptions(n_threads=1, n_batch=n, cache_type_k="bf16", flash_attn="on") for n in (8, 16)]
    given = ("n_batch", "n_ubatch", "cache_type_k", "flash_attn", "load_mode")
    cases = plan_bench([model], [Workload(8, 4, 4)], contexts)
    stream = Terminal()
    with make_printer("md", stream, describe_machine(), cases, given) as printer:
        for result in run_bench(cases, repetitions=1):
            printer.add(result)
    out = stream.getvalue()
    assert max(map(len, out.splitlines())) <= columns
    # each value once in all, or once in each row
    assert out.count("bf16") == (2 if columns == 120 else 1)
    assert ("all rows: threads 1, n_ubatch 512, type_k bf16, fa on" in " ".join(out.split())) == (columns < 120)
    assert out.count("pp8+tg4 @ d4") == 2
    assert ("n_batch 16, test pp8" in out) == (columns == 40)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-p", "many"), "expected numbers such as 512"),
        (("-t", "4-1*0"), "no range that comes to an end"),
        (("-p", "8-4"), "is an empty range"),
        (("-p", "0", "-n", "0"), "nothing to measure"),
        (("-pg", "1"), "-pg takes two numbers"),
        (("-ctk", "q9"), "--cache-type-k must be one of"),
        (("-fa", "perhaps"), "--flash-attn must be one of"),
        (("-ngl", "some"), "expected a number"),
        (("--repack", "2"), "expected 0 or 1"),
        (("-r", "0"), "--repetitions must be at least 1"),
        (("-o", "xml"), "xml"),
    ],
)
def test_wrong_usage(model: Path, capsys: Capture, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = run(capsys, model, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_a_model_that_cannot_be_read_is_said_before_the_first_run(model: Path, capsys: Capture, tmp_path: Path) -> None:
    code, out, err = run(capsys, model, tmp_path / "absent.gguf", *QUICK)
    assert (code, out) == (1, "")
    assert "absent.gguf" in err


def numbers(*words: str) -> list[int]:
    return [workload.n_prompt for workload in BenchOptions(n_prompt=words, n_gen=("0",)).workloads]


def test_ranges_are_llama_bench_s() -> None:
    assert numbers("512") == [512]
    assert numbers("1,2", "4") == [1, 2, 4]
    assert numbers("1-4") == [1, 2, 3, 4]
    assert numbers("128-512+128") == [128, 256, 384, 512]
    assert numbers("1-16*2,3") == [1, 2, 4, 8, 16, 3]
    for wrong in ("1-", "1-4*1", "1-99999999", "a-b", ""):
        with pytest.raises(OptionError):
            numbers(wrong)


def test_values_of_several_devices_are_parted_by_slashes() -> None:
    options = BenchOptions(device=("GPU0/GPU1,GPU0",), tensor_split=("3/1",), override_tensor=("a=CPU;b=CPU,c=CPU",))
    assert [offload.device for offload in options.offloads] == ["GPU0,GPU1"] * 2 + ["GPU0"] * 2
    assert options.offloads[0].split_shares == (3, 1)
    assert [offload.override_tensor for offload in options.offloads[:2]] == [("a=CPU", "b=CPU"), ("c=CPU",)]


def test_a_listed_option_is_the_option_object_s(capsys: Capture) -> None:
    assert exit_code(["bench", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "-b, --batch-size N,... Logical batch: most tokens passed to llama.cpp in one call. [default: 2048]" in text
    assert "-sm, --split-mode WORD,..." in text
    assert "One of none, layer, row, tensor. [default: layer]" in text
    assert "-nkvo, --no-kv-offload 0|1,... Keep the KV cache in main memory. 0 or 1. [default: 0]" in text
    assert "--repack 0|1,..." in text
    for kind in (ContextOptions, OffloadOptions):
        single = BenchOptions().contexts if kind is ContextOptions else BenchOptions().offloads
        assert single == (kind(),)


def test_switches_and_words_make_combinations() -> None:
    options = BenchOptions(kv_offload=("0,1",), repack=("0",), n_gpu_layers=("all,3",), fit="off", rpc="a:1,b:2")
    assert options.offloads == tuple(
        OffloadOptions(n_gpu_layers=layers, kv_offload=kept, repack=False, fit="off", rpc="a:1,b:2")
        for layers in (ALL_LAYERS, 3)
        for kept in (True, False)
    )
    assert options.given == {"kv_offload", "repack", "n_gpu_layers", "fit", "rpc"}
    both = BenchOptions(cache_type_k=("f16,q8_0",), n_threads=("1-2",)).contexts
    assert [(context.cache_type_k, context.n_threads) for context in both] == [
        ("f16", 1),
        ("f16", 2),
        ("q8_0", 1),
        ("q8_0", 2),
    ]


@pytest.mark.parametrize("output", ["json", "md"])
def test_ctrl_c_prints_what_there_is(model: Path, output: str) -> None:
    program = [sys.executable, "-m", "ggufmoe", "bench", str(model)]
    command = [*program, "-p", "8", "-n", "0", "-r", "1", "-t", "1", "-d", "0-450", "-o", output]
    # a pipe that is soon full holds the bench up: it cannot end before the signal, however late that comes
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, pipesize=4096) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        out = "".join(child.stdout.readline() for _ in range(4))
        child.send_signal(signal.SIGINT)
        rest, err = child.stdout.read(), child.stderr.read()
    assert (child.returncode, err.splitlines()) == (130, ["error: the bench was stopped"])
    if output == "json":
        depths = [one["n_depth"] for one in json.loads(out + rest)]
        assert depths == list(range(len(depths)))
        assert 3 <= len(depths) < 451
    else:
        assert len(table(out + rest)) >= 4
        assert (out + rest).splitlines()[-1].startswith("build: llama.cpp ")
