"""The picture of routing: well-formed, readable as text, with its own paper for light and dark."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from ggufmoe.routing.picture import routing_picture
from tests.routing.traces import random_trace, trace_of

SVG = "{http://www.w3.org/2000/svg}"


def texts(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter(f"{SVG}text")]


def test_tokens_weights_and_names_are_text() -> None:
    rows = [[[0.75, 0.25], [0.5, 0.5]], [[0.1, 0.9], [0.2, 0.8]], [[0.6, 0.4], [0.9, 0.1]]]
    trace = trace_of(rows, 2, texts=["<s>", " two <&>", " end"], n_prompt=2)
    root = ElementTree.fromstring(routing_picture("m.gguf", [trace], ["everyday", "math"]))
    assert {"m.gguf", "everyday", "math", "two <&>", "end", "62", "85", "75"} <= set(texts(root))
    assert "2 experts in 2 layers, all run for every token" in texts(root)
    titles = [element.text for element in root.iter(f"{SVG}title")]
    assert titles[0] == "Routing in m.gguf"
    assert "two <&>: everyday 15 %, math 85 %" in titles
    description = root.find(f"{SVG}desc")
    assert description is not None
    assert "everyday 51 %, math 49 %" in str(description.text)


def test_the_paper_is_its_own_in_light_and_dark() -> None:
    svg = routing_picture("m", [random_trace(5, 2, 4, 2)])
    assert "prefers-color-scheme: dark" in svg
    assert 'class="paper"' in svg
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.parametrize(("n_token", "n_layer"), [(1, 1), (300, 32)])
def test_everything_stays_on_the_paper(n_token: int, n_layer: int) -> None:
    traces = [random_trace(n_token, n_layer, 8, 2, seed) for seed in (1, 2)]
    root = ElementTree.fromstring(routing_picture("m", traces))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for rectangle in root.iter(f"{SVG}rect"):
        left, top = float(rectangle.attrib["x"]), float(rectangle.attrib["y"])
        assert 0 <= left <= left + float(rectangle.attrib["width"]) <= width
        assert 0 <= top <= top + float(rectangle.attrib["height"]) <= height
    assert all(0 < float(text.attrib["y"]) < height for text in root.iter(f"{SVG}text"))


def test_of_many_experts_the_leading_ones_are_named() -> None:
    trace = random_trace(20, 2, 128, 8)
    svg = routing_picture("m", [trace])
    named = texts(ElementTree.fromstring(svg))
    assert sum(text.startswith("expert ") for text in named) == 12
    assert "and 116 more with smaller shares" in named
    titles = [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}title")]
    assert all(title.count("expert ") <= 8 for title in titles)
