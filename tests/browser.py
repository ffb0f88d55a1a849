"""A headless Chromium that tests talk to: the DevTools protocol over two pipes. No port is opened and no name resolved."""

import base64
import contextlib
import io
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL import Image

from effilib import paths

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = """--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --hide-scrollbars --no-first-run --no-default-browser-check
--disable-background-networking --disable-component-update --disable-sync --disable-extensions --disable-default-apps
--remote-debugging-pipe"""
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND"

# Chromium reads from descriptor 3 and writes to 4: the pipes go there, by way of free numbers, and Python makes room for it.
START = """import fcntl, os, sys
read, write = (fcntl.fcntl(int(pipe), fcntl.F_DUPFD, 10) for pipe in sys.argv[1:3])
os.dup2(read, 3)
os.dup2(write, 4)
os.execv(sys.argv[3], sys.argv[3:])"""
SILENCE = 60  # seconds after which a browser that says nothing is given up

# What a person would see of the page, as plain values.
LOOK = """(() => {
  const shown = e => e.checkVisibility();
  const small = [], texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const parent = texts.currentNode.parentElement;
    const size = parseFloat(getComputedStyle(parent).fontSize);
    if (texts.currentNode.data.trim() && size < 12 && shown(parent) && !parent.closest("math, style"))
      small.push(size + "px: " + texts.currentNode.data.trim().slice(0, 60));
  }
  const wide = [...document.body.querySelectorAll("*")].filter(e => shown(e) && !e.parentElement.closest(".scroll, pre, .formula, details")
    && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(e => e.outerHTML.slice(0, 80));
  return {
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    wide, small,
    height: document.documentElement.scrollHeight,
    formulas: [...document.querySelectorAll("math")].filter(shown).map(m => {
      const box = m.getBoundingClientRect(); return [m.getAttribute("alttext"), box.width, box.height]; }),
    broken: [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.alt),
    links: [...document.links].map(a => a.href),
    anchors: [...document.querySelectorAll("[id]")].map(e => e.id),
  };
})()"""


class Browser:
    """`with Browser(folder) as browser: page = browser.open(file, width)`. folder: for its profile."""

    def __init__(self, folder):
        self.numbers, self.events = itertools.count(1), []
        (read, self.commands), (self.answers, write) = os.pipe(), os.pipe()
        line = [sys.executable, "-I", "-S", "-c", START, str(read), str(write)]
        line += [CHROMIUM, *OPTIONS.split(), OFFLINE, f"--user-data-dir={folder}"]
        self.process = subprocess.Popen(line, pass_fds=(read, write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(read)
        os.close(write)
        self.rest = b""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            self.send("Browser.close")
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.commands)
        os.close(self.answers)

    def send(self, method, session=None, **params):
        """Send a command; returns its number."""
        message = {"id": next(self.numbers), "method": method, "params": params, **({"sessionId": session} if session else {})}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        return message["id"]

    def hear(self):
        """The next message: an answer, or an event."""
        while b"\0" not in self.rest:
            if not select.select([self.answers], [], [], SILENCE)[0]:
                raise TimeoutError(f"Chromium has said nothing for {SILENCE} s")
            more = os.read(self.answers, 1 << 20)
            if not more:
                raise ConnectionError("Chromium has ended")
            self.rest += more
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def call(self, method, session=None, **params):
        """A command's result; events that come meanwhile are kept."""
        number = self.send(method, session, **params)
        while True:
            message = self.hear()
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]
            self.events.append(message)

    def wait_for(self, method):
        """Until that event has come."""
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self.hear())

    def open(self, file, width=1440, height=900):
        """Load a file in a window of that width, up to 600 pixels a phone's. Returns what `LOOK` and `account` say, and a "screenshot"."""
        self.events = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable", session)
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=width <= 600)
        self.call("Emulation.setDeviceMetricsOverride", session, **size)
        self.events = []
        self.call("Page.navigate", session, url=file.absolute().as_uri())
        self.wait_for("Page.loadEventFired")
        looked = self.call("Runtime.evaluate", session, expression=LOOK, returnByValue=True)["result"]
        size["height"] = min(looked["value"]["height"], 16_000)  # the whole page
        self.call("Emulation.setDeviceMetricsOverride", session, **size)
        shot = self.call("Page.captureScreenshot", session)["data"]
        self.call("Target.closeTarget", targetId=target)
        return {**looked["value"], **self.account(), "screenshot": base64.b64decode(shot)}

    def account(self):
        """What went wrong while a page was loaded, in words, and all addresses that were asked for."""
        problems, requests = [], []
        for event in self.events:
            what, params = event.get("method"), event.get("params", {})
            if what == "Network.requestWillBeSent":
                requests.append(params["request"]["url"])
            elif what == "Network.loadingFailed":
                problems.append(f"request failed: {params['errorText']}")
            elif what == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                problems.append(f"{params['entry']['level']}: {params['entry']['text']}")
            elif what == "Runtime.exceptionThrown":
                problems.append(f"exception: {params['exceptionDetails']['text']}")
            elif what == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                problems.append(f"console: {params['args']}")
        return {"problems": problems, "requests": requests}


def complaints(page, file):
    """All that is wrong with a page, in words."""
    found = list(page["problems"])
    found += [f"asked for {url}" for url in page["requests"] if not url.startswith(("file:", "data:"))]
    found += [f"{page['overflow']} pixels too wide: {page['wide'][:3]}"] * (page["overflow"] > 0)
    found += [f"formula not visible: {text}" for text, width, height in page["formulas"] if width < 4 or height < 8]
    found += [f"too small: {text}" for text in page["small"]]
    found += [f"picture not shown: {alt}" for alt in page["broken"]]
    for link in page["links"]:
        address = urlsplit(link)
        if address.scheme == "file":
            target = Path(unquote(address.path))
            found += [f"leads nowhere: {link}"] * (not target.exists())
            found += [f"leads to no place: {link}"] * (
                target == file and bool(address.fragment) and address.fragment not in page["anchors"]
            )
        else:
            found += [f"odd address: {link}"] * (address.scheme not in ("http", "https"))
    with Image.open(io.BytesIO(page["screenshot"])) as shot:
        found += ["the screenshot is blank"] * (len(shot.convert("L").getcolors()) < 20)
    return found


def keep(page, name):
    """Screenshots stay where somebody wants to look at them: EFFILIB_SCREENSHOTS=folder."""
    place = os.environ.get("EFFILIB_SCREENSHOTS")
    if place:
        paths.write(paths.make(place) / f"{name}.png", page["screenshot"])
