"""A headless Chromium, the system's, that tests look at pages with. No name is resolved."""

import io
import os
import shutil
from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL import Image

from effilib import paths

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND"

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
  const inside = e => e.parentElement.closest(".scroll, pre, .formula, details");
  const edge = document.documentElement.clientWidth + 1;
  const wide = [...document.body.querySelectorAll("*")]
    .filter(e => shown(e) && !inside(e) && e.getBoundingClientRect().right > edge)
    .map(e => e.outerHTML.slice(0, 80));
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
    """`with Browser() as browser: page = browser.open(file, width)`."""

    def __enter__(self):
        from playwright.sync_api import sync_playwright

        self.driver = sync_playwright().start()
        self.chromium = self.driver.chromium.launch(
            executable_path=CHROMIUM, chromium_sandbox=False, args=[OFFLINE]
        )
        return self

    def __exit__(self, *error):
        self.chromium.close()
        self.driver.stop()

    def open(self, file, width=1440, height=900):
        """Load a file in a window of that width, up to 600 pixels a phone's. Returns what `LOOK` says, and
        "problems" in words, all addresses that were asked for as "requests", and a "screenshot" of the whole
        page."""
        page = self.chromium.new_page(viewport={"width": width, "height": height}, is_mobile=width <= 600)
        problems, requests = [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("requestfailed", lambda request: problems.append(f"request failed: {request.failure}"))
        page.on("pageerror", lambda error: problems.append(f"exception: {error.message}"))
        page.on(
            "console",
            lambda m: (
                problems.append(f"console: {m.type}: {m.text}")
                if m.type in ("error", "warning", "assert")
                else None
            ),
        )
        page.goto(file.absolute().as_uri())
        looked = page.evaluate(LOOK)
        shot = page.screenshot(full_page=True)
        page.close()
        return {**looked, "problems": problems, "requests": requests, "screenshot": shot}


def complaints(page, file):
    """All that is wrong with a page, in words."""
    found = list(page["problems"])
    found += [f"asked for {url}" for url in page["requests"] if not url.startswith(("file:", "data:"))]
    found += [f"{page['overflow']} pixels too wide: {page['wide'][:3]}"] * (page["overflow"] > 0)
    found += [
        f"formula not visible: {text}" for text, width, height in page["formulas"] if width < 4 or height < 8
    ]
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
