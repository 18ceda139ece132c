"""Escape sequences in names, templates, metadata, commands and answers: no verb passes one on to a terminal."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest

from ggufmoe.cli.app import exit_code
from tests.scripted import Scripted

HOSTILE = "\x1b]52;c;cm0=\x07a\rb\x1bc\x9b2J"
"""Sets the clipboard, returns to the beginning of the line, resets the terminal and clears it."""
_OWN = re.compile(r"\x1b\[([0-9;]*m|\?25[lh]|[0-9]*[AK])")
"""What the verbs themselves write: colours, and the cursor of progress lines."""


class Screen(io.StringIO):
    """A terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with escape sequences wherever its format has room for text."""
    folder = tmp_path_factory.mktemp("hostile")
    template = "{# " + HOSTILE + " #}{% for m in messages %}{{ m.content }}{% endfor %}[x]"
    metadata = {
        "general.name": HOSTILE,
        "general.description": HOSTILE,
        "general.tags": [HOSTILE],
        HOSTILE: HOSTILE,
        f"tokenizer.chat_template.{HOSTILE}": template,
    }
    model = Scripted({"[x]": HOSTILE}, pieces=["hi"], chat_template=template, metadata=metadata)
    return model.write(folder / f"m{HOSTILE}.gguf")


def screen_after(arguments: list[str], typed: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What is on a terminal after a command, stdout and stderr."""
    out, err = Screen(), Screen()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(typed))
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        exit_code(arguments)
    return out.getvalue() + err.getvalue()


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "MODEL"],
        ["inspect", "MODEL", "--recipe"],
        ["diff", "MODEL", "OTHER"],
        ["plan", "MODEL"],
        ["run", "MODEL", "hi", "-t", "1"],
        ["run", "MODEL", "hi", "--chat-template", HOSTILE],
        ["run", "MODEL", "hi", "-dev", HOSTILE],
        ["run", "MODEL", "hi", "-ot", f"{HOSTILE}=CPU"],
        ["chat", "MODEL", "-t", "1"],
        ["route", "MODEL", "hi"],
        ["bench", "MODEL", "-p", "8", "-n", "2", "-r", "1", "-t", "1"],
        ["quantize", "MODEL", "-q", "Q8_0", "--dry-run"],
        ["quantize", "MODEL", "-q", "Q8_0", "--force"],
        ["perplexity", "MODEL", "-f", HOSTILE],
        ["convert", "MODEL"],
        ["convert", HOSTILE],
        ["merge", f"{HOSTILE}.yaml", HOSTILE],
        [HOSTILE],
    ],
    ids=lambda arguments: " ".join(arguments).replace(HOSTILE, "HOSTILE"),
)
def test_a_terminal_gets_no_foreign_escape_sequence(
    arguments: list[str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TERM", "xterm")
    other = Scripted({"[x]": "a"}, metadata={"general.name": f"other {HOSTILE}"}).write(tmp_path / "n.gguf")
    words = {"MODEL": str(model), "OTHER": str(other)}
    typed = f"hi\n/{HOSTILE}\n/load {HOSTILE}\n/set {HOSTILE} 1\n/system {HOSTILE}\n/undo\n"
    shown = screen_after([words.get(word, word) for word in arguments], typed, monkeypatch)
    assert shown.strip()
    left = _OWN.sub("", shown)
    assert not set("\x1b\x07\x9b") & set(left), repr(left)
    assert "a\rb" not in left
