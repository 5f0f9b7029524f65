"""Makes a run folder of a pretrained model of the Hugging Face hub.

    python -m model.hub.convert HuggingFaceTB/SmolLM2-135M --output runs/smollm2

SOURCE is a name on the hub, a folder with config.json and safetensors, or a GGUF file. OUTPUT gets a checkpoint of step
0 with the same weights, the tokenizer, and network.yaml: the architecture for `--config` of train.py beside
`--init_from OUTPUT`. eval.run and the other commands take OUTPUT as any run.
"""

from common.interrupts import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()  # the imports take seconds

import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.command_line import CommandParser
from common.errors import UsageError, error_line, run_command
from common.new_folder import check_new, written_aside
from data.tokenizer import Tokenizer
from model.checkpoint import NETWORK
from model.checksums import is_finite
from model.config import ModelConfig
from model.hub.architecture import architecture_of
from model.hub.run_folder import write_run
from model.hub.run_tokenizer import find_tokenizer
from model.hub.weights import is_alias, our_name
from model.loading import load_model

INSTALL = "pip install -r requirements-hub.txt"
PROBE_TOKENS = 64
TOLERANCE = 1e-4  # of logits, in their spread: float32's through tens of layers


@dataclass(frozen=True)
class Source:
    """What transformers is asked for. gguf: the file in folder `name`."""

    name: str
    gguf: str | None = None

    @property
    def path(self) -> str:
        """As messages have it."""
        return self.name if self.gguf is None else str(Path(self.name, self.gguf))

    @property
    def options(self) -> dict[str, Any]:
        return {} if self.gguf is None else {"gguf_file": self.gguf}


def convert(
    source: str,
    output: Path,
    tokenizer: str | None = None,
    *,
    bos: str | None = None,
    eos: str | None = None,
    lossy: bool = False,
) -> list[str]:
    """Writes the run folder `output`.

    Args:
        source: as the module says.
        tokenizer: a name or a folder, as source, of the tokenizer; None: source's own.
        bos, eos: texts of its special tokens, where its files do not name them.
        lossy: take a tokenizer that changes texts.

    Returns: lines on what is there now.

    Raises UsageError: source cannot be read, has something that this code has no model for, or its logits are not
    reproduced; output is not new.
    """
    check_new(output, "--output")
    asked = find_source(source)
    if asked.gguf is None and Path(asked.name).is_dir() and output.resolve().is_relative_to(Path(asked.name).resolve()):
        raise UsageError(f"--output {output} is inside {source}: expected a folder elsewhere")
    network = architecture_of(_config(asked))  # before weights are fetched
    theirs = load_source(asked)
    length: int = theirs.config.max_position_embeddings
    with written_aside(output, "--output") as aside:
        with _tokenizer(tokenizer, asked, bos, eos, lossy) as chosen:
            if chosen.vocab_size > network.vocab_size:
                raise UsageError(
                    f"the tokenizer has {chosen.vocab_size} tokens, expected at most the model's {network.vocab_size}: "
                    "choose another with --tokenizer"
                )
            weights = _weights(source, theirs.state_dict(), network)
            folder, n_weights = write_run(aside, output, network, weights, chosen, length=length, source=source)
        error = _largest_error(theirs, folder)
        if not error <= TOLERANCE:
            raise UsageError(
                f"{source} is not reproduced: logits of {PROBE_TOKENS} tokens differ by {error:.1e} of their spread, "
                f"expected {TOLERANCE:.0e}; it computes something that its config.json does not say"
            )
    return [
        f"{output}: {n_weights:,} weights of {source}, {theirs.config.model_type} as {network.attention.kind} with "
        f"{network.positions}, {length:,} tokens of context; logits within {error:.1e} of their spread",
        f"train with it: train.py --config {output / NETWORK} --init_from {output} ...",
    ]


def find_source(name: str) -> Source:
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UsageError(f"{name}: no such file; expected a GGUF file, a folder, or a name on the hub")
        return Source(str(path.parent), path.name)
    if (path / "checkpoints").is_dir():
        raise UsageError(f"{name} is a run of this code already: expected a model of the hub")
    if (path.is_absolute() or name.startswith(".")) and not path.is_dir():
        raise UsageError(f"{name}: no such folder; expected a folder with config.json, or a name on the hub")
    return Source(name)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UsageError(f"converting models needs transformers: {INSTALL}") from error
    import longsplash.hub  # noqa: F401 — exported entmax models have its classes

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


@contextmanager
def _loading(source: Source) -> Iterator[None]:
    """transformers and the readers beneath it raise of all kinds where files are not what they should be."""
    try:
        yield
    except Exception as error:
        raise UsageError(f"{source.name} cannot be loaded by transformers: {error_line(error)[:500]}") from error


def _config(source: Source) -> Any:
    with _loading(source):
        return _transformers().AutoConfig.from_pretrained(source.name, **source.options)


def load_source(source: Source) -> Any:
    """transformers' model, in float32. Raises UsageError for weights that are not the config's."""
    with _loading(source):
        model, found = _transformers().AutoModelForCausalLM.from_pretrained(
            source.name, dtype=torch.float32, output_loading_info=True,
            ignore_mismatched_sizes=True,  # which are refused below
            **source.options,
        )  # fmt: skip
    wrong = {key: sorted(map(str, found[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    for kind, names in wrong.items():
        if names:
            listed = ", ".join(names[:5])
            raise UsageError(f"{source.name} has {kind.replace('_', ' ')}, of {len(names)} the first: {listed}")
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    if model.config.tie_word_embeddings and not torch.equal(head, embedding):
        raise UsageError(
            f"{source.name} has an lm_head.weight that differs from its embedding, but tie_word_embeddings in its "
            "config.json is true: set that to false to keep the head, or remove lm_head.weight"
        )
    return model.eval()


def _weights(source: str, state: Mapping[str, Tensor], network: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """By our names."""
    for name, tensor in state.items():
        if is_alias(name, network):
            continue
        try:
            ours = our_name(name)
        except KeyError as error:
            raise UsageError(
                f"{source} has {name} {tuple(tensor.shape)}, which has no place in our model: it cannot be converted"
            ) from error
        if not is_finite(tensor):
            raise UsageError(f"{source} has {name}, which is not finite: choose another model")
        yield ours, tensor


@contextmanager
def _tokenizer(chosen: str | None, model: Source, bos: str | None, eos: str | None, lossy: bool) -> Iterator[Tokenizer]:
    """chosen: a file, a folder, a run or a source; None for that of the model: its own tokenizer.json, else what
    transformers makes of its tokenizer."""
    options: dict[str, Any] = {"bos": bos, "eos": eos, "lossy": lossy or None}
    if chosen is not None and Path(chosen).exists() and not chosen.endswith(".gguf"):
        yield _opened(chosen, {}, options)
        return
    source = model if chosen is None else find_source(chosen)
    with tempfile.TemporaryDirectory() as folder:
        own = [] if source.gguf else [_cached(source, name) for name in ("tokenizer.json", "tokenizer_config.json")]
        if own and own[0] is not None:
            for path in filter(None, own):
                shutil.copyfile(path, Path(folder, path.name))
            shown = {folder: source.name}
        else:
            try:
                _transformers().AutoTokenizer.from_pretrained(source.name, **source.options).save_pretrained(folder)
            except Exception as error:  # as in _loading
                reason = error_line(error).split(". ")[0][:200]
                raise UsageError(
                    f"{source.path} has no tokenizer that transformers loads ({reason}): choose one with --tokenizer"
                ) from error
            # the source has no such files
            shown = {f"{folder}/{name}": source.path for name in ("tokenizer.json", "tokenizer_config.json")}
        yield _opened(folder, shown, options)


def _opened(path: str, shown: Mapping[str, str], options: dict[str, Any]) -> Tokenizer:
    """shown: what paths are in messages, where options have the names of this command, not of data.prepare."""
    try:
        return find_tokenizer(Path(path), **options)
    except (ValueError, FileNotFoundError) as error:
        line = error_line(error)
        for ours, theirs in shown.items():
            line = line.replace(ours, theirs)
        line = line.replace("tokenizer.lossy: true where the corpus is prepared", "--lossy")
        for name in ("bos", "eos"):
            line = line.replace(f"tokenizer.{name}", f"--{name}")
        raise UsageError(line) from error


def _cached(source: Source, name: str) -> Path | None:
    from transformers.utils import cached_file

    found = cached_file(source.name, name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


@torch.no_grad()
def _largest_error(theirs: Any, checkpoint: Path) -> float:
    """Largest difference of logits on drawn tokens, in units of their standard deviation."""
    loaded = load_model(checkpoint)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(loaded.config.vocab_size, (1, PROBE_TOKENS), generator=generator)
    expected = theirs(input_ids=tokens, use_cache=False).logits.float()
    ours = loaded.model.logits(loaded.model(tokens)).float()
    difference = (ours - expected).abs().max()
    return 0.0 if difference == 0 else float(difference / expected.std())


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one "error:" line on stderr."""

    def work(given: list[str]) -> list[str]:
        options = _parser().parse_args(given)
        return convert(
            options.source, Path(options.output), options.tokenizer,
            bos=options.bos, eos=options.eos, lossy=options.lossy,
        )  # fmt: skip

    return run_command(work, arguments, stopped="stopped by Ctrl-C: nothing is written")


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m model.hub.convert", description=__doc__)
    parser.add_argument("source", type=str, help="a name on the hub, a folder, or a GGUF file")
    parser.add_argument("--output", type=str, required=True, help="a new run folder")
    parser.add_argument("--tokenizer", type=str, default=None, help="file, folder, run or name; default: the source's")
    parser.add_argument("--bos", type=str, default=None, help="text of the token before a document")
    parser.add_argument("--eos", type=str, default=None, help="text of the token behind a document")
    parser.add_argument("--lossy", action="store_true", help="take a tokenizer that changes texts")
    return parser


if __name__ == "__main__":
    sys.exit(main())
