"""Tokenizers of the hub: their ids, bytes, special tokens and fingerprints, corpora prepared with them, and errors."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.prepare import main
from data.store import TokenStore, read_manifest
from data.tokenizer import Tokenizer, load_tokenizer
from data.tokenizers.hub_tokenizer import WHOLE_CHARACTERS
from tests.data.conftest import PrepareTexts, contents, make_module
from tests.data.test_tokenizer import AWKWARD, foreign_model
from tests.hub_tokenizers import END, PYTHON, bert, byte_level, llama_2, save

Change = Callable[[dict[str, Any]], object]


def changed(folder: Path, found: tokenizers.Tokenizer, change: Change) -> Path:
    content = json.loads(found.to_str())
    change(content)
    return save(folder, json.dumps(content), bos_token=END, eos_token=END)


@pytest.fixture(scope="module")
def gpt_2() -> tokenizers.Tokenizer:
    return byte_level([END])


@pytest.fixture(scope="module")
def folder(gpt_2: tokenizers.Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("hub"), gpt_2, bos_token=END, eos_token={"content": END, "lstrip": False})


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@settings(max_examples=300)
@given(text=st.one_of(st.text(), st.text("\u2581 \n\tab<tool>|endoftx\0\r", max_size=40)))
@example(text="".join(AWKWARD) + f"{END}<tool>{END} <tool>")
def test_any_text_comes_back_and_holds_no_special_token(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids
    assert sum(len(tokenizer.token_bytes(token)) for token in ids) == len(text.encode())


def test_ids_are_the_librarys_without_what_it_adds(tokenizer: Tokenizer, gpt_2: tokenizers.Tokenizer) -> None:
    text = PYTHON + "  x <tool>漢"
    wanted = gpt_2.encode(text, add_special_tokens=False).ids
    assert gpt_2.encode(text).ids == [0, *wanted]
    assert tokenizer.encode(text) == wanted and tokenizer.encode_batch([text, ""]) == [wanted, []]
    tool = gpt_2.token_to_id("<tool>")
    assert tool in wanted and tokenizer.token_bytes(tool) == b"<tool>" and tokenizer.vocab_size == tool + 1
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.decode([0, *wanted, 0])) == (0, 0, text)
    with pytest.raises(ValueError, match=r"is outside \[0, \d+\)"):
        tokenizer.decode([tokenizer.vocab_size])
    with pytest.raises(ValueError, match="lone surrogate at character 1"):
        tokenizer.encode("a\ud800")


def test_long_texts_are_whole_and_take_linear_time(tokenizer: Tokenizer) -> None:
    def seconds(text: str) -> float:
        start = time.thread_time()
        assert tokenizer.decode(tokenizer.encode(text)) == text
        return time.thread_time() - start

    for line in ("a", PYTHON):
        text = line * (WHOLE_CHARACTERS * 3 // 2 // len(line))
        seconds(text[:1000])
        assert seconds(text) < 12 * 3 * max(0.02, seconds(text[: len(text) // 12]))


def test_truncation_and_padding_of_the_file_are_not_done(gpt_2: tokenizers.Tokenizer, tmp_path: Path) -> None:
    other = tokenizers.Tokenizer.from_str(gpt_2.to_str())
    other.enable_truncation(4)
    other.enable_padding(length=50)
    found = load_tokenizer(save(tmp_path, other), bos=END, eos=END)
    assert found.decode(found.encode(PYTHON)) == PYTHON


def test_fingerprints_are_those_of_what_is_encoded(
    gpt_2: tokenizers.Tokenizer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    def older(content: dict[str, Any]) -> None:
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
        del content["model"]["ignore_merges"], content["post_processor"]
        content["truncation"] = None

    def fingerprint(name: str, change: Change) -> str:
        return load_tokenizer(changed(tmp_path / name, gpt_2, change)).fingerprint

    assert fingerprint("older", older) == tokenizer.fingerprint
    assert fingerprint("merge", lambda content: content["model"]["merges"].pop()) != tokenizer.fingerprint
    assert fingerprint("added", lambda content: content["added_tokens"].pop()) != tokenizer.fingerprint
    other_eos = load_tokenizer(tmp_path / "older", eos="<tool>")
    assert other_eos.fingerprint != tokenizer.fingerprint
    assert other_eos.encode("<tool>") != [other_eos.eos_id] and other_eos.decode(other_eos.encode("<tool>")) == "<tool>"


@pytest.mark.parametrize("bos", ["<tool>", "Hello", "a"], ids=["added", "of several bytes", "of one byte"])
def test_any_token_may_be_bos_and_is_not_written_by_text(gpt_2: tokenizers.Tokenizer, tmp_path: Path, bos: str) -> None:
    found = load_tokenizer(save(tmp_path, gpt_2), bos=bos, eos=END, lossy=True)
    assert found.bos_id == gpt_2.token_to_id(bos) and found.token_bytes(found.bos_id) == b""


@pytest.mark.parametrize(
    ("make", "bos", "eos", "shown"),
    [
        (llama_2, "<s>", "</s>", r"'def f\(x\):\\n    return  1\\n' comes back as ' def f"),
        (bert, "[CLS]", "[SEP]", r"'def f\(x\):\\n    return  1\\n' comes back as ' def f \( x \) : return 1'"),
    ],
)
def test_a_tokenizer_that_changes_text_is_refused_unless_that_is_said(
    make: Callable[[], tokenizers.Tokenizer], bos: str, eos: str, shown: str, tmp_path: Path
) -> None:
    path = save(tmp_path, make(), bos_token=bos, eos_token=eos)
    with pytest.raises(ValueError, match=f"tokenizer.json changes text: {shown}.*set tokenizer.lossy: true"):
        load_tokenizer(path)
    found = load_tokenizer(path, lossy=True)
    assert found.decode(found.encode("abc def")) == " abc def"
    assert found.lossy and not {found.bos_id, found.eos_id} & set(found.encode(f"a{bos}{eos}"))


def test_byte_pieces_are_bytes(tmp_path: Path) -> None:
    found = load_tokenizer(save(tmp_path, llama_2()), bos="<s>", eos="</s>", lossy=True)
    assert found.decode(found.encode("\U0001f680 <0x41>\n")) == " \U0001f680 <0x41>\n"


def test_unicode_that_is_composed_is_shown(gpt_2: tokenizers.Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="changes text: 'e\u0301 .* comes back as 'é"):
        load_tokenizer(changed(tmp_path, gpt_2, lambda content: content.update(normalizer={"type": "NFC"})))


def test_a_character_that_is_changed_is_shown(gpt_2: tokenizers.Tokenizer, tmp_path: Path) -> None:
    rule = {"type": "Replace", "pattern": {"String": "\u0436"}, "content": "\u0416"}
    with pytest.raises(ValueError, match="changes text: .*ж.* comes back as .*Ж"):
        load_tokenizer(changed(tmp_path / "rule", gpt_2, lambda content: content.update(normalizer=rule)))
    with pytest.raises(ValueError, match="changes text: .*'def f.* comes back as"):  # no token for a byte
        load_tokenizer(changed(tmp_path / "byte", gpt_2, lambda content: forget(content["model"], "(")))
    with pytest.raises(ValueError, match="changes text: .* comes back as"):  # of no probe
        load_tokenizer(changed(tmp_path / "rare", gpt_2, lambda content: forget(content["model"], "Ļ")))


def forget(model: dict[str, Any], piece: str) -> None:
    """Nothing spells this piece any more."""
    model["vocab"] = {f"unused {i}" if piece in key else key: i for key, i in model["vocab"].items()}
    model["merges"] = [pair for pair in model["merges"] if piece not in "".join(pair)]


def drop_merges_at_random(content: dict[str, Any]) -> None:
    content["model"]["dropout"] = 0.1


def test_bad_files_are_named(gpt_2: tokenizers.Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer .*/gone.json does not exist; expected a tokenizer.json or"):
        load_tokenizer(tmp_path / "gone.json")
    with pytest.raises(FileNotFoundError, match="is a folder without tokenizer.json or tokenizer.model"):
        load_tokenizer(tmp_path)
    for number, content in enumerate(("{", "[]", "{}", '{"model": {}}', '{"model": {"type": "BPE", "vocab": 3}}')):
        with pytest.raises(ValueError, match=r"tokenizer.json .*; expected the tokenizer.json of a model of the"):
            load_tokenizer(save(tmp_path / str(number), content))
    with pytest.raises(ValueError, match=r"has model.dropout 0.1, so it encodes at random"):
        load_tokenizer(changed(tmp_path / "dropout", gpt_2, drop_merges_at_random))
    with pytest.raises(ValueError, match=r"has added token '<tool>' with id 7, where its vocabulary asks for \d+"):
        load_tokenizer(changed(tmp_path / "id", gpt_2, lambda content: content["added_tokens"][-1].update(id=7)))
    path = save(tmp_path / "config", gpt_2, bos_token=3)
    with pytest.raises(ValueError, match=r"tokenizer_config.json has bos_token 3, expected the text of a token"):
        load_tokenizer(path)
    (path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json is not valid JSON"):
        load_tokenizer(path)


def test_bos_and_eos_must_be_said(gpt_2: tokenizers.Tokenizer, tmp_path: Path) -> None:
    path = save(tmp_path / "plain", gpt_2)
    with pytest.raises(ValueError, match=r"has no bos: .*tokenizer_config.json does not exist; set tokenizer.bos to"):
        load_tokenizer(path, eos=END)
    path = save(tmp_path / "qwen", gpt_2, bos_token=None, eos_token=END)
    with pytest.raises(ValueError, match=r"names no bos_token; .* the eos for a model without bos .*'<\|endoftext\|>'"):
        load_tokenizer(path)
    assert load_tokenizer(path, bos=END).bos_id == 0
    with pytest.raises(ValueError, match=r"tokenizer.bos is '<s>', which is no token of .*; set tokenizer.bos to"):
        load_tokenizer(path, bos="<s>")
    path = save(tmp_path / "wrong", gpt_2, bos_token=END, eos_token="</s>")
    with pytest.raises(ValueError, match=r"eos_token of .*tokenizer_config.json is '</s>', which is no token of"):
        load_tokenizer(path)


def texts_of(corpus: Path) -> list[str]:
    tokenizer, store = load_tokenizer(corpus), TokenStore(corpus / "train", verify="checksum")
    documents = [store.document(index).tolist() for index in range(store.num_documents)]
    assert all((ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id) for ids in documents)
    return [tokenizer.decode(ids) for ids in documents]


def test_a_corpus_is_prepared_and_read_with_it(
    folder: Path, texts: Path, prepare_texts: PrepareTexts, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    output = prepare_texts(tmp_path / "out", f"--tokenizer.path={folder}")
    assert texts_of(output) == [path.read_text() for path in sorted(texts.glob("*.txt"))]
    store = TokenStore(output / "train")
    assert store.tokenizer_path == output / "tokenizer.json"
    assert store.fingerprint_of_tokenizer == tokenizer.fingerprint == load_tokenizer(output).fingerprint
    module = make_module(output, val_sequences=0)
    module.prepare_data()
    module.setup("fit")
    assert (module.tokenizer_fingerprint, module.vocab_size) == (tokenizer.fingerprint, tokenizer.vocab_size)
    again = prepare_texts(tmp_path / "again", f"--tokenizer.path={output / 'tokenizer.json'}", "--workers=2")
    assert contents(again) == contents(output)
    prepare_texts(output, f"--tokenizer.path={again}")  # already prepared
    (again / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer_config.json has fingerprint .* but the shards were written with"):
        TokenStore(again / "train")


def test_one_kind_of_tokenizer_takes_the_place_of_the_other(
    folder: Path, prepare_texts: PrepareTexts, tmp_path: Path
) -> None:
    output = prepare_texts(tmp_path / "out")
    with pytest.raises(ValueError, match=r"was prepared with another config .*tokenizer.fingerprint"):
        prepare_texts(output, f"--tokenizer.path={folder}")
    prepare_texts(output, f"--tokenizer.path={folder}", "--overwrite=true")
    assert {path.name for path in output.glob("tokenizer*")} == {"tokenizer.json", "tokenizer_config.json"}
    texts_of(output)
    prepare_texts(output, "--overwrite=true")
    assert {path.name for path in output.glob("tokenizer*")} == {"tokenizer.model"}
    texts_of(output)


@pytest.mark.parametrize("kind", ["tokenizer.json", "tokenizer.model"])
def test_a_lossy_tokenizer_is_taken_where_the_corpus_says_so(
    kind: str, texts: Path, prepare_texts: PrepareTexts, tmp_path: Path
) -> None:
    path = tmp_path / "hub"
    if kind == "tokenizer.json":
        save(path, llama_2(), bos_token="<s>", eos_token="</s>")
    else:
        path.mkdir()
        path = foreign_model(path)
    with pytest.raises(ValueError, match=r"changes text: .* set tokenizer.lossy: true"):
        prepare_texts(tmp_path / "out", f"--tokenizer.path={path}")
    output = prepare_texts(tmp_path / "out", f"--tokenizer.path={path}", "--tokenizer.lossy=true")
    assert read_manifest(output, "")["config"]["tokenizer"]["lossy"] is True
    store, tokenizer = TokenStore(output / "train"), load_tokenizer(output)
    assert store.tokenizer_path == output / kind and tokenizer.lossy
    originals = [path.read_bytes() for path in sorted(texts.glob("*.txt"))]
    assert store.num_bytes.tolist() == [len(text) for text in originals]
    assert texts_of(output)[0].startswith(" document 0")
    again = prepare_texts(tmp_path / "again", f"--tokenizer.path={output}")  # said once, said for its copies
    assert contents(again) == contents(output)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokenizer.lossy=true"], "tokenizer.lossy is True without tokenizer.path"),
        (["--tokenizer.eos=</s>"], "tokenizer.eos is '</s>' without tokenizer.path"),
        (["--tokenizer.path={hub}", "--tokenizer.bos=<nothing>"], "tokenizer.bos is '<nothing>', which is no token of"),
        (["--tokenizer.path={sentencepiece}", "--tokenizer.bos=<s>"], "is a SentencePiece model, which has its own"),
        (["--tokenizer.path={empty}"], "tokenizer.path is .*, which does not exist or has none: expected"),
    ],
)
def test_options_that_do_not_fit_are_named(
    options: list[str], message: str, folder: Path, prepared: Path, prepare_texts: PrepareTexts, tmp_path: Path
) -> None:
    places = {"hub": folder, "sentencepiece": prepared, "empty": tmp_path}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare_texts(tmp_path / "out", *(option.format(**places) for option in options))
    assert not (tmp_path / "out").exists()


def test_its_options_are_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    help_text = capsys.readouterr().out
    assert all(f"--tokenizer.{name}" in help_text for name in ("bos", "eos", "lossy"))
