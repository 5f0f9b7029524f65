"""A report as a list of blocks, rendered to Markdown and to one self-contained HTML page."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --back: #ffffff; --soft: #f3f5f7; --line: #d0d7de; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --back: #0f1419; --soft: #1a2129; --line: #3a444f; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; background: var(--back); color: var(--text);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; } h2 { font-size: 1.3rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
table.text th, table.text td { text-align: left; overflow-wrap: anywhere; min-width: 6rem; }
thead th { background: var(--soft); }
figure { margin: 1.2rem 0; }
figure img { width: 100%; height: auto; background: #ffffff; border: 1px solid var(--line); border-radius: .4rem; }
figcaption { font-size: .92rem; }
pre { background: var(--soft); padding: .7rem; overflow-x: auto; border-radius: .4rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
"""


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
class Table:
    """Rows of plain text; `numeric` aligns all but the first column to the right."""

    header: list[str]
    rows: list[list[str]]
    numeric: bool = True


@dataclass(frozen=True)
class Picture:
    """A PNG file; `caption` is also its text alternative."""

    path: Path
    caption: str


Block = Heading | Paragraph | Items | Code | Table | Picture


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
            return "\n".join(f"- {item}" for item in items)
        case Code(text):
            return f"```\n{text}\n```"
        case Picture(path, caption):
            return f"![{caption}]({path.relative_to(folder).as_posix()})\n\n{caption}"
        case Table(header, rows, numeric):
            rule = ["---"] + ["---:" if numeric else "---"] * (len(header) - 1)
            cells = [[cell.replace("|", "\\|") for cell in row] for row in [header, rule, *rows]]
            return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """One page that needs no other file: pictures are inline, the style is plain CSS, there is no script."""
    body = "\n".join(_html(block) for block in blocks)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n'
        f"</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{html.escape(text)}</p>"
        case Items(items):
            return "<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in items) + "</ul>"
        case Code(text):
            return f"<pre><code>{html.escape(text)}</code></pre>"
        case Picture(path, caption):
            data = base64.b64encode(path.read_bytes()).decode()
            said = html.escape(caption)
            return (
                f'<figure><img alt="{said}" src="data:image/png;base64,{data}"><figcaption>{said}</figcaption></figure>'
            )
        case Table(header, rows, numeric):
            head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
            body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
            kind = "" if numeric else ' class="text"'
            return f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
