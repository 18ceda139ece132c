"""The page: well-formed, self-contained, escaped, readable as tables; and the picture."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from ggufmoe.errors import OptionError
from ggufmoe.routing import RoutingTrace
from ggufmoe.routing.page import routing_page
from ggufmoe.routing.palette import expert_colour
from ggufmoe.routing.plot import write_picture
from ggufmoe.routing.statistics import share_by_label
from tests.routing.traces import random_trace, trace_of

EVIL = '</script><script>alert(1)</script><img src="http://x.example/y" onerror=\'z\'>"&\x1b'
VOID = {"meta", "br"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    children: list[Element] = field(default_factory=list)
    text: str = ""

    def all(self, tag: str) -> list[Element]:
        found = [self] if self.tag == tag else []
        return found + [one for child in self.children for one in child.all(tag)]

    @property
    def words(self) -> str:
        return self.text + "".join(child.words for child in self.children)


class Reader(HTMLParser):
    """A parser that fails where tags are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Element("root", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].text += data


def parse(page: str) -> Element:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == [reader.root]
    return reader.root


def tokens(root: Element) -> list[Element]:
    return [span for span in root.all("span") if "data-e" in span.attributes]


@pytest.fixture
def trace() -> RoutingTrace:
    rows = [[[0.75, 0.25], [0.5, 0.5]], [[0.1, 0.9], [0.2, 0.8]], [[0.6, 0.4], [0.9, 0.1]]]
    return trace_of(rows, 2, texts=["<s>", EVIL, " end\n"], n_prompt=2)


def test_the_page_says_each_token_s_expert_without_colour(trace: RoutingTrace) -> None:
    root = parse(routing_page("m.gguf", [("Text", trace)]))
    spans = tokens(root)
    assert [span.attributes["data-e"] for span in spans] == ["0", "1", "0"]
    assert spans[0].attributes["title"] == "expert 0: 62.5 %, expert 1: 37.5 %"
    assert spans[2].attributes["class"] == "t generated"
    assert spans[2].words == " end⏎"


def test_numbers_stand_in_tables_with_headings(trace: RoutingTrace) -> None:
    root = parse(routing_page("m.gguf", [("Text", trace)]))
    tables = root.all("table")
    assert all(len(table.all("caption")) == 1 for table in tables)
    assert all(cell.attributes.get("scope") in ("row", "col") for table in tables for cell in table.all("th"))
    heat = tables[0]
    assert [cell.words for cell in heat.all("td")] == ["48.3 %", "51.7 %", "53.3 %", "46.7 %", "50.8 %", "49.2 %"]
    every_token = tables[-1]
    assert len(every_token.all("tr")) == 1 + trace.n_token
    assert root.all("html")[0].attributes["lang"] == "en"
    assert len(root.all("h1")) == 1


def test_text_is_escaped_everywhere(trace: RoutingTrace) -> None:
    page = routing_page(EVIL, [(EVIL, trace)], shares=share_by_label([(EVIL, trace), ("b", trace)]))
    root = parse(page)
    assert len(root.all("script")) == 2
    assert root.all("img") == []
    assert tokens(root)[1].words == EVIL.replace("\x1b", "\\x1b")
    assert "\x1b" not in page


def test_nothing_is_fetched(trace: RoutingTrace) -> None:
    page = routing_page("m.gguf", [("Text", trace.part(2))])
    root = parse(page)
    policy = next(one.attributes["content"] for one in root.all("meta") if "http-equiv" in one.attributes)
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert re.findall(r"https?:|//[a-z]|@import|url\(", page) == []
    assert {name for one in every(root) for name in one.attributes} & {"src", "href", "action", "onclick"} == set()
    assert root.all("link") + root.all("iframe") == []


def every(element: Element) -> list[Element]:
    return [element, *(one for child in element.children for one in every(child))]


def test_the_script_s_data_are_the_weights(trace: RoutingTrace) -> None:
    root = parse(routing_page("m.gguf", [("Text", trace)]))
    data = json.loads(root.all("script")[0].words)
    np.testing.assert_allclose(np.array(data["texts"][0]) / 1000, trace.expert_weights, atol=5e-4)
    assert data["layers"] == [0, 1]
    assert len(data["colours"]) == 2


def test_light_dark_and_narrow(trace: RoutingTrace) -> None:
    style = parse(routing_page("m.gguf", [("Text", trace)])).all("style")[0].words
    assert "prefers-color-scheme: dark" in style
    assert "overflow-x: auto" in style


def test_labels_are_compared_first(trace: RoutingTrace) -> None:
    shares = share_by_label([("math", trace), ("rest", trace.part(1))])
    root = parse(routing_page("m.gguf", [("math", trace), ("rest", trace)], shares=shares))
    assert [head.words for head in root.all("h2")] == ["By label", "math", "rest"]
    assert "math (3 tokens)" in root.all("table")[0].words
    sections = [one.attributes["data-number"] for one in root.all("section") if "data-number" in one.attributes]
    assert sections == ["0", "1"]


def test_a_choice_of_experts_is_said_to_be_one() -> None:
    page = routing_page("m.gguf", [("Text", random_trace(4, 2, 8, 2))])
    assert "2 of them run on each token" in page
    assert "Share of choices by layer and expert" in page


def test_the_picture_stands_below_the_text(trace: RoutingTrace) -> None:
    root = parse(routing_page("m.gguf", [("Text", trace)]))
    (picture,) = root.all("svg")
    assert picture.attributes["role"] == "img"
    assert len(picture.all("g")) == trace.n_token
    assert "layer" in root.all("figcaption")[0].words


def test_two_experts_have_a_scale_and_no_numbers(trace: RoutingTrace) -> None:
    named = replace(trace, expert_names=("every<day>", "math"))
    page = routing_page("m.gguf", [("Text", named)])
    root = parse(page)
    assert root.all("body")[0].attributes["class"] == "two"
    assert "every<day> on the left, math on the right" in root.words
    assert [one.words for one in root.all("b")] == ["every<day>", "math"]
    assert "--s:62.5%" in str(tokens(root)[0].attributes["style"])
    assert tokens(root)[0].attributes["title"] == "every<day>: 62.5 %, math: 37.5 %"
    assert "math" in [head.words for head in root.all("table")[0].all("th")]
    assert parse(routing_page("m", [("t", random_trace(3, 2, 4, 2))])).all("b") == []


def test_a_pair_stands_side_by_side(trace: RoutingTrace) -> None:
    texts = [("A", trace), ("B", trace)]
    shares = share_by_label(texts)
    root = parse(routing_page("m.gguf", texts, shares=shares))
    (pair,) = [one for one in root.all("div") if one.attributes.get("class") == "pair"]
    assert [one.tag for one in pair.children] == ["section", "section"]
    assert "class=pair" not in routing_page("m.gguf", [*texts, ("C", trace)], shares=shares).replace('"', "")


@pytest.mark.parametrize("n_expert", [128, 256])
def test_of_many_experts_the_leading_ones_are_shown(n_expert: int) -> None:
    trace = random_trace(30, 4, n_expert, 8)
    page = routing_page("m.gguf", [("Text", trace)])
    root = parse(page)
    legend = next(one for one in root.all("ul"))
    assert len(legend.all("li")) == 13
    assert f"and {n_expert - 12} more" in legend.words
    heads = [head.words for head in root.all("table")[0].all("thead")[0].all("th")]
    assert len(heads) == 14
    assert heads[-1] == "others"
    for row in root.all("table")[0].all("tbody")[0].all("tr"):
        assert sum(float(cell.words.split()[0]) for cell in row.all("td")) == pytest.approx(100, abs=0.7)
    assert len(root.all("table")[1].all("thead")[0].all("th")) == 1 + n_expert
    assert all(str(token.attributes["title"]).count("expert") <= 8 for token in tokens(root))
    data = json.loads(root.all("script")[0].words)
    assert data["sparse"]
    pairs = data["texts"][0][3][2]
    dense = dict(zip(pairs[::2], pairs[1::2], strict=True))
    np.testing.assert_allclose([dense.get(e, 0) / 1000 for e in range(n_expert)], trace.expert_shares[3, 2], atol=5e-4)
    assert len(page) < 1_500_000


def test_words_are_not_broken() -> None:
    texts = ["<s>", " un", "break", "able", " next", "\n", "x" * 20, "y" * 20, "漢", "字"]
    trace = trace_of(list(random_trace(len(texts), 2, 4, 2).probabilities), 2, texts=texts)
    root = parse(routing_page("m.gguf", [("Text", trace)]))
    words = [span.words for span in root.all("span") if span.attributes.get("class") == "word"]
    assert words == ["<s>", " unbreakable", " next", "⏎", "x" * 20, "y" * 20, "漢", "字"]


def test_facts_about_the_experts_are_told(trace: RoutingTrace) -> None:
    page = routing_page("m.gguf", [("Text", trace)], facts=[("gating", "sig<moid>")])
    assert "Gating: sig<moid>. " in parse(page).words


# ---- the picture


@pytest.mark.parametrize("n_token", [3, 200])
def test_a_picture_of_any_length(tmp_path: Path, n_token: int) -> None:
    path = tmp_path / "p.png"
    texts = ["$x^{", "漢", "\n"] + [f"t{i}" for i in range(n_token - 3)]
    trace = trace_of(list(random_trace(n_token, 2, 4, 2).probabilities), 2, texts=texts, n_prompt=2)
    write_picture(path, "m_$1.gguf", trace, layer=1)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert int.from_bytes(content[16:20], "big") >= 9 * 144 - 1


def test_the_picture_has_the_palette_s_colours_and_names(tmp_path: Path) -> None:
    from matplotlib import image

    sure = trace_of([[[1.0, 0.0]]] * 2 + [[[0.0, 1.0]]] * 2, 2, texts=["a", "b", "c", "d"])
    write_picture(tmp_path / "p.png", "m", replace(sure, expert_names=("$a", "b")))
    pixels = (image.imread(tmp_path / "p.png")[..., :3] * 255).round().astype(int)
    for expert in (0, 1):
        assert (pixels == expert_colour(expert)).all(axis=-1).any()


def test_shares_of_many_experts_are_seen_and_numbers_have_room() -> None:
    few, many = (routing_page("m", [("Text", random_trace(40, 2, n, 2))]) for n in (8, 256))
    assert 'class="many" style="--digits:3"' in many
    assert "--digits" not in few.replace("var(--digits)", "")

    def strongest(page: str) -> float:
        return max(float(alpha) for alpha in re.findall(r'<td style="--c:[\d ]+;--a:([\d.]+)"', page))

    assert strongest(few) < 0.2
    assert strongest(many) > 0.3


@pytest.mark.parametrize("n_expert", [16, 256])
def test_a_picture_of_many_experts_has_the_leading_ones(tmp_path: Path, n_expert: int) -> None:
    write_picture(tmp_path / "p.png", "m", random_trace(12, 4, n_expert, 4))
    height = int.from_bytes((tmp_path / "p.png").read_bytes()[20:24], "big")
    assert height < 144 * 10


def test_without_matplotlib_it_says_how_to_get_it(
    tmp_path: Path, trace: RoutingTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(OptionError, match=r"pip install 'ggufmoe\[plot\]'"):
        write_picture(tmp_path / "p.png", "m", trace)
