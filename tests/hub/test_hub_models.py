"""Names of models on the hub, and which GGUF files of a repository they mean."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_server import COMMIT, HubServer, Model

from ggufmoe.errors import HubError
from ggufmoe.hub.hub_models import HubEntry, HubListing, HubName, find_gguf, is_hub_id, list_repository, split_id
from tests.own_hub import talk_with_hub

FILES = (
    "README.md",
    "config.json",
    "small-Q8_0.gguf",
    "small-Q4_K_M.gguf",
    "small-UD-Q4_K_XL.gguf",
    "small.IQ2_xxs.gguf",
    "BF16/small-00002-of-00002.gguf",
    "BF16/small-00001-of-00002.gguf",
    "mmproj-small-F16.gguf",
    "small-imatrix.gguf",
)


def listing(*names: str) -> HubListing:
    return HubListing("org/small", COMMIT, tuple(HubEntry(name, 10, None) for name in names))


def chosen(text: str, *names: str) -> list[str]:
    name = HubName.parse(text)
    assert name is not None
    return [entry.name for entry in listing(*(names or FILES)).choose(name).entries]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubName("org/name")),
        ("org/na.me-1@main", HubName("org/na.me-1", "main")),
        ("o/n@refs/pr/1", HubName("o/n", "refs/pr/1")),
        ("org/name:Q4_K_M", HubName("org/name", quant="Q4_K_M")),
        ("org/name@v1:UD-Q4_K_XL", HubName("org/name", "v1", quant="UD-Q4_K_XL")),
        ("org/name/file.gguf", HubName("org/name", file="file.gguf")),
        ("org/name@v1/sub/file.GGUF", HubName("org/name", "v1", file="sub/file.GGUF")),
        ("org/name@refs/pr/1/file.gguf", HubName("org/name", "refs/pr/1", file="file.gguf")),
        ("name", None),
        ("model.gguf", None),
        ("folder/model.gguf", HubName("folder/model.gguf")),
        ("./org/name", None),
        ("/org/name/file.gguf", None),
        ("../org/name/file.gguf", None),
        ("a/b/c", None),
        ("org/name:", None),
        ("http://org/name", None),
        ("C:/models/a.gguf", None),
    ],
)
def test_names(text: str, expected: HubName | None) -> None:
    assert HubName.parse(text) == expected
    assert expected is None or str(expected) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/small", ["small-Q4_K_M.gguf"]),
        ("org/small:q8_0", ["small-Q8_0.gguf"]),
        ("org/small:UD-Q4_K_XL", ["small-UD-Q4_K_XL.gguf"]),
        ("org/small:Q4_K_XL", ["small-UD-Q4_K_XL.gguf"]),
        ("org/small:IQ2_XXS", ["small.IQ2_xxs.gguf"]),
        ("org/small:BF16", ["BF16/small-00001-of-00002.gguf", "BF16/small-00002-of-00002.gguf"]),
        ("org/small/small.IQ2_xxs.gguf", ["small.IQ2_xxs.gguf"]),
        (
            "org/small/BF16/small-00002-of-00002.gguf",
            ["BF16/small-00001-of-00002.gguf", "BF16/small-00002-of-00002.gguf"],
        ),
    ],
)
def test_which_files_a_name_means(text: str, expected: list[str]) -> None:
    assert chosen(text) == expected


def test_without_a_quant_it_is_q4_k_m_then_q8_0_then_the_only_one() -> None:
    assert chosen("org/small", "a-Q2_K.gguf", "a-Q8_0.gguf") == ["a-Q8_0.gguf"]
    assert chosen("org/small", "odd.gguf", "mmproj.gguf") == ["odd.gguf"]
    with pytest.raises(HubError, match=r"org/small: several models fit; name one: a-Q2_K\.gguf, a-Q3_K\.gguf"):
        chosen("org/small", "a-Q2_K.gguf", "a-Q3_K.gguf")


def test_what_does_not_fit_is_an_error_that_says_what_there_is() -> None:
    with pytest.raises(HubError, match=r"org/small:Q3_K: there is no such GGUF file; org/small has BF16, Q4_K_M, Q8_0"):
        chosen("org/small:Q3_K")
    with pytest.raises(HubError, match=r"several models fit; name one: a-7b-Q8_0\.gguf, a-8b-Q8_0\.gguf"):
        chosen("org/small:Q8_0", "a-7b-Q8_0.gguf", "a-8b-Q8_0.gguf")
    with pytest.raises(HubError, match="1 of 2 parts are there"):
        chosen("org/small", "a-00002-of-00002.gguf")
    with pytest.raises(HubError, match=r"has no GGUF file of a model$"):
        chosen("org/small", "README.md", "mmproj-F16.gguf")
    with pytest.raises(HubError, match=r"no GGUF file of a model; `ggufmoe convert org/small` makes one"):
        chosen("org/small", "config.json", "model.safetensors")


def test_a_listing_has_sizes_hashes_and_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a-Q4_0.gguf").write_bytes(b"12345")
    (tmp_path / "README.md").write_bytes(b"123")
    with HubServer({"org/small": Model(tmp_path, revisions={"v2": "2" * 40})}) as hub:
        talk_with_hub(hub.url, monkeypatch)
        found = list_repository("org/small", "v2")
        gguf = find_gguf(HubName("org/small"))
        with pytest.raises(HubError, match=r"org/small@v3: there is no such revision"):
            list_repository("org/small", "v3")
        with pytest.raises(HubError, match=r"org/other is neither a local directory nor a public model"):
            find_gguf(HubName("org/other"))
    assert (found.repo_id, found.commit, gguf.commit) == ("org/small", "2" * 40, COMMIT)
    assert [(one.name, one.n_bytes, one.sha256 is not None) for one in found.entries] == [
        ("README.md", 3, False),
        ("sub/a-Q4_0.gguf", 5, True),
    ]
    assert (gguf.n_bytes, gguf.quant, gguf.name) == (5, "Q4_0", "org/small/sub/a-Q4_0.gguf")


@pytest.mark.parametrize("source", ["org/name", "org/na.me-1@main", "o/n@refs/pr/1", "mistralai/Mistral-7B-v0.2"])
def test_hub_ids(source: str) -> None:
    assert is_hub_id(source)


@pytest.mark.parametrize("source", ["name", "./org/name", "/org/name", "a/b/c", "../x", "org/name/", "o/..", "o/n@"])
def test_paths_are_not_hub_ids(source: str) -> None:
    assert not is_hub_id(source)


def test_a_revision_is_given_once() -> None:
    assert split_id("org/name@v1", None) == ("org/name", "v1")
    assert split_id("org/name", "v1") == ("org/name", "v1")
    with pytest.raises(HubError, match="names a revision already"):
        split_id("org/name@v1", "v2")
    with pytest.raises(HubError, match="not a hub id"):
        split_id("name", None)
