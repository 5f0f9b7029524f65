"""How long a run is and how long it warms up: optimizer steps, of options that give steps or tokens."""

from typing import Any, NamedTuple

from common.checks import check_number
from common.errors import UsageError

MOST_STEPS = 10**9
MOST_TOKENS = 10**18


class Length(NamedTuple):
    """How the length and the warm-up of a run were asked for, as messages name them."""

    run: str
    warmup: str


def check_length(options: Any, no_steps: int, *, needed: bool) -> None:
    """Raises ValueError unless the Trainer's options give a length, in steps or in tokens.

    Args:
        options: of the Trainer, as parsed, with max_tokens.
        no_steps: max_steps where it is left out.
        needed: there must be one.
    """
    steps, tokens = options.max_steps, options.max_tokens
    if tokens is None:
        if needed or steps != no_steps:
            check_number("trainer.max_steps", steps, least=1, most=MOST_STEPS, whole=True)
        return
    _check_tokens("trainer.max_tokens", tokens, least=1)
    if steps != no_steps:
        raise UsageError(
            f"trainer.max_steps is {steps} and trainer.max_tokens {tokens}: expected one of the two; leave one out, or "
            f"take back a file's with --trainer.max_steps {no_steps} or --trainer.max_tokens null"
        )


def _check_tokens(name: str, tokens: Any, least: int) -> None:
    """1e9 is a float, and whole."""
    whole = int(tokens) if isinstance(tokens, float) and tokens.is_integer() else tokens
    check_number(name, whole, least=least, most=MOST_TOKENS, whole=True)


def tokens_to_steps(config: Any, *, step: int, tokens: int, warmup_steps: int | None = None) -> Length:
    """Give a parsed config its max_steps and warmup_steps where it has tokens instead. From there on the run is
    counted in steps, its record too.

    A step takes data.global_batch_size x data.sequence_length tokens, labelled or not.

    Args:
        step, tokens: where the session starts, and what the run has trained on by then, with whatever batch: it counts
            towards max_tokens and warmup_tokens.
        warmup_steps: of the run until then; a warm-up that is over stays what it was.

    Raises:
        ValueError: values that are not whole numbers, or more steps than a run may have.
    """
    a_step = config.data.global_batch_size * config.data.sequence_length
    trainer, optimizer = config.trainer, config.model.optimizer
    run, warmup = f"trainer.max_steps {trainer.max_steps}", f"model.optimizer.warmup_steps is {optimizer.warmup_steps}"
    if trainer.max_tokens is not None:
        left = max(0, int(trainer.max_tokens) - tokens)
        trainer.max_steps = _steps("trainer.max_tokens", trainer.max_tokens, left, a_step, step)
        run = f"trainer.max_tokens {int(trainer.max_tokens)} ({trainer.max_steps} steps)"
        trainer.max_tokens = None
    if optimizer.warmup_tokens is not None:
        name, wanted = "model.optimizer.warmup_tokens", optimizer.warmup_tokens
        _check_tokens(name, wanted, least=0)
        left = int(wanted) - tokens
        if step and left <= 0:
            over = warmup_steps is not None and warmup_steps <= step
            optimizer.warmup_steps = warmup_steps if over else -(-int(wanted) * step // tokens)
        else:
            optimizer.warmup_steps = _steps(name, wanted, left, a_step, step)
        warmup = f"{name} is {int(wanted)} ({optimizer.warmup_steps} steps)"
        optimizer.warmup_tokens = None
    return Length(run, warmup)


def _steps(name: str, tokens: float, left: int, a_step: int, taken: int) -> int:
    """Steps taken, and those that the tokens that are left need: the last one may go beyond them."""
    steps = taken - (-left // a_step)
    if steps > MOST_STEPS:
        raise UsageError(
            f"{name} is {int(tokens):,}, {steps:,} steps of {a_step:,} tokens: expected at most {MOST_STEPS:,} steps"
        )
    return steps


def check_warmup(warmup_steps: int, max_steps: int, length: Length) -> None:
    """Raises UsageError for a warm-up that the run does not outlast: max_steps shapes the schedule, and a cut of a
    longer one is what trainer.max_time and signals make."""
    if warmup_steps > max_steps:
        raise UsageError(
            f"{length.warmup}, longer than {length.run}, so that the learning rate would never reach "
            f"model.optimizer.lr: expected at most {max_steps} steps; to cut a longer run, leave its length and give "
            "--trainer.max_time"
        )
