"""What every report's page must be: read with the standard library, and with a browser where there is one."""

import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PHONE, DESKTOP = 390, 1280
VOID = {"meta", "link", "img", "br", "hr"}


class Page(HTMLParser):
    """tags: (name, attributes, names of the elements around it). texts: by tag, of headings, title and the like."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None], list[tuple[str, str]]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        assert len(attributes) == len(attrs), f"{tag} has an attribute twice: {attrs}"
        self.tags.append((tag, attributes, list(self._open)))
        self.texts.setdefault(tag, []).append("")
        if tag not in VOID:
            self._open.append((tag, attributes.get("class") or ""))

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1][0] == tag, f"</{tag}> closes {self._open[-1:]}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for tag in {tag for tag, _ in self._open}:
            self.texts[tag][-1] += data

    def of(self, *names: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes, _ in self.tags if tag in names]


def check_html(text: str) -> Page:
    """What can be seen without a browser; returns the page for more."""
    page = Page(text)
    assert text.startswith("<!doctype html>") and page.of("html") == [{"lang": "en"}]
    assert page.texts["title"][0].strip() and len(page.of("main")) == 1
    assert any(one.get("name") == "viewport" for one in page.of("meta"))
    (policy,) = [one["content"] for one in page.of("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    assert policy and policy.startswith("default-src 'none'")
    assert not page.of("script", "iframe", "object", "embed", "base")
    for tag, attributes, around in page.tags:
        assert not any(name.startswith("on") for name in attributes), f"{tag} has a handler"
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert (attributes.get(name) or "data:").startswith("data:"), f"{tag} asks for {attributes[name]}"
        if tag == "table":
            assert around[-1] == ("div", "scroll")
    assert "url(" not in text and "@import" not in text
    check_headings([int(tag[1]) for tag, _, _ in page.tags if re.fullmatch("h[1-6]", tag)])
    for image in page.of("img"):
        assert (image["alt"] or "").strip() and image["width"] and image["height"]
    for region in (one for one in page.of("div") if one.get("class") == "scroll"):
        assert region["tabindex"] == "0" and region["role"] == "region" and (region["aria-label"] or "").strip()
    check_order([(tag, attributes.get("class") or "") for tag, attributes, _ in page.tags])
    assert "-0.000" not in text and not re.search(r"\b1 (samples|documents|tasks)\b", text)
    return page


def check_headings(levels: list[int]) -> None:
    assert levels[0] == 1 and levels.count(1) == 1, levels
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False)), levels


def check_order(tags: list[tuple[str, str]]) -> None:
    """The verdict stands behind the title, and pictures before tables."""
    names = [f"{tag}.{kind}" if kind == "verdict" else tag for tag, kind in tags]
    assert names.index("section.verdict") == names.index("h1") + 1
    first = {name: names.index(name) for name in ("img", "table") if name in names}
    assert "img" not in first or first["img"] < first.get("table", len(names))


def find_browser() -> str | None:
    """Chromium or Chrome; LONGSPLASH_CHROMIUM names one that lies elsewhere."""
    return os.environ.get("LONGSPLASH_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)


SCRIPT = """
addEventListener("load", () => {
  const found = {};
  for (const frame of document.querySelectorAll("iframe")) {
    const inner = frame.contentDocument, width = inner.documentElement.clientWidth;
    const scrolls = [...inner.querySelectorAll(".scroll")];
    const out = [...inner.body.querySelectorAll("*")].filter(one =>
      !scrolls.some(scroll => scroll !== one && scroll.contains(one)) && one.getBoundingClientRect().right > width + 1);
    const texts = [...inner.querySelectorAll("p, li, td, th, figcaption, code, summary")];
    found[frame.id] = {
      width, scroll_width: inner.documentElement.scrollWidth,
      overflowing: out.map(one => one.tagName + " " + one.textContent.slice(0, 60)),
      scrolling: scrolls.filter(one => one.scrollWidth > one.clientWidth + 1).length,
      smallest_text: Math.min(...texts.map(one => parseFloat(frame.contentWindow.getComputedStyle(one).fontSize))),
      images: [...inner.images].map(one => one.complete && one.naturalWidth > 0),
      requests: frame.contentWindow.performance.getEntriesByType("resource").map(one => one.name)
        .filter(name => !name.startsWith("data:")),
    };
  }
  document.getElementById("found").textContent = JSON.stringify(found);
});
"""


def look(browser: str, pages: Mapping[str, str], folder: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Opens pages, with all that is folded, at the width of a phone and of a desktop, in one start of the browser.

    Args:
        pages: HTML by a name.
        folder: for the files, empty.

    Returns: name -> width in CSS pixels -> what SCRIPT finds.
    """
    frames = []
    for name, text in pages.items():
        (folder / f"{name}.html").write_text(text.replace("<details>", "<details open>"))
        frames += [
            f'<iframe id="{name} {width}" src="{name}.html" width="{width}" height="900" style="border: 0"></iframe>'
            for width in (PHONE, DESKTOP)
        ]
    outer = f'<!doctype html><body>{"".join(frames)}<pre id="found"></pre><script>{SCRIPT}</script>'
    (folder / "frames.html").write_text(outer)
    ended = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}",
            "--virtual-time-budget=10000", "--dump-dom",
            (folder / "frames.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    printed = re.search(r'<pre id="found">(.*?)</pre>', ended.stdout, re.S)
    assert printed and printed[1], ended.stderr[-2000:]
    found = json.loads(html.unescape(printed[1]))
    return {name: {width: found[f"{name} {width}"] for width in (PHONE, DESKTOP)} for name in pages}
