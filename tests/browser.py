"""A page in headless Chromium, driven over the DevTools protocol through a pair of pipes."""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_SECONDS = 120  # a machine that does other things as well


def chromium() -> str | None:
    """The browser: what VITCOP_CHROMIUM names, or one on the path; None without."""
    return os.environ.get("VITCOP_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One tab. profile: an empty folder of its own."""

    def __init__(self, program: str, profile: Path, size: tuple[int, int] = (1280, 900)):
        theirs, self._write = os.pipe()
        self._read, answers = os.pipe()
        # The protocol's pipes are the descriptors 3 and 4 of the browser.
        moved = f'exec "$0" "$@" 3<&{theirs} 4>&{answers}'
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-extensions",
                 "--remote-debugging-pipe", f"--user-data-dir={profile}", "--window-size={},{}".format(*size)]  # fmt: skip
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(["bash", "-c", moved, program, *flags], pass_fds=(theirs, answers), **quiet)
        os.close(theirs)
        os.close(answers)
        self._held = b""
        self._numbers = itertools.count(1)
        self._session: str | None = None
        self.problems: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **given: Any) -> dict[str, Any]:
        """The result of a call of the protocol. What the page complains of meanwhile goes into `problems`."""
        number = next(self._numbers)
        asked = {"id": number, "method": method, "params": given} | ({"sessionId": self._session} if self._session else {})
        os.write(self._write, json.dumps(asked).encode() + b"\0")
        while True:
            told = self._next()
            if told.get("method") == "Runtime.exceptionThrown":
                self.problems.append(json.dumps(told["params"]["exceptionDetails"]))
            if told.get("method") == "Log.entryAdded" and told["params"]["entry"]["level"] == "error":
                self.problems.append(told["params"]["entry"]["text"])
            if told.get("method") == "Network.requestWillBeSent":
                address = told["params"]["request"]["url"]
                self.problems += [] if address.startswith(("file:", "data:")) else [f"asked for {address}"]
            if told.get("id") == number:
                assert "error" not in told, told
                return told["result"]

    def open(self, page: Path) -> None:
        """Loads `page`, and waits until it says that it is ready."""
        self.call("Page.navigate", url=page.resolve().as_uri())
        end = time.monotonic() + _SECONDS
        while self.ask("document.body && document.body.dataset.ready") != "yes":
            assert time.monotonic() < end, f"the page is not ready: {self.problems}"
            time.sleep(0.05)

    def ask(self, expression: str) -> Any:
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str) -> None:
        """A key, for what has the focus."""
        codes = {"ArrowRight": 39, "ArrowLeft": 37, "ArrowUp": 38, "ArrowDown": 40, "Home": 36, "End": 35, "Tab": 9}
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key])

    def move(self, x: float, y: float) -> None:
        """The pointer, in pixels of the window."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def picture(self, path: Path, size: tuple[int, int], dark: bool = False) -> None:
        """The page as it looks in a window of `size`."""
        width, height = size
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        """Ends the browser."""
        self._process.terminate()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._held:
            assert select.select([self._read], [], [], _SECONDS)[0], "the browser says nothing"
            part = os.read(self._read, 1 << 16)
            assert part, "the browser has ended"
            self._held += part
        told, _, self._held = self._held.partition(b"\0")
        return json.loads(told)
