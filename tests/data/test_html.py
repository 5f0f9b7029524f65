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


def test_linked_files_are_read_once_and_said_once(
    book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "other" / "a.html", "Other", "<p>x</p>")
    (tmp_path / "other" / "link.html").symlink_to(book / "lost.html")
    (book / "again.html").symlink_to(book / "ch2.html")
    corpus = HtmlTree([str(book), str(tmp_path / "other")])
    first, second = (document.text or "" for document in corpus.documents(0))
    assert corpus.groups() and corpus.identity()
    assert first.count("größer") == 1 and "alone" in first and "alone" not in second
    assert capsys.readouterr().out == "2 files of the corpus are named more than once; each is read once\n"


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


SENTENCES = [
    "The {0} of the machine is turned until its mark stands at the top of the dial.",
    "Where the {0} does not move, look for the screw behind it and loosen it a little.",
    "It is usual that the {0} makes some noise in the first hours of its life.",
]


def chapters(names: list[str], frame: str = "") -> dict[str, str]:
    return {name: frame.replace("BODY", "".join(f"<p>{one.format(name)}</p>" for one in SENTENCES)) for name in names}


def test_navigation_and_lines_of_every_page_are_no_text(tmp_path: Path) -> None:
    frame = (
        '<div class="navheader"><table summary="Navigation header"><tr><td>Prev</td></tr></table></div>'
        '<p>The Manual</p>BODY<p>Last updated today</p><div class="navfooter">Next</div>'
    )
    for name, body in chapters(["wheel", "lever", "spring", "crank", "pedal"], frame).items():
        (tmp_path / f"{name}.html").write_text(f"<html><body><h1>{name}</h1>{body}</body></html>")
    (document,) = HtmlTree([str(tmp_path)], main_content=True).documents(0)
    text = document.text or ""
    assert all(line not in text for line in ("Prev", "Next", "updated"))
    assert text.count("The Manual") == 5  # a heading stands before it
    assert text.startswith("crank") and "The pedal of the machine" in text
    (whole,) = HtmlTree([str(tmp_path)], main_content=False).documents(0)
    assert "Prev" in (whole.text or "")


def test_a_page_of_what_has_been_said_is_left_out(tmp_path: Path) -> None:
    """A copy, and a page of all chapters with a line of its own; another with more of its own stays."""
    bodies = chapters(["wheel", "lever", "spring"], "BODY")
    for name, body in bodies.items():
        write(tmp_path / f"{name}.html", name, body)
    write(tmp_path / "wheel-copy.html", "wheel", bodies["wheel"])
    write(tmp_path / "xall.html", "All chapters", "".join(bodies.values()) + "<p>" + "All of it on one page. " * 4)
    write(tmp_path / "yhalf.html", "Half", bodies["wheel"] + chapters(["clutch"], "BODY")["clutch"])
    (document,) = HtmlTree([str(tmp_path)]).documents(0)
    text = document.text or ""
    assert text.count("The lever of the machine") == 1 and "All chapters" not in text
    assert text.count("The wheel of the machine") == 2 and "The clutch of the machine" in text


def test_pages_of_other_languages_are_left_out(tmp_path: Path) -> None:
    german = "<p>Das Rad der Maschine wird gedreht, bis seine Marke oben auf der Skala steht.</p>" * 3
    english = chapters(["wheel"], "BODY")["wheel"]
    write(tmp_path / "de.html", "Das Rad", german)
    write(tmp_path / "en.html", "The wheel", english)
    for name, lang in (("says-de", 'lang="de-DE"'), ("says-en", 'xml:lang="en_GB"')):
        (tmp_path / f"{name}.html").write_text(f"<html {lang}><body><h1>{name}</h1>{english}more</body></html>")
    write(tmp_path / "names.html", "Index", "".join(f"<p>zgbmv_{i} dsyrk2 xqcz</p>" for i in range(30)))

    def kept(language: str | None) -> str:
        corpus = HtmlTree([str(tmp_path)], join="page", language=language)
        return " ".join((document.text or "").split("\n")[0] for document in corpus.documents(0)).strip()

    assert kept("en").split() == ["The", "wheel", "says-en"]
    assert kept("de") == "Das Rad"
    assert kept(None) == "Das Rad The wheel Index says-de says-en"
    with pytest.raises(ValueError, match="language is 'klingon', which resiliparse does not detect"):
        HtmlTree([str(tmp_path)], language="klingon")


@pytest.mark.timeout(60)
def test_an_index_of_many_links_is_read_in_linear_time(tmp_path: Path) -> None:
    """Through resiliparse's own lists of elements this took hours."""
    write(
        tmp_path / "index.html", "Index", "".join(f"<a href='b.html#{i}'>name {i}</a> <i>x</i>" for i in range(20000))
    )
    write(tmp_path / "a.html", "Before", "<p>a</p>")
    write(tmp_path / "b.html", "After", '<p>b</p><A\nclass="x" HREF=a.html>it</A>')
    (document,) = HtmlTree([str(tmp_path)]).documents(0)
    assert (document.text or "").index("After") < (document.text or "").index("Before")


def test_mistakes_name_what_was_expected(book: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="join is 'book', expected one of root, folder, page"):
        HtmlTree([str(book)], join="book")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="does not exist"):
        HtmlTree([str(tmp_path / "none")])
    with pytest.raises(FileNotFoundError, match="no file below .* matches"):
        list(HtmlTree([str(book)], include=["*.txt"]).documents(0))
