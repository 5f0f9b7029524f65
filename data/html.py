"""Corpora of HTML pages: manuals and other books that are many files."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from html import unescape
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
# Links to the pages around, as generators of manuals write them, which main_content does not know
NAVIGATION = [
    *(".navheader", ".navfooter", ".NAVHEADER", ".NAVFOOTER", 'table[summary^="Navigation"]'),  # DocBook
    *(".nav-panel", ".header > p > a[rel]", ".viewcode-link", ".headerlink"),  # Texinfo, Sphinx
    *(".chlinktop", ".chlinkbot", ".chlinkprevnexttop", ".chlinkprevnextbot"),  # GAPDoc
    *(".navsettop", ".navsetbottom", ".nav_table", ".book-navigation"),  # Scribble, LilyPond, Drupal
]
LINK = re.compile(r"""<a\s(?:[^>]*?\s)?href\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s>"']+))""", re.IGNORECASE)
FRAME_LINES = 4  # at either end of a page, which are compared with other pages'
FRAME_SHARE, FRAME_PAGES = 0.2, 4  # of a document's pages, and at least
LONG_LINE = 40  # characters; shorter ones are alike by chance
REPEATED = 0.8  # share of a page's lines


@dataclass(frozen=True)
class Page:
    """text: of its main content. links: files that it links to, in order."""

    text: str
    links: list[Path]


class HtmlTree(SourceTree):
    """Text of the HTML pages below some folders, extracted by resiliparse (pip install resiliparse).

    The pages of a document stand in the order in which a reader meets them: from the first page (index.html, else the
    first name) along its links, depth first; pages that no link leads to come last, by name. Lines that begin or end
    many of them are no text and go; so does a page most of whose lines stand on earlier pages of the same document: a
    copy, or a chapter of a manual that is there as one page too.

    Args:
        paths: folders. Groups, which can be held out, are their names
        include: patterns of file names; by default *.html, *.htm, *.xhtml
        exclude: names of folders or files left out at any depth, as patterns
        join: what one document is: all pages of a root, of a folder, or a page
        main_content: leave out navigation, headers and footers, as far as they can be told from the content
        language: two letters, e.g. "en": pages that say or seem to be of another are left out, lists of names among
            them; None takes all
    """

    def __init__(
        self,
        paths: list[str],
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        join: Join = "root",
        main_content: bool = True,
        language: str | None = None,
    ) -> None:
        if join not in get_args(Join):
            raise ValueError(f"join is {join!r}, expected one of {', '.join(get_args(Join))}")
        _library()
        if language is not None and not _detected(language):
            raise ValueError(f"language is {language!r}, which resiliparse does not detect: expected one such as 'en'")
        super().__init__(paths, include=include or PAGES, exclude=exclude)
        self.join, self.main_content, self.language = join, main_content, language

    def group_of(self, root: Path, path: Path) -> str:
        return root.resolve().name

    def _documents_paths(self) -> Iterator[tuple[str, list[Path]]]:
        yield from self._found

    @cached_property
    def _found(self) -> list[tuple[str, list[Path]]]:
        """As _documents_paths, looked for once: there may be a hundred thousand files."""
        below = {root: sorted(self._files_below(root), key=_natural) for root in self.roots}
        kept = set(each_once([path for files in below.values() for path in files]))
        documents: list[tuple[str, list[Path]]] = []
        for root, files in below.items():
            if not files:
                raise FileNotFoundError(f"no file below {root} matches {self.include}; change include or exclude")
            parts: dict[Path, list[Path]] = {}
            for path in filter(kept.__contains__, files):
                part = {"root": root, "folder": path.parent, "page": path}[self.join]
                parts.setdefault(part, []).append(path)
            documents += [(self.group_of(root, members[0]), members) for members in parts.values()]
        return documents

    def documents(self, skip: int) -> Iterator[Document]:
        for group, paths in itertools.islice(self._documents_paths(), skip, None):
            pages = {path.resolve(): self._read(path) for path in paths}
            ordered = [pages[path].text for path in reading_order(pages) if pages[path].text]
            texts = [text for text in without_frames(list(without_repeated(ordered))) if text]
            yield Document("\n\n".join(texts) + "\n" if texts else None, group, missing=not texts)

    def _read(self, path: Path) -> Page:
        html, extract_plain_text, encoding = _library()
        with naming(path):
            content = path.read_bytes()
        used = _encoding(content, encoding)
        tree = html.HTMLTree.parse_from_bytes(content, used)
        if tree.document is None or tree.body is None:
            return Page("", [])
        skipped = NAVIGATION if self.main_content else []
        text = extract_plain_text(tree, main_content=self.main_content, alt_texts=False, skip_elements=skipped).strip()
        if self.language is not None and not _is_in(self.language, tree, text):
            text = ""
        return Page(text, _links(path, encoding.bytes_to_str(content, used, "replace")))


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


def without_frames(texts: list[str]) -> list[str]:
    """Pages without the lines that begin or end many of them: names of the book, links, dates of generation."""
    pages = [[line.strip() for line in text.splitlines() if line.strip()] for text in texts]
    edges = Counter(line for lines in pages for line in {*lines[:FRAME_LINES], *lines[-FRAME_LINES:]})
    least = max(FRAME_PAGES, FRAME_SHARE * len(texts))
    frame = {"", *(line for line, count in edges.items() if count >= least)}
    return ["\n".join(_trimmed(text.splitlines(), frame)) for text in texts]


def _trimmed(lines: list[str], frame: set[str]) -> list[str]:
    kept = [number for number, line in enumerate(lines) if line.strip() not in frame]
    return lines[kept[0] : kept[-1] + 1] if kept else []


def without_repeated(texts: Iterable[str]) -> Iterator[str]:
    """Pages but for those of whose long lines REPEATED have come before. One without long lines counts as a line."""
    seen: set[int] = set()
    for text in texts:
        lines = {hash(line) for line in map(str.strip, text.splitlines()) if len(line) >= LONG_LINE} or {hash(text)}
        if len(lines & seen) < REPEATED * len(lines):
            yield text
        seen |= lines


def _is_in(language: str, tree: Any, text: str) -> bool:
    """By what the page says, and by its letters."""
    from resiliparse.parse.lang import detect_fast

    root = tree.document.query_selector("html")
    said = root.getattr("lang") or root.getattr("xml:lang") or language
    return said.lower().split("-")[0].split("_")[0] == language and detect_fast(text)[0] == language


def _detected(language: str) -> bool:
    from resiliparse.parse.lang import supported_langs

    return language in supported_langs()


def _first(path: Path) -> tuple[int, int]:
    """Least for the page that a reader would open: of the highest folder, by name."""
    name = path.stem.lower()
    return len(path.parts), FIRST_PAGES.index(name) if name in FIRST_PAGES else len(FIRST_PAGES)


def _links(page: Path, content: str) -> list[Path]:
    """Files that a page links to. From its text: resiliparse needs minutes to list the links of an index of names."""
    folder = str(page.parent)
    found = (_target(folder, unescape(match[1] or match[2] or match[3] or "")) for match in LINK.finditer(content))
    return [path for path in found if path is not None]


@lru_cache(2**16)  # pages have their links in common, and resolving asks the disk
def _target(folder: str, href: str) -> Path | None:
    """The file that a link of a page in `folder` leads to; None for other sites, scripts and places within the page."""
    name = unquote(href.split("#")[0].split("?")[0])
    if not name or "\0" in name or re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:|//", href):
        return None
    return Path(folder, name).resolve()


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
