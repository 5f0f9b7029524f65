"""Continues a text with a trained model: python -m eval.generate RUN --prompt TEXT

The text is written as it comes, to standard output; why it ended and how fast it came, to standard error.
"""

from common.interrupts import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()  # the imports take seconds

import codecs
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from jsonargparse import Namespace

from common.command_line import CommandParser
from common.errors import run_command
from data.tokenizer import Tokenizer, load_tokenizer
from eval.common.scoring import Runtime
from eval.common.subjects import Subject, choose_autocast, choose_device
from eval.generation import GenerationOptions, stream
from model.checkpoint import CheckpointInfo, resolve_checkpoint
from model.loading import load_model
from model.policies.bsfa import use_thresholds

# of GenerationOptions: what the command line offers; the rest is the tokenizer's, or for many texts
OFFERED = ["temperature", "top_k", "top_p", "seed", "max_prompt_tokens", "chunk_tokens", "cuda_graphs"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 2 after one "error:" line on stderr, 130 after Ctrl-C."""

    def work(given: list[str]) -> list[str]:
        write_continuation(_parser().parse_args(given))
        return []

    return run_command(work, arguments)


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m eval.generate", description=__doc__, may_be_empty=["prompt"])
    parser.add_argument("run", type=str, help="run folder (newest complete checkpoint), checkpoint or export")
    parser.add_argument("--prompt", type=str, default=None, help="text to continue; may be empty")
    parser.add_argument("--prompt_file", type=str, default=None, help="UTF-8 file with the text to continue")
    parser.add_argument(
        "--tokenizer", type=str, default=None,
        help="the recorded tokenizer, where it has moved: its tokenizer.model or tokenizer.json, or a folder with it",
    )  # fmt: skip
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--precision", choices=["auto", "float32", "bfloat16"], default="auto",
        help="auto is bfloat16 autocast on CUDA for runs trained in bf16, else float32",
    )  # fmt: skip
    parser.add_argument("--thresholds", type=str, default=None, help="file of eval.calibrate: sparse prefill")
    parser.add_argument("--keep_blocks", type=int, default=None, help="which of its ks")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="most tokens of the continuation")
    names = {field.name for field in fields(GenerationOptions)}
    parser.add_class_arguments(GenerationOptions, skip=names - set(OFFERED))
    return parser


def write_continuation(options: Namespace) -> None:
    """Raises ValueError or OSError for a prompt, checkpoint, tokenizer or device that cannot be used."""
    prompt = _prompt(options)
    device = choose_device(options.device)
    found = resolve_checkpoint(options.run)
    autocast = choose_autocast(options.precision, Subject(found.path.name, found), device)
    tokenizer = open_tokenizer(found, options.tokenizer)
    values = {name: options[name] for name in OFFERED}
    chosen = GenerationOptions(options.max_new_tokens, **values, eos=tokenizer.eos_id, vocab_size=tokenizer.vocab_size)
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    loaded = load_model(found.path, device)
    runtime = Runtime(device, autocast, chosen.chunk_tokens)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # holds back the first bytes of a character
    count, started, why = 0, time.monotonic(), None
    with runtime.precision(), use_thresholds(loaded.model, options.thresholds, options.keep_blocks):
        for piece in stream(loaded.model, [ids], chosen):
            text = decoder.decode(b"".join(map(tokenizer.token_bytes, piece.tokens)), final=piece.ended is not None)
            print(text, end="", flush=True)
            count, why = count + len(piece.tokens), piece.ended
    seconds = time.monotonic() - started
    print(flush=True)
    print(f"[{why} after {count} tokens, {len(ids)} prompt tokens, {seconds:.1f} s on {device}]", file=sys.stderr)


def _prompt(options: Namespace) -> str:
    if (options.prompt is None) == (options.prompt_file is None):
        raise ValueError("give the text to continue with either --prompt or --prompt_file")
    if options.prompt is not None:
        return str(options.prompt)
    try:
        return Path(options.prompt_file).read_bytes().decode()  # read_text would change line ends
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt_file {options.prompt_file} is not UTF-8: {error}") from error


def open_tokenizer(checkpoint: CheckpointInfo, path: str | None) -> Tokenizer:
    """The tokenizer that a checkpoint was trained with, from where it says or from `path`.

    Raises:
        FileNotFoundError, ValueError: no tokenizer there, or another one.
    """
    recorded, fingerprint = Path(checkpoint.tokenizer["path"]), checkpoint.tokenizer["fingerprint"]
    if path is None and not recorded.is_file():
        raise FileNotFoundError(
            f"{recorded}, the tokenizer of {checkpoint.path}, does not exist: say where it is with --tokenizer"
        )
    tokenizer = load_tokenizer(path or recorded)
    if tokenizer.fingerprint != fingerprint:
        raise ValueError(
            f"{tokenizer.path} has fingerprint {tokenizer.fingerprint[:12]}, but {checkpoint.path} was trained with "
            f"{fingerprint[:12]}: pass the run's own with --tokenizer"
        )
    return tokenizer


if __name__ == "__main__":
    sys.exit(main())
