"""A real browser that looks at a page: Chromium without a window, asked by its DevTools protocol."""

import contextlib
import json
import re
import shutil
import subprocess
import tempfile
import time
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_DEADLINE_S = 60.0
_SEEN = """(() => {
  const box = one => one.getBoundingClientRect();
  const sticks = one => !one.closest('.table, pre, svg') && box(one).width > 0 && box(one).right > innerWidth + 1;
  return {
    plots: [...document.querySelectorAll('figure svg')].map(
      one => [box(one).width, box(one).height, one.querySelectorAll('path').length]),
    scrolls: document.documentElement.scrollWidth,
    sticking: [...document.querySelectorAll('main *')].filter(sticks).map(one => one.outerHTML.slice(0, 80)),
    shading: [...document.querySelectorAll('.kl')].map(
      one => [getComputedStyle(one).backgroundColor, getComputedStyle(one).color, one.title]),
  };
})()"""


@dataclass(kw_only=True)
class Sight:
    """What a browser showed of a page."""

    plots: list[tuple[float, float, int]]
    """(width, height, paths) of each plot, pixels"""
    scrolls: int
    """width of all that there is, pixels"""
    sticking: list[str]
    """beginnings of the elements that stick out on the right, but for what scrolls by itself"""
    shading: list[tuple[str, str, str]]
    """(background, letters, title) of each shaded token"""
    picture: bytes = b""
    """PNG of the whole page"""


@dataclass
class Browser:
    """One tab."""

    socket: ClientConnection
    session: str = ""
    errors: list[str] = field(default_factory=list)
    """of the console and of scripts, and what the browser itself complained of"""
    requests: list[str] = field(default_factory=list)
    """addresses that were asked for"""
    _number: int = 0

    def look(self, page: Path, width: int, dark: bool = False) -> Sight:
        """Open a page at a width, in pixels."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Page.navigate", url=page.resolve().as_uri())
        deadline = time.monotonic() + _DEADLINE_S
        while self._receive(deadline)["method"] != "Page.loadEventFired":
            pass
        seen = self.ask("Runtime.evaluate", expression=_SEEN, returnByValue=True)["result"]["value"]
        picture = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        return Sight(**seen, picture=b64decode(picture["data"]))

    def ask(self, method: str, **parameters: Any) -> Any:
        """Call a method of the protocol. Raises RuntimeError for a refusal, TimeoutError for none in a minute."""
        self._number, deadline = self._number + 1, time.monotonic() + _DEADLINE_S
        message = {"id": self._number, "method": method, "params": parameters}
        self.socket.send(json.dumps(message | ({"sessionId": self.session} if self.session else {})))
        while (answer := self._receive(deadline)).get("id") != self._number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _receive(self, deadline: float) -> dict[str, Any]:
        """The next message; of events it is noted what they complain of, and what is asked for."""
        told = {"method": "", **json.loads(self.socket.recv(timeout=max(0.0, deadline - time.monotonic())))}
        said = told.get("params", {})
        if told["method"] == "Network.requestWillBeSent":
            self.requests.append(said["request"]["url"])
        elif told["method"] == "Runtime.exceptionThrown":
            self.errors.append(said["exceptionDetails"]["text"])
        elif told["method"] == "Log.entryAdded":
            self.errors.append(said["entry"]["text"])
        elif told["method"] == "Runtime.consoleAPICalled":
            self.errors.append(json.dumps(said["args"]))
        return told


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """Start Chromium, which finds no host but this machine, and end it."""
    assert CHROMIUM
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
    flags += ("--remote-debugging-port=0", "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = [CHROMIUM, *flags, f"--user-data-dir={folder}", "about:blank"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        try:
            assert process.stderr
            lines = (re.search(r"DevTools listening on (ws://\S+)", line) for line in process.stderr)
            address = next(filter(None, lines))[1]
            with connect(address, max_size=None, proxy=None) as socket:
                tab = Browser(socket)
                target = tab.ask("Target.createTarget", url="about:blank")["targetId"]
                tab.session = tab.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
                for area in ("Page", "Network", "Runtime", "Log"):
                    tab.ask(f"{area}.enable")
                yield tab
        finally:
            process.kill()
            process.wait(10)
