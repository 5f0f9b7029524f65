"""Generation, lm-eval, RULER and held-out evaluation of a model whose corpus has a tokenizer of the hub."""

from pathlib import Path

import pytest
import torch

from data.corpora import TextFiles
from data.prepare import prepare
from data.prepare_settings import PrepareConfig, TokenizerConfig
from data.store import TokenStore
from data.tokenizer import load_tokenizer
from eval.common.scoring import Runtime
from eval.common.subjects import find_subjects
from eval.generate import main, open_tokenizer
from eval.held_out.config import EvalConfig
from eval.held_out.measurement import measure
from eval.held_out.perplexity import bytes_of_tokens
from eval.held_out.texts import open_held_out
from model.loading import load_model
from tests.eval.conftest import BASE_LENGTH, MakeRun, failing_line
from tests.hub_tokenizers import END, byte_level, llama_2, save


def prepare_with(hub: Path, corpus: Path, output: Path, lossy: bool = False) -> Path:
    """The texts of the shared corpus, which lie beside it."""
    tokenizer = TokenizerConfig(path=str(hub), lossy=lossy)
    texts = TextFiles([str(corpus.parent / "*.py")])
    prepare(PrepareConfig(texts, str(output), tokenizer, heldout_fraction=0.5, workers=1), {"paths": "test"})
    return output


@pytest.fixture(scope="module")
def data(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    hub = save(folder / "hub", byte_level([END]), bos_token=END, eos_token=END)
    return prepare_with(hub, corpus, folder / "prepared")


@pytest.fixture(scope="module")
def run(data: Path, make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run") / "run", "softmax", init_std=0.3, data=data)


def test_generation(run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(run), "--prompt", "value é", "--max_new_tokens", "8", "--device", "cpu"]
    assert main(arguments) == 0
    written = capsys.readouterr().out
    assert main([*arguments, "--tokenizer", str(data)]) == 0
    assert capsys.readouterr().out == written != "\n"
    hub = save(tmp_path, byte_level([END]), bos_token=END, eos_token="<tool>")
    assert "was trained with" in failing_line(capsys, main, *arguments, "--tokenizer", hub)


def test_lm_eval(run: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs pip install -r requirements-eval.txt")
    from lm_eval.api.instance import Instance

    from eval.tasks.lm_eval_adapter import HarnessModel

    loaded, tokenizer = load_model(run), open_tokenizer(find_subjects([str(run)])[0].checkpoint, None)
    runtime = Runtime(torch.device("cpu"), None, 300)
    model = HarnessModel(
        loaded.model,
        tokenizer,
        runtime,
        window=None,
        refuse=True,
        add_bos_token=True,
        batch_tokens=600,
        seed=0,
        label="test",
    )
    text = "value items é"
    whole = model.loglikelihood([Instance("loglikelihood", {}, ("", text), 0, ("task", 0, 1))])[0][0]  # type: ignore[arg-type]
    rolling = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0, ("task", 0, 1))])[0]  # type: ignore[arg-type]
    assert whole == pytest.approx(rolling, abs=1e-4) and whole < -len(tokenizer.encode(text))


def test_ruler(run: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("wonderwords", reason="needs pip install -r requirements-eval.txt")
    from eval.ruler.command import RulerConfig, build, find_tokenizer
    from eval.ruler.files import check_tokenizer, open_frozen

    assert find_tokenizer(data).fingerprint == find_tokenizer(run).fingerprint
    build(find_tokenizer(run), None, RulerConfig(tasks=["fwe"], lengths=[1024], samples=1), tmp_path)
    check_tokenizer(tmp_path, [find_subjects([str(run)])[0].checkpoint])
    sample = open_frozen(tmp_path, "fwe", [1024])[0].samples[0]
    assert sample["tokens"] == 1 + len(load_tokenizer(data).encode(sample["prompt"])) <= 1024


def test_bytes_of_its_tokens_add_up_to_every_document(data: Path) -> None:
    store, tokenizer = TokenStore(data / "heldout"), load_tokenizer(data)
    table = bytes_of_tokens(tokenizer)
    for index in range(store.num_documents):
        assert table[store.document(index)].sum() == store.num_bytes[index]
    text = "\ufffd 漢日本 \u2581\U0001f680"
    assert table[tokenizer.encode(text)].sum() == len(text.encode())


def test_bits_per_byte_of_a_lossy_tokenizer_count_the_texts_bytes(
    corpus: Path, make_run: MakeRun, tmp_path: Path
) -> None:
    hub = save(tmp_path / "hub", llama_2(), bos_token="<s>", eos_token="</s>")
    data = prepare_with(hub, corpus, tmp_path / "prepared", lossy=True)
    subjects = find_subjects([str(make_run(tmp_path / "run", "softmax", data=data))])
    config = EvalConfig(lengths=[1], needle_samples=1, needle_depths=2, headline_tokens=0, max_documents=2)
    measured = measure(subjects[0], open_held_out(data, subjects, config), config, torch.device("cpu"))
    store = TokenStore(data / "heldout")
    assert measured.perplexity.headline.bytes == store.num_bytes.tolist()
    lossless = TokenStore(corpus / "heldout")
    assert store.num_bytes.tolist() == lossless.num_bytes.tolist()
    assert measured.training_length == BASE_LENGTH
