"""RULER in the comparison of policies with the entmax twin, on samples that fit tiny checkpoints."""

import json
import random
import shutil
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import eval.sparse_frontier.command
import eval.sparse_frontier.measure
from data.tokenizer import Tokenizer, load_tokenizer
from eval.common.scoring import Runtime
from eval.generation import generate
from eval.reporting.document import Picture
from eval.reporting.statistics import share
from eval.ruler.files import FORMAT, MANIFEST, FrozenTask, write_manifest, write_samples
from eval.ruler.tasks import RULER_TASKS
from eval.sparse_frontier.command import main
from eval.sparse_frontier.config import Study
from eval.sparse_frontier.report import Summaries
from eval.sparse_frontier.ruler_answers import open_sets, write_answers
from eval.sparse_frontier.tasks import Scorer
from kernels import entmax_attention
from model.inference.incremental import extend, make_cache, prefill
from model.loading import load_model
from model.policies.policy import Phase, SparsePolicy, use_policy
from model.policies.snapkv import SnapKV
from model.policies.window import SlidingWindow
from model.transformer import Transformer
from tests.eval.conftest import BASE_LENGTH, WORDS, MakeRun

QUICK = ["--max_documents", "2", "--needle_samples", "1", "--needle_depths", "2"]
QUICK += ["--lengths", "1", "2", "--decode_tokens", "3", "--timed_runs", "1", "--densities", "0.3", "1", "--device"]
QUICK += ["cpu", "--policies", "window", "vertical_slash", "snapkv", "--ruler_samples", "2"]
RUNTIME = Runtime(torch.device("cpu"), None, 8192)
SAMPLES = 3  # frozen, of which QUICK takes two


def load(run: Path) -> Transformer:
    return load_model(run / "checkpoints/step-00000007", torch.device("cpu")).model


@pytest.fixture(scope="module")
def runs(make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("ruler_runs")
    return {kind: make_run(folder / kind, kind, init_std=0.5) for kind in ("softmax", "asentmax")}


@pytest.fixture(scope="module")
def tokenizer(corpus: Path) -> Tokenizer:
    return load_tokenizer(corpus / "tokenizer.model")


def prompt(seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=80))


def written(model: Transformer, tokenizer: Tokenizer, text: str, tokens: int) -> str:
    """What dense greedy decoding writes."""
    ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    options = dict(max_new_tokens=tokens, eos=tokenizer.eos_id, vocab_size=tokenizer.vocab_size)
    return tokenizer.decode(generate(model, [ids], **options)[0].tokens)  # type: ignore[arg-type]


def freeze(folder: Path, tokenizer: Tokenizer, files: list[FrozenTask], left_out: list[dict[str, Any]]) -> Path:
    """A folder as eval.ruler makes it."""
    folder.mkdir(parents=True, exist_ok=True)
    records = [write_samples(folder, one.task, one.length, one.samples) for one in files]
    facts = {"format": FORMAT, "tokenizer": {"fingerprint": tokenizer.fingerprint}}
    write_manifest(folder, {**facts, "files": records, "left_out": left_out}, MANIFEST)
    return folder


@pytest.fixture(scope="module")
def ruler(runs: dict[str, Path], tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers that the dense softmax model writes: half of vt's, and of qa_squad, where one is enough, the second."""
    model, files = load(runs["softmax"]), []
    for name, answers_of in (("vt", lambda text: [text[3:8], "never"]), ("qa_squad", lambda text: ["never", text[:6]])):
        samples = []
        for index in range(SAMPLES):
            text = prompt(index + 10 * len(files))
            answers = answers_of(written(model, tokenizer, text, RULER_TASKS[name].answer_tokens))
            tokens = 1 + len(tokenizer.encode(text))
            assert tokens + RULER_TASKS[name].answer_tokens <= BASE_LENGTH
            samples.append({"index": index, "prompt": text, "answers": answers, "tokens": tokens})
        files.append(FrozenTask(name, BASE_LENGTH, "", samples))
    left_out = [{"task": "vt", "length": 2 * BASE_LENGTH, "reason": "nothing to hide it in"}]
    return freeze(tmp_path_factory.mktemp("ruler"), tokenizer, files, left_out)


def options(corpus: Path, runs: dict[str, Path], ruler: Path, output: Path) -> list[str]:
    named = ["--softmax", str(runs["softmax"]), "--entmax", str(runs["asentmax"]), "--ruler", str(ruler)]
    return [*named, "--data", str(corpus), "--output", str(output), *QUICK]


def without_plots(monkeypatch: pytest.MonkeyPatch) -> list[Study]:
    """Instead of reports, which take longer than tiny models: what they would show."""
    studies: list[Study] = []

    def keep(study: Study, summaries: Summaries, output: Path) -> tuple[Path, list[Picture]]:
        studies.append(study)
        return output, []

    monkeypatch.setattr(eval.sparse_frontier.command, "write_report", keep)
    return studies


def test_every_way_of_attending_answers_ruler(
    corpus: Path, runs: dict[str, Path], ruler: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = options(corpus, runs, ruler, tmp_path)
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.count("128 tokens, RULER (2 tasks): ") == 2 and "256 tokens, RULER" not in printed
    report = json.loads((tmp_path / "sparse_frontier.json").read_text())
    cells = {(c["method"], c["phase"], c["wanted"], c["task"]): c for c in report["ruler"]}
    scored = {(c["method"], c["phase"], c["wanted"]) for c in report["cells"] if c["multiple"] == 1}
    assert set(cells) == {(*way, task) for way in scored for task in ("vt", "qa_squad")}
    for (method, phase, wanted, task), cell in cells.items():
        same = next(c for c in report["cells"] if (c["method"], c["phase"], c["wanted"]) == (method, phase, wanted))
        assert cell["policy"] == same["policy"] and cell["label"] == same["label"]
        assert len(cell["scores"]) == 2 and cell["context"] == BASE_LENGTH and "texts" not in cell
        if method == "dense" or wanted == 1:
            assert cell["scores"] == ([0.5, 0.5] if task == "vt" else [1, 1]) and cell["density"] == 1, (method, phase)
        else:
            assert 0 < cell["density"] < 0.9
    assert any(c["scores"] != cells["dense", c["phase"], None, c["task"]]["scores"] for c in cells.values())

    summaries = {(s["method"], s["phase"], s["wanted"]): s for s in report["ruler_summaries"]}
    assert set(summaries) == scored
    dense = summaries["dense", "prefill", None]
    assert [dense["accuracy"][name] for name in ("value", "low")] == [0.75, None]
    assert dense["tasks"]["vt"] == vars(share(0.5, 2)) and dense["difference"]["value"] == 0
    page = (tmp_path / "sparse_frontier.md").read_text()
    assert page.count("| mean of the tasks |") == 2 and "policies act on the whole prompt" in page.lower()
    assert "- No RULER samples of 256 tokens.\n" in page
    assert (tmp_path / "plots/decode_ruler_over_density.png").is_file()

    def refuse(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(eval.sparse_frontier.measure, "write_answers", refuse)
    monkeypatch.setattr(eval.sparse_frontier.measure, "make_tasks", refuse)
    studies = without_plots(monkeypatch)
    assert main(arguments) == 0
    assert [asdict(one) | {"texts": 0} for one in studies[0].ruler] == [one | {"texts": 0} for one in report["ruler"]]
    assert main([*arguments, "--ruler_tasks", "qa_squad"]) == 0
    assert [one.task for one in studies[1].ruler] == ["qa_squad"] * len(summaries)
    with pytest.raises(AssertionError, match="measured again"):
        main([*arguments, "--ruler_samples", "3"])


def test_other_samples_are_measured_alone(
    corpus: Path, runs: dict[str, Path], ruler: Path, tokenizer: Tokenizer, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Without RULER first: its results stand beside the others', which it does not touch."""
    without_plots(monkeypatch)
    arguments = [*options(corpus, runs, ruler, tmp_path / "out"), "--lengths", "1", "--policies", "window"]
    place = arguments.index("--ruler")
    without = [*arguments[:place], *arguments[place + 2 :]]
    place = without.index("--ruler_samples")
    assert main([*without[:place], *without[place + 2 :]]) == 0
    monkeypatch.setattr(eval.sparse_frontier.measure.Measuring, "_measure", None)
    measured: list[str] = []
    real = write_answers

    def counting(scorer: Scorer, codec: Tokenizer, frozen: FrozenTask, policy: SparsePolicy | None) -> Any:
        measured.append(frozen.task)
        return real(scorer, codec, frozen, policy)

    monkeypatch.setattr(eval.sparse_frontier.measure, "write_answers", counting)
    assert main([*arguments, "--ruler_tasks", "vt"]) == 0
    ways = 2 * (2 + 3)  # in each phase both models and the window at two densities and at entmax's
    assert measured == ["vt"] * ways
    assert main(arguments) == 0
    assert measured[ways:] == ["qa_squad"] * ways
    measured.clear()
    files, _ = open_sets(ruler, [], None, [BASE_LENGTH], [])
    files[0].samples[1]["answers"] = ["other"]
    arguments[arguments.index("--ruler") + 1] = str(freeze(tmp_path / "other", tokenizer, files, []))
    assert main(arguments) == 0
    assert measured == [files[0].task] * ways


@pytest.mark.parametrize("kind", ["softmax", "asentmax"])
def test_without_a_policy_the_scores_are_those_of_eval_tasks(
    kind: str, runs: dict[str, Path], ruler: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason="needs pip install -r requirements-eval.txt")
    import eval.tasks.command

    arguments = [str(runs[kind]), "--tasks", "vt", "qa_squad", "--ruler", str(ruler), "--device", "cpu"]
    assert eval.tasks.command.main([*arguments, "--output", str(tmp_path)]) == 0
    wanted = {}
    for path in (tmp_path / "results").iterdir():
        raw = json.loads(path.read_text())
        wanted[raw["group"]] = raw["metrics"][0]["values"]
    phases: tuple[Phase, ...] = ("prefill", "decode")
    for phase in phases:
        scorer = Scorer(load(runs[kind]), phase, RUNTIME, 64, "")
        for one in open_sets(ruler, [], None, [BASE_LENGTH], [])[0]:
            assert write_answers(scorer, tokenizer, one, None).scores == wanted[one.task]


@torch.no_grad()
def by_hand(model: Transformer, ids: list[int], policy: SparsePolicy, phase: Phase, count: int) -> list[int]:
    """Greedy tokens: the prompt under the policy and dense decoding, or a dense prompt and its last token and all that
    follows under the policy."""
    cache, tokens, decoding = make_cache(model, 1, len(ids) + count), [], phase == "decode"
    with nullcontext() if decoding else use_policy(model, policy):
        hidden = prefill(model, [ids[: len(ids) - decoding]], cache, len(ids))
    with use_policy(model, policy) if decoding else nullcontext():
        if decoding:
            hidden = extend(model, torch.tensor([ids[-1:]]), cache)[0]
        for _ in range(count):
            tokens.append(int(model.logits(hidden)[0].argmax()))
            hidden = extend(model, torch.tensor([tokens[-1:]]), cache)[0]
    return tokens


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_policy_acts_in_its_phase_only(
    phase: Phase, runs: dict[str, Path], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the whole prompt at once, though decoding prefills in smaller chunks, or on single tokens."""
    model, policy, count = load(runs["softmax"]), SlidingWindow(6), RULER_TASKS["vt"].answer_tokens
    prompts = [prompt(seed) for seed in range(2)]
    frozen = FrozenTask("vt", 128, "", [{"prompt": text, "answers": ["never"]} for text in prompts])
    passes: set[int] = set()
    real = SlidingWindow.select

    def caught(self: SlidingWindow, q: torch.Tensor, *rest: Any) -> Any:
        passes.add(q.shape[1])
        return real(self, q, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(SlidingWindow, "select", caught)
        answers = write_answers(Scorer(model, phase, RUNTIME, 64, ""), tokenizer, frozen, policy)
    assert passes == ({1} if phase == "decode" else {1 + len(tokenizer.encode(text)) for text in prompts})
    kept = visible = 0
    for asked, text in zip(prompts, answers.texts, strict=True):
        ids = [tokenizer.bos_id, *tokenizer.encode(asked)]
        tokens = by_hand(model, ids, policy, phase, count)
        assert tokenizer.eos_id not in tokens
        assert text == tokenizer.decode(tokens) != written(model, tokenizer, asked, count)
        # the last token that was written is not read, and the first comes from the prompt's last one
        queries = range(1, len(ids) + 1) if phase == "prefill" else range(len(ids), len(ids) + count)
        kept, visible = kept + sum(min(6, n) for n in queries), visible + sum(queries)
    assert answers.density == pytest.approx(kept / visible)


def test_answers_end_when_their_score_is_final(runs: dict[str, Path], ruler: Path, tokenizer: Tokenizer) -> None:
    """And where it is not, with the room that the task has; a policy that remembers one prompt gets one."""
    scorer = Scorer(load(runs["softmax"]), "decode", RUNTIME, 64, "")
    half, enough = open_sets(ruler, ["vt", "qa_squad"], None, [BASE_LENGTH], [])[0]
    for one, whole in ((half, True), (enough, False)):
        for policy in (None, SnapKV(BASE_LENGTH)):
            answers = write_answers(scorer, tokenizer, one, policy)
            assert answers.scores == [0.5 if whole else 1.0] * SAMPLES and answers.density == 1
            room = RULER_TASKS[one.task].answer_tokens
            texts = [written(scorer.model, tokenizer, sample["prompt"], room) for sample in one.samples]
            assert (answers.texts == texts) is whole
            assert all(
                text.startswith(shown.rstrip("\ufffd")) for text, shown in zip(texts, answers.texts, strict=True)
            )


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_density_of_entmax_is_that_of_the_tokens_it_read(
    phase: Phase, runs: dict[str, Path], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the support caught while the answers are written; every call has one query but for the prompt's."""
    model = load(runs["asentmax"])
    frozen = FrozenTask("vt", 128, "", [{"prompt": prompt(3), "answers": ["never"]}])
    length = 1 + len(tokenizer.encode(prompt(3)))
    supports: list[torch.Tensor] = []

    def caught(q: torch.Tensor, *rest: Any, **options: Any) -> Any:
        out, stats = entmax_attention(q, *rest, **{**options, "return_stats": True})
        if (q.shape[2] == 1) == (phase == "decode") and (phase == "decode" or not supports[1:]):
            supports.append(stats.support[0].sum(-1))
        return (out, stats) if options.get("return_stats") else out

    monkeypatch.setattr("model.attention.entmax_attention", caught)
    answers = write_answers(Scorer(model, phase, RUNTIME, 128, ""), tokenizer, frozen, None)
    read = RULER_TASKS["vt"].answer_tokens if phase == "decode" else 1
    assert len(supports) == 2 * read and answers.texts[0]
    queries = range(length, length + read) if phase == "decode" else range(1, length + 1)
    kept = torch.stack(supports).unflatten(0, (-1, 2)).sum(0)  # [layers, heads]
    two_keys = 2 / (kept.numel() * sum(queries))  # at a threshold rounding decides
    assert answers.density == pytest.approx(float((kept / sum(queries)).mean()), abs=two_keys)


def test_what_the_folder_lacks_at_a_length_is_noted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    samples = [{"index": i, "prompt": "", "answers": ["a"], "tokens": 1} for i in range(3)]
    files = [FrozenTask(*place, "", samples) for place in (("vt", 128), ("vt", 256), ("fwe", 256), ("fwe", 1024))]
    freeze(tmp_path, tokenizer, files, [{"task": "fwe", "length": 128, "reason": "too short"}])
    found, notes = open_sets(tmp_path, [], 2, [128, 256, 512], [])
    assert [(one.task, one.length, len(one.samples)) for one in found] == [
        ("vt", 128, 2), ("vt", 256, 2), ("fwe", 256, 2),
    ]  # fmt: skip
    assert notes == ["No RULER task fwe at 128 tokens: too short.", "No RULER samples of 512 tokens."]
    found, notes = open_sets(tmp_path, ["fwe"], None, [128, 256], [])
    assert [(one.task, one.length) for one in found] == [("fwe", 256)] and len(found[0].samples) == 3


def test_what_cannot_be_measured_ends_in_one_line(
    corpus: Path, runs: dict[str, Path], ruler: Path, tmp_path: Path, capsys: Any
) -> None:
    def failing(*arguments: str) -> str:
        assert main([*options(corpus, runs, ruler, tmp_path), *arguments]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ")
        return lines[0]

    longer = failing("--lengths", "2", "4")
    assert f"--ruler {ruler} has samples of 128 tokens, contexts measured have 256, 512: expected a common" in longer
    assert "python -m eval.ruler --lengths 256 512, or set --base_length and --lengths" in longer
    assert "has vt at 128 tokens, contexts measured have 512" in failing("--lengths", "4", "--ruler_tasks", "vt")
    not_built = failing("--lengths", "2", "--ruler_tasks", "vt")
    assert f"{ruler} has no vt at 256; vt at 256 was left out: nothing to hide it in" in not_built
    assert f"{ruler} has no task cwe" in failing("--ruler_tasks", "cwe")
    unknown = failing("--ruler_tasks", "vt", "niah")
    assert "ruler_tasks is ['vt', 'niah']: expected different ones of niah_single_1" in unknown
    assert "ruler_samples is 0: expected at least 1" in failing("--ruler_samples", "0")
    assert "RULER was not built there" in failing("--ruler", str(tmp_path / "nowhere"))
    named = ["--softmax", str(runs["softmax"]), "--entmax", str(runs["asentmax"]), "--data", str(corpus)]
    assert main([*named, "--ruler_samples", "1"]) == 2
    assert "ruler_samples is 1, but ruler is not set: build RULER with" in capsys.readouterr().err
    copy = Path(shutil.copytree(ruler, tmp_path / "copy"))
    write_manifest(copy, json.loads((copy / MANIFEST).read_text()) | {"tokenizer": {"fingerprint": "0" * 64}}, MANIFEST)
    assert "was built with tokenizer 000000000000, but" in failing("--ruler", str(copy))
    shutil.copy(ruler / MANIFEST, copy)
    (copy / "vt-128.jsonl").write_text("{")
    assert "vt-128.jsonl is missing or damaged" in failing("--ruler", str(copy))
