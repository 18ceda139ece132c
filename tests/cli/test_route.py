"""``ggufmoe route`` in terminals of all kinds, over pipes, and into files."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import ggufmoe
from ggufmoe.cli import route as route_module
from ggufmoe.cli.app import exit_code
from ggufmoe.cli.console import cell_width
from ggufmoe.cli.route_view import RouteView
from ggufmoe.routing.statistics import share_by_label, summarize
from tests.routing.traces import random_trace, trace_of

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
Make = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("route") / "m.gguf"
    checkpoint = tiny_checkpoint(n_embd=64, n_ff=64, n_expert=4, n_expert_used=2, chat_template=TEMPLATE)
    ggufmoe.convert(checkpoint, path, quant="F16")
    return path


@pytest.fixture
def run(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "100")

    def call(*args: object) -> tuple[int, str, str]:
        code = exit_code(["route", str(model), *map(str, args), "-t", "1"])
        return code, *capsys.readouterr()

    return call


def test_the_text_with_marks_and_all_the_tables(run: Run) -> None:
    code, out, err = run("the model", "--generate", 5)
    assert (code, err) == (0, "")
    assert "m.gguf: 4 experts in 2 layers; 2 of them run on each token" in out
    assert "<s>" in out
    assert any(mark in out for mark in "⁰¹²³")
    assert "(5 tokens after » generated)" in out
    for title in (
        "Share of choices by layer and expert",
        "Summary",
        "Tokens that each expert gets more than its average",
    ):
        assert f"\n{title}" in out
    assert "load-balancing loss:" in out
    assert "\x1b" not in out


def test_nothing_to_route(run: Run) -> None:
    assert run("") == (1, "", "error: the prompt is empty: there is nothing to route\n")


def test_one_layer(run: Run) -> None:
    assert "Text, layer 1" in run("the model", "--layer", 1)[1]
    code, out, err = run("the model", "--layer", 2)
    assert (code, out, err) == (2, "", "error: layer 2 has no experts: there are layers 0 to 1\n")


def test_the_prompt_from_stdin_and_the_template(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("the model\n"))
    code, out, _ = run("-", "--json", "-")
    plain = json.loads(out)["texts"][0]["texts"]
    assert code == 0
    templated = json.loads(run("the model", "--chat", "--json", "-")[1])["texts"][0]["texts"]
    assert "".join(templated).replace(" ", "") == "<s><user>themodel"
    assert "".join(plain).replace(" ", "") == "<s>themodel"


def test_files_are_written_whole(run: Run, tmp_path: Path) -> None:
    html, png, data = (tmp_path / name for name in ("a.html", "a.png", "a.json"))
    code, out, err = run("the model", "--html", html, "--png", png, "--json", data, "--capacity-factor", 2)
    assert code == 0
    assert "Summary" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "a.json", "a.png"]
    assert err.splitlines() == [f"wrote {data}", f"wrote {html}", f"wrote {png}"]
    text = json.loads(data.read_text(encoding="utf-8"))["texts"][0]
    assert text["summary"]["capacity_factor"] == 2
    assert len(text["tokens"]) == len(text["texts"]) == len(text["probabilities"])
    assert "the" in html.read_text(encoding="utf-8")


def test_two_prompts_are_compared_without_bos(run: Run, tmp_path: Path) -> None:
    html, data = tmp_path / "a.html", tmp_path / "a.json"
    code, out, _ = run("--compare", "the model", "a number", "--html", html, "--json", data)
    assert code == 0
    assert "\nA, mean of all layers" in out
    assert "\nB, mean of all layers" in out
    assert "Share of choices by label (tokens) and expert, mean of all layers, %" in out
    assert "where labels differ most" in out
    found = json.loads(data.read_text(encoding="utf-8"))
    labels = found["comparison"]["labels"]
    assert [one["label"] for one in labels] == ["A", "B"]
    assert [one["n_tokens"] for one in labels] == [len(text["tokens"]) - 1 for text in found["texts"]]
    assert "By label" in html.read_text(encoding="utf-8")


def test_one_prompt_in_two_files(run: Run, model: Path, tmp_path: Path) -> None:
    """The files say where their routers come from; equal files route alike."""
    html, data, other = tmp_path / "a.html", tmp_path / "a.json", tmp_path / "other.gguf"
    ggufmoe.refit(model, other, router=model)
    code, out, _ = run("the model", "--against", other, "--html", html, "--json", data)
    assert code == 0
    assert out.startswith("m.gguf and other.gguf: 4 experts in ")
    assert "router of other.gguf: taken from another model" in out
    assert "\nm.gguf, mean of all layers" in out
    assert "\nother.gguf, mean of all layers" in out
    found = json.loads(data.read_text(encoding="utf-8"))
    assert (found["model"], found["against"]) == (str(model), str(other))
    assert found["texts"][0]["probabilities"] == found["texts"][1]["probabilities"]
    labels = found["comparison"]["labels"]
    assert [one["label"] for one in labels] == ["m.gguf", "other.gguf"]
    assert [one["n_tokens"] for one in labels] == [len(text["tokens"]) - 1 for text in found["texts"]]
    assert "Router of other.gguf: taken from another model." in html.read_text(encoding="utf-8")
    code, out, _ = run("the model", "--against", model)
    assert f"\n{model}, mean of all layers" in out


def test_files_of_other_experts_are_not_compared(run: Run, tiny_checkpoint: Make, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(n_embd=64, n_ff=64, n_expert=3, n_expert_used=2)
    ggufmoe.convert(checkpoint, tmp_path / "three.gguf", "F16")
    code, _, err = run("the model", "--against", tmp_path / "three.gguf")
    assert code == 1
    assert "m.gguf has 4 experts in 2 layers" in err
    assert "three.gguf 3 experts in 2 layers: they cannot be compared" in err


def test_labelled_prompts_from_a_file(run: Run, tmp_path: Path) -> None:
    prompts, html = tmp_path / "p.jsonl", tmp_path / "a.html"
    rows = [("math", "two numbers"), ("rest", "the model"), ("math", "a sum")]
    prompts.write_text("\n".join(json.dumps({"label": a, "prompt": b}) for a, b in rows) + "\n\n", encoding="utf-8")
    code, out, _ = run("--prompts", prompts, "--html", html)
    assert code == 0
    assert "math (" in out
    assert "rest (" in out
    titles = html.read_text(encoding="utf-8")
    assert all(f">{title}</h2>" in titles for title in ("math, 1", "rest", "math, 2"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "there is no prompt in it"),
        (b'{"label": "a"}', ':1: expected {"label": "...", "prompt": "..."}'),
        (b'{"label": "a", "prompt": "x"}\n[1]', ":2: expected"),
        (b"\n{", ":2: not JSON"),
        (b"\xff", "cannot be read"),
    ],
)
def test_files_of_prompts_that_are_wrong(run: Run, tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    code, _, err = run("--prompts", path)
    assert code == 1
    assert message in err
    assert str(path) in err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["x", "--compare", "a", "b"],
        ["--compare", "a", "b", "--png", "p.png"],
        ["--prompts", "f.jsonl", "--png", "p.png"],
        ["--compare", "a", "b", "--against", "m.gguf"],
        ["x", "--against", "m.gguf", "--png", "p.png"],
        ["x", "--generate", "-1"],
        ["x", "--capacity-factor", "0"],
    ],
)
def test_wrong_usage(run: Run, arguments: list[str]) -> None:
    assert run(*arguments)[0] == 2


def test_an_input_is_never_written_over(run: Run, model: Path) -> None:
    before = model.read_bytes()
    code, _, err = run("x", "--html", model)
    assert (code, err) == (1, f"error: {model} is {model}, which is read; choose another output\n")
    assert model.read_bytes() == before


@pytest.mark.parametrize("flag", ["--html", "--png", "--json"])
def test_where_nothing_can_be_written(run: Run, tmp_path: Path, flag: str) -> None:
    folder = tmp_path / "missing"
    code, out, err = run("x", flag, folder / "file.png")
    assert (code, out) == (1, "")
    assert f"error: {folder} is not a directory; make it first" in err
    folder.mkdir()
    code, out, err = run("x", flag, folder)
    assert (code, out) == ((2, "") if flag == "--png" else (1, ""))
    assert str(folder) in err


@pytest.mark.parametrize("flag", ["--html", "--png", "--json"])
def test_what_turns_out_not_to_be_writable(
    run: Run, tmp_path: Path, flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(route_module, "_check_outputs", lambda *_: None)
    path = tmp_path / "missing" / "file.png"
    code, _, err = run("x", flag, path)
    assert code == 1
    what = "the picture" if flag == "--png" else "the report"
    assert f"error: {path}: {what} cannot be written: " in err


def test_a_picture_of_another_kind(run: Run, tmp_path: Path) -> None:
    code, out, err = run("x", "--png", tmp_path / "a.jpg")
    assert (code, out) == (2, "")
    assert "a.jpg the ending .png" in err


# ---- the view


class Stream(io.StringIO):
    """A terminal, or a file, of some encoding."""

    def __init__(self, *, terminal: bool, encoding: str = "utf-8") -> None:
        super().__init__()
        self._terminal, self._encoding = terminal, encoding

    def isatty(self) -> bool:
        return self._terminal

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    def show(n_expert: int = 4, *, width: int = 80, terminal: bool = False, encoding: str = "utf-8", **env: str) -> str:
        for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "TERM"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"COLUMNS": str(width), "TERM": "xterm-256color", **env}.items():
            monkeypatch.setenv(name, value)
        trace = random_trace(30, 3, n_expert, 2)
        stream = Stream(terminal=terminal, encoding=encoding)
        view = RouteView(stream)
        view.model("m.gguf", trace)
        view.text(trace, None)
        view.summary(trace, summarize(trace), None)
        shares = share_by_label([("a very long label, longer than a terminal", trace), ("b", trace.part(3))])
        view.comparison(shares, trace)
        return stream.getvalue()

    return show


def test_colour_only_on_terminals_that_want_it(shown: Callable[..., str]) -> None:
    assert "\x1b[" not in shown()
    assert "\x1b[" in shown(terminal=True)
    assert ";48;" in shown(terminal=True) or "[48;" in shown(terminal=True)
    assert "48;" not in shown(terminal=True, NO_COLOR="1")
    assert "\x1b[" not in shown(terminal=True, TERM="dumb")


def test_marks_say_what_colours_say(shown: Callable[..., str]) -> None:
    plain = shown(12)
    trace = random_trace(30, 3, 12, 2)
    for text, weights in zip(trace.texts, trace.mean_weights(), strict=True):
        mark = str(int(weights.argmax())).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
        assert f"{text.strip()}{mark}" in plain


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_lines_stay_within_the_terminal(shown: Callable[..., str], width: int) -> None:
    lines = shown(16, width=width).splitlines()
    assert max(len(line) for line in lines) <= width
    assert sum("label" in line.split() for line in lines) >= (2 if width == 200 else 3)


def test_terminals_without_superscripts(shown: Callable[..., str]) -> None:
    plain = shown(encoding="ascii")
    assert plain.isascii()
    assert "[3]" in plain


def test_all_experts_stand_in_a_folded_table(shown: Callable[..., str]) -> None:
    for width in (20, 80):
        rows = [line.split() for line in shown(16, width=width).splitlines() if line.startswith("layer  ")]
        assert [int(word) for row in rows for word in row[1:]] == list(range(16))


def test_two_experts_have_two_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = replace(trace_of([[[0.9, 0.1]], [[0.2, 0.8]]], 2, texts=["2", " x"]), expert_names=("everyday", "math"))
    for encoding, marks, signs in (("utf-8", "2▁ x▇", "█░"), ("ascii", "2[10] x[80]", "#.")):
        bar = signs[0] * 22 + signs[1] * 18
        monkeypatch.setenv("COLUMNS", "60")
        stream = Stream(terminal=False, encoding=encoding)
        view = RouteView(stream)
        view.model("m.gguf", trace, [("gating", "sigmoid")])
        view.text(trace, None)
        view.summary(trace, summarize(trace), None)
        shown = stream.getvalue()
        assert marks in shown
        assert f" mean  55.0 {bar}  45.0\n" in shown
        assert "layer  everyday" + " " * 40 + "math\n" in shown
        assert "everyday: 2 90% (+35)\nmath: x 80% (+35)\n" in shown
        assert "gating: sigmoid\n" in shown
        assert not any(mark in shown for mark in "⁰¹")
        assert max(map(len, shown.splitlines())) <= 60


def test_of_many_experts_the_leading_ones_have_columns(shown: Callable[..., str]) -> None:
    plain = shown(128)
    assert "and 112 more" in plain
    assert "(the 16 experts with the largest shares, of 128)" in plain
    assert plain.count("\nexpert ") == 16


@pytest.mark.parametrize(("n_expert", "group"), [(40, 1), (128, 3), (256, 6)])
def test_all_of_many_experts_are_in_a_strip(n_expert: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    trace = random_trace(40, 2, n_expert, 4)
    stream = Stream(terminal=False, encoding="ascii")
    RouteView(stream).summary(trace, summarize(trace), None)
    lines = stream.getvalue().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("layer  others"))
    assert ("a character for each" if group == 1 else f"a character for every {group}") in lines[start]
    share = summarize(trace).share
    for row, line in enumerate(lines[start + 1 : start + 3]):
        others, strip = float(line[6:12]), line[14:].ljust(-(-n_expert // group))
        shown = list(trace.leading_experts(16))
        assert others == pytest.approx(100 * (1 - share[row, shown].sum()), abs=0.06)
        assert len(strip) == -(-n_expert // group)
        for i, shade in enumerate(strip):
            most = share[row, i * group : (i + 1) * group].max() * n_expert
            assert " .:+#".index(shade) == min(4, math.ceil(most))
    assert max(map(len, lines)) <= 60


def test_tokens_cannot_command_the_terminal() -> None:
    trace = trace_of([[[0.6, 0.4]], [[0.4, 0.6]]], 2, texts=["\x1b[2J\x07", "a\nb\n"], n_prompt=1)
    stream = Stream(terminal=False)
    RouteView(stream).text(trace, None, title="\x1b]0;x\x07")
    assert "\\x1b[2J\\x07▄ » a⏎b⏎▅\n" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def texts_shown(monkeypatch: pytest.MonkeyPatch, width: int, *, terminal: bool = True) -> list[str]:
    """Two texts as the view writes them, without colours."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "dumb")
    left = trace_of([[[0.9, 0.1]]] * 21, 2, texts=[" wonder", "ful"] * 10 + [" 日本"], n_prompt=20)
    right = trace_of([[[0.2, 0.8]]] * 3, 2, texts=["one\n", " two", "\x1b[2J"])
    stream = Stream(terminal=terminal)
    RouteView(stream).texts([("A", left), ("B", right)], 0)
    lines = stream.getvalue().splitlines()
    assert max(map(cell_width, lines)) <= width or not terminal
    assert " wonder▁ful▁ wonder▁ful▁" in stream.getvalue()
    assert not any(line.startswith("ful") for line in lines)
    return lines


def test_two_texts_stand_side_by_side_on_a_wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for width in (100, 121, 160):
        lines = texts_shown(monkeypatch, width)
        column = (width + 4) // 2
        assert lines[1] == f"{'A, layer 0':<{column}}B, layer 0"
        for line, right in zip(lines[2:], ("one⏎▇", " two▇\\x1b[2J▇"), strict=False):
            assert line.endswith(right)
            assert cell_width(line.removesuffix(right)) == column
        assert "".join(lines).count("wonder▁ful▁") == 10
        assert lines[-1] == "(1 token after » generated)"


@pytest.mark.parametrize(("width", "terminal"), [(99, True), (60, True), (160, False)])
def test_two_texts_stand_one_below_the_other_elsewhere(
    monkeypatch: pytest.MonkeyPatch, width: int, terminal: bool
) -> None:
    lines = texts_shown(monkeypatch, width, terminal=terminal)
    assert "A, layer 0" in lines
    assert lines[lines.index("B, layer 0") :] == ["B, layer 0", "one⏎▇", " two▇\\x1b[2J▇"]


@pytest.mark.parametrize("width", [20, 60, 120])
def test_words_of_a_text_are_not_split(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "dumb")
    words = [" un", "believ", "able"] * 9 + [" " + "x" * 130] + [" end"]
    stream = Stream(terminal=True)
    RouteView(stream).text(trace_of([[[0.9, 0.1]]] * len(words), 2, texts=words), None)
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "".join(lines[2:]).count(" un▁believ▁able▁") == 9
    assert sum("un▁believ▁able▁" in line for line in lines) >= (9 if width == 20 else 1)
    assert all(not line.startswith(("believ", "able")) for line in lines)
    assert "".join(lines[2:]).endswith("x" * 130 + "▁ end▁")
