"""Headless Chromium over its DevTools websocket: open a page as a reader would, say what went wrong in it."""

import asyncio
import itertools
import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from tornado.websocket import websocket_connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"),
    *("--hide-scrollbars", "--remote-debugging-port=0"),
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
)
QUIET_SECONDS = 0.3  # without a request under way: scripts that load more have done so

# Images are made eager first: a lazy one below the fold is neither loaded nor broken.
IMAGES_SETTLED = """(async () => {
    const images = [...document.images];
    images.forEach(image => image.loading = "eager");
    await Promise.all(images.map(image => image.complete || new Promise(done => {
        image.onload = image.onerror = done;
    })));
    await document.fonts.ready;
})()"""

FACTS = """({
    title: document.title,
    text: document.body.innerText.length,
    broken: [...document.images].filter(image => !image.naturalWidth).map(image => image.src),
    width: document.documentElement.scrollWidth,
    wide: [...document.querySelectorAll("main *")].filter(element => {
        if (element.getBoundingClientRect().right <= innerWidth + 1) return false;
        for (let outer = element; outer; outer = outer.parentElement)
            if (outer !== document.body && getComputedStyle(outer).overflowX !== "visible") return false;
        return true;
    }).slice(0, 3).map(element => element.outerHTML.slice(0, 120)),
})"""


def find() -> str | None:
    """The browser that is installed, or that CHROME names; None without one."""
    return next(filter(None, map(shutil.which, filter(None, (os.environ.get("CHROME"), *NAMES)))), None)


@dataclass
class Visit:
    """What one page showed in a window `width` CSS pixels wide."""

    url: str
    width: int
    facts: dict = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)  # console errors, exceptions, failed requests
    requests: list[str] = field(default_factory=list)


class Chromium:
    """`async with Chromium() as browser`: an empty profile, in which external hosts do not resolve."""

    async def __aenter__(self):
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        command = [find(), *FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future] = {}
        self._visits: dict[str, Visit] = {}
        self._pending: dict[str, set] = {}
        self._loaded: dict[str, asyncio.Event] = {}
        port = await self._port()
        self._socket = await websocket_connect(f"ws://127.0.0.1:{port[0]}{port[1]}", max_message_size=1 << 28)
        self._reader = asyncio.create_task(self._listen())
        return self

    async def __aexit__(self, *_):
        self._reader.cancel()
        self._socket.close()
        self._process.terminate()
        self._process.wait(30)
        self._profile.cleanup()

    async def _port(self) -> list[str]:
        file = Path(self._profile.name) / "DevToolsActivePort"
        for _ in range(600):
            if file.exists() and len(lines := file.read_text().split()) == 2:
                return lines
            if self._process.poll() is not None:
                break
            await asyncio.sleep(0.1)
        raise RuntimeError("Chromium did not start.")

    async def visit(self, url: str, *, width: int, height: int = 900, until: str | None = None) -> Visit:
        """Load `url`, wait until it is quiet (and the JavaScript expression `until` holds), look at it."""
        target = (await self._call("Target.createTarget", url="about:blank"))["targetId"]
        session = (await self._call("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]
        visit = self._visits[session] = Visit(url, width)
        self._pending[session], self._loaded[session] = set(), asyncio.Event()
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self._call(f"{domain}.enable", session)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        await self._call("Emulation.setDeviceMetricsOverride", session, **size)
        await self._call("Page.navigate", session, url=url)
        await asyncio.wait_for(self._loaded[session].wait(), 60)
        await self.evaluate(session, IMAGES_SETTLED)
        await self._quiet(session)
        for _ in range(100 if until else 0):
            if await self.evaluate(session, until):
                break
            await asyncio.sleep(0.1)
        visit.facts = await self.evaluate(session, FACTS)
        visit.facts["until"] = await self.evaluate(session, until) if until else True
        await self._call("Target.closeTarget", targetId=target)
        return visit

    async def evaluate(self, session: str, expression: str):
        """The value of a JavaScript expression in a page, awaited if it is a promise."""
        options = {"expression": expression, "awaitPromise": True, "returnByValue": True}
        return (await self._call("Runtime.evaluate", session, **options))["result"].get("value")

    async def _quiet(self, session: str) -> None:
        quiet = 0.0
        for _ in range(300):
            if quiet >= QUIET_SECONDS:
                return
            await asyncio.sleep(0.1)
            quiet = 0.0 if self._pending[session] else quiet + 0.1

    async def _call(self, method: str, session: str | None = None, **parameters) -> dict:
        number = next(self._numbers)
        arrival = self._answers[number] = asyncio.get_running_loop().create_future()
        message = {"id": number, "method": method, "params": parameters}
        await self._socket.write_message(json.dumps(message | ({"sessionId": session} if session else {})))
        answer = await asyncio.wait_for(arrival, 60)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    async def _listen(self) -> None:
        while (text := await self._socket.read_message()) is not None:
            message = json.loads(text)
            if "id" in message:
                self._answers.pop(message["id"]).set_result(message)
            elif message.get("sessionId") in self._visits:
                self._note(message["sessionId"], message["method"], message["params"])

    def _note(self, session: str, event: str, details: dict) -> None:
        visit, pending = self._visits[session], self._pending[session]
        if event == "Page.loadEventFired":
            self._loaded[session].set()
        elif event == "Network.requestWillBeSent":
            visit.requests.append(details["request"]["url"])
            pending.add(details["requestId"])
        elif event == "Network.loadingFinished":
            pending.discard(details["requestId"])
        elif event == "Network.loadingFailed":
            pending.discard(details["requestId"])
            if not details.get("canceled"):
                visit.errors.append(f"a request failed: {details['errorText']}")
        elif event == "Network.responseReceived" and details["response"]["status"] >= 400:
            visit.errors.append(f"{details['response']['status']}: {details['response']['url']}")
        elif event == "Runtime.exceptionThrown":
            visit.errors.append(json.dumps(details["exceptionDetails"])[:300])
        elif event == "Runtime.consoleAPICalled" and details["type"] in {"error", "assert"}:
            words = [str(part.get("value", part.get("description"))) for part in details["args"]]
            visit.errors.append(" ".join(words))
        elif event == "Log.entryAdded" and details["entry"]["level"] == "error":
            visit.errors.append(f"{details['entry']['text']} {details['entry'].get('url', '')}")
