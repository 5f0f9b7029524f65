"""The files of a report: Markdown, the page, and every number as JSON."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.files import to_rows, write_file
from eval.reporting.document import Block, Code, Heading, Items, to_markdown
from eval.reporting.html_page import write_page


def write_documents(
    markdown: Path, title: str, runs: Sequence[str], blocks: Sequence[Block], numbers: dict[str, Any]
) -> Path:
    """Writes the Markdown file, JSON of its name and report.html beside it; returns the page's path.

    title: as in write_page. runs: what is reported on.
    """
    folder = markdown.parent
    write_file(markdown, to_markdown(blocks, folder).encode())
    write_file(markdown.with_suffix(".json"), to_rows(numbers))
    return write_page(folder, title, " and ".join(runs), blocks)


def made_by(command: str, facts: Sequence[str]) -> list[Block]:
    """How a report ends: the command, and what else its numbers depend on."""
    return [Heading("Made by"), Code(command), Items(list(facts))]
