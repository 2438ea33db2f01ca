"""A real browser that looks at a page and uses it: Chromium without a window, asked by its DevTools protocol."""

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
_KEYS = {"Enter": (13, "\r"), "Backspace": (8, ""), "Escape": (27, ""), "ArrowLeft": (37, ""), "ArrowRight": (39, "")}
_CONTROL = 2
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
    address: str
    """of the browser's protocol"""
    session: str = ""
    errors: list[str] = field(default_factory=list)
    """of the console and of scripts, and what the browser itself complained of"""
    requests: list[str] = field(default_factory=list)
    """addresses that were asked for"""
    _number: int = 0

    def look(self, page: Path, width: int, dark: bool = False) -> Sight:
        """Open a file at a width, in pixels."""
        self.open(page.resolve().as_uri(), width, dark=dark)
        return self.sight()

    def open(self, url: str, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Open an address in a window of a size, in pixels, and wait until it is loaded."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Page.navigate", url=url)
        deadline = time.monotonic() + _DEADLINE_S
        while self._receive(deadline)["method"] != "Page.loadEventFired":
            pass

    def sight(self, whole: bool = True) -> Sight:
        """What is shown now; with `whole` the picture is of the whole page, else of the window."""
        picture = self.ask("Page.captureScreenshot", captureBeyondViewport=whole)
        return Sight(**self.run(_SEEN), picture=b64decode(picture["data"]))

    def run(self, script: str) -> Any:
        """What an expression is, once it is settled. Raises RuntimeError where it throws."""
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script:.200}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait(self, script: str, seconds: float = 20.0) -> Any:
        """What an expression is, once it is something. Raises TimeoutError, with the text of the page, after that."""
        deadline = time.monotonic() + seconds
        while (found := self.run(script)) in (None, False, 0, ""):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{script} is nothing after {seconds:g} s: {self.run('document.body.innerText')}")
            time.sleep(0.02)
        return found

    def press(self, *keys: str, control: bool = False) -> None:
        """Press keys, one after another."""
        for key in keys:
            code, text = _KEYS.get(key) or (ord(key.upper()), key)
            told = {"key": key, "windowsVirtualKeyCode": code, "modifiers": _CONTROL * control}
            self.ask("Input.dispatchKeyEvent", type="keyDown", text="" if control else text, **told)
            self.ask("Input.dispatchKeyEvent", type="keyUp", **told)

    def click(self, selector: str) -> None:
        """Click in the middle of an element."""
        self.drag(selector, selector)

    def drag(self, start: str, end: str) -> None:
        """Press the mouse on one element, and let it go on another."""
        (x, y), target = self._middle(start), self._middle(end)
        mouse = {"button": "left", "buttons": 1, "clickCount": 1}
        self.ask("Input.dispatchMouseEvent", type="mousePressed", x=x, y=y, **mouse)
        if target != (x, y):
            for step in (0.5, 1.0):
                place = {"x": x + (target[0] - x) * step, "y": y + (target[1] - y) * step}
                self.ask("Input.dispatchMouseEvent", type="mouseMoved", **place, **mouse)
        self.ask("Input.dispatchMouseEvent", type="mouseReleased", x=target[0], y=target[1], **mouse)

    def swipe(self, start: str, end: str) -> None:
        """Put a finger on one element, and take it off on another."""
        self.ask("Emulation.setTouchEmulationEnabled", enabled=True)
        (x, y), target = self._middle(start), self._middle(end)
        self.ask("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        for step in (0.3, 0.7, 1.0):
            place = {"x": x + (target[0] - x) * step, "y": y + (target[1] - y) * step}
            self.ask("Input.dispatchTouchEvent", type="touchMove", touchPoints=[place])
        self.ask("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def offline(self, cut: bool) -> None:
        """Cut the network off, or give it back."""
        speed = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self.ask("Network.emulateNetworkConditions", offline=cut, **speed)

    def another(self) -> contextlib.AbstractContextManager["Browser"]:
        """Another tab, with the same cookies."""
        return _tab(self.address)

    def _middle(self, selector: str) -> tuple[float, float]:
        """The middle of an element, scrolled into view."""
        found = self.run(
            "(one => { if (!one) return null; one.scrollIntoView({block: 'nearest'}); const box ="
            " one.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; })"
            f"(document.querySelector({json.dumps(selector)}))"
        )
        assert found, f"nothing is {selector}"
        return found[0], found[1]

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
    """Start Chromium, which finds this machine alone, and end it."""
    assert CHROMIUM
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
    flags += ("--remote-debugging-port=0", "--disable-background-networking")
    flags += ("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = [CHROMIUM, *flags, f"--user-data-dir={folder}", "about:blank"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        try:
            assert process.stderr
            lines = (re.search(r"DevTools listening on (ws://\S+)", line) for line in process.stderr)
            address = next(filter(None, lines))[1]
            with _tab(address) as tab:
                yield tab
        finally:
            process.kill()
            process.wait(10)


@contextlib.contextmanager
def _tab(address: str) -> Iterator[Browser]:
    with connect(address, max_size=None, proxy=None) as socket:
        tab = Browser(socket, address)
        target = tab.ask("Target.createTarget", url="about:blank")["targetId"]
        tab.session = tab.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for area in ("Page", "Network", "Runtime", "Log"):
            tab.ask(f"{area}.enable")
        yield tab
