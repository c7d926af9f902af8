"""Open a report in headless Chromium: what it logs, what it asks the network for, how wide it gets, how it looks.

Speaks the DevTools protocol over two pipes, so nothing but the browser is needed.
Source: https://chromedevtools.github.io/devtools-protocol
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)

TIMEOUT = 60.0
"""Seconds that the browser may take for one answer."""


def find_browser() -> str | None:
    """Path of a Chromium, from the variable KVCOMPRESS_CHROMIUM or the path; None where there is none."""
    return os.environ.get("KVCOMPRESS_CHROMIUM") or next(
        (found for name in NAMES if (found := shutil.which(name))), None
    )


class Page:
    """A page in a browser that was started for it."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._out, self._in = to_browser, from_browser
        self._buffer = b""
        self._session: str | None = None
        self._number = 0
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def open(self, path: Path, width: int, height: int = 900, *, dark: bool = False, scale: float = 1.0) -> None:
        """Load a file in a window of `width` CSS pixels; below 600 as a phone does."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        self._wait_for("Page.loadEventFired")

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in answer:
            raise ValueError(f"the script failed: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def complaints(self) -> list[str]:
        """Errors, warnings and messages on the console since the page was opened."""
        self.evaluate("0")  # what was logged before comes before the answer
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self.events if event["method"] in kinds]

    def requests(self) -> list[str]:
        """Addresses that the page asked for since it was opened, itself included."""
        self.evaluate("0")
        sent = (event["params"] for event in self.events if event["method"] == "Network.requestWillBeSent")
        return [str(params["request"]["url"]) for params in sent]

    def screenshot(self, path: Path, element: str = "html") -> None:
        """A PNG of one element, given as a CSS selector, as large as it is."""
        box = self.evaluate(
            f"(b => ({{x: b.x + scrollX, y: b.y + scrollY, width: b.width, height: b.height}}))"
            f"(document.querySelector({json.dumps(element)}).getBoundingClientRect())"
        )
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip={**box, "scale": 1})[
            "data"
        ]
        path.write_bytes(base64.b64decode(data))

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; events that arrive meanwhile are kept."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise ValueError(f"{method}: {answer['error']['message']}")
                result: dict[str, Any] = answer["result"]
                return result

    def _wait_for(self, event: str) -> None:
        while not any(item["method"] == event for item in self.events):
            self._next()

    def _next(self) -> dict[str, Any]:
        """The next message, an event being kept as well."""
        deadline = time.monotonic() + TIMEOUT
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(self._in, 1 << 16) if ready else b""
            if not piece:
                raise OSError("the browser ended" if ready else f"the browser did not answer in {TIMEOUT:.0f} s")
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if "method" in message:
            self.events.append(message)
        return message


@contextmanager
def browse() -> Iterator[Page]:
    """A page in a fresh browser with a profile of its own, ended afterwards.

    Raises:
        ValueError: no Chromium is installed.
    """
    program = find_browser()
    if program is None:
        raise ValueError(f"no browser found; install one of {', '.join(NAMES)} or set KVCOMPRESS_CHROMIUM")
    commands, answers = os.pipe(), os.pipe()

    def connect() -> None:
        # The browser reads commands from descriptor 3 and writes to 4; moved out of the way first, as 3 may be in use.
        reads, writes = fcntl.fcntl(commands[0], fcntl.F_DUPFD, 10), fcntl.fcntl(answers[1], fcntl.F_DUPFD, 10)
        os.dup2(reads, 3)
        os.dup2(writes, 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={profile}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,
            preexec_fn=connect,
        )
        os.close(commands[0])
        os.close(answers[1])
        try:
            yield Page(commands[1], answers[0])
        finally:
            os.close(commands[1])
            os.close(answers[0])
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def picture(html: str | Path, png: str | Path, *, element: str = "html", width: int = 1280, dark: bool = False) -> None:
    """A PNG of a report, or of one element of it, two pixels per CSS pixel."""
    with browse() as page:
        page.open(Path(html), width, dark=dark, scale=2.0)
        page.screenshot(Path(png), element)
