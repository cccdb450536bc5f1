"""Check a page of `specrl report` as it is used, in Chromium: by keyboard, in light and dark, wide and on a phone.

    specrl report runs/quickstart-20261121-104250-15218 --output_dir runs/page
    python tools/check_report.py runs/page/report.html

Keys are pressed as a keyboard presses them, through the DevTools protocol. Each must hold:

- Tab reaches every control, in the order of the page, and Shift+Tab goes the same way back; neither is ever caught.
- What has the focus lies in the window and has an outline that stands out (a contrast of 3 or more, WCAG 2.2, 1.4.11).
- Enter follows a link; Enter and Space open and close what is folded, and what was folded is then reached by Tab.
- Arrow keys move a table that is wider than its box.
- Text has a contrast of 4.5 or more (WCAG 2.2, 1.4.3).
- Nothing is wider than the window, no picture is broken, nothing is loaded, and the console stays empty.

Needs a Chromium: CHROMIUM=path, or one by a usual name; without one it ends with status 2.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
KEYS = {  # the key's number, and the text it types
    "Tab": (9, ""), "Enter": (13, "\r"), " ": (32, " "), "ArrowRight": (39, ""), "ArrowLeft": (37, ""), "End": (35, ""),
}  # fmt: skip
SHIFT = 8

ABOUT = """
(() => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(x => x / 255)
    .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const contrast = (a, b) => {
    const [more, less] = [light(a), light(b)].sort((x, y) => y - x);
    return (more + 0.05) / (less + 0.05);
  };
  const paper = node => {
    for (let at = node; at; at = at.parentElement) {
      const colour = rgb(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return matchMedia("(prefers-color-scheme: dark)").matches ? [18, 18, 18] : [255, 255, 255];
  };
  const name = node => node.tagName.toLowerCase() + " " +
    (node.getAttribute("aria-label") || node.textContent.trim()).slice(0, 60);
  const shown = node => node.checkVisibility();
  const controls = () => [...document.querySelectorAll("a[href], summary, button, input, select, [tabindex='0']")]
    .filter(shown);
  window.check = {
    controls: () => controls().map(name),
    place: () => controls().indexOf(document.activeElement),
    focus: () => {
      const node = document.activeElement, style = getComputedStyle(node), box = node.getBoundingClientRect();
      return {
        name: name(node), visible: node.matches(":focus-visible"), outline: parseFloat(style.outlineWidth),
        kind: style.outlineStyle, contrast: contrast(rgb(style.outlineColor), paper(node.parentElement)),
        inside: box.bottom > 0 && box.right > 0 && box.top < innerHeight && box.left < innerWidth,
      };
    },
    faint: () => {
      const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = new Set();
      while (walker.nextNode()) {
        const node = walker.currentNode.parentElement;
        if (!walker.currentNode.data.trim() || !shown(node)) continue;
        const value = contrast(rgb(getComputedStyle(node).color), paper(node));
        if (value < 4.5) found.add(`${name(node)}: ${value.toFixed(2)}`);
      }
      return [...found];
    },
    page: () => ({
      over: document.scrollingElement.scrollWidth - innerWidth,
      broken: [...document.images].filter(image => !image.naturalWidth).length,
      images: document.images.length,
    }),
    boxes: () => controls().map((node, n) => [n, node.scrollWidth - node.clientWidth, node])
      .filter(([, over, node]) => node.tagName === "DIV" && over > 0).map(([n]) => n),
    scrolled: () => document.activeElement.scrollLeft,
    to: n => controls()[n].focus(),
    open: n => controls()[n].parentElement.open,
    folds: () => controls().flatMap((node, n) => node.tagName === "SUMMARY" ? [n] : []),
    start: () => {  // where Tab goes on from is the body's beginning again
      document.body.tabIndex = -1;
      document.body.focus();
      document.body.removeAttribute("tabindex");
      scrollTo(0, 0);
    },
  };
})()
"""


class Browser:
    """A Chromium without a window, spoken to in the DevTools protocol over two pipes; a zero byte ends a message."""

    def __init__(self, program: str, profile: str) -> None:
        (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
        flags = (
            f"--headless --no-sandbox --disable-gpu --no-first-run --remote-debugging-pipe --user-data-dir={profile}"
        )

        def as_3_and_4() -> None:
            spare = os.dup(theirs_in), os.dup(theirs_out)
            os.dup2(spare[0], 3)
            os.dup2(spare[1], 4)

        self.process = subprocess.Popen(
            [program, *flags.split(), "about:blank"], preexec_fn=as_3_and_4, close_fds=False,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self._to, self._from = os.fdopen(ours_out, "wb"), os.fdopen(ours_in, "rb")
        self._count, self._rest, self.session = itertools.count(1), b"", ""
        self.events: list[dict[str, Any]] = []

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._from.fileno(), 1 << 16)
            if not more:
                raise SystemExit("Chromium ended by itself; start it by hand to see why")
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))

    def ask(self, method: str, **given: Any) -> dict[str, Any]:
        """Call a method of the protocol; events that come meanwhile are kept."""
        number = next(self._count)
        message = {"id": number, "method": method, "params": given}
        if self.session:
            message["sessionId"] = self.session
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        while (answer := self._read()).get("id") != number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return dict(answer["result"])

    def wait(self, event: str) -> None:
        """Until an event of this name came."""
        while not any(seen.get("method") == event for seen in self.events):
            self.events.append(self._read())

    def js(self, expression: str) -> Any:
        """The value of an expression in the page."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def press(self, key: str, modifiers: int = 0) -> None:
        """A key, down and up; returns when the page has drawn what followed."""
        number, text = KEYS[key]
        given = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": number}
        down: dict[str, Any] = {"type": "keyDown", "text": text} if text else {"type": "rawKeyDown"}
        self.ask("Input.dispatchKeyEvent", **down, **given, modifiers=modifiers)
        self.ask("Input.dispatchKeyEvent", type="keyUp", **given, modifiers=modifiers)
        self.js("new Promise(done => requestAnimationFrame(() => setTimeout(done, 0)))")

    def close(self) -> None:
        """End it."""
        try:
            self.ask("Browser.close")
        finally:
            self.process.wait(20)


def open_page(browser: Browser, page: Path) -> None:
    """Open the page in a tab and listen to it."""
    target = browser.ask("Target.createTarget", url="about:blank")["targetId"]
    browser.session = browser.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    for domain in ("Page", "Runtime", "Log", "Network"):
        browser.ask(f"{domain}.enable")
    browser.ask("Page.navigate", url=page.resolve().as_uri())
    browser.wait("Page.loadEventFired")
    browser.js(ABOUT)


def walk(browser: Browser, names: list[str], *, back: bool) -> list[str]:
    """Press Tab, or Shift+Tab, through all the controls; what went wrong."""
    wrong, way = list[str](), list(range(len(names)))
    for n in way[-2::-1] if back else way:  # backwards from the last one, where forwards ended
        browser.press("Tab", SHIFT if back else 0)
        if (at := browser.js("check.place()")) != n:
            return [*wrong, f"{'Shift+' if back else ''}Tab goes to {names[at] if at >= 0 else at}, not {names[n]!r}"]
        found = browser.js("check.focus()")
        if not (found["visible"] and found["outline"] >= 2 and found["kind"] != "none" and found["contrast"] >= 3):
            wrong.append(f"the focus cannot be seen: {found}")
        if not found["inside"]:
            wrong.append(f"what has the focus is out of sight: {found['name']!r}")
    return wrong


def use(browser: Browser) -> list[str]:
    """Press what can be pressed; what went wrong."""
    wrong = []
    browser.js("check.start()")
    browser.press("Tab")
    browser.press("Enter")
    if browser.js("document.activeElement.id") != "content":
        wrong.append("Enter on the first link does not lead to the results")
    links = browser.js("[...document.querySelectorAll('nav a')].map(a => a.hash)")
    for n, link in enumerate(links, start=1):
        browser.js(f"check.to({n})")
        browser.press("Enter")
        if browser.js("location.hash") != link:
            wrong.append(f"Enter does not follow {link}")
    for n in reversed(browser.js("check.folds()")):  # the last first: what opens moves only those behind it
        browser.js(f"check.to({n})")
        for key, opened in ((" ", True), ("Enter", False), ("Enter", True)):
            browser.press(key)
            if browser.js(f"check.open({n})") != opened:
                wrong.append(f"{key!r} does not {'open' if opened else 'close'} control {n}")
    for n in browser.js("check.boxes()"):
        browser.js(f"check.to({n})")
        browser.press("ArrowRight")
        browser.js("new Promise(done => setTimeout(done, 200))")  # it moves smoothly
        if not browser.js("check.scrolled()"):
            wrong.append(f"ArrowRight does not move {browser.js('check.focus()')['name']!r}")
    return wrong


def check(browser: Browser, page: Path, theme: str, width: int) -> list[str]:
    """Everything, in one theme at one width; what went wrong."""
    browser.ask("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
    browser.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
    browser.events.clear()
    browser.ask("Page.navigate", url="about:blank")
    browser.wait("Page.loadEventFired")
    browser.events.clear()
    browser.ask("Page.navigate", url=page.resolve().as_uri())
    browser.wait("Page.loadEventFired")
    browser.js(ABOUT)
    wrong = []
    for opened in (False, True):  # folded as it comes, and with everything open
        browser.js("check.start()")
        names = browser.js("check.controls()")
        wrong += walk(browser, names, back=False)
        if opened and not wrong:
            wrong += walk(browser, names, back=True)
            browser.press("Tab", SHIFT)
            if browser.js("check.place()") == 0:
                wrong.append("Shift+Tab does not leave the page at its beginning")
            browser.js(f"check.to({len(names) - 1})")
            browser.press("Tab")
            if browser.js("check.place()") == len(names) - 1:
                wrong.append("Tab does not leave the page at its end")
        if not opened:
            wrong += use(browser)
        found = browser.js("check.page()")
        if found["over"] > 0:
            wrong.append(f"the page is {found['over']} pixels wider than the window")
        if found["broken"]:
            wrong.append(f"{found['broken']} of {found['images']} pictures are broken")
        wrong += [f"too little contrast: {text}" for text in browser.js("check.faint()")]
    print(f"{theme:5}  {width:5} px  {len(names):3} controls with all open  {found['images']:3} pictures  ", end="")
    for event in browser.events:
        given = event.get("params", {})
        if event.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            wrong.append(f"on the console: {json.dumps(given)[:300]}")
        elif event.get("method") == "Network.requestWillBeSent":
            address = given["request"]["url"]
            if address.split("#")[0] != page.resolve().as_uri() and not address.startswith("data:"):
                wrong.append(f"loaded: {address[:100]}")
    print(f"{len(wrong)} wrong" if wrong else "all right")
    return wrong


def main(arguments: list[str]) -> int:
    """Status 0: all right; 1: something is wrong; 2: no page or no browser."""
    if len(arguments) != 1 or not Path(arguments[0]).is_file():
        print("give it the report.html of a 'specrl report', but got", *arguments, file=sys.stderr)
        return 2
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if program is None or shutil.which(program) is None:
        print(f"needs Chromium, but got {program}: set CHROMIUM, or 'apt-get install chromium'", file=sys.stderr)
        return 2
    page, wrong = Path(arguments[0]), list[str]()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(program, profile)
        try:
            open_page(browser, page)
            for theme, width in itertools.product(("light", "dark"), (1280, 390)):
                wrong += [f"{theme}, {width} px: {text}" for text in check(browser, page, theme, width)]
        finally:
            browser.close()
    print(*wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
