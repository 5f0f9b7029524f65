"""Pages of HTML as documents: their text, their order, and what is left out."""

from pathlib import Path

import pytest

from data.html import HtmlTree

PAGE = """<!DOCTYPE html><html><head><title>t</title>{head}<style>p {{ color: red }}</style></head><body>
<nav><a href="index.html">Home of all</a></nav>
<main><h1>{title}</h1>{body}</main><script>var hidden = 1;</script></body></html>"""


def write(path: Path, title: str, body: str, head: str = '<meta charset="utf-8">', encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(PAGE.format(title=title, body=body, head=head).encode(encoding))


def links(*names: str) -> str:
    return "".join(f'<li><a href="{name}">to it</a></li>' for name in names)


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """index -> ch10 -> part/deep, then ch2; lost is linked by nobody; links that lead nowhere stand between."""
    root = tmp_path / "book"
    write(
        root / "index.html", "Start", links("https://x.org/a.html", "#top", "ch10.html#a", "ch2.html?x=1", "gone.html")
    )
    write(root / "ch2.html", "Second", "<p>größer &lt;tag&gt;</p>" + links("index.html"))
    write(
        root / "ch10.html", "Tenth", "<p>A paragraph.</p><pre>def f(x):\n    return  1</pre>" + links("part/deep.html")
    )
    write(root / "part" / "deep.html", "Deep", links("../ch2.html", "javascript:void(0)"))
    write(root / "lost.html", "Lost", "<p>alone</p>")
    (root / "style.css").write_text("p {}")
    return root


def order(text: str) -> list[str]:
    titles = ("Start", "Second", "Tenth", "Deep", "Lost")
    return sorted((title for title in titles if title in text), key=text.index)


def test_a_root_is_one_document_in_the_order_of_its_links(book: Path) -> None:
    (document,) = HtmlTree([str(book)]).documents(0)
    assert document.group == "book" and document.text is not None
    assert order(document.text) == ["Start", "Tenth", "Deep", "Second", "Lost"]
    assert "größer <tag>" in document.text and "    return  1" in document.text
    assert "hidden" not in document.text and "color" not in document.text and "Home of all" not in document.text


def test_folders_and_pages_are_documents(book: Path) -> None:
    def titles(join: str) -> list[list[str]]:
        return [order(document.text or "") for document in HtmlTree([str(book)], join=join).documents(0)]

    assert titles("folder") == [["Start", "Tenth", "Second", "Lost"], ["Deep"]]
    assert titles("page") == [["Second"], ["Tenth"], ["Start"], ["Lost"], ["Deep"]]
    (last,) = HtmlTree([str(book)], join="page").documents(4)
    assert order(last.text or "") == ["Deep"]


def test_roots_are_groups(book: Path, tmp_path: Path) -> None:
    write(tmp_path / "other" / "a.htm", "Other", "<p>x</p>")
    corpus = HtmlTree([str(book), str(tmp_path / "other")], exclude=["part", "lost.*"])
    assert corpus.groups() == {"book", "other"}
    assert [document.group for document in corpus.documents(0)] == ["book", "other"]
    before = corpus.identity()
    write(tmp_path / "other" / "a.htm", "Other", "<p>xy</p>")
    assert corpus.identity() != before


@pytest.mark.parametrize(
    ("head", "encoding"),
    [("", "utf-8"), ('<meta charset="iso-8859-1">', "latin-1"), ('<meta charset="koi8-r">', "koi8-r")],
)
def test_encodings(head: str, encoding: str, tmp_path: Path) -> None:
    text = "привет, как дела" if encoding == "koi8-r" else "größer als Café"
    write(tmp_path / "a.html", "T", f"<p>{text}</p>", head, encoding)
    (document,) = HtmlTree([str(tmp_path)]).documents(0)
    assert text in (document.text or "")


def test_what_has_no_text_is_counted_as_missing(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_bytes(b"")
    (tmp_path / "b.html").write_text("<html><body><img src='x.png'></body></html>")
    (document,) = HtmlTree([str(tmp_path)]).documents(0)
    assert document.text is None and document.missing


def test_mistakes_name_what_was_expected(book: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="join is 'book', expected one of root, folder, page"):
        HtmlTree([str(book)], join="book")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="does not exist"):
        HtmlTree([str(tmp_path / "none")])
    with pytest.raises(FileNotFoundError, match="no file below .* matches"):
        list(HtmlTree([str(book)], include=["*.txt"]).documents(0))
