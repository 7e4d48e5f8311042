"""A real headless Chromium, spoken to through its DevTools protocol: pages are opened, listened to and looked at."""

import asyncio
import base64
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import aiohttp

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--mute-audio",
    "--autoplay-policy=no-user-gesture-required",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # no network: a page that needs one fails here
    "--remote-debugging-port=0",
    "--window-size=1260,1000",
)

# Plays the first player, and looks at what a person needs: names, headers, keyboard, contrast, width.
INSPECTION = """(async () => {
  const players = [...document.querySelectorAll("audio")];
  const player = players[0];
  await player.play();
  const head = player.closest(".side").querySelector(".playhead");
  // A busy machine's audio starts late: up to 20 s, not one fixed wait.
  for (let tries = 0; tries < 200; tries++) {
    if (player.currentTime > 0.3 && head.style.visibility === "visible") break;
    await new Promise((done) => setTimeout(done, 100));
  }
  const result = {
    players: players.length, time: player.currentTime, duration: player.duration,
    head: head.style.visibility, moved: head.getAttribute("transform"),
    scripts: document.scripts.length, alerted: Boolean(window.alerted), images: document.images.length,
    headless: [...document.querySelectorAll("table")].filter((t) => !t.querySelector("th[scope=col]")).length,
    unlabelled: [...document.querySelectorAll("audio")].filter((a) => !a.getAttribute("aria-label")).length,
    regions: [...document.querySelectorAll("[role=region]")].every((r) => r.tabIndex === 0),
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    contrast: 21, text: document.body.innerText,
  };
  player.pause();
  const luminance = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map((c) => {
      c = Number(c) / 255;
      return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  for (const element of document.querySelectorAll("main *, header *")) {
    if (element instanceof SVGElement || !element.innerText || element.children.length) continue;
    let behind = element;
    while (behind && getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
    const back = behind ? getComputedStyle(behind).backgroundColor : "rgb(255, 255, 255)";
    const pair = [luminance(getComputedStyle(element).color), luminance(back)].sort((a, b) => b - a);
    result.contrast = Math.min(result.contrast, (pair[0] + 0.05) / (pair[1] + 0.05));
  }
  return result;
})()"""


# The text of tables of which a part lies beyond the paper, or beyond a box that cannot be scrolled there.
PRINTED = """[...document.querySelectorAll("table")].filter((table) => {
  const box = table.getBoundingClientRect();
  return box.right > document.documentElement.clientWidth + 1 || box.left < -1
    || table.parentElement.scrollWidth > table.parentElement.clientWidth + 1;
}).map((table) => table.innerText)"""
PAPER = 718  # pixels: A4 upright without its margins, for a printer that does not turn it as the page asks


def visit(
    path: Path, script: str, screenshot: Path | None = None, seconds: float = 120.0, paper: int | None = None
) -> dict:
    """Open a page, run a script in it, and say what happened.

    Args:
        path: of the page.
        script: a JavaScript expression, awaited where it is a promise.
        screenshot: PNG of the whole page.
        seconds: to wait, at most.
        paper: lay it out as it is printed, on paper so many pixels wide.

    Returns:
        `value` of the script, `errors` (console errors and exceptions), `requests` that leave the page.
    """
    # Its children, killed with it, may still be writing when the folder goes.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = [CHROMIUM, *_FLAGS, f"--user-data-dir={folder}", "about:blank"]
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            port_file = Path(folder) / "DevToolsActivePort"
            until = time.monotonic() + seconds
            while not (port_file.is_file() and port_file.read_text().count("\n")):
                if time.monotonic() > until:
                    raise TimeoutError("Chromium did not start")
                time.sleep(0.1)
            port = int(port_file.read_text().splitlines()[0])
            return asyncio.run(asyncio.wait_for(_visit(port, path, script, screenshot, paper), seconds))
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


async def _visit(port: int, path: Path, script: str, screenshot: Path | None, paper: int | None) -> dict:
    errors: list[str] = []
    requests: list[str] = []
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/json") as reply:
            (target,) = [t for t in await reply.json() if t["type"] == "page"]
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            page = _Page(socket, errors, requests)
            for domain in ("Page", "Runtime", "Log", "Network"):
                await page.call(f"{domain}.enable")
            if paper is not None:
                size = {"width": paper, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
                await page.call("Emulation.setDeviceMetricsOverride", **size)
                await page.call("Emulation.setEmulatedMedia", media="print")
            await page.call("Page.navigate", url=path.resolve().as_uri())
            await page.wait_for("Page.loadEventFired")
            result = await page.call(
                "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True
            )
            if "exceptionDetails" in result:
                errors.append(json.dumps(result["exceptionDetails"]))
            if screenshot is not None:
                shot = await page.call("Page.captureScreenshot", captureBeyondViewport=True)
                screenshot.write_bytes(base64.b64decode(shot["data"]))
    return {"value": result["result"].get("value"), "errors": errors, "requests": requests}


class _Page:
    def __init__(self, socket: aiohttp.ClientWebSocketResponse, errors: list[str], requests: list[str]) -> None:
        self._socket, self._errors, self._requests = socket, errors, requests
        self._number = 0
        self._seen: set[str] = set()

    async def call(self, method: str, **parameters: object) -> dict:
        self._number += 1
        number = self._number
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = await self._next()
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]

    async def wait_for(self, event: str) -> None:
        while event not in self._seen:
            await self._next()

    async def _next(self) -> dict:
        message = json.loads((await self._socket.receive()).data)
        method, parameters = message.get("method", ""), message.get("params", {})
        self._seen.add(method)
        if method == "Runtime.exceptionThrown":
            self._errors.append(json.dumps(parameters["exceptionDetails"]))
        elif (method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning")) or (
            method == "Log.entryAdded" and parameters["entry"]["level"] == "error"
        ):
            self._errors.append(json.dumps(parameters))
        elif method == "Network.requestWillBeSent":
            url = parameters["request"]["url"]
            if not url.startswith(("file:", "data:")):
                self._requests.append(url)
        return message
