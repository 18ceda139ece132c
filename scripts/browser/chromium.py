"""Headless Chromium, driven through a pipe in its DevTools protocol: no driver of its own version, no open port.

Owns the process and the messages; what a page should be is said by the tests. The browser is the one that the variable
CHROMIUM names.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

TIMEOUT_S = 120.0
_FIRST_FREE = 10
"""Pipes get numbers from here on, because the browser wants to read 3 and write 4."""
_FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


class Chromium:
    """One browser with a profile in ``folder``; use it with ``with``."""

    def __init__(self, folder: Path) -> None:
        read_commands, self._commands = _pipe()
        self._answers, write_answers = _pipe()
        command = [os.environ["CHROMIUM"], *_FLAGS, f"--user-data-dir={folder}"]
        if os.geteuid() == 0:
            command.append("--no-sandbox")

        def take_3_and_4() -> None:
            os.dup2(read_commands, 3)
            os.dup2(write_answers, 4)

        self._log = (folder / "chromium.log").open("wb")
        self._process = subprocess.Popen(
            [*command, "about:blank"],
            preexec_fn=take_3_and_4,
            pass_fds=(3, 4),
            stdout=self._log,
            stderr=self._log,
            stdin=subprocess.DEVNULL,
        )
        os.close(read_commands)
        os.close(write_answers)
        self._buffer = b""
        self._last_id = 0
        self._events: list[dict[str, Any]] = []

    def page(self) -> Page:
        """A new, empty page whose network, log and errors are watched."""
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.call(f"{domain}.enable")
        return page

    def call(self, method: str, parameters: dict[str, Any] | None = None, session: str | None = None) -> dict[str, Any]:
        """Send a command and give its result; RuntimeError if it is refused."""
        self._last_id += 1
        message: dict[str, Any] = {"id": self._last_id, "method": method, "params": parameters or {}}
        if session is not None:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._commands, data) :]
        while True:
            answer = self._read(time.monotonic() + TIMEOUT_S)
            if answer.get("id") == self._last_id:
                break
            self._events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def wait_for(self, method: str, session: str) -> dict[str, Any]:
        """The parameters of the first event of this name that was not asked for before."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            for event in self._events:
                if event.get("method") == method and event.get("sessionId") == session:
                    self._events.remove(event)
                    found: dict[str, Any] = event["params"]
                    return found
            self._events.append(self._read(deadline))

    def events(self, method: str, session: str) -> list[dict[str, Any]]:
        """The parameters of all events of this name so far."""
        self.call("Browser.getVersion")  # whatever was sent before it has arrived with its answer
        mine = (event for event in self._events if event.get("sessionId") == session)
        return [event["params"] for event in mine if event.get("method") == method]

    def _read(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self._answers], [], [], max(0.0, left))
            if not ready:
                raise TimeoutError(f"Chromium said nothing for {TIMEOUT_S:.0f} s")
            data = os.read(self._answers, 1 << 16)
            if not data:
                raise RuntimeError(f"Chromium ended with {self._process.wait()}; see {self._log.name}")
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def close(self) -> None:
        """End the browser."""
        os.close(self._commands)  # it ends when nobody can tell it anything any more
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._answers)
        self._log.close()

    def __enter__(self) -> Chromium:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _pipe() -> tuple[int, int]:
    """Both ends, above the numbers that the browser takes, and not inherited."""
    ends = os.pipe()
    moved = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE) for end in ends]
    for end in ends:
        os.close(end)
    return moved[0], moved[1]


class Page:
    """One page of a browser."""

    def __init__(self, browser: Chromium, session: str) -> None:
        self._browser = browser
        self._session = session

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol to this page."""
        return self._browser.call(method, parameters, self._session)

    def open(self, path: Path) -> None:
        """Load a file and wait until it has been shown."""
        self.call("Page.navigate", url=path.resolve().as_uri())
        self._browser.wait_for("Page.loadEventFired", self._session)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, as JSON carries it; RuntimeError if it throws."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def emulate(self, *, width: int = 1000, height: int = 800, scheme: str = "light") -> None:
        """A window of this size on a system with this colour scheme."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def hover(self, selector: str) -> None:
        """Move the mouse onto the middle of the first element that matches, which is scrolled to."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f"{element}.scrollIntoView({{block: 'center'}})")
        # the first of its lines, if it is broken over several
        box = self.evaluate(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({element}.getClientRects()[0])")
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])

    def press(self, key: str) -> None:
        """Press and release a key, for example ArrowRight."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key)

    @property
    def requests(self) -> list[str]:
        """Addresses of all that was asked for so far, the page itself first."""
        sent = self._browser.events("Network.requestWillBeSent", self._session)
        return [event["request"]["url"] for event in sent]

    @property
    def complaints(self) -> list[str]:
        """Errors of scripts, and what the browser logged: blocked by the page's policy, not found, and so on."""
        thrown = self._browser.events("Runtime.exceptionThrown", self._session)
        logged = self._browser.events("Log.entryAdded", self._session)
        return [str(event["exceptionDetails"]) for event in thrown] + [event["entry"]["text"] for event in logged]

    def accessible(self) -> list[tuple[str, str]]:
        """(role, name) of everything that a screen reader meets, in its order."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        seen = (node for node in nodes if not node.get("ignored"))
        return [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in seen]

    def picture(self, path: Path) -> None:
        """Write what the whole page looks like as PNG."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))
