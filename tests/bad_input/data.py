"""data.prepare, and prepared corpora as the other commands read them."""

from tests.bad_input.cases import Case, Place


def prepare(*options: str, corpus: str = "TextFiles", paths: str = "[{tmp}/texts]") -> list[str]:
    """Prepare the files of {tmp}/texts into {tmp}/out."""
    reader = [f"--corpus=data.corpora.{corpus}", f"--corpus.paths={paths}"]
    return ["-m", "data.prepare", *reader, "--output={tmp}/out", "--workers=1", *options]


def some_texts(place: Place) -> None:
    (place.tmp / "texts").mkdir()
    for number in range(20):
        text = " ".join(f"word{number * step % 97} other{step % 13}" for step in range(200))
        (place.tmp / "texts" / f"{number}.txt").write_text(text)


CASES = [
    Case("no files there", prepare(paths="[{tmp}/none]"), ["{tmp}/none"]),
    Case("heldout_fraction 2", prepare("--heldout_fraction=2"), ["heldout_fraction", "2"], some_texts),
]
