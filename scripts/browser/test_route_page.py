"""The page of ``ggufmoe route --html`` in a real browser: what is seen, pointed at, read aloud, and never fetched."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tabs import NewTab, Tab

import ggufmoe
from ggufmoe.cli.app import exit_code
from ggufmoe.routing.page import routing_page
from ggufmoe.routing.statistics import share_by_label
from tests.routing.traces import random_trace, trace_of
from tests.tiny import make_checkpoint

PROMPT = 'Once upon a time <script>alert("no")</script> there were "2 + 2"'


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The page of a tiny model with three experts, and the numbers that it shows."""
    folder = tmp_path_factory.mktemp("route")
    checkpoint = make_checkpoint(folder / "ck", n_embd=64, n_ff=64, n_expert=3, n_expert_used=2, n_layer=3)
    ggufmoe.convert(checkpoint, folder / "m.gguf", quant="F16")
    page, numbers = folder / "route.html", folder / "route.json"
    command = ["route", str(folder / "m.gguf"), PROMPT, "--generate", "6", "-t", "1"]
    assert exit_code([*command, "--html", str(page), "--json", str(numbers)]) == 0
    return page, json.loads(numbers.read_text(encoding="utf-8"))["texts"][0]


@pytest.fixture
def numbers(files: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    return files[1]


@pytest.fixture
def tab(new_tab: NewTab, files: tuple[Path, dict[str, Any]]) -> Tab:
    opened = new_tab()
    opened.look()
    opened.open_file(files[0])
    return opened


def weights(numbers: dict[str, Any], token: int, layer: int) -> list[float]:
    """Weight of each expert."""
    dense = [0.0] * numbers["n_expert"]
    for expert, weight in zip(numbers["chosen"][token][layer], numbers["weights"][token][layer], strict=True):
        dense[expert] = weight
    return dense


def mean(numbers: dict[str, Any], token: int) -> list[float]:
    layers = range(len(numbers["layers"]))
    rows = [weights(numbers, token, layer) for layer in layers]
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def best(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def test_the_page_renders_and_fetches_nothing(tab: Tab, files: tuple[Path, dict[str, Any]]) -> None:
    assert tab.page.evaluate("document.title") == "Routing in m.gguf"
    shown = tab.page.evaluate("[...document.querySelectorAll('.t')].map(t => t.textContent)")
    assert len(shown) == len(files[1]["tokens"])
    assert "".join(shown).startswith("<s>")
    assert tab.page.evaluate("document.querySelectorAll('script').length") == 2
    tab.page.hover(".t")
    tab.page.hover("table td")
    assert tab.requests == [files[0].resolve().as_uri()]
    assert tab.complaints == []


DETAIL = "[...document.querySelectorAll('.detail tr')].map(row => [...row.cells].map(cell => cell.textContent))"


def test_hover_shows_the_numbers(tab: Tab, numbers: dict[str, Any]) -> None:
    for token in (0, 4, len(numbers["tokens"]) - 1):
        tab.page.hover(f".t[data-i='{token}']")
        rows = tab.page.evaluate(
            "[...document.querySelectorAll('.detail tr')].map(r => [...r.cells].map(c => c.textContent))"
        )
        assert tab.page.evaluate("document.querySelector('.detail strong').textContent").startswith(
            f"Token {token + 1}: "
        )
        assert rows[0] == ["layer", *map(str, numbers["layers"]), "mean"]
        for expert, row in enumerate(rows[1:]):
            assert row[0] == f"expert {expert}"
            for layer, cell in enumerate(row[1:-1]):
                weight = weights(numbers, token, layer)[expert]
                assert cell == "–" if not weight else float(cell.split()[0]) == pytest.approx(100 * weight, abs=0.11)
            assert float(row[-1].split()[0]) == pytest.approx(100 * mean(numbers, token)[expert], abs=0.11)


def test_a_layer_can_be_chosen(tab: Tab, numbers: dict[str, Any]) -> None:
    marks = "[...document.querySelectorAll('.t')].map(t => t.dataset.e)"
    tokens = range(len(numbers["tokens"]))
    assert tab.page.evaluate(marks) == [str(best(mean(numbers, token))) for token in tokens]
    tab.page.evaluate(
        "(s => { s.value = '1'; s.dispatchEvent(new Event('change')); })(document.querySelector('select'))"
    )
    assert tab.page.evaluate(marks) == [str(best(weights(numbers, token, 1))) for token in tokens]


def test_the_keyboard_reaches_every_token(tab: Tab) -> None:
    tab.page.evaluate("document.querySelector('.t').focus()")
    tab.page.keyboard.press("ArrowRight")
    tab.page.keyboard.press("ArrowRight")
    assert (tab.page.text_content(".detail strong") or "").startswith("Token 3: ")
    tab.page.keyboard.press("ArrowLeft")
    assert tab.page.evaluate("[...document.querySelectorAll('.t')].indexOf(document.activeElement)") == 1


CONTRAST = """(() => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const over = (top, below) => {
    const alpha = top[3] ?? 1;
    return [0, 1, 2].map((i) => top[i] * alpha + below[i] * (1 - alpha));
  };
  const light = (colour) => {
    const [r, g, b] = colour.map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
  const paper = parts(getComputedStyle(document.body).backgroundColor);
  const all = [...document.querySelectorAll(".t, td, th, caption, p.note, dt, dd, summary, h1, h2")].map((element) => {
    const style = getComputedStyle(element);
    const back = over(parts(style.backgroundColor), paper);
    const inks = [parts(style.color)];
    if (element.matches(".t")) inks.push(parts(getComputedStyle(element, "::after").color));
    return Math.min(...inks.map((ink) => ratio(over(ink, back), back)));
  });
  return [Math.min(...all), light(paper)];
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_can_be_read(tab: Tab, scheme: str) -> None:
    """Contrast as the Web Content Accessibility Guidelines want it, 4.5 to 1, of text on whatever lies below it."""
    tab.look(scheme=scheme)
    contrast, paper = tab.page.evaluate(CONTRAST)
    assert contrast >= 4.5
    assert (paper > 0.5) == (scheme == "light")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_colour_at_its_strongest_can_be_read(new_tab: NewTab, tmp_path: Path, scheme: str) -> None:
    """Each of twelve experts has a token, and a layer's share, for itself."""
    sure = np.eye(12, dtype=np.float32)[:, None]
    parts = [(f"{expert}", trace_of([sure[expert]], 1)) for expert in range(12)]
    (tmp_path / "page.html").write_text(routing_page("m", parts), encoding="utf-8")
    tab = new_tab()
    tab.look(scheme=scheme)
    tab.open_file(tmp_path / "page.html")
    assert tab.page.evaluate("document.querySelectorAll('.t').length") == 12
    assert tab.page.evaluate(CONTRAST)[0] >= 4.5


def test_a_narrow_window_scrolls_tables_and_not_the_page(tab: Tab) -> None:
    tab.look(width=360)
    tab.page.hover(".t")
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 360


def test_many_experts_are_folded_and_pointed_at(new_tab: NewTab, tmp_path: Path) -> None:
    trace = random_trace(40, 6, 256, 8)
    (tmp_path / "page.html").write_text(routing_page("m", [("Text", trace)]), encoding="utf-8")
    tab = new_tab()
    tab.look()
    tab.open_file(tmp_path / "page.html")
    tab.page.hover(".t[data-i='7']")
    rows = tab.page.evaluate(DETAIL)
    assert len(rows) == 9
    order = np.argsort(-trace.mean_weights()[7])[:8]
    assert {row[0] for row in rows[1:]} == {f"expert {expert}" for expert in order}
    assert float(rows[1][-1].split()[0]) == pytest.approx(100 * trace.mean_weights()[7].max(), abs=0.11)
    assert tab.page.evaluate("document.querySelectorAll('.legend li').length") == 13
    assert tab.complaints == []


def test_two_experts_have_a_bar_below_each_token(new_tab: NewTab, tmp_path: Path) -> None:
    name = '<img src=x onerror="document.title=1">'
    trace = replace(
        trace_of([[[0.9, 0.1], [0.3, 0.7]], [[0.2, 0.8], [0.4, 0.6]]], 2, texts=["a", name]),
        expert_names=(name, "math"),
    )
    (tmp_path / "page.html").write_text(routing_page(name, [(name, trace)]), encoding="utf-8")
    tab = new_tab()
    tab.look()
    tab.open_file(tmp_path / "page.html")
    parts = "[...document.querySelectorAll('.t')].map(t => t.style.getPropertyValue('--s'))"
    assert tab.page.evaluate(parts) == ["60.0%", "30.0%"]
    tab.page.evaluate(
        "(s => { s.value = '0'; s.dispatchEvent(new Event('change')); })(document.querySelector('select'))"
    )
    assert tab.page.evaluate(parts) == ["90.0%", "20.0%"]
    assert "gradient" in tab.page.evaluate("getComputedStyle(document.querySelector('.t'), '::after').backgroundImage")
    tab.page.hover(".t[data-i='1']")
    assert [row[0] for row in tab.page.evaluate(DETAIL)] == ["layer", name, "math"]
    assert tab.page.evaluate("document.images.length") == 0
    assert tab.page.evaluate("document.title") == f"Routing in {name}"


def test_a_pair_stands_side_by_side_where_there_is_room(new_tab: NewTab, tmp_path: Path) -> None:
    trace = random_trace(30, 2, 2, 2)
    texts = [("A", trace), ("B", trace)]
    (tmp_path / "page.html").write_text(routing_page("m", texts, shares=share_by_label(texts)), encoding="utf-8")
    tab = new_tab()
    tops = "[...document.querySelectorAll('[data-number]')].map(one => one.getBoundingClientRect().top)"
    for width, beside in ((1400, True), (700, False)):
        tab.look(width=width)
        tab.open_file(tmp_path / "page.html")
        first, second = tab.page.evaluate(tops)
        assert (first == second) == beside
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize(("width", "most_hidden"), [(1400, 0), (800, 0), (400, 500)])
def test_text_and_picture_lie_within_the_window(new_tab: NewTab, tmp_path: Path, width: int, most_hidden: int) -> None:
    """Only what would be too small to read is scrolled to: the picture in a narrow window."""
    trace = replace(random_trace(60, 2, 2, 2), expert_names=("everyday", "mathematics"))
    texts = [("A", trace), ("B", trace)]
    (tmp_path / "page.html").write_text(routing_page("m", texts, shares=share_by_label(texts)), encoding="utf-8")
    tab = new_tab()
    tab.look(width=width)
    tab.open_file(tmp_path / "page.html")
    boxes = "[...document.querySelectorAll('.scroll:has({})')]"
    hidden = f"Math.max(...{boxes}.map(box => box.scrollWidth - box.clientWidth))"
    assert tab.page.evaluate(hidden.format("table.words")) == 0
    assert tab.page.evaluate(hidden.format("svg.routing")) <= most_hidden
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_screen_reader_meets_names(tab: Tab, numbers: dict[str, Any]) -> None:
    met = tab.accessible()
    assert ("heading", "Routing in m.gguf") in met
    assert ("combobox", "Colour by") in met
    assert ("list", "Colours of the experts") in met
    tables = [name for role, name in met if role == "table"]
    assert tables
    assert all(tables)
    assert {("columnheader", f"expert {expert}") for expert in range(numbers["n_expert"])} <= set(met)


def test_without_scripts_all_numbers_are_there(new_tab: NewTab, files: tuple[Path, dict[str, Any]]) -> None:
    tab = new_tab(java_script_enabled=False)
    tab.open_file(files[0])
    names = [name for role, name in tab.accessible() if role in ("table", "caption", "StaticText")]
    assert any("Share of choices by layer and expert" in name for name in names)
    assert "Colour by" not in names
    assert any(role == "table" for role, _ in tab.accessible())
