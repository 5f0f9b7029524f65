"""Every corpus YAML of configs/data, on itself or on a stand-in."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from data.prepare import main
from data.store import TokenStore
from data.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "data"


def test_stdlib_yaml_holds_out_packages_with_long_documents(tmp_path: Path) -> None:
    output = tmp_path / "stdlib"
    main([f"--config={CONFIGS / 'prepare_stdlib.yaml'}", f"--output={output}", "--workers=1"])
    train, heldout = TokenStore(output / "train"), TokenStore(output / "heldout")
    assert heldout.vocab_size == 4096
    assert 0.07 < heldout.num_bytes.sum() / (train.num_bytes.sum() + heldout.num_bytes.sum()) < 0.11
    assert (heldout.lengths >= 4096).sum() >= 10 and (heldout.lengths > 8192).sum() >= 5
    assert train.num_bytes.sum() / train.num_tokens > 3.3


def test_source_tree_yaml_with_one_package(tmp_path: Path) -> None:
    settings = ["--corpus.packages=[networkx]", "--corpus.exclude=[tests, algorithms]"]
    settings += ["--heldout_groups=[networkx/drawing]", "--tokenizer.vocab_size=1000", "--workers=1"]
    main([f"--config={CONFIGS / 'prepare_source_tree.yaml'}", f"--output={tmp_path / 'tree'}", *settings])
    assert TokenStore(tmp_path / "tree" / "heldout").num_documents > 2


def test_linux_yaml_on_a_stand_in(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = yaml.safe_load((CONFIGS / "prepare_linux.yaml").read_text())
    by_name = {Path(path).name: path for path in config["corpus"]["init_args"]["paths"]}
    groups = ["/".join((by_name[group.split("/")[0]], group.split("/")[1])) for group in config["heldout_groups"]]
    for folder in [*groups, *(f"{path}/other" for path in by_name.values())]:
        (tmp_path / folder).mkdir(parents=True)
        for name in ("a.c", "b.h", "Makefile"):
            (tmp_path / folder / name).write_text(f"/* {folder} {name} */\nint x;\n")
    monkeypatch.chdir(tmp_path)
    settings = [f"--tokenizer.path={prepared / 'tokenizer.model'}", "--output=out", "--workers=1"]
    main([f"--config={CONFIGS / 'prepare_linux.yaml'}", *settings])
    tokenizer, heldout = load_tokenizer(tmp_path / "out" / "tokenizer.model"), TokenStore(tmp_path / "out" / "heldout")
    texts = {tokenizer.decode(heldout.document(i).tolist()) for i in range(heldout.num_documents)}
    assert texts == {"".join(f"/* {one} {name} */\nint x;\n" for name in ("a.c", "b.h")) for one in groups}
    assert TokenStore(tmp_path / "out" / "train").num_documents == len(by_name)


def test_debian_docs_yaml_on_a_stand_in(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its command finds the packages, and each held-out one is a document."""
    text = (CONFIGS / "prepare_debian_docs.yaml").read_text()
    config = yaml.safe_load(text)
    (expression,) = re.findall(r"sed -n '(.*?)'", text)
    command = ["sed", "-n", expression, str(CONFIGS / "prepare_debian_docs.yaml")]
    packages = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert [f"debian-docs/{name}" for name in packages] == config["corpus"]["init_args"]["paths"]
    assert len(packages) > 100 and set(config["heldout_groups"]) < set(packages)
    page = "<html><body><p>This is the manual of {0}, which everybody should read before it is used.</p></body></html>"
    for name in packages:
        folder = tmp_path / "debian-docs" / name / "usr" / "share" / "doc" / name
        folder.mkdir(parents=True)
        (folder / "index.html").write_text(page.format(name))
        (folder / "genindex.html").write_text(page.format("nothing"))
    monkeypatch.chdir(tmp_path)
    settings = [f"--tokenizer.path={prepared / 'tokenizer.model'}", "--output=out", "--workers=1"]
    main([f"--config={CONFIGS / 'prepare_debian_docs.yaml'}", *settings])
    tokenizer, heldout = load_tokenizer(tmp_path / "out" / "tokenizer.model"), TokenStore(tmp_path / "out" / "heldout")
    assert "manual of debian-policy, which" in tokenizer.decode(heldout.document(0).tolist())
    assert heldout.num_documents == len(config["heldout_groups"])
    assert TokenStore(tmp_path / "out" / "train").num_documents == len(packages) - heldout.num_documents


def write_hub_folder(folder: Path, file_name: str, rows: list[dict[str, object]], config: str) -> None:
    """A folder that datasets.load_dataset reads like a hub repository."""
    import pyarrow
    import pyarrow.parquet

    path = folder / file_name
    path.parent.mkdir(parents=True)
    if file_name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {config}\n  data_files:\n  - split: train\n    path: {file_name}\n---\n"
    )


FINEWEB_ROW: dict[str, object] = {"text": "", "id": "<urn:uuid:1>", "dump": "CC-MAIN-2024-10"}
FINEWEB_ROW |= {"url": "https://a.example", "file_path": "s3://x"}
FINEWEB_ROW |= {"language": "en", "language_score": 0.9, "token_count": 100, "score": 3.1, "int_score": 3}
DCLM_ROW: dict[str, object] = {"text": "", "language_id_whole_page_fasttext": {"en": 0.9}}
DCLM_ROW |= {"bff_contained_ngram_count_before_dedupe": 0}
DCLM_ROW |= {"metadata": {"Content-Length": "5"}, "previous_word_count": 5, "url": "https://a.example", "warcinfo": "w"}
DCLM_ROW |= {"fasttext_openhermes_reddit_eli5_vs_rw_v2_bigram_200k_train_prob": 0.1}


@pytest.mark.parametrize(
    ("name", "file_name", "config", "row"),
    [
        ("fineweb_edu", "sample/10BT/000.parquet", "sample-10BT", FINEWEB_ROW),
        ("dclm", "global-shard_01/shard_0.jsonl", "default", DCLM_ROW),
    ],
)
def test_hub_yamls_on_a_stand_in_of_the_same_schema(
    prepared: Path, tmp_path: Path, name: str, file_name: str, config: str, row: dict[str, object]
) -> None:
    texts = [f"web page {i}: \u2581 naïve\r\n" + "word " * i for i in range(1, 40)]
    write_hub_folder(tmp_path / "hub", file_name, [row | {"text": text} for text in texts], config)
    settings = [f"--config={CONFIGS / f'prepare_{name}.yaml'}", f"--corpus.path={tmp_path / 'hub'}", "--workers=1"]
    settings += [f"--tokenizer.path={prepared / 'tokenizer.model'}", "--shard_bytes=500", "--max_documents=30"]
    main([*settings, f"--output={tmp_path / 'out'}", "--heldout_fraction=0.1"])
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer.model")
    stores = [TokenStore(tmp_path / "out" / split) for split in ("train", "heldout")]
    found = {tokenizer.decode(store.document(i).tolist()) for store in stores for i in range(store.num_documents)}
    assert found == set(texts[:30])
    assert stores[0].fingerprint_of_tokenizer == TokenStore(prepared / "train").fingerprint_of_tokenizer
    text = (CONFIGS / f"prepare_{name}.yaml").read_text()
    assert re.search(r"path: (HuggingFaceFW/fineweb-edu|mlfoundations/dclm-baseline-1.0)\n", text)
