"""A report as a list of blocks, and as Markdown. eval/reporting/html_page.py makes the page of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Items:
    """An unordered list."""

    items: list[str]


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Verdict:
    """What was found: in a sentence, and the lines that the command prints."""

    sentence: str
    lines: list[str]


@dataclass(frozen=True)
class Table:
    """Rows of plain text; `numeric` aligns all but the first column to the right. caption: what the numbers are."""

    header: list[str]
    rows: list[list[str]]
    numeric: bool = True
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    """A PNG file. alt: what it shows, for those who do not see it; the caption where there is no more to say."""

    path: Path
    caption: str
    alt: str = ""

    @property
    def said(self) -> str:
        return self.alt or self.caption


@dataclass(frozen=True)
class Details:
    """Blocks that most readers skip: folded on the page."""

    summary: str
    blocks: "list[Block]"


Block = Heading | Paragraph | Items | Code | Verdict | Table | Picture | Details


def pictures_of(blocks: Sequence[Block]) -> list[Picture]:
    """All of them, folded ones too, in their order."""
    found: list[Picture] = []
    for block in blocks:
        if isinstance(block, Details):
            found += pictures_of(block.blocks)
        elif isinstance(block, Picture):
            found.append(block)
    return found


def to_markdown(blocks: Sequence[Block], folder: Path) -> str:
    """GitHub-flavoured Markdown; pictures are linked relative to `folder`, where the text will lie."""
    return "\n\n".join(_markdown(block, folder) for block in blocks) + "\n"


def _markdown(block: Block, folder: Path) -> str:
    match block:
        case Heading(text, level):
            return "#" * level + " " + text
        case Paragraph(text):
            return text
        case Items(items):
            return _list(items)
        case Code(text):
            return f"```\n{text}\n```"
        case Verdict(sentence, lines):
            return f"**{sentence}**" + (f"\n\n{_list(lines)}" if lines else "")
        case Picture(path, caption):
            return f"![{block.said}]({path.relative_to(folder).as_posix()})\n\n{caption}"
        case Table(header, rows, numeric, caption):
            rule = ["---"] + ["---:" if numeric else "---"] * (len(header) - 1)
            cells = [[cell.replace("|", "\\|") for cell in row] for row in [header, rule, *rows]]
            table = "\n".join("| " + " | ".join(row) + " |" for row in cells)
            return f"{caption}:\n\n{table}" if caption else table
        case Details(summary, blocks):
            return f"<details><summary>{summary}</summary>\n\n{to_markdown(blocks, folder)}\n</details>"


def _list(items: Sequence[str]) -> str:
    return "\n".join(f"- {item}" for item in items)
