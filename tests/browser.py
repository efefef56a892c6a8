"""Headless Chromium for tests, driven over the DevTools protocol through two pipes: no package, no port."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from typing import Any

PROGRAM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
MISSING = "needs a headless Chromium on PATH: apt-get install chromium"
OPTIONS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-extensions", "--no-first-run",
           "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--remote-debugging-pipe"]


class Browser:
    """A browser with one tab. events: (method, parameters) that came and that nobody waited for. Raises TimeoutError."""

    def __init__(self, seconds: float = 60.0):
        self.seconds, self.events, self._number, self._rest = seconds, [], 0, b""
        self._folder = tempfile.mkdtemp(prefix="browser-")
        child_reads, self._write = os.pipe()
        self._read, child_writes = os.pipe()
        # the browser reads from 3 and writes to 4: first out of the way of both
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 100) for end in (child_reads, child_writes)]
        actions = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0), (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
                   (os.POSIX_SPAWN_DUP2, ends[0], 3), (os.POSIX_SPAWN_DUP2, ends[1], 4)]
        command = [PROGRAM, *OPTIONS, f"--user-data-dir={self._folder}"]
        self._process = os.posix_spawn(PROGRAM, command, dict(os.environ), file_actions=actions, setpgroup=0)
        for end in (child_reads, child_writes, *ends):
            os.close(end)
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        os.killpg(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)
        os.close(self._read)
        os.close(self._write)
        shutil.rmtree(self._folder, ignore_errors=True)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        content = json.dumps(message).encode() + b"\0"
        while content:
            content = content[os.write(self._write, content):]
        until = time.monotonic() + self.seconds
        while (found := self._message(until)).get("id") != self._number:
            self.events.append((found.get("method"), found.get("params", {})))
        assert "error" not in found, (method, found["error"])
        return found["result"]

    def _message(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            if not select.select([self._read], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            got = os.read(self._read, 1 << 20)
            if not got:
                raise TimeoutError("the browser has ended")
            self._rest += got
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    # -- what a reader does ---------------------------------------------------------------------------------------------------------
    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited where it is a promise."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, expression: str) -> Any:
        """Wait until an expression is true, and what it is."""
        until = time.monotonic() + self.seconds
        while not (value := self.evaluate(expression)):
            if time.monotonic() > until:
                raise TimeoutError(f"never true: {expression}\n{self.evaluate('document.body.innerText')}")
            time.sleep(0.02)
        return value

    def click(self, selector: str) -> None:
        self.evaluate(f"document.querySelector({json.dumps(selector)}).click()")

    def type(self, selector: str, text: str) -> None:
        """Into an empty or selected field."""
        self.evaluate(f"(field => {{ field.focus(); field.select(); }})(document.querySelector({json.dumps(selector)}))")
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int, *, ctrl: bool = False) -> None:
        text = {"text": "\r"} if key == "Enter" and not ctrl else {}  # with it the key also sends a form
        for kind, more in (("keyDown" if text else "rawKeyDown", text), ("keyUp", {})):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code,
                      modifiers=2 if ctrl else 0, **more)

    def view(self, width: int, height: int, *, dark: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def screenshot(self) -> bytes:
        """A PNG of what is in view."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def problems(self) -> list[str]:
        """What went wrong in the page so far: exceptions, and messages of the browser such as breaches of the content policy.
        Answers that are errors are none, as pages show them."""
        found = [str(p["exceptionDetails"]) for method, p in self.events if method == "Runtime.exceptionThrown"]
        logged = [p["entry"] for method, p in self.events if method == "Log.entryAdded"]
        return found + [entry["text"] for entry in logged if entry["level"] == "error" and entry["source"] != "network"]

    def requested(self) -> list[str]:
        """Addresses of all requests so far."""
        return [p["request"]["url"] for method, p in self.events if method == "Network.requestWillBeSent"]
