"""The chat window of ``examples``, offscreen, with models that say what the test wants."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ["QT_QPA_PLATFORM"] = "offscreen"
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from desktop_chat import STYLE, ChatWindow, Settings, SettingsDialog  # noqa: E402
from PySide6.QtCore import Qt  # noqa: E402
from PySide6.QtTest import QTest  # noqa: E402
from PySide6.QtWidgets import QApplication, QLabel  # noqa: E402

from ggufmoe import EngineError  # noqa: E402
from tests.scripted import Scripted  # noqa: E402

TEMPLATE = "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}[assistant]"
LIMIT_S = 60


def wait(condition: Callable[[], object]) -> None:
    """Let the window work until it is so."""
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, "the window did not come to it"
        QTest.qWait(10)


@pytest.fixture(scope="session")
def app() -> Iterator[QApplication]:
    app = QApplication([])
    app.setStyleSheet(STYLE)
    yield app
    gc.collect()


@pytest.fixture
def window(app: QApplication) -> Iterator[ChatWindow]:
    window = ChatWindow()
    window.show()
    window.apply(Settings(n_ctx=8192, n_threads=1))
    yield window
    window.close()


def model(path: Path, answer: str, **fields: object) -> Path:
    """Says ``answer`` to every question, and then, if the answer is ``on``, that for ever."""
    follows = {"[assistant]": f" {answer}", " on": " on"}
    pieces = ("[user]", "[system]", f" {answer}")
    return Scripted(follows, pieces=pieces, chat_template=TEMPLATE, n_ctx_train=8192, **fields).write(path)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def brief(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("brief") / "brief.gguf", "hello")


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("endless") / "endless.gguf", "on")


def texts(window: ChatWindow, kind: str) -> list[str]:
    shown = window.transcript.findChildren(QLabel, kind)
    return [label.text() for label in shown if not label.isHidden()]


def load(window: ChatWindow, path: Path) -> None:
    window.open_model(path)
    wait(lambda: window.busy is None)
    assert window.name.text() == path.stem


def ask(window: ChatWindow, text: str) -> None:
    QTest.keyClicks(window.prompt, text)
    QTest.keyClick(window.prompt, Qt.Key.Key_Return)


def test_a_model_is_opened_and_answers(window: ChatWindow, brief: Path) -> None:
    assert texts(window, "welcome") != []
    assert not window.button.isEnabled()
    parts: list[int] = []
    window.progress.valueChanged.connect(parts.append)
    load(window, brief)
    assert parts[-1] == 1000
    assert texts(window, "welcome") == []
    ask(window, "hi")
    wait(lambda: window.busy is None)
    assert (texts(window, "question"), texts(window, "answer")) == (["hi"], ["hello"])
    assert "1 tokens" in window.status.text()
    window.start_over()
    QTest.qWait(20)
    assert texts(window, "question") == []


def test_what_a_model_thinks_is_shown_above_its_answer(window: ChatWindow, tmp_path: Path) -> None:
    follows = {"[assistant]": "<think>", "<think>": " Hm", " Hm": "</think>", "</think>": " hello"}
    template = TEMPLATE.replace("[assistant]", "{% if 0 %}<think></think>{% endif %}[assistant]")
    thinker = Scripted(
        follows,
        pieces=("[user]", "[system]", " hello"),
        controls=["<think>", "</think>"],
        chat_template=template,
        n_ctx_train=8192,
    )
    load(window, thinker.write(tmp_path / "thinker.gguf"))
    ask(window, "hi")
    wait(lambda: window.busy is None)
    assert (texts(window, "thought"), texts(window, "answer")) == (["Hm"], ["hello"])


def test_an_answer_is_streamed_and_stopped(window: ChatWindow, endless: Path) -> None:
    load(window, endless)
    ask(window, "hi")
    wait(lambda: len(texts(window, "answer")[0]) > 20)
    assert window.button.text() == "Stop"
    QTest.mouseClick(window.button, Qt.MouseButton.LeftButton)
    wait(lambda: window.busy is None)
    assert "stopped" in window.status.text()
    assert texts(window, "answer")[0].startswith("on on on")
    assert window.button.text() == "Send"


def test_another_model_is_opened_in_the_middle_of_an_answer(window: ChatWindow, endless: Path, brief: Path) -> None:
    load(window, endless)
    ask(window, "hi")
    wait(lambda: len(texts(window, "answer")[0]) > 5)
    first = window._talker._engine
    assert first is not None
    load(window, brief)
    assert first is not window._talker._engine
    with pytest.raises(EngineError, match="closed"):
        first.tokenize("a")
    ask(window, "and now")
    wait(lambda: window.busy is None)
    assert texts(window, "answer")[-1] == "hello"


def test_errors_are_one_line_in_the_window(window: ChatWindow, brief: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(60))
    window.open_model(tmp_path / "broken.gguf")
    wait(lambda: window.busy is None)
    assert window.error.isVisible()
    assert "broken.gguf" in window.error.text()
    assert "\n" not in window.error.text()
    assert not window.prompt.isEnabled()
    load(window, brief)
    assert not window.error.isVisible()
    window.prompt.setPlainText("far too long " * 3000)
    window.send()
    wait(lambda: window.busy is None)
    assert "context" in window.error.text()
    assert texts(window, "answer") == []


def test_loading_is_stopped(window: ChatWindow, brief: Path) -> None:
    window.open_model(brief)
    assert window.progress.isVisible()
    window.stop()
    wait(lambda: window.busy is None)
    assert window.status.text() == "Stopped"
    assert not window.prompt.isEnabled()


def test_settings_reach_the_model(window: ChatWindow, brief: Path) -> None:
    dialog = SettingsDialog(window, Settings("be kind", 512, 1))
    assert dialog.settings() == Settings("be kind", 512, 1)
    load(window, brief)
    window.apply(dialog.settings())
    wait(lambda: window.busy is None)
    assert "512 tokens" in window.facts.text()
    ask(window, "hi")
    wait(lambda: window.busy is None)
    assert window._talker._chat is not None
    assert window._talker._chat.system == "be kind"


def test_the_window_is_closed_in_the_middle_of_an_answer(app: QApplication, endless: Path) -> None:
    window = ChatWindow()
    window.show()
    window.apply(Settings(n_ctx=8192, n_threads=1))
    load(window, endless)
    ask(window, "hi")
    wait(lambda: len(texts(window, "answer")[0]) > 5)
    window.close()
    assert window._thread.isFinished()
    assert window._talker._engine is None
    assert not any(thread.name.startswith("ggufmoe") for thread in threading.enumerate())
