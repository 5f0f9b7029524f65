"""Corpora of HTML pages: manuals and other books that are many files."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import unquote

from common.files import naming
from data.corpora import SourceTree
from data.documents import Document
from data.files import each_once

Join = Literal["root", "folder", "page"]
PAGES = ["*.html", "*.htm", "*.xhtml"]
FIRST_PAGES = ("index", "toc", "contents", "book")  # names of pages that link to all others


@dataclass(frozen=True)
class Page:
    """text: of its main content. links: files that it links to, in order."""

    text: str
    links: list[Path]


class HtmlTree(SourceTree):
    """Text of the HTML pages below some folders, extracted by resiliparse (pip install resiliparse).

    The pages of a document stand in the order in which a reader meets them: from the first page (index.html, else the
    first name) along its links, depth first; pages that no link leads to come last, by name.

    Args:
        paths: folders. Groups, which can be held out, are their names
        include: patterns of file names; by default *.html, *.htm, *.xhtml
        exclude: names of folders or files left out at any depth, as patterns
        join: what one document is: all pages of a root, of a folder, or a page
        main_content: leave out navigation, headers and footers, as far as they can be told from the content
    """

    def __init__(
        self,
        paths: list[str],
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        join: Join = "root",
        main_content: bool = True,
    ) -> None:
        if join not in get_args(Join):
            raise ValueError(f"join is {join!r}, expected one of {', '.join(get_args(Join))}")
        _library()
        super().__init__(paths, include=include or PAGES, exclude=exclude)
        self.join, self.main_content = join, main_content

    def group_of(self, root: Path, path: Path) -> str:
        return root.resolve().name

    def _documents_paths(self) -> Iterator[tuple[str, list[Path]]]:
        for root in self.roots:
            files = each_once(sorted(self._files_below(root), key=_natural))
            if not files:
                raise FileNotFoundError(f"no file below {root} matches {self.include}; change include or exclude")
            parts: dict[Path, list[Path]] = {}
            for path in files:
                part = {"root": root, "folder": path.parent, "page": path}[self.join]
                parts.setdefault(part, []).append(path)
            yield from ((self.group_of(root, members[0]), members) for members in parts.values())

    def documents(self, skip: int) -> Iterator[Document]:
        for group, paths in itertools.islice(self._documents_paths(), skip, None):
            pages = {path.resolve(): self._read(path) for path in paths}
            texts = [pages[path].text for path in reading_order(pages) if pages[path].text]
            yield Document("\n\n".join(texts) + "\n" if texts else None, group, missing=not texts)

    def _read(self, path: Path) -> Page:
        html, extract_plain_text, encoding = _library()
        with naming(path):
            content = path.read_bytes()
        tree = html.HTMLTree.parse_from_bytes(content, _encoding(content, encoding))
        if tree.document is None or tree.body is None:
            return Page("", [])
        links = [anchor.getattr("href") for anchor in tree.document.get_elements_by_tag_name("a")]
        text = extract_plain_text(tree, main_content=self.main_content, alt_texts=False)
        return Page(text.strip(), [found for href in links if href and (found := _target(path, href)) is not None])


def reading_order(pages: dict[Path, Page]) -> list[Path]:
    """All pages, each once, as HtmlTree says. pages: by resolved path, in the order of their names."""
    found: dict[Path, None] = {}
    for start in [min(pages, key=_first), *pages]:
        pending = [start]
        while pending:
            path = pending.pop()
            if path in pages and path not in found:
                found[path] = None
                pending += reversed(pages[path].links)
    return list(found)


def _first(path: Path) -> tuple[int, int]:
    """Least for the page that a reader would open: of the highest folder, by name."""
    name = path.stem.lower()
    return len(path.parts), FIRST_PAGES.index(name) if name in FIRST_PAGES else len(FIRST_PAGES)


def _target(page: Path, href: str) -> Path | None:
    """The file that a link of a page leads to; None for other sites, scripts and places within the page."""
    name = unquote(href.split("#")[0].split("?")[0])
    if not name or "\0" in name or re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:|//", href):
        return None
    return (page.parent / name).resolve()


def _encoding(content: bytes, detection: Any) -> str:
    try:
        content.decode()
    except UnicodeDecodeError:
        return str(detection.detect_encoding(content, from_html_meta=True))
    return "utf-8"


def _natural(path: Path) -> list[tuple[int, str]]:
    """ch2 before ch10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def _library() -> tuple[Any, Any, Any]:
    try:
        from resiliparse.extract.html2text import extract_plain_text
        from resiliparse.parse import encoding, html
    except ImportError as error:
        raise ValueError(f"reading HTML needs resiliparse ({error}): pip install -r requirements.txt") from error
    return html, extract_plain_text, encoding
