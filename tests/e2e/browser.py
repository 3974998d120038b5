"""A headless Chromium, driven over the DevTools protocol."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from websockets.sync.client import ClientConnection, connect

TIMEOUT = 60.0


class Page:
    """One tab."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.numbers = itertools.count(1)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self.socket.recv(TIMEOUT))
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives (a promise is waited for)."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def wait(self, expression: str, seconds: float = TIMEOUT) -> Any:
        """The first truthy value of the expression."""
        deadline = time.monotonic() + seconds
        while not (found := self.value(expression)):
            assert time.monotonic() < deadline, f"not within {seconds} s: {expression}\n{self.text()[:2000]}"
            time.sleep(0.3)
        return found

    def text(self) -> str:
        return str(self.value("document.body?.innerText"))

    def wait_text(self, text: str, seconds: float = TIMEOUT) -> None:
        self.wait(f"document.body?.innerText.includes({json.dumps(text)})", seconds)

    def click(self, element: str) -> None:
        """Click in the middle of the element that a JavaScript expression gives."""
        self.wait(f"!!({element})")
        self.value(f"({element}).scrollIntoView({{block: 'center'}})")
        time.sleep(0.3)
        where = self.value(f"(r => [r.x + r.width / 2, r.y + r.height / 2])(({element}).getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=where[0], y=where[1], button="left", clickCount=1)

    def write(self, text: str) -> None:
        """Type into what has the focus, over what is selected there."""
        self.call("Input.insertText", text=text)

    def screenshot(self, path: Path) -> None:
        time.sleep(0.7)  # fades
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


def button(text: str) -> str:
    """JavaScript that finds a button or link by its words."""
    return (
        "[...document.querySelectorAll('button, a, [role=menuitem], [role=button], [role=tab], .p-tab')]"
        f".find(e => e.innerText.trim() === {json.dumps(text)} && e.offsetParent)"
    )


@contextmanager
def chromium(folder: Path, width: int = 1360, height: int = 1000) -> Iterator[Page]:
    """A browser with its profile in `folder`; the test is skipped where there is none."""
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if binary is None:
        pytest.skip("no Chromium on this machine: the browser tests did not run")
    profile = folder / "profile"
    process = subprocess.Popen(
        [binary, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
         "--remote-debugging-port=0", f"--user-data-dir={profile}", f"--window-size={width},{height}", "about:blank"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        port_file = profile / "DevToolsActivePort"
        deadline = time.monotonic() + TIMEOUT
        while not port_file.exists() or not port_file.read_text().strip():
            assert process.poll() is None, "Chromium ended at once"
            assert time.monotonic() < deadline, "Chromium did not start"
            time.sleep(0.1)
        port = port_file.read_text().splitlines()[0]
        targets = json.load(urlopen(f"http://127.0.0.1:{port}/json/list", timeout=30))
        address = next(t["webSocketDebuggerUrl"] for t in targets if t["type"] == "page")
        with connect(address, max_size=None, open_timeout=30) as socket:
            page = Page(socket)
            page.call("Page.enable")
            page.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                      deviceScaleFactor=1, mobile=False)  # fmt: skip
            yield page
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
