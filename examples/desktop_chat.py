"""A chat window: open a model, watch it load, talk with it, stop it, switch to another one.

    pip install "ggufmoe[desktop]"
    python examples/desktop_chat.py [MODEL.gguf]

The model lives in a thread of its own (``Talker``), which speaks with the window through Qt's signals alone, so the
window never waits. Each task is given a ``threading.Event``; setting it stops the task, whatever it is doing.
"""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from PySide6.QtCore import QObject, Qt, QThread, Signal, Slot
from PySide6.QtGui import QCloseEvent, QKeyEvent
from PySide6.QtWidgets import (
    QApplication,
    QDialog,
    QDialogButtonBox,
    QFileDialog,
    QFormLayout,
    QFrame,
    QHBoxLayout,
    QLabel,
    QMainWindow,
    QPlainTextEdit,
    QProgressBar,
    QPushButton,
    QScrollArea,
    QSizePolicy,
    QSpinBox,
    QVBoxLayout,
    QWidget,
)

from ggufmoe import Cancelled, Chat, ContextOptions, Engine, GgufmoeError, SamplingOptions
from ggufmoe.runtime.events import Finished, Reasoning
from ggufmoe.work import Progress

DRAW_S = 0.03
"""The least time between two drawings of an answer that grows."""
STYLE = """
QWidget { font-size: 15px; color: #1f2430; }
QMainWindow, QDialog, #page, #transcript { background: #f5f6f8; }
QScrollArea { border: none; }
#header, #footer { background: #ffffff; }
#header { border-bottom: 1px solid #e3e6eb; }
#footer { border-top: 1px solid #e3e6eb; }
#model { font-size: 16px; font-weight: 600; }
#facts, #status, #divider { color: #6b7280; font-size: 13px; }
#divider { padding: 6px; }
#welcome { color: #6b7280; font-size: 17px; }
#error { background: #fdecec; color: #9b1c1c; border-bottom: 1px solid #f5c2c2; padding: 10px 24px; font-size: 14px; }
#question { background: #2f5bd7; color: #ffffff; border-radius: 16px; padding: 11px 16px; }
#thought { color: #6b7280; font-style: italic; padding: 0 16px; }
#answer { background: #ffffff; border: 1px solid #e3e6eb; border-radius: 16px; padding: 11px 16px; }
QPlainTextEdit { background: #ffffff; border: 1px solid #d3d7de; border-radius: 12px; padding: 6px 8px; }
QPlainTextEdit:focus { border-color: #2f5bd7; }
QSpinBox { background: #ffffff; border: 1px solid #d3d7de; border-radius: 8px; padding: 5px 8px; min-width: 110px; }
QPushButton { background: #ffffff; border: 1px solid #d3d7de; border-radius: 10px; padding: 8px 16px; }
QPushButton:hover { border-color: #2f5bd7; }
QPushButton:disabled { color: #a3a9b5; border-color: #e3e6eb; }
#send { background: #2f5bd7; border-color: #2f5bd7; color: #ffffff; font-weight: 600; min-width: 64px; padding: 13px; }
#send:disabled { background: #b9c6ee; border-color: #b9c6ee; }
QScrollBar:vertical { background: transparent; width: 10px; margin: 2px; }
QScrollBar::handle:vertical { background: #c9ced8; border-radius: 3px; min-height: 32px; }
QScrollBar::add-line, QScrollBar::sub-line { height: 0; }
QProgressBar { background: #e3e6eb; border: none; max-height: 3px; }
QProgressBar::chunk { background: #2f5bd7; }
"""

Widget = TypeVar("Widget", bound=QWidget)

STOPS = "background: #ffffff; color: #b42318; border-color: #e5a9a3;"


@dataclass(frozen=True)
class Settings:
    """What the user has chosen; 0 stands for the library's own choice."""

    system: str = ""
    n_ctx: int = 0
    n_threads: int = 0

    def context(self) -> ContextOptions:
        return ContextOptions(n_ctx=self.n_ctx or None, n_threads=self.n_threads or None)


@dataclass(frozen=True)
class Task:
    """One thing for the talker to do: load the model at ``path``, or answer ``text``. ``stop`` ends it early."""

    settings: Settings
    path: Path | None = None
    text: str = ""
    stop: threading.Event = field(default_factory=threading.Event)


class Talker(QObject):
    """Owns the engine; lives in a thread of its own. ``ended`` comes after each task, with a word on how it went."""

    progressed = Signal(float)
    loaded = Signal(str, int)
    thought = Signal(str)
    said = Signal(str)
    failed = Signal(str)
    ended = Signal(object, str)

    def __init__(self) -> None:
        super().__init__()
        self._engine: Engine | None = None
        self._chat: Chat | None = None

    @Slot(object)
    def do(self, task: Task) -> None:
        status = ""
        try:
            if task.path is not None:
                self._load(task, task.path)
            elif self._chat is not None:
                status = self._answer(task, self._chat)
        except Cancelled:
            status = "Stopped"
        except GgufmoeError as error:
            self.failed.emit(str(error))
        finally:
            self.ended.emit(task, status)

    def _load(self, task: Task, path: Path) -> None:
        # before the next model is loaded, so that never two are in memory
        self.close()

        def show(progress: Progress) -> None:  # in a thread of the engine, where a signal may be emitted
            self.progressed.emit(progress.done)

        self._engine = Engine(path, task.settings.context(), on_progress=show, cancel=task.stop)
        self._chat = Chat(self._engine, sampling=SamplingOptions(n_predict=-1))
        self.loaded.emit(path.name, self._engine.n_ctx)

    def _answer(self, task: Task, chat: Chat) -> str:
        chat.system = task.settings.system or None
        thoughts, held, shown_at, summary = "", "", 0.0, ""
        for event in chat.send(task.text, cancel=task.stop):
            held += event.text
            if isinstance(event, Reasoning):
                thoughts += event.reasoning
            if isinstance(event, Finished):
                summary = _summary(event)
            # a fast model has tokens more often than a window can be drawn
            if summary or time.monotonic() > shown_at + DRAW_S:
                self.thought.emit(thoughts)
                self.said.emit(held)
                thoughts, held, shown_at = "", "", time.monotonic()
        return summary

    @Slot()
    def forget(self) -> None:
        """Begin a new conversation with the same model."""
        if self._chat is not None:
            self._chat.reset()

    def close(self) -> None:
        """Give the model's memory back."""
        self._chat = None
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    @Slot()
    def leave(self) -> None:
        """End the thread, after what was asked before."""
        self.close()
        self.thread().quit()


def _summary(event: Finished) -> str:
    notes = {"length": "cut short", "context": "the context is full", "cancelled": "stopped"}
    timing = event.timing
    facts = f"{timing.generated_tokens} tokens · {timing.generated_tokens_per_s:.1f} per second"
    return f"{facts} · {notes[event.reason]}" if event.reason in notes else facts


def named(name: str, widget: Widget) -> Widget:
    """Give ``widget`` the name by which ``STYLE`` knows it."""
    widget.setObjectName(name)
    return widget


class Transcript(QScrollArea):
    """The conversation as bubbles; follows its end while the reader is there."""

    def __init__(self) -> None:
        super().__init__()
        self._page = named("transcript", QWidget())
        self._rows = QVBoxLayout(self._page)
        self._rows.setContentsMargins(24, 20, 24, 20)
        self._rows.setSpacing(12)
        self._welcome = named("welcome", QLabel(alignment=Qt.AlignmentFlag.AlignCenter))
        self._rows.addWidget(self._welcome, 1)
        self._rows.addStretch()
        self._thought: QLabel | None = None
        self._answer: QLabel | None = None
        self._follows = True
        self.setWidget(self._page)
        self.setWidgetResizable(True)
        self.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        bar = self.verticalScrollBar()
        bar.valueChanged.connect(lambda value: setattr(self, "_follows", value >= bar.maximum() - 4))
        bar.rangeChanged.connect(lambda _, end: bar.setValue(end) if self._follows else None)

    def ask(self, text: str) -> None:
        """A question, and an empty answer that ``think`` and ``say`` fill."""
        self._follows = True
        self._add_bubble("question", text)
        self._thought = self._add_bubble("thought", "")
        self._thought.hide()
        self._answer = self._add_bubble("answer", "…")

    def think(self, text: str) -> None:
        """Show what a reasoning model thinks before it answers."""
        if self._thought is not None and text:
            self._thought.setText((self._thought.text() + text).lstrip())
            self._thought.show()

    def say(self, text: str) -> None:
        if self._answer is not None and text:
            self._answer.setText(self._answer.text().removesuffix("…") + text)

    def end(self) -> None:
        """The answer is complete; one that never began is taken away."""
        if self._answer is not None and self._answer.text() == "…":
            self._answer.hide()
        self._answer = None

    def divide(self, text: str) -> None:
        self._rows.addWidget(named("divider", QLabel(text)), alignment=Qt.AlignmentFlag.AlignHCenter)

    def clear(self) -> None:
        for child in self._page.findChildren(QWidget, options=Qt.FindChildOption.FindDirectChildrenOnly):
            if child is not self._welcome:
                self._rows.removeWidget(child)
                child.deleteLater()

    def welcome(self, text: str | None) -> None:
        """What is shown in the middle of an empty page."""
        self._welcome.setText(text or "")
        self._welcome.setVisible(text is not None)

    def _add_bubble(self, kind: str, text: str) -> QLabel:
        bubble = named(kind, QLabel(text))
        bubble.setTextFormat(Qt.TextFormat.PlainText)
        bubble.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)
        bubble.setSizePolicy(QSizePolicy.Policy.Preferred, QSizePolicy.Policy.Minimum)
        row = QWidget(self._page)
        line = QHBoxLayout(row)
        line.setContentsMargins(0, 0, 0, 0)
        line.addWidget(bubble)
        bubble.ensurePolished()
        # a short question is as wide as its text
        is_wide = kind != "question" or bubble.sizeHint().width() > 0.7 * self.width()
        bubble.setWordWrap(is_wide)
        line.setStretch(0, 4 if is_wide else 0)
        line.insertStretch(0 if kind == "question" else 1, 1)
        self._rows.addWidget(row)
        return bubble


class Prompt(QPlainTextEdit):
    """Where the user writes: Enter sends, Shift+Enter begins a new line."""

    sent = Signal()

    def __init__(self) -> None:
        super().__init__()
        self.setPlaceholderText("Write a message")
        self.setFixedHeight(56)

    def keyPressEvent(self, event: QKeyEvent) -> None:  # noqa: N802 (Qt's name)
        is_enter = event.key() in (Qt.Key.Key_Return, Qt.Key.Key_Enter)
        if is_enter and not event.modifiers() & Qt.KeyboardModifier.ShiftModifier:
            self.sent.emit()
        else:
            super().keyPressEvent(event)


class SettingsDialog(QDialog):
    """System prompt, context and threads."""

    def __init__(self, parent: QWidget, settings: Settings) -> None:
        super().__init__(parent)
        self.setWindowTitle("Settings")
        self.system = QPlainTextEdit(settings.system)
        self.system.setPlaceholderText("What the model is told before the conversation")
        self.n_ctx = self._number(settings.n_ctx, 1 << 20, 1024, " tokens")
        self.n_threads = self._number(settings.n_threads, 512, 1, "")
        buttons = QDialogButtonBox(QDialogButtonBox.StandardButton.Ok | QDialogButtonBox.StandardButton.Cancel)
        buttons.accepted.connect(self.accept)
        buttons.rejected.connect(self.reject)
        form = QFormLayout(self)
        form.setContentsMargins(24, 24, 24, 20)
        form.setSpacing(14)
        form.addRow("System prompt", self.system)
        form.addRow("Context", self.n_ctx)
        form.addRow("Threads", self.n_threads)
        form.addRow(buttons)
        self.resize(520, 320)

    def settings(self) -> Settings:
        return Settings(self.system.toPlainText().strip(), self.n_ctx.value(), self.n_threads.value())

    @staticmethod
    def _number(value: int, maximum: int, step: int, suffix: str) -> QSpinBox:
        box = QSpinBox(maximum=maximum, singleStep=step, suffix=suffix)
        box.setButtonSymbols(QSpinBox.ButtonSymbols.NoButtons)
        box.setSpecialValueText("automatic")
        box.setValue(value)
        return box


class ChatWindow(QMainWindow):
    """Everything that is seen. ``busy`` is what the talker is doing for it, if anything."""

    asked = Signal(object)
    emptied = Signal()
    left = Signal()

    def __init__(self) -> None:
        super().__init__()
        self.settings = Settings()
        self.model: Path | None = None
        self.busy: Task | None = None
        self._is_ready = False
        self._build()
        self._thread = QThread()
        self._thread.setObjectName("talker")
        self._talker = Talker()
        self._talker.moveToThread(self._thread)
        self._connect(self._talker)
        self._thread.start()
        self._show_state()

    # ---- what the user does

    def open_model(self, path: Path) -> None:
        """Load a model, and give the old one's memory back first."""
        self.stop()
        self.model, self._is_ready = path, False
        self.progress.setValue(0)
        self._begin(Task(self.settings, path=path))

    def send(self) -> None:
        text = self.prompt.toPlainText().strip()
        if self.busy or not self._is_ready or not text:
            return
        self.prompt.clear()
        self.transcript.ask(text)
        self._begin(Task(self.settings, text=text))

    def stop(self) -> None:
        """End what runs now; it says so by itself when it has ended."""
        if self.busy:
            self.busy.stop.set()

    def start_over(self) -> None:
        if not self.busy:
            self.transcript.clear()
            self.emptied.emit()

    def choose_model(self) -> None:
        name, _ = QFileDialog.getOpenFileName(self, "Open a model", "", "Models (*.gguf)")
        if name:
            self.open_model(Path(name))

    def choose_settings(self) -> None:
        dialog = SettingsDialog(self, self.settings)
        if dialog.exec() == QDialog.DialogCode.Accepted:
            self.apply(dialog.settings())

    def apply(self, settings: Settings) -> None:
        """Context and threads belong to the loaded model: other ones load it again."""
        loads_again = replace(settings, system="") != replace(self.settings, system="")
        self.settings = settings
        if loads_again and self.model is not None:
            self.open_model(self.model)

    def closeEvent(self, event: QCloseEvent) -> None:  # noqa: N802 (Qt's name)
        self.stop()
        self.left.emit()
        self._thread.wait()
        event.accept()
        # widgets that live longer than the application crash at the interpreter's end
        self.deleteLater()

    # ---- what the talker says

    def _on_progressed(self, part: float) -> None:
        self.progress.setValue(round(1000 * part))

    def _on_loaded(self, name: str, n_ctx: int) -> None:
        self._is_ready = True
        self.facts.setText(f"{n_ctx:,} tokens of context")
        self.transcript.divide(f"Talking with {name}")

    def _on_failed(self, message: str) -> None:
        self.error.setText(message)
        self.error.show()

    def _on_ended(self, task: Task, status: str) -> None:
        if task.text:
            self.transcript.end()
        # otherwise another model was opened meanwhile, and its turn comes next
        if task is self.busy:
            self.busy = None
            self.status.setText(status)
            self._show_state()

    def _begin(self, task: Task) -> None:
        self.busy = task
        self.error.hide()
        self.status.setText("Loading" if task.path else "Answering")
        self._show_state()
        self.asked.emit(task)

    def _show_state(self) -> None:
        is_loading = self.busy is not None and self.busy.path is not None
        self.name.setText(self.model.stem if self.model else "No model")
        self.facts.setVisible(self._is_ready)
        self.progress.setVisible(is_loading)
        self.transcript.welcome(None if self.model else "Open a GGUF model to begin")
        self.prompt.setEnabled(self._is_ready)
        self.restart.setEnabled(self._is_ready and self.busy is None)
        self.button.setText("Stop" if self.busy else "Send")
        self.button.setEnabled(self.busy is not None or self._is_ready)
        self.button.setStyleSheet(STOPS if self.busy else "")
        if self._is_ready:
            self.prompt.setFocus()

    # ---- the widgets

    def _build(self) -> None:
        self.setWindowTitle("ggufmoe")
        self.resize(820, 680)
        self.progress = QProgressBar(maximum=1000, textVisible=False)
        self.error = named("error", QLabel(wordWrap=True))
        self.error.hide()
        self.transcript = Transcript()
        page = named("page", QWidget())
        column = QVBoxLayout(page)
        column.setContentsMargins(0, 0, 0, 0)
        column.setSpacing(0)
        for part in (self._header(), self.progress, self.error, self.transcript, self._footer()):
            column.addWidget(part, 1 if part is self.transcript else 0)
        self.setCentralWidget(page)

    def _header(self) -> QFrame:
        header = named("header", QFrame())
        self.name = named("model", QLabel())
        self.facts = named("facts", QLabel())
        titles = QVBoxLayout()
        titles.setSpacing(2)
        titles.addWidget(self.name)
        titles.addWidget(self.facts)
        self.restart, settings, opening = QPushButton("New chat"), QPushButton("Settings"), QPushButton("Open model")
        self.restart.clicked.connect(self.start_over)
        settings.clicked.connect(self.choose_settings)
        opening.clicked.connect(self.choose_model)
        line = QHBoxLayout(header)
        line.setContentsMargins(24, 12, 20, 12)
        line.addLayout(titles, 1)
        for button in (self.restart, settings, opening):
            line.addWidget(button)
        return header

    def _footer(self) -> QFrame:
        footer = named("footer", QFrame())
        self.prompt = Prompt()
        self.prompt.sent.connect(self.send)
        self.button = named("send", QPushButton())
        self.button.clicked.connect(lambda: self.stop() if self.busy else self.send())
        self.status = named("status", QLabel())
        line = QHBoxLayout()
        line.setSpacing(12)
        line.addWidget(self.prompt, 1)
        line.addWidget(self.button)
        column = QVBoxLayout(footer)
        column.setContentsMargins(24, 14, 20, 10)
        column.addLayout(line)
        column.addWidget(self.status)
        return footer

    def _connect(self, talker: Talker) -> None:
        self.asked.connect(talker.do)
        self.emptied.connect(talker.forget)
        self.left.connect(talker.leave)
        # bound methods: Qt calls those in the thread of their object, and a lambda in the talker's
        talker.progressed.connect(self._on_progressed)
        talker.loaded.connect(self._on_loaded)
        talker.thought.connect(self.transcript.think)
        talker.said.connect(self.transcript.say)
        talker.failed.connect(self._on_failed)
        talker.ended.connect(self._on_ended)


def main() -> int:
    """Open the window, with the model that was named."""
    app = QApplication(sys.argv)
    app.setStyleSheet(STYLE)
    window = ChatWindow()
    window.show()
    if len(sys.argv) > 1:
        window.open_model(Path(sys.argv[1]))
    return app.exec()


if __name__ == "__main__":
    sys.exit(main())
