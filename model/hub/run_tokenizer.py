"""The tokenizer that a run was trained with."""

from pathlib import Path

from data.tokenizer import Tokenizer, find_tokenizer_file, load_tokenizer
from model.checkpoint import resolve_checkpoint


def find_tokenizer(
    path: Path, *, bos: str | None = None, eos: str | None = None, lossy: bool | None = None
) -> Tokenizer:
    """The tokenizer of a run, checkpoint or prepared corpus, or the file itself. Others as in `load_tokenizer`.

    Raises: FileNotFoundError, ValueError as `load_tokenizer` and, for a run without a copy of its own, as
        `resolve_checkpoint`.
    """
    if path.is_dir():
        try:
            path = find_tokenizer_file(path)
        except FileNotFoundError as no_file:
            try:
                path = Path(resolve_checkpoint(path).tokenizer["path"])
            except FileNotFoundError as no_run:
                raise FileNotFoundError(f"{no_file}, or a run: {no_run}") from no_run
    return load_tokenizer(path, bos=bos, eos=eos, lossy=lossy)
