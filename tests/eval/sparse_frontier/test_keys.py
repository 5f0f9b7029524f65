"""What is measured again after a change: all that depends on it, and nothing else."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eval.common.subjects import Subject
from eval.held_out.texts import HeldOut, open_held_out
from eval.ruler.files import FrozenTask
from eval.sparse_frontier.config import FrontierConfig
from eval.sparse_frontier.measure import Measuring
from model.checkpoint import resolve_checkpoint
from tests.eval.conftest import MakeRun

CPU = torch.device("cpu")
BASE = FrontierConfig(lengths=[1, 2], max_documents=2, needle_samples=1, needle_depths=2, device="cpu", decode_tokens=4)
FROZEN = FrozenTask("vt", 128, "a" * 64, [{"prompt": "x", "answers": ["y"]}] * 3)
WAYS = {
    "cell, prefill": ("cell", "dense", "prefill", 1, None),
    "cell, decode": ("cell", "snapkv", "decode", 1, 0.5),
    "time": ("prefill-time", "window", "prefill", 1, 0.5),
    "ruler, dense, prefill": ("ruler-vt", "dense", "prefill", 1, None),
    "ruler, dense, decode": ("ruler-vt", "dense", "decode", 1, None),
    "ruler, policy, prefill": ("ruler-vt", "window", "prefill", 1, 0.5),
    "ruler, policy, decode": ("ruler-vt", "snapkv", "decode", 1, 0.5),
}
ALL = set(WAYS)
RULER = {name for name in WAYS if name.startswith("ruler")}
CELLS, DECODE = ALL - RULER - {"time"}, {name for name in WAYS if name.endswith("decode")}
OF_TEXT = ALL - {"ruler, dense, prefill", "ruler, dense, decode"}  # read held-out text, if only to set a policy


@pytest.fixture(scope="module")
def subject(make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject("softmax", resolve_checkpoint(make_run(tmp_path_factory.mktemp("runs") / "softmax", "softmax")))


@pytest.fixture(scope="module")
def held_out(corpus: Path, subject: Subject) -> HeldOut:
    return open_held_out(corpus, [subject], BASE.shared())


def kept(
    subject: Subject, held_out: HeldOut, config: FrontierConfig = BASE, frozen: FrozenTask = FROZEN
) -> dict[str, str]:
    """The files' names by way."""
    measuring = Measuring(subject, held_out, Path("out"), config, CPU)
    return {
        name: measuring._kept(*way, frozen if name in RULER else None).name  # type: ignore[arg-type]
        for name, way in WAYS.items()
    }


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before if before[name] != after[name]}


@pytest.mark.parametrize(
    ("setting", "value", "depending"),
    [
        ("seed", 1, OF_TEXT), ("max_documents", 3, OF_TEXT), ("row_tokens", 512, OF_TEXT),
        ("needle_samples", 2, CELLS), ("needle_tokens", 999, CELLS), ("needle_depths", 3, CELLS),
        ("needle_digits", 5, CELLS), ("needle_count", 3, CELLS),
        ("decode_tokens", 5, DECODE), ("chunk_tokens", 64, DECODE), ("timed_runs", 7, {"time"}),
        ("precision", "bfloat16", ALL), ("precision", "float32", set()), ("device", "auto", set()),
        ("base_length", 128, set()), ("densities", [0.3], set()), ("policies", ["window"], set()),
    ],
)  # fmt: skip
def test_a_setting_decides_what_depends_on_it(
    setting: str, value: object, depending: set[str], subject: Subject, held_out: HeldOut
) -> None:
    config = replace(BASE, **{setting: value})  # type: ignore[arg-type]
    assert changed(kept(subject, held_out), kept(subject, held_out, config)) == depending


def test_every_setting_is_decided_about() -> None:
    """A new one must be given to the results that depend on it, or be named here."""
    from eval.sparse_frontier.measure import deciding

    used = {setting for way in WAYS.values() for setting in deciding(way[0], way[2], way[4])}
    elsewhere = {  # in the key by what they lead to, or which results there are and who measures them
        "policies", "densities", "thresholds", "patterns", "ruler", "ruler_tasks", "ruler_samples", "lengths",
        "base_length", "device", "precision", "processes",
    }  # fmt: skip
    assert used | elsewhere == set(vars(BASE)) and not used & elsewhere


def test_samples_decide_ruler_alone_and_text_all_that_reads_it(subject: Subject, held_out: HeldOut) -> None:
    before = kept(subject, held_out)
    other = replace(FROZEN, sha256="b" * 64)
    fewer = replace(FROZEN, samples=FROZEN.samples[:2])
    assert changed(before, kept(subject, held_out, frozen=other)) == RULER
    assert changed(before, kept(subject, held_out, frozen=fewer)) == RULER
    text = replace(held_out, fingerprint="other")
    assert changed(before, kept(subject, text)) == OF_TEXT
    longer = replace(held_out, plan=replace(held_out.plan, multiples=[1, 2, 4]))
    assert changed(before, kept(subject, longer)) == OF_TEXT
    assert changed(before, kept(subject, replace(held_out, base_length=64))) == ALL
    assert len(set(before.values())) == len(before)


def test_the_checkpoint_decides_everything(
    subject: Subject, held_out: HeldOut, make_run: MakeRun, tmp_path: Path
) -> None:
    other = Subject("softmax", resolve_checkpoint(make_run(tmp_path / "softmax", "softmax")))
    assert changed(kept(subject, held_out), kept(other, held_out)) == ALL
