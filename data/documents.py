"""A document, and how it is taken from a record."""

from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

from data import records
from data.files import Undecodable, without_surrogates

MissingText = Literal["error", "skip"]


class Document(NamedTuple):
    """text: None for a record that is left out. group: package it belongs to, "" where there are none. missing: left
    out because it has no text, not because it is not UTF-8."""

    text: str | None
    group: str = ""
    missing: bool = False


class TextField:
    """The field of a record that holds its text. missing_text: what to do where there is none."""

    def __init__(self, name: str, missing_text: MissingText) -> None:
        self.name, self.missing_text = name, missing_text

    def document(self, record: Any, where: str) -> Document:
        """Raises ValueError for a record without the field, without text, or with something else there."""
        if not isinstance(record, dict):
            raise ValueError(f"{where} is {type(record).__name__}, expected an object with the field {self.name!r}")
        text = record.get(self.name)
        if isinstance(text, str):
            return Document(text)
        if text is not None:
            raise ValueError(
                f"{where}: field {self.name!r} is {type(text).__name__} ({str(text)[:40]!r}), expected text; mend or "
                "remove the record, or set corpus.text_field"
            )
        if self.missing_text == "skip":
            return Document(None, missing=True)
        if self.name not in record:
            self.check_column(list(record), where)
        raise ValueError(
            f"{where}: field {self.name!r} is null, expected text; set corpus.missing_text: skip to leave such records "
            "out and count them"
        )

    def check_column(self, names: list[str], where: str) -> None:
        if self.name not in names:
            raise ValueError(f"{where} has no field {self.name!r} (it has: {', '.join(names)}); set corpus.text_field")


def documents_of_lines(
    file: Iterable[bytes], name: str, field: TextField, undecodable: Undecodable
) -> Iterator[Document]:
    for record, where in records.json_lines(file, name):
        document = field.document(record, where)
        if document.text is not None:
            document = Document(without_surrogates(document.text, undecodable, where))
        yield document
