"""Training steps of checkpoints in benchmarks.train_speed, as far as they run without a CUDA device."""

from pathlib import Path

import pytest
import torch

from benchmarks.train_speed import main
from benchmarks.trained_steps import TrainedTrial, open_runs, windows
from data.store import TokenStore
from model.attention_stats import attention_stats
from model.loading import load_model
from tests.benchmarks.conftest import Refused
from tests.eval.conftest import MakeRun


def trial(run: Path, corpus: Path) -> TrainedTrial:
    (subject,), store = open_runs([str(run)], corpus)
    return TrainedTrial(subject, store, "chunked", dict(compile=False))


@pytest.mark.parametrize("kind", ["softmax", "asentmax", "nsa", "hierarchical"])
def test_steps_leave_the_weights_as_they_were_trained(
    kind: str, corpus: Path, make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run(tmp_path / kind, kind, init_std=0.3)
    trained, steps = load_model(run).model, trial(run, corpus)
    steps.step(steps.batch(192, 64))
    assert steps.optimizer.state, "the optimizer works"
    for name, weight in steps.module.model.state_dict().items():
        assert torch.equal(weight, trained.state_dict()[name]), name


def test_a_batch_is_of_held_out_documents(corpus: Path, make_run: MakeRun, tmp_path: Path) -> None:
    steps, store = trial(make_run(tmp_path / "run", "softmax"), corpus), TokenStore(corpus / "heldout")
    batch = steps.batch(192, 64)
    found = windows(store, 64, 3)
    assert batch["tokens"].shape == (3, 64) and batch["cu_seqlens"] is None and len(set(found)) == 3
    for row, labels, (document, start) in zip(batch["tokens"], batch["labels"], found, strict=True):
        tokens = store.document(document)[start : start + 65].tolist()
        assert [*row.tolist(), int(labels[-1])] == tokens and row[1:].equal(labels[:-1])


def test_live_tiles_are_those_of_a_document(corpus: Path, make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "asentmax", init_std=0.5)
    steps, model = trial(run, corpus), load_model(run).model
    document, start = windows(steps.store, 256, 1)[0]
    tokens = torch.from_numpy(steps.store.document(document)[start : start + 256].astype("int64"))[None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        live = [one.live_share.mean() for one in attention_stats(model, tokens)]
    assert steps.live_percent(256) == pytest.approx(100 * float(sum(live)) / len(live))


def test_windows_lie_in_documents_and_do_not_overlap(corpus: Path) -> None:
    store = TokenStore(corpus / "heldout")
    every = windows(store, 100, sum((int(n) - 1) // 100 for n in store.lengths))
    assert all(start + 100 < store.lengths[document] for document, start in every) and len(set(every)) == len(every)
    assert windows(store, 100, 2) == [every[0], every[len(every) // 2]]
    with pytest.raises(ValueError, match=rf"has {len(every)} windows of 100 tokens inside documents, expected 1000"):
        windows(store, 100, 1000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--runs", "{run}"], "--runs needs --data"),
        (["--output", "{corpus}/x.csv"], "is a run's or a corpus's own folder"),
        (["--output", "{folder}"], "is a folder: expected the name of a file"),
        (["--runs", "{run}", "--data", "{corpus}", "--models", "1b"], "leave out --models and --kinds"),
        (["--runs", "{run}", "--data", "{corpus}", "--sequence_parallel", "2"], "expected 1 with --runs"),
        (["--data", "{corpus}"], "only --runs reads it"),
        (["--runs", "{run}", "--data", "{corpus}", "--lengths", "0"], "is '0': expected a whole number, at least 1"),
        (["--tokens", "-3"], "is '-3': expected a whole number, at least 1"),
        (["--steps", "two"], "is 'two': expected a whole number, at least 1"),
        (["--runs", "{run}", "--data", "{run}"], "manifest.json"),
        (["--runs", "{corpus}", "--data", "{corpus}"], "checkpoint"),
        (["--runs", "{run}", "--data", "{corpus}"], "expected 8: set --lengths or --tokens lower"),
    ],
)
def test_errors_come_before_anything_is_measured(
    options: list[str], message: str, corpus: Path, make_run: MakeRun, tmp_path: Path, refused: Refused
) -> None:
    run = make_run(tmp_path / "run", "softmax")
    assert message in refused(main, [one.format(run=run, corpus=corpus, folder=tmp_path) for one in options])
