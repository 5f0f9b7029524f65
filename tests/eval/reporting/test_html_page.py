"""The page of a report: what it holds, and how it lies on a phone and on a desktop."""

from pathlib import Path

import pytest
from PIL import Image

from common.errors import UsageError
from eval.reporting.document import (
    Block,
    Code,
    Details,
    Heading,
    Items,
    Paragraph,
    Picture,
    Table,
    Verdict,
    pictures_of,
    to_markdown,
)
from eval.reporting.figures import DOTS_PER_INCH, PHONE_INCHES
from eval.reporting.html_page import PAGE, check_page, to_html, write_page
from tests.eval.reporting.pages import DESKTOP, PHONE, Page, check_html, find_browser, look
from tests.eval.reporting.studies import write_pages

LONG = "a-run-with-a-very-long-name-" * 3 + "and_no_place_to_break_it" * 3
BROWSER = find_browser()


def picture(folder: Path, inches: float, alt: str = "") -> Picture:
    path = folder / f"{inches}.png"
    Image.new("RGB", (round(inches * DOTS_PER_INCH), 500), "blue").save(path)
    return Picture(path, f"A picture of {inches} inches.", alt)


def everything(folder: Path) -> list[Block]:
    wide = Table(["run", *(f"{n}x ({512 * n:,})" for n in range(1, 12))], [[LONG, *["204.28 [188.54, 221.61]"] * 11]])
    return [
        Heading(f"Title {LONG}", 1),
        Verdict(f"{LONG} is ahead.", [f"{LONG}: 1", "b < c & d"]),
        Heading("Pictures"),
        picture(folder, PHONE_INCHES, "what it shows"),
        picture(folder, 3 * PHONE_INCHES),
        Paragraph(f"https://example.invalid/{LONG}"),
        wide,
        Heading("Below", 3),
        Table(["setting", "value"], [[LONG, f"[{{'path': '{LONG}'}}]"]], numeric=False, caption="Settings"),
        Details("More", [Table(["a"], [["b"]], caption="Folded"), picture(folder, 2.0)]),
        Code(f"python -m eval.run --output {LONG}"),
        Items([LONG]),
    ]


def test_a_page_needs_nothing_else_and_can_be_read_aloud(tmp_path: Path) -> None:
    page = check_html(to_html("Report", LONG, everything(tmp_path)))
    assert page.texts["title"] == [f"Report: {LONG}"]
    assert [one["alt"] for one in page.of("img")] == [
        "what it shows", "A picture of 16.200000000000003 inches.", "A picture of 2.0 inches.",
    ]  # fmt: skip
    assert page.texts["section"][0].startswith(f"{LONG} is ahead.") and "b < c & d" in page.texts["section"][0]
    labels = [one["aria-label"] for one in page.of("div") if one.get("class") == "scroll"]
    assert labels[0] == "A picture of 16.200000000000003 inches."  # the others fit a phone
    assert labels[1].startswith("table: run, 1x (512)") and labels[2:] == ["Settings", "Folded"]
    assert [one for one in page.of("th") if one.get("scope") not in ("col", "row")] == []


def test_markdown_and_pictures_have_what_is_folded_too(tmp_path: Path) -> None:
    blocks = everything(tmp_path)
    text = to_markdown(blocks, tmp_path)
    assert f"**{LONG} is ahead.**\n\n- {LONG}: 1" in text and "Settings:\n\n| setting | value |" in text
    assert "<details><summary>More</summary>\n\nFolded:\n\n| a |\n" in text and "![what it shows](5.4.png)" in text
    assert [one.path.name for one in pictures_of(blocks)] == ["5.4.png", "16.200000000000003.png", "2.0.png"]


@pytest.mark.parametrize(
    ("bad", "said"),
    [("<html lang=en><p></div>", "closes"), ("<p><b></p>", "closes"), ("<p>", "left open"),
     ("<p id=a id=b></p>", "twice")],
)  # fmt: skip
def test_broken_html_is_seen(bad: str, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        Page(bad)


@pytest.mark.parametrize(
    ("old", "new"),
    [("<main>", '<main><img alt="" width="1" height="1" src="data:,">'), ('lang="en"', ""),
     ("<h3>", "<h4>"), ("<main>", '<main><link href="https://example.invalid/style.css">'),
     ('class="scroll" role="region" tabindex="0"', 'class="scroll" role="region"')],
)  # fmt: skip
def test_a_page_that_is_not_as_it_should_is_seen(old: str, new: str, tmp_path: Path) -> None:
    text = to_html("Report", "x", everything(tmp_path))
    assert old in text
    with pytest.raises((AssertionError, KeyError)):
        check_html(text.replace(old, new).replace("</h3>", "</h4>" if old == "<h3>" else "</h3>"))


def test_another_report_s_page_is_not_written_over(tmp_path: Path) -> None:
    check_page(tmp_path, "One")
    write_page(tmp_path, "One & two", "x", [Heading("a", 1)])
    check_page(tmp_path, "One & two")
    with pytest.raises(UsageError, match="has the page of another report, One & two: choose another folder"):
        check_page(tmp_path, "Three")
    (tmp_path / PAGE).write_text("<p>by hand")
    check_page(tmp_path, "Three")  # as before: nothing says whose it is


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The page of each command that writes one."""
    return {name: page.read_text() for name, page in write_pages(tmp_path_factory.mktemp("reports")).items()}


@pytest.mark.parametrize(
    ("name", "said"),
    [("run", "sparse is ahead of dense in bits per byte"),
     ("length_generalisation", "sort at 2x the training length: asentmax, 4 layers 91.0 %, softmax, 4 layers 1.0 %; "
                               "reverse at 2x "),
     ("sparse_frontier", "In the prompt, at 16,384 tokens, entmax reads 7.5 % of the keys and is ahead of dense"),
     ("tasks", "asentmax is ahead of softmax in the mean of 2 tasks (by 60.0 % [48.3, 71.7]); asentmax is ahead of "
               "softmax in 4 of 4 scores; asentmax is above chance in 2 of 2 scores; softmax is above chance in 0 of "
               "2 scores.")],
)  # fmt: skip
def test_every_report_says_first_what_was_found(name: str, said: str, reports: dict[str, str]) -> None:
    if name not in reports:
        pytest.skip("needs pip install -r requirements-eval.txt")
    page = check_html(reports[name])
    assert page.texts["section"][0].startswith(said), page.texts["section"][0][:400]
    assert len(page.of("img")) >= 1 and len(page.of("table")) >= 2


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_nothing_overflows_in_a_browser(reports: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "frames").mkdir()
    texts = {"everything": to_html("Report", LONG, everything(tmp_path)), **reports}
    texts["too_wide"] = texts["everything"].replace("<main>", '<main><p style="min-width: 2000px">wide</p>')
    seen = look(str(BROWSER), texts, tmp_path / "frames")
    for name, by_width in seen.items():
        for width, one in by_width.items():
            if name == "too_wide":  # else the test could not fail
                assert one["scroll_width"] > width and any(tag.startswith("P wide") for tag in one["overflowing"])
                continue
            assert one["width"] == width and one["scroll_width"] <= width and one["overflowing"] == [], (name, one)
            assert all(one["images"]) and one["requests"] == [] and one["smallest_text"] >= 12, (name, one)
    assert seen["everything"][PHONE]["scrolling"] >= 2 and seen["everything"][DESKTOP]["scrolling"] >= 1
