"""RULER's samples: right answers, lengths that hold, the same bytes again; the command, its manifest and mistakes."""

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("wonderwords", reason="needs pip install -r requirements-eval.txt")
import eval.ruler.tasks
from data.tokenizer import Tokenizer, load_tokenizer
from data.tokenizers.training import train_tokenizer
from eval.ruler.command import RulerConfig, build, fit, gather, main, read_essays, split_sentences
from eval.ruler.files import FORMAT, MANIFEST, PARTIAL, open_frozen, read_manifest, write_manifest, write_samples
from eval.ruler.tasks import RULER_TASKS, Draft, Material, Recipe, match
from tests.eval.common.olmo import needs_olmo
from tests.eval.conftest import failing_line

ESSAY = " ".join(f"On day {day} we walked {day % 7} miles. Was it far? It was {day % 11} miles!" for day in range(600))
OFFLINE = [name for name in RULER_TASKS if name != "qa_squad"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("ruler") / "tokenizer.model"
    texts = [ESSAY, *(value for value in vars(eval.ruler.tasks).values() if isinstance(value, str))]
    train_tokenizer(texts, 900, path, sample_bytes=10**6, scan_bytes=10**6, split_by_unicode_script=True)
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def essays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("essays") / "essays.txt"
    path.write_text(ESSAY)
    return path


@pytest.fixture(scope="module")
def material(essays: Path) -> Material:
    return gather(RulerConfig(tasks=OFFLINE), essays)[0]


def sample(name: str, material: Material, tokenizer: Tokenizer, length: int, index: int = 0) -> tuple[str, list[str]]:
    task = RULER_TASKS[name]
    found = fit(
        task.recipe(f"0/{name}/{length}/{index}", material, length, index), tokenizer, length - task.answer_tokens
    )
    assert not isinstance(found, str), found
    assert found[1] == 1 + len(tokenizer.encode(found[0].prompt)) <= length - task.answer_tokens
    return found[0].prompt, found[0].answers


@pytest.mark.parametrize("name", OFFLINE)
def test_samples_fill_their_length_and_never_exceed_it(name: str, material: Material, tokenizer: Tokenizer) -> None:
    """Room for one more unit is left at most; the largest unit is a sentence or a line, some 90 tokens here."""
    for length in (2048, 8192):
        prompt, _ = sample(name, material, tokenizer, length)
        assert length - RULER_TASKS[name].answer_tokens - 120 < 1 + len(tokenizer.encode(prompt))


@pytest.mark.parametrize("name", [name for name in OFFLINE if name.startswith("niah")])
def test_each_asked_needle_is_there_once(name: str, material: Material, tokenizer: Tokenizer) -> None:
    prompt, answers = sample(name, material, tokenizer, 4096)
    kind = "uuids" if name in ("niah_single_3", "niah_multikey_3") else "numbers"
    needles = re.findall(rf"One of the special magic {kind} for (\S+) is: ([\w-]+)\.", prompt)
    asked = re.findall(r"\nWhat \w+ (?:all )?the special magic \w+ for (.+) mentioned in the provided text\?", prompt)[
        0
    ]
    keys = re.split(r", and |, ", asked)
    assert set(answers) == {value for key, value in needles if key in keys}
    if len(keys) > 1:  # in the order of the question
        assert answers == [dict(needles)[key] for key in keys]
    assert len(answers) == (4 if name in ("niah_multivalue", "niah_multiquery") else 1) == len(set(answers))
    assert len(keys) == (4 if name == "niah_multiquery" else 1)
    values = {"niah_multivalue": 4}.get(name, 1)
    assert all(sum(key == wanted for wanted, _ in needles) == values for key in keys)
    shown = len({key for key, _ in needles})
    if name in ("niah_multikey_2", "niah_multikey_3"):
        assert shown > 20  # needles all over
    else:
        assert shown == (4 if name in ("niah_multikey_1", "niah_multiquery") else 1)
    assert ("What is the special" in prompt) == (len(answers) == 1) == prompt.endswith("provided text is")
    if kind == "numbers":
        assert all(len(answer) == 7 and answer.isdigit() for answer in answers)


def test_needles_stand_at_all_depths(material: Material, tokenizer: Tokenizer) -> None:
    places = []
    for index in range(30):
        prompt, answers = sample("niah_single_2", material, tokenizer, 2048, index)
        places.append(prompt.index(answers[0]) / len(prompt))
    assert min(places) < 0.2 and max(places) > 0.75 and len(set(places)) > 20


def test_a_chain_of_variables_leads_to_every_answer(material: Material, tokenizer: Tokenizer) -> None:
    prompt, answers = sample("vt", material, tokenizer, 4096)
    example, asked = prompt.split("\n\nMemorize and track")
    for text, wanted in ((example, example.split("they are: ")[1].split()), (asked, answers)):
        value = re.findall(r"assigned the value (\d+) in", text)[0]
        holds = {name for name, number in re.findall(r"VAR ([A-Z]+) = (\d+)", text) if number == value}
        for name, source in re.findall(r"VAR ([A-Z]+) = VAR ([A-Z]+)", text):  # in order: no variable before its source
            if source in holds:
                holds.add(name)
        assert holds == set(wanted) and len(wanted) == 5
    assert prompt.endswith("they are:") and "5 variables" in asked


def test_the_ten_common_words_are_the_answer(material: Material, tokenizer: Tokenizer) -> None:
    prompt, answers = sample("cwe", material, tokenizer, 8192)
    example, asked = prompt.split("\nBelow is a numbered list")
    items = re.findall(r"(\d+)\. (\D+?)(?= \d+\. |\nQuestion)", asked)
    assert [int(number) for number, _ in items] == list(range(1, len(items) + 1))
    counts = Counter(word for _, word in items).most_common()
    assert {word for word, _ in counts[:10]} == set(answers) and counts[9][1] == 30 and counts[10][1] == 3
    shown = re.findall(r"10\. (.+)$", example)
    assert len(shown) == 1  # the example has its answer


def test_the_three_frequent_words_are_the_answer(material: Material, tokenizer: Tokenizer) -> None:
    prompt, answers = sample("fwe", material, tokenizer, 2048)
    words = prompt.split("coded words. ")[1].split("\nQuestion")[0].split()
    counts = Counter(words).most_common(5)
    assert counts[0][0] == "..." and [word for word, _ in counts[1:4]] == answers
    assert len({count for _, count in counts}) == 5  # no tie


@needs_olmo
def test_documents_hold_the_answer_among_others_of_the_article(tokenizer: Tokenizer) -> None:
    material, sources = gather(RulerConfig(tasks=["qa_squad"]), None)
    assert len(material.questions) == 1000 == sources["questions"]["questions"]
    for index in range(5):
        prompt, answers = sample("qa_squad", material, tokenizer, 4096, index)
        question = material.questions[index]
        assert prompt.endswith(f"Question: {question['question']} Answer:")
        assert prompt.count("\nDocument ") > 2 and question["document"] in prompt
        assert any(answer in question["document"] for answer in answers)


def test_scores_are_those_of_ruler() -> None:
    assert match("they are 12 and ABC.", ["12", "abc", "7", "9"], part=False) == 0.5
    assert match("they are 12", ["12", "13"], part=True) == 1 and match("none", ["12", "13"], part=True) == 0


def test_fit_finds_the_most_units() -> None:
    class Characters:
        def encode(self, text: str) -> list[int]:
            return list(text.encode())

    for rate in (1, 7, 40):
        recipe = Recipe(lambda units, rate=rate: Draft("x" * (20 + rate * units), []), 3, 10_000)  # type: ignore[misc]
        found = fit(recipe, Characters(), 1000)  # type: ignore[arg-type]
        assert found[1] == 21 + rate * ((1000 - 21) // rate)
    recipe = Recipe(lambda units: Draft("x" * units, []), 2, 50)
    assert fit(recipe, Characters(), 51) == (Draft("x" * 50, []), 51)  # type: ignore[arg-type]
    assert "used up after 51 tokens, 90 are wanted" in fit(recipe, Characters(), 90)  # type: ignore[arg-type]
    assert "it takes 3 tokens at the least, there is room for 2" in fit(recipe, Characters(), 2)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


SMALL = {"tasks": ["niah_single_1", "niah_multikey_1", "cwe"], "lengths": [1024, 2048]}


def test_the_same_options_give_the_same_bytes_also_after_an_interruption(
    tokenizer: Tokenizer, essays: Path, tmp_path: Path
) -> None:
    config = RulerConfig(**SMALL, samples=3)  # type: ignore[arg-type]
    lines = build(tokenizer, essays, config, tmp_path / "a")
    assert any(line.startswith("left out: cwe at 1024: sample 0: it takes") for line in lines)
    assert any(line.startswith("left out: qa_hotpot: HotpotQA has no data") for line in lines)
    first = contents(tmp_path / "a")
    assert len(first) >= 5 and PARTIAL not in first
    build(tokenizer, essays, config, tmp_path / "b")
    assert contents(tmp_path / "b") == first
    manifest = read_manifest(tmp_path / "b")
    assert manifest["tokenizer"]["fingerprint"] == tokenizer.fingerprint and manifest["settings"]["seed"] == 0
    # as after a kill: no manifest, one file missing, one half written
    (tmp_path / "b" / MANIFEST).rename(tmp_path / "b" / PARTIAL)
    (tmp_path / "b" / "niah_single_1-1024.jsonl").unlink()
    (tmp_path / "b" / "niah_multikey_1-2048.jsonl").write_text("{")
    with pytest.raises(FileNotFoundError, match="its build was interrupted"):
        open_frozen(tmp_path / "b", None, [])
    build(tokenizer, essays, config, tmp_path / "b")
    again = contents(tmp_path / "b")
    assert {name: text for name, text in again.items() if name != MANIFEST} == {
        name: text for name, text in first.items() if name != MANIFEST
    }
    build(tokenizer, essays, RulerConfig(**SMALL, samples=2), tmp_path / "c")  # type: ignore[arg-type]
    fewer = (tmp_path / "c/niah_single_1-1024.jsonl").read_text().splitlines()
    assert fewer == first["niah_single_1-1024.jsonl"].decode().splitlines()[:2]
    build(tokenizer, essays, RulerConfig(**SMALL, samples=3, seed=1), tmp_path / "d")  # type: ignore[arg-type]
    assert contents(tmp_path / "d")["niah_single_1-1024.jsonl"] != first["niah_single_1-1024.jsonl"]
    with pytest.raises(ValueError, match='made with settings .*"seed": 0.* choose another --output'):
        build(tokenizer, essays, RulerConfig(**SMALL, samples=3, seed=1), tmp_path / "a")  # type: ignore[arg-type]


def test_frozen_files_are_checked(tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = RulerConfig(tasks=["niah_single_1", "niah_single_2"], lengths=[1024], samples=2)
    lines = build(tokenizer, None, config, tmp_path)
    assert any("niah_single_2 at 1024: it hides its needles in essays: say which with --essays" in one for one in lines)
    found = open_frozen(tmp_path, "niah_single_1", [1024])
    assert len(found) == 1 and len(found[0].samples) == 2 and set(found[0].samples[0]) == {
        "index", "prompt", "answers", "tokens",
    }  # fmt: skip
    with pytest.raises(ValueError, match="has no niah_single_1 at 4096"):
        open_frozen(tmp_path, "niah_single_1", [4096])
    with pytest.raises(ValueError, match="has no task niah_single_2: it hides its needles in essays"):
        open_frozen(tmp_path, "niah_single_2", [])
    with pytest.raises(ValueError, match="has no task qa_hotpot: HotpotQA has no data"):
        open_frozen(tmp_path, "qa_hotpot", [])
    path = tmp_path / "niah_single_1-1024.jsonl"
    path.write_text(path.read_text().replace("grass", "grxss", 1))
    with pytest.raises(ValueError, match="niah_single_1-1024.jsonl is missing or damaged"):
        open_frozen(tmp_path, None, [])
    with pytest.raises(FileNotFoundError, match="RULER was not built there"):
        open_frozen(tmp_path / "absent", None, [])


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        ("[]", "holds a list, expected an object; build it again"),
        ("{", "is not valid JSON"),
        ({"format": FORMAT}, "lacks 'files', expected a list; build it again"),
        ({"files": [{"task": "vt"}]}, r"files\[0\] lacks 'length', expected a whole number; build it again"),
        ({"files": ["vt"]}, r"files\[0\] holds a string, expected an object; build it again"),
        ({"tokenizer": {}}, "tokenizer lacks 'fingerprint', expected a string; build it again"),
        ({"left_out": [{"task": 1}]}, r"left_out\[0\] has a whole number as 'task', expected a string"),
    ],
)
def test_damaged_manifests_are_named(tmp_path: Path, manifest: Any, said: str) -> None:
    whole = {"format": FORMAT, "files": [], "left_out": [], "tokenizer": {"fingerprint": "x"}}
    if isinstance(manifest, dict) and "format" not in manifest:
        manifest = whole | manifest
    (tmp_path / MANIFEST).write_text(manifest if isinstance(manifest, str) else json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"manifest\.json.* {said}"):
        open_frozen(tmp_path, None, [])


def test_samples_that_lack_a_part_are_named(tmp_path: Path) -> None:
    record = write_samples(tmp_path, "vt", 512, [{"prompt": "x", "tokens": 1}])
    whole = {"format": FORMAT, "files": [record], "left_out": [], "tokenizer": {"fingerprint": "x"}}
    write_manifest(tmp_path, whole, MANIFEST)
    with pytest.raises(ValueError, match=r"vt-512\.jsonl, line 1 lacks 'answers', expected a list; build it again"):
        open_frozen(tmp_path, None, [])


def test_essays_from_a_file_a_folder_or_a_corpus(corpus: Path, essays: Path, tmp_path: Path) -> None:
    sentences = split_sentences(read_essays(essays))
    assert sentences[:3] == ["On day 0 we walked 0 miles.", "Was it far?", "It was 0 miles!"] and len(sentences) == 1800
    (tmp_path / "b.txt").write_text("Second\nline. ")
    (tmp_path / "a.txt").write_text("First")
    assert split_sentences(read_essays(tmp_path)) == ["First", "Second line."]
    held_out = split_sentences(read_essays(corpus))
    assert len(held_out) > 100 and max(map(len, held_out)) <= 400 and "=" in held_out[0]
    with pytest.raises(FileNotFoundError, match="expected a text file, a folder of .txt files or a prepared corpus"):
        read_essays(tmp_path / "absent")


def test_the_command(corpus: Path, essays: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--tokenizer", str(corpus), "--essays", str(essays), "--samples", "1", "--lengths", "2048"]
    arguments += ["--tasks", "niah_single_2", "fwe", "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert "RULER: 2 files, 2 samples" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/manifest.json").read_text())["tokenizer"]["vocab_size"] == 420


def test_mistakes_are_one_line(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ["--tokenizer", corpus, "--output", tmp_path / "out"]
    cases: dict[tuple[str, ...], str] = {
        ("--tasks", "niah"): "tasks is ['niah']: expected different ones of niah_single_1",
        ("--lengths", "2048", "1024"): "lengths is [2048, 1024]: expected rising numbers of tokens from 512 on",
        ("--samples", "0"): "samples is 0: expected at least 1",
        ("--tasks", "niah_single_2", "--essays", str(tmp_path / "x")): "expected a text file, a folder of .txt files",
    }
    for options, message in cases.items():
        assert message in failing_line(capsys, main, *out, *options)
    assert "holds no complete checkpoint" in failing_line(capsys, main, "--tokenizer", tmp_path)
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    assert "pip install -r requirements-eval.txt" in failing_line(capsys, main, *out, "--tasks", "vt")


def test_needs_are_fields_of_material() -> None:
    fields: dict[str, Any] = Material.__dataclass_fields__
    assert {task.needs for task in RULER_TASKS.values()} <= set(fields)
