"""``ggufmoe inspect`` at the door of the command line: what is shown, where, and with which exit code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ggufmoe.cli.app import exit_code
from ggufmoe.gguf.header import GGUFValue, read_header
from ggufmoe.gguf.manifest import write_manifest
from ggufmoe.gguf.types import GGMLType, ValueType
from tests.architecture_files import write_architecture
from tests.gguf_files import text, u32, write_gguf, write_mixtral, write_weights

Capture = pytest.CaptureFixture[str]


def run(capsys: Capture, *arguments: object) -> tuple[int, str, str]:
    code = exit_code(["inspect", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def rows(output: str) -> dict[str, str]:
    """First column to the rest of its line; of lines that begin alike, the first."""
    split = [line.split("  ", 1) for line in reversed(output.splitlines()) if "  " in line]
    return {label.strip(): " ".join(rest.split()) for label, rest in split}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_mixtral(tmp_path / "m.gguf", n_expert=4, n_used=2)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[read_header(path).data_offset + 10] ^= 4
    path.write_bytes(content)


def test_what_is_in_the_file_is_shown(model: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run(capsys, model)
    shown = rows(out)
    assert (code, err) == (0, "")
    assert shown["file"] == "m.gguf"
    assert shown["architecture"] == "llama"
    assert shown["experts"] == "4, 2 for each token"
    assert shown["parameters"] == "3.56 M, 1.99 M of them for each token"
    assert shown["file type"] == "Q4_K_M"
    assert shown["attention"] == "8 393 K 221 kB 9.7 % 4.50"
    assert shown["Q6_K"] == "3 1.06 M 869 kB 38.0 % 6.56"
    assert shown["context"] == "32768 tokens"
    assert shown["heads"] == "4, 2 for keys and values, 64 wide"
    assert shown["rope"] == "theta 1e+06, 64 dimensions, yarn scaling by 4"
    assert shown["model"] == "llama / default"
    assert shown["special"] == "bos 1 t1, eos 2 t2"
    assert shown["adds"] == "BOS yes, space no"
    assert shown["template"] == "46 characters: {% for m in messages %}"
    assert (shown["templates"], shown["sampling"]) == ("tool_use", "top_k 40")
    assert shown["license"] == "apache-2.0"
    assert shown["tags"] == "moe, merge"
    assert shown["base model"] == "Mistralai / Mistral 7B (https://example.org/m)"
    assert shown["merge.gate_mode"] == "hidden"


@pytest.mark.parametrize("columns", [80, 50])
def test_lines_fit_the_terminal(model: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    _, out, _ = run(capsys, model)
    assert max(map(len, out.splitlines())) <= columns
    assert "…" not in out
    assert ("tensors   weights" in out) == (columns == 80)
    assert "6.56" in out


def test_memory_for_a_context(model: Path, capsys: Capture) -> None:
    shown = rows(run(capsys, model, "-c", 1000, "-ctk", "q8_0", "-ctv", "q8_0")[1])
    assert shown["memory for"] == "1024 tokens 32768 tokens"
    assert shown["KV cache"] == "544 KiB 17.0 MiB"
    assert shown["in all"].endswith(" MiB")
    assert run(capsys, model, "-ctk", "q9")[0] == 2


def test_what_the_header_says_of_experts(tmp_path: Path, capsys: Capture) -> None:
    changes = {
        "llama.expert_shared_count": u32(1),
        "llama.expert_gating_func": u32(2),
        "llama.expert_weights_scale": GGUFValue(ValueType.FLOAT32, 2.5),
        "llama.expert_weights_norm": GGUFValue(ValueType.BOOL, True),
        "llama.leading_dense_block_count": u32(3),
    }
    path = write_mixtral(tmp_path / "m.gguf", changes=changes)
    shown = rows(run(capsys, path)[1])
    assert shown["shared experts"] == "1, on every token"
    assert shown["gating"] == "sigmoid"
    assert shown["expert weights"] == "rescaled to one, times 2.5"
    assert shown["dense layers"] == "the first 3, without experts"
    hyper = json.loads(run(capsys, path, "--json")[1])["hyper"]
    assert (hyper["n_expert_shared"], hyper["expert_gating"], hyper["n_leading_dense"]) == (1, "sigmoid", 3)


@pytest.mark.parametrize(
    ("name", "row", "text"),
    [
        ("gpt-oss", "window", "64 tokens, in 2 of 4 layers"),
        ("gemma3", "window", "64 tokens, in 5 of 6 layers"),
        ("qwen3next", "recurrent", "3 layers"),
    ],
)
def test_layers_that_do_not_keep_every_token_are_told(
    name: str, row: str, text: str, tmp_path: Path, capsys: Capture
) -> None:
    assert rows(run(capsys, write_architecture(tmp_path / "m.gguf", name))[1])[row] == text


RECIPE = "base_model: a\nexperts:\n" + "".join(f"  - source_model: \x1b{i}\n" for i in range(30))


def test_the_recipe_is_shown_and_can_be_had(tmp_path: Path, capsys: Capture) -> None:
    keys = {"ggufmoe.recipe": text(RECIPE), "ggufmoe.gate_mode": text("hidden"), "ggufmoe.version": text("0.1.0")}
    path = write_mixtral(tmp_path / "m.gguf", changes=keys)
    lines = run(capsys, path)[1].splitlines()
    assert "recipe, router hidden, ggufmoe 0.1.0" in lines
    assert "  base_model: a" in lines
    assert "    - source_model: \ufffd21" in lines
    assert "  and 8 more lines; --recipe prints all of it" in lines
    code, out, err = run(capsys, path, "--recipe")
    assert (code, err) == (0, "")
    assert out == RECIPE.replace("\x1b", "\ufffd")
    other = write_mixtral(tmp_path / "n.gguf")
    assert run(capsys, other, "--recipe")[::2] == (1, f"error: {other}: contains no recipe: `ggufmoe convert "
        "RECIPE.yaml` records it, other tools do not\n")  # fmt: skip


def experts_of(path: Path, n_expert: int) -> Path:
    random = np.random.default_rng(0)
    base = random.normal(0, 1, (8, 64))
    values = np.stack([base + i * random.normal(0, 1, base.shape) for i in range(n_expert)]).astype(np.float32)
    tensors = {f"blk.{i}.ffn_{kind}_exps.weight": (GGMLType.F32, values) for i in range(2) for kind in ("up", "down")}
    return write_weights(path, {"general.architecture": text("llama")}, tensors)


def test_similarity_of_two_experts(tmp_path: Path, capsys: Capture) -> None:
    path = experts_of(tmp_path / "m.gguf", 2)
    code, out, _ = run(capsys, path, "--experts")
    assert code == 0
    assert "similarity of experts, cosine: 8 of 8 rows of a matrix" in out
    shown = rows(out)
    assert shown["layer"] == "up down"
    assert [float(cell) for cell in shown["1"].split()] == [pytest.approx(0.7, abs=0.1)] * 2
    assert "most alike" not in out
    report = json.loads(run(capsys, path, "--experts", "--json")[1])["experts"]
    assert (report["n_expert"], len(report["matrices"])) == (2, 4)
    assert "experts" not in json.loads(run(capsys, path, "--json")[1])


def test_similarity_of_many_experts(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    path = experts_of(tmp_path / "m.gguf", 4)
    _, out, _ = run(capsys, path, "--experts")
    assert "cosine: mean of all pairs of experts, 8 of 8 rows" in out
    pairs = rows(out[out.index("\nexpert ") :])
    assert pairs["expert"] == "0 1 2 3"
    assert pairs["0"].split()[0] == "1"
    assert "most alike: 0 and 1 (0." in out
    assert "; least: " in out
    monkeypatch.setenv("COLUMNS", "39")
    _, out, _ = run(capsys, path, "--experts")
    assert "expert " not in [line[:7] for line in out.splitlines()]


def test_a_dense_model_has_no_experts_to_compare(tmp_path: Path, capsys: Capture) -> None:
    path = write_gguf(tmp_path / "m.gguf", {})
    code, out, err = run(capsys, path, "--experts")
    assert (code, out) == (1, "")
    assert "a dense model: it has no experts to compare" in err


def test_json_is_one_object(model: Path, capsys: Capture) -> None:
    code, out, err = run(capsys, model, "--json")
    report = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert (report["hyper"]["n_expert"], report["file_type"]) == (4, "Q4_K_M")
    assert "verification" not in report


def test_a_file_cannot_play_with_the_terminal(tmp_path: Path, capsys: Capture) -> None:
    bad = "\x1b]0;owned\x07[red]x[/red]\x1b[2J\u202e\r\nz\udcff"
    path = write_mixtral(
        tmp_path / "m.gguf",
        changes={
            "general.name": text(bad),
            "general.\x1b[31m": text(bad),
            "tokenizer.chat_template": text(bad),
            "general.long": text("x" * 1000),
        },
    )
    code, out, _ = run(capsys, path)
    assert code == 0
    assert not set(out) & set("\x1b\x07\r\u202e\udcff")
    assert "[red]x[/red]" in out
    assert out.count("x") < 250


def test_notes_are_shown(tmp_path: Path, capsys: Capture) -> None:
    path = write_mixtral(tmp_path / "m.gguf", 2, 2, {"tokenizer.chat_template": None})
    _, out, _ = run(capsys, path)
    flat = " ".join(out.split())
    assert "note: no chat template: chat needs --chat-template" in flat
    assert "note: both experts run for every token" in flat


def test_what_is_no_model_is_told_so_and_nothing_else(tmp_path: Path, capsys: Capture) -> None:
    path = write_mixtral(tmp_path / "i.gguf", 2, 0, {"general.type": text("imatrix"), "tokenizer.chat_template": None})
    _, out, _ = run(capsys, path)
    assert out.count("note: ") == 1
    said = " ".join(out.split())
    assert "note: an importance matrix, not a model; convert and quantize take it with --imatrix" in said


def test_an_empty_file_of_the_format_is_shown(tmp_path: Path, capsys: Capture) -> None:
    code, out, _ = run(capsys, write_gguf(tmp_path / "m.gguf", {}))
    assert code == 0
    assert rows(out)["parameters"] == "0"


def test_split_and_layered_models_are_shown(tmp_path: Path, capsys: Capture) -> None:
    for number in range(2):
        split = {"split.no": GGUFValue(ValueType.UINT16, number), "split.count": GGUFValue(ValueType.UINT16, 2)}
        split |= {"split.tensors.count": GGUFValue(ValueType.INT32, 0), "general.architecture": text("x")}
        split |= {"x.attention.head_count": GGUFValue(ValueType.ARRAY, [4, 8], ValueType.INT32)}
        path = write_gguf(tmp_path / f"m-0000{number + 1}-of-00002.gguf", split)
    shown = rows(run(capsys, path)[1])
    assert (shown["file"], shown["heads"]) == ("m-00001-of-00002.gguf and 1 more", "4 to 8")


def test_verify_says_that_nothing_changed(model: Path, capsys: Capture) -> None:
    write_manifest([model])
    code, out, _ = run(capsys, model, "--verify")
    assert code == 0
    assert "verified: header and all 23 tensors are as m.manifest.json says" in " ".join(out.split())


def test_verify_names_what_changed(model: Path, capsys: Capture) -> None:
    elsewhere = write_manifest([model], model.parent / "other.json")
    flip_a_bit(model)
    code, out, err = run(capsys, model, "--manifest", elsewhere)
    assert code == 1
    assert "differs: m.gguf: tensor 'token_embd.weight' differs" in out
    assert err == (
        f"error: {model}: differs from other.json in 1 places, first: m.gguf: tensor 'token_embd.weight' differs; "
        "download or make it again\n"
    )


def test_verify_as_json(model: Path, capsys: Capture) -> None:
    where = write_manifest([model])
    _, out, _ = run(capsys, model, "--verify", "--json")
    assert json.loads(out)["verification"] == {"manifest": str(where), "tensors": 23, "differences": []}
    flip_a_bit(model)
    code, out, err = run(capsys, model, "--verify", "--json")
    assert json.loads(out)["verification"]["differences"] == ["m.gguf: tensor 'token_embd.weight' differs"]
    assert (code, err.count("\n")) == (1, 1)


def test_known_errors_are_one_line(tmp_path: Path, model: Path, capsys: Capture) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"FUGG")
    for arguments, message in (
        ([tmp_path / "absent.gguf"], "cannot be read"),
        ([bad], "this is not a GGUF file"),
        ([model, "--verify"], "there is no such manifest"),
    ):
        code, out, err = run(capsys, *arguments)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert message in err


def test_wrong_usage(capsys: Capture) -> None:
    assert run(capsys)[0] == 2
    assert run(capsys, "m.gguf", "--no-such-flag")[0] == 2
