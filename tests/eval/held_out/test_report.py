import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from eval.common.results import reuse
from eval.held_out import figures as plots
from eval.held_out.analysis import choose_baseline, pair, summarise
from eval.held_out.measurement import Measurement
from eval.held_out.perplexity import PerplexityResult, Sums
from eval.held_out.report import summary_lines, write_report
from eval.held_out.settings_report import config_differences
from eval.reporting.document import Block, Heading, Items, Paragraph, Picture, Table, to_markdown
from eval.reporting.html_page import to_html
from tests.eval.held_out.made_up import PLAN, TWINS, study
from tests.eval.reporting.pages import check_html


@pytest.mark.parametrize("count", [1, 2])
def test_the_report_renders_with_one_and_with_two_runs(tmp_path: Path, count: int) -> None:
    page, pictures = write_report(study(TWINS[:count]), tmp_path)
    text, markdown = page.read_text(), (tmp_path / "report.md").read_text()
    row = next(line for line in markdown.splitlines() if line.startswith("| multi_key |"))
    assert "75 %" in row and "2 samples" in markdown  # 6 of 8 tokens
    assert "| sparse | 16 | 4.0 | 37.5 % | 1.25 (50 %) | 27.5 % |" in markdown
    assert "| sparse | 1 | 1.00 (50 %) | 1.25 (50 %) |" in markdown and "| sparse | 0 | 25.0 % | 25.0 % |" in markdown
    for needed in (
        "prepared/x",
        "f" * 16,
        "abc",
        "python -m eval.run x",
        "test machine",
        "2026-01-01",
        "8x was dropped.",
    ):
        assert needed in text and needed in markdown
    assert ("What differs between the runs" in text) == ("| kind | sparse | dense |" in markdown) == (count == 2)
    plots = sorted(path.stem for path in (tmp_path / "plots").glob("*.png"))
    wanted = ["alpha_by_head", "alpha_over_steps", "attention_spread", "loss", "needle_sparse",
              "perplexity_by_position", "perplexity_over_length", "sparsity"]  # fmt: skip
    assert plots == sorted(picture.path.stem for picture in pictures)
    assert plots == sorted(wanted + (["needle_dense"] if count == 2 else []))
    for path in (tmp_path / "plots").glob("*.png"):
        with Image.open(path) as image:
            assert image.width >= 900
        assert f"plots/{path.name}" in markdown
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert [run["label"] for run in numbers["runs"]] == ["sparse", "dense"][:count]
    assert numbers["measurements"][0]["perplexity"]["headline"]["loss"] == [8.0, 12.0] * 3


def test_few_documents_have_no_interval_anywhere(tmp_path: Path) -> None:
    def first(sums: Sums) -> Sums:
        return Sums(sums.documents[:3], sums.loss[:3], sums.tokens[:3], sums.bytes[:3])

    few = []
    for one in TWINS:
        result = one.perplexity
        by_length = {multiple: first(sums) for multiple, sums in result.by_length.items()}
        fewer = PerplexityResult(first(result.headline), by_length, result.position_loss[:3], result.position_tokens)
        few.append(replace(one, plan=replace(PLAN, documents=[0, 1, 2]), perplexity=fewer))
    write_report(study(few), tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    assert "| sparse | 0.721 (no interval: 3 documents) | 3.21 (no interval: 3 documents) |" in markdown
    assert "| sparse against dense | -0.180 (no interval: 3 documents) | 0.800 (no interval: 3 documents) |" in markdown
    assert "without intervals (3 documents)" in markdown and "with 95 % intervals" not in markdown
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert numbers["runs"][0]["bits_per_byte"]["low"] is None and numbers["runs"][0]["bits_per_byte"]["units"] == 3
    assert len(list((tmp_path / "plots").glob("*.png"))) == 9


def test_lines_stand_at_the_training_lengths_not_at_1x(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure) or path)
    plots.perplexity_by_position(
        [summarise(one) for one in TWINS], [12, 12, 4, 64], tmp_path / "x.png"
    )  # 64: beyond the longest context, 16
    (axes,) = drawn[0].axes
    assert [text.get_text() for text in axes.texts][:2] == ["training length 4", "training length 12"]
    assert [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"] == [4, 12]


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    text = write_report(study(TWINS), tmp_path)[0].read_text()
    check_html(text)
    sources = re.findall(r'(?:src|href)="([^"]{1,30})', text) + re.findall(r"url\(", text)
    assert len(sources) >= 8 and all(source.startswith("data:") for source in sources)
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text
    assert all(alt for alt in re.findall(r'<img alt="([^"]*)"', text))


def test_the_numbers_are_the_arithmetic_of_the_sums() -> None:
    run = summarise(TWINS[0])
    bits = (8 + 12) / (16 + 24) / 0.6931471805599453
    assert run.bits_per_byte.value == pytest.approx(bits)
    assert run.perplexity.value == pytest.approx(2.718281828459045 ** (20 / 16))
    assert run.perplexity.low is not None and run.perplexity.high is not None
    assert run.perplexity.low < run.perplexity.value < run.perplexity.high
    assert run.chance is not None and run.chance.token_accuracy.value == 1 / 8 and run.chance.exact_match.value == 0
    pooled = {score.multiple: score for score in run.needles_by_length}
    assert pooled[1].samples == 4 and pooled[1].token_accuracy.value == 10 / 16 and pooled[1].exact_match.value == 0.5
    pairs = pair(TWINS[0], TWINS[1])
    assert pairs.bits_per_byte_ratio.value == pytest.approx(0.8) and pairs.bits_per_byte_ratio.high == pytest.approx(
        0.8
    )
    assert pairs.bits_per_byte_difference.value == pytest.approx(bits - 1.25 * bits)


def test_the_baseline_is_the_softmax_twin_wherever_it_stands() -> None:
    assert choose_baseline(TWINS).label == choose_baseline(TWINS[::-1]).label == "dense"
    assert choose_baseline(TWINS[:1]).label == "sparse"


def test_runs_of_other_documents_are_not_paired() -> None:
    other = replace(TWINS[1], plan=replace(PLAN, documents=[0, 1, 2, 3, 4, 9]))
    with pytest.raises(ValueError, match="different documents"):
        pair(TWINS[0], other)


def test_the_summary_has_a_line_for_each_part(tmp_path: Path) -> None:
    lines = summary_lines(study(TWINS), tmp_path / "report.html")
    assert len(lines) == 8  # ten with four lengths
    assert "4.0M parameters, step 5" in lines[0] and "0.800 [0.800, 0.800] times dense's" in lines[1]
    assert lines[3].startswith("Perplexity at 1x (8 tokens): sparse ") and "dense" in lines[4]
    assert "without needle 12 %" in lines[5] and lines[6] == (
        "Live 64x64 tiles: sparse 1x 38 %, 2x 38 %; dense 1x 100 %, 2x 100 %"
    )
    assert lines[7].endswith("report.html")


def never() -> Measurement:
    raise AssertionError("measured anew")


def test_kept_results_come_back_as_they_were(tmp_path: Path) -> None:
    reuse(tmp_path / "results/x.json", Measurement, lambda: TWINS[0])
    assert reuse(tmp_path / "results/x.json", Measurement, never) == TWINS[0]
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["x.json"]


def test_a_damaged_result_is_named_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    reuse(path, Measurement, lambda: TWINS[0])
    raw = json.loads(path.read_text())
    for change, said in (
        ({"plan": []}, r"x\.json: plan is \[\], expected an object; delete it"),
        ({"perplexity": {"headline": {}}}, r"x\.json: perplexity lacks 'by_length'; delete it"),
        ({"needles": [[1, 2]]}, r"x\.json: needles\[0\] is \[1, 2\], expected an object; delete it"),
    ):
        path.write_text(json.dumps(raw | change))
        with pytest.raises(ValueError, match=said):
            reuse(path, Measurement, never)


def test_only_differing_settings_are_listed() -> None:
    assert config_differences(
        {"a": {"x": "1", "y": "2", "run_dir": "a"}, "b": {"x": "1", "y": "3", "z": "4", "run_dir": "b"}}
    ) == [
        ["y", "2", "3"],
        ["z", "not set", "4"],
    ]


def test_text_is_escaped_in_both_forms(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "p.png")
    blocks: list[Block] = [Heading("a < b"), Paragraph("x & y"), Items(["<i>"]), Table(["k", "v"], [["a|b", "<td>"]]),
              Picture(tmp_path / "p.png", 'say "hi"')]  # fmt: skip
    page, markdown = to_html("t", "u", blocks), to_markdown(blocks, tmp_path)
    for escaped in ("a &lt; b", "x &amp; y", "&lt;i&gt;", "&lt;td&gt;", "say &quot;hi&quot;"):
        assert escaped in page
    assert "| a\\|b | <td> |" in markdown and '![say "hi"](p.png)' in markdown
