"""A length in tokens is whole optimizer steps, and everything that depends on the length follows."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import Namespace

from common.errors import UsageError
from model.checkpoint import checkpoint_folder, read_complete
from tests.training.conftest import ROOT, TrainProcess, assert_same_weights, run_train
from training.length import check_length, check_warmup, tokens_to_steps
from training.step.optim import OptimizerConfig, lr_factor

IN_TOKENS = ("--trainer.max_steps", -1, "--trainer.max_tokens")  # the tiny config has max_steps


def in_steps(
    step: int = 0, tokens: int = 0, batch: int = 4, recorded: int | None = None, **options: Any
) -> tuple[int, int]:
    """max_steps and warmup_steps of a run in steps of batch x 64 tokens."""
    config = Namespace(
        trainer=Namespace(max_steps=-1, max_tokens=options.get("max_tokens")),
        data=Namespace(global_batch_size=batch, sequence_length=64),
        model=Namespace(optimizer=Namespace(warmup_steps=3, warmup_tokens=options.get("warmup_tokens"))),
    )
    tokens_to_steps(config, step=step, tokens=tokens, warmup_steps=recorded)
    assert config.trainer.max_tokens is None and config.model.optimizer.warmup_tokens is None
    return config.trainer.max_steps, config.model.optimizer.warmup_steps


def test_tokens_are_rounded_up_to_whole_steps() -> None:
    for tokens, steps in ((1, 1), (255, 1), (256, 1), (257, 2), (25_600, 100), (25_601, 101), (1e6, 3907)):
        assert in_steps(max_tokens=tokens) == (steps, 3)
        assert in_steps(max_tokens=256, warmup_tokens=tokens) == (1, steps)
    assert in_steps(warmup_tokens=0) == (-1, 0) and in_steps() == (-1, 3)


def test_what_a_run_has_trained_on_counts_whatever_its_batch_was() -> None:
    assert in_steps(step=40, tokens=40 * 256, max_tokens=25_600) == (100, 3)  # as from the start
    assert in_steps(step=40, tokens=40 * 256, batch=8, max_tokens=25_600) == (70, 3)
    assert in_steps(step=40, tokens=40 * 256, max_tokens=40 * 256 - 1)[0] == 40  # and no step back


def test_a_warm_up_goes_on_and_one_that_is_over_stays() -> None:
    started = dict(step=40, tokens=40 * 256)
    for batch in (1, 4, 8):
        assert in_steps(**started, batch=batch, warmup_tokens=4_096)[1] == 16
        assert in_steps(**started, batch=batch, warmup_tokens=4_096, recorded=17)[1] == 17
        assert in_steps(**started, batch=batch, warmup_tokens=4_096, recorded=50)[1] == 16  # asked for now
        assert in_steps(**started, batch=batch, warmup_tokens=12_288)[1] == 40 + 2_048 // (64 * batch)
    assert in_steps(step=40, tokens=40 * 256, warmup_tokens=12_288)[1] == in_steps(warmup_tokens=12_288)[1]


def test_messages_name_what_was_asked_for() -> None:
    config = Namespace(
        trainer=Namespace(max_steps=-1, max_tokens=1024), data=Namespace(global_batch_size=4, sequence_length=64),
        model=Namespace(optimizer=Namespace(warmup_steps=3, warmup_tokens=5000)),
    )  # fmt: skip
    length = tokens_to_steps(config, step=0, tokens=0)
    with pytest.raises(UsageError, match=r"tokens is 5000 \(20 steps\), longer than .*max_tokens 1024 \(4 steps\)"):
        check_warmup(config.model.optimizer.warmup_steps, config.trainer.max_steps, length)


def test_schedules_follow_the_tokens() -> None:
    """100 steps of 256 tokens, 10 of them warm-up, by the definitions of the schedules."""
    steps, warmup = in_steps(max_tokens=25_600, warmup_tokens=2_560)
    wsd = lr_factor(OptimizerConfig(schedule="wsd", warmup_steps=warmup, final_lr_fraction=0.0), steps)
    assert [wsd(step) for step in (0, 4, 9, 79, 89, 99)] == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.5, 0.0])
    cosine = lr_factor(OptimizerConfig(schedule="cosine", warmup_steps=warmup, final_lr_fraction=0.2), steps)
    # halfway between steps 10 and 99 the cosine is 0
    assert cosine(54) + cosine(55) == pytest.approx(2 * 0.6) and cosine(99) == pytest.approx(0.2)


def test_tokens_that_nobody_has_turned_into_steps_are_not_ignored() -> None:
    with pytest.raises(ValueError, match="warmup_tokens is 100: expected steps"):
        lr_factor(OptimizerConfig(warmup_tokens=100), 10)


def test_one_length_is_given() -> None:
    def check(steps: int, tokens: float | None, needed: bool = True) -> None:
        check_length(Namespace(max_steps=steps, max_tokens=tokens), -1, needed=needed)

    check(5, None), check(-1, 1e9), check(-1, 1), check(-1, None, needed=False)
    with pytest.raises(ValueError, match="max_steps is 5 and trainer.max_tokens 1000: expected one of the two.* null$"):
        check(5, 1000)
    for tokens in (0, -1, 2.5, float("nan"), 10**19):
        with pytest.raises(ValueError, match="trainer.max_tokens is .* expected a whole number at least 1"):
            check(-1, tokens, needed=False)
    with pytest.raises(ValueError, match="trainer.max_steps is -1"):
        check(-1, None)


def test_a_run_of_tokens_is_that_of_its_steps_and_goes_on_in_tokens(train: TrainProcess, tmp_path: Path) -> None:
    done = train("--run_dir", tmp_path / "tokens", *IN_TOKENS, "1.5e3", "--model.optimizer.warmup_tokens", 700)
    assert done.returncode == 0, done.stderr
    assert "from step 0 to 6: 4 x 64 tokens a step" in done.stderr
    assert train("--run_dir", tmp_path / "steps", "--trainer.max_steps", 6, "--model.optimizer.warmup_steps", 3)
    assert_same_weights(tmp_path / "tokens", tmp_path / "steps")
    record = yaml.safe_load((tmp_path / "tokens" / "config.yaml").read_text())
    assert (record["trainer"]["max_steps"], record["trainer"]["max_tokens"]) == (6, None)
    again = ("--run_dir", tmp_path / "tokens", "--resume", "auto", *IN_TOKENS)
    warm = ("--model.optimizer.warmup_steps", 3)
    assert "already at step 6" in train(*again, 1500, *warm).stderr
    refused = train(*again, 3000, *warm)
    assert refused.returncode == 2 and "trainer.max_steps 6 (config: 12): not the schedule" in refused.stderr
    # 1,536 tokens are behind it: 1,464 are 3 steps of 512
    more = (*warm, "--data.global_batch_size", 8, "--allow_changes", "[trainer.max_tokens]")
    longer = train(*again, 3000, *more)
    assert longer.returncode == 0 and "learning rate of step 7:" in longer.stderr, longer.stderr
    assert read_complete(checkpoint_folder(tmp_path / "tokens", 9)).meta["tokens"] == 6 * 256 + 3 * 512


def test_print_config_shows_what_was_asked_for() -> None:
    options = ("--config", ROOT / "configs/smoke.yaml", "--run_dir", "x", *IN_TOKENS, 7000)
    # as eval.twins takes a length back for its trials
    for more, length in (((), (-1, 7000)), (("--trainer.max_steps", 5, "--trainer.max_tokens", "null"), (5, None))):
        printed = yaml.safe_load(run_train(*options, *more, "--print_config").stdout)
        assert (printed["trainer"]["max_steps"], printed["trainer"]["max_tokens"]) == length
