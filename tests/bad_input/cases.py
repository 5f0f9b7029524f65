"""The rows of the tables: a command, or a call of a function, that cannot be right."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Place:
    """What the placeholders of a command stand for.

    Attributes:
        corpus: {corpus}, a prepared corpus with a training and a held-out split.
        run: {run}, a run folder of 10 steps with the checkpoints of steps 5 and 10.
        tiny: {tiny}, the configuration it was trained with, on that corpus.
        tmp: {tmp}, an empty folder of the case's own.
    """

    corpus: Path
    run: Path
    tiny: Path
    tmp: Path

    def fill(self, text: str) -> str:
        """Replace {corpus}, {run}, {tiny} and {tmp}; other braces stay."""
        for name in ("corpus", "run", "tiny", "tmp"):
            text = text.replace(f"{{{name}}}", str(getattr(self, name)))
        return text

    def copied(self) -> "Place":
        """With copies of corpus, run and configuration in the folder of the case, to damage."""
        corpus, run, tiny = self.tmp / "corpus", self.tmp / "run", self.tmp / "tiny.yaml"
        shutil.copytree(self.corpus, corpus)
        shutil.copytree(self.run, run)
        tiny.write_text(self.tiny.read_text().replace(str(self.corpus), str(corpus)))
        return Place(corpus, run, tiny, self.tmp)


@dataclass(frozen=True)
class Case:
    """A command that must end with exit code 2 and one error line on stderr, nothing lost and nothing left running.

    Attributes:
        name: what is wrong, in a few words; unique in its area.
        command: what is typed after `python`, with the placeholders of Place.
        parts: of the error line: the value and what was expected, at least; placeholders as in the command.
        damage: called with the case's own copies of corpus and run before the command; the rest are shared.
        notes: how the lines begin that may stand before it, such as "resuming from".
        environment: more environment variables.
        timeout: seconds; a command that takes longer hangs.
    """

    name: str
    command: list[str]
    parts: list[str]
    damage: Callable[[Place], object] | None = None
    notes: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    timeout: float = 200.0


@dataclass(frozen=True)
class Call:
    """A call in the test's own process that must raise a ValueError or TypeError of one line.

    Attributes:
        name: what is wrong, in a few words; unique in its area.
        call: calls the function.
        parts: of the message: the value and what was expected, at least.
        raises: what it must be.
    """

    name: str
    call: Callable[[], object]
    parts: list[str]
    raises: type[Exception] = ValueError


TOO_LONG = "x" * 300  # as a file's name: 255 bytes are the most
