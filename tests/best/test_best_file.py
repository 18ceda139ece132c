"""Files that are measured before they are kept, and sizes that follow from memory or from a divergence."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

import ggufmoe
from ggufmoe.best.best_file import _solve, plan_best_file, standard_options
from ggufmoe.cli.app import exit_code
from ggufmoe.errors import Cancelled, OptionError, OutputExistsError
from ggufmoe.gguf.manifest import read_manifest, verify
from ggufmoe.options import ConvertOptions, QuantizeOptions, SizedOptions
from ggufmoe.quantize import plan_quantize
from tests.sizing.drawn import saved
from tests.tiny import make_checkpoint
from tests.tiny_tokenizers import CORPUS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, its sensitivity, its BF16 file and a text."""
    where = tmp_path_factory.mktemp("best")
    make_checkpoint(where / "tiny", n_embd=64, n_ff=96, n_layer=1)
    (where / "text.txt").write_text(" ".join(CORPUS * 60), encoding="utf-8")
    ggufmoe.sensitivity(where / "tiny", where / "s.gguf", text_file=where / "text.txt", threads=1)
    ggufmoe.convert(where / "tiny", where / "plain.gguf", "BF16", threads=1)
    return where


def words(folder: Path, **more: object) -> ConvertOptions:
    return ConvertOptions(**{"sensitivity": folder / "s.gguf", "types": "k", "threads": 1, **more})  # type: ignore[arg-type]


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_chosen_file_is_measured_beside_the_standard_mix(folder: Path, tmp_path: Path) -> None:
    output, text = tmp_path / "out.gguf", folder / "text.txt"
    sized = SizedOptions(verify=text, verify_chunks=2)
    found = ggufmoe.best_file(folder / "tiny", output, options=words(folder, quant="7bpw"), sized=sized)
    assert left(tmp_path) == ["out.gguf"]
    assert found.result.paths == (output,)
    assert found.standard is not None
    assert found.kept_standard == (found.difference > 0)
    (mine,) = found.measured
    assert found.difference == pytest.approx(mine.kl - found.standard.kl)
    again = ggufmoe.kl_divergence(output, folder / "plain.gguf", text_file=text, chunks=2)
    kept = found.standard if found.kept_standard else mine
    assert again.kl.mean.value == pytest.approx(kept.kl, rel=1e-6)
    assert output.stat().st_size == kept.n_bytes


def test_a_standard_mix_that_wins_is_kept_with_its_own_bytes(folder: Path, tmp_path: Path) -> None:
    """A sensitivity that is drawn ranks tensors wrongly: among some sizes the standard mix is nearer at one."""
    shapes = {
        tensor.name: tensor.shape for tensor in plan_quantize(folder / "plain.gguf", tmp_path / "x", "F16").tensors
    }
    wrong = saved(tmp_path / "wrong.gguf", shapes)
    sized = SizedOptions(verify=folder / "text.txt", verify_chunks=1)
    for bits in (8.5, 6.5, 6.0, 7.5, 7.0):
        output = tmp_path / f"{bits}.gguf"
        options = ConvertOptions(f"{bits}bpw", sensitivity=wrong, types="k", threads=1)
        found = ggufmoe.best_file(folder / "tiny", output, options=options, sized=sized)
        if found.kept_standard:
            break
    assert found.kept_standard
    assert found.standard is not None
    plain = tmp_path / "standard.gguf"
    ggufmoe.convert(folder / "tiny", plain, found.standard.name, imatrix=wrong, threads=1)
    assert output.read_bytes() == plain.read_bytes()
    assert standard_options(options, found.standard.name).quant == found.result.plan.file_type


def test_memory_is_divided_by_the_planner(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.gguf"
    context = SizedOptions(fit="4MB", n_ctx=256)
    plan, sums = plan_best_file(folder / "tiny", output, options=words(folder), sized=context)
    assert sums is not None
    assert sums.weight_bytes + sums.kv_bytes + sums.compute_bytes == sums.memory_bytes == 4_000_000
    assert sum(tensor.n_bytes for tensor in plan.tensors) <= sums.weight_bytes
    _, longer = plan_best_file(folder / "tiny", output, options=words(folder), sized=SizedOptions(fit="4MB", n_ctx=512))
    assert longer is not None
    assert longer.kv_bytes == 2 * sums.kv_bytes
    with pytest.raises(OptionError, match="are less than the KV cache of 65536 tokens"):
        plan_best_file(folder / "tiny", output, options=words(folder), sized=SizedOptions(fit="4MB", n_ctx=65536))
    _, here = plan_best_file(folder / "tiny", output, options=words(folder), sized=SizedOptions(fit="auto"))
    assert here is not None
    assert here.where.startswith("this machine's ")
    arguments = ["convert", str(folder / "tiny"), "--fit", "4MB", "-c", "256", "--sensitivity", str(folder / "s.gguf")]
    assert exit_code([*arguments, "--types", "k", "--dry-run"]) == 0
    assert sums.told() in capsys.readouterr().out


def test_the_smallest_file_within_a_divergence_is_measured(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, text = tmp_path / "out.gguf", folder / "text.txt"
    coarse = ggufmoe.best_file(
        folder / "plain.gguf",
        tmp_path / "first.gguf",
        options=ggufmoe.QuantizeOptions("6bpw", sensitivity=folder / "s.gguf", types="k", threads=1),
        sized=SizedOptions(verify=text, verify_chunks=1),
    )
    limit = float(f"{1.2 * coarse.measured[0].kl:.3g}")
    arguments = ["quantize", str(folder / "plain.gguf"), "-o", str(output), "--sensitivity", str(folder / "s.gguf")]
    arguments += ["--types", "k", "-t", "1", "--verify", str(text), "--verify-chunks", "1", "--max-kl", f"{limit:.9f}"]
    assert exit_code(arguments) == 0
    said = capsys.readouterr().err
    assert "warning: the sensitivity was measured on text.txt as well" in said
    assert f"kept the smallest that measures at most {limit:g}: " in said
    assert said.count("measured KL divergence ") <= 4
    found = ggufmoe.kl_divergence(output, folder / "plain.gguf", text_file=text, chunks=1)
    assert found.kl.mean.value <= 1.05 * limit
    assert output.stat().st_size <= 1.05 * coarse.result.n_bytes
    assert left(tmp_path) == ["first.gguf", "out.gguf"]
    arguments[arguments.index("--max-kl") + 1] = "0.000001"
    assert exit_code([*arguments, "--force"]) == 2
    assert "no file keeps to a divergence of 1e-06 on text.txt: the nearest of " in capsys.readouterr().err
    assert left(tmp_path) == ["first.gguf", "out.gguf"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_kl": 0.01}, "give --verify TEXT"),
        ({"n_ctx": 512}, "--ctx-size is for --fit"),
        ({"fit": "8"}, "is no size of memory"),
        ({"fit": "8GiB", "max_kl": 0.01, "verify": "text.txt"}, "give one of them"),
    ],
)
def test_options_that_do_not_go_together(given: dict[str, object], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        SizedOptions(**given)  # type: ignore[arg-type]


def test_a_size_is_given_once_and_a_folder_that_is_there_is_left_alone(folder: Path, tmp_path: Path) -> None:
    output, text = tmp_path / "out.gguf", folder / "text.txt"
    for sized, more, said in (
        (SizedOptions(fit="4MB"), {"quant": "5bpw"}, "5bpw and --fit each say"),
        (SizedOptions(fit="4MB"), {"sensitivity": None}, "--fit needs --sensitivity FILE"),
        (SizedOptions(verify=text), {"quant": "Q4_K_M"}, "--verify is for a file of a size"),
        (SizedOptions(verify=text), {"quant": "5bpw", "resume": True}, "leave out --resume"),
    ):
        with pytest.raises(OptionError, match=said):
            ggufmoe.best_file(folder / "tiny", output, options=words(folder, **more), sized=sized)
    (tmp_path / "out.gguf.verify.partial").mkdir()
    with pytest.raises(OutputExistsError, match="delete it"):
        ggufmoe.best_file(folder / "tiny", output, options=words(folder, quant="7bpw"), sized=SizedOptions(verify=text))
    assert left(tmp_path) == ["out.gguf.verify.partial"]


def test_neither_the_source_nor_what_is_there_is_overwritten(folder: Path, tmp_path: Path) -> None:
    source, text = tmp_path / "m.gguf", folder / "text.txt"
    source.write_bytes((folder / "plain.gguf").read_bytes())
    for size, sized in (
        ({"quant": "7bpw"}, SizedOptions(verify=text, verify_chunks=1)),
        ({}, SizedOptions(verify=text, verify_chunks=1, max_kl=0.01)),
    ):
        options = QuantizeOptions(sensitivity=folder / "s.gguf", types="k", force=True, threads=1, **size)  # type: ignore[arg-type]
        with pytest.raises(OutputExistsError, match="which is read"):
            ggufmoe.best_file(source, source, options=options, sized=sized)
    assert source.read_bytes() == (folder / "plain.gguf").read_bytes()
    part = tmp_path / "out-00002-of-00002.gguf"
    part.write_bytes(b"mine")
    split = words(folder, quant="7bpw", split_max_size="60KB")
    with pytest.raises(OutputExistsError, match=f"{part.name} exists already"):
        ggufmoe.best_file(
            folder / "tiny", tmp_path / "out.gguf", options=split, sized=SizedOptions(verify=text, verify_chunks=1)
        )
    assert part.read_bytes() == b"mine"
    assert left(tmp_path) == ["m.gguf", part.name]


def test_a_manifest_that_is_there_becomes_that_of_the_new_file(folder: Path, tmp_path: Path) -> None:
    output, manifest = tmp_path / "out.gguf", tmp_path / "out.manifest.json"
    manifest.write_text("{}")
    sized = SizedOptions(verify=folder / "text.txt", verify_chunks=1)
    ggufmoe.best_file(folder / "tiny", output, options=words(folder, quant="7bpw"), sized=sized)
    assert verify([output], read_manifest(manifest)) == []


def test_who_stops_is_not_sent_to_what_was_deleted(folder: Path, tmp_path: Path) -> None:
    stop = threading.Event()
    with pytest.raises(Cancelled, match="start again"):
        ggufmoe.best_file(
            folder / "tiny",
            tmp_path / "out.gguf",
            options=words(folder, quant="7bpw"),
            sized=SizedOptions(verify=folder / "text.txt"),
            on_progress=lambda progress: stop.set() if progress.phase == "write" else None,
            cancel=stop,
        )
    assert left(tmp_path) == []


@pytest.mark.parametrize("factor", [1e-9, 1e9])
def test_a_prediction_that_is_far_off_asks_for_no_impossible_file(factor: float) -> None:
    aims: list[float] = []

    def measure(aim: float) -> tuple[float, bool]:
        aims.append(aim)
        return factor, True

    _solve(measure, lambda: [aim * factor for aim in aims], 10.0)
    assert 1 < len(aims) <= 4
    for aim in aims:
        ConvertOptions(predicted_kl=aim)
