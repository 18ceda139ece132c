"""Lets huggingface_hub, in this process, talk with a hub of our own (``scripts/hub_server.py``)."""

from __future__ import annotations

from pathlib import Path

import pytest


def talk_with_hub(url: str, monkeypatch: pytest.MonkeyPatch, cache: Path | None = None) -> None:
    """Until the end of the test: the hub is at ``url``, and its cache in ``cache`` if that is given."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    for module in ("constants", "file_download"):  # huggingface_hub before 1.0 has it in both
        monkeypatch.setattr(f"huggingface_hub.{module}.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    if cache is not None:
        for module in ("constants", "file_download"):
            monkeypatch.setattr(f"huggingface_hub.{module}.HF_HUB_CACHE", str(cache), raising=False)
