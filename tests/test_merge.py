"""From the recipe to files: both roads give the same GGUF, merges read back, and nothing half-done shows."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

import ggufmoe
from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.errors import Cancelled, NonFiniteError, NoSpaceError, OptionError, OutputError, OutputExistsError
from ggufmoe.gguf.header import read_header
from ggufmoe.weights.dtypes import read_f32
from ggufmoe.work import Progress
from tests.merge.test_merged import TEMPLATE, write_recipe
from tests.tiny import make_checkpoint


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    make_checkpoint(tmp_path / "base", arch="mistral", seed=1)
    make_checkpoint(tmp_path / "math", arch="mistral", seed=2, chat_template=TEMPLATE)
    changes: list[dict[str, Any]] = [{}, {"noise_scale": 0.01, "residual_scale": 0.9}]
    return write_recipe(tmp_path, "base", "math", experts=changes, name="Tiny mixture", seed=7)


@pytest.mark.parametrize("quant", ["F32", "Q8_0", "Q4_K_M"])
def test_both_roads_give_the_same_file(recipe: Path, quant: str) -> None:
    folder = recipe.parent
    ggufmoe.convert(recipe, folder / "straight.gguf", quant)
    for layout in ("classic", "fused"):
        ggufmoe.merge(recipe, folder / layout, layout=layout, max_shard_size="2M")
        ggufmoe.convert(folder / layout, folder / "around.gguf", quant, force=True)
        assert (folder / "straight.gguf").read_bytes() == (folder / "around.gguf").read_bytes()


def test_the_file_tells_what_it_was_made_from(recipe: Path) -> None:
    result = ggufmoe.convert(recipe, recipe.parent / "m.gguf", "Q8_0")
    header = read_header(recipe.parent / "m.gguf")
    assert header.get("general.name") == "Tiny mixture"
    assert header.get("general.base_model.count") == 2
    assert header.get("general.base_model.1.name") == "math"
    assert header.get("ggufmoe.recipe") == recipe.read_text()
    assert header.get("ggufmoe.gate_mode") == "hidden"
    assert header.get("ggufmoe.version") == ggufmoe.__version__
    assert header.get("tokenizer.chat_template") == TEMPLATE
    assert header.get("llama.expert_count") == 2
    assert result.router_report is not None
    assert result.to_dict()["router"]["gate_mode"] == "hidden"


def test_safetensors_itself_reads_what_is_written(recipe: Path) -> None:
    folder = recipe.parent
    result = ggufmoe.merge(recipe, folder / "out", max_shard_size="1500K")
    index = json.loads((folder / "out" / "model.safetensors.index.json").read_text())
    assert len(result.paths) > 2
    assert set(index["weight_map"].values()) == {path.name for path in result.paths}
    for path in result.paths:
        with safe_open(path, "numpy") as file:
            assert set(file.keys()) == {name for name, shard in index["weight_map"].items() if shard == path.name}
    with open_checkpoint(folder / "out") as merged:
        weights = sum(int(np.prod(tensor.shape)) for tensor in merged.tensors.values())
    assert index["metadata"]["total_size"] == 2 * weights


def test_a_merged_directory_is_a_whole_checkpoint(recipe: Path) -> None:
    out = recipe.parent / "out"
    ggufmoe.merge(recipe, out)
    names = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.model", "README.md"} <= names
    assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"] == TEMPLATE
    card = (out / "README.md").read_text()
    assert card.startswith("---\n")
    assert recipe.read_text().strip() in card
    with open_checkpoint(out) as merged, open_checkpoint(recipe.parent / "base") as base:
        assert merged.config.n_expert == 2
        name = "model.layers.0.self_attn.v_proj.weight"
        np.testing.assert_array_equal(read_f32(merged.tensors[name]), read_f32(base.tensors[name]))


def test_both_roads_keep_all_ends_of_the_base(recipe: Path) -> None:
    folder = recipe.parent
    config = json.loads((folder / "base" / "config.json").read_text())
    (folder / "base" / "config.json").write_text(json.dumps(config | {"eos_token_id": [2, 300, 301, 302]}))
    ggufmoe.merge(recipe, folder / "out")
    assert json.loads((folder / "out" / "generation_config.json").read_text())["eos_token_id"] == [2, 300, 301, 302]
    ggufmoe.convert(folder / "out", folder / "two.gguf", "F32")
    ggufmoe.convert(recipe, folder / "one.gguf", "F32")
    assert read_header(folder / "one.gguf").get("ggufmoe.eos_token_ids") == [2, 300, 301, 302]
    assert (folder / "one.gguf").read_bytes() == (folder / "two.gguf").read_bytes()


def test_the_router_report_is_written_on_request(recipe: Path) -> None:
    report = recipe.parent / "router.json"
    ggufmoe.convert(recipe, recipe.parent / "m.gguf", "Q8_0", router_report=report)
    content = json.loads(report.read_text())
    assert len(content["condition_numbers"]) == 2
    assert content["preferences"][1]["prompt"] == "solve for x"
    for job, out in ((ggufmoe.merge, "out"), (ggufmoe.convert, "n.gguf")):
        with pytest.raises(OutputError, match="no is not a directory; make it first"):
            job(recipe, recipe.parent / out, router_report=recipe.parent / "no" / "router.json")
        assert not list(recipe.parent.glob(f"{out}*"))


def test_a_file_in_the_place_of_the_partial_directory_is_an_error_and_stays(recipe: Path) -> None:
    (recipe.parent / "out.partial").write_text("mine")
    with pytest.raises(OutputError, match=r"out\.partial cannot be written: File exists"):
        ggufmoe.merge(recipe, recipe.parent / "out")
    assert (recipe.parent / "out.partial").read_text() == "mine"


def test_a_report_that_turns_out_unwritable_leaves_no_output(recipe: Path) -> None:
    report = recipe.parent / "router.json"

    def block(step: Progress) -> None:
        report.mkdir(exist_ok=True)

    with pytest.raises(OutputError, match=r"router\.json: the router's report cannot be written: Is a directory"):
        ggufmoe.merge(recipe, recipe.parent / "out", router_report=report, on_progress=block)
    assert not list(recipe.parent.glob("out*"))


def test_only_recipes_take_recipe_options(recipe: Path) -> None:
    with pytest.raises(OptionError, match="is no recipe"):
        ggufmoe.convert(recipe.parent / "base", recipe.parent / "m.gguf", allow_identical_experts=True)
    with pytest.raises(OptionError, match="is no recipe"):
        ggufmoe.convert(recipe.parent / "base", recipe.parent / "m.gguf", allow_outside_files=True)
    with pytest.raises(OptionError, match="MergeOptions has no option 'quant'"):
        ggufmoe.merge(recipe, recipe.parent / "out", quant="Q8_0")  # type: ignore[call-arg]
    with pytest.raises(OptionError, match="layout must be one of classic, fused"):
        ggufmoe.merge(recipe, recipe.parent / "out", layout="new")  # type: ignore[arg-type]


def test_phases_are_told_in_order(recipe: Path) -> None:
    seen: list[Progress] = []
    ggufmoe.convert(recipe, recipe.parent / "m.gguf", "Q8_0", manifest=True, on_progress=seen.append)
    phases = list(dict.fromkeys(step.phase for step in seen))
    assert phases == ["router", "write", "hash"]
    assert seen[1].item == "layer 2 of 2"
    assert all(step.done <= step.total for step in seen)


def test_a_dry_run_computes_no_router(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ggufmoe.convert import plan_convert

    for weights in recipe.parent.glob("*/model.safetensors"):
        with weights.open("r+b") as file:
            header = 8 + int.from_bytes(file.read(8), "little")
            size = weights.stat().st_size
            file.truncate(header)
            file.truncate(size)
    plan = plan_convert(recipe, recipe.parent / "m.gguf", "Q4_K_M")
    assert {t.name for t in plan.tensors} >= {"blk.1.ffn_gate_inp.weight", "blk.0.ffn_up_exps.weight"}
    assert not (recipe.parent / "m.gguf").exists()


def test_an_existing_checkpoint_needs_force_and_is_replaced_as_a_whole(recipe: Path) -> None:
    out = recipe.parent / "out"
    ggufmoe.merge(recipe, out, max_shard_size="2M")
    with pytest.raises(OutputExistsError, match="replace it with --force"):
        ggufmoe.merge(recipe, out)
    ggufmoe.merge(recipe, out, force=True)
    assert [path.name for path in out.glob("*.safetensors*")] == ["model.safetensors"]
    assert {path.name for path in recipe.parent.iterdir()} == {"base", "math", "out", "mixture.yaml"}


def test_what_is_no_checkpoint_is_never_replaced(recipe: Path) -> None:
    diary = recipe.parent / "diary"
    diary.mkdir()
    (diary / "monday.txt").write_text("dear diary")
    for target in (diary, recipe):
        with pytest.raises(OutputExistsError, match="was not written by ggufmoe"):
            ggufmoe.merge(recipe, target, force=True)
    with pytest.raises(OutputExistsError, match="was not written by ggufmoe"):
        ggufmoe.merge(recipe, recipe.parent / "base", force=True)
    (recipe.parent / "ggufmoe.json").write_text("{}")
    with pytest.raises(OutputExistsError, match="which is read"):
        ggufmoe.merge(recipe, recipe.parent, force=True)
    with pytest.raises(OutputError, match="is not a directory"):
        ggufmoe.merge(recipe, recipe.parent / "nowhere" / "out")
    assert (diary / "monday.txt").read_text() == "dear diary"


def test_a_merge_in_the_folder_of_its_base_is_no_input(recipe: Path) -> None:
    out = recipe.parent / "base" / "merged"
    ggufmoe.merge(recipe, out)
    ggufmoe.merge(recipe, out, force=True)
    assert (out / "ggufmoe.json").is_file()
    with pytest.raises(OutputExistsError, match="which is read"):
        ggufmoe.convert(recipe.parent / "base", recipe.parent / "base" / "config.json", "F16", force=True)


def test_force_replaces_only_what_a_merge_writes(recipe: Path) -> None:
    out = recipe.parent / "out"
    ggufmoe.merge(recipe, out, max_shard_size="2M")
    (out / "model-Q8_0.gguf").write_bytes(b"made from it")
    (out / "notes").mkdir()
    (out / "notes" / "monday.txt").write_text("dear diary")
    (out / "chat_template.jinja").write_text("an older template, which would change the model")
    ggufmoe.merge(recipe, out, force=True)
    assert (out / "model-Q8_0.gguf").read_bytes() == b"made from it"
    assert (out / "notes" / "monday.txt").read_text() == "dear diary"
    assert not (out / "chat_template.jinja").exists()
    assert [path.name for path in out.glob("*.safetensors*")] == ["model.safetensors"]
    assert not out.with_name("out.replaced").exists()


def test_a_checkpoint_of_somebody_else_is_not_replaced(recipe: Path) -> None:
    out = recipe.parent / "downloaded"
    out.mkdir()
    (out / "config.json").write_text("{}")
    (out / "pytorch_model.bin").write_bytes(b"days of training")
    with pytest.raises(OutputExistsError, match="was not written by ggufmoe"):
        ggufmoe.merge(recipe, out, force=True)
    assert (out / "pytorch_model.bin").read_bytes() == b"days of training"


def test_what_an_interrupted_replacement_left_is_not_lost(recipe: Path) -> None:
    out = recipe.parent / "out"
    ggufmoe.merge(recipe, out)
    left = recipe.parent / "out.replaced"
    left.mkdir()
    (left / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="move away what you need of it"):
        ggufmoe.merge(recipe, out, force=True)
    assert (left / "mine.txt").read_text() == "mine"


def test_a_merge_that_could_not_be_put_in_its_place_is_resumed(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, partial = recipe.parent / "out", recipe.parent / "out.partial"
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", refusing(os.replace, partial))
        with pytest.raises(OutputError, match=r"all is in .*\.partial"):
            ggufmoe.merge(recipe, out)
    weights = partial / "model.safetensors"
    before = weights.stat()
    (partial / "added_tokens.json").write_text('{"<left by the first run>": 3}')
    ggufmoe.merge(recipe, out, resume=True)
    after = (out / "model.safetensors").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert not (out / "added_tokens.json").exists()
    assert not list(out.glob("*.journal"))


def refusing(replace: Callable[..., None], source: Path) -> Callable[..., None]:
    """``os.replace`` on a disk that does not let ``source`` be renamed."""

    def instead(old: Path, new: Path) -> None:
        if Path(old) == source:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(old, new)

    return instead


def test_a_failed_replacement_leaves_the_older_checkpoint(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = recipe.parent / "out"
    ggufmoe.merge(recipe, out)
    before = (out / "model.safetensors").stat().st_ino
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", refusing(os.replace, recipe.parent / "out.partial"))
        with pytest.raises(OutputError, match="cannot be written"):
            ggufmoe.merge(recipe, out, force=True)
    assert (out / "model.safetensors").stat().st_ino == before


def test_a_link_to_a_directory_is_followed(recipe: Path) -> None:
    out, link = recipe.parent / "out", recipe.parent / "link"
    ggufmoe.merge(recipe, out)
    link.symlink_to(out)
    ggufmoe.merge(recipe, link, force=True)
    assert link.is_symlink()
    assert (out / "model.safetensors").is_file()


def test_weights_that_are_not_finite_leave_nothing_that_looks_finished(recipe: Path) -> None:
    weights = recipe.parent / "math" / "model.safetensors"
    with safe_open(weights, "numpy"), weights.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))["model.layers.1.mlp.up_proj.weight"]
        file.seek(8 + length + entry["data_offsets"][0])
        file.write(b"\xc0\x7f")
    with pytest.raises(NonFiniteError, match="w3"):
        ggufmoe.merge(recipe, recipe.parent / "out")
    assert not (recipe.parent / "out").exists()


def test_space_is_counted_before_the_router_is_computed(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage(recipe.parent)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    seen: list[Progress] = []
    for job in (ggufmoe.convert, ggufmoe.merge):
        with pytest.raises(NoSpaceError, match="needs"):
            job(recipe, recipe.parent / "out", on_progress=seen.append)
    assert seen == []


def test_cancelling_during_the_router_leaves_no_output(recipe: Path) -> None:
    stop = threading.Event()
    with pytest.raises(Cancelled):
        ggufmoe.convert(recipe, recipe.parent / "m.gguf", on_progress=lambda step: stop.set(), cancel=stop)
    assert not (recipe.parent / "m.gguf").exists()


def test_a_killed_merge_is_resumed_to_the_same_checkpoint(recipe: Path, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "base", arch="mistral", seed=1, n_ff=4096, n_layer=4)
    make_checkpoint(tmp_path / "math", arch="mistral", seed=2, n_ff=4096, n_layer=4)
    ggufmoe.merge(recipe, tmp_path / "whole", max_shard_size="20M")
    script = (
        "import sys, ggufmoe, ggufmoe.writing.writer as writer\n"
        "writer.FLUSH_INTERVAL_S = 0.0\n"
        "ggufmoe.merge(sys.argv[1], sys.argv[2], max_shard_size='20M', threads=1)\n"
    )
    job = subprocess.Popen([sys.executable, "-c", script, str(recipe), str(tmp_path / "out")])
    partial = tmp_path / "out.partial"
    deadline = time.monotonic() + 60
    while not list(partial.glob("*.journal")) and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(0.05)
    os.kill(job.pid, signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    job.wait()
    assert not (tmp_path / "out").exists() or job.returncode == 0
    ggufmoe.merge(recipe, tmp_path / "out", max_shard_size="20M", resume=True, force=True)
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert not partial.exists()
