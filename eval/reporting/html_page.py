"""The one self-contained page of a report: verdict first, readable on a phone, light and dark, without a request."""

import base64
import html
import re
import struct
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from common.errors import UsageError
from common.files import write_file
from eval.reporting.document import Block, Code, Details, Heading, Items, Paragraph, Picture, Table, Verdict
from eval.reporting.figures import DOTS_PER_INCH, PHONE_INCHES

PAGE = "report.html"
PHONE_PIXELS = 356  # of a figure of PHONE_INCHES: a phone's 390 without margins; its text has 9 pixels there
LARGEST = 1.6  # times that, on a desktop
NOTHING_BUT_ITSELF = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; form-action 'none'; base-uri 'none'"
STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --back: #ffffff; --soft: #f3f5f7; --line: #d0d7de; --mark: #0062a3;
  --shade: rgba(0, 0, 0, .22); }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --back: #0f1419; --soft: #1a2129; --line: #3a444f; --mark: #6cb6f5;
    --shade: rgba(255, 255, 255, .3); }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); overflow-wrap: break-word;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { margin: 0 auto; padding: 1rem 1rem 3rem; max-width: 64rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0 1rem; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 2.6rem 0 .6rem; padding-top: .8rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.08rem; margin: 1.8rem 0 .5rem; }
p, ul { max-width: 48rem; } ul { padding-left: 1.2rem; } li { margin: .15rem 0; }
.verdict { background: var(--soft); border-left: .3rem solid var(--mark); border-radius: .3rem; padding: .9rem 1rem; }
.verdict p { font-size: 1.15rem; line-height: 1.45; font-weight: 600; margin: 0; }
.verdict ul { margin: .7rem 0 0; font-size: .92rem; }
.scroll { overflow-x: auto; max-width: 100%; margin: .6rem 0 1.2rem;
  background: linear-gradient(to right, var(--back) 30%, transparent) left / 3rem 100% local,
    linear-gradient(to left, var(--back) 30%, transparent) right / 3rem 100% local,
    radial-gradient(farthest-side at 0 50%, var(--shade), transparent) left / .8rem 100% scroll,
    radial-gradient(farthest-side at 100% 50%, var(--shade), transparent) right / .8rem 100% scroll;
  background-repeat: no-repeat; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--mark); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
.caption { margin: 1.1rem 0 0; font-weight: 600; font-size: .95rem; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
td { white-space: nowrap; } thead th { border-bottom: 2px solid var(--line); vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tbody th { font-weight: 600; white-space: normal; min-width: 5.5rem; max-width: 12rem; }
@media (min-width: 40rem) { tbody th { max-width: 24rem; } table.text tbody th { min-width: 14rem; } }
table.text th, table.text td { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 6.5rem; }
.pictures { display: grid; gap: 1.2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr));
  margin: 1rem 0; }
.pictures > .wide { grid-column: 1 / -1; }
figure { margin: 0; min-width: 0; }
figure .scroll { margin: 0; }
figure img { display: block; width: 100%; height: auto; background: #ffffff; border: 1px solid var(--line);
  border-radius: .4rem; }
figcaption { font-size: .9rem; margin-top: .35rem; }
pre { background: var(--soft); padding: .7rem; border-radius: .4rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font-size: .88rem; }
details { border: 1px solid var(--line); border-radius: .4rem; padding: .1rem .8rem; margin: 1rem 0; }
summary { cursor: pointer; padding: .5rem 0; font-weight: 600; }
"""


def check_page(output: Path, title: str) -> None:
    """Before the work. Raises UsageError where OUTPUT has the page of another kind of report, which would be lost."""
    try:
        start = (output / PAGE).read_text(errors="replace")[:2000]
    except FileNotFoundError:
        return
    made = re.search(r'<meta name="generator" content="([^"]*)">', start)
    if made and html.unescape(made[1]) != title:
        raise UsageError(
            f"--output {output} has the page of another report, {html.unescape(made[1])}: choose another folder"
        )


def write_page(output: Path, title: str, of: str, blocks: Sequence[Block]) -> Path:
    """Writes OUTPUT/report.html and returns its path.

    Args:
        title: of this kind of report, which check_page knows again.
        of: what is reported on, for example the runs.
    """
    page = output / PAGE
    write_file(page, to_html(title, of, blocks).encode())
    return page


def to_html(title: str, of: str, blocks: Sequence[Block]) -> str:
    """One page that needs no other file: pictures are inline, the style is plain CSS, there is no script, and the
    browser is told to fetch nothing."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{NOTHING_BUT_ITSELF}">\n'
        f'<meta name="generator" content="{html.escape(title)}">\n'
        f'<link rel="icon" href="data:,">\n<title>{html.escape(f"{title}: {of}")}</title>\n<style>{STYLE}</style>\n'
        f"</head>\n<body>\n<main>\n{_all(blocks)}\n</main>\n</body>\n</html>\n"
    )


def _all(blocks: Sequence[Block]) -> str:
    """Pictures that follow each other stand side by side where there is room."""
    parts = []
    for pictured, group in groupby(blocks, lambda block: isinstance(block, Picture)):
        inner = "\n".join(_html(block) for block in group)
        parts.append(f'<div class="pictures">\n{inner}\n</div>' if pictured else inner)
    return "\n".join(parts)


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{html.escape(text)}</p>"
        case Items(items):
            return _list(items)
        case Code(text):
            return f"<pre><code>{html.escape(text)}</code></pre>"
        case Verdict(sentence, lines):
            more = _list(lines) if lines else ""
            return f'<section class="verdict" aria-label="Verdict"><p>{html.escape(sentence)}</p>{more}</section>'
        case Picture():
            return _picture(block)
        case Table():
            return _table(block)
        case Details(summary, blocks):
            return f"<details><summary>{html.escape(summary)}</summary>\n{_all(blocks)}\n</details>"


def _list(items: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in items) + "</ul>"


def _scroll(inner: str, label: str) -> str:
    """What is wider than the page scrolls by itself, with the keyboard too."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{html.escape(label)}">{inner}</div>'


def _picture(picture: Picture) -> str:
    data = picture.path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])  # of a PNG's first chunk
    least = round(width / DOTS_PER_INCH / PHONE_INCHES * PHONE_PIXELS)
    wide = least > PHONE_PIXELS
    image = (
        f'<img alt="{html.escape(picture.said)}" width="{width}" height="{height}"'
        + (f' style="min-width: {least}px"' if wide else "")
        + f' src="data:image/png;base64,{base64.b64encode(data).decode()}">'
    )
    body = _scroll(image, picture.caption) if wide else image
    kind = ' class="wide"' if wide else ""
    return (
        f'<figure{kind} style="max-width: {LARGEST * least:.0f}px">{body}'
        f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
    )


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in table.header)
    body = "".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in table.rows
    )
    kind = "" if table.numeric else ' class="text"'
    caption = f'<p class="caption">{html.escape(table.caption)}</p>' if table.caption else ""
    label = table.caption or "table: " + ", ".join(cell for cell in table.header if cell)
    rows = f"<table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return caption + _scroll(rows, label)
