"""The page's files: what is served, with which headers, to whom, and nothing else."""

from __future__ import annotations

import asyncio
import hashlib
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import pytest

from ggufmoe.errors import EngineError
from ggufmoe.options import ServerOptions
from ggufmoe.server.modelhost import ModelHost
from ggufmoe.server.page_files import PAGE_PATHS
from ggufmoe.server.webapp import web_app

FOLDER = Path(str(files("ggufmoe.server"))) / "page"


def loads_nothing(*_: Any) -> Any:
    raise EngineError("the page needs no model")


def get(path: str, *keys: str, method: str = "GET", **headers: str) -> httpx.Response:
    """The response of a server that has not loaded its model."""
    app = web_app(ModelHost(loads_nothing), "m", ServerOptions(), keys)
    names = {name.replace("_", "-"): value for name, value in headers.items()}

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8080") as client:
            return await client.request(method, path, headers=names)

    return asyncio.run(ask())


@pytest.mark.parametrize("path", sorted(PAGE_PATHS))
def test_every_file_is_served_without_a_key_under_the_policy(path: str) -> None:
    answer = get(path, "secret")
    assert answer.status_code == 200
    assert answer.content
    policy = dict(part.strip().partition(" ")[::2] for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    kinds = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml", "LICENSE": "text/plain"}
    assert answer.headers["content-type"].split(";")[0] == kinds.get(path.rpartition(".")[2], "text/html")


def test_what_is_known_is_not_sent_again() -> None:
    first = get("/")
    again = get("/", if_none_match=first.headers["etag"])
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["content-security-policy"] == first.headers["content-security-policy"]
    assert get("/", if_none_match='"other"').content == first.content


@pytest.mark.parametrize(
    "path",
    [
        "/page/",
        "/page",
        "/page/none.js",
        "/page/vendor/README.md",
        "/page/..%2fguard.py",
        "/page/%2e%2e/%2e%2e/guard.py",
        "//etc/passwd",
        "/page/app.js/",
        "/index.html",
        "/static/../../etc/passwd",
    ],
)
def test_nothing_else_of_the_file_system_is_served(path: str) -> None:
    answer = get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["message"]


def test_the_page_is_only_read() -> None:
    assert get("/", method="POST").status_code == 405
    assert get("/", method="HEAD").status_code == 200


def test_a_page_of_another_name_that_leads_here_does_not_get_it() -> None:
    assert get("/", Host="evil.example").status_code == 403


def test_the_api_still_wants_the_key() -> None:
    assert get("/v1/models", "secret").status_code == 401
    assert get("/v1/models", "secret", Authorization="Bearer secret").status_code == 200
    same = {"Origin": "http://127.0.0.1:8080", "Authorization": "Bearer secret"}
    assert get("/v1/models", "secret", **same).status_code == 200
    assert get("/v1/models", "secret", **(same | {"Origin": "http://evil.example"})).status_code == 403


def test_every_file_of_the_folder_is_served_or_told_where_it_is_from() -> None:
    sources = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file()}
    served = {"index.html" if path == "/" else path.removeprefix("/page/") for path in PAGE_PATHS}
    served = {
        {"marked.js": "vendor/marked.esm.js", "marked.LICENSE": "vendor/marked.LICENSE"}.get(p, p) for p in served
    }
    assert sources == served - {"palette.js"} | {"vendor/README.md"}


def test_the_page_names_only_files_that_are_served_and_has_no_script_of_its_own() -> None:
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    named = {f"/{path}" for path in re.findall(r'(?:href|src)="([^"#]+)"', html)}
    assert named <= PAGE_PATHS
    assert re.findall(r"<script(?![^>]* src=)|\son\w+=|\sstyle=|<style", html) == []
    for script in FOLDER.glob("*.js"):
        code = script.read_text(encoding="utf-8")
        assert {f"/page/{name}" for name in re.findall(r'from "\./([^"]+)"', code)} <= PAGE_PATHS
        assert "innerHTML" not in code


def test_the_library_is_the_one_that_is_recorded() -> None:
    record = (FOLDER / "vendor" / "README.md").read_text(encoding="utf-8")
    code = (FOLDER / "vendor" / "marked.esm.js").read_bytes()
    assert hashlib.sha256(code).hexdigest() in record
    version = re.search(rb"marked v([\d.]+)", code)
    assert version is not None
    assert f"marked@{version[1].decode()}" in record
    assert "MIT" in record
    assert "Permission is hereby granted" in (FOLDER / "vendor" / "marked.LICENSE").read_text(encoding="utf-8")
